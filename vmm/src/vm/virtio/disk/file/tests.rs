//! The device with a driver's side and a file.

#![allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::*;
use crate::base::testing::as_root;
use crate::vm::virtio::testing::{DriverQueue, Loop, memory};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

struct Guest {
    device: Arc<Mutex<FileDisk>>,
    events: Loop,
    queue: DriverQueue,
    folder: tempfile::TempDir,
}

fn image(size: usize) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    let bytes: Vec<u8> = (0..size).map(|i| (i / 512) as u8).collect();
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// A range to discard or to fill with zeroes.
fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// What a disk says, to nobody.
fn nobody() -> Outbox {
    Arc::new(|_| ())
}

/// What a disk says.
fn heard() -> (Outbox, Arc<Mutex<Vec<FromVm>>>) {
    let said = Arc::new(Mutex::new(Vec::new()));
    let to = Arc::clone(&said);
    (Arc::new(move |message| to.lock().unwrap().push(message)), said)
}

fn messenger(outbox: Outbox) -> Messenger {
    Messenger { device: DeviceId::block(0), path: "disk.img".into(), outbox, limit: LogLimit::default() }
}

impl Guest {
    fn new(read_only: bool) -> Self {
        let (folder, path) = image(64 * 512);
        Self::with(
            FileDisk::new(&Disk { path, read_only, on_full: OnFull::Error }, 3, nobody()).unwrap(),
            folder,
            1,
            256,
        )
    }

    /// A guest with memory for `queues` queues, of which one is used.
    fn with(block: FileDisk, folder: tempfile::TempDir, queues: u64, size: u16) -> Self {
        let device = Arc::new(Mutex::new(block));
        let events = Loop::new(&device);
        let queue = DriverQueue::new(&memory(queues), 0, size);
        device.lock().unwrap().start_queue(0, queue.resources(), None).unwrap();
        Self { device, events, queue, folder }
    }

    /// Runs the event loop until `count` more requests are answered.
    fn answered(&mut self, count: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        self.events.run_until(|| {
            used.extend(self.queue.used());
            used.len() >= count
        });
        used
    }

    /// One request; its status and the data that came.
    fn request(&mut self, readable: &[&[u8]], writable: &[u32]) -> (u8, Vec<u8>) {
        let head = self.queue.add(readable, writable);
        self.queue.kick();
        let used = self.answered(1);
        assert_eq!((used.len(), used[0].0), (1, head));
        let parts: Vec<u8> = (head + readable.len() as u16..)
            .zip(writable)
            .flat_map(|(index, &length)| self.queue.buffer(index, length))
            .collect();
        let (status, data) = parts.split_last().unwrap();
        (*status, data[..used[0].1 as usize - 1].to_vec())
    }
}

#[test]
fn what_is_written_is_read_again() {
    let mut guest = Guest::new(false);
    let data: Vec<u8> = (0..1024).map(|i| (i % 249) as u8).collect();
    let (first, second) = data.split_at(700);
    assert_eq!(guest.request(&[&header(OUT, 5), first, second], &[1]), (0, vec![]));
    assert_eq!(guest.request(&[&header(FLUSH, 0)], &[1]), (0, vec![]));
    assert_eq!(guest.request(&[&header(IN, 5)], &[1000, 25]), (0, data.clone()));
    let file = std::fs::read(guest.folder.path().join("disk.img")).unwrap();
    assert_eq!(file[5 * 512..7 * 512], data);
    assert_eq!((file.len(), file[7 * 512]), (64 * 512, 7));
}

#[test]
fn header_may_come_in_pieces_and_share_a_descriptor_with_data() {
    let mut guest = Guest::new(false);
    let head = header(OUT, 1);
    let mut tail = head[10..].to_vec();
    tail.extend([0xEE; 512]);
    assert_eq!(guest.request(&[&head[..10], &tail], &[1]).0, 0);
    assert_eq!(guest.request(&[&header(IN, 1)], &[512, 1]), (0, vec![0xEE; 512]));
}

