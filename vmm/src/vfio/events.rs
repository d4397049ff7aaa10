//! Bad news about a passed-through function: the device reports an error, the host wants it back, or it is
//! gone. Whoever runs the VM decides what to do.

use std::os::fd::AsRawFd;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::error::Error;
use super::irq::Index;
use super::region::HostFunction;
use crate::pci::address::Bdf;

/// What happened to a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// An uncorrectable error was reported (PCI Express AER); its state is undefined.
    DeviceError,
    /// The host wants to take the device away (it is unbound or unplugged).
    RemovalRequested,
    /// It does not answer any more.
    Vanished,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::DeviceError => "the device reported an uncorrectable error",
            Self::RemovalRequested => "the host wants the device back",
            Self::Vanished => "the device does not answer any more",
        })
    }
}

/// Tells a callback about each failure of one function. Subscribe it to the VM's event loop.
pub struct FailureWatch {
    bdf: Bdf,
    error: EventFd,
    request: EventFd,
    vanished: EventFd,
    tell: Box<dyn FnMut(Bdf, Failure) + Send>,
}

impl FailureWatch {
    pub(super) fn new(host: &HostFunction, tell: Box<dyn FnMut(Bdf, Failure) + Send>) -> Result<Self, Error> {
        let bdf = host.bdf();
        let failed = |source| Error::EventFd { bdf, source };
        let event = || EventFd::new(EFD_NONBLOCK).map_err(failed);
        let vanished = host.vanished().try_clone().map_err(failed)?;
        let this = Self { bdf, error: event()?, request: event()?, vanished, tell };
        for (index, event) in [(Index::Error, &this.error), (Index::Request, &this.request)] {
            // Conventional PCI devices have no error event.
            if host.irq_count(index) > 0 {
                host.irq_enable(index, &[event]).map_err(|source| Error::HostInterrupt {
                    kind: "error events",
                    bdf,
                    source,
                })?;
            }
        }
        Ok(this)
    }

    fn sources(&self) -> [(&EventFd, Failure); 3] {
        [
            (&self.error, Failure::DeviceError),
            (&self.request, Failure::RemovalRequested),
            (&self.vanished, Failure::Vanished),
        ]
    }
}

impl MutEventSubscriber for FailureWatch {
    fn init(&mut self, ops: &mut EventOps) {
        for (event, _) in self.sources() {
            if let Err(error) = ops.add(Events::new(event, EventSet::IN)) {
                tracing::error!("{}: watch for failures: {error:?}", self.bdf);
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let found = self.sources().into_iter().find(|(event, _)| event.as_raw_fd() == events.fd());
        let Some((event, failure)) = found else { return };
        // The kernel repeats a removal request while the device is open: each is one event.
        let _ = event.read();
        (self.tell)(self.bdf, failure);
    }
}
