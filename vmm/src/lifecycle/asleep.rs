//! The host sleeps: a planned restart with a night between its two halves. The life gives its device up before, the next one begins
//! after it. Pure, a part of the life cycle.
//!
//! ```text
//!   any state with a life --sleep--> (guests' devices come to rest) --> fencing --> resetting --> asleep --wake--> resetting --> ...
//!   back-off --sleep--> asleep        fencing, resetting --sleep--> as they go on, then asleep instead of the next life
//! ```
//! A standby waits on, booted: it has no device. A spare has one, and goes.
//!
//! Invariant: from the time at which [`Lifecycle::has_let_go`] is true until [`Input::Wake`](super::Input::Wake), no process has the
//! device or that of the spare, and none is started.

use super::{Action, Failure, Lifecycle, NoticedBy, RESET_PATIENCE, REST_PATIENCE, Standby, State, Time};

/// What those are told who ask for something else meanwhile.
pub(super) const WHY: &str = "the host is to sleep";

impl Lifecycle {
    /// Whether no process has the device, nor that of the spare, and none will get it by itself.
    pub fn has_let_go(&self) -> bool {
        let spare_is_held = matches!(self.reserve.state(), Standby::Fencing { .. } | Standby::Resetting { .. });
        // One that is idle takes no part in this run, or is about to begin, and sleeps then.
        let holds_nothing = matches!(self.state, State::Idle | State::Asleep | State::Quarantined | State::Stopped);
        holds_nothing && !spare_is_held
    }

    pub(super) fn on_sleep(&mut self, now: Time) -> Vec<Action> {
        if self.sleeps || matches!(self.state, State::Stopping | State::Stopped) {
            return Vec::new();
        }
        self.sleeps = true;
        let off = self.restarting.take();
        // What was started for a restart alone goes with it.
        let drops = self.reserve.is_spare() || (off.is_some() && self.fresh);
        let mut actions: Vec<_> = off.map(|_| Action::RestartOff(WHY.into())).into_iter().collect();
        if drops {
            actions.extend(self.drop_standby(now));
        }
        match self.state {
            State::Live { .. } if self.rests => {
                // They may be coming to rest already, for the restart that is off.
                if self.resting.replace(now + REST_PATIENCE).is_none() {
                    actions.push(Action::Quiesce);
                }
            }
            State::BackOff { .. } => self.state = State::Asleep,
            _ => actions.extend(self.fall_asleep(now)),
        }
        actions
    }

    /// Ends the present life, if there is one.
    pub(super) fn fall_asleep(&mut self, now: Time) -> Vec<Action> {
        self.fail(now, Failure { source: NoticedBy::Planned, what: WHY.into(), at: now })
    }

    pub(super) fn on_wake(&mut self, now: Time) -> Vec<Action> {
        if !std::mem::take(&mut self.sleeps) {
            return Vec::new();
        }
        if self.state == State::Asleep {
            self.state = State::Resetting { until: now + RESET_PATIENCE, next: Some(now) };
            return vec![Action::Reset];
        }
        // What is still on its way there goes on to its next life; what has not begun goes on serving.
        self.call_rest_off().into_iter().collect()
    }
}
