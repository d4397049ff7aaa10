//! The signals that end a machine, or have it read its file again (SIGHUP), as a descriptor to poll, and the terminal as it was before.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::base::saved_terminal::SavedTerminal;

/// Blocks the signals that ask for something and returns where to read them. SIGTTOU is blocked for good: the terminal is
/// restored even when `umbra run` is in the background by then.
///
/// # Errors
///
/// The kernel offers no signalfd.
pub(in crate::supervisor) fn watch() -> Result<SignalFd, Errno> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block()?;
    SigSet::from(Signal::SIGTTOU).thread_block()?;
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// Puts the terminal back when dropped: a guest's process that is killed cannot do so itself.
pub(in crate::supervisor) struct RestoreTerminal(pub(in crate::supervisor) SavedTerminal);

impl Drop for RestoreTerminal {
    fn drop(&mut self) {
        self.0.restore();
    }
}
