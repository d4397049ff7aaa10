//! Which disk it is. Nothing is written to a disk that a new driver VM brings before it has proved to be the one that the guest was
//! given: by what it says of itself, and by up to [`SAMPLES`] blocks that were flushed to it. A block that differs means another disk,
//! or one that lied about a flush.

use serde::{Deserialize, Serialize};

use super::exchange::{Fingerprint, Payload, Slice};
use super::range::SectorRange;

/// Blocks of which a fingerprint is kept: enough that another disk with the same serial number (a clone, a bridge that has one number
/// for all its disks) is found out, few enough to be read in no time.
pub const SAMPLES: usize = 16;

/// Sectors of a sample: 4 KiB, the largest logical block.
pub const SAMPLE_SECTORS: u64 = 8;

/// Time after which the oldest of all samples makes room for one more, ns. A second: hashing costs nothing then, and what is sampled
/// follows what the guest uses.
const RENEWAL_NS: u64 = 1_000_000_000;

/// Times that reading a sample may fail, or be cut off by a death, before it is dropped: it must not keep its disk away.
const ATTEMPTS: u8 = 2;

/// The part of a disk that one guest has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// First sector on the disk.
    pub start: u64,
    /// Sectors; the size of the guest's disk.
    pub sectors: u64,
}

impl Window {
    /// Where a range of the guest's disk is on the driver VM's disk; none if it is not within the guest's part.
    pub fn locate(self, range: SectorRange) -> Option<SectorRange> {
        if range.end() > self.sectors {
            return None;
        }
        range.shifted(self.start)
    }
}

/// What a disk says of itself. Pinned when the guest gets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Serial number, WWID, or CID of an SD card.
    pub serial: String,
    /// Sectors of the whole disk.
    pub sectors: u64,
    /// Bytes of a logical block: a power of two, 512 at least.
    pub logical_block: u32,
    /// Whether it cannot be written to.
    pub read_only: bool,
    /// The guest's part of it.
    pub window: Window,
}

impl Identity {
    /// Whether `other` is this disk.
    ///
    /// # Errors
    /// What differs.
    pub fn check(&self, other: &Self) -> Result<(), Mismatch> {
        let differences = [
            (self.serial != other.serial, Mismatch::Serial),
            (self.sectors != other.sectors, Mismatch::Size),
            (self.logical_block != other.logical_block, Mismatch::LogicalBlock),
            (self.read_only != other.read_only, Mismatch::ReadOnly),
            (self.window != other.window, Mismatch::Window),
        ];
        differences.iter().find(|(differs, _)| *differs).map_or(Ok(()), |(_, mismatch)| Err(*mismatch))
    }

    /// Whether `range` is whole logical blocks of the guest's part.
    pub(super) fn offers(&self, range: SectorRange) -> bool {
        let block = self.block_sectors();
        self.window.locate(range).is_some_and(|at| at.end() <= self.sectors)
            && range.start().is_multiple_of(block)
            && range.count().is_multiple_of(block)
    }

    fn block_sectors(&self) -> u64 {
        u64::from(self.logical_block / 512).max(1)
    }

    /// Whether [`SAMPLE_SECTORS`] are whole logical blocks.
    pub(super) fn can_be_sampled(&self) -> bool {
        SAMPLE_SECTORS.is_multiple_of(self.block_sectors())
    }
}

/// In what a disk differs from the one that the guest was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Serial number.
    #[error("another disk: its serial number differs")]
    Serial,
    /// Size.
    #[error("another disk, or changed: its size differs")]
    Size,
    /// Logical block.
    #[error("another disk, or changed: its logical block differs")]
    LogicalBlock,
    /// Read-only or not.
    #[error("the disk has become read-only, or writable")]
    ReadOnly,
    /// Start or length of the guest's part.
    #[error("the disk's partition has moved or changed its size")]
    Window,
    /// A block that was flushed.
    #[error("another disk, or one that lost what it had flushed: the block at sector {0} differs")]
    Sample(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Known,
    Unread,
    Reading,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: SectorRange,
    fingerprint: Fingerprint,
    state: State,
    attempts: u8,
}

/// The samples of one disk, oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples {
    kept: Vec<Sample>,
    newest_ns: u64,
}

impl Samples {
    /// Whether one more is wanted at `now` ns.
    pub(super) fn are_wanted(&self, now: u64) -> bool {
        self.kept.len() < SAMPLES || now.saturating_sub(self.newest_ns) >= RENEWAL_NS
    }

    /// Data that a flush has made stable: keeps the fingerprint of a block, if there is a whole one of which `is_free` says that
    /// nothing is about to change it. Returns whether it did.
    pub(super) fn offer<P: Payload>(
        &mut self,
        range: SectorRange,
        data: &Slice<P>,
        now: u64,
        is_free: impl Fn(SectorRange) -> bool,
    ) -> bool {
        let start = range.start().next_multiple_of(SAMPLE_SECTORS);
        let Some(at) = SectorRange::new(start, SAMPLE_SECTORS) else { return false };
        if at.end() > range.end() || !is_free(at) {
            return false;
        }
        self.overwritten(at);
        if self.kept.len() >= SAMPLES {
            self.kept.remove(0);
        }
        let fingerprint = data.payload.fingerprint(data.skip + (start - range.start()), SAMPLE_SECTORS);
        self.kept.push(Sample { at, fingerprint, state: State::Known, attempts: 0 });
        self.newest_ns = now;
        true
    }

    /// Something in `range` is about to be changed.
    pub(super) fn overwritten(&mut self, range: SectorRange) {
        if broken!(SamplesOutliveTheirBlock) {
            return;
        }
        self.kept.retain(|sample| !sample.at.overlaps(range));
    }

