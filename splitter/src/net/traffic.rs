//! Frames on their way between the guest's queues, the link and the shadow's log.

use umbra_shadow::net::FrameVerdict;

use super::source::{Inward, Outward};
use super::{GuestQueue, LinkState, NetSplitter, features};
use crate::header::Offloads;
use crate::pump::{self, Flow, Owner, PumpError, Stop};
use crate::queue::RingFault;

impl NetSplitter {
    /// Frames of the guest: to the driver VM, into the log, or nowhere.
    pub(super) fn outward(&mut self) {
        let Some(queue) = &mut self.guest[GuestQueue::Tx as usize] else { return };
        let negotiated = features::transmit(self.shadow.features());
        let (shadow, counts, sources) = (&mut self.shadow, &mut self.outward, &mut self.sources);
        let looks = sources.looks();
        if looks {
            sources.set_time((self.clock)());
        }
        let outcome = match (shadow.verdict(), &mut self.link) {
            (FrameVerdict::Pass, LinkState::Up { link, in_flight, .. }) => {
                let flow = outward_flow(negotiated, link.features);
                let before = counts.frames;
                let outcome = if looks {
                    pump::pump(queue, &mut link.rx, &flow, &mut Outward { sources, in_flight }, counts)
                } else {
                    pump::pump(queue, &mut link.rx, &flow, in_flight, counts)
                };
                shadow.handed(counts.frames - before);
                outcome
            }
            (FrameVerdict::Log, _) => {
                let mut foreign = 0;
                let outcome = pump::drain(queue, negotiated, counts, |frame| {
                    let frame = frame.to_vec();
                    if sources.admits(pump::copied_source(&frame)) {
                        shadow.log(frame);
                    } else {
                        foreign += 1;
                    }
                });
                counts.foreign_source += foreign;
                outcome.map_err(guests_fault)
            }
            (FrameVerdict::Discard, _) => pump::drain(queue, negotiated, counts, |_| {}).map_err(guests_fault),
            (FrameVerdict::Hold | FrameVerdict::Pass, _) => return,
        };
        self.progress.note(matches!(outcome, Ok(Stop::TargetFull)));
        self.tell_foreign();
        self.after(outcome, GuestQueue::Tx);
    }

    /// Frames for the guest: only from a driver VM that was ordered to go live.
    pub(super) fn inward(&mut self) {
        let LinkState::Up { link, .. } = &mut self.link else { return };
        let Some(queue) = &mut self.guest[GuestQueue::Rx as usize] else { return };
        if self.shadow.link().is_none() {
            return;
        }
        let flow = Flow {
            source: Owner::DriverVm,
            negotiated: features::transmit(link.features),
            accepted: features::receive(self.shadow.features()),
            mergeable: features::mergeable(self.shadow.features()),
        };
        let outcome = if self.sources.looks() || self.shadow.verdict() != FrameVerdict::Pass {
            self.sources.set_time((self.clock)());
            let mut tap = Inward { sources: &mut self.sources, heard: false };
            let outcome = pump::pump(&mut link.tx, queue, &flow, &mut tap, &mut self.inward);
            if tap.heard {
                self.shadow.heard(link.id.generation);
            }
            outcome
        } else {
            pump::pump(&mut link.tx, queue, &flow, &mut pump::Off, &mut self.inward)
        };
        self.after(outcome, GuestQueue::Rx);
    }
}

fn guests_fault(fault: RingFault) -> PumpError {
    PumpError { owner: Owner::Guest, fault: fault.into() }
}

pub(super) fn outward_flow(negotiated: Offloads, link_features: u64) -> Flow {
    Flow {
        source: Owner::Guest,
        negotiated,
        accepted: features::receive(link_features),
        mergeable: features::mergeable(link_features),
    }
}
