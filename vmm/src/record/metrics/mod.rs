//! Metrics in OpenMetrics text: counters and histograms that follow the events, and the present state.
//!
//! The supervisor feeds ([`Metrics::observe`], [`Metrics::show`]) and never waits; [`server`] answers in a thread of its
//! own. Off unless the machine asks for it. `docs/observe.md` lists the metrics.

mod now;
mod server;

use std::fmt::Write as _;
use std::sync::{Arc, Mutex};

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

pub use server::{Server, ServerError};

use super::events::Event;
use super::parts::RecoveryParts;
use super::status::Status;
use crate::base::lock::lock;
use crate::wire::messages::MaskedCounts;

/// Upper bounds of the outage histogram, in seconds: from a spare that takes over at once to a cold boot under emulation.
const OUTAGE_BUCKETS: [f64; 14] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Driver {
    driver: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cause {
    driver: String,
    source: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Part {
    driver: String,
    part: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Fate {
    driver: String,
    fate: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    machine: String,
    version: &'static str,
}

type Seconds = Counter<f64, std::sync::atomic::AtomicU64>;

/// A machine's metrics.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Arc<Registry>,
    now: Arc<Mutex<Option<Status>>>,
    failures: Family<Cause, Counter>,
    outage: Family<Driver, Histogram, fn() -> Histogram>,
    parts: Family<Part, Seconds>,
    frames: Family<Fate, Counter>,
    samples: Family<Fate, Counter>,
    clean_starts: Family<Driver, Counter>,
    quarantines: Family<Driver, Counter>,
    reboots: Counter,
    warnings: Counter,
}

impl Metrics {
    /// Metrics of the machine `name`, all zero.
    pub fn new(name: &str) -> Self {
        let now = Arc::new(Mutex::new(None));
        let mut this = Self {
            registry: Arc::default(),
            now: now.clone(),
            failures: Family::default(),
            outage: Family::new_with_constructor(|| Histogram::new(OUTAGE_BUCKETS)),
            parts: Family::default(),
            frames: Family::default(),
            samples: Family::default(),
            clean_starts: Family::default(),
            quarantines: Family::default(),
            reboots: Counter::default(),
            warnings: Counter::default(),
        };
        let mut registry = Registry::with_prefix("umbra");
        let build = Build { machine: name.into(), version: env!("CARGO_PKG_VERSION") };
        registry.register("machine", "The machine and the version that runs it", Info::new(build));
        registry.register("driver_failures", "Failures of driver VMs by how they were noticed", this.failures.clone());
        registry.register_with_unit(
            "driver_outage",
            "Outages as the guests' devices saw them, from the mask to live",
            Unit::Seconds,
            this.outage.clone(),
        );
        registry.register_with_unit(
            "driver_recovery",
            "Time spent in each part of the recoveries",
            Unit::Seconds,
            this.parts.clone(),
        );
        registry.register("driver_frames", "What became of frames during outages", this.frames.clone());
        registry.register("driver_samples", "What became of sound frames during outages", this.samples.clone());
        let help = "Devices of guests that started over, because lives died of what was replayed";
        registry.register("driver_clean_starts", help, this.clean_starts.clone());
        registry.register("driver_quarantines", "Driver VMs that were given up", this.quarantines.clone());
        registry.register("guest_reboots", "Guests that were rebooted", this.reboots.clone());
        registry.register("warnings", "Warnings given", this.warnings.clone());
        registry.register_collector(Box::new(now::Now(now)));
        this.registry = Arc::new(registry);
        this
    }

    /// Counts `event`.
    pub fn observe(&self, event: &Event) {
        match event {
            // Replaced by plan, or because of its NIC's carrier: no failure.
            Event::DriverFailed { driver, source, .. } if source.is_failure() => {
                self.failures.get_or_create(&Cause { driver: driver.clone(), source: source.to_string() }).inc();
            }
            Event::DriverLive { driver, outage_ms: Some(outage), parts, frames, .. } => {
                self.outage.get_or_create(&Driver { driver: driver.clone() }).observe(outage / 1000.0);
                self.add_parts(driver, parts);
                self.add_frames(driver, frames);
            }
            Event::EndLive { driver, frames, .. } => self.add_frames(driver, frames),
            Event::SoundLive { driver, samples, .. } => {
                for (fate, count) in [
                    ("skipped", samples.frames_skipped),
                    ("silent", samples.frames_silent),
                    ("overrun", samples.frames_overrun),
                ] {
                    self.samples.get_or_create(&Fate { driver: driver.clone(), fate }).inc_by(count);
                }
            }
            Event::CleanStart { driver, .. } => {
                self.clean_starts.get_or_create(&Driver { driver: driver.clone() }).inc();
            }
            Event::Quarantined { driver, .. } => {
                self.quarantines.get_or_create(&Driver { driver: driver.clone() }).inc();
            }
            Event::GuestRebooted { .. } => drop(self.reboots.inc()),
            Event::Warning { .. } => drop(self.warnings.inc()),
            _ => {}
        }
    }

    fn add_frames(&self, driver: &str, frames: &MaskedCounts) {
        let MaskedCounts { logged, replayed, dropped, unknown } = *frames;
        for (fate, count) in [("logged", logged), ("replayed", replayed), ("dropped", dropped), ("unknown", unknown)] {
            self.frames.get_or_create(&Fate { driver: driver.into(), fate }).inc_by(count);
        }
    }

    fn add_parts(&self, driver: &str, parts: &RecoveryParts) {
        for (part, ms) in parts.named() {
            if let Some(ms) = ms.filter(|ms| *ms > 0.0) {
                self.parts.get_or_create(&Part { driver: driver.into(), part }).inc_by(ms / 1000.0);
            }
        }
    }

    /// Shows `status` as the present state.
    pub fn show(&self, status: Status) {
        *lock(&self.now) = Some(status);
    }

    /// All metrics as OpenMetrics text.
    pub fn text(&self) -> String {
        let mut out = String::new();
        if text::encode(&mut out, &self.registry).is_err() {
            // Nothing of ours can fail in a string; an empty but valid answer is better than none.
            out.clear();
            let _ = writeln!(out, "# EOF");
        }
        out
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
