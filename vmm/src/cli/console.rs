//! `umbra console`: a guest's serial console, from anywhere on the host, however the machine runs.
//!
//! The guest's process serves it. A guest that reboots has another process then: the console waits for it, and ends with the guest.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::connection::{Connection, Dropped, Ended};
use crate::record::status::{GuestStateName, GuestStatus};
use crate::supervisor::start::rundir;
use crate::vm::machine::terminal::RawMode;

/// Ctrl-], which leaves, as in telnet(1).
const LEAVE: u8 = 0x1d;

/// Interval at which the machine is asked about a guest that has no console at the moment.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Looks at a guest that runs and has no console before that is an error: its process is about to end, or to listen.
const MAX_LOOKS: u32 = 50;

/// Arguments of `umbra console`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Ctrl-] leaves; the guest runs on. Up to 8 look on at a time; who types first is the one who types, until it leaves.\n\
                  The last 64 KiB that the guest has printed come first. A guest that reboots is waited for."
)]
pub struct Args {
    /// The guest, where the machine has several.
    guest: Option<String>,
    /// Only look on.
    #[arg(long, short)]
    read_only: bool,
    /// The machine, where several run.
    #[arg(long, value_name = "MACHINE")]
    name: Option<String>,
}

/// How the time at a console ended.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    /// By the escape key.
    ByKey,
    /// By the other side.
    Closed,
}

/// Shows the console until the guest is off, or the user leaves.
///
/// # Errors
///
/// No machine answers, there is no such guest, or it does not run.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let found = rundir::connect(&rundir::base(), args.name.as_deref())?;
    let folder = rundir::base().join(&found.0);
    let mut machine = Connection::over(found.0, found.1)?;
    let guest = chosen(&mut machine, args.guest.as_deref())?;
    if let Some(why) = is_over(&guest) {
        bail!("{} has no console: it is {why}; `umbra start {}` starts it", guest.name, guest.name);
    }
    let socket = rundir::console_socket(&folder, &guest.name);
    let typed = (!args.read_only).then(io::stdin);
    let is_terminal = typed.as_ref().is_some_and(IsTerminal::is_terminal);
    if is_terminal {
        eprintln!("umbra: the console of {}; Ctrl-] leaves", guest.name);
    }
    let raw = is_terminal.then(RawMode::enter).transpose().context("put the terminal into raw mode")?;
    let mut input = typed.map(|stdin| stdin.as_fd().try_clone_to_owned().map(File::from)).transpose()?;
    let end = show(&mut machine, &guest.name, &socket, &mut input);
    // The terminal is as it was before anything is said.
    drop(raw);
    match end? {
        None => Ok(()),
        Some(why) => {
            eprintln!("\numbra: {}: {why}", guest.name);
            Ok(())
        }
    }
}

/// Shows one life of the guest after the other. Why there is no other; nothing, if the user has left.
fn show(
    machine: &mut Connection,
    guest: &str,
    socket: &Path,
    input: &mut Option<File>,
) -> anyhow::Result<Option<String>> {
    let mut looks = 0;
    loop {
        if let Ok(stream) = UnixStream::connect(socket) {
            looks = 0;
            if pass(stream, input)? == Left::ByKey {
                return Ok(None);
            }
        }
        match chosen(machine, Some(guest)) {
            Err(error) if error.is::<Ended>() => return Ok(Some("the machine has ended".into())),
            Err(error) if error.is::<Dropped>() => machine.reopen()?,
            Err(error) => return Err(error),
            Ok(status) => match is_over(&status) {
                Some(why) => return Ok(Some(format!("it is {why}"))),
                None if status.state == GuestStateName::Running => looks += 1,
                None => {}
            },
        }
        if looks > MAX_LOOKS {
            bail!(
                "{guest} runs, and nobody listens at {}: it has been removed, or its path is too long",
                socket.display()
            );
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// The guest named `guest`, or the only one.
fn chosen(machine: &mut Connection, guest: Option<&str>) -> anyhow::Result<GuestStatus> {
    let mut guests = machine.status(None)?.guests;
    let names: Vec<_> = guests.iter().map(|guest| guest.name.clone()).collect();
    match guest {
        Some(name) => match names.iter().position(|it| it == name) {
            Some(n) => Ok(guests.swap_remove(n)),
            None => bail!("{} has no guest named {name}; it has {}", machine.name, names.join(", ")),
        },
        None if guests.len() == 1 => Ok(guests.swap_remove(0)),
        None => bail!("{} has several guests; choose one: {}", machine.name, names.join(", ")),
    }
}

/// Why it has no console, if it is off.
fn is_over(guest: &GuestStatus) -> Option<String> {
    match (guest.state, &guest.reason) {
        (GuestStateName::Failed, Some(why)) => Some(format!("failed: {}", crate::base::untrusted_text::line(why))),
        (GuestStateName::Off | GuestStateName::Failed, _) => Some(guest.state.to_string()),
        _ => None,
    }
}

/// Passes bytes between the user and the console until one of them has enough.
fn pass(mut console: UnixStream, input: &mut Option<File>) -> anyhow::Result<Left> {
    let mut buffer = [0; 4096];
    if input.is_none() {
        // A console that is gone is seen when it is read.
        let _ = console.shutdown(Shutdown::Write);
    }
    loop {
        let mut fds = vec![PollFd::new(console.as_fd(), PollFlags::POLLIN)];
        fds.extend(input.as_ref().map(|input| PollFd::new(input.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let ready: Vec<_> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        if ready[0] {
            let length = match console.read(&mut buffer) {
                Ok(0) => return Ok(Left::Closed),
                // A process that was killed.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Left::Closed),
                result => result?,
            };
            let mut out = io::stdout().lock();
            out.write_all(&buffer[..length]).and_then(|()| out.flush())?;
        }
        if let (Some(true), Some(keys)) = (ready.get(1), input.as_mut()) {
            let length = keys.read(&mut buffer)?;
            let typed = &buffer[..length];
            let kept = typed.iter().position(|key| *key == LEAVE);
            let sent = console.write_all(&typed[..kept.unwrap_or(length)]);
            if kept.is_some() {
                return Ok(Left::ByKey);
            }
            if sent.is_err() {
                return Ok(Left::Closed);
            }
            if length == 0 {
                // At its end: it looks on.
                *input = None;
                let _ = console.shutdown(Shutdown::Write);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn keys_before_the_escape_reach_the_guest_and_those_behind_it_do_not() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"exit\r\x1drm -rf").unwrap();
        let mut input = Some(File::from(std::os::fd::OwnedFd::from(reader)));
        assert_eq!(pass(ours, &mut input).unwrap(), Left::ByKey);
        let mut got = String::new();
        theirs.read_to_string(&mut got).unwrap();
        assert_eq!(got, "exit\r");
    }

    #[test]
    fn an_input_at_its_end_looks_on() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut input = Some(File::open("/dev/null").unwrap());
        let looking = std::thread::spawn(move || pass(ours, &mut input).map(|left| (left, input.is_none())).unwrap());
        let mut got = Vec::new();
        assert_eq!(theirs.read_to_end(&mut got).unwrap(), 0, "it has closed its half");
        drop(theirs);
        assert_eq!(looking.join().unwrap(), (Left::Closed, true));
    }
}
