//! Loading a kernel as a boot loader would: image, initial RAM disks, command line, and the structures of
//! the boot protocol. A bzImage is entered at its 64-bit entry (Documentation/arch/x86/boot.rst), an ELF
//! vmlinux by PVH where it has that note, else at its 64-bit entry. Firmware is not involved.

mod memory_map;
mod pvh;
mod registers;
mod zero_page;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, bzimage, elf};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, ReadVolatile};

use super::layout;
pub use registers::{Error as RegistersError, set_up as set_up_registers};

/// Offset of the setup header in a bzImage, and the magic in it.
const HDRS_OFFSET: u64 = 0x202;
/// Offset of the 64-bit entry from the load address of a bzImage.
const ENTRY_64: u64 = 0x200;
/// `xloadflags`: the kernel has the 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// The oldest boot protocol with `init_size` and `pref_address`.
const PROTOCOL_2_10: u16 = 0x020a;
/// Highest address + 1 of an initial RAM disk for kernels that do not say.
const INITRD_LIMIT: u64 = 0x8000_0000;
/// Room between a kernel and the initial RAM disks for what the kernel needs before it knows of them.
const SLACK: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Errors of loading a kernel.
#[derive(Debug, Error)]
pub enum Error {
    /// A file cannot be opened or read.
    #[error("{operation} {path}")]
    File {
        /// `open the kernel`, ...
        operation: &'static str,
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Something else.
    #[error("{0} is no Linux kernel (neither bzImage nor ELF vmlinux)")]
    NotAKernel(PathBuf),
    /// 32 bits, or older than 2011.
    #[error("{0} is a Linux kernel without a 64-bit entry: use an x86-64 kernel, version 3.8 or later")]
    No64BitEntry(PathBuf),
    /// The loader cannot take it.
    #[error("load the kernel {path}: the file is damaged or cut short")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// Memory too small.
    #[error(
        "{have_mib} MiB of memory are too little: the kernel and its initial RAM disks alone need {need_mib} MiB; \
         raise `memory`"
    )]
    MemoryTooSmall {
        /// Configured.
        have_mib: u64,
        /// At least.
        need_mib: u64,
    },
    /// Command line too long.
    #[error("the kernel command line has {0} bytes, and the kernel reads {max} at most", max = layout::CMDLINE_MAX - 1)]
    CmdlineTooLong(usize),
    /// Command line with a NUL.
    #[error("the kernel command line holds a NUL byte")]
    CmdlineNul,
    /// A structure does not fit in memory.
    #[error("write {what} to guest memory")]
    Write {
        /// Which structure.
        what: &'static str,
        /// The cause.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
}

impl Error {
    /// Whether the kernel, the command line or the size of the memory is wrong; a file that is not there may come.
    pub fn is_configuration(&self) -> bool {
        !matches!(self, Self::File { .. } | Self::Write { .. })
    }
}

/// Where and how the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32-bit protected mode, `ebx` holds the start info's address.
    Pvh(GuestAddress),
    /// Linux's 64-bit entry: long mode, `rsi` holds the zero page's address.
    Linux64(GuestAddress),
}

/// What the boot structures tell the kernel.
struct Handover {
    memory_size: u64,
    cmdline_length: usize,
    initrd: Option<(GuestAddress, u64)>,
    rsdp: GuestAddress,
}

enum Image {
    BzImage(Box<setup_header>),
    Vmlinux(PvhBootCapability),
}

struct Loaded {
    image: Image,
    load: GuestAddress,
    /// First byte that the running kernel leaves free.
    end: u64,
    initrd_limit: u64,
}

/// Loads `kernel`, `initrds` one behind the other, and `cmdline`, and writes the boot structures, which point
/// to the ACPI tables at `rsdp`.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &Path,
    initrds: &[PathBuf],
    cmdline: &str,
    rsdp: GuestAddress,
) -> Result<Entry, Error> {
    let memory_size = memory.iter().map(GuestMemoryRegion::len).sum();
    write_cmdline(memory, cmdline)?;
    let loaded = load_kernel(memory, memory_size, kernel)?;
    let initrd = load_initrds(memory, memory_size, initrds, &loaded)?;
    let handover = Handover { memory_size, cmdline_length: cmdline.len(), initrd, rsdp };
    match loaded.image {
        Image::Vmlinux(PvhBootCapability::PvhEntryPresent(entry)) => {
            pvh::write_all(memory, &handover)?;
            Ok(Entry::Pvh(entry))
        }
        Image::Vmlinux(_) => {
            zero_page::write_all(memory, zero_page::vmlinux_header(), &handover)?;
            Ok(Entry::Linux64(loaded.load))
        }
        Image::BzImage(header) => {
            zero_page::write_all(memory, *header, &handover)?;
            Ok(Entry::Linux64(GuestAddress(loaded.load.0 + ENTRY_64)))
        }
    }
}

fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), Error> {
    if cmdline.len() >= layout::CMDLINE_MAX {
        return Err(Error::CmdlineTooLong(cmdline.len()));
    }
    if cmdline.contains('\0') {
        return Err(Error::CmdlineNul);
    }
    let bytes = [cmdline.as_bytes(), b"\0"].concat();
    write(memory, "the command line", &bytes, layout::CMDLINE)
}

fn write(memory: &GuestMemoryMmap, what: &'static str, bytes: &[u8], at: GuestAddress) -> Result<(), Error> {
    memory.write_slice(bytes, at).map_err(|source| Error::Write { what, source })
}

fn load_kernel(memory: &GuestMemoryMmap, memory_size: u64, path: &Path) -> Result<Loaded, Error> {
    let fail = |operation| move |source| Error::File { operation, path: path.to_owned(), source };
    let mut file = File::open(path).map_err(fail("open the kernel"))?;
    let size = file.metadata().map_err(fail("read the kernel"))?.len();
    let mut magic = [0; 4];
    let is_elf = file.read_exact_at(&mut magic, 0).is_ok() && &magic == b"\x7fELF";
    let is_bzimage = file.read_exact_at(&mut magic, HDRS_OFFSET).is_ok() && &magic == b"HdrS";
    if !is_elf && !is_bzimage {
        return Err(Error::NotAKernel(path.to_owned()));
    }
    // What does not fit even without its bss; a better figure follows when the headers are read.
    check_fits(memory_size, layout::HIGH_MEMORY.0 + size)?;
    if is_elf {
        check_fits(memory_size, vmlinux_end(&file).map_err(fail("read the kernel"))?)?;
        load_vmlinux(memory, path, &mut file)
    } else {
        load_bzimage(memory, memory_size, path, &mut file)
    }
}

/// First address behind the segments of an ELF file; 0 for a file that ends in its headers.
fn vmlinux_end(file: &File) -> io::Result<u64> {
    const HEADER: usize = 64;
    const PROGRAM_HEADER: usize = 56;
    const PT_LOAD: [u8; 4] = 1u32.to_le_bytes();
    let quad = |bytes: &[u8], at: usize| bytes[at..at + 8].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0)?;
    let (table, count) = (quad(&header, 32), u16::from_le_bytes([header[56], header[57]]));
    let mut end = 0;
    for index in 0..u64::from(count) {
        let mut entry = [0; PROGRAM_HEADER];
        file.read_exact_at(&mut entry, table.saturating_add(index * PROGRAM_HEADER as u64))?;
        if entry[..4] == PT_LOAD {
            end = end.max(quad(&entry, 24).saturating_add(quad(&entry, 40)));
        }
    }
    Ok(end)
}

fn load_vmlinux<F: Read + ReadVolatile + Seek>(
    memory: &GuestMemoryMmap,
    path: &Path,
    file: &mut F,
) -> Result<Loaded, Error> {
    let damaged = |source| Error::Damaged { path: path.to_owned(), source };
    let mut class = [0; 5];
    let seen = file.rewind().and_then(|()| file.read_exact(&mut class));
    seen.map_err(|source| Error::File { operation: "read the kernel", path: path.to_owned(), source })?;
    // ELFCLASS64
    if class[4] != 2 {
        return Err(Error::No64BitEntry(path.to_owned()));
    }
    let result = Elf::load(memory, None, file, Some(layout::HIGH_MEMORY)).map_err(|source| match source {
        linux_loader::loader::Error::Elf(elf::Error::InvalidEntryAddress) => Error::NotAKernel(path.to_owned()),
        source => damaged(source),
    })?;
    Ok(Loaded {
        image: Image::Vmlinux(result.pvh_boot_cap),
        load: result.kernel_load,
        end: result.kernel_end,
        initrd_limit: layout::LOW_RAM_LIMIT,
    })
}

