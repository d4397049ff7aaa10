//! Parts of a BAR mapped into this process and, while the BAR decodes, into the VM as KVM memory slots.
//!
//! The invariant: a slot exists only while its pages are mapped here; dropping a mapping removes the slots
//! first. A function that is given up leaves memory in the place of its registers: KVM drops what it has of them when they
//! are unmapped here, without the grace periods that the removal of each slot would wait for.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::vm::machine::memory::{Access, Error, MemorySlot, MemorySlots};

/// One mapped part of a BAR.
struct Area {
    /// Offset in the BAR.
    offset: u64,
    length: NonZeroUsize,
    address: NonNull<libc::c_void>,
}

// SAFETY: the pointer is only handed to KVM and to munmap, never dereferenced; no thread owns the mapping.
unsafe impl Send for Area {}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: mapped by `BarMapping::new` with this length; `BarMapping` drops the slots before its areas, and
        // nothing else refers to the pages.
        if let Err(error) = unsafe { munmap(self.address, self.length.get()) } {
            tracing::warn!("unmap a BAR: {error}");
        }
    }
}

/// The mapped parts of one BAR. Fields are dropped in this order: slots, then the pages behind them.
pub struct BarMapping {
    placed: Vec<MemorySlot>,
    base: Option<u64>,
    areas: Vec<Area>,
    slots: Arc<MemorySlots>,
}

impl BarMapping {
    /// Maps `parts` (page-aligned) of the region that begins at `region_offset` in the device file.
    pub fn new(
        slots: &Arc<MemorySlots>,
        device: BorrowedFd<'_>,
        region_offset: u64,
        parts: &[Range<u64>],
    ) -> std::io::Result<Self> {
        let mut this = Self { placed: Vec::new(), base: None, areas: Vec::new(), slots: Arc::clone(slots) };
        for part in parts {
            let too_large = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
            let length =
                usize::try_from(part.end - part.start).ok().and_then(NonZeroUsize::new).ok_or_else(too_large)?;
            let position =
                region_offset.checked_add(part.start).and_then(|p| i64::try_from(p).ok()).ok_or_else(too_large)?;
            let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: a fresh mapping at an address that the kernel chooses touches no existing memory.
            let address = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, device, position) }?;
            this.areas.push(Area { offset: part.start, length, address });
        }
        Ok(this)
    }

    /// Takes the registers out of this process and the VM, at once, and leaves memory in their place. After an error some of them
    /// may still be there.
    pub fn leave_device(&mut self) -> std::io::Result<()> {
        for area in &self.areas {
            let at = NonZeroUsize::new(area.address.as_ptr() as usize);
            let (access, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_FIXED);
            let flags = flags | MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
            // SAFETY: it replaces a mapping of this length that `self` owns and that nothing but the VM accesses.
            unsafe { mmap_anonymous(at, area.length, access, flags) }?;
        }
        Ok(())
    }

    /// Shows the BAR to the VM at `base`; `None`: nowhere. After an error it is shown in part or not at all.
    pub fn place(&mut self, base: Option<u64>) -> Result<(), Error> {
        if base == self.base {
            return Ok(());
        }
        self.placed.clear();
        self.base = base;
        let Some(base) = base else { return Ok(()) };
        for area in &self.areas {
            let (address, length) = (base + area.offset, area.length.get() as u64);
            // SAFETY: the pages are device registers, which nothing in this process reads or writes, and stay mapped
            // until after the slot is dropped (order of the fields).
            let slot = unsafe { self.slots.map(address, area.address.as_ptr() as u64, length, Access::ReadWrite) }?;
            self.placed.push(slot);
        }
        Ok(())
    }
}
