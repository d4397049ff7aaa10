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
/// Memory that stays available in a small VM, in bytes: a driver's rings and buffers, and what is queued under full load.
const KEPT: u64 = 24 << 20;
/// In a larger one this part of its memory stays: who gives a driver VM more memory has a driver that needs it.
const KEPT_PART: u64 = 4;
/// Available memory that is left alone while the rest is cleared, in bytes: this VM ends where the kernel finds none.
const MARGIN: u64 = 8 << 20;
/// The kernel's pool of huge pages: their number.
const POOL: &str = "/proc/sys/vm/nr_hugepages";
/// Where the pages of this process are (`Documentation/admin-guide/mm/pagemap.rst`).
const PAGE_MAP: &str = "/proc/self/pagemap";
/// Bytes of its entry for each page.
const ENTRY: usize = 8;

/// Takes what memory is available, but for what a driver will need, for good; the ranges, by address. A kernel that has no huge pages
/// keeps its memory. What stays free holds zeros afterwards, not what the boot has left there: a snapshot is the smaller.
pub fn give_up() -> Vec<MemoryRange> {
    let wanted = pages_to_give(system::available_memory(), system::total_memory());
    let held = if wanted == 0 { Ok(Vec::new()) } else { hold(wanted) };
    clear(system::available_memory().saturating_sub(MARGIN));
    held.unwrap_or_else(|error| {
        kernel_log::info(&format!("no memory is given up: {error:#}"));
        Vec::new()
    })
}

/// Has the kernel clear `bytes` of free memory, by taking them for a moment.
fn clear(bytes: u64) {
    let Ok(length) = usize::try_from(bytes / PAGE as u64 * PAGE as u64) else { return };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nobody. One of no bytes is refused.
    let mapped = unsafe { libc::mmap(null_mut(), length, access, flags, -1, 0) };
    if mapped != libc::MAP_FAILED {
        // SAFETY: it was just mapped, and nothing refers to it.
        unsafe { libc::munmap(mapped, length) };
    }
}

/// Huge pages that a VM with so many bytes of memory, of which so many are available, can do without.
fn pages_to_give(available: u64, total: u64) -> usize {
    let spare = available.saturating_sub(KEPT.max(total / KEPT_PART));
    usize::try_from(spare).unwrap_or(0) / HUGE_PAGE
}

/// Holds `wanted` huge pages, or as many as there are.
fn hold(wanted: usize) -> anyhow::Result<Vec<MemoryRange>> {
    fs::write(POOL, wanted.to_string()).context("no huge pages can be made")?;
    let made = fs::read_to_string(POOL).context("the number of huge pages cannot be read")?;
    let pages = made.trim().parse::<usize>().context("the number of huge pages is none")?.min(wanted);
    if pages == 0 {
        return Ok(Vec::new());
    }
    let first = map(pages * HUGE_PAGE).context("huge pages cannot be mapped")?;
    let page_map = File::open(PAGE_MAP).context("the addresses of pages cannot be read")?;
    let addresses = (0..pages).map(|page| physical(&page_map, first + page * HUGE_PAGE));
    Ok(merge(addresses.collect::<anyhow::Result<_>>()?))
}

/// Maps `length` bytes of huge pages, which are there at once; the address.
fn map(length: usize) -> io::Result<usize> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_POPULATE;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nobody; it stays until the VM ends.
    let mapped = unsafe { libc::mmap(null_mut(), length, libc::PROT_READ, flags, -1, 0) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped.addr()) }
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
    fn a_small_vm_keeps_what_a_driver_needs_and_a_large_one_a_quarter() {
        assert_eq!(pages_to_give(59 * MIB, 87 * MIB), 17);
        assert_eq!(pages_to_give(25 * MIB, 60 * MIB), 0);
        assert_eq!(pages_to_give(10 * MIB, 60 * MIB), 0);
        assert_eq!(pages_to_give(940 * MIB, 980 * MIB), (940 - 245) / 2);
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
