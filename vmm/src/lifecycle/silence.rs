//! How long the agent of a life has been silent. Time in which its VM got no processor shows nothing about the VM, and is excused
//! within a bound.

use std::time::Duration;

use super::standby::PATIENCE;
use crate::base::time::Time;

/// The silence since the agent was last heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Silence {
    heard: Time,
    excused: Duration,
}

impl Silence {
    /// Heard just now.
    pub(super) fn since(now: Time) -> Self {
        Self { heard: now, excused: Duration::ZERO }
    }

    /// Nobody would have heard it in the time `away`.
    pub(super) fn was_unwatched(&mut self, away: Duration) {
        self.heard = self.heard + away;
    }

    /// The last sign of life.
    pub(super) fn heard(&self) -> Time {
        self.heard
    }

    /// Longest silence that is no failure: the time-out, and what was excused.
    pub(super) fn limit(&self, timeout: Duration) -> Duration {
        timeout + self.excused
    }

    /// Half a time-out before the limit: when to begin checking whether the VM gets a processor.
    pub(super) fn half(&self, timeout: Duration) -> Time {
        self.heard + timeout / 2 + self.excused
    }

    /// The VM got no processor in the last half of the time-out: extends the limit by that half, to [`PATIENCE`] time-outs at most.
    pub(super) fn excuse(&mut self, timeout: Duration) {
        self.excused = (self.excused + timeout / 2).min(timeout * (PATIENCE - 1));
    }
}
