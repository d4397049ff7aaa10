//! Watches the sessions' threads: one that does not come back from the card's driver is noticed by nobody else where guests share the
//! card, for a guest alone is not believed. As long as all is well the agent is told so: it watches this process.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use umbra_driver_vm::calls::{CallWatch, Calls};

/// How often the sessions are looked at.
pub const LOOK: Duration = Duration::from_secs(1);
/// Looks in a row that may find a session at the same work: longer than anything takes that a card's driver answers, its firmware's loading
/// included. Looks, not time: a driver VM that stands still does not look.
const LIMIT: u64 = 30;

/// Until a session ends or hangs, which is returned; says at each look that all is well.
pub fn watch(
    ended: &Receiver<anyhow::Error>,
    sessions: &[Calls],
    look: Duration,
    mut say: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Error {
    let mut watches: Vec<_> = sessions.iter().map(|_| CallWatch::default()).collect();
    loop {
        match ended.recv_timeout(look) {
            Ok(error) => return error,
            Err(RecvTimeoutError::Disconnected) => return anyhow::anyhow!("there is no session"),
            Err(RecvTimeoutError::Timeout) => {}
        }
        if sessions.iter().zip(&mut watches).any(|(session, watch)| watch.look(session) >= LIMIT) {
            return anyhow::anyhow!("the card's driver does not come back");
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

    /// Watches two sessions, the second of which does this before each look; how that ends, within 100 looks.
    fn ends(mut session: impl FnMut(&Calls)) -> String {
        let (_sender, ended) = mpsc::channel();
        let calls = Calls::default();
        let mut looks = 0;
        let say = || {
            session(&calls);
            looks += 1;
            if looks < 100 { Ok(()) } else { Err(anyhow::anyhow!("all is well")) }
        };
        watch(&ended, &[Calls::default(), calls.clone()], Duration::from_millis(1), say).to_string()
    }

    #[test]
    fn a_session_that_waits_or_gets_on_is_well() {
        assert_eq!(ends(|_| ()), "all is well");
        assert_eq!(ends(|calls| calls.make(|| ())), "all is well");
    }

    #[test]
    fn one_that_is_at_the_same_work_for_long_ends_the_service() {
        let (_sender, ended) = mpsc::channel();
        let sessions = [Calls::default(), Calls::default()];
        let mut looks = 0;
        let say = || {
            looks += 1;
            Ok(())
        };
        let error = sessions[1].make(|| watch(&ended, &sessions, Duration::from_millis(1), say));
        assert_eq!((error.to_string().as_str(), looks), ("the card's driver does not come back", LIMIT));
    }
}
