//! A hot spare's link: armed it goes live by itself, before it is not heard, and the network is told.
#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::vm::{DriverVm, Guest, MAC, attached, attached_again, attached_as, generation, link};
use common::{frame, number};
use proptest::prelude::*;
use umbra_shadow::net::{MaskedCounts, ModeName};
use umbra_splitter::link::Cause;
use umbra_splitter::net::{Log, Notice};
use vhost::vhost_user::Frontend;

/// A guest that is served by generation 1, and generation 2 that waits, with receive buffers, unarmed.
fn served_with_another_waiting() -> (Guest, DriverVm, DriverVm) {
    served_with_another_waiting_by(Guest::new())
}

fn served_with_another_waiting_by(mut guest: Guest) -> (Guest, DriverVm, DriverVm) {
    let mut first = attached(&mut guest, 1);
    first.rx.offer_all();
    guest.splitter.go_live(generation(1), Log::Replay);
    while !matches!(guest.notice(), Notice::Live(..)) {}
    guest.rx.offer_all();
    let mut second = attached(&mut guest, 2);
    second.rx.offer_all();
    (guest, first, second)
}

fn armed() -> (Guest, DriverVm, DriverVm) {
    let (mut guest, mut first, second) = served_with_another_waiting();
    guest.splitter.arm(generation(2), true);
    assert_eq!(take_announcements(&mut first), 1, "the question about the network");
    (guest, first, second)
}

/// Takes all frames that have arrived; how many announcements of the guest's address were among them.
fn take_announcements(vm: &mut DriverVm) -> usize {
    let frames = vm.rx.receive_all();
    vm.rx.offer_all();
    frames.iter().filter(|frame| is_announcement(frame)).count()
}

fn is_announcement(frame: &[u8]) -> bool {
    frame[..6] == [0xff; 6] && frame[6..12] == MAC && frame[12..14] == [0x80, 0x35]
}

fn notices(guest: &Guest) -> Vec<Notice> {
    guest.notices.try_iter().collect()
}

#[test]
fn an_armed_link_goes_live_in_the_same_call_and_tells_the_network_first() {
    let (mut guest, mut first, mut second) = armed();
    guest.tx.send(&frame(1, 100));
    guest.turn();
    assert_eq!(first.rx.receive_all(), [frame(1, 100)]);
    guest.tx.send(&frame(2, 100));
    guest.splitter.mask(generation(1));
    assert_eq!(guest.splitter.status().mode, ModeName::Passive);
    let told = notices(&guest);
    assert!(matches!(told[..], [Notice::Live(g, counts)] if g == generation(2) && counts.logged == 0), "{told:?}");
    let frames = second.rx.receive_all();
    assert_eq!(frames.len(), 2);
    assert!(is_announcement(&frames[0]));
    assert_eq!(frames[1], frame(2, 100), "what waited in the guest's queue goes out without a stay in the log");
    second.tx.send(&frame(7, 90));
    guest.turn();
    assert_eq!(guest.rx.receive_all(), [frame(7, 90)]);
    assert_eq!(first.rx.receive_all().len(), 0);
}

#[test]
fn an_announcement_that_is_lost_is_no_frame_of_the_guest() {
    let (mut guest, mut first, _second) = served_with_another_waiting();
    (0..3).for_each(|n| guest.tx.send(&frame(n, 100)));
    guest.turn();
    assert_eq!(first.rx.receive_all().len(), 3);
    first.rx.offer_all();
    // The question about the network goes out, and dies with the driver VM.
    guest.splitter.arm(generation(2), true);
    guest.splitter.mask(generation(1));
    let told = notices(&guest);
    assert!(matches!(told[..], [Notice::Live(_, counts)] if counts == MaskedCounts::default()), "{told:?}");
}

#[test]
fn an_armed_link_takes_over_from_one_that_closes_or_breaks_a_rule() {
    for breaks in [false, true] {
        let (mut guest, mut first, mut second) = armed();
        if breaks {
            first.tx.driver.set_avail_idx(u16::MAX);
            guest.turn();
        } else {
            drop(first);
        }
        match guest.notice() {
            Notice::LinkLost(g, cause) => assert_eq!((g, matches!(cause, Cause::Closed)), (link(1), !breaks)),
            other => panic!("{other:?}"),
        }
        assert!(matches!(guest.notice(), Notice::Live(g, _) if g == generation(2)));
        assert_eq!(take_announcements(&mut second), 1);
    }
}

