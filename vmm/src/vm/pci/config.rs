//! Configuration space of an emulated function (PCI 3.0, chapter 6): a type 0 header, BARs with the sizing
//! protocol, and a capability list. Invariant: a guest's write changes only bits that are declared writable.
//! [`BarRegisters`] stands alone for devices whose other registers are elsewhere (VFIO).

use thiserror::Error;

use crate::base::pci_config::{BARS, COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, COMMAND_IO, COMMAND_MEMORY};

use super::device::{Bar, BarChange, BarIndex, BarKind};

/// Size of conventional configuration space; behind it reads are 0 (no extended capability).
pub const CONFIG_SIZE: usize = 256;
/// Command register: offset.
pub const COMMAND: usize = 0x04;
/// First base address register: offset.
pub const BAR0: u16 = 0x10;

/// Command bits that a guest can write.
const COMMAND_WRITABLE: u16 = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
/// Status register: offset.
pub const STATUS: u16 = 0x06;
/// Status bit, in its low byte: an interrupt is pending, whether `INTx#` is disabled or not.
pub const STATUS_INTERRUPT: u8 = 1 << 3;
/// Status bit: there is a capability list.
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3C;
const INTERRUPT_PIN: usize = 0x3D;
/// Where capabilities begin: behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// BAR flag bits (PCI 3.0, section 6.2.5.1).
const BAR_IO: u32 = 0b1;
const BAR_MEMORY64: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;

/// A capability does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("PCI capability {id:#04x} does not fit into configuration space")]
pub struct CapabilityError {
    id: u8,
}

/// What a type 0 header says about a function.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor and device ID.
    pub id: (u16, u16),
    /// Subsystem vendor and subsystem ID.
    pub subsystem: (u16, u16),
    /// Base class, sub-class, programming interface.
    pub class: (u8, u8, u8),
    /// Revision ID.
    pub revision: u8,
    /// 0: none; 1: `INTA#`.
    pub interrupt_pin: u8,
}

/// The six base address registers, which answer the sizing protocol: bits below a BAR's size read as 0.
#[derive(Clone, Debug)]
pub struct BarRegisters {
    bars: Vec<Bar>,
    /// For each register its value, its writable bits, and its fixed flags.
    registers: [Register; BARS],
}

#[derive(Clone, Copy, Debug, Default)]
struct Register {
    value: u32,
    writable: u32,
    flags: u32,
}

impl BarRegisters {
    /// Registers for `bars`, at address 0. BARs that do not fit into six registers are left out.
    pub fn new(bars: &[Bar]) -> Self {
        let mut this = Self { bars: Vec::new(), registers: [Register::default(); BARS] };
        for &bar in bars {
            let index = usize::from(bar.index.0);
            let wide = matches!(bar.kind, BarKind::Memory64 { .. });
            let mask = !(bar.size.wrapping_sub(1));
            if index + usize::from(wide) >= BARS {
                tracing::warn!("BAR {index} lies outside of the header and is left out");
                continue;
            }
            // Low and high half of the mask: truncation is the meaning.
            #[allow(clippy::cast_possible_truncation)]
            let (low, high) = (mask as u32, (mask >> 32) as u32);
            let flags = flags(bar.kind);
            this.registers[index] = Register { value: flags, writable: low & !address_flags(bar.kind), flags };
            if wide {
                this.registers[index + 1] = Register { value: 0, writable: high, flags: 0 };
            }
            this.bars.push(bar);
        }
        this
    }

    /// The BARs.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// Register `index`, 0 to 5; 0 for others.
    pub fn read(&self, index: usize) -> u32 {
        self.registers.get(index).map_or(0, |register| register.value)
    }

    /// Writes the bits of register `index` that `mask` selects.
    pub fn write(&mut self, index: usize, value: u32, mask: u32) {
        if let Some(register) = self.registers.get_mut(index) {
            let mask = mask & register.writable;
            register.value = (register.value & !mask) | (value & mask) | register.flags;
        }
    }

    /// The address in the registers of `bar`, whether decoded or not.
    pub fn address(&self, bar: Bar) -> u64 {
        let index = usize::from(bar.index.0);
        let low = u64::from(self.read(index) & self.registers.get(index).map_or(0, |r| r.writable));
        match bar.kind {
            BarKind::Memory64 { .. } => low | u64::from(self.read(index + 1)) << 32,
            _ => low,
        }
    }

    /// Where `bar` decodes when the command register holds `command`.
    pub fn decoded(&self, bar: Bar, command: u16) -> Option<u64> {
        let enable = match bar.kind {
            BarKind::Io => COMMAND_IO,
            BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => COMMAND_MEMORY,
        };
        (command & enable != 0).then(|| self.address(bar))
    }

    /// The BARs that decode differently here under `command` than in `before` under `command_before`.
    pub fn changes(&self, command: u16, before: &Self, command_before: u16) -> Vec<BarChange> {
        let decodes = |&bar: &Bar| {
            let base = self.decoded(bar, command);
            (base != before.decoded(bar, command_before)).then_some(BarChange { bar, base })
        };
        self.bars.iter().filter_map(decodes).collect()
    }
}

