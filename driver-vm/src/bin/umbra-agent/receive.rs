//! A driver that lives and receives nothing: the NIC counts frames that it had no room for, and none that it has received.
//!
//! Under overload both counts grow: a driver that is too slow still empties its ring. One that has stopped doing so (a lost
//! interrupt, a ring that is never refilled) leaves the received frames where they were while frames are missed. The counts are
//! read from sysfs, which does not take the network stack's lock.

use std::fs;
use std::path::{Path, PathBuf};

/// Looks that find more frames missed and none received before the driver counts as stuck: at one look a second at least 10 s. Some
/// drivers fetch their counts from the NIC every 2 s, and a driver's own reset takes up to 5 s; neither lasts for ten such looks.
pub const LOOKS: u32 = 10;

/// Frames that have come to the NIC and found no room: in its own memory, in its queue, or at its driver.
const MISSED: [&str; 3] = ["rx_missed_errors", "rx_fifo_errors", "rx_over_errors"];

/// Where a watch begins to count: nothing received since.
#[derive(Clone, Copy, Debug)]
struct Standstill {
    /// Frames missed, at the last look.
    missed: u64,
    /// Looks that have found this grown.
    grown: u32,
}

/// The watch over a NIC that receives.
#[derive(Debug, Default)]
pub struct Watch {
    received: Option<u64>,
    still: Option<Standstill>,
}

impl Watch {
    /// Takes the count of frames `received` and, where that has not grown since the last look, the count of those `missed`;
    /// returns why the driver is stuck, if it is. To be called once a second; more time between two looks only delays the answer.
    pub fn look(&mut self, received: u64, missed: impl FnOnce() -> u64) -> Option<String> {
        if self.received != Some(received) {
            *self = Self { received: Some(received), still: None };
            return None;
        }
        let missed = missed();
        // Fewer than before: the driver's count has started again from zero.
        let Some(still) = self.still.as_mut().filter(|still| missed >= still.missed) else {
            self.still = Some(Standstill { missed, grown: 0 });
            return None;
        };
        if missed > still.missed {
            *still = Standstill { missed, grown: still.grown + 1 };
        }
        (still.grown >= LOOKS).then(|| {
            format!("it has received no frame in {LOOKS} seconds in each of which the NIC had no room for some")
        })
    }

    /// No frame need be received, because there is no carrier.
    pub fn pause(&mut self) {
        *self = Self::default();
    }
}

fn count(nic: &str, what: &str) -> Option<u64> {
    let path: PathBuf = Path::new("/sys/class/net").join(nic).join("statistics").join(what);
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Frames that a NIC has received. Drivers may read the NIC's own registers for it.
pub fn received(nic: &str) -> Option<u64> {
    count(nic, "rx_packets")
}

/// Frames that a NIC had no room for.
pub fn missed(nic: &str) -> u64 {
    MISSED.iter().filter_map(|what| count(nic, what)).fold(0, u64::wrapping_add)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The look, from 0, at which the counts (received, missed) are a failure.
    fn stuck_at(counts: impl IntoIterator<Item = (u64, u64)>) -> Option<usize> {
        let mut watch = Watch::default();
        counts.into_iter().position(|(received, missed)| watch.look(received, || missed).is_some())
    }

    #[test]
    fn frames_missed_for_ten_seconds_and_none_received_are_a_failure() {
        // The first look begins, the second has the first count of missed frames.
        assert_eq!(stuck_at((0..60).map(|second| (7, second * 1000))), Some(11));
        assert_eq!(stuck_at((0..60).map(|second| (0, second))), Some(11));
    }

    #[test]
    fn overload_is_none() {
        assert_eq!(stuck_at((0..600).map(|second| (second, second * 100_000))), None);
        // A driver that gets one frame out of its ring every five seconds.
        assert_eq!(stuck_at((0..600).map(|second| (second / 5, second * 1000))), None);
    }

    #[test]
    fn a_quiet_network_is_none() {
        assert_eq!(stuck_at((0..600).map(|_| (7, 9))), None);
        // A burst of a few seconds during a reset of the adapter, then silence.
        assert_eq!(stuck_at((0..600).map(|second: u64| (7, second.min(9)))), None);
    }

    #[test]
    fn a_network_with_few_frames_takes_longer() {
        assert_eq!(stuck_at((0..600).map(|second| (7, second / 10))), Some(100));
    }

    #[test]
    fn counts_that_begin_anew_are_a_new_start() {
        assert_eq!(stuck_at((0..20).map(|second| (7, if second < 9 { second + 100 } else { second }))), Some(19));
    }

    #[test]
    fn without_a_carrier_nothing_can_be_received() {
        let mut watch = Watch::default();
        for missed in 0..600 {
            assert_eq!(watch.look(7, || missed), None);
            if missed % 10 == 9 {
                watch.pause();
            }
        }
    }

    #[test]
    fn the_kernel_counts_for_an_interface_that_is_there() {
        assert!(received("lo").is_some());
        assert_eq!((received("no-such-if"), missed("no-such-if")), (None, 0));
    }
}