#[test]
fn what_an_armed_link_brings_in_before_it_serves_is_never_delivered() {
    let (mut guest, _first, mut second) = armed();
    for n in 0..200 {
        second.tx.send(&frame(n, 100));
        if n % 10 == 9 {
            guest.turn();
        }
    }
    assert_eq!(second.tx.completed(), 200, "its ring does not fill");
    // These are still in its ring when it takes over.
    second.tx.send(&frame(200, 100));
    guest.splitter.mask(generation(1));
    second.tx.send(&frame(201, 100));
    guest.turn();
    assert_eq!(guest.rx.receive_all(), [frame(201, 100)]);
}

#[test]
fn a_link_that_is_not_armed_waits_to_be_told() {
    let (mut guest, mut first, mut second) = armed();
    guest.splitter.arm(generation(2), false);
    guest.splitter.mask(generation(1));
    guest.tx.send(&frame(1, 100));
    guest.turn();
    assert_eq!(guest.splitter.status().mode, ModeName::Masking);
    assert_eq!(second.rx.receive_all().len(), 0, "nothing goes through it");
    guest.splitter.announce(generation(2));
    guest.splitter.go_live(generation(2), Log::Replay);
    let frames = second.rx.receive_all();
    assert!(is_announcement(&frames[0]) && frames[1..] == [frame(1, 100)]);
    // A life that it serves already has announced again, no more.
    guest.splitter.announce(generation(2));
    second.rx.offer_all();
    assert_eq!(take_announcements(&mut second), 1);
    assert_eq!(first.rx.receive_all().len(), 0);
}

#[test]
fn a_driver_vm_that_dies_in_replay_leaves_its_log_to_be_judged() {
    let (mut guest, _first, _second) = served_with_another_waiting();
    guest.splitter.mask(generation(1));
    for n in 0..100 {
        guest.tx.send(&frame(n, 100));
        guest.turn();
    }
    // More frames than generation 2 has buffers: it is in the midst of the replay when generation 3 comes.
    guest.splitter.go_live(generation(2), Log::Replay);
    assert_eq!(guest.splitter.status().mode, ModeName::Replaying);
    let mut third = attached(&mut guest, 3);
    third.rx.offer_all();
    guest.splitter.arm(generation(3), true);
    guest.splitter.mask(generation(2));
    assert_eq!(guest.splitter.status().mode, ModeName::Masking);
    guest.splitter.go_live(generation(3), Log::Drop);
    assert_eq!((guest.splitter.status().mode, third.rx.receive_all().len()), (ModeName::Passive, 0));
}

#[test]
fn a_frame_of_the_guest_s_that_comes_back_proves_the_network() {
    let (mut guest, _first, mut second) = armed();
    second.tx.send(&frame(1, 100));
    guest.turn();
    assert!(notices(&guest).is_empty());
    let mut echo = frame(2, 100);
    echo[6..12].copy_from_slice(&MAC);
    for _ in 0..3 {
        second.tx.send(&echo);
        guest.turn();
    }
    let told = notices(&guest);
    assert!(matches!(told[..], [Notice::SameNetwork(g)] if g == generation(2)), "once: {told:?}");
    assert!(guest.rx.receive_all().is_empty());
}

#[test]
fn the_supervisor_hears_when_an_armed_link_is_lost_and_the_guest_does_not() {
    let (mut guest, mut first, second) = armed();
    drop(second);
    assert!(matches!(guest.notice(), Notice::LinkLost(g, Cause::Closed) if g == link(2)));
    guest.tx.send(&frame(1, 100));
    guest.turn();
    assert_eq!(guest.splitter.status().mode, ModeName::Passive);
    assert_eq!(first.rx.receive_all(), [frame(1, 100)]);
}

