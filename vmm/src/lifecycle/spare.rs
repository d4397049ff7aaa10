//! The hot spare: the standby with a device of its own, which takes over at the stage that it has reached. Pure, a part of the life
//! cycle.
//!
//! ```text
//!           live            1 s later, reset     hello, forwarding          carrier         failure of the
//!   none ----------> due ----------------> booting -------------> no-carrier <-----> armed --------------> the present life
//!                     ^                       | death                 | death          | death  serving one
//!                     |                       v                       v                v
//!                     +---- back-off --- recovering (given up or killed) <---- the failed life, with its device
//! ```
//!
//! Invariants: it takes over only if the policy allows another restart; the life that has failed is fenced and its device
//! reset before the next spare starts there; a spare that fails changes nothing for the guests.

use std::time::Duration;

use super::silence::Silence;
use super::standby::Stage;
use super::{Action, Carrier, Failure, Input, Lifecycle, Rank, Standby, State, Time};

impl Lifecycle {
    pub(super) fn on_spare(&mut self, now: Time, input: &Input) -> Vec<Action> {
        match *input {
            Input::SpareForwarding => {
                self.reserve.forwarding(now);
                // From here on only its carrier is awaited.
                let patience = self.carrier_patience();
                if let Some(until) = self.restarting.as_mut().filter(|_| self.reserve.is_hot()) {
                    *until = (*until).min(now + patience);
                }
                Vec::new()
            }
            Input::SpareCarrier(carrier) => self.on_spare_carrier(now, carrier == Carrier::Up),
            Input::SpareLive(end) => {
                // The splitter left the serving life because that has failed: its failure is still to come, or waits for a better
                // reason.
                self.ahead.extend(self.reserve.state().generation().map(|generation| (end, generation)));
                Vec::new()
            }
            Input::SpareFenced => {
                let report = self.reserve.fenced();
                if report { vec![Action::ReportFenced] } else { Vec::new() }
            }
            Input::SpareResetDone if self.reserve.reset_done() => self.spawn_spare(now),
            _ => Vec::new(),
        }
    }

    fn on_spare_carrier(&mut self, now: Time, up: bool) -> Vec<Action> {
        if !self.reserve.carrier(up) {
            return Vec::new();
        }
        let mut actions = vec![Action::Arm(up)];
        actions.extend(self.switch_over(now));
        actions.extend(self.leave_for_spare(now));
        actions
    }

    fn spawn_spare(&mut self, now: Time) -> Vec<Action> {
        if !self.may_start_spare() {
            // No spare is started beside a recovery; the next life that goes live asks for one again.
            return Vec::new();
        }
        let generation = self.next_generation();
        self.reserve.started(now, generation);
        vec![Action::SpawnStandby(Rank::First, generation)]
    }

    /// The serving life has failed after being live for `lived`: the spare takes over at the stage that it has reached, even if it
    /// still boots, because its device needs neither fence nor reset. `None`: there is no spare, or no restart is allowed.
    pub(super) fn take_over(&mut self, now: Time, failure: &Failure, lived: Option<Duration>) -> Option<Vec<Action>> {
        let counts = failure.source.is_failure();
        if !self.reserve.is_spare() || (counts && self.history.is_exhausted(now, lived)) {
            return None;
        }
        let (generation, stage) = self.reserve.adopt(now)?;
        if counts {
            // No back-off: guests may have gone over to the spare already.
            self.history.failed(now, lived);
        }
        self.generation = Some(generation);
        let until = now + Duration::from_secs(self.history.policy().boot_timeout_s.into());
        self.forget_life();
        self.applying = matches!(stage, Stage::Forwarding(..));
        let mut actions = vec![Action::Failed(failure.clone()), Action::TakeOver(generation)];
        match stage {
            Stage::Booting => self.state = State::Booting { until },
            Stage::Hello => self.state = State::Configuring { until },
            Stage::Forwarding(heard, armed) => {
                self.silence = Some(Silence::since(heard));
                self.state = State::WaitingCarrier { until: now + self.carrier_patience() };
                if armed {
                    self.carrier.change(now, Carrier::Up);
                    actions.extend(self.go_live(now));
                }
            }
        }
        Some(actions)
    }

    /// Whether the standby is a spare that takes over by itself.
    pub fn is_armed(&self) -> bool {
        matches!(self.reserve.state(), Standby::Hot { armed: true, .. })
    }
}
