//! Where a function keeps its MSI-X table and pending bits (PCI 3.0, section 6.8.2); both are emulated by
//! [`crate::vm::pci::msix`].

use std::ops::Range;

use super::bars::Emulated;
use crate::host::region::HostConfig;
use crate::vm::pci::device::BarIndex;
use crate::vm::pci::msix::{CONTROL_OFFSET, ENTRY_SIZE};

/// Length of the capability.
pub const LENGTH: u16 = 12;
/// Message control: number of vectors, less one.
const CONTROL_COUNT: u16 = 0x7FF;
const TABLE: u16 = 4;
const PENDING: u16 = 8;
/// Low bits of table and pending register: which BAR.
const BAR_MASK: u32 = 0b111;
/// BARs of a function; a higher index is reserved.
const BARS: u8 = 6;

/// The parts of an MSI-X capability that do not change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// Offset of the capability in configuration space.
    pub offset: u16,
    /// Vectors.
    pub count: u16,
    /// The table.
    pub table: Emulated,
    /// The pending bits.
    pub pending: Emulated,
}

impl MsixLayout {
    /// Reads the capability at `offset`; `None` if it points to a BAR that there cannot be.
    pub fn read(host: &dyn HostConfig, offset: u16) -> Option<Self> {
        let count = (host.config16(offset + u16::from(CONTROL_OFFSET)) & CONTROL_COUNT) + 1;
        let place = |register: u16, size: u64| {
            let value = host.config32(offset + register);
            let bar = u8::try_from(value & BAR_MASK).ok().filter(|&bar| bar < BARS)?;
            let start = u64::from(value & !BAR_MASK);
            Some(Emulated { bar: BarIndex(bar), bytes: start..start + size })
        };
        Some(Self {
            offset,
            count,
            table: place(TABLE, u64::from(count) * ENTRY_SIZE as u64)?,
            pending: place(PENDING, u64::from(count).div_ceil(64) * 8)?,
        })
    }

    /// True for bytes of configuration space that belong to it.
    pub fn contains(&self, offset: u16) -> bool {
        (self.offset..self.offset + LENGTH).contains(&offset)
    }

    /// The emulated parts.
    pub fn emulated(&self) -> [Emulated; 2] {
        [self.table.clone(), self.pending.clone()]
    }
}

/// Where an access at `offset` of `bar` lies in an emulated part.
pub fn within(part: &Emulated, bar: BarIndex, offset: u64) -> Option<u64> {
    let Range { start, end } = part.bytes;
    (part.bar == bar && (start..end).contains(&offset)).then(|| offset - start)
}
