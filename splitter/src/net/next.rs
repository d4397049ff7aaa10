//! The link of the driver VM that waits to take over: set up ahead, while another generation serves.
//!
//! Invariants: it carries nothing before it is promoted; it is promoted only when the serving link is lost; its own
//! loss changes nothing for the guest.

use umbra_shadow::Generation;

use super::{InFlight, LinkState, NetSplitter, Notice};
use crate::link::{Cause, LinkServer, What};

/// The waiting link.
#[derive(Default)]
pub(super) struct Next(LinkState);

impl Next {
    pub(super) fn generation(&self) -> Option<Generation> {
        self.0.generation()
    }
}

impl NetSplitter {
    /// A link begins: the one that serves, or the one that waits behind it.
    pub(super) fn connecting(&mut self, server: LinkServer) {
        let new = LinkState::Connecting { server, go_live: false };
        let serving = self.link.generation().filter(|g| self.shadow.generation() == Some(*g));
        if serving.is_none() {
            if let Some(old) = self.link.generation() {
                self.lose(old, Cause::GivenUp);
            }
            self.link = new;
        } else {
            let old = std::mem::replace(&mut self.next.0, new);
            self.forget(old);
        }
    }

    /// News of the waiting link.
    pub(super) fn next_event(&mut self, what: What) {
        match (what, std::mem::take(&mut self.next.0)) {
            (What::Up(link), LinkState::Connecting { server, .. }) => {
                let generation = server.generation();
                self.next.0 = LinkState::Up { server, link, in_flight: InFlight::default() };
                (self.listener)(Notice::LinkUp(generation));
            }
            (What::Call(queue, call), mut next) => {
                next.set_call(queue, call);
                self.next.0 = next;
            }
            (What::Lost(cause), next) => {
                tracing::debug!(?cause, "the waiting link is lost");
                self.forget(next);
            }
            (What::Up(link), next) => {
                self.retire(*link);
                self.next.0 = next;
            }
        }
    }

    /// The serving link is lost: the waiting one takes its place, and masks until it is told to go live.
    pub(super) fn promote(&mut self) {
        if self.link.generation().is_some() {
            return;
        }
        self.link = std::mem::take(&mut self.next.0);
        if self.link.generation().is_some() {
            self.wake_up();
        }
    }

    fn forget(&mut self, link: LinkState) {
        if let LinkState::Up { link, .. } = link {
            self.retire(*link);
        }
    }
}
