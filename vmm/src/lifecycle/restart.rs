//! A requested restart: it waits beside the serving driver VM until the next one is ready, then goes over to that. Pure, a part of
//! the life cycle.
//!
//! Where the guests' devices lose something by a reset of the host's device, they come to rest first, as late as can be: when the next
//! driver VM is ready. A death while they do is a failure as any other.
//!
//! Invariants: it has an end, [`Action::RestartOff`] at the latest; a fresh standby whose restart is given up goes with it, so
//! that nothing that was started for the restart ever takes over.

use super::{Action, Failure, Lifecycle, NoticedBy, REST_PATIENCE, Standby, State, Time};

impl Lifecycle {
    pub(super) fn on_restart(&mut self, now: Time, fresh: bool) -> Vec<Action> {
        if !matches!(self.state, State::Live { .. }) {
            return vec![Action::RestartOff(format!("it is {}", self.state.name()))];
        }
        if self.sleeps {
            return vec![Action::RestartOff(super::asleep::WHY.into())];
        }
        if !fresh && matches!(self.reserve.state(), Standby::Hot { armed: false, .. }) {
            return vec![Action::RestartOff("its spare has no carrier".into())];
        }
        let go_on = self.call_rest_off();
        // Where nothing waits, nothing is to wait behind a restart that is given up; and a process that leaves a snapshot does not serve.
        let fresh = fresh || self.reserve.is_snapshot();
        let mut actions: Vec<_> = go_on.into_iter().collect();
        if fresh {
            actions.extend(self.drop_standby(now));
        }
        (self.restarting, self.fresh) = (Some(now + self.reserve.longest()), fresh);
        self.reserve.want_now(now);
        actions.extend(self.switch_over(now));
        actions
    }

    /// Gives the restart up, because the next driver VM was not ready in time.
    pub(super) fn give_restart_up(&mut self, now: Time) -> Vec<Action> {
        let why = if self.reserve.is_hot() { "its spare has no carrier" } else { "it was not ready in time" };
        self.restarting = None;
        let mut actions: Vec<_> = self.call_rest_off().into_iter().chain([Action::RestartOff(why.into())]).collect();
        if self.fresh {
            actions.extend(self.on_standby_useless(now));
        }
        actions
    }

    /// Hands over to the standby, if a restart was requested and the standby is ready.
    pub(super) fn switch_over(&mut self, now: Time) -> Vec<Action> {
        if !self.may_switch_over() || self.resting.is_some() {
            return Vec::new();
        }
        if self.rests {
            self.resting = Some(now + REST_PATIENCE);
            // Its time to get ready is over; that of coming to rest has begun.
            self.restarting = self.resting;
            return vec![Action::Quiesce];
        }
        self.replace(now)
    }

    /// Whether the guests' devices are waited for, before a restart.
    pub fn is_coming_to_rest(&self) -> bool {
        self.resting.is_some()
    }

    fn may_switch_over(&self) -> bool {
        let ready = matches!(self.reserve.state(), Standby::Ready { .. } | Standby::Hot { armed: true, .. });
        self.restarting.is_some() && ready && matches!(self.state, State::Live { .. })
    }

    /// The guests' devices are at rest, or have had their time.
    pub(super) fn on_at_rest(&mut self, now: Time) -> Vec<Action> {
        match self.resting.take() {
            None => Vec::new(),
            Some(_) if self.sleeps => self.fall_asleep(now),
            Some(_) if self.may_switch_over() => self.replace(now),
            // The standby has become useless meanwhile; the next one will find them at rest again.
            Some(_) => vec![Action::GoOn],
        }
    }

    /// The guests' devices go on, if they were to come to rest.
    pub(super) fn call_rest_off(&mut self) -> Option<Action> {
        self.resting.take().map(|_| Action::GoOn)
    }

    fn replace(&mut self, now: Time) -> Vec<Action> {
        self.fail(now, Failure { source: NoticedBy::Planned, what: "a restart was asked for".into(), at: now })
    }

    pub(super) fn on_standby_useless(&mut self, now: Time) -> Vec<Action> {
        let actions = self.drop_standby(now);
        self.want_next(now);
        actions
    }

    /// Schedules the next standby, if there is a live driver VM beside which it can boot.
    pub(super) fn want_next(&mut self, now: Time) {
        match (&self.state, self.restarting) {
            (State::Live { .. }, Some(_)) => self.reserve.want_now(now),
            (State::Live { .. }, None) => self.reserve.want(now),
            _ => {}
        }
    }
}
