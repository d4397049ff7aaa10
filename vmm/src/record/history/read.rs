//! Reading event log and crash reports into a [`History`].

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use super::{DevicePace, Driver, Evidence, History, Outcome, PastFailure};
use crate::record::events::Event;
use crate::record::log::EVENT_LOG;
use crate::record::log::EventLog;
use crate::record::parts::RecoveryParts;
use crate::wire::messages::MaskedCounts;

/// Largest crash report that is read, in bytes: console and registers are bounded where they are written.
const MAX_REPORT: u64 = 4 << 20;
/// Most remarks kept: a flood of warnings is no report.
const MAX_REMARKS: usize = 200;

/// Why there is no past to show.
#[derive(Debug, Error)]
pub enum ReadError {
    /// A file cannot be read.
    #[error("read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The folder has no events.
    #[error("{} has no event log ({EVENT_LOG}): is it a machine's folder of reports?", .0.display())]
    NoEvents(PathBuf),
}

/// An event as the log has it.
#[derive(Deserialize)]
struct Line {
    at_ns: u64,
    time: String,
    #[serde(default)]
    text: Option<String>,
    #[serde(flatten)]
    event: Event,
}

/// Reads the folder `reports` of the machine `name`.
///
/// # Errors
///
/// The folder has no event log that can be read. A crash report that cannot be read is left out.
pub fn read(reports: &Path, name: &str) -> Result<History, ReadError> {
    let log = reports.join(EVENT_LOG);
    let mut reader = Reader { history: History { machine: name.into(), ..History::default() }, ..Reader::default() };
    let mut found = false;
    for path in [EventLog::older(&log), log] {
        match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(source) => return Err(ReadError::Io { path, source }),
            Ok(file) => {
                found = true;
                for line in BufReader::new(file).split(b'\n') {
                    let line = line.map_err(|source| ReadError::Io { path: path.clone(), source })?;
                    // A line of another version, one that is being written now, and what a power cut has left of one are left out.
                    if let Ok(line) = serde_json::from_slice::<Line>(&line) {
                        reader.take(line);
                    }
                }
            }
        }
    }
    if !found {
        return Err(ReadError::NoEvents(reports.into()));
    }
    let mut history = reader.history;
    for failure in &mut history.failures {
        failure.evidence = evidence(&reports.join(format!("{}-gen{}.json", failure.driver, failure.generation)));
        let driver = history.drivers.iter_mut().find(|driver| driver.name == failure.driver);
        if let (Some(driver), Some(evidence)) = (driver, &failure.evidence) {
            driver.device.clone_from(&evidence.device);
            driver.kernel_driver.clone_from(&evidence.kernel_driver);
        }
    }
    Ok(history)
}

fn evidence(path: &Path) -> Option<Evidence> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_REPORT).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

#[derive(Default)]
struct Reader {
    history: History,
    first_ns: Option<u64>,
    /// Driver, generation and kind of a crash that somebody asked for.
    requested: Vec<(String, u32, String)>,
    /// Masks before the failure that explains them.
    masked: Vec<(String, String)>,
}