fn flags(kind: BarKind) -> u32 {
    let prefetch = |on| if on { BAR_PREFETCHABLE } else { 0 };
    match kind {
        BarKind::Io => BAR_IO,
        BarKind::Memory32 { prefetchable } => prefetch(prefetchable),
        BarKind::Memory64 { prefetchable } => BAR_MEMORY64 | prefetch(prefetchable),
    }
}

/// Bits of a BAR register that are never address.
fn address_flags(kind: BarKind) -> u32 {
    match kind {
        BarKind::Io => 0b11,
        BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => 0b1111,
    }
}

/// Configuration space of an emulated function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    registers: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    bars: BarRegisters,
    /// Where the pointer to the next capability goes.
    link: usize,
    /// Where the next capability goes.
    free: usize,
}

impl ConfigSpace {
    /// A header with the BARs of the function.
    pub fn new(identity: Identity, bars: &[Bar]) -> Self {
        let mut registers = [0; CONFIG_SIZE];
        registers[0x00..0x02].copy_from_slice(&identity.id.0.to_le_bytes());
        registers[0x02..0x04].copy_from_slice(&identity.id.1.to_le_bytes());
        registers[0x08] = identity.revision;
        let (base, sub, interface) = identity.class;
        registers[0x09..0x0C].copy_from_slice(&[interface, sub, base]);
        registers[0x2C..0x2E].copy_from_slice(&identity.subsystem.0.to_le_bytes());
        registers[0x2E..0x30].copy_from_slice(&identity.subsystem.1.to_le_bytes());
        registers[INTERRUPT_PIN] = identity.interrupt_pin;
        let mut writable = [0; CONFIG_SIZE];
        writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        // Software's own note (cache line size, interrupt line): no effect.
        writable[0x0C] = 0xFF;
        writable[INTERRUPT_LINE] = 0xFF;
        Self { registers, writable, bars: BarRegisters::new(bars), link: CAPABILITY_POINTER, free: FIRST_CAPABILITY }
    }

    /// Appends a capability: `body` is what follows its ID and next pointer, `writable` the bits of `body`
    /// that a guest can write (shorter: the rest is read-only). Returns the capability's offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u8, CapabilityError> {
        let at = self.free;
        let end = at + 2 + body.len();
        let offset = u8::try_from(at).map_err(|_| CapabilityError { id })?;
        if end > CONFIG_SIZE || writable.len() > body.len() {
            return Err(CapabilityError { id });
        }
        self.registers[at] = id;
        self.registers[at + 2..end].copy_from_slice(body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.registers[self.link] = offset;
        self.registers[usize::from(STATUS)] |= STATUS_CAPABILITIES;
        self.link = at + 1;
        self.free = end.next_multiple_of(4);
        Ok(offset)
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        u16::from_le_bytes([self.registers[COMMAND], self.registers[COMMAND + 1]])
    }

    /// The BARs.
    pub fn bars(&self) -> &BarRegisters {
        &self.bars
    }

    /// Reads at byte `offset`, naturally aligned; 0 behind the end.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = match bar_byte(at) {
                Some((index, shift)) => self.bars.read(index).to_le_bytes()[shift],
                None => self.registers.get(at).copied().unwrap_or(0),
            };
        }
    }

    /// Writes at byte `offset`, naturally aligned. Returns the BARs that decode differently now.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        let (bars, command) = (self.bars.clone(), self.command());
        for (&byte, at) in data.iter().zip(usize::from(offset)..) {
            if let Some((index, shift)) = bar_byte(at) {
                let shift = shift * 8;
                self.bars.write(index, u32::from(byte) << shift, 0xFF << shift);
            } else if at < CONFIG_SIZE {
                let mask = self.writable[at];
                self.registers[at] = (self.registers[at] & !mask) | (byte & mask);
            }
        }
        self.bars.changes(self.command(), &bars, command)
    }

    /// All registers as a guest reads them.
    pub fn image(&self) -> Vec<u8> {
        let mut image = vec![0; CONFIG_SIZE];
        self.read(0, &mut image);
        image
    }

    /// Writes all registers as a guest would. Returns the BARs that decode differently now; `None`: they are not those of this
    /// function.
    pub fn restore(&mut self, image: &[u8]) -> Option<Vec<BarChange>> {
        let changes = self.write(0, image);
        (self.image() == image).then_some(changes)
    }

    /// Sets a byte that only the device itself can change.
    pub fn set(&mut self, offset: u8, value: u8) {
        self.registers[usize::from(offset)] = value;
    }
}

/// The BAR register that byte `offset` of the header belongs to, and which byte of it.
fn bar_byte(offset: usize) -> Option<(usize, usize)> {
    let at = offset.checked_sub(usize::from(BAR0))?;
    (at < BARS * 4).then_some((at / 4, at % 4))
}

