//! The structures of the PVH boot protocol (Xen's `public/arch-x86/hvm/start_info.h`, version 1).

use std::mem::size_of;

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::{Error, Handover, memory_map, write};
use crate::vm::machine::layout;

const MAGIC: u32 = 0x336e_c578;

/// Writes start info, module list and memory map behind one another at [`layout::PVH_INFO`].
pub(super) fn write_all(memory: &GuestMemoryMmap, handover: &Handover) -> Result<(), Error> {
    let modules = layout::PVH_INFO.0 + size_of::<hvm_start_info>() as u64;
    let map_at = modules + size_of::<hvm_modlist_entry>() as u64;
    let map = memory_map::of(handover.memory_size);
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: layout::CMDLINE.0,
        rsdp_paddr: handover.rsdp.0,
        memmap_paddr: map_at,
        memmap_entries: map.len().try_into().unwrap_or(u32::MAX),
        ..Default::default()
    };
    if let Some((start, size)) = handover.initrd {
        (info.nr_modules, info.modlist_paddr) = (1, modules);
        let module = hvm_modlist_entry { paddr: start.0, size, ..Default::default() };
        put(memory, "the PVH module list", &module, modules)?;
    }
    for (index, range) in (0u64..).zip(&map) {
        let entry = hvm_memmap_table_entry { addr: range.start, size: range.size, type_: range.kind, reserved: 0 };
        let at = map_at + index * size_of::<hvm_memmap_table_entry>() as u64;
        put(memory, "the PVH memory map", &entry, at)?;
    }
    put(memory, "the PVH start info", &info, layout::PVH_INFO.0)
}

fn put<T: ByteValued>(memory: &GuestMemoryMmap, what: &'static str, value: &T, at: u64) -> Result<(), Error> {
    write(memory, what, value.as_slice(), GuestAddress(at))
}
