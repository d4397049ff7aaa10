//! Ranges of sectors, and sets of them. A sector has 512 bytes whatever the disk's logical block is, as in virtio (1.2, section
//! 5.2); a request of the guest covers whole logical blocks.

use std::collections::BTreeMap;
use std::fmt;

/// Bytes of a sector (virtio 1.2, section 5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// A range of at least one sector. Invariant: `start < end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectorRange {
    start: u64,
    end: u64,
}

impl SectorRange {
    /// `count` sectors from `start`; none for no sectors, or past 2^64.
    pub fn new(start: u64, count: u64) -> Option<Self> {
        Self::between(start, start.checked_add(count)?)
    }

    /// From `start` up to `end`, which is not in it; none if that is empty.
    pub fn between(start: u64, end: u64) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }

    /// The first sector.
    pub fn start(self) -> u64 {
        self.start
    }

    /// The sector after the last.
    pub fn end(self) -> u64 {
        self.end
    }

    /// Number of sectors, at least 1.
    pub fn count(self) -> u64 {
        self.end - self.start
    }

    /// Number of bytes (saturating).
    pub fn bytes(self) -> u64 {
        self.count().saturating_mul(SECTOR_BYTES)
    }

    /// Whether a sector is in both.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The same number of sectors, `by` sectors further on; none past 2^64.
    pub fn shifted(self, by: u64) -> Option<Self> {
        Self::new(self.start.checked_add(by)?, self.count())
    }

    /// Cuts it in parts of at most `longest` sectors (at least 1), in order.
    pub fn parts(self, longest: u64) -> impl Iterator<Item = Self> {
        let longest = longest.max(1);
        let mut at = self.start;
        std::iter::from_fn(move || {
            let part = Self::between(at, at.saturating_add(longest).min(self.end))?;
            at = part.end;
            Some(part)
        })
    }
}

impl fmt::Display for SectorRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sectors {} to {}", self.start, self.end - 1)
    }
}

/// A set of sectors, kept as ranges that neither overlap nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    /// Adds `range`.
    pub fn insert(&mut self, range: SectorRange) {
        let (mut start, mut end) = (range.start, range.end);
        while let Some((&from, &to)) = self.0.range(..=end).next_back().filter(|(_, to)| **to >= start) {
            self.0.remove(&from);
            (start, end) = (start.min(from), end.max(to));
        }
        self.0.insert(start, end);
    }

    /// Takes `range` out.
    pub fn remove(&mut self, range: SectorRange) {
        while let Some((&from, &to)) = self.0.range(..range.end).next_back().filter(|(_, to)| **to > range.start) {
            self.0.remove(&from);
            if to > range.end {
                self.0.insert(range.end, to);
            }
            if from < range.start {
                self.0.insert(from, range.start);
            }
        }
    }

    /// Whether a sector of `range` is in the set.
    pub fn overlaps(&self, range: SectorRange) -> bool {
        self.0.range(..range.end).next_back().is_some_and(|(_, &to)| to > range.start)
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = SectorRange> {
        self.0.iter().map(|(&start, &end)| SectorRange { start, end })
    }

    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parts_cover_a_range_once_and_in_order() {
        let range = SectorRange::new(5, 10).unwrap();
        let parts: Vec<_> = range.parts(4).map(|part| (part.start(), part.end())).collect();
        assert_eq!(parts, [(5, 9), (9, 13), (13, 15)]);
        assert_eq!(SectorRange::new(u64::MAX, 2), None);
        assert_eq!(SectorRange::new(7, 0), None);
    }

    proptest! {
        /// Any insertions and removals leave what a set of single sectors has, in ranges that do not touch.
        #[test]
        fn a_set_of_ranges_is_a_set_of_sectors(steps in prop::collection::vec((any::<bool>(), 0u64..40, 1u64..12), 0..40)) {
            let (mut set, mut sectors) = (RangeSet::default(), std::collections::BTreeSet::new());
            for (insert, start, count) in steps {
                let range = SectorRange::new(start, count).unwrap();
                prop_assert_eq!(set.overlaps(range), (start..start + count).any(|s| sectors.contains(&s)));
                if insert {
                    set.insert(range);
                    sectors.extend(start..start + count);
                } else {
                    set.remove(range);
                    sectors.retain(|s| !(start..start + count).contains(s));
                }
                let held: Vec<u64> = set.iter().flat_map(|r| r.start()..r.end()).collect();
                prop_assert_eq!(held, sectors.iter().copied().collect::<Vec<_>>());
                let ranges: Vec<_> = set.iter().collect();
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end() < pair[1].start()));
            }
        }
    }
}
