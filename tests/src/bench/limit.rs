//! The end of a scenario that would go on and on.
//!
//! Waits follow progress, so what moves without getting anywhere (a standby that fails and is tried again, a console that prints)
//! keeps them waiting. A test host of a scenario therefore has a life of limited length: its emulator is killed then, and whatever
//! waits for it fails.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::process::{Companion, Process};
use super::{brake, patience, tell_at_once};

/// How often it is looked whether the time is over: what boots have shown of this machine may have made it longer.
const LOOK: Duration = Duration::from_secs(1);

/// So many times longer than on the reference machine a life may be, the brake apart: a boot that was very late for once must not make it
/// last for hours.
const SLOWEST: f64 = 4.0;

/// What the program asks for.
static ASKED: Mutex<Option<Duration>> = Mutex::new(None);
/// A test host was ended.
static EXCEEDED: AtomicBool = AtomicBool::new(false);

/// Has every test host of this process live for `longest` at most, as on the reference machine ([`patience`]).
pub fn at_most(longest: Duration) {
    *ASKED.lock().unwrap_or_else(PoisonError::into_inner) = Some(longest);
}

/// A test host of this process has lived for too long.
pub fn was_exceeded() -> bool {
    EXCEEDED.load(Ordering::Relaxed)
}

/// `longest` as it is on this machine.
fn scaled(longest: Duration) -> Duration {
    longest.mul_f64(patience::factor().min(SLOWEST / brake::speed().unwrap_or(1.0)))
}

/// Limits the life of the process `pid`, a child that has not been waited for, until what is returned is dropped; if the program has
/// asked for it.
///
/// # Errors
/// The process is gone, or there is no thread.
pub(super) fn on(pid: u32, name: &str) -> io::Result<Companion> {
    let asked = *ASKED.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(longest) = asked else { return Ok(Companion::default()) };
    let (process, start, name) = (Process::open(pid)?, Instant::now(), name.to_owned());
    Companion::start("limit", move |released| {
        while released.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
            if start.elapsed() < scaled(longest) {
                continue;
            }
            EXCEEDED.store(true, Ordering::Relaxed);
            let minutes = start.elapsed().as_secs() / 60;
            tell_at_once(&format!(
                "the test host `{name}` has lived for {minutes} min, which is too long: it is ended"
            ));
            let _ = process.signal(libc::SIGKILL);
            return;
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    #[test]
    fn a_process_that_lives_too_long_is_ended_and_one_that_is_let_go_lives_on() {
        at_most(Duration::ZERO);
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let _limit = on(child.id(), "x").unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        assert!(was_exceeded());

        at_most(Duration::from_secs(1000));
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        drop(on(child.id(), "x").unwrap());
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
