//! Coming to rest: before a deliberate reset of a device that loses something by it (a controller with a volatile cache), what guests
//! have had acknowledged is made stable.
//!
//! ```text
//!   umbra restart              guests' devices rest, as late as can be; the agent flushes ---> the next driver VM takes over
//!   umbra stop/reboot --force  the guest's devices rest -----------------> its process is killed
//!   a guest's panic, on_crash  the guest's devices rest -----------------> its process is killed
//!     where one cannot rest, as its driver VM is away: the next one takes what it keeps ---> its process ends
//!   end of the machine         guests end ---> the agent flushes --------> the driver VM is ended
//! ```
//! A guest that powers off or resets by itself is not asked: its process goes on until a flush has made stable what its guest was told is
//! done (`vm::process`), over the death of a driver VM too, and ends; the driver VM serves on, and the agent flushes once more when the
//! port closes. Its next process is greeted after that.
//!
//! Invariants: nobody is waited for without a limit ([`REST_PATIENCE`]); a guest that is killed once more, or a machine, ends at once.

use umbra_driver_vm::protocol::ToAgent;
use umbra_shadow::DeviceId;

use std::time::Duration;

use super::class::traits;
use super::driver::EndRef;
use super::ids::{DriverId, GuestId};
use super::run::Supervisor;
use crate::base::time::{Time, milliseconds};
use crate::lifecycle::{Input, REST_PATIENCE, State};
use crate::record::events::Event;
use crate::wire::messages::ToVm;

/// Time that a guest's process has beyond that, which it waits by itself, to say what is lost.
const LAST_WORDS: Duration = Duration::from_secs(10);

/// What a driver VM's agent does before its VM is ended on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AgentRest {
    /// It was asked to flush, and has this long to answer.
    Asked(Time),
    /// It has answered.
    Done,
}

impl Supervisor {
    /// Has the guests' devices at driver VM `n` come to rest, before it is replaced on purpose.
    pub(super) fn quiesce(&mut self, n: DriverId) {
        for EndRef { guest, device } in self.drivers[n].ends.rows() {
            self.ask_to_rest(guest, device);
        }
        self.look_at_rest(n);
    }

    /// Driver VM `n` is not replaced: lets the guests' devices go on, but those of a guest that is about to be killed.
    pub(super) fn go_on(&mut self, n: DriverId) {
        self.drivers[n].rest = None;
        for EndRef { guest, device } in self.drivers[n].ends.rows() {
            if self.guests[guest].killing.is_some() {
                continue;
            }
            if let Some(device) = self.guests[guest].devices.get_mut(&device) {
                device.resting = None;
            }
            self.tell_guest(guest, &ToVm::GoOn { device });
        }
    }

    fn ask_to_rest(&mut self, guest: GuestId, device: DeviceId) {
        let this = &mut self.guests[guest];
        let there = this.process.is_some();
        if let Some(asked) = this.devices.get_mut(&device).filter(|_| there) {
            asked.resting.get_or_insert(Time::now());
            self.tell_guest(guest, &ToVm::Quiesce { device });
        }
    }

    /// `device` says that it has come to rest, or cannot.
    pub(super) fn on_at_rest(&mut self, (guest, device): (GuestId, DeviceId), stable: bool) {
        let Some((driver, _)) = self.served(guest, device) else { return };
        if self.end_rest((guest, device), stable) {
            self.look_at_rest(driver);
        }
    }

    /// `device` does not come to rest any more. Whether it was to.
    pub(super) fn end_rest(&mut self, (guest, device): (GuestId, DeviceId), stable: bool) -> bool {
        let Some((driver, _)) = self.served(guest, device) else { return false };
        let since = self.guests[guest].devices.get_mut(&device).and_then(|device| device.resting.take());
        // Not asked, or the last word of one that was lost meanwhile.
        let Some(since) = since else { return false };
        self.events.tell(&Event::AtRest {
            guest: self.guests[guest].name.clone(),
            device,
            driver: self.drivers[driver].name.clone(),
            ms: milliseconds(Time::now().since(since)),
            stable,
        });
        self.guests[guest].unrest |= !stable;
        self.kill_at_rest(guest);
        true
    }

    /// The process of guest `n` is gone: nobody waits for its devices any more.
    pub(super) fn rests_no_more(&mut self, n: GuestId) {
        self.guests[n].killing = None;
        for (driver, _) in self.guests[n].drivers() {
            self.look_at_rest(driver);
        }
    }

    /// Goes on where all guests' devices at driver VM `n` have answered.
    pub(super) fn look_at_rest(&mut self, n: DriverId) {
        let rests = |end: &EndRef| {
            let device = self.guests[end.guest].devices.get(&end.device);
            device.is_some_and(|device| device.resting.is_some())
        };
        if !self.drivers[n].ends.iter().any(rests) && !self.waits_for_agent(n) {
            self.drive(n, Input::AtRest);
        }
    }

