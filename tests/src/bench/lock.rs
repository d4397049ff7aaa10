//! One bench at a time: two emulated hosts on one machine would measure each other, and starve each other's driver VMs.

use std::fs::{self, File};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

use super::BenchError;

/// Held while a bench lives; the kernel lets go of the file when the process ends, however that may be.
pub(super) struct Lock(#[expect(dead_code, reason = "held, not read")] Flock<File>);

impl Lock {
    /// Waits for the bench of another process in the folder of all benches, `out`, to end.
    pub(super) fn take(out: &Path) -> Result<Self, BenchError> {
        fs::create_dir_all(out).map_err(|e| BenchError::file("make", out, e))?;
        let path = out.join("lock");
        let open = || File::create(&path).map_err(|e| BenchError::file("open", &path, e));
        let first = Flock::lock(open()?, FlockArg::LockExclusiveNonblock).or_else(|_| {
            eprintln!("another bench runs; waiting for it ...");
            Flock::lock(open()?, FlockArg::LockExclusive).map_err(|(_, e)| BenchError::file("lock", &path, e.into()))
        });
        first.map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_benches_take_turns() {
        let dir = tempfile::tempdir().unwrap();
        let order = std::sync::Mutex::new(Vec::new());
        let first = Lock::take(dir.path()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _second = Lock::take(dir.path()).unwrap();
                order.lock().unwrap().push("second");
            });
            std::thread::sleep(std::time::Duration::from_millis(50));
            order.lock().unwrap().push("first");
            drop(first);
        });
        assert_eq!(*order.lock().unwrap(), ["first", "second"]);
    }
}
