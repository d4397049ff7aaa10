//! What is kept of past runs, as the commands show it, and what a machine does where nothing can be kept.

use std::fs;

use serde_json::Value;
use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::supervisor::front::protocol::StopHow;

use crate::cases::{Case, cases};
use crate::machine::{TestMachine, make, start};

/// All of them.
pub const ALL: &[Case] = cases![
    past_runs_are_kept_over_a_boot_of_the_host,
    a_state_directory_that_cannot_be_written_costs_a_warning,
    a_machine_that_keeps_nothing_has_no_past,
];

fn end(machine: &mut TestMachine) {
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
}

fn past_runs_are_kept_over_a_boot_of_the_host() {
    let mut machine = start("", "", "");
    machine.wait_live(1);
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    machine.report_with_steps(1, &["live"]);
    end(&mut machine);
    machine.start_again();
    machine.wait_live(1);
    end(&mut machine);
    // What is in /run does not outlive the host.
    fs::remove_dir_all(machine.run_dir()).unwrap();

    let (status, said) = machine.umbra(&["report", "--list", "--json"]);
    let list: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("{status} {said}"));
    assert_eq!((&list["machine"], list["runs"].as_array().unwrap().len()), (&"m".into(), 2), "{list}");
    let run = |n: usize, field: &str| list["runs"][n][field].clone();
    assert_eq!(
        (run(0, "run"), run(1, "run"), run(0, "failures"), run(1, "failures")),
        (1.into(), 2.into(), 1.into(), 0.into())
    );
    assert!(run(0, "longest_outage_ms").as_f64().unwrap() > 0.0 && run(0, "bytes").as_u64().unwrap() > 1000, "{list}");
    let (_, table) = machine.umbra(&["report", "--list"]);
    assert!(table.starts_with("RUN ") && table.lines().count() == 3, "{table}");

    // The report of the crash, with the end of the driver VM's console, is there after all.
    let page = machine.dir.path().join("page.html");
    let page = page.to_str().unwrap();
    let (status, said) = machine.umbra(&["report", "--run", "1", "-o", page]);
    assert!(status == 0 && said.contains("1 failure of m"), "{said}");
    assert!(fs::read_to_string(page).unwrap().contains("Kernel panic"), "the evidence is in it");
    let (_, events) = machine.umbra(&["events", "--run", "1"]);
    assert!(events.contains("\"event\":\"driver-failed\"") && events.contains("\"event\":\"guest-ended\""), "{events}");
    // Without a number it is the last one, and the one before it.
    let (_, events) = machine.umbra(&["events"]);
    assert!(events.contains("\"event\":\"driver-live\"") && !events.contains("driver-failed"), "{events}");
    let (status, said) = machine.umbra(&["report", "--previous", "-o", page]);
    assert!(status == 0 && said.contains("1 failure of m"), "{said}");

    for (words, what) in [
        (
            &["report", "--run", "7"][..],
            "umbra: no run 7 of m is kept; `umbra report --list --name m` lists those that are\n",
        ),
        (&["report", "--list", "--name", "../m"][..], "nothing is kept of a machine named ../m"),
    ] {
        let (status, said) = machine.umbra(words);
        assert!(status == 1 && said.contains(what), "{said}");
    }
}

fn a_state_directory_that_cannot_be_written_costs_a_warning() {
    let mut machine = make("", "", "");
    fs::write(machine.dir.path().join("state"), "in the way").unwrap();
    machine.start_again();
    machine.wait_live(1);
    machine.wait_for_event("set UMBRA_STATE_DIR to a folder that you can write to", 1);
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    machine.wait_for_event("UMBRA_STATE_DIR", 1);
    end(&mut machine);
    let (status, said) = machine.umbra(&["report", "--list"]);
    assert!(status == 1 && said.contains("nothing is kept of any machine"), "{said}");
    let (_, events) = machine.umbra(&["events"]);
    assert!(events.contains("driver-failed"), "the run directory has them");
}

fn a_machine_that_keeps_nothing_has_no_past() {
    let mut machine = make("", "", "");
    let path = machine.dir.path().join("m.toml");
    fs::write(&path, fs::read_to_string(&path).unwrap() + "[history]\nruns = 0\n").unwrap();
    machine.start_again();
    machine.wait_live(1);
    end(&mut machine);
    assert!(!machine.dir.path().join("state").exists());
}
