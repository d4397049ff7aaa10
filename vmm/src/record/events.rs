//! What `umbra run` reports: each event as a sentence on stderr, and as a JSON line in the file of `--events`.
//!
//! `docs/events.md` describes the fields. A file that cannot be written costs a warning, never a recovery, and none waits
//! for one that blocks: lines are written by threads. What `umbra events`, reports and metrics show comes from here alone:
//! [`RecentEvents`] in memory, [`EventLog`] in the run directory.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use serde::Serialize;

use super::log::EventLog;
use super::metrics::Metrics;
use super::parts::{Ms, Parts};
use super::recent::RecentEvents;
use super::writer::{Queued, Trouble, Writer};
use crate::base::time::Time;
use crate::base::{untrusted_text, wall};
use crate::lifecycle::Source;
use crate::wire::messages::{MaskedCounts, PaceSteps, SoundCounts};

/// How long the end of the run waits for lines that are not written yet, for each place.
const LAST_LINES: Duration = Duration::from_secs(2);

/// What happened.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A guest's vCPUs run.
    GuestRunning {
        /// The guest.
        guest: String,
    },
    /// A guest resets: it is started again.
    GuestRebooted {
        /// The guest.
        guest: String,
    },
    /// A guest has ended.
    GuestEnded {
        /// The guest.
        guest: String,
        /// How: `powered off`, `killed`, or what went wrong.
        how: String,
    },
    /// A guest's device that came later than its driver VM's life, or was connected with it again, is served.
    EndLive {
        /// The guest.
        guest: String,
        /// Its device.
        device: String,
        /// The driver VM.
        driver: String,
        /// Which life.
        generation: u32,
    },
    /// A generation of a driver VM is started.
    DriverStarting {
        /// The driver VM.
        driver: String,
        /// Which life.
        generation: u32,
    },
    /// A standby boots.
    StandbyStarting {
        /// The driver VM.
        driver: String,
        /// Which life it will be.
        generation: u32,
    },
    /// A standby waits for its turn.
    StandbyReady {
        /// The driver VM.
        driver: String,
        /// Which life it will be.
        generation: u32,
        /// How long it took to boot, ms.
        boot_ms: f64,
        /// It was restored from a snapshot.
        restored: bool,
    },
    /// A standby died while it waited; another one is started after a delay.
    StandbyFailed {
        /// The driver VM.
        driver: String,
        /// Which life it would have been.
        generation: u32,
        /// Why.
        reason: String,
    },
    /// A standby takes the device, or a spare takes over with its own.
    DriverAdopted {
        /// The driver VM.
        driver: String,
        /// Which life it is now.
        generation: u32,
        /// The device that serves from now on.
        device: String,
        /// How far it was: `ready` or `booting`; a spare `armed` or `booting`.
        standby: &'static str,
    },
    /// The carrier of a waiting spare's NIC changed: with one it takes over at once, without it does not.
    SpareCarrier {
        /// The driver VM.
        driver: String,
        /// Which life it will be.
        generation: u32,
        /// Link up.
        up: bool,
    },
    /// A restart that was asked for did not come about; the image of before is in use.
    RestartFailed {
        /// The driver VM.
        driver: String,
        /// Why.
        reason: String,
    },
    /// A generation got on.
    DriverStage {
        /// The driver VM.
        driver: String,
        /// Which life.
        generation: u32,
        /// `running`, `hello`, `nic`, `forwarding`, `carrier`.
        stage: &'static str,
        /// Since the process was started, ms.
        ms: f64,
        /// What the agent said, as the driver's name.
        detail: String,
    },
    /// A guest's device lost its driver VM; the shadow answers.
    Masked {
        /// The guest.
        guest: String,
        /// The device, as `net0` or `sound0`.
        device: String,
        /// The driver VM.
        driver: String,
        /// The life that was lost.
        generation: u32,
        /// `closed`, or the rule that the driver VM broke.
        cause: String,
    },
    /// A driver VM has failed.
    DriverFailed {
        /// The driver VM.
        driver: String,
        /// Which life.
        generation: u32,
        /// How it was noticed.
        source: Source,
        /// What happened.
        reason: String,
        /// From the first sign to the certainty, ms.
        detect_ms: f64,
    },
    /// The failed life is fenced and its evidence kept.
    DriverFenced {
        /// The driver VM.
        driver: String,
        /// Which life.
        generation: u32,
        /// From the certainty to the end of the process, ms.
        fence_ms: f64,
        /// The crash report, where it could be written.
        report: Option<String>,
    },
    /// The device was reset between two lives.
    DeviceReset {
        /// The driver VM.
        driver: String,
        /// The device.
        device: String,
        /// The method, or `none`.
        method: String,
        /// How long it took, ms.
        reset_ms: f64,
        /// What went wrong, if anything.
        error: Option<String>,
    },
    /// A driver VM serves.
    DriverLive {
        /// The driver VM.
        driver: String,
        /// Which life.
        generation: u32,
        /// From the mask to here, ms; none for the first life.
        outage_ms: Option<f64>,
        /// How long each part took, ms.
        parts: Parts,
        /// What became of the frames, summed over the guests.
        frames: MaskedCounts,
    },
    /// A guest's sound device plays again after an outage.
    SoundLive {
        /// The guest.
        guest: String,
        /// The device, as `sound0`.
        device: String,
        /// The driver VM.
        driver: String,
        /// Which life.
        generation: u32,
        /// What became of the samples.
        samples: SoundCounts,
    },
    /// How much a guest's device moved around an outage, two seconds after it.
    Pace {
        /// The guest.
        guest: String,
        /// The device, as `net0` or `sound0`.
        device: String,
        /// The driver VM.
        driver: String,
        /// The life that serves now.
        generation: u32,
        /// How much.
        steps: PaceSteps,
    },
    /// The NIC's carrier changed.
    Carrier {
        /// The driver VM.
        driver: String,
        /// Link up.
        up: bool,
    },
    /// The next generation gets nothing of what was recorded of a guest's device, and the guest is told.
    CleanStart {
        /// The driver VM.
        driver: String,
        /// The guest.
        guest: String,
        /// Its device: `net0`, `sound0`.
        device: String,
    },
    /// There will be no further generation.
    Quarantined {
        /// The driver VM.
        driver: String,
        /// Why.
        reason: String,
    },
    /// Someone asked for the end of a quarantine.
    Resumed {
        /// The driver VM.
        driver: String,
    },
    /// The run before was killed; this one has cleaned up after it.
    CleanedUp {
        /// The number of the supervisor that was killed.
        pid: u32,
        /// What was done.
        done: String,
    },
    /// Somebody asked for a crash.
    CrashRequested {
        /// The driver VM.
        driver: String,
        /// Which life.
        generation: u32,
        /// How: a kind of `umbra crash`.
        kind: String,
    },
    /// The machine is ending.
    Stopping {
        /// Why and how.
        how: String,
    },
    /// Something is not as it should be, and the machine goes on.
    Warning {
        /// What.
        what: String,
    },
}

