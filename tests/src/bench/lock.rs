//! One bench at a time: two emulated hosts on one machine would measure each other.

use std::fs::{self, File};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

use super::BenchError;

/// Held while a bench lives; the kernel lets go of it when the process ends, however that may be.
pub(super) struct Lock(#[expect(dead_code, reason = "held, not read")] Flock<File>);

impl Lock {
    pub(super) fn take(out: &Path) -> Result<Self, BenchError> {
        let path = out.join("lock");
        fs::create_dir_all(out).map_err(|e| BenchError::file("make", out, e))?;
        let open = || File::create(&path).map_err(|e| BenchError::file("open", &path, e));
        match Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Self(lock)),
            Err(_) => {
                eprintln!("another bench runs; waiting for it ...");
                let lock = Flock::lock(open()?, FlockArg::LockExclusive);
                lock.map(Self).map_err(|(_, e)| BenchError::file("lock", &path, e.into()))
            }
        }
    }
}
