//! What guests ask of their network devices (receive mode, offloads), on its way to the agents of the driver VMs.
//!
//! Invariant: an agent is sent the present state of an end, and only when it has read what was sent before. So a guest that
//! changes its mind without end costs one message at a time, and never fills the stream of a driver VM that others share.

use std::collections::BTreeSet;

use umbra_driver_vm::protocol::{MAX_LINE, NetEnd, NetPlan, Offloads, RxMode, ToAgent};
use umbra_shadow::DeviceId;

use crate::base::lines::LineError;
use crate::lifecycle::Input;
use crate::supervisor::driver::{DriverVm, EndRef, Life, Role, device_mac};
use crate::supervisor::guest::GuestVm;
use crate::supervisor::run::Supervisor;

/// What of an end changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::supervisor) enum Setting {
    Mode,
    Offloads,
}

/// What an agent has not been told yet.
#[derive(Debug, Default)]
pub(in crate::supervisor) enum Settings {
    /// It has no plan, which will have everything.
    #[default]
    Unplanned,
    /// It has one.
    Planned {
        /// What has changed since, by end.
        changed: BTreeSet<(u16, Setting)>,
        /// Ends of which the plan has nothing that their guests had asked for (a clean start), until they ask for something.
        clean: BTreeSet<u16>,
    },
}

impl Settings {
    fn change(&mut self, position: u16, setting: Setting) {
        let Self::Planned { changed, clean } = self else { return };
        changed.insert((position, setting));
        // The first thing that is asked for brings back all of it.
        if clean.remove(&position) {
            changed.extend([(position, Setting::Mode), (position, Setting::Offloads)]);
        }
    }

    /// What the agent is to be told next, of positions that are not held back.
    fn next(&self, is_held: impl Fn(u16) -> bool) -> Option<(u16, Setting)> {
        let Self::Planned { changed, .. } = self else { return None };
        changed.iter().find(|(position, _)| !is_held(*position)).copied()
    }

    fn told(&mut self, position: u16, setting: Setting) {
        if let Self::Planned { changed, .. } = self {
            changed.remove(&(position, setting));
        }
    }
}

/// Which life of a driver VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::supervisor) enum Which {
    Present,
    Standby,
}

/// A message as a line that the agent accepts.
pub(in crate::supervisor) fn encode(message: &ToAgent) -> Result<String, LineError> {
    let line = serde_json::to_string(message).map_err(|error| LineError::Io(error.into()))?;
    if line.len() > MAX_LINE { Err(LineError::TooLong(MAX_LINE)) } else { Ok(line) }
}

/// The plan in one message; where the ends' modes make that too long for a line, without them, and with those that have
/// to follow.
fn plan_messages(mut plan: NetPlan) -> (ToAgent, BTreeSet<(u16, Setting)>) {
    let whole = ToAgent::ConfigureNet(plan.clone());
    if encode(&whole).is_ok() {
        return (whole, BTreeSet::new());
    }
    let mut follow = BTreeSet::new();
    for (position, end) in (0..).zip(&mut plan.ends) {
        // A mode without lists is short.
        if end.mode.unicast.len() + end.mode.multicast.len() > 0 || end.mode.vlans.is_some() {
            end.mode = RxMode::default();
            follow.insert((position, Setting::Mode));
        }
    }
    (ToAgent::ConfigureNet(plan), follow)
}

impl Supervisor {
    /// Tells the agent of this life of driver VM `n` what to serve.
    pub(in crate::supervisor) fn configure(&mut self, n: usize, which: Which) {
        let driver = &self.drivers[n];
        let Some(life) = driver.life_of(which) else { return };
        let (message, changed) = if driver.is_sound() {
            let ends = u16::try_from(driver.ends.len()).unwrap_or(u16::MAX);
            (ToAgent::ConfigureSound { ends, device: life.role.device() }, BTreeSet::new())
        } else {
            plan_messages(net_plan(&self.guests, driver, life))
        };
        let clean = self.drivers[n].clean_ends().collect();
        let sent = self.drivers[n].send(which, &message);
        if let Some(life) = self.drivers[n].life_of_mut(which) {
            life.settings = Settings::Planned { changed, clean };
        }
        self.after_sending(n, which, sent);
        self.send_settings(n, which);
    }

