//! Huge pages of 2 MiB: taking them from the kernel, and where they are in this VM's memory.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::null_mut;

use anyhow::Context;

/// Bytes of a page, and of a huge page, of x86-64.
pub const PAGE: usize = 4096;
/// Bytes of a huge page.
pub const HUGE_PAGE: usize = 2 << 20;
/// The kernel's pool of huge pages: their number, mapped ones included.
const NUMBER: &str = "/proc/sys/vm/nr_hugepages";
/// Where the pages of this process are (`Documentation/admin-guide/mm/pagemap.rst`).
const PAGE_MAP: &str = "/proc/self/pagemap";
/// Bytes of its entry for each page.
const ENTRY: usize = 8;
/// Private memory of huge pages, all of them there when the call returns.
pub const HUGE: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_POPULATE;

/// Number of huge pages that the kernel has, those that are mapped included.
///
/// # Errors
/// When the kernel has no such memory.
pub fn number() -> anyhow::Result<usize> {
    let made = fs::read_to_string(NUMBER).context("the number of huge pages cannot be read")?;
    made.trim().parse().context("the number of huge pages is none")
}

/// Asks the kernel for this number of huge pages in all. It makes as many as it finds memory for, and gives back none that is mapped.
///
/// # Errors
/// When the kernel has no such memory.
pub fn set_number(wanted: usize) -> anyhow::Result<()> {
    fs::write(NUMBER, wanted.to_string()).context("the number of huge pages cannot be changed")
}

/// Maps `length` bytes of nothing.
pub fn map(length: usize, access: libc::c_int, flags: libc::c_int) -> io::Result<*mut libc::c_void> {
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nobody.
    let mapped = unsafe { libc::mmap(null_mut(), length, access, flags, -1, 0) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapped) }
}

/// Takes a mapping of [`map`], or a part of one, away.
pub fn unmap(place: *mut libc::c_void, length: usize) {
    // SAFETY: it was mapped by `map`, and nothing refers to it.
    unsafe { libc::munmap(place, length) };
}

/// The pages of this process.
#[derive(Debug)]
pub struct PageMap(File);

impl PageMap {
    /// Opens it.
    ///
    /// # Errors
    /// When the kernel has none.
    pub fn open() -> anyhow::Result<Self> {
        File::open(PAGE_MAP).map(Self).context("the addresses of pages cannot be read")
    }

    /// The physical address of the page at `address` of this process.
    ///
    /// # Errors
    /// When there is no page, or its address is kept from this process.
    pub fn physical(&self, address: usize) -> anyhow::Result<u64> {
        let mut entry = [0; ENTRY];
        self.0.read_exact_at(&mut entry, (address / PAGE * ENTRY) as u64)?;
        page_address(u64::from_ne_bytes(entry)).context("a page is not there")
    }
}

/// The physical address in an entry of [`PAGE_MAP`]: bit 63 says that the page is there, bits 0 to 54 are its number, which is 0 for who
/// may not know it.
fn page_address(entry: u64) -> Option<u64> {
    let number = entry & ((1 << 55) - 1);
    (entry >> 63 == 1 && number != 0).then_some(number * PAGE as u64)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_the_page_map_are_read_as_the_kernel_writes_them() {
        assert_eq!(page_address(0x8180_0000_0000_1a00), Some(0x1a0_0000));
        assert_eq!(page_address(0x0180_0000_0000_1a00), None, "swapped or not there");
        assert_eq!(page_address(0x8180_0000_0000_0000), None, "not for us");
        let here = 7u64;
        let map = PageMap::open().unwrap();
        // Only root learns an address.
        assert_eq!(map.physical(std::ptr::from_ref(&here).addr()).is_ok(), nix::unistd::geteuid().is_root());
    }
}
