//! The device with a driver's side, and a driver VM whose console and agent are the real ones but for the disk: that is in memory, with
//! a cache that is lost on command.

#![allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use umbra_shadow::block::{Identity, Window, WriteCache};

use super::*;
use crate::vm::virtio::testing::{DriverQueue, Loop, memory};

mod driver_vm;
mod lives;

use driver_vm::DriverVm;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

/// Sectors of the guest's disk, which begins at sector [`START`] of the driver VM's.
const SECTORS: u64 = 8192;
const START: u64 = 8;
/// Memory of the guest, where its two queues are in it, and where they are after a reset; the first has room for large requests.
const MEMORY: u64 = 16;
const PLACES: [u64; 2] = [0, 12];
const NEXT_PLACES: [u64; 2] = [13, 14];
/// Number of the guest's disk.
const INDEX: u16 = 1;

fn disk() -> Disk {
    let window = Window { start: START, sectors: SECTORS };
    let serial = "QEMU NVMe Ctrl_deadbeef".into();
    let identity = Identity { serial, sectors: START + SECTORS, logical_block: 512, read_only: false, window };
    let cache = WriteCache::Volatile;
    Disk { identity, cache, physical_block: 4096, optimal_io: 0, discards: true, rotational: false }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// A guest with two queues, and the driver VM of the moment.
struct Bench {
    device: Arc<Mutex<SplitDisk>>,
    events: Loop,
    queues: [DriverQueue; 2],
    said: Receiver<FromVm>,
    config_call: EventFd,
    vm: Option<DriverVm>,
}

/// A disk of which nobody hears.
pub fn without_a_driver_vm() -> SplitDisk {
    with_outbox(Arc::new(|_| {}))
}

fn with_outbox(outbox: Outbox) -> SplitDisk {
    let settings = Settings {
        disk: disk(),
        cache: CachePolicy::Auto,
        driver_memory: MemorySize(64 << 20),
        io_timeout: Duration::from_secs(10),
        queues: 2,
    };
    SplitDisk::new(INDEX, &settings, outbox).unwrap()
}

impl Bench {
    fn new() -> Self {
        Self::accepting(u64::MAX)
    }

    /// With a driver that accepts these of the features that are offered.
    fn accepting(features: u64) -> Self {
        let (sender, said) = channel();
        let outbox: Outbox = Arc::new(move |message| sender.send(message).unwrap_or(()));
        let mut device = with_outbox(outbox);
        device.set_features(device.features() & features);
        let config_call = EventFd::new(EFD_NONBLOCK).unwrap();
        device.set_config_interrupt(config_call.try_clone().unwrap());
        let device = Arc::new(Mutex::new(device));
        let events = Loop::new(&device);
        let memory = memory(MEMORY);
        let queues = PLACES.map(|place| DriverQueue::new(&memory, place, 256));
        let bench = Self { device, events, queues, said, config_call, vm: None };
        bench.start_queues();
        bench
    }

    fn start_queues(&self) {
        for (index, queue) in (0..).zip(&self.queues) {
            self.lock().start_queue(index, queue.resources(), None).unwrap();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, SplitDisk> {
        self.device.lock().unwrap()
    }

    /// Connects a driver VM with what `medium` holds, and waits until it serves.
    fn live(&mut self, link: LinkId, medium: Vec<u8>) {
        self.attach(link, medium);
        self.until("the driver VM", |bench| {
            bench.said.try_iter().find_map(|message| match message {
                FromVm::Live { generation, outage: OutageCounts::Block(_), .. } => {
                    (generation == link.generation).then_some(())
                }
                other => panic!("{other:?}"),
            })
        });
    }

    fn attach(&mut self, link: LinkId, medium: Vec<u8>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.lock().attach(link, ours);
        self.vm = Some(DriverVm::new(link, theirs, medium));
    }

    /// The driver VM lives on, and its connection is made again.
    fn reconnect(&mut self, link: LinkId) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.lock().attach(link, ours);
        self.vm.as_mut().unwrap().connect(link, theirs);
    }

    /// The driver VM dies; what its disk held, with its cache or without.
    fn kill(&mut self, keep_cache: bool) -> Vec<u8> {
        let medium = self.vm.take().unwrap().end(keep_cache);
        let cause = self.until("the loss", |bench| {
            bench.said.try_iter().find_map(|message| match message {
                FromVm::Lost { cause, .. } => Some(cause),
                _ => None,
            })
        });
        assert_eq!(cause, LinkEnd::Closed);
        medium
    }

    /// A turn of all event loops and of the driver VM's agent.
    fn turn(&mut self) {
        self.events.run();
        if let Some(vm) = &mut self.vm {
            vm.turn();
        }
    }

    /// Turns until `done` has an answer.
    fn until<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            self.turn();
            if let Some(answer) = done(self) {
                return answer;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "waited in vain for {what}");
        }
    }

    /// A message of the device that `wanted` recognises.
    fn wait<T>(&mut self, wanted: impl Fn(FromVm) -> Option<T>) -> T {
        self.until("a message", |bench| bench.said.try_iter().find_map(&wanted))
    }

    /// Puts a request into queue 0; its head.
    fn add(&mut self, readable: &[&[u8]], writable: &[u32]) -> u16 {
        let head = self.queues[0].add(readable, writable);
        self.queues[0].kick();
        head
    }

    /// Turns until `count` requests of queue 0 are answered.
    fn answered(&mut self, count: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        self.until("the guest's requests", |bench| {
            used.extend(bench.queues[0].used());
            (used.len() >= count).then_some(())
        });
        used
    }

    /// One request; its status and the data that came.
    fn request(&mut self, readable: &[&[u8]], writable: &[u32]) -> (u8, Vec<u8>) {
        let head = self.add(readable, writable);
        let used = self.answered(1);
        assert_eq!((used.len(), used[0].0), (1, head));
        let parts: Vec<u8> = (head + readable.len() as u16..)
            .zip(writable)
            .flat_map(|(index, &length)| self.queues[0].buffer(index, length))
            .collect();
        let (status, data) = parts.split_last().unwrap();
        (*status, data[..used[0].1 as usize - 1].to_vec())
    }

    fn write(&mut self, sector: u64, byte: u8, sectors: usize) {
        assert_eq!(self.request(&[&header(OUT, sector), &vec![byte; 512 * sectors]], &[1]), (0, vec![]));
    }

    fn flush(&mut self) {
        assert_eq!(self.request(&[&header(FLUSH, 0)], &[1]), (0, vec![]));
    }

    fn read(&mut self, sector: u64, sectors: usize) -> Vec<u8> {
        let (status, data) = self.request(&[&header(IN, sector)], &[512 * sectors as u32, 1]);
        assert_eq!(status, 0);
        data
    }

    fn mode(&self) -> ModeName {
        let FromVm::Status { device, status: DeviceStatus::Block { mode, .. } } = self.lock().status() else {
            panic!("no status")
        };
        assert_eq!(device, DeviceId::block(INDEX));
        mode
    }
}

