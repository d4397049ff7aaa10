//! The terminal as a serial console: raw mode while the VM runs, and a way out: Ctrl-A x, as in QEMU.
//!
//! Invariant: [`RawMode`] puts the terminal back when it is dropped. A process that is killed cannot; the
//! supervisor, which saved the state with [`SavedTerminal`] before, does it then.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::sys::termios::{OutputFlags, SetArg, cfmakeraw, tcsetattr};

use super::end::End;
use super::legacy::SerialLine;
use crate::base::lock::lock;
use crate::base::saved_terminal::SavedTerminal;
use crate::wire::messages::VmEnd;

/// Ctrl-A, which starts an escape.
const ESCAPE: u8 = 0x01;

/// Raw mode, until dropped.
#[derive(Debug)]
pub struct RawMode(SavedTerminal);

impl RawMode {
    /// Turns raw mode on, where standard input is a terminal.
    pub fn enter() -> nix::Result<Self> {
        let saved = SavedTerminal::save();
        if let Some(state) = saved.state() {
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

/// Whether the event loop watches the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    On,
    /// The guest has to read what it has first. A pipe that its writer has closed is always ready: only an input that is
    /// not watched lets the loop rest.
    NoRoom,
    /// At its end.
    Ended,
}

/// Reads standard input for the guest's serial line.
pub struct TerminalInput {
    /// Standard input, under a number of its own.
    input: OwnedFd,
    watch: Watch,
    serial: Arc<Mutex<SerialLine>>,
    end: Arc<End>,
    keys: Keys,
    _raw: RawMode,
}

impl TerminalInput {
    /// Input for `serial`; the escape ends the VM by `end`.
    pub fn new(serial: Arc<Mutex<SerialLine>>, end: Arc<End>) -> nix::Result<Self> {
        Ok(Self::on(nix::unistd::dup(io::stdin())?, serial, end, RawMode::enter()?))
    }

    fn on(input: OwnedFd, serial: Arc<Mutex<SerialLine>>, end: Arc<End>, raw: RawMode) -> Self {
        Self { input, watch: Watch::Ended, serial, end, keys: Keys::Plain, _raw: raw }
    }

    fn serial(&self) -> MutexGuard<'_, SerialLine> {
        lock(&self.serial)
    }

    fn listen(&mut self, ops: &mut EventOps) {
        match ops.add(Events::new(&self.input, EventSet::IN)) {
            Ok(()) => self.watch = Watch::On,
            // A regular file or /dev/null cannot be polled: there is no input then.
            Err(error) => {
                tracing::debug!(%error, "listen to standard input");
                self.watch = Watch::Ended;
            }
        }
    }

    fn ignore(&mut self, ops: &mut EventOps, from_now: Watch) {
        if let Err(error) = ops.remove(Events::empty(&self.input)) {
            tracing::warn!(%error, "stop listening to standard input");
        }
        self.watch = from_now;
    }

    fn read(&mut self, ops: &mut EventOps) {
        // One byte less than fits: an escaped key may become two.
        let room = self.serial().room().saturating_sub(1);
        if room == 0 {
            return self.ignore(ops, Watch::NoRoom);
        }
        let mut buffer = [0; 64];
        let take = room.min(buffer.len());
        match nix::unistd::read(&self.input, &mut buffer[..take]) {
            Ok(0) => self.ignore(ops, Watch::Ended),
            Ok(length) => match self.keys.take(&buffer[..length]) {
                Meaning::Input(input) => self.serial().input(&input),
                Meaning::Leave => self.end.set(VmEnd::Killed),
            },
            Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => {}
            Err(error) => {
                tracing::warn!(%error, "read standard input");
                self.ignore(ops, Watch::Ended);
            }
        }
    }
}

impl MutEventSubscriber for TerminalInput {
    fn init(&mut self, ops: &mut EventOps) {
        self.listen(ops);
        if self.watch == Watch::Ended {
            return;
        }
        let serial = self.serial();
        if let Err(error) = ops.add(Events::new(serial.drained(), EventSet::IN)) {
            tracing::warn!(%error, "listen to the serial line");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.input.as_raw_fd() {
            self.read(ops);
        } else {
            // The counter only wakes us.
            let _ = self.serial().drained().read();
            if self.watch == Watch::NoRoom {
                self.listen(ops);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use event_manager::{EventManager, SubscriberOps};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::config::Console;

    /// Turns of the loop until it rests.
    fn run(events: &mut EventManager<Arc<Mutex<TerminalInput>>>) -> usize {
        (0..1000).take_while(|_| events.run_with_timeout(1).unwrap() > 0).count()
    }

    #[test]
    fn a_pipe_that_is_at_its_end_waits_for_a_guest_that_does_not_read() {
        let serial = SerialLine::new(&Console::Off, None, EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
        let serial = Arc::new(Mutex::new(serial));
        let (reader, mut writer) = io::pipe().unwrap();
        let raw = RawMode(SavedTerminal::default());
        let input = TerminalInput::on(reader.into(), Arc::clone(&serial), Arc::new(End::new().unwrap()), raw);
        let input = Arc::new(Mutex::new(input));
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(Arc::clone(&input));
        let text: Vec<u8> = (0..150).collect();
        writer.write_all(&text).unwrap();
        drop(writer);
        let mut got = Vec::new();
        for _ in 0..10 {
            assert!(run(&mut events) < 100, "the loop spins");
            let mut serial = serial.lock().unwrap();
            while serial.read(5) & 1 != 0 {
                got.push(serial.read(0));
            }
        }
        assert_eq!(got, text);
        assert_eq!(input.lock().unwrap().watch, Watch::Ended);
    }

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
