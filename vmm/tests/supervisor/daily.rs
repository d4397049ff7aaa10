//! What scripts and people use every day: the list, the check, waiting, the console.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};

use serde_json::Value;
use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::lifecycle::StateName;
use umbra_vmm::record::status::GuestStateName;
use umbra_vmm::supervisor::front::protocol::{Request, StopHow};

use crate::cases::{Case, cases};
use crate::machine::{ended, start, start_shared, start_with_spare};

/// All of them.
pub const ALL: &[Case] = cases![
    the_check_has_a_status_and_reasons,
    the_list_has_all_machines_and_their_health,
    a_wait_ends_when_it_is_so_or_its_time_is_over,
    every_answer_has_its_schema,
    the_console_follows_a_guest_over_its_reboots,
    keys_reach_the_guest_until_the_escape,
    a_program_follows_events_and_waits_for_a_recovery,
    an_nmi_reaches_a_guest_that_runs,
];

fn the_check_has_a_status_and_reasons() {
    let mut machine = start("", "", "limit = 1");
    assert_eq!(machine.umbra(&["wait", "ok"]), (0, String::new()));
    assert_eq!(machine.umbra(&["status", "--check"]), (0, "m: ok\n".into()));
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    machine.crash(CrashKind::Panic);
    machine.wait_for("its end", |driver| driver.state == StateName::Quarantined);
    let (status, said) = machine.umbra(&["status", "--check"]);
    assert!(status == 2 && said.starts_with("m: failed\n  ") && said.contains("nic0 is quarantined: "), "{said}");
    let (status, said) = machine.umbra(&["status", "--check", "--json"]);
    let answer: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((status, &answer["health"], &answer["name"]), (2, &"failed".into(), &"m".into()));
    machine.press(StopHow::Kill);
    let _ = machine.wait();
    let (status, said) = machine.umbra(&["status", "--check"]);
    assert!(status == 2 && said.starts_with("umbra: no machine is running"), "{said}");
    // A spare whose NIC has no carrier.
    let machine = start_with_spare("no-carrier=2 ");
    machine.wait_for("it", |driver| {
        driver.standby.as_ref().is_some_and(|standby| standby.state == umbra_vmm::lifecycle::StandbyStage::NoCarrier)
    });
    let (status, said) = machine.umbra(&["status", "--check"]);
    assert_eq!((status, said.as_str()), (1, "m: degraded\n  the spare 0000:04:00.0 of nic0 has no carrier\n"));
    machine.stop();
}

fn the_list_has_all_machines_and_their_health() {
    let machine = start("", "", "");
    assert_eq!(machine.umbra(&["wait", "ok"]).0, 0);
    let (status, said) = machine.umbra(&["list"]);
    assert!(status == 0 && said.lines().count() == 2, "{said}");
    assert!(said.contains("1 of 1 running  1 of 1 live  ok\n"), "{said}");
    let (_, said) = machine.umbra(&["list", "--json"]);
    let answer: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(answer["machines"][0]["name"], "m");
    assert_eq!(answer["machines"][0]["drivers_live"], 1);
    machine.stop();
}

fn a_wait_ends_when_it_is_so_or_its_time_is_over() {
    let mut machine = start_shared("", "");
    for words in [&["wait", "live"][..], &["wait", "standby", "nic0"], &["wait", "running", "web"]] {
        assert_eq!(machine.umbra(words), (0, String::new()), "{words:?}");
    }
    let (status, said) = machine.umbra(&["wait", "off", "web", "--timeout", "0"]);
    assert_eq!((status, said.as_str()), (124, "umbra: after 0 s: web is running\n"));
    let (status, said) = machine.umbra(&["wait", "live", "web"]);
    assert_eq!((status, said.as_str()), (1, "umbra: there is no driver VM named web; there is nic0\n"));
    // For ever, as a script might say it.
    assert_eq!(machine.umbra(&["wait", "live", "--timeout", "18446744073709551615"]), (0, String::new()));
    let off = machine.command_line(&["wait", "off", "web"]);
    machine.ask_about(&Request::StopGuest { name: "web".into(), how: StopHow::PowerButton }).unwrap();
    assert_eq!(ended(off), (0, String::new()));
    let all = machine.command_line(&["wait", "off"]);
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
    assert_eq!(ended(all), (0, String::new()));
    assert_eq!(machine.umbra(&["wait", "off", "--name", "m"]), (0, String::new()), "it has run");
    let (status, said) = machine.umbra(&["wait", "live", "--timeout", "0"]);
    assert!(status == 124 && said.contains("no machine is running"), "{said}");
}

