//! What the disk holds: a base file, which survives, and a volatile cache of sectors, which may be lost.
//!
//! A write goes to the cache; a flush moves to the base what was complete when the flush was *taken* from the connection, and not
//! what has come since; a durable write (FUA) goes to the base. After each write some random sectors of the cache are written back
//! unasked, one by one, so that the base sees writes out of order and torn.
//!
//! Invariants:
//! - a sector is in one place of `cache` and `given_up` at most; reads get that content, else the base's;
//! - when a flush succeeds, each sector that was complete when it was taken is in the base, with that content or a later one, but for
//!   what is given up: a cached content that a flush under way covers is written back before a later write takes its place, and a
//!   flush that has lost such a content to a [`Medium::lose`] is no longer in `flushes` and fails;
//! - once a flush has failed, no later one writes what it covered (`given_up`), as with disks and kernels that drop the error
//!   together with the data: only another write of the sector helps.
//!
//! The base file is not synced: what the machine that runs the bench loses is not the subject.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};
use sha2::{Digest, Sha256};

use super::{Access, Settings};
use crate::random::Random;

/// Bytes of a sector, the unit that is lost or kept.
pub const SECTOR: usize = 512;

/// Zeroed or trimmed ranges longer than this many sectors (4 MiB, as the longest write) bypass the cache, as a disk's long commands
/// do: one request may be of 4 GiB, for which the cache has no room.
const LONGEST_CACHED: u64 = 8192;

/// Bytes that go to the base, and through the hash, at once.
const CHUNK: usize = 1 << 20;

/// The content of one sector; `None`: zeroes.
type Content = Option<Box<[u8; SECTOR]>>;

/// A sector of the cache.
#[derive(Debug)]
struct Unflushed {
    content: Content,
    /// When its write was complete, by the medium's clock.
    done: u64,
}

/// What has become of sectors since the server was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) flushed: u64,
    pub(super) written_back: u64,
    pub(super) dropped: u64,
}

/// See the file's header.
#[derive(Debug)]
pub(super) struct Medium {
    base: File,
    sectors: u64,
    access: Access,
    settings: Settings,
    random: Random,
    swaps: u64,
    /// Counts completed writes and taken flushes.
    clock: u64,
    cache: BTreeMap<u64, Unflushed>,
    given_up: BTreeMap<u64, Content>,
    /// Flushes that were taken, have not been answered, and can still succeed.
    flushes: BTreeSet<u64>,
    counts: Counts,
}

impl Medium {
    /// Opens a base file of whole sectors.
    pub(super) fn open(base: &Path, settings: &Settings) -> io::Result<Self> {
        let (file, sectors) = open(base, Access::ReadWrite)?;
        Ok(Self {
            base: file,
            sectors,
            access: Access::ReadWrite,
            settings: settings.clone(),
            random: Random::new(settings.seed),
            swaps: 0,
            clock: 0,
            cache: BTreeMap::new(),
            given_up: BTreeMap::new(),
            flushes: BTreeSet::new(),
            counts: Counts::default(),
        })
    }

