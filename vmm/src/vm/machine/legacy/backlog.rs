//! What a VM has printed last, for the viewers of its console: one ring for all of them, in which each has a place of its own.
//!
//! Invariant: printing waits for no viewer and costs no more memory than [`KEPT`], however many there are and however slowly they
//! read. One that falls behind by more loses what it has not read, and is told how much.

use std::collections::VecDeque;
use std::io;
use std::sync::Mutex;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::base::lock::lock;

/// Bytes kept: some screens for who comes later, and a quarter of a kernel's boot log for who reads slowly.
pub const KEPT: usize = 64 << 10;

/// The ring.
#[derive(Debug)]
pub struct Backlog {
    state: Mutex<State>,
    news: EventFd,
}

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    /// Bytes printed in all: the place behind the last of `bytes`.
    end: u64,
    /// Somebody has read everything, and is to hear of what comes.
    awaited: bool,
}

/// A part of what was printed.
#[derive(Debug, PartialEq, Eq)]
pub struct Part {
    /// Bytes lost before it.
    pub lost: u64,
    /// It.
    pub bytes: Vec<u8>,
}

impl Backlog {
    /// An empty one.
    ///
    /// # Errors
    /// There is no eventfd.
    pub fn new() -> io::Result<Self> {
        let news = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { state: Mutex::default(), news })
    }

    /// The VM has printed `bytes`.
    pub fn push(&self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        let kept = &bytes[bytes.len().saturating_sub(KEPT)..];
        let excess = (state.bytes.len() + kept.len()).saturating_sub(KEPT);
        state.bytes.drain(..excess);
        state.bytes.extend(kept);
        state.end += bytes.len() as u64;
        if std::mem::take(&mut state.awaited) {
            // A full counter means that it is heard of already.
            let _ = self.news.write(1);
        }
    }

    /// Readable when something was printed since [`Self::await_news`].
    pub fn news(&self) -> &EventFd {
        &self.news
    }

    /// Has [`Self::news`] signalled at the next byte.
    pub fn await_news(&self) {
        let _ = self.news.read();
        lock(&self.state).awaited = true;
    }

    /// The place of the oldest byte that is kept.
    pub fn start(&self) -> u64 {
        lock(&self.state).start()
    }

    /// At most `most` bytes from the place `at` on.
    pub fn part(&self, at: u64, most: usize) -> Part {
        let state = lock(&self.state);
        let lost = state.start().saturating_sub(at);
        let from = usize::try_from(at + lost - state.start()).unwrap_or(usize::MAX);
        Part { lost, bytes: state.bytes.iter().skip(from).take(most).copied().collect() }
    }
}

impl State {
    fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn who_reads_slowly_loses_the_oldest_and_knows_how_much() {
        let backlog = Backlog::new().unwrap();
        backlog.push(b"hello");
        assert_eq!(backlog.part(0, 3), Part { lost: 0, bytes: b"hel".into() });
        assert_eq!(backlog.part(3, 9), Part { lost: 0, bytes: b"lo".into() });
        assert_eq!(backlog.part(5, 9), Part { lost: 0, bytes: vec![] });
        (0..KEPT).for_each(|_| backlog.push(b"x"));
        assert_eq!((backlog.start(), backlog.part(3, 1)), (5, Part { lost: 2, bytes: b"x".into() }));
        backlog.push(&[b'y'; KEPT + 7]);
        let all = backlog.part(5, usize::MAX);
        assert_eq!((all.lost, all.bytes.len()), (KEPT as u64 + 7, KEPT));
        assert!(lock(&backlog.state).bytes.capacity() <= 2 * KEPT);
    }

    #[test]
    fn one_signal_stands_for_all_that_comes_until_it_is_waited_for_again() {
        let backlog = Backlog::new().unwrap();
        backlog.push(b"nobody waits");
        assert!(backlog.news().read().is_err());
        backlog.await_news();
        (0..3).for_each(|_| backlog.push(b"x"));
        assert_eq!(backlog.news().read().unwrap(), 1);
        backlog.push(b"x");
        assert!(backlog.news().read().is_err());
    }
}