fn every_answer_has_its_schema() {
    let mut machine = start("", "", "");
    machine.wait_live(1);
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    let words = [
        &["status", "--json"][..],
        &["list", "--json"],
        &["status", "--check", "--json"],
        &["crash", "nic0", "--json"],
        &["events"],
        &["doctor", "--json"],
    ];
    for words in words {
        let (_, said) = machine.umbra(words);
        let mut objects = serde_json::Deserializer::from_str(&said).into_iter::<Value>();
        let first = objects.next().unwrap().unwrap();
        assert_eq!(first["schema"], 1, "{words:?}: {said}");
    }
    assert_eq!(machine.report(1)["schema"], 1);
    let for_ever = "18446744073709551615";
    let (status, said) = machine.umbra(&["reboot", "web", "--force", "--timeout", for_ever]);
    assert_eq!((status, said.as_str()), (0, "web runs\n"));
    let (status, said) = machine.umbra(&["stop", "web", "--json", "--timeout", for_ever]);
    let answer: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((status, answer), (0, serde_json::json!({ "response": "done", "name": "web", "schema": 1 })));
    machine.wait().unwrap();
}

fn the_console_follows_a_guest_over_its_reboots() {
    let mut machine = start_shared("speaks ", "");
    machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running);
    let mut console = machine.command_line(&["console", "web"]);
    let mut screen = console.stdout.take().unwrap();
    let mut greeting = [0; 7];
    screen.read_exact(&mut greeting).unwrap();
    for how in [StopHow::PowerButton, StopHow::Kill] {
        machine.ask_about(&Request::RebootGuest { name: "web".into(), how }).unwrap();
        screen.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"login: ");
    }
    assert!(machine.run_dir().join("web.console.sock").exists());
    machine.ask_about(&Request::StopGuest { name: "web".into(), how: StopHow::PowerButton }).unwrap();
    assert_eq!(ended(console), (0, "\numbra: web: it is off\n".into()));
    let (status, said) = machine.umbra(&["console", "web"]);
    assert_eq!((status, said.as_str()), (1, "umbra: web has no console: it is off; `umbra start web` starts it\n"));
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
    assert!(!machine.run_dir().join("web.console.sock").exists(), "nothing is left");
}

fn keys_reach_the_guest_until_the_escape() {
    let machine = start("speaks ", "", "");
    machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running);
    let (status, said) = machine.umbra(&["console", "www"]);
    assert_eq!((status, said.as_str()), (1, "umbra: m has no guest named www; it has web\n"));
    // The only guest need not be named.
    let mut console = machine.command_line_with(&["console"], Stdio::piped());
    let mut keys = console.stdin.take().unwrap();
    let mut screen = console.stdout.take().unwrap();
    keys.write_all(b"root").unwrap();
    let mut seen = [0; 11];
    screen.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"login: root");
    keys.write_all(b"\x1d").unwrap();
    assert_eq!(ended(console), (0, String::new()));
    machine.stop();
}

fn a_program_follows_events_and_waits_for_a_recovery() {
    let machine = start("", "", "");
    machine.wait_live(1);
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples/wait_for_recovery.py");
    let mut python = Command::new("python3");
    python.arg(example).arg(machine.run_dir().join("control.sock")).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut program = python.spawn().expect("this test needs python3: the example is a program in Python");
    // It is one that goes before any failure.
    let mut said = BufReader::new(program.stdout.take().unwrap()).lines();
    assert_eq!(said.next().unwrap().unwrap(), "following");
    machine.crash(CrashKind::Panic);
    let said: Vec<_> = said.map(Result::unwrap).collect();
    let (status, errors) = ended(program);
    assert_eq!((status, said.len()), (0, 2), "{said:?} {errors}");
    assert!(said[0].starts_with("nic0: panic: kernel panic"), "{said:?}");
    assert!(said[1].starts_with("nic0: generation 2 serves after "), "{said:?}");
    machine.stop();
}

fn an_nmi_reaches_a_guest_that_runs() {
    let machine = start_shared("", "");
    machine.wait_for_guest("web", "it", |guest| guest.state == GuestStateName::Running);
    assert_eq!(machine.umbra(&["nmi", "web"]), (0, "web: a non-maskable interrupt was injected\n".into()));
    machine.wait_for_event("a non-maskable interrupt was injected", 1);
    machine.wait_for_log("web", "Nmi");
    machine.ask_about(&Request::StopGuest { name: "web".into(), how: StopHow::PowerButton }).unwrap();
    machine.wait_for_guest("web", "its end", |guest| guest.state == GuestStateName::Off);
    let (status, said) = machine.umbra(&["nmi", "web"]);
    assert_eq!((status, said.as_str()), (1, "umbra: web has no vCPU that runs: it is off\n"));
    machine.stop();
}