/// A BAR by index, for devices that list theirs by hand.
pub fn memory_bar(index: u8, size: u64) -> Bar {
    Bar { index: BarIndex(index), kind: BarKind::Memory32 { prefetchable: false }, size }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            id: (0x1AF4, 0x1041),
            subsystem: (0x1AF4, 0x0001),
            class: (0x02, 0x00, 0x00),
            revision: 1,
            interrupt_pin: 0,
        };
        let bars = [
            memory_bar(0, 0x1000),
            Bar { index: BarIndex(1), kind: BarKind::Io, size: 0x20 },
            Bar { index: BarIndex(2), kind: BarKind::Memory64 { prefetchable: true }, size: 1 << 33 },
        ];
        ConfigSpace::new(identity, &bars)
    }

    fn read32(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn header_says_who_it_is() {
        let space = space();
        assert_eq!(read32(&space, 0), 0x1041_1AF4);
        assert_eq!(read32(&space, 8), 0x0200_0001);
        assert_eq!(read32(&space, 0x2C), 0x0001_1AF4);
        assert_eq!(read32(&space, 0x100), 0);
    }

    #[test]
    fn sizing_protocol_tells_each_size() {
        let mut space = space();
        for offset in [0x10, 0x14, 0x18, 0x1C, 0x20] {
            assert!(space.write(offset, &[0xFF; 4]).is_empty(), "decoding is off");
        }
        assert_eq!(read32(&space, 0x10), 0xFFFF_F000);
        assert_eq!(read32(&space, 0x14), 0xFFFF_FFE1);
        assert_eq!(read32(&space, 0x18), 0x0000_000C);
        assert_eq!(read32(&space, 0x1C), 0xFFFF_FFFE);
        assert_eq!(read32(&space, 0x20), 0);
    }

    #[test]
    fn moves_and_enables_are_told() {
        let mut space = space();
        space.write(0x10, &0xC000_0000u32.to_le_bytes());
        space.write(0x1C, &0x40u32.to_le_bytes());
        let on = space.write(4, &COMMAND_MEMORY.to_le_bytes());
        let bases: Vec<_> = on.iter().map(|c| (c.bar.index.0, c.base)).collect();
        assert_eq!(bases, [(0, Some(0xC000_0000)), (2, Some(0x40_0000_0000))]);
        let moved = space.write(0x10, &0xC000_1000u32.to_le_bytes());
        assert_eq!(moved.len(), 1);
        assert_eq!(moved[0].base, Some(0xC000_1000));
        assert!(space.write(0x10, &0xC000_1000u32.to_le_bytes()).is_empty());
        let off = space.write(4, &0u16.to_le_bytes());
        assert!(off.iter().all(|c| c.base.is_none()) && off.len() == 2);
    }

    #[test]
    fn registers_that_a_guest_has_set_come_back_and_those_of_another_function_do_not() {
        let mut before = space();
        before.write(0x10, &0xC000_0000u32.to_le_bytes());
        before.write(0x3C, &[11]);
        before.write(4, &COMMAND_MEMORY.to_le_bytes());
        let mut after = space();
        let changes = after.restore(&before.image()).unwrap();
        assert_eq!(changes[0].base, Some(0xC000_0000));
        assert_eq!(after.image(), before.image());
        let mut other = before.image();
        other[0] ^= 1;
        assert!(space().restore(&other).is_none());
        assert!(space().restore(&[]).is_none());
    }

    #[test]
    fn capabilities_are_linked_until_full() {
        let mut space = space();
        let first = space.add_capability(0x11, &[0xFF; 10], &[0, 0xC0]).unwrap();
        let second = space.add_capability(0x09, &[1, 2, 3], &[]).unwrap();
        assert_eq!((first, second), (0x40, 0x4C));
        assert_eq!(read32(&space, 0x34), 0x40);
        assert_eq!(read32(&space, 0x40) & 0xFFFF, 0x4C11);
        assert_eq!(read32(&space, 0x4C), 0x0201_0009);
        space.write(0x43, &[0]);
        assert_eq!(read32(&space, 0x40) >> 24, 0x3F, "only the writable bits change");
        assert!(space.add_capability(0x09, &[0; 255], &[]).is_err());
    }

    proptest! {
        #[test]
        fn any_writes_leave_identity_and_flags(
            writes in prop::collection::vec((0u16..1024, any::<u32>(), prop::sample::select(vec![1usize, 2, 4])), 0..64),
        ) {
            let mut space = space();
            for (offset, value, length) in writes {
                space.write(offset * 4, &value.to_le_bytes()[..length]);
            }
            prop_assert_eq!(read32(&space, 0), 0x1041_1AF4);
            prop_assert_eq!(read32(&space, 0x10) & 0xFFF, 0);
            prop_assert_eq!(read32(&space, 0x14) & 0x1F, 1);
            prop_assert_eq!(read32(&space, 0x18), 0xC);
            for bar in space.bars().bars() {
                prop_assert_eq!(space.bars().address(*bar) % bar.size, 0);
            }
        }
    }
}
