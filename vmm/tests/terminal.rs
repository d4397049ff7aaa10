//! The serial console on a terminal: input and output, the way out by Ctrl-A x, and the terminal as it was
//! after each way in which the VM's process can end by itself.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Code, Files, echo_plus_one, elf, kvm};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;
use umbra_vmm::config::Console;

const PATIENCE: Duration = Duration::from_secs(30);

/// A guest whose console is on a terminal of ours.
struct OnTerminal {
    child: Child,
    ours: File,
    theirs: OwnedFd,
    before: Termios,
    _files: Files,
}

impl OnTerminal {
    fn start(code: &Code) -> Self {
        let files = Files::new(&elf(&code.0));
        let mut spec = files.spec();
        spec.console = Console::Terminal;
        let path = files.dir.path().join("spec.json");
        std::fs::write(&path, serde_json::to_vec(&spec).unwrap()).unwrap();
        let pty = openpty(None, None).unwrap();
        let before = tcgetattr(&pty.slave).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_umbra"));
        command.args(["vm", "--spec"]).arg(path).stdin(Stdio::from(pty.slave.try_clone().unwrap()));
        command.stdout(Stdio::from(pty.slave.try_clone().unwrap())).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        Self { child, ours: File::from(pty.master), theirs: pty.slave, before, _files: files }
    }

    /// Reads until the guest has printed `text`.
    fn expect(&mut self, text: &str) {
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).ends_with(text) {
            let mut byte = [0];
            self.ours.read_exact(&mut byte).unwrap();
            seen.push(byte[0]);
            assert!(seen.len() < 4096, "{}", String::from_utf8_lossy(&seen));
        }
    }

    fn is_raw(&self) -> bool {
        !tcgetattr(&self.theirs).unwrap().local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO)
    }

    /// Waits until the terminal is raw, which it is a little after the guest has started.
    fn wait_until_raw(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_raw() {
            assert!(Instant::now() < deadline, "the terminal is not raw");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for the process; true if it succeeded. The terminal must be as it was.
    fn ended(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the VM process does not end");
            std::thread::sleep(Duration::from_millis(2));
        };
        assert!(tcgetattr(&self.theirs).unwrap() == self.before, "the terminal is not as it was");
        status.success()
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn keys_reach_the_guest_and_the_escape_leaves() {
    if !kvm() {
        return;
    }
    let mut vm = OnTerminal::start(&echo_plus_one());
    vm.expect(">");
    vm.wait_until_raw();
    // Ctrl-C is the guest's, too.
    vm.ours.write_all(b"a\x03").unwrap();
    vm.expect("b\x04");
    vm.ours.write_all(b"\x01x").unwrap();
    assert!(vm.ended());
}

#[test]
fn a_flood_of_input_arrives_whole() {
    if !kvm() {
        return;
    }
    let mut vm = OnTerminal::start(&echo_plus_one());
    vm.expect(">");
    vm.wait_until_raw();
    vm.ours.write_all(&[b'a'; 1000]).unwrap();
    vm.ours.write_all(b"y").unwrap();
    vm.expect(&("b".repeat(1000) + "z"));
}

#[test]
fn the_terminal_is_as_it_was_after_each_end() {
    if !kvm() {
        return;
    }
    let key_then = |end: Code| {
        let wait = [0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 1, 0x74, 0xf6];
        Code(Code::new().print(">").raw(&wait).0.into_iter().chain(end.0).collect())
    };
    let ends = [(key_then(Code::new().out8(0xcf9, 6).spin()), true), (key_then(Code::new().raw(&[0x0f, 0x0b])), false)];
    for (code, success) in ends {
        let mut vm = OnTerminal::start(&code);
        vm.expect(">");
        vm.wait_until_raw();
        vm.ours.write_all(b"k").unwrap();
        assert_eq!(vm.ended(), success);
    }
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        let mut vm = OnTerminal::start(&Code::new().print(">").spin());
        vm.expect(">");
        vm.wait_until_raw();
        kill(Pid::from_raw(vm.child.id().try_into().unwrap()), signal).unwrap();
        assert!(vm.ended());
    }
}

/// A guest that prints more than a pipe holds runs to its end though nobody reads.
#[test]
fn a_pipe_that_nobody_reads_holds_up_nobody() {
    const PRINTED: u32 = 100_000;
    if !kvm() {
        return;
    }
    // mov ecx, PRINTED; mov edx, 0x3f8; mov al, 'x'; out dx, al; dec ecx; jnz back to out
    let flood =
        [&[0xb9][..], &PRINTED.to_le_bytes(), &[0xba, 0xf8, 0x03, 0, 0, 0xb0, b'x', 0xee, 0xff, 0xc9, 0x75, 0xfb]];
    let code = Code::new().raw(&flood.concat()).out8(0xcf9, 6).spin();
    let files = Files::new(&elf(&code.0));
    let mut spec = files.spec();
    spec.console = Console::Terminal;
    let path = files.dir.path().join("spec.json");
    std::fs::write(&path, serde_json::to_vec(&spec).unwrap()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_umbra"));
    command.args(["vm", "--spec"]).arg(path).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + 2 * PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the pipe holds the VM");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(child.wait().unwrap().success());
    let mut pipe = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut pipe).unwrap();
    assert!((4096..PRINTED as usize).contains(&pipe.len()), "{} bytes in the pipe", pipe.len());
}

/// Ends with the test, whatever that comes to.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// As a lost ssh session does it: the terminal goes, and its session is told so.
#[test]
fn a_terminal_that_is_gone_ends_no_guest() {
    if !kvm() {
        return;
    }
    let files = Files::new(&elf(&Code::new().print(">").spin().0));
    let dir = files.dir.path();
    let umbra = |words: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_umbra"));
        let output = command
            .args(words)
            .env("UMBRA_RUN_DIR", dir.join("run"))
            .env("UMBRA_STATE_DIR", dir.join("state"))
            .output()
            .unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    let pty = openpty(None, None).unwrap();
    // It is gone when we close it.
    fcntl(&pty.master, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
    let theirs = || Stdio::from(pty.slave.try_clone().unwrap());
    // The terminal is that of a session of its own, as at a login.
    let mut command = Command::new("setsid");
    command.arg("--ctty").arg(env!("CARGO_BIN_EXE_umbra")).args(["run", "--memory", "16M", "--kernel"]);
    command.arg(files.spec().kernel).env("UMBRA_RUN_DIR", dir.join("run")).env("UMBRA_STATE_DIR", dir.join("state"));
    let mut child = Killed(command.stdin(theirs()).stdout(theirs()).stderr(theirs()).spawn().unwrap());
    let wait_for = |what: &str, look: &dyn Fn() -> String| {
        let deadline = Instant::now() + PATIENCE;
        let mut said = look();
        while !said.contains(what) {
            assert!(Instant::now() < deadline, "waited in vain for {what}: {said}");
            std::thread::sleep(Duration::from_millis(10));
            said = look();
        }
    };
    wait_for("guest-running", &|| umbra(&["events"]));
    drop(pty);
    wait_for("this machine was started from flags", &|| umbra(&["events"]));
    wait_for("\"state\": \"running\"", &|| umbra(&["status", "--json"]));
    assert!(child.0.try_wait().unwrap().is_none());
    umbra(&["stop", "--force"]);
    child.0.wait().unwrap();
}
