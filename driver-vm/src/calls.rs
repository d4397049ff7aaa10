//! The calls of one thread into the kernel: which of them is under way, so that one that does not return shows.
//!
//! A thread that waits in the kernel, for a lock or for a device, waits without a limit and without an error. So another thread looks
//! now and then whether it is still in the same call. Looks, and no clock, are what counts: a VM that was stopped for a minute has not
//! waited for anything.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
}

/// The watch over a thread's calls.
#[derive(Debug, Default)]
pub struct CallWatch {
    /// The count at the last look.
    last: u64,
    /// Consecutive looks that have found the same call under way, after the first.
    looks: u64,
}

impl CallWatch {
    /// Looks at the calls; returns how many looks in a row have found the present call under way, after the first.
    pub fn look(&mut self, calls: &Calls) -> u64 {
        let count = calls.0.load(Ordering::Relaxed);
        let same = count == self.last && !count.is_multiple_of(2);
        self.looks = if same { self.looks + 1 } else { 0 };
        self.last = count;
        self.looks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_at_the_same_call_are_counted_and_its_return_starts_the_count_anew() {
        let (calls, mut watch) = (Calls::default(), CallWatch::default());
        for _ in 0..3 {
            calls.make(|| (0..200).for_each(|looks| assert_eq!(watch.look(&calls), looks)));
            assert_eq!(watch.look(&calls), 0, "it has returned");
        }
    }

    #[test]
    fn many_calls_and_none_are_not_long() {
        let (calls, mut watch) = (Calls::default(), CallWatch::default());
        assert!((0..200).all(|_| calls.make(|| watch.look(&calls)) == 0));
        assert!((0..200).all(|_| watch.look(&calls) == 0));
    }
}
