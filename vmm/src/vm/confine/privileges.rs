//! What is taken from a process, or from a thread of it, besides system calls: capabilities, files by name, core dumps, rights that a
//! program could gain.

use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};
use nix::sys::prctl;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

/// Newest version of Landlock whose rights are known here. What an older kernel does not know is left out.
const KNOWN: ABI = ABI::V6;

/// What a whole process is without, from its start on.
pub(super) fn of_process() -> nix::Result<()> {
    prctl::set_no_new_privs()?;
    // A guest's memory belongs in no file.
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    if nix::unistd::geteuid().is_root() {
        // Nobody without CAP_SYS_PTRACE looks into it. Another user's stays open to that user's supervisor, which finds by its
        // environment what was left behind.
        prctl::set_dumpable(false)?;
    }
    Ok(())
}

/// Lets the process lock all memory that it may: without capabilities it cannot raise the limit later, when a function comes.
pub(super) fn raise_locked_memory() {
    let raised = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    if let Err(error) = raised {
        // Without the right to: it stays as the user has it, and `umbra doctor` says what that comes to.
        tracing::debug!(%error, "raise the limit of locked memory");
    }
}

/// `struct __user_cap_header_struct` (capset(2)).
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

/// Takes all capabilities from this thread, and those that it could gain.
pub(super) fn drop_capabilities() -> io::Result<()> {
    /// `_LINUX_CAPABILITY_VERSION_3`: two words for each set.
    const VERSION_3: u32 = 0x2008_0522;
    for capability in 0..64 as libc::c_ulong {
        // Ends at the first that the kernel does not know. Without CAP_SETPCAP the set stays, and is of no use.
        // SAFETY: the call takes no pointers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            break;
        }
    }
    let (header, none) = (CapHeader { version: VERSION_3, pid: 0 }, [0_u32; 6]);
    // SAFETY: the kernel reads a header, and two structures of three words each.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// From here on this thread, and those that it starts, can open no file by name but below `folder`, and connect to nothing. Descriptors
/// that are open stay so. Does nothing on a kernel without Landlock.
pub(super) fn close_files(folder: Option<&Path>) -> Result<(), RulesetError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        // Not signals: before Linux 6.15 threads of one process could then be out of each other's reach.
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    if let Some(folder) = folder.and_then(|folder| PathFd::new(folder).ok()) {
        let rights = AccessFs::ReadFile
            | AccessFs::ReadDir
            | AccessFs::WriteFile
            | AccessFs::MakeReg
            | AccessFs::RemoveFile
            | AccessFs::Truncate;
        rules = rules.add_rule(PathBeneath::new(folder, rights))?;
    }
    rules.restrict_self()?;
    Ok(())
}
