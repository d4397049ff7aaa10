//! What is kept of runs beyond their end, and beyond the host's next boot: a folder for each run in the state directory,
//! `MACHINE/NUMBER`, with the event log and the crash reports as they are in the run directory.
//!
//! A run has a folder from the moment on at which there is something to look at: a guest runs, or a driver VM has failed. The folders of
//! older runs go then, as far as [`Keep`] says.
//!
//! Invariant: nothing of it harms a machine. The event log's writer has a thread for it, which waits for the disk alone; what cannot be
//! written is a warning, once.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, Metadata};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::log::{EVENT_LOG, EventLog};
use crate::base::user_folder;
use crate::config::Keep;

/// Environment variable: the folder of the machines' past.
pub const FOLDER: &str = "UMBRA_STATE_DIR";

/// Most events that wait for something worth a folder, and for a disk on which there can be none; a start has some dozens.
const MAX_WAITING: usize = 4096;
/// In the lines of events behind which there is something to look at.
const WORTH: [&str; 3] = [r#""event":"guest-running""#, r#""event":"driver-failed""#, r#""event":"quarantined""#];
/// The end of the name of a file that is being copied.
const UNFINISHED: &str = ".new";

/// The folder that has those of the machines: `$UMBRA_STATE_DIR`, else `/var/lib/umbra` for root, else `$XDG_STATE_HOME/umbra` or
/// `~/.local/state/umbra`. `None`: there is no home.
pub fn base() -> Option<PathBuf> {
    user_folder::of(FOLDER, "/var/lib/umbra", ("XDG_STATE_HOME", ".local/state"), "umbra")
}

/// The past of a machine that runs.
#[derive(Debug)]
pub struct Archive {
    /// The machine's folder.
    machine: PathBuf,
    /// The run directory's reports.
    reports: PathBuf,
    keep: Keep,
    run: Run,
    /// What has been copied of the reports: size and time of each.
    copied: BTreeMap<OsString, (u64, SystemTime)>,
    /// The last change of the reports' folder that was looked at.
    seen: Option<SystemTime>,
    /// The last try has failed, which was reported.
    failing: bool,
}

/// The run's own folder.
#[derive(Debug)]
enum Run {
    /// There is none: the events wait.
    Waiting(Vec<String>),
    There(PathBuf, EventLog),
}

impl Archive {
    /// The past of `machine`, below `base`, whose crash reports come to `reports`.
    pub fn new(base: &Path, machine: &str, reports: PathBuf, keep: Keep) -> Self {
        let machine = base.join(machine);
        Self {
            machine,
            reports,
            keep,
            run: Run::Waiting(Vec::new()),
            copied: BTreeMap::new(),
            seen: None,
            failing: false,
        }
    }

    /// Keeps an event, `line` with its newline, and the crash reports that are there by now. Returns why that begins to fail.
    pub(super) fn write(&mut self, line: &str) -> Option<String> {
        let result = self.try_write(line).and_then(|()| self.copy_reports(false));
        let begins = result.is_err() && !self.failing;
        self.failing = result.is_err();
        let error = result.err().filter(|_| begins)?;
        Some(format!(
            "what happens in this run is not kept for `umbra report --run` at present: {}: {error}; make room there, or set {FOLDER} to a \
             folder that you can write to",
            self.machine.display()
        ))
    }

    fn try_write(&mut self, line: &str) -> io::Result<()> {
        if let Run::Waiting(lines) = &mut self.run {
            if lines.len() < MAX_WAITING {
                lines.push(line.into());
            }
            if !lines.iter().any(|line| WORTH.iter().any(|worth| line.contains(worth))) {
                return Ok(());
            }
            let folder = begin(&self.machine)?;
            tidy(&self.machine, &folder, self.keep);
            let log = EventLog::new(folder.join(EVENT_LOG));
            let Run::Waiting(lines) = std::mem::replace(&mut self.run, Run::There(folder, log)) else { return Ok(()) };
            return self.log_all(&lines);
        }
        self.log(line)
    }

    /// Each of them, also where the disk has no room for one before: what cannot be written waits in the log.
    fn log_all(&mut self, lines: &[String]) -> io::Result<()> {
        lines.iter().map(|line| self.log(line)).fold(Ok(()), io::Result::and)
    }

    fn log(&mut self, line: &str) -> io::Result<()> {
        let Run::There(_, log) = &mut self.run else { return Ok(()) };
        match log.write(line) {
            Some(error) => Err(error),
            // It has failed before, and keeps what it could not write.
            None if log.is_waiting() => Err(io::ErrorKind::Other.into()),
            None => Ok(()),
        }
    }

    /// Copies the crash reports that are new or have changed, if the folder has changed since the last look, or `in_any_case`.
    fn copy_reports(&mut self, in_any_case: bool) -> io::Result<()> {
        let Run::There(folder, _) = &self.run else { return Ok(()) };
        // Each report is written beside and renamed: the folder's own time changes.
        let changed = fs::metadata(&self.reports).and_then(|metadata| metadata.modified()).ok();
        if changed.is_none() || (changed == self.seen && !in_any_case) {
            return Ok(());
        }
        let there = files(&self.reports);
        for (name, metadata) in &there {
            let state = (metadata.len(), metadata.modified()?);
            if is_report(name) && self.copied.get(name) != Some(&state) {
                replace(&self.reports.join(name), &folder.join(name))?;
                self.copied.insert(name.clone(), state);
            }
        }
        // The run directory has the newest alone.
        self.copied.retain(|name, _| {
            let kept = there.iter().any(|(there, _)| there == name);
            kept || fs::remove_file(folder.join(name)).is_err()
        });
        self.seen = changed;
        Ok(())
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        // With the run there is nobody left to be warned.
        let _ = self.copy_reports(true);
    }
}

fn is_report(name: &OsStr) -> bool {
    Path::new(name).extension().is_some_and(|end| end == "json" || end == "txt")
}

/// The files of a folder; what cannot be looked at is left out.
fn files(folder: &Path) -> Vec<(OsString, Metadata)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let files = entries.filter_map(|entry| Some((entry.file_name(), entry.metadata().ok()?)));
    files.filter(|(_, metadata)| metadata.is_file()).collect()
}

