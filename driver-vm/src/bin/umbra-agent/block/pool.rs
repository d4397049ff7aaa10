//! The pool: memory of this VM that the host fills before a write and empties after a read, one share for each end.
//!
//! It is huge pages, which stay where they are: the host knows them by their physical addresses, and the kernel pins them once, as one
//! buffer of the ring. A driver VM of disks is started with `hugepages=8`; they are mapped before a snapshot may be taken, so that every
//! life restored from one has them.

use std::ptr::NonNull;

use anyhow::{Context, bail};
use umbra_driver_vm::block_protocol::{MAX_POOL_RANGES, PoolRange};

use crate::huge_pages::{self, HUGE, HUGE_PAGE, PAGE, PageMap};
use crate::kernel_log;

/// Huge pages of all ends together: 16 MiB, enough for the orders of a fast disk in flight, at most 1 MiB each.
const PAGES: usize = MAX_POOL_RANGES;

/// Memory for data on their way.
#[derive(Debug)]
pub struct Pool {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory belongs to the value, and to the process as a whole; nothing about it is a thread's.
unsafe impl Send for Pool {}

/// A part of the pool: the places of one end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its first byte, from the start of the pool.
    pub start: usize,
    /// Bytes.
    pub length: usize,
}

impl Pool {
    /// The huge pages that the kernel's command line has asked for, if it did.
    pub fn of_command_line() -> Option<Self> {
        let pages = huge_pages::number().unwrap_or(0).min(PAGES);
        let pool = (pages > 0).then(|| Self::of_huge_pages(pages))?;
        pool.inspect_err(|error| kernel_log::error(&format!("no pool of huge pages: {error:#}"))).ok()
    }

    /// A pool for `ends` ends: `early`, or one that is made now if there is none or it is too small.
    ///
    /// # Errors
    /// When there is not a huge page for each end.
    pub fn for_ends(ends: usize, early: Option<Self>) -> anyhow::Result<Self> {
        if let Some(pool) = early.filter(|pool| pool.length >= ends * HUGE_PAGE) {
            return Ok(pool);
        }
        let (before, wanted) = (huge_pages::number()?, ends.max(PAGES));
        huge_pages::set_number(before + wanted)?;
        let made = huge_pages::number()?.saturating_sub(before).min(wanted);
        if made < ends {
            bail!(
                "this VM has memory for {made} huge pages of 2 MiB, and {ends} disks need one each: give it more memory"
            );
        }
        Self::of_huge_pages(made)
    }

    fn of_huge_pages(pages: usize) -> anyhow::Result<Self> {
        Self::map(pages * HUGE_PAGE, HUGE).context("huge pages cannot be mapped")
    }

    /// Memory of ordinary pages, which are where they happen to be.
    #[cfg(test)]
    pub fn ordinary(length: usize) -> Self {
        Self::map(length, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE).unwrap()
    }

    fn map(length: usize, flags: libc::c_int) -> anyhow::Result<Self> {
        let mapped = huge_pages::map(length, libc::PROT_READ | libc::PROT_WRITE, flags)?;
        let start = NonNull::new(mapped.cast()).context("memory at address 0")?;
        Ok(Self { start, length })
    }

    /// The whole of it, as the ring is given it.
    pub fn as_buffer(&self) -> libc::iovec {
        libc::iovec { iov_base: self.start.as_ptr().cast(), iov_len: self.length }
    }

    /// The address of the byte at `place`; none if `length` bytes from there are not all in the pool.
    pub fn address(&self, place: usize, length: usize) -> Option<*mut u8> {
        let end = place.checked_add(length)?;
        // SAFETY: `place` is within the mapping, or just behind it for a length of 0.
        (end <= self.length).then(|| unsafe { self.start.as_ptr().add(place) })
    }

    /// Divides it among `ends` ends: whole huge pages, as many for each.
    pub fn shares(&self, ends: usize) -> Vec<Share> {
        let length = self.length / HUGE_PAGE / ends.max(1) * HUGE_PAGE;
        (0..ends).map(|end| Share { start: end * length, length }).collect()
    }

    /// Where a share is in this VM's memory, in the order of its places.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn locate(&self, share: Share) -> anyhow::Result<Vec<PoolRange>> {
        let page_map = PageMap::open()?;
        let pages = (share.start..share.start + share.length).step_by(HUGE_PAGE);
        let located = pages.map(|place| page_map.physical(self.start.as_ptr().addr() + place));
        Ok(merge(located.collect::<anyhow::Result<Vec<_>>>()?))
    }
}

impl Drop for Pool {
    /// What the kernel has pinned for the ring outlives the mapping.
    fn drop(&mut self) {
        huge_pages::unmap(self.start.as_ptr().cast(), self.length);
    }
}

/// Huge pages as ranges, in their order.
fn merge(pages: Vec<u64>) -> Vec<PoolRange> {
    let mut ranges: Vec<PoolRange> = Vec::new();
    for start in pages {
        match ranges.last_mut() {
            Some(last) if last.start + last.length == start => last.length += HUGE_PAGE as u64,
            _ => ranges.push(PoolRange { start, length: HUGE_PAGE as u64 }),
        }
    }
    ranges
}

const _: () = assert!(HUGE_PAGE.is_multiple_of(PAGE));

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_pages_are_one_range_in_the_order_of_their_places() {
        let page = |n: u64| n * HUGE_PAGE as u64;
        let range = |n, pages| PoolRange { start: page(n), length: page(pages) };
        let ranges = merge(vec![page(9), page(3), page(4), page(5), page(8)]);
        assert_eq!(ranges, [range(9, 1), range(3, 3), range(8, 1)]);
    }

    #[test]
    fn each_end_has_its_own_share_of_whole_huge_pages() {
        let pool = Pool::ordinary(8 * HUGE_PAGE);
        assert_eq!(pool.shares(1), [Share { start: 0, length: 8 * HUGE_PAGE }]);
        let shares = pool.shares(3);
        assert!(shares.iter().all(|share| share.length == 2 * HUGE_PAGE), "{shares:?}");
        assert!(shares.windows(2).all(|pair| pair[0].start + pair[0].length == pair[1].start));
        assert_eq!(pool.shares(8)[7], Share { start: 7 * HUGE_PAGE, length: HUGE_PAGE });
    }

    #[test]
    fn no_piece_reaches_past_the_pool() {
        let pool = Pool::ordinary(HUGE_PAGE);
        assert!(pool.address(HUGE_PAGE - 512, 512).is_some());
        assert!(pool.address(HUGE_PAGE - 512, 513).is_none());
        assert!(pool.address(usize::MAX, 2).is_none());
    }
}
