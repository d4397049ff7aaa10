//! What VFIO says about an open function: its regions and interrupts (`VFIO_DEVICE_GET_INFO` and the like).
//!
//! The kernel's answers are trusted, but for what they say of their own size.

use std::fs::File;
use std::io;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_PCI_ROM_REGION_INDEX,
    VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, VFIO_TYPE, vfio_device_info, vfio_irq_info,
    vfio_region_info,
};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref};

use super::files::{argsz, done};
use super::irq::Index;
use crate::base::pci_config::BARS;

/// `_IO(VFIO_TYPE, VFIO_BASE + n)`.
const VFIO_DEVICE_GET_INFO: libc::c_ulong = nix::request_code_none!(VFIO_TYPE, VFIO_BASE + 7);
const VFIO_DEVICE_GET_REGION_INFO: libc::c_ulong = nix::request_code_none!(VFIO_TYPE, VFIO_BASE + 8);
const VFIO_DEVICE_GET_IRQ_INFO: libc::c_ulong = nix::request_code_none!(VFIO_TYPE, VFIO_BASE + 9);

/// Longest answer about a region: it lists hundreds of parts that can be mapped.
const MAX_REGION_INFO: u32 = 64 * 1024;

/// A region as VFIO describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionInfo {
    /// Size in bytes; 0: not there.
    pub size: u64,
    /// `mmap` is allowed.
    pub mappable: bool,
    /// If given, only these parts can be mapped.
    pub sparse: Option<Vec<Range<u64>>>,
}

/// A region of the device file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Region {
    /// `VFIO_REGION_INFO_FLAG_*`.
    pub(crate) flags: u32,
    /// Bytes; 0: it is not there.
    pub(crate) size: u64,
    /// Where it begins in the device file.
    pub(crate) offset: u64,
    /// If given, only these parts can be mapped.
    pub(crate) sparse: Option<Vec<Range<u64>>>,
}

/// A function as VFIO describes it.
#[derive(Clone, Debug)]
pub(crate) struct Info {
    /// Its regions, by VFIO's index.
    pub(crate) regions: Vec<Region>,
    /// How many interrupts it has of each kind, by VFIO's index.
    pub(crate) irqs: Vec<u32>,
    /// `VFIO_DEVICE_RESET` works.
    pub(crate) resettable: bool,
}

impl Info {
    /// Region `index`.
    pub(crate) fn region(&self, index: u32) -> Option<&Region> {
        self.regions.get(usize::try_from(index).ok()?)
    }

    /// How many interrupts there are of this kind.
    pub(crate) fn irqs(&self, index: Index) -> u32 {
        usize::try_from(index.number()).ok().and_then(|index| self.irqs.get(index)).copied().unwrap_or(0)
    }

    /// The BARs' regions; an empty one for those that are not there.
    pub(crate) fn bars(&self) -> [RegionInfo; BARS] {
        std::array::from_fn(|index| self.regions.get(index).map(Region::shown).unwrap_or_default())
    }
}

impl Region {
    fn shown(&self) -> RegionInfo {
        let readable = self.flags & (VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE) != 0;
        RegionInfo {
            size: if readable { self.size } else { 0 },
            mappable: self.flags & VFIO_REGION_INFO_FLAG_MMAP != 0,
            sparse: self.sparse.clone(),
        }
    }
}

/// Asks for everything about `device`. What the kernel does not describe (a VGA region of a NIC) counts as not there.
pub(crate) fn read(device: &File) -> io::Result<Info> {
    let mut info = vfio_device_info { argsz: argsz::<vfio_device_info>(), ..Default::default() };
    // SAFETY: the structure is of the size that it names.
    done(unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_GET_INFO, &mut info) })?;
    if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
        return Err(io::Error::other("it is no PCI device"));
    }
    Ok(Info {
        regions: (0..info.num_regions).map(|index| region_shown(device, index)).collect(),
        irqs: (0..info.num_irqs).map(|index| irqs(device, index).unwrap_or_default()).collect(),
        resettable: info.flags & VFIO_DEVICE_FLAGS_RESET != 0,
    })
}

