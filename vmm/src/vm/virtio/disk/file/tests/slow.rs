//! A disk that does not answer until it is told to: what the event loop and a reset do meanwhile.

use std::io;
use std::sync::Condvar;
use std::time::{Duration, Instant};

use super::*;
use crate::vm::virtio::disk::file::worker::Backing;
use crate::vm::virtio::disk::offer::F_FLUSH;
use crate::vm::virtio::disk::offer::tests::OFFER;

/// Sectors of the disk.
const SECTORS: u64 = 1 << 15;

/// What the disk is told and has been asked.
#[derive(Default)]
struct Told {
    /// Kinds of requests that hang.
    held: Vec<u32>,
    /// Number of the next flushes that fail.
    failing_flushes: usize,
    /// There is no room for a write.
    is_full: bool,
    /// What a discard comes to.
    cannot_discard: bool,
    /// Requests that have begun: kind and position.
    begun: Vec<(u32, u64)>,
}

/// The kind of what is no request of the guest.
const RESIZE: u32 = u32::MAX;

struct SlowDisk {
    told: Mutex<Told>,
    changed: Condvar,
}

impl SlowDisk {
    fn begin(&self, kind: u32, position: u64) {
        let mut told = self.told.lock().unwrap();
        told.begun.push((kind, position));
        self.changed.notify_all();
        drop(self.changed.wait_while(told, |told| told.held.contains(&kind)).unwrap());
    }

    /// From now on these kinds of requests hang, others do not any more.
    fn hold(&self, kinds: &[u32]) {
        self.told.lock().unwrap().held = kinds.to_vec();
        self.changed.notify_all();
    }

    /// Waits until `count` requests have begun; all of them.
    fn begun(&self, count: usize) -> Vec<(u32, u64)> {
        let told = self.told.lock().unwrap();
        let patience = Duration::from_secs(60);
        let (told, _) = self.changed.wait_timeout_while(told, patience, |told| told.begun.len() < count).unwrap();
        assert!(told.begun.len() >= count, "{:?}", told.begun);
        told.begun.clone()
    }
}

impl Backing for SlowDisk {
    fn read(&self, position: u64, into: &mut [u8]) -> io::Result<()> {
        self.begin(IN, position);
        into.fill(0xDD);
        Ok(())
    }