/// A disk full of zeroes.
fn empty() -> Vec<u8> {
    vec![0; 512 * (START + SECTORS) as usize]
}

fn first() -> LinkId {
    LinkId::first(Generation::FIRST)
}

fn second() -> LinkId {
    LinkId::first(Generation::FIRST.next())
}

fn bytes_at(medium: &[u8], sector: u64, sectors: usize) -> &[u8] {
    let at = 512 * (START + sector) as usize;
    &medium[at..at + 512 * sectors]
}

#[test]
fn a_disk_of_a_driver_vm_is_read_written_and_flushed() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    assert_eq!(bench.mode(), ModeName::Passive);
    let data: Vec<u8> = (0..2048u32).map(|i| (i % 251) as u8).collect();
    let (one, two) = data.split_at(900);
    assert_eq!(bench.request(&[&header(OUT, 5), one, two], &[1]), (0, vec![]));
    assert_eq!(bench.request(&[&header(IN, 5)], &[1000, 1000, 49]), (0, data.clone()));
    bench.flush();
    let medium = bench.kill(false);
    assert_eq!(bytes_at(&medium, 5, 4), data, "in the guest's part of the disk, and stable");
    assert!(medium[..512 * START as usize].iter().all(|byte| *byte == 0));
}

#[test]
fn the_guest_sees_the_disk_that_was_reported() {
    let mut bench = Bench::new();
    assert_eq!(bench.request(&[&header(GET_ID, 0)], &[20, 1]), (0, b"U NVMe Ctrl_deadbeef".to_vec()), "without a life");
    let device = bench.lock();
    let mut config = [0; 36];
    device.config_read(0, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!((config[20], config[21], config[24], config[25], config[34]), (0, 2, 3, 0, 2));
    assert_eq!(device.queue_sizes(), [256, 256]);
}

#[test]
fn requests_that_the_disk_does_not_take_are_answered_without_it() {
    let mut bench = Bench::new();
    assert_eq!(bench.request(&[&header(OUT, SECTORS), &[1; 512]], &[1]).0, 1);
    assert_eq!(bench.request(&[&header(IN, 0)], &[100, 1]).0, 1);
    assert_eq!(bench.request(&[&[1, 2, 3]], &[1]).0, 1, "no header");
    assert_eq!(bench.request(&[&header(99, 0)], &[1]).0, 2);
    assert_eq!(bench.request(&[&header(DISCARD, 0), &segment(0, 8, 1)], &[1]).0, 2);
    let silent = bench.add(&[&header(IN, 0)], &[]);
    assert_eq!(bench.answered(1), [(silent, 0)], "no room for a status");
}

#[test]
fn requests_wait_for_a_driver_vm_and_what_was_acknowledged_outlives_its_cache() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    bench.write(0, 1, 8);
    bench.flush();
    bench.write(4, 2, 8);
    bench.write(100, 3, 1);
    let medium = bench.kill(false);
    assert_eq!(bytes_at(&medium, 4, 8)[2048], 0, "the cache is gone");
    assert_eq!(bench.mode(), ModeName::Masking);
    // Meanwhile the guest waits, and sees nothing but time.
    let read = bench.add(&[&header(IN, 0)], &[12 * 512, 1]);
    bench.turn();
    assert_eq!(bench.queues[0].used(), []);
    bench.live(second(), medium);
    assert_eq!(bench.answered(1), [(read, 12 * 512 + 1)]);
    let wanted = [vec![1; 4 * 512], vec![2; 8 * 512]].concat();
    assert_eq!(bench.queues[0].buffer(read + 1, 12 * 512), wanted);
    assert_eq!(bench.read(100, 1), [3; 512]);
    bench.flush();
    let medium = bench.kill(false);
    assert_eq!((bytes_at(&medium, 0, 12), bytes_at(&medium, 100, 1)), (&wanted[..], &[3; 512][..]));
}

