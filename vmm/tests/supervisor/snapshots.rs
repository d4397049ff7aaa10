//! Standbys that are saved before they begin, and restored.

use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::lifecycle::StandbyStage;

use crate::cases::Case;
use crate::machine::{TestMachine, make};

/// All of them.
pub const ALL: &[Case] = &[
    (
        "a_standby_is_saved_before_it_meets_anybody_and_the_next_is_restored",
        a_standby_is_saved_before_it_meets_anybody_and_the_next_is_restored,
    ),
    ("a_failure_while_the_standby_is_saved_is_survived", a_failure_while_the_standby_is_saved_is_survived),
    ("without_a_standby_the_next_life_is_restored_too", without_a_standby_the_next_life_is_restored_too),
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
    // The first finds none and is saved, the second finds a damaged one and cannot be saved, the third is restored.
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
