//! Frames between two queues in two memories.
#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)]

mod common;

use common::{Driver, RINGS_LEN, Rx, Tx, WRITE, frame, memory, number};
use umbra_splitter::header::{HEADER_LEN, Offloads};
use umbra_splitter::pump::{self, Counts, Fault, Flow, Off, Owner, Stop};
use umbra_splitter::queue::{ChainFault, RingFault, Virtqueue};

const SIZE: u16 = 64;

struct Pair {
    tx: Tx,
    rx: Rx,
    source: Virtqueue,
    target: Virtqueue,
    flow: Flow,
    counts: Counts,
}

impl Pair {
    fn new(source: Owner, rx_len: u32, event_idx: bool) -> Self {
        let (a, b) = (memory(8 << 20), memory(8 << 20));
        let tx = Tx::new(Driver::new(&a, 0x1000, SIZE, event_idx), 0x1000 + RINGS_LEN);
        let rx = Rx::new(Driver::new(&b, 0x2000, SIZE, event_idx), 0x2000 + RINGS_LEN, rx_len);
        let flow = Flow { source, negotiated: Offloads::all(), accepted: Offloads::all(), mergeable: true };
        let (source, target) = (tx.driver.device(), rx.driver.device());
        Self { tx, rx, source, target, flow, counts: Counts::default() }
    }

    fn pump(&mut self) -> Result<Stop, (Owner, Fault)> {
        let Self { source, target, flow, counts, .. } = self;
        pump::pump(source, target, flow, &mut Off, counts).map_err(|e| (e.owner, e.fault))
    }
}

#[test]
fn frames_arrive_whole_and_in_order_with_one_interrupt_each_way() {
    for event_idx in [false, true] {
        let mut pair = Pair::new(Owner::Guest, 2048, event_idx);
        pair.rx.offer_all();
        for n in 0..20 {
            pair.tx.send(&frame(n, 60 + n as usize * 70));
        }
        assert_eq!(pair.pump().unwrap(), Stop::SourceEmpty);
        assert_eq!((pair.tx.driver.interrupts(), pair.rx.driver.interrupts()), (1, 1));
        let got = pair.rx.receive_all();
        assert_eq!(got, (0..20).map(|n| frame(n, 60 + n as usize * 70)).collect::<Vec<_>>());
        assert_eq!(pair.tx.completed(), 20);
        assert_eq!(pair.counts.frames, 20);
    }
}

#[test]
fn a_large_frame_is_merged_from_small_buffers() {
    let mut pair = Pair::new(Owner::Guest, 1536, true);
    pair.rx.offer_all();
    let large = frame(7, 65_000);
    pair.tx.send(&large);
    pair.pump().unwrap();
    let (header, got) = pair.rx.receive().unwrap();
    assert_eq!(u16::from_le_bytes([header[10], header[11]]), 43);
    assert!(got == large);
}

#[test]
fn a_frame_without_buffers_waits_in_its_queue() {
    let mut pair = Pair::new(Owner::Guest, 1536, true);
    pair.rx.offer(2);
    pair.tx.send(&frame(0, 1000));
    pair.tx.send(&frame(1, 3000));
    pair.tx.send(&frame(2, 100));
    assert_eq!(pair.pump().unwrap(), Stop::TargetFull);
    assert_eq!(pair.tx.completed(), 1);
    assert_eq!(pair.rx.receive_all().len(), 1);
    pair.rx.offer(3);
    assert_eq!(pair.pump().unwrap(), Stop::SourceEmpty);
    assert_eq!(pair.rx.receive_all(), [frame(1, 3000), frame(2, 100)]);
    assert_eq!(pair.tx.completed(), 3);
}

#[test]
fn rings_wrap_around() {
    let mut pair = Pair::new(Owner::DriverVm, 2048, true);
    let mut expected = 0;
    for n in 0..70_000u32 {
        pair.tx.send(&frame(n, 64));
        if n % 13 == 0 {
            pair.rx.offer_all();
            pair.pump().unwrap();
            for got in pair.rx.receive_all() {
                assert_eq!(number(&got), expected);
                expected += 1;
            }
        }
    }
    assert!(expected > 69_000);
}

