//! Configuration space of a passed-through function: most registers are the device's, as VFIO in the host's
//! kernel shows them; what names addresses and interrupts of the *VM* is emulated (PCI 3.0, chapter 6).
//!
//! | register | |
//! | --- | --- |
//! | command | forwarded; memory and I/O enable are remembered for decoding |
//! | header type | single function |
//! | BARs | emulated |
//! | expansion ROM | hidden |
//! | interrupt line, pin | emulated: the VM's GSI, `INTA#` if the device has a line |
//! | MSI, MSI-X | emulated |
//! | power management | forwarded; a BAR decodes in D0 alone |
//! | extended: SR-IOV, ARI, resizable BAR | hidden: they name host resources |

use super::bars::Emulated;
use super::msi::Msi;
use super::msix::MsixLayout;
use crate::base::pci_address::Bdf;
use crate::base::pci_config::{BARS, COMMAND_IO, COMMAND_MEMORY};
use crate::host::capabilities::{Capabilities, POWER_CONTROL};
use crate::host::error::Error;
use crate::host::info::RegionInfo;
use crate::host::region::{COMMAND, HostConfig};
use crate::vm::pci::config::{BAR0, BarRegisters};
use crate::vm::pci::device::{Bar, BarChange};
use crate::vm::pci::msix::{self, Msix};

/// Its power state bits; 0 is D0.
const POWER_STATE: u8 = 0b11;
const HEADER_TYPE: u16 = 0x0E;
/// Header type bit: the device has several functions.
const HEADER_MULTIFUNCTION: u8 = 1 << 7;
const BARS_LAST: u16 = 0x27;
const ROM_FIRST: u16 = 0x30;
const ROM_LAST: u16 = 0x33;
const INTERRUPT_FIRST: u16 = 0x3C;
const INTERRUPT_PIN: u16 = 0x3D;
const INTERRUPT_LAST: u16 = 0x3F;

/// What a write changed beside the register.
#[derive(Debug, Default)]
pub struct Effects {
    /// BARs that decode differently.
    pub bars: Vec<BarChange>,
    /// MSI or MSI-X may have been switched on or off.
    pub interrupts: bool,
}

/// The emulated part of a function's configuration space.
pub struct Config {
    bars: BarRegisters,
    command: u16,
    line: u8,
    gsi: u8,
    pin: u8,
    power: Option<u16>,
    in_d0: bool,
    hidden: Vec<u16>,
    /// MSI, if the function has it.
    pub msi: Option<Msi>,
    /// MSI-X, if the function has it.
    pub msix: Option<(MsixLayout, Msix)>,
}

impl Config {
    /// For a function with these capabilities and BARs; `gsi` is where its `INTx#` line goes, if it has one.
    pub fn new(capabilities: &Capabilities, bars: &[Bar], gsi: Option<u8>) -> Self {
        Self {
            bars: BarRegisters::new(bars),
            command: 0,
            line: gsi.unwrap_or(0),
            gsi: gsi.unwrap_or(0),
            // The VM sees one function: its line is INTA#, whichever the host's slot uses.
            pin: u8::from(gsi.is_some()),
            power: capabilities.power,
            in_d0: true,
            hidden: capabilities.hidden.clone(),
            msi: None,
            msix: None,
        }
    }

    /// Reads, naturally aligned.
    pub fn read(&self, host: &dyn HostConfig, offset: u16, data: &mut [u8]) {
        host.read_config(offset, data);
        for (byte, at) in data.iter_mut().zip(offset..) {
            *byte = self.overlay(at, *byte);
        }
    }

    fn overlay(&self, at: u16, host: u8) -> u8 {
        match at {
            COMMAND => {
                let decode = (COMMAND_IO | COMMAND_MEMORY).to_le_bytes()[0];
                host & !decode | self.command.to_le_bytes()[0] & decode
            }
            HEADER_TYPE => host & !HEADER_MULTIFUNCTION,
            BAR0..=BARS_LAST => {
                let at = usize::from(at - BAR0);
                self.bars.read(at / 4).to_le_bytes()[at % 4]
            }
            ROM_FIRST..=ROM_LAST => 0,
            INTERRUPT_FIRST => self.line,
            INTERRUPT_PIN => self.pin,
            _ => self.overlay_capability(at, host),
        }
    }

    fn overlay_capability(&self, at: u16, host: u8) -> u8 {
        if let Some(hidden) = self.hidden.iter().find(|&&h| (h..h + 3).contains(&at)) {
            // ID (16 bits) and version (4) read as those of the null capability, the pointer to the next stays.
            return if at == hidden + 2 { host & 0xF0 } else { 0 };
        }
        if let Some(msi) = self.msi.as_ref().filter(|msi| msi.contains(at)) {
            return msi.read(at);
        }
        let Some((layout, msix)) = &self.msix else { return host };
        let control = layout.offset + u16::from(msix::CONTROL_OFFSET);
        if (control..control + 2).contains(&at) {
            msix.control().to_le_bytes()[usize::from(at - control)]
        } else {
            host
        }
    }

