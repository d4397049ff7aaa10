//! Timers for event loops.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// A timer of the monotonic clock that is not set; reading it does not wait.
///
/// # Errors
/// No file descriptor is left (timerfd_create(2)).
pub fn monotonic() -> nix::Result<TimerFd> {
    TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)
}

/// A timer for one deadline, which is moved often: a system call only where it changes.
#[derive(Debug)]
pub struct DeadlineTimer {
    timer: TimerFd,
    /// Time that the timer is set to, ns.
    due: Option<u64>,
}

impl DeadlineTimer {
    /// Not set.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> nix::Result<Self> {
        Ok(Self { timer: monotonic()?, due: None })
    }

    /// Readable from the deadline on.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// To be called when it was readable.
    pub fn expired(&mut self) {
        let _ = self.timer.wait();
        self.due = None;
    }

    /// Moves the deadline to `due` of `CLOCK_MONOTONIC`, ns; none: there is no deadline.
    pub fn set(&mut self, due: Option<u64>) {
        if due == self.due {
            return;
        }
        let result = match due {
            // A time of 0 would turn the timer off.
            Some(at) => {
                let at = TimeSpec::from(Duration::from_nanos(at.max(1)));
                self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)
            }
            None => self.timer.unset(),
        };
        match result {
            Ok(()) => self.due = due,
            Err(error) => tracing::error!(%error, "set a timer"),
        }
    }
}
