//! `standby = "snapshot"`: a process leaves a snapshot and is gone, and each next life is restored from it.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::lifecycle::StandbyStage;
use umbra_vmm::supervisor::front::protocol::{Request, Response, StopHow};

use crate::cases::{Case, cases, kill};
use crate::machine::{PATIENCE, SPARE, TestMachine, make};

/// All of them.
pub const ALL: &[Case] = cases![
    a_taker_runs_once_and_a_failure_is_restored_from_what_it_left,
    a_failure_while_the_taker_boots_is_survived_by_it,
    a_failure_while_the_taker_looks_is_survived_by_a_new_life,
    a_taker_that_dies_is_tried_again_and_nobody_is_told_of_a_failure,
    a_disk_that_stays_full_is_told_once_and_shown,
    an_upgrade_leaves_the_new_image_s_snapshot_first,
    an_upgrade_that_leaves_no_snapshot_says_so,
    a_guest_s_reboot_while_the_taker_boots_keeps_the_taker_unmet,
    a_machine_is_prepared_without_its_guests,
    a_machine_that_cannot_be_prepared_says_why,
    a_preparation_that_is_stopped_has_failed_and_starts_no_guest_meanwhile,
    a_driver_vm_without_snapshots_has_no_part_in_a_preparation,
];

/// Events that tell of a failure, or of somebody who waits.
const ALARMS: [&str; 6] =
    ["driver-failed", "masked", "standby-failed", "standby-starting", "quarantined", "\"warning\""];

/// A machine whose first life boots and leaves a snapshot that is gone when a taker looks for it.
fn start(guest: &str, driver: &str) -> TestMachine {
    start_whole(guest, &format!("lost=1 {driver}"))
}

fn start_whole(guest: &str, driver: &str) -> TestMachine {
    let more = "standby = \"snapshot\"\nsnapshots = true\nrestart = { backoff_ms = 10, limit = 9 }";
    let mut machine = make(guest, &format!("kept {driver}"), more);
    machine.start_again();
    machine
}

/// Files of snapshots, and who wrote each.
fn snapshots(machine: &TestMachine) -> Vec<String> {
    let files = fs::read_dir(machine.dir.path()).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|end| end == "snapshot"));
    files.map(|path| fs::read_to_string(path).unwrap()).collect()
}

