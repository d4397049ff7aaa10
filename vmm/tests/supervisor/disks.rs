//! Disks: known before their guests start, the same ones in each life, at rest before each deliberate reset.

use std::fs;
use std::thread;

use libc::{RLIM_INFINITY, RLIMIT_FSIZE, prlimit, rlimit};
use serde_json::Value;
use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::lifecycle::{StandbyStage, StateName};
use umbra_vmm::record::status::{DeviceMode, DriverStatus, GuestStateName};
use umbra_vmm::supervisor::front::protocol::{Request, Response, StopHow};

use crate::cases::kill;
use crate::machine::{TestMachine, make_with_disks};

/// All of them.
pub const ALL: &[crate::cases::Case] = &[
    ("a_guest_waits_for_its_disk_and_keeps_it_over_crashes", a_guest_waits_for_its_disk_and_keeps_it_over_crashes),
    ("a_restart_waits_until_the_disks_are_at_rest", a_restart_waits_until_the_disks_are_at_rest),
    (
        "a_guest_is_killed_when_its_disks_are_at_rest_and_at_once_the_second_time",
        a_guest_is_killed_when_its_disks_are_at_rest_and_at_once_the_second_time,
    ),
    (
        "a_guest_whose_disk_cannot_rest_ends_by_itself_when_it_is_killed",
        a_guest_whose_disk_cannot_rest_ends_by_itself_when_it_is_killed,
    ),
    (
        "a_guest_that_has_panicked_is_killed_when_its_disks_are_at_rest",
        a_guest_that_has_panicked_is_killed_when_its_disks_are_at_rest,
    ),
    ("another_disk_is_quarantined_at_once", another_disk_is_quarantined_at_once),
    ("another_content_is_quarantined_at_once", another_content_is_quarantined_at_once),
    (
        "of_two_guests_the_one_whose_disk_is_another_goes_without",
        of_two_guests_the_one_whose_disk_is_another_goes_without,
    ),
    (
        "a_machine_ends_when_the_agent_has_flushed_and_at_once_when_that_is_asked_for",
        a_machine_ends_when_the_agent_has_flushed_and_at_once_when_that_is_asked_for,
    ),
    ("disks_are_brought_to_rest_before_a_machine_is_killed", disks_are_brought_to_rest_before_a_machine_is_killed),
    ("an_image_that_names_the_disk_otherwise_is_given_up", an_image_that_names_the_disk_otherwise_is_given_up),
    (
        "a_restart_that_does_not_come_about_lets_the_disks_go_on",
        a_restart_that_does_not_come_about_lets_the_disks_go_on,
    ),
    ("a_death_while_disks_come_to_rest_is_a_failure", a_death_while_disks_come_to_rest_is_a_failure),
    ("disks_that_cannot_be_end_a_first_start", disks_that_cannot_be_end_a_first_start),
    (
        "a_disk_whose_file_has_grown_is_measured_and_nobody_asked",
        a_disk_whose_file_has_grown_is_measured_and_nobody_asked,
    ),
    (
        "a_disk_on_a_file_has_another_size_when_the_guest_s_process_says_so",
        a_disk_on_a_file_has_another_size_when_the_guest_s_process_says_so,
    ),
    ("an_error_that_the_agent_bears_out_fails_the_life", an_error_that_the_agent_bears_out_fails_the_life),
    (
        "an_error_that_one_guest_alone_claims_costs_its_connection",
        an_error_that_one_guest_alone_claims_costs_its_connection,
    ),
];

fn start(guest: &str, driver: &str) -> TestMachine {
    let mut machine = make_with_disks(guest, driver, &[]);
    machine.start_again();
    machine
}

/// One whose guest may write to its disk on a file, which has 4096 bytes.
fn start_writable(guest: &str) -> TestMachine {
    let mut machine = make_with_disks(guest, "", &[]);
    let file = machine.dir.path().join("m.toml");
    let written = fs::read_to_string(&file).unwrap().replace("read_only = true", "read_only = false");
    fs::write(&file, written).unwrap();
    machine.start_again();
    machine
}

/// The first event that has `text`, once there is one, with its position among all.
fn event(machine: &TestMachine, text: &str) -> (usize, Value) {
    machine.wait_for_event(text, 1);
    let events = machine.events_text();
    let (n, line) = events.lines().enumerate().find(|(_, line)| line.contains(text)).unwrap();
    (n, serde_json::from_str(line).unwrap())
}

