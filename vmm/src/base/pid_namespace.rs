//! Starting processes as the first of a PID namespace of their own (pid_namespaces(7)): no other process has a number there, so that none
//! can be signalled, traced or asked for.
//!
//! The thread that starts one goes on in its own namespace; what it starts next is in a new one, until it takes that back.
//!
//! To the first process of a namespace signals from within it do nothing for which it has no handler, `SIGABRT` and `SIGKILL` among them;
//! faults end it as any other, and so do signals from outside, those of the kernel at its parent's end included. Its parent has the
//! number 0 there, whether it is still there or not: that is seen by a descriptor of it, [`this_process`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::process::{Child, Command};
use std::thread::Builder;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};

use super::namespaces::{Error, errno, failed};

/// The namespace of this process.
const OWN: &str = "/proc/self/ns/pid";

/// What makes namespaces for processes that are started.
#[derive(Debug)]
pub struct PidNamespaces {
    own: File,
}

impl PidNamespaces {
    /// Whether processes can be started so: a thread tries it.
    ///
    /// # Errors
    /// Without `CAP_SYS_ADMIN`, or where a filter of system calls is in the way.
    pub fn find() -> Result<Self, Error> {
        let no_thread = failed("start a thread");
        let own = File::open(OWN).map_err(|error| errno(&error)).map_err(failed("open the PID namespace"))?;
        let this = Self { own };
        let tried = Builder::new().name("namespaces".into()).spawn(move || {
            begin()?;
            this.end()?;
            Ok(this)
        });
        tried.map_err(|_| no_thread(Errno::EAGAIN))?.join().unwrap_or_else(|_| Err(no_thread(Errno::EINTR)))
    }

    /// Starts `command` in a namespace of its own.
    ///
    /// # Errors
    /// As [`Command::spawn`], and where no further namespace can be had.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        begin().map_err(io::Error::other)?;
        let spawned = command.spawn();
        if let Err(error) = self.end() {
            // Nothing could be started by this thread any more.
            if let Ok(mut child) = spawned {
                let _ = child.kill().and_then(|()| child.wait());
            }
            return Err(io::Error::other(error));
        }
        spawned
    }

    fn end(&self) -> Result<(), Error> {
        setns(&self.own, CloneFlags::CLONE_NEWPID).map_err(failed("go back to the own PID namespace (setns)"))
    }
}

/// From here on what this thread starts would be in a new namespace.
fn begin() -> Result<(), Error> {
    unshare(CloneFlags::CLONE_NEWPID).map_err(failed("make a PID namespace (unshare)"))
}

/// A descriptor of this process, by which others see that it has ended.
///
/// # Errors
/// There is no descriptor left.
pub fn this_process() -> io::Result<OwnedFd> {
    of_process(std::process::id())
}

/// A descriptor of the process `pid`, close-on-exec (pidfd_open(2)).
///
/// # Errors
/// There is no such process, or no descriptor left.
pub fn of_process(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers; it makes a new descriptor that nobody else knows.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        match RawFd::try_from(fd) {
            Ok(fd) if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Whether the process of a descriptor has ended. Async-signal-safe.
///
/// # Errors
/// It is no such descriptor.
pub fn has_ended(process: BorrowedFd<'_>) -> nix::Result<bool> {
    poll(&mut [PollFd::new(process.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).map(|ready| ready > 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Stdio;

    use super::*;
    use crate::base::testing::as_root;

    #[test]
    fn what_is_started_finds_no_other_process_and_its_parent_goes_on() {
        as_root(|| {
            let namespaces = PidNamespaces::find().unwrap();
            for _ in 0..2 {
                let mut shell = Command::new("sh");
                let parent = std::process::id();
                // $PPID is 0: to 0 a shell would signal itself.
                shell.args(["-c", &format!("echo $$ $PPID; kill -0 {parent} || kill -0 2 || kill -KILL $$; echo on")]);
                let child = namespaces.spawn(shell.stdout(Stdio::piped()).stderr(Stdio::null())).unwrap();
                let output = child.wait_with_output().unwrap();
                assert_eq!(String::from_utf8(output.stdout).unwrap(), "1 0\non\n");
                // In a namespace that is another one's this thread could start none.
                std::thread::spawn(|| ()).join().unwrap();
                let outside = Command::new("sh").args(["-c", "echo $PPID"]).output().unwrap();
                assert_eq!(String::from_utf8(outside.stdout).unwrap().trim(), parent.to_string());
            }
            assert!(namespaces.spawn(&mut Command::new("/no/such/program")).is_err());
            let mut sleeper = namespaces.spawn(Command::new("sleep").arg("600")).unwrap();
            let watched = of_process(sleeper.id()).unwrap();
            assert!(!has_ended(watched.as_fd()).unwrap());
            sleeper.kill().unwrap();
            assert_eq!(sleeper.wait().unwrap().signal(), Some(libc::SIGKILL));
            assert!(has_ended(watched.as_fd()).unwrap() && !has_ended(this_process().unwrap().as_fd()).unwrap());
        });
    }

    #[test]
    fn who_has_no_right_to_it_is_told() {
        as_root(|| {
            // SAFETY: the raw call changes the user of this thread alone, which ends with the test.
            assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) }, 0);
            let error = PidNamespaces::find().unwrap_err();
            assert_eq!(
                crate::base::error::chain(&error),
                "make a PID namespace (unshare): EPERM: Operation not permitted"
            );
        });
    }
}