fn load_bzimage<F: Read + ReadVolatile + Seek>(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    path: &Path,
    file: &mut F,
) -> Result<Loaded, Error> {
    let damaged = |source| Error::Damaged { path: path.to_owned(), source };
    let result = BzImage::load(memory, None, file, Some(layout::HIGH_MEMORY)).map_err(damaged)?;
    let header = result
        .setup_header
        .ok_or_else(|| damaged(linux_loader::loader::Error::Bzimage(bzimage::Error::ReadBzImageHeader)))?;
    if header.version < PROTOCOL_2_10 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::No64BitEntry(path.to_owned()));
    }
    // The kernel unpacks itself to its preferred address and needs `init_size` bytes there.
    let runs_to = header.pref_address.max(result.kernel_load.0).saturating_add(u64::from(header.init_size));
    let end = result.kernel_end.max(runs_to);
    check_fits(memory_size, end)?;
    let initrd_limit = match header.initrd_addr_max {
        0 => INITRD_LIMIT,
        last => u64::from(last) + 1,
    };
    Ok(Loaded { image: Image::BzImage(Box::new(header)), load: result.kernel_load, end, initrd_limit })
}

fn check_fits(memory_size: u64, need: u64) -> Result<(), Error> {
    if need <= memory_size.min(layout::LOW_RAM_LIMIT) {
        return Ok(());
    }
    Err(Error::MemoryTooSmall { have_mib: memory_size >> 20, need_mib: (need >> 20) + 1 })
}