    /// A guest has asked for something else at an end: the agents that have their plan are told.
    pub(in crate::supervisor) fn pass_on(&mut self, guest: usize, device: DeviceId, setting: Setting) {
        let Some((driver, end)) = self.served(guest, device) else { return };
        let Ok(position) = u16::try_from(end) else { return };
        for which in [Which::Present, Which::Standby] {
            if let Some(life) = self.drivers[driver].life_of_mut(which) {
                life.settings.change(position, setting);
                self.send_settings(driver, which);
            }
        }
    }

    /// Guest `n` begins anew, or is away: it asks for nothing but what a guest begins with.
    pub(in crate::supervisor) fn pass_on_defaults(&mut self, n: usize) {
        let nets = (0..).zip(&self.guests[n].nets).filter(|(_, net)| net.driver.is_some());
        let devices: Vec<_> = nets.map(|(index, _)| DeviceId::net(index)).collect();
        for device in devices {
            self.pass_on(n, device, Setting::Mode);
            self.pass_on(n, device, Setting::Offloads);
        }
    }

    /// Sends what has changed, as far as the agent reads; of an end that starts clean, once it is live.
    pub(in crate::supervisor) fn send_settings(&mut self, n: usize, which: Which) {
        loop {
            let driver = &self.drivers[n];
            let Some(life) = driver.life_of(which) else { return };
            if life.agent.as_ref().is_none_or(crate::base::lines::Lines::has_unsent) {
                return;
            }
            // What has killed the lives before may be among it.
            let is_clean = |position: u16| driver.lifecycle.starts_clean(usize::from(position));
            let next = life.settings.next(|position| which == Which::Present && is_clean(position));
            let Some((position, setting)) = next else { return };
            if let Some(life) = self.drivers[n].life_of_mut(which) {
                life.settings.told(position, setting);
            }
            let Some(EndRef { guest, device }) = self.drivers[n].ends.get(usize::from(position)).copied() else {
                continue;
            };
            let Some(net) = self.guests[guest].net(device) else { continue };
            let message = match setting {
                Setting::Mode => ToAgent::SetRxMode { end: position, mode: net.mode.clone() },
                Setting::Offloads => ToAgent::SetOffloads { end: position, offloads: net.offloads },
            };
            let sent = self.drivers[n].send(which, &message);
            self.after_sending(n, which, sent);
        }
    }

    pub(in crate::supervisor) fn after_sending(&mut self, n: usize, which: Which, sent: Result<(), LineError>) {
        match (sent, which) {
            (Ok(()), _) => {}
            (Err(error), Which::Present) => self.lose_agent(n, &error),
            // One that is closed is noticed where it is read as well.
            (Err(error), Which::Standby) => {
                if let Some(standby) = &mut self.drivers[n].standby {
                    standby.life.agent = None;
                }
                self.drive(n, Input::StandbyFailed(format!("its agent's control stream: {error}")));
            }
        }
    }
}

/// What the guests of `driver` have asked for so far, for its life `life`.
fn net_plan(guests: &[GuestVm], driver: &DriverVm, life: &Life) -> NetPlan {
    let end = |(position, end): (usize, &EndRef)| {
        let net = guests[end.guest].net(end.device)?;
        let clean_start = driver.lifecycle.starts_clean(position);
        let (mode, offloads) = if clean_start { clean() } else { (net.mode.clone(), net.offloads) };
        Some(NetEnd { device_mac: device_mac(position), mode, offloads })
    };
    let ends = driver.ends.iter().enumerate().filter_map(end).collect();
    let mtu = driver.mtu;
    NetPlan { ends, mtu, device: life.role.device() }
}

impl DriverVm {
    /// The ends that start clean with the next plan.
    fn clean_ends(&self) -> impl Iterator<Item = u16> {
        let positions = (0..).take(self.ends.len());
        positions.filter(|position| self.lifecycle.starts_clean(usize::from(*position)))
    }

    pub(in crate::supervisor) fn life_of(&self, which: Which) -> Option<&Life> {
        match which {
            Which::Present => self.life.as_ref(),
            Which::Standby => self.standby.as_ref().filter(|standby| !standby.dropped).map(|standby| &standby.life),
        }
    }

    pub(in crate::supervisor) fn life_of_mut(&mut self, which: Which) -> Option<&mut Life> {
        match which {
            Which::Present => self.life.as_mut(),
            Which::Standby => self.standby.as_mut().filter(|standby| !standby.dropped).map(|standby| &mut standby.life),
        }
    }

