//! How much a device moved around an outage, in small steps of time: what a report draws of it.
//!
//! [`OutageTrace::note`] is called at each event of the device, which costs a clock reading and an addition. Two seconds after a
//! driver VM has taken over, the timer fires, and [`OutageTrace::take`] has the steps from two seconds before the loss on.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::timerfd::{Expiration, TimerFd, TimerSetTimeFlags};
use umbra_shadow::Generation;

use crate::base::timer;
use crate::wire::messages::PaceSteps;

/// Length of a step, ns.
const STEP_NS: u64 = 25_000_000;
/// Steps kept before the loss, and again after the recovery: two seconds each.
const AROUND: u64 = 80;
/// Most steps reported: longer outages are reported in longer steps.
const TOLD: u64 = 240;
/// Most steps kept, counting only those in which something moved.
const KEPT: usize = 4096;

/// What a device has moved since it was made, in frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// From the guest to its driver VM; of a sound device, what the card played.
    pub out: u64,
    /// To the guest from its driver VM.
    pub into: u64,
}

/// A step in which something moved.
#[derive(Clone, Copy, Debug)]
struct Step {
    /// Number of the step since the clock's epoch, in units of [`STEP_NS`].
    number: u64,
    moved: Moved,
}

/// The steps of one device.
#[derive(Debug)]
pub struct OutageTrace {
    timer: TimerFd,
    steps: VecDeque<Step>,
    total: Moved,
    serving: Option<Generation>,
    /// The step in which the driver VM was lost, until [`OutageTrace::take`].
    lost: Option<u64>,
}

impl OutageTrace {
    /// A trace in which nothing has moved yet.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn new() -> std::io::Result<Self> {
        let timer = timer::monotonic()?;
        Ok(Self { timer, steps: VecDeque::new(), total: Moved::default(), serving: None, lost: None })
    }

    /// At `now` (`CLOCK_MONOTONIC`, ns) this much has moved in all, and this generation serves.
    pub fn note(&mut self, now: u64, total: Moved, serving: Option<Generation>) {
        let number = now / STEP_NS;
        let moved = Moved { out: total.out - self.total.out, into: total.into - self.total.into };
        self.total = total;
        if moved != Moved::default() {
            match self.steps.back_mut() {
                Some(last) if last.number == number => {
                    last.moved = Moved { out: last.moved.out + moved.out, into: last.moved.into + moved.into };
                }
                _ => self.steps.push_back(Step { number, moved }),
            }
        }
        let before = std::mem::replace(&mut self.serving, serving);
        if before.is_some() && before != serving {
            self.lost.get_or_insert(number);
        }
        if serving.is_some() && before != serving && self.lost.is_some() {
            let after = Duration::from_nanos(AROUND * STEP_NS);
            if let Err(error) = self.timer.set(Expiration::OneShot(after.into()), TimerSetTimeFlags::empty()) {
                tracing::warn!(%error, "set the timer of what a device moves");
            }
        }
        let begin = self.lost.unwrap_or(number).saturating_sub(AROUND);
        while self.steps.len() > KEPT || self.steps.front().is_some_and(|step| step.number < begin) {
            self.steps.pop_front();
        }
    }

    /// Fires when there is something to take.
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// What moved around the outage that is over; none if another one has begun.
    pub fn take(&mut self, now: u64) -> Option<PaceSteps> {
        // Nothing to read if the timer was set again a moment ago.
        let _ = self.timer.wait();
        self.serving?;
        let (lost, end) = (self.lost.take()?, now / STEP_NS);
        let begin = lost.saturating_sub(AROUND);
        let each = (end - begin).div_ceil(TOLD).max(1);
        let count = usize::try_from((end - begin).div_ceil(each)).unwrap_or(0);
        let (mut out, mut into) = (vec![0u64; count], vec![0u64; count]);
        for step in &self.steps {
            let place = step.number.checked_sub(begin).and_then(|n| usize::try_from(n / each).ok());
            let Some(place) = place.filter(|place| *place < count) else { continue };
            out[place] += step.moved.out;
            into[place] += step.moved.into;
        }
        let ms = |steps: u64| steps * STEP_NS / 1_000_000;
        Some(PaceSteps { step_ms: ms(each), before_ms: ms(lost - begin), out, into })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn generation(n: u32) -> Option<Generation> {
        Generation::new(n)
    }

    /// Moves a frame each way every 5 ms while something serves; the card is away from 10 s on.
    fn run(away_ms: u64, by_itself: bool) -> Option<PaceSteps> {
        let (mut pace, mut total) = (OutageTrace::new().unwrap(), Moved::default());
        for ms in (0..12_000 + away_ms).step_by(5) {
            let away = (10_000..10_000 + away_ms).contains(&ms);
            if !away {
                total = Moved { out: total.out + 1, into: total.into + 2 };
            } else if by_itself {
                continue;
            }
            let serving = if away { None } else { generation(if ms < 10_000 { 1 } else { 2 }) };
            pace.note(ms * MS, total, serving);
        }
        pace.take((12_000 + away_ms) * MS)
    }

    #[test]
    fn an_outage_is_a_gap_between_two_seconds_each() {
        let steps = run(1000, false).unwrap();
        assert_eq!((steps.step_ms, steps.before_ms, steps.out.len()), (25, 2000, 200));
        let gap = steps.out.iter().map(|n| *n == 0).collect::<Vec<_>>();
        assert_eq!(gap.iter().position(|empty| *empty), Some(80));
        assert_eq!(gap.iter().filter(|empty| **empty).count(), 40);
        assert_eq!(steps.out.iter().sum::<u64>(), 800);
        assert_eq!(steps.into.iter().sum::<u64>(), 1600);
    }

    #[test]
    fn a_spare_that_takes_over_within_one_event_is_an_outage_too() {
        let steps = run(50, true).unwrap();
        assert_eq!(steps.out.iter().filter(|n| **n == 0).count(), 2);
    }

    #[test]
    fn a_long_outage_has_longer_steps() {
        let steps = run(56_000, false).unwrap();
        assert_eq!((steps.step_ms, steps.out.len()), (250, 240));
        assert_eq!(steps.out.iter().filter(|n| **n == 0).count(), 224);
        assert!(steps.out[..8].iter().all(|n| *n == 50), "what was before the loss is kept: {:?}", &steps.out[..9]);
    }

    #[test]
    fn a_first_life_and_an_outage_that_lasts_are_not_told() {
        let mut pace = OutageTrace::new().unwrap();
        pace.note(0, Moved::default(), None);
        pace.note(MS, Moved { out: 1, into: 0 }, generation(1));
        assert!(pace.take(2000 * MS).is_none());
        pace.note(3000 * MS, Moved { out: 2, into: 0 }, None);
        assert!(pace.take(5000 * MS).is_none());
    }
}