/// Copies `from` to `to`, whole or not at all.
fn replace(from: &Path, to: &Path) -> io::Result<()> {
    let mut new = to.as_os_str().to_owned();
    new.push(UNFINISHED);
    let new = PathBuf::from(new);
    let copied = fs::read(from).and_then(|bytes| fs::write(&new, bytes)).and_then(|()| fs::rename(&new, to));
    if copied.is_err() {
        let _ = fs::remove_file(&new);
    }
    copied
}

/// Makes the folder of the next run.
fn begin(machine: &Path) -> io::Result<PathBuf> {
    DirBuilder::new().recursive(true).mode(0o700).create(machine)?;
    let mut number = runs(machine).last().map_or(1, |run| run.number + 1);
    loop {
        let folder = machine.join(number.to_string());
        match DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => return Ok(folder),
            // Another machine of this name, with a run directory of its own, was quicker.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
            Err(error) => return Err(error),
        }
    }
}

/// Removes the folders of the oldest runs, until the others and `now` are within the bounds.
fn tidy(machine: &Path, now: &Path, keep: Keep) {
    let mut past = runs(machine);
    past.retain(|run| run.folder != now);
    let age = Duration::from_secs(u64::from(keep.days) * 86_400);
    let oldest = SystemTime::now().checked_sub(age);
    let mut bytes: u64 = past.iter().map(Kept::bytes).sum();
    let mut left = past.len();
    for run in &past {
        let is_old = oldest.is_some_and(|oldest| run.changed().is_some_and(|changed| changed < oldest));
        if left < keep.runs as usize && bytes <= keep.size.0 && !is_old {
            return;
        }
        (bytes, left) = (bytes - run.bytes(), left - 1);
        if let Err(error) = fs::remove_dir_all(&run.folder) {
            tracing::debug!(%error, folder = %run.folder.display(), "remove what is kept of an old run");
        }
    }
}

/// What is kept of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its number, from 1.
    pub number: u32,
    /// Its folder.
    pub folder: PathBuf,
}

impl Kept {
    /// Bytes of its files.
    pub fn bytes(&self) -> u64 {
        files(&self.folder).iter().map(|(_, metadata)| metadata.len()).sum()
    }

    /// When its last event was written.
    fn changed(&self) -> Option<SystemTime> {
        fs::metadata(self.folder.join(EVENT_LOG)).and_then(|metadata| metadata.modified()).ok()
    }
}

/// The runs that are kept of the machine with this folder, the oldest first.
pub fn runs(machine: &Path) -> Vec<Kept> {
    let entries = fs::read_dir(machine).into_iter().flatten().flatten();
    let run = |entry: fs::DirEntry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        Some(Kept { number, folder: entry.path() })
    };
    let mut runs: Vec<_> = entries.filter_map(run).collect();
    runs.sort_by_key(|run| run.number);
    runs
}

