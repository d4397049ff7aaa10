//! Memory that a driver VM needs for its boot and never again. It is given up before the VM is saved as a snapshot, while nothing of a
//! device is in it: huge pages that this process holds and does not touch, which the host takes back.
//!
//! Invariant: what was reported is mapped here until the VM ends, so that the kernel gives it to nobody else.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::null_mut;

use anyhow::Context;
use umbra_driver_vm::protocol::{MAX_UNUSED, MemoryRange};

use crate::{kernel_log, system};

/// Bytes of a page, and of a huge page, of x86-64.
const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;
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
/// The kernel's pool of huge pages: their number.
const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Where the pages of this process are (`Documentation/admin-guide/mm/pagemap.rst`).
const PAGE_MAP: &str = "/proc/self/pagemap";
/// Bytes of its entry for each page.
const ENTRY: usize = 8;

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

/// Holds `wanted` huge pages, or as many as there are; all or none of them.
fn hold(wanted: usize) -> anyhow::Result<Vec<MemoryRange>> {
    let page_map = File::open(PAGE_MAP).context("the addresses of pages cannot be read")?;
    fs::write(POOL, wanted.to_string()).context("no huge pages can be made")?;
    let held = hold_of_pool(wanted, &page_map);
    let pages = held.as_ref().map_or(0, Vec::len);
    // What is not held goes back.
    fs::write(POOL, pages.to_string()).context("huge pages cannot be given back")?;
    held.map(merge)
}

/// Maps up to `wanted` huge pages of the pool, and keeps those above [`LOW`]: their addresses. After an error none is mapped.
fn hold_of_pool(wanted: usize, page_map: &File) -> anyhow::Result<Vec<u64>> {
    let made = fs::read_to_string(POOL).context("the number of huge pages cannot be read")?;
    let pages = made.trim().parse::<usize>().context("the number of huge pages is none")?.min(wanted);
    if pages == 0 {
        return Ok(Vec::new());
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_POPULATE;
    let first = map(pages * HUGE_PAGE, libc::PROT_READ, flags).context("huge pages cannot be mapped")?;
    let places = (0..pages).map(|page| first.wrapping_byte_add(page * HUGE_PAGE));
    let located = places.map(|place| Ok((place, physical(page_map, place.addr())?)));
    let located: Vec<_> = located.collect::<anyhow::Result<_>>().inspect_err(|_| unmap(first, pages * HUGE_PAGE))?;
    let (kept, low): (Vec<_>, Vec<_>) = located.into_iter().partition(|(_, address)| *address >= LOW);
    for (place, _) in low {
        unmap(place, HUGE_PAGE);
    }
    Ok(kept.into_iter().map(|(_, address)| address).collect())
}

/// Maps `length` bytes of nothing.
fn map(length: usize, access: libc::c_int, flags: libc::c_int) -> io::Result<*mut libc::c_void> {
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nobody.
    let mapped = unsafe { libc::mmap(null_mut(), length, access, flags, -1, 0) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped) }
}

/// Takes a mapping of [`map`], or a part of one, away.
fn unmap(place: *mut libc::c_void, length: usize) {
    // SAFETY: it was mapped by `map`, and nothing refers to it.
    unsafe { libc::munmap(place, length) };
}

/// The physical address of the page at `address` of this process.
fn physical(page_map: &File, address: usize) -> anyhow::Result<u64> {
    let mut entry = [0; ENTRY];
    page_map.read_exact_at(&mut entry, (address / PAGE * ENTRY) as u64)?;
    page_address(u64::from_ne_bytes(entry)).context("a huge page is not there")
}

/// The physical address in an entry of [`PAGE_MAP`]: bit 63 says that the page is there, bits 0 to 54 are its number, which is 0 for who
/// may not know it.
fn page_address(entry: u64) -> Option<u64> {
    let number = entry & ((1 << 55) - 1);
    (entry >> 63 == 1 && number != 0).then_some(number * PAGE as u64)
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
    fn entries_of_the_page_map_are_read_as_the_kernel_writes_them() {
        assert_eq!(page_address(0x8180_0000_0000_1a00), Some(0x1a0_0000));
        assert_eq!(page_address(0x0180_0000_0000_1a00), None, "swapped or not there");
        assert_eq!(page_address(0x8180_0000_0000_0000), None, "not for us");
        let here = 7u64;
        let map = File::open(PAGE_MAP).unwrap();
        // Only root learns an address.
        assert_eq!(physical(&map, std::ptr::from_ref(&here).addr()).is_ok(), nix::unistd::geteuid().is_root());
    }

    #[test]
    fn the_longest_list_fits_in_a_line() {
        use umbra_driver_vm::protocol::{FromAgent, MAX_LINE};
        let unused = vec![MemoryRange { start: u64::MAX, length: u64::MAX }; MAX_UNUSED];
        let line = serde_json::to_string(&FromAgent::Ready { loaded: true, unused }).unwrap();
        assert!(line.len() < MAX_LINE, "{} bytes", line.len());
    }
}
