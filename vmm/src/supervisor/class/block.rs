//! Disks: what is different from the network. A guest with a disk is started when the disk is known, and its device goes live by itself,
//! as soon as the disk service has greeted it.

use umbra_driver_vm::block_protocol::BLOCK_PORT;

use super::Traits;
use crate::wire::messages::{PortBackend, PortEnd};

pub(super) const TRAITS: Traits = Traits {
    // Its session with the disk service.
    begins_with_device: true,
    greets: true,
    has_carrier: false,
    // A controller carries out what it was given, and no more.
    runs_on: false,
};

/// The driver VM's end `n`: a port, whose queues the guest's process serves.
pub(super) fn end_backend(n: usize) -> PortBackend {
    PortBackend { name: format!("{BLOCK_PORT}.{n}"), end: PortEnd::VhostUser }
}