    /// A new driver VM: all are to be read.
    pub(super) fn begin_check(&mut self) {
        for sample in &mut self.kept {
            sample.state = State::Unread;
        }
    }

    /// The next one to read.
    pub(super) fn next_unread(&mut self) -> Option<SectorRange> {
        let sample = self.kept.iter_mut().find(|sample| sample.state == State::Unread)?;
        sample.state = State::Reading;
        Some(sample.at)
    }

    /// A sample was read.
    ///
    /// # Errors
    /// When it differs.
    pub(super) fn read(&mut self, at: SectorRange, found: Fingerprint) -> Result<(), Mismatch> {
        for sample in self.kept.iter_mut().filter(|sample| sample.at == at) {
            if sample.fingerprint != found {
                return Err(Mismatch::Sample(at.start()));
            }
            (sample.state, sample.attempts) = (State::Known, 0);
        }
        Ok(())
    }

    /// A sample could not be read: again, or it is dropped.
    pub(super) fn read_failed(&mut self, at: SectorRange) {
        for sample in self.kept.iter_mut().filter(|sample| sample.at == at) {
            sample.state = State::Unread;
            sample.attempts = sample.attempts.saturating_add(1);
        }
        self.kept.retain(|sample| sample.attempts < ATTEMPTS);
    }

    /// Whether the present disk is the one: there is nothing left to read.
    pub(super) fn are_checked(&self) -> bool {
        self.kept.iter().all(|sample| sample.state == State::Known)
    }

    /// Number of samples.
    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn range(start: u64, count: u64) -> SectorRange {
        SectorRange::new(start, count).unwrap()
    }

    #[derive(Clone)]
    struct Copied(Arc<[u8]>);

    impl Payload for Copied {
        fn fingerprint(&self, skip: u64, sectors: u64) -> Fingerprint {
            Fingerprint::of_sectors(&self.0, skip, sectors)
        }
    }

    /// 64 sectors, each block of which is filled with its number.
    fn data() -> Slice<Copied> {
        let bytes: Vec<u8> = (0..8u8).flat_map(|block| vec![block; 4096]).collect();
        Slice { payload: Copied(bytes.into()), skip: 0, sectors: 64 }
    }

    fn block(n: u8) -> Fingerprint {
        Fingerprint::of(&[n; 4096])
    }

    #[test]
    fn a_sample_is_a_whole_block_of_what_was_flushed() {
        let mut samples = Samples::default();
        assert!(!samples.offer(range(3, 12), &data(), 0, |_| true), "no whole block");
        assert!(!samples.offer(range(0, 64), &data(), 0, |_| false), "about to be changed");
        // Sectors 3 to 18 hold what is 8 sectors and more into the copy; the whole block is at 8.
        let slice = Slice { skip: 3, ..data() };
        assert!(samples.offer(range(3, 16), &slice, 0, |_| true));
        samples.begin_check();
        assert!(!samples.are_checked());
        let at = samples.next_unread().unwrap();
        assert_eq!((at, samples.next_unread()), (range(8, 8), None));
        assert_eq!(samples.read(at, block(2)), Err(Mismatch::Sample(8)));
        assert_eq!(samples.read(at, block(1)), Ok(()));
        assert!(samples.are_checked());
    }

    #[test]
    fn samples_are_dropped_when_overwritten_or_unreadable_and_renewed_by_time() {
        let mut samples = Samples::default();
        for n in 0..SAMPLES as u64 {
            assert!(samples.are_wanted(0));
            samples.offer(range(8 * n, 8), &data(), 0, |_| true);
        }
        assert!(!samples.are_wanted(RENEWAL_NS - 1) && samples.are_wanted(RENEWAL_NS));
        samples.offer(range(800, 8), &data(), RENEWAL_NS, |_| true);
        assert_eq!(samples.len(), SAMPLES);
        samples.begin_check();
        assert_eq!(samples.next_unread(), Some(range(8, 8)), "the oldest made room");
        samples.read_failed(range(8, 8));
        assert_eq!(samples.next_unread(), Some(range(8, 8)));
        samples.read_failed(range(8, 8));
        assert_eq!(samples.len(), SAMPLES - 1);
        samples.overwritten(range(23, 2));
        assert_eq!(samples.len(), SAMPLES - 3);
    }

    #[test]
    fn each_thing_that_a_disk_says_of_itself_counts() {
        let disk = Identity {
            serial: "s".into(),
            sectors: 1000,
            logical_block: 4096,
            read_only: false,
            window: Window { start: 64, sectors: 512 },
        };
        assert_eq!(disk.check(&disk.clone()), Ok(()));
        let others = [
            (Identity { serial: "t".into(), ..disk.clone() }, Mismatch::Serial),
            (Identity { sectors: 999, ..disk.clone() }, Mismatch::Size),
            (Identity { logical_block: 512, ..disk.clone() }, Mismatch::LogicalBlock),
            (Identity { read_only: true, ..disk.clone() }, Mismatch::ReadOnly),
            (Identity { window: Window { start: 65, sectors: 512 }, ..disk.clone() }, Mismatch::Window),
        ];
        for (other, mismatch) in others {
            assert_eq!(disk.check(&other), Err(mismatch));
        }
        assert!(disk.offers(range(504, 8)) && !disk.offers(range(504, 16)), "past the end of the window");
        assert!(!disk.offers(range(4, 8)) && !disk.offers(range(0, 12)), "parts of a logical block");
        assert_eq!(disk.window.locate(range(8, 8)), Some(range(72, 8)));
        let past_the_disk = Identity { window: Window { start: 900, sectors: 512 }, ..disk };
        assert!(!past_the_disk.offers(range(200, 8)));
    }
}
