//! Where a running machine can be found: a folder with its control socket, its console logs and its crash reports.
//!
//! `$UMBRA_RUN_DIR/NAME`, or `/run/umbra/NAME` (`$XDG_RUNTIME_DIR/umbra/NAME` for users other than root). A lock on
//! the folder's file `lock` says that the machine runs: the kernel drops it with the process, so that nothing stale is
//! ever mistaken for a machine.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use thiserror::Error;

use crate::record::log::EVENT_LOG;

use crate::record::log::EventLog;

/// The control socket's name in a machine's folder.
const SOCKET: &str = "control.sock";

/// How the sockets of consoles end.
const CONSOLE_SOCKET: &str = ".console.sock";

/// The file with the kernel's orders of reset methods.
const RESETS: &str = "reset-methods.json";

/// Errors of run directories.
#[derive(Debug, Error)]
pub enum RunDirError {
    /// The machine runs.
    #[error("{0} is already running; `umbra status --name {0}` shows it, `umbra stop --name {0}` ends it")]
    AlreadyRunning(String),
    /// No folder.
    #[error("{what} {}; set UMBRA_RUN_DIR to a folder that you can write to", path.display())]
    Io {
        /// What failed.
        what: &'static str,
        /// With which path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A name that is no file name.
    #[error("{0:?} cannot name a machine: use letters, digits, `-`, `_` and `.` (or choose a name with --name)")]
    BadName(String),
    /// No such machine.
    #[error("no machine named {name} is running{}", others(.running))]
    NotRunning {
        /// The name.
        name: String,
        /// Those that run.
        running: Vec<String>,
    },
    /// None at all.
    #[error("no machine is running (nothing in {})", .0.display())]
    NoneRunning(PathBuf),
    /// Not even one that has ended.
    #[error("no machine is running or has run (nothing in {})", .0.display())]
    NoneKnown(PathBuf),
    /// Which one of those that have ended?
    #[error("several machines have run ({}); choose one with --name", .0.join(", "))]
    AmbiguousPast(Vec<String>),
    /// Which one?
    #[error("several machines are running ({}); choose one with --name", .0.join(", "))]
    Ambiguous(Vec<String>),
}

fn others(running: &[String]) -> String {
    if running.is_empty() { String::new() } else { format!("; these are: {}", running.join(", ")) }
}

/// What the run before left, where it did not end by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// The number of its supervisor.
    pub pid: u32,
    /// The kernel's orders of reset methods, by device, before it reset any.
    pub resets: BTreeMap<String, String>,
}

/// The folder of a machine that this process runs. The socket goes when it is dropped; reports and logs stay.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    name: String,
    lock: Flock<File>,
    left: Option<Left>,
    uncleaned: bool,
}

