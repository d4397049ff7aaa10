//! Inputs of the life cycles that are still to be handled, in order.
//!
//! Invariant: no transition is ever started inside another. An input that comes up while the actions of another one are being
//! done waits until they are done.

use std::collections::VecDeque;

use super::ids::DriverId;
use super::run::Supervisor;
use crate::base::time::Time;
use crate::lifecycle::{Input, State};

/// Inputs that wait, each for its driver VM.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    waiting: VecDeque<(DriverId, Input)>,
    /// An input is being handled; those that come up meanwhile wait.
    busy: bool,
}

impl Supervisor {
    /// Gives `input` to the life cycle of driver VM `n` and does what it asks for: at once, or, while actions are being done, after
    /// them.
    pub(super) fn drive(&mut self, n: DriverId, input: Input) {
        self.inbox.waiting.push_back((n, input));
        if std::mem::replace(&mut self.inbox.busy, true) {
            return;
        }
        while let Some((n, input)) = self.inbox.waiting.pop_front() {
            self.transition(n, input);
        }
        self.inbox.busy = false;
    }

    fn transition(&mut self, n: DriverId, input: Input) {
        let _about = self.drivers[n].span().entered();
        let now = Time::now();
        let before = self.drivers[n].lifecycle.state().name();
        let actions = self.drivers[n].lifecycle.handle(now, input);
        let after = self.drivers[n].lifecycle.state().name();
        if before != after {
            tracing::debug!(%before, %after, "state");
        }
        for action in actions {
            self.act(n, action, now);
        }
        let driver = &mut self.drivers[n];
        if matches!(driver.lifecycle.state(), State::Quarantined | State::Asleep | State::Stopped) {
            driver.close_files();
        }
    }
}