/// The expansion ROM is hidden from every VM, and the kernel would read all of it over for its size.
fn region_shown(device: &File, index: u32) -> Region {
    if index == VFIO_PCI_ROM_REGION_INDEX { Region::default() } else { region(device, index).unwrap_or_default() }
}

/// Asks for region `index`.
pub(crate) fn region(device: &File, index: u32) -> io::Result<Region> {
    let mut info = vfio_region_info { argsz: argsz::<vfio_region_info>(), index, ..Default::default() };
    // SAFETY: the structure is of the size that it names.
    done(unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_GET_REGION_INFO, &mut info) })?;
    let mut region = Region { flags: info.flags, size: info.size, offset: info.offset, sparse: None };
    let header = argsz::<vfio_region_info>();
    if info.flags & VFIO_REGION_INFO_FLAG_CAPS != 0 && (header..=MAX_REGION_INFO).contains(&info.argsz) {
        // The same question with room for the rest of the answer: argsz, flags, index, ...
        let mut answer = vec![0_u64; usize::try_from(info.argsz).unwrap_or_default().div_ceil(8)];
        answer[0] = u64::from(info.argsz);
        answer[1] = u64::from(index);
        // SAFETY: the buffer is aligned as the structure is and as long as its first field says.
        done(unsafe { ioctl_with_mut_ptr(device, VFIO_DEVICE_GET_REGION_INFO, answer.as_mut_ptr()) })?;
        let bytes: Vec<u8> = answer.iter().flat_map(|word| word.to_ne_bytes()).collect();
        region.sparse = sparse(&bytes);
    }
    Ok(region)
}

fn irqs(device: &File, index: u32) -> io::Result<u32> {
    let mut info = vfio_irq_info { argsz: argsz::<vfio_irq_info>(), index, ..Default::default() };
    // SAFETY: the structure is of the size that it names.
    done(unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_GET_IRQ_INFO, &mut info) })?;
    Ok(info.count)
}

/// The parts that can be mapped, out of an answer with capabilities: a chain of (ID 16 bits, version 16, offset of the
/// next 32), each with its content behind it.
fn sparse(answer: &[u8]) -> Option<Vec<Range<u64>>> {
    /// Offset of the first capability's offset.
    const FIRST: usize = 12;
    let word = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_ne_bytes(answer.get(at..at.checked_add(8)?)?.try_into().ok()?));
    let mut at = usize::try_from(word(FIRST)?).ok()?;
    // Each has a header of 8 bytes: a chain that is longer loops.
    for _ in 0..answer.len() / 8 {
        if at == 0 {
            return None;
        }
        let id = u16::from_ne_bytes(answer.get(at..at.checked_add(2)?)?.try_into().ok()?);
        if u32::from(id) == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = usize::try_from(word(at + 8)?).ok()?;
            let area = |n: usize| {
                let start = long(n.checked_mul(16)?.checked_add(at + 16)?)?;
                Some(start..start.saturating_add(long(n * 16 + at + 24)?))
            };
            return (0..count).map(area).collect();
        }
        at = usize::try_from(word(at + 4)?).ok()?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer whose first capability is at 32.
    fn answer(capabilities: &[u32]) -> Vec<u8> {
        let header = [0, 0, 0, 32, 0, 0, 0, 0];
        header.iter().chain(capabilities).flat_map(|word: &u32| word.to_ne_bytes()).collect()
    }

    #[test]
    fn the_mappable_parts_are_found_behind_other_capabilities() {
        let areas = [1 | 1 << 16, 0, 2, 0, 0x1000, 0, 0x2000, 0, 0x8000, 0, 0x1000, 0];
        let mut list = vec![3 | 1 << 16, 40];
        list.extend(areas);
        assert_eq!(sparse(&answer(&list)), Some(vec![0x1000..0x3000, 0x8000..0x9000]));
        assert_eq!(sparse(&answer(&[3 | 1 << 16, 0])), None);
    }

    #[test]
    fn an_answer_that_makes_no_sense_ends() {
        assert_eq!(sparse(&answer(&[3, 32])), None, "a loop");
        assert_eq!(sparse(&answer(&[1, 0, 9, 0, 0, 0])), None, "cut off");
        assert_eq!(sparse(&answer(&[3, u32::MAX])), None, "outside");
        assert_eq!(sparse(&[]), None);
    }
}
