//! The calls into the kernel's network stack: which of them is under way, so that a lock held inside shows.
//!
//! The stack's lock (rtnl) is one for all interfaces. Whoever asks it while a driver holds it for its own recovery waits in the
//! kernel, without a limit and without an error. So these calls have a thread of their own, and the main loop looks at each beat
//! whether that thread is still in the same call. Beats, and no clock, are what counts: a VM that was stopped for a minute has
//! not waited for a lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use umbra_driver_vm::protocol::HEARTBEAT_MS;

/// Longest time of one call, in seconds. No driver's recovery is known to hold the lock for that long (firmware downloads and
/// self-tests take 5 to 10 s); the kernel has the same limit for a task that waits for a lock (`hung_task_timeout_secs`).
pub const PATIENCE_S: u64 = 30;
/// [`PATIENCE_S`] in beats.
const BEATS: u64 = PATIENCE_S * 1000 / HEARTBEAT_MS;

/// The calls of one thread, counted: even between two calls, odd while one is under way.
#[derive(Clone, Debug, Default)]
pub struct Calls(Arc<AtomicU64>);

impl Calls {
    /// Makes a call, which counts as under way until it returns.
    pub fn make<T>(&self, call: impl FnOnce() -> T) -> T {
        self.0.fetch_add(1, Ordering::Relaxed);
        let result = call();
        self.0.fetch_add(1, Ordering::Relaxed);
        result
    }

    fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The watch over a thread's calls.
#[derive(Debug, Default)]
pub struct CallWatch {
    /// The count at the last beat.
    last: u64,
    /// Consecutive beats that have found the same call under way, after the first.
    beats: u64,
}

impl CallWatch {
    /// Looks at the calls, once a beat; returns whether the present call has taken [`PATIENCE_S`].
    pub fn look(&mut self, calls: &Calls) -> bool {
        let count = calls.count();
        let same = count == self.last && !count.is_multiple_of(2);
        self.beats = if same { self.beats + 1 } else { 0 };
        self.last = count;
        self.beats >= BEATS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The beat at which a call made at the first of them is too long.
    fn beats_until_too_long(watch: &mut CallWatch, calls: &Calls) -> u64 {
        (0..).find(|_| watch.look(calls)).unwrap()
    }

    #[test]
    fn one_call_for_half_a_minute_is_too_long() {
        let (calls, mut watch) = (Calls::default(), CallWatch::default());
        assert_eq!(calls.make(|| beats_until_too_long(&mut watch, &calls)), BEATS);
        assert!(!watch.look(&calls), "it has returned");
    }

    #[test]
    fn many_calls_and_none_are_not_too_long() {
        let (calls, mut watch) = (Calls::default(), CallWatch::default());
        for _ in 0..3 * BEATS {
            assert!(!calls.make(|| watch.look(&calls)));
        }
        for _ in 0..3 * BEATS {
            assert!(!watch.look(&calls));
        }
    }

    #[test]
    fn a_call_that_returns_in_time_starts_the_count_anew() {
        let (calls, mut watch) = (Calls::default(), CallWatch::default());
        for _ in 0..3 {
            assert!(calls.make(|| (0..BEATS).all(|_| !watch.look(&calls))));
        }
    }
}