#[test]
fn a_guest_that_ends_leaves_nothing_unwritten_where_a_driver_vm_comes() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    bench.write(0, 1, 8);
    let medium = bench.kill(false);
    assert!(bench.lock().keeps());
    bench.lock().finish();
    bench.attach(second(), medium);
    bench.vm.as_mut().unwrap().hold(true);
    bench.until("the replay", |bench| (bench.vm.as_ref().unwrap().held() > 0).then_some(()));
    assert!(bench.lock().keeps(), "the disk is live, and what was acknowledged is not on it yet");
    bench.vm.as_mut().unwrap().hold(false);
    bench.until("its end", |bench| (!bench.lock().keeps()).then_some(()));
    let medium = bench.kill(false);
    assert_eq!(bytes_at(&medium, 0, 8), [1; 8 * 512]);
    let mut bench = Bench::new();
    bench.live(first(), empty());
    bench.write(0, 1, 8);
    bench.lock().quarantine();
    assert!(!bench.lock().keeps(), "nobody comes");
}

#[test]
fn what_a_guest_was_told_is_stable_before_its_process_ends_though_the_driver_vm_dies_meanwhile() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    bench.write(0, 1, 8);
    assert!(bench.lock().keeps(), "no flush has made it stable");
    bench.vm.as_mut().unwrap().hold(true);
    bench.add(&[&header(IN, 0)], &[512, 1]);
    bench.until("the read", |bench| (bench.vm.as_ref().unwrap().held() > 0).then_some(()));
    // A queue that does not run any more holds nobody up.
    assert!(bench.lock().stop_queue(0).is_some());
    bench.lock().finish();
    bench.until("the flush", |bench| (bench.vm.as_ref().unwrap().held() > 1).then_some(()));
    let medium = bench.kill(false);
    assert_eq!(bytes_at(&medium, 0, 8), [0; 8 * 512], "the cache is gone");
    assert!(bench.lock().keeps());
    bench.live(second(), medium);
    bench.until("its end", |bench| (!bench.lock().keeps()).then_some(()));
    let medium = bench.kill(false);
    assert_eq!(bytes_at(&medium, 0, 8), [1; 8 * 512]);
}