impl Event {
    /// The sentence for people; `None` for what only measures.
    pub(crate) fn sentence(&self) -> Option<String> {
        Some(match self {
            Self::StandbyStarting { .. } | Self::StandbyReady { .. } | Self::Pace { .. } => return None,
            Self::DriverStage { .. } | Self::DriverFenced { report: None, .. } => return None,
            Self::DeviceReset { error: None, .. } => return None,
            Self::GuestRunning { guest } => format!("{guest}: running"),
            Self::GuestRebooted { guest } => format!("{guest}: reboots"),
            Self::EndLive { guest, device, driver, generation } => {
                format!("{guest}.{device} is served by {driver}, generation {generation}")
            }
            Self::GuestEnded { guest, how } => format!("{guest}: {how}"),
            Self::DriverStarting { driver, generation } => format!("{driver}: generation {generation} starts"),
            Self::StandbyFailed { driver, generation, reason } => {
                format!("{driver}: the standby (generation {generation}) failed: {reason}; another one follows")
            }
            Self::DriverAdopted { driver, generation, device, standby: standby @ ("armed" | "no-carrier") } => {
                format!("{driver}: the spare {device} takes over as generation {generation} (it was {standby})")
            }
            Self::SpareCarrier { driver, up: true, .. } => format!("{driver}: the spare has a carrier"),
            Self::SpareCarrier { driver, up: false, .. } => format!("{driver}: the spare has no carrier"),
            Self::DriverAdopted { driver, generation, standby, .. } => {
                format!("{driver}: the standby takes over as generation {generation} (it was {standby})")
            }
            Self::Masked { guest, device, driver, cause, .. } if cause == "closed" => {
                format!("{guest}.{device}: {driver} is gone; masked")
            }
            Self::Masked { guest, device, driver, cause, .. } => {
                format!("{guest}.{device}: {driver} broke a rule ({cause}); masked")
            }
            Self::RestartFailed { driver, reason } => {
                format!("{driver}: not restarted: {reason}")
            }
            Self::DriverFailed { driver, generation, source: Source::Planned | Source::Carrier, reason, .. } => {
                format!("{driver}: generation {generation} is replaced: {reason}")
            }
            Self::DriverFailed { driver, generation, reason, detect_ms, .. } => {
                format!("{driver}: generation {generation} failed: {reason} (detected in {})", Ms(*detect_ms))
            }
            Self::DriverFenced { driver, report: Some(report), .. } => format!("{driver}: report in {report}"),
            Self::DeviceReset { driver, method, error: Some(error), .. } => {
                format!("{driver}: the device's reset ({method}) failed: {error}; going on without")
            }
            Self::DriverLive { driver, generation, outage_ms: None, parts, .. } => {
                format!("{driver}: generation {generation} live ({parts})")
            }
            Self::DriverLive { driver, generation, outage_ms: Some(outage), parts, frames } => {
                let MaskedCounts { logged, replayed, dropped, unknown } = frames;
                format!(
                    "{driver}: generation {generation} live after {} ({parts}; frames: {logged} logged, {replayed} \
                     sent, {dropped} dropped, {unknown} of unknown fate)",
                    Ms(*outage)
                )
            }
            Self::SoundLive { guest, device, samples, .. } => {
                let SoundCounts { frames_skipped, frames_silent, xruns, .. } = samples;
                format!(
                    "{guest}.{device}: plays again (samples: {frames_skipped} skipped, {frames_silent} silent; {xruns} xruns)"
                )
            }
            Self::Carrier { driver, up: true } => format!("{driver}: carrier"),
            Self::Carrier { driver, up: false } => format!("{driver}: no carrier"),
            Self::CleanStart { driver, guest, device } => {
                format!(
                    "{driver}: lives in a row died while {guest}'s {device} was set up or replayed; {device} starts over (until then \
                     a NIC's link is down, a sound card is dead)"
                )
            }
            Self::Quarantined { driver, reason } => {
                format!(
                    "{driver}: quarantined: {reason}; its guests have no service (a NIC shows no link, a sound card is dead). \
                     `umbra resume {driver}` tries again"
                )
            }
            Self::Resumed { driver } => format!("{driver}: is tried again, as was asked for"),
            Self::CleanedUp { pid, done } => format!(
                "the run before (process {pid}) was killed: {done}; its reports are kept (`umbra report --previous`)"
            ),
            Self::CrashRequested { driver, generation, kind } => {
                format!("{driver}: generation {generation} is told to crash ({kind})")
            }
            Self::Stopping { how } => format!("stopping: {how}"),
            Self::Warning { what } => format!("warning: {what}"),
        })
    }
}

