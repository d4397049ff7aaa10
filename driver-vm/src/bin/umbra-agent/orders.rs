//! What the main loop wants of the network thread, or of the disk service. Never waits for it: an order that has not been taken yet is
//! replaced by the next of its kind. So a guest that changes its mind while the network stack is locked costs one order at a time.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use umbra_driver_vm::protocol::{Offloads, RxMode};

/// What has been ordered and not been taken yet.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// What guests receive from now on, by end.
    pub modes: BTreeMap<u16, RxMode>,
    /// What guests can take from now on, by end.
    pub offloads: BTreeMap<u16, Offloads>,
    /// All modules are loaded.
    pub loaded: bool,
    /// The device has come: from now on it has to appear within its time.
    pub device_has_come: bool,
    /// The guests' frames, or their orders to disks, are no longer to be taken.
    pub stall: bool,
    /// The disks are to be flushed, once no guest is served any more.
    pub rest: bool,
}

impl Orders {
    /// Orders what the guest at `end` receives.
    pub fn set_mode(&mut self, end: u16, mode: RxMode) {
        self.modes.insert(end, mode);
    }

    /// Orders what the guest at `end` can take.
    pub fn set_offloads(&mut self, end: u16, offloads: Offloads) {
        self.offloads.insert(end, offloads);
    }
}

/// Orders on their way between two threads.
#[derive(Debug)]
pub struct Mailbox {
    orders: Mutex<Orders>,
    wake: EventFd,
}

impl Mailbox {
    /// An empty mailbox.
    ///
    /// # Errors
    /// When the kernel has no event descriptor left.
    pub fn new() -> Result<Self, Errno> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { orders: Mutex::default(), wake })
    }

    /// Adds to what is ordered and wakes the thread that takes it.
    pub fn order(&self, change: impl FnOnce(&mut Orders)) {
        change(&mut self.lock());
        // A counter that is full wakes as well.
        let _ = self.wake.write(1);
    }

    /// Takes what has been ordered since the last time.
    pub fn take(&self) -> Orders {
        let _ = self.wake.read(); // before the orders, so that none stays unseen
        std::mem::take(&mut *self.lock())
    }

    /// Readable when [`Mailbox::take`] has something new.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn lock(&self) -> MutexGuard<'_, Orders> {
        // What is in there is whole after every statement.
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn is_readable(mailbox: &Mailbox) -> bool {
        let mut polled = [PollFd::new(mailbox.descriptor(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn the_last_order_of_its_kind_counts_and_is_taken_once() {
        let mailbox = Mailbox::new().unwrap();
        assert!(!is_readable(&mailbox));
        let off = Offloads { checksum: false, tso4: false, tso6: false };
        for all_multicast in [true, false, true] {
            mailbox.order(|orders| orders.set_mode(1, RxMode { all_multicast, ..RxMode::default() }));
        }
        mailbox.order(|orders| orders.set_offloads(0, off));
        mailbox.order(|orders| orders.stall = true);
        assert!(is_readable(&mailbox));
        let mode = RxMode { all_multicast: true, ..RxMode::default() };
        let (modes, offloads) = (BTreeMap::from([(1, mode)]), BTreeMap::from([(0, off)]));
        assert_eq!(mailbox.take(), Orders { modes, offloads, stall: true, ..Orders::default() });
        assert!(!is_readable(&mailbox));
        assert_eq!(mailbox.take(), Orders::default());
    }
}
