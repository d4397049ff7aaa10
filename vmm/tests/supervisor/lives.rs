//! Lives that end apart: what happens to a guest costs its own end of a driver VM, and nobody else's.

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::lifecycle::{StandbyStage, StateName};
use umbra_vmm::record::status::{DriverStatus, GuestStateName};
use umbra_vmm::supervisor::front::protocol::{Request, StopHow};
use umbra_vmm::supervisor::start::rundir;

use crate::machine::{
    DEVICE, PATIENCE, SPARE, TestMachine, make, share_with_db, start, start_elsewhere, start_shared,
    start_without_drivers,
};
use crate::spares::wait_armed;

/// All of them.
pub const ALL: &[crate::cases::Case] = &[
    ("a_guest_s_reboot_costs_nobody_else_anything", a_guest_s_reboot_costs_nobody_else_anything),
    (
        "a_killed_guest_costs_nobody_else_anything_and_can_be_started",
        a_killed_guest_costs_nobody_else_anything_and_can_be_started,
    ),
    ("a_guest_that_stands_still_holds_up_no_recovery", a_guest_that_stands_still_holds_up_no_recovery),
    (
        "a_guest_that_accuses_a_shared_driver_vm_loses_its_own_end",
        a_guest_that_accuses_a_shared_driver_vm_loses_its_own_end,
    ),
    ("the_only_guest_that_accuses_its_driver_vm_is_believed", the_only_guest_that_accuses_its_driver_vm_is_believed),
    ("a_guest_that_cannot_start_again_fails_alone", a_guest_that_cannot_start_again_fails_alone),
    (
        "a_guest_without_driver_vms_that_cannot_start_again_fails_alone",
        a_guest_without_driver_vms_that_cannot_start_again_fails_alone,
    ),
    ("guests_are_stopped_started_and_rebooted_by_themselves", guests_are_stopped_started_and_rebooted_by_themselves),
    ("a_rebooted_guest_keeps_its_driver_vm_and_standby", a_rebooted_guest_keeps_its_driver_vm_and_standby),
    (
        "a_guest_that_triple_faults_boots_again_and_fails_at_the_limit",
        a_guest_that_triple_faults_boots_again_and_fails_at_the_limit,
    ),
    ("a_guest_s_panic_is_answered_as_configured", a_guest_s_panic_is_answered_as_configured),
    (
        "a_guest_that_boots_when_its_button_is_pressed_goes_down",
        a_guest_that_boots_when_its_button_is_pressed_goes_down,
    ),
    ("a_guest_that_is_stopped_as_it_resets_stays_off", a_guest_that_is_stopped_as_it_resets_stays_off),
    (
        "a_guest_that_was_stopped_before_its_card_came_has_not_failed",
        a_guest_that_was_stopped_before_its_card_came_has_not_failed,
    ),
    (
        "what_a_late_guest_was_masked_for_is_no_part_of_the_next_outage",
        what_a_late_guest_was_masked_for_is_no_part_of_the_next_outage,
    ),
    (
        "a_guest_that_reboots_while_its_driver_vm_recovers_is_served_by_the_standby",
        a_guest_that_reboots_while_its_driver_vm_recovers_is_served_by_the_standby,
    ),
    (
        "guests_that_share_a_killed_driver_vm_are_all_served_by_the_standby",
        guests_that_share_a_killed_driver_vm_are_all_served_by_the_standby,
    ),
    ("no_guest_is_started_while_the_machine_ends", no_guest_is_started_while_the_machine_ends),
    (
        "a_guest_that_reads_nothing_does_not_keep_the_supervisor_busy",
        a_guest_that_reads_nothing_does_not_keep_the_supervisor_busy,
    ),
    (
        "a_guest_that_is_served_after_the_others_is_announced_at_the_device_that_took_over",
        a_guest_that_is_served_after_the_others_is_announced_at_the_device_that_took_over,
    ),
];

