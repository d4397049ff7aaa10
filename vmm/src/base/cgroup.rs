//! Control groups (cgroups(7), version 2): what the processes in one may take of the host together, bounded by the kernel.
//!
//! Groups are made in one that is *delegated*: a part of the tree that its manager (systemd: `Delegate=`, a container's runtime) leaves to
//! whoever runs in it. The kernel lets no group hand controllers down that has processes itself, so this process goes into a leaf first.
//!
//! ```text
//!   BASE/supervisor           this process
//!   BASE/vm-web               one process of a VM each, from its start to its end
//!   BASE/vm-nic0.1
//! ```
//! Invariants: a group is removed when the last who holds it lets go, and again later where its process is not quite gone yet; with the
//! last of all BASE is as it was found. What a process that was killed has left is removed by the next that makes groups in BASE.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use thiserror::Error;

use super::error::chain;
use super::lock::lock;

/// Where the process is that makes groups, so that their parent has none. As `DelegateSubgroup=` of a systemd unit it is there already.
const LEAF: &str = "supervisor";
/// How groups begin that are made here.
const PREFIX: &str = "vm-";
/// What says that a group is delegated, to root and to anybody (systemd, <https://systemd.io/CGROUP_DELEGATION>).
const MARKS: [&str; 2] = ["trusted.delegate", "user.delegate"];
/// The processes of a group: a number that is written there moves that process, 0 the one that writes.
const PROCESSES: &str = "cgroup.procs";
/// The controllers that a group hands down.
const HANDED_DOWN: &str = "cgroup.subtree_control";
/// The process that writes.
const SELF: &str = "0";
/// Groups of one name at a time: of a VM that has ended and whose process the kernel has not let go yet, and the next.
const OF_ONE_NAME: usize = 8;
/// Period in which the processor time of a group is bounded, µs. A fifth of the kernel's default: whoever has used its part up waits for
/// less than 20 ms, and a share of 5 % is the shortest that the kernel takes, 1 ms.
const CPU_PERIOD_US: u64 = 20_000;

/// Why no groups can be made.
#[derive(Debug, Error)]
pub enum Error {
    /// No cgroup2 file system.
    #[error("the host has no control groups of version 2 (no file system cgroup2 is mounted in which this process is)")]
    NoTree,
    /// The usual case of a program that is started by hand.
    #[error("no control group is delegated to this process, which is in {}", .0.display())]
    NotDelegated(PathBuf),
    /// Only leaves have both.
    #[error("the control group {} has other processes, and so cannot have groups with bounds in it", .0.display())]
    Occupied(PathBuf),
    /// A file of the tree.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

/// The tree of groups, and where in it this process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// Where the tree is mounted.
    mount: PathBuf,
    /// The group of this process, below that.
    own: PathBuf,
}

impl Tree {
    /// The tree of the host whose files are below `root`; `None`: there is none, or this process is outside of what is mounted of it.
    pub fn find(root: &Path) -> Option<Self> {
        let read = |path: &str| fs::read_to_string(root.join(path)).ok();
        let own = group_of(&read("proc/self/cgroup")?)?;
        let (mount, own) = mounted(&read("proc/self/mountinfo")?, &own)?;
        Some(Self { mount: root.join(mount.strip_prefix("/").ok()?), own })
    }

    /// The folder of the group with this path from the top of the tree.
    pub fn group(&self, path: &Path) -> PathBuf {
        self.mount.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The controllers of the group with this path from the top of the tree; none: it is not there, or has none.
    pub fn controllers_of(&self, path: &Path) -> Vec<String> {
        let text = fs::read_to_string(self.group(path).join("cgroup.controllers")).unwrap_or_default();
        text.split_whitespace().map(ToOwned::to_owned).collect()
    }

    /// The group of this process, from the top of the tree, for people.
    pub fn own(&self) -> PathBuf {
        Path::new("/").join(&self.own)
    }

    /// The group in which this process may make others.
    ///
    /// # Errors
    /// None is delegated to it.
    pub fn delegated(&self) -> Result<PathBuf, Error> {
        let own = self.mount.join(&self.own);
        if is_delegated(&own) || self.is_container() {
            return Ok(own);
        }
        match own.parent() {
            Some(parent) if own.ends_with(LEAF) && is_delegated(parent) => Ok(parent.into()),
            _ => Err(Error::NotDelegated(self.own())),
        }
    }

    /// Whether the top of the tree is not the host's, as in a container with a namespace of groups, and may be written to: it is the
    /// container's own. The host's top has no type.
    fn is_container(&self) -> bool {
        let may_write = |file: &str| OpenOptions::new().write(true).open(self.mount.join(file)).is_ok();
        self.own.as_os_str().is_empty() && self.mount.join("cgroup.type").exists() && may_write(PROCESSES)
    }

    /// The path of the group `dir` from the top of the tree.
    fn shown(&self, dir: &Path) -> PathBuf {
        Path::new("/").join(dir.strip_prefix(&self.mount).unwrap_or(dir))
    }
}

/// The group of version 2 in the text of `/proc/PID/cgroup`; `None`: it has none, or one that is outside of this namespace, or gone.
fn group_of(text: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let is_inside = !path.split('/').any(|part| part == "..") && !path.ends_with(" (deleted)");
    is_inside.then(|| path.into())
}

/// Where the tree is mounted by the text of `/proc/self/mountinfo`, and the group `own` below that.
fn mounted(mounts: &str, own: &Path) -> Option<(PathBuf, PathBuf)> {
    mounts.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (top, place) = (fields.next()?.strip_prefix('/')?, fields.next()?);
        let own = own.strip_prefix(top).ok()?;
        (file_system.split(' ').next() == Some("cgroup2")).then(|| (place.into(), own.into()))
    })
}

