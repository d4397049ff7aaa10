//! What `umbra run` reports: each event as a sentence on stderr, and as a JSON line in the file of `--events`.
//!
//! `docs/events.md` describes the fields. A file that cannot be written costs a warning, never a recovery, and none waits
//! for one that blocks: lines are written by threads. What `umbra events`, reports and metrics show comes from here alone:
//! [`RecentEvents`] in memory, [`EventLog`] in the run directory.

mod event;

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use serde::Serialize;

pub use event::Event;

use super::archive::Archive;
use super::log::EventLog;
use super::metrics::Metrics;
use super::recent::RecentEvents;
use super::schema::SCHEMA;
use super::writer::{Queued, Trouble, Writer};
use crate::base::time::Time;
use crate::base::untrusted_text;
use crate::base::wall;

/// Longest wait at the end of the run, for each place, until its lines are written.
const LAST_LINES: Duration = Duration::from_secs(2);

/// Ends of guests that are remembered. The error of a run is the first end that is a failure; one that comes after so many is printed
/// twice.
const MOST_ENDS: usize = 256;

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
    /// Warnings that come from the writers.
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
    schema: u32,
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

    /// Keeps them in `archive` as well, beyond the run.
    pub fn with_archive(mut self, archive: Option<Archive>) -> Self {
        if let Some(mut archive) = archive {
            self.add("the past", move |line| archive.write(line).map_or(Ok(()), |what| Err(Trouble::Passing(what))));
        }
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

    /// Counts them there from now on, or nowhere.
    pub fn set_metrics(&mut self, metrics: Option<Metrics>) {
        self.metrics = metrics;
    }

    /// Where events are counted, if they are.
    pub fn metrics(&self) -> Option<&Metrics> {
        self.metrics.as_ref()
    }

    /// Reports `event` in all places, without waiting for any.
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
            if matches!(event, Event::GuestEnded { .. }) && self.ends.len() < MOST_ENDS {
                self.ends.push(sentence.clone());
            }
        }
        let stamped = Stamped { seq: self.next, at_ns: Time::now().0, time: wall::now(), event, text, schema: SCHEMA };
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

    /// Reports the warnings of the places for lines since the last call.
    pub fn tell_troubles(&mut self) {
        while let Ok(what) = self.warnings.1.try_recv() {
            self.warn(what);
        }
    }

    /// Waits a bounded time until everything reported is written. What is reported later is written nowhere.
    pub fn finish(&mut self) {
        let places = self.lines.drain(..).chain(self.sentences.take());
        places.for_each(|place| place.finish(LAST_LINES));
    }

    /// Reports a warning.
    pub fn warn(&mut self, what: String) {
        self.tell(&Event::Warning { what });
    }

    /// Whether `sentence` was printed as the end of a guest.
    pub fn has_printed(&self, sentence: &str) -> bool {
        let sentence = untrusted_text::line(sentence);
        self.ends.contains(&sentence)
    }

    /// The newest events, in memory.
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
        // With stderr gone there is nowhere to report that.
        let _ = stderr.write_all(line.as_bytes());
        Ok(())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

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
        assert_eq!(lines[0]["schema"], SCHEMA);
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
