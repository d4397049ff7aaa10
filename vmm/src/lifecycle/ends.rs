//! The guests at a driver VM's ends: how a life goes live with them, and how they come and go meanwhile. Pure, a part of the life
//! cycle.
//!
//! Invariant: no guest is waited for without a limit: a life goes live without those that are away or do not answer in time, and
//! serves them when they come.

use super::{Action, Carrier, Endpoint, GOING_LIVE_PATIENCE, Lifecycle, State, Time};

impl Lifecycle {
    pub(super) fn go_live(&mut self, now: Time) -> Vec<Action> {
        let ahead = std::mem::take(&mut self.ahead);
        let is_ahead = |end: &Endpoint| ahead.get(end).copied() == self.generation;
        let waiting = self.ends.iter().copied().filter(|end| !is_ahead(end)).collect();
        self.state = State::GoingLive { waiting, until: now + GOING_LIVE_PATIENCE };
        let mut actions: Vec<_> =
            self.ends.iter().map(|end| Action::GoLive(*end, self.suspects.replay(*end))).collect();
        actions.extend(self.check_all_live(now));
        actions
    }

    pub(super) fn on_end_live(&mut self, now: Time, end: Endpoint) -> Vec<Action> {
        match &mut self.state {
            State::GoingLive { waiting, .. } => {
                let was_waiting = waiting.remove(&end);
                if was_waiting {
                    self.suspects.clear(end);
                }
            }
            State::Live { .. } if self.late.remove(&end) => {
                self.suspects.clear(end);
                return vec![Action::EndLive(end)];
            }
            // The splitter took the spare while that was armed; the supervisor has not handled that yet.
            State::Booting { .. } | State::Configuring { .. } | State::WaitingCarrier { .. }
                if self.reserve.is_spare() =>
            {
                self.ahead.extend(self.generation.map(|generation| (end, generation)));
            }
            _ => {}
        }
        self.check_all_live(now)
    }

    pub(super) fn on_end_here(&mut self, end: Endpoint) -> Vec<Action> {
        self.ends.insert(end);
        match &mut self.state {
            State::GoingLive { waiting, .. } => drop(waiting.insert(end)),
            State::Live { .. } => drop(self.late.insert(end)),
            _ => return Vec::new(),
        }
        vec![Action::GoLive(end, self.suspects.replay(end))]
    }

    pub(super) fn on_end_gone(&mut self, now: Time, end: Endpoint) -> Vec<Action> {
        self.ends.remove(&end);
        self.late.remove(&end);
        self.ahead.remove(&end);
        if let State::GoingLive { waiting, .. } = &mut self.state {
            waiting.remove(&end);
        }
        self.check_all_live(now)
    }

    /// Whether the guest of `end` is there, and connected.
    pub fn serves(&self, end: Endpoint) -> bool {
        self.ends.contains(&end)
    }

    /// Whether the guest of `end` has gone live with the life that is live.
    pub fn is_live_at(&self, end: Endpoint) -> bool {
        matches!(self.state, State::Live { .. }) && self.serves(end) && !self.late.contains(&end)
    }

    /// The guest at `end` was started again: it is not the one whose recorded requests lives have died of.
    pub fn end_starts_over(&mut self, end: Endpoint) {
        self.suspects.clear(end);
    }

    fn check_all_live(&mut self, now: Time) -> Vec<Action> {
        match &self.state {
            State::GoingLive { waiting, .. } if waiting.is_empty() => self.live(now),
            _ => Vec::new(),
        }
    }

    fn live(&mut self, now: Time) -> Vec<Action> {
        self.state = State::Live { since: now };
        self.history.started();
        self.reserve.want(now);
        self.want_second(now);
        vec![Action::Live]
    }

    /// Goes live without the ends that have not answered in time.
    pub(super) fn leave_behind(&mut self, now: Time) -> Vec<Action> {
        if let State::GoingLive { waiting, .. } = &mut self.state {
            self.late = std::mem::take(waiting);
        }
        // Ends that wait for a carrier are not to blame for their silence.
        let silent = self.late.iter().filter(|_| self.carrier() == Carrier::Up);
        let late = silent.copied().map(Action::LeaveBehind).collect::<Vec<_>>();
        self.live(now).into_iter().chain(late).collect()
    }
}