#[test]
fn a_request_in_flight_at_a_death_is_done_by_the_next_driver_vm() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    bench.vm.as_mut().unwrap().hold(true);
    let write = bench.add(&[&header(OUT, 9), &[7; 1024]], &[1]);
    bench.until("the order", |bench| (bench.vm.as_ref().unwrap().held() > 0).then_some(()));
    let medium = bench.kill(true);
    assert_eq!(bench.queues[0].used(), []);
    bench.live(second(), medium);
    assert_eq!(bench.answered(1), [(write, 1)]);
    assert_eq!(bench.read(9, 2), [7; 1024]);
}

#[test]
fn a_connection_that_is_made_again_brings_what_the_one_before_had_in_flight() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    bench.write(20, 5, 1);
    bench.vm.as_mut().unwrap().hold(true);
    let write = bench.add(&[&header(OUT, 9), &[7; 1024]], &[1]);
    let read = bench.add(&[&header(IN, 20)], &[512, 1]);
    bench.until("both orders", |bench| (bench.vm.as_ref().unwrap().held() == 2).then_some(()));
    // One answer is on its way in the driver VM's kernel, and is skipped.
    bench.vm.as_mut().unwrap().answer_unheard();
    bench.reconnect(first().next());
    bench.vm.as_mut().unwrap().hold(false);
    let mut answered = bench.answered(2);
    answered.sort_unstable();
    assert_eq!(answered, [(write, 1), (read, 513)]);
    assert_eq!((bench.queues[0].buffer(read + 1, 512), bench.read(9, 2)), (vec![5; 512], vec![7; 1024]));
    assert_eq!(bench.mode(), ModeName::Passive);
}

#[test]
fn a_large_request_goes_in_parts_and_comes_whole_over_a_death() {
    const LENGTH: usize = (2 << 20) + 4608;
    let mut bench = Bench::new();
    let data: Vec<u8> = (0..LENGTH).map(|i| (i % 253) as u8).collect();
    bench.live(first(), empty());
    let write = bench.add(&[&header(OUT, 3), &data[..700], &data[700..]], &[1]);
    assert_eq!(bench.answered(1), [(write, 1)]);
    let medium = bench.kill(false);
    let read = bench.add(&[&header(IN, 3)], &[1000, LENGTH as u32 - 1000 + 1]);
    bench.live(second(), medium);
    assert_eq!(bench.answered(1), [(read, LENGTH as u32 + 1)]);
    let queue = &bench.queues[0];
    let got = [queue.buffer(read + 1, 1000), queue.buffer(read + 2, LENGTH as u32 - 1000 + 1)].concat();
    assert!(got[..LENGTH] == data && got[LENGTH] == 0);
}

#[test]
fn a_driver_that_does_not_flush_gets_its_writes_acknowledged_when_they_are_stable() {
    let mut bench = Bench::accepting(!F_FLUSH);
    bench.live(first(), empty());
    bench.write(7, 4, 1);
    let medium = bench.kill(false);
    assert_eq!(bytes_at(&medium, 7, 1), [4; 512]);
}