fn is_delegated(dir: &Path) -> bool {
    MARKS.iter().any(|mark| attribute(dir, mark).as_deref() == Some(b"1"))
}

/// An extended attribute, or its beginning.
fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let (path, name) = (CString::new(path.as_os_str().as_bytes()).ok()?, CString::new(name).ok()?);
    let mut value = [0_u8; 8];
    // SAFETY: both strings end with a zero byte; the kernel writes into `value` no more than it is long.
    let length = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.get(..usize::try_from(length).ok()?).map(<[u8]>::to_vec)
}

/// In which group others are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// In that which is delegated to this process.
    Delegated,
    /// In a group with this name, which is made for it in the group with this path from the top of the tree.
    In(&'a Path, &'a str),
}

/// What a group may take. Where the kernel, or whoever delegates, has no such controller, that part is not bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Memory, bytes: of the process, and of what it has made the kernel keep for it, the cache of its files included.
    pub memory: u64,
    /// Swap beside that, bytes.
    pub swap: u64,
    /// Processes and threads.
    pub threads: u32,
    /// Processor time, percent of one processor.
    pub cpu_percent: Option<u32>,
}

/// A group with others in it. Clones are the same.
#[derive(Clone, Debug)]
pub struct Cgroups(Arc<Base>);

#[derive(Debug)]
struct Base {
    tree: Tree,
    dir: PathBuf,
    /// This process went from `dir` into the leaf.
    moved: bool,
    /// `dir` was made.
    made: bool,
    memory: AtomicBool,
    threads: AtomicBool,
    cpu: AtomicBool,
    /// Groups that could not be removed yet.
    left: Mutex<Vec<PathBuf>>,
    has_warned: AtomicBool,
}

impl Cgroups {
    /// Gets the group at `place` ready for others.
    ///
    /// # Errors
    /// It is not this process's to use. All is as it was then.
    pub fn open(tree: Tree, place: Place<'_>) -> Result<Self, Error> {
        let dir = match place {
            Place::Delegated => tree.delegated()?,
            Place::In(path, name) => {
                let above = tree.group(path);
                for controller in ["memory", "pids"] {
                    hand_down(&tree, &above, controller)?;
                }
                above.join(name)
            }
        };
        let moves = place == Place::Delegated && dir == tree.mount.join(&tree.own);
        let new = || AtomicBool::new(false);
        let mut base = Base {
            tree,
            dir,
            moved: false,
            made: false,
            memory: new(),
            threads: new(),
            cpu: new(),
            left: Mutex::default(),
            has_warned: new(),
        };
        if moves {
            let leaf = base.dir.join(LEAF);
            base.moved = true;
            make_dir(&leaf).map_err(failed("make the control group", &leaf))?;
            write(&leaf, PROCESSES, SELF).map_err(failed("go into the control group", &leaf))?;
        } else if matches!(place, Place::In(..)) {
            base.made = true;
            make_dir(&base.dir).map_err(failed("make the control group", &base.dir))?;
        }
        base.memory = hand_down(&base.tree, &base.dir, "memory")?.into();
        base.threads = hand_down(&base.tree, &base.dir, "pids")?.into();
        base.remove_stale();
        Ok(Self(Arc::new(base)))
    }

