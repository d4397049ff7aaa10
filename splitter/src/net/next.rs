//! The link of the driver VM that waits to take over: set up ahead, while another generation serves.
//!
//! Invariants: nothing is sent through it before it is promoted, and what it brings in before is discarded; it is
//! promoted only when the serving link is lost; its own loss changes nothing for the guest. One that is *armed* (its
//! driver VM has a device of its own and forwards: a hot spare) goes live by itself when it is promoted.

use umbra_shadow::net::ModeName;
use umbra_shadow::{Generation, LinkId};

use super::announce::announcement;
use super::traffic::outward_flow;
use super::{InFlight, LinkState, NetSplitter, Notice, features};
use crate::header::Offloads;
use crate::link::{Cause, Link, LinkServer, What};
use crate::pump::{self, Counts, Handed, InPlace, Owner, PumpError, Stop};

/// The waiting link.
#[derive(Default)]
pub(super) struct WaitingLink {
    link: LinkState,
    /// The generation that is armed, whether its link waits now, or is still to come, or has taken the place of another for a while.
    armed: Option<Generation>,
    /// It has brought in a frame that the guest had sent through the serving one: both are on one network.
    proven: bool,
}

impl WaitingLink {
    pub(super) fn id(&self) -> Option<LinkId> {
        self.link.id()
    }

    /// The link whose frames are to be discarded.
    pub(super) fn armed_link(&self) -> Option<&Link> {
        match &self.link {
            LinkState::Up { link, .. } if self.is_armed() => Some(link),
            _ => None,
        }
    }

    pub(super) fn disarm(&mut self) {
        self.armed = None;
    }

    fn is_armed(&self) -> bool {
        self.armed.is_some() && self.armed == self.link.generation()
    }
}

impl NetSplitter {
    /// The driver VMs have `bytes` of memory; a link with more is refused. Without this call all sizes are taken.
    pub fn limit_memory(&mut self, bytes: u64) {
        self.link_memory = bytes;
    }

    /// The waiting driver VM of `generation` forwards and has its carrier (`armed`), or has not any more. Armed, its link goes live
    /// by itself when the serving one is lost. Called again for an armed link, it asks whether both are on one network; answered by
    /// [`Notice::SameNetwork`] if they are.
    pub fn arm(&mut self, generation: Generation, armed: bool) {
        self.take_events();
        if armed {
            self.next.armed = Some(generation);
        } else if self.next.armed == Some(generation) {
            self.next.disarm();
        }
        if self.next.link.generation() == Some(generation) {
            // Its kick is to be watched.
            self.wake_up();
            self.discard();
            if armed && !self.next.proven && self.shadow.mode() == ModeName::Passive {
                // A broadcast with the guest's address, from where that address is: it does no harm, and comes back
                // through the waiting link if that hears the same network.
                self.announce_here();
            }
        }
    }

    /// The driver VM of `generation` has another device than the one before: the guest's addresses are announced to the network
    /// when it goes live, or at once if it is live.
    pub fn announce(&mut self, generation: Generation) {
        self.take_events();
        if self.link.generation() == Some(generation) && self.shadow.mode() == ModeName::Passive {
            self.announce_here();
        } else {
            self.announce = Some(generation);
        }
    }

    /// Sends the announcement of each of the guest's addresses, and of those behind it, through the link, if it has room.
    pub(super) fn announce_here(&mut self) {
        let LinkState::Up { link, in_flight, .. } = &mut self.link else { return };
        let flow = outward_flow(Offloads::all(), link.features);
        let id = link.id;
        let mut outcome = Ok(Handed::Yes);
        self.sources.set_time((self.clock)());
        self.sources.announced();
        for mac in self.sources.to_announce(self.shadow.filter()) {
            // Of the splitter's own: no frame of the guest's is missing if it is lost.
            outcome = pump::hand(&mut link.rx, &flow, &announcement(mac), &mut in_flight.uncounted());
            if !matches!(outcome, Ok(Handed::Yes)) {
                break;
            }
        }
        let told = link.rx.notify().map_err(|fault| PumpError { owner: Owner::DriverVm, fault: fault.into() });
        if let Err(error) = outcome.and(told) {
            self.lose(id, error.into());
        }
    }

