//! What guests ask of their network devices (receive mode, offloads), on its way to the agents of the driver VMs.
//!
//! Invariant: an agent is sent the present state of an end, and only when it has read what was sent before. So a guest that
//! changes its mind without end costs one message at a time, and never fills the stream of a driver VM that others share.

use std::collections::BTreeSet;

use umbra_driver_vm::protocol::{NetEnd, NetPlan, Offloads, RxMode, ToAgent};
use umbra_shadow::DeviceId;

use super::net::end_mac;
use crate::base::lines::LineError;
use crate::lifecycle::{Endpoint, Input, Rank};
use crate::supervisor::driver::life::{LifeRole, encode};
use crate::supervisor::driver::{DriverVm, EndRef, Life};
use crate::supervisor::guest::GuestVm;
use crate::supervisor::ids::{DriverId, GuestId, Table};
use crate::supervisor::run::Supervisor;

/// What of an end changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::supervisor) enum Setting {
    Mode,
    Offloads,
}

/// Changes that were not sent to an agent yet.
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

    /// The change to send next, among the ends that are not held back.
    fn next(&self, is_held: impl Fn(u16) -> bool) -> Option<(u16, Setting)> {
        let Self::Planned { changed, .. } = self else { return None };
        changed.iter().find(|(position, _)| !is_held(*position)).copied()
    }

    fn sent(&mut self, position: u16, setting: Setting) {
        if let Self::Planned { changed, .. } = self {
            changed.remove(&(position, setting));
        }
    }
}

/// The plan in one message; where the ends' modes make that too long for a line, without them, and with those that have
/// to follow.
pub(super) fn plan_messages(mut plan: NetPlan) -> (ToAgent, BTreeSet<(u16, Setting)>) {
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
    pub(in crate::supervisor) fn configure(&mut self, n: DriverId, role: LifeRole) {
        let driver = &self.drivers[n];
        let Some(life) = driver.life_of(role) else { return };
        let (message, changed) = self.plan(driver, life);
        let clean = self.drivers[n].clean_ends().collect();
        let sent = self.drivers[n].send(role, &message);
        if let Some(life) = self.drivers[n].life_of_mut(role) {
            life.settings = Settings::Planned { changed, clean };
        }
        self.after_sending(n, role, sent);
        self.send_settings(n, role);
    }

    /// A guest has asked for something else: passes it on to the agents that have their plan.
    pub(in crate::supervisor) fn pass_on(&mut self, guest: GuestId, device: DeviceId, setting: Setting) {
        let Some((driver, end)) = self.served(guest, device) else { return };
        let Ok(position) = u16::try_from(end.place()) else { return };
        for role in [LifeRole::Present, LifeRole::Standby(Rank::First), LifeRole::Standby(Rank::Second)] {
            if let Some(life) = self.drivers[driver].life_of_mut(role) {
                life.settings.change(position, setting);
                self.send_settings(driver, role);
            }
        }
    }

    /// Guest `n` has a new process, or none: passes on the settings that a guest begins with.
    pub(in crate::supervisor) fn pass_on_defaults(&mut self, n: GuestId) {
        let devices: Vec<_> = self.guests[n].devices.keys().copied().collect();
        for device in devices {
            self.pass_on(n, device, Setting::Mode);
            self.pass_on(n, device, Setting::Offloads);
        }
    }

    /// Sends what has changed, as far as the agent reads; of an end that starts clean, once it is live.
    pub(in crate::supervisor) fn send_settings(&mut self, n: DriverId, role: LifeRole) {
        loop {
            let driver = &self.drivers[n];
            let Some(life) = driver.life_of(role) else { return };
            if !life.agent_reads() {
                return;
            }
            // What has killed the lives before may be among it.
            let is_clean = |position: u16| driver.lifecycle.starts_clean(position.into());
            let next = life.settings.next(|position| role == LifeRole::Present && is_clean(position));
            let Some((position, setting)) = next else { return };
            if let Some(life) = self.drivers[n].life_of_mut(role) {
                life.settings.sent(position, setting);
            }
            let Some(EndRef { guest, device }) = self.drivers[n].ends.get(position.into()).copied() else {
                continue;
            };
            let Some(net) = self.guests[guest].net(device) else { continue };
            let message = match setting {
                Setting::Mode => ToAgent::SetRxMode { end: position, mode: net.mode.clone() },
                Setting::Offloads => ToAgent::SetOffloads { end: position, offloads: net.offloads },
            };
            let sent = self.drivers[n].send(role, &message);
            self.after_sending(n, role, sent);
        }
    }

    pub(in crate::supervisor) fn after_sending(&mut self, n: DriverId, role: LifeRole, sent: Result<(), LineError>) {
        match (sent, role) {
            (Ok(()), _) | (Err(_), LifeRole::Dying) => {}
            (Err(error), LifeRole::Present) => self.lose_agent(n, &error),
            // One that is closed is noticed where it is read as well.
            (Err(error), LifeRole::Standby(rank)) => {
                if let Some(life) = self.drivers[n].life_of_mut(role) {
                    life.drop_agent();
                }
                self.drive(n, Input::StandbyFailed(rank, format!("its agent's control stream: {error}")));
            }
        }
    }
}

/// What the guests of `driver` have asked for so far, for its life `life`.
pub(super) fn net_plan(guests: &Table<GuestId, GuestVm>, driver: &DriverVm, life: &Life) -> NetPlan {
    let plan = |(end, EndRef { guest, device }): (Endpoint, &EndRef)| {
        let net = guests[*guest].net(*device)?;
        let clean_start = driver.lifecycle.starts_clean(end);
        let (mode, offloads) = if clean_start { clean() } else { (net.mode.clone(), net.offloads) };
        Some(NetEnd { device_mac: end_mac(end.place()), mode, offloads })
    };
    let ends = driver.ends.numbered().filter_map(plan).collect();
    let mtu = driver.mtu;
    NetPlan { ends, mtu, device: life.purpose.device() }
}

impl DriverVm {
    /// The ends that start clean with the next plan.
    fn clean_ends(&self) -> impl Iterator<Item = u16> {
        let positions = (0..).take(self.ends.len());
        positions.filter(|position| self.lifecycle.starts_clean(Endpoint::from(*position)))
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
    use umbra_driver_vm::protocol::{DevicePlace, MAX_LINE, Mac, Offloads};

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
        next.into_iter().for_each(|(position, setting)| settings.sent(position, setting));
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