    fn write(&self, position: u64, _: &[u8]) -> io::Result<()> {
        self.begin(OUT, position);
        if self.told.lock().unwrap().is_full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn discard(&self, position: u64, _: u64) -> io::Result<()> {
        self.begin(DISCARD, position);
        if self.told.lock().unwrap().cannot_discard { Err(io::ErrorKind::Unsupported.into()) } else { Ok(()) }
    }

    fn zeroes(&self, position: u64, _: u64, _: bool) -> io::Result<()> {
        self.begin(ZEROES, position);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.begin(FLUSH, 0);
        let failing = &mut self.told.lock().unwrap().failing_flushes;
        let Some(left) = failing.checked_sub(1) else { return Ok(()) };
        *failing = left;
        Err(io::ErrorKind::StorageFull.into())
    }

    fn resize(&self, bytes: Option<u64>) -> Result<u64, String> {
        self.begin(RESIZE, 0);
        bytes.ok_or_else(|| "it cannot be measured".into())
    }

    fn grown(&self) -> Option<u64> {
        None
    }
}

/// A guest with a disk on which these kinds of requests hang.
fn guest(held: &[u32], queues: u64) -> (Arc<SlowDisk>, Guest) {
    let told = Mutex::new(Told { held: held.to_vec(), ..Told::default() });
    let disk = Arc::new(SlowDisk { told, changed: Condvar::new() });
    let offer = Offer { sectors: SECTORS, ..OFFER };
    let block = FileDisk::on(offer, (disk.clone(), OnFull::Pause), messenger(nobody())).unwrap();
    (disk, Guest::with(block, tempfile::tempdir().unwrap(), queues, 256))
}

impl Guest {
    fn add(&mut self, kind: u32, sector: u64) -> u16 {
        let head = match kind {
            IN => self.queue.add(&[&header(IN, sector)], &[512, 1]),
            OUT => self.queue.add(&[&header(OUT, sector), &[7; 512]], &[1]),
            _ => self.queue.add(&[&header(kind, sector)], &[1]),
        };
        self.queue.kick();
        head
    }
}

#[test]
fn the_loop_and_other_requests_go_on_while_a_flush_hangs() {
    let (disk, mut guest) = guest(&[FLUSH], 1);
    let flush = guest.add(FLUSH, 0);
    guest.events.run();
    disk.begun(1);
    for n in 0..10 {
        assert_eq!(guest.request(&[&header(OUT, n), &[7; 512]], &[1]).0, 0);
        assert_eq!(guest.request(&[&header(IN, n)], &[512, 1]), (0, vec![0xDD; 512]));
        guest.events.run();
    }
    assert_eq!(guest.queue.used(), [], "a flush is answered when it is done");
    disk.hold(&[]);
    assert_eq!(guest.answered(1), [(flush, 1)]);
}

#[test]
fn flushes_go_on_while_a_read_hangs() {
    let (disk, mut guest) = guest(&[IN], 1);
    let read = guest.add(IN, 0);
    guest.events.run();
    disk.begun(1);
    assert_eq!(guest.request(&[&header(FLUSH, 0)], &[1]).0, 0);
    disk.hold(&[]);
    assert_eq!(guest.answered(1), [(read, 513)]);
}

#[test]
fn a_flush_covers_what_was_done_before_it_and_those_that_wait_share_the_next() {
    let (disk, mut guest) = guest(&[FLUSH], 1);
    guest.add(FLUSH, 0);
    guest.events.run();
    disk.begun(1);
    // Done behind the beginning of the first flush: that one says nothing about it.
    assert_eq!(guest.request(&[&header(OUT, 3), &[7; 512]], &[1]).0, 0);
    let heads = [guest.add(FLUSH, 0), guest.add(FLUSH, 0), guest.add(FLUSH, 0)];
    guest.events.run();
    disk.told.lock().unwrap().failing_flushes = 2;
    disk.hold(&[]);
    guest.answered(4);
    assert_eq!(disk.begun(3), [(FLUSH, 0), (OUT, 3 * 512), (FLUSH, 0)]);
    for head in heads {
        assert_eq!(guest.queue.buffer(head + 1, 1), [1], "the kernel tells an error once: it is everyone's");
    }
}

#[test]
fn what_a_guest_without_flushes_has_written_is_stable_when_it_is_answered() {
    let (disk, mut guest) = guest(&[], 2);
    let without_flushes = |guest: &Guest, is_so: bool| {
        let mut device = guest.device.lock().unwrap();
        let features = device.features();
        device.set_features(if is_so { features & !F_FLUSH } else { features });
    };
    without_flushes(&guest, true);
    let changes = |guest: &mut Guest| {
        assert_eq!(guest.request(&[&header(OUT, 3), &[7; 512]], &[1]).0, 0);
        assert_eq!(guest.request(&[&header(ZEROES, 0), &segment(8, 8, 0)], &[1]).0, 0);
        assert_eq!(guest.request(&[&header(DISCARD, 0), &segment(8, 8, 0)], &[1]).0, 0);
        assert_eq!(guest.request(&[&header(IN, 3)], &[512, 1]).0, 0);
    };
    changes(&mut guest);
    let [at, zeroes] = [3 * 512, 8 * 512];
    let each = [(OUT, at), (FLUSH, 0), (ZEROES, zeroes), (FLUSH, 0), (DISCARD, zeroes), (FLUSH, 0), (IN, at)];
    assert_eq!(disk.begun(7), each);
    // No answer before it is so, and an error if it cannot be so.
    disk.hold(&[FLUSH]);
    disk.told.lock().unwrap().failing_flushes = 1;
    let write = guest.add(OUT, 0);
    guest.events.run_until(|| disk.told.lock().unwrap().begun.len() == 9);
    assert_eq!(guest.queue.used(), []);
    disk.hold(&[]);
    assert_eq!((guest.answered(1), guest.queue.buffer(write + 2, 1)), (vec![(write, 1)], vec![1]));
    // The next driver may use them.
    reset(&guest.device);
    guest.queue = guest.queue.another(1, 256);
    without_flushes(&guest, false);
    guest.device.lock().unwrap().start_queue(0, guest.queue.resources(), None).unwrap();
    changes(&mut guest);
    assert_eq!(disk.begun(13)[9..], [(OUT, at), (ZEROES, zeroes), (DISCARD, zeroes), (IN, at)]);
}

/// Stops the device as a driver's reset does; it must not wait.
fn reset(device: &Mutex<FileDisk>) -> Option<QueueState> {
    let start = Instant::now();
    let mut device = device.lock().unwrap();
    let state = device.stop_queue(0);
    device.reset();
    assert!(start.elapsed() < Duration::from_secs(30), "a reset waits for no disk");
    state
}

#[test]
fn a_reset_does_not_wait_and_nothing_of_the_past_reaches_the_guest() {
    for kind in [FLUSH, IN, OUT] {
        let (disk, mut guest) = guest(&[FLUSH, IN, OUT], 2);
        let head = guest.add(kind, 0);
        guest.add(kind, 1);
        guest.events.run();
        disk.begun(1);
        assert!(reset(&guest.device).is_some());
        guest.events.run();
        disk.hold(&[]);
        // The next life, on another queue in the same memory.
        let mut next = guest.queue.another(1, 256);
        std::mem::swap(&mut guest.queue, &mut next);
        guest.device.lock().unwrap().start_queue(0, guest.queue.resources(), None).unwrap();
        assert_eq!(guest.request(&[&header(IN, 9)], &[512, 1]), (0, vec![0xDD; 512]));
        assert_eq!(guest.request(&[&header(FLUSH, 0)], &[1]).0, 0);
        assert_eq!(next.used(), [], "no answer");
        let (index, length) = if kind == IN { (head + 1, 512) } else { (next.last(), 1) };
        assert_eq!(next.buffer(index, length), vec![0; length as usize], "no byte");
        let begun = disk.begun(3);
        assert!(!begun.contains(&(kind, 512)), "what had not begun is not done: {begun:?}");
    }
}

#[test]
fn a_write_that_a_reset_has_left_behind_ends_before_the_next_begins() {
    let (disk, mut guest) = guest(&[OUT], 1);
    guest.add(OUT, 5);
    guest.events.run();
    disk.begun(1);
    reset(&guest.device);
    guest.queue = guest.queue.another(0, 256);
    guest.device.lock().unwrap().start_queue(0, guest.queue.resources(), None).unwrap();
    let write = guest.add(OUT, 6);
    let flush = guest.add(FLUSH, 0);
    assert_eq!(guest.answered(1), [(flush, 1)]);
    assert_eq!(disk.begun(2), [(OUT, 5 * 512), (FLUSH, 0)]);
    disk.hold(&[]);
    assert_eq!(guest.answered(1), [(write, 1)]);
}

#[test]
fn a_flush_that_fails_and_is_forgotten_fails_the_next_one() {
    for is_done in [false, true] {
        let (disk, mut guest) = guest(&[FLUSH], 1);
        assert_eq!(guest.request(&[&header(OUT, 3), &[7; 512]], &[1]).0, 0);
        disk.told.lock().unwrap().failing_flushes = 1;
        guest.add(FLUSH, 0);
        guest.events.run();
        disk.begun(2);
        // The driver resets the device before the flush has failed, or behind that and before it hears of it.
        if is_done {
            let done = guest.device.lock().unwrap().worker.done_event().try_clone().unwrap();
            disk.hold(&[]);
            while done.read().is_err() {
                std::thread::yield_now();
            }
        }
        reset(&guest.device);
        disk.hold(&[]);
        guest.queue = guest.queue.another(0, 256);
        guest.device.lock().unwrap().start_queue(0, guest.queue.resources(), None).unwrap();
        assert_eq!(guest.request(&[&header(FLUSH, 0)], &[1]).0, 1, "the kernel tells an error once");
        assert_eq!(guest.request(&[&header(FLUSH, 0)], &[1]).0, 0);
    }
}

#[test]
fn a_driver_that_resets_again_and_again_holds_no_more_memory() {
    let (disk, mut guest) = guest(&[OUT], 12);
    for _ in 0..20 {
        for _ in 0..8 {
            guest.queue.add(&[&header(OUT, 0), &vec![7; serve::PART]], &[1]);
        }
        guest.queue.kick();
        guest.events.run();
        let in_flight = guest.device.lock().unwrap().in_flight.len();
        assert!((1..=5).contains(&in_flight), "{in_flight} of a megabyte each");
        reset(&guest.device);
        guest.queue = guest.queue.another(0, 256);
        guest.device.lock().unwrap().start_queue(0, guest.queue.resources(), None).unwrap();
    }
    assert_eq!(disk.begun(1).len(), 1, "what waited is dropped");
    disk.hold(&[]);
}

#[test]
fn what_is_in_flight_is_bounded_and_the_rest_is_served_in_time() {
    let (disk, mut guest) = guest(&[OUT], 12);
    for _ in 0..8 {
        guest.queue.add(&[&header(OUT, 0), &vec![7; serve::PART]], &[1]);
    }
    guest.queue.kick();
    guest.events.run();
    assert!((4..=5).contains(&guest.device.lock().unwrap().in_flight.len()));
    disk.hold(&[]);
    assert_eq!(guest.answered(8).len(), 8);
    assert_eq!(guest.device.lock().unwrap().in_flight.len(), 0);
}

#[test]
fn a_queue_that_goes_on_gets_the_answers_of_what_was_in_flight() {
    let (disk, mut guest) = guest(&[FLUSH], 1);
    let flush = guest.add(FLUSH, 0);
    guest.events.run();
    disk.begun(1);
    let state = guest.device.lock().unwrap().stop_queue(0);
    assert_eq!(state, Some(QueueState { next_avail: 1, next_used: 0 }));
    disk.hold(&[]);
    guest.events.run();
    assert_eq!(guest.queue.used(), [], "stopped");
    guest.device.lock().unwrap().start_queue(0, guest.queue.resources(), state).unwrap();
    assert_eq!(guest.answered(1), [(flush, 1)]);
}

#[test]
fn a_driver_that_changes_a_request_in_flight_gets_what_was_checked() {
    let (disk, mut guest) = guest(&[OUT], 12);
    let whole = 2 * serve::PART;
    guest.queue.add(&[&header(OUT, 0), &vec![7; whole]], &[1]);
    guest.queue.kick();
    guest.events.run();
    disk.begun(1);
    // Past the disk's end now.
    guest.queue.overwrite(&[], &[], 0, &header(OUT, SECTORS));
    disk.hold(&[]);
    assert_eq!(guest.answered(1), [(0, 1)]);
    assert_eq!(disk.begun(2), [(OUT, 0), (OUT, serve::PART as u64)], "the header was read once");
    assert_eq!(guest.queue.buffer(2, 1), [0]);
}

#[test]
fn a_driver_that_takes_its_buffers_away_gets_an_error() {
    let (disk, mut guest) = guest(&[OUT], 12);
    guest.queue.add(&[&header(OUT, 0), &vec![7; 2 * serve::PART]], &[1]);
    guest.queue.kick();
    guest.events.run();
    disk.begun(1);
    // The descriptors are a header and a status of a byte each now.
    let status = 0x8000 + 64;
    guest.queue.overwrite(&[(0x8000, 16, 1, 2), (0, 0, 0, 0), (status, 1, 2, 0)], &[], 0, &[]);
    disk.hold(&[]);
    assert_eq!(guest.answered(1), [(0, 1)]);
    assert_eq!((guest.queue.buffer(2, 1), disk.begun(1).len()), (vec![1], 1));
}

#[test]
fn the_end_does_not_wait_for_a_disk_that_does_not_answer() {
    let (disk, mut guest) = guest(&[FLUSH, IN], 1);
    guest.add(FLUSH, 0);
    guest.add(IN, 0);
    guest.events.run();
    disk.begun(2);
    let start = Instant::now();
    drop(guest);
    assert!(start.elapsed() < Duration::from_secs(30));
    disk.hold(&[]);
}

#[test]
fn several_ranges_are_one_request_that_is_answered_when_all_are_done() {
    let (disk, mut guest) = guest(&[DISCARD], 1);
    let ranges = [segment(8, 8, 0), segment(800, 8, 0)].concat();
    let head = guest.queue.add(&[&header(DISCARD, 0), &ranges], &[1]);
    guest.queue.kick();
    guest.events.run();
    disk.begun(1);
    assert_eq!(guest.queue.used(), []);
    disk.hold(&[]);
    assert_eq!(guest.answered(1), [(head, 1)]);
    assert_eq!((disk.begun(2), guest.queue.buffer(head + 2, 1)), (vec![(DISCARD, 4096), (DISCARD, 409_600)], vec![0]));
}

#[test]
fn a_discard_that_the_file_system_does_not_take_is_unsupported_and_ends_its_request() {
    let (disk, mut guest) = guest(&[], 1);
    disk.told.lock().unwrap().cannot_discard = true;
    let ranges = [segment(8, 8, 0), segment(800, 8, 0)].concat();
    assert_eq!(guest.request(&[&header(DISCARD, 0), &ranges], &[1]).0, 2);
    assert_eq!(disk.begun(1).len(), 1);
    assert_eq!(guest.request(&[&header(ZEROES, 0), &segment(8, 8, 1)], &[1]).0, 0);
}

#[test]
fn a_write_without_room_waits_for_it_and_a_reset_ends_that() {
    let (disk, mut guest) = guest(&[], 1);
    let (outbox, said) = heard();
    guest.device.lock().unwrap().messenger = messenger(outbox);
    disk.told.lock().unwrap().is_full = true;
    guest.queue.add(&[&header(OUT, 0), &[7; 512]], &[1]);
    guest.queue.kick();
    guest.events.run_until(|| !said.lock().unwrap().is_empty());
    assert!(matches!(&said.lock().unwrap()[0], FromVm::Disk { news, .. } if news.contains("no room")), "{said:?}");
    assert_eq!(guest.queue.used().len(), 0, "it waits");
    disk.told.lock().unwrap().is_full = false;
    assert_eq!(guest.answered(1).len(), 1);
    guest.events.run_until(|| said.lock().unwrap().len() > 1);
    assert!(matches!(&said.lock().unwrap()[1], FromVm::Disk { news, .. } if news.contains("room again")), "{said:?}");

    disk.told.lock().unwrap().is_full = true;
    guest.queue.add(&[&header(OUT, 0), &[7; 512]], &[1]);
    guest.queue.kick();
    guest.events.run_until(|| said.lock().unwrap().len() > 2);
    let begun = Instant::now();
    drop(guest);
    assert!(begun.elapsed() < Duration::from_secs(30), "its end waits for room");
}

#[test]
fn another_size_waits_for_the_host_and_nobody_waits_for_it() {
    let (disk, mut guest) = guest(&[RESIZE], 1);
    let (outbox, said) = heard();
    guest.device.lock().unwrap().messenger = messenger(outbox);
    let sectors = |guest: &Guest| {
        let mut capacity = [0; 8];
        guest.device.lock().unwrap().config_read(0, &mut capacity);
        u64::from_le_bytes(capacity)
    };
    guest.device.lock().unwrap().resize(Some(2 * SECTORS * 512));
    disk.begun(1);
    // What the guest does meanwhile does not lose the answer.
    guest.device.lock().unwrap().reset();
    assert_eq!((sectors(&guest), guest.device.lock().unwrap().config_generation()), (SECTORS, 0));
    let call = EventFd::new(EFD_NONBLOCK).unwrap();
    guest.device.lock().unwrap().set_config_interrupt(call.try_clone().unwrap());
    disk.hold(&[]);
    guest.events.run_until(|| !said.lock().unwrap().is_empty());
    assert!(matches!(said.lock().unwrap()[0], FromVm::Resized { result: Ok(bytes), .. } if bytes == 2 * SECTORS * 512));
    assert_eq!((sectors(&guest), guest.device.lock().unwrap().config_generation()), (2 * SECTORS, 1));
    assert!(call.read().is_ok(), "the guest is told");
    guest.device.lock().unwrap().resize(None);
    guest.events.run_until(|| said.lock().unwrap().len() > 1);
    assert!(matches!(&said.lock().unwrap()[1], FromVm::Resized { result: Err(_), .. }));
    assert_eq!((sectors(&guest), call.read().is_ok()), (2 * SECTORS, false));
}
