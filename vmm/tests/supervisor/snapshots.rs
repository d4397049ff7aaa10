//! Standbys that are saved before they begin, and restored.

use std::fs;

use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::lifecycle::{StandbyStage, StateName};
use umbra_vmm::supervisor::front::protocol::StopHow;

use crate::cases::{Case, cases};
use crate::machine::{TestMachine, make};

/// All of them.
pub const ALL: &[Case] = cases![
    a_standby_is_saved_before_it_meets_anybody_and_the_next_is_restored,
    a_failure_while_the_standby_is_saved_is_survived,
    a_first_life_leaves_the_snapshot_of_the_next,
    a_life_that_is_saved_is_not_asked_how_it_is,
    a_life_that_fails_while_it_is_saved_gets_no_device,
    a_disk_too_slow_for_a_first_life_keeps_the_next_from_nothing,
    without_a_standby_the_next_life_is_restored_too,
];

fn with_snapshots(driver: &str) -> TestMachine {
    let mut machine = make("", driver, "snapshots = true\nrestart = { backoff_ms = 10, limit = 9 }");
    machine.start_again();
    machine
}

fn wait_ready(machine: &TestMachine, generation: u32) {
    machine.wait_for("the standby", |status| {
        let standby = status.standby.as_ref();
        standby.is_some_and(|standby| standby.state == StandbyStage::Ready && standby.generation == Some(generation))
    });
}

/// A fake VM checks that it has been told nothing before it is saved, and which life it is afterwards.
fn a_standby_is_saved_before_it_meets_anybody_and_the_next_is_restored() {
    let machine = with_snapshots("");
    machine.wait_live(1);
    // The first life cannot be saved. The first standby finds none and is saved, the second finds a damaged one and cannot be saved, the
    // third is restored.
    for generation in 2..=4 {
        wait_ready(&machine, generation);
        machine.crash(CrashKind::Panic);
        machine.wait_live(generation);
    }
    let said = machine.events_text();
    for (generation, restored) in [(2, false), (3, false), (4, true)] {
        let ready = said
            .lines()
            .find(|line| line.contains("standby-ready") && line.contains(&format!("\"generation\":{generation},")));
        assert!(ready.unwrap().contains(&format!("\"restored\":{restored}")), "{ready:?}");
    }
    machine.stop();
}

fn a_failure_while_the_standby_is_saved_is_survived() {
    let machine = with_snapshots("slow-to-be-saved");
    machine.wait_live(1);
    machine
        .wait_for("the standby", |status| status.standby.as_ref().is_some_and(|standby| standby.generation == Some(2)));
    machine.crash(CrashKind::Panic);
    // It is told which life it is all the same, and serves.
    machine.wait_live(2);
    machine.stop();
}

/// A machine whose snapshots are files.
fn with_files(driver: &str) -> TestMachine {
    let more = "snapshots = true\nrestart = { backoff_ms = 10, limit = 9 }";
    let mut machine = make("", &format!("kept {driver}"), more);
    machine.start_again();
    machine
}

fn a_first_life_leaves_the_snapshot_of_the_next() {
    let machine = with_files("");
    machine.wait_live(1);
    assert!(machine.dir.path().join("nic0.1.boots").exists());
    // Before any standby could boot.
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    wait_ready(&machine, 3);
    let boots = |n: u32| machine.dir.path().join(format!("nic0.{n}.boots")).exists();
    assert!((2..=3).all(|n| !boots(n)), "what follows the first life is restored");
    assert!(!machine.events_text().contains("\"warning\""));
    machine.stop();
}

fn a_life_that_is_saved_is_not_asked_how_it_is() {
    let machine = with_files("saved-slowly=1 ");
    machine.wait_for("the life to be saved", |_| machine.dir.path().join("is-being-saved").exists());
    // Each of them asks all processes.
    for _ in 0..2 {
        assert!(machine.status().is_some());
    }
    fs::write(machine.dir.path().join("is-saved"), "").unwrap();
    machine.wait_live(1);
    assert!(!machine.events_text().contains("urgent"), "{}", machine.events_text());
    machine.stop();
}

fn a_life_that_fails_while_it_is_saved_gets_no_device() {
    let machine = with_files("fails-when-saved=1 ");
    machine.wait_live(2);
    assert!(machine.events_text().contains("urgent"), "{}", machine.events_text());
    assert!(!machine.dir.path().join("has-device").exists());
    machine.stop();
}

fn a_disk_too_slow_for_a_first_life_keeps_the_next_from_nothing() {
    let more = "snapshots = true\nrestart = { backoff_ms = 10, limit = 9, boot_timeout_s = 1 }";
    let mut machine = make("", "kept saved-slowly=1 slow-to-be-saved=2 ", more);
    machine.start_again();
    let live = machine.wait_for("a life", |driver| driver.state == StateName::Live);
    assert_eq!((live.generation, live.failures), (Some(2), 1), "the second is not saved");
    machine.press(StopHow::Kill);
}

/// The life that is to serve is started without its device, restored, and gets the device then.
fn without_a_standby_the_next_life_is_restored_too() {
    let mut machine =
        make("", "restored", "snapshots = true\nstandby = \"cold\"\nrestart = { backoff_ms = 10, limit = 9 }");
    machine.start_again();
    for generation in 1..=3 {
        machine.wait_live(generation);
        machine.crash(CrashKind::Panic);
    }
    machine.wait_live(4);
    assert!(!machine.events_text().contains("standby-starting"));
    machine.stop();
}
