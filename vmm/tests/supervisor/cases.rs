//! The cases: start a machine, break something, expect.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::host::reset::ResetMethod;
use umbra_vmm::lifecycle::{StandbyStage, StateName};
use umbra_vmm::record::status::{DriverStatus, GuestStateName};
use umbra_vmm::supervisor::front::protocol::{Response, StopHow};

use crate::machine::{DEVICE, PATIENCE, TestMachine, make, start, start_elsewhere};

pub type Case = (&'static str, fn());

macro_rules! cases {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), $name as fn())),*] };
}
pub(crate) use cases;

/// All of them.
pub const ALL: &[Case] = cases![
    a_panicked_driver_vm_is_replaced_and_reported,
    a_killed_process_is_replaced,
    a_standby_takes_over_and_the_next_one_follows,
    a_standby_that_is_killed_is_replaced,
    a_second_standby_moves_up_at_a_failure_and_when_the_first_is_killed,
    a_restart_is_masked_and_no_failure,
    an_image_that_does_not_boot_changes_nothing,
    an_image_that_fails_gives_way_to_the_old_one,
    a_hung_agent_is_replaced_after_the_heartbeat_timeout,
    a_reset_driver_vm_is_replaced_with_its_registers_kept,
    an_agent_that_talks_nonsense_is_replaced,
    an_agent_that_floods_is_replaced,
    a_boot_that_hangs_is_replaced,
    a_death_during_replay_drops_the_suspect_log,
    after_two_deaths_during_replay_the_guest_s_device_starts_over,
    settings_that_kill_a_life_as_it_gets_them_are_left_out_of_the_third,
    past_the_limit_the_driver_is_quarantined_and_the_guest_lives_on,
    a_killed_guest_ends_the_run_with_its_name,
    a_driver_vm_that_cannot_start_ends_the_run,
    a_device_that_cannot_be_opened_ends_the_run,
    an_agent_that_cannot_work_at_first_ends_the_run,
    a_guest_that_changes_its_mind_without_end_costs_no_driver_vm,
    a_rebooted_guest_hears_that_its_driver_is_quarantined,
    a_full_disk_does_not_stop_recovery,
    a_driver_vm_gets_its_own_descriptors_alone,
    a_client_that_says_nonsense_is_told_and_a_silent_one_disturbs_nobody,
    a_kill_ends_everything_at_once,
    a_guest_that_waits_for_its_sound_card_is_off_when_the_machine_is_stopped,
    a_supervisor_that_is_killed_takes_its_vms_along_and_the_next_cleans_up,
];

fn a_panicked_driver_vm_is_replaced_and_reported() {
    let machine = start("", "", "");
    machine.wait_live(1);
    assert_eq!(machine.command() & 4, 0, "bus mastering is off before the first start");
    machine.crash(CrashKind::Panic);
    let driver = machine.wait_live(2);
    assert_eq!(driver.failures, 1);
    assert_eq!(driver.reset_method, Some(ResetMethod::Flr));
    // The kernel's own words come a moment later than the recovery begins.
    let reason = Some("kernel panic: Kernel panic - not syncing: fake crash");
    let driver = machine.wait_for("the reason", |driver| driver.reason.as_deref() == reason);
    assert!(driver.last_outage_ms.unwrap() < 5000.0);
    assert_eq!(machine.resets(), "1");
    let report = machine.report_with_steps(1, &["live"]);
    assert_eq!((&report["source"], &report["verdict"]), (&"panic".into(), &"restart".into()));
    assert_eq!(report["registers"], "rip 0000", "{report}");
    assert!(report["console_tail"].as_str().unwrap().contains("CPU: 0 PID: 1"));
    assert_eq!(report["frames"]["replayed"], 2);
    let steps: Vec<_> =
        report["timeline"].as_array().unwrap().iter().map(|mark| mark["step"].as_str().unwrap()).collect();
    let order = [
        "detect",
        "fence",
        "reset-start",
        "reset",
        "spawn",
        "running",
        "hello",
        "nic",
        "forwarding",
        "go-live",
        "live",
    ];
    let found: Vec<_> = steps.iter().filter(|step| order.contains(step)).collect();
    assert_eq!(found, order.iter().collect::<Vec<_>>(), "{steps:?}");
    assert!(report["outage_ms"].as_f64().unwrap() > 0.0);
    machine.stop();
}

