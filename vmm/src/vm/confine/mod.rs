//! What a VM's process may do once its guest runs: use what it has open, and nothing else. Whoever takes the process over, from the
//! guest or from a driver VM, is to find no way on to the host.
//!
//! ```text
//!   the process starts     no new privileges, no core dumps; namespaces of its own, if root started it
//!   it opens and builds    as any program of the user: nothing of a guest's making is read yet
//!   each thread starts     } another user than root, no capabilities, no file by name (Landlock), its own system calls (seccomp)
//!   the guest is to run    } the same for the main thread, the event loop; an empty root folder and no larger files for all
//! ```
//! Invariants: no vCPU runs before all threads are confined; a thread that a confined one starts can do no more than that one, so that
//! vCPUs' threads start before the main thread is confined, and links' and helpers' tables are parts of those of who starts them; what is
//! opened later (a TAP interface that is there again, a device that is plugged) the supervisor opens and sends.

pub mod filter;
mod privileges;
pub mod tables;
pub mod trap;

use std::io::{self, Write};
use std::sync::OnceLock;

use landlock::RulesetError;
use nix::errno::Errno;
use seccompiler::BackendError;
use thiserror::Error;
use umbra_splitter::threads::{self, Inherits, Purpose};

use crate::base::error::chain;
use crate::base::namespaces::{self, Namespaces};
use crate::base::users::User;
use crate::base::vm_users::OF_VMS;
pub use crate::config::Confine as Mode;

/// Kinds of threads that differ in what they may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Category {
    /// The main thread: messages of the supervisor, devices.
    EventLoop,
    /// A vCPU, and the devices that it touches.
    Vcpu,
    /// Reads and writes a disk's file.
    Disk,
    /// Speaks with a driver VM's process.
    Link,
    /// Writes log and console, sends messages, watches eventfds.
    Helper,
}

impl Category {
    /// All.
    pub const ALL: [Self; 5] = [Self::EventLoop, Self::Vcpu, Self::Disk, Self::Link, Self::Helper];
}

/// What all threads of a VM's process are without, whatever their table says, and by which means; those of root's where it may take them.
pub const WITHOUT: &[(&str, &str)] = &[
    ("capabilities, and privileges that a program could gain", "capset(2), PR_SET_NO_NEW_PRIVS"),
    ("files by name, TCP, abstract sockets", "Landlock, without rules"),
    ("larger files, core dumps", "RLIMIT_FSIZE, RLIMIT_CORE"),
    ("root's name and groups, if root starts it", "setresuid(2), to a user of its own"),
    ("the host's files, network, IPC and host name, if root starts it", "namespaces, an empty root folder"),
    ("other processes, if root starts it", "a PID namespace, of which it is the first process"),
];

