//! Hostile rings: whatever a driver VM or a guest writes into its own memory, nothing panics, each call ends within
//! its bound, and the other side sees whole frames in its own buffers or nothing.
#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)]

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Driver, RINGS_LEN, Rx, Tx, WRITE, frame, memory};
use proptest::prelude::*;
use umbra_shadow::net::rx_mode::RxFilter;
use umbra_splitter::control::{self, Command};
use umbra_splitter::header::{HEADER_LEN, MAX_FRAME, MIN_FRAME, Offloads};
use umbra_splitter::net::in_flight::InFlight;
use umbra_splitter::pump::{self, Counts, Flow, Owner, Stop};
use umbra_splitter::queue::Virtqueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const SIZE: u16 = 16;
const BASE: u64 = 0x1000;
const DATA: u64 = BASE + RINGS_LEN;
const MEMORY: usize = 0x8_0000;
const CANARY: u8 = 0xa5;

/// One descriptor, likely enough to be nearly right.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        20 => DATA..DATA + 0x8000,
        1 => BASE..DATA,
        1 => MEMORY as u64 - 64..MEMORY as u64 + 64,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![12 => 26u32..200, 6 => 200u32..3000, 1 => 0u32..30, 1 => (0u32..6).prop_map(|n| n * 16), 1 => any::<u32>()];
    let flags = prop_oneof![16 => Just(0u16), 8 => Just(WRITE), 6 => 0u16..4, 2 => 0u16..8, 1 => any::<u16>()];
    (address, len, flags, 0..SIZE + 1)
}

/// A ring's memory as its owner may have left it.
#[derive(Clone, Debug)]
struct Wreck {
    descriptors: Vec<(u64, u32, u16, u16)>,
    heads: Vec<u16>,
    avail_idx: u16,
    data: Vec<u8>,
}

fn wreck() -> impl Strategy<Value = Wreck> {
    let head = prop_oneof![30 => 0..SIZE, 1 => any::<u16>()];
    (
        prop::collection::vec(descriptor(), usize::from(SIZE)),
        prop::collection::vec(head, usize::from(SIZE)),
        prop_oneof![12 => 0..=SIZE, 1 => any::<u16>()],
        prop::collection::vec(prop_oneof![40 => Just(0u8), 1 => any::<u8>()], 0x400),
    )
        .prop_map(|(descriptors, heads, avail_idx, data)| Wreck { descriptors, heads, avail_idx, data })
}

impl Wreck {
    fn write(&self, driver: &mut Driver) {
        // Also what indirect tables, headers and frames are made of.
        for at in (DATA..DATA + 0x8000).step_by(self.data.len()) {
            driver.memory.write_slice(&self.data, GuestAddress(at)).unwrap();
        }
        for (index, (address, len, flags, next)) in (0u16..).zip(&self.descriptors) {
            driver.write_descriptor(index, *address, *len, *flags, *next);
        }
        self.heads.iter().for_each(|head| driver.offer_head(*head));
        driver.set_avail_idx(self.avail_idx);
    }
}

fn flow(source: Owner) -> Flow {
    Flow { source, negotiated: Offloads::all(), accepted: Offloads::all(), mergeable: true }
}

/// Pumps until nothing moves; the bound on calls is the test.
fn pump_out(source: &mut Virtqueue, target: &mut Virtqueue, flow: &Flow) -> (Counts, Result<(), Owner>) {
    let mut counts = Counts::default();
    let mut tap = InFlight::default();
    for _ in 0..100 {
        match pump::pump(source, target, flow, &mut tap, &mut counts) {
            Ok(Stop::Budget) => {}
            Ok(Stop::SourceEmpty | Stop::TargetFull) => {
                let held = tap.count(target);
                assert!(held <= counts.frames && held <= u64::from(target.size()));
                return (counts, Ok(()));
            }
            Err(error) => return (counts, Err(error.owner)),
        }
    }
    panic!("a ring of {SIZE} keeps the pump busy for ever");
}

/// An honest receiver in a memory full of canaries.
fn receiver(len: u32) -> Rx {
    let memory = memory(MEMORY);
    memory.write_slice(&vec![CANARY; MEMORY], GuestAddress(0)).unwrap();
    memory.write_slice(&vec![0; usize::try_from(RINGS_LEN).unwrap()], GuestAddress(BASE)).unwrap();
    let mut rx = Rx::new(Driver::new(&memory, BASE, SIZE, true), DATA, len);
    rx.offer(usize::from(SIZE) - 4);
    rx
}

fn snapshot(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(memory.last_addr().0 + 1).unwrap()];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