#[test]
fn zeroes_and_several_ranges_are_answered_when_all_are_done() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    bench.write(0, 5, 32);
    bench.vm.as_mut().unwrap().hold(true);
    let ranges = [segment(0, 8, 0), segment(16, 8, 1)].concat();
    let head = bench.add(&[&header(ZEROES, 0), &ranges], &[1]);
    bench.until("both orders", |bench| (bench.vm.as_ref().unwrap().held() == 2).then_some(()));
    bench.vm.as_mut().unwrap().answer_one();
    for _ in 0..3 {
        bench.turn();
    }
    assert_eq!(bench.queues[0].used(), [], "one is not all");
    bench.vm.as_mut().unwrap().hold(false);
    assert_eq!(bench.answered(1), [(head, 1)]);
    let wanted = [[0; 4096], [5; 4096], [0; 4096], [5; 4096]].concat();
    assert_eq!(bench.read(0, 32), wanted);
    assert_eq!(bench.request(&[&header(DISCARD, 0), &segment(24, 8, 0)], &[1]).0, 0);
}

#[test]
fn a_disk_in_quarantine_fails_requests_until_a_driver_vm_comes() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    bench.write(0, 1, 1);
    let medium = bench.kill(false);
    let waiting = bench.add(&[&header(IN, 0)], &[512, 1]);
    bench.turn();
    bench.lock().quarantine();
    assert_eq!(bench.answered(1), [(waiting, 1)]);
    assert_eq!(bench.queues[0].buffer(waiting + 2, 1), [1]);
    assert_eq!((bench.mode(), bench.request(&[&header(IN, 0)], &[512, 1]).0), (ModeName::Quarantined, 1));
    bench.live(second(), medium);
    assert_eq!(bench.read(0, 1), [1; 512], "the log was kept");
}

#[test]
fn a_disk_comes_to_rest_before_a_reset_and_goes_on_where_none_comes() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    bench.write(0, 1, 1);
    let device = DeviceId::block(INDEX);
    bench.lock().order(&ToVm::Quiesce { device });
    let at_rest = |message| match message {
        FromVm::AtRest { device: of, stable } => (of == device).then_some(stable),
        _ => None,
    };
    assert!(bench.wait(at_rest));
    assert_eq!(bytes_at(bench.vm.as_ref().unwrap().stable(), 0, 1), [1; 512]);
    let write = bench.add(&[&header(OUT, 1), &[2; 512]], &[1]);
    for _ in 0..3 {
        bench.turn();
    }
    assert_eq!(bench.queues[0].used(), [], "nothing is begun");
    bench.lock().order(&ToVm::GoOn { device });
    assert_eq!(bench.answered(1), [(write, 1)]);
}

#[test]
fn another_disk_is_not_written_to_and_reported() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    bench.write(0, 1, 1);
    bench.kill(false);
    bench.attach(second(), empty());
    bench.vm.as_mut().unwrap().report.identity.serial = "another".into();
    let lost = |message| match message {
        FromVm::Lost { link, cause, .. } => Some((link, cause)),
        _ => None,
    };
    let (link, cause) = bench.wait(lost);
    assert!(link == second() && matches!(&cause, LinkEnd::OtherDisk(what) if what.contains("serial")), "{cause:?}");
    assert_eq!(bench.vm.take().unwrap().end(true), empty());
}

/// Stops the device as a driver's reset does.
fn reset(bench: &Bench) {
    for index in 0..2 {
        assert!(bench.lock().stop_queue(index).is_some());
    }
    bench.lock().reset();
}