    /// Whether the agent of driver VM `n`, which is about to be replaced on purpose, has still to flush: a guest that has just ended left
    /// what nobody else keeps. It is asked once.
    fn waits_for_agent(&mut self, n: DriverId) -> bool {
        let driver = &mut self.drivers[n];
        if !driver.lifecycle.is_coming_to_rest() {
            return false;
        }
        match driver.rest {
            Some(AgentRest::Asked(_)) => true,
            Some(AgentRest::Done) => {
                driver.rest = None;
                false
            }
            None => {
                driver.rest = Some(AgentRest::Asked(Time::now() + REST_PATIENCE));
                self.tell_agent(n, &ToAgent::Rest);
                true
            }
        }
    }

    /// Kills guest `n`, as was asked for: at once where that was asked for before, else when its devices have come to rest.
    pub(super) fn kill_guest(&mut self, n: GuestId) {
        let guest = &mut self.guests[n];
        let (resting, unrest): (Vec<_>, _) = (guest.resting_devices().collect(), guest.keeps_for_one_away());
        if resting.is_empty() && !unrest || guest.killing.is_some() {
            return guest.kill();
        }
        (guest.killing, guest.unrest) = (Some(Time::now() + REST_PATIENCE), unrest);
        for device in resting {
            self.ask_to_rest(n, device);
        }
        self.kill_at_rest(n);
    }

    /// Kills guest `n`, if it is to be killed when its devices are at rest, and they are. Where one has no driver VM, or lost it
    /// before, its process ends by itself, when the next driver VM has what is kept.
    fn kill_at_rest(&mut self, n: GuestId) {
        let guest = &mut self.guests[n];
        if guest.killing.is_none() || guest.devices.values().any(|device| device.resting.is_some()) {
            return;
        }
        if guest.unrest {
            // Its process has a limit of its own, at which it says what is lost.
            guest.killing = Some(Time::now() + REST_PATIENCE + LAST_WORDS);
            self.tell_guest(n, &ToVm::Finish);
        } else {
            guest.kill();
        }
    }

    /// Kills the guests whose devices have had their time to come to rest.
    pub(super) fn kill_overdue(&mut self, now: Time) {
        for guest in self.guests.iter_mut().filter(|guest| guest.killing.is_some_and(|due| due <= now)) {
            // Once: what a process that the kernel holds would make due again and again.
            guest.killing = None;
            guest.kill();
        }
    }

    /// Nobody has watched for the time `away`, which has just ended.
    pub(super) fn rests_were_unwatched(&mut self, away: Duration) {
        for due in self.guests.iter_mut().filter_map(|guest| guest.killing.as_mut()) {
            *due = *due + away;
        }
        for driver in self.drivers.iter_mut() {
            if let Some(AgentRest::Asked(due)) = &mut driver.rest {
                *due = *due + away;
            }
        }
    }

    /// When something of this is due next.
    pub(super) fn rest_due(&self) -> Option<Time> {
        let now = Time::now();
        let guests = self.guests.iter().filter_map(|guest| guest.killing);
        let agents = self.drivers.iter().filter_map(|driver| match driver.rest {
            Some(AgentRest::Asked(due)) => Some(due),
            Some(AgentRest::Done) | None => None,
        });
        guests.chain(agents).filter(|due| *due > now).min()
    }

    /// Whether driver VM `n` is not to be ended yet: guests that it serves come to rest, or its agent flushes what they have left.
    pub(super) fn has_to_rest(&mut self, n: DriverId, now: Time) -> bool {
        let driver = &self.drivers[n];
        if !traits(driver.class()).rests {
            return false;
        }
        // Where it is away, its next life takes what they keep.
        if driver.ends.iter().any(|end| self.guests[end.guest].killing.is_some()) {
            return true;
        }
        // One that has no agent, or has never served, has nothing to flush.
        let serves =
            driver.was_live && matches!(driver.lifecycle.state(), State::GoingLive { .. } | State::Live { .. });
        if !serves {
            return false;
        }
        match driver.rest {
            Some(AgentRest::Done) => false,
            Some(AgentRest::Asked(due)) if due > now => true,
            Some(AgentRest::Asked(_)) => {
                self.drivers[n].rest = Some(AgentRest::Done);
                false
            }
            None => {
                self.drivers[n].rest = Some(AgentRest::Asked(now + REST_PATIENCE));
                self.tell_agent(n, &ToAgent::Rest);
                true
            }
        }
    }

    /// The agent of driver VM `n` has flushed its disks, as it was asked to.
    pub(super) fn on_agent_at_rest(&mut self, n: DriverId, stable: bool) {
        let driver = &mut self.drivers[n];
        if !matches!(driver.rest, Some(AgentRest::Asked(_))) {
            return;
        }
        driver.rest = Some(AgentRest::Done);
        if !stable {
            let name = driver.name.clone();
            self.events.warn(format!("{name}: its disks could not be flushed before its end"));
        }
        self.look_at_rest(n);
    }
}
