//! What a driver VM reports of a disk: which one it is, and what it can do.

use serde::{Deserialize, Serialize};

use super::exchange::WriteCache;
use super::identity::Identity;
use super::range::SECTOR_BYTES;

/// Longest serial number or WWID, in bytes: an NVMe name with its controller's model is the longest known, at some 70.
pub const MAX_SERIAL: usize = 128;

/// Largest logical block, in bytes: a page; Linux takes no larger one of a virtio disk.
pub const MAX_LOGICAL_BLOCK: u32 = 4096;

/// A disk, or a part of one, as a driver VM offers it to a guest. The guest sees the first report for its life; of a later one only
/// the identity and the cache count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Which disk it is. The window is the guest's part of it.
    pub identity: Identity,
    /// Its write cache.
    pub cache: WriteCache,
    /// Bytes of a physical block: a power of two, no smaller than the logical block.
    pub physical_block: u32,
    /// Bytes that are read or written best at a time; 0: unknown.
    pub optimal_io: u32,
    /// Whether it takes discards.
    pub discards: bool,
    /// Whether it has a spindle.
    pub rotational: bool,
}

impl Disk {
    /// Whether there can be such a disk: a driver VM may say anything.
    pub fn is_sane(&self) -> bool {
        let Identity { serial, sectors, logical_block, window, .. } = &self.identity;
        let block_sectors = u64::from(*logical_block) / SECTOR_BYTES;
        let is_block = |bytes: u32| bytes.is_power_of_two() && u64::from(bytes) >= SECTOR_BYTES;
        let end = window.start.checked_add(window.sectors);
        serial.len() <= MAX_SERIAL
            && serial.chars().all(|c| c.is_ascii_graphic() || c == ' ')
            && is_block(*logical_block)
            && *logical_block <= MAX_LOGICAL_BLOCK
            && is_block(self.physical_block)
            && self.physical_block >= *logical_block
            && *sectors <= i64::MAX as u64 / SECTOR_BYTES
            && window.sectors > 0
            && end.is_some_and(|end| end <= *sectors)
            && [window.start, window.sectors].iter().all(|at| at.is_multiple_of(block_sectors))
    }
}

#[cfg(test)]
mod tests {
    use super::super::identity::Window;
    use super::*;

    fn disk() -> Disk {
        let window = Window { start: 8, sectors: 1_000 };
        let serial = "QEMU NVMe Ctrl_deadbeef".into();
        let identity = Identity { serial, sectors: 2_048, logical_block: 512, read_only: false, window };
        let cache = WriteCache::Volatile;
        Disk { identity, cache, physical_block: 4096, optimal_io: 0, discards: true, rotational: false }
    }

    #[test]
    fn only_disks_that_can_be_are_sane() {
        assert!(disk().is_sane());
        let wrong: [fn(&mut Disk); 9] = [
            |disk| disk.identity.serial = "x".repeat(MAX_SERIAL + 1),
            |disk| disk.identity.serial = "a\nb".into(),
            |disk| disk.identity.logical_block = 0,
            |disk| disk.identity.logical_block = 768,
            |disk| disk.identity.logical_block = 8192,
            |disk| disk.physical_block = 256,
            |disk| disk.identity.window.sectors = 0,
            |disk| disk.identity.window.start = u64::MAX,
            |disk| (disk.identity.logical_block, disk.identity.window.start) = (4096, 9),
        ];
        for change in wrong {
            let mut disk = disk();
            change(&mut disk);
            assert!(!disk.is_sane(), "{disk:?}");
        }
    }
}
