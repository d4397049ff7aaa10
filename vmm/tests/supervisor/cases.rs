//! The cases: start a machine, break something, expect.

use std::fs;
use std::os::unix::net::UnixStream;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::supervisor::control::StopHow;

use crate::machine::start;

type Case = (&'static str, fn());

macro_rules! cases {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), $name as fn())),*] };
}

/// All of them.
pub const ALL: &[Case] = cases![
    a_panicked_driver_vm_is_replaced_and_reported,
    a_killed_process_is_replaced,
    a_hung_agent_is_replaced_after_the_heartbeat_timeout,
    a_reset_driver_vm_is_replaced_with_its_registers_kept,
    an_agent_that_talks_nonsense_is_replaced,
    an_agent_that_floods_is_replaced,
    a_boot_that_hangs_is_replaced,
    a_death_during_replay_drops_the_suspect_log,
    past_the_limit_the_driver_is_quarantined_and_the_guest_lives_on,
    a_rebooted_guest_gets_a_new_driver_vm_that_is_no_failure,
    a_killed_guest_ends_the_run_with_its_name,
    a_driver_vm_that_cannot_start_ends_the_run,
    an_agent_that_cannot_work_at_first_ends_the_run,
    a_full_disk_does_not_stop_recovery,
    a_driver_vm_gets_its_own_descriptors_alone,
    a_client_that_says_nonsense_is_told_and_a_silent_one_disturbs_nobody,
    a_kill_ends_everything_at_once,
];

fn a_panicked_driver_vm_is_replaced_and_reported() {
    let machine = start("", "", "");
    machine.wait_live(1);
    assert_eq!(machine.command() & 4, 0, "bus mastering is off before the first start");
    machine.crash(CrashKind::Panic);
    let driver = machine.wait_live(2);
    assert_eq!(driver.failures, 1);
    assert_eq!(driver.reset_method, "flr");
    assert_eq!(driver.reason.unwrap(), "kernel panic: Kernel panic - not syncing: fake crash");
    assert!(driver.last_outage_ms.unwrap() < 5000.0);
    assert_eq!(machine.resets(), "1");
    let report = machine.report(1);
    assert_eq!((&report["source"], &report["verdict"]), (&"panic".into(), &"restart".into()));
    assert_eq!(report["registers"], "rip 0000");
    assert!(report["console_tail"].as_str().unwrap().contains("CPU: 0 PID: 1"));
    assert_eq!(report["frames"]["replayed"], 2);
    let steps: Vec<_> = report["timeline"].as_array().unwrap().iter().map(|mark| mark["step"].as_str().unwrap()).collect();
    let order = ["detect", "fence", "reset-start", "reset", "spawn", "running", "hello", "nic", "forwarding", "go-live", "live"];
    let found: Vec<_> = steps.iter().filter(|step| order.contains(step)).collect();
    assert_eq!(found, order.iter().collect::<Vec<_>>(), "{steps:?}");
    assert!(report["outage_ms"].as_f64().unwrap() > 0.0);
    machine.stop();
}

fn a_killed_process_is_replaced() {
    let machine = start("", "", "");
    let pid = machine.wait_live(1).pid.unwrap();
    kill(pid);
    machine.wait_live(2);
    let report = machine.report(1);
    assert_eq!(report["source"], "process-exit");
    assert!(report["exit"].as_str().unwrap().contains("signal 9"), "{report}");
    assert_eq!(report["masks"][0]["cause"], "closed", "the guest saw it itself");
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
    let reports = [machine.report(1), machine.report(2)];
    assert!(reports[0]["outage_ms"].is_null(), "the first report's outage went on");
    let outage = reports[1]["outage_ms"].as_f64().unwrap();
    let since_second_failure = reports[1]["timeline"].as_array().unwrap().len();
    assert!(outage > 100.0 && since_second_failure > 5, "the outage counts from the first mask: {outage}");
    machine.stop();
}

fn past_the_limit_the_driver_is_quarantined_and_the_guest_lives_on() {
    let machine = start("", "die-after-forwarding=1 die-after-forwarding=2 die-after-forwarding=3", "limit = 2, backoff_ms = 10");
    let driver = machine.wait_for("quarantine", |driver| driver.state == "quarantined");
    assert!(driver.reason.unwrap().starts_with("more than 2 failures in 60 s"));
    assert_eq!((driver.generation, driver.failures, driver.pid), (Some(3), 3, None));
    assert_eq!(machine.report(3)["verdict"], "quarantine");
    assert!(machine.guest_log().contains("Quarantine"));
    assert_eq!(machine.status().unwrap().guests[0].state, "running");
    machine.stop();
}

fn a_rebooted_guest_gets_a_new_driver_vm_that_is_no_failure() {
    let machine = start("reset-in=1", "", "");
    let first = machine.wait_live(1);
    let second = machine.wait_live(2);
    assert_ne!(first.pid, second.pid);
    assert_eq!(second.failures, 0);
    assert!(machine.events_text().contains("\"guest-rebooted\""));
    assert_eq!(machine.guest_log().matches("AttachLink").count(), 2);
    assert_eq!(machine.status().unwrap().guests[0].state, "running");
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
    let mut machine = start("", "fake=no-start", "");
    assert_eq!(machine.wait().unwrap_err().to_string(), "nic0: it has no engine");
}

fn an_agent_that_cannot_work_at_first_ends_the_run() {
    let mut machine = start("", "agent-fails=1", "");
    assert_eq!(machine.wait().unwrap_err().to_string(), "nic0: no module named nic");
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
    assert!(machine.events_text().contains("no crash report in"));
    machine.stop();
}

fn a_driver_vm_gets_its_own_descriptors_alone() {
    let machine = start("", "", "");
    machine.wait_live(1);
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    let console = fs::read_to_string(machine.run_dir().join("nic0.console.log")).unwrap();
    // Three standard streams, the control channel, the agent's port, the link.
    for name in ["nic0.1", "nic0.2"] {
        assert!(console.contains(&format!("booting {name} with 6 descriptors")), "{console}");
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

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}
