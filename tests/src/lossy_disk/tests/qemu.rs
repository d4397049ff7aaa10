//! QEMU as the client: its own NBD driver, `qemu-io` commands in its monitor, no machine.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::Duration;

use super::client::PATIENCE;
use super::{BYTES, Rig};
use crate::assets::QEMU_VARIABLE;
use crate::lossy_disk::{Access, Class, LossyDisk, Times};

struct Qemu {
    child: Child,
    monitor: BufReader<UnixStream>,
}

impl Qemu {
    /// With the disk as its node `disk0`.
    fn start(disk: &LossyDisk) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let program = std::env::var_os(QEMU_VARIABLE).unwrap_or_else(|| "qemu-system-x86_64".into());
        let node = disk.blockdev("disk0");
        let child = Command::new(program)
            .args(["-machine", "none", "-display", "none", "-nodefaults", "-qmp", "stdio", "-blockdev", &node])
            .stdin(OwnedFd::from(theirs.try_clone().unwrap()))
            .stdout(OwnedFd::from(theirs))
            .spawn()
            .expect("QEMU cannot be started; `make setup` installs it");
        let mut qemu = Self { child, monitor: BufReader::new(ours) };
        qemu.send(r#"{"execute": "qmp_capabilities"}"#);
        qemu.returned();
        qemu
    }

    fn send(&mut self, line: &str) {
        self.monitor.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// What was printed before the answer to a command.
    fn returned(&mut self) -> String {
        let mut printed = String::new();
        loop {
            let mut line = String::new();
            assert_ne!(self.monitor.read_line(&mut line).unwrap(), 0, "QEMU has ended: {printed}");
            if line.starts_with(r#"{"return""#) {
                return printed;
            }
            printed += &line;
        }
    }

    fn start_io(&mut self, command: &str) {
        let monitor = serde_json::json!({ "command-line": format!("qemu-io disk0 \"{command}\"") });
        self.send(&serde_json::json!({ "execute": "human-monitor-command", "arguments": monitor }).to_string());
    }

    /// Runs a command of `qemu-io`; returns whether it succeeded, patterns included.
    fn io(&mut self, command: &str) -> bool {
        self.start_io(command);
        let printed = self.returned();
        println!("{command}: {printed}");
        !printed.contains("failed")
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn qemu_reads_what_was_flushed_and_misses_what_was_lost() {
    let rig = Rig::new();
    let mut qemu = Qemu::start(&rig.disk);
    assert!(qemu.io("write -P 1 0 32k") && qemu.io("flush"));
    assert!(qemu.io("write -P 2 0 32k") && qemu.io("read -P 2 0 32k"));
    assert_eq!(rig.disk.lose(1.0).lost, 64);
    assert!(qemu.io("read -P 1 0 32k") && !qemu.io("read -P 2 0 32k"));
    // FUA, zeroes, trimming; a write that is not of whole sectors.
    assert!(qemu.io("write -f -P 3 0 4k") && qemu.io("write -z 4k 4k") && qemu.io("discard 8k 4k"));
    assert!(qemu.io("write -P 4 12388 100"));
    assert!(qemu.io("read -P 0 4k 8k") && qemu.io("read -P 4 12388 100"));
    assert_eq!(rig.disk.lose(1.0).lost, 8 + 8 + 1);
    assert!(qemu.io("read -P 3 0 4k") && qemu.io("read -P 1 4k 28k"));
    assert_eq!(rig.disk.state().host_errors, 0);
}

#[test]
fn qemu_sees_errors_stalls_and_another_disk() {
    let rig = Rig::new();
    let mut qemu = Qemu::start(&rig.disk);
    rig.disk.fail(Class::Read, 0..512, Times::Once);
    rig.disk.fail(Class::Flush, 0..BYTES, Times::Once);
    assert!(!qemu.io("read 0 4k") && qemu.io("read 0 4k"));
    // `qemu-io` does not say that a flush failed.
    assert!(qemu.io("write 0 4k") && qemu.io("flush") && qemu.io("flush"));
    assert_eq!((rig.disk.state().failed, rig.disk.state().given_up), (2, 8));
    rig.disk.stall();
    qemu.start_io("write -P 5 0 4k");
    rig.wait(|state| state.waiting == 1);
    rig.disk.resume();
    assert!(!qemu.returned().contains("failed"));
    rig.disk.delay(Class::Write, Duration::from_millis(20));
    assert!(qemu.io("write -P 6 0 4k") && qemu.io("read -P 6 0 4k"));
    // Another disk of the same size, then one of another: QEMU connects again.
    rig.disk.swap(&rig.other("same", BYTES, 7), Access::ReadWrite).unwrap();
    assert!(qemu.io("read -P 7 0 32k"));
    rig.disk.swap(&rig.other("smaller", BYTES / 2, 8), Access::ReadWrite).unwrap();
    assert!(qemu.io("read -P 8 0 4k"));
    assert_eq!((rig.disk.state().connections, rig.disk.state().host_errors), (2, 0));
}
