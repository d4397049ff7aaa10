//! The pool: memory of the driver VM through which the data of orders go, given out in pieces.
//!
//! A buddy allocator over blocks of 1 MiB, each within one range of the pool; pieces are a power of two of pages, 4 KiB to 1 MiB. Of the
//! free blocks that fit best it takes the lowest, so that pieces lie close together and the same requests get the same pieces. What is
//! left of a range behind its last whole block stays unused.
//!
//! Invariants: pieces in use do not overlap, and each lies within the driver VM's memory as it was when the session began, which is
//! checked again at each use; a pool with nothing in use has room for a piece of any size. The driver VM's kernel and processes can read
//! and write all of it at any time.

use std::collections::BTreeSet;

use thiserror::Error;
use umbra_driver_vm::block_protocol::{PIECE_ALIGNMENT, PoolRange};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// Bytes of the largest piece: the largest order with data (`umbra_shadow::block::Limits::part_sectors`).
pub const LARGEST_PIECE: u64 = 1 << 20;

/// Bytes of a page, the smallest piece.
const PAGE: u64 = PIECE_ALIGNMENT;

/// Pages of a block.
const BLOCK_PAGES: u32 = 256;

/// Sizes of pieces: 1, 2, 4 ... 256 pages.
const SIZES: usize = 9;

/// Most blocks that are used of a pool: 64 MiB, four times what a driver VM sets aside. It bounds what a hello can make this process
/// keep.
const MAX_BLOCKS: usize = 64;

/// Why a pool cannot be used.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PoolError {
    /// A range is not in the driver VM's memory, or not in one piece.
    #[error("the {length} bytes at {start:#x} are not in the driver VM's memory")]
    Outside {
        /// Guest physical address.
        start: u64,
        /// Bytes.
        length: u64,
    },
    /// There is no place for the largest order.
    #[error("no range of it has {LARGEST_PIECE} bytes")]
    TooSmall,
}

/// Where a block is.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// In the pool, bytes from the start of its first range.
    place: u64,
    /// In the driver VM's memory, guest physical.
    address: u64,
}

/// A piece in use. Not to be cloned: it is given back once.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece {
    /// Page over all blocks.
    page: u32,
    /// Which of [`SIZES`].
    size: usize,
    /// Bytes that were asked for.
    bytes: u64,
}

/// The pool of one session.
#[derive(Debug)]
pub struct Pool {
    blocks: Vec<Block>,
    /// First pages of what is free, by size. A free piece and its buddy of the same size are never both in it, but at the largest size.
    free: [BTreeSet<u32>; SIZES],
}

impl Pool {
    /// Of these ranges of `memory`.
    ///
    /// # Errors
    /// When one of them is not in the memory, or none is large enough.
    pub fn new(ranges: &[PoolRange], memory: &GuestMemoryMmap) -> Result<Self, PoolError> {
        let (mut blocks, mut place) = (Vec::new(), 0u64);
        for PoolRange { start, length } in ranges.iter().copied() {
            let outside = PoolError::Outside { start, length };
            let bytes = usize::try_from(length).map_err(|_| outside)?;
            memory.get_slice(GuestAddress(start), bytes).map_err(|_| outside)?;
            let whole = (0..length / LARGEST_PIECE).map(|n| n * LARGEST_PIECE);
            blocks.extend(whole.take(MAX_BLOCKS).map(|at| Block { place: place + at, address: start + at }));
            place = place.checked_add(length).ok_or(outside)?;
        }
        blocks.truncate(MAX_BLOCKS);
        if blocks.is_empty() {
            return Err(PoolError::TooSmall);
        }
        let mut free: [BTreeSet<u32>; SIZES] = Default::default();
        free[SIZES - 1] = (0u32..).step_by(BLOCK_PAGES as usize).take(blocks.len()).collect();
        Ok(Self { blocks, free })
    }

    /// Whether there is room for a piece of [`LARGEST_PIECE`].
    pub fn has_room(&self) -> bool {
        !self.free[SIZES - 1].is_empty()
    }

    /// A piece for `bytes` bytes, 1 to [`LARGEST_PIECE`]; none if there is no room.
    pub fn take(&mut self, bytes: u64) -> Option<Piece> {
        let size = size_of_piece(bytes)?;
        let from = (size..SIZES).find(|size| !self.free[*size].is_empty())?;
        let page = self.free[from].pop_first()?;
        // The upper halves stay free.
        for half in size..from {
            self.free[half].insert(page + (1 << half));
        }
        Some(Piece { page, size, bytes })
    }

    /// Takes a piece back, which is not to be used any more.
    pub fn give_back(&mut self, piece: &Piece) {
        let Piece { mut page, mut size, .. } = *piece;
        while size < SIZES - 1 && self.free[size].remove(&(page ^ (1 << size))) {
            page &= !(1 << size);
            size += 1;
        }
        self.free[size].insert(page);
    }

