//! Snapshots made ahead: nothing waits, and the next life is restored from a snapshot that a process has left which serves nobody, the
//! *taker*. Pure, a part of the life cycle.
//!
//! ```text
//!           live            1 s later          it is there, or is left          failure
//!   none ----------> due -------------> saving -----------------------> snapshot -------> none: the next life is restored
//!    ^                ^                  |  | failure
//!    |                +- 1, 2 .. 60 s ---+  +---> the taker serves if it boots already, else it is ended
//!    +--- quarantine, stop       death
//! ```
//! Invariants: a taker is started as a standby is: beside a life that serves, at its turn, never beside a recovery. One that has found
//! a snapshot ends by itself, so it becomes the present life only if it has said that it boots. A restart waits for a standby, not for
//! a taker.

use super::{Action, Input, Lifecycle, Rank, Standby, Time};

impl Lifecycle {
    pub(super) fn on_snapshot(&mut self, input: &Input) -> Vec<Action> {
        match input {
            Input::SnapshotThere if self.reserve.saved() => return vec![Action::DropStandby(Rank::First, None)],
            Input::SnapshotMissing => self.reserve.boots_to_save(),
            _ => {}
        }
        Vec::new()
    }

    /// Whether a taker is at work.
    pub(super) fn is_saving(&self) -> bool {
        matches!(self.reserve.state(), Standby::Saving { .. })
    }

    /// Whether what starts next is a taker: a restart needs a standby, which leaves a snapshot too.
    pub(super) fn saves_next(&self) -> bool {
        self.reserve.is_snapshot() && self.restarting.is_none()
    }

    /// A life begins without a standby: a taker that still looks for a snapshot is ended, and the snapshot is looked for again beside that
    /// life, because it may be gone or refused by then.
    pub(super) fn end_saving(&mut self, now: Time) -> Vec<Action> {
        match self.reserve.state() {
            Standby::Saving { .. } | Standby::Saved => self.drop_standby(now),
            _ => Vec::new(),
        }
    }

    /// Standbys or takers that have died in a row, since one was adopted or a snapshot was there.
    pub fn standby_deaths(&self) -> u32 {
        self.reserve.deaths()
    }
}
