//! Bad news about a passed-through function: the device reports an error, interrupts without end, the host wants it
//! back, or it is gone. Whoever runs the VM decides what to do.

use std::fs::File;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};
use nix::sys::timerfd::{Expiration, TimerFd, TimerSetTimeFlags};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::storm::StormWatch;
use crate::base::pci_address::Bdf;
use crate::base::timer;
use crate::host::error::Error;
use crate::host::irq::Index;
use crate::host::region::{HostFunction, Presence};

/// What happened to a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceFailure {
    /// An uncorrectable error was reported (PCI Express AER); its state is undefined.
    DeviceError,
    /// The host wants to take the device away (it is unbound or unplugged).
    RemovalRequested,
    /// It does not answer any more.
    Vanished,
    /// Something else than its driver has switched it off or reset it.
    SwitchedOff,
    /// One of its interrupts comes this many times a second, more than is allowed.
    InterruptStorm(u32),
}

impl std::fmt::Display for DeviceFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::DeviceError => f.write_str("the device reported an uncorrectable error"),
            Self::RemovalRequested => f.write_str("the host wants the device back"),
            Self::Vanished => f.write_str("the device does not answer any more"),
            Self::SwitchedOff => f.write_str("the device was switched off or reset by something else than its driver"),
            Self::InterruptStorm(rate) => write!(f, "interrupt storm: the device interrupts {rate} times a second"),
        }
    }
}

/// Interval at which the function's command register is read and its interrupts are counted.
const LOOK_EVERY: Duration = Duration::from_secs(1);

fn timer() -> nix::Result<TimerFd> {
    let timer = timer::monotonic()?;
    timer.set(Expiration::Interval(LOOK_EVERY.into()), TimerSetTimeFlags::empty())?;
    Ok(timer)
}

/// Reports each failure of one function to a callback. Subscribe it to the VM's event loop.
pub struct FailureWatch {
    bdf: Bdf,
    error: EventFd,
    request: EventFd,
    vanished: EventFd,
    /// The function that is looked at. A strong reference would keep the device open.
    host: Weak<HostFunction>,
    looks: TimerFd,
    /// What the last look found.
    last: Presence,
    storm: Option<StormWatch>,
    tell: Box<dyn FnMut(Bdf, DeviceFailure) + Send>,
}

impl FailureWatch {
    /// `storm`: most interrupts a second that are no failure, and the host's counters; `None`: no limit.
    pub(super) fn new(
        host: &Arc<HostFunction>,
        storm: Option<(NonZeroU32, Arc<File>)>,
        tell: Box<dyn FnMut(Bdf, DeviceFailure) + Send>,
    ) -> Result<Self, Error> {
        let bdf = host.bdf();
        let failed = |source| Error::EventFd { bdf, source };
        let event = || EventFd::new(EFD_NONBLOCK).map_err(failed);
        let vanished = host.vanished().try_clone().map_err(failed)?;
        let looks = timer().map_err(|errno| failed(errno.into()))?;
        let (last, weak) = (Presence::Present, Arc::downgrade(host));
        let storm = storm.map(|(limit, counters)| StormWatch::new(bdf, counters, limit));
        let this = Self { bdf, error: event()?, request: event()?, vanished, host: weak, looks, last, storm, tell };
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

    /// Reports what two looks in a row have found: at one look a driver may be about to switch something.
    fn look(&mut self) {
        // With nothing to read, this look is an extra one, which does no harm.
        let _ = self.looks.wait();
        let Some(host) = self.host.upgrade() else { return };
        let now = host.look();
        let failure = match now {
            Presence::Present => None,
            Presence::SwitchedOff => Some(DeviceFailure::SwitchedOff),
            Presence::Absent => Some(DeviceFailure::Vanished),
        };
        let failure = failure.filter(|_| now == self.last);
        let storm = self.storm.as_mut().and_then(|storm| storm.look(Instant::now()));
        if let Some(failure) = failure.or(storm.map(DeviceFailure::InterruptStorm)) {
            // One report is enough.
            let _ = self.looks.unset();
            (self.tell)(self.bdf, failure);
        }
        self.last = now;
    }

    fn sources(&self) -> [(&EventFd, DeviceFailure); 3] {
        [
            (&self.error, DeviceFailure::DeviceError),
            (&self.request, DeviceFailure::RemovalRequested),
            (&self.vanished, DeviceFailure::Vanished),
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
        if let Err(error) = ops.add(Events::new_raw(self.looks.as_fd().as_raw_fd(), EventSet::IN)) {
            tracing::error!("{}: watch for failures: {error:?}", self.bdf);
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.fd() == self.looks.as_fd().as_raw_fd() {
            return self.look();
        }
        let found = self.sources().into_iter().find(|(event, _)| event.as_raw_fd() == events.fd());
        let Some((event, failure)) = found else { return };
        // The kernel repeats a removal request while the device is open: each is one event.
        let _ = event.read();
        (self.tell)(self.bdf, failure);
    }
}