#[test]
fn requests_outside_of_the_disk_fail_and_change_nothing() {
    let mut guest = Guest::new(false);
    assert_eq!(guest.request(&[&header(OUT, 64), &[1; 512]], &[1]).0, 1);
    assert_eq!(guest.request(&[&header(IN, 63)], &[1024, 1]).0, 1);
    assert_eq!(guest.request(&[&header(OUT, 0), &[1; 100]], &[1]).0, 1);
    assert_eq!(guest.request(&[&[1, 2, 3]], &[1]).0, 1, "no header");
    assert_eq!(guest.request(&[&header(99, 0)], &[1]).0, 2);
    let file = std::fs::read(guest.folder.path().join("disk.img")).unwrap();
    assert_eq!(file.len(), 64 * 512);
    assert!(file.iter().zip(0..).all(|(&byte, i)| usize::from(byte) == i / 512));
}

#[test]
fn identifier_and_configuration() {
    let mut guest = Guest::new(false);
    assert_eq!(guest.request(&[&header(GET_ID, 0)], &[20, 1]), (0, b"umbra-disk3\0\0\0\0\0\0\0\0\0".to_vec()));
    let mut config = [0; 28];
    guest.device.lock().unwrap().config_read(0, &mut config);
    assert_eq!(config[..8], 64u64.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    let block = std::fs::metadata(guest.folder.path().join("disk.img")).unwrap().blksize();
    assert_eq!(512 << config[24], block, "the physical block is the file system's");
}

#[test]
fn zeroes_and_discards_reach_the_file_and_nothing_beside_them() {
    let mut guest = Guest::new(false);
    let zeroes = [segment(4, 2, 0), segment(9, 1, 1)].concat();
    assert_eq!(guest.request(&[&header(ZEROES, 0), &zeroes], &[1]), (0, vec![]));
    // Advice, which a file system may refuse.
    let (status, _) = guest.request(&[&header(DISCARD, 0), &segment(32, 8, 0)], &[1]);
    assert!([0, 2].contains(&status), "{status}");
    let file = std::fs::read(guest.folder.path().join("disk.img")).unwrap();
    let sector = |n: usize| &file[n * 512..(n + 1) * 512];
    for n in 0..64 {
        let discarded = (32..40).contains(&n) && sector(n) == [0; 512];
        let wanted = if [4, 5, 9].contains(&n) || discarded { 0 } else { n as u8 };
        assert_eq!(sector(n), [wanted; 512], "sector {n}");
    }
    assert_eq!(guest.request(&[&header(ZEROES, 0), &segment(63, 2, 0)], &[1]).0, 1);
    assert_eq!(file.len(), 64 * 512);
}

#[test]
fn read_only_disk_refuses_writes() {
    let mut guest = Guest::new(true);
    assert_ne!(guest.device.lock().unwrap().features() & offer::F_RO, 0);
    assert_eq!(guest.request(&[&header(OUT, 0), &[9; 512]], &[1]).0, 1);
    assert_eq!(guest.request(&[&header(IN, 2)], &[512, 1]), (0, vec![2; 512]));
    assert_eq!(guest.request(&[&header(FLUSH, 0)], &[1]).0, 0);
}

#[test]
fn file_that_shrank_is_an_io_error() {
    let mut guest = Guest::new(false);
    std::fs::File::options().write(true).open(guest.folder.path().join("disk.img")).unwrap().set_len(512).unwrap();
    assert_eq!(guest.request(&[&header(IN, 10)], &[512, 1]).0, 1);
    assert_eq!(guest.request(&[&header(IN, 0)], &[512, 1]).0, 0);
}

#[test]
fn more_requests_than_a_turn_allows_are_all_served() {
    let mut guest = Guest::new(false);
    for _ in 0..80 {
        guest.queue.add(&[&header(IN, 0)], &[512, 1]);
    }
    guest.queue.kick();
    assert_eq!(guest.answered(80).len(), 80);
}

#[test]
fn a_large_request_goes_in_parts_and_comes_whole() {
    const LENGTH: u32 = 4 * serve::PART as u32 + 512;
    let (folder, path) = image(512);
    std::fs::File::options().write(true).open(&path).unwrap().set_len(6 << 20).unwrap();
    let block =
        FileDisk::new(&Disk { path: path.clone(), read_only: false, on_full: OnFull::Error }, 0, nobody()).unwrap();
    let mut guest = Guest::with(block, folder, 10, 16);
    let data: Vec<u8> = (0..LENGTH).map(|i| (i % 251) as u8).collect();
    let write = guest.queue.add(&[&header(OUT, 1), &data[..9], &data[9..]], &[1]);
    guest.queue.kick();
    assert_eq!(guest.answered(1), [(write, 1)]);
    assert_eq!(std::fs::read(&path).unwrap()[512..512 + LENGTH as usize], data);
    let read = guest.queue.add(&[&header(IN, 1)], &[77, LENGTH - 77 + 1]);
    guest.queue.kick();
    assert_eq!(guest.answered(1), [(read, LENGTH + 1)]);
    let got = [guest.queue.buffer(read + 1, 77), guest.queue.buffer(read + 2, LENGTH - 77 + 1)].concat();
    assert_eq!((&got[..LENGTH as usize], got[LENGTH as usize]), (&data[..], 0));
}

#[test]
fn two_writers_are_refused_and_readers_may_share() {
    let (_folder, path) = image(512);
    let disk = |read_only| Disk { path: path.clone(), read_only, on_full: OnFull::Error };
    let writer = FileDisk::new(&disk(false), 0, nobody()).unwrap();
    for read_only in [false, true] {
        let error = FileDisk::new(&disk(read_only), 0, nobody()).err().unwrap().to_string();
        assert!(error.contains("disk.img: in use by another process"), "{error}");
    }
    drop(writer);
    let _first = FileDisk::new(&disk(true), 0, nobody()).unwrap();
    let _second = FileDisk::new(&disk(true), 0, nobody()).unwrap();
    assert!(FileDisk::new(&disk(false), 0, nobody()).is_err());
}

#[test]
fn a_disk_grows_with_its_file_and_never_shrinks() {
    let (_folder, path) = image(64 * 512);
    let disk = |read_only| Disk { path: path.clone(), read_only, on_full: OnFull::Error };
    let image = image::Image::open(&disk(false)).unwrap();
    assert_eq!(image.resize(Some(128 * 512)), Ok(128 * 512));
    assert_eq!((std::fs::metadata(&path).unwrap().len(), image.offer().sectors), (128 * 512, 128));
    assert_eq!(image.resize(None), Ok(128 * 512));
    assert!(image.resize(Some(64 * 512)).unwrap_err().contains("cannot be made smaller"));
    assert!(image.resize(Some(200 * 512 + 1)).unwrap_err().contains("no whole blocks"));
    // By another program: a rest is left out.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(256 * 512 + 100).unwrap();
    assert_eq!(image.resize(None), Ok(256 * 512));
    std::fs::File::options().write(true).open(&path).unwrap().set_len(512).unwrap();
    assert!(image.resize(None).unwrap_err().contains("has 131072 bytes"), "the guest still sees it as it was");
    drop(image);
    let image = image::Image::open(&disk(true)).unwrap();
    assert!(image.resize(Some(1024)).unwrap_err().contains("make that larger first"));
}

/// A block device of the host whose bytes are in a file.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn on(file: &std::path::Path) -> Self {
        let made = losetup(&["--find", "--show", file.to_str().unwrap()]);
        Self(made.trim().into())
    }

    /// Makes it as large as its file is by now.
    fn measure(&self) {
        losetup(&["--set-capacity", self.0.to_str().unwrap()]);
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        losetup(&["--detach", self.0.to_str().unwrap()]);
    }
}