    /// Puts another base file in the place of the present one, whose unflushed sectors are lost, as those of a disk that is pulled
    /// out. Returns whether clients have to connect again to learn what has changed: size or access.
    pub(super) fn swap(&mut self, base: &Path, access: Access) -> io::Result<bool> {
        let (file, sectors) = open(base, access)?;
        self.lose(1.0);
        self.swaps += 1;
        let is_other = (sectors, access) != (self.sectors, self.access);
        (self.base, self.sectors, self.access) = (file, sectors, access);
        Ok(is_other)
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    /// How often another base has come: requests that came before it are not for it.
    pub(super) fn swaps(&self) -> u64 {
        self.swaps
    }

    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// Sectors that a loss may take.
    pub(super) fn unflushed(&self) -> u64 {
        (self.cache.len() + self.given_up.len()) as u64
    }

    /// Of these, those that no flush will write any more.
    pub(super) fn given_up(&self) -> u64 {
        self.given_up.len() as u64
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The content of `sectors`.
    pub(super) fn read(&self, sectors: Range<u64>) -> io::Result<Vec<u8>> {
        let mut data = vec![0; bytes(sectors.end - sectors.start)];
        self.base.read_exact_at(&mut data, offset(sectors.start))?;
        let cached = self.cache.range(sectors.clone()).map(|(&sector, unflushed)| (sector, &unflushed.content));
        let given_up = self.given_up.range(sectors.clone()).map(|(&sector, content)| (sector, content));
        for (sector, content) in cached.chain(given_up) {
            let at = bytes(sector - sectors.start);
            data[at..at + SECTOR].copy_from_slice(bytes_of(content));
        }
        Ok(data)
    }

    /// Writes whole sectors from `first` on, to the cache.
    pub(super) fn write(&mut self, first: u64, data: &[u8]) -> io::Result<()> {
        let done = self.tick();
        let contents = data.as_chunks::<SECTOR>().0;
        for (sector, content) in (first..).zip(contents) {
            self.put(sector, Unflushed { content: Some(Box::new(*content)), done })?;
        }
        self.write_back(contents.len() as u64)
    }

    /// Writes that are to be durable are as others.
    pub(super) fn ignores_fua(&self) -> bool {
        self.settings.ignores_fua
    }

    /// Writes whole sectors from `first` on, to the base (FUA).
    pub(super) fn write_through(&mut self, first: u64, data: &[u8]) -> io::Result<()> {
        self.base.write_all_at(data, offset(first))?;
        self.forget(first..first + (data.len() / SECTOR) as u64);
        Ok(())
    }

    /// Makes `sectors` zeroes, in the cache; in the base if they are too many for the cache.
    pub(super) fn zero(&mut self, sectors: Range<u64>) -> io::Result<()> {
        let count = sectors.end - sectors.start;
        if count > LONGEST_CACHED {
            return self.zero_through(sectors);
        }
        let done = self.tick();
        for sector in sectors {
            self.put(sector, Unflushed { content: None, done })?;
        }
        self.write_back(count)
    }

    /// Makes `sectors` zeroes, in the base.
    pub(super) fn zero_through(&mut self, sectors: Range<u64>) -> io::Result<()> {
        let (start, end) = (offset(sectors.start), offset(sectors.end));
        if start < end {
            let signed = |bytes: u64| i64::try_from(bytes).map_err(io::Error::other);
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&self.base, hole, signed(start)?, signed(end - start)?)?;
        }
        self.forget(sectors);
        Ok(())
    }

    /// What is in the base now replaces cached contents.
    fn forget(&mut self, sectors: Range<u64>) {
        let cached: Vec<u64> = self.cache.range(sectors.clone()).map(|(&sector, _)| sector).collect();
        for sector in cached {
            self.cache.remove(&sector);
        }
        self.given_up.retain(|sector, _| !sectors.contains(sector));
    }

    fn put(&mut self, sector: u64, new: Unflushed) -> io::Result<()> {
        self.given_up.remove(&sector);
        let old = self.cache.insert(sector, new);
        if let Some(old) = old.filter(|old| self.flushes.last().is_some_and(|&flush| old.done < flush)) {
            self.write_sector(sector, &old.content)?;
        }
        if self.cache.len() > self.settings.cache_sectors {
            self.write_back_one()?;
        }
        Ok(())
    }

    /// After a write of `sectors`: each gives a random sector of the cache the chance to be written back.
    fn write_back(&mut self, sectors: u64) -> io::Result<()> {
        for _ in 0..sectors {
            if self.random.chance(self.settings.write_back) {
                self.write_back_one()?;
            }
        }
        Ok(())
    }

    /// Writes a random sector of the cache to the base. One behind a gap is likelier than one behind its neighbour.
    fn write_back_one(&mut self) -> io::Result<()> {
        let ends = self.cache.first_key_value().zip(self.cache.last_key_value());
        let Some(((&low, _), (&high, _))) = ends else { return Ok(()) };
        let from = low + self.random.below(high - low + 1);
        let Some(sector) = self.cache.range(from..).next().map(|(&sector, _)| sector) else { return Ok(()) };
        let Some(unflushed) = self.cache.remove(&sector) else { return Ok(()) };
        self.write_sector(sector, &unflushed.content)
    }

    fn write_sector(&mut self, sector: u64, content: &Content) -> io::Result<()> {
        self.counts.written_back += 1;
        self.base.write_all_at(bytes_of(content), offset(sector))
    }

    /// A flush has come: returns what [`Medium::flush`] and its like are to be called with.
    pub(super) fn take_flush(&mut self) -> u64 {
        let flush = self.tick();
        self.flushes.insert(flush);
        flush
    }

    /// Moves to the base what was complete when `flush` was taken. `false`: some of that has been lost since.
    pub(super) fn flush(&mut self, flush: u64) -> io::Result<bool> {
        if !self.flushes.remove(&flush) {
            return Ok(false);
        }
        let covered = self.cut_covered(flush);
        self.counts.flushed += covered.len() as u64;
        write_runs(&self.base, &covered)?;
        Ok(true)
    }

    /// Fails `flush`: what it covered within `sectors` is given up, the rest is moved to the base.
    pub(super) fn fail_flush(&mut self, flush: u64, sectors: &Range<u64>) -> io::Result<()> {
        self.flushes.remove(&flush);
        let covered = self.cut_covered(flush);
        let (given_up, flushed): (BTreeMap<_, _>, BTreeMap<_, _>) =
            covered.into_iter().partition(|(sector, _)| sectors.contains(sector));
        self.given_up.extend(given_up);
        self.counts.flushed += flushed.len() as u64;
        write_runs(&self.base, &flushed)
    }

    /// `flush` will not be answered.
    pub(super) fn forget_flush(&mut self, flush: u64) {
        self.flushes.remove(&flush);
    }

    fn cut_covered(&mut self, flush: u64) -> BTreeMap<u64, Content> {
        let all = std::mem::take(&mut self.cache);
        let (covered, kept): (BTreeMap<_, _>, BTreeMap<_, _>) =
            all.into_iter().partition(|(_, unflushed)| unflushed.done < flush);
        self.cache = kept;
        covered.into_iter().map(|(sector, unflushed)| (sector, unflushed.content)).collect()
    }

    /// Loses each unflushed sector with this probability; its content is the base's again. The others stay unflushed: a later loss
    /// may take them. Returns how many were lost.
    pub(super) fn lose(&mut self, probability: f64) -> u64 {
        let before = self.unflushed();
        let (random, mut oldest) = (&mut self.random, u64::MAX);
        self.cache.retain(|_, unflushed| {
            let is_lost = random.chance(probability);
            if is_lost {
                oldest = oldest.min(unflushed.done);
            }
            !is_lost
        });
        self.given_up.retain(|_, _| !random.chance(probability));
        self.flushes.retain(|&flush| flush < oldest);
        let lost = before - self.unflushed();
        self.counts.dropped += lost;
        lost
    }

    /// The SHA-256 of the base, as `sha256sum` prints it.
    pub(super) fn base_sha256(&self) -> io::Result<String> {
        let (mut hash, mut chunk) = (Sha256::new(), vec![0; CHUNK]);
        let (mut at, end) = (0, offset(self.sectors));
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            self.base.read_exact_at(&mut chunk[..length], at)?;
            hash.update(&chunk[..length]);
            at += length as u64;
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Opens a base file; returns it with its number of sectors.
fn open(base: &Path, access: Access) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().read(true).write(access == Access::ReadWrite).open(base)?;
    let length = file.metadata()?.len();
    let sector = SECTOR as u64;
    if !length.is_multiple_of(sector) {
        return Err(io::Error::other(format!("its {length} bytes are not whole sectors of {SECTOR}")));
    }
    Ok((file, length / sector))
}

/// Writes contents to `base`, neighbours together.
fn write_runs(base: &File, contents: &BTreeMap<u64, Content>) -> io::Result<()> {
    let (mut run, mut first) = (Vec::new(), 0);
    for (&sector, content) in contents {
        if sector != first + (run.len() / SECTOR) as u64 || run.len() >= CHUNK {
            base.write_all_at(&run, offset(first))?;
            run.clear();
            first = sector;
        }
        run.extend_from_slice(bytes_of(content));
    }
    base.write_all_at(&run, offset(first))
}

fn bytes_of(content: &Content) -> &[u8; SECTOR] {
    content.as_deref().unwrap_or(&[0; SECTOR])
}

/// Where a sector begins, bytes.
fn offset(sector: u64) -> u64 {
    sector * SECTOR as u64
}

/// Bytes of so many sectors, which come from a request that has been checked: [`super::protocol::MAX_PAYLOAD`] at most.
fn bytes(sectors: u64) -> usize {
    usize::try_from(offset(sectors)).unwrap_or(usize::MAX)
}
