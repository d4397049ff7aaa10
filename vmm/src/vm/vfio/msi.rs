//! The MSI capability of a function (PCI 3.0, section 6.8.1), emulated: the guest's message goes to KVM, the
//! host's kernel has its own in the device. A vector is unmasked when MSI is on, the vector is among those
//! enabled and its mask bit, where there is one, is clear.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::host::region::HostConfig;
use crate::vm::interrupt::{self, Interrupts, MsiMessage};
use crate::vm::pci::msix::Vector;

/// Capability ID.
pub const CAPABILITY_ID: u8 = 0x05;
/// Longest form: 64-bit address, mask and pending bits.
const MAX_LENGTH: usize = 24;
/// Most vectors of a function, as a power of two.
const MAX_VECTORS_LOG2: u16 = 5;

const CONTROL_OFFSET: u16 = 2;
const CONTROL: usize = CONTROL_OFFSET as usize;
/// Message control: MSI is on.
const CONTROL_ENABLE: u16 = 1;
/// Message control: vectors the device can send, log2.
const CONTROL_CAPABLE_SHIFT: u16 = 1;
/// Message control: vectors the guest enabled, log2.
const CONTROL_ENABLED_SHIFT: u16 = 4;
const CONTROL_COUNT_MASK: u16 = 0b111;
/// Message control: the address has 64 bits.
const CONTROL_64: u16 = 1 << 7;
/// Message control: there are mask bits.
const CONTROL_MASKABLE: u16 = 1 << 8;
const ADDRESS: usize = 4;

/// The MSI capability and its vectors.
pub struct Msi {
    offset: u16,
    registers: [u8; MAX_LENGTH],
    writable: [u8; MAX_LENGTH],
    vectors: Vec<Box<dyn Vector>>,
}

/// How many vectors the capability at `offset` announces.
pub fn announced(host: &dyn HostConfig, offset: u16) -> u16 {
    let control = host.config16(offset + CONTROL_OFFSET);
    1 << (control >> CONTROL_CAPABLE_SHIFT & CONTROL_COUNT_MASK).min(MAX_VECTORS_LOG2)
}

/// Vectors of the VM for an MSI capability.
pub fn vectors(interrupts: &Arc<Interrupts>, count: u16) -> Result<Vec<Box<dyn Vector>>, interrupt::Error> {
    (0..count).map(|_| interrupts.msi_vector().map(|v| Box::new(v) as Box<dyn Vector>)).collect()
}

impl Msi {
    /// The capability at `offset`; `vectors` are as many as [`announced`].
    pub fn new(host: &dyn HostConfig, offset: u16, vectors: Vec<Box<dyn Vector>>) -> Self {
        let fixed =
            host.config16(offset + CONTROL_OFFSET) & !(CONTROL_ENABLE | CONTROL_COUNT_MASK << CONTROL_ENABLED_SHIFT);
        let mut registers = [0; MAX_LENGTH];
        registers[0] = CAPABILITY_ID;
        registers[1] = host.config8(offset + 1);
        registers[CONTROL..ADDRESS].copy_from_slice(&fixed.to_le_bytes());
        let mut this = Self { offset, registers, writable: [0; MAX_LENGTH], vectors };
        let control = CONTROL_ENABLE | CONTROL_COUNT_MASK << CONTROL_ENABLED_SHIFT;
        this.allow(CONTROL, &control.to_le_bytes());
        this.allow(ADDRESS, &(!0b11u32).to_le_bytes());
        if this.control() & CONTROL_64 != 0 {
            this.allow(ADDRESS + 4, &[0xFF; 4]);
        }
        this.allow(this.data_at(), &[0xFF; 2]);
        if this.control() & CONTROL_MASKABLE != 0 {
            let bits = (1u64 << this.vectors.len()) - 1;
            this.allow(this.mask_at(), &bits.to_le_bytes()[..4]);
        }
        this
    }

