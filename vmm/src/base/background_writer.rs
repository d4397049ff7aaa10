//! Output to a place that may block for ever (a terminal that is held, a pipe that nobody reads, a file system that is
//! frozen), written by a thread of its own.
//!
//! Invariants: [`BackgroundWriter::push`] never waits; at most twice the capacity is held (what waits, and what is being
//! written); bytes come out in the order in which they came in. Where there is no room the oldest bytes that wait are lost,
//! because the last words of a VM say most. Those, and bytes that cannot be written, are counted, and a mark with the count
//! takes their place in the output. The end waits a bounded time.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use umbra_splitter::threads::{self, Purpose};

use crate::base::lock::lock;

/// Longest time without progress that the end waits for: far more than a terminal or disk that works needs for
/// [`PIECE`] bytes, on a slow machine too.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Bytes written by one system call: what a place that takes bytes slowly shows as progress.
const PIECE: usize = 1024;

/// The text that takes the place of a number of lost bytes.
pub type Mark = fn(u64) -> String;

/// What it took to make room for pushed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// Nothing.
    Fitted,
    /// Older bytes are lost; the first loss of this writer.
    FirstLoss,
    /// Older bytes are lost, again.
    Loss,
}

/// A place for bytes, written by its thread.
#[derive(Debug)]
pub struct BackgroundWriter {
    shared: Arc<Shared>,
    capacity: usize,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// The thread has something to do.
    work: Condvar,
    /// Something was written.
    progress: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<u8>,
    /// Bytes lost before those in `waiting` that have no mark in the output yet.
    unmarked: u64,
    /// All bytes lost.
    lost: u64,
    /// The thread waits for work.
    idle: bool,
    /// Pieces written so far.
    pieces: u64,
    /// Pieces that were written when the end was last waited for in vain.
    given_up_at: Option<u64>,
    closed: bool,
}

impl State {
    fn lose(&mut self, bytes: u64) {
        self.unmarked += bytes;
        self.lost += bytes;
    }

    fn is_done(&self) -> bool {
        self.idle && self.waiting.is_empty()
    }
}

