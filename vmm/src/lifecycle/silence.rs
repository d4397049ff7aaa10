//! How long the agent of a life has been silent. Time for which its VM got no processor says nothing of the VM and is
//! excused, within a bound.

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

    /// The last sign of life.
    pub(super) fn heard(&self) -> Time {
        self.heard
    }

    /// How long it may last.
    pub(super) fn limit(&self, timeout: Duration) -> Duration {
        timeout + self.excused
    }

    /// When it is half a time-out before its limit: from here on it is worth a look whether the VM gets a processor.
    pub(super) fn half(&self, timeout: Duration) -> Time {
        self.heard + timeout / 2 + self.excused
    }

    /// The VM got no processor in the last half of the time-out: that long it may last longer, [`PATIENCE`] time-outs in all.
    pub(super) fn excuse(&mut self, timeout: Duration) {
        self.excused = (self.excused + timeout / 2).min(timeout * (PATIENCE - 1));
    }
}