/// The machines of which runs are kept below `base`, by name.
pub fn machines(base: &Path) -> Vec<String> {
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    let names = entries.filter(|entry| !runs(&entry.path()).is_empty());
    let mut names: Vec<_> = names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::MemorySize;

    const RAN: &str = "{\"seq\":2,\"event\":\"guest-running\"}\n";

    struct Place {
        dir: tempfile::TempDir,
        keep: Keep,
    }

    impl Place {
        fn new(keep: Keep) -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("reports")).unwrap();
            Self { dir, keep }
        }

        fn archive(&self) -> Archive {
            Archive::new(&self.dir.path().join("state"), "web", self.dir.path().join("reports"), self.keep)
        }

        fn report(&self, name: &str, text: &str) {
            let reports = self.dir.path().join("reports");
            fs::write(reports.join("new"), text).unwrap();
            fs::rename(reports.join("new"), reports.join(name)).unwrap();
        }

        fn runs(&self) -> Vec<u32> {
            runs(&self.dir.path().join("state/web")).iter().map(|run| run.number).collect()
        }

        fn read(&self, name: &str) -> Option<String> {
            fs::read_to_string(self.dir.path().join("state/web").join(name)).ok()
        }
    }

    #[test]
    fn a_run_is_kept_with_its_reports_from_the_first_event_on() {
        let place = Place::new(Keep::default());
        let mut archive = place.archive();
        assert_eq!(archive.write("{\"seq\":1}\n"), None);
        assert_eq!(place.runs(), [0; 0], "a start that comes to nothing leaves nothing");
        assert_eq!(archive.write(RAN), None);
        assert_eq!(place.read("1/events.jsonl").unwrap(), format!("{{\"seq\":1}}\n{RAN}"));
        place.report("nic0-gen1.txt", "a report");
        archive.write("{\"seq\":3}\n");
        assert_eq!(place.read("1/nic0-gen1.txt").unwrap(), "a report");
        place.report("nic0-gen1.txt", "with the rest of it");
        fs::write(place.dir.path().join("reports/events.jsonl"), "not copied").unwrap();
        place.report("nic0-gen2.json", "{}");
        drop(archive);
        assert_eq!(place.read("1/nic0-gen1.txt").unwrap(), "with the rest of it");
        assert_eq!(place.read("1/nic0-gen2.json").unwrap(), "{}");
        assert!(place.read("1/events.jsonl").unwrap().ends_with("{\"seq\":3}\n"));
    }

    #[test]
    fn reports_that_the_run_directory_has_no_more_go() {
        let place = Place::new(Keep::default());
        let mut archive = place.archive();
        place.report("nic0-gen1.txt", "old");
        archive.write(RAN);
        fs::remove_file(place.dir.path().join("reports/nic0-gen1.txt")).unwrap();
        place.report("nic0-gen33.txt", "new");
        drop(archive);
        assert_eq!((place.read("1/nic0-gen1.txt"), place.read("1/nic0-gen33.txt").unwrap()), (None, "new".into()));
    }

    #[test]
    fn the_oldest_runs_go_by_number_size_and_age() {
        let run = |place: &Place| drop(place.archive().write(RAN));
        let few = Place::new(Keep { runs: 3, ..Keep::default() });
        (0..5).for_each(|_| run(&few));
        assert_eq!(few.runs(), [3, 4, 5]);

        let small = Place::new(Keep { size: MemorySize(1 << 20), ..Keep::default() });
        (0..3).for_each(|_| run(&small));
        fs::write(small.dir.path().join("state/web/1/nic0-gen1.txt"), vec![b'x'; 1 << 20]).unwrap();
        run(&small);
        assert_eq!(small.runs(), [2, 3, 4]);

        let young = Place::new(Keep { days: 2, ..Keep::default() });
        (0..3).for_each(|_| run(&young));
        let log = fs::File::options().append(true).open(young.dir.path().join("state/web/1/events.jsonl")).unwrap();
        log.set_modified(SystemTime::now() - Duration::from_secs(3 * 86_400)).unwrap();
        run(&young);
        assert_eq!(young.runs(), [2, 3, 4]);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_told_once_and_tried_again() {
        let place = Place::new(Keep::default());
        let state = place.dir.path().join("state");
        fs::write(&state, "in the way").unwrap();
        let mut archive = place.archive();
        assert_eq!(archive.write("{\"seq\":1}\n"), None);
        let told = archive.write(RAN).unwrap();
        assert!(told.contains("state/web") && told.contains(FOLDER), "{told}");
        assert_eq!(archive.write("{\"seq\":3}\n"), None, "once");
        fs::remove_file(&state).unwrap();
        assert_eq!(archive.write("{\"seq\":4}\n"), None);
        assert_eq!(place.read("1/events.jsonl").unwrap().lines().count(), 4);
    }

    #[test]
    fn what_has_waited_for_a_folder_waits_for_room_as_well() {
        let place = Place::new(Keep::default());
        let mut archive = place.archive();
        let folder = place.dir.path().join("state/web/1");
        archive.run = Run::There(folder.clone(), EventLog::new(folder.join(EVENT_LOG)));
        assert!(archive.log_all(&["one\n".into(), "two\n".into()]).is_err());
        fs::create_dir_all(&folder).unwrap();
        archive.write("three\n");
        assert_eq!(place.read("1/events.jsonl").unwrap(), "one\ntwo\nthree\n");
    }

    #[test]
    fn a_disk_without_room_is_told_once_and_loses_nothing_for_long() {
        let place = Place::new(Keep::default());
        let mut archive = place.archive();
        archive.write(RAN);
        // As a log that cannot be written.
        let log = place.dir.path().join("state/web/1/events.jsonl");
        archive.run = Run::There(log.parent().unwrap().into(), EventLog::new("/dev/full".into()));
        assert!(archive.write("{\"seq\":3}\n").is_some());
        assert_eq!(archive.write("{\"seq\":4}\n"), None);
        let Run::There(_, log) = &archive.run else { panic!() };
        assert!(log.is_waiting());
    }
}
