//! When a failed driver VM is started again, and when no more: the bound on restarts, the back-off. Pure: times go
//! in, a [`RestartVerdict`] comes out.
//!
//! The bound is systemd's `StartLimitBurst`/`StartLimitIntervalSec`; the back-off doubles with each failure in a row.

use std::collections::VecDeque;
use std::time::Duration;

use crate::base::time::Time;
use crate::config::Restart;

/// Time in service after which a life counts as a success: a failure after it is the first in a new row. Short, so that the
/// back-off slows down only a driver that dies while it starts; frequent deaths in service are bounded by the restart limit.
const STABLE: Duration = Duration::from_secs(1);

/// Shortest time between two tries to start a process where the host has none to start, whatever the policy's delays are.
const LEAST_DELAY: Duration = Duration::from_millis(100);

/// What follows a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestartVerdict {
    /// Start the next generation after this delay.
    Restart(Duration),
    /// Start no more.
    Quarantine,
}

/// The failures of one driver so far, as far as the policy needs them.
#[derive(Clone, Debug)]
pub struct RestartHistory {
    policy: Restart,
    /// Failures within the window, oldest first; never more than `limit` of them.
    recent: VecDeque<Time>,
    /// Failures since the last stable life.
    in_a_row: u32,
    /// Tries in a row in which no process could be started.
    unstarted: u32,
    total: u64,
}

impl RestartHistory {
    /// No failures yet.
    pub fn new(policy: Restart) -> Self {
        Self { policy, recent: VecDeque::new(), in_a_row: 0, unstarted: 0, total: 0 }
    }

    /// Failures since the start.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The policy in force.
    pub fn policy(&self) -> &Restart {
        &self.policy
    }

    /// Another policy from now on; what has failed so far counts.
    pub fn set_policy(&mut self, policy: Restart) {
        self.policy = policy;
    }

    /// Takes note of a failure at `now` of a life that was live for `lived` (`None`: it never was).
    pub fn failed(&mut self, now: Time, lived: Option<Duration>) -> RestartVerdict {
        self.total = self.total.saturating_add(1);
        let exhausted = self.is_exhausted(now, lived);
        self.in_a_row = self.row_with(lived);
        if exhausted {
            return RestartVerdict::Quarantine;
        }
        let window = Duration::from_secs(self.policy.interval_s.into());
        self.recent.retain(|at| now.since(*at) < window);
        self.recent.push_back(now);
        RestartVerdict::Restart(self.back_off())
    }

    /// Whether a failure at `now` of a life that was live for `lived` would exceed a limit: that of failures within the window, or
    /// the same number of failures in a row, because lives that take long to fail never fill a window.
    pub fn is_exhausted(&self, now: Time, lived: Option<Duration>) -> bool {
        self.fills_window(now) || self.row_with(lived) > self.policy.limit
    }

    /// Which limit a failure at `now` has passed, in words.
    pub fn passed(&self, now: Time) -> String {
        let Restart { limit, interval_s, .. } = self.policy;
        if self.fills_window(now) {
            format!("more than {limit} failures in {interval_s} s")
        } else {
            format!("more than {limit} failures in a row")
        }
    }

    fn fills_window(&self, now: Time) -> bool {
        let window = Duration::from_secs(self.policy.interval_s.into());
        let recent = self.recent.iter().filter(|at| now.since(**at) < window).count();
        recent >= usize::try_from(self.policy.limit).unwrap_or(usize::MAX)
    }

    /// Number of failures in a row, including that of a life that was live for `lived`.
    fn row_with(&self, lived: Option<Duration>) -> u32 {
        if lived.is_some_and(|d| d >= STABLE) { 1 } else { self.in_a_row.saturating_add(1) }
    }

    /// Forgets the failures so far; only [`Self::total`] still counts them.
    pub fn forgive(&mut self) {
        self.recent.clear();
        self.in_a_row = 0;
    }

    /// Takes note of a life for which no process could be started, which is no failure of the driver VM and bounds nothing. Whether it is
    /// the first in a row, and the delay until the next try.
    pub fn not_started(&mut self) -> (bool, Duration) {
        let tries = self.unstarted;
        self.unstarted = tries.saturating_add(1);
        (tries == 0, self.doubled(tries).max(LEAST_DELAY))
    }

    /// A process was started.
    pub fn started(&mut self) {
        self.unstarted = 0;
    }

    /// Nothing before the second failure in a row, then `backoff_ms` and twice as much each time.
    fn back_off(&self) -> Duration {
        self.in_a_row.checked_sub(2).map_or(Duration::ZERO, |doublings| self.doubled(doublings))
    }