/// The second is connected with the guest when it is the first, and serves as any other.
fn a_second_standby_moves_up_at_a_failure_and_when_the_first_is_killed() {
    let mut machine = make("", "", "standbys = 2\nrestart = { backoff_ms = 10, limit = 9 }");
    machine.start_again();
    let both_ready = |first: u32| {
        let waiting = |driver: &DriverStatus| {
            let standby = driver.standby.clone().unwrap();
            let second = standby.second.clone().unwrap();
            [(standby.state, standby.generation), (second.state, second.generation)]
        };
        let ready = |generation| (StandbyStage::Ready, Some(generation));
        machine.wait_for("both", |driver| waiting(driver) == [ready(first), ready(first + 1)]).standby.unwrap()
    };
    let before = both_ready(2);
    let second = before.second.unwrap();
    machine.crash(CrashKind::Panic);
    assert_eq!(machine.wait_live(2).pid, before.pid);
    machine.crash(CrashKind::Panic);
    let driver = machine.wait_live(3);
    assert_eq!((driver.pid, driver.failures), (second.pid, 2));
    kill(both_ready(4).pid.unwrap());
    let moved = both_ready(5);
    kill(moved.second.unwrap().pid.unwrap());
    machine.wait_for("another second", |driver| {
        let standby = driver.standby.clone().unwrap();
        let second = standby.second.unwrap();
        standby.pid == moved.pid && (second.state, second.generation) == (StandbyStage::Ready, Some(7))
    });
    machine.crash(CrashKind::Panic);
    assert_eq!(machine.wait_live(5).pid, moved.pid);
    machine.stop();
}

fn a_killed_process_is_replaced() {
    let machine = start("", "", "");
    let pid = machine.wait_live(1).pid.unwrap();
    kill(pid);
    machine.wait_live(2);
    // The guest saw it itself.
    let report = machine.report_with(1, "the guest's word", |report| report["masks"][0]["cause"] == "closed");
    assert_eq!(report["source"], "process-exit");
    assert!(report["exit"].as_str().unwrap().contains("signal 9"), "{report}");
    machine.stop();
}

fn a_standby_takes_over_and_the_next_one_follows() {
    let machine = start("", "", "");
    let standby = |driver: &DriverStatus| driver.standby.clone().unwrap();
    let ready = machine.wait_for("a standby", |driver| standby(driver).state == StandbyStage::Ready);
    let pid = standby(&ready).pid;
    assert_eq!((ready.generation, standby(&ready).generation), (Some(1), Some(2)));
    machine.crash(CrashKind::Panic);
    let driver = machine.wait_live(2);
    assert_eq!(driver.pid, pid, "the process is that of the standby");
    let report = machine.report_with_steps(1, &["live"]);
    let steps: Vec<_> =
        report["timeline"].as_array().unwrap().iter().map(|mark| mark["step"].as_str().unwrap()).collect();
    assert!(steps.contains(&"plugged") && !steps.contains(&"running"), "{steps:?}");
    assert_eq!(report["parts"]["boot_ms"], 0.0);
    let next = machine.wait_for("the next", |driver| standby(driver).state == StandbyStage::Ready);
    assert_eq!(standby(&next).generation, Some(3));
    machine.stop();
}

fn a_standby_that_is_killed_is_replaced() {
    let machine = start("", "", "");
    let standby = |driver: &DriverStatus| driver.standby.clone().unwrap();
    let ready = machine.wait_for("a standby", |driver| standby(driver).state == StandbyStage::Ready);
    kill(standby(&ready).pid.unwrap());
    let next = machine.wait_for("another", |driver| {
        standby(driver).generation == Some(3) && standby(driver).state == StandbyStage::Ready
    });
    assert_eq!((next.state, next.generation, next.failures), (StateName::Live, Some(1), 0));
    assert!(machine.events_text().contains("\"standby-failed\""));
    machine.crash(CrashKind::Panic);
    machine.wait_live(3);
    machine.stop();
}

fn a_restart_is_masked_and_no_failure() {
    let machine = start("", "", "");
    machine.wait_live(1);
    let Response::Restarted { generation, outage_ms, .. } = machine.restart(None) else { panic!("no restart") };
    assert!(generation == 2 && outage_ms.unwrap() < 5000.0);
    let driver = machine.wait_live(2);
    assert_eq!(driver.failures, 0);
    let Response::Restarted { generation, .. } = machine.restart(Some("image")) else { panic!("no upgrade") };
    assert!(generation > 2);
    assert!(!machine.run_dir().join("reports/nic0-gen1.json").exists(), "no crash report");
    assert!(matches!(machine.restart(Some("nowhere")), Response::Error { what } if what.contains("nowhere")));
    machine.stop();
}

