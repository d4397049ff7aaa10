//! Hands the shadow's log to a driver VM, at the shadow's pace, and asks for an answer while frames are kept back.

use std::time::Duration;

use umbra_shadow::net::{NetShadow, pacing};

use super::in_flight::InFlight;
use super::probe::Question;
use super::traffic::outward_flow;
use crate::header::{HEADER_LEN, Offloads};
use crate::link::Link;
use crate::pump::{self, Counts, Handed, Owner, PumpError};

/// How an attempt to hand the log over ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All of it is handed over.
    Empty,
    /// The driver VM has no buffers for the rest.
    Full,
    /// The rest is kept back until something comes in, or time has passed.
    Paced,
}

/// The replay to one link.
pub(super) struct Replay<'a> {
    pub(super) shadow: &'a mut NetShadow,
    pub(super) link: &'a mut Link,
    pub(super) in_flight: &'a mut InFlight,
    pub(super) counts: &'a mut Counts,
    /// When neighbours were asked last.
    pub(super) asked: &'a mut Option<Duration>,
}

impl Replay<'_> {
    /// Hands logged frames over at `now`, oldest first.
    pub(super) fn hand_over(mut self, now: Duration) -> Result<Outcome, PumpError> {
        let handed = self.hand_log(now);
        let asked = self.ask(now);
        let told = self.link.rx.notify().map_err(|fault| PumpError { owner: Owner::DriverVm, fault: fault.into() });
        let outcome = handed?;
        asked.and(told).map(|()| outcome)
    }

    fn hand_log(&mut self, now: Duration) -> Result<Outcome, PumpError> {
        let flow = outward_flow(Offloads::all(), self.link.features);
        while let Some(frame) = self.shadow.next_replay(now) {
            let len = frame.len();
            match pump::hand(&mut self.link.rx, &flow, frame, self.in_flight)? {
                Handed::Yes => {
                    self.shadow.replayed();
                    self.counts.frames += 1;
                    self.counts.bytes += len.saturating_sub(HEADER_LEN) as u64;
                }
                Handed::Never => self.shadow.skip_replay(),
                Handed::Full => return Ok(Outcome::Full),
            }
        }
        Ok(if self.shadow.is_paced() { Outcome::Paced } else { Outcome::Empty })
    }

    /// Asks the neighbours for whom frames are kept back, unless that was done a moment ago.
    fn ask(&mut self, now: Duration) -> Result<(), PumpError> {
        let lately = self.asked.is_some_and(|at| now.saturating_sub(at) < pacing::STEP);
        if lately || !self.shadow.is_paced() {
            return Ok(());
        }
        *self.asked = Some(now);
        let flow = outward_flow(Offloads::all(), self.link.features);
        for question in Question::all(self.shadow.logged()) {
            // Of the splitter's own: no frame of the guest's is missing if it is lost.
            let mut uncounted = self.in_flight.uncounted();
            if pump::hand(&mut self.link.rx, &flow, &question.frame(), &mut uncounted)? != Handed::Yes {
                break;
            }
        }
        Ok(())
    }
}
