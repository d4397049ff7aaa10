//! `INTA#` of a virtio function and its ISR status (virtio 1.2, section 4.1.4.5), for drivers without MSI-X: old ones, and kernels that
//! are told `pci=nomsi`.
//!
//! ```text
//!   device signals a call ─> bit of ISR status, line raised (irqfd)       driver reads ISR status: bits are 0
//!   driver's EOI ─> KVM lowers the line, signals `resample` ─> raised again if a bit was set since
//! ```
//! While the command register disables `INTx#` the line is not raised; when that is over, it is if a bit is set (PCI 3.0, section 6.2.2).
//! Devices signal eventfds as with MSI-X, also from other processes; a thread of the line turns them into bits. It is there only while
//! a driver uses the line.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use umbra_splitter::threads::{self, Purpose};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::base::lock::lock;
use crate::vm::interrupt::{self, Interrupts};

/// What an interrupt is about: a bit of ISR status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum About {
    /// A queue.
    Queue = 1,
    /// The device's configuration.
    Config = 2,
}

/// The interrupt controller's pin.
pub(super) trait Pin: Send + Sync {
    /// Writes to `trigger` raise the line; the driver's EOI lowers it and signals `resample`.
    fn bind(&self, trigger: &EventFd, resample: &EventFd) -> Result<(), interrupt::Error>;

    /// Undoes [`Self::bind`].
    fn unbind(&self, trigger: &EventFd) -> Result<(), interrupt::Error>;
}

/// The pin of a VM that `_PRT` names.
pub(super) struct Gsi(pub(super) Arc<Interrupts>, pub(super) u32);

impl Pin for Gsi {
    fn bind(&self, trigger: &EventFd, resample: &EventFd) -> Result<(), interrupt::Error> {
        self.0.bind_intx(self.1, trigger, resample)
    }

    fn unbind(&self, trigger: &EventFd) -> Result<(), interrupt::Error> {
        self.0.unbind(self.1, trigger)
    }
}

/// A line that a driver uses.
pub(super) struct Line {
    queue: EventFd,
    config: EventFd,
    over: EventFd,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    status: Mutex<Status>,
    trigger: EventFd,
}

#[derive(Default)]
struct Status {
    /// ISR status.
    bits: u8,
    /// The driver has disabled the line.
    is_disabled: bool,
    /// The line was raised, and the driver's EOI has not come.
    is_raised: bool,
}

impl Line {
    /// Binds the line to `pin`, disabled or not, and starts its thread.
    pub(super) fn new(pin: Arc<dyn Pin>, is_disabled: bool) -> Result<Self, interrupt::Error> {
        let event = || EventFd::new(EFD_NONBLOCK).map_err(interrupt::Error::EventFd);
        let copy = |event: &EventFd| event.try_clone().map_err(interrupt::Error::EventFd);
        let (queue, config, over, resample) = (event()?, event()?, event()?, event()?);
        let shared =
            Arc::new(Shared { status: Mutex::new(Status { is_disabled, ..Status::default() }), trigger: event()? });
        let watched = [copy(&queue)?, copy(&config)?, copy(&resample)?, copy(&over)?];
        let its = Arc::clone(&shared);
        pin.bind(&shared.trigger, &resample)?;
        let work = move || {
            its.run(&watched);
            if let Err(error) = pin.unbind(&its.trigger) {
                tracing::debug!("unbind the line of a virtio device: {error}");
            }
        };
        let thread = threads::spawn(Purpose::Helper, "virtio-intx", work);
        let thread = Some(thread.map_err(interrupt::Error::EventFd)?);
        Ok(Self { queue, config, over, shared, thread })
    }

    /// The eventfd of an interrupt.
    pub(super) fn call(&self, about: About) -> &EventFd {
        match about {
            About::Queue => &self.queue,
            About::Config => &self.config,
        }
    }

    /// The driver has disabled the line, or not.
    pub(super) fn set_disabled(&self, is_disabled: bool) {
        let mut status = lock(&self.shared.status);
        status.is_disabled = is_disabled;
        self.shared.raise(&mut status);
    }

    /// Whether an interrupt is pending, disabled or not.
    pub(super) fn is_pending(&self) -> bool {
        lock(&self.shared.status).bits != 0
    }

