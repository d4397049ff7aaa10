//! A disk that can lose what was not flushed.

use std::collections::BTreeMap;

use umbra_shadow::block::{Disk, Identity, SectorRange, Window, WriteCache};

/// Sectors of the guest's disk: 16 MiB.
pub const SIZE: u64 = 32_768;
/// Where it begins on the medium.
pub const START: u64 = 64;

const SECTOR: usize = 512;

pub fn disk() -> Disk {
    let window = Window { start: START, sectors: SIZE };
    let serial = "QEMU NVMe Ctrl_1".into();
    let identity = Identity { serial, sectors: START + SIZE, logical_block: 512, read_only: false, window };
    let cache = WriteCache::Volatile;
    Disk { identity, cache, physical_block: 512, optimal_io: 0, discards: true, rotational: false }
}

#[derive(Clone)]
pub struct Medium {
    stable: Vec<u8>,
    cache: BTreeMap<u64, Vec<u8>>,
    /// Whether a write stays in the cache until a flush.
    pub is_volatile: bool,
}

fn place(sector: u64) -> std::ops::Range<usize> {
    let at = usize::try_from(sector).unwrap() * SECTOR;
    at..at + SECTOR
}

impl Medium {
    pub fn new() -> Self {
        let bytes = usize::try_from(START + SIZE).unwrap() * SECTOR;
        Self { stable: vec![0; bytes], cache: BTreeMap::new(), is_volatile: true }
    }

    pub fn write(&mut self, at: SectorRange, bytes: &[u8]) {
        for (sector, content) in (at.start()..at.end()).zip(bytes.chunks(SECTOR)) {
            if self.is_volatile {
                self.cache.insert(sector, content.to_vec());
            } else {
                self.stable[place(sector)].copy_from_slice(content);
            }
        }
    }

    pub fn read(&self, at: SectorRange) -> Vec<u8> {
        let sector = |sector| self.cache.get(&sector).map_or(&self.stable[place(sector)], Vec::as_slice);
        (at.start()..at.end()).flat_map(|at| sector(at).to_vec()).collect()
    }

    pub fn flush(&mut self) {
        for (sector, content) in std::mem::take(&mut self.cache) {
            self.stable[place(sector)].copy_from_slice(&content);
        }
    }

    /// The reset: of what is in the cache, the sectors of which `keeps` says so reach the medium.
    pub fn lose_cache(&mut self, mut keeps: impl FnMut() -> bool) {
        for (sector, content) in std::mem::take(&mut self.cache) {
            if keeps() {
                self.stable[place(sector)].copy_from_slice(&content);
            }
        }
    }

    /// What is on the medium at a sector of the guest's disk.
    pub fn stable(&self, sector: u64) -> &[u8] {
        &self.stable[place(START + sector)]
    }
}
