//! The machine's events in its run directory: a file of JSON lines that never holds half a line and never grows without
//! end. What cannot be written (a full disk) waits in memory and is written when that works again.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The event log's name in the folder of the reports.
pub const EVENT_LOG: &str = "events.jsonl";

/// Size at which the file is put aside; the run directory is mostly in memory.
const MAX_FILE: u64 = 2 << 20;

/// Most lines that wait while the disk is full; the oldest are dropped first.
const MAX_WAITING: usize = 4096;

/// The file.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    file: Option<File>,
    /// Length of the whole lines in the file, in bytes.
    length: u64,
    limit: u64,
    waiting: VecDeque<String>,
}

impl EventLog {
    /// A new log at `path`, which is made with the first event.
    pub fn new(path: PathBuf) -> Self {
        Self { path, file: None, length: 0, limit: MAX_FILE, waiting: VecDeque::new() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the older part of the log at `path` is.
    pub fn older(path: &Path) -> PathBuf {
        path.with_extension("old.jsonl")
    }

    /// Whether lines wait that could not be written.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Writes `line`, which ends in a newline, and what waits. Returns the error when writing begins to fail.
    pub(super) fn write(&mut self, line: &str) -> Option<io::Error> {
        let failing = self.is_waiting();
        self.waiting.push_back(line.to_owned());
        if self.waiting.len() > MAX_WAITING {
            self.waiting.pop_front();
        }
        while let Some(line) = self.waiting.front() {
            let line = line.clone();
            if let Err(error) = self.append(&line) {
                return (!failing).then_some(error);
            }
            self.waiting.pop_front();
        }
        None
    }

    fn append(&mut self, line: &str) -> io::Result<()> {
        if self.file.as_ref().is_some_and(is_removed) {
            // What is written there nobody would find.
            (self.file, self.length) = (None, 0);
        }
        if self.length > self.limit {
            self.file = None;
            fs::rename(&self.path, Self::older(&self.path))?;
            self.length = 0;
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let file = OpenOptions::new().create(true).append(true).open(&self.path)?;
                self.length = file.metadata()?.len();
                self.file.insert(file)
            }
        };
        if let Err(error) = file.write_all(line.as_bytes()) {
            // No half a line: the next one must start at the beginning of a line.
            let _ = file.set_len(self.length);
            return Err(error);
        }
        self.length += line.len() as u64;
        Ok(())
    }
}

/// Whether somebody has removed the open `file`.
fn is_removed(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.nlink() == 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_bounded_and_loses_no_line_at_the_seam() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut log = EventLog::new(path.clone());
        log.limit = 50;
        for n in 0..9 {
            assert!(log.write(&format!("line {n:05}\n")).is_none());
        }
        let text = fs::read_to_string(EventLog::older(&path)).unwrap() + &fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().next(), Some("line 00000"));
        assert_eq!(text.lines().count(), 9);
    }

    #[test]
    fn a_disk_that_is_full_for_a_while_loses_nothing_and_is_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("reports");
        let path = folder.join("events.jsonl");
        let mut log = EventLog::new(path.clone());
        assert!(log.write("one\n").is_some(), "the folder is missing: nothing can be written");
        assert!(log.write("two\n").is_none(), "told once");
        fs::create_dir(&folder).unwrap();
        assert!(log.write("three\n").is_none());
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\nthree\n");
    }

    #[test]
    fn a_log_that_somebody_removes_begins_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut log = EventLog::new(path.clone());
        log.limit = 5;
        for lines in ["one\n", "longer than the limit\n"] {
            assert!(log.write(lines).is_none());
            fs::remove_file(&path).unwrap();
            assert!(log.write("next\n").is_none(), "after {lines}");
            assert_eq!(fs::read_to_string(&path).unwrap(), "next\n");
        }
    }

    #[test]
    fn a_device_without_room_keeps_what_waits() {
        let mut log = EventLog::new("/dev/full".into());
        assert!(log.write("one\n").is_some());
        assert!((0..2 * MAX_WAITING).all(|_| log.write("more\n").is_none()));
        assert_eq!(log.waiting.len(), MAX_WAITING);
    }
}
