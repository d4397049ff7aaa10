//! The host sleeps: a planned restart with a night between its two halves. The life gives its device up before, the next one begins
//! after it. Pure, a part of the life cycle.
//!
//! ```text
//!   any state with a life --sleep--> (guests' devices come to rest) --> fencing --> resetting --> asleep --wake--> resetting --> ...
//!   back-off --sleep--> asleep        fencing, resetting --sleep--> as they go on, then asleep instead of the next life
//! ```
//! A standby waits on, booted: it has no device. A spare has one, and goes.
//!
//! Invariants: from the time at which [`Lifecycle::hold`] is [`Hold::Released`] until [`Input::Wake`](super::Input::Wake), no process has
//! the device or that of the spare, and none is started; a hold that the kernel does not let go of is [`Hold::Hangs`] in the end.

use super::{Action, Failure, Lifecycle, NoticedBy, RESET_PATIENCE, REST_PATIENCE, State, Time};

/// What those are told who ask for something else meanwhile.
pub(super) const WHY: &str = "the host is to sleep";

/// How a device, or the spare's, is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// No process has one, and none will get one by itself.
    Released,
    /// One is in use, given up or reset. `until`: when that counts as hung, if nothing else has an end before.
    Held {
        /// Of the spare's device; that of the present life ends by [`Lifecycle::deadline`].
        until: Option<Time>,
    },
    /// One is held by a killed process that has not ended in its time, or by a reset that has not returned in its.
    Hangs,
}

impl Lifecycle {
    /// How the device and that of the spare are held at `now`.
    pub fn hold(&self, now: Time) -> Hold {
        let spare = self.reserve.hold(now);
        // One that is idle takes no part in this run, or is about to begin, and sleeps then.
        if !matches!(self.state, State::Idle | State::Asleep | State::Quarantined | State::Stopped) {
            return Hold::Held { until: if let Hold::Held { until } = spare { until } else { None } };
        }
        let hangs = self.process_hangs || self.reset_hangs;
        if hangs && spare == Hold::Released { Hold::Hangs } else { spare }
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
        // What is still on its way there goes on to its next life; what has not begun goes on serving, and misses a standby that went with
        // a restart.
        self.want_next(now);
        self.call_rest_off().into_iter().collect()
    }
}