fn losetup(words: &[&str]) -> String {
    let output = std::process::Command::new("losetup").args(words).output().unwrap();
    assert!(output.status.success(), "losetup {words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_block_device_that_became_smaller_fails_what_is_behind_its_end_and_does_not_wait_for_room() {
    as_root(|| {
        let (folder, path) = image(64 * 512);
        let device = LoopDevice::on(&path);
        let (outbox, said) = heard();
        let disk = Disk { path: device.0.clone(), read_only: false, on_full: OnFull::Pause };
        let mut guest = Guest::with(FileDisk::new(&disk, 0, outbox).unwrap(), folder, 1, 256);
        assert_eq!(guest.request(&[&header(OUT, 63), &[7; 512]], &[1]).0, 0);
        std::fs::File::options().write(true).open(&path).unwrap().set_len(32 * 512).unwrap();
        device.measure();
        assert_eq!(guest.request(&[&header(OUT, 63), &[7; 512]], &[1]).0, 1);
        assert_eq!(guest.request(&[&header(IN, 63)], &[512, 1]).0, 1);
        for unmap in [0, 1] {
            assert_eq!(guest.request(&[&header(ZEROES, 0), &segment(24, 16, unmap)], &[1]).0, 1);
        }
        assert_eq!(guest.request(&[&header(OUT, 31), &[7; 512]], &[1]).0, 0, "what is there is served");
        let said = said.lock().unwrap();
        let is_why = |news: &str| news.contains("has become smaller under the guest, and has 16384 bytes");
        assert!(said.iter().all(|said| matches!(said, FromVm::Disk { news, .. } if is_why(news))), "{said:?}");
        assert_eq!(said.len(), 4);
    });
}

#[test]
fn a_file_that_became_smaller_fails_reads_behind_its_end_and_is_made_as_large_again_by_writes() {
    let (folder, path) = image(64 * 512);
    let disk = Disk { path: path.clone(), read_only: false, on_full: OnFull::Pause };
    let mut guest = Guest::with(FileDisk::new(&disk, 0, nobody()).unwrap(), folder, 1, 256);
    std::fs::File::options().write(true).open(&path).unwrap().set_len(32 * 512).unwrap();
    assert_eq!(guest.request(&[&header(IN, 63)], &[512, 1]).0, 1);
    assert_eq!(guest.request(&[&header(ZEROES, 0), &segment(24, 16, 0)], &[1]).0, 1);
    assert_eq!(guest.request(&[&header(OUT, 63), &[7; 512]], &[1]).0, 0);
    assert_eq!(guest.request(&[&header(IN, 63)], &[512, 1]), (0, vec![7; 512]));
}

#[test]
fn what_is_no_disk_is_refused_with_advice() {
    let (folder, path) = image(512);
    let refused = |path: PathBuf| {
        let error = FileDisk::new(&Disk { path, read_only: true, on_full: OnFull::Error }, 0, nobody()).err().unwrap();
        format!("{error}")
    };
    assert!(refused(folder.path().join("missing")).contains("missing: open it for reading"));
    assert!(refused(folder.path().into()).contains("neither a file nor a block device"));
    let _socket = UnixListener::bind(folder.path().join("socket")).unwrap();
    assert!(refused(folder.path().join("socket")).contains("open it"));
    std::fs::write(&path, b"QFI\xFB and more").unwrap();
    assert!(refused(path.clone()).contains("qcow2 image; make a raw one"));
    let mut fixed_vhd = vec![0; 1024];
    fixed_vhd[512..520].copy_from_slice(b"conectix");
    std::fs::write(&path, fixed_vhd).unwrap();
    assert!(refused(path.clone()).contains("VHD image; make a raw one"));
    std::fs::write(&path, b"").unwrap();
    assert!(refused(path).contains("truncate -s"));
}

#[test]
fn bad_ring_asks_for_a_reset() {
    let mut guest = Guest::new(false);
    guest.queue.break_ring();
    guest.queue.kick();
    guest.events.run();
    let mut device = guest.device.lock().unwrap();
    assert!(device.needs_reset());
    assert!(device.stop_queue(0).is_some());
    device.reset();
    assert!(!device.needs_reset());
}

mod slow;

#[test]
fn a_file_that_somebody_makes_larger_is_reported_until_it_is_measured() {
    let (folder, path) = image(64 * 512);
    let (outbox, said) = heard();
    let disk = FileDisk::new(&Disk { path: path.clone(), read_only: false, on_full: OnFull::Error }, 0, outbox);
    let mut guest = Guest::with(disk.unwrap(), folder, 1, 256);
    let length = |bytes| std::fs::File::options().write(true).open(&path).unwrap().set_len(bytes).unwrap();
    // The size that was measured, or that it has grown.
    let next = |guest: &mut Guest| {
        guest.events.run_until(|| !said.lock().unwrap().is_empty());
        match said.lock().unwrap().remove(0) {
            FromVm::Grown { .. } => None,
            FromVm::Resized { result, .. } => Some(result.unwrap()),
            other => panic!("{other:?}"),
        }
    };
    // Part of a sector is none that the guest could see.
    length(80 * 512 + 100);
    for _ in 0..2 {
        assert_eq!(next(&mut guest), None);
    }
    guest.device.lock().unwrap().resize(None);
    let measured = std::iter::from_fn(|| Some(next(&mut guest))).flatten().next();
    assert_eq!(measured, Some(80 * 512));
    said.lock().unwrap().clear();
    // What is smaller is left as it is, and so is what the guest has seen; a request finds the thread at work.
    length(70 * 512);
    assert_eq!(guest.request(&[&header(FLUSH, 0)], &[1]).0, 0);
    length(81 * 512);
    assert_eq!(next(&mut guest), None);
}