impl BackgroundWriter {
    /// Starts the thread `name`, which writes to `place`. `trouble` hears of the first error of the place.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        name: &str,
        capacity: usize,
        place: impl Write + Send + 'static,
        mark: Mark,
        trouble: impl FnOnce(&io::Error) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), work: Condvar::new(), progress: Condvar::new() });
        let mut thread = Thread { shared: Arc::clone(&shared), place, mark, trouble: Some(trouble) };
        // Signals are for the event loops, which have blocked what they read from a signalfd; this thread may be older than that.
        let mut all = SigSet::all();
        // What the thread itself has done wrong is not to be held back (`vm::confine`).
        all.remove(Signal::SIGSYS);
        let signals = all.thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        let started = threads::spawn(Purpose::Helper, name, move || thread.run());
        signals.thread_set_mask()?;
        let thread = started?;
        Ok(Self { shared, capacity, thread: Some(thread) })
    }

    /// Queues `bytes`, in place of older ones if there is no room. Never waits.
    pub fn push(&self, bytes: &[u8]) -> Pushed {
        let mut state = self.shared.lock();
        let lost_before = state.lost;
        let (left_out, kept) = bytes.split_at(bytes.len().saturating_sub(self.capacity));
        let excess = (state.waiting.len() + kept.len()).saturating_sub(self.capacity);
        state.waiting.drain(..excess);
        state.lose((excess + left_out.len()) as u64);
        state.waiting.extend(kept);
        let pushed = match (lost_before, state.lost - lost_before) {
            (_, 0) => Pushed::Fitted,
            (0, _) => Pushed::FirstLoss,
            _ => Pushed::Loss,
        };
        if std::mem::take(&mut state.idle) {
            self.shared.work.notify_one();
        }
        pushed
    }

    /// Bytes lost so far.
    pub fn lost(&self) -> u64 {
        self.shared.lock().lost
    }

    /// Waits until everything is written. Gives up once nothing was written for `patience`; asked again, it does not wait again
    /// unless something was written since.
    pub fn finish(&self, patience: Duration) {
        let mut state = self.shared.lock();
        while !state.is_done() && state.given_up_at != Some(state.pieces) {
            let before = state.pieces;
            let waits = |state: &mut State| state.pieces == before && !state.is_done() && !self.is_over();
            let waited = self.shared.progress.wait_timeout_while(state, patience, waits);
            let timeout;
            (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() || self.is_over() {
                state.given_up_at = Some(state.pieces);
            }
        }
    }

    fn is_over(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for BackgroundWriter {
    fn drop(&mut self) {
        self.finish(PATIENCE);
        self.shared.lock().closed = true;
        self.shared.work.notify_one();
        // A thread that the place holds is left to the end of the process.
        if self.shared.lock().idle
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

struct Thread<W, T> {
    shared: Arc<Shared>,
    place: W,
    mark: Mark,
    trouble: Option<T>,
}

/// A chunk that could not be written to its end.
struct Unwritten {
    error: io::Error,
    /// Bytes of it that are lost.
    bytes: usize,
    /// Earlier losses that have no mark yet.
    unmarked: u64,
}

impl<W: Write, T: FnOnce(&io::Error)> Thread<W, T> {
    fn run(&mut self) {
        let mut chunk = VecDeque::new();
        while let Some(lost_before) = self.next(&mut chunk) {
            if let Err(unwritten) = self.write(lost_before, chunk.make_contiguous()) {
                let mut state = self.shared.lock();
                state.lose(unwritten.bytes as u64);
                state.unmarked += unwritten.unmarked;
                drop(state);
                if let Some(trouble) = self.trouble.take() {
                    trouble(&unwritten.error);
                }
            }
        }
    }

    /// Waits for bytes to write, and takes them; returns how many were lost before them. `None` at the end.
    fn next(&self, chunk: &mut VecDeque<u8>) -> Option<u64> {
        let mut state = self.shared.lock();
        chunk.clear();
        while state.waiting.is_empty() {
            state.idle = true;
            self.shared.progress.notify_all();
            if state.closed {
                return None;
            }
            state = self.shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.idle = false;
        std::mem::swap(chunk, &mut state.waiting);
        Some(std::mem::take(&mut state.unmarked))
    }

    /// Writes the mark of the `lost` bytes before `chunk`, then `chunk`.
    fn write(&mut self, lost: u64, chunk: &[u8]) -> Result<(), Unwritten> {
        self.write_mark(lost).map_err(|error| Unwritten { error, bytes: chunk.len(), unmarked: lost })?;
        let mut left = chunk;
        while !left.is_empty() {
            match self.place.write(&left[..left.len().min(PIECE)]) {
                Ok(0) => {
                    let error = io::ErrorKind::WriteZero.into();
                    return Err(Unwritten { error, bytes: left.len(), unmarked: 0 });
                }
                Ok(length) => left = &left[length..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Unwritten { error, bytes: left.len(), unmarked: 0 }),
            }
            self.shared.lock().pieces += 1;
            self.shared.progress.notify_all();
        }
        Ok(())
    }

    fn write_mark(&mut self, lost: u64) -> io::Result<()> {
        if lost == 0 { Ok(()) } else { self.place.write_all((self.mark)(lost).as_bytes()) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::mpsc::{self, Receiver};

    use super::*;

    /// A place that takes nothing until it is let go; then bytes go into a text that the test sees.
    struct Held {
        go: Receiver<()>,
        text: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Held {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.go.recv();
            self.text.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A disk that has no room at times.
    struct Full {
        full: Arc<Mutex<bool>>,
        text: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if *self.full.lock().unwrap() {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.text.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn mark(lost: u64) -> String {
        format!("<{lost}>")
    }

    fn text_of(text: &Mutex<Vec<u8>>) -> String {
        String::from_utf8(text.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn a_place_that_takes_nothing_holds_up_nobody_and_the_loss_is_marked_where_it_is() {
        let (let_go, go) = mpsc::channel();
        let text = Arc::new(Mutex::new(Vec::new()));
        let writer = BackgroundWriter::start("held", 10, Held { go, text: Arc::clone(&text) }, mark, |_| {}).unwrap();
        assert_eq!(writer.push(b"first "), Pushed::Fitted);
        // The thread has taken it and is held by the place.
        while !writer.shared.lock().waiting.is_empty() {
            std::thread::yield_now();
        }
        assert_eq!(writer.push(b"0123456789"), Pushed::Fitted);
        assert_eq!(writer.push(b"a"), Pushed::FirstLoss);
        for _ in 0..999 {
            assert_eq!(writer.push(b"b"), Pushed::Loss);
        }
        assert_eq!(writer.lost(), 1000);
        assert_eq!(writer.push(b"more than there is room for: last words"), Pushed::Loss);
        drop(let_go);
        writer.finish(PATIENCE);
        assert_eq!(writer.push(b" the end"), Pushed::Fitted);
        drop(writer);
        assert_eq!(text_of(&text), "first <1039>last words the end");
    }

    #[test]
    fn all_that_was_pushed_is_written_at_the_end() {
        let text = Arc::new(Mutex::new(Vec::new()));
        let place = Full { full: Arc::default(), text: Arc::clone(&text) };
        let writer = BackgroundWriter::start("end", 1 << 20, place, mark, |_| {}).unwrap();
        let expected: String = (0..10_000).map(|n| format!("{n}\n")).collect();
        expected.bytes().for_each(|byte| assert_eq!(writer.push(&[byte]), Pushed::Fitted));
        drop(writer);
        assert_eq!(text_of(&text), expected);
    }

    #[test]
    fn the_end_does_not_wait_for_a_place_that_takes_nothing() {
        let (_let_go, go) = mpsc::channel();
        let writer = BackgroundWriter::start("stuck", 10, Held { go, text: Arc::default() }, mark, |_| {}).unwrap();
        writer.push(b"x");
        writer.finish(Duration::from_millis(20));
        // Nor does it a second time.
        writer.finish(Duration::MAX);
    }

    #[test]
    fn a_full_disk_is_told_once_and_counted_and_writing_goes_on_when_there_is_room() {
        let (full, text) = (Arc::new(Mutex::new(true)), Arc::new(Mutex::new(Vec::new())));
        let place = Full { full: Arc::clone(&full), text: Arc::clone(&text) };
        let (sender, told) = mpsc::channel();
        let trouble = move |error: &io::Error| sender.send(error.kind()).unwrap();
        let writer = BackgroundWriter::start("full", 100, place, mark, trouble).unwrap();
        for _ in 0..3 {
            assert_eq!(writer.push(b"lost "), Pushed::Fitted);
            writer.finish(PATIENCE);
        }
        assert_eq!((told.recv().unwrap(), told.try_recv().is_err()), (io::ErrorKind::StorageFull, true));
        assert_eq!(writer.lost(), 15);
        *full.lock().unwrap() = false;
        writer.push(b"kept");
        drop(writer);
        assert_eq!(text_of(&text), "<15>kept");
    }
}
