//! The machine file is read again (`umbra reload`, SIGHUP).

use std::fs;
use std::io::Write;

use serde_json::Value;
use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::config::changes::{Change, Effect};
use umbra_vmm::lifecycle::{StandbyStage, StateName};
use umbra_vmm::record::status::GuestStateName;
use umbra_vmm::supervisor::front::protocol::{Request, Response, StopHow};

use crate::cases::{Case, cases};
use crate::machine::{SPARE, TestMachine, start, start_elsewhere};

/// All of them.
pub const ALL: &[Case] = cases![
    a_policy_is_taken_over_at_once_and_a_check_changes_nothing,
    a_guest_s_next_start_is_of_the_new_file,
    what_waits_goes_by_the_new_file,
    a_guest_and_its_driver_vm_are_added,
    a_file_that_is_wrong_changes_nothing,
    metrics_move_and_a_place_that_is_taken_is_refused,
    a_hang_up_reads_the_file_again_and_ends_nothing,
    a_file_that_is_read_while_the_machine_ends_adds_nothing,
];

/// Puts `to` in the place of `from` in the machine file.
fn edit(machine: &TestMachine, from: &str, to: &str) {
    let path = machine.dir.path().join("m.toml");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from}: {text}");
    fs::write(path, text.replace(from, to)).unwrap();
}

fn ask(machine: &TestMachine, check: bool) -> Result<Vec<Change>, String> {
    match machine.ask(&Request::Reload { check }).unwrap() {
        Response::Reloaded { changes } => Ok(changes),
        Response::Error { what } => Err(what),
        other => panic!("{other:?}"),
    }
}

fn keys(changes: &[Change]) -> Vec<(&str, Effect)> {
    changes.iter().map(|change| (&*change.key, change.effect)).collect()
}

fn a_policy_is_taken_over_at_once_and_a_check_changes_nothing() {
    let mut machine = start("", "", "limit = 1");
    machine.wait_live(1);
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    edit(&machine, "limit = 1", "limit = 5");
    let limit = [("driver.nic0.restart.limit", Effect::Now)];
    assert_eq!(keys(&ask(&machine, true).unwrap()), limit);
    assert_eq!(keys(&ask(&machine, true).unwrap()), limit, "the first one was a check");
    assert!(!machine.events_text().contains("reloaded"), "a check is no event");
    assert_eq!(keys(&ask(&machine, false).unwrap()), limit);
    machine.wait_for_event("\"taken\":[\"driver.nic0.restart.limit\"],\"left\":[]", 1);
    assert_eq!(ask(&machine, false).unwrap(), []);
    machine.crash(CrashKind::Panic);
    machine.wait_live(3);
    edit(&machine, "limit = 5", "limit = 0");
    ask(&machine, false).unwrap();
    machine.crash(CrashKind::Panic);
    machine.wait_for("its end", |driver| driver.state == StateName::Quarantined);
    machine.press(StopHow::Kill);
    let _ = machine.wait();
}

fn a_guest_s_next_start_is_of_the_new_file() {
    let mut machine = start("", "", "");
    machine.wait_live(1);
    edit(&machine, "cmdline = \" \"\nconsole", "cmdline = \"fake=no-start \"\ncpus = 2\nconsole");
    edit(&machine, "web.log", "other.log");
    let changes = ask(&machine, false).unwrap();
    let expected = [
        ("guest.web.cmdline", Effect::NextStart),
        ("guest.web.console", Effect::NextRun),
        ("guest.web.cpus", Effect::NextStart),
    ];
    assert_eq!(keys(&changes), expected);
    assert_eq!(changes[2].remedy.as_deref(), Some("`umbra reboot web`"));
    // What is not taken over is named each time.
    assert_eq!(keys(&ask(&machine, false).unwrap()), [("guest.web.console", Effect::NextRun)]);
    assert_eq!(machine.status().unwrap().guests[0].state, GuestStateName::Running, "it runs on as it was");
    machine.ask_about(&Request::RebootGuest { name: "web".into(), how: StopHow::Kill }).unwrap();
    machine.wait_for_event("it has no engine", 1);
    assert!(machine.wait().is_err());
}

