//! The terminal's settings as they were: read before anything changes them, put back at the end.

use std::io::{self, IsTerminal};

use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};

/// The state of the terminal on standard input, if that is one.
#[derive(Clone, Debug, Default)]
pub struct SavedTerminal(Option<Termios>);

impl SavedTerminal {
    /// Reads the state.
    pub fn save() -> Self {
        let stdin = io::stdin();
        Self(if stdin.is_terminal() { tcgetattr(&stdin).ok() } else { None })
    }

    /// The state; `None` where standard input is no terminal.
    pub fn state(&self) -> Option<&Termios> {
        self.0.as_ref()
    }

    /// Puts the state back. Does not wait until what was printed is out: a terminal that is held would hold us.
    pub fn restore(&self) {
        if let Self(Some(state)) = self
            && let Err(error) = tcsetattr(io::stdin(), SetArg::TCSANOW, state)
        {
            tracing::warn!(%error, "restore the terminal (`stty sane` does it by hand)");
        }
    }
}
