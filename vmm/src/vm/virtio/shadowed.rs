//! What the supervisor can ask of a guest's device that has a shadow, whatever its class.

use std::os::unix::net::UnixStream;

use umbra_shadow::{Generation, LinkId};

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

    /// The VM has ended: nothing more comes of its guest, and what that was told is done is to become stable.
    fn finish(&mut self) {}

    /// Whether something that the guest was told is done would be lost with its driver VM, if this process ended now. It is not, if the
    /// driver VM lives: its agent makes it stable.
    fn keeps(&self) -> bool {
        false
    }
}
