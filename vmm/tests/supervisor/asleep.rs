//! The host sleeps: driver VMs give their devices up before it, and are reborn after it; guests are masked meanwhile.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use umbra_vmm::lifecycle::{StandbyStage, StateName};
use umbra_vmm::record::status::DriverStatus;
use umbra_vmm::supervisor::front::protocol::{Request, Response};

use crate::cases::{Case, cases};
use crate::machine::{PATIENCE, SPARE, TestMachine, make_with_disks, start, start_with_spare};
use crate::spares::wait_armed;

/// All of them.
pub const ALL: &[Case] = cases![
    a_machine_sleeps_masked_and_its_standby_takes_over,
    a_spare_gives_its_device_up_as_well,
    disks_are_at_rest_before_the_host_sleeps,
    a_host_that_wakes_early_finds_disks_that_go_on,
    a_quarantine_is_not_ended_before_the_host_is_awake,
    a_machine_that_starts_sleeps_too,
    a_driver_vm_that_is_added_meanwhile_sleeps_too,
    sleep_and_wake_are_commands_for_one_machine_or_all,
];

fn sleep(machine: &TestMachine) {
    let answer = machine.ask(&Request::Sleep).unwrap();
    assert!(matches!(answer, Response::Asleep { .. }), "{answer:?}");
}

/// Wakes the machine; whether it slept.
fn wake(machine: &TestMachine) -> bool {
    match machine.ask(&Request::Wake).unwrap() {
        Response::Awake { slept } => slept,
        other => panic!("{other:?}"),
    }
}

fn driver(machine: &TestMachine) -> DriverStatus {
    machine.status().unwrap().drivers.remove(0)
}

fn a_machine_sleeps_masked_and_its_standby_takes_over() {
    let machine = start("", "", "");
    let ready = machine.wait_for("a standby", |driver| {
        driver.standby.as_ref().is_some_and(|standby| standby.state == StandbyStage::Ready)
    });
    let standby = ready.standby.unwrap().pid;
    assert!(!wake(&machine), "it is awake");
    sleep(&machine);
    let asleep = driver(&machine);
    assert_eq!((asleep.state, asleep.pid), (StateName::Asleep, None));
    assert_eq!(asleep.standby.unwrap().pid, standby, "it has no device");
    let log = machine.guest_log();
    assert!(log.contains("Mask") && !log.contains("Quarantine"), "{log}");
    // Whoever asks again is answered as well.
    sleep(&machine);
    for answer in [machine.restart(None), machine.resume()] {
        assert!(matches!(&answer, Response::Error { what } if what.contains("it is asleep")), "{answer:?}");
    }
    assert!(wake(&machine));
    let live = machine.wait_live(2);
    assert_eq!((live.pid, live.failures), (standby, 0));
    assert!(!machine.run_dir().join("reports/nic0-gen1.json").exists(), "it has not failed");
    machine.wait_for_event("\"asleep\"", 1);
    machine.wait_for_event("\"awake\"", 1);
    machine.stop();
}

fn a_spare_gives_its_device_up_as_well() {
    let machine = start_with_spare("");
    wait_armed(&machine, 1, SPARE, 2);
    sleep(&machine);
    let asleep = driver(&machine);
    let spare = asleep.standby.unwrap();
    assert_eq!((asleep.state, asleep.pid, spare.pid), (StateName::Asleep, None, None));
    assert!(wake(&machine));
    machine.wait_live(3);
    wait_armed(&machine, 3, SPARE, 4);
    machine.stop();
}

fn with_disks(guest: &str) -> TestMachine {
    let mut machine = make_with_disks(guest, "", &[]);
    machine.start_again();
    machine.wait_live(1);
    machine
}

fn disks_are_at_rest_before_the_host_sleeps() {
    let machine = with_disks("rests-slowly");
    sleep(&machine);
    machine.wait_for_event("\"asleep\"", 1);
    let events = machine.events_text();
    let at = |what: &str| events.find(what).unwrap_or_else(|| panic!("no {what}: {events}"));
    assert!(at("\"at-rest\"") < at("\"driver-failed\"") && at("\"driver-failed\"") < at("\"asleep\""), "{events}");
    assert!(wake(&machine));
    machine.wait_for("its next life", |driver| driver.state == StateName::Live && driver.failures == 0);
    machine.stop();
}

