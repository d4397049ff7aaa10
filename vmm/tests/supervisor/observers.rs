//! Who looks from outside: events, metrics, the watch, the report, a service manager.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::lifecycle::StateName;
use umbra_vmm::record::status::GuestStateName;
use umbra_vmm::supervisor::front::protocol::{Request, StopHow};

use crate::machine::{make, start};

/// All of them.
pub const ALL: &[crate::cases::Case] = &[
    ("events_are_told_from_the_past_and_as_they_come", events_are_told_from_the_past_and_as_they_come),
    ("the_watch_shows_status_and_events_until_the_end", the_watch_shows_status_and_events_until_the_end),
    (
        "a_report_shows_the_failures_of_a_machine_that_has_ended",
        a_report_shows_the_failures_of_a_machine_that_has_ended,
    ),
    ("metrics_count_failures_and_show_the_present", metrics_count_failures_and_show_the_present),
    ("a_service_manager_hears_of_ready_watchdog_and_stopping", a_service_manager_hears_of_ready_watchdog_and_stopping),
    ("what_is_not_there_has_no_carrier_and_no_uptime", what_is_not_there_has_no_carrier_and_no_uptime),
];

fn events_are_told_from_the_past_and_as_they_come() {
    let mut machine = start("", "", "");
    machine.wait_live(1);
    let follower = machine.command_line(&["events", "--follow"]);
    // One that asks for all and reads nothing disturbs nobody.
    let mut deaf = UnixStream::connect(machine.run_dir().join("control.sock")).unwrap();
    deaf.write_all(b"{\"request\":\"events\",\"after\":0,\"follow\":true}\n").unwrap();
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    let now = machine.command_line(&["events"]).wait_with_output().unwrap();
    let now = String::from_utf8(now.stdout).unwrap();
    assert!(now.contains("\"event\":\"driver-failed\"") && now.ends_with('\n'), "{now}");
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
    let followed = follower.wait_with_output().unwrap();
    assert!(followed.status.success());
    let followed = String::from_utf8(followed.stdout).unwrap();
    assert!(followed.starts_with(&now), "{followed}");
    let log = fs::read_to_string(machine.run_dir().join("reports/events.jsonl")).unwrap();
    assert_eq!(followed, log, "the log has the same lines");
    let lines: Vec<serde_json::Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let numbers: Vec<_> = lines.iter().map(|line| line["seq"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=lines.len() as u64).collect::<Vec<_>>());
    let live = lines.iter().filter(|line| line["event"] == "driver-live").count();
    assert_eq!(live, 2);
}

fn the_watch_shows_status_and_events_until_the_end() {
    let machine = start("", "", "");
    machine.wait_live(1);
    let watch = machine.command_line(&["status", "--watch", "--interval", "0.05"]);
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    std::thread::sleep(Duration::from_millis(300));
    machine.stop();
    let output = watch.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.matches("DRIVER VM").count() > 3 && text.ends_with("m has ended\n"), "{text}");
    assert!(text.contains("  nic0: generation 2 live after "), "{text}");
    assert!(!text.contains('\x1b'), "no terminal, no control sequences");
}

fn a_report_shows_the_failures_of_a_machine_that_has_ended() {
    let mut machine = start("", "garbage=2", "");
    machine.wait_live(1);
    machine.crash(CrashKind::Panic);
    machine.wait_live(3);
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
    let page = machine.dir.path().join("page.html");
    let output = machine.command_line(&["report", "-o", page.to_str().unwrap()]).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8(output.stdout).unwrap().contains("page.html: 2 failures of m, "));
    let page = fs::read_to_string(page).unwrap();
    for words in [
        "1. nic0: kernel panic",
        "Kernel panic - not syncing: fake crash",
        "umbra crash --kind panic",
        "generation 3 live",
        "</b> sent, ",
        "reset: <b>flr</b>",
        "2. nic0: its agent sent what is no message",
    ] {
        assert!(page.contains(words), "{words}: {page}");
    }
}

fn metrics_count_failures_and_show_the_present() {
    let machine = start("", "", "");
    machine.wait_live(1);
    // Clients that ask for nothing, and for too much, hold up nobody.
    let socket = machine.dir.path().join("metrics.sock");
    let _silent = UnixStream::connect(&socket).unwrap();
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    std::thread::sleep(Duration::from_millis(1200));
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    for line in [
        "umbra_driver_failures_total{driver=\"nic0\",source=\"panic\"} 1",
        "umbra_driver_outage_seconds_count{driver=\"nic0\"} 1",
        "umbra_driver_frames_total{driver=\"nic0\",fate=\"replayed\"} 2",
        "umbra_driver_generation{driver=\"nic0\"} 2",
        "umbra_driver_state{driver=\"nic0\",state=\"live\"} 1",
        "umbra_guest_state{guest=\"web\",state=\"running\"} 1",
    ] {
        assert!(text.lines().any(|have| have == line), "{line}: {text}");
    }
    machine.stop();
}

fn a_service_manager_hears_of_ready_watchdog_and_stopping() {
    let mut machine = start("", "", "");
    let (all_live, mut words, mut chunk) =
        ("STATUS=1 of 1 guests running, 1 of 1 driver VMs live", String::new(), [0; 4096]);
    // A button that is pressed before the guest runs would come first.
    machine.manager.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    while !(words.contains("READY=1") && words.contains(all_live)) {
        let n = machine.manager.recv(&mut chunk).unwrap_or_else(|error| panic!("{error}: {words}"));
        words.push_str(std::str::from_utf8(&chunk[..n]).unwrap());
    }
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
    machine.manager.set_nonblocking(true).unwrap();
    while let Ok(n) = machine.manager.recv(&mut chunk) {
        words.push_str(std::str::from_utf8(&chunk[..n]).unwrap());
    }
    let at = |line: &str| words.lines().position(|have| have == line).unwrap_or_else(|| panic!("{line}: {words}"));
    assert!(at("WATCHDOG=1") <= at("READY=1") && at("READY=1") < at("STOPPING=1"), "{words}");
    assert!(at(all_live) < at("STOPPING=1"));
}

fn what_is_not_there_has_no_carrier_and_no_uptime() {
    let machine = make("", "", "restart = { limit = 0 }");
    fs::write(machine.dir.path().join("keep"), "").unwrap();
    let mut machine = machine;
    machine.start_again();
    let driver = machine.wait_live(1);
    assert!(driver.carrier);
    let guest = machine.wait_for_guest("web", "a second", |guest| guest.uptime_s > 0.01);
    assert_eq!(guest.state, GuestStateName::Running);
    machine.crash(CrashKind::Panic);
    let driver = machine.wait_for("quarantine", |driver| driver.state == StateName::Quarantined);
    assert!(!driver.carrier, "it serves nobody");
    machine.ask_about(&Request::StopGuest { name: "web".into(), how: StopHow::Kill }).unwrap();
    let guest = machine.wait_for_guest("web", "its end", |guest| guest.state == GuestStateName::Off);
    assert_eq!(guest.uptime_s, 0.0);
    machine.stop();
}
