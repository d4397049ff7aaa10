//! Timers for event loops.

use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};

/// A timer of the monotonic clock that is not set; reading it does not wait.
///
/// # Errors
/// No file descriptor is left (timerfd_create(2)).
pub fn monotonic() -> nix::Result<TimerFd> {
    TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)
}
