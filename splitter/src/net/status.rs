//! What is told of a network splitter: its state, and what it has done.

use umbra_shadow::Generation;
use umbra_shadow::net::{MaskedCounts, ModeName};

use super::{GuestQueue, Kicker, NetSplitter};
use crate::link::LinkQueue;
use crate::pump::Counts;

/// State for `umbra status`.
#[derive(Clone, Copy, Debug)]
pub struct Status {
    /// The shadow's mode.
    pub mode: ModeName,
    /// Frames to the driver VM, live and replayed, and what was dropped.
    pub out: Counts,
    /// Frames to the guest.
    pub into: Counts,
    /// Kicks for either direction.
    pub kicks: Kicks,
    /// Frames in the log now.
    pub logged_now: usize,
    /// Sums over all outages.
    pub masked: MaskedCounts,
}

/// Kicks that the event loop has passed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kicks {
    /// By whoever has frames to go out, or has made room for them.
    pub out: u64,
    /// The same for frames that come in.
    pub into: u64,
}

impl Kicks {
    pub(super) fn note(&mut self, source: Kicker) {
        match source {
            Kicker::Guest(GuestQueue::Tx) | Kicker::Link(LinkQueue::Rx) => self.out += 1,
            Kicker::Guest(GuestQueue::Rx) | Kicker::Link(LinkQueue::Tx) => self.into += 1,
            Kicker::Guest(GuestQueue::Control) | Kicker::Spare => {}
        }
    }
}

impl NetSplitter {
    /// State for users.
    pub fn status(&self) -> Status {
        Status {
            mode: self.shadow.mode(),
            out: self.outward,
            into: self.inward,
            kicks: self.kicks,
            logged_now: self.shadow.logged_now(),
            masked: self.shadow.total(),
        }
    }

    /// Whose driver VM takes and brings frames now.
    pub fn serving(&self) -> Option<Generation> {
        self.link.generation().filter(|_| self.shadow.mode() == ModeName::Passive)
    }

    /// What was moved or dropped: from the guest, and to it.
    pub fn counts(&self) -> (Counts, Counts) {
        (self.outward, self.inward)
    }
}
