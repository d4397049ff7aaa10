//! Memory that a driver VM has given up: its agent holds huge pages of it for good and never touches them, so nothing is kept in them,
//! no huge page of the host backs them, and no device can reach them.
//!
//! Invariant: what is given up stays so for the life of the VM and for each life restored from its snapshot. A VM that touches such
//! memory after all finds zeros there, and takes room for it again, within its size.

use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

use thiserror::Error;
use umbra_driver_vm::protocol::{MAX_UNUSED, MemoryRange};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::memory::{HUGE_PAGE, discard};
use crate::base::lock::lock;

/// Why memory cannot be given up.
#[derive(Debug, Error)]
pub enum Error {
    /// The list breaks a rule of [`MemoryRange`].
    #[error("memory at {start:#x}, {length:#x} bytes, cannot be given up: {why}")]
    Range {
        /// Guest physical address.
        start: u64,
        /// Bytes.
        length: u64,
        /// The rule.
        why: &'static str,
    },
    /// There are more ranges than an agent sends.
    #[error("{0} ranges of memory to give up, more than {MAX_UNUSED}")]
    TooMany(usize),
    /// The host's kernel cannot take it back.
    #[error("give memory of the VM back to the host")]
    Discard(#[source] io::Error),
}

/// What a VM has given up.
#[derive(Debug, Default)]
pub struct Unused(Mutex<Vec<MemoryRange>>);

impl Unused {
    /// `ranges`, which a snapshot says of the VM with `memory`, before anything is in that.
    ///
    /// # Errors
    /// They cannot be true.
    pub fn restored(memory: &GuestMemoryMmap, ranges: Vec<MemoryRange>) -> Result<Self, Error> {
        check(memory, &ranges)?;
        Ok(Self(Mutex::new(ranges)))
    }

    /// Gives `ranges` of `memory` back to the host; they replace what was given up before.
    ///
    /// # Errors
    /// They break a rule: then nothing is given back. Or the host's kernel cannot.
    pub fn give_up(&self, memory: &GuestMemoryMmap, ranges: Vec<MemoryRange>) -> Result<(), Error> {
        check(memory, &ranges)?;
        for range in &ranges {
            discard(memory, range.start, range.length).map_err(Error::Discard)?;
        }
        *lock(&self.0) = ranges;
        Ok(())
    }

    /// The ranges, by address.
    pub fn ranges(&self) -> Vec<MemoryRange> {
        self.held().clone()
    }

    /// What of `memory` is in use, by address, in parts of one region and at most `most` bytes each.
    pub fn rest<'a>(
        &'a self,
        memory: &'a GuestMemoryMmap,
        most: usize,
    ) -> impl Iterator<Item = (GuestAddress, usize)> + 'a {
        let used = memory.iter().flat_map(|region| self.rest_of(region.start_addr().0, region.len()));
        used.flat_map(move |used| {
            let length = move |at| usize::try_from(used.end - at).unwrap_or(most).min(most);
            (used.start..used.end).step_by(most).map(move |at| (GuestAddress(at), length(at)))
        })
    }

    /// What of the memory from `start` on, `length` bytes, is in use: ranges of guest physical addresses.
    fn rest_of(&self, start: u64, length: u64) -> Vec<Range<u64>> {
        let (mut rest, mut from, end) = (Vec::new(), start, start + length);
        for gap in self.held().iter().filter(|gap| gap.start < end && gap.start + gap.length > start) {
            if gap.start > from {
                rest.push(from..gap.start);
            }
            from = from.max(gap.start + gap.length);
        }
        if from < end {
            rest.push(from..end);
        }
        rest
    }

    fn held(&self) -> MutexGuard<'_, Vec<MemoryRange>> {
        lock(&self.0)
    }
}

