//! Work beside the loop: what may wait for a file system that hangs is done in a thread, and the loop hears when it is done.

use std::fmt;
use std::io::{self, PipeReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;

use super::run::Supervisor;

/// Most work under way: each has a thread and a descriptor, and a file system that hangs may keep both for good.
const MOST: usize = 16;

/// What is done in the loop with a result.
pub(super) type Then = Box<dyn FnOnce(&mut Supervisor) + Send>;

/// Work under way.
pub(super) struct Aside<T> {
    /// Ends with the thread.
    done: PipeReader,
    result: Receiver<T>,
}

impl<T: Send + 'static> Aside<T> {
    /// Begins `work` in a thread of this name.
    ///
    /// # Errors
    /// There is no thread, or no descriptor, for it.
    pub(super) fn begin(name: &str, work: impl FnOnce() -> T + Send + 'static) -> io::Result<Self> {
        let (sender, result) = mpsc::channel();
        let (done, finished) = io::pipe()?;
        thread::Builder::new().name(name.into()).spawn(move || {
            // Closed when the result is there.
            let _finished = finished;
            let _ = sender.send(work());
        })?;
        Ok(Self { done, result })
    }

    /// The result, if the work is done; `None`: it has panicked.
    pub(super) fn end(self) -> Result<Option<T>, Self> {
        match self.result.try_recv() {
            Ok(result) => Ok(Some(result)),
            Err(TryRecvError::Disconnected) => Ok(None),
            Err(TryRecvError::Empty) => Err(self),
        }
    }
}

impl<T> fmt::Debug for Aside<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Aside").finish_non_exhaustive()
    }
}

impl Supervisor {
    /// Begins `work` beside the loop, which does what that returns.
    ///
    /// # Errors
    /// There is no thread, or no descriptor, for it, or [`MOST`] wait already.
    pub(super) fn aside(&mut self, name: &str, work: impl FnOnce() -> Then + Send + 'static) -> io::Result<()> {
        if self.asides.len() >= MOST {
            return Err(io::Error::other(format!(
                "{MOST} such requests wait already for file systems that do not answer"
            )));
        }
        self.asides.push(Aside::begin(name, work)?);
        Ok(())
    }

    /// Some work beside the loop is done.
    pub(super) fn on_aside(&mut self) {
        for aside in std::mem::take(&mut self.asides) {
            match aside.end() {
                Ok(then) => then.into_iter().for_each(|then| then(self)),
                Err(aside) => self.asides.push(aside),
            }
        }
    }
}

impl<T> AsFd for Aside<T> {
    /// Readable when the work is done.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    fn is_readable<T>(aside: &Aside<T>, timeout: PollTimeout) -> bool {
        poll(&mut [PollFd::new(aside.as_fd(), PollFlags::POLLIN)], timeout).unwrap() == 1
    }

    #[test]
    fn the_loop_goes_on_until_the_work_is_done() {
        let (answer, answers) = mpsc::channel();
        let aside = Aside::begin("work", move || answers.recv().unwrap()).unwrap();
        assert!(!is_readable(&aside, PollTimeout::ZERO));
        let aside = aside.end().unwrap_err();
        answer.send(7).unwrap();
        assert!(is_readable(&aside, PollTimeout::NONE));
        assert_eq!(aside.end().unwrap(), Some(7));
    }
}
