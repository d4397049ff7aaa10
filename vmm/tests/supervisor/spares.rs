//! A hot spare: it takes over, it fails, and both fail.

use std::fs;

use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::lifecycle::{StandbyStage, StateName};
use umbra_vmm::record::status::{DriverStatus, SpareNetwork};
use umbra_vmm::supervisor::front::protocol::Response;

use crate::cases::{Case, cases, kill};
use crate::machine::{DEVICE, SPARE, TestMachine, make, make_with_spare, start_with_spare};

/// All of them.
pub const ALL: &[Case] = cases![
    a_spare_takes_over_and_the_devices_change_places,
    a_spare_that_takes_over_by_itself_is_adopted_with_the_better_reason,
    a_guest_s_word_that_comes_when_it_is_served_again_is_in_the_report,
    what_a_failed_life_says_behind_its_failure_is_not_held_against_the_spare,
    a_spare_that_is_killed_is_replaced,
    a_failure_of_both_is_survived,
    a_spare_in_the_device_s_own_group_is_refused,
    a_restart_goes_over_to_the_spare,
];

/// The spare of `driver`: its state, device, generation.
fn spare(driver: &DriverStatus) -> (StandbyStage, String, u32) {
    let standby = driver.standby.clone().unwrap();
    (standby.state, standby.device.unwrap(), standby.generation.unwrap_or_default())
}

pub fn wait_armed(machine: &TestMachine, serving: u32, device: &str, next: u32) -> DriverStatus {
    let armed = (StandbyStage::Armed, device.to_owned(), next);
    machine.wait_for("an armed spare", |driver| driver.generation == Some(serving) && spare(driver) == armed)
}

fn a_spare_takes_over_and_the_devices_change_places() {
    let machine = start_with_spare("");
    let driver = wait_armed(&machine, 1, SPARE, 2);
    assert_eq!((driver.device.as_str(), machine.resets_of(SPARE).as_str()), (DEVICE, "1"));
    machine.wait_for("the network", |driver| driver.standby.clone().unwrap().network == Some(SpareNetwork::Same));
    let pid = driver.standby.unwrap().pid;
    machine.crash(CrashKind::Panic);
    let driver = machine.wait_live(2);
    assert_eq!((driver.pid, driver.device.as_str(), driver.failures), (pid, SPARE, 1));
    assert!(driver.last_outage_ms.unwrap() < 1000.0);
    let log = machine.guest_log();
    assert!(log.contains("replay: Everything, announce: true"), "{log}");
    let report = machine.report_with(1, "an outage", |report| report["outage_ms"].as_f64().is_some());
    assert_eq!((&report["source"], &report["device"]), (&"panic".into(), &DEVICE.into()));
    assert_eq!(report["registers"], "rip 0000", "{report}");
    assert!(report["console_tail"].as_str().unwrap().contains("CPU: 0 PID: 1"));
    assert!(report["parts"]["reset_ms"].is_null(), "{report}");

    // The failed device recovers behind it, and is the spare then.
    let driver = wait_armed(&machine, 2, DEVICE, 3);
    assert_eq!((machine.resets(), machine.resets_of(SPARE)), ("1".into(), "1".into()), "written over, not appended");
    assert!(driver.standby.unwrap().pid != pid);
    machine.crash(CrashKind::Reboot);
    let driver = machine.wait_live(3);
    assert_eq!((driver.device.as_str(), driver.failures), (DEVICE, 2));
    wait_armed(&machine, 3, SPARE, 4);
    machine.stop();
}

fn a_spare_that_takes_over_by_itself_is_adopted_with_the_better_reason() {
    let machine = start_with_spare("");
    kill(wait_armed(&machine, 1, SPARE, 2).pid.unwrap());
    machine.wait_live(2);
    let report = machine.report_with(1, "the guest's word", |report| report["masks"][0]["cause"] == "closed");
    assert_eq!(report["source"], "process-exit", "{report}");
    assert!(report["exit"].as_str().unwrap().contains("signal 9"), "{report}");
    machine.report_with_steps(1, &["live", "fence"]);
    machine.stop();
}

/// The end of a process may be known, and its place taken, before the guest has told what it saw.
fn a_guest_s_word_that_comes_when_it_is_served_again_is_in_the_report() {
    for spare in [String::new(), format!("spare = \"{SPARE}\"\n")] {
        let mut machine = make("says-late ", "", &spare);
        machine.start_again();
        let driver = if spare.is_empty() { machine.wait_live(1) } else { wait_armed(&machine, 1, SPARE, 2) };
        kill(driver.pid.unwrap());
        machine.wait_live(2);
        let report = machine.report_with(1, "the guest's word", |report| report["masks"][0]["cause"] == "closed");
        assert_eq!(
            (&report["source"], report["masks"].as_array().unwrap().len()),
            (&"process-exit".into(), 1),
            "{report}"
        );
        machine.stop();
    }
}

fn what_a_failed_life_says_behind_its_failure_is_not_held_against_the_spare() {
    let machine = start_with_spare("");
    wait_armed(&machine, 1, SPARE, 2);
    machine.crash(CrashKind::Unbind);
    machine.wait_live(2);
    assert_eq!(machine.report(1)["reason"], "its device is gone");
    // The spare serves on, while the failed device recovers.
    assert_eq!(wait_armed(&machine, 2, DEVICE, 3).failures, 1);
    machine.stop();
}

fn a_spare_that_is_killed_is_replaced() {
    let machine = start_with_spare("");
    kill(wait_armed(&machine, 1, SPARE, 2).standby.unwrap().pid.unwrap());
    let driver = wait_armed(&machine, 1, SPARE, 3);
    assert_eq!((driver.state, driver.failures, driver.last_outage_ms), (StateName::Live, 0, None));
    assert!(!machine.events_text().contains("masked"), "no guest is told");
    machine.stop();
}

fn a_failure_of_both_is_survived() {
    let machine = start_with_spare("");
    let driver = wait_armed(&machine, 1, SPARE, 2);
    kill(driver.standby.unwrap().pid.unwrap());
    kill(driver.pid.unwrap());
    // The spare may be adopted before its end is told: the life that counts is the one with a spare on the other device.
    machine.wait_for("a life with a spare", |driver| {
        let other = if driver.device == DEVICE { SPARE } else { DEVICE };
        let lives = driver.state == StateName::Live && driver.generation > Some(2);
        let (stage, device, _) = spare(driver);
        lives && stage == StandbyStage::Armed && device == other
    });
    machine.stop();
}

fn a_spare_in_the_device_s_own_group_is_refused() {
    let mut machine = make_with_spare("");
    let link = machine.dir.path().join("pci/devices").join(SPARE).join("iommu_group");
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(machine.dir.path().join("groups/7"), &link).unwrap();
    machine.start_again();
    let error = machine.wait().unwrap_err().to_string();
    assert!(error.contains("the spare 0000:04:00.0 of [driver.nic0] are both in IOMMU group 7"), "{error}");
}

fn a_restart_goes_over_to_the_spare() {
    let machine = start_with_spare("");
    wait_armed(&machine, 1, SPARE, 2);
    let Response::Restarted { generation, .. } = machine.restart(None) else { panic!("not restarted") };
    assert_eq!(generation, 2);
    assert_eq!(machine.wait_live(2).failures, 0);
    wait_armed(&machine, 2, DEVICE, 3);
    machine.stop();
}
