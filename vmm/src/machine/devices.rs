//! From the pieces of a VM's spec to devices on its PCI bus: a short `match` each; how a device is made is the
//! device's own business.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use event_manager::EventManager;
use thiserror::Error;

use super::vm::Vm;
use crate::process::host::Host;
use crate::process::ipc::{ToVm, VmSpec};
use crate::process::vm::Subscriber;

/// Errors of adding devices.
#[derive(Debug, Error)]
pub enum Error {}

/// The devices that the supervisor speaks with.
#[derive(Default)]
pub struct Devices {}

/// Makes the devices of `spec` and puts them on the bus and into the event loop.
pub fn add(
    vm: &Vm,
    spec: &VmSpec,
    host: &Arc<Host>,
    events: &mut EventManager<Subscriber>,
) -> Result<Devices, Error> {
    let _ = (vm, spec, host, events);
    Ok(Devices {})
}

impl Devices {
    /// A message of the supervisor that concerns a device.
    pub fn handle(&mut self, message: ToVm, fds: Vec<OwnedFd>, host: &Host) {
        let _ = (message, fds, host);
    }
}
