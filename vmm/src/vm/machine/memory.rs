//! The guest's memory: one memfd, sealed against change of size, so that a vhost-user back-end that maps it
//! cannot be hit by SIGBUS; and KVM's memory slots, which RAM and mapped BARs of passed-through devices share.
//! Invariant: guest memory stays mapped for the life of the process, which runs one VM.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use thiserror::Error;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::layout;
use super::unused::Unused;
use crate::base::lock::lock;
use crate::base::parallel::in_parallel;

/// Page size of the host and of KVM's slots.
const PAGE: u64 = 4096;
/// A huge page of x86-64. KVM maps guest memory by huge pages where guest and host address agree modulo this.
pub(super) const HUGE_PAGE: usize = 2 << 20;
/// A huge page that takes longer has cost others their punctuality.
const SLOW_PAGE: Duration = Duration::from_millis(50);

/// Most RAM: what lies below the 64-bit PCI window, less the hole below 4 GiB.
const LIMIT: u64 = layout::PCI_MMIO64_START - layout::HIGH_RAM_START + layout::LOW_RAM_LIMIT;

/// Errors of guest memory.
#[derive(Debug, Error)]
pub enum Error {
    /// The size cannot be used.
    #[error("guest memory of {0} bytes: it must be a multiple of 4 KiB and not 0")]
    Size(u64),
    /// RAM would reach into the 64-bit PCI window.
    #[error("guest memory of {} GiB: {} GiB are the most there is room for; lower `memory`", .0 >> 30, LIMIT >> 30)]
    TooLarge(u64),
    /// The memfd could not be made or sealed.
    #[error("create {size} bytes of guest memory (memfd)")]
    Memfd {
        /// Bytes.
        size: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The memfd could not be mapped.
    #[error("map {size} bytes of guest memory")]
    Map {
        /// Bytes.
        size: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The regions do not make a memory.
    #[error("lay out the guest memory")]
    Layout(#[source] vm_memory::region::GuestRegionCollectionError),
    /// A region has no address in this process.
    #[error("find the host address of guest memory at {0:#x}")]
    HostAddress(u64),
    /// KVM has no slot left.
    #[error("KVM has no free memory slot (limit {0})")]
    NoSlot(usize),
    /// KVM refused a slot.
    #[error("map guest memory at {address:#x}, {size:#x} bytes (KVM_SET_USER_MEMORY_REGION)")]
    Slot {
        /// Guest physical address.
        address: u64,
        /// Bytes.
        size: u64,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Bytes of RAM below 4 GiB, and above, of a guest with `size` bytes.
pub fn split(size: u64) -> (u64, u64) {
    let low = size.min(layout::LOW_RAM_LIMIT);
    (low, size - low)
}

/// Makes the memory of the VM `name`.
pub fn create(name: &str, size: u64) -> Result<GuestMemoryMmap, Error> {
    if size == 0 || !size.is_multiple_of(PAGE) {
        return Err(Error::Size(size));
    }
    if size > LIMIT {
        return Err(Error::TooLarge(size));
    }
    let file = sealed_memfd(name, size).map_err(|source| Error::Memfd { size, source })?;
    let file = Arc::new(file);
    let (low, high) = split(size);
    let mut regions = vec![region(&file, 0, 0, low)?];
    if high > 0 {
        regions.push(region(&file, layout::HIGH_RAM_START, low, high)?);
    }
    GuestMemoryMmap::from_regions(regions).map_err(Error::Layout)
}

/// Maps `size` bytes of `file` from `offset` on as the guest memory at `start`.
fn region(file: &Arc<File>, start: u64, offset: u64, size: u64) -> Result<GuestRegionMmap, Error> {
    let failed = |source| Error::Map { size, source };
    let length = usize::try_from(size).map_err(|_| Error::Size(size))?;
    let host = map_aligned(file, offset, length).map_err(failed)?;
    let builder = MmapRegionBuilder::new(length)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset));
    // SAFETY: `map_aligned` has just mapped `length` bytes there, and nobody unmaps them.
    let mapping = unsafe { builder.with_raw_mmap_pointer(host) }.build();
    let mapping = mapping.map_err(|error| failed(io::Error::other(error)))?;
    GuestRegionMmap::new(mapping, GuestAddress(start)).ok_or(Error::Size(size))
}

/// Maps `length` bytes at an address that is a multiple of [`HUGE_PAGE`].
fn map_aligned(file: &File, offset: u64, length: usize) -> io::Result<*mut u8> {
    let too_large = || io::Error::from(io::ErrorKind::OutOfMemory);
    let reserve = length.checked_add(HUGE_PAGE).ok_or_else(too_large)?;
    let offset = libc::off_t::try_from(offset).map_err(|_| too_large())?;
    let (anonymous, shared) = (libc::MAP_ANONYMOUS | libc::MAP_PRIVATE, libc::MAP_SHARED | libc::MAP_FIXED);
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nobody.
    let area = unsafe { libc::mmap(null_mut(), reserve, libc::PROT_NONE, anonymous | libc::MAP_NORESERVE, -1, 0) };
    if area == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let aligned = area.wrapping_byte_add(area.align_offset(HUGE_PAGE));
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: `aligned` and the `length` bytes from there lie inside of the area that was just reserved and
    // that nobody else knows of; what is left of it stays reserved and costs nothing.
    let mapped = unsafe { libc::mmap(aligned, length, access, shared | libc::MAP_NORESERVE, file.as_raw_fd(), offset) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(mapped.cast())
}

/// How memory is backed with huge pages ([`collapse`]). The kernel is not preempted while it makes one, which takes long where it has to
/// compact its memory first; what has to be punctual on the same processor, as a player in a guest, is late by as much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Page by page, with a rest after each for as long as it took, and after a slow one for three times as long: nobody waits for it.
    Gentle,
    /// Page by page.
    Steady,
    /// [`SWIFT`] bytes at once: each call has the kernel wait for all processors, which for single pages takes longer than the pages. It
    /// lets others go between two pages.
    Swift,
    /// As before, by several threads: a guest waits for it.
    Urgent,
}

/// Bytes of a call at [`Pace::Swift`] and [`Pace::Urgent`].
const SWIFT: usize = 16 << 20;
/// Most threads at [`Pace::Urgent`]: they wait for the kernel's memory management more than for a processor.
const MAX_THREADS: usize = 4;

/// Backs all of `memory` that is not `unused` with huge pages now, before anything is in it, where the kernel can (Linux 6.1). For
/// memory that will be pinned for a device anyway: fewer pages to pin, and fewer faults while it is filled or the guest boots.
pub fn collapse(memory: &GuestMemoryMmap, unused: &Unused, pace: Pace) {
    let step = if matches!(pace, Pace::Swift | Pace::Urgent) { SWIFT } else { HUGE_PAGE };
    let parts: Vec<_> = unused.rest(memory, step).collect();
    let threads = if pace == Pace::Urgent { MAX_THREADS } else { 1 };
    // Nothing is lost with what stays in small pages.
    let _ = in_parallel(
        threads,
        &parts,
        || (),
        |(), part| {
            let start = Instant::now();
            if let Err(error) = collapse_part(memory, *part) {
                tracing::debug!(%error, "back guest memory with huge pages");
                if error.raw_os_error() == Some(libc::EINVAL) {
                    // An older kernel, or no huge pages at all.
                    return Err(());
                }
            }
            let took = start.elapsed();
            if pace == Pace::Gentle {
                std::thread::sleep(took * if took > SLOW_PAGE { 3 } else { 1 });
            }
            Ok(())
        },
    );
}

/// Backs `length` bytes from `start` on, in one region, with huge pages.
fn collapse_part(memory: &GuestMemoryMmap, (start, length): (GuestAddress, usize)) -> io::Result<()> {
    // The kernel collapses only where there is a page already: a read makes one of shared memory.
    for page in (start.0..start.0 + length as u64).step_by(HUGE_PAGE) {
        let _: u8 = memory.read_obj(GuestAddress(page)).map_err(io::Error::other)?;
    }
    let host = memory.get_host_address(start).map_err(io::Error::other)?;
    // SAFETY: the range is inside of a mapping of this process that stays; its contents do not change.
    match unsafe { libc::madvise(host.cast(), length, libc::MADV_COLLAPSE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where `address`, which is in `memory`, lies in the memfd.
pub fn memfd_offset(memory: &GuestMemoryMmap, address: GuestAddress) -> Option<u64> {
    let (region, at) = memory.to_region_addr(address)?;
    Some(region.file_offset()?.start() + at.0)
}

/// Makes `length` bytes of `memory` from the guest physical address `start` on, which are in one region, hold zeros, and take no room.
pub fn discard(memory: &GuestMemoryMmap, start: u64, length: u64) -> io::Result<()> {
    let outside = || io::Error::from(io::ErrorKind::InvalidInput);
    let region = memory.find_region(GuestAddress(start)).ok_or_else(outside)?;
    let file = region.file_offset().ok_or_else(outside)?;
    let offset = memfd_offset(memory, GuestAddress(start)).ok_or_else(outside)?;
    let offset = libc::off_t::try_from(offset).map_err(|_| outside())?;
    let length = libc::off_t::try_from(length).map_err(|_| outside())?;
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(fallocate(file.file(), punch, offset, length)?)
}

fn sealed_memfd(name: &str, size: u64) -> io::Result<File> {
    let name = format!("umbra-{name}");
    let file = File::from(memfd_create(name.as_str(), MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(size)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|e: Errno| io::Error::from(e))?;
    Ok(file)
}

/// KVM's memory slots of one VM.
#[derive(Debug)]
pub struct MemorySlots {
    vm: Arc<VmFd>,
    limit: usize,
    used: Mutex<Vec<bool>>,
}

/// A mapping into the guest; dropping it takes the mapping away.
#[derive(Debug)]
pub struct MemorySlot {
    slots: Arc<MemorySlots>,
    number: u32,
}

/// Whether the guest may write to a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads and writes.
    ReadWrite,
    /// Writes exit to the VMM as MMIO.
    ReadOnly,
}

impl MemorySlots {
    /// The slots of `vm`, of which KVM allows `limit`.
    pub fn new(vm: Arc<VmFd>, limit: usize) -> Arc<Self> {
        Arc::new(Self { vm, limit, used: Mutex::new(Vec::new()) })
    }

    /// Maps every region of `memory`; the mappings last as long as the VM.
    pub fn map_ram(self: &Arc<Self>, memory: &GuestMemoryMmap) -> Result<Vec<MemorySlot>, Error> {
        let map = |region: &<GuestMemoryMmap as GuestMemoryBackend>::R| {
            let start = region.start_addr().0;
            let host = region.get_host_address(MemoryRegionAddress(0)).map_err(|_| Error::HostAddress(start))?;
            // SAFETY: guest memory is never unmapped, and is shared with the guest by design: all access to it
            // is volatile (`vm_memory`).
            unsafe { self.map(start, host as u64, region.len(), Access::ReadWrite) }
        };
        memory.iter().map(map).collect()
    }

    /// Maps `size` bytes of this process at `host` to the guest physical address `address`.
    ///
    /// # Safety
    /// The memory at `host` must stay mapped until the returned slot is dropped, and nothing in this process
    /// may assume that it does not change.
    pub unsafe fn map(
        self: &Arc<Self>,
        address: u64,
        host: u64,
        size: u64,
        access: Access,
    ) -> Result<MemorySlot, Error> {
        let flags = match access {
            Access::ReadWrite => 0,
            Access::ReadOnly => KVM_MEM_READONLY,
        };
        let number = self.take()?;
        let slot = MemorySlot { slots: Arc::clone(self), number };
        let region = kvm_userspace_memory_region {
            slot: number,
            flags,
            guest_phys_addr: address,
            memory_size: size,
            userspace_addr: host,
        };
        // SAFETY: the caller vouches for the memory behind `host`.
        let set = unsafe { self.vm.set_user_memory_region(region) };
        set.map_err(|source| Error::Slot { address, size, source })?;
        Ok(slot)
    }

    fn take(&self) -> Result<u32, Error> {
        let mut used = lock(&self.used);
        let number = used.iter().position(|taken| !taken).unwrap_or(used.len());
        if number >= self.limit {
            return Err(Error::NoSlot(self.limit));
        }
        if number == used.len() {
            used.push(true);
        } else {
            used[number] = true;
        }
        u32::try_from(number).map_err(|_| Error::NoSlot(self.limit))
    }
}

impl Drop for MemorySlot {
    fn drop(&mut self) {
        let region = kvm_userspace_memory_region { slot: self.number, ..Default::default() };
        // SAFETY: a size of 0 removes the slot; no memory is given to the guest.
        let removed = unsafe { self.slots.vm.set_user_memory_region(region) };
        if let Err(error) = removed {
            // Fails where the slot was never set (the drop in the error path of `map`).
            tracing::debug!(slot = self.number, %error, "remove a memory slot");
        }
        let mut used = lock(&self.slots.used);
        used[self.number as usize] = false;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_split_at_the_pci_hole() {
        let memory = create("test", (4 << 30) + PAGE).unwrap();
        let regions: Vec<_> = memory.iter().map(|r| (r.start_addr().0, r.len())).collect();
        assert_eq!(regions, [(0, 0xc000_0000), (1 << 32, 0x4000_0000 + PAGE)]);
        let offsets: Vec<_> = memory.iter().map(|r| r.file_offset().unwrap().start()).collect();
        assert_eq!(offsets, [0, 0xc000_0000]);
    }

    #[test]
    fn memory_cannot_shrink() {
        let memory = create("test", 1 << 20).unwrap();
        let file = memory.iter().next().unwrap().file_offset().unwrap().file();
        assert_eq!(file.set_len(PAGE).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        let seals = SealFlag::from_bits_retain(fcntl(file, FcntlArg::F_GET_SEALS).unwrap());
        assert!(seals.contains(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL));
    }

    #[test]
    fn memory_stays_below_the_64_bit_pci_window() {
        let error = create("test", LIMIT + PAGE).unwrap_err();
        assert_eq!(
            error.to_string(),
            "guest memory of 255 GiB: 255 GiB are the most there is room for; lower `memory`"
        );
        let memory = create("test", LIMIT).unwrap();
        assert_eq!(memory.last_addr().0 + 1, layout::PCI_MMIO64_START);
    }

    #[test]
    fn odd_sizes_are_refused() {
        for size in [0, 1, PAGE + 1] {
            assert!(matches!(create("test", size), Err(Error::Size(n)) if n == size));
        }
    }
}
