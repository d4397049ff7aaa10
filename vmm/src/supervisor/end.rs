//! The end of the machine: what it waits for, and what it ends without.
//!
//! Invariant: no process is waited for without a limit. One that was killed and that the kernel does not let end is given up after
//! [`RESET_PATIENCE`], named, and left to the next run of the machine, which waits for it as far as it can still be told by its words.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::driver::DriverVm;
use super::guest::GuestVm;
use super::run::Supervisor;
use crate::base::time::Time;
use crate::lifecycle::RESET_PATIENCE;

/// Longest wait at the end of the run for resets that are under way. A bus reset takes a second.
const LAST_RESET: Duration = Duration::from_secs(5);

/// Whether each of these processes was `killed` so long ago that the kernel does not let it end.
pub(super) fn all_hang(mut killed: impl Iterator<Item = Option<Time>>, now: Time) -> bool {
    killed.all(|killed| killed.is_some_and(|killed| killed + RESET_PATIENCE <= now))
}

impl Supervisor {
    /// All guests have ended, and so have the driver VMs.
    pub(super) fn is_over(&self) -> bool {
        let now = Time::now();
        self.is_done() && self.drivers.iter().all(|driver| driver.has_ended(now))
    }

    /// Whether no guest is waited for: all have ended, or, where the machine is stopped, hang.
    pub(super) fn have_guests_ended(&self) -> bool {
        let now = Time::now();
        let hangs = |guest: &GuestVm| self.stopping.is_some() && all_hang(std::iter::once(guest.killed), now);
        self.guests.iter().all(|guest| guest.is_over() || hangs(guest))
    }

    /// When a process that was killed is waited for no longer.
    pub(super) fn hung_due(&self) -> Option<Time> {
        let now = Time::now();
        let guests = self.guests.iter().filter_map(|guest| guest.killed.filter(|_| guest.process.is_some()));
        let drivers = self.drivers.iter().filter(|driver| driver.is_being_stopped()).flat_map(DriverVm::killed);
        guests.chain(drivers).map(|killed| killed + RESET_PATIENCE).filter(|due| *due > now).min()
    }

    /// The processes that have not been seen to end: their numbers, and what is readable when they have ended.
    fn processes(&self) -> Vec<(u32, OwnedFd)> {
        let guests = self.guests.iter().filter_map(|guest| guest.process.as_ref());
        let processes = guests.chain(self.drivers.iter().flat_map(DriverVm::processes));
        let own = |pidfd: BorrowedFd<'_>| pidfd.try_clone_to_owned().ok();
        processes.filter_map(|process| Some((process.pid(), own(process.pidfd())?))).collect()
    }

    /// Waits for resets that are under way, for [`LAST_RESET`] at most: until a reset returns, the device's order of reset methods
    /// in sysfs is changed. What has not ended by then, `hung` processes included, is left to the next run to clean up.
    pub(super) fn finish_resets(&mut self, hung: &[u32]) {
        let until = Time::now() + LAST_RESET;
        let mut jobs = self.drivers.iter().flat_map(|driver| {
            driver.resetting.iter().chain(driver.spare.iter().filter_map(|spare| spare.resetting.as_ref()))
        });
        if !jobs.all(|job| job.wait(until)) || !hung.is_empty() {
            self.run_dir.leave_to_the_next();
        }
        for pid in hung {
            self.events.warn(format!(
                "the process {pid} of a VM was killed and has not ended: the kernel holds it, perhaps over its device (`dmesg`); \
                 the machine ends without it"
            ));
        }
    }

    /// Kills what still runs and waits for it, before the terminal is restored. Those that have not ended by then.
    pub(super) fn end_processes(&mut self) -> Vec<u32> {
        let pidfds: Vec<_> = self.processes();
        self.drivers.iter_mut().for_each(|driver| (driver.life, driver.dying) = (None, None));
        self.drivers.iter_mut().for_each(|driver| (driver.standby, driver.second) = (None, None));
        self.drivers.iter_mut().for_each(|driver| driver.ending.clear());
        self.guests.iter_mut().for_each(|guest| guest.process = None);
        let runs = |pidfd: &OwnedFd| {
            poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ended| ended == 0)
        };
        pidfds.into_iter().filter(|(_, pidfd)| runs(pidfd)).map(|(pid, _)| pid).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_does_not_wait_for_ever_for_a_process_that_was_killed() {
        let at = |s: u64| Time(s * 1_000_000_000);
        let hang = |killed: &[Option<Time>], now| all_hang(killed.iter().copied(), now);
        assert!(hang(&[], at(0)), "there is none");
        assert!(!hang(&[None], at(1_000_000)), "it is not killed yet");
        assert!(!hang(&[Some(at(1)), Some(at(2))], at(76)));
        assert!(hang(&[Some(at(1)), Some(at(2))], at(77)));
    }
}