#[test]
fn after_a_reset_nothing_of_the_past_reaches_the_guest_and_its_writes_are_whole() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    bench.vm.as_mut().unwrap().hold(true);
    let read = bench.add(&[&header(IN, 50)], &[512, 1]);
    let write = bench.add(&[&header(OUT, 9), &[7; 512]], &[1]);
    bench.until("both orders", |bench| (bench.vm.as_ref().unwrap().held() == 2).then_some(()));
    reset(&bench);
    bench.vm.as_mut().unwrap().hold(false);
    // The next life, on other queues in the same memory.
    let mut next = NEXT_PLACES.map(|place| bench.queues[0].another(place, 256));
    std::mem::swap(&mut bench.queues, &mut next);
    bench.start_queues();
    assert_eq!(bench.read(9, 1), [7; 512], "a write that had begun is carried to its end");
    assert_eq!(next[0].used(), []);
    assert_eq!((next[0].buffer(read + 2, 1), next[0].buffer(write + 2, 1)), (vec![0], vec![0]), "no byte");
}

#[test]
fn a_queue_that_stops_and_goes_on_gets_the_answers_and_its_data_meanwhile_wait() {
    let mut bench = Bench::new();
    let write = bench.add(&[&header(OUT, 9), &[7; 512]], &[1]);
    bench.turn();
    // The driver chooses another interrupt vector before a driver VM comes.
    let state = bench.lock().stop_queue(0);
    assert_eq!(state, Some(QueueState { next_avail: 1, next_used: 0 }));
    bench.attach(first(), empty());
    for _ in 0..20 {
        bench.turn();
    }
    assert_eq!(bench.vm.as_ref().unwrap().orders(), 0, "its data cannot be had");
    let resources = bench.queues[0].resources();
    bench.lock().start_queue(0, resources, state).unwrap();
    assert_eq!(bench.answered(1), [(write, 1)]);
    assert_eq!(bench.read(9, 1), [7; 512]);
}

#[test]
fn all_queues_are_served_and_more_requests_than_a_turn_takes() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    for n in 0..80 {
        for queue in &mut bench.queues {
            queue.add(&[&header(OUT, n), &[n as u8; 512]], &[1]);
        }
    }
    bench.queues.iter().for_each(DriverQueue::kick);
    let mut counts = [0, 0];
    bench.until("all requests", |bench| {
        for (count, queue) in counts.iter_mut().zip(&mut bench.queues) {
            *count += queue.used().len();
        }
        (counts == [80, 80]).then_some(())
    });
    for queue in &bench.queues {
        assert!(queue.call.read().is_ok(), "the guest is interrupted");
    }
    assert_eq!(bench.read(79, 1), [79; 512]);
}

#[test]
fn a_driver_that_takes_its_data_away_writes_zeroes() {
    let mut bench = Bench::new();
    bench.live(first(), vec![9; 512 * (START + SECTORS) as usize]);
    bench.kill(true);
    bench.add(&[&header(OUT, 9), &[7; 1024]], &[1]);
    bench.turn();
    // The data are one sector now.
    bench.queues[0].overwrite(&[(0x8000, 16, 1, 1), (0x8010, 512, 1, 2), (0x8410, 1, 2, 0)], &[], 0, &[]);
    bench.live(second(), vec![9; 512 * (START + SECTORS) as usize]);
    assert_eq!(bench.answered(1).len(), 1);
    let (_, data) = bench.request(&[&header(IN, 9)], &[1024, 1]);
    assert!(data[512..].iter().all(|byte| *byte == 0), "and nothing of what else was in the pool");
}

#[test]
fn a_bad_ring_asks_for_a_reset_and_the_log_stays() {
    let mut bench = Bench::new();
    bench.live(first(), empty());
    bench.write(3, 1, 1);
    bench.queues[0].break_ring();
    bench.queues[0].kick();
    bench.turn();
    assert!(bench.lock().needs_reset());
    assert_eq!(bench.config_call.read().unwrap(), 1);
    let medium = bench.kill(false);
    reset(&bench);
    assert!(!bench.lock().needs_reset());
    let mut next = NEXT_PLACES.map(|place| bench.queues[0].another(place, 256));
    std::mem::swap(&mut bench.queues, &mut next);
    bench.start_queues();
    bench.live(second(), medium);
    assert_eq!(bench.read(3, 1), [1; 512]);
}