    /// ISR status, which a read clears.
    pub(super) fn take_status(&self) -> u8 {
        std::mem::take(&mut lock(&self.shared.status).bits)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        // Its only write.
        let _ = self.over.write(1);
        // It waits for nothing any more. A driver that resets its device without end is not to make threads faster than they end.
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Until the line is given up; what is watched is queue, configuration, EOI, end.
    fn run(&self, watched: &[EventFd; 4]) {
        let [queue, config, resample, over] = watched;
        loop {
            let mut fds = watched.each_ref().map(|event| {
                // SAFETY: the eventfd is open as long as the borrow, which ends with this turn.
                let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
                PollFd::new(fd, PollFlags::POLLIN)
            });
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    return tracing::error!("wait for a virtio device's interrupts: {}", io::Error::from(errno));
                }
            }
            if over.read().is_ok() {
                return;
            }
            // EOI first: what is signalled behind it raises the line again.
            if resample.read().is_ok() {
                self.lowered();
            }
            for (event, about) in [(queue, About::Queue), (config, About::Config)] {
                if event.read().is_ok() {
                    self.signalled(about);
                }
            }
        }
    }

    fn signalled(&self, about: About) {
        let mut status = lock(&self.status);
        status.bits |= about as u8;
        self.raise(&mut status);
    }

    /// KVM has lowered the line.
    fn lowered(&self) {
        let mut status = lock(&self.status);
        status.is_raised = false;
        self.raise(&mut status);
    }

    /// Raises the line if something is pending and it is not up.
    fn raise(&self, status: &mut Status) {
        if status.bits != 0 && !status.is_disabled && !std::mem::replace(&mut status.is_raised, true) {
            // Fails only when 2^64 - 2 interrupts wait: then one waits anyway.
            let _ = self.trigger.write(1);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// A pin that a test looks at: trigger and resample of the line that is bound to it.
    #[derive(Default)]
    pub(in super::super) struct FakePin(pub(in super::super) Mutex<Option<(EventFd, EventFd)>>);

    impl Pin for FakePin {
        fn bind(&self, trigger: &EventFd, resample: &EventFd) -> Result<(), interrupt::Error> {
            *lock(&self.0) = Some((trigger.try_clone().unwrap(), resample.try_clone().unwrap()));
            Ok(())
        }

        /// Takes a while, as KVM does.
        fn unbind(&self, _: &EventFd) -> Result<(), interrupt::Error> {
            std::thread::sleep(Duration::from_millis(10));
            *lock(&self.0) = None;
            Ok(())
        }
    }

    impl FakePin {
        /// Waits until the line is raised.
        pub(in super::super) fn await_raised(&self) {
            self.until("raised", |bound| bound.as_ref().is_some_and(|(trigger, _)| trigger.read().is_ok()));
        }

        fn until(&self, what: &str, wanted: impl Fn(&Option<(EventFd, EventFd)>) -> bool) {
            let until = Instant::now() + Duration::from_secs(60);
            while !wanted(&lock(&self.0)) {
                assert!(Instant::now() < until, "not {what}");
                std::thread::sleep(Duration::from_millis(1));
            }
        }

        pub(in super::super) fn is_raised(&self) -> bool {
            lock(&self.0).as_ref().unwrap().0.read().is_ok()
        }

        pub(in super::super) fn end_of_interrupt(&self) {
            lock(&self.0).as_ref().unwrap().1.write(1).unwrap();
        }
    }

    #[test]
    fn what_comes_before_the_end_of_an_interrupt_raises_the_line_again() {
        let pin = Arc::new(FakePin::default());
        let line = Line::new(Arc::clone(&pin) as _, false).unwrap();
        assert_eq!(line.take_status(), 0);
        line.call(About::Queue).write(1).unwrap();
        pin.await_raised();
        assert_eq!((line.take_status(), line.take_status()), (1, 0));
        // While the driver looks at its queues.
        line.call(About::Config).write(1).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while lock(&line.shared.status).bits == 0 {
            assert!(Instant::now() < until, "the call is not seen");
        }
        assert!(!pin.is_raised(), "it is up");
        pin.end_of_interrupt();
        pin.await_raised();
        assert_eq!(line.take_status(), 2);
        pin.end_of_interrupt();
        line.call(About::Queue).write(1).unwrap();
        pin.await_raised();
        // A driver that resets its device without end leaves no more threads and bindings behind than one.
        drop(line);
        assert!(lock(&pin.0).is_none(), "given up");
    }
}