fn console(machine: &TestMachine) -> String {
    fs::read_to_string(machine.run_dir().join("nic0.console.log")).unwrap()
}

fn a_guest_waits_for_its_disk_and_keeps_it_over_crashes() {
    let machine = start("", "");
    machine.wait_live(1);
    let log = machine.guest_log();
    let (file, split) = (log.find("File(Disk").unwrap(), log.find("Split { disk: Disk").unwrap());
    assert!(file < split && log.contains("driver_memory: MemorySize(201326592)"), "{log}");
    assert!(log.contains("cache: Volatile") && log.contains("serial: \"S1\""), "{log}");
    let (disks, running) = (event(&machine, "\"stage\":\"disks\""), event(&machine, "\"guest-running\""));
    assert!(disks.0 < running.0 && disks.1["detail"] == "nvme S1 (512 MiB)", "{disks:?}");
    let guest = machine.wait_for_guest("web", "a live disk", |guest| guest.disks[0].mode == DeviceMode::Passive);
    let disk = &guest.disks[0];
    assert_eq!((disk.index, disk.serial.as_deref(), disk.bytes), (1, Some("S1"), Some(512 << 20)));
    assert_eq!((disk.kept_bytes, disk.volatile_cache, disk.driver.as_deref()), (4096, Some(true), Some("nic0")));
    kill(machine.wait_live(1).pid.unwrap());
    machine.wait_live(2);
    // The guest saw it itself, and its word may come behind that.
    let report = machine.report_with(1, "the guest's word", |report| report["masks"][0]["device"] == "block1");
    assert_eq!((&report["kernel_driver"], &report["source"]), (&"nvme".into(), &"process-exit".into()));
    machine.report_with_steps(1, &["nic", "live"]);
    machine.crash(CrashKind::Panic);
    machine.wait_live(3);
    machine.wait_for_event("\"block-live\"", 2);
    assert_eq!(event(&machine, "\"block-live\"").1["requests"]["kept_in_flight"], 2);
    let now = machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running);
    assert_eq!(now.pid, guest.pid, "it noticed nothing");
    assert!(console(&machine).contains("serial: None") && console(&machine).contains("serial: Some(\"S1\")"));
    assert!(!machine.guest_log().contains("Quarantine"));
    machine.stop();
}

fn a_restart_waits_until_the_disks_are_at_rest() {
    let machine = start("rests-slowly", "");
    machine.wait_live(1);
    let Response::Restarted { generation, .. } = machine.restart(None) else { panic!("not restarted") };
    assert_eq!(machine.wait_live(generation).failures, 0);
    let log = machine.guest_log();
    let at = |what: &str| log.find(what).unwrap_or_else(|| panic!("no {what}: {log}"));
    assert!(at("Quiesce") < at("at rest") && at("at rest") < at("Mask"), "{log}");
    let (rest, failed) = (event(&machine, "\"at-rest\""), event(&machine, "\"driver-failed\""));
    assert!(rest.0 < failed.0 && failed.1["source"] == "planned", "{rest:?} {failed:?}");
    assert!(rest.1["stable"] == true && rest.1["ms"].as_f64().unwrap() >= 300.0, "{rest:?}");
    machine.stop();
}

fn a_guest_is_killed_when_its_disks_are_at_rest_and_at_once_the_second_time() {
    let reboot = || Request::RebootGuest { name: "web".into(), how: StopHow::Kill };
    let machine = start("rests-slowly", "");
    let driver = machine.wait_live(1).pid;
    let before = machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running).pid;
    machine.ask_about(&reboot()).unwrap();
    machine.wait_for_guest("web", "another", |guest| guest.state == GuestStateName::Running && guest.pid != before);
    assert!(machine.guest_log().contains("at rest\n"), "{}", machine.guest_log());
    machine.wait_for_event("\"end-live\"", 1);
    assert_eq!(machine.wait_live(1).pid, driver, "the driver VM serves on");
    machine.stop();

    // One that never comes to rest would be waited for for 30 s.
    let machine = start("never-rests", "");
    machine.wait_live(1);
    let before = machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running).pid;
    machine.ask_about(&reboot()).unwrap();
    assert_eq!(machine.wait_for_guest("web", "it", |_| true).pid, before);
    machine.ask_about(&reboot()).unwrap();
    machine.wait_for_guest("web", "another", |guest| guest.state == GuestStateName::Running && guest.pid != before);
    machine.stop();
}

