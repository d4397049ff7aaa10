//! Makes a NIC interrupt without end, as a broken one does: Intel's have a register that raises any of their interrupts
//! (interrupt cause set, ICS), which is written in a loop from outside its driver VM.

use std::error::Error;
use std::time::{Duration, Instant};

use super::registers::Registers;

/// Offset of ICS in BAR 0 (e1000, e1000e: Intel 82574 datasheet, section 10.2.4.3).
const ICS: usize = 0xC8;
/// The cause of e1000e's first receive queue, with MSI-X (bit 20), and of a received frame, without (bit 7).
const RECEIVE: u32 = 1 << 20 | 1 << 7;
/// Writes between two looks at the clock.
const BURST: u32 = 64;

/// Raises the receive interrupt of the function `bdf` for `length`. Returns how often.
///
/// # Errors
/// Its registers cannot be mapped.
pub fn storm(bdf: &str, length: Duration) -> Result<u64, Box<dyn Error>> {
    let registers = Registers::map(bdf)?;
    let (start, mut writes) = (Instant::now(), 0);
    while start.elapsed() < length {
        for _ in 0..BURST {
            registers.write::<ICS>(RECEIVE);
        }
        writes += u64::from(BURST);
    }
    Ok(writes)
}
