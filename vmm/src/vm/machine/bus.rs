//! Where a vCPU's accesses to ports and memory go: the legacy devices on fixed ports, and the PCI bus.
//! Reads that nobody answers are ones, writes are dropped, as on a PC.

use super::layout;
use super::legacy::Legacy;
use crate::vm::pci::bus::PciBus;

/// The address decoding of one VM.
pub struct Bus {
    /// Devices on fixed ports.
    pub legacy: Legacy,
    /// The PCI root bus.
    pub pci: PciBus,
}

impl Bus {
    /// `in` of `data.len()` bytes.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        let answered = (port < layout::PCI_IO_START && self.legacy.read(port, data)) || self.pci.pio_read(port, data);
        if !answered {
            data.fill(0xff);
        }
    }

    /// `out`.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        let answered = (port < layout::PCI_IO_START && self.legacy.write(port, data)) || self.pci.pio_write(port, data);
        if !answered {
            tracing::trace!(port, ?data, "write to a port that nobody has");
        }
    }

    /// A load from an address that is no RAM.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        match ecam_offset(address) {
            Some(offset) => self.pci.ecam_read(offset, data),
            None if self.pci.mmio_read(address, data) => {}
            None => data.fill(0xff),
        }
    }

    /// A store to an address that is no RAM.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        match ecam_offset(address) {
            Some(offset) => self.pci.ecam_write(offset, data),
            None if self.pci.mmio_write(address, data) => {}
            None => tracing::trace!(address, ?data, "write to memory that nobody has"),
        }
    }
}

fn ecam_offset(address: u64) -> Option<u64> {
    address.checked_sub(layout::ECAM_START).filter(|offset| *offset < layout::ECAM_SIZE)
}
