//! How much one turn of the event loop may do for a disk. The loop is the VM's: its network devices wait as long as a disk
//! works, so that a turn is bounded in bytes, and a request that is larger goes on in the next ones.
//!
//! Invariant: between two turns nothing is kept of a request but how many of its bytes are done. Its chain and header are
//! read and checked anew; a driver that has changed them meanwhile gets what it asks for last.

use std::io;

use vm_memory::VolatileSlice;

use super::image::{first, rest};

/// Bytes a turn: under a millisecond from the page cache, some from an SSD.
pub(super) const BYTES: usize = 1 << 20;

/// Whether a request is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    All,
    Part,
}

/// A turn.
#[derive(Debug)]
pub(super) struct Turn {
    left: usize,
    /// Bytes done of the request in hand.
    moved: u64,
}

impl Turn {
    /// A turn that begins with a request of which `moved` bytes are done.
    pub(super) fn new(moved: u64) -> Self {
        Self { left: BYTES, moved }
    }

    pub(super) fn is_over(&self) -> bool {
        self.left == 0
    }

    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    /// The request in hand is answered.
    pub(super) fn next_request(&mut self) {
        self.moved = 0;
    }

    /// Moves as much as the turn allows of the `length` bytes from byte `skip` of `slices` on. `transfer` gets the place in
    /// these bytes and the slices.
    pub(super) fn step<'m>(
        &mut self,
        slices: &[VolatileSlice<'m>],
        skip: usize,
        length: usize,
        transfer: impl FnOnce(u64, &[VolatileSlice<'m>]) -> io::Result<()>,
    ) -> io::Result<Moved> {
        let done = usize::try_from(self.moved).unwrap_or(usize::MAX).min(length);
        let count = (length - done).min(self.left);
        transfer(done as u64, &first(&rest(slices, skip + done)?, count)?)?;
        self.left -= count;
        self.moved = (done + count) as u64;
        Ok(if done + count == length { Moved::All } else { Moved::Part })
    }
}
