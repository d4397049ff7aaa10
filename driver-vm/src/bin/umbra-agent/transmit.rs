//! A driver that lives and sends nothing: its transmit queue stands still, and the frames forwarded to it are dropped.
//!
//! The kernel counts how often frames have waited too long in a queue (the netdev watchdog, 5 s for most drivers), and has
//! the driver reset its adapter each time. The first time is left to that; a second one soon after says that it did not
//! help. The kernel sees it only while frames wait and there is a carrier.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Two time-outs within this are a failure: with 5 s for each, and a reset of the slowest adapters between them, twice that
/// happens well within it, and a queue that moves again for a minute has been helped.
pub const WITHIN: Duration = Duration::from_secs(60);

/// The time-outs of a NIC's transmit queues, as counted so far. A NIC begins with none.
#[derive(Debug, Default)]
pub struct Timeouts {
    count: u64,
    last: Option<Instant>,
}

impl Timeouts {
    /// Takes the count of `now`; returns whether the driver is stuck. A smaller count is a new start: queues have gone.
    pub fn are_too_many(&mut self, now: Instant, count: u64) -> bool {
        if count < self.count {
            *self = Self { count, last: None };
        }
        let new = count - self.count;
        if new == 0 {
            return false;
        }
        let again = self.last.is_some_and(|last| now.saturating_duration_since(last) <= WITHIN);
        *self = Self { count, last: Some(now) };
        again || new > 1
    }
}

/// The time-outs of all transmit queues of an interface; `None` where the kernel does not tell.
pub fn timeouts(interface: &str) -> Option<u64> {
    let queues = fs::read_dir(Path::new("/sys/class/net").join(interface).join("queues")).ok()?;
    // Receive queues have no such file.
    let counts = queues.flatten().filter_map(|queue| fs::read_to_string(queue.path().join("tx_timeout")).ok());
    Some(counts.filter_map(|count| count.trim().parse::<u64>().ok()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of each count, taken so many seconds after the start.
    fn stuck<const N: usize>(counts: [(u64, u64); N]) -> [bool; N] {
        let (start, mut timeouts) = (Instant::now(), Timeouts::default());
        counts.map(|(at, count)| timeouts.are_too_many(start + Duration::from_secs(at), count))
    }

    #[test]
    fn one_time_out_is_the_drivers_own_affair() {
        assert_eq!(stuck([(0, 0), (5, 1), (6, 1), (60, 1)]), [false; 4]);
    }

    #[test]
    fn a_second_within_a_minute_is_a_failure() {
        assert_eq!(stuck([(5, 1), (15, 1), (65, 2)]), [false, false, true]);
    }

    #[test]
    fn one_a_long_time_after_is_a_first_again() {
        assert_eq!(stuck([(5, 1), (66, 2), (130, 3), (140, 4)]), [false, false, false, true]);
    }

    #[test]
    fn two_between_two_looks_are_two() {
        assert_eq!(stuck([(0, 0), (30, 2)]), [false, true]);
    }

    #[test]
    fn a_smaller_count_is_a_new_start() {
        assert_eq!(stuck([(5, 1), (6, 0), (7, 1), (8, 2)]), [false, false, false, true]);
    }

    #[test]
    fn the_kernel_counts_for_an_interface_that_is_there() {
        assert!(timeouts("lo").is_some());
        assert_eq!(timeouts("no-such-if"), None);
    }
}
