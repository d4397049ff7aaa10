//! The lossy disk: an NBD server that loses, on command, what was not flushed.
//!
//! A test host's disk has it as its medium (`-blockdev nbd` over a unix socket; QEMU's models of controllers have no volatile
//! cache of their own), so a scenario can take a controller's cache away at the moment at which its driver dies. [`LossyDisk`] is both
//! the server, whose threads run in this process, and the handle that a scenario gives its orders with. The disk outlives its clients:
//! a QEMU that is killed and started again finds it as it left it.
//!
//! | file | |
//! | --- | --- |
//! | `protocol.rs` | NBD on the wire |
//! | `handshake.rs` | negotiation |
//! | `server.rs` | connections, queues, stalls and delays |
//! | `drive.rs` | one request: checks, ordered errors |
//! | `medium.rs` | the base file and the cache: what is kept, torn and lost |
//! | `faults.rs` | ordered errors and delays |
//!
//! Unless it is stalled or told to delay, it answers every request, with an error if need be: QEMU's reset of a controller waits
//! for all requests.

mod drive;
mod faults;
mod handshake;
mod medium;
mod protocol;
mod server;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tempfile::TempDir;

use drive::Drive;
pub use faults::{Class, Times};
use medium::Medium;
pub use medium::SECTOR;
use server::{Inner, Shared};

/// The socket's name in its folder.
const SOCKET: &str = "disk";

/// For how long QEMU keeps requests when its connection has ended, seconds. The server is there all the time, so this need only be more
/// than any machine takes to connect.
const RECONNECT_S: u32 = 60;

/// How a disk behaves.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Determines which sectors are lost and written back, given the same requests in the same order.
    pub seed: u64,
    /// Probability, for each sector that is written, that a random sector of the cache is written back to the base. The default
    /// takes one for each write of 4 KiB on average: nearly everything is torn sooner or later, and most of what is
    /// unflushed is still nowhere but in the cache.
    pub write_back: f64,
    /// Most sectors in the cache; beyond, random ones are written back. The default, 128 MiB, is twice what a guest's log of
    /// unflushed writes holds, so the disk never hides that something is missing there. With 0 nothing is volatile.
    pub cache_sectors: usize,
    /// Writes that are to be durable are kept in the cache as all others: a disk that lies.
    pub ignores_fua: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { seed: 0, write_back: 0.125, cache_sectors: 256 << 10, ignores_fua: false }
    }
}

/// What clients may do with a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read and write.
    ReadWrite,
    /// Read: writes fail with `EPERM`, and the client knows it from the handshake.
    ReadOnly,
}

/// A disk that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LossyDiskError {
    /// The base file.
    #[error("{} cannot be a lossy disk", path.display())]
    Base {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The server.
    #[error("cannot serve a lossy disk")]
    Serve(#[source] io::Error),
}

/// What [`LossyDisk::lose`] has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Sectors that were lost.
    pub lost: u64,
    /// Sectors that are unflushed still.
    pub kept: u64,
    /// [`State::requests`] at that moment. If it is more than when the driver VM was fenced, requests have come in between, and
    /// the scenario shows nothing.
    pub requests: u64,
}

/// The first request that came after the last loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstRequest {
    /// It was the request of this number, counted from 1 ([`State::requests`]).
    pub number: u64,
    /// When it came: `CLOCK_MONOTONIC`, microseconds ([`crate::peer::now_us`]).
    pub at_us: u64,
}

/// How a disk is. Counts begin with the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Size, bytes.
    pub bytes: u64,
    /// What clients may do.
    pub access: Access,
    /// Requests that have come.
    pub requests: u64,
    /// Of these, those that wait: for the end of a stall or a delay, or for their turn.
    pub waiting: usize,
    /// Requests that failed as ordered ([`LossyDisk::fail`]).
    pub failed: u64,
    /// Requests that failed because the base could not be read or written. Any makes a scenario worthless.
    pub host_errors: u64,
    /// Connections that have come as far as requests.
    pub connections: u64,
    /// Sectors that a loss may take now.
    pub unflushed: u64,
    /// Of these, those that no flush will write any more: one that covered them has failed.
    pub given_up: u64,
    /// Sectors that a flush moved to the base.
    pub flushed: u64,
    /// Sectors that went to the base unasked.
    pub written_back: u64,
    /// Sectors lost.
    pub dropped: u64,
    /// Calls of [`LossyDisk::lose`].
    pub losses: u64,
    /// What came first after the last of these.
    pub first_after_loss: Option<FirstRequest>,
}

/// A disk, and its server. Dropping it ends the server at once; what is in the cache is lost then.
#[derive(Debug)]
pub struct LossyDisk {
    shared: Arc<Shared>,
    listener: Arc<UnixListener>,
    accepting: Option<JoinHandle<()>>,
    dir: TempDir,
}