/// Outside the used ring and `buffers` bytes of buffers nothing has changed.
fn untouched(driver: &Driver, before: &[u8], buffers: u64) {
    let after = snapshot(&driver.memory);
    let used = driver.used_ring()..driver.used_ring() + 4 + 8 * u64::from(SIZE) + 2;
    let kept = [(0, used.start), (used.end, DATA), (DATA + buffers, before.len() as u64)];
    for (from, to) in kept.map(|(from, to)| (usize::try_from(from).unwrap(), usize::try_from(to).unwrap())) {
        assert!(before[from..to] == after[from..to], "something between {from:#x} and {to:#x} was written");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_hostile_sender_cannot_reach_past_the_receivers_buffers(wreck in wreck(), from_guest in any::<bool>()) {
        let hostile = memory(MEMORY);
        let mut driver = Driver::new(&hostile, BASE, SIZE, true);
        wreck.write(&mut driver);
        let mut rx = receiver(2048);
        let before = snapshot(&rx.driver.memory);
        let source = if from_guest { Owner::Guest } else { Owner::DriverVm };
        let (counts, end) = pump_out(&mut driver.device(), &mut rx.driver.device(), &flow(source));
        prop_assert!(end.is_ok() || end == Err(source), "the honest side was blamed");
        prop_assert!(from_guest || counts.malformed == 0);
        untouched(&rx.driver, &before, u64::from(SIZE) * 2048);
        let got = rx.receive_all();
        prop_assert_eq!(got.len() as u64, counts.frames);
        prop_assert!(got.iter().all(|f| (MIN_FRAME..=MAX_FRAME).contains(&f.len())));
    }

    #[test]
    fn a_hostile_receiver_changes_nothing_for_the_sender(wreck in wreck(), to_guest in any::<bool>()) {
        let honest = memory(MEMORY * 4);
        let mut tx = Tx::new(Driver::new(&honest, BASE, SIZE, true), DATA);
        for n in 0..8 {
            tx.send(&frame(n, 60 + n as usize * 300));
        }
        let hostile = memory(MEMORY);
        let mut driver = Driver::new(&hostile, BASE, SIZE, true);
        wreck.write(&mut driver);
        let sender = if to_guest { Owner::DriverVm } else { Owner::Guest };
        let before = snapshot(&honest);
        let (counts, end) = pump_out(&mut tx.driver.device(), &mut driver.device(), &flow(sender));
        let receiver = if to_guest { Owner::Guest } else { Owner::DriverVm };
        prop_assert!(end.is_ok() || end == Err(receiver), "the honest side was blamed");
        untouched(&tx.driver, &before, 0);
        // Each frame that was completed is accounted for; each other waits.
        let completed = u64::from(tx.completed());
        prop_assert_eq!(completed, counts.frames + counts.no_room + counts.malformed);
    }

    #[test]
    fn a_hostile_guest_cannot_overfill_what_is_drained(wreck in wreck()) {
        let hostile = memory(MEMORY);
        let mut driver = Driver::new(&hostile, BASE, SIZE, true);
        wreck.write(&mut driver);
        let mut counts = Counts::default();
        let mut kept = Vec::new();
        let outcome = pump::drain(&mut driver.device(), Offloads::all(), &mut counts, |frame| kept.push(frame.to_vec()));
        prop_assert!(kept.len() <= usize::from(SIZE));
        prop_assert!(kept.iter().all(|f| f.len() <= 12 + MAX_FRAME));
        prop_assert!(outcome.is_err() || kept.len() as u64 + counts.malformed == u64::from(driver.avail_idx));
    }

    #[test]
    fn a_hostile_control_queue_is_answered_or_broken(wreck in wreck()) {
        let hostile = memory(MEMORY);
        let mut driver = Driver::new(&hostile, BASE, SIZE, true);
        wreck.write(&mut driver);
        let mut filter = RxFilter::new([2; 6]);
        let _ = control::serve(&mut driver.device(), &mut filter);
        prop_assert!(filter.unicast().len() <= 64 && filter.multicast().len() <= 64);
    }

    #[test]
    fn any_bytes_parse_to_a_command_or_none(bytes in prop::collection::vec(any::<u8>(), 0..200), class in 0u8..4) {
        let mut filter = RxFilter::new([2; 6]);
        filter.reset(u64::MAX);
        for bytes in [bytes.clone(), [&[class, bytes.first().map_or(0, |b| b % 3)][..], &bytes].concat()] {
            if let Some(command) = Command::parse(&bytes) {
                command.apply(&mut filter);
            }
        }
        prop_assert!(filter.vlans().is_some_and(|v| v.len() <= 100 && v.iter().all(|v| *v < 4096)));
    }
}

/// Rings of 1024 chains of 1024 descriptors of one byte: the most work that can be asked for.
#[test]
fn the_most_expensive_rings_cost_a_bounded_time() {
    const LARGE: u16 = 1024;
    let hostile = memory(4 << 20);
    let table = DATA;
    for entry in 0..1024u64 {
        let (flags, next) = if entry < 1023 { (1 | u64::from(WRITE), entry + 1) } else { (u64::from(WRITE), 0) };
        hostile.write_obj(0x20_0000u64, GuestAddress(table + 16 * entry)).unwrap();
        let len = if entry == 0 { 12u64 } else { 1 };
        hostile.write_obj(len | flags << 32 | next << 48, GuestAddress(table + 16 * entry + 8)).unwrap();
    }
    let mut driver = Driver::new(&hostile, BASE, LARGE, true);
    for _ in 0..LARGE {
        driver.offer(&[(table, 1024 * 16, 4)]);
    }
    let honest = memory(32 << 20);
    let mut tx = Tx::new(Driver::new(&honest, BASE, 256, true), DATA);
    for n in 0..200 {
        tx.send(&frame(n, 60_000));
    }
    let (mut source, mut target) = (tx.driver.device(), driver.device());
    let mut counts = Counts::default();
    let stop =
        pump::pump(&mut source, &mut target, &flow(Owner::Guest), &mut InFlight::default(), &mut counts).unwrap();
    assert_eq!(stop, Stop::Budget);
    assert_eq!(counts.frames, 1, "one frame costs the whole budget here");
}

/// One descriptor for each of the longest frames: what they cost is their bytes.
#[test]
fn frames_that_are_drained_cost_what_their_bytes_do() {
    const LARGE: u16 = 1024;
    let hostile = memory(1 << 20);
    let mut driver = Driver::new(&hostile, BASE, LARGE, true);
    for _ in 0..LARGE {
        driver.offer(&[(DATA, u32::try_from(HEADER_LEN + MAX_FRAME).unwrap(), 0)]);
    }
    let mut bytes = 0;
    let mut source = driver.device();
    let mut counts = Counts::default();
    let stop = pump::drain(&mut source, Offloads::all(), &mut counts, |frame| bytes += frame.to_vec().len()).unwrap();
    assert_eq!(stop, Stop::Budget);
    assert!((8 << 20..20 << 20).contains(&bytes), "{bytes} bytes in one call");
}

/// The same from queue to queue.
#[test]
fn frames_that_are_moved_cost_what_their_bytes_do() {
    const LARGE: u16 = 1024;
    let bytes = u32::try_from(HEADER_LEN + MAX_FRAME).unwrap();
    let ring = |flags| {
        let mut driver = Driver::new(&memory(1 << 20), BASE, LARGE, true);
        for _ in 0..LARGE {
            driver.offer(&[(DATA, bytes, flags)]);
        }
        driver
    };
    let (from, to) = (ring(0), ring(WRITE));
    let mut counts = Counts::default();
    let (mut source, mut target) = (from.device(), to.device());
    let stop = pump::pump(&mut source, &mut target, &flow(Owner::Guest), &mut pump::Off, &mut counts).unwrap();
    assert_eq!(stop, Stop::Budget);
    assert!((8 << 20..20 << 20).contains(&counts.bytes), "{} bytes in one call", counts.bytes);
}

/// The owner rewrites its ring while it is being read: what was checked is what is used.
#[test]
fn a_ring_that_changes_under_the_pump_reaches_nothing_else() {
    let hostile = memory(MEMORY);
    let mut driver = Driver::new(&hostile, BASE, SIZE, false);
    let stop = Arc::new(AtomicBool::new(false));
    let mut source = driver.device();
    driver.set_avail_idx(1);
    let writer = std::thread::spawn({
        let (stop, memory) = (Arc::clone(&stop), Arc::clone(&hostile));
        move || scribble(&memory, &stop)
    });
    let start = Instant::now();
    let (mut frames, mut faults, mut seen) = (0, 0, HashMap::new());
    while start.elapsed() < Duration::from_millis(1500) {
        let mut rx = receiver(2048);
        let before = snapshot(&rx.driver.memory);
        let mut target = rx.driver.device();
        let mut counts = Counts::default();
        let outcome = pump::pump(&mut source, &mut target, &flow(Owner::DriverVm), &mut pump::Off, &mut counts);
        if let Err(error) = outcome {
            assert_eq!(error.owner, Owner::DriverVm);
            *seen.entry(std::mem::discriminant(&error.fault)).or_insert(0) += 1;
            faults += 1;
            // A new link: another position in the ring.
            source = driver.device();
        }
        untouched(&rx.driver, &before, u64::from(SIZE) * 2048);
        frames += rx.receive_all().iter().filter(|f| (MIN_FRAME..=MAX_FRAME).contains(&f.len())).count() as u64;
        assert!(counts.frames <= 16);
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    assert!(faults > 10 && seen.len() > 1, "{faults} faults, {frames} frames: the race did not happen");
}

/// Changes lengths, flags, links, heads and the index without rest.
fn scribble(memory: &GuestMemoryMmap, stop: &AtomicBool) {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    while !stop.load(Ordering::Relaxed) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let index = random % u64::from(SIZE);
        let word = ((random >> 8) % 4000) | (((random >> 20) % 6) << 32) | (((random >> 30) % 18) << 48);
        memory.write_obj(DATA + (random >> 40) % 0x8000, GuestAddress(BASE + 16 * index)).unwrap();
        memory.write_obj(word, GuestAddress(BASE + 16 * index + 8)).unwrap();
        let head = u16::try_from((random >> 50) % 17).unwrap();
        memory.write_obj(head, GuestAddress(BASE + 0x4000 + 4 + 2 * index)).unwrap();
        let avail = u16::try_from((random >> 16) % 12).unwrap();
        memory.write_obj(avail, GuestAddress(BASE + 0x4000 + 2)).unwrap();
    }
}