fn what_waits_goes_by_the_new_file() {
    let machine = start("", "", "");
    let ready = |stage| {
        move |driver: &umbra_vmm::record::status::DriverStatus| {
            driver.standby.as_ref().is_some_and(|standby| standby.state == stage)
        }
    };
    let first = machine.wait_for("a standby", ready(StandbyStage::Ready)).standby.unwrap().generation;
    edit(&machine, "snapshots = false", "snapshots = false\ncpus = 2");
    assert_eq!(keys(&ask(&machine, false).unwrap()), [("driver.nic0.cpus", Effect::NextLife)]);
    machine.wait_for("another standby", |driver| {
        driver.standby.as_ref().is_some_and(|it| it.state == StandbyStage::Ready && it.generation != first)
    });
    edit(&machine, "cpus = 2", "cpus = 2\nstandby = \"cold\"");
    assert_eq!(keys(&ask(&machine, false).unwrap()), [("driver.nic0.standby", Effect::Now)]);
    machine.wait_for("none", |driver| driver.standby.is_none());
    machine.crash(CrashKind::Panic);
    machine.wait_for("the next", |driver| driver.state == StateName::Live && driver.failures == 1);
    edit(&machine, "standby = \"cold\"", "standbys = 2");
    ask(&machine, false).unwrap();
    machine.wait_for("two", |driver| {
        let second = driver.standby.as_ref().and_then(|standby| standby.second.as_ref());
        second.is_some_and(|second| second.state == StandbyStage::Ready)
    });
    machine.stop();
}

fn a_guest_and_its_driver_vm_are_added() {
    let machine = start("", "", "");
    machine.wait_live(1);
    let path = machine.dir.path().join("m.toml");
    let before = fs::read_to_string(&path).unwrap();
    let guest = |name: &str, driver: &str| {
        format!(
            "[guest.{name}]\nkernel = \"kernel\"\nconsole = {{ file = \"{name}.log\" }}\nnet = [{{ driver = \"{driver}\" }}]\n"
        )
    };
    let driver = format!("[driver.nic1]\ndevice = \"{SPARE}\"\nimage = \"image\"\nsnapshots = false\n");
    fs::write(&path, format!("{before}{}{driver}{}", guest("db", "nic1"), guest("mail", "nic0"))).unwrap();
    let expected = [("guest.db", Effect::Now), ("guest.mail", Effect::NextRun), ("driver.nic1", Effect::Now)];
    assert_eq!(keys(&ask(&machine, false).unwrap()), expected);
    machine.wait_for_guest("db", "a served guest", |guest| {
        guest.state == GuestStateName::Running
            && guest.nets[0].mode == umbra_vmm::wire::messages::ShadowMode::Passive.into()
    });
    let status = machine.status().unwrap();
    assert_eq!(status.drivers.iter().map(|driver| &*driver.name).collect::<Vec<_>>(), ["nic0", "nic1"]);
    assert_eq!(status.guests.len(), 2, "no guest comes to a driver VM that runs");
    let resets = fs::read_to_string(machine.run_dir().join("reset-methods.json")).unwrap();
    assert!(resets.contains(SPARE), "a run that is killed leaves it to the next: {resets}");
    machine.stop();
}

