//! Gives out naturally aligned pieces of an address window, lowest first.

use std::ops::Range;

/// A window and what is taken of it, sorted and disjoint.
#[derive(Debug)]
pub(super) struct Allocator {
    window: Range<u64>,
    taken: Vec<Range<u64>>,
}

impl Allocator {
    pub(super) fn new(window: Range<u64>) -> Self {
        Self { window, taken: Vec::new() }
    }

    /// Takes `size` bytes (a power of two) at a multiple of `size`.
    pub(super) fn take(&mut self, size: u64) -> Option<u64> {
        let mut start = self.window.start;
        let mut index = 0;
        loop {
            let base = start.checked_next_multiple_of(size)?;
            let end = base.checked_add(size)?;
            match self.taken.get(index) {
                Some(next) if end > next.start => {
                    start = next.end;
                    index += 1;
                }
                _ if end > self.window.end => return None,
                _ => {
                    self.taken.insert(index, base..end);
                    return Some(base);
                }
            }
        }
    }

    /// Gives back the piece at `base`.
    pub(super) fn give_back(&mut self, base: u64) {
        self.taken.retain(|range| range.start != base);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn holes_are_filled() {
        let mut allocator = Allocator::new(0x1000..0x4000);
        assert_eq!(allocator.take(0x10), Some(0x1000));
        assert_eq!(allocator.take(0x1000), Some(0x2000));
        assert_eq!(allocator.take(0x100), Some(0x1100));
        assert_eq!(allocator.take(0x2000), None);
        allocator.give_back(0x2000);
        assert_eq!(allocator.take(0x2000), Some(0x2000));
    }

    proptest! {
        #[test]
        fn pieces_are_aligned_disjoint_and_inside(
            start in 0u64..0x10000,
            length in 0u64..0x10000,
            shifts in prop::collection::vec(2u32..14, 0..40),
        ) {
            let window = start..start + length;
            let mut allocator = Allocator::new(window.clone());
            let mut seen: Vec<Range<u64>> = Vec::new();
            for shift in shifts {
                let size = 1u64 << shift;
                let Some(base) = allocator.take(size) else { continue };
                let piece = base..base + size;
                prop_assert_eq!(base % size, 0);
                prop_assert!(window.start <= piece.start && piece.end <= window.end);
                prop_assert!(seen.iter().all(|other| other.end <= piece.start || piece.end <= other.start));
                seen.push(piece);
            }
        }
    }
}
