//! The hostile program: the first process of a driver VM whose image has it in front of the agent, or root's in a guest ([`in_guest`]).
//!
//! In a driver VM it runs the real agent as the first process of a PID namespace, with a terminal in the place of the control port, and
//! passes on what host and agent say ([`relay`]). So a life is as any other up to the moment at which its plan has it attack.

mod function;
mod lies;
mod pci;
mod relay;
mod rings;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::Duration;

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::reboot::{RebootMode, reboot};
use umbra_driver_vm::protocol::CONTROL_PORT;

use super::plan::{self, Attack};
use crate::random::Random;

/// Length of an attack that nothing stops.
pub(super) const GIVES_UP: Duration = Duration::from_secs(3);
/// Where the agent is in a hostile image.
pub const AGENT: &str = "/agent";

/// File system, place.
const MOUNTS: [(&str, &str); 4] = [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("devpts", "/dev/pts")];
/// Modules of the link to the host, in load order, and the last one that the control port needs.
const MODULES: &str = "/etc/umbra/modules";
const CONSOLE_MODULE: &str = "virtio_console";
/// Between two looks for the port.
const LOOK: Duration = Duration::from_millis(5);
/// Between the last word on the console and the reset.
const LAST_WORD: Duration = Duration::from_millis(200);

/// Attacks as the campaign `seed` has it, until this VM is reset. Never returns in a driver VM.
///
/// # Errors
/// This is not the first process of a driver VM, or one in which nothing works.
pub fn main(seed: u64) -> io::Result<()> {
    if std::process::id() != 1 {
        return Err(io::Error::other("this is the first process of a hostile driver VM, and nothing else"));
    }
    for (kind, place) in MOUNTS {
        fs::create_dir_all(place)?;
        // What is there already is good enough.
        let _ = mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>);
    }
    load_console()?;
    let (real, port) = control_port()?;
    let (master, slave) = terminal()?;
    replace(&port, &slave)?;
    let mut agent = start_agent()?;
    let shared = relay::start(seed, real, File::from(master))?;
    let ended = agent.wait()?;
    // An attack takes the agent's devices away, and goes on without it.
    while shared.attacks() {
        thread::sleep(LOOK);
    }
    say(&format!("the agent has ended ({ended})"));
    restart()
}

/// Attacks from a guest, as its life `life` (from 0) in the campaign `seed`.
pub fn in_guest(seed: u64, life: u32) {
    let (attack, mut random) = plan::of_guest(seed, life);
    say(&format!("life {life}: {attack:?}"));
    on_devices(attack, &mut random);
    say(&format!("nothing has stopped {attack:?}"));
}

/// Attacks by the devices of this VM, if `attack` is one on devices.
fn on_devices(attack: Attack, random: &mut Random) {
    let done = match attack {
        Attack::Rings => rings::rings(random),
        Attack::Headers => rings::headers(random),
        Attack::Vectors => rings::vectors(random),
        Attack::Dma => pci::dma(random),
        Attack::Kicks => rings::kicks(random),
        Attack::Registers => rings::registers(random),
        Attack::Config => pci::config(random),
        Attack::Bars => pci::bars(random),
        _ => Ok(()),
    };
    if let Err(error) = done {
        say(&format!("{attack:?} cannot be done: {error}"));
    }
}

/// A line on the console, where the host keeps it.
fn say(what: &str) {
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = writeln!(console, "\nhostile: {what}");
    }
}

/// Resets this VM at once: its kernel stops no device before, so that the host sees a reset and nothing else.
fn restart() -> ! {
    thread::sleep(LAST_WORD);
    let _ = fs::write("/proc/sysrq-trigger", "b");
    let Err(_) = reboot(RebootMode::RB_AUTOBOOT);
    std::process::abort()
}

/// Loads what the control port needs; the agent loads the rest.
fn load_console() -> io::Result<()> {
    for path in fs::read_to_string(MODULES)?.lines() {
        let name = Path::new(path).file_stem().unwrap_or_default().to_string_lossy().replace('-', "_");
        finit_module(File::open(path)?, c"", ModuleInitFlags::empty())?;
        if name == CONSOLE_MODULE {
            break;
        }
    }
    Ok(())
}

/// Waits for the control port; the open port and its node.
fn control_port() -> io::Result<(File, PathBuf)> {
    loop {
        let found =
            fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten().find(|port| {
                fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == CONTROL_PORT)
            });
        let node = found.map(|port| Path::new("/dev").join(port.file_name())).filter(|node| node.exists());
        if let Some(node) = node {
            return Ok((OpenOptions::new().read(true).write(true).open(&node)?, node));
        }
        thread::sleep(LOOK);
    }
}

/// A terminal that passes on all bytes as they are: our end, and the other one.
fn terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let (mut master, mut slave) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: both numbers outlive the call; the other arguments may be null.
    if unsafe { libc::openpty(&raw mut master, &raw mut slave, none, none.cast(), none.cast()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made both descriptors, which nobody else owns.
    let (master, slave) = unsafe { (OwnedFd::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
    let mut settings = nix::sys::termios::tcgetattr(&slave)?;
    nix::sys::termios::cfmakeraw(&mut settings);
    nix::sys::termios::tcsetattr(&slave, nix::sys::termios::SetArg::TCSANOW, &settings)?;
    Ok((master, slave))
}

/// Puts the terminal in the place of the port. It is kept open, and so are its settings.
fn replace(port: &Path, slave: &OwnedFd) -> io::Result<()> {
    let name = fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd()))?;
    fs::remove_file(port)?;
    std::os::unix::fs::symlink(name, port)?;
    // SAFETY: a duplicate that nobody else owns; it lives as long as this process.
    if unsafe { libc::dup(slave.as_raw_fd()) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The agent, which is the first process of its namespace, and sees the processes of that.
fn start_agent() -> io::Result<Child> {
    let own = File::open("/proc/self/ns/pid")?;
    let mut command = Command::new(AGENT);
    // SAFETY: unshare(2) is async-signal-safe and touches no memory of this process.
    unsafe { command.pre_exec(|| unshare(CloneFlags::CLONE_NEWNS).map_err(Into::into)) };
    unshare(CloneFlags::CLONE_NEWPID)?;
    let agent = command.spawn();
    // Children of another namespace could be no threads.
    setns(own, CloneFlags::CLONE_NEWPID)?;
    agent
}
