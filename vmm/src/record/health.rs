//! Whether a machine does what it was set up for, out of its [`Status`]: `umbra status --check`, `umbra list`, `umbra wait`.

use std::fmt;

use serde::Serialize;

use super::status::{DeviceMode, DriverStatus, GuestStateName, GuestStatus, Status};
use crate::lifecycle::{StandbyStage, StateName};

/// How a machine is, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// All guests that are not off run, all driver VMs serve, and what is to wait for a failure waits.
    Ok,
    /// Something is not there now, and is expected to come: a recovery, a start, a standby, a carrier.
    Degraded,
    /// Something has been given up, until a person does something about it.
    Failed,
}

impl fmt::Display for Level {
    /// The word of `umbra list`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// How a machine is, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Health {
    /// The worst of all.
    pub health: Level,
    /// What is not as it should be, a clause each; those of the worst level first.
    pub reasons: Vec<String>,
}

impl Health {
    /// The health of a machine of this status.
    pub fn of(status: &Status) -> Self {
        let guests = status.guests.iter().flat_map(of_guest);
        let mut found: Vec<_> = guests.chain(status.drivers.iter().flat_map(of_driver)).collect();
        found.sort_by_key(|(level, _)| std::cmp::Reverse(*level));
        Self {
            health: found.first().map_or(Level::Ok, |(level, _)| *level),
            reasons: found.into_iter().map(|(_, why)| why).collect(),
        }
    }
}

fn of_guest(guest: &GuestStatus) -> Vec<(Level, String)> {
    let name = &guest.name;
    match guest.state {
        GuestStateName::Off => return Vec::new(),
        GuestStateName::Failed => {
            let why = guest.reason.as_ref().map_or_else(String::new, |why| format!(": {why}"));
            return vec![(Level::Failed, format!("{name} has failed{why}"))];
        }
        GuestStateName::Running => {}
        state => return vec![(Level::Degraded, format!("{name} is {state}"))],
    }
    let nets = guest.nets.iter().map(|net| (format!("net{}", net.index), net.mode, &net.driver));
    let sounds = guest.sounds.iter().map(|sound| (format!("sound{}", sound.index), sound.mode, &sound.driver));
    let disks = guest.disks.iter().map(|disk| (format!("block{}", disk.index), disk.mode, &disk.driver));
    let devices = nets.chain(sounds).chain(disks);
    let found = devices.filter_map(|(device, mode, driver)| {
        let level = match mode {
            DeviceMode::Tap | DeviceMode::Passive | DeviceMode::Unknown => return None,
            DeviceMode::Quarantined => Level::Failed,
            _ => Level::Degraded,
        };
        let driver = driver.as_deref().unwrap_or("-");
        Some((level, format!("{name}: {device} is not served by {driver} ({mode})")))
    });
    found.collect()
}

fn of_driver(driver: &DriverStatus) -> Vec<(Level, String)> {
    let name = &driver.name;
    let why = |reason: &Option<String>| reason.as_ref().map_or_else(String::new, |why| format!(": {why}"));
    match driver.state {
        StateName::Live => {}
        StateName::Quarantined => {
            return vec![(Level::Failed, format!("{name} is quarantined{}", why(&driver.reason)))];
        }
        state => return vec![(Level::Degraded, format!("{name} is {state}"))],
    }
    let mut found = Vec::new();
    if !driver.carrier {
        found.push((Level::Degraded, format!("{name} has no carrier")));
    }
    if let Some(standby) = &driver.standby {
        let what = standby.device.as_ref().map_or("standby".into(), |device| format!("spare {device}"));
        let lacks = match standby.state {
            stage if stage.is_ready() => None,
            StandbyStage::NoCarrier => Some(format!("the {what} of {name} has no carrier")),
            state => Some(format!("{name} has no {what} ready ({state}){}", why(&standby.reason))),
        };
        found.extend(lacks.map(|why| (Level::Degraded, why)));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::status::testing::status;

    fn health(change: impl FnOnce(&mut Status)) -> (Level, Vec<String>) {
        let mut status = status();
        change(&mut status);
        let Health { health, reasons } = Health::of(&status);
        (health, reasons)
    }

    fn standby(status: &mut Status) -> &mut crate::record::status::StandbyStatus {
        status.drivers[0].standby.get_or_insert_with(|| panic!("the test's machine has a standby"))
    }

    #[test]
    fn a_machine_that_has_all_it_is_set_up_with_is_well() {
        assert_eq!(health(|_| {}), (Level::Ok, vec![]));
        assert_eq!(health(|status| status.drivers[0].standby = None), (Level::Ok, vec![]), "cold, as configured");
        assert_eq!(
            health(|status| status.guests[0].state = GuestStateName::Off),
            (Level::Ok, vec![]),
            "as it was told"
        );
        assert_eq!(health(|status| standby(status).state = StandbyStage::Snapshot), (Level::Ok, vec![]));
    }

    #[test]
    fn what_is_on_its_way_is_named() {
        for (state, said) in [
            (StandbyStage::None, "nic0 has no standby ready (none)"),
            (StandbyStage::Booting, "nic0 has no standby ready (booting)"),
            (StandbyStage::Saving, "nic0 has no standby ready (saving)"),
        ] {
            assert_eq!(health(|status| standby(status).state = state), (Level::Degraded, vec![said.into()]));
        }
        let said = health(|status| {
            standby(status).device = Some("0000:04:00.0".into());
            standby(status).state = StandbyStage::NoCarrier;
            status.drivers[0].carrier = false;
        });
        let reasons = ["nic0 has no carrier", "the spare 0000:04:00.0 of nic0 has no carrier"].map(String::from);
        assert_eq!(said, (Level::Degraded, reasons.to_vec()));
        let booting = health(|status| status.drivers[0].state = StateName::Booting);
        assert_eq!(
            booting,
            (Level::Degraded, vec!["nic0 is booting".into()]),
            "of its standby nothing is expected now"
        );
        let said = health(|status| status.guests[0].nets[0].mode = DeviceMode::Masking);
        assert_eq!(said, (Level::Degraded, vec!["web: net0 is not served by nic0 (masking)".into()]));
    }

    #[test]
    fn what_was_given_up_comes_first() {
        let said = health(|status| {
            status.guests[0].state = GuestStateName::Starting;
            status.drivers[0].state = StateName::Quarantined;
        });
        let reasons = ["nic0 is quarantined: kernel panic", "web is starting"].map(String::from);
        assert_eq!(said, (Level::Failed, reasons.to_vec()));
        let said = health(|status| {
            status.guests[0].state = GuestStateName::Failed;
            status.guests[0].reason = Some("its kernel is gone".into());
        });
        assert_eq!(said, (Level::Failed, vec!["web has failed: its kernel is gone".into()]));
        assert_eq!(health(|status| status.guests[0].nets[0].mode = DeviceMode::Quarantined).0, Level::Failed);
    }
}