impl RunDir {
    /// Takes the folder for the machine `name` below `base`, and listens at its control socket.
    ///
    /// # Errors
    ///
    /// The machine runs already, or the folder cannot be made.
    pub fn claim(base: &Path, name: &str) -> Result<(Self, UnixListener), RunDirError> {
        check_name(name)?;
        let path = base.join(name);
        let fail = |what, path: &Path| {
            let path = path.to_owned();
            move |source| RunDirError::Io { what, path, source }
        };
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&path).map_err(fail("make the folder", &path))?;
        let lock_path = path.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(&lock_path);
        let lock = Flock::lock(lock.map_err(fail("open", &lock_path))?, FlockArg::LockExclusiveNonblock)
            .map_err(|_| RunDirError::AlreadyRunning(name.into()))?;
        let left = Left::read(&lock, &path);
        let reports = path.join("reports");
        // The evidence of the last run is kept once; a start that came to nothing has none.
        if has_evidence(&reports) {
            let _ = fs::remove_dir_all(path.join("reports.old"));
            let _ = fs::rename(&reports, path.join("reports.old"));
        } else {
            let _ = fs::remove_dir_all(&reports);
        }
        builder.create(&reports).map_err(fail("make the folder", &reports))?;
        let socket = path.join(SOCKET);
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).map_err(fail("listen at", &socket))?;
        let private = fs::Permissions::from_mode(0o600);
        fs::set_permissions(&socket, private).map_err(fail("restrict", &socket))?;
        listener.set_nonblocking(true).map_err(fail("listen at", &socket))?;
        let mut this = Self { path, name: name.into(), lock, left, uncleaned: false };
        // Whoever finds a number in here, and the file not locked, knows that nobody has cleaned up.
        this.write_pid(&std::process::id().to_string()).map_err(fail("write", &lock_path))?;
        Ok((this, listener))
    }

    fn write_pid(&mut self, pid: &str) -> io::Result<()> {
        self.lock.set_len(0)?;
        self.lock.write_all_at(pid.as_bytes(), 0)
    }

    /// What the run before left, if it was killed.
    pub fn left(&self) -> Option<&Left> {
        self.left.as_ref()
    }

    /// What the run before left could not be cleaned up, or this one leaves something: the next start is to try again.
    pub fn leave_to_the_next(&mut self) {
        self.uncleaned = true;
    }

    /// Notes the kernel's orders of reset methods, for the next run if this one is killed.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn note_resets(&self, resets: &BTreeMap<String, String>) -> io::Result<()> {
        fs::write(self.path.join(RESETS), serde_json::to_string(resets)?)
    }

    /// The machine's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder of the crash reports.
    pub fn reports(&self) -> PathBuf {
        self.path.join("reports")
    }

    /// The log of events, which is put aside together with the reports.
    pub fn event_log(&self) -> PathBuf {
        self.reports().join(EVENT_LOG)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The console log of the driver VM `driver`.
    pub fn console_log(&self, driver: &str) -> PathBuf {
        self.path.join(format!("{driver}.console.log"))
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.path.join(SOCKET));
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().ends_with(CONSOLE_SOCKET) {
                let _ = fs::remove_file(entry.path());
            }
        }
        if self.uncleaned {
            // What was found is still to be cleaned up, by the next who tries.
            let pid = self.left.as_ref().map_or_else(std::process::id, |left| left.pid);
            let _ = self.write_pid(&pid.to_string());
            return;
        }
        let _ = self.write_pid("");
        let _ = fs::remove_file(self.path.join(RESETS));
    }
}

/// Where viewers of the console of `guest` connect, below a machine's folder.
pub fn console_socket(folder: &Path, guest: &str) -> PathBuf {
    folder.join(format!("{guest}{CONSOLE_SOCKET}"))
}

/// A machine that runs or has run.
#[derive(Debug)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
    /// Its control socket, if it runs.
    pub stream: Option<UnixStream>,
}

/// Finds the machine `name` below `base`, running or not; without a name the only one that runs, or else the only one
/// that has run.
///
/// # Errors
///
/// There is none, or there are several.
pub fn find(base: &Path, name: Option<&str>) -> Result<Found, RunDirError> {
    match connect(base, name) {
        Ok((name, stream)) => Ok(Found { path: base.join(&name), name, stream: Some(stream) }),
        Err(error @ RunDirError::NotRunning { .. }) => match name.filter(|name| check_name(name).is_ok()) {
            Some(name) if base.join(name).is_dir() => {
                Ok(Found { path: base.join(name), name: name.into(), stream: None })
            }
            _ => Err(error),
        },
        Err(RunDirError::NoneRunning(_)) => {
            let entries = fs::read_dir(base).into_iter().flatten().flatten().filter(|entry| entry.path().is_dir());
            let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
            names.sort();
            match names.as_slice() {
                [] => Err(RunDirError::NoneKnown(base.into())),
                [name] => Ok(Found { path: base.join(name), name: name.clone(), stream: None }),
                _ => Err(RunDirError::AmbiguousPast(names)),
            }
        }
        Err(error) => Err(error),
    }
}

impl Left {
    /// What the file `lock`, which was not locked, and the folder say.
    fn read(lock: &File, path: &Path) -> Option<Self> {
        let mut pid = String::new();
        lock.take(16).read_to_string(&mut pid).ok()?;
        let pid = pid.trim().parse().ok()?;
        let resets = fs::read(path.join(RESETS)).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Some(Self { pid, resets: resets.unwrap_or_default() })
    }
}

/// The folder that has the machines' folders.
pub fn base() -> PathBuf {
    base_of(nix::unistd::geteuid().is_root(), |name| std::env::var_os(name))
}