    /// What the groups have no bounds of, although they should have, as the names of controllers.
    pub fn lacks(&self) -> Vec<&'static str> {
        let has = [("memory", &self.0.memory), ("pids", &self.0.threads)];
        has.into_iter().filter(|(_, has)| !has.load(Ordering::Relaxed)).map(|(name, _)| name).collect()
    }

    /// The group that has the others in it, from the top of the tree.
    pub fn path(&self) -> PathBuf {
        self.0.tree.shown(&self.0.dir)
    }

    /// Makes a group for the process of `vm`, which goes into it by writing [`SELF_INTO`] to the file that is returned. That takes some ms:
    /// the kernel waits for all processors first. `None`, and a line in the log once: it cannot be made.
    pub fn make(&self, vm: &str, bounds: &Bounds) -> Option<(Group, File)> {
        let made = self.try_make(vm, bounds);
        made.inspect_err(|error| self.warn(&format!("{vm}: {}", chain(error)))).ok()
    }

    /// Says once what processes go without.
    fn warn(&self, why: &str) {
        if !self.0.has_warned.swap(true, Ordering::Relaxed) {
            tracing::warn!("a VM's process has no control group of its own, and so no bounds: {why}");
        }
    }

    fn try_make(&self, vm: &str, bounds: &Bounds) -> Result<(Group, File), Error> {
        let base = &self.0;
        base.remove_left();
        let names = (1..=OF_ONE_NAME).map(|n| if n == 1 { vm.into() } else { format!("{vm}-{n}") });
        let mut last = None;
        for name in names {
            let dir = base.dir.join(format!("{PREFIX}{name}"));
            match fs::create_dir(&dir) {
                Ok(()) => {
                    // From here on it is removed again.
                    let group = Group { dir, base: Arc::clone(base) };
                    let file = group.set_up(vm, bounds)?;
                    return Ok((group, file));
                }
                Err(source) if source.kind() == ErrorKind::AlreadyExists => last = Some((dir, source)),
                Err(source) => return Err(failed("make the control group", &dir)(source)),
            }
        }
        let (dir, source) = last.unwrap_or_else(|| (base.dir.clone(), ErrorKind::AlreadyExists.into()));
        Err(failed("make the control group", &dir)(source))
    }
}

/// What a process writes to go into a group.
pub const SELF_INTO: &[u8] = SELF.as_bytes();

/// A group of one process; removed when dropped.
#[derive(Debug)]
pub struct Group {
    dir: PathBuf,
    base: Arc<Base>,
}

/// How a process of a group has run out of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutOfMemory {
    /// The group has reached its bound, in bytes.
    OfItsOwn(u64),
    /// The host has, or a group around it.
    OfTheHost,
}

impl Group {
    fn set_up(&self, vm: &str, bounds: &Bounds) -> Result<File, Error> {
        let set = |file: &'static str, text: &str| match write(&self.dir, file, text) {
            // A kernel without it: swap that is not counted, one before 4.19.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            other => other.map_err(failed("set a bound of the control group by", &self.dir.join(file))),
        };
        if self.base.memory.load(Ordering::Relaxed) {
            // All that is of the VM ends together, and as one event.
            set("memory.oom.group", "1")?;
            set("memory.max", &bounds.memory.to_string())?;
            set("memory.swap.max", &bounds.swap.to_string())?;
        }
        if self.base.threads.load(Ordering::Relaxed) {
            set("pids.max", &bounds.threads.to_string())?;
        }
        if let Some(percent) = bounds.cpu_percent {
            let quota = u64::from(percent) * CPU_PERIOD_US / 100;
            match self.base.hand_down_cpu() {
                Ok(true) => set("cpu.max", &format!("{quota} {CPU_PERIOD_US}"))?,
                Ok(false) => {
                    tracing::warn!("{vm} has no bound of processor time: the controller `cpu` is not delegated")
                }
                Err(error) => tracing::warn!("{vm} has no bound of processor time: {}", chain(&error)),
            }
        }
        let processes = self.dir.join(PROCESSES);
        OpenOptions::new().write(true).open(&processes).map_err(failed("open", &processes))
    }

    /// Whether the process `pid` is in it, or was when it ended. Where it is not, the log says so once.
    pub fn has(&self, pid: u32) -> bool {
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/cgroup")) else { return true };
        let own = self.dir.strip_prefix(&self.base.tree.mount).unwrap_or(&self.dir);
        let has = group_of(&text).is_some_and(|group| group.ends_with(own));
        if !has {
            Cgroups(Arc::clone(&self.base)).warn(&format!("it could not go into {}", self.path().display()));
        }
        has
    }

    /// Its path from the top of the tree.
    pub fn path(&self) -> PathBuf {
        self.base.tree.shown(&self.dir)
    }

    /// The bytes of memory that it takes; `None`: they are not counted.
    pub fn memory(&self) -> Option<u64> {
        self.number("memory.current")
    }

    /// The bytes of memory that it may take; `None`: there is no bound.
    pub fn memory_max(&self) -> Option<u64> {
        self.number("memory.max")
    }

    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.dir.join(file)).ok()?.trim().parse().ok()
    }

    /// What lifts its bound of memory, from any thread; it may be gone by then.
    pub fn lifter(&self) -> impl FnOnce() + Send + use<> {
        let dir = self.dir.clone();
        move || {
            if let Err(error) = write(&dir, "memory.max", "max") {
                tracing::debug!(%error, "lift the bound of memory of {}", dir.display());
            }
        }
    }

    /// Whether a process of it was ended by the kernel for want of memory, and whose.
    pub fn out_of_memory(&self) -> Option<OutOfMemory> {
        let events = fs::read_to_string(self.dir.join("memory.events")).ok()?;
        (count(&events, "oom_kill") > 0).then(|| match count(&events, "oom") {
            0 => OutOfMemory::OfTheHost,
            _ => OutOfMemory::OfItsOwn(self.memory_max().unwrap_or(u64::MAX)),
        })
    }

    /// Gives all of its threads as much of the processors, beside other groups, as this nice value would beside other processes: where
    /// groups share processors, those of threads count within their group alone.
    pub fn set_nice(&self, nice: i32) {
        if self.base.cpu.load(Ordering::Relaxed)
            && let Err(error) = write(&self.dir, "cpu.weight.nice", &nice.to_string())
        {
            tracing::debug!(%error, "the share of {} in the processors", self.dir.display());
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !remove(&self.dir) {
            lock(&self.base.left).push(std::mem::take(&mut self.dir));
        }
    }
}