impl LossyDisk {
    /// Serves the file `base`, of whole sectors of [`SECTOR`] bytes.
    ///
    /// # Errors
    /// The file is not there or of an odd size, or there is no room for a socket or a thread.
    pub fn start(base: &Path, settings: &Settings) -> Result<Self, LossyDiskError> {
        let medium =
            Medium::open(base, settings).map_err(|source| LossyDiskError::Base { path: base.into(), source })?;
        // A folder of its own, for this user alone; and a path that is short enough for a socket.
        let dir = tempfile::Builder::new().prefix("umbra-disk-").tempdir().map_err(LossyDiskError::Serve)?;
        let listener = UnixListener::bind(dir.path().join(SOCKET)).map_err(LossyDiskError::Serve)?;
        let shared = Arc::new(Shared::new(Inner::new(Drive::new(medium), settings.seed)));
        let listener = Arc::new(listener);
        let (server, listens) = (shared.clone(), listener.clone());
        let accepting = thread::Builder::new().name("lossy-disk-accept".into());
        let accepting = accepting.spawn(move || server.accept(&listens)).map_err(LossyDiskError::Serve)?;
        Ok(Self { shared, listener, accepting: Some(accepting), dir })
    }

    /// Where it is served: the one export has no name.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join(SOCKET)
    }

    /// The argument of QEMU's `-blockdev` that makes this disk the node `name`.
    pub fn blockdev(&self, name: &str) -> String {
        blockdev(&self.socket(), name).to_string()
    }

    /// Loses each unflushed sector with this probability, from 0 to 1. What is kept stays unflushed, and a later loss may take
    /// it; a flush that has come and covers a lost sector fails.
    ///
    /// QEMU has to run: when it stops a machine it flushes all disks (`do_vm_stop`, `system/cpus.c`), and nothing is left to lose.
    pub fn lose(&self, probability: f64) -> Loss {
        self.shared.with(|inner| {
            inner.losses += 1;
            inner.first_after_loss = None;
            let medium = &mut inner.drive.medium;
            let lost = medium.lose(probability);
            Loss { lost, kept: medium.unflushed(), requests: inner.requests }
        })
    }

    /// Requests of this class that touch a byte of `range` fail with `EIO`. A failed write or read does nothing. A flush has no range and
    /// fails in any case: what it covered within the range is given up, readable until it is lost, and written by no
    /// later flush; what it covered elsewhere is flushed.
    pub fn fail(&self, class: Class, range: Range<u64>, times: Times) {
        let sector = SECTOR as u64;
        let sectors = range.start / sector..range.end.div_ceil(sector);
        self.shared.with(|inner| inner.drive.faults.add(class, sectors, times));
    }

    /// Ends all errors that were ordered; what was given up stays so.
    pub fn heal(&self) {
        self.shared.with(|inner| inner.drive.faults.clear());
    }

    /// Serves no request until [`Self::resume`].
    pub fn stall(&self) {
        self.shared.with(|inner| inner.is_stalled = true);
    }

    /// Ends a stall.
    pub fn resume(&self) {
        self.shared.with(|inner| inner.is_stalled = false);
    }

    /// Serves requests of this class no sooner than so long after they came; that holds for those that wait already, too.
    pub fn delay(&self, class: Class, delay: Duration) {
        self.shared.with(|inner| inner.drive.faults.set_delay(class, delay));
    }

    /// Serves what waits for the end of a delay; what comes from now on waits all the same.
    pub fn release(&self) {
        self.shared.with(Inner::release);
    }

    /// Puts another disk in the place of this one: the file `base`. What is unflushed is lost, and requests that wait fail. Clients
    /// notice nothing else, unless size or access is another: then their connections end, and they learn it when they connect again.
    ///
    /// # Errors
    /// As [`Self::start`]; the disk is the old one then.
    pub fn swap(&self, base: &Path, access: Access) -> Result<(), LossyDiskError> {
        self.shared.with(|inner| {
            let swapped = inner.drive.medium.swap(base, access);
            if swapped.map_err(|source| LossyDiskError::Base { path: base.into(), source })? {
                inner.hang_up();
            }
            Ok(())
        })
    }

    /// How the disk is.
    pub fn state(&self) -> State {
        self.shared.look(|inner| {
            let (drive, counts) = (&inner.drive, inner.drive.medium.counts());
            State {
                bytes: drive.medium.sectors() * SECTOR as u64,
                access: drive.medium.access(),
                requests: inner.requests,
                waiting: inner.waiting(),
                failed: drive.failed,
                host_errors: drive.host_errors,
                connections: inner.connections_made,
                unflushed: drive.medium.unflushed(),
                given_up: drive.medium.given_up(),
                flushed: counts.flushed,
                written_back: counts.written_back,
                dropped: counts.dropped,
                losses: inner.losses,
                first_after_loss: inner.first_after_loss,
            }
        })
    }

    /// The SHA-256 of the base, as `sha256sum` prints it. Requests wait meanwhile: half a second for 256 MiB.
    ///
    /// # Errors
    /// The base cannot be read.
    pub fn base_sha256(&self) -> io::Result<String> {
        self.shared.look(|inner| inner.drive.medium.base_sha256())
    }
}

/// The argument of QEMU's `-blockdev`, and of `blockdev-add`, that makes what is served at `socket` the node `name`.
pub fn blockdev(socket: &Path, name: &str) -> serde_json::Value {
    // Without `unmap` QEMU keeps discards to itself.
    serde_json::json!({
        "driver": "nbd",
        "node-name": name,
        "server": { "type": "unix", "path": socket },
        "reconnect-delay": RECONNECT_S,
        "discard": "unmap",
    })
}

impl Drop for LossyDisk {
    fn drop(&mut self) {
        self.shared.stop(&self.listener);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}
