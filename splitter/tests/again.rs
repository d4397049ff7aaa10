//! One life of a driver VM that is connected several times: to the same guest, whose link was lost, and to the next life of a
//! guest. Its rings go on where they stand.
#![allow(clippy::unwrap_used)]

mod common;

use common::frame;
use common::vm::{DriverVm, Guest, attached, attached_again, attached_as, generation, link};
use umbra_shadow::LinkId;
use umbra_shadow::net::ModeName;
use umbra_splitter::net::{Log, Notice};

fn live(guest: &mut Guest, vm: &mut DriverVm, n: u32) {
    vm.rx.offer_all();
    guest.splitter.go_live(generation(n), Log::Replay);
    loop {
        match guest.notice() {
            Notice::Live(g, _) if g == generation(n) => return,
            Notice::LinkLost(l, cause) => panic!("link {l} lost: {cause}"),
            _ => {}
        }
    }
}

fn lost(guest: &mut Guest, id: LinkId) {
    loop {
        match guest.notice() {
            Notice::LinkLost(l, _) if l == id => return,
            Notice::Live(..) => panic!("live"),
            _ => {}
        }
    }
}

fn exchange(guest: &mut Guest, vm: &mut DriverVm, from: u32) {
    guest.rx.offer_all();
    for n in from..from + 10 {
        guest.tx.send(&frame(n, 100));
        vm.tx.send(&frame(n + 1000, 300));
    }
    guest.turn();
    assert_eq!(vm.rx.receive_all(), (from..from + 10).map(|n| frame(n, 100)).collect::<Vec<_>>());
    assert_eq!(guest.rx.receive_all(), (from..from + 10).map(|n| frame(n + 1000, 300)).collect::<Vec<_>>());
}

#[test]
fn a_lost_link_of_a_driver_vm_that_lives_is_made_again_and_what_came_meanwhile_is_replayed() {
    let mut guest = Guest::new();
    let mut vm = attached(&mut guest, 1);
    live(&mut guest, &mut vm, 1);
    exchange(&mut guest, &mut vm, 1);
    let mut id = link(1);
    for round in 1..4 {
        // The connection ends by itself; the driver VM is not accused of anything here.
        let socket = vm.hang_up();
        lost(&mut guest, id);
        drop(socket);
        guest.tx.send(&frame(100 * round, 100));
        guest.turn();
        assert_eq!(guest.splitter.status().mode, ModeName::Masking);
        // Of the time without a link, and not for the guest.
        vm.tx.send(&frame(7777, 100));
        id = id.next();
        attached_again(&mut guest, &mut vm, id);
        live(&mut guest, &mut vm, 1);
        assert_eq!(vm.rx.receive_all(), [frame(100 * round, 100)]);
        exchange(&mut guest, &mut vm, 100 * round + 1);
    }
}

#[test]
fn the_next_life_of_a_guest_goes_on_with_the_same_driver_vm() {
    let mut first = Guest::new();
    let mut vm = attached(&mut first, 1);
    live(&mut first, &mut vm, 1);
    exchange(&mut first, &mut vm, 1);
    drop(first);
    let mut second = Guest::new();
    attached_again(&mut second, &mut vm, link(1).next());
    live(&mut second, &mut vm, 1);
    exchange(&mut second, &mut vm, 100);
}

#[test]
fn the_serving_life_is_connected_again_although_another_one_waits() {
    let mut guest = Guest::new();
    let mut first = attached(&mut guest, 1);
    live(&mut guest, &mut first, 1);
    let mut second = attached(&mut guest, 2);
    second.rx.offer_all();
    drop(first.hang_up());
    lost(&mut guest, link(1));
    attached_again(&mut guest, &mut first, link(1).next());
    live(&mut guest, &mut first, 1);
    exchange(&mut guest, &mut first, 1);
    // The one that waited still does.
    guest.splitter.mask(generation(1));
    live(&mut guest, &mut second, 2);
    exchange(&mut guest, &mut second, 50);
}

/// A guest's process that starts hears of the life that serves and of its standby in one breath.
#[test]
fn a_waiting_link_does_not_displace_one_that_is_being_set_up() {
    let mut guest = Guest::new();
    let ((mut first, socket), (mut second, other)) = (DriverVm::new(), DriverVm::new());
    guest.splitter.attach(link(1), socket);
    guest.splitter.go_live(generation(1), Log::Replay);
    guest.splitter.attach(link(2), other);
    first.rx.offer_all();
    first.connect();
    second.connect();
    loop {
        match guest.notice() {
            Notice::Live(g, _) => break assert_eq!(g, generation(1)),
            Notice::LinkLost(lost, cause) => panic!("link {lost} lost: {cause}"),
            _ => {}
        }
    }
    exchange(&mut guest, &mut first, 1);
    guest.splitter.mask(generation(1));
    live(&mut guest, &mut second, 2);
    exchange(&mut guest, &mut second, 50);
}

/// A guest's process that starts slowly finds that nobody waits at the other ends any more: both lives are connected again, in any
/// order, and the present one serves.
#[test]
fn connections_that_were_given_up_before_they_served_bar_no_other_life() {
    for standby_first in [false, true] {
        let mut guest = Guest::new();
        let (mut first, mut second) = (DriverVm::new().0, DriverVm::new().0);
        let dead = || DriverVm::new().1;
        guest.splitter.attach(link(1), dead());
        guest.splitter.go_live(generation(1), Log::Replay);
        guest.splitter.attach(link(2), dead());
        let mut awaited = vec![link(1), link(2)];
        while !awaited.is_empty() {
            if let Notice::LinkLost(lost, _) = guest.notice() {
                awaited.retain(|id| *id != lost);
            }
        }
        if standby_first {
            attached_again(&mut guest, &mut second, link(2).next());
            attached_again(&mut guest, &mut first, link(1).next());
        } else {
            attached_again(&mut guest, &mut first, link(1).next());
            attached_again(&mut guest, &mut second, link(2).next());
        }
        live(&mut guest, &mut first, 1);
        exchange(&mut guest, &mut first, 1);
        second.rx.offer_all();
        guest.splitter.mask(generation(1));
        live(&mut guest, &mut second, 2);
        exchange(&mut guest, &mut second, 50);
    }
}

#[test]
fn a_link_that_was_given_up_or_is_older_is_refused() {
    let mut guest = Guest::new();
    let mut vm = attached_as(&mut guest, link(3).next());
    live(&mut guest, &mut vm, 3);
    for old in [link(3), link(2), link(1).next()] {
        let socket = DriverVm::new();
        guest.splitter.attach(old, socket.1);
        assert!(vhost::VhostBackend::get_features(&socket.0.frontend).is_err(), "{old}");
    }
    exchange(&mut guest, &mut vm, 1);
    guest.splitter.mask(generation(3));
    let (refused, socket) = DriverVm::new();
    guest.splitter.attach(link(3).next().next(), socket);
    assert!(vhost::VhostBackend::get_features(&refused.frontend).is_err(), "the supervisor gave the generation up");
}