/// The same, of root or another user with these environment variables; an empty one is none.
fn base_of(is_root: bool, variable: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    let folder = |name| variable(name).filter(|folder| !folder.is_empty()).map(PathBuf::from);
    folder("UMBRA_RUN_DIR").unwrap_or_else(|| {
        let user = if is_root { None } else { folder("XDG_RUNTIME_DIR") };
        user.unwrap_or_else(|| "/run".into()).join("umbra")
    })
}

/// The machines that run below `base`, by name, each with a connection to its control socket.
pub fn running(base: &Path) -> Vec<(String, UnixStream)> {
    let entries = fs::read_dir(base).into_iter().flatten().flatten();
    let running = entries.filter_map(|entry| {
        let stream = UnixStream::connect(entry.path().join(SOCKET)).ok()?;
        Some((entry.file_name().to_string_lossy().into_owned(), stream))
    });
    let mut running: Vec<_> = running.collect();
    running.sort_by(|a, b| a.0.cmp(&b.0));
    running
}

/// Connects to the machine `name` below `base`, or to the only one that runs.
///
/// # Errors
///
/// There is none, or there are several.
pub fn connect(base: &Path, name: Option<&str>) -> Result<(String, UnixStream), RunDirError> {
    let mut running = running(base);
    let names = || running.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    match name {
        Some(name) => match running.iter().position(|(running, _)| running == name) {
            Some(n) => Ok(running.swap_remove(n)),
            None => Err(RunDirError::NotRunning { name: name.into(), running: names() }),
        },
        None if running.len() > 1 => Err(RunDirError::Ambiguous(names())),
        None => running.pop().ok_or_else(|| RunDirError::NoneRunning(base.into())),
    }
}

fn check_name(name: &str) -> Result<(), RunDirError> {
    let valid = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(valid) {
        return Err(RunDirError::BadName(name.into()));
    }
    Ok(())
}

/// In the line of a [`crate::record::events::Event::GuestRunning`].
const GUEST_RAN: &str = r#""event":"guest-running""#;