#[test]
fn header_and_frame_may_lie_scattered_and_indirect() {
    let mut pair = Pair::new(Owner::Guest, 2048, true);
    pair.rx.offer_all();
    use vm_memory::{Bytes, GuestAddress};
    let memory = pair.tx.driver.memory.clone();
    let bytes = [vec![0; HEADER_LEN], frame(5, 500)].concat();
    memory.write_slice(&bytes, GuestAddress(0x20_0000)).unwrap();
    pair.tx.driver.offer(&[(0x20_0000, 5, 0), (0x20_0005, 7, 0), (0x20_000c, 1, 0), (0x20_000d, 499, 0)]);
    // The same through an indirect table at an odd address.
    let table = 0x30_0001u64;
    for (place, (address, len)) in [(0x20_0000u64, 12u64), (0x20_000c, 500)].into_iter().enumerate() {
        let (flags, next) = if place == 0 { (1u64, 1u64) } else { (0, 0) };
        let at = table + 16 * place as u64;
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(len | flags << 32 | next << 48, GuestAddress(at + 8)).unwrap();
    }
    pair.tx.driver.offer(&[(table, 32, 4)]);
    pair.pump().unwrap();
    assert_eq!(pair.rx.receive_all(), [frame(5, 500), frame(5, 500)]);
}

