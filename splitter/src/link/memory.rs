//! The memory table of a vhost-user front-end: files into mapped regions.
//!
//! Invariant: no access to a region that passed can fault: its file is a memory file (tmpfs, whose pages need no
//! reservation) that can no longer shrink, and the region lies inside it. All regions together are no larger than the driver VM's
//! memory is configured: a file of holes costs its owner nothing, and this process the pages of whatever it writes there.

use std::fs::File;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use super::Cause;

/// Most regions, as in the vhost-user specification without configurable slots.
const MAX_REGIONS: usize = 8;

/// A driver VM's memory, and where its process sees it.
#[derive(Debug)]
pub(super) struct MemoryTable {
    memory: GuestMemoryMmap,
    /// Address in the front-end, length, guest physical address.
    places: Vec<(u64, u64, u64)>,
}

impl MemoryTable {
    /// Checks and maps the regions, of at most `limit` bytes.
    pub(super) fn map(regions: &[VhostUserMemoryRegion], files: Vec<File>, limit: u64) -> Result<Self, Cause> {
        if regions.len() > MAX_REGIONS || regions.len() != files.len() {
            return Err(Cause::Protocol(format!("{} memory regions with {} files", regions.len(), files.len())));
        }
        let mut left = limit;
        let mut places = Vec::with_capacity(regions.len());
        let mut mapped = Vec::with_capacity(regions.len());
        for (index, (region, file)) in regions.iter().zip(files).enumerate() {
            // Packed structure: copies of its fields.
            let (user, size, guest) = (region.user_addr, region.memory_size, region.guest_phys_addr);
            left = left.checked_sub(size).ok_or_else(|| {
                let why = format!("with it they are larger than the {limit} bytes of the driver VM's memory");
                Cause::Memory { index, why }
            })?;
            mapped.push(map_region(index, guest, size, region.mmap_offset, file)?);
            places.push((user, size, guest));
        }
        mapped.sort_by_key(|region: &GuestRegionMmap| region.start_addr());
        let memory = GuestMemoryMmap::from_regions(mapped)
            .map_err(|error| Cause::Memory { index: 0, why: error.to_string() })?;
        Ok(Self { memory, places })
    }

    /// The guest physical address of the front-end's address `user`.
    pub(super) fn translate(&self, user: u64) -> Option<u64> {
        let inside = |&&(start, len, _): &&(u64, u64, u64)| user >= start && user - start < len;
        self.places.iter().find(inside).map(|(start, _, guest)| user - start + guest)
    }

    /// The memory.
    pub(super) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }
}

fn map_region(index: usize, guest: u64, size: u64, offset: u64, file: File) -> Result<GuestRegionMmap, Cause> {
    let refuse = |why: String| Cause::Memory { index, why };
    // First of all: on a file that is no memory file this fails without asking the file's owner anything.
    let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map_err(|_| refuse("it is no memory file (memfd)".into()))?;
    if !SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_SHRINK) {
        return Err(Cause::NotSealed(index));
    }
    let system = fstatfs(&file).map_err(|error| refuse(error.to_string()))?;
    if system.filesystem_type() != TMPFS_MAGIC {
        return Err(refuse("it is of huge pages, which can run out under us".into()));
    }
    let length = file.metadata().map_err(|error| refuse(error.to_string()))?.len();
    if offset.checked_add(size).is_none_or(|end| end > length) {
        return Err(refuse(format!("{size} bytes at {offset} in a file of {length} bytes")));
    }
    let bytes = usize::try_from(size).map_err(|_| refuse("too large".into()))?;
    let mapping = MmapRegion::from_file(FileOffset::new(file, offset), bytes).map_err(|e| refuse(e.to_string()))?;
    GuestRegionMmap::new(mapping, GuestAddress(guest)).ok_or_else(|| refuse("its addresses wrap".into()))
}