/// Whether sentences are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verbosity {
    /// On stderr.
    Sentences,
    /// Not at all.
    Quiet,
}

/// Where events go.
#[derive(Debug)]
pub struct Events {
    /// Sentences on stderr.
    sentences: Option<Writer>,
    /// JSON lines: the file of `--events`, and the log.
    lines: Vec<Writer>,
    /// What the writers have to tell.
    warnings: (Sender<String>, Receiver<String>),
    metrics: Option<Metrics>,
    past: RecentEvents,
    next: u64,
    /// The ends of guests that were printed, to say none twice.
    ends: Vec<String>,
}

/// An event with its number, its times and its sentence, as lines have it.
#[derive(Serialize)]
struct Stamped<'a> {
    seq: u64,
    at_ns: u64,
    time: String,
    #[serde(flatten)]
    event: &'a Event,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

impl Events {
    /// Sentences as `verbosity` says, and JSON lines into `file`.
    pub fn new(verbosity: Verbosity, file: Option<File>) -> Self {
        let warnings = mpsc::channel();
        let sentences = (verbosity == Verbosity::Sentences).then(|| stderr(warnings.0.clone())).flatten();
        let mut new = Self {
            sentences,
            lines: Vec::new(),
            warnings,
            metrics: None,
            past: RecentEvents::default(),
            next: 1,
            ends: Vec::new(),
        };
        if let Some(mut file) = file {
            new.add("the events file", move |line| {
                let failed = |error| Trouble::Last(format!("the events file cannot be written any more: {error}"));
                file.write_all(line.as_bytes()).map_err(failed)
            });
        }
        new
    }

    /// Keeps the lines in `log` as well.
    pub fn with_log(mut self, mut log: EventLog) -> Self {
        self.add("the event log", move |line| match log.write(line) {
            None => Ok(()),
            Some(error) => {
                let path = log.path().display();
                Err(Trouble::Passing(format!("{path} cannot be written ({error}); events wait in memory until it can")))
            }
        });
        self
    }

    fn add(&mut self, place: &'static str, write: impl FnMut(&str) -> Result<(), Trouble> + Send + 'static) {
        self.lines.extend(Writer::start(place, self.warnings.0.clone(), write));
    }

    /// Counts events in `metrics` as well.
    pub fn with_metrics(mut self, metrics: Option<Metrics>) -> Self {
        self.metrics = metrics;
        self
    }

    /// Where events are counted, if they are.
    pub fn metrics(&self) -> Option<&Metrics> {
        self.metrics.as_ref()
    }

