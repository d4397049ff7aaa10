//! PCI functions of this VM as root has them by sysfs: configuration space, registers, and memory for the device to reach.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap, mmap_anonymous};

/// Command register, and its bits: ports, memory and DMA.
const COMMAND: u64 = 4;
const ALL_ON: u16 = 7;
/// Bytes of a page.
pub(super) const PAGE: usize = 4096;

/// A function.
#[derive(Debug)]
pub(super) struct Function {
    path: PathBuf,
    config: File,
    /// Vendor and device.
    pub(super) id: (u16, u16),
}

impl Function {
    /// All of them, in the order of their addresses.
    pub(super) fn all() -> Vec<Self> {
        let mut paths: Vec<_> =
            fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        paths.sort();
        paths.into_iter().filter_map(Self::open).collect()
    }

    fn open(path: PathBuf) -> Option<Self> {
        let config = OpenOptions::new().read(true).write(true).open(path.join("config")).ok()?;
        let mut id = [0; 4];
        config.read_exact_at(&mut id, 0).ok()?;
        let [a, b, c, d] = id;
        Some(Self { path, config, id: (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d])) })
    }

    /// Takes it from its driver, and has it answer and reach memory.
    pub(super) fn take(&self) {
        let name = self.path.file_name().unwrap_or_default();
        let _ = fs::write(self.path.join("driver/unbind"), name.as_encoded_bytes());
        self.write_config(COMMAND, &ALL_ON.to_le_bytes());
    }

    /// Writes configuration space; what is refused is.
    pub(super) fn write_config(&self, offset: u64, bytes: &[u8]) {
        let _ = self.config.write_at(bytes, offset);
    }

    /// The registers of a BAR, if it is one of memory and there.
    pub(super) fn map(&self, bar: usize) -> Option<Registers> {
        let table = fs::read_to_string(self.path.join("resource")).ok()?;
        let mut fields = table.lines().nth(bar)?.split_whitespace();
        let mut number = || u64::from_str_radix(fields.next()?.trim_start_matches("0x"), 16).ok();
        let (start, end) = (number()?, number()?);
        let length = usize::try_from(end.checked_sub(start)?.checked_add(1)?).ok()?;
        let file = OpenOptions::new().read(true).write(true).open(self.path.join(format!("resource{bar}"))).ok()?;
        // A BAR that is smaller than a page begins within one.
        let before = usize::try_from(start).ok()? % PAGE;
        let whole = NonZeroUsize::new((before + length).next_multiple_of(PAGE))?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping of device registers, at an address of the kernel's choice; it is never unmapped.
        let base = unsafe { mmap(None, whole, access, MapFlags::MAP_SHARED, &file, 0) }.ok()?;
        Some(Registers { base: base.cast(), before, length })
    }
}

/// Mapped registers.
#[derive(Debug)]
pub(super) struct Registers {
    base: NonNull<u8>,
    before: usize,
    length: usize,
}

// SAFETY: the mapping belongs to the process, and is there until its end.
unsafe impl Send for Registers {}

macro_rules! access {
    ($write:ident, $type:ty) => {
        /// Writes a register; beside the BAR or unaligned nothing is written.
        pub(super) fn $write(&self, offset: usize, value: $type) {
            let size = size_of::<$type>();
            if offset.is_multiple_of(size) && offset + size <= self.length {
                // SAFETY: within the mapping and aligned; what the write does to this VM's devices is the aim.
                unsafe { self.base.as_ptr().add(self.before + offset).cast::<$type>().write_volatile(value) };
            }
        }
    };
}

impl Registers {
    access!(write8, u8);
    access!(write16, u16);
    access!(write32, u32);

    /// A 64-bit register, by halves.
    pub(super) fn write64(&self, offset: usize, value: u64) {
        // The halves are meant.
        #[expect(clippy::cast_possible_truncation, reason = "the low half")]
        self.write32(offset, value as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }

    /// Reads a register; all ones beside the BAR.
    pub(super) fn read32(&self, offset: usize) -> u32 {
        if !offset.is_multiple_of(4) || offset + 4 > self.length {
            return u32::MAX;
        }
        // SAFETY: as in `access`.
        unsafe { self.base.as_ptr().add(self.before + offset).cast::<u32>().read_volatile() }
    }

    /// Bytes of the BAR.
    pub(super) fn length(&self) -> usize {
        self.length
    }
}

/// A page that stays where it is, and its address for devices.
#[derive(Debug)]
pub(super) struct Page {
    base: NonNull<u8>,
    pub(super) address: u64,
}

// SAFETY: as for `Registers`.
unsafe impl Send for Page {}

impl Page {
    /// A page of zeroes; it is never given back.
    pub(super) fn new() -> io::Result<Self> {
        let length = NonZeroUsize::new(PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address of the kernel's choice, kept for ever.
        let base = unsafe { mmap_anonymous(None, length, access, MapFlags::MAP_PRIVATE)? };
        // SAFETY: both calls are about the mapping just made. Huge pages would be split, and move.
        unsafe {
            let _ = madvise(base, PAGE, MmapAdvise::MADV_NOHUGEPAGE);
            mlock(base, PAGE)?;
        }
        let page = Self { base: base.cast(), address: 0 };
        page.write8(0, 0);
        Ok(Self { address: physical(page.base.as_ptr() as u64)?, ..page })
    }

    /// Writes a byte; nothing beside the page.
    pub(super) fn write8(&self, offset: usize, value: u8) {
        self.write(offset, &[value]);
    }

    /// Writes bytes; nothing beside the page.
    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        for (offset, &byte) in (offset..PAGE).zip(bytes) {
            // SAFETY: within the page.
            unsafe { self.base.as_ptr().add(offset).write_volatile(byte) };
        }
    }
}

/// The physical address of a mapped page (`Documentation/admin-guide/mm/pagemap.rst`).
fn physical(address: u64) -> io::Result<u64> {
    const FRAME: u64 = (1 << 55) - 1;
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, address / PAGE as u64 * 8)?;
    match u64::from_le_bytes(entry) & FRAME {
        0 => Err(io::Error::other("a page has no physical address")),
        frame => Ok(frame * PAGE as u64),
    }
}
