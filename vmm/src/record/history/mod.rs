//! A machine's past, out of its event log and its crash reports: what `umbra report` shows.
//!
//! The events say what happened to every driver VM, the reports add what a console and a kernel said of the newest
//! failures. Both were written by this program, but carry the words of driver VMs: nothing here is trusted to be short,
//! and [`page`] escapes all of it. Fields of another version are left out, not an error.

mod chart;
mod pace;
pub mod page;
mod parts;
mod read;
mod timeline;

pub use read::{ReadError, folder, read};

use umbra_shadow::DeviceId;

use super::parts::RecoveryParts;
use super::timeline::Mark;
use crate::lifecycle::NoticedBy;
use crate::wire::messages::{MaskedCounts, PaceSteps};

/// A machine's past.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Name of the machine.
    pub machine: String,
    /// Time of the first event, wall clock, UTC.
    pub from: String,
    /// Time of the last event.
    pub until: String,
    /// From the first event to the last, in seconds.
    pub seconds: f64,
    /// Driver VMs in the order of their first event.
    pub drivers: Vec<Driver>,
    /// Failures, oldest first.
    pub failures: Vec<PastFailure>,
    /// Warnings and what became of the guests: time and sentence.
    pub remarks: Vec<(String, String)>,
}

/// A driver VM.
#[derive(Clone, Debug, Default)]
pub struct Driver {
    /// Its name.
    pub name: String,
    /// PCI address, if a crash report has it.
    pub device: Option<String>,
    /// Its kernel's driver for the device.
    pub kernel_driver: Option<String>,
    /// Reset method last used.
    pub reset: Option<String>,
    /// The parts of its first start.
    pub first_start: Option<RecoveryParts>,
    /// Why it was given up, if it was.
    pub quarantined: Option<String>,
}

/// One failure of a driver VM, and what followed.
#[derive(Clone, Debug)]
pub struct PastFailure {
    /// Name of the driver VM.
    pub driver: String,
    /// Generation of the life that ended.
    pub generation: u32,
    /// When it was certain, wall clock, UTC.
    pub time: String,
    /// Since the first event, in seconds.
    pub second: f64,
    /// How it was noticed.
    pub source: NoticedBy,
    /// What happened, for people.
    pub reason: String,
    /// The kind of crash, where somebody had asked for it.
    pub requested: Option<String>,
    /// First sign to certainty, ms.
    pub detect_ms: f64,
    /// What followed.
    pub outcome: Outcome,
    /// How long each part took; parts that are not known are `None`.
    pub parts: RecoveryParts,
    /// Frames of the outage.
    pub frames: MaskedCounts,
    /// Guests' devices that were answered by the shadow: `web.net0`.
    pub masked: Vec<String>,
    /// How much the guests' devices moved around the outage.
    pub paces: Vec<DevicePace>,
    /// What a crash report adds.
    pub evidence: Option<Evidence>,
}

/// How much a guest's device moved around an outage.
#[derive(Clone, Debug)]
pub struct DevicePace {
    /// The guest's name.
    pub guest: String,
    /// The device.
    pub device: DeviceId,
    /// Frames in each step of time.
    pub steps: PaceSteps,
}

/// What followed a failure.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Outcome {
    /// The next life serves: its generation, and the outage in ms (`None`: nothing had been served before).
    Live(u32, Option<f64>),
    /// The next life failed before it served.
    FailedAgain,
    /// There is no next life.
    Quarantined,
    /// The log ends here.
    #[default]
    Open,
}

/// What a crash report adds to the events.
#[derive(Clone, Debug, Default, serde::Deserialize)]
#[serde(default)]
pub struct Evidence {
    /// PCI address.
    pub device: Option<String>,
    /// Kernel driver.
    pub kernel_driver: Option<String>,
    /// Kernel release.
    pub kernel: Option<String>,
    /// The kernel's own line about it.
    pub kernel_says: Option<String>,
    /// How the process ended, in words.
    pub exit: Option<String>,
    /// Registers.
    pub registers: String,
    /// The end of the life's console.
    pub console_tail: String,
    /// The steps of failure and recovery.
    pub timeline: Vec<Mark>,
}

impl PastFailure {
    /// What the event `driver-failed` says; nothing has followed yet.
    fn new(driver: String, generation: u32, source: NoticedBy, reason: String, detect_ms: f64) -> Self {
        Self {
            driver,
            generation,
            time: String::new(),
            second: 0.0,
            source,
            reason,
            requested: None,
            detect_ms,
            outcome: Outcome::Open,
            parts: RecoveryParts::default(),
            frames: MaskedCounts::default(),
            masked: Vec::new(),
            paces: Vec::new(),
            evidence: None,
        }
    }

    /// The outage in ms, where it is over.
    pub fn outage(&self) -> Option<f64> {
        if let Outcome::Live(_, outage) = self.outcome { outage } else { None }
    }
}

impl History {
    /// The outages that are over, shortest first, ms.
    pub fn outages(&self) -> Vec<f64> {
        let mut outages: Vec<_> = self.failures.iter().filter_map(PastFailure::outage).collect();
        outages.sort_by(f64::total_cmp);
        outages
    }
}

/// The value below which a share of `percent` of `sorted` lies (nearest rank).
pub fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        assert_eq!(percentile(&[], 50), None);
        assert_eq!(percentile(&[3.0], 95), Some(3.0));
        let values: Vec<_> = (1..=20).map(f64::from).collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 95)), (Some(10.0), Some(19.0)));
    }
}