    fn doubled(&self, doublings: u32) -> Duration {
        let factor = 1_u64.checked_shl(doublings).unwrap_or(u64::MAX);
        let delay = u64::from(self.policy.backoff_ms).saturating_mul(factor);
        Duration::from_millis(delay.min(self.policy.backoff_max_ms.into()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIVED: Option<Duration> = Some(Duration::from_secs(10));

    fn at(ms: u64) -> Time {
        Time(ms * 1_000_000)
    }

    #[test]
    fn a_driver_that_works_in_between_is_restarted_without_delay_until_the_limit() {
        let mut history = RestartHistory::new(Restart { limit: 3, interval_s: 60, ..Restart::default() });
        for n in 0..3 {
            assert_eq!(history.failed(at(n * 10_000), LIVED), RestartVerdict::Restart(Duration::ZERO));
        }
        assert_eq!(history.failed(at(30_000), LIVED), RestartVerdict::Quarantine);
    }

    #[test]
    fn failures_older_than_the_window_do_not_count() {
        let mut history = RestartHistory::new(Restart { limit: 1, interval_s: 60, ..Restart::default() });
        for n in 0..5 {
            assert_eq!(history.failed(at(n * 60_000), LIVED), RestartVerdict::Restart(Duration::ZERO), "{n}");
        }
        assert_eq!(history.failed(at(299_999), LIVED), RestartVerdict::Quarantine);
    }

    #[test]
    fn a_driver_that_dies_of_starting_is_slowed_down() {
        let policy = Restart { limit: 9, backoff_ms: 100, backoff_max_ms: 500, ..Restart::default() };
        let mut history = RestartHistory::new(policy);
        let delays: Vec<_> = (0..6).map(|n| history.failed(at(n), None)).collect();
        let ms = |n| RestartVerdict::Restart(Duration::from_millis(n));
        assert_eq!(delays, [ms(0), ms(100), ms(200), ms(400), ms(500), ms(500)]);
        assert_eq!(history.failed(at(9), LIVED), ms(0), "a stable life ends the row");
    }

    #[test]
    fn one_that_fails_slowly_again_and_again_is_given_up_as_well() {
        let mut history = RestartHistory::new(Restart { limit: 3, interval_s: 60, ..Restart::default() });
        for n in 0..3 {
            assert!(matches!(history.failed(at(n * 70_000), None), RestartVerdict::Restart(_)), "{n}");
        }
        assert_eq!(history.failed(at(210_000), None), RestartVerdict::Quarantine);
        assert_eq!(history.passed(at(210_000)), "more than 3 failures in a row");
    }

    #[test]
    fn what_is_forgiven_counts_no_more() {
        let mut history = RestartHistory::new(Restart { limit: 1, interval_s: 60, ..Restart::default() });
        assert_eq!(history.failed(at(0), None), RestartVerdict::Restart(Duration::ZERO));
        assert_eq!(history.failed(at(1), None), RestartVerdict::Quarantine);
        history.forgive();
        assert_eq!(history.failed(at(2), None), RestartVerdict::Restart(Duration::ZERO));
        assert_eq!(history.total(), 3);
    }

    #[test]
    fn processes_that_cannot_be_started_are_tried_again_for_ever_and_later_and_later() {
        let mut history = RestartHistory::new(Restart { limit: 0, backoff_ms: 0, ..Restart::default() });
        assert!((0..100).all(|n| history.not_started() == (n == 0, LEAST_DELAY)));
        let mut history = RestartHistory::new(Restart { backoff_ms: 400, backoff_max_ms: 1000, ..Restart::default() });
        let delays = |history: &mut RestartHistory| [0; 3].map(|_| history.not_started().1.as_millis());
        assert_eq!(delays(&mut history), [400, 800, 1000]);
        history.started();
        assert_eq!((delays(&mut history), history.total()), ([400, 800, 1000], 0));
    }

    #[test]
    fn a_limit_of_zero_never_restarts() {
        let mut history = RestartHistory::new(Restart { limit: 0, ..Restart::default() });
        assert_eq!(history.failed(at(0), LIVED), RestartVerdict::Quarantine);
    }

    proptest! {
        #[test]
        fn never_more_restarts_in_any_window_than_allowed(
            limit in 0_u32..6,
            interval_s in 1_u32..5,
            gaps in prop::collection::vec((0_u64..2_000, prop::option::of(0_u64..3_000)), 0..80),
        ) {
            let mut history = RestartHistory::new(Restart { limit, interval_s, ..Restart::default() });
            let mut now = 0;
            let mut restarts = Vec::new();
            for (gap, lived) in gaps {
                now += gap;
                if let RestartVerdict::Restart(_) = history.failed(at(now), lived.map(Duration::from_millis)) {
                    restarts.push(now);
                }
            }
            let window = u64::from(interval_s) * 1000;
            for (n, first) in restarts.iter().enumerate() {
                let within = restarts[n..].iter().filter(|at| **at < first + window).count();
                prop_assert!(within <= limit as usize, "{within} restarts from {first} on");
            }
        }

        #[test]
        fn delays_stay_within_their_bound_and_never_shrink_in_a_row(
            backoff_ms in 0_u32..,
            max in 0_u32..,
            failures in 0_usize..100,
        ) {
            let policy = Restart { limit: u32::MAX, backoff_ms, backoff_max_ms: max, ..Restart::default() };
            let mut history = RestartHistory::new(policy);
            let mut last = Duration::ZERO;
            for n in 0..failures {
                let RestartVerdict::Restart(delay) = history.failed(at(n as u64), None) else {
                    return Err(TestCaseError::fail("quarantined below the limit"));
                };
                prop_assert!(delay >= last && delay <= Duration::from_millis(max.into()));
                last = delay;
            }
        }
    }
}