/// Processes of driver VMs of this machine: their supervisor is this process.
fn wait_gone(pid: u32) {
    let until = Instant::now() + PATIENCE;
    while Path::new(&format!("/proc/{pid}")).exists() {
        assert!(Instant::now() < until, "the taker {pid} is left");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for the taker of `generation`, and returns its process.
fn wait_taker(machine: &TestMachine, generation: u32) -> u32 {
    let driver = machine.wait_for("a taker", |driver| {
        let standby = driver.standby.as_ref();
        standby.is_some_and(|taker| {
            taker.state == StandbyStage::Saving && taker.generation == Some(generation) && taker.pid.is_some()
        })
    });
    driver.standby.unwrap().pid.unwrap()
}

fn a_taker_runs_once_and_a_failure_is_restored_from_what_it_left() {
    let machine = start("", "");
    machine.wait_live(1);
    let taker = wait_taker(&machine, 2);
    let saved = machine.wait_saved();
    assert_eq!((saved.generation, saved.failures, saved.standby.unwrap().pid), (Some(1), 0, None));
    wait_gone(taker);
    assert_eq!(snapshots(&machine), ["nic0.2"]);
    let said = machine.events_text();
    assert!(ALARMS.iter().all(|alarm| !said.contains(alarm)), "{said}");
    assert!(said.contains("\"snapshot-ready\"") && said.contains("\"bytes\":1048576"), "{said}");
    // It stays so.
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(machine.wait_saved().standby.unwrap().generation, None);
    for (next, taker) in [(3, 4), (5, 6)] {
        machine.crash(CrashKind::Panic);
        let driver = machine.wait_live(next);
        assert_eq!(driver.failures, u64::from(next / 2));
        // It looks, finds what is there, and ends.
        machine.wait_for_event("snapshot-ready", usize::try_from(taker / 2).unwrap());
        machine.wait_saved();
    }
    assert_eq!(snapshots(&machine), ["nic0.2"], "a life that serves finds what a taker has left: it has the same key");
    assert!(!machine.events_text().contains("standby-"), "nothing ever waits");
    machine.stop();
}

fn a_failure_while_the_taker_boots_is_survived_by_it() {
    let machine = start("", "slow-to-be-saved=2 ");
    machine.wait_live(1);
    let taker = wait_taker(&machine, 2);
    // Until it has said that it boots, it would be ended.
    machine.wait_for("its boot", |_| machine.dir.path().join("nic0.2.boots").exists());
    machine.crash(CrashKind::Panic);
    assert_eq!(machine.wait_live(2).pid, Some(taker));
    // The next one leaves it.
    machine.wait_saved();
    assert_eq!(snapshots(&machine), ["nic0.3"]);
    machine.stop();
}

fn a_failure_while_the_taker_looks_is_survived_by_a_new_life() {
    let machine = start("", "slow-to-look=2 ");
    machine.wait_live(1);
    let taker = wait_taker(&machine, 2);
    machine.crash(CrashKind::Panic);
    assert_eq!(machine.wait_live(3).failures, 1);
    wait_gone(taker);
    machine.wait_saved();
    assert_eq!(snapshots(&machine), ["nic0.3"], "a life that serves leaves its snapshot too");
    machine.stop();
}

fn a_taker_that_dies_is_tried_again_and_nobody_is_told_of_a_failure() {
    let machine = start("", "dies-of-saving=2 slow-to-look=3 ");
    machine.wait_live(1);
    kill(wait_taker(&machine, 3));
    machine.wait_saved();
    assert_eq!(snapshots(&machine), ["nic0.4"]);
    let said = machine.events_text();
    assert!(ALARMS.iter().all(|alarm| !said.contains(alarm)), "{said}");
    let driver = machine.wait_live(1);
    assert_eq!((driver.failures, driver.standby.unwrap().reason), (0, None));
    machine.stop();
}

fn a_disk_that_stays_full_is_told_once_and_shown() {
    let machine = start_whole("", "full-disk ");
    machine.wait_live(1);
    machine.wait_for("the reason", |driver| {
        let reason = driver.standby.as_ref().and_then(|standby| standby.reason.as_ref());
        reason.is_some_and(|reason| reason.contains("would boot") && reason.contains("No space left"))
    });
    // The first is of the life that serves.
    machine.wait_for_event("would boot", 1);
    assert!(machine.events_text().matches("\"warning\"").count() == 2, "{}", machine.events_text());
    assert!(wait_taker(&machine, 5) > 0, "it is tried again");
    machine.stop();
}

fn an_upgrade_leaves_the_new_image_s_snapshot_first() {
    let machine = start("", "");
    machine.wait_saved();
    let Response::Restarted { generation: 3, no_snapshot: None, .. } = machine.restart(Some("image-new")) else {
        panic!("no upgrade")
    };
    let mut who = snapshots(&machine);
    who.sort();
    assert_eq!(who, ["nic0.2", "nic0.3"]);
    // On trial: what is looked for is the old image's, which the next life would be of.
    let driver = machine.wait_saved();
    assert!(driver.kernel.unwrap().ends_with("image-new"));
    machine.crash(CrashKind::Panic);
    let driver = machine.wait_for("the next life", |driver| driver.generation > Some(3) && driver.kernel.is_some());
    machine.wait_live(driver.generation.unwrap());
    machine
        .wait_for("the old image", |driver| driver.kernel.as_ref().is_some_and(|kernel| kernel.ends_with("of image")));
    assert_eq!(snapshots(&machine).len(), 2, "restored from what was there");
    machine.stop();
}

fn an_upgrade_that_leaves_no_snapshot_says_so() {
    let machine = start("", "full-disk ");
    machine.wait_live(1);
    let Response::Restarted { no_snapshot: Some(why), .. } = machine.restart(Some("image-new")) else {
        panic!("no upgrade, or no word of it")
    };
    assert!(why.contains("No space left"), "{why}");
    machine.stop();
}

/// A connection would be part of what is saved.
fn a_guest_s_reboot_while_the_taker_boots_keeps_the_taker_unmet() {
    let machine = start("reset-in=1", "slow-to-load=2 ");
    machine.wait_live(1);
    wait_taker(&machine, 2);
    let rebooted = machine.events_text().matches("guest-rebooted").count();
    machine.wait_for_event("guest-rebooted", rebooted + 2);
    fs::write(machine.dir.path().join("may-load"), "").unwrap();
    machine.wait_saved();
    assert_eq!(snapshots(&machine), ["nic0.2"]);
    machine.press(StopHow::Kill);
}

/// Makes a machine that is only to be prepared.
fn to_be_prepared(driver: &str, more: &str) -> TestMachine {
    let machine = make("", driver, more);
    fs::write(machine.dir.path().join("prepare"), "").unwrap();
    machine
}

fn a_machine_is_prepared_without_its_guests() {
    for standby in ["warm", "cold", "snapshot"] {
        let mut machine = to_be_prepared("kept ", &format!("snapshots = true\nstandby = \"{standby}\""));
        // The second time it is there already.
        for _ in 0..2 {
            machine.start_again();
            machine.wait().unwrap();
            assert_eq!(snapshots(&machine), ["nic0.1"], "standby = {standby}");
        }
        assert!(!machine.dir.path().join("web.log").exists(), "a guest was started");
        // Then a guest's run restores its first life.
        fs::remove_file(machine.dir.path().join("prepare")).unwrap();
        fs::remove_file(machine.dir.path().join("nic0.1.boots")).unwrap();
        machine.start_again();
        machine.wait_live(1);
        assert!(!machine.dir.path().join("nic0.1.boots").exists(), "its first life boots");
        machine.press(StopHow::Kill);
    }
}

fn a_machine_that_cannot_be_prepared_says_why() {
    let ends = |driver: &str, more: &str| {
        let mut machine = to_be_prepared(driver, more);
        machine.start_again();
        (machine.wait().unwrap_err().to_string(), machine.events_text())
    };
    let (error, said) = ends("kept full-disk ", "snapshots = true");
    assert_eq!(error, "nic0: no snapshot is taken: write the snapshot: No space left on device");
    assert_eq!(said.matches("\"warning\"").count(), 3, "each try is told: {said}");
    let dies = "kept slow-to-look=2 die-after-forwarding=1 ";
    let (error, _) = ends(dies, "snapshots = true\nrestart = { limit = 0 }");
    assert!(error.starts_with("nic0: no snapshot is taken: more than 0 failures"), "{error}");
    for none in ["snapshots = false".into(), format!("snapshots = true\nspare = \"{SPARE}\"")] {
        let (error, _) = ends("", &none);
        assert!(error.starts_with("there is nothing to prepare"), "{error}");
    }
}

fn a_preparation_that_is_stopped_has_failed_and_starts_no_guest_meanwhile() {
    let mut machine = to_be_prepared("kept slow-to-look=2 ", "snapshots = true");
    machine.start_again();
    wait_taker(&machine, 2);
    let refused = machine.ask_about(&Request::StartGuest { name: "web".into() }).unwrap_err();
    assert!(refused.contains("--prepare"), "{refused}");
    machine.press(StopHow::PowerButton);
    assert_eq!(machine.wait().unwrap_err().to_string(), "stopped before all snapshots were there");
}

fn a_driver_vm_without_snapshots_has_no_part_in_a_preparation() {
    let mut machine = to_be_prepared("kept ", "snapshots = true");
    let path = machine.dir.path().join("m.toml");
    let other = format!(
        "[guest.db]\nkernel = \"kernel\"\nnet = [{{ driver = \"nic1\" }}]\n\
         [driver.nic1]\ndevice = \"{SPARE}\"\nimage = \"image\"\nsnapshots = false\n"
    );
    fs::write(&path, fs::read_to_string(&path).unwrap() + &other).unwrap();
    machine.start_again();
    machine.wait().unwrap();
    assert_eq!(snapshots(&machine), ["nic0.1"]);
    assert!(!machine.events_text().contains("nic1"), "{}", machine.events_text());
}