    /// Sends `message` to the agent of this life, if there is one.
    pub(in crate::supervisor) fn send(&mut self, which: Which, message: &ToAgent) -> Result<(), LineError> {
        let Some(agent) = self.life_of_mut(which).and_then(|life| life.agent.as_mut()) else { return Ok(()) };
        agent.send(&encode(message)?)
    }
}

impl Role {
    /// Where the device of such a life is when the agent gets its plan.
    fn device(self) -> umbra_driver_vm::protocol::DevicePlace {
        match self {
            Self::Serves | Self::Spare => umbra_driver_vm::protocol::DevicePlace::Present,
            Self::Waits => umbra_driver_vm::protocol::DevicePlace::ToCome,
        }
    }
}

/// What serves any guest and asks nothing of a driver: every frame on the wire, as it was there.
fn clean() -> (RxMode, Offloads) {
    let mode = RxMode { promiscuous: true, all_multicast: true, ..RxMode::default() };
    (mode, Offloads { checksum: false, tso4: false, tso6: false })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use umbra_driver_vm::protocol::{DevicePlace, Mac, Offloads};

    use super::*;

    fn full_mode() -> RxMode {
        let macs = |first| (0..64).map(|n| Mac([first, 0, 0, 0, 0, n])).collect();
        let vlans = Some((0..4096).collect());
        RxMode { unicast: macs(2), multicast: macs(1), vlans, ..RxMode::default() }
    }

    fn planned<const N: usize>(clean: [u16; N]) -> Settings {
        Settings::Planned { changed: BTreeSet::new(), clean: clean.into() }
    }

    fn take(settings: &mut Settings) -> Option<(u16, Setting)> {
        let next = settings.next(|_| false);
        next.into_iter().for_each(|(position, setting)| settings.told(position, setting));
        next
    }

    fn plan(ends: u8) -> NetPlan {
        let end = |n| NetEnd { device_mac: Mac([2, 0, 0, 0, 0, n]), mode: full_mode(), offloads: Offloads::default() };
        NetPlan { ends: (0..ends).map(end).collect(), mtu: None, device: DevicePlace::Present }
    }

    #[test]
    fn a_plan_that_is_too_long_for_a_line_is_sent_in_parts_that_are_not() {
        let (message, changed) = plan_messages(plan(1));
        assert_eq!(message, ToAgent::ConfigureNet(plan(1)), "one end fits");
        assert!(changed.is_empty());
        let (message, changed) = plan_messages(plan(2));
        encode(&message).unwrap();
        assert_eq!(changed, BTreeSet::from([(0, Setting::Mode), (1, Setting::Mode)]));
        encode(&ToAgent::SetRxMode { end: 1, mode: full_mode() }).unwrap();
    }

    #[test]
    fn a_message_that_the_agent_would_refuse_is_not_sent() {
        assert!(matches!(encode(&ToAgent::ConfigureNet(plan(2))), Err(LineError::TooLong(MAX_LINE))));
    }

    #[test]
    fn however_often_an_end_changes_it_is_told_once_and_before_the_plan_not_at_all() {
        let mut settings = Settings::default();
        settings.change(0, Setting::Mode);
        assert_eq!(settings.next(|_| false), None);
        let mut settings = planned([]);
        for _ in 0..1000 {
            settings.change(1, Setting::Offloads);
            settings.change(0, Setting::Mode);
        }
        assert_eq!(settings.next(|position| position < 2), None, "both are held back");
        assert_eq!(take(&mut settings), Some((0, Setting::Mode)));
        assert_eq!(take(&mut settings), Some((1, Setting::Offloads)));
        assert_eq!(take(&mut settings), None);
    }

    #[test]
    fn the_first_thing_that_is_asked_for_after_a_clean_start_brings_back_everything() {
        for first in [Setting::Mode, Setting::Offloads] {
            let mut settings = planned([1]);
            settings.change(0, first);
            settings.change(1, first);
            assert_eq!(take(&mut settings), Some((0, first)), "that end had its settings");
            assert_eq!(take(&mut settings), Some((1, Setting::Mode)));
            assert_eq!(take(&mut settings), Some((1, Setting::Offloads)));
            settings.change(1, first);
            assert_eq!((take(&mut settings), take(&mut settings)), (Some((1, first)), None), "once");
        }
    }
}
