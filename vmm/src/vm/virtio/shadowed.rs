//! What the supervisor can ask of a guest's device that has a shadow, whatever its class.

use std::os::unix::net::UnixStream;

use umbra_shadow::{Generation, LinkId};

use super::disk::SplitDisk;
use super::net::split::SplitNet;
use super::sound::Sound;
use crate::wire::messages::{FromVm, ToVm};

/// A guest's device that a driver VM serves. Each call returns at once.
pub trait Shadowed: Send {
    /// [`ToVm::Attach`]: the other end of a connection with a driver VM. One that is older than what is known is closed.
    fn attach(&mut self, link: LinkId, socket: UnixStream);

    /// [`ToVm::Mask`]: the driver VM of `generation` has failed.
    fn mask(&mut self, generation: Generation);

    /// [`ToVm::Quarantine`]: there will be no driver VM for now; the guest gets what its class says (link down, a
    /// dead card, failed requests).
    fn quarantine(&mut self);

    /// What only this class knows: [`ToVm::GoLive`], [`ToVm::Arm`], [`ToVm::Carrier`] of a network device; [`ToVm::Quiesce`],
    /// [`ToVm::GoOn`] of a disk.
    fn order(&mut self, message: &ToVm);

    /// The answer to [`ToVm::QueryStatus`].
    fn status(&self) -> FromVm;
}

impl Shadowed for SplitNet {
    fn attach(&mut self, link: LinkId, socket: UnixStream) {
        Self::attach(self, link, socket);
    }

    fn mask(&mut self, generation: Generation) {
        Self::mask(self, generation);
    }

    fn quarantine(&mut self) {
        Self::quarantine(self);
    }

    fn order(&mut self, message: &ToVm) {
        match *message {
            ToVm::GoLive { generation, replay, announce, .. } => self.go_live(generation, replay, announce),
            ToVm::Arm { generation, armed, .. } => self.arm(generation, armed),
            ToVm::Carrier { generation, up, .. } => self.carrier(generation, up),
            _ => tracing::error!(?message, "an order that a network device does not know"),
        }
    }

    fn status(&self) -> FromVm {
        Self::status(self)
    }
}

impl Shadowed for Sound {
    fn attach(&mut self, link: LinkId, socket: UnixStream) {
        Self::attach(self, link, socket);
    }

    fn mask(&mut self, generation: Generation) {
        Self::mask(self, generation);
    }

    fn quarantine(&mut self) {
        Self::quarantine(self);
    }

    fn order(&mut self, message: &ToVm) {
        tracing::error!(?message, "an order that a sound device does not know");
    }

    fn status(&self) -> FromVm {
        Self::status(self)
    }
}

impl Shadowed for SplitDisk {
    fn attach(&mut self, link: LinkId, socket: UnixStream) {
        Self::attach(self, link, socket);
    }

    fn mask(&mut self, generation: Generation) {
        Self::mask(self, generation);
    }

    fn quarantine(&mut self) {
        Self::quarantine(self);
    }

    fn order(&mut self, message: &ToVm) {
        Self::order(self, message);
    }

    fn status(&self) -> FromVm {
        Self::status(self)
    }
}
