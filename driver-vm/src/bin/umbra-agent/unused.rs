//! Memory that a driver VM needs for its boot and never again. It is given up before the VM is saved as a snapshot, while nothing of a
//! device is in it: huge pages that this process holds and does not touch, which the host takes back.
//!
//! Invariant: what was reported is mapped here until the VM ends, so that the kernel gives it to nobody else.

use anyhow::Context;
use umbra_driver_vm::protocol::{MAX_UNUSED, MemoryRange};

use crate::huge_pages::{self, HUGE, HUGE_PAGE, PAGE, PageMap, map, unmap};
use crate::{kernel_log, system};

/// Memory that stays available for each CPU, in bytes: a driver's rings and buffers, and what is queued under full load.
const KEPT: u64 = 24 << 20;
/// Most that is given up, in bytes: what the default memory leaves over. Who gives a driver VM more has a driver that needs it.
const MOST: u64 = 32 << 20;
/// Below this address is memory that some devices alone can reach (the kernel's `ZONE_DMA`): it stays with their drivers.
const LOW: u64 = 16 << 20;
/// Free memory that is left alone while the rest is cleared, in bytes: this VM ends where the kernel finds none.
const MARGIN: u64 = 8 << 20;
/// Most that is cleared, in bytes: a boot leaves less.
const CLEARED: u64 = 64 << 20;

/// Takes what memory is available, but for what a driver will need, for good; the ranges, by address. A kernel that has no huge pages
/// keeps its memory, and so does one with an area for contiguous allocations (CMA), which may move such pages and use what was below
/// them. What stays free holds zeros afterwards, not what the boot has left there: a snapshot is the smaller.
pub fn give_up() -> Vec<MemoryRange> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let wanted = pages_to_give(system::available_memory(), cpus);
    let held = if wanted == 0 || system::memory("CmaTotal:") != 0 { Ok(Vec::new()) } else { hold(wanted) };
    clear(system::memory("MemFree:").saturating_sub(MARGIN).min(CLEARED));
    held.unwrap_or_else(|error| {
        kernel_log::info(&format!("no memory is given up: {error:#}"));
        Vec::new()
    })
}

/// Has the kernel clear `bytes` of free memory, by taking them for a moment.
fn clear(bytes: u64) {
    let length = usize::try_from(bytes).unwrap_or(0) / PAGE * PAGE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    // One of no bytes is refused.
    if let Ok(mapped) = map(length, libc::PROT_READ | libc::PROT_WRITE, flags) {
        unmap(mapped, length);
    }
}

/// Huge pages that a VM with so many CPUs, which has so many bytes available, can do without.
fn pages_to_give(available: u64, cpus: usize) -> usize {
    let spare = available.saturating_sub(KEPT * cpus as u64).min(MOST);
    usize::try_from(spare).unwrap_or(0) / HUGE_PAGE
}

/// Holds `wanted` huge pages, or as many as there are; all or none of them. Those that the VM has already, as a pool for disks, stay.
fn hold(wanted: usize) -> anyhow::Result<Vec<MemoryRange>> {
    let page_map = PageMap::open()?;
    let before = huge_pages::number()?;
    huge_pages::set_number(before + wanted)?;
    let held = huge_pages::number().and_then(|made| hold_of_pool(made.saturating_sub(before).min(wanted), &page_map));
    let pages = held.as_ref().map_or(0, Vec::len);
    // What is not held goes back.
    huge_pages::set_number(before + pages)?;
    held.map(merge)
}

/// Maps `pages` huge pages of the kernel's pool, and keeps those above [`LOW`]: their addresses. After an error none is mapped.
fn hold_of_pool(pages: usize, page_map: &PageMap) -> anyhow::Result<Vec<u64>> {
    if pages == 0 {
        return Ok(Vec::new());
    }
    let first = map(pages * HUGE_PAGE, libc::PROT_READ, HUGE).context("huge pages cannot be mapped")?;
    let places = (0..pages).map(|page| first.wrapping_byte_add(page * HUGE_PAGE));
    let located = places.map(|place| Ok((place, page_map.physical(place.addr())?)));
    let located: Vec<_> = located.collect::<anyhow::Result<_>>().inspect_err(|_| unmap(first, pages * HUGE_PAGE))?;
    let (kept, low): (Vec<_>, Vec<_>) = located.into_iter().partition(|(_, address)| *address >= LOW);
    for (place, _) in low {
        unmap(place, HUGE_PAGE);
    }
    Ok(kept.into_iter().map(|(_, address)| address).collect())
}

/// Huge pages as ranges: the largest, as many as may be reported, by address.
fn merge(mut pages: Vec<u64>) -> Vec<MemoryRange> {
    pages.sort_unstable();
    let mut ranges: Vec<MemoryRange> = Vec::new();
    for start in pages {
        match ranges.last_mut() {
            Some(last) if last.start + last.length == start => last.length += HUGE_PAGE as u64,
            _ => ranges.push(MemoryRange { start, length: HUGE_PAGE as u64 }),
        }
    }
    ranges.sort_by_key(|range| std::cmp::Reverse(range.length));
    ranges.truncate(MAX_UNUSED);
    ranges.sort_by_key(|range| range.start);
    ranges
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_driver_keeps_what_it_needs_and_all_that_was_given_beyond_the_default() {
        assert_eq!(pages_to_give(55 * MIB, 1), 15);
        assert_eq!(pages_to_give(55 * MIB, 2), 3);
        assert_eq!(pages_to_give(25 * MIB, 1), 0);
        assert_eq!(pages_to_give(10 * MIB, 4), 0);
        assert_eq!(pages_to_give(940 * MIB, 1), 16);
    }

    #[test]
    fn neighbouring_pages_are_one_range() {
        let page = |n: u64| n * HUGE_PAGE as u64;
        let range = |n, pages| MemoryRange { start: page(n), length: page(pages) };
        assert_eq!(merge(vec![page(9), page(3), page(1), page(2)]), [range(1, 3), range(9, 1)]);
        let scattered = (0..300).map(|n| page(2 * n)).chain([page(601), page(602)]).collect();
        let merged = merge(scattered);
        assert_eq!((merged.len(), merged.last()), (MAX_UNUSED, Some(&range(601, 2))), "the largest stay");
        assert!(merged.windows(2).all(|pair| pair[0].start < pair[1].start));
    }

    #[test]
    fn the_longest_list_fits_in_a_line() {
        use umbra_driver_vm::protocol::{FromAgent, MAX_LINE};
        let unused = vec![MemoryRange { start: u64::MAX, length: u64::MAX }; MAX_UNUSED];
        let line = serde_json::to_string(&FromAgent::Ready { loaded: true, unused }).unwrap();
        assert!(line.len() < MAX_LINE, "{} bytes", line.len());
    }
}
