//! What the shadow keeps is bounded: copies in bytes, extents in number, and the age of what is not stable, so that the next replay
//! stays short. At half of a bound a flush is ordered; at the bound new changes wait in the guest's queue. That cannot deadlock: the
//! flush ends, or its life does, and the log is written again.

use super::exchange::Access;
use super::extents::Longest;
use super::range::SECTOR_BYTES;

/// Bounds of one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of private copies: those in the log and those in flight. 64 MiB: 10 ms of a fast flash disk, a second of a hard disk.
    pub bytes: u64,
    /// Most extents of the log, with those that writes in flight may add. 16,384: 64 MiB in pieces of 4 KiB.
    pub extents: usize,
    /// Age of the oldest extent at which a flush is ordered, ns. 2 s: a replay then takes about as long as the disk's own flush would
    /// have taken, on hard disks too.
    pub age_ns: u64,
    /// Most sectors of an order with data. 2,048 (1 MiB): the largest piece of the driver VM's pool.
    pub part_sectors: u64,
    /// Most sectors of an order without data. 131,072 (64 MiB): a card that has to write the zeroes itself, at 1 MB/s, does it within
    /// [`Self::slow_ns`].
    pub wide_sectors: u64,
    /// Longest time with orders in flight and no answer, ns. 10 s: above the 7 s that hard disks try to read a sector, below the 30 s
    /// after which the kernel resets a controller.
    pub stall_ns: u64,
    /// The same while the driver VM says again and again that an order is under way which may take long: a flush, zeroes, a discard. 90 s:
    /// above the 60 s that Linux gives a disk for a flush, so that its driver's own error comes first; below the 120 s after which the
    /// guest's kernel says that a task hangs.
    pub slow_ns: u64,
    /// Longest time to come to rest before a deliberate reset, ns. 10 s, for the same reasons.
    pub quiesce_ns: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 64 << 20,
            extents: 16_384,
            age_ns: 2_000_000_000,
            part_sectors: 2_048,
            wide_sectors: 131_072,
            stall_ns: 10_000_000_000,
            slow_ns: 90_000_000_000,
            quiesce_ns: 10_000_000_000,
        }
    }
}

/// Extents that one change can add to the log: its own, and one more where it cuts the middle out of an older one. A failed change
/// cuts an older one at both ends and adds none of its own.
const EXTENTS_OF_A_CHANGE: usize = 2;

/// Parts of one request of the guest: 64 MiB of data, or 4 GiB of zeroes or discards. Bounds what a single request makes the shadow
/// keep; the device offers less than that (`seg_max`, `max_write_zeroes_sectors`, `max_discard_sectors`).
pub const MAX_PARTS: u64 = 64;

/// Ranges that may be lost before the disk is held for dead: further changes fail. A disk has spare sectors; one that cannot write a
/// thousand ranges has none left.
pub const MAX_LOST: usize = 1_024;

impl Limits {
    /// These, raised so far that any order fits into half of them, and none is given less time for being slow.
    pub(super) fn sound(mut self) -> Self {
        self.part_sectors = self.part_sectors.max(1);
        self.wide_sectors = self.wide_sectors.max(self.part_sectors);
        self.bytes = self.bytes.max(2 * self.part_sectors * SECTOR_BYTES);
        self.extents = self.extents.max(2 * EXTENTS_OF_A_CHANGE);
        self.slow_ns = self.slow_ns.max(self.stall_ns);
        self
    }

    /// Most sectors of an order.
    pub(super) fn longest(&self) -> Longest {
        Longest { data: self.part_sectors, wide: self.wide_sectors }
    }

    /// Most sectors of an order of this kind.
    pub(super) fn longest_of(&self, access: Access) -> u64 {
        match access {
            Access::Read | Access::Write => self.part_sectors,
            Access::WriteZeroes { .. } | Access::Discard => self.wide_sectors,
        }
    }

    /// Whether a change with a copy of `bytes` bytes fits beside what is `kept`, with `extents` in the log and `changes` in flight.
    pub(super) fn has_room(&self, bytes: u64, kept: u64, extents: usize, changes: usize) -> bool {
        if broken!(NoBound) {
            return true;
        }
        kept + bytes <= self.bytes && extents + EXTENTS_OF_A_CHANGE * (changes + 1) <= self.extents
    }

    /// Whether the log has come to half of a bound.
    pub(super) fn is_half(&self, logged: u64, extents: usize) -> bool {
        logged >= self.bytes / 2 || extents >= self.extents / 2
    }
}