    /// The bytes of configuration space that it takes.
    pub fn contains(&self, offset: u16) -> bool {
        let end = if self.control() & CONTROL_MASKABLE != 0 { self.mask_at() + 8 } else { self.mask_at() };
        (self.offset..self.offset + u16::try_from(end).unwrap_or(u16::MAX)).contains(&offset)
    }

    /// Reads a byte of configuration space; one that it [`contains`](Self::contains).
    pub fn read(&self, offset: u16) -> u8 {
        let at = usize::from(offset - self.offset);
        let pending_at = self.mask_at() + 4;
        if self.control() & CONTROL_MASKABLE != 0 && at >= pending_at {
            let first = (at - pending_at) * 8;
            let pending = |bit: usize| self.vectors.get(first + bit).is_some_and(|v| v.is_pending());
            return (0..8).map(|bit| u8::from(pending(bit)) << bit).sum();
        }
        self.registers.get(at).copied().unwrap_or(0)
    }

    /// Writes configuration space from a byte that it contains on.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (byte, at) in data.iter().zip(usize::from(offset - self.offset)..) {
            if let (Some(register), Some(mask)) = (self.registers.get_mut(at), self.writable.get(at)) {
                *register = *register & !mask | byte & mask;
            }
        }
        self.apply();
    }

    /// MSI is on.
    pub fn enabled(&self) -> bool {
        self.control() & CONTROL_ENABLE != 0
    }

    /// Eventfds of the vectors that the guest enabled.
    pub fn events(&self) -> Vec<&EventFd> {
        self.vectors.iter().take(self.active()).map(|v| v.event()).collect()
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        for (register, mask) in self.registers.iter_mut().zip(&self.writable) {
            *register &= !mask;
        }
        self.apply();
        for vector in &self.vectors {
            // Empty already: nothing waited.
            let _ = vector.event().read();
        }
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        self.writable[at..at + bits.len()].copy_from_slice(bits);
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.registers[at], self.registers[at + 1]])
    }

    fn dword(&self, at: usize) -> u32 {
        u32::from(self.word(at)) | u32::from(self.word(at + 2)) << 16
    }

    fn control(&self) -> u16 {
        self.word(CONTROL)
    }

    fn data_at(&self) -> usize {
        if self.control() & CONTROL_64 != 0 { ADDRESS + 8 } else { ADDRESS + 4 }
    }

    fn mask_at(&self) -> usize {
        self.data_at() + 4
    }

    fn active(&self) -> usize {
        let log2 = self.control() >> CONTROL_ENABLED_SHIFT & CONTROL_COUNT_MASK;
        (1usize << log2.min(MAX_VECTORS_LOG2)).min(self.vectors.len())
    }

    fn message(&self, vector: usize) -> MsiMessage {
        let high = if self.control() & CONTROL_64 != 0 { self.dword(ADDRESS + 4) } else { 0 };
        // The device replaces the low bits of the data by the vector's number.
        let low_bits = u32::try_from(self.active() - 1).unwrap_or(0);
        let number = u32::try_from(vector).unwrap_or(0);
        MsiMessage {
            address: u64::from(high) << 32 | u64::from(self.dword(ADDRESS)),
            data: u32::from(self.word(self.data_at())) & !low_bits | number,
        }
    }

    fn apply(&mut self) {
        let mask = if self.control() & CONTROL_MASKABLE != 0 { self.dword(self.mask_at()) } else { 0 };
        for index in 0..self.vectors.len() {
            let on = self.enabled() && index < self.active() && mask >> index & 1 == 0;
            let message = self.message(index);
            let vector = &mut self.vectors[index];
            if let Err(error) = if on { vector.unmask(message) } else { vector.mask() } {
                // A guest can cause this (an address that KVM refuses): its interrupt is lost, the VMM goes on.
                tracing::warn!("MSI vector {index}: {error}");
            }
        }
    }
}
