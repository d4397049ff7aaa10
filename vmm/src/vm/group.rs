//! The way of a VM's process into its control group. The kernel waits until each processor has passed a certain point before it moves
//! one, some 15 ms, in which the process builds its VM.
//!
//! Invariant: no vCPU runs before that is done, and the file is closed then: what a guest has made is never met outside of the bounds.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;

use umbra_splitter::threads::{self, Purpose};

use crate::base::cgroup::SELF_INTO;

/// A move that is under way.
#[derive(Debug)]
pub struct Entering(JoinHandle<io::Result<()>>);

impl Entering {
    /// Begins to move this process into the group whose list of processes is open as `entrance`.
    ///
    /// # Errors
    /// There is no thread for it.
    pub fn begin(entrance: OwnedFd) -> io::Result<Self> {
        let mut entrance = File::from(entrance);
        threads::spawn(Purpose::Helper, "group", move || entrance.write_all(SELF_INTO)).map(Self)
    }

    /// Waits until the process is in its group, or cannot be: then it has no bounds, as where there is no group at all.
    pub fn finish(self) {
        let moved = self.0.join().unwrap_or_else(|_| Err(io::Error::other("its thread has panicked")));
        if let Err(error) = moved {
            tracing::warn!("go into the control group: {error}");
        }
    }
}