/// Starts a machine whose guest has this kernel command line and these keys; it runs on when the guest is off.
fn start_guest_with(cmdline: &str, keys: &str) -> TestMachine {
    let mut machine = make(cmdline, "", "");
    let path = machine.dir.path().join("m.toml");
    let text = fs::read_to_string(&path).unwrap().replace("[guest.web]\n", &format!("[guest.web]\n{keys}\n"));
    fs::write(&path, text).unwrap();
    fs::write(machine.dir.path().join("keep"), "").unwrap();
    machine.start_again();
    machine
}

fn a_guest_that_triple_faults_boots_again_and_fails_at_the_limit() {
    let machine = start_guest_with("triple-fault ", "restart = { limit = 2, interval_s = 3600 }");
    let web = machine.wait_for_guest("web", "its failure", |guest| guest.state == GuestStateName::Failed);
    let why = web.reason.unwrap();
    assert!(why.contains("triple fault") && why.contains("more than 2 failures in 3600 s"), "{why}");
    assert_eq!(machine.events_text().matches("\"guest-rebooted\"").count(), 2, "{}", machine.events_text());
    // It was put right, says who starts it.
    machine.ask_about(&Request::StartGuest { name: "web".into() }).unwrap();
    machine.wait_for_event("\"guest-rebooted\"", 4);
    machine.press(StopHow::Kill);

    let machine = start_guest_with("triple-fault ", "on_reset = \"stop\"");
    let web = machine.wait_for_guest("web", "its failure", |guest| guest.state == GuestStateName::Failed);
    assert!(web.reason.unwrap().contains("triple fault"));
    machine.press(StopHow::Kill);
}

fn a_guest_s_panic_is_answered_as_configured() {
    let keys = "on_crash = \"reboot\"\nrestart = { limit = 2, interval_s = 3600 }";
    let machine = start_guest_with("panic ", keys);
    let web = machine.wait_for_guest("web", "its failure", |guest| guest.state == GuestStateName::Failed);
    let why = web.reason.unwrap();
    assert!(why.contains("panicked") && why.contains("more than 2 failures"), "{why}");
    assert_eq!(machine.events_text().matches("\"guest-rebooted\"").count(), 2, "{}", machine.events_text());
    machine.press(StopHow::Kill);

    let machine = start_guest_with("panic ", "on_crash = \"stop\"");
    let web = machine.wait_for_guest("web", "its failure", |guest| guest.state == GuestStateName::Failed);
    assert!(web.reason.unwrap().contains("panicked"));
    machine.press(StopHow::Kill);

    let machine = start_guest_with("panic ", "");
    machine.wait_for_event("its kernel panicked", 1);
    machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running);
    machine.stop();
}

fn a_guest_that_boots_when_its_button_is_pressed_goes_down() {
    let machine = start_guest_with("boots-at-first-press ", "");
    machine.wait_live(1);
    machine.ask_about(&Request::StopGuest { name: "web".into(), how: StopHow::PowerButton }).unwrap();
    machine.wait_for_guest("web", "its end", |guest| guest.state == GuestStateName::Off);
    assert_eq!(machine.guest_log().matches("PowerButton").count(), 2, "{}", machine.guest_log());
    machine.stop();
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

/// Waits for the first life, live, with its standby ready.
fn wait_ready(machine: &TestMachine) -> DriverStatus {
    machine.wait_for("a standby", |driver| {
        driver.state == StateName::Live
            && driver.standby.as_ref().is_some_and(|standby| standby.state == StandbyStage::Ready)
    })
}

/// The driver VM and its standby are the processes that they were, and nothing was said to `db` but what it heard before.
fn assert_undisturbed(machine: &TestMachine, before: &DriverStatus, heard: &str) {
    let now = machine.wait_live(1);
    assert_eq!((now.pid, now.failures, now.last_outage_ms), (before.pid, 0, None));
    let (standby, was) = (now.standby.unwrap(), before.standby.clone().unwrap());
    assert_eq!((standby.pid, standby.generation), (was.pid, was.generation), "{}", machine.events_text());
    let news = machine.log_of("db").replace(heard, "");
    assert!(!news.contains("Mask") && !news.contains("Attach") && !news.contains("Carrier"), "{news}");
}

fn a_guest_s_reboot_costs_nobody_else_anything() {
    let machine = start_shared("reset-in=1", "");
    let before = wait_ready(&machine);
    let heard = machine.log_of("db");
    // It resets 300 ms after each time that it goes live.
    machine.wait_for_event("\"guest-rebooted\"", 5);
    machine.wait_for_event("\"end-live\"", 4);
    assert_undisturbed(&machine, &before, &heard);
    machine.press(StopHow::Kill);
}

fn a_killed_guest_costs_nobody_else_anything_and_can_be_started() {
    let machine = start_shared("", "");
    let before = wait_ready(&machine);
    let heard = machine.log_of("db");
    let web = machine.wait_for_guest("web", "a process", |guest| guest.pid.is_some());
    signal(web.pid.unwrap(), Signal::SIGKILL);
    let web = machine.wait_for_guest("web", "its failure", |guest| guest.state == GuestStateName::Failed);
    assert!(web.reason.unwrap().contains("signal 9"));
    machine.ask_about(&Request::StartGuest { name: "web".into() }).unwrap();
    machine.wait_for_event("\"end-live\"", 1);
    assert_eq!(machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running).reason, None);
    assert_undisturbed(&machine, &before, &heard);
    machine.stop();
}

