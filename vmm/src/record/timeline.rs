//! When each step of a failure and of the recovery after it happened.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::parts::RecoveryParts;
use crate::base::time::{Time, milliseconds};
use crate::base::wall;

/// A step of a failure and its recovery, in the usual order. Reports have the variant's name in kebab case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Milestone {
    /// A guest's device was masked.
    Mask,
    /// The first sign of the failure.
    Sign,
    /// The failure was certain.
    Detect,
    /// The process was gone.
    Fence,
    /// The device's reset began.
    ResetStart,
    /// The reset returned.
    Reset,
    /// The next generation's process was started, or the standby taken.
    Spawn,
    /// Its vCPUs ran.
    Running,
    /// Its agent said hello.
    Hello,
    /// The standby has the device.
    Plugged,
    /// The device has a driver.
    Nic,
    /// Frames are forwarded.
    Forwarding,
    /// The NIC has its link.
    Carrier,
    /// The splitters were ordered to replay.
    GoLive,
    /// All guests' devices are live.
    Live,
    /// A word of another version, read from its files. Never written.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for Milestone {
    /// The word of reports.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// How far a life has got that is on its way to serve, as the event `driver-stage` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LifeStage {
    /// Its vCPUs run.
    Running,
    /// Its agent said hello.
    Hello,
    /// A standby has the device.
    Plugged,
    /// The NIC has a driver.
    Nic,
    /// The sound card has a driver.
    Sound,
    /// The disks have a driver, and are there.
    Disks,
    /// Frames, samples or a disk's requests are forwarded.
    Forwarding,
    /// The NIC has its link.
    Carrier,
    /// A word of another version, read from its files. Never written.
    #[serde(other)]
    Unknown,
}

impl LifeStage {
    /// The step of the time line that it is.
    pub fn milestone(self) -> Milestone {
        match self {
            Self::Running => Milestone::Running,
            Self::Hello => Milestone::Hello,
            Self::Plugged => Milestone::Plugged,
            Self::Nic | Self::Sound | Self::Disks => Milestone::Nic,
            Self::Forwarding => Milestone::Forwarding,
            Self::Carrier => Milestone::Carrier,
            Self::Unknown => Milestone::Unknown,
        }
    }
}

/// The steps so far. A step that is marked several times keeps its earliest time.
#[derive(Clone, Debug, Default)]
pub struct Timeline(Vec<(Milestone, Time)>);

/// A step as a report has it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Mark {
    /// Which step.
    pub step: Milestone,
    /// `CLOCK_MONOTONIC`, ns.
    pub at_ns: u64,
    /// Since the first step, ms.
    pub ms: f64,
    /// Wall clock, UTC.
    pub time: String,
}

impl Timeline {
    /// Notes `step` at `at`.
    pub fn mark(&mut self, step: Milestone, at: Time) {
        match self.0.iter_mut().find(|(have, _)| *have == step) {
            Some((_, have)) => *have = at.min(*have),
            None => self.0.push((step, at)),
        }
    }

    /// When `step` happened.
    pub fn at(&self, step: Milestone) -> Option<Time> {
        self.0.iter().find(|(have, _)| *have == step).map(|(_, at)| *at)
    }

    /// Time from `from` to `to`; `None` where one of them has not happened.
    pub fn between(&self, from: Milestone, to: Milestone) -> Option<Duration> {
        Some(self.at(to)?.since(self.at(from)?))
    }

    /// From the mask to live.
    pub fn outage(&self) -> Option<Duration> {
        self.between(Milestone::Mask, Milestone::Live)
    }

    /// The steps in the order of their times.
    pub fn marks(&self) -> Vec<Mark> {
        let mut steps = self.0.clone();
        steps.sort_by_key(|(step, at)| (*at, *step));
        let Some((_, first)) = steps.first().copied() else { return Vec::new() };
        let mark = |(step, at): (Milestone, Time)| Mark {
            step,
            at_ns: at.0,
            ms: milliseconds(at.since(first)),
            time: wall::of(at),
        };
        steps.into_iter().map(mark).collect()
    }

    /// The parts of the recovery; the reset's method is `reset_method`.
    pub fn parts(&self, reset_method: &str) -> RecoveryParts {
        let ms = |from, to| self.between(from, to).map(milliseconds);
        // A carrier that was there before forwarding took no time; without one, the patience for it did.
        let link = match (ms(Milestone::Forwarding, Milestone::Carrier), ms(Milestone::Forwarding, Milestone::GoLive)) {
            (Some(carrier), Some(_)) => Some(carrier),
            (None, waited) => waited,
            (carrier, None) => carrier,
        };
        let ready = self.at(Milestone::Hello).max(self.at(Milestone::Plugged));
        let plug = self.at(Milestone::Plugged).zip(self.at(Milestone::Spawn).max(self.at(Milestone::Hello)));
        RecoveryParts {
            detect_ms: ms(Milestone::Sign, Milestone::Detect),
            fence_ms: ms(Milestone::Detect, Milestone::Fence),
            reset_ms: ms(Milestone::ResetStart, Milestone::Reset),
            reset_method: reset_method.into(),
            back_off_ms: ms(Milestone::Reset, Milestone::Spawn),
            boot_ms: ms(Milestone::Spawn, Milestone::Hello),
            plug_ms: plug.map(|(plugged, from)| milliseconds(plugged.since(from))),
            probe_ms: self.at(Milestone::Nic).zip(ready).map(|(nic, ready)| milliseconds(nic.since(ready))),
            setup_ms: ms(Milestone::Nic, Milestone::Forwarding),
            link_ms: link,
            replay_ms: ms(Milestone::GoLive, Milestone::Live),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_sorted_and_the_earliest_of_a_kind_counts() {
        let mut timeline = Timeline::default();
        let ms = |n: u64| Time(n * 1_000_000);
        timeline.mark(Milestone::Detect, ms(3));
        timeline.mark(Milestone::Mask, ms(2));
        timeline.mark(Milestone::Mask, ms(1));
        timeline.mark(Milestone::Mask, ms(9));
        timeline.mark(Milestone::Live, ms(101));
        let steps: Vec<_> = timeline.marks().into_iter().map(|mark| (mark.step, mark.ms)).collect();
        assert_eq!(steps, [(Milestone::Mask, 0.0), (Milestone::Detect, 2.0), (Milestone::Live, 100.0)]);
        assert_eq!(timeline.outage(), Some(Duration::from_millis(100)));
    }

    #[test]
    fn without_a_carrier_the_link_s_part_is_the_patience() {
        let mut timeline = Timeline::default();
        timeline.mark(Milestone::Forwarding, Time(0));
        timeline.mark(Milestone::GoLive, Time(6_000_000_000));
        assert_eq!(timeline.parts("flr").link_ms, Some(6000.0));
        timeline.mark(Milestone::Carrier, Time(1_000_000_000));
        assert_eq!(timeline.parts("flr").link_ms, Some(1000.0));
    }
}
