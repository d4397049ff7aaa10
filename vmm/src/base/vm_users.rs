//! Whom the processes of VMs are handed to once their VM is built, where root starts them: each to a user of its own, of a range that the
//! host has set aside for `umbra-vm` (subuid(5), subgid(5)), or all to `umbra-vm` where there is none.
//!
//! Invariant: no two processes have one number of the range. Who takes a number holds a lock on the file that is called so; the process
//! inherits that file, open, so that its number is free again when the supervisor *and* all threads of the process have closed it. All
//! supervisors of the host look in one folder, whatever their run directories.

use std::fs::{DirBuilder, File, TryLockError};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use thiserror::Error;

use super::error::chain;
use super::users::{USERS, User};

/// The user that the range is set aside for.
pub const OF_VMS: &str = "umbra-vm";

/// Ranges of users and of groups that belong to users, a line each: `NAME:FIRST:COUNT`.
pub const SUBUID: &str = "/etc/subuid";
/// The same, of groups.
pub const SUBGID: &str = "/etc/subgid";

/// Where numbers are locked: below a folder that is empty after a boot, and root's.
const LOCKS: &str = "/run/umbra-users";

/// Numbers that this process's user namespace has (user_namespaces(7)): of a container, fewer than the host's.
const MAPS: [&str; 2] = ["/proc/self/uid_map", "/proc/self/gid_map"];

/// Numbers of a range as distributions give them, and the first of them (`SUB_UID_COUNT`, `SUB_UID_MIN` of login.defs(5)).
const USUAL_COUNT: u32 = 65_536;
const USUAL_FIRST: u32 = 100_000;

/// Why there is no range that can be used, although one was meant.
#[derive(Debug, Error)]
pub enum RangeError {
    /// A file.
    #[error("read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A line of the user's.
    #[error(
        "{}:{line}: {text:?} is no range of users: write {OF_VMS}:FIRST:COUNT, where FIRST is not 0 (root) and FIRST + COUNT at most {}",
        path.display(), u32::MAX
    )]
    Line {
        /// In which file.
        path: PathBuf,
        /// Its number, from 1.
        line: usize,
        /// What it says.
        text: String,
    },
    /// A process has one number for user and group.
    #[error("the ranges of {OF_VMS} in {SUBUID} and {SUBGID} have no number in common: give it the same range in both")]
    Apart,
    /// In a container.
    #[error("this user namespace has none of the numbers of {OF_VMS} in {SUBUID} ({}): choose some that it has", MAPS.join(", "))]
    Unmapped,
}

/// The user `umbra-vm` of a host, and the numbers that are set aside for it.
#[derive(Debug)]
pub struct VmUsers {
    shared: User,
    range: Result<Vec<Range<u32>>, RangeError>,
    locks: PathBuf,
    has_warned: AtomicBool,
}

/// Whom one process is handed to.
#[derive(Debug)]
pub struct Taken {
    /// Its numbers.
    pub user: User,
    /// What keeps them from other processes: the process is to inherit it. `None`: they are not its own.
    pub lock: Option<File>,
}

impl VmUsers {
    /// Those of the host whose files are below `root`; `None`: it has no such user.
    pub fn find(root: &Path) -> Option<Self> {
        let shared = User::find(&below(root, USERS), OF_VMS).ok().flatten().filter(|user| user.uid != 0)?;
        let (range, locks) = (range(root, shared.uid), below(root, LOCKS));
        Some(Self { shared, range, locks, has_warned: AtomicBool::new(false) })
    }

    /// The numbers that are set aside; none: all processes are one user's.
    ///
    /// # Errors
    /// None can be used, although some were meant to be.
    pub fn range(&self) -> Result<&[Range<u32>], &RangeError> {
        self.range.as_deref()
    }

    /// Takes the first number of the range that no process has; the user that they share, if there is none, which is logged once.
    pub fn take(&self) -> Taken {
        let why = match self.take_own() {
            Ok(Some(taken)) => return taken,
            Ok(None) => "all numbers of its range are in use; a larger one does not run out".into(),
            Err(error) => format!("lock a number below {}: {}", self.locks.display(), chain(&error)),
        };
        if self.range.as_ref().is_ok_and(|range| !range.is_empty()) && !self.has_warned.swap(true, Ordering::Relaxed) {
            tracing::warn!("a VM's process has no user of its own and goes on as {OF_VMS}, as others may: {why}");
        }
        Taken { user: self.shared, lock: None }
    }