fn a_guest_that_stands_still_holds_up_no_recovery() {
    let machine = start_shared("", "");
    machine.wait_live(1);
    let web = machine.wait_for_guest("web", "a process", |guest| guest.pid.is_some()).pid.unwrap();
    signal(web, Signal::SIGSTOP);
    for generation in 2..4 {
        machine.crash(CrashKind::Panic);
        machine.wait_live(generation);
        let told = format!("generation: Generation({generation}), replay: Everything");
        assert!(machine.log_of("db").contains(&told), "{}", machine.log_of("db"));
    }
    machine.wait_for_event("does not answer", 2);
    assert!(!machine.events_text().contains("quarantined"));
    signal(web, Signal::SIGCONT);
    machine.wait_for_event("\"guest\":\"web\",\"device\":\"net0\",\"driver\":\"nic0\",\"generation\":3", 1);
    machine.stop();
}

fn a_guest_that_accuses_a_shared_driver_vm_loses_its_own_end() {
    let machine = start_shared("accuse ", "");
    let before = wait_ready(&machine);
    let heard = machine.log_of("db");
    // Connected again after each accusation, later and later, and at last left alone.
    machine.wait_for_event("is left alone until", 1);
    machine.wait_for_log("web", "attempt: 3");
    machine.wait_for_log("web", "Quarantine");
    assert_undisturbed(&machine, &before, &heard);
    machine.stop();
}

fn the_only_guest_that_accuses_its_driver_vm_is_believed() {
    let machine = start("accuse ", "", "limit = 1");
    machine.wait_for("the end of it", |driver| driver.state == StateName::Quarantined);
    let report = machine.report(1);
    assert_eq!(report["source"], "link");
    assert!(report["reason"].as_str().unwrap().contains("a rule"), "{report}");
    machine.stop();
}

fn a_guest_that_cannot_start_again_fails_alone() {
    let machine = start_shared("", "");
    let before = wait_ready(&machine);
    let heard = machine.log_of("db");
    fs::rename(machine.dir.path().join("kernel"), machine.dir.path().join("gone")).unwrap();
    machine.ask_about(&Request::RebootGuest { name: "web".into(), how: StopHow::PowerButton }).unwrap();
    let web = machine.wait_for_guest("web", "its failure", |guest| guest.state == GuestStateName::Failed);
    assert!(web.reason.unwrap().contains("its kernel is gone"));
    assert_undisturbed(&machine, &before, &heard);
    fs::rename(machine.dir.path().join("gone"), machine.dir.path().join("kernel")).unwrap();
    machine.ask_about(&Request::StartGuest { name: "web".into() }).unwrap();
    machine.wait_for_event("\"end-live\"", 1);
    assert_undisturbed(&machine, &before, &heard);
    machine.stop();
}

