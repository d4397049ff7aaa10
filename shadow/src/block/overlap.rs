//! Which parts of requests overlap a range: an index by length class. All ranges of one class are less than twice as long as each
//! other, so that those which can reach a sector start within the class's longest length before it. A search costs O(log n) for each
//! class in use, plus the ranges that it finds; among ranges that do not overlap each other, at most two of a class are looked at in
//! vain.

use std::collections::BTreeMap;

use super::queue::PartId;
use super::range::SectorRange;

/// Lengths from 2^n to 2^(n+1) - 1 sectors are class n.
const CLASSES: usize = 64;

/// The index.
#[derive(Clone, Debug)]
pub(super) struct Overlaps {
    /// For each class, by start: the end.
    classes: [BTreeMap<(u64, PartId), u64>; CLASSES],
    /// Bit n: class n is not empty.
    used: u64,
}

impl Default for Overlaps {
    fn default() -> Self {
        Self { classes: std::array::from_fn(|_| BTreeMap::new()), used: 0 }
    }
}

fn class_of(range: SectorRange) -> usize {
    range.count().ilog2() as usize
}

impl Overlaps {
    pub(super) fn insert(&mut self, range: SectorRange, id: PartId) {
        let class = class_of(range);
        self.classes[class].insert((range.start(), id), range.end());
        self.used |= 1 << class;
    }

    pub(super) fn remove(&mut self, range: SectorRange, id: PartId) {
        let class = class_of(range);
        self.classes[class].remove(&(range.start(), id));
        if self.classes[class].is_empty() {
            self.used &= !(1 << class);
        }
    }

    /// All that overlap `range`, in no particular order.
    pub(super) fn overlapping(&self, range: SectorRange) -> impl Iterator<Item = PartId> {
        self.candidates(range).filter(move |(_, end)| *end > range.start()).map(|(id, _)| id)
    }

    /// What a search looks at, with its end.
    fn candidates(&self, range: SectorRange) -> impl Iterator<Item = (PartId, u64)> {
        let classes = self.classes.iter().enumerate().filter(|(class, _)| self.used & (1 << class) != 0);
        classes.flat_map(move |(class, map)| {
            let longest = u64::MAX >> (CLASSES - 1 - class);
            let from = (range.start().saturating_sub(longest - 1), PartId::FIRST);
            map.range(from..(range.end(), PartId::FIRST)).map(|(&(_, id), &end)| (id, end))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, count: u64) -> SectorRange {
        SectorRange::new(start, count).unwrap()
    }

    proptest! {
        /// The index finds what a search through all finds.
        #[test]
        fn all_that_overlap_are_found(
            held in prop::collection::vec((0u64..5000, prop_oneof![1u64..20, 1u64..3000, Just(1u64 << 40)]), 0..60),
            removed in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
            asked in (0u64..6000, 1u64..4000),
        ) {
            let mut index = Overlaps::default();
            let mut naive: Vec<(SectorRange, PartId)> = Vec::new();
            for (n, (start, count)) in (0..).zip(held) {
                let entry = (range(start, count), PartId::nth(n));
                index.insert(entry.0, entry.1);
                naive.push(entry);
            }
            for at in removed.iter().filter(|_| !naive.is_empty()).collect::<Vec<_>>() {
                if !naive.is_empty() {
                    let (range, id) = naive.swap_remove(at.index(naive.len()));
                    index.remove(range, id);
                }
            }
            let asked = range(asked.0, asked.1);
            let expected: BTreeSet<_> = naive.iter().filter(|(r, _)| r.overlaps(asked)).map(|(_, id)| *id).collect();
            prop_assert_eq!(index.overlapping(asked).collect::<BTreeSet<_>>(), expected);
        }

        /// The work of a search does not grow with what is in flight: of 4,096 ranges that do not overlap, of all lengths, it looks at
        /// those that it finds and at two of each class beside them.
        #[test]
        fn the_work_is_bounded_by_what_is_found(seed in any::<u64>(), asked in 0u64..1_000_000, count in 1u64..2049) {
            let mut index = Overlaps::default();
            let (mut at, mut state) = (0, seed | 1);
            for n in 0..4096 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let count = 1 + ((state >> 33) & ((1 << (state >> 60)) - 1)).min(2047);
                index.insert(range(at, count), PartId::nth(n));
                at += count + (state >> 40) % 3;
            }
            let asked = range(asked, count);
            let found = index.overlapping(asked).count();
            let looked_at = index.candidates(asked).count();
            prop_assert!(looked_at <= found + 2 * 12, "{looked_at} looked at for {found}");
        }
    }
}