/// Whether a run has left something to look at: crash reports, or events of a guest that ran.
fn has_evidence(reports: &Path) -> bool {
    let log = reports.join(EVENT_LOG);
    let logs = [EventLog::older(&log), log];
    let mut files = fs::read_dir(reports).into_iter().flatten().flatten().map(|entry| entry.path());
    let guest_ran = |log: &PathBuf| fs::read_to_string(log).is_ok_and(|text| text.contains(GUEST_RAN));
    files.any(|file| !logs.contains(&file)) || logs.iter().any(guest_ran)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_variable_names_no_folder() {
        let base = |is_root, run: &'static str, user: &'static str| {
            base_of(is_root, |name| Some(if name == "UMBRA_RUN_DIR" { run } else { user }.into()))
        };
        let folders = [(false, "/r", "/u"), (false, "", "/u"), (false, "", ""), (true, "", "/u")];
        let bases = folders.map(|(is_root, run, user)| base(is_root, run, user));
        assert_eq!(bases, ["/r", "/u/umbra", "/run/umbra", "/run/umbra"].map(PathBuf::from));
    }

    #[test]
    fn a_machine_runs_once() {
        let base = tempfile::tempdir().unwrap();
        let (first, _listener) = RunDir::claim(base.path(), "m").unwrap();
        assert!(matches!(RunDir::claim(base.path(), "m"), Err(RunDirError::AlreadyRunning(name)) if name == "m"));
        drop(first);
        let (second, _listener) = RunDir::claim(base.path(), "m").unwrap();
        assert_eq!(second.left(), None, "it ended by itself");
        second.note_resets(&BTreeMap::from([("0000:01:00.0".into(), "flr".into())])).unwrap();
        // As if it were killed.
        std::mem::forget(second);
        fs::remove_file(base.path().join("m/lock")).unwrap();
        fs::write(base.path().join("m/lock"), "4242").unwrap();
        let (third, _listener) = RunDir::claim(base.path(), "m").unwrap();
        let left = third.left().unwrap();
        assert_eq!((left.pid, left.resets["0000:01:00.0"].as_str()), (4242, "flr"));
        let mut third = third;
        third.leave_to_the_next();
        drop(third);
        assert_eq!(
            RunDir::claim(base.path(), "m").unwrap().0.left().map(|left| left.pid),
            Some(4242),
            "not cleaned up yet"
        );
    }

    #[test]
    fn a_socket_that_a_dead_process_left_is_replaced() {
        let base = tempfile::tempdir().unwrap();
        let dir = base.path().join("m");
        fs::create_dir_all(dir.join("reports")).unwrap();
        fs::write(dir.join("reports/nic0-gen1.txt"), "old").unwrap();
        drop(UnixListener::bind(dir.join(SOCKET)).unwrap());
        assert!(matches!(connect(base.path(), None), Err(RunDirError::NoneRunning(_))));
        let (run_dir, _listener) = RunDir::claim(base.path(), "m").unwrap();
        assert_eq!(connect(base.path(), None).unwrap().0, "m");
        assert!(dir.join("reports.old/nic0-gen1.txt").exists(), "evidence is kept");
        assert_eq!(fs::metadata(dir.join(SOCKET)).unwrap().permissions().mode() & 0o777, 0o600);
        drop(run_dir);
        assert!(!dir.join(SOCKET).exists());
    }

    #[test]
    fn a_start_that_fails_leaves_the_evidence_of_the_run_before_it() {
        let base = tempfile::tempdir().unwrap();
        let reports = base.path().join("m/reports");
        fs::create_dir_all(&reports).unwrap();
        let line = r#"{"seq":1,"event":"guest-running","guest":"web"}"#;
        fs::write(reports.join(EVENT_LOG), line).unwrap();
        for _ in 0..3 {
            drop(RunDir::claim(base.path(), "m").unwrap());
            // Its kernel is no kernel, say.
            fs::write(reports.join(EVENT_LOG), r#"{"seq":1,"event":"guest-ended","guest":"web"}"#).unwrap();
        }
        assert_eq!(fs::read_to_string(base.path().join("m/reports.old").join(EVENT_LOG)).unwrap(), line);
    }

    #[test]
    fn a_run_that_leaves_a_reset_behind_tells_the_next() {
        let base = tempfile::tempdir().unwrap();
        let (mut run_dir, _listener) = RunDir::claim(base.path(), "m").unwrap();
        run_dir.note_resets(&BTreeMap::from([("0000:01:00.0".into(), "flr".into())])).unwrap();
        run_dir.leave_to_the_next();
        drop(run_dir);
        let (next, _listener) = RunDir::claim(base.path(), "m").unwrap();
        let left = next.left().unwrap();
        assert_eq!((left.pid, left.resets["0000:01:00.0"].as_str()), (std::process::id(), "flr"));
    }

    #[test]
    fn several_machines_are_told_apart_by_name() {
        let base = tempfile::tempdir().unwrap();
        let _a = RunDir::claim(base.path(), "a").unwrap();
        let _b = RunDir::claim(base.path(), "b").unwrap();
        assert!(matches!(connect(base.path(), None), Err(RunDirError::Ambiguous(names)) if names == ["a", "b"]));
        assert_eq!(connect(base.path(), Some("b")).unwrap().0, "b");
        let error = connect(base.path(), Some("c")).unwrap_err().to_string();
        assert_eq!(error, "no machine named c is running; these are: a, b");
    }

    #[test]
    fn a_machine_that_has_ended_is_found_for_its_past() {
        let base = tempfile::tempdir().unwrap();
        let none = |name| find(base.path(), name).unwrap_err().to_string();
        assert!(none(None).starts_with("no machine is running or has run"));
        drop(RunDir::claim(base.path(), "a").unwrap());
        let found = find(base.path(), None).unwrap();
        assert_eq!((found.name.as_str(), found.stream.is_none()), ("a", true));
        drop(RunDir::claim(base.path(), "b").unwrap());
        assert_eq!(none(None), "several machines have run (a, b); choose one with --name");
        assert_eq!(none(Some("../a")), "no machine named ../a is running");
        let _running = RunDir::claim(base.path(), "b").unwrap();
        assert!(find(base.path(), None).unwrap().stream.is_some());
        assert_eq!(find(base.path(), Some("a")).unwrap().path, base.path().join("a"));
    }

    #[test]
    fn names_stay_below_the_base() {
        for name in ["", "..", ".hidden", "a/b", "a b", &"x".repeat(65)] {
            assert!(matches!(RunDir::claim(Path::new("/nonexistent"), name), Err(RunDirError::BadName(_))), "{name}");
        }
    }
}
