//! Lines on their way out: to a place that may block for ever (a terminal that is held, a pipe that nobody reads) by a
//! thread of its own, so that no recovery waits for it.
//!
//! Invariants: lines come out in their order; at most [`MAX_WAITING`] wait, later ones are left out and counted; who ends
//! waits for a bounded time.

use std::sync::mpsc::{self, Receiver, Sender, SyncSender, TrySendError};
use std::thread;
use std::time::Duration;

/// Most lines that wait for a place that takes none: more than two hundred recoveries.
const MAX_WAITING: usize = 4096;

/// The thread's nice value: there is most to write while a recovery runs, which goes first.
const NICE: i32 = 10;

/// A place for lines, written by its thread.
#[derive(Debug)]
pub(super) struct Writer {
    /// What it is, for people.
    place: &'static str,
    lines: SyncSender<String>,
    /// Left out since a line was last taken.
    left_out: u64,
    /// Ends when the thread has written everything.
    done: Receiver<()>,
}

/// What became of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Queued {
    /// It will be written.
    Taken,
    /// It will be written. The warning, to be reported, says that lines before it were left out.
    TakenAfterLoss(String),
    /// It was left out.
    LeftOut,
    /// The place is of no more use; the thread has reported why.
    Closed,
}

impl Writer {
    /// Begins to write to `place` by `write`, whose troubles are sent as `warnings`. `None`: no thread could be started.
    pub(super) fn start(
        place: &'static str,
        warnings: Sender<String>,
        mut write: impl FnMut(&str) -> Result<(), Trouble> + Send + 'static,
    ) -> Option<Self> {
        let (lines, queue) = mpsc::sync_channel::<String>(MAX_WAITING);
        let (ended, done) = mpsc::channel();
        let work = move || {
            let _ended = ended;
            // SAFETY: the call takes no pointers; 0 is this thread. Refused, it writes at the wrong moment, no more.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
            for line in queue {
                let Err(trouble) = write(&line) else { continue };
                let last = matches!(trouble, Trouble::Last(_));
                let (Trouble::Passing(what) | Trouble::Last(what)) = trouble;
                // After the end of the machine nobody takes the warning.
                let _ = warnings.send(what);
                if last {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name(format!("write {place}")).spawn(work);
        thread.is_ok().then_some(Self { place, lines, left_out: 0, done })
    }

    /// Queues `line`, without waiting.
    pub(super) fn write(&mut self, line: String) -> Queued {
        match self.lines.try_send(line) {
            Ok(()) => match std::mem::take(&mut self.left_out) {
                0 => Queued::Taken,
                n => Queued::TakenAfterLoss(format!(
                    "{} took nothing for a while: {n} lines are missing there",
                    self.place
                )),
            },
            Err(TrySendError::Full(_)) => {
                self.left_out += 1;
                Queued::LeftOut
            }
            Err(TrySendError::Disconnected(_)) => Queued::Closed,
        }
    }

    /// Waits until everything is written, for `patience` at most.
    pub(super) fn finish(self, patience: Duration) {
        let Self { lines, done, .. } = self;
        drop(lines);
        // It sends nothing; that its end is gone is the sign.
        let _ = done.recv_timeout(patience);
    }
}

/// How a place failed to take a line.
#[derive(Debug)]
pub(super) enum Trouble {
    /// A warning to report; the next line is tried.
    Passing(String),
    /// A warning to report; no other line is tried.
    Last(String),
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Instant;

    use super::*;

    #[test]
    fn lines_come_out_in_order_and_all_are_there_at_the_end() {
        let out = Arc::new(Mutex::new(String::new()));
        let to = Arc::clone(&out);
        let write = move |line: &str| {
            to.lock().unwrap().push_str(line);
            Ok(())
        };
        let mut writer = Writer::start("the test", mpsc::channel().0, write).unwrap();
        for n in 0..1000 {
            assert_eq!(writer.write(format!("{n}\n")), Queued::Taken);
        }
        writer.finish(Duration::from_secs(10));
        let expected: String = (0..1000).map(|n| format!("{n}\n")).collect();
        assert_eq!(*out.lock().unwrap(), expected);
    }

    #[test]
    fn a_place_that_takes_nothing_blocks_nobody_and_the_loss_is_told() {
        let (go, wait) = mpsc::channel::<()>();
        let write = move |_: &str| {
            let _ = wait.recv();
            Ok(())
        };
        let mut writer = Writer::start("the test", mpsc::channel().0, write).unwrap();
        let lost = (0..2 * MAX_WAITING).filter(|_| writer.write("x".into()) == Queued::LeftOut).count();
        assert!(lost >= MAX_WAITING - 1);
        drop(go);
        let told = loop {
            match writer.write("x".into()) {
                Queued::TakenAfterLoss(told) => break told,
                _ => thread::sleep(Duration::from_millis(1)),
            }
        };
        assert!(told.contains("lines are missing"), "{told}");
    }

    #[test]
    fn the_end_does_not_wait_for_ever() {
        let (_go, wait) = mpsc::channel::<()>();
        let write = move |_: &str| {
            let _ = wait.recv();
            Ok(())
        };
        let mut writer = Writer::start("the test", mpsc::channel().0, write).unwrap();
        writer.write("x".into());
        let start = Instant::now();
        writer.finish(Duration::from_millis(50));
        assert!(start.elapsed() >= Duration::from_millis(50));
    }

    #[test]
    fn a_place_that_is_gone_says_why_once() {
        let (sender, warnings) = mpsc::channel();
        let write = |_: &str| Err(Trouble::Last("no room".into()));
        let mut writer = Writer::start("the test", sender, write).unwrap();
        writer.write("x".into());
        assert_eq!(warnings.recv().unwrap(), "no room");
        while writer.write("x".into()) != Queued::Closed {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(warnings.try_recv().is_err());
    }
}