fn a_host_that_wakes_early_finds_disks_that_go_on() {
    let machine = with_disks("never-rests");
    thread::scope(|scope| {
        let answer = scope.spawn(|| machine.ask(&Request::Sleep).unwrap());
        machine.wait_for_log("web", "Quiesce");
        assert!(wake(&machine));
        let answer = answer.join().unwrap();
        assert!(matches!(&answer, Response::Error { what } if what.contains("woke before")), "{answer:?}");
    });
    machine.wait_for_log("web", "GoOn");
    assert_eq!(machine.wait_live(1).failures, 0);
    machine.stop();
}

fn a_quarantine_is_not_ended_before_the_host_is_awake() {
    let machine = start("", "die-after-forwarding=1", "limit = 0");
    machine.wait_for("quarantine", |driver| driver.state == StateName::Quarantined);
    sleep(&machine);
    let refused = machine.resume();
    assert!(
        matches!(&refused, Response::Error { what } if what.contains("`umbra wake`, then try again")),
        "{refused:?}"
    );
    assert_eq!(driver(&machine).state, StateName::Quarantined);
    assert!(wake(&machine));
    assert!(matches!(machine.resume(), Response::Restarted { generation: 2, .. }));
    machine.stop();
}

fn a_machine_that_starts_sleeps_too() {
    let machine = start("", "", "");
    machine.wait_for("its first process", |driver| driver.pid.is_some());
    sleep(&machine);
    assert_eq!(driver(&machine).state, StateName::Asleep);
    assert!(wake(&machine));
    machine.wait_for("its life", |driver| driver.state == StateName::Live && driver.failures == 0);
    machine.stop();
}

fn a_driver_vm_that_is_added_meanwhile_sleeps_too() {
    let machine = start("", "", "");
    machine.wait_live(1);
    sleep(&machine);
    let path = machine.dir.path().join("m.toml");
    let guest = "[guest.db]\nkernel = \"kernel\"\nconsole = { file = \"db.log\" }\nnet = [{ driver = \"nic1\" }]\n";
    let driver = format!("[driver.nic1]\ndevice = \"{SPARE}\"\nimage = \"image\"\nsnapshots = false\n");
    fs::write(&path, fs::read_to_string(&path).unwrap() + guest + &driver).unwrap();
    let answer = machine.ask(&Request::Reload { check: false }).unwrap();
    assert!(matches!(answer, Response::Reloaded { .. }), "{answer:?}");
    let until = Instant::now() + PATIENCE;
    loop {
        let added = machine.status().unwrap().drivers.remove(1);
        match added.state {
            StateName::Asleep => break assert_eq!(added.pid, None),
            StateName::Resetting if Instant::now() < until => thread::sleep(Duration::from_millis(20)),
            state => panic!("it is {state}: the host's device is in use"),
        }
    }
    assert!(wake(&machine));
    machine.wait_for_event("\"driver-live\"", 3);
    machine.stop();
}

fn sleep_and_wake_are_commands_for_one_machine_or_all() {
    let machine = start("", "", "");
    machine.wait_live(1);
    let umbra = |words: &[&str]| machine.umbra(words);
    let (status, said) = umbra(&["sleep", "--all"]);
    assert!(status == 0 && said.starts_with("m: asleep after "), "{said}");
    // Told before the host may sleep: the watchdog counts the time for which a host that wakes lets no process run.
    machine.manager.set_nonblocking(true).unwrap();
    let mut told = String::new();
    let mut chunk = [0; 4096];
    while let Ok(n) = machine.manager.recv(&mut chunk) {
        told.push_str(std::str::from_utf8(&chunk[..n]).unwrap());
    }
    assert!(told.lines().any(|line| line == "WATCHDOG_USEC=600000000"), "{told}");
    let (status, said) = umbra(&["status", "--check"]);
    assert!(status == 1 && said.contains("nic0 is asleep"), "{said}");
    assert_eq!(umbra(&["wake"]), (0, "m: awake\n".into()));
    machine.wait_for("its next life", |driver| driver.state == StateName::Live);
    let (status, said) = umbra(&["sleep", "--name", "other"]);
    assert!(status == 1 && said.contains("other"), "{said}");
    machine.stop();
}
