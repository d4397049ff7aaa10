//! pvpanic (QEMU's `docs/specs/pvpanic`): a port by which the guest's kernel says that it has panicked, before it
//! reboots or stops. It says so once in a VM's life, which ends then; what comes after tells nothing, however often.

use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// The guest has panicked; the only event that is offered.
const PANICKED: u8 = 1;

/// The port.
#[derive(Debug)]
pub(super) struct Pvpanic {
    panicked: EventFd,
    told: AtomicBool,
}

impl Pvpanic {
    /// `panicked` is signalled at the first panic.
    pub(super) fn new(panicked: EventFd) -> Self {
        Self { panicked, told: AtomicBool::new(false) }
    }

    /// The guest has said that it has panicked.
    pub(super) fn told(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }

    /// Events that are offered.
    pub(super) fn read(&self) -> u8 {
        PANICKED
    }

    pub(super) fn write(&self, event: u8) {
        if event & PANICKED != 0
            && !self.told.swap(true, Ordering::Relaxed)
            && let Err(error) = self.panicked.write(1)
        {
            tracing::warn!(%error, "tell of the guest's panic");
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn a_guest_that_panics_without_end_is_heard_once() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let port = Pvpanic::new(event.try_clone().unwrap());
        port.write(2);
        assert!(event.read().is_err(), "no panic");
        for _ in 0..3 {
            port.write(port.read());
        }
        assert_eq!(event.read().unwrap(), 1);
        port.write(1);
        assert!(event.read().is_err());
    }
}