impl Reader {
    fn take(&mut self, line: Line) {
        let first = *self.first_ns.get_or_insert(line.at_ns);
        let seconds = std::time::Duration::from_nanos(line.at_ns.saturating_sub(first)).as_secs_f64();
        if self.history.from.is_empty() {
            self.history.from.clone_from(&line.time);
        }
        self.history.until.clone_from(&line.time);
        self.history.seconds = seconds;
        match line.event {
            Event::DriverStarting { driver, .. } => {
                let _ = self.driver(&driver);
            }
            Event::Masked { guest, device, driver, .. } => self.on_masked(driver, format!("{guest}.{device}")),
            Event::CrashRequested { driver, generation, kind } => self.requested.push((driver, generation, kind)),
            Event::DriverFailed { driver, generation, source, reason, detect_ms } => {
                // Replaced by plan, or because its NIC had no carrier: what came before has an end all the same.
                let counts = source.is_failure();
                let failure = PastFailure::new(driver, generation, source, reason, detect_ms);
                self.on_failed(PastFailure { time: line.time, second: seconds, ..failure }, counts);
            }
            Event::DriverFenced { driver, generation, fence_ms, .. } => {
                if let Some(failure) = self.open(&driver).filter(|failure| failure.generation == generation) {
                    failure.parts.fence_ms = Some(fence_ms);
                }
            }
            Event::DeviceReset { driver, method, reset_ms, .. } => {
                self.driver(&driver).reset = Some(method.clone());
                if let Some(failure) = self.open(&driver) {
                    failure.parts.reset_ms = Some(reset_ms);
                    failure.parts.reset_method = method;
                }
            }
            Event::DriverLive { driver, generation, outage_ms, parts, frames } => {
                self.on_live(&driver, generation, outage_ms, parts, frames);
            }
            Event::Pace { guest, device, driver, generation, steps } => {
                let recovered = |failure: &&mut PastFailure| {
                    failure.driver == driver && matches!(failure.outcome, Outcome::Live(life, _) if life == generation)
                };
                if let Some(failure) = self.history.failures.iter_mut().rev().find(recovered) {
                    failure.paces.push(DevicePace { guest, device, steps });
                }
            }
            Event::Quarantined { driver, reason } => {
                self.driver(&driver).quarantined = Some(reason);
                if let Some(failure) = self.open(&driver) {
                    failure.outcome = Outcome::Quarantined;
                }
            }
            Event::CleanStart { .. }
            | Event::GuestRebooted { .. }
            | Event::GuestEnded { .. }
            | Event::Stopping { .. }
            | Event::Warning { .. } => {
                let room = self.history.remarks.len() < MAX_REMARKS;
                self.history.remarks.extend(line.text.filter(|_| room).map(|text| (line.time, text)));
            }
            _ => {}
        }
    }

    fn driver(&mut self, name: &str) -> &mut Driver {
        let drivers = &mut self.history.drivers;
        let n = drivers.iter().position(|driver| driver.name == name).unwrap_or_else(|| {
            drivers.push(Driver { name: name.into(), ..Driver::default() });
            drivers.len() - 1
        });
        &mut drivers[n]
    }

    /// The last failure of `driver`, if nothing has followed yet.
    fn open(&mut self, driver: &str) -> Option<&mut PastFailure> {
        let last = self.history.failures.iter_mut().rev().find(|failure| failure.driver == driver)?;
        (last.outcome == Outcome::Open).then_some(last)
    }

    fn on_masked(&mut self, driver: String, device: String) {
        match self.open(&driver) {
            Some(failure) if !failure.masked.contains(&device) => failure.masked.push(device),
            Some(_) => {}
            None => self.masked.push((driver, device)),
        }
    }

    fn on_failed(&mut self, mut failure: PastFailure, counts: bool) {
        let _ = self.driver(&failure.driver);
        if let Some(before) = self.open(&failure.driver) {
            before.outcome = Outcome::FailedAgain;
        }
        failure.parts.detect_ms = Some(failure.detect_ms);
        let (driver, generation) = (failure.driver.clone(), failure.generation);
        let asked = self.requested.iter().find(|(name, life, _)| *name == driver && *life == generation);
        failure.requested = asked.map(|(.., kind)| kind.clone());
        let (mine, rest) = std::mem::take(&mut self.masked).into_iter().partition(|(name, _)| *name == driver);
        self.masked = rest;
        let mine: Vec<(String, String)> = mine;
        failure.masked = mine.into_iter().map(|(_, device)| device).collect();
        if counts {
            self.history.failures.push(failure);
        }
    }

    fn on_live(
        &mut self,
        driver: &str,
        generation: u32,
        outage_ms: Option<f64>,
        parts: RecoveryParts,
        frames: MaskedCounts,
    ) {
        if let Some(failure) = self.open(driver) {
            failure.outcome = Outcome::Live(generation, outage_ms);
            let method = parts.reset_method.clone();
            failure.parts = parts;
            failure.frames = frames;
            if !method.is_empty() {
                self.driver(driver).reset = Some(method);
            }
        } else {
            self.driver(driver).first_start.get_or_insert(parts);
        }
    }
}

/// The newest of `reports` and `reports.old` of the machine's folder `path` that has events.
pub fn folder(path: &Path, previous: bool) -> PathBuf {
    let (now, before) = (path.join("reports"), path.join("reports.old"));
    let usable = |dir: &Path| fs::metadata(dir.join(EVENT_LOG)).is_ok();
    if previous || (!usable(&now) && usable(&before)) { before } else { now }
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