    /// Tells `event`. Nothing is waited for.
    pub fn tell(&mut self, event: &Event) {
        if let Some(metrics) = &self.metrics {
            metrics.observe(event);
        }
        let text = event.sentence().map(|sentence| untrusted_text::line(&sentence));
        let mut lost = Vec::new();
        if let (Some(sentences), Some(sentence)) = (&mut self.sentences, &text) {
            if let Queued::TakenAfterLoss(told) = sentences.write(format!("umbra: {sentence}\n")) {
                lost.push(told);
            }
            if matches!(event, Event::GuestEnded { .. }) {
                self.ends.push(sentence.clone());
            }
        }
        let stamped = Stamped { seq: self.next, at_ns: Time::now().0, time: wall::now(), event, text };
        let Ok(line) = serde_json::to_string(&stamped) else { return };
        let mut line = untrusted_text::json(&line).into_owned();
        self.past.push(self.next, line.clone());
        self.next += 1;
        line.push('\n');
        self.lines.retain_mut(|place| match place.write(line.clone()) {
            Queued::Closed => false,
            Queued::TakenAfterLoss(told) => {
                lost.push(told);
                true
            }
            Queued::Taken | Queued::LeftOut => true,
        });
        lost.into_iter().for_each(|told| self.warn(told));
    }

    /// Tells what the places for lines have had to say since this was called last.
    pub fn tell_troubles(&mut self) {
        while let Ok(what) = self.warnings.1.try_recv() {
            self.warn(what);
        }
    }

    /// Waits a bounded time until all that was told is written. What is told later is written nowhere.
    pub fn finish(&mut self) {
        let places = self.lines.drain(..).chain(self.sentences.take());
        places.for_each(|place| place.finish(LAST_LINES));
    }

    /// Tells a warning.
    pub fn warn(&mut self, what: String) {
        self.tell(&Event::Warning { what });
    }

    /// Whether `sentence` was printed as the end of a guest.
    pub fn has_printed(&self, sentence: &str) -> bool {
        let sentence = untrusted_text::line(sentence);
        self.ends.contains(&sentence)
    }

    /// The events of late.
    pub fn past(&self) -> &RecentEvents {
        &self.past
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Sentences go past the lock of stderr, which whoever else logs would wait for while the terminal is held.
fn stderr(warnings: Sender<String>) -> Option<Writer> {
    let mut stderr = File::from(std::io::stderr().as_fd().try_clone_to_owned().ok()?);
    Writer::start("stderr", warnings, move |line| {
        // Nobody is left to be told that stderr is gone.
        let _ = stderr.write_all(line.as_bytes());
        Ok(())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_recovery_reads_as_a_sentence() {
        let parts = Parts {
            detect_ms: Some(0.4),
            reset_ms: Some(104.0),
            reset_method: "flr".into(),
            back_off_ms: Some(0.01),
            boot_ms: Some(5123.0),
            ..Parts::default()
        };
        let frames = MaskedCounts { logged: 14, replayed: 12, dropped: 0, unknown: 2 };
        let live = Event::DriverLive { driver: "nic0".into(), generation: 2, outage_ms: Some(6214.0), parts, frames };
        assert_eq!(
            live.sentence().unwrap(),
            "nic0: generation 2 live after 6.21 s (detect 0.4 ms, reset flr 104 ms, boot 5.12 s; frames: 14 logged, \
             12 sent, 0 dropped, 2 of unknown fate)"
        );
    }

    #[test]
    fn the_file_has_a_json_object_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        let mut events = Events::new(Verbosity::Quiet, Some(File::create(&path).unwrap()));
        events.tell(&Event::Carrier { driver: "nic0".into(), up: true });
        events.warn("x".into());
        events.finish();
        let text = std::fs::read_to_string(path).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines[0]["event"], "carrier");
        assert_eq!(lines[0]["up"], true);
        assert!(lines[0]["at_ns"].as_u64().unwrap() > 0);
        assert_eq!((&lines[0]["seq"], &lines[0]["text"]), (&1.into(), &"nic0: carrier".into()));
        assert_eq!(lines[1]["event"], "warning");
    }

    #[test]
    fn a_full_disk_is_no_failure() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut events = Events::new(Verbosity::Quiet, Some(full));
        events.warn("x".into());
        let until = Time::now() + Duration::from_secs(10);
        while !events.lines.is_empty() && Time::now() < until {
            events.warn("y".into());
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(events.lines.is_empty());
        events.tell_troubles();
        let (_, last) = events.past().after(events.next - 2).unwrap();
        assert!(last.contains("cannot be written any more"), "{last}");
    }

    #[test]
    fn a_pipe_that_nobody_reads_holds_up_nobody() {
        let (_reader, pipe) = nix::unistd::pipe().unwrap();
        let mut events = Events::new(Verbosity::Quiet, Some(File::from(pipe)));
        let start = Time::now();
        for _ in 0..3 {
            events.warn("x".repeat(100_000));
        }
        assert!(Time::now().since(start) < Duration::from_secs(1));
        assert!(events.past().after(2).is_some());
    }
}
