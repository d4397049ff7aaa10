//! Makes a NIC interrupt without end, as a broken one does: Intel's have a register that raises any of their interrupts
//! (interrupt cause set, ICS), which is written in a loop from outside its driver VM.

use std::error::Error;
use std::fs::OpenOptions;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Offset of ICS in BAR 0 (e1000, e1000e: Intel 82574 datasheet, section 10.2.4.3).
const ICS: usize = 0xC8;
/// The cause of e1000e's first receive queue, with MSI-X (bit 20), and of a received frame, without (bit 7).
const RECEIVE: u32 = 1 << 20 | 1 << 7;
/// What is mapped.
const LENGTH: usize = 4096;
/// Writes between two looks at the clock.
const BURST: u32 = 64;

/// Raises the receive interrupt of the function `bdf` for `length`. Returns how often. The kernel lets a function that a
/// driver holds be mapped only with `iomem=relaxed`.
///
/// # Errors
/// Its registers cannot be mapped.
pub fn storm(bdf: &str, length: Duration) -> Result<u64, Box<dyn Error>> {
    let path = format!("/sys/bus/pci/devices/{bdf}/resource0");
    let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|e| format!("open {path}: {e}"))?;
    let (length_mapped, access) = (NonZeroUsize::try_from(LENGTH)?, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    // SAFETY: a fresh mapping of device registers, at an address of the kernel's choice.
    let base = unsafe { mmap(None, length_mapped, access, MapFlags::MAP_SHARED, &file, 0) };
    let base = base.map_err(|e| format!("map {path}: {e}"))?;
    let register = base.cast::<u8>().as_ptr().wrapping_add(ICS).cast::<u32>();
    let (start, mut writes) = (Instant::now(), 0);
    while start.elapsed() < length {
        for _ in 0..BURST {
            // SAFETY: within the mapping, aligned; the register takes any value.
            unsafe { register.write_volatile(RECEIVE) };
        }
        writes += u64::from(BURST);
    }
    // SAFETY: mapped above and used no more.
    unsafe { munmap(base, LENGTH) }?;
    Ok(writes)
}