fn guests_are_stopped_started_and_rebooted_by_themselves() {
    let machine = start_shared("", "");
    let before = wait_ready(&machine);
    let name = || "web".to_owned();
    let first = machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running).pid;
    assert!(machine.ask_about(&Request::StartGuest { name: name() }).unwrap_err().contains("it is running"));
    machine.ask_about(&Request::RebootGuest { name: name(), how: StopHow::PowerButton }).unwrap();
    let second =
        machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running && guest.pid != first).pid;
    machine.ask_about(&Request::RebootGuest { name: name(), how: StopHow::Kill }).unwrap();
    machine.wait_for_guest("web", "it", |guest| {
        guest.state == GuestStateName::Running && guest.pid != second && guest.pid != first
    });
    for how in [StopHow::PowerButton, StopHow::Kill] {
        machine.ask_about(&Request::StopGuest { name: name(), how }).unwrap();
        machine.wait_for_guest("web", "its end", |guest| guest.state == GuestStateName::Off);
        assert!(machine.ask_about(&Request::StopGuest { name: name(), how }).unwrap_err().contains("it is off"));
        machine.ask_about(&Request::StartGuest { name: name() }).unwrap();
        machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running);
    }
    let unknown = machine.ask_about(&Request::StopGuest { name: "www".into(), how: StopHow::Kill }).unwrap_err();
    assert!(unknown.contains("there is web, db") || unknown.contains("there is db, web"), "{unknown}");
    // The machine was told to go on without guests.
    for guest in ["web", "db"] {
        machine.ask_about(&Request::StopGuest { name: guest.into(), how: StopHow::PowerButton }).unwrap();
        machine.wait_for_guest(guest, "its end", |guest| guest.state == GuestStateName::Off);
    }
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(machine.wait_live(1).pid, before.pid);
    machine.ask_about(&Request::StartGuest { name: "db".into() }).unwrap();
    machine.wait_for_guest("db", "it", |guest| guest.state == GuestStateName::Running);
    machine.stop();
}

fn a_rebooted_guest_keeps_its_driver_vm_and_standby() {
    let machine = start("reset-in=1", "", "");
    let before = wait_ready(&machine);
    machine.wait_for_event("\"guest-rebooted\"", 2);
    machine.wait_for_event("\"end-live\"", 2);
    let now = machine.wait_live(1);
    assert_eq!((now.pid, now.failures), (before.pid, 0));
    assert_eq!(now.standby.unwrap().pid, before.standby.unwrap().pid);
    assert!(machine.guest_log().contains("attempt: 3"), "{}", machine.guest_log());
    assert!(!machine.events_text().contains("\"masked\""), "it is not the driver VM that was lost");
    machine.press(StopHow::Kill);
}

fn a_guest_without_driver_vms_that_cannot_start_again_fails_alone() {
    let machine = start_without_drivers();
    for guest in ["web", "db"] {
        machine.wait_for_guest(guest, "it", |guest| guest.state == GuestStateName::Running);
    }
    let pid = machine.wait_for_guest("db", "it", |guest| guest.pid.is_some()).pid;
    fs::remove_file(machine.dir.path().join("kernel-of-web")).unwrap();
    machine.ask_about(&Request::RebootGuest { name: "web".into(), how: StopHow::PowerButton }).unwrap();
    machine.wait_for_guest("web", "its failure", |guest| guest.state == GuestStateName::Failed);
    assert_eq!(machine.wait_for_guest("db", "it", |guest| guest.state == GuestStateName::Running).pid, pid);
    machine.press(StopHow::Kill);
}

fn a_guest_that_is_stopped_as_it_resets_stays_off() {
    let machine = start_guest_with("resets-slowly ", "");
    // It has said so, and its process has not ended.
    machine.wait_for_event("\"guest-rebooted\"", 1);
    machine.ask_about(&Request::StopGuest { name: "web".into(), how: StopHow::PowerButton }).unwrap();
    machine.wait_for_guest("web", "its end", |guest| guest.state == GuestStateName::Off);
    machine.press(StopHow::Kill);
}