    /// True if this write may end decoding (command register, power state): the BARs must be taken out of the
    /// VM before the device stops answering.
    pub fn may_stop_decoding(&self, offset: u16, data: &[u8]) -> bool {
        let power = self.power.map(|p| p + POWER_CONTROL);
        if offset <= COMMAND && data.len() > usize::from(COMMAND - offset) {
            return u16::from(data[usize::from(COMMAND - offset)]) & COMMAND_MEMORY == 0;
        }
        power.is_some_and(|p| offset == p && data.first().is_some_and(|&byte| byte & POWER_STATE != 0))
    }

    /// Writes, naturally aligned (1, 2 or 4 bytes).
    pub fn write(&mut self, host: &dyn HostConfig, offset: u16, data: &[u8]) -> Effects {
        match offset {
            BAR0..=BARS_LAST => return Effects { bars: self.write_bar(offset, data), interrupts: false },
            ROM_FIRST..=ROM_LAST => return Effects::default(),
            INTERRUPT_FIRST..=INTERRUPT_LAST => {
                if offset == INTERRUPT_FIRST
                    && let Some(&line) = data.first()
                {
                    self.line = line;
                }
                return Effects::default();
            }
            _ => {}
        }
        if self.write_capability(offset, data) {
            return Effects { bars: Vec::new(), interrupts: true };
        }
        host.write_config(offset, data);
        let before = self.decoding();
        self.remember(host, offset, data);
        Effects { bars: self.bars.changes(self.decoding(), &self.bars, before), interrupts: false }
    }

    fn write_bar(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        let before = self.bars.clone();
        for (&byte, at) in data.iter().zip(usize::from(offset - BAR0)..) {
            let shift = at % 4 * 8;
            self.bars.write(at / 4, u32::from(byte) << shift, 0xFF << shift);
        }
        self.bars.changes(self.decoding(), &before, self.decoding())
    }

    /// True if the write was to an emulated capability.
    fn write_capability(&mut self, offset: u16, data: &[u8]) -> bool {
        if let Some(msi) = self.msi.as_mut().filter(|msi| msi.contains(offset)) {
            msi.write(offset, data);
            return true;
        }
        let Some((layout, msix)) = self.msix.as_mut().filter(|(layout, _)| layout.contains(offset)) else {
            return false;
        };
        let mut control = msix.control().to_le_bytes();
        let first = layout.offset + u16::from(msix::CONTROL_OFFSET);
        for (&byte, at) in data.iter().zip(offset..) {
            if let Some(place) = at.checked_sub(first).and_then(|i| control.get_mut(usize::from(i))) {
                *place = byte;
            }
        }
        msix.set_control(u16::from_le_bytes(control));
        true
    }

    /// Takes note of a forwarded write.
    fn remember(&mut self, host: &dyn HostConfig, offset: u16, data: &[u8]) {
        let mut command = self.command.to_le_bytes();
        for (&byte, at) in data.iter().zip(offset..) {
            if let Some(place) = at.checked_sub(COMMAND).and_then(|i| command.get_mut(usize::from(i))) {
                *place = byte;
            }
        }
        self.command = u16::from_le_bytes(command);
        if let Some(power) = self.power.map(|p| p + POWER_CONTROL).filter(|p| (*p..p + 4).contains(&offset)) {
            // The device may refuse a state: what it says counts.
            self.in_d0 = host.config8(power) & POWER_STATE == 0;
        }
    }

    /// The command register as far as it decodes.
    fn decoding(&self) -> u16 {
        if self.in_d0 { self.command } else { self.command & !(COMMAND_IO | COMMAND_MEMORY) }
    }

    /// Back to the state after power-on: nothing decodes, no bus mastering, no interrupt.
    pub fn reset(&mut self, host: &dyn HostConfig) {
        host.write_config(COMMAND, &[0; 2]);
        self.command = 0;
        self.line = self.gsi;
        self.bars = BarRegisters::new(self.bars.bars());
        self.in_d0 = self.power.is_none_or(|p| host.config8(p + POWER_CONTROL) & POWER_STATE == 0);
        if let Some(msi) = &mut self.msi {
            msi.reset();
        }
        if let Some((_, msix)) = &mut self.msix {
            msix.reset();
        }
    }
}

/// The BAR registers as the host shows them.
pub fn bar_registers(host: &dyn HostConfig) -> [u32; BARS] {
    let mut registers = [0; BARS];
    for (register, offset) in registers.iter_mut().zip((BAR0..).step_by(4)) {
        *register = host.config32(offset);
    }
    registers
}

/// The MSI-X layout of a function; an error if it points outside of its BARs.
pub fn msix_layout(
    (bdf, host): (Bdf, &dyn HostConfig),
    regions: &[RegionInfo; BARS],
    capabilities: &Capabilities,
) -> Result<Option<MsixLayout>, Error> {
    let Some(offset) = capabilities.msix else { return Ok(None) };
    let inside = |part: &Emulated| regions.get(usize::from(part.bar.0)).is_some_and(|bar| part.bytes.end <= bar.size);
    let layout = MsixLayout::read(host, offset).filter(|layout| layout.emulated().iter().all(inside));
    let malformed = || Error::Malformed { bdf, what: "its MSI-X table lies outside of its BARs".into() };
    layout.ok_or_else(malformed).map(Some)
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
