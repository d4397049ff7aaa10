//! Frames that wait for a driver VM which offers no buffers: whom that is blamed on, and whom not.
#![allow(clippy::unwrap_used)]

mod common;

use common::frame;
use common::vm::{DriverVm, Guest, attached, generation};
use umbra_shadow::net::ModeName;
use umbra_splitter::link::Cause;
use umbra_splitter::net::{GuestQueue, Log, Notice};

/// More looks than a stall takes.
const MANY: usize = 20;

/// A guest that generation 1 serves; its driver VM has two buffers left.
fn served_with_two_buffers() -> (Guest, DriverVm) {
    let mut guest = Guest::new();
    let mut vm = attached(&mut guest, 1);
    guest.splitter.go_live(generation(1), Log::Replay);
    while !matches!(guest.notice(), Notice::Live(..)) {}
    vm.rx.offer(2);
    (guest, vm)
}

fn send(guest: &mut Guest, count: u32) {
    (0..count).for_each(|n| guest.tx.send(&frame(n, 100)));
    guest.turn();
}

/// Whether the driver VM is given up as stalled.
fn is_stalled(guest: &mut Guest) -> bool {
    (0..MANY).for_each(|_| guest.splitter.check_progress());
    guest.notices.try_iter().any(|notice| matches!(notice, Notice::LinkLost(_, Cause::Stalled(_))))
}

/// A guest's log waits for room in the queue of a driver VM, and its device was reset.
fn replays_after_a_reset() -> (Guest, DriverVm) {
    let mut guest = Guest::new();
    send(&mut guest, 5);
    let mut vm = attached(&mut guest, 1);
    vm.rx.offer(2);
    guest.splitter.go_live(generation(1), Log::Replay);
    guest.splitter.stop_queue(GuestQueue::Tx);
    (guest, vm)
}

#[test]
fn a_driver_vm_that_takes_nothing_is_given_up() {
    let (mut guest, _vm) = served_with_two_buffers();
    send(&mut guest, 5);
    assert!(guest.splitter.waits_for_driver_vm());
    assert!(is_stalled(&mut guest));
    assert!(!guest.splitter.waits_for_driver_vm());
    assert_eq!(guest.splitter.status().mode, ModeName::Masking);
}

#[test]
fn a_guest_that_resets_its_device_while_its_frames_wait_makes_no_stall() {
    let (mut guest, _vm) = served_with_two_buffers();
    send(&mut guest, 5);
    assert!(guest.splitter.waits_for_driver_vm());
    for name in GuestQueue::ALL {
        guest.splitter.stop_queue(name);
    }
    guest.turn();
    assert!(!guest.splitter.waits_for_driver_vm());
    assert!(!is_stalled(&mut guest));
    assert_eq!(guest.splitter.status().mode, ModeName::Passive);
}

#[test]
fn a_log_that_waits_is_a_stall_whatever_the_guest_does() {
    let (mut guest, _vm) = replays_after_a_reset();
    assert!(guest.splitter.waits_for_driver_vm());
    assert!(is_stalled(&mut guest));
}

/// The guest's boot loader has left the device, and its system has not taken it yet.
#[test]
fn a_log_that_waits_for_a_carrier_is_no_stall_whatever_the_guest_does() {
    let (mut guest, _vm) = replays_after_a_reset();
    guest.splitter.carrier(generation(1), false);
    assert_eq!(guest.splitter.status().mode, ModeName::WaitingCarrier);
    assert!(!guest.splitter.waits_for_driver_vm());
    assert!(!is_stalled(&mut guest));
    guest.splitter.carrier(generation(1), true);
    assert!(is_stalled(&mut guest), "with a carrier it is");
}

#[test]
fn nothing_waits_for_a_driver_vm_that_is_lost() {
    let mut guest = Guest::new();
    send(&mut guest, 5);
    let _vm = attached(&mut guest, 1);
    guest.splitter.go_live(generation(1), Log::Replay);
    guest.splitter.stop_queue(GuestQueue::Tx);
    guest.splitter.mask(generation(1));
    assert!(!guest.splitter.waits_for_driver_vm());
    let mut second = attached(&mut guest, 2);
    second.rx.offer_all();
    second.tx.send(&frame(9, 100));
    guest.splitter.go_live(generation(2), Log::Replay);
    assert!(!is_stalled(&mut guest));
    assert_eq!(guest.splitter.status().mode, ModeName::Passive);
}