#[test]
fn what_the_target_does_not_accept_is_dropped_and_counted() {
    let mut pair = Pair::new(Owner::DriverVm, 2048, true);
    pair.flow.accepted = Offloads::CHECKSUM;
    pair.rx.offer_all();
    let mut tso = [0; HEADER_LEN];
    tso[..10].copy_from_slice(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
    pair.tx.send_with(tso, &frame(0, 5000));
    pair.tx.send(&frame(1, 100));
    pair.pump().unwrap();
    assert_eq!(pair.rx.receive_all(), [frame(1, 100)]);
    assert_eq!((pair.counts.not_accepted, pair.tx.completed()), (1, 2));
}

#[test]
fn a_frame_of_too_many_segments_is_dropped_and_counted_whoever_sends_it() {
    // From the driver VM as well: a host on the wire chooses the segments that its kernel merges.
    for source in [Owner::Guest, Owner::DriverVm] {
        let mut pair = Pair::new(source, 2048, true);
        pair.rx.offer_all();
        let mut tiny = [0; HEADER_LEN];
        tiny[..10].copy_from_slice(&[1, 1, 54, 0, 1, 0, 34, 0, 16, 0]);
        pair.tx.send_with(tiny, &frame(0, 65_000));
        pair.tx.send(&frame(1, 100));
        assert_eq!(pair.pump().unwrap(), Stop::SourceEmpty);
        assert_eq!(pair.rx.receive_all(), [frame(1, 100)]);
        assert_eq!((pair.counts.malformed, pair.counts.frames, pair.tx.completed()), (1, 1, 2));
    }
}

#[test]
fn without_merging_a_frame_needs_one_buffer() {
    let mut pair = Pair::new(Owner::Guest, 1536, true);
    pair.flow.mergeable = false;
    pair.rx.offer_all();
    pair.tx.send(&frame(0, 3000));
    pair.tx.send(&frame(1, 1500));
    pair.pump().unwrap();
    assert_eq!(pair.rx.receive_all(), [frame(1, 1500)]);
    assert_eq!(pair.counts.no_room, 1);
}

#[test]
fn the_guests_malformed_chains_are_its_own_loss() {
    let mut pair = Pair::new(Owner::Guest, 2048, true);
    pair.rx.offer_all();
    let data = 0x20_0000;
    pair.tx.driver.offer(&[(data, 100, WRITE)]);
    pair.tx.driver.offer(&[(u64::MAX - 5, 100, 0)]);
    pair.tx.driver.offer(&[(data, 0, 0)]);
    pair.tx.driver.offer(&[(data, 11, 0)]);
    pair.tx.driver.offer(&[(data, 12 + 65_563, 0)]);
    pair.tx.send(&frame(9, 100));
    assert_eq!(pair.pump().unwrap(), Stop::SourceEmpty);
    assert_eq!(pair.counts.malformed, 5);
    assert_eq!(pair.tx.completed(), 6);
    assert_eq!(pair.rx.receive_all(), [frame(9, 100)]);
}

#[test]
fn the_driver_vms_malformed_chains_are_violations() {
    type Break = fn(&mut Driver);
    let cases: [(Break, &str); 7] = [
        (
            |d| {
                d.offer(&[(0x20_0000, 100, WRITE)]);
            },
            "direction",
        ),
        (
            |d| {
                d.offer(&[(1 << 40, 100, 0)]);
            },
            "outside memory",
        ),
        (
            |d| {
                d.offer(&[(0x20_0000, 20, 0)]);
            },
            "8 bytes",
        ),
        (
            |d| {
                d.offer_head(SIZE);
            },
            "chain head 64",
        ),
        (
            |d| {
                d.set_avail_idx(SIZE + 1);
            },
            "jumped",
        ),
        (
            |d| {
                d.write_descriptor(3, 0x20_0000, 100, 1, 3);
                d.offer_head(3);
            },
            "without end",
        ),
        (
            |d| {
                d.write_descriptor(3, 0x20_0000, 100, 1, SIZE);
                d.offer_head(3);
            },
            "goes on at 64",
        ),
    ];
    for (break_it, what) in cases {
        let mut pair = Pair::new(Owner::DriverVm, 2048, true);
        pair.rx.offer_all();
        break_it(&mut pair.tx.driver);
        let (owner, fault) = pair.pump().unwrap_err();
        assert_eq!(owner, Owner::DriverVm, "{what}");
        let text = std::iter::successors(Some(&fault as &dyn std::error::Error), |e| e.source())
            .map(ToString::to_string)
            .collect::<String>();
        assert!(text.contains(what), "{what}: {text}");
    }
}

#[test]
fn the_driver_vms_receive_buffers_are_checked_too() {
    let mut pair = Pair::new(Owner::Guest, 2048, true);
    pair.tx.send(&frame(0, 100));
    pair.rx.driver.offer(&[(0x20_0000, 2000, 0)]);
    assert!(matches!(pair.pump(), Err((Owner::DriverVm, Fault::Chain(ChainFault::Direction)))));
    let mut pair = Pair::new(Owner::Guest, 2048, true);
    pair.tx.send(&frame(0, 100));
    pair.rx.driver.offer(&[(0x20_0000, 11, WRITE)]);
    assert!(matches!(pair.pump(), Err((Owner::DriverVm, Fault::Room(11)))));
    let mut pair = Pair::new(Owner::Guest, 2048, true);
    pair.tx.send(&frame(0, 100));
    pair.rx.driver.set_avail_idx(30_000);
    assert!(matches!(pair.pump(), Err((Owner::DriverVm, Fault::Ring(RingFault::IndexJump { .. })))));
    // The guest's frame is still its own: nothing was completed.
    assert_eq!(pair.tx.completed(), 0);
}

#[test]
fn what_a_driver_has_taken_from_its_queue_shows_with_event_index() {
    for event_idx in [true, false] {
        let memory = memory(1 << 20);
        let mut driver = Driver::new(&memory, 0x1000, SIZE, event_idx);
        let mut device = driver.device();
        for round in 0..3 {
            let heads = [driver.offer(&[(0x8000, 64, 0)]), driver.offer(&[(0x8000, 64, 0)])];
            assert!(device.open().unwrap().all_taken().unwrap(), "round {round}: nothing was given back");
            for head in heads {
                let mut ring = device.open().unwrap();
                ring.take(1);
                ring.complete(head, 0).unwrap();
            }
            assert_eq!(device.open().unwrap().all_taken().unwrap(), !event_idx);
            driver.take_used().unwrap();
            assert_eq!(device.open().unwrap().all_taken().unwrap(), !event_idx, "one is left");
            driver.take_used().unwrap();
            assert!(device.open().unwrap().all_taken().unwrap());
        }
    }
}
