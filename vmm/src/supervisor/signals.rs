//! The signals that end a machine, as a descriptor to poll, and the terminal as it was before.

use std::io::IsTerminal;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};

/// Blocks the signals that ask for an end and returns where to read them. SIGTTOU is blocked for good: the terminal is
/// restored even when `umbra run` is in the background by then.
///
/// # Errors
///
/// The kernel offers no signalfd.
pub(super) fn watch() -> Result<SignalFd, Errno> {
    let ends = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    ends.thread_block()?;
    SigSet::from(Signal::SIGTTOU).thread_block()?;
    SignalFd::with_flags(&ends, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// The terminal's settings, put back when dropped: a guest's process that is killed cannot do so itself.
pub(super) struct SavedTerminal(Option<Termios>);

impl SavedTerminal {
    /// Takes note of the settings, if stdin is a terminal.
    pub(super) fn save() -> Self {
        let stdin = std::io::stdin();
        Self(if stdin.is_terminal() { tcgetattr(&stdin).ok() } else { None })
    }
}

impl Drop for SavedTerminal {
    fn drop(&mut self) {
        if let Some(settings) = &self.0 {
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, settings);
        }
    }
}