fn an_image_that_does_not_boot_changes_nothing() {
    let machine = start("", "", "");
    machine.wait_live(1);
    let Response::Error { what } = machine.restart(Some("image-that-does-not-boot")) else { panic!("it boots") };
    assert!(what.contains("it has no engine") && what.contains("image of before"), "{what}");
    let driver = machine.wait_live(1);
    assert_eq!((driver.failures, driver.generation), (0, Some(1)));
    assert!(!machine.events_text().contains("masked"), "the guest noticed nothing");
    machine
        .wait_for("a standby of the old image", |d| d.standby.as_ref().is_some_and(|s| s.state == StandbyStage::Ready));
    machine.stop();
}

fn an_image_that_fails_gives_way_to_the_old_one() {
    let machine = start("", "", "");
    machine.wait_live(1);
    let Response::Error { what } = machine.restart(Some("image-without-the-driver")) else { panic!("it serves") };
    assert!(what.contains("no module named nic") && what.contains("image of before"), "{what}");
    machine.wait_for("the old image", |driver| driver.state == StateName::Live && driver.generation > Some(2));
    machine.stop();
}

fn a_hung_agent_is_replaced_after_the_heartbeat_timeout() {
    let machine = start("", "", "heartbeat_timeout_ms = 600");
    machine.wait_live(1);
    let crashed = Instant::now();
    machine.crash(CrashKind::AgentHang);
    machine.wait_live(2);
    assert!(crashed.elapsed() >= Duration::from_millis(500));
    assert_eq!(machine.report(1)["source"], "heartbeat");
    machine.stop();
}

fn a_reset_driver_vm_is_replaced_with_its_registers_kept() {
    let machine = start("", "", "");
    machine.wait_live(1);
    machine.crash(CrashKind::Reboot);
    machine.wait_live(2);
    let report = machine.report(1);
    assert_eq!((&report["source"], &report["registers"]), (&"vm-end".into(), &"rip 1111".into()));
    machine.stop();
}

fn an_agent_that_talks_nonsense_is_replaced() {
    let machine = start("", "garbage=1", "");
    machine.wait_live(2);
    let report = machine.report(1);
    assert_eq!(report["source"], "control-stream");
    assert!(report["reason"].as_str().unwrap().contains("root-shell"), "{report}");
    machine.stop();
}

fn an_agent_that_floods_is_replaced() {
    let machine = start("", "flood=1", "");
    machine.wait_live(2);
    assert!(machine.report(1)["reason"].as_str().unwrap().contains("more than 32768 bytes"));
    machine.stop();
}

fn a_boot_that_hangs_is_replaced() {
    let machine = start("", "hang-at-boot=1", "boot_timeout_s = 1");
    machine.wait_live(2);
    assert_eq!(machine.report(1)["source"], "boot-timeout");
    machine.stop();
}

fn a_death_during_replay_drops_the_suspect_log() {
    let machine = start("hold=2", "die-after-forwarding=2", "");
    machine.wait_live(1);
    machine.crash(CrashKind::Panic);
    machine.wait_live(3);
    let log = machine.guest_log();
    let scopes: Vec<_> = log.lines().filter(|line| line.starts_with("GoLive")).collect();
    assert_eq!(scopes.len(), 3, "{log}");
    assert!(scopes[0].contains("Everything") && scopes[1].contains("Everything"), "{log}");
    assert!(scopes[2].contains("ConfigurationOnly"), "{log}");
    let reports = [machine.report(1), machine.report_with_steps(2, &["live"])];
    assert!(reports[0]["outage_ms"].is_null(), "the first report's outage went on");
    let outage = reports[1]["outage_ms"].as_f64().unwrap();
    let since_second_failure = reports[1]["timeline"].as_array().unwrap().len();
    assert!(outage > 100.0 && since_second_failure > 5, "the outage counts from the first mask: {outage}");
    machine.stop();
}

/// What the guest was told of going live and of being without, in order.
fn told(machine: &TestMachine) -> Vec<&'static str> {
    let log = machine.guest_log();
    let word = |line: &str| ["GoLive", "Quarantine"].into_iter().find(|word| line.starts_with(word));
    log.lines().filter_map(word).collect()
}

