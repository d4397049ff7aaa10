//! Follows the events file of `umbra run --events` (JSON lines; `docs/events.md` describes them).

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

/// One event: its kind and generation, and all its fields.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    /// `driver-live`, `driver-failed`, ...
    pub event: String,
    /// The driver VM's life, where the event is about one.
    #[serde(default)]
    pub generation: u32,
    /// The other fields.
    #[serde(flatten)]
    pub fields: serde_json::Map<String, Value>,
}

impl Event {
    /// A field as text; empty when it is not there.
    pub fn text(&self, name: &str) -> &str {
        self.fields.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    /// A field as a number.
    pub fn number(&self, name: &str) -> Option<f64> {
        self.fields.get(name).and_then(Value::as_f64)
    }
}

/// Reads what is new in the file, a line at a time.
#[derive(Debug)]
pub struct Follow {
    path: PathBuf,
    read: u64,
    partial: Vec<u8>,
    waiting: VecDeque<Event>,
}

impl Follow {
    /// Follows a file that may not be there yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, read: 0, partial: Vec::new(), waiting: VecDeque::new() }
    }

    /// The next event, if there is one already.
    pub fn take(&mut self) -> Option<Event> {
        if self.waiting.is_empty() {
            self.read_more();
        }
        self.waiting.pop_front()
    }

    /// Gives back what was taken last: it is taken once more.
    pub fn put_back(&mut self, events: impl DoubleEndedIterator<Item = Event>) {
        events.rev().for_each(|event| self.waiting.push_front(event));
    }

    fn read_more(&mut self) {
        let Ok(mut file) = File::open(&self.path) else { return };
        let mut new = Vec::new();
        if file.seek(SeekFrom::Start(self.read)).is_err() || file.read_to_end(&mut new).is_err() {
            return;
        }
        self.read += new.len() as u64;
        self.partial.extend_from_slice(&new);
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            self.waiting.extend(serde_json::from_slice::<Event>(&line).ok());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn half_a_line_waits_for_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        let mut follow = Follow::new(path.clone());
        assert!(follow.take().is_none());
        let mut file = File::create(&path).unwrap();
        file.write_all(b"{\"event\":\"driver-live\",\"gene").unwrap();
        assert!(follow.take().is_none());
        file.write_all(b"ration\":2,\"outage_ms\":1.5}\n").unwrap();
        let event = follow.take().unwrap();
        assert_eq!((event.event.as_str(), event.generation, event.number("outage_ms")), ("driver-live", 2, Some(1.5)));
        assert!(follow.take().is_none());
    }
}
