//! The log waits for a carrier, and goes out bit by bit to a NIC that may not forward yet.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::vm::{DriverVm, Guest, MAC, attached, generation};
use common::{frame, number};
use umbra_shadow::net::pacing::{BATCH, LONGEST, STEP};
use umbra_shadow::net::{MaskedCounts, ModeName};
use umbra_splitter::net::{Log, Notice};

/// Frames in the log: more than a NIC that forwards nothing may lose.
const LOGGED: u32 = 60;

fn numbers(vm: &mut DriverVm) -> Vec<u32> {
    let frames = vm.rx.receive_all();
    vm.rx.offer_all();
    frames.iter().filter(|frame| !is_question(frame)).map(|frame| number(frame)).collect()
}

/// A datagram of the guest's to 10.0.0.9.
fn datagram(n: u8) -> Vec<u8> {
    let mut frame = vec![0; 60];
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    frame[6..12].copy_from_slice(&MAC);
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    frame[14] = 0x45;
    frame[26..34].copy_from_slice(&[10, 0, 0, 7, 10, 0, 0, 9]);
    frame[40] = n;
    frame
}

fn is_question(frame: &[u8]) -> bool {
    frame[12..14] == [0x08, 0x06] && frame[20..22] == [0, 1]
}

/// A guest that has sent [`LOGGED`] frames, and a driver VM with room for all of them.
fn with_a_log() -> (Guest, DriverVm) {
    let mut guest = Guest::new();
    for n in 0..LOGGED {
        guest.tx.send(&frame(n, 100));
        guest.turn();
    }
    let mut vm = attached(&mut guest, 1);
    vm.rx.offer_all();
    (guest, vm)
}

fn live(guest: &Guest) -> Option<MaskedCounts> {
    guest.notices.try_iter().find_map(|notice| match notice {
        Notice::Live(_, counts) => Some(counts),
        _ => None,
    })
}

#[test]
fn nothing_is_replayed_into_a_nic_without_carrier() {
    let (mut guest, mut vm) = with_a_log();
    guest.splitter.carrier(generation(1), false);
    guest.splitter.go_live(generation(1), Log::Replay);
    let status = guest.splitter.status();
    assert_eq!((status.mode, status.logged_now, status.masked.replayed), (ModeName::WaitingCarrier, 60, 0));
    assert!(!guest.splitter.shadow().link_up());
    // The guest goes on sending, and is not held up.
    for n in LOGGED..LOGGED + 300 {
        guest.tx.send(&frame(n, 100));
        guest.turn();
    }
    assert_eq!(u32::from(guest.tx.completed()), LOGGED + 300);
    guest.pass(10 * LONGEST);
    guest.splitter.go_on_replaying();
    assert_eq!((numbers(&mut vm).len(), guest.splitter.waits_for_driver_vm()), (0, false));
    assert!(live(&guest).is_none());

    guest.splitter.carrier(generation(1), true);
    assert!(guest.splitter.shadow().link_up());
    assert_eq!(numbers(&mut vm), [0, 1, 2, 3], "a few, until something comes in");
    vm.tx.send(&frame(1000, 60));
    let mut got = vec![0, 1, 2, 3];
    let counts = loop {
        guest.turn();
        got.extend(numbers(&mut vm));
        if let Some(counts) = live(&guest) {
            break counts;
        }
    };
    got.extend(numbers(&mut vm));
    assert_eq!(got, (0..LOGGED + 300).collect::<Vec<_>>());
    assert_eq!(counts, MaskedCounts { logged: 360, replayed: 360, ..Default::default() });
}

#[test]
fn a_carrier_that_goes_during_the_replay_keeps_what_is_left() {
    let (mut guest, mut vm) = with_a_log();
    guest.rx.offer_all();
    guest.splitter.go_live(generation(1), Log::Replay);
    guest.tx.send(&frame(LOGGED, 100));
    guest.turn();
    assert_eq!(u32::from(guest.tx.completed()), LOGGED, "it waits behind the log");
    let sent = guest.splitter.status().masked.replayed;
    assert_eq!(sent, BATCH);
    vm.tx.send(&frame(1000, 60));
    guest.splitter.carrier(generation(1), false);
    assert_eq!(u32::from(guest.tx.completed()), LOGGED + 1, "now it is in the log");
    assert_eq!((guest.splitter.status().masked.replayed, guest.rx.receive_all().len()), (sent, 1));
    guest.splitter.carrier(generation(1), true);
    let masked = guest.splitter.status().masked;
    assert_eq!(masked.replayed, sent + BATCH, "what came in before the carrier was lost is no sign");
    assert_eq!(numbers(&mut vm).len() as u64, sent + BATCH);
    drop(vm);
    let mut second = attached(&mut guest, 2);
    second.rx.offer_all();
    second.tx.send(&frame(1001, 60));
    guest.splitter.go_live(generation(2), Log::Replay);
    let rest = u32::try_from(sent + BATCH).unwrap()..=LOGGED;
    assert_eq!(numbers(&mut second), rest.collect::<Vec<_>>());
    assert_eq!(guest.splitter.status().masked.replayed, u64::from(LOGGED) + 1);
}

