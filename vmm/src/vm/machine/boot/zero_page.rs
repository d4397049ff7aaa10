//! The zero page (`struct boot_params`) of the Linux boot protocol.

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::{Error, Handover, memory_map, write};
use crate::vm::machine::layout;

const BOOT_FLAG: u16 = 0xaa55;
const HDRS: u32 = 0x5372_6448;
/// `type_of_loader`: a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `kernel_alignment` for a kernel that brings no header.
const ALIGNMENT: u32 = 0x100_0000;

/// A header for a kernel that has none.
pub(super) fn vmlinux_header() -> setup_header {
    setup_header { boot_flag: BOOT_FLAG, header: HDRS, kernel_alignment: ALIGNMENT, ..Default::default() }
}

/// Writes the zero page for a kernel with `header`.
pub(super) fn write_all(memory: &GuestMemoryMmap, mut header: setup_header, handover: &Handover) -> Result<(), Error> {
    // The protocol's fields have 32 bits; command line and initial RAM disk lie below 4 GiB.
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = low(layout::CMDLINE.0);
    header.cmdline_size = low(handover.cmdline_length as u64 + 1);
    if let Some((start, size)) = handover.initrd {
        (header.ramdisk_image, header.ramdisk_size) = (low(start.0), low(size));
    }
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: handover.rsdp.0, ..Default::default() };
    let map = memory_map::of(handover.memory_size);
    for (entry, range) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: range.start, size: range.size, r#type: range.kind };
    }
    params.e820_entries = map.len().try_into().unwrap_or(u8::MAX);
    write(memory, "the zero page", params.as_slice(), layout::ZERO_PAGE)
}
