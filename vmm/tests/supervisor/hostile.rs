//! Processes of VMs that say more than they should: what they say is bounded, and costs them their life at most.

use std::fs;

use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::lifecycle::StateName;
use umbra_vmm::record::status::GuestStateName;
use umbra_vmm::supervisor::front::protocol::StopHow;

use crate::cases::{Case, cases};
use crate::fake_vm::ESCAPES;
use crate::machine::{TestMachine, start};

/// All of them.
pub const ALL: &[Case] = cases![
    a_driver_vm_that_sends_descriptors_is_replaced,
    an_agent_that_talks_without_end_is_replaced,
    a_driver_vm_that_sends_descriptors_in_its_agents_name_is_replaced,
    what_a_driver_vm_says_reaches_no_terminal_raw,
    a_guest_that_loses_links_without_end_fills_nothing,
    a_guest_that_brings_warnings_about_without_end_fills_no_log,
    a_guest_that_sends_descriptors_is_killed,
    a_failed_life_that_says_that_it_gave_its_device_up_and_stays_is_killed,
    a_process_that_its_confinement_ends_is_a_failure_of_that_kind,
    a_guest_that_boasts_without_end_fills_no_log,
    a_driver_vm_that_complains_of_its_snapshot_without_end_fills_no_log,
    a_time_that_a_guest_makes_up_makes_no_outage_longer,
    what_was_said_before_an_end_is_heard_however_much_it_is,
];

/// What is made of the call that a confined process must not make, in words.
const CONFINED: &str = "its process was ended by its confinement: the thread vcpu0 made the system call 59 (execve)";

fn a_process_that_its_confinement_ends_is_a_failure_of_that_kind() {
    let machine = start("", "breaks-out=1", "");
    machine.wait_live(2);
    let report = machine.report(1);
    assert_eq!((&report["source"], &report["reason"]), (&"confinement".into(), &CONFINED.into()), "{report}");
    // It ends by itself at its word, and is killed for it: whichever comes first.
    let exit = report["exit"].as_str().unwrap();
    assert!(exit.contains("by its confinement") || exit.contains("signal 9"), "{report}");
    machine.stop();
    let mut machine = start("breaks-out", "", "");
    assert_eq!(machine.wait().unwrap_err().to_string(), format!("web: {CONFINED}"));
}

fn a_driver_vm_that_sends_descriptors_is_replaced() {
    let machine = start("", "descriptors=1", "");
    machine.wait_live(2);
    let report = machine.report(1);
    assert_eq!(report["source"], "control-stream", "{report}");
    assert!(report["reason"].as_str().unwrap().contains("20 file descriptors, of 0"), "{report}");
    assert!(report["exit"].as_str().unwrap().contains("signal 9"), "nothing that it says is believed: {report}");
    machine.stop();
}

fn a_driver_vm_that_sends_descriptors_in_its_agents_name_is_replaced() {
    let machine = start("", "descriptors-by-agent=1", "");
    machine.wait_live(2);
    let report = machine.report(1);
    assert_eq!(report["source"], "control-stream", "{report}");
    assert!(report["reason"].as_str().unwrap().contains("1 file descriptors came on a stream"), "{report}");
    machine.stop();
}

fn a_guest_that_sends_descriptors_is_killed() {
    let mut machine = start("descriptors", "", "");
    let error = machine.wait().unwrap_err().to_string();
    assert!(error.starts_with("web: its process broke a rule") && error.contains("20 file descriptors"), "{error}");
}

fn a_failed_life_that_says_that_it_gave_its_device_up_and_stays_is_killed() {
    let machine = start("", "stays=1", "");
    let process = format!("/proc/{}", machine.wait_live(1).pid.unwrap());
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    // Its report is complete when its process has ended.
    let report = machine.report(1);
    assert!(report["exit"].as_str().unwrap().contains("signal 9"), "{report}");
    assert!(!fs::exists(&process).unwrap(), "{report}");
    machine.stop();
}

fn an_agent_that_talks_without_end_is_replaced() {
    let machine = start("", "talks=1", "");
    machine.wait_live(2);
    let report = machine.report(1);
    assert_eq!(report["source"], "control-stream", "{report}");
    assert_eq!(report["reason"], "its agent says more than 64 KiB a second", "{report}");
    machine.stop();
}

