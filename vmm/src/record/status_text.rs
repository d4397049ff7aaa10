//! The status as a table, for people.

use std::fmt;

use super::status::{
    BlockStatus, DriverStatus, GuestStatus, NetStatus, SoundStatus, SpareNetwork, StandbyStatus, Status,
};
use crate::base::untrusted_text;
use crate::host::reset;
use crate::lifecycle::StateName;

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if !self.guests.is_empty() {
            parts.push(table(&GUEST_COLUMNS, &self.guests));
        }
        if !self.drivers.is_empty() {
            parts.push(table(&DRIVER_COLUMNS, &self.drivers));
        }
        for driver in self.drivers.iter().filter(|driver| driver.reset_method.is_none()) {
            parts.push(format!("{}: {}\n", driver.name, driver.reset_meaning));
        }
        for driver in &self.drivers {
            if let Some(reason) = driver.standby.as_ref().and_then(|standby| standby.reason.as_ref()) {
                parts.push(format!("{}: {reason}\n", driver.name));
            }
        }
        for driver in &self.drivers {
            let has_end = |guest: &&GuestStatus| guest.nets.iter().any(|net| net.driver.as_ref() == Some(&driver.name));
            let guests: Vec<_> = self.guests.iter().filter(has_end).map(|guest| guest.name.as_str()).collect();
            if guests.len() > 1 {
                parts.push(format!("{}: its NIC is shared by {}\n", driver.name, guests.join(", ")));
            }
        }
        f.write_str(parts.join("\n").trim_end())
    }
}

/// A column of a table: its head, and the cell of a row.
pub(crate) type Column<T> = (&'static str, fn(&T) -> String);

const GUEST_COLUMNS: [Column<GuestStatus>; 4] = [
    ("GUEST", |guest| guest.name.clone()),
    ("STATE", |guest| match &guest.reason {
        Some(reason) => format!("{} ({reason})", guest.state),
        None => guest.state.to_string(),
    }),
    ("UPTIME", |guest| format!("{:.0} s", guest.uptime_s)),
    ("DEVICES", |guest| {
        let nets = guest.nets.iter().map(ToString::to_string);
        let sounds = guest.sounds.iter().map(ToString::to_string);
        nets.chain(sounds).chain(guest.disks.iter().map(ToString::to_string)).collect::<Vec<_>>().join(", ")
    }),
];

const DRIVER_COLUMNS: [Column<DriverStatus>; 10] = [
    ("DRIVER VM", |driver| driver.name.clone()),
    ("DEVICE", |driver| driver.device.clone()),
    ("DRIVER", |driver| or_dash(driver.driver.as_ref())),
    ("GENERATION", |driver| or_dash(driver.generation)),
    ("STATE", |driver| {
        let carrier = if driver.state == StateName::Live && !driver.carrier { " (no carrier)" } else { "" };
        format!("{}{carrier}", driver.state)
    }),
    ("STANDBY", |driver| driver.standby.as_ref().map_or_else(|| "cold".into(), StandbyStatus::cell)),
    ("RESET", |driver| reset::word(driver.reset_method).into()),
    ("FAILURES", |driver| driver.failures.to_string()),
    ("LAST OUTAGE", |driver| or_dash(driver.last_outage_ms.map(|ms| format!("{ms:.0} ms")))),
    ("REASON", |driver| or_dash(driver.reason.as_ref())),
];

/// The cell of what may be unknown.
pub(crate) fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".into(), |value| value.to_string())
}

impl fmt::Display for NetStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.tap, &self.driver) {
            (Some(tap), _) => write!(f, "net{}: tap {tap}", self.index),
            (None, Some(driver)) => write!(f, "net{}: {driver} {}", self.index, self.mode),
            (None, None) => write!(f, "net{}", self.index),
        }?;
        match self.foreign_source {
            0 => Ok(()),
            frames => write!(f, " ({frames} frames with another's address dropped)"),
        }
    }
}

impl fmt::Display for SoundStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let driver = self.driver.as_deref().unwrap_or("-");
        write!(f, "sound{}: {driver} {}", self.index, self.mode)
    }
}

impl fmt::Display for BlockStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let driver = self.driver.as_deref().unwrap_or("-");
        write!(f, "block{}: {driver} {}", self.index, self.mode)?;
        match self.owed_bytes {
            0 => Ok(()),
            bytes => write!(f, " ({} KiB owed)", bytes.div_ceil(1024)),
        }
    }
}

impl StandbyStatus {
    pub(super) fn cell(&self) -> String {
        let other = if self.network == Some(SpareNetwork::Silent) { ", other network?" } else { "" };
        match &self.device {
            Some(device) => format!("spare {device} {}{other}", self.state),
            None => match &self.second {
                Some(second) => format!("{}, then {}", self.state, second.state),
                None => self.state.to_string(),
            },
        }
    }
}

/// The table of `rows`: columns as wide as their widest cell. What a VM said is made fit for a terminal.
pub(crate) fn table<T>(columns: &[Column<T>], rows: &[T]) -> String {
    let heads = columns.iter().map(|(head, _)| (*head).to_owned()).collect();
    let cells = rows.iter().map(|row| columns.iter().map(|(_, cell)| untrusted_text::line(&cell(row))).collect());
    let lines: Vec<Vec<_>> = std::iter::once(heads).chain(cells).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<_> = (0..columns.len()).map(width).collect();
    let line = |line: &Vec<String>| {
        let cells: Vec<_> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    lines.iter().map(line).collect()
}