fn after_two_deaths_during_replay_the_guest_s_device_starts_over() {
    let machine = start("hold=2 hold=3", "die-after-forwarding=2 die-after-forwarding=3 clean=4", "backoff_ms = 10");
    machine.wait_live(1);
    machine.crash(CrashKind::Panic);
    machine.wait_live(4);
    assert_eq!(told(&machine), ["GoLive", "GoLive", "GoLive", "Quarantine", "GoLive"]);
    let events = machine.events_text();
    assert!(events.contains(r#""event":"clean-start","driver":"nic0","guest":"web","device":"net0""#), "{events}");
    machine.stop();
}

fn settings_that_kill_a_life_as_it_gets_them_are_left_out_of_the_third() {
    let machine = start("", "die-of-settings=2 die-of-settings=3 clean=4", "backoff_ms = 10");
    machine.wait_live(1);
    machine.crash(CrashKind::Panic);
    machine.wait_live(4);
    assert_eq!(told(&machine), ["GoLive", "Quarantine", "GoLive"]);
    machine.stop();
}

fn past_the_limit_the_driver_is_quarantined_and_the_guest_lives_on() {
    let machine =
        start("", "die-after-forwarding=1 die-after-forwarding=2 die-after-forwarding=3", "limit = 2, backoff_ms = 10");
    let driver = machine.wait_for("quarantine", |driver| driver.state == StateName::Quarantined);
    assert!(driver.reason.unwrap().starts_with("more than 2 failures in 60 s"));
    assert_eq!((driver.generation, driver.failures, driver.pid), (Some(3), 3, None));
    assert_eq!(machine.report(3)["verdict"], "quarantine");
    machine.wait_for_log("web", "Quarantine");
    assert_eq!(machine.status().unwrap().guests[0].state, GuestStateName::Running);
    machine.stop();
}

fn a_killed_guest_ends_the_run_with_its_name() {
    let mut machine = start("", "", "");
    machine.wait_live(1);
    kill(machine.status().unwrap().guests[0].pid.unwrap());
    let error = machine.wait().unwrap_err().to_string();
    assert!(error.starts_with("web: its process was killed by signal 9"), "{error}");
}

fn a_driver_vm_that_cannot_start_ends_the_run() {
    for (guest, driver, said) in [("", "fake=no-start", "nic0"), ("fake=no-start", "", "web")] {
        for (ever, configuration) in [("", false), ("-ever", true)] {
            let words = |word: &str| if word.is_empty() { String::new() } else { format!("{word}{ever}") };
            let error = start(&words(guest), &words(driver), "").wait().unwrap_err();
            assert_eq!(error.to_string(), format!("{said}: it has no engine"));
            assert_eq!(error.is_configuration(), configuration, "{said}{ever}");
        }
    }
}

fn a_device_that_cannot_be_opened_ends_the_run() {
    let mut machine = make("", "", "");
    fs::write(machine.dir.path().join("pci/devices").join(DEVICE).join("unbound"), "").unwrap();
    machine.start_again();
    let message = machine.wait().unwrap_err().to_string();
    assert!(message.starts_with("nic0: 0000:03:00.0 is bound to no driver"), "{message}");
    assert_eq!(machine.resets(), "", "what cannot be opened is not reset");
}

fn an_agent_that_cannot_work_at_first_ends_the_run() {
    let mut machine = start("", "agent-fails=1", "");
    assert_eq!(machine.wait().unwrap_err().to_string(), "nic0: no module named nic");
}

fn a_guest_that_changes_its_mind_without_end_costs_no_driver_vm() {
    let machine = start("flood", "deaf=1", "");
    machine.wait_live(1);
    // Longer than the agent reads nothing.
    std::thread::sleep(Duration::from_millis(2500));
    let driver = machine.wait_live(1);
    assert_eq!((driver.failures, driver.generation), (0, Some(1)));
    machine.stop();
}

fn a_rebooted_guest_hears_that_its_driver_is_quarantined() {
    let machine = start("reset-at-quarantine", "die-after-forwarding=1", "limit = 0");
    machine.wait_for("quarantine", |driver| driver.state == StateName::Quarantined);
    let until = Instant::now() + PATIENCE;
    while machine.guest_log().matches("Quarantine").count() < 2 {
        assert!(Instant::now() < until, "{}", machine.guest_log());
        std::thread::sleep(Duration::from_millis(20));
    }
    machine.stop();
}

fn a_full_disk_does_not_stop_recovery() {
    let machine = start("", "", "");
    machine.wait_live(1);
    // Even root cannot write below a file.
    fs::remove_dir_all(machine.run_dir().join("reports")).unwrap();
    fs::write(machine.run_dir().join("reports"), "").unwrap();
    machine.crash(CrashKind::Panic);
    let driver = machine.wait_live(2);
    assert_eq!(driver.report, None);
    assert_eq!(machine.events_text().matches(r#""what":"nic0: no crash report in"#).count(), 1, "told once");
    // There is room again: nothing was lost.
    fs::remove_file(machine.run_dir().join("reports")).unwrap();
    fs::create_dir(machine.run_dir().join("reports")).unwrap();
    machine.wait_for("the report", |driver| driver.report.is_some());
    machine.report_with(1, "an outage", |report| report["outage_ms"].as_f64().is_some_and(|ms| ms > 0.0));
    machine.stop();
}

fn a_driver_vm_gets_its_own_descriptors_alone() {
    let machine = start("", "", "");
    machine.wait_live(1);
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    let console = fs::read_to_string(machine.run_dir().join("nic0.console.log")).unwrap();
    // Three standard streams, the control channel, the agent's port.
    for name in ["nic0.1", "nic0.2"] {
        assert!(console.contains(&format!("booting {name} with 5 descriptors")), "{console}");
    }
    machine.stop();
}

fn a_client_that_says_nonsense_is_told_and_a_silent_one_disturbs_nobody() {
    let machine = start("", "", "");
    machine.wait_live(1);
    let silent = UnixStream::connect(machine.run_dir().join("control.sock")).unwrap();
    let mut rude = UnixStream::connect(machine.run_dir().join("control.sock")).unwrap();
    rude.write_all(b"{\"request\":\"format-disk\"}\n").unwrap();
    let mut answer = [0; 1000];
    let length = rude.read(&mut answer).unwrap();
    assert!(String::from_utf8_lossy(&answer[..length]).contains("not a request"));
    let mut long = UnixStream::connect(machine.run_dir().join("control.sock")).unwrap();
    let _ = long.write_all(&[b'x'; 100_000]);
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    drop(silent);
    machine.stop();
}

fn a_kill_ends_everything_at_once() {
    let mut machine = start("", "", "");
    machine.wait_live(1);
    machine.press(StopHow::Kill);
    machine.wait().unwrap();
}

fn a_guest_that_waits_for_its_sound_card_is_off_when_the_machine_is_stopped() {
    let mut machine = make("", "", "");
    let path = machine.dir.path().join("m.toml");
    let text = fs::read_to_string(&path).unwrap().replace("net = [{", "sound = [{");
    fs::write(&path, text).unwrap();
    machine.start_again();
    machine.wait_for("a boot", |driver| driver.state == StateName::Booting);
    assert_eq!(machine.status().unwrap().guests[0].pid, None);
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
}

pub fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

fn a_supervisor_that_is_killed_takes_its_vms_along_and_the_next_cleans_up() {
    let mut machine = start_elsewhere("");
    machine.wait_live(1);
    let pids = machine.pids();
    assert_eq!(pids.len(), 2);
    let supervisor = machine.kill_supervisor();
    let until = Instant::now() + PATIENCE;
    while pids.iter().any(|pid| is_alive(*pid)) {
        assert!(Instant::now() < until, "VMs outlive their supervisor");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(machine.run_dir().join("control.sock").exists(), "it could not clean up itself");
    // As if it was killed in the middle of a reset.
    machine.write_reset_method("bus");
    machine.start_again();
    machine.wait_live(1);
    let events = machine.events_text();
    assert!(
        events.contains(&format!("the run before (process {supervisor}) was killed: its VMs have ended with it")),
        "{events}"
    );
    assert!(events.contains("stand as before (flr bus)"), "{events}");
    let old = fs::read_to_string(machine.run_dir().join("reports.old/events.jsonl")).unwrap();
    assert!(old.contains("\"event\":\"driver-live\""), "its past is kept");
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
    let lock = fs::read_to_string(machine.run_dir().join("lock")).unwrap();
    assert_eq!(lock, "", "this one ended by itself");
}

/// Whether a process is there and more than a zombie.
fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).is_some_and(|state| state != "Z")
}