fn a_guest_whose_disk_cannot_rest_ends_by_itself_when_it_is_killed() {
    let machine = start("cannot-rest", "");
    machine.wait_live(1);
    let before = machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running).pid;
    machine.ask_about(&Request::RebootGuest { name: "web".into(), how: StopHow::Kill }).unwrap();
    machine.wait_for_guest("web", "another", |guest| guest.state == GuestStateName::Running && guest.pid != before);
    let log = machine.guest_log();
    assert!(log.contains("\nFinish\n"), "what it keeps is for the next driver VM: {log}");
    assert_eq!(event(&machine, "\"at-rest\"").1["stable"], false);
    machine.stop();
}

fn a_guest_that_has_panicked_is_killed_when_its_disks_are_at_rest() {
    let mut machine = make_with_disks("rests-slowly", "", &[]);
    let path = machine.dir.path().join("m.toml");
    let text = fs::read_to_string(&path).unwrap().replace("[guest.web]\n", "[guest.web]\non_crash = \"reboot\"\n");
    fs::write(&path, text).unwrap();
    machine.start_again();
    machine.wait_live(1);
    let before = machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running).pid;
    machine.ask_about(&Request::Nmi { name: "web".into() }).unwrap();
    machine.wait_for_guest("web", "another", |guest| guest.state == GuestStateName::Running && guest.pid != before);
    assert!(machine.guest_log().contains("at rest\n"), "{}", machine.guest_log());
    assert_eq!(machine.events_text().matches("\"guest-rebooted\"").count(), 1, "{}", machine.events_text());
    machine.stop();
}

fn quarantined(guest: &str, driver: &str, why: &str) -> TestMachine {
    let machine = start(guest, driver);
    machine.wait_live(1);
    let before = machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running).pid;
    machine.crash(CrashKind::Panic);
    let driver = machine.wait_for("the end of it", |driver| driver.state == StateName::Quarantined);
    assert_eq!((driver.failures, driver.generation), (2, Some(2)), "no second try");
    assert!(driver.reason.unwrap().contains("another disk"));
    let report = machine.report(2);
    let reason = report["reason"].as_str().unwrap();
    assert!(report["source"] == "identity" && report["verdict"] == "quarantine" && reason.contains(why), "{report}");
    machine.wait_for_guest("web", "it", |guest| guest.pid == before && guest.state == GuestStateName::Running);
    assert!(!machine.events_text().contains("as in a power cut"));
    machine.wait_for_log("web", "Quarantine");
    machine
}

fn another_disk_is_quarantined_at_once() {
    let machine = quarantined("", "other-disk=2", "web.block1: another disk: its serial number differs");
    // Somebody has put the right one back.
    assert!(matches!(machine.resume(), Response::Restarted { generation: 3, .. }));
    machine.wait_live(3);
    machine.stop();
}

fn another_content_is_quarantined_at_once() {
    let machine = quarantined("other-content=2", "", "web.block1: another disk: a block differs");
    // What is kept is in the guest's process.
    machine.ask_about(&Request::RebootGuest { name: "web".into(), how: StopHow::Kill }).unwrap();
    machine.wait_for_event("web.block1: the guest ended while the driver VM of this disk was away", 1);
    assert!(machine.guest_log().contains("Finish\n"), "what it keeps may be for a driver VM that comes");
    machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running);
    machine.stop();
}

fn of_two_guests_the_one_whose_disk_is_another_goes_without() {
    let mut machine = make_with_disks("", "other-disk-of-0=2", &["partition = 1", "partition = 2"]);
    machine.start_again();
    machine.wait_live(1);
    machine.crash(CrashKind::Panic);
    let driver = machine.wait_live(2);
    assert_eq!(driver.failures, 1);
    // The ends are in the order of the guests' names.
    machine.wait_for_event("db.block1 is not served, its disk is not the one it was", 1);
    machine.wait_for_event("\"block-live\"", 1);
    machine.wait_for_log("db", "Quarantine");
    assert!(!machine.guest_log().contains("Quarantine"));
    // And is again, when it is the one it was.
    machine.crash(CrashKind::Panic);
    machine.wait_live(3);
    machine.wait_for_event("\"guest\":\"db\",\"device\":\"block1\",\"driver\":\"nic0\",\"generation\":3", 1);
    machine.stop();
}

