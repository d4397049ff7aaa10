//! ACPI's registers (ACPI 6.5, section 4.8): the PM1a block with power button and power-off by `SLP_EN`, and behind it
//! general-purpose event block 0, whose only event is another VM generation ID. An event stays until the guest has cleared it,
//! so that one that comes before the guest listens is not lost. ACPI mode is always on: `SCI_EN` reads as 1, and there is no SMI
//! command port.

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

/// `GPE0_STS` and `GPE0_EN`: the VM has another generation ID (`_E00` of the DSDT).
const GENERATION_ID: u8 = 1;

/// Offsets of the registers' bytes in the blocks.
const STATUS: u16 = 0;
const ENABLE: u16 = 2;
const CONTROL: u16 = 4;
const EVENTS: u16 = 6;

/// What a write asks the machine to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    None,
    PowerOff,
}

/// Status, enable and control register of PM1a, status and enable register of the event block.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct PowerManagement {
    status: u16,
    enable: u16,
    control: u16,
    event_status: u8,
    event_enable: u8,
}

impl PowerManagement {
    /// True while the SCI is to be asserted.
    pub(super) fn interrupts(&self) -> bool {
        self.status & self.enable != 0 || self.event_status & self.event_enable != 0
    }

    pub(super) fn press_button(&mut self) {
        self.status |= POWER_BUTTON;
    }

    /// The VM has another generation ID.
    pub(super) fn change_generation_id(&mut self) {
        self.event_status |= GENERATION_ID;
    }

    pub(super) fn read(&self, offset: u16, data: &mut [u8]) {
        let [s0, s1] = self.status.to_le_bytes();
        let [e0, e1] = self.enable.to_le_bytes();
        let [c0, c1] = (self.control | SCI_ENABLE).to_le_bytes();
        let registers = [s0, s1, e0, e1, c0, c1, self.event_status, self.event_enable];
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
                EVENTS if at == EVENTS => self.event_status &= !*byte,
                EVENTS => self.event_enable = *byte,
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
    fn another_generation_id_interrupts_until_it_is_acknowledged() {
        let mut pm = PowerManagement::default();
        pm.change_generation_id();
        assert!(!pm.interrupts(), "the guest does not listen yet");
        pm.write(EVENTS + 1, &[0xff]);
        assert!(pm.interrupts());
        assert_eq!(word(&pm, EVENTS), 0xff00 | u16::from(GENERATION_ID));
        // Neither the other block nor a zero acknowledges it.
        pm.write(STATUS, &[0xff; 2]);
        pm.write(EVENTS, &[0]);
        assert!(pm.interrupts());
        pm.write(EVENTS, &[GENERATION_ID]);
        assert!(!pm.interrupts());
        assert_eq!(word(&pm, EVENTS), 0xff00, "it is still listened for");
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