#[test]
fn a_silent_network_gets_the_log_in_the_end_and_no_stall_is_seen() {
    let (mut guest, mut vm) = with_a_log();
    guest.splitter.go_live(generation(1), Log::Replay);
    assert!(guest.splitter.is_paced() && !guest.splitter.waits_for_driver_vm());
    let mut handed = vec![(Duration::ZERO, BATCH)];
    for silence in (1..).map(|n| n * STEP) {
        guest.pass(STEP);
        guest.splitter.go_on_replaying();
        let replayed = guest.splitter.status().masked.replayed;
        if handed.last().is_some_and(|(_, before)| *before < replayed) {
            handed.push((silence, replayed));
        }
        if silence == LONGEST {
            break;
        }
        assert!(live(&guest).is_none());
    }
    let bounded = [0, 1, 2, 4, 8, 16].map(|n| n * STEP).into_iter().zip((1..).map(|n| n * BATCH));
    assert_eq!(handed, bounded.chain([(LONGEST, u64::from(LOGGED))]).collect::<Vec<_>>());
    assert!(!guest.splitter.is_paced());
    assert_eq!(live(&guest), Some(MaskedCounts { logged: 60, replayed: 60, ..Default::default() }));
    assert_eq!(numbers(&mut vm), (0..LOGGED).collect::<Vec<_>>());
}

#[test]
fn what_came_in_before_it_was_told_to_go_live_counts_and_is_delivered() {
    let (mut guest, mut vm) = with_a_log();
    guest.rx.offer_all();
    vm.tx.send(&frame(1000, 60));
    guest.splitter.go_live(generation(1), Log::Replay);
    assert!(live(&guest).is_some());
    assert_eq!((numbers(&mut vm).len(), guest.rx.receive_all()), (60, vec![frame(1000, 60)]));
}

#[test]
fn a_short_log_is_not_held_back() {
    let mut guest = Guest::new();
    (0..4).for_each(|n| guest.tx.send(&frame(n, 100)));
    guest.turn();
    let mut vm = attached(&mut guest, 1);
    vm.rx.offer_all();
    guest.splitter.go_live(generation(1), Log::Replay);
    assert!(live(&guest).is_some());
    assert_eq!(vm.rx.receive_all().len(), 4);
}

#[test]
fn a_guest_that_only_sends_has_its_neighbour_asked() {
    let mut guest = Guest::new();
    (0..20).for_each(|n| guest.tx.send(&datagram(n)));
    guest.turn();
    let mut vm = attached(&mut guest, 1);
    vm.rx.offer_all();
    guest.splitter.go_live(generation(1), Log::Replay);
    let frames = vm.rx.receive_all();
    assert_eq!(frames[..4], [0, 1, 2, 3].map(datagram));
    assert!(frames.len() == 5 && is_question(&frames[4]), "{frames:?}");
    assert_eq!((&frames[4][..6], &frames[4][38..42]), (&[2, 0, 0, 0, 0, 9][..], &[10, 0, 0, 9][..]));
    vm.tx.send(&frame(1000, 60));
    guest.turn();
    assert_eq!(live(&guest).unwrap(), MaskedCounts { logged: 20, replayed: 20, ..Default::default() });
    // What the splitter asked is no frame of the guest's: only the twenty can be missing.
    guest.splitter.mask(generation(1));
    assert!(guest.splitter.status().masked.unknown <= 20);
}

#[test]
fn a_spare_that_was_heard_gets_what_is_there_at_once() {
    let (mut guest, mut first) = with_a_log();
    first.tx.send(&frame(1000, 60));
    guest.splitter.go_live(generation(1), Log::Replay);
    let mut spare = attached(&mut guest, 2);
    spare.rx.offer_all();
    guest.splitter.arm(generation(2), true);
    spare.tx.send(&frame(1001, 60));
    guest.turn();
    // Not armed any more: it masks, and is told to go live later.
    guest.splitter.arm(generation(2), false);
    guest.splitter.mask(generation(1));
    for n in 0..LOGGED {
        guest.tx.send(&frame(n, 100));
        guest.turn();
    }
    guest.splitter.go_live(generation(2), Log::Replay);
    assert_eq!((numbers(&mut spare).len(), guest.splitter.status().mode), (60, ModeName::Passive));
}
