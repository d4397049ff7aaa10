//! How a VM ends: the first reason counts, stops every vCPU and wakes the event loop.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::wire::messages::VmEnd;

/// The end of one VM, shared by its vCPUs, devices and event loop.
#[derive(Debug)]
pub struct End {
    how: OnceLock<VmEnd>,
    stopped: AtomicBool,
    event: EventFd,
}

impl End {
    /// Not ended yet.
    pub fn new() -> std::io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { how: OnceLock::new(), stopped: AtomicBool::new(false), event })
    }

    /// Ends the VM. The first call counts.
    pub fn set(&self, how: VmEnd) {
        if self.how.set(how).is_err() {
            return;
        }
        self.stopped.store(true, Ordering::Release);
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "wake the event loop for the VM's end");
        }
    }

    /// How the VM has ended, if it has.
    pub fn get(&self) -> Option<VmEnd> {
        self.how.get().copied()
    }

    /// True once the VM has ended; cheap enough for each exit of a vCPU.
    pub fn is_set(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Readable once the VM has ended.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}
