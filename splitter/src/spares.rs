//! Memory for data on their way, to be used again and again: the kernel fills new memory page by page, which takes several times as long
//! as a copy does.
//!
//! Invariant: what is kept is bounded in bytes. Its content is that of an earlier use: whoever takes it fills it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Smallest step between two sizes: a sector.
const LEAST: usize = 512;

/// Memory that nobody uses. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Spares {
    most: usize,
    shelf: Arc<Mutex<Shelf>>,
}

#[derive(Debug, Default)]
struct Shelf {
    /// By capacity, each the [`size_for`] some length.
    by_size: BTreeMap<usize, Vec<Vec<u8>>>,
    /// Sum of the capacities.
    bytes: usize,
}

impl Spares {
    /// Keeps `most` bytes at most.
    pub fn new(most: usize) -> Self {
        Self { most, shelf: Arc::default() }
    }

    /// Memory of this length, with any content.
    pub fn take(&self, length: usize) -> Vec<u8> {
        let size = size_for(length);
        let spare = {
            let mut shelf = self.shelf();
            let spare = shelf.by_size.get_mut(&size).and_then(Vec::pop);
            shelf.bytes -= if spare.is_some() { size } else { 0 };
            spare
        };
        let mut bytes = spare.unwrap_or_else(|| Vec::with_capacity(size));
        bytes.resize(length, 0);
        bytes
    }

    /// Takes memory back, or lets go of it.
    pub fn keep(&self, bytes: Vec<u8>) {
        let (size, mut shelf) = (bytes.capacity(), self.shelf());
        if size > 0 && size == size_for(size) && shelf.bytes + size <= self.most {
            shelf.bytes += size;
            shelf.by_size.entry(size).or_default().push(bytes);
        }
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that are reserved for `length` bytes: the next eighth of a power of two, so that few sizes serve all lengths, and a quarter more
/// than asked for at most.
fn size_for(length: usize) -> usize {
    length.next_multiple_of((length.next_power_of_two() / 8).max(LEAST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_taken_again_for_what_fits_it() {
        let spares = Spares::new(1 << 20);
        let first = spares.take(4096);
        let at = first.as_ptr();
        spares.keep(first);
        let longer = spares.take(4097);
        assert_ne!(longer.as_ptr(), at);
        let again = spares.take(3585);
        assert_eq!((again.as_ptr(), again.len()), (at, 3585));
    }

    #[test]
    fn a_quarter_more_is_reserved_at_most() {
        for length in (1..5000).chain([(1 << 20) - 1, 1 << 20, 520 << 10]) {
            let size = size_for(length);
            assert!(size >= length && (size <= length + length / 4 || size - length < LEAST), "{length} {size}");
            assert_eq!(size_for(size), size);
        }
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let spares = Spares::new(4 << 20);
        let taken: Vec<_> = (0..6).map(|_| spares.take(1 << 20)).collect();
        taken.into_iter().for_each(|bytes| spares.keep(bytes));
        assert_eq!(spares.shelf().bytes, 4 << 20);
        spares.keep(spares.take(4096));
        assert_eq!(spares.shelf().bytes, 4 << 20, "there is no room for another size");
        let taken: Vec<_> = (0..5).map(|_| spares.take(1 << 20)).collect();
        assert_eq!(spares.shelf().bytes, 0);
        drop(taken);
    }
}
