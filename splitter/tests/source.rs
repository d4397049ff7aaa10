//! Guests that share a NIC: what a guest's frames, its filter and its announcements cannot take from another.
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::vm::{DriverVm, Guest, MAC, attached, generation};
use common::{Rx, Tx, frame};
use umbra_splitter::header::HEADER_LEN;
use umbra_splitter::net::in_flight::InFlight;
use umbra_splitter::net::{Log, Notice};
use umbra_splitter::pump::{self, Addresses, Counts, Flow, HandoverLog, Owner};
use vm_memory::{Bytes, GuestAddress};

const NEIGHBOUR: [u8; 6] = [0x52, 0x54, 0, 1, 2, 4];
const GATEWAY: [u8; 6] = [0, 0x11, 0x22, 0x33, 0x44, 0x55];

fn from(source: [u8; 6], n: u32) -> Vec<u8> {
    let mut frame = frame(n, 100);
    frame[..6].copy_from_slice(&[0xff; 6]);
    frame[6..12].copy_from_slice(&source);
    frame
}

/// A guest that shares its NIC, served.
fn shared(any: bool) -> (Guest, DriverVm) {
    let mut guest = Guest::new();
    guest.splitter.share(vec![NEIGHBOUR], any);
    let mut vm = attached(&mut guest, 1);
    vm.rx.offer_all();
    guest.rx.offer_all();
    guest.splitter.go_live(generation(1), Log::Replay);
    guest.notices.try_iter().for_each(drop);
    (guest, vm)
}

fn send(guest: &mut Guest, sources: &[[u8; 6]]) {
    (0..).zip(sources).for_each(|(n, source)| guest.tx.send(&from(*source, n)));
    guest.turn();
}

fn sources(vm: &mut DriverVm) -> Vec<[u8; 6]> {
    let frames = vm.rx.receive_all();
    vm.rx.offer_all();
    frames.iter().map(|frame| frame[6..12].try_into().unwrap()).collect()
}

fn warned(guest: &Guest) -> Vec<[u8; 6]> {
    let told = guest.notices.try_iter();
    told.filter_map(|notice| if let Notice::ForeignAddress(mac) = notice { Some(mac) } else { None }).collect()
}

#[test]
fn frames_with_anothers_address_are_dropped_and_told() {
    let (mut guest, mut vm) = shared(false);
    let free = [2, 1, 1, 1, 1, 1];
    send(&mut guest, &[MAC, NEIGHBOUR, free, [1; 6], GATEWAY]);
    assert_eq!(sources(&mut vm), [MAC, free, GATEWAY], "nobody has been heard with the last");
    assert_eq!((guest.tx.completed(), guest.splitter.status().out.foreign_source), (5, 2));
    assert_eq!(warned(&guest), [NEIGHBOUR], "once");
    // The gateway speaks; and somebody who uses the guest's own address.
    vm.tx.send(&from(GATEWAY, 10));
    vm.tx.send(&from(MAC, 11));
    guest.turn();
    assert_eq!(guest.rx.receive_all().len(), 2);
    send(&mut guest, &[MAC, GATEWAY, NEIGHBOUR]);
    assert_eq!((sources(&mut vm), guest.splitter.status().out.foreign_source), (vec![MAC], 4));
}

#[test]
fn nor_do_they_go_through_the_log() {
    let (mut guest, mut vm) = shared(false);
    vm.tx.send(&from(GATEWAY, 10));
    guest.turn();
    guest.splitter.mask(generation(1));
    send(&mut guest, &[NEIGHBOUR, MAC, GATEWAY]);
    let status = guest.splitter.status();
    assert_eq!((status.logged_now, status.masked.logged, status.out.foreign_source), (1, 1, 2));
    let mut vm = attached(&mut guest, 2);
    vm.rx.offer_all();
    guest.splitter.go_live(generation(2), Log::Replay);
    assert_eq!(sources(&mut vm), [MAC]);
}

#[test]
fn a_guest_that_bridges_may_use_any_and_so_may_one_alone() {
    let (mut bridging, mut vm) = shared(true);
    send(&mut bridging, &[NEIGHBOUR, MAC]);
    assert_eq!((sources(&mut vm), warned(&bridging)), (vec![NEIGHBOUR, MAC], vec![]));
    assert_eq!(bridging.command(&[&[1, 1], &NEIGHBOUR[..]].concat()), 0);
    let Some(Notice::RxMode(told)) = bridging.notices.try_iter().last() else { panic!("no rx mode") };
    assert_eq!(told.unicast(), [NEIGHBOUR]);

    let mut alone = Guest::new();
    alone.splitter.share(vec![], false);
    let mut vm = attached(&mut alone, 1);
    vm.rx.offer_all();
    alone.splitter.go_live(generation(1), Log::Replay);
    send(&mut alone, &[GATEWAY, [1; 6]]);
    assert_eq!(sources(&mut vm).len(), 2);
}

#[test]
fn asking_for_anothers_frames_and_announcing_its_address_are_of_no_use() {
    let (mut guest, mut vm) = shared(false);
    assert_eq!(guest.command(&[&[1, 1], &NEIGHBOUR[..]].concat()), 0);
    let told: Vec<Notice> = guest.notices.try_iter().collect();
    let [Notice::RxMode(mode), Notice::ForeignAddress(NEIGHBOUR)] = &told[..] else { panic!("{told:?}") };
    assert_eq!(mode.unicast(), [MAC]);
    guest.splitter.announce(generation(1));
    assert!(sources(&mut vm).is_empty());
    assert_eq!(guest.command(&[&[1, 1], &MAC[..]].concat()), 0);
    guest.splitter.announce(generation(1));
    assert_eq!(sources(&mut vm), [MAC]);
}

/// Lets everything pass, after it has seen it and time has gone by.
struct Slow<'a>(InFlight, &'a AtomicBool);

impl HandoverLog for Slow<'_> {
    const LOOKS: bool = true;

    fn admits(&mut self, addresses: &Addresses) -> bool {
        self.1.store(true, Ordering::Release);
        while self.1.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        addresses.source == MAC
    }

    fn handed(&mut self, used: u16, heads: impl Iterator<Item = u16>) {
        self.0.handed(used, heads);
    }
}

#[test]
fn a_source_that_is_changed_behind_the_check_does_not_get_out() {
    use common::{Driver, RINGS_LEN, memory};
    let (a, b) = (memory(4 << 20), memory(4 << 20));
    let mut tx = Tx::new(Driver::new(&a, 0x1000, 16, true), 0x1000 + RINGS_LEN);
    let mut rx = Rx::new(Driver::new(&b, 0x1000, 16, true), 0x1000 + RINGS_LEN, 2048);
    rx.offer_all();
    let at = 0x1000 + RINGS_LEN + u64::from(tx.driver.next_head()) * common::TX_SLOT + HEADER_LEN as u64 + 6;
    tx.send(&from(MAC, 1));
    let looked = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !looked.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            a.write_slice(&NEIGHBOUR, GuestAddress(at)).unwrap();
            looked.store(false, Ordering::Release);
        });
        let flow = Flow {
            source: Owner::Guest,
            negotiated: umbra_splitter::header::Offloads::all(),
            accepted: umbra_splitter::header::Offloads::all(),
            mergeable: true,
        };
        let mut counts = Counts::default();
        let (mut source, mut target) = (tx.driver.device(), rx.driver.device());
        pump::pump(&mut source, &mut target, &flow, &mut Slow(InFlight::default(), &looked), &mut counts).unwrap();
        assert_eq!(counts.frames, 1);
    });
    assert_eq!(rx.receive_all(), [from(MAC, 1)]);
}
