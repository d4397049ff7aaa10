//! A NIC's registers (BAR 0), mapped from outside its driver VM, to break the NIC behind its driver's back.

use std::error::Error;
use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// What is mapped: the general registers of Intel's NICs and those of transmission in general.
const LENGTH: usize = 4096;

/// The first registers of a function.
#[derive(Debug)]
pub struct Registers(NonNull<u8>);

impl Registers {
    /// Maps those of the function `bdf`. The kernel lets a function that a driver holds be mapped only with `iomem=relaxed`.
    ///
    /// # Errors
    /// They cannot be mapped.
    pub fn map(bdf: &str) -> Result<Self, Box<dyn Error>> {
        let path = format!("/sys/bus/pci/devices/{bdf}/resource0");
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|e| format!("open {path}: {e}"))?;
        let (length, access) = (NonZeroUsize::try_from(LENGTH)?, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
        // SAFETY: a fresh mapping of device registers, at an address of the kernel's choice.
        let base = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, &file, 0) };
        Ok(Self(base.map_err(|e| format!("map {path}: {e}"))?.cast()))
    }

    /// What the register at `OFFSET` holds; all ones when the function does not answer.
    pub fn read<const OFFSET: usize>(&self) -> u32 {
        // SAFETY: within the mapping, aligned (`at`), and mapped for as long as `self` is there.
        unsafe { self.at::<OFFSET>().read_volatile() }
    }

    /// Writes the register at `OFFSET`.
    pub fn write<const OFFSET: usize>(&self, value: u32) {
        // SAFETY: as in `read`; what the write does to the device is the caller's aim.
        unsafe { self.at::<OFFSET>().write_volatile(value) };
    }

    fn at<const OFFSET: usize>(&self) -> *mut u32 {
        const { assert!(OFFSET.is_multiple_of(4) && OFFSET < LENGTH, "a register within the mapping") };
        self.0.as_ptr().wrapping_add(OFFSET).cast()
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and used no more.
        let _ = unsafe { munmap(self.0.cast(), LENGTH) };
    }
}