    fn take_own(&self) -> io::Result<Option<Taken>> {
        let mut numbers = self.range.iter().flatten().cloned().flatten().peekable();
        if numbers.peek().is_some() {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.locks)?;
        }
        for number in numbers {
            // Only read: the process could write to what it inherits.
            let flags = OFlag::O_RDONLY | OFlag::O_CREAT | OFlag::O_CLOEXEC;
            let file = File::from(open(&self.locks.join(number.to_string()), flags, Mode::S_IRUSR)?);
            match file.try_lock() {
                Ok(()) => return Ok(Some(Taken { user: User { uid: number, gid: number }, lock: Some(file) })),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
        Ok(None)
    }
}

/// A range that no user of the host below `root` has: its first and its last number.
pub fn unused_range(root: &Path) -> (u32, u32) {
    let texts = [SUBUID, SUBGID].map(|file| std::fs::read_to_string(below(root, file)).unwrap_or_default());
    let ends =
        texts.iter().flat_map(|text| text.lines()).filter_map(|line| Some(numbers(line.split(':').skip(1))?.end));
    let first = ends.max().unwrap_or(0).clamp(USUAL_FIRST, u32::MAX - USUAL_COUNT);
    (first, first + (USUAL_COUNT - 1))
}

fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn range(root: &Path, uid: u32) -> Result<Vec<Range<u32>>, RangeError> {
    let (uids, gids) = (ranges(&below(root, SUBUID), uid)?, ranges(&below(root, SUBGID), uid)?);
    if uids.is_empty() && gids.is_empty() {
        return Ok(Vec::new());
    }
    let mut usable = common(&uids, &gids);
    if usable.is_empty() {
        return Err(RangeError::Apart);
    }
    for map in MAPS {
        let text = read(Path::new(map))?;
        let mapped: Vec<_> = text.lines().filter_map(|line| mapped(line.split_whitespace())).collect();
        usable = common(&usable, &mapped);
    }
    if usable.is_empty() { Err(RangeError::Unmapped) } else { Ok(usable) }
}

/// What is empty where the host has no such file.
fn read(path: &Path) -> Result<String, RangeError> {
    match std::fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        other => other.map_err(|source| RangeError::Read { path: path.into(), source }),
    }
}

/// The ranges of `umbra-vm`, which a line may name by its number `uid` as well, in the file `path`.
fn ranges(path: &Path, uid: u32) -> Result<Vec<Range<u32>>, RangeError> {
    let text = read(path)?;
    let lines = text.lines().enumerate().filter_map(|(n, text)| {
        let mut fields = text.split(':').map(str::trim);
        let is_ours = fields.next().is_some_and(|name| name == OF_VMS || name.parse() == Ok(uid));
        is_ours.then(|| {
            let range = numbers(fields.by_ref()).filter(|range| range.start > 0 && fields.next().is_none());
            range.ok_or_else(|| RangeError::Line { path: path.into(), line: n + 1, text: text.into() })
        })
    });
    lines.collect()
}

/// `FIRST` and `COUNT`. The last number of all is none: to the kernel it means that nothing is to change.
fn numbers<'a>(mut fields: impl Iterator<Item = &'a str>) -> Option<Range<u32>> {
    let (first, count) = (fields.next()?.parse::<u32>().ok()?, fields.next()?.parse().ok()?);
    Some(first..first.checked_add(count)?).filter(|range| !range.is_empty())
}

/// A line of a namespace's map: the first number in it, the first outside of it, and how many.
fn mapped<'a>(mut fields: impl Iterator<Item = &'a str>) -> Option<Range<u32>> {
    let first = fields.next()?;
    numbers([first, fields.nth(1)?].into_iter())
}

/// The numbers that both have.
fn common(some: &[Range<u32>], others: &[Range<u32>]) -> Vec<Range<u32>> {
    let pairs = some.iter().flat_map(|one| others.iter().map(move |other| (one, other)));
    let both = pairs.map(|(one, other)| one.start.max(other.start)..one.end.min(other.end));
    both.filter(|range| !range.is_empty()).collect()
}

#[cfg(test)]
#[path = "vm_users_tests.rs"]
mod tests;
