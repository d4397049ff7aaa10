//! Clients of the control socket: none that wants nothing keeps out one that wants something.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use umbra_vmm::supervisor::front::protocol::StopHow;

use crate::cases::Case;
use crate::machine::{PATIENCE, TestMachine, start};

/// All of them.
pub const ALL: &[Case] = &[
    ("idle_clients_keep_nobody_out_for_long", idle_clients_keep_nobody_out_for_long),
    ("followers_of_events_leave_places_for_others", followers_of_events_leave_places_for_others),
];

/// As many as the machine takes.
const BOUND: usize = 16;

fn connect(machine: &TestMachine) -> UnixStream {
    UnixStream::connect(machine.run_dir().join("control.sock")).unwrap()
}

fn umbra(machine: &TestMachine, words: &[&str]) -> (bool, String) {
    let (status, said) = machine.umbra(words);
    (status == 0, said)
}

fn idle_clients_keep_nobody_out_for_long() {
    let mut machine = start("", "", "");
    machine.wait_live(1);
    let idle: Vec<_> = (0..2 * BOUND).map(|_| connect(&machine)).collect();
    let mut told = String::new();
    BufReader::new(idle.last().unwrap()).read_line(&mut told).unwrap();
    assert!(told.contains("too many clients of this machine: 16 are connected; close some"), "{told}");
    let (_, said) = umbra(&machine, &["status"]);
    assert!(!said.contains("ended"), "{said}");
    let until = Instant::now() + PATIENCE;
    loop {
        let (good, said) = umbra(&machine, &["status"]);
        if good {
            break;
        }
        assert!(said.contains("too many clients") && Instant::now() < until, "{said}");
        std::thread::sleep(Duration::from_millis(200));
    }
    let (good, said) = umbra(&machine, &["stop", "--force"]);
    assert!(good, "{said}");
    machine.wait().unwrap();
}

fn followers_of_events_leave_places_for_others() {
    let mut machine = start("", "", "");
    machine.wait_live(1);
    let followers: Vec<_> = (0..BOUND)
        .map(|_| {
            let mut stream = connect(&machine);
            stream.write_all(b"{\"request\":\"events\",\"after\":0,\"follow\":true}\n").unwrap();
            // It has been heard.
            let mut line = String::new();
            BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
            (stream, line)
        })
        .collect();
    let refused = followers.iter().filter(|(_, line)| line.contains("too many clients of this machine")).count();
    assert_eq!(refused, 4);
    let (good, said) = umbra(&machine, &["events", "--follow"]);
    assert!(!good && said.contains("too many clients"), "{said}");
    drop(followers);
    let (good, said) = umbra(&machine, &["status"]);
    assert!(good, "{said}");
    machine.press(StopHow::PowerButton);
    machine.wait().unwrap();
}
