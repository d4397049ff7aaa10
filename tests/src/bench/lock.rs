//! Who may use the machine: two emulated hosts on one machine measure each other.
//!
//! Outside a test suite a test host is alone. In one, each has a place, as many as the machine has processors for; one that its scenario
//! has braked leaves most of the machine to others, and has a place beside. What has to be alone in a suite waits until all others have
//! ended, and no other begins before it (`turn`).
//!
//! Invariant: `turn` and `lock` are waited for with a place in hand or none, a place with nothing in hand: no two processes wait for each
//! other.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::{BenchError, brake};
use crate::suite;

/// Processors of a test host at full speed.
const CPUS: f64 = 2.0;
/// Memory of the machine for a test host, and for what is compiled meanwhile, MiB.
const MEMORY: u64 = 5 << 10;
/// How often it is looked for a free place.
const LOOK: Duration = Duration::from_millis(200);

/// Held while a bench lives; the kernel lets go of the files when the process ends, however that may be.
pub(super) struct Lock(#[expect(dead_code, reason = "held, not read")] Vec<Flock<File>>);

impl Lock {
    /// Waits for a place for a test host of this process in the folder of all benches, `out`; for the whole machine, if it is to be
    /// `alone`.
    pub(super) fn take(out: &Path, alone: bool) -> Result<Self, BenchError> {
        fs::create_dir_all(out).map_err(|e| BenchError::file("make", out, e))?;
        let places = if alone || !suite::is_running() { 0 } else { places() };
        Self::in_one_of(out, places, brake::is_asked_for())
    }

    /// In one of so many places; in none: alone.
    fn in_one_of(out: &Path, places: usize, is_braked: bool) -> Result<Self, BenchError> {
        let (turn, all) = (out.join("turn"), out.join("lock"));
        if places == 0 {
            let _turn = wait(&turn, FlockArg::LockExclusive)?;
            return Ok(Self(vec![wait(&all, FlockArg::LockExclusive)?]));
        }
        let place = match is_braked {
            true => wait(&out.join("braked.lock"), FlockArg::LockExclusive)?,
            false => any_place(out, places)?,
        };
        let _turn = wait(&turn, FlockArg::LockExclusive)?;
        Ok(Self(vec![place, wait(&all, FlockArg::LockShared)?]))
    }
}

/// Waits until one of the places is free.
fn any_place(out: &Path, places: usize) -> Result<Flock<File>, BenchError> {
    loop {
        for place in 1..=places {
            let path = out.join(format!("place-{place}.lock"));
            match Flock::lock(open(&path)?, FlockArg::LockExclusiveNonblock) {
                Ok(held) => return Ok(held),
                Err((_, Errno::EWOULDBLOCK)) => {}
                Err((_, e)) => return Err(BenchError::file("lock", &path, e.into())),
            }
        }
        thread::sleep(LOOK);
    }
}

/// Waits for the file; with a word where a bench outside a suite holds it.
fn wait(path: &Path, how: FlockArg) -> Result<Flock<File>, BenchError> {
    let at_once = match how {
        FlockArg::LockShared => FlockArg::LockSharedNonblock,
        _ => FlockArg::LockExclusiveNonblock,
    };
    Flock::lock(open(path)?, at_once).or_else(|_| {
        if !suite::is_running() {
            eprintln!("another bench runs; waiting for it ...");
        }
        Flock::lock(open(path)?, how).map_err(|(_, e)| BenchError::file("lock", path, e.into()))
    })
}

fn open(path: &Path) -> Result<File, BenchError> {
    File::create(path).map_err(|e| BenchError::file("open", path, e))
}

/// Test hosts at the speed of the suite that may run side by side here, beside one that is braked; 0: not even these two.
pub fn places() -> usize {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let memory = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_mib(&text)).unwrap_or(0);
    places_of(cpus, memory, brake::named_speed().unwrap_or(1.0))
}

/// [`places`] on a machine like this. Pure.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "processors: a number from 0 to some thousands"
)]
fn places_of(cpus: usize, memory_mib: u64, speed: f64) -> usize {
    let by_cpus = (cpus as f64 / (CPUS * speed)) as usize;
    // One more is that of the braked one.
    let by_memory = usize::try_from(memory_mib / MEMORY).unwrap_or(usize::MAX).saturating_sub(1);
    by_cpus.min(by_memory)
}

/// `MemTotal` of proc_meminfo(5), MiB.
fn total_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Mutex, mpsc};

    #[test]
    fn places_are_as_many_as_processors_and_memory_allow() {
        assert_eq!(places_of(2, 10 << 10, 1.0), 1);
        assert_eq!(places_of(1, 64 << 10, 1.0), 0, "a braked one beside another needs a second processor");
        assert_eq!(places_of(2, 9 << 10, 1.0), 0, "two need 10 GiB");
        assert_eq!(places_of(2, 24_000, 0.25), 3);
        assert_eq!(places_of(8, 64 << 10, 1.0), 4);
    }

    #[test]
    fn the_machine_s_memory_is_read() {
        assert_eq!(total_mib("MemTotal:       24576000 kB\nMemFree:  1 kB\n"), Some(24_000));
        assert_eq!(total_mib("MemFree: 1 kB\n"), None);
    }

    #[test]
    fn a_place_is_free_or_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::in_one_of(dir.path(), 2, false).unwrap();
        let _second = Lock::in_one_of(dir.path(), 2, false).unwrap();
        let _braked = Lock::in_one_of(dir.path(), 2, true).unwrap();
        let (tell, told) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                let _third = Lock::in_one_of(dir.path(), 2, false).unwrap();
                tell.send(()).unwrap();
            });
            assert!(told.recv_timeout(3 * LOOK).is_err(), "three have two places");
            drop(first);
            told.recv().unwrap();
        });
    }

    #[test]
    fn what_is_alone_waits_for_all_and_goes_before_those_that_come_later() {
        let dir = tempfile::tempdir().unwrap();
        let (place, order) = (Lock::in_one_of(dir.path(), 1, true).unwrap(), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            scope.spawn(|| {
                let _alone = Lock::in_one_of(dir.path(), 0, false).unwrap();
                order.lock().unwrap().push("alone");
            });
            // It waits when it has the turn.
            while Flock::lock(open(&dir.path().join("turn")).unwrap(), FlockArg::LockExclusiveNonblock).is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
            scope.spawn(|| {
                let _later = Lock::in_one_of(dir.path(), 1, false).unwrap();
                order.lock().unwrap().push("later");
            });
            thread::sleep(Duration::from_millis(50));
            order.lock().unwrap().push("first");
            drop(place);
        });
        assert_eq!(*order.lock().unwrap(), ["first", "alone", "later"]);
    }
}
