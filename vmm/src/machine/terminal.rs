//! The terminal as a serial console: raw mode while the VM runs, and a way out: Ctrl-A x, as in QEMU.
//!
//! Invariant: [`RawMode`] puts the terminal back when it is dropped. A process that is killed cannot; the
//! supervisor, which saved the state with [`SavedTerminal`] before, does it then.

use std::io::{self, IsTerminal};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::end::End;
use super::legacy::SerialLine;
use crate::process::ipc::VmEnd;

/// Ctrl-A, which starts an escape.
const ESCAPE: u8 = 0x01;

/// The state of the terminal on standard input, if that is one.
#[derive(Clone, Debug)]
pub struct SavedTerminal(Option<Termios>);

impl SavedTerminal {
    /// Reads the state.
    pub fn save() -> Self {
        let stdin = io::stdin();
        Self(if stdin.is_terminal() { tcgetattr(&stdin).ok() } else { None })
    }

    /// Puts the state back.
    pub fn restore(&self) {
        if let Self(Some(state)) = self
            && let Err(error) = tcsetattr(io::stdin(), SetArg::TCSADRAIN, state)
        {
            tracing::warn!(%error, "restore the terminal (`stty sane` does it by hand)");
        }
    }
}

/// Raw mode, until dropped.
#[derive(Debug)]
pub struct RawMode(SavedTerminal);

impl RawMode {
    /// Turns raw mode on, where standard input is a terminal.
    pub fn enter() -> nix::Result<Self> {
        let saved = SavedTerminal::save();
        if let SavedTerminal(Some(state)) = &saved {
            let mut raw = state.clone();
            cfmakeraw(&mut raw);
            // Messages of this program still end their lines.
            raw.output_flags |= OutputFlags::OPOST;
            tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        }
        Ok(Self(saved))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.0.restore();
    }
}

/// What the keys mean so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keys {
    Plain,
    /// Ctrl-A was the last one.
    Escaped,
}

/// What a piece of input comes to.
#[derive(Debug, PartialEq, Eq)]
enum Meaning {
    Input(Vec<u8>),
    Leave,
}

impl Keys {
    /// `Ctrl-A x` leaves, `Ctrl-A Ctrl-A` is one Ctrl-A; before any other key Ctrl-A is itself.
    fn take(&mut self, bytes: &[u8]) -> Meaning {
        let mut input = Vec::new();
        for &byte in bytes {
            match (*self, byte) {
                (Self::Plain, ESCAPE) => *self = Self::Escaped,
                (Self::Plain, _) => input.push(byte),
                (Self::Escaped, b'x') => return Meaning::Leave,
                (Self::Escaped, ESCAPE) => {
                    input.push(ESCAPE);
                    *self = Self::Plain;
                }
                (Self::Escaped, _) => {
                    input.extend([ESCAPE, byte]);
                    *self = Self::Plain;
                }
            }
        }
        Meaning::Input(input)
    }
}

/// Reads standard input for the guest's serial line.
pub struct TerminalInput {
    serial: Arc<Mutex<SerialLine>>,
    end: Arc<End>,
    keys: Keys,
    _raw: RawMode,
}

impl TerminalInput {
    /// Input for `serial`; the escape ends the VM by `end`.
    pub fn new(serial: Arc<Mutex<SerialLine>>, end: Arc<End>) -> nix::Result<Self> {
        Ok(Self { serial, end, keys: Keys::Plain, _raw: RawMode::enter()? })
    }

    fn serial(&self) -> MutexGuard<'_, SerialLine> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(ops: &mut EventOps, to: EventSet) {
        let stdin = Events::new(&io::stdin(), to);
        if let Err(error) = ops.modify(stdin) {
            tracing::warn!(%error, "listen to standard input");
        }
    }

    fn read(&mut self, ops: &mut EventOps) {
        // One byte less than fits: an escaped key may become two.
        let room = self.serial().room().saturating_sub(1);
        if room == 0 {
            // Wait until the guest has read what it has.
            Self::listen(ops, EventSet::empty());
            return;
        }
        let mut buffer = [0; 64];
        let take = room.min(buffer.len());
        match nix::unistd::read(io::stdin(), &mut buffer[..take]) {
            Ok(0) => drop(ops.remove(Events::empty(&io::stdin()))),
            Ok(length) => match self.keys.take(&buffer[..length]) {
                Meaning::Input(input) => self.serial().input(&input),
                Meaning::Leave => self.end.set(VmEnd::Killed),
            },
            Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => {}
            Err(error) => {
                tracing::warn!(%error, "read standard input");
                drop(ops.remove(Events::empty(&io::stdin())));
            }
        }
    }
}

impl MutEventSubscriber for TerminalInput {
    fn init(&mut self, ops: &mut EventOps) {
        // A regular file or /dev/null cannot be polled: there is no input then.
        if let Err(error) = ops.add(Events::new(&io::stdin(), EventSet::IN)) {
            tracing::debug!(%error, "listen to standard input");
            return;
        }
        let serial = self.serial();
        if let Err(error) = ops.add(Events::new(serial.drained(), EventSet::IN)) {
            tracing::warn!(%error, "listen to the serial line");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == io::stdin().as_raw_fd() {
            self.read(ops);
        } else {
            // The counter only wakes us.
            let _ = self.serial().drained().read();
            Self::listen(ops, EventSet::IN);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_leaves_and_other_keys_pass() {
        let mut keys = Keys::Plain;
        assert_eq!(keys.take(b"ls\r"), Meaning::Input(b"ls\r".into()));
        assert_eq!(keys.take(b"\x01"), Meaning::Input(vec![]));
        assert_eq!(keys.take(b"\x01x"), Meaning::Input(b"\x01x".into()));
        assert_eq!(keys.take(b"\x01b"), Meaning::Input(b"\x01b".into()));
        assert_eq!(keys.take(b"a\x01"), Meaning::Input(b"a".into()));
        assert_eq!(keys.take(b"x"), Meaning::Leave);
    }
}
