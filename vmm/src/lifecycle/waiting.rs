//! The lives that wait: what they say, when they are started, when they are given up. Pure, a part of the life cycle.
//!
//! The *second standby* waits behind the first, so that a failure right behind another one finds a life that is ready too:
//!
//! ```text
//!        the first is ready     1 s later          hello, modules loaded
//!   none -----------------> due ----------> booting ----------------------> ready
//!    ^                       ^               |   | death               death |   |
//!    |                       +---- 1, 2 .. 60 s -+---------------------------+   |
//!    +---- it is the first from now on: that was adopted, or has died -----------+
//! ```
//! It is a [`Standbys`] as the first is, without a spare or a snapshot that is made ahead.
//!
//! Invariants: it is started only beside a first that is ready and a life that serves; there is never a second without a first, because
//! it moves up at once. Until then it has no connection with a guest.

use std::time::Duration;

use super::{Action, Input, Lifecycle, NoticedBy, Rank, Standby, StandbyPolicy, Standbys, State, Time};

impl Lifecycle {
    /// With so many standbys, of which a second is of use only behind a first that waits booted.
    #[must_use]
    pub fn with_standbys(mut self, standbys: u8) -> Self {
        self.set_standbys(standbys);
        self
    }

    fn set_standbys(&mut self, standbys: u8) {
        self.second.keep(if standbys > 1 { StandbyPolicy::Warm } else { StandbyPolicy::Nothing });
    }

    /// Keeps `ahead` ready from now on, and so many standbys; what waits already goes by [`Input::StandbyUseless`].
    pub fn keep(&mut self, ahead: StandbyPolicy, standbys: u8, starts_ahead: bool) {
        self.reserve.keep(ahead);
        self.set_standbys(standbys);
        self.starts_ahead = starts_ahead;
    }

    /// As [`Self::silence`], of a life that waits booted.
    pub fn silence_of(&self, rank: Rank) -> Option<(Time, Time)> {
        match rank {
            Rank::First => self.reserve.silence(),
            Rank::Second => self.second.silence(),
        }
    }

    /// In the last half of its silence, the VM of a life that waits wanted a processor and got none.
    pub fn excuse(&mut self, rank: Rank) {
        self.waiting(rank).excuse();
    }

    /// State of the second standby.
    pub fn second_standby(&self) -> Standby {
        self.second.state()
    }

    pub(super) fn on_standby(&mut self, now: Time, input: Input) -> Vec<Action> {
        match input {
            Input::StandbyHello(rank) if self.waiting(rank).hello() => return vec![Action::ConfigureStandby(rank)],
            Input::StandbyLoaded(rank) => {
                self.waiting(rank).ready(now);
                self.want_second(now);
                return self.switch_over(now);
            }
            Input::StandbyHeartbeat(rank) => self.waiting(rank).heartbeat(now),
            Input::StandbyFailed(Rank::Second, why) if self.second.died(now) => {
                return vec![Action::DropStandby(Rank::Second, Some(why))];
            }
            Input::StandbyFailed(Rank::First, why) if self.is_saving() && self.reserve.died(now) => {
                return vec![Action::DropTaker(why)];
            }
            Input::StandbyFailed(Rank::First, why) if self.reserve.died(now) => {
                let off = self.restarting.take().map(|_| Action::RestartOff(why.clone()));
                let go_on = self.call_rest_off();
                let next = self.move_up(now);
                let drop = Action::DropStandby(Rank::First, Some(why));
                return std::iter::once(drop).chain(next).chain(go_on).chain(off).collect();
            }
            _ => {}
        }
        Vec::new()
    }

    /// Gives the standbys up, with no reason to report.
    pub(super) fn drop_standby(&mut self, now: Time) -> Vec<Action> {
        let given_up = [Rank::First, Rank::Second].into_iter().filter(|rank| self.waiting(*rank).give_up(now));
        given_up.map(|rank| Action::DropStandby(rank, None)).collect()
    }

    /// Starts the next standby when it is due; gives the present one up when it is overdue.
    pub(super) fn tick_standby(&mut self, now: Time) -> Vec<Action> {
        if let Some(why) = self.reserve.overdue(now) {
            return self.on_standby(now, Input::StandbyFailed(Rank::First, why));
        }
        match (self.reserve.state(), &self.state) {
            (Standby::Due(at), _) if at <= now && self.reserve.is_spare() && self.may_start_spare() => {
                self.reserve.resetting(now);
                vec![Action::ResetSpare]
            }
            (Standby::Due(at), State::Live { .. }) if at <= now && !self.sleeps => {
                let generation = self.next_generation();
                if self.saves_next() {
                    self.reserve.saving(now, generation);
                    return vec![Action::TakeSnapshot(generation)];
                }
                self.reserve.started(now, generation);
                vec![Action::SpawnStandby(Rank::First, generation)]
            }
            // No standby is started beside a recovery, or before a sleep; the next life that goes live asks for one again.
            (Standby::Due(at), _) if at <= now => self.drop_standby(now),
            _ => Vec::new(),
        }
    }

    /// With lives that can be started before they have their device, as those can that are restored.
    #[must_use]
    pub fn with_starts_ahead(self, starts_ahead: bool) -> Self {
        Self { starts_ahead, ..self }
    }

    /// The life that was live for `lived` has failed, and nothing waits: the next one is started beside its fence, if there will be one.
    /// Behind one that never served it is not: it may be the start that fails.
    pub(super) fn start_ahead(&mut self, now: Time, lived: Option<Duration>, source: NoticedBy) -> Option<Action> {
        let nothing_waits = matches!(self.reserve.state(), Standby::Absent | Standby::Due(_) | Standby::Saved);
        let is_last = source == NoticedBy::Identity || self.history.is_exhausted(now, lived);
        if !self.starts_ahead || self.sleeps || self.reserve.is_spare() || !nothing_waits || is_last || lived.is_none()
        {
            return None;
        }
        let generation = self.next_generation();
        self.reserve.started(now, generation);
        Some(Action::SpawnAhead(generation))
    }

    pub(super) fn waiting(&mut self, rank: Rank) -> &mut Standbys {
        match rank {
            Rank::First => &mut self.reserve,
            Rank::Second => &mut self.second,
        }
    }

    /// Schedules the second standby, if there is a first that is ready, beside a life that serves.
    pub(super) fn want_second(&mut self, now: Time) {
        if self.reserve.is_ready() && matches!(self.state, State::Live { .. }) {
            self.second.want(now);
        }
    }

    /// There is no first standby any more: the second takes its place, if there is one.
    pub(super) fn move_up(&mut self, now: Time) -> Option<Action> {
        let moves = self.reserve.move_up(&mut self.second);
        self.want_second(now);
        moves.then_some(Action::MoveUp)
    }

    /// The same for the second.
    pub(super) fn tick_second(&mut self, now: Time) -> Vec<Action> {
        if let Some(why) = self.second.overdue(now) {
            return self.on_standby(now, Input::StandbyFailed(Rank::Second, why));
        }
        match self.second.state() {
            Standby::Due(at) if at <= now && self.reserve.is_ready() && matches!(self.state, State::Live { .. }) => {
                let generation = self.next_generation();
                self.second.started(now, generation);
                vec![Action::SpawnStandby(Rank::Second, generation)]
            }
            Standby::Due(at) if at <= now => {
                // It is wanted again when the first is ready.
                self.second.give_up(now);
                Vec::new()
            }
            _ => Vec::new(),
        }
    }
}
