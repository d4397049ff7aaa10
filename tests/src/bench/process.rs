//! A child process by its descriptor, so that a signal never reaches another process that got its number; and a thread that
//! accompanies it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

#[derive(Debug)]
pub(super) struct Process(OwnedFd);

impl Process {
    /// The process `pid`, a child that has not been waited for.
    ///
    /// # Errors
    /// It is gone.
    pub(super) fn open(pid: u32) -> io::Result<Self> {
        let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
        // SAFETY: pidfd_open takes two integers and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// # Errors
    /// It is gone.
    pub(super) fn signal(&self, signal: libc::c_int) -> io::Result<()> {
        let none = std::ptr::null_mut::<libc::siginfo_t>();
        // SAFETY: a null siginfo is allowed; the descriptor outlives the call.
        let done = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal, none, 0) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// A thread beside a process: ended, and waited for, when dropped. There may be none.
#[derive(Debug, Default)]
pub(super) struct Companion {
    release: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Companion {
    /// Starts `body`, which ends when what it gets has no sender any more.
    ///
    /// # Errors
    /// There is no thread.
    pub(super) fn start(name: &str, body: impl FnOnce(Receiver<()>) + Send + 'static) -> io::Result<Self> {
        let (release, released) = channel();
        let thread = thread::Builder::new().name(name.into()).spawn(move || body(released))?;
        Ok(Self { release: Some(release), thread: Some(thread) })
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        drop(self.release.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