#[test]
fn a_waiting_link_that_is_lost_is_told_once_and_may_come_again() {
    let (mut guest, mut first, second) = served_with_another_waiting();
    drop(second);
    assert!(matches!(guest.notice(), Notice::LinkLost(g, Cause::Closed) if g == link(2)));
    guest.tx.send(&frame(1, 100));
    guest.turn();
    assert_eq!(first.rx.receive_all(), [frame(1, 100)], "the guest notices nothing");
    guest.splitter.mask(generation(1));
    guest.splitter.go_live(generation(2), Log::Replay);
    assert!(notices(&guest).is_empty());
    let mut again = attached_as(&mut guest, link(2).next());
    again.rx.offer_all();
    guest.splitter.go_live(generation(2), Log::Replay);
    assert_eq!(guest.splitter.status().mode, ModeName::Passive);
    guest.splitter.mask(generation(2));
    let mut third = attached(&mut guest, 3);
    third.rx.offer_all();
    guest.splitter.go_live(generation(3), Log::Replay);
    assert_eq!(guest.splitter.status().mode, ModeName::Passive);
}

#[test]
fn one_that_waits_is_not_missing_when_it_is_told_to_go_live_too_early() {
    let (mut guest, _first, _second) = served_with_another_waiting();
    guest.splitter.go_live(generation(2), Log::Replay);
    assert!(notices(&guest).is_empty());
    assert_eq!(guest.splitter.serving(), Some(generation(1)));
}

/// The driver VM's side has given the connection up and the supervisor has made another, before the guest has seen the end of the
/// first, because its process stood still.
#[test]
fn a_serving_link_that_is_made_again_before_its_end_is_seen_leaves_the_waiting_one_waiting() {
    for is_armed in [false, true] {
        let (mut guest, mut first, mut second) = served_with_another_waiting();
        guest.splitter.arm(generation(2), is_armed);
        take_announcements(&mut first);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let _unseen = std::mem::replace(&mut first.frontend, Frontend::from_stream(ours, 2));
        guest.splitter.attach(link(1).next(), theirs);
        guest.tx.send(&frame(1, 100));
        guest.turn();
        assert_eq!(guest.splitter.status().mode, ModeName::Masking);
        first.connect();
        while !matches!(guest.notice(), Notice::LinkUp(id) if id == link(1).next()) {}
        guest.splitter.go_live(generation(1), Log::Replay);
        assert_eq!(guest.splitter.serving(), Some(generation(1)));
        assert_eq!(first.rx.receive_all(), [frame(1, 100)]);
        guest.splitter.mask(generation(1));
        assert_eq!(guest.splitter.serving(), is_armed.then_some(generation(2)));
        guest.splitter.go_live(generation(2), Log::Replay);
        assert_eq!(guest.splitter.serving(), Some(generation(2)));
        assert_eq!(take_announcements(&mut second), usize::from(is_armed));
    }
}

/// A guest that starts may be connected with the spare first; and a link that was lost before it served is made again.
#[test]
fn a_spare_is_armed_whenever_its_link_comes_to_wait() {
    for is_lost in [false, true] {
        let mut guest = Guest::new();
        let before = is_lost.then(|| attached(&mut guest, 1));
        let mut second = attached(&mut guest, 2);
        second.rx.offer_all();
        guest.splitter.arm(generation(2), true);
        let (mut first, id) = match before {
            Some(mut first) => {
                let socket = first.hang_up();
                while !matches!(guest.notice(), Notice::LinkLost(id, _) if id == link(1)) {}
                drop(socket);
                attached_again(&mut guest, &mut first, link(1).next());
                (first, link(1).next())
            }
            None => (attached(&mut guest, 1), link(1)),
        };
        first.rx.offer_all();
        guest.splitter.go_live(generation(1), Log::Replay);
        assert_eq!((guest.splitter.serving(), guest.splitter.shadow().link()), (Some(generation(1)), Some(id)));
        guest.rx.offer_all();
        second.tx.send(&frame(7, 100));
        guest.turn();
        guest.splitter.mask(generation(1));
        assert_eq!(guest.splitter.serving(), Some(generation(2)));
        assert!(guest.rx.receive_all().is_empty(), "what it had brought in is of another time");
    }
}

#[test]
fn an_armed_link_that_breaks_a_rule_is_lost_alone() {
    let (mut guest, _first, second) = armed();
    let mut second = second;
    second.tx.driver.set_avail_idx(u16::MAX);
    guest.turn();
    assert!(matches!(guest.notice(), Notice::LinkLost(g, Cause::Data(_)) if g == link(2)));
    assert_eq!(guest.splitter.status().mode, ModeName::Passive);
}