fn a_guest_that_was_stopped_before_its_card_came_has_not_failed() {
    let mut machine = make("", "", "restart = { limit = 0, boot_timeout_s = 1 }");
    let path = machine.dir.path().join("m.toml");
    let text = fs::read_to_string(&path).unwrap().replace("net = [{", "sound = [{");
    fs::write(&path, text).unwrap();
    fs::write(machine.dir.path().join("keep"), "").unwrap();
    machine.start_again();
    machine.wait_for("its start", |driver| driver.pid.is_some());
    machine.ask_about(&Request::StopGuest { name: "web".into(), how: StopHow::PowerButton }).unwrap();
    machine.wait_for("its end", |driver| driver.state == StateName::Quarantined);
    let web = machine.wait_for_guest("web", "it", |_| true);
    assert_eq!((web.state, web.reason), (GuestStateName::Off, None), "{}", machine.events_text());
    machine.stop();
}

/// The event of this kind of that generation.
fn event(machine: &TestMachine, kind: &str, generation: u32) -> Value {
    let events = machine.events_text();
    let mut events = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    events.find(|event| event["event"] == kind && event["generation"] == generation).unwrap()
}

fn what_a_late_guest_was_masked_for_is_no_part_of_the_next_outage() {
    let machine = start("hold=2", "", "");
    machine.wait_live(1);
    machine.ask_about(&Request::RebootGuest { name: "web".into(), how: StopHow::Kill }).unwrap();
    machine.wait_for_event("\"end-live\"", 1);
    let late = event(&machine, "end-live", 1);
    assert_eq!(late["frames"]["logged"], 3, "{late}");
    machine.crash(CrashKind::Panic);
    // It does not answer.
    machine.wait_for_event("\"driver-live\"", 2);
    let live = event(&machine, "driver-live", 2);
    assert_eq!(live["frames"]["logged"], 0, "those of its reboot: {live}");
    assert!(live["outage_ms"].as_f64().unwrap() >= 5000.0, "over before it began: {live}");
    machine.stop();
}

fn a_guest_that_reboots_while_its_driver_vm_recovers_is_served_by_the_standby() {
    let machine = start_shared("", "");
    let before = wait_ready(&machine);
    // The reset returns when somebody reads what is written there.
    let reset = machine.dir.path().join("pci/devices").join(DEVICE).join("reset");
    fs::remove_file(&reset).unwrap();
    nix::unistd::mkfifo(&reset, nix::sys::stat::Mode::S_IRWXU).unwrap();
    machine.crash(CrashKind::Panic);
    machine.wait_for("the reset", |driver| driver.state == StateName::Resetting);
    machine.ask_about(&Request::RebootGuest { name: "web".into(), how: StopHow::Kill }).unwrap();
    let standby = before.standby.unwrap().generation.unwrap();
    // The new process is connected with the standby.
    machine.wait_for_log("web", &format!("Generation({standby}), attempt: 2"));
    assert_eq!(fs::read_to_string(&reset).unwrap(), "1");
    machine.wait_live(standby);
    for guest in ["db", "web"] {
        machine.wait_for_log(guest, &format!("generation: Generation({standby}), replay"));
    }
    machine.stop();
}

fn guests_that_share_a_killed_driver_vm_are_all_served_by_the_standby() {
    let machine = start_shared("", "");
    for _ in 0..3 {
        let before = wait_ready(&machine);
        signal(before.pid.unwrap(), Signal::SIGKILL);
        let standby = before.standby.unwrap().generation.unwrap();
        machine.wait_live(standby);
        for guest in ["web", "db"] {
            machine.wait_for_log(guest, &format!("generation: Generation({standby}), replay"));
        }
    }
    machine.stop();
}