fn a_file_that_is_wrong_changes_nothing() {
    let machine = start("", "", "limit = 1");
    machine.wait_live(1);
    edit(&machine, "limit = 1", "limit = 9, typo = 1");
    let path = machine.dir.path().join("m.toml");
    let why = ask(&machine, false).unwrap_err();
    assert!(why.starts_with(&format!("{}:", path.display())) && why.contains("unknown field `typo`"), "{why}");
    machine.wait_for_event("\"event\":\"reload-failed\"", 1);
    // A host that has not what is asked for.
    edit(&machine, "limit = 9, typo = 1", "limit = 9");
    edit(&machine, "kernel = \"kernel\"", "kernel = \"no-kernel\"");
    let why = ask(&machine, true).unwrap_err();
    assert!(why.contains("web: cannot read the kernel") && why.contains("no-kernel"), "{why}");
    assert_eq!(machine.events_text().matches("reload-failed").count(), 1, "a check is no event");
    edit(&machine, "no-kernel", "kernel");
    assert_eq!(
        keys(&ask(&machine, true).unwrap()),
        [("driver.nic0.restart.limit", Effect::Now)],
        "nothing was taken over"
    );
    machine.stop();
}

fn metrics_move_and_a_place_that_is_taken_is_refused() {
    let machine = start("", "", "limit = 1");
    machine.wait_live(1);
    let [old, new, taken] = ["metrics.sock", "moved.sock", "taken.sock"].map(|name| machine.dir.path().join(name));
    assert!(old.exists());
    edit(&machine, "./metrics.sock", "./moved.sock");
    ask(&machine, false).unwrap();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while old.exists() && std::time::Instant::now() < until {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(new.exists() && !old.exists());
    let _other = std::os::unix::net::UnixListener::bind(&taken).unwrap();
    edit(&machine, "./moved.sock", "./taken.sock");
    edit(&machine, "limit = 1", "limit = 2");
    let why = ask(&machine, false).unwrap_err();
    assert!(why.contains("taken.sock"), "{why}");
    assert!(new.exists());
    let both = [("metrics", Effect::Now), ("driver.nic0.restart.limit", Effect::Now)];
    assert_eq!(keys(&ask(&machine, true).unwrap()), both, "all or nothing");
    edit(&machine, "metrics = \"./taken.sock\"\n", "");
    ask(&machine, false).unwrap();
    machine.stop();
    assert!(!new.exists());
}

fn a_hang_up_reads_the_file_again_and_ends_nothing() {
    let mut machine = start_elsewhere("");
    machine.wait_live(1);
    let pids = machine.pids();
    let supervisor = machine.status().unwrap().pid;
    let hang_up = || {
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(supervisor.try_into().unwrap()),
            nix::sys::signal::Signal::SIGHUP,
        )
        .unwrap();
    };
    hang_up();
    machine.wait_for_event("the machine file was read again: nothing in it differs", 1);
    fs::write(machine.dir.path().join("m.toml"), "guest = 1\n").unwrap();
    hang_up();
    machine.wait_for_event("the machine file was not taken over, nothing is changed: ", 1);
    let said: Vec<Value> = machine.events_text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(
        said.iter().any(|event| event["reason"].as_str().is_some_and(|why| why.contains("m.toml:1: "))),
        "{said:#?}"
    );
    let after = machine.pids();
    assert!(pids.iter().all(|pid| after.contains(pid)), "{pids:?} {after:?}");
    machine.kill_supervisor();
}

/// As with SIGHUP and SIGTERM at once: the file is read in a thread, and the machine is told to end meanwhile.
fn a_file_that_is_read_while_the_machine_ends_adds_nothing() {
    let mut machine = start("no-power-button", "", "");
    machine.wait_live(1);
    let path = machine.dir.path().join("m.toml");
    let text = fs::read_to_string(&path).unwrap();
    fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let why = std::thread::scope(|scope| {
        let answer = scope.spawn(|| ask(&machine, false));
        // Whoever opens it has a reader, who waits for the text.
        let mut file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        machine.press(StopHow::PowerButton);
        let guest = "[guest.db]\nkernel = \"kernel\"\nconsole = { file = \"db.log\" }\n";
        file.write_all((text + guest).as_bytes()).unwrap();
        drop(file);
        answer.join().unwrap().unwrap_err()
    });
    assert!(why.contains("being stopped"), "{why}");
    assert_eq!(machine.status().unwrap().guests.len(), 1);
    machine.press(StopHow::Kill);
    machine.wait().unwrap();
}
