//! Keeps a NIC from sending, as one whose transmitter hangs: Intel's have a bit that enables transmission (transmit control,
//! TCTL), which is cleared again and again from outside its driver VM, so that a reset by its driver does not help.

use std::error::Error;
use std::thread;
use std::time::{Duration, Instant};

use super::registers::Registers;

/// Offset of TCTL in BAR 0 (e1000, e1000e: Intel 82574 datasheet, section 10.2.6.1).
const TCTL: usize = 0x400;
/// Transmission is enabled (EN).
const ENABLED: u32 = 1 << 1;
/// The function does not answer.
const GONE: u32 = u32::MAX;
/// Between two looks: a driver that has reset the NIC gets few frames out in it.
const EVERY: Duration = Duration::from_millis(10);

/// Keeps the function `bdf` from sending for `length`. Returns how often transmission had been enabled.
///
/// # Errors
/// Its registers cannot be mapped.
pub fn mute(bdf: &str, length: Duration) -> Result<u64, Box<dyn Error>> {
    let registers = Registers::map(bdf)?;
    let (start, mut cleared) = (Instant::now(), 0);
    while start.elapsed() < length {
        let control = registers.read::<TCTL>();
        if control != GONE && control & ENABLED != 0 {
            registers.write::<TCTL>(control & !ENABLED);
            cleared += 1;
        }
        thread::sleep(EVERY);
    }
    Ok(cleared)
}