fn no_guest_is_started_while_the_machine_ends() {
    let mut machine = make("", "", "");
    let path = machine.dir.path().join("m.toml");
    let db = "[guest.db]\nkernel = \"kernel\"\nconsole = { file = \"db.log\" }\ndisk = [{ driver = \"disk0\" }]\n";
    let disk0 = format!(
        "[driver.disk0]\ndevice = \"{SPARE}\"\nimage = \"image\"\ncmdline = \"deaf-to-rest \"\nsnapshots = false\n"
    );
    fs::write(&path, fs::read_to_string(&path).unwrap() + db + &disk0).unwrap();
    machine.start_again();
    let wait_both = |wanted: [StateName; 2]| {
        let until = Instant::now() + PATIENCE;
        loop {
            let drivers = machine.status().map(|status| status.drivers).unwrap_or_default();
            let states: Vec<_> = drivers.iter().map(|driver| driver.state).collect();
            if states == wanted {
                return;
            }
            assert!(Instant::now() < until, "{states:?}\n{}", machine.events_text());
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait_both([StateName::Live, StateName::Live]);
    for guest in ["web", "db"] {
        machine.ask_about(&Request::StopGuest { name: guest.into(), how: StopHow::PowerButton }).unwrap();
    }
    // The disks are being flushed, and the NIC's driver VM has ended.
    wait_both([StateName::Live, StateName::Stopped]);
    let why = machine.ask_about(&Request::StartGuest { name: "web".into() }).unwrap_err();
    assert!(why.contains("its last guest has ended"), "{why}");
    machine.press(StopHow::Kill);
    machine.wait().unwrap();
}

fn a_guest_that_reads_nothing_does_not_keep_the_supervisor_busy() {
    let mut machine = start_elsewhere("unanswered=1");
    machine.wait_live(1);
    let supervisor = machine.status().unwrap().pid;
    let web = machine.wait_for_guest("web", "a process", |guest| guest.pid.is_some()).pid.unwrap();
    signal(web, Signal::SIGSTOP);
    // More than its channel takes.
    let (_, mut stream) = rundir::connect(&machine.dir.path().join("run"), Some("m")).unwrap();
    let question = serde_json::to_string(&Request::Status).unwrap() + "\n";
    (0..2000).for_each(|_| stream.write_all(question.as_bytes()).unwrap());
    // Its connection is to be made again 5 s after it was not answered.
    std::thread::sleep(Duration::from_secs(7));
    let before = processor_time(supervisor);
    std::thread::sleep(Duration::from_secs(3));
    let used = processor_time(supervisor) - before;
    assert!(used < 100, "{used} hundredths of a second in 3 s");
    signal(web, Signal::SIGCONT);
    machine.wait_for_log("web", "attempt: 2");
    machine.kill_supervisor();
}

/// Time for which this process has run, in hundredths of a second (proc(5)).
fn processor_time(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, rest) = text.rsplit_once(')').unwrap();
    rest.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

fn a_guest_that_is_served_after_the_others_is_announced_at_the_device_that_took_over() {
    let mut machine = make("", "", &format!("spare = \"{SPARE}\"\n"));
    share_with_db(&machine);
    machine.start_again();
    wait_armed(&machine, 1, SPARE, 2);
    machine.ask_about(&Request::StopGuest { name: "web".into(), how: StopHow::Kill }).unwrap();
    machine.wait_for_guest("web", "its end", |guest| guest.state == GuestStateName::Off);
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    // It may have come late to the first life as well.
    let came = machine.events_text().matches("\"end-live\"").count();
    machine.ask_about(&Request::StartGuest { name: "web".into() }).unwrap();
    machine.wait_for_event("\"end-live\"", came + 1);
    let announced =
        |log: &str| log.lines().rfind(|line| line.starts_with("GoLive")).unwrap().contains("announce: true");
    assert!(announced(&machine.guest_log()), "{}", machine.guest_log());
    // Once.
    machine.ask_about(&Request::RebootGuest { name: "web".into(), how: StopHow::Kill }).unwrap();
    machine.wait_for_event("\"end-live\"", came + 2);
    assert!(!announced(&machine.guest_log()), "{}", machine.guest_log());
    machine.press(StopHow::Kill);
}