    /// A link begins: the one that serves, or the one that waits behind it.
    pub(super) fn connecting(&mut self, server: LinkServer) {
        let id = server.link();
        let new = LinkState::Connecting { server, go_live: false };
        let present = self.link.id().is_some();
        if present && self.link.generation() < Some(id.generation) {
            // Also behind a link that does not serve yet: a guest that starts gets the links of both lives at once.
            self.wait_behind(new);
        } else if self.link.generation() > Some(id.generation) {
            // The present link waited before, and took the place of a lost one, whose life is connected again now.
            let waiting = std::mem::replace(&mut self.link, new);
            self.wait_behind(waiting);
        } else {
            // The one that waits waits on.
            if let Some(old) = self.link.id() {
                self.part(old, Cause::GivenUp);
            }
            self.link = new;
            self.outward();
        }
    }

    /// `generation` is to serve: if it waits behind a link that has never served, that link is given up.
    pub(super) fn pass_over(&mut self, generation: Generation) {
        let Some(before) = self.link.id().filter(|id| self.shadow.link() != Some(*id)) else { return };
        if self.next.link.generation() == Some(generation) {
            self.lose(before, Cause::GivenUp);
        }
    }

    /// Makes `link` the one that waits, in place of any other.
    fn wait_behind(&mut self, link: LinkState) {
        let old = std::mem::replace(&mut self.next.link, link);
        self.next.proven = false;
        self.forget(old);
        // The set of kicks has changed.
        self.wake_up();
    }

    /// The link `id` cannot begin; if another link is there, that goes on.
    pub(super) fn lose_new(&mut self, id: LinkId, cause: Cause) {
        if self.link.id().is_some() {
            (self.listener)(Notice::LinkLost(id, cause));
        } else {
            self.lose(id, cause);
        }
    }

    /// News of the waiting link.
    pub(super) fn next_event(&mut self, what: What) {
        match (what, std::mem::take(&mut self.next.link)) {
            (What::Up(link), LinkState::Connecting { server, .. }) => {
                let id = server.link();
                self.next.link = LinkState::Up { server, link, in_flight: InFlight::default() };
                (self.listener)(Notice::LinkUp(id));
                self.discard();
            }
            (What::Calls, mut next) => {
                next.take_calls();
                self.next.link = next;
            }
            (What::Lost(cause), next) => {
                self.next.link = next;
                self.lose_next(cause);
            }
            (What::Up(link), next) => {
                self.retire(*link);
                self.next.link = next;
            }
        }
    }

    /// The waiting link is lost. The supervisor has to know, because it counts on it.
    fn lose_next(&mut self, cause: Cause) {
        tracing::debug!(?cause, "the waiting link is lost");
        let next = std::mem::take(&mut self.next);
        if let Some(id) = next.id() {
            (self.listener)(Notice::LinkLost(id, cause));
        }
        self.forget(next.link);
    }

    /// What an armed link brings in before it serves came to the guest through the serving one, or was not for it.
    pub(super) fn discard(&mut self) {
        if !self.next.is_armed() {
            return;
        }
        let WaitingLink { link: LinkState::Up { link, .. }, proven, .. } = &mut self.next else { return };
        let own = if *proven { Vec::new() } else { self.sources.own_of(self.shadow.filter()) };
        let (mut seen, mut heard) = (false, false);
        let look = |frame: &InPlace<'_, '_>| {
            let addresses = frame.addresses();
            seen |= own.contains(&addresses.source);
            heard |= self.sources.is_from_wire(&addresses);
        };
        let (generation, offloads) = (link.id.generation, features::transmit(link.features));
        let outcome = pump::drain(&mut link.tx, offloads, &mut Counts::default(), look);
        if heard {
            self.shadow.heard(generation);
        }
        if seen {
            *proven = true;
            (self.listener)(Notice::SameNetwork(generation));
        }
        match outcome {
            Ok(Stop::Budget) => self.wake_up(),
            Ok(Stop::SourceEmpty | Stop::TargetFull) => {}
            Err(fault) => self.lose_next(PumpError { owner: Owner::DriverVm, fault: fault.into() }.into()),
        }
    }

    /// The serving link is lost: the waiting one takes its place. It masks until it is ordered to go live, unless it is armed and
    /// the lost one has `served`: whether to replay a log that a driver VM died of is for the supervisor to decide.
    pub(super) fn promote(&mut self, served: bool) {
        if self.link.id().is_some() {
            return;
        }
        self.discard();
        let armed = self.next.is_armed();
        self.link = std::mem::take(&mut self.next.link);
        self.next.proven = false;
        let Some(id) = self.link.id() else { return };
        self.wake_up();
        if armed && served {
            self.announce = Some(id.generation);
            self.go_live_now(id, super::Log::Replay);
        }
    }

    fn forget(&mut self, link: LinkState) {
        if let LinkState::Up { link, .. } = link {
            self.retire(*link);
        }
    }
}
