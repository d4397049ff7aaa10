//! The one copy between two VMs' memories: from scattered slices to scattered slices, through volatile accesses,
//! with no buffer between.
//!
//! Invariant: never more than `len` bytes move, and never outside the slices that were given. The bytes may change
//! under the copy (another VM owns them); nothing here looks at them.

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// A position in a list of slices.
#[derive(Clone, Copy, Debug)]
struct Cursor {
    slice: usize,
    offset: usize,
}

impl Cursor {
    /// The place of byte `skip`.
    fn at<B: BitmapSlice>(slices: &[VolatileSlice<'_, B>], mut skip: usize) -> Self {
        let mut slice = 0;
        while slice < slices.len() && skip >= slices[slice].len() {
            skip -= slices[slice].len();
            slice += 1;
        }
        Self { slice, offset: skip }
    }

    /// What is left of the slice here, at most `len` bytes; `None` at the end.
    fn piece<'m, B: BitmapSlice>(&self, slices: &[VolatileSlice<'m, B>], len: usize) -> Option<VolatileSlice<'m, B>> {
        let slice = slices.get(self.slice)?;
        let count = len.min(slice.len() - self.offset);
        slice.subslice(self.offset, count).ok()
    }

    fn advance<B: BitmapSlice>(&mut self, slices: &[VolatileSlice<'_, B>], count: usize) {
        self.offset += count;
        while self.slice < slices.len() && self.offset >= slices[self.slice].len() {
            self.offset -= slices[self.slice].len();
            self.slice += 1;
        }
    }
}

/// Copies `len` bytes from byte `from_skip` of `from` to byte `to_skip` of `to`. Returns the number of bytes copied,
/// less than `len` only if one side is too short.
pub fn copy<A: BitmapSlice, B: BitmapSlice>(
    from: &[VolatileSlice<'_, A>],
    from_skip: usize,
    to: &[VolatileSlice<'_, B>],
    to_skip: usize,
    len: usize,
) -> usize {
    let (mut source, mut target) = (Cursor::at(from, from_skip), Cursor::at(to, to_skip));
    let mut left = len;
    while left > 0 {
        let Some(out) = target.piece(to, left) else { break };
        let Some(piece) = source.piece(from, out.len()) else { break };
        let count = piece.len();
        piece.copy_to_volatile_slice(out);
        source.advance(from, count);
        target.advance(to, count);
        left -= count;
    }
    len - left
}

/// Fills `bytes` from byte `skip` of `from`; returns how many bytes there were.
pub fn gather<B: BitmapSlice>(from: &[VolatileSlice<'_, B>], skip: usize, bytes: &mut [u8]) -> usize {
    let mut source = Cursor::at(from, skip);
    let mut done = 0;
    while done < bytes.len() {
        let Some(piece) = source.piece(from, bytes.len() - done) else { break };
        let count = piece.copy_to(&mut bytes[done..done + piece.len()]);
        source.advance(from, count);
        done += count;
    }
    done
}

/// Writes `bytes` to byte `skip` of `to`; returns how many bytes had room.
pub fn scatter<B: BitmapSlice>(bytes: &[u8], to: &[VolatileSlice<'_, B>], skip: usize) -> usize {
    let mut target = Cursor::at(to, skip);
    let mut done = 0;
    while done < bytes.len() {
        let Some(piece) = target.piece(to, bytes.len() - done) else { break };
        let count = piece.len();
        piece.copy_from(&bytes[done..done + count]);
        target.advance(to, count);
        done += count;
    }
    done
}