    /// Place of a piece in the pool, bytes.
    pub fn place(&self, piece: &Piece) -> u64 {
        let (block, within) = self.locate(piece);
        block.place + within
    }

    /// The bytes of a piece that were asked for, in the driver VM's memory.
    ///
    /// # Errors
    /// When they are not in it, which the check at the start excludes.
    pub fn bytes<'m>(&self, piece: &Piece, memory: &'m GuestMemoryMmap) -> Result<VolatileSlice<'m>, PoolError> {
        let (block, within) = self.locate(piece);
        let (start, length) = (block.address + within, piece.bytes);
        let outside = PoolError::Outside { start, length };
        let count = usize::try_from(length).map_err(|_| outside)?;
        memory.get_slice(GuestAddress(start), count).map_err(|_| outside)
    }

    fn locate(&self, piece: &Piece) -> (Block, u64) {
        let block = self.blocks[(piece.page / BLOCK_PAGES) as usize];
        (block, u64::from(piece.page % BLOCK_PAGES) * PAGE)
    }
}

/// Index of the size of a piece for `bytes` bytes.
fn size_of_piece(bytes: u64) -> Option<usize> {
    let pages = bytes.div_ceil(PAGE).next_power_of_two();
    (bytes > 0 && bytes <= LARGEST_PIECE).then_some(pages.trailing_zeros() as usize)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20), (GuestAddress(16 << 20), 4 << 20)]).unwrap()
    }

    fn range(start: u64, length: u64) -> PoolRange {
        PoolRange { start, length }
    }

    #[test]
    fn a_pool_lies_in_the_driver_vm_s_memory_and_has_room_for_the_largest_order() {
        let memory = memory();
        for outside in [range(7 * MIB, 2 * MIB), range(12 * MIB, MIB), range(8 * MIB, MIB), range(MIB, u64::MAX - MIB)]
        {
            let of = |ranges: &[PoolRange]| Pool::new(ranges, &memory).map(|_| ());
            let error = PoolError::Outside { start: outside.start, length: outside.length };
            assert_eq!(of(&[range(0, MIB), outside]), Err(error));
        }
        assert_eq!(Pool::new(&[range(0, MIB - PAGE)], &memory).map(|_| ()), Err(PoolError::TooSmall));
    }

    #[test]
    fn places_count_through_all_ranges_and_no_piece_lies_in_two() {
        let memory = memory();
        let mut pool = Pool::new(&[range(MIB, MIB + PAGE), range(16 * MIB, 2 * MIB)], &memory).unwrap();
        let pieces: Vec<_> = std::iter::from_fn(|| pool.take(MIB)).collect();
        let places: Vec<_> = pieces.iter().map(|piece| pool.place(piece)).collect();
        assert_eq!(places, [0, MIB + PAGE, 2 * MIB + PAGE]);
        let slice = pool.bytes(&pieces[1], &memory).unwrap();
        let there = memory.get_slice(GuestAddress(16 * MIB), 1).unwrap();
        assert_eq!(slice.ptr_guard().as_ptr(), there.ptr_guard().as_ptr());
    }

    /// A piece in use, and what was asked for.
    fn span(pool: &Pool, piece: &Piece) -> (u64, u64) {
        let start = pool.place(piece);
        (start, start + piece.bytes)
    }

    proptest! {
        #[test]
        fn pieces_never_overlap_and_all_room_comes_back(
            steps in prop::collection::vec((any::<bool>(), 1u64..=256, 0u64..PAGE, any::<prop::sample::Index>()), 1..200),
        ) {
            let memory = memory();
            let ranges = [range(0, 2 * MIB), range(17 * MIB, MIB)];
            let mut pool = Pool::new(&ranges, &memory).unwrap();
            let mut used: Vec<Piece> = Vec::new();
            for (give_back, pages, less, which) in steps {
                if give_back && !used.is_empty() {
                    let piece = used.swap_remove(which.index(used.len()));
                    pool.give_back(&piece);
                    continue;
                }
                let bytes = pages * PAGE - less;
                let had_room = pool.has_room();
                match pool.take(bytes) {
                    Some(piece) => {
                        let (start, end) = span(&pool, &piece);
                        prop_assert_eq!(end - start, bytes);
                        prop_assert!(start.is_multiple_of(PAGE) && end <= 3 * MIB);
                        prop_assert_eq!(pool.bytes(&piece, &memory).unwrap().len() as u64, bytes);
                        let clear = |other| { let (a, b) = span(&pool, other); end <= a || b <= start };
                        prop_assert!(used.iter().all(clear));
                        used.push(piece);
                    }
                    None => prop_assert!(!had_room),
                }
            }
            used.iter().for_each(|piece| pool.give_back(piece));
            prop_assert_eq!(std::iter::from_fn(|| pool.take(MIB)).count(), 3);
        }
    }
}