fn said(machine: &TestMachine, words: &[&str]) -> String {
    let output = machine.command_line(words).wait_with_output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn what_a_driver_vm_says_reaches_no_terminal_raw() {
    let mut machine = start("", "escapes=1", "");
    machine.wait_live(2);
    let report = machine.report(1);
    assert!(report["kernel_says"].as_str().unwrap().ends_with(ESCAPES), "JSON is exact: {report}");
    let status = machine.wait_for("its words", |driver| driver.reason.as_ref().is_some_and(|why| why.contains("RED")));
    assert!(status.reason.unwrap().ends_with(ESCAPES));
    let page = machine.dir.path().join("page.html");
    said(&machine, &["report", "-o", page.to_str().unwrap()]);
    let shown = [
        ("status", said(&machine, &["status"])),
        ("status --json", said(&machine, &["status", "--json"])),
        ("events", said(&machine, &["events"])),
        ("the report's text", fs::read_to_string(machine.run_dir().join("reports/nic0-gen1.txt")).unwrap()),
        ("the report's JSON", fs::read_to_string(machine.run_dir().join("reports/nic0-gen1.json")).unwrap()),
        ("the page", fs::read_to_string(page).unwrap()),
    ];
    for (what, text) in shown {
        assert!(text.contains("RED") && text.contains("OWNED"), "{what}: {text}");
        let obeyed = text.chars().find(|c| c.is_control() && !"\n\t".contains(*c) || *c == '\u{202e}');
        assert_eq!(obeyed, None, "{what}: {text}");
    }
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
}

fn a_guest_that_brings_warnings_about_without_end_fills_no_log() {
    let mut machine = start("cries", "", "");
    machine.wait_live(1);
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
    let events = machine.events_text();
    let warnings = events.lines().filter(|line| line.contains("another's address")).count();
    assert!((1..=20).contains(&warnings), "{warnings}: {events}");
}

fn a_guest_that_loses_links_without_end_fills_nothing() {
    let mut machine = start("lose-links", "", "limit = 1, backoff_ms = 10");
    machine.wait_for("the end of it", |driver| driver.state == StateName::Quarantined);
    let report = machine.report(1);
    let masks = report["masks"].as_array().unwrap();
    assert!(masks.len() <= 256, "{}", masks.len());
    assert!(masks.iter().all(|mask| mask["cause"].as_str().unwrap().len() <= 2048));
    assert!(machine.events_text().matches("\"masked\"").count() <= 256);
    assert!(report["reason"].as_str().unwrap().len() < 4096, "{report}");
    machine.press(StopHow::Kill);
    machine.wait().unwrap();
}

fn a_guest_that_boasts_without_end_fills_no_log() {
    let mut machine = start("boasts", "", "");
    machine.wait_live(1);
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
    let events = machine.events_text();
    for event in ["\"event\":\"guest-running\"", "\"event\":\"pace\""] {
        assert_eq!(events.matches(event).count(), 1, "{event}");
    }
}

fn a_driver_vm_that_complains_of_its_snapshot_without_end_fills_no_log() {
    let machine = start("", "complains=1", "");
    machine.wait_live(1);
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    let complaints = machine.events_text().lines().filter(|line| line.contains("it is damaged")).count();
    assert!((1..=8).contains(&complaints), "{complaints}");
    machine.stop();
}

/// A time that a process names is one at which it was there.
fn a_time_that_a_guest_makes_up_makes_no_outage_longer() {
    let machine = start("accuses-long-ago", "", "");
    let began = umbra_vmm::base::time::Time::now();
    let driver = machine.wait_live(2);
    let most = umbra_vmm::base::time::milliseconds(umbra_vmm::base::time::Time::now().since(began)) + 60_000.0;
    let report = machine.report_with(1, "an outage", |report| report["outage_ms"].as_f64().is_some());
    for (what, ms) in [
        ("last_outage_ms", driver.last_outage_ms),
        ("outage_ms", report["outage_ms"].as_f64()),
        ("detect_ms", report["parts"]["detect_ms"].as_f64()),
    ] {
        assert!(ms.is_some_and(|ms| ms < most), "{what}: {ms:?}");
    }
    machine.stop();
}

fn what_was_said_before_an_end_is_heard_however_much_it_is() {
    let machine = start("", "talks-and-ends=1", "");
    machine.wait_live(2);
    let report = machine.report(1);
    assert_eq!((&report["source"], &report["registers"]), (&"vm-end".into(), &"rip 2222".into()), "{report}");
    machine.stop();
    let machine = start("talks-and-resets", "", "");
    machine.wait_for_event("\"event\":\"guest-running\"", 2);
    machine.wait_for_guest("web", "its next life", |guest| guest.state == GuestStateName::Running);
    assert_eq!(machine.events_text().matches("\"event\":\"guest-rebooted\"").count(), 1);
    machine.stop();
}