#[test]
fn quarantine_ends_the_armed_one_too() {
    let (mut guest, _first, _second) = armed();
    guest.splitter.quarantine();
    assert_eq!(guest.splitter.status().mode, ModeName::Quarantined);
    assert!(!guest.splitter.shadow().link_up());
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Send,
    /// The waiting one brings a frame in.
    Noise,
    /// The serving one brings a frame in.
    Deliver,
    /// Crash of the serving one; a new one takes its place behind the spare.
    Crash,
    /// A message about a generation that is no more.
    Stale,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => Just(Step::Send),
        3 => Just(Step::Noise),
        3 => Just(Step::Deliver),
        1 => Just(Step::Crash),
        1 => Just(Step::Stale),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the order: each frame of the guest goes to one driver VM, in order, none is lost or sent twice; the guest gets
    /// what the serving one brought in and nothing else.
    #[test]
    fn every_frame_goes_once_through_the_one_that_serves(steps in prop::collection::vec(step(), 0..40)) {
        let (mut guest, mut serving, mut spare) = armed();
        let (mut n, mut newest) = (0, 2);
        let (mut sent, mut taken, mut delivered, mut got) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let numbers = |frames: Vec<Vec<u8>>| -> Vec<u32> {
            frames.iter().filter(|frame| !is_announcement(frame)).map(|frame| number(frame)).collect()
        };
        for step in steps {
            n += 1;
            match step {
                Step::Send => {
                    guest.tx.send(&frame(n, 100));
                    sent.push(n);
                }
                Step::Noise => spare.tx.send(&frame(n, 100)),
                Step::Deliver => {
                    serving.tx.send(&frame(n, 100));
                    delivered.push(n);
                }
                Step::Crash => {
                    guest.splitter.mask(generation(newest - 1));
                    taken.extend(numbers(serving.rx.receive_all()));
                    newest += 1;
                    serving = std::mem::replace(&mut spare, attached(&mut guest, newest));
                    spare.rx.offer_all();
                    guest.splitter.arm(generation(newest), true);
                }
                Step::Stale => {
                    guest.splitter.arm(generation(1), false);
                    if newest > 2 {
                        guest.splitter.mask(generation(1));
                        guest.splitter.go_live(generation(1), Log::Drop);
                    }
                }
            }
            guest.turn();
            taken.extend(numbers(serving.rx.receive_all()));
            serving.rx.offer_all();
            got.extend(numbers(guest.rx.receive_all()));
            guest.rx.offer_all();
            prop_assert_eq!(guest.splitter.status().mode, ModeName::Passive);
        }
        prop_assert_eq!(taken, sent);
        prop_assert_eq!(got, delivered);
        prop_assert_eq!(spare.rx.receive_all().len(), 0);
        let MaskedCounts { logged, dropped, .. } = guest.splitter.status().masked;
        prop_assert_eq!((logged, dropped), (0, 0));
    }
}

#[test]
fn hosts_behind_the_guest_are_announced_at_a_take_over() {
    const HOST: [u8; 6] = [2, 0, 0, 0, 0x77, 0x66];
    const GONE: [u8; 6] = [2, 0, 0, 0, 0x77, 0x67];
    let from = |source: [u8; 6], n| {
        let mut frame = frame(n, 100);
        frame[6..12].copy_from_slice(&source);
        frame
    };
    for keeps in [true, false] {
        let mut guest = Guest::new();
        if keeps {
            guest.splitter.keep_behind();
        }
        let (mut guest, mut first, mut second) = served_with_another_waiting_by(guest);
        guest.splitter.arm(generation(2), true);
        (0..).zip([MAC, HOST, GONE]).for_each(|(n, source)| guest.tx.send(&from(source, n)));
        guest.turn();
        // One of them answers from the wire, after the time in which an echo may come.
        guest.pass(Duration::from_secs(2));
        first.tx.send(&from(GONE, 9));
        guest.turn();
        drop(first);
        while !matches!(guest.notice(), Notice::Live(..)) {}
        let announced: Vec<_> = second.rx.receive_all().iter().map(|frame| frame[6..12].to_vec()).collect();
        let expected: &[[u8; 6]] = if keeps { &[MAC, HOST] } else { &[MAC] };
        assert_eq!(announced, expected, "the guest's own first");
    }
}
