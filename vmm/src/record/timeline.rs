//! When each step of a failure and of the recovery after it happened.

use std::time::Duration;

use serde::Serialize;

use super::parts::Parts;
use crate::base::time::{Time, milliseconds};
use crate::base::wall;

/// A step, in the usual order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
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
    /// The splitters were told to replay.
    GoLive,
    /// All guests' devices are live.
    Live,
}

/// The steps so far. A step is taken once; of several times the earliest counts.
#[derive(Clone, Debug, Default)]
pub struct Timeline(Vec<(Step, Time)>);

/// A step as a report has it.
#[derive(Clone, Debug, Serialize)]
pub struct Mark {
    /// The step.
    pub step: Step,
    /// `CLOCK_MONOTONIC`, ns.
    pub at_ns: u64,
    /// Since the first step, ms.
    pub ms: f64,
    /// Wall clock, UTC.
    pub time: String,
}

impl Timeline {
    /// Notes `step` at `at`.
    pub fn mark(&mut self, step: Step, at: Time) {
        match self.0.iter_mut().find(|(have, _)| *have == step) {
            Some((_, have)) => *have = at.min(*have),
            None => self.0.push((step, at)),
        }
    }

    /// When `step` happened.
    pub fn at(&self, step: Step) -> Option<Time> {
        self.0.iter().find(|(have, _)| *have == step).map(|(_, at)| *at)
    }

    /// How long it took from `from` to `to`.
    pub fn between(&self, from: Step, to: Step) -> Option<Duration> {
        Some(self.at(to)?.since(self.at(from)?))
    }

    /// From the mask to live.
    pub fn outage(&self) -> Option<Duration> {
        self.between(Step::Mask, Step::Live)
    }

    /// The steps in the order of their times.
    pub fn marks(&self) -> Vec<Mark> {
        let mut steps = self.0.clone();
        steps.sort_by_key(|(step, at)| (*at, *step));
        let first = steps.first().map_or(Time(0), |(_, at)| *at);
        let mark = |(step, at): (Step, Time)| Mark {
            step,
            at_ns: at.0,
            ms: milliseconds(at.since(first)),
            time: wall::of(at),
        };
        steps.into_iter().map(mark).collect()
    }

    /// The parts of the recovery; the reset's method is `reset_method`.
    pub fn parts(&self, reset_method: &str) -> Parts {
        let ms = |from, to| self.between(from, to).map(milliseconds);
        // A carrier that was there before forwarding took no time; without one, the patience for it did.
        let link = match (ms(Step::Forwarding, Step::Carrier), ms(Step::Forwarding, Step::GoLive)) {
            (Some(carrier), Some(_)) => Some(carrier),
            (None, waited) => waited,
            (carrier, None) => carrier,
        };
        let ready = self.at(Step::Hello).max(self.at(Step::Plugged));
        let plug = self.at(Step::Plugged).zip(self.at(Step::Spawn).max(self.at(Step::Hello)));
        Parts {
            detect_ms: ms(Step::Sign, Step::Detect),
            fence_ms: ms(Step::Detect, Step::Fence),
            reset_ms: ms(Step::ResetStart, Step::Reset),
            reset_method: reset_method.into(),
            back_off_ms: ms(Step::Reset, Step::Spawn),
            boot_ms: ms(Step::Spawn, Step::Hello),
            plug_ms: plug.map(|(plugged, from)| milliseconds(plugged.since(from))),
            probe_ms: self.at(Step::Nic).zip(ready).map(|(nic, ready)| milliseconds(nic.since(ready))),
            setup_ms: ms(Step::Nic, Step::Forwarding),
            link_ms: link,
            replay_ms: ms(Step::GoLive, Step::Live),
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
        timeline.mark(Step::Detect, ms(3));
        timeline.mark(Step::Mask, ms(2));
        timeline.mark(Step::Mask, ms(1));
        timeline.mark(Step::Mask, ms(9));
        timeline.mark(Step::Live, ms(101));
        let steps: Vec<_> = timeline.marks().into_iter().map(|mark| (mark.step, mark.ms)).collect();
        assert_eq!(steps, [(Step::Mask, 0.0), (Step::Detect, 2.0), (Step::Live, 100.0)]);
        assert_eq!(timeline.outage(), Some(Duration::from_millis(100)));
    }

    #[test]
    fn without_a_carrier_the_link_s_part_is_the_patience() {
        let mut timeline = Timeline::default();
        timeline.mark(Step::Forwarding, Time(0));
        timeline.mark(Step::GoLive, Time(6_000_000_000));
        assert_eq!(timeline.parts("flr").link_ms, Some(6000.0));
        timeline.mark(Step::Carrier, Time(1_000_000_000));
        assert_eq!(timeline.parts("flr").link_ms, Some(1000.0));
    }
}
