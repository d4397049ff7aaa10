//! What is taken from a process, or from a thread of it, besides system calls: capabilities, files by name, core dumps, rights that a
//! program could gain.

use std::io;

use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError, Scope};
use nix::sys::prctl;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::unistd::getppid;

use crate::base::users::User;

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

/// No file that is open can be made larger than `bytes`, which a limit that the process was started with may have below. `for_good`: also
/// not by who may raise limits of this user's processes.
pub(super) fn limit_files(bytes: u64, for_good: bool) -> nix::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_FSIZE)?;
    setrlimit(Resource::RLIMIT_FSIZE, soft.min(bytes), if for_good { hard.min(bytes) } else { hard })
}

/// No program that is started from here on has a capability.
pub(super) fn bound_capabilities() {
    for capability in 0..64 as libc::c_ulong {
        // Ends at the first that the kernel does not know. Without CAP_SETPCAP the set stays, and is of no use.
        // SAFETY: the call takes no pointers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
            break;
        }
    }
}

/// Makes this thread `user`'s, without further groups. By system calls of its own: the C library's would have all threads of the process
/// make them, and some may no more. The process still ends with its supervisor.
pub(super) fn become_user(user: User) -> io::Result<()> {
    let (signal, parent) = (prctl::get_pdeathsig()?, getppid());
    let (uid, gid) = (user.uid, user.gid);
    // SAFETY: the calls take no pointers but to a list of no groups.
    let all = unsafe {
        [
            libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()),
            libc::syscall(libc::SYS_setresgid, gid, gid, gid),
            libc::syscall(libc::SYS_setresuid, uid, uid, uid),
        ]
    };
    if all.iter().any(|&done| done != 0) {
        return Err(io::Error::last_os_error());
    }
    // Other credentials took it away (prctl(2)).
    prctl::set_pdeathsig(signal)?;
    if signal.is_some() && getppid() != parent {
        return Err(io::Error::other("the supervisor has ended"));
    }
    Ok(())
}

/// `struct __user_cap_header_struct` (capset(2)).
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

/// `_LINUX_CAPABILITY_VERSION_3`: two words for each set.
const VERSION_3: u32 = 0x2008_0522;

/// Whether who has this thread's capabilities may raise limits of another user's processes (`CAP_SYS_RESOURCE`).
pub(super) fn may_raise_limits() -> bool {
    const SYS_RESOURCE: u32 = 24;
    let (header, mut sets) = (CapHeader { version: VERSION_3, pid: 0 }, [0_u32; 6]);
    // SAFETY: the kernel reads a header, and writes two structures of three words each, of which the first is what is effective.
    let done = unsafe { libc::syscall(libc::SYS_capget, &raw const header, sets.as_mut_ptr()) };
    done == 0 && sets[0] & 1 << SYS_RESOURCE != 0
}

/// Takes all capabilities from this thread.
pub(super) fn drop_capabilities() -> io::Result<()> {
    let (header, none) = (CapHeader { version: VERSION_3, pid: 0 }, [0_u32; 6]);
    // SAFETY: the kernel reads a header, and two structures of three words each.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// From here on this thread, and those that it starts, can open no file by name, and connect to nothing. Descriptors that are open stay
/// so. Does nothing on a kernel without Landlock.
pub(super) fn close_files() -> Result<(), RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        // Not signals: before Linux 6.15 threads of one process could then be out of each other's reach.
        .scope(Scope::AbstractUnixSocket)?
        .create()?
        .restrict_self()?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::File;
    use std::io::{ErrorKind, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// The version of Landlock that the kernel has; 0: none.
    fn landlock() -> libc::c_long {
        // SAFETY: with this flag the call takes no structure and makes nothing.
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, 1) }.max(0)
    }

    #[test]
    fn a_thread_without_files_can_name_none_and_uses_what_it_has_open() {
        let dir = tempfile::tempdir().unwrap();
        let mut open = File::create(dir.path().join("open")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (path, address) = (dir.path().to_owned(), listener.local_addr().unwrap());
        let refused = std::thread::spawn(move || {
            close_files().unwrap();
            open.write_all(b"x").unwrap();
            let named = [File::open(path.join("open")).err(), File::create(path.join("new")).err()];
            let moved = std::fs::rename(path.join("open"), path.join("moved")).err();
            let removed = std::fs::remove_file(path.join("open")).err();
            (named, moved, removed, TcpStream::connect(address).err())
        });
        let ([read, made], moved, removed, connected) = refused.join().unwrap();
        let denied = ErrorKind::PermissionDenied;
        let kind = |error: Option<std::io::Error>| error.map(|error| error.kind());
        match landlock() {
            0 => assert!(read.is_none(), "nothing is taken away where there is no Landlock"),
            version => {
                let all = [read, made, removed, moved].map(kind);
                assert_eq!(all, [Some(denied); 4]);
                assert_eq!(kind(connected), (version >= 4).then_some(denied));
            }
        }
    }
}