fn a_machine_ends_when_the_agent_has_flushed_and_at_once_when_that_is_asked_for() {
    let machine = start("", "");
    machine.wait_live(1);
    let log = machine.run_dir().join("nic0.console.log");
    let mut machine = machine;
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
    assert!(fs::read_to_string(log).unwrap().contains("nic0.1: flushed"));

    let mut machine = start("", "deaf-to-rest");
    machine.wait_live(1);
    machine.press(StopHow::PowerButton);
    machine.wait_for_guest("web", "its end", |guest| guest.state == GuestStateName::Off);
    machine.wait_for("its driver VM", |driver| driver.state == StateName::Live);
    machine.press(StopHow::Kill);
    machine.wait().unwrap();
}

fn disks_are_brought_to_rest_before_a_machine_is_killed() {
    let mut machine = start("rests-slowly", "");
    machine.wait_live(1);
    machine.press(StopHow::Kill);
    machine.wait().unwrap();
    assert!(machine.guest_log().ends_with("at rest\n"), "{}", machine.guest_log());
    assert!(console(&machine).contains("nic0.1: flushed"), "{}", console(&machine));

    let mut machine = start("never-rests", "");
    machine.wait_live(1);
    machine.press(StopHow::Kill);
    machine.press(StopHow::Kill);
    machine.wait().unwrap();
}

fn an_image_that_names_the_disk_otherwise_is_given_up() {
    let machine = start("", "other-disk=3");
    machine.wait_for("a standby", |driver| {
        driver.standby.as_ref().is_some_and(|standby| standby.state == StandbyStage::Ready)
    });
    let Response::Error { what } = machine.restart(Some("image-new")) else { panic!("it serves") };
    assert!(what.contains("its serial number differs") && what.contains("image of before"), "{what}");
    let driver = machine.wait_live(4);
    assert_eq!((driver.kernel.as_deref(), driver.failures), (Some("6.12-fake of image"), 1));
    machine.stop();
}

/// Asks for a restart, and does `then` when the guest's disk has been asked to come to rest, which it never does. The answer.
fn restart_and(machine: &TestMachine, then: impl FnOnce(&DriverStatus)) -> Response {
    let ready = machine.wait_for("a standby", |driver| {
        driver.standby.as_ref().is_some_and(|standby| standby.state == StandbyStage::Ready)
    });
    thread::scope(|scope| {
        let answer = scope.spawn(|| machine.restart(None));
        machine.wait_for_log("web", "Quiesce");
        then(&ready);
        answer.join().unwrap()
    })
}

fn a_restart_that_does_not_come_about_lets_the_disks_go_on() {
    let machine = start("never-rests", "");
    let answer = restart_and(&machine, |ready| kill(ready.standby.clone().unwrap().pid.unwrap()));
    assert!(matches!(&answer, Response::Error { what } if what.contains("did not come up")), "{answer:?}");
    machine.wait_for_log("web", "GoOn");
    let driver = machine.wait_live(1);
    assert_eq!((driver.failures, machine.guest_log().contains("Mask")), (0, false), "it serves on");
    machine.stop();
}

fn a_death_while_disks_come_to_rest_is_a_failure() {
    let machine = start("never-rests", "");
    let answer = restart_and(&machine, |_| machine.crash(CrashKind::Panic));
    assert!(matches!(answer, Response::Restarted { generation: 2, .. }), "{answer:?}");
    assert_eq!(machine.wait_live(2).failures, 1);
    let (_, rest) = event(&machine, "\"at-rest\"");
    assert!(rest["stable"] == false && machine.report(1)["source"] == "panic", "{rest}");
    machine.stop();
}

fn disks_that_cannot_be_end_a_first_start() {
    let mut machine = start("", "odd-disks=1");
    let error = machine.wait().unwrap_err().to_string();
    assert_eq!(error, "nic0: it reports disks that cannot be");
}

/// Two guests on one controller, of which "web", the second end, suspects the driver VM at its first connection.
fn suspecting(driver: &str) -> TestMachine {
    let mut machine = make_with_disks("suspects=1.1", driver, &["partition = 1", "partition = 2"]);
    machine.start_again();
    machine
}