/// Puts the RAM disks as high as the kernel accepts, each aligned to 4 bytes as the cpio format wants it.
fn load_initrds(
    memory: &GuestMemoryMmap,
    memory_size: u64,
    paths: &[PathBuf],
    kernel: &Loaded,
) -> Result<Option<(GuestAddress, u64)>, Error> {
    let mut files = Vec::new();
    let mut total = 0u64;
    for path in paths {
        let fail = |operation| move |source| Error::File { operation, path: path.clone(), source };
        let mut file = File::open(path).map_err(fail("open the initial RAM disk"))?;
        let size = file.seek(SeekFrom::End(0)).map_err(fail("read the initial RAM disk"))?;
        file.rewind().map_err(fail("read the initial RAM disk"))?;
        let offset = total.next_multiple_of(4);
        total = offset.saturating_add(size);
        files.push((path, file, offset, size));
    }
    if total == 0 {
        return Ok(None);
    }
    check_fits(memory_size, kernel.end.saturating_add(total).saturating_add(SLACK))?;
    let limit = memory_size.min(layout::LOW_RAM_LIMIT).min(kernel.initrd_limit);
    let start = (limit.saturating_sub(total)) & !(PAGE - 1);
    check_fits(start, kernel.end)?;
    for (path, mut file, offset, size) in files {
        let length = usize::try_from(size).unwrap_or(usize::MAX);
        memory.read_exact_volatile_from(GuestAddress(start + offset), &mut file, length).map_err(|source| {
            let source = io::Error::other(source);
            Error::File { operation: "read the initial RAM disk", path: path.clone(), source }
        })?;
    }
    Ok(Some((GuestAddress(start), total)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::vm::machine::memory;

    const MIB: u64 = 1 << 20;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().write_all_at(bytes, 0).unwrap();
        file
    }

    /// A bzImage with nothing but what a loader reads.
    fn bzimage(xloadflags: u16, init_size: u32) -> Vec<u8> {
        let mut image = vec![0; 4096];
        image[0x1f1] = 1; // one setup sector
        image[0x1fe..0x200].copy_from_slice(&0xaa55u16.to_le_bytes());
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
        image[0x211] = 1; // loaded high
        image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        image[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&init_size.to_le_bytes());
        image
    }

    fn load_with(
        size: u64,
        kernel: &Path,
        initrds: &[PathBuf],
        cmdline: &str,
    ) -> (GuestMemoryMmap, Result<Entry, Error>) {
        let memory = memory::create("test", size).unwrap();
        let entry = load(&memory, kernel, initrds, cmdline, layout::ACPI_TABLES);
        (memory, entry)
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        let text = file(b"#!/bin/sh\n");
        let (_, result) = load_with(64 * MIB, text.path(), &[], "");
        let message = result.unwrap_err().to_string();
        assert!(message.ends_with("is no Linux kernel (neither bzImage nor ELF vmlinux)"), "{message}");
        assert!(message.starts_with(&text.path().display().to_string()), "{message}");
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let (_, result) = load_with(64 * MIB, Path::new("/nowhere/vmlinuz"), &[], "");
        assert_eq!(result.unwrap_err().to_string(), "open the kernel /nowhere/vmlinuz");
    }

    #[test]
    fn a_bzimage_starts_at_its_64_bit_entry() {
        let kernel = file(&bzimage(XLF_KERNEL_64, 0x10_0000));
        let (memory, entry) = load_with(64 * MIB, kernel.path(), &[], "quiet");
        assert_eq!(entry.unwrap(), Entry::Linux64(GuestAddress(0x10_0200)));
        let mut text = [0; 6];
        memory.read_slice(&mut text, layout::CMDLINE).unwrap();
        assert_eq!(&text, b"quiet\0");
    }

    #[test]
    fn a_32_bit_kernel_is_refused() {
        let kernel = file(&bzimage(0, 0x10_0000));
        let (_, result) = load_with(64 * MIB, kernel.path(), &[], "");
        assert!(matches!(result, Err(Error::No64BitEntry(_))));
    }

    #[test]
    fn too_little_memory_says_how_much_is_needed() {
        let kernel = file(&bzimage(XLF_KERNEL_64, 48 << 20));
        let (_, result) = load_with(32 * MIB, kernel.path(), &[], "");
        assert!(matches!(result, Err(Error::MemoryTooSmall { have_mib: 32, need_mib: 65 })));
    }

    #[test]
    fn initrds_lie_one_behind_the_other_aligned() {
        let kernel = file(&bzimage(XLF_KERNEL_64, 0x10_0000));
        let (one, two) = (file(b"first"), file(b"second"));
        let paths = [one.path().to_owned(), two.path().to_owned()];
        let (memory, entry) = load_with(64 * MIB, kernel.path(), &paths, "");
        entry.unwrap();
        let mut found = [0; 14];
        memory.read_slice(&mut found, GuestAddress(64 * MIB - PAGE)).unwrap();
        assert_eq!(&found, b"first\0\0\0second");
        let mut header = [0u8; 8];
        memory.read_slice(&mut header, GuestAddress(layout::ZERO_PAGE.0 + 0x218)).unwrap();
        assert_eq!(u64::from(u32::from_le_bytes(header[..4].try_into().unwrap())), 64 * MIB - PAGE);
        assert_eq!(u32::from_le_bytes(header[4..].try_into().unwrap()), 14);
    }

    #[test]
    fn an_initrd_that_does_not_fit_is_refused() {
        let kernel = file(&bzimage(XLF_KERNEL_64, 0x10_0000));
        let big = tempfile::NamedTempFile::new().unwrap();
        big.as_file().set_len(60 * MIB).unwrap();
        let (_, result) = load_with(64 * MIB, kernel.path(), &[big.path().to_owned()], "");
        assert!(matches!(result, Err(Error::MemoryTooSmall { have_mib: 64, .. })));
    }

    #[test]
    fn a_vmlinux_counts_its_bss() {
        let mut image = vec![0; 4096];
        image[..5].copy_from_slice(b"\x7fELF\x02");
        image[5] = 1;
        image[24..32].copy_from_slice(&0x100_0000u64.to_le_bytes()); // entry
        image[32..40].copy_from_slice(&64u64.to_le_bytes()); // program headers
        image[54..58].copy_from_slice(&[56, 0, 1, 0]);
        image[64] = 1; // load
        image[64 + 24..64 + 32].copy_from_slice(&0x100_0000u64.to_le_bytes());
        image[64 + 40..64 + 48].copy_from_slice(&(100 * MIB).to_le_bytes());
        let kernel = file(&image);
        let (_, result) = load_with(64 * MIB, kernel.path(), &[], "");
        assert!(matches!(result, Err(Error::MemoryTooSmall { have_mib: 64, need_mib: 117 })), "{result:?}");
        let (_, result) = load_with(128 * MIB, kernel.path(), &[], "");
        assert_eq!(result.unwrap(), Entry::Linux64(GuestAddress(0x100_0000)));
    }

    #[test]
    fn bad_command_lines_are_refused() {
        let kernel = file(&bzimage(XLF_KERNEL_64, 0x10_0000));
        let (_, long) = load_with(64 * MIB, kernel.path(), &[], &"x".repeat(2048));
        assert!(matches!(long, Err(Error::CmdlineTooLong(2048))));
        let (_, nul) = load_with(64 * MIB, kernel.path(), &[], "a\0b");
        assert!(matches!(nul, Err(Error::CmdlineNul)));
    }
}
