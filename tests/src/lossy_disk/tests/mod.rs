//! The lossy disk as its clients see it, over its socket.

mod client;
mod control;
mod hostile;
mod model;
mod qemu;

use std::fs::{self, File};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{LossyDisk, Settings, State};
use client::{Client, PATIENCE};

/// Sectors of a test's disk.
const SECTORS: u64 = 64;
const BYTES: u64 = SECTORS * super::SECTOR as u64;

/// A disk with an empty base file.
struct Rig {
    disk: LossyDisk,
    base: PathBuf,
    dir: TempDir,
}

impl Rig {
    /// No sector is written back unasked, so that all is determined.
    fn new() -> Self {
        Self::with(&Settings { write_back: 0.0, ..Settings::default() })
    }

    fn with(settings: &Settings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        File::create(&base).unwrap().set_len(BYTES).unwrap();
        Self { disk: LossyDisk::start(&base, settings).unwrap(), base, dir }
    }

    fn client(&self) -> Client {
        Client::new(&self.disk)
    }

    /// The first bytes of `count` sectors of the base, which tell them apart in these tests.
    fn base(&self, count: usize) -> Vec<u8> {
        firsts(&fs::read(&self.base).unwrap()[..count * super::SECTOR])
    }

    /// Another file, full of `byte`.
    fn other(&self, name: &str, bytes: u64, byte: u8) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, vec![byte; usize::try_from(bytes).unwrap()]).unwrap();
        path
    }

    /// Waits until the disk's state is as wanted.
    fn wait(&self, wanted: impl Fn(&State) -> bool) {
        let start = Instant::now();
        while !wanted(&self.disk.state()) {
            assert!(start.elapsed() < PATIENCE, "{:?}", self.disk.state());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// So many sectors full of `byte`.
fn sectors(count: usize, byte: u8) -> Vec<u8> {
    vec![byte; count * super::SECTOR]
}

/// The first byte of each sector.
fn firsts(data: &[u8]) -> Vec<u8> {
    data.chunks(super::SECTOR).map(|sector| sector[0]).collect()
}
