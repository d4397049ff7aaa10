//! `umbra status --watch`: the status and the latest events, again and again in the same place.

use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::thread;
use std::time::Duration;

use serde::Deserialize;

use crate::base::untrusted_text;
use crate::record::schema::Versioned;

use super::connection::{Connection, Dropped, Ended};

/// Events shown below the status.
const SHOWN: usize = 10;

/// To the upper left corner, and clear what is below.
const HOME: &str = "\x1b[H\x1b[J";
/// Another screen, so that the one before is there again afterwards; no cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
/// Back.
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// What an event's line is needed for here.
#[derive(Deserialize)]
struct Line {
    seq: u64,
    time: String,
    text: Option<String>,
}

/// The other screen, left when dropped.
struct Screen;

impl Screen {
    fn enter() -> Option<Self> {
        let mut out = std::io::stdout();
        (out.is_terminal() && out.write_all(ENTER.as_bytes()).is_ok()).then(|| Self)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let mut out = std::io::stdout();
        let _ = out.write_all(LEAVE.as_bytes()).and_then(|()| out.flush());
    }
}

/// Shows `machine` (or its `vm` alone) every `period` until it ends.
///
/// # Errors
///
/// The machine does not answer, or has no such VM.
pub(super) fn watch(machine: &mut Connection, vm: Option<&str>, json: bool, period: Duration) -> anyhow::Result<()> {
    let screen = if json { None } else { Screen::enter() };
    // Ctrl-C has to give the screen back.
    let interrupted = interrupted()?;
    let (mut after, mut events) = (0, VecDeque::new());
    let mut last = String::new();
    let ended = loop {
        let status = match machine.status(vm) {
            Err(error) if error.is::<Ended>() => break true,
            // It was silent for too long between two looks.
            Err(error) if error.is::<Dropped>() => {
                machine.reopen()?;
                continue;
            }
            result => result?,
        };
        if json {
            super::print(&untrusted_text::json(&serde_json::to_string(&Versioned::new(&status))?))?;
        } else {
            let noted = machine.events(after, false, |line| {
                note(line, vm, &mut after, &mut events);
                Ok(())
            });
            match noted {
                Err(error) if error.is::<Ended>() => break true,
                result => result?,
            }
            let lines: Vec<_> = events.iter().map(String::as_str).collect();
            last = format!("{} (process {})\n\n{status}\n\n{}\n", status.name, status.pid, lines.join("\n"));
            let home = if screen.is_some() { HOME } else { "" };
            super::print(&format!("{home}{last}"))?;
            std::io::stdout().flush()?;
        }
        if wait(&interrupted, period)? {
            break false;
        }
    };
    if screen.is_some() {
        drop(screen);
        super::print(&last)?;
    }
    if ended && !json { super::print(&format!("{} has ended", machine.name)) } else { Ok(()) }
}

fn note(line: &str, vm: Option<&str>, after: &mut u64, events: &mut VecDeque<String>) {
    let Ok(line) = serde_json::from_str::<Line>(line) else { return };
    *after = line.seq;
    let Some(text) = line.text.filter(|text| vm.is_none_or(|vm| text.contains(vm))) else { return };
    let clock = line.time.get(11..19).unwrap_or(&line.time);
    events.push_back(untrusted_text::line(&format!("{clock}  {text}")));
    if events.len() > SHOWN {
        events.pop_front();
    }
}

/// Readable once the user has had enough.
fn interrupted() -> anyhow::Result<nix::sys::signalfd::SignalFd> {
    use nix::sys::signal::{SigSet, Signal};
    let mut set = SigSet::empty();
    [Signal::SIGINT, Signal::SIGTERM].into_iter().for_each(|signal| set.add(signal));
    set.thread_block()?;
    Ok(nix::sys::signalfd::SignalFd::new(&set)?)
}

/// Waits for `period`; true if the user has had enough.
fn wait(interrupted: &nix::sys::signalfd::SignalFd, period: Duration) -> anyhow::Result<bool> {
    use std::os::fd::AsFd;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut fds = [PollFd::new(interrupted.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::try_from(period).unwrap_or(PollTimeout::MAX)) {
        Ok(ready) => Ok(ready > 0),
        Err(nix::errno::Errno::EINTR) => {
            thread::yield_now();
            Ok(false)
        }
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_sentences_are_kept_with_their_clock() {
        let (mut after, mut events) = (0, VecDeque::new());
        for n in 1..=20 {
            let text = if n % 2 == 0 { format!(",\"text\":\"nic0: {n}\"") } else { String::new() };
            let line = format!("{{\"seq\":{n},\"time\":\"2026-01-02T03:04:05.678Z\",\"event\":\"x\"{text}}}");
            note(&line, None, &mut after, &mut events);
        }
        assert_eq!((after, events.len()), (20, SHOWN));
        assert_eq!(events.back().map(String::as_str), Some("03:04:05  nic0: 20"));
        note("{\"seq\":21,\"time\":\"t\",\"text\":\"web: running\"}", Some("nic0"), &mut after, &mut events);
        assert_eq!((after, events.back().map(String::as_str)), (21, Some("03:04:05  nic0: 20")), "another VM's");
    }
}
