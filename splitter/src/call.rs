//! Writing to an eventfd that a process which is not trusted has as well: that by which a driver VM is interrupted.
//!
//! Whether a write waits for room is a flag of the open file (`O_NONBLOCK`), which whoever has a descriptor of it may clear, and no
//! system call writes to an eventfd without waiting whatever the flag is (`RWF_NOWAIT` is refused for it). The driver VM's
//! process could fill the counter and so stop the guest's only event loop. A thread therefore looks for a write that is still
//! under way since its look before, and interrupts it by a signal; the write fails, and the link is lost.
//!
//! Invariants: a write costs no system call beside itself, unless it is the first after a pause; the loop stands still for two
//! looks at most; a signal that finds no write that waits (because the machine is busy, or it comes late) changes nothing.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::Duration;

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::threads::{self, Purpose};

/// Time between two looks. A write takes less than a microsecond, and the loop may be without a processor for some
/// milliseconds.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A write that waited, and was ended.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("the eventfd of its interrupts was made to hold its writers up")]
pub struct Blocks;

/// Looks after the writes of one thread, an event loop's. The thread that looks ends with it.
#[derive(Debug)]
pub struct CallWatch {
    shared: Arc<Shared>,
    looks: Thread,
}

#[derive(Debug, Default)]
struct Shared {
    /// Writes that have begun and ended: odd while one is under way.
    steps: AtomicU64,
    /// The thread that writes.
    writer: AtomicI32,
    /// Nobody looks, because nothing was written for a while: the next write wakes the thread that looks.
    rests: AtomicBool,
    over: AtomicBool,
}

thread_local! {
    /// Number of this thread (`gettid`), asked for once.
    static THREAD: i32 = nix::unistd::gettid().as_raw();
}

extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The signal: real-time, behind the one that has vCPUs leave their guest.
fn signal() -> libc::c_int {
    SIGRTMIN() + 1
}

impl CallWatch {
    /// Begins to look.
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn new() -> io::Result<Self> {
        /// Whether the signal has its handler, without which it would end the process.
        static HANDLER: OnceLock<Result<(), i32>> = OnceLock::new();
        // Without SA_RESTART: the write is to end.
        let install = || register_signal_handler(signal(), interrupt).map_err(|error| error.errno());
        HANDLER.get_or_init(install).map_err(io::Error::from_raw_os_error)?;
        let shared = Arc::new(Shared::default());
        let seen = Arc::clone(&shared);
        let looks = threads::spawn(Purpose::Helper, "call-watch", move || seen.look())?;
        Ok(Self { shared, looks: looks.thread().clone() })
    }

    /// Adds one to the counter of `call`; one that is full has an interrupt waiting anyway.
    ///
    /// # Errors
    /// The write waited and was ended.
    pub fn write(&self, call: &EventFd) -> Result<(), Blocks> {
        let shared = &*self.shared;
        shared.writer.store(THREAD.with(|thread| *thread), Ordering::Relaxed);
        shared.steps.fetch_add(1, Ordering::SeqCst);
        if shared.rests.load(Ordering::SeqCst) {
            shared.rests.store(false, Ordering::SeqCst);
            self.looks.unpark();
        }
        let one = 1_u64.to_ne_bytes();
        // SAFETY: the buffer is ours and as long as said.
        let written = unsafe { libc::write(call.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        let interrupted = written < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
        shared.steps.fetch_add(1, Ordering::SeqCst);
        if interrupted { Err(Blocks) } else { Ok(()) }
    }
}

impl Drop for CallWatch {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        self.looks.unpark();
    }
}

impl Shared {
    fn look(&self) {
        let mut before = 0;
        while !self.over.load(Ordering::SeqCst) {
            thread::park_timeout(LOOK_EVERY);
            let steps = self.steps.load(Ordering::SeqCst);
            if steps == before && steps % 2 == 1 {
                self.end_write();
            } else if steps == before {
                self.rest(steps);
            }
            before = steps;
        }
    }

    /// Waits until something is written.
    fn rest(&self, steps: u64) {
        self.rests.store(true, Ordering::SeqCst);
        // Either the next write sees that nobody looks, or it is seen here.
        while self.steps.load(Ordering::SeqCst) == steps && !self.over.load(Ordering::SeqCst) {
            thread::park();
        }
        self.rests.store(false, Ordering::SeqCst);
    }

    fn end_write(&self) {
        let (process, thread) = (nix::unistd::getpid().as_raw(), self.writer.load(Ordering::Relaxed));
        // SAFETY: the call takes no pointers. The signal's handler does nothing, in whichever thread of this process it runs. It
        // fails if the thread has ended meanwhile.
        unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal()) };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// An eventfd as its other holder can make it: full, and its writers wait.
    fn full() -> EventFd {
        let call = EventFd::new(0).unwrap();
        call.write(u64::MAX - 1).unwrap();
        call
    }

    #[test]
    fn a_write_that_waits_is_ended_also_after_a_pause() {
        let watch = CallWatch::new().unwrap();
        let (sender, ended) = channel();
        thread::spawn(move || {
            let free = EventFd::new(0).unwrap();
            for _ in 0..2 {
                assert_eq!(watch.write(&free), Ok(()));
                sender.send(watch.write(&full())).unwrap();
                while !watch.shared.rests.load(Ordering::SeqCst) {
                    thread::yield_now();
                }
            }
            assert_eq!(free.read().unwrap(), 2);
        });
        for _ in 0..2 {
            assert_eq!(ended.recv_timeout(Duration::from_secs(60)), Ok(Err(Blocks)));
        }
    }

    #[test]
    fn a_full_counter_is_no_fault() {
        let call = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        call.write(u64::MAX - 1).unwrap();
        assert_eq!(CallWatch::new().unwrap().write(&call), Ok(()));
    }
}
