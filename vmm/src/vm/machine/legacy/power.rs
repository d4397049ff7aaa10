//! The PM1a register block (ACPI 6.5, section 4.8.3): power button, and power-off by `SLP_EN`.
//! ACPI mode is always on, so `SCI_EN` reads as 1 and there is no SMI command port.

use serde::{Deserialize, Serialize};

/// `SLP_TYP` of the soft-off state, as `_S5` in the DSDT says.
pub const SLEEP_TYPE_S5: u8 = 5;

/// `PM1_STS` and `PM1_EN`: power button.
const POWER_BUTTON: u16 = 1 << 8;
/// Bits of `PM1_EN` that are kept: timer, global lock, power button, sleep button, clock.
const ENABLE_BITS: u16 = 1 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 10;
/// `PM1_CNT`: ACPI events raise the SCI.
const SCI_ENABLE: u16 = 1;
/// `PM1_CNT`: go to sleep now; reads as 0.
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 7;

/// Offsets of the registers' bytes in the block.
const STATUS: u16 = 0;
const ENABLE: u16 = 2;
const CONTROL: u16 = 4;

/// What a write asks the machine to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    None,
    PowerOff,
}

/// Status, enable and control register.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct PowerManagement {
    status: u16,
    enable: u16,
    control: u16,
}

impl PowerManagement {
    /// True while the SCI is to be asserted.
    pub(super) fn interrupts(&self) -> bool {
        self.status & self.enable != 0
    }

    pub(super) fn press_button(&mut self) {
        self.status |= POWER_BUTTON;
    }

    pub(super) fn read(&self, offset: u16, data: &mut [u8]) {
        let [s0, s1] = self.status.to_le_bytes();
        let [e0, e1] = self.enable.to_le_bytes();
        let [c0, c1] = (self.control | SCI_ENABLE).to_le_bytes();
        let registers = [s0, s1, e0, e1, c0, c1];
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = registers.get(at).copied().unwrap_or(0xff);
        }
    }

    pub(super) fn write(&mut self, offset: u16, data: &[u8]) -> Action {
        let mut action = Action::None;
        for (byte, at) in data.iter().zip(offset..) {
            // Which half of its register this byte is.
            let shift = at % 2 * 8;
            let (value, mask) = (u16::from(*byte) << shift, 0xff << shift);
            match at - at % 2 {
                STATUS => self.status &= !value,
                ENABLE => self.enable = (self.enable & !mask | value) & ENABLE_BITS,
                CONTROL => {
                    self.control = self.control & !mask | value & !SLEEP_ENABLE;
                    let kind = self.control >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                    if value & SLEEP_ENABLE != 0 && kind == u16::from(SLEEP_TYPE_S5) {
                        action = Action::PowerOff;
                    }
                }
                _ => {}
            }
        }
        action
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(pm: &PowerManagement, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        pm.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    #[test]
    fn the_button_interrupts_until_it_is_acknowledged() {
        let mut pm = PowerManagement::default();
        pm.press_button();
        assert!(!pm.interrupts());
        pm.write(ENABLE, &POWER_BUTTON.to_le_bytes());
        assert!(pm.interrupts());
        assert_eq!(word(&pm, STATUS), POWER_BUTTON);
        pm.write(STATUS, &POWER_BUTTON.to_le_bytes());
        assert!(!pm.interrupts());
    }

    #[test]
    fn soft_off_needs_type_and_enable() {
        let mut pm = PowerManagement::default();
        assert_eq!(word(&pm, CONTROL), SCI_ENABLE);
        let kind = u16::from(SLEEP_TYPE_S5) << SLEEP_TYPE_SHIFT;
        assert_eq!(pm.write(CONTROL, &kind.to_le_bytes()), Action::None);
        assert_eq!(pm.write(CONTROL, &SLEEP_ENABLE.to_le_bytes()), Action::None);
        assert_eq!(pm.write(CONTROL, &(kind | SLEEP_ENABLE).to_le_bytes()), Action::PowerOff);
        // Byte by byte as well.
        let [low, high] = (kind | SLEEP_ENABLE).to_le_bytes();
        assert_eq!(pm.write(CONTROL, &[low]), Action::None);
        assert_eq!(pm.write(CONTROL + 1, &[high]), Action::PowerOff);
    }
}
