//! The host is short of something for a while: processes, descriptors, time. What can go on does, and nothing is given up.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;
use umbra_vmm::lifecycle::StateName;
use umbra_vmm::record::status::GuestStateName;
use umbra_vmm::supervisor::front::protocol::{Request, StopHow};

use crate::cases::{Case, cases, kill};
use crate::machine::{DEVICE, PATIENCE, TestMachine, make, run_elsewhere};

/// All of them.
pub const ALL: &[Case] = cases![
    a_driver_vm_whose_process_cannot_be_started_is_not_given_up,
    a_guest_that_reboots_while_no_process_can_be_started_is_started_later,
    a_guest_that_waits_for_a_process_can_be_stopped,
    without_descriptors_a_device_waits_for_its_reset_and_the_loop_for_its_clients,
    a_machine_that_was_stopped_for_a_while_has_missed_no_heartbeat,
];

/// The beginning of the warnings.
const NO_LIFE: &str = "\"what\":\"nic0: its next process cannot be started";
const NO_GUEST: &str = "\"what\":\"web: its next process cannot be started";

/// A machine without standby, whose driver VM is quarantined after few failures.
fn cold() -> TestMachine {
    make("", "", "standby = \"cold\"\nrestart = { limit = 2, backoff_ms = 10, backoff_max_ms = 200 }")
}

fn a_driver_vm_whose_process_cannot_be_started_is_not_given_up() {
    let mut machine = cold();
    machine.start_again();
    let pid = machine.wait_live(1).pid.unwrap();
    machine.set_program(false);
    kill(pid);
    machine.wait_for_event(NO_LIFE, 1);
    // Far more tries than failures that are allowed.
    std::thread::sleep(Duration::from_secs(2));
    let driver = machine.status().unwrap().drivers.remove(0);
    assert_eq!((driver.state, driver.failures), (StateName::BackOff, 1), "{}", machine.events_text());
    machine.set_program(true);
    let driver = machine.wait_for("a life", |driver| driver.state == StateName::Live);
    assert_eq!(driver.failures, 1);
    assert_eq!(machine.events_text().matches(NO_LIFE).count(), 1, "told once");
    assert!(!machine.guest_log().contains("Quarantine"));
    // The next time is another one.
    machine.set_program(false);
    kill(driver.pid.unwrap());
    machine.wait_for_event(NO_LIFE, 2);
    machine.set_program(true);
    machine.wait_for("a life", |now| now.state == StateName::Live && now.pid != driver.pid);
    machine.stop();
}

/// A guest whose next process cannot be started.
fn rebooting_guest() -> TestMachine {
    let mut machine = cold();
    machine.start_again();
    machine.wait_live(1);
    machine.set_program(false);
    machine.ask_about(&Request::RebootGuest { name: "web".into(), how: StopHow::Kill }).unwrap();
    machine.wait_for_event(NO_GUEST, 1);
    machine.wait_for_guest("web", "another process", |guest| guest.state == GuestStateName::Starting);
    machine
}

fn a_guest_that_reboots_while_no_process_can_be_started_is_started_later() {
    let machine = rebooting_guest();
    machine.set_program(true);
    machine.wait_for_guest("web", "its start", |guest| guest.state == GuestStateName::Running);
    assert_eq!(machine.events_text().matches(NO_GUEST).count(), 1, "told once");
    machine.stop();
}

fn a_guest_that_waits_for_a_process_can_be_stopped() {
    let mut machine = rebooting_guest();
    machine.ask_about(&Request::StopGuest { name: "web".into(), how: StopHow::PowerButton }).unwrap();
    machine.wait().unwrap();
}

/// Bounds the descriptors of process `pid` to `limit`.
fn limit_descriptors(pid: u32, limit: u64) {
    let limit = libc::rlimit { rlim_cur: limit, rlim_max: 4096 };
    let pid = libc::pid_t::try_from(pid).unwrap();
    // SAFETY: the kernel reads one limit.
    let set = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
    assert_eq!(set, 0);
}

/// The lowest number that no descriptor of process `pid` has.
fn first_free(pid: u32) -> u64 {
    (0..).find(|number| fs::symlink_metadata(format!("/proc/{pid}/fd/{number}")).is_err()).unwrap()
}

/// Processor time of process `pid` so far.
fn used(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_millis(ticks * 10)
}

fn without_descriptors_a_device_waits_for_its_reset_and_the_loop_for_its_clients() {
    let machine = run_elsewhere(cold());
    let pid = machine.wait_live(1).pid.unwrap();
    let supervisor = machine.supervisor();
    // What only a reset writes.
    let reset = machine.dir.path().join("pci/devices").join(DEVICE).join("reset");
    fs::write(&reset, "").unwrap();
    limit_descriptors(supervisor, first_free(supervisor));
    kill(pid);
    std::thread::sleep(Duration::from_millis(500));
    // Those of the life that has ended are free again.
    limit_descriptors(supervisor, first_free(supervisor));
    let client = std::os::unix::net::UnixStream::connect(machine.run_dir().join("control.sock")).unwrap();
    let before = used(supervisor);
    std::thread::sleep(Duration::from_secs(2));
    let busy = used(supervisor).saturating_sub(before);
    assert!(busy < Duration::from_millis(400), "its loop turns without a pause: {busy:?} of 2 s");
    limit_descriptors(supervisor, 1024);
    drop(client);
    let driver = machine.wait_for("a life", |driver| driver.state == StateName::Live);
    assert_eq!((machine.resets().as_str(), driver.failures), ("1", 1), "{}", machine.events_text());
    machine.stop_elsewhere();
}

/// As by `systemctl freeze`, or Ctrl-Z in the terminal.
fn a_machine_that_was_stopped_for_a_while_has_missed_no_heartbeat() {
    // Longer than a busy machine lets a process wait.
    let heartbeat = "restart = { heartbeat_timeout_ms = 4000 }";
    let machine = run_elsewhere(make("", "", heartbeat));
    let standby = |driver: &umbra_vmm::record::status::DriverStatus| driver.standby.clone().unwrap();
    let ready = machine.wait_for("a standby", |driver| standby(driver).state.is_ready());
    let vms = [machine.pids(), vec![standby(&ready).pid.unwrap()]].concat();
    let signal = |pid: u32, signal| send(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
    signal(machine.supervisor(), Signal::SIGSTOP);
    vms.iter().for_each(|pid| signal(*pid, Signal::SIGSTOP));
    std::thread::sleep(Duration::from_secs(10));
    // It sees the time before anything that it watches can say a word.
    signal(machine.supervisor(), Signal::SIGCONT);
    std::thread::sleep(Duration::from_millis(300));
    vms.iter().for_each(|pid| signal(*pid, Signal::SIGCONT));
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        let driver = machine.status().unwrap().drivers.remove(0);
        assert_eq!((driver.generation, driver.failures), (Some(1), 0), "{}", machine.events_text());
        std::thread::sleep(Duration::from_millis(100));
    }
    let now = machine.status().unwrap().drivers.remove(0);
    assert_eq!(standby(&now).pid, standby(&ready).pid, "{}", machine.events_text());
    // One that hangs by itself is found out as ever.
    signal(ready.pid.unwrap(), Signal::SIGSTOP);
    let hung = Instant::now();
    machine.wait_live(2);
    assert!(hung.elapsed() < PATIENCE);
    machine.stop_elsewhere();
}