/// Errors of confining.
#[derive(Debug, Error)]
pub enum Error {
    /// What a process is without.
    #[error("give up what the process is to be without")]
    Process(#[source] Errno),
    /// The handler of the signal.
    #[error("have refused system calls reported (SIGSYS)")]
    Handler(#[source] io::Error),
    /// The user that the process is handed to.
    #[error(
        "go on as the user {user} ({OF_VMS}); who starts it needs CAP_SETUID and CAP_SETGID, also in a unit's CapabilityBoundingSet"
    )]
    User {
        /// Its numbers.
        user: User,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Namespaces of its own.
    #[error(
        "give the process namespaces of its own; who starts it needs CAP_SYS_ADMIN, also in a unit's CapabilityBoundingSet"
    )]
    Namespaces(#[from] namespaces::Error),
    /// Capabilities.
    #[error("give up all capabilities")]
    Capabilities(#[source] io::Error),
    /// Landlock.
    #[error("give up the file system (Landlock)")]
    Files(#[from] RulesetError),
    /// A table that makes no program.
    #[error("make a filter of system calls")]
    Program(#[from] BackendError),
    /// The kernel does not take it.
    #[error("have system calls filtered (seccomp); this kernel lacks it: `confine = \"off\"` does without")]
    Filter(#[source] io::Error),
}

/// What the process of root loses besides: its name, and the host's namespaces.
#[derive(Clone, Copy, Debug, Default)]
pub struct OfRoot {
    /// Whose its threads are once they are confined.
    pub user: Option<User>,
    /// It has namespaces of its own, with an empty root folder.
    pub namespaces: bool,
}

struct Begun {
    mode: Mode,
    user: Option<User>,
    namespaces: Option<Namespaces>,
}

static BEGUN: OnceLock<Begun> = OnceLock::new();

fn mode() -> Mode {
    BEGUN.get().map_or(Mode::Off, |begun| begun.mode)
}

fn namespaces() -> Option<&'static Namespaces> {
    BEGUN.get().and_then(|begun| begun.namespaces.as_ref())
}

/// To be called first in a VM's process, before any thread is started. `of_root` is for one that root started.
///
/// # Errors
/// The kernel refuses what every program may do, or namespaces.
pub fn begin(mode: Mode, of_root: OfRoot) -> Result<(), Error> {
    let namespaces = (of_root.namespaces && mode == Mode::On).then(Namespaces::split_off).transpose()?;
    if BEGUN.get_or_init(|| Begun { mode, user: of_root.user, namespaces }).mode == Mode::Off {
        return Ok(());
    }
    privileges::of_process().map_err(Error::Process)?;
    trap::install().map_err(Error::Handler)?;
    threads::at_start(|purpose, inherits| {
        let category = match (purpose, inherits) {
            (Purpose::Brief, Inherits::Confinement) => return,
            (Purpose::Vcpu, _) => Category::Vcpu,
            (Purpose::Disk, _) => Category::Disk,
            (Purpose::Link, _) => Category::Link,
            (Purpose::Helper, _) => Category::Helper,
            (Purpose::Brief, Inherits::Everything) => Category::EventLoop,
        };
        if let Err(error) = enter(category, inherits) {
            // It must not run without, and nobody waits for what it could say.
            let _ = writeln!(io::stderr(), "umbra: confine a thread: {}", chain(&error));
            std::process::exit(1);
        }
    });
    Ok(())
}

/// The process may lock all of its memory for a function that is passed through, now or later.
pub fn expect_function() {
    if mode() != Mode::Off {
        privileges::raise_locked_memory();
    }
}

/// From here on no file that the process has open grows beyond `bytes`: a write there fails with `EFBIG`. The supervisor raises that where
/// a file is to grow, and there is no limit where it may not; `for_good`: none ever is to.
///
/// # Errors
/// The kernel refuses what every program may do.
pub fn limit_files(bytes: u64, for_good: bool) -> Result<(), Error> {
    let Some(begun) = BEGUN.get().filter(|begun| begun.mode == Mode::On) else { return Ok(()) };
    if !for_good && begun.user.is_some() && !privileges::may_raise_limits() {
        return Ok(());
    }
    privileges::limit_files(bytes, for_good).map_err(Error::Process)
}

/// Confines the main thread, whose guest is to run next.
///
/// # Errors
/// It cannot be confined; the guest must not run.
pub fn lock_down() -> Result<(), Error> {
    if let Some(namespaces) = namespaces() {
        namespaces.empty_root()?;
    }
    enter(Category::EventLoop, Inherits::Everything)
}

/// Takes from this thread all but what its `category` needs.
fn enter(category: Category, inherits: Inherits) -> Result<(), Error> {
    let mode = mode();
    if mode == Mode::Off {
        return Ok(());
    }
    if inherits == Inherits::Everything {
        privileges::bound_capabilities();
        if mode == Mode::On {
            if let Some(namespaces) = namespaces() {
                namespaces.enter_network()?;
            }
            if let Some(user) = BEGUN.get().and_then(|begun| begun.user) {
                privileges::become_user(user).map_err(|source| Error::User { user, source })?;
            }
            privileges::close_files()?;
        }
        privileges::drop_capabilities().map_err(Error::Capabilities)?;
    }
    for program in &filter::programs(category, mode)? {
        filter::install(program).map_err(Error::Filter)?;
    }
    threads::mark_confined();
    Ok(())
}