fn an_error_that_the_agent_bears_out_fails_the_life() {
    let machine = suspecting("errs-at-1=1");
    machine.wait_live(2);
    let report = machine.report(1);
    let reason = report["reason"].as_str().unwrap();
    assert!(report["source"] == "link" && reason.contains("web.block1: an I/O error without a cause"), "{report}");
    machine.wait_for_event("\"block-live\"", 2);
    assert!(!machine.guest_log().contains("Quarantine"));
    machine.stop();
}

fn an_error_that_one_guest_alone_claims_costs_its_connection() {
    // The agent speaks of another guest's disk.
    let machine = suspecting("errs-at-0=1");
    machine.wait_for_log("web", "attempt: 2");
    machine.wait_for_guest("web", "its disk", |guest| guest.disks[0].mode == DeviceMode::Passive);
    assert_eq!(machine.wait_live(1).failures, 0);
    machine.stop();
}

fn a_disk_whose_file_has_grown_is_measured_and_nobody_asked() {
    let machine = start_writable("grows");
    assert_eq!(event(&machine, "\"disk-resized\"").1["bytes"], 4096);
    let log = fs::read_to_string(machine.dir.path().join("web.log")).unwrap();
    assert_eq!(log.matches("Resize").count(), 1, "a process that says it without end is not heeded each time: {log}");
    machine.stop();

    let machine = start_writable("grows-in-vain");
    let why = "web: its file has grown, which the guest does not see: web.block0: it cannot be measured";
    assert_eq!(event(&machine, "\"warning\"").1["what"], why);
    machine.stop();
}

fn a_disk_on_a_file_has_another_size_when_the_guest_s_process_says_so() {
    let resize = |disk, bytes| Request::Resize { name: "web".into(), disk, bytes };
    let machine = start_writable("");
    let disk = machine.dir.path().join("root.raw");
    machine.wait_live(1);
    let pid = machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running).pid.unwrap();
    // As a real one does before it runs.
    let limit = |new: Option<u64>| {
        let (pid, new) = (pid.cast_signed(), new.map(|bytes| rlimit { rlim_cur: bytes, rlim_max: RLIM_INFINITY }));
        let mut old = rlimit { rlim_cur: 0, rlim_max: 0 };
        let new = new.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the kernel reads and writes one limit each.
        assert_eq!(unsafe { prlimit(pid, RLIMIT_FSIZE, new, &raw mut old) }, 0);
        old.rlim_cur
    };
    limit(Some(4096));
    let answer = machine.ask(&resize(0, Some(8192))).unwrap();
    assert_eq!(limit(None), 8192, "its process may make the file as large as was asked for");
    assert!(matches!(answer, Response::Resized { disk: 0, bytes: 8192, .. }), "{answer:?}");
    assert_eq!(event(&machine, "\"disk-resized\"").1["bytes"], 8192);
    // It is the file that the process has open that counts, not what is at its path by now.
    let moved = machine.dir.path().join("moved.raw");
    fs::rename(&disk, &moved).unwrap();
    fs::write(&disk, [0; 512]).unwrap();
    fs::File::options().write(true).open(moved).unwrap().set_len(16_384 + 100).unwrap();
    let answer = machine.ask(&resize(0, None)).unwrap();
    assert!(matches!(answer, Response::Resized { disk: 0, bytes: 16_384, .. }), "whole sectors: {answer:?}");
    for (disk, bytes, why) in
        [(1, None, "web.block1 is a driver VM's disk"), (2, None, "web has 2 disks, vda and so on")]
    {
        let answer = machine.ask(&resize(disk, bytes)).unwrap();
        assert!(matches!(&answer, Response::Error { what } if what.contains(why)), "{answer:?}");
    }
    assert_eq!(limit(None), 16_384, "as large as the file is by now");
    machine.stop();

    let mut machine = start("never-resizes", "");
    machine.wait_live(1);
    let before = machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running).pid;
    thread::scope(|scope| {
        let answer = scope.spawn(|| machine.ask(&resize(0, Some(8192))).unwrap());
        machine.wait_for_log("web", "Resize");
        kill(before.unwrap());
        let answer = answer.join().unwrap();
        assert!(matches!(&answer, Response::Error { what } if what.contains("the guest has ended")), "{answer:?}");
    });
    // It was the only one.
    let _ = machine.wait();
}
