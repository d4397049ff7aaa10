//! The carrier of the serving NIC, and when the driver VM goes over to its spare because of it. Pure, a part of the life cycle.
//!
//! ```text
//!                      carrier                                 lost
//!   none since it began ------> there is one <----------------------------------> lost
//!      |                                         back again                        |
//!      | the spare is armed                                                        | for `spare_after_ms`, past the hold
//!      v                                                                           v and with the spare armed
//!   the spare takes over                                                  the spare takes over; the hold doubles
//! ```
//!
//! A NIC that has had no carrier since its life began is a last resort: at a failure a spare without a carrier is taken all the
//! same, because it may find one sooner than the failed device recovers. A carrier that is lost may come back (a cable is moved, a
//! switch restarts), so the driver VM waits for it before it goes over.
//!
//! Invariants: it goes over only to an armed spare, which is one with a carrier; going over is no failure; two NICs that lose
//! their carriers by turns have the driver VM go over no more often than once in [`HOLD_MAX`] in the long run.

use std::time::Duration;

use super::{Action, Carrier, Failure, Lifecycle, NoticedBy, State, Time};
use crate::config::DEFAULT_SPARE_AFTER_MS;

/// Shortest time that the driver VM stays with a NIC after it left the other one because of a lost carrier. Each change ends a
/// life, and a switch that restarts may take its ports' carriers away by turns for seconds. Doubled with each further change, up to
/// [`HOLD_MAX`].
const HOLD: Duration = Duration::from_secs(5);

/// Longest such stay. It bounds how long guests may be without a link although the other NIC has one, where both carriers come and
/// go all the time.
const HOLD_MAX: Duration = Duration::from_secs(60);

/// Time without such a change after which the next stay is [`HOLD`] again: several times [`HOLD_MAX`], so that carriers that come
/// and go at the pace of the longest stay do not begin with the shortest again.
const CALM: Duration = Duration::from_secs(300);

/// The carrier of the present life.
#[derive(Clone, Copy, Debug)]
pub(super) struct CarrierWatch {
    now: Carrier,
    /// When the carrier was lost; `None`: there is one, or has been none in this life.
    lost: Option<Time>,
    /// How long a lost carrier is waited for; `None`: for ever.
    patience: Option<Duration>,
    /// When the driver VM last went over because a carrier was lost, and how long it stays with the NIC that it went to.
    last: Option<(Time, Duration)>,
}

impl CarrierWatch {
    pub(super) fn new() -> Self {
        let mut this = Self { now: Carrier::Down, lost: None, patience: None, last: None };
        this.set_patience(DEFAULT_SPARE_AFTER_MS);
        this
    }

    fn set_patience(&mut self, ms: u32) {
        self.patience = (ms > 0).then(|| Duration::from_millis(ms.into()));
    }

    /// Another life begins.
    pub(super) fn begin(&mut self) {
        (self.now, self.lost) = (Carrier::Down, None);
    }

    pub(super) fn change(&mut self, at: Time, carrier: Carrier) {
        match (self.now, carrier) {
            (_, Carrier::Up) => self.lost = None,
            (Carrier::Up, Carrier::Down) => self.lost = Some(at),
            (Carrier::Down, Carrier::Down) => {}
        }
        self.now = carrier;
    }

    /// When to leave this NIC for an armed spare: at once where it has found no carrier in this life. `None`: there is no reason
    /// to.
    fn leave_due(&self) -> Option<Time> {
        match (self.now, self.lost) {
            (Carrier::Up, _) => None,
            (Carrier::Down, None) => Some(Time::BOOT),
            (Carrier::Down, Some(lost)) => {
                let held = self.last.map(|(last, hold)| last + hold);
                self.patience.map(|patience| held.map_or(lost + patience, |held| held.max(lost + patience)))
            }
        }
    }

    /// Leaves this NIC at `now`: the reason, and since when there has been no carrier.
    fn leave(&mut self, now: Time) -> (String, Time) {
        let Some(lost) = self.lost else {
            return ("its NIC has found no carrier, and the spare's has one".into(), now);
        };
        let hold = match self.last {
            Some((last, hold)) if now.since(last) < CALM => (hold * 2).min(HOLD_MAX),
            _ => HOLD,
        };
        self.last = Some((now, hold));
        let ms = now.since(lost).as_millis();
        (format!("its NIC has had no carrier for {ms} ms, and the spare's has one"), lost)
    }
}

impl Lifecycle {
    /// Sets the wait for a lost carrier, in ms, in place of [`DEFAULT_SPARE_AFTER_MS`]; 0: a lost carrier never makes it go over to
    /// the spare.
    #[must_use]
    pub fn with_spare_after(mut self, ms: u32) -> Self {
        self.set_spare_after(ms);
        self
    }

    /// The same, from now on.
    pub fn set_spare_after(&mut self, ms: u32) {
        self.carrier.set_patience(ms);
    }

    /// The NIC's carrier, as far as the present life has said.
    pub fn carrier(&self) -> Carrier {
        self.carrier.now
    }

    /// Whether there is a life with a carrier.
    pub fn has_carrier(&self) -> bool {
        self.has_life() && self.carrier() == Carrier::Up
    }

    /// How long a NIC may take to find its link before the guests learn that there is none.
    pub(super) fn carrier_patience(&self) -> Duration {
        Duration::from_secs(self.history.policy().carrier_timeout_s.into())
    }

    pub(super) fn on_carrier(&mut self, now: Time, carrier: Carrier) -> Vec<Action> {
        self.carrier.change(now, carrier);
        match self.state {
            State::WaitingCarrier { .. } if carrier == Carrier::Up => self.go_live(now),
            _ => Vec::new(),
        }
    }

    /// Whether the guests have no link, because the present life forwards and has no carrier.
    fn lacks_carrier(&self) -> bool {
        let forwards =
            matches!(self.state, State::WaitingCarrier { .. } | State::GoingLive { .. } | State::Live { .. });
        forwards && self.carrier() == Carrier::Down
    }

    /// Whether the spare is waited for, because the present life has no carrier.
    pub fn awaits_spare(&self) -> bool {
        self.reserve.is_spare() && self.lacks_carrier()
    }

    /// Whether a spare may start: not beside a recovery, but beside a life that could not give the guests a link.
    pub(super) fn may_start_spare(&self) -> bool {
        matches!(self.state, State::Live { .. }) || self.lacks_carrier()
    }

    /// When the present life has to give way to the spare because of its carrier. `None` also while there is a sign of failure,
    /// which is a better reason and leads to the spare as well.
    pub(super) fn leave_due(&self) -> Option<Time> {
        let may = self.lacks_carrier() && self.is_armed() && self.suspicion.is_none();
        self.carrier.leave_due().filter(|_| may)
    }

    /// Goes over to the spare, if that is due.
    pub(super) fn leave_for_spare(&mut self, now: Time) -> Vec<Action> {
        if self.leave_due().is_none_or(|due| due > now) {
            return Vec::new();
        }
        let (what, at) = self.carrier.leave(now);
        self.fail(now, Failure { source: NoticedBy::Carrier, what, at })
    }
}

#[cfg(test)]
#[path = "carrier_tests.rs"]
mod tests;