impl Base {
    fn remove_left(&self) {
        lock(&self.left).retain(|dir| !remove(dir));
    }

    /// Has the groups share the processors, from the first on that is bounded: the kernel then counts the nice values of threads within
    /// their group alone, which the others need not be bothered with.
    fn hand_down_cpu(&self) -> Result<bool, Error> {
        if self.cpu.load(Ordering::Relaxed) {
            // Again it would wait for groups that are removed just then.
            return Ok(true);
        }
        if self.made
            && let Some(above) = self.dir.parent()
        {
            hand_down(&self.tree, above, "cpu")?;
        }
        let has = hand_down(&self.tree, &self.dir, "cpu")?;
        self.cpu.store(has, Ordering::Relaxed);
        Ok(has)
    }

    /// Removes what is left of runs before; what has processes stays.
    fn remove_stale(&self) {
        for group in self.groups() {
            let _ = fs::remove_dir(group);
        }
    }

    /// The groups of VMs in it, those of other machines too.
    fn groups(&self) -> impl Iterator<Item = PathBuf> + use<> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().as_bytes().starts_with(PREFIX.as_bytes())).map(|entry| entry.path())
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        self.remove_left();
        // Another machine in it keeps its bounds.
        if self.moved && self.groups().next().is_none() {
            for controller in ["cpu", "memory", "pids"] {
                let _ = write(&self.dir, HANDED_DOWN, &format!("-{controller}"));
            }
            let leaf = self.dir.join(LEAF);
            let back = write(&self.dir, PROCESSES, SELF).and_then(|()| fs::remove_dir(&leaf));
            if let Err(error) = back {
                tracing::debug!(%error, "leave the control group {}", leaf.display());
            }
        }
        if self.made {
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// Has the group `dir` hand `controller` down to those in it. Whether it has that itself.
fn hand_down(tree: &Tree, dir: &Path, controller: &str) -> Result<bool, Error> {
    let file = dir.join("cgroup.controllers");
    let has = fs::read_to_string(&file).map_err(failed("read", &file))?;
    if !has.split_whitespace().any(|has| has == controller) {
        return Ok(false);
    }
    match write(dir, HANDED_DOWN, &format!("+{controller}")) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(Error::Occupied(tree.shown(dir))),
        Err(error) => Err(failed("hand a controller down by", &dir.join(HANDED_DOWN))(error)),
    }
}

/// Writes to a file that is there.
fn write(dir: &Path, file: &str, text: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(dir.join(file))?.write_all(text.as_bytes())
}

fn make_dir(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// Removes a group. False: it has processes, of which the last may be about to end.
fn remove(dir: &Path) -> bool {
    fs::remove_dir(dir).is_ok() || !dir.exists()
}

/// The number behind `key` in a file of lines `KEY NUMBER`.
fn count(text: &str, key: &str) -> u64 {
    let number = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok());
    number.unwrap_or_default()
}

#[cfg(test)]
#[path = "cgroup_tests.rs"]
mod tests;
