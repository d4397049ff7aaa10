//! A driver that lives and sends nothing: its transmit queue stands still, and the frames forwarded to it are dropped.
//!
//! The kernel counts how often frames have waited too long in a queue (the netdev watchdog, 5 s for most drivers), and has the
//! driver reset its adapter each time. The first time-out is left to that reset. It did not help if the kernel counts another
//! time-out soon after, or if the NIC has sent nothing since although frames came: the watchdog sees full queues alone, and few
//! frames do not fill one that stands still.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time after a time-out in which the queue is watched. A second time-out comes well within it: 5 s for each, and a reset of the
/// slowest adapters between them. A queue that moves again for a minute has recovered.
pub const WITHIN: Duration = Duration::from_secs(60);
/// Longest standstill of a watched queue while frames come: twice the slowest autonegotiation.
pub const STANDSTILL: Duration = Duration::from_secs(8);
/// Frames that must have come during a standstill that counts: fewer may have been lost elsewhere.
const FRAMES: u64 = 4;

/// Frames, as the kernel has counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Sent by the NIC.
    pub sent: u64,
    /// Come from the guest.
    pub came: u64,
}

/// The watch over a NIC. A NIC begins with no time-outs.
#[derive(Debug, Default)]
pub struct Watch {
    timeouts: u64,
    last: Option<Instant>,
    /// Since when no frame was sent, and the counts at that time.
    still: Option<(Instant, Flow)>,
}

impl Watch {
    /// Takes the count of time-outs at `now` and, after a time-out, the `flow`; returns why the driver is stuck, if it is. A lower
    /// count is a new start: queues have gone.
    pub fn look(&mut self, now: Instant, timeouts: u64, flow: impl FnOnce() -> Option<Flow>) -> Option<String> {
        if timeouts < self.timeouts {
            *self = Self { timeouts, ..Self::default() };
        }
        let new = timeouts - self.timeouts;
        let watched = self.last.is_some_and(|last| now.saturating_duration_since(last) <= WITHIN);
        if new > 0 {
            (self.timeouts, self.last) = (timeouts, Some(now));
            if watched || new > 1 {
                return Some(format!("its transmit queue has timed out twice in {} s", WITHIN.as_secs()));
            }
        } else if !watched {
            self.still = None;
            return None;
        }
        let flow = flow()?;
        match self.still {
            Some((since, before)) if before.sent == flow.sent => {
                let (came, seconds) = (flow.came.saturating_sub(before.came), STANDSTILL.as_secs());
                let stuck = now.saturating_duration_since(since) >= STANDSTILL && came >= FRAMES;
                stuck.then(|| {
                    format!("its transmit queue has timed out, and none of {came} frames was sent in {seconds} s")
                })
            }
            _ => {
                self.still = Some((now, flow));
                None
            }
        }
    }

    /// The queue need not move, because there is no carrier.
    pub fn pause(&mut self) {
        self.still = None;
    }
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn interface(name: &str) -> PathBuf {
    Path::new("/sys/class/net").join(name)
}

/// The time-outs of all transmit queues of a NIC; `None` where the kernel does not count them.
pub fn timeouts(nic: &str) -> Option<u64> {
    let queues = fs::read_dir(interface(nic).join("queues")).ok()?;
    // Receive queues have no such file.
    Some(queues.flatten().filter_map(|queue| number(&queue.path().join("tx_timeout"))).sum())
}

/// The frames of a NIC and of the end that is joined with it. Drivers may read the NIC's own registers for it.
pub fn flow(nic: &str, end: &str) -> Option<Flow> {
    let count = |name, what| number(&interface(name).join("statistics").join(what));
    Some(Flow { sent: count(nic, "tx_packets")?, came: count(end, "rx_packets")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether each look is a failure: seconds after the start; then time-outs, frames sent, frames come.
    fn stuck<const N: usize>(looks: [(u64, [u64; 3]); N]) -> [bool; N] {
        let (start, mut watch) = (Instant::now(), Watch::default());
        looks.map(|(at, [timeouts, sent, came])| {
            watch.look(start + Duration::from_secs(at), timeouts, || Some(Flow { sent, came })).is_some()
        })
    }

    /// As [`stuck`], of a NIC that sends all the time.
    fn timed_out<const N: usize>(counts: [(u64, u64); N]) -> [bool; N] {
        stuck(counts.map(|(at, timeouts)| (at, [timeouts, at, at])))
    }

    #[test]
    fn one_time_out_is_the_drivers_own_affair() {
        assert_eq!(timed_out([(0, 0), (5, 1), (6, 1), (60, 1)]), [false; 4]);
    }

    #[test]
    fn a_second_within_a_minute_is_a_failure() {
        assert_eq!(timed_out([(5, 1), (15, 1), (65, 2)]), [false, false, true]);
    }

    #[test]
    fn one_a_long_time_after_is_a_first_again() {
        assert_eq!(timed_out([(5, 1), (66, 2), (130, 3), (140, 4)]), [false, false, false, true]);
    }

    #[test]
    fn two_between_two_looks_are_two() {
        assert_eq!(timed_out([(0, 0), (30, 2)]), [false, true]);
    }

    #[test]
    fn a_smaller_count_is_a_new_start() {
        assert_eq!(timed_out([(5, 1), (6, 0), (7, 1), (8, 2)]), [false, false, false, true]);
    }

    #[test]
    fn a_nic_that_has_timed_out_and_sends_nothing_of_what_comes_is_stuck() {
        let looks = [(0, [0, 7, 7]), (5, [1, 7, 9]), (6, [1, 8, 10]), (13, [1, 8, 17]), (14, [1, 8, 18])];
        assert_eq!(stuck(looks), [false, false, false, false, true]);
    }

    #[test]
    fn without_a_time_out_or_without_frames_it_may_stand_still() {
        assert_eq!(stuck([(0, [0, 7, 7]), (60, [0, 7, 99])]), [false; 2]);
        assert_eq!(stuck([(5, [1, 7, 7]), (20, [1, 7, 10])]), [false; 2]);
        assert_eq!(stuck([(5, [1, 7, 7]), (66, [1, 7, 99])]), [false; 2]);
    }

    #[test]
    fn without_a_carrier_nothing_can_be_sent() {
        let (start, mut watch) = (Instant::now(), Watch::default());
        let look = |watch: &mut Watch, at, came| {
            watch.look(start + Duration::from_secs(at), 1, || Some(Flow { sent: 7, came }))
        };
        assert_eq!(look(&mut watch, 5, 7), None);
        watch.pause();
        assert_eq!(look(&mut watch, 15, 99), None);
        assert!(look(&mut watch, 23, 103).unwrap().contains("none of 4 frames"));
    }

    #[test]
    fn the_kernel_counts_for_an_interface_that_is_there() {
        assert!(timeouts("lo").is_some() && flow("lo", "lo").is_some());
        assert_eq!((timeouts("no-such-if"), flow("lo", "no-such-if")), (None, None));
    }
}