/// Whether `ranges` are as [`MemoryRange`] says, in `memory`.
fn check(memory: &GuestMemoryMmap, ranges: &[MemoryRange]) -> Result<(), Error> {
    if ranges.len() > MAX_UNUSED {
        return Err(Error::TooMany(ranges.len()));
    }
    let mut free = 0;
    for &MemoryRange { start, length } in ranges {
        let wrong = |why| Error::Range { start, length, why };
        let huge = HUGE_PAGE as u64;
        if length == 0 || start % huge != 0 || length % huge != 0 {
            return Err(wrong("it is no huge page of 2 MiB"));
        }
        if start < free {
            return Err(wrong("ranges are not in order"));
        }
        let end = start.checked_add(length).ok_or_else(|| wrong("it ends nowhere"))?;
        let inside = |region: &<GuestMemoryMmap as GuestMemoryBackend>::R| {
            let first = region.start_addr().0;
            first <= start && end - first <= region.len()
        };
        if !memory.iter().any(inside) {
            return Err(wrong("it is not in the VM's memory"));
        }
        free = end;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::Bytes;

    use super::super::{layout, memory};
    use super::*;

    const HUGE: u64 = HUGE_PAGE as u64;

    fn range(start: u64, length: u64) -> MemoryRange {
        MemoryRange { start, length }
    }

    #[test]
    fn what_is_given_up_takes_no_room_and_reads_as_zeros() {
        let memory = memory::create("test", 4 * HUGE).unwrap();
        for page in 0..4 {
            memory.write_obj(page + 1, GuestAddress(page * HUGE + 8)).unwrap();
        }
        let unused = Unused::default();
        unused.give_up(&memory, vec![range(HUGE, 2 * HUGE)]).unwrap();
        let values: Vec<u64> = (0..4).map(|page| memory.read_obj(GuestAddress(page * HUGE + 8)).unwrap()).collect();
        assert_eq!(values, [1, 0, 0, 4]);
        unused.give_up(&memory, vec![range(HUGE, 2 * HUGE)]).unwrap();
        let file = memory.iter().next().unwrap().file_offset().unwrap().file().metadata().unwrap();
        assert!(file.blocks() * 512 <= 2 * HUGE, "{} blocks", file.blocks());
    }

    #[test]
    fn the_rest_is_all_but_the_gaps() {
        let memory = memory::create("test", 8 * HUGE).unwrap();
        let unused =
            Unused::restored(&memory, vec![range(HUGE, HUGE), range(2 * HUGE, HUGE), range(6 * HUGE, 2 * HUGE)]);
        let unused = unused.unwrap();
        let rest = |start, length| unused.rest_of(start * HUGE, length * HUGE);
        let pages = |ranges: &[(u64, u64)]| -> Vec<_> { ranges.iter().map(|(a, b)| a * HUGE..b * HUGE).collect() };
        assert_eq!(rest(0, 8), pages(&[(0, 1), (3, 6)]));
        assert_eq!(rest(1, 2), []);
        assert_eq!(rest(2, 3), pages(&[(3, 5)]));
        assert_eq!(rest(8, 4), pages(&[(8, 12)]), "another region");
        assert_eq!(Unused::default().rest_of(0, HUGE), vec![0..HUGE]);
    }

    #[test]
    fn lies_are_refused_and_nothing_is_given_back() {
        let size = layout::LOW_RAM_LIMIT + 2 * HUGE;
        let memory = memory::create("test", size).unwrap();
        memory.write_obj(7u8, GuestAddress(0)).unwrap();
        let unused = Unused::default();
        let lies = [
            vec![range(0, HUGE), range(HUGE / 2, HUGE)],
            vec![range(0, 4096)],
            vec![range(0, 0)],
            vec![range(0, HUGE), range(0, HUGE)],
            vec![range(2 * HUGE, HUGE), range(0, HUGE)],
            vec![range(0, layout::LOW_RAM_LIMIT + HUGE)],
            vec![range(layout::LOW_RAM_LIMIT, HUGE)],
            vec![range(layout::HIGH_RAM_START + 2 * HUGE, HUGE)],
            vec![range(u64::MAX - HUGE + 1, HUGE)],
            vec![range(0, u64::MAX - HUGE + 1)],
            (0..=MAX_UNUSED as u64).map(|page| range(page * HUGE, HUGE)).collect(),
        ];
        for lie in lies {
            assert!(unused.give_up(&memory, lie.clone()).is_err(), "{:?}", &lie[..lie.len().min(2)]);
        }
        assert_eq!((unused.ranges().len(), memory.read_obj::<u8>(GuestAddress(0)).unwrap()), (0, 7));
        unused.give_up(&memory, vec![range(0, HUGE), range(layout::HIGH_RAM_START + HUGE, HUGE)]).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    }
}
