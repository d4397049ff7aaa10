//! Clients of the control socket: none that wants nothing keeps out one that wants something.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use umbra_driver_vm::protocol::CrashKind;
use umbra_vmm::supervisor::front::protocol::{Request, StopHow};

use crate::cases::{Case, cases};
use crate::machine::{PATIENCE, TestMachine, start};

/// All of them.
pub const ALL: &[Case] = cases![
    idle_clients_keep_nobody_out_for_long,
    followers_of_events_leave_places_for_others,
    a_client_that_has_said_all_that_it_has_to_say_is_answered,
    an_image_that_cannot_be_read_holds_up_nobody,
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

/// As `socat` and others do, which close their side when their input ends.
fn a_client_that_has_said_all_that_it_has_to_say_is_answered() {
    let machine = start("", "", "");
    machine.wait_live(1);
    for (request, answer) in [
        (r#"{"request":"status"}"#, r#"{"response":"status""#),
        (r#"{"request":"restart","name":"nic0","image":null}"#, r#"{"response":"restarted""#),
        (r#"{"request":"events","after":0,"follow":false}"#, r#"{"response":"events-end""#),
    ] {
        let mut stream = connect(&machine);
        stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        assert!(said.lines().last().is_some_and(|line| line.starts_with(answer)), "{request}: {said:?}");
    }
    // One that wants nothing more is let go.
    let mut silent = connect(&machine);
    silent.shutdown(Shutdown::Write).unwrap();
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    machine.stop();
}

/// A folder on a file system that does not answer: here a manifest that nobody writes.
fn an_image_that_cannot_be_read_holds_up_nobody() {
    let machine = start("", "", "");
    machine.wait_live(1);
    let image = machine.dir.path().join("image-that-hangs");
    std::fs::create_dir(&image).unwrap();
    let manifest = image.join("manifest.json");
    nix::unistd::mkfifo(&manifest, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut waiting = connect(&machine);
    let request = Request::Restart { name: "nic0".into(), image: Some(image) };
    waiting.write_all((serde_json::to_string(&request).unwrap() + "\n").as_bytes()).unwrap();
    machine.crash(CrashKind::Panic);
    machine.wait_live(2);
    std::fs::write(manifest, "{}").unwrap();
    let mut said = String::new();
    BufReader::new(waiting).read_line(&mut said).unwrap();
    assert!(said.contains("\"error\"") && said.contains("image-that-hangs"), "{said}");
    machine.stop();
}
