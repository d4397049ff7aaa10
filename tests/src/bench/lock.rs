//! One bench at a time: two emulated hosts on one machine would measure each other.
//!
//! In a test suite a test host that its scenario has braked runs beside another one: it leaves most of the machine to that one.
//!
//! Invariant: who takes both files takes [`Lane::Full`] first, so that no two processes wait for each other.

use std::fs::{self, File};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

use super::{BenchError, brake};
use crate::suite;

/// Processors that two test hosts side by side need.
const CPUS_FOR_TWO: usize = 2;
/// Memory of the machine that two test hosts side by side need, MiB: both of them, and what is being compiled meanwhile.
const MEMORY_FOR_TWO: u64 = 10 << 10;

/// Which test hosts keep each other waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lane {
    /// Those at the speed of the suite.
    Full,
    /// Those that a scenario has braked.
    Braked,
}

impl Lane {
    fn file_name(self) -> &'static str {
        match self {
            Self::Full => "lock",
            Self::Braked => "braked.lock",
        }
    }
}

/// The lanes that a test host takes. Pure.
fn lanes(is_braked: bool, two_may_run: bool) -> &'static [Lane] {
    match (two_may_run, is_braked) {
        (true, true) => &[Lane::Braked],
        (true, false) => &[Lane::Full],
        (false, _) => &[Lane::Full, Lane::Braked],
    }
}

/// Held while a bench lives; the kernel lets go of the files when the process ends, however that may be.
pub(super) struct Lock(#[expect(dead_code, reason = "held, not read")] Vec<Flock<File>>);

impl Lock {
    /// Waits for the lanes of a test host of this process in the folder of all benches, `out`; for all of them, if it is to be `alone`.
    pub(super) fn take(out: &Path, alone: bool) -> Result<Self, BenchError> {
        fs::create_dir_all(out).map_err(|e| BenchError::file("make", out, e))?;
        let two_may_run = !alone && suite::is_running() && has_room_for_two();
        let lanes = lanes(brake::is_asked_for(), two_may_run);
        lanes.iter().map(|lane| take(&out.join(lane.file_name()))).collect::<Result<_, _>>().map(Self)
    }
}

fn take(path: &Path) -> Result<Flock<File>, BenchError> {
    let open = || File::create(path).map_err(|e| BenchError::file("open", path, e));
    Flock::lock(open()?, FlockArg::LockExclusiveNonblock).or_else(|_| {
        eprintln!("another bench runs; waiting for it ...");
        Flock::lock(open()?, FlockArg::LockExclusive).map_err(|(_, e)| BenchError::file("lock", path, e.into()))
    })
}

fn has_room_for_two() -> bool {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_mib(&text)).unwrap_or(0);
    cpus >= CPUS_FOR_TWO && memory >= MEMORY_FOR_TWO
}

/// `MemTotal` of proc_meminfo(5), MiB.
fn total_mib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_braked_test_host_runs_beside_another_one_and_only_in_a_suite() {
        assert_eq!(lanes(true, true), [Lane::Braked]);
        assert_eq!(lanes(false, true), [Lane::Full]);
        for is_braked in [false, true] {
            assert_eq!(lanes(is_braked, false), [Lane::Full, Lane::Braked]);
        }
    }

    #[test]
    fn the_machine_s_memory_is_read() {
        assert_eq!(total_mib("MemTotal:       24576000 kB\nMemFree:  1 kB\n"), Some(24_000));
        assert_eq!(total_mib("MemFree: 1 kB\n"), None);
    }

    #[test]
    fn two_processes_that_want_the_same_lane_take_turns() {
        let dir = tempfile::tempdir().unwrap();
        let (path, order) = (dir.path().join("lock"), std::sync::Mutex::new(Vec::new()));
        let first = take(&path).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _second = take(&path).unwrap();
                order.lock().unwrap().push("second");
            });
            std::thread::sleep(std::time::Duration::from_millis(50));
            order.lock().unwrap().push("first");
            drop(first);
        });
        assert_eq!(*order.lock().unwrap(), ["first", "second"]);
    }
}
