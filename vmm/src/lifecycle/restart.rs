//! A requested restart: it waits beside the serving driver VM until the next one is ready, then goes over to that. Pure, a part of
//! the life cycle.
//!
//! Invariants: it has an end, [`Action::RestartOff`] at the latest; a fresh standby whose restart is given up goes with it, so
//! that nothing that was started for the restart ever takes over.

use super::{Action, Failure, Lifecycle, NoticedBy, Standby, State, Time};

impl Lifecycle {
    pub(super) fn on_restart(&mut self, now: Time, fresh: bool) -> Vec<Action> {
        if !matches!(self.state, State::Live { .. }) {
            return vec![Action::RestartOff(format!("it is {}", self.state.name()))];
        }
        if !fresh && matches!(self.reserve.state(), Standby::Hot { armed: false, .. }) {
            return vec![Action::RestartOff("its spare has no carrier".into())];
        }
        // Where nothing waits, nothing is to wait behind a restart that is given up; and a process that leaves a snapshot does not serve.
        let fresh = fresh || self.reserve.is_snapshot();
        let mut actions = if fresh { self.drop_standby(now) } else { Vec::new() };
        (self.restarting, self.fresh) = (Some(now + self.reserve.longest()), fresh);
        self.reserve.want_now(now);
        actions.extend(self.switch_over(now));
        actions
    }

    /// Gives the restart up, because the next driver VM was not ready in time.
    pub(super) fn give_restart_up(&mut self, now: Time) -> Vec<Action> {
        let why = if self.reserve.is_hot() { "its spare has no carrier" } else { "it was not ready in time" };
        self.restarting = None;
        let mut actions = vec![Action::RestartOff(why.into())];
        if self.fresh {
            actions.extend(self.on_standby_useless(now));
        }
        actions
    }

    /// Hands over to the standby, if a restart was requested and the standby is ready.
    pub(super) fn switch_over(&mut self, now: Time) -> Vec<Action> {
        let ready = matches!(self.reserve.state(), Standby::Ready { .. } | Standby::Hot { armed: true, .. });
        if !(self.restarting.is_some() && ready && matches!(self.state, State::Live { .. })) {
            return Vec::new();
        }
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
