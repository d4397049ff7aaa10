//! Watches the sessions' threads: one that does not come back from the card's driver is noticed by nobody else where guests share the
//! card, for a guest alone is not believed. As long as all is well the agent is told so: it watches this process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// How often the sessions are looked at.
pub const LOOK: Duration = Duration::from_secs(1);
/// Looks in a row that may find a session at the same work: longer than anything takes that a card's driver answers, its firmware's loading
/// included. Looks, not time: a driver VM that stands still does not look.
const LIMIT: u32 = 30;

/// What a session's thread is at: a number that changes, odd while it works and even while it waits for something to do.
#[derive(Debug, Default)]
pub struct Progress(AtomicU32);

impl Progress {
    /// It has something to do from here on, or nothing. For one thread alone.
    pub fn mark(&self, works: bool) {
        let next = (self.0.load(Ordering::Relaxed) | 1).wrapping_add(1);
        self.0.store(next | u32::from(works), Ordering::Relaxed);
    }
}

/// Until a session ends or hangs, which is returned; says at each look that all is well.
pub fn watch(
    ended: &Receiver<anyhow::Error>,
    sessions: &[Arc<Progress>],
    look: Duration,
    mut say: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Error {
    let mut known = vec![(0, 0); sessions.len()];
    loop {
        match ended.recv_timeout(look) {
            Ok(error) => return error,
            Err(RecvTimeoutError::Disconnected) => return anyhow::anyhow!("there is no session"),
            Err(RecvTimeoutError::Timeout) => {}
        }
        for (session, (last, looks)) in sessions.iter().zip(&mut known) {
            let now = session.0.load(Ordering::Relaxed);
            *looks = if now == *last && now % 2 == 1 { *looks + 1 } else { 0 };
            *last = now;
            if *looks >= LIMIT {
                return anyhow::anyhow!("the card's driver does not come back");
            }
        }
        if let Err(error) = say() {
            return error;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Watches a session that does this before each look; how that ends, within 100 looks.
    fn ends(mut session: impl FnMut(&Progress)) -> String {
        let (_sender, ended) = mpsc::channel();
        let progress = Arc::new(Progress::default());
        session(&progress);
        let mut looks = 0;
        let say = || {
            session(&progress);
            looks += 1;
            if looks < 100 { Ok(()) } else { Err(anyhow::anyhow!("all is well")) }
        };
        watch(&ended, &[Arc::clone(&progress)], Duration::from_millis(1), say).to_string()
    }

    #[test]
    fn a_session_that_waits_or_gets_on_is_well() {
        assert_eq!(ends(|_| ()), "all is well");
        assert_eq!(ends(|progress| progress.mark(false)), "all is well");
        assert_eq!(ends(|progress| progress.mark(true)), "all is well");
    }

    #[test]
    fn one_that_is_at_the_same_work_for_long_ends_the_service() {
        let mut turns = 0;
        let hangs = |progress: &Progress| {
            turns += 1;
            if turns <= 20 {
                progress.mark(false);
                progress.mark(true);
            }
        };
        assert_eq!(ends(hangs), "the card's driver does not come back");
    }
}
