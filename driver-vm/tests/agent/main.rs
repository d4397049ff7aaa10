//! The agent in a real driver VM: a stock kernel with real drivers of NICs and disks under plain QEMU. Needs `qemu-system-x86_64` and
//! a kernel package named by `UMBRA_TEST_KERNEL_DEB`; `cargo test -p umbra-driver-vm --test agent -- --ignored` runs them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod disks;
mod vm;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use umbra_driver_vm::protocol::{CrashKind, FromAgent, Mac, RxMode, ToAgent};
use vm::{DriverVm, GUEST, STATION, frame, mode_of, plan};

const OTHER: Mac = Mac([0x52, 0x54, 0, 0x99, 0x99, 0x99]);
const GROUP: Mac = Mac([1, 0, 0x5e, 0, 0, 251]);
const BROADCAST: Mac = Mac([0xff; 6]);

/// One VM at a time: they are emulated and would starve each other.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn frames_pass_and_filters_hold(nic: &str, driver: &str) {
    let _alone = alone();
    let Some(mut vm) = DriverVm::forwarding(nic, driver, vec![mode_of(GUEST)]) else { return };
    assert!(!vm.has_sent_anything(), "the VM sends frames of its own");

    assert!(vm.leaves(&frame(STATION, GUEST, None), 0));
    assert!(vm.leaves(&frame(STATION, GUEST, Some(5)), 0), "a tag is lost on the way out");
    assert!(vm.arrives(&frame(GUEST, STATION, None), 0));
    assert!(vm.arrives(&frame(BROADCAST, STATION, None), 0));
    assert!(!vm.arrives(&frame(OTHER, STATION, None), 0), "a foreign address passes");
    assert!(!vm.arrives(&frame(GROUP, STATION, None), 0), "a group that was not joined passes");

    let more = RxMode { unicast: vec![GUEST, OTHER], multicast: vec![GROUP], ..mode_of(GUEST) };
    vm.set_mode(0, more);
    vm.comes_true("another address passes", |vm| vm.arrives(&frame(OTHER, STATION, None), 0));
    vm.comes_true("a group passes", |vm| vm.arrives(&frame(GROUP, STATION, None), 0));
    vm.set_mode(0, RxMode { vlans: Some(vec![5]), ..mode_of(GUEST) });
    vm.comes_true("a tag is kept on the way in", |vm| vm.arrives(&frame(GUEST, STATION, Some(5)), 0));
    vm.set_mode(0, mode_of(GUEST));
    vm.comes_true("an address that was given up is deaf", |vm| !vm.arrives(&frame(OTHER, STATION, None), 0));
    vm.comes_true("a group that was left is deaf", |vm| !vm.arrives(&frame(GROUP, STATION, None), 0));
    vm.set_mode(0, RxMode { all_multicast: true, ..mode_of(GUEST) });
    vm.comes_true("all groups pass", |vm| vm.arrives(&frame(GROUP, STATION, None), 0));
    assert!(!vm.arrives(&frame(OTHER, STATION, None), 0));
    vm.set_mode(0, RxMode { promiscuous: true, ..mode_of(GUEST) });
    vm.comes_true("everything passes", |vm| vm.arrives(&frame(OTHER, STATION, None), 0));

    vm.send(&ToAgent::Crash { kind: CrashKind::Panic });
    assert!(vm.wait_for_end() < Duration::from_secs(5));
    assert!(vm.console().contains("Kernel panic - not syncing"), "{}", vm.console());
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn e1000e_forwards_and_filters() {
    frames_pass_and_filters_hold("e1000e", "e1000e");
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn igb_forwards_and_filters() {
    frames_pass_and_filters_hold("igb", "igb");
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn rtl8139_forwards_and_filters() {
    frames_pass_and_filters_hold("rtl8139", "8139cp");
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn two_guests_share_a_nic() {
    let _alone = alone();
    let (a, b) = (Mac([0x52, 0x54, 0, 0, 0, 0xa]), Mac([0x52, 0x54, 0, 0, 0, 0xb]));
    let Some(mut vm) = DriverVm::forwarding("e1000e", "e1000e", vec![mode_of(a), mode_of(b)]) else { return };
    assert!(!vm.has_sent_anything(), "the VM sends frames of its own");
    assert!(vm.arrives(&frame(a, STATION, None), 0));
    assert!(!vm.arrives(&frame(a, STATION, None), 1), "one guest sees the other's frames");
    assert!(vm.arrives(&frame(b, STATION, Some(7)), 1));
    assert!(vm.leaves(&frame(STATION, a, None), 0) && vm.leaves(&frame(STATION, b, Some(7)), 1));
    assert!(vm.crosses(&frame(b, a, None), 0, 1));
    assert!(vm.arrives(&frame(BROADCAST, STATION, None), 0) && vm.arrives(&frame(GROUP, STATION, None), 1));
    vm.set_mode(1, mode_of(OTHER));
    vm.comes_true("the new address passes", |vm| {
        vm.arrives(&frame(OTHER, STATION, None), 1) && !vm.arrives(&frame(OTHER, STATION, None), 0)
    });
    vm.send(&ToAgent::Crash { kind: CrashKind::Reboot });
    vm.wait_for_end();
    assert!(!vm.console().contains("Kernel panic"));
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn a_missing_nic_is_named() {
    let _alone = alone();
    let Some(mut vm) = DriverVm::boot(None, "e1000e", 1) else { return };
    vm.begin();
    vm.send(&ToAgent::ConfigureNet(plan(vec![mode_of(GUEST)])));
    let failed = vm.expect(|m| matches!(m, FromAgent::Failed { .. }));
    assert!(matches!(&failed, FromAgent::Failed { what } if what.contains("the NIC has not appeared")), "{failed:?}");
    vm.wait_for_end();
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn nonsense_from_the_host_is_a_failure() {
    let _alone = alone();
    let Some(mut vm) = DriverVm::boot(None, "e1000e", 1) else { return };
    vm.begin();
    vm.send(&ToAgent::SetRxMode { end: 0, mode: RxMode::default() });
    let failed = vm.expect(|m| matches!(m, FromAgent::Failed { .. }));
    assert!(
        matches!(&failed, FromAgent::Failed { what } if what.contains("settings for a network that is none")),
        "{failed:?}"
    );
    vm.wait_for_end();
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn a_driver_that_holds_the_network_lock_holds_no_beat_up() {
    let _alone = alone();
    let Some(mut vm) = DriverVm::forwarding("e1000e", "e1000e", vec![mode_of(GUEST)]) else { return };
    vm.send(&ToAgent::Crash { kind: CrashKind::LockNetwork });
    // What is ordered meanwhile waits for the lock, and holds nothing up either.
    vm.set_mode(0, RxMode { promiscuous: true, ..mode_of(GUEST) });
    let beats = vm.beats_until("the self-test ends", |vm| vm.console().contains("the self-test of"));
    let console = vm.console();
    let line = console.lines().find(|line| line.contains("the self-test of")).unwrap();
    let took: u32 = line.split_whitespace().rev().nth(1).unwrap().parse().unwrap();
    assert!(line.contains("has ended") && took >= 3000, "{line}");
    assert!(beats >= took / 250 / 2, "{beats} beats in {took} ms");
    vm.comes_true("the order is obeyed", |vm| vm.arrives(&frame(OTHER, STATION, None), 0));
    assert!(vm.leaves(&frame(STATION, GUEST, None), 0));
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn an_end_without_a_link_is_waited_for_by_nobody_and_comes_at_any_time() {
    let _alone = alone();
    let Some(mut vm) = DriverVm::boot(Some("e1000e"), "e1000e", 1) else { return };
    vm.set_link(0, false);
    vm.expect_forwarding(vec![mode_of(GUEST)]);
    end_comes_and_goes(&mut vm, 0, GUEST);
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn one_of_two_ends_comes_and_goes_beside_the_other() {
    let _alone = alone();
    let (a, b) = (Mac([0x52, 0x54, 0, 0, 0, 0xa]), Mac([0x52, 0x54, 0, 0, 0, 0xb]));
    let Some(mut vm) = DriverVm::boot(Some("e1000e"), "e1000e", 2) else { return };
    vm.set_link(1, false);
    vm.expect_forwarding(vec![mode_of(a), mode_of(b)]);
    assert!(vm.arrives(&frame(a, STATION, None), 0) && vm.leaves(&frame(STATION, a, None), 0));
    end_comes_and_goes(&mut vm, 1, b);
    assert!(vm.arrives(&frame(a, STATION, None), 0) && vm.leaves(&frame(STATION, a, None), 0));
    vm.comes_true("the two reach each other", |vm| vm.crosses(&frame(b, a, None), 0, 1));
    assert!(vm.crosses(&frame(a, b, None), 1, 0));
    assert!(!vm.arrives(&frame(b, STATION, None), 0), "one guest sees the other's frames");
}

/// An end that has no link gets one, loses it and gets it again; frames from the time without it do not come later.
fn end_comes_and_goes(vm: &mut DriverVm, end: usize, address: Mac) {
    let to_it = frame(address, STATION, None);
    for round in 0..3u8 {
        let mut stale = to_it.clone();
        stale[100] = round; // unlike those before
        assert!(!vm.arrives(&stale, end), "a frame passes an end without a link");
        vm.set_link(end, true);
        vm.comes_true("frames arrive", |vm| vm.arrives(&to_it, end));
        vm.comes_true("frames leave", |vm| vm.leaves(&frame(STATION, address, Some(5)), end));
        assert!(!vm.has_passed(&stale), "a frame was kept for an end without a link");
        vm.set_link(end, false);
        vm.beats(4);
    }
    vm.set_link(end, true);
    vm.comes_true("frames arrive again", |vm| vm.arrives(&to_it, end));
}

#[test]
#[ignore = "boots QEMU with the kernel package that UMBRA_TEST_KERNEL_DEB names"]
fn a_driver_that_gets_no_interrupt_and_receives_nothing_is_noticed() {
    /// The rtl8139's interrupt mask.
    const MASK: u16 = 0x3c;
    let _alone = alone();
    let Some(mut vm) = DriverVm::forwarding("rtl8139", "8139cp", vec![mode_of(GUEST)]) else { return };
    let base = vm.io_base("10ec:8139");
    assert!(vm.arrives(&frame(GUEST, STATION, None), 0));
    // Some heartbeats without a frame: nothing to receive is no failure.
    vm.beats(8);
    loop {
        vm.write_register(base, MASK, 0);
        // The ring has 64 places.
        (0..16).for_each(|_| vm.send_on_wire(&frame(GUEST, STATION, None)));
        let message = vm.expect(|m| matches!(m, FromAgent::Heartbeat { .. } | FromAgent::Failed { .. }));
        match message {
            FromAgent::Heartbeat { sequence, .. } => assert!(sequence < 4 * 600, "never noticed:\n{}", vm.console()),
            FromAgent::Failed { what } => {
                assert!(what.contains("has received no frame"), "{what}");
                break;
            }
            _ => {}
        }
    }
    vm.wait_for_end();
}
