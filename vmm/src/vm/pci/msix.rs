//! MSI-X (PCI 3.0, section 6.8.2): message control, vector table and pending bits of one function, over any
//! source of vectors. A vector is unmasked when MSI-X is enabled and neither the function nor the vector is
//! masked. Interrupts are the eventfds' business: nothing here is on the path of one.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::vm::interrupt::{self, Interrupts, MsiMessage, MsiVector};

/// Capability ID.
pub const CAPABILITY_ID: u8 = 0x11;
/// Offset of message control behind the capability's start.
pub const CONTROL_OFFSET: u8 = 2;
/// Most vectors of a function (section 6.8.2.3).
pub const MAX_VECTORS: u16 = 2048;
/// Size of a table entry.
pub const ENTRY_SIZE: usize = 16;

/// Message control: MSI-X is on.
const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const CONTROL_MASK: u16 = 1 << 14;
/// Vector control: the vector is masked.
const VECTOR_MASK: u32 = 1;

/// Bits of the capability's body (behind ID and next pointer) that a guest can write.
pub const CAPABILITY_WRITABLE: [u8; 2] = (CONTROL_ENABLE | CONTROL_MASK).to_le_bytes();

/// Errors of MSI-X set-up.
#[derive(Debug, Error)]
pub enum Error {
    /// Too many vectors.
    #[error("{0} MSI-X vectors; a function has at most {MAX_VECTORS}")]
    TooMany(u16),
    /// A vector could not be made.
    #[error("make an MSI-X vector")]
    Vector(#[source] interrupt::Error),
}

/// A source of one message-signalled interrupt; starts masked.
pub trait Vector: Send {
    /// A write of 1 is one interrupt; counted while masked.
    fn event(&self) -> &EventFd;
    /// Interrupts go to `message` from now on, those that waited included.
    fn unmask(&mut self, message: MsiMessage) -> Result<(), interrupt::Error>;
    /// Holds interrupts back.
    fn mask(&mut self) -> Result<(), interrupt::Error>;
    /// An interrupt waits behind the mask.
    fn is_pending(&self) -> bool;
}

impl Vector for MsiVector {
    fn event(&self) -> &EventFd {
        self.event()
    }

    fn unmask(&mut self, message: MsiMessage) -> Result<(), interrupt::Error> {
        self.unmask(message)
    }

    fn mask(&mut self) -> Result<(), interrupt::Error> {
        self.mask()
    }

    fn is_pending(&self) -> bool {
        self.is_pending()
    }
}

/// A row of the table.
struct Entry {
    message: MsiMessage,
    masked: bool,
    vector: Box<dyn Vector>,
}

impl Entry {
    fn bytes(&self) -> [u8; ENTRY_SIZE] {
        let mut bytes = [0; ENTRY_SIZE];
        bytes[..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.data.to_le_bytes());
        bytes[12..].copy_from_slice(&u32::from(self.masked).to_le_bytes());
        bytes
    }

    fn write(&mut self, dword: usize, value: u32) {
        let value64 = u64::from(value);
        match dword {
            // The two lowest address bits are fixed 0.
            0 => self.message.address = self.message.address >> 32 << 32 | value64 & !0b11,
            1 => self.message.address = value64 << 32 | self.message.address & 0xFFFF_FFFF,
            2 => self.message.data = value,
            _ => self.masked = value & VECTOR_MASK != 0,
        }
    }
}

/// A snapshot's part.
#[derive(Debug, Serialize, Deserialize)]
pub struct MsixState {
    control: u16,
    table: Vec<u8>,
    /// Vectors with an interrupt behind their mask.
    pending: Vec<u16>,
}

/// MSI-X of one function.
pub struct Msix {
    entries: Vec<Entry>,
    enabled: bool,
    function_masked: bool,
}

impl Msix {
    /// MSI-X with `count` vectors of the VM.
    pub fn new(interrupts: &Arc<Interrupts>, count: u16) -> Result<Self, Error> {
        if count > MAX_VECTORS {
            return Err(Error::TooMany(count));
        }
        let make = |_| interrupts.msi_vector().map(|vector| Box::new(vector) as Box<dyn Vector>);
        let vectors: Result<_, _> = (0..count).map(make).collect();
        vectors.map(Self::from_vectors).map_err(Error::Vector)
    }

    /// MSI-X over given vectors, at most [`MAX_VECTORS`].
    pub fn from_vectors(vectors: Vec<Box<dyn Vector>>) -> Self {
        let entry = |vector| Entry { message: MsiMessage::default(), masked: true, vector };
        Self { entries: vectors.into_iter().map(entry).collect(), enabled: false, function_masked: false }
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        // At most `MAX_VECTORS` by construction.
        u16::try_from(self.entries.len()).unwrap_or(MAX_VECTORS)
    }

    /// The eventfd of a vector.
    pub fn event(&self, vector: u16) -> Option<&EventFd> {
        self.entries.get(usize::from(vector)).map(|entry| entry.vector.event())
    }

    /// MSI-X is on.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Size of the table in bytes.
    pub fn table_size(&self) -> u64 {
        self.entries.len() as u64 * ENTRY_SIZE as u64
    }

    /// Size of the pending bit array in bytes.
    pub fn pba_size(&self) -> u64 {
        u64::from(self.count()).div_ceil(64) * 8
    }

    /// The capability's body, with table and pending bits at (BAR, offset).
    pub fn capability(&self, table: (u8, u32), pba: (u8, u32)) -> [u8; 10] {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&self.control().to_le_bytes());
        body[2..6].copy_from_slice(&(table.1 | u32::from(table.0)).to_le_bytes());
        body[6..].copy_from_slice(&(pba.1 | u32::from(pba.0)).to_le_bytes());
        body
    }

    /// Message control.
    pub fn control(&self) -> u16 {
        let bit = |on, bit| if on { bit } else { 0 };
        self.count().saturating_sub(1) | bit(self.enabled, CONTROL_ENABLE) | bit(self.function_masked, CONTROL_MASK)
    }

    /// Writes message control.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & CONTROL_ENABLE != 0;
        self.function_masked = control & CONTROL_MASK != 0;
        (0..self.entries.len()).for_each(|index| self.apply(index));
    }

    /// Reads the table at byte `offset`; 0 behind its end.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            *byte = self.entries.get(at / ENTRY_SIZE).map_or(0, |entry| entry.bytes()[at % ENTRY_SIZE]);
        }
    }

    /// Writes the table: aligned 32 or 64 bits (section 6.8.2); others are ignored.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        let index = offset / ENTRY_SIZE;
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len()) || index >= self.entries.len() {
            return;
        }
        for (bytes, dword) in data.chunks_exact(4).zip(offset % ENTRY_SIZE / 4..) {
            let value = bytes.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte));
            self.entries[index].write(dword, value);
        }
        self.apply(index);
    }

    /// Reads the pending bits at byte `offset`.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            let first = usize::try_from(at.saturating_mul(8)).unwrap_or(usize::MAX);
            let pending = |bit: usize| {
                let entry = self.entries.get(first.saturating_add(bit));
                u8::from(entry.is_some_and(|entry| entry.vector.is_pending())) << bit
            };
            *byte = (0..8).map(pending).sum();
        }
    }

    /// Back to the state after power-on: off, all vectors masked, counted interrupts forgotten.
    pub fn reset(&mut self) {
        self.enabled = false;
        self.function_masked = false;
        for index in 0..self.entries.len() {
            self.entries[index].message = MsiMessage::default();
            self.entries[index].masked = true;
            self.apply(index);
            // Empty already: nothing waited.
            let _ = self.entries[index].vector.event().read();
        }
    }

    /// What is to be saved.
    pub fn save(&self) -> MsixState {
        let mut table = vec![0; self.entries.len() * ENTRY_SIZE];
        self.table_read(0, &mut table);
        let is_pending = |vector: &u16| self.entries[usize::from(*vector)].vector.is_pending();
        MsixState { control: self.control(), table, pending: (0..self.count()).filter(is_pending).collect() }
    }

    /// Takes what was saved. False: it is of a function with other vectors.
    pub fn restore(&mut self, state: &MsixState) -> bool {
        for (at, bytes) in (0u64..).step_by(8).zip(state.table.chunks(8)) {
            self.table_write(at, bytes);
        }
        self.set_control(state.control);
        for event in state.pending.iter().filter_map(|vector| self.event(*vector)) {
            // Fails only when 2^64 - 2 interrupts wait: then one waits anyway.
            let _ = event.write(1);
        }
        let now = self.save();
        now.control == state.control && now.table == state.table
    }

    fn apply(&mut self, index: usize) {
        let unmasked = self.enabled && !self.function_masked;
        let entry = &mut self.entries[index];
        let done = if unmasked && !entry.masked { entry.vector.unmask(entry.message) } else { entry.vector.mask() };
        if let Err(error) = done {
            // A guest can cause this (an address that KVM refuses): its interrupt is lost, the VMM goes on.
            tracing::warn!("MSI-X vector {index}: {error}");
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    /// What a vector is bound to, as the irqchip would see it.
    pub(crate) type Seen = Arc<Mutex<Option<MsiMessage>>>;

    pub(crate) struct FakeVector {
        event: EventFd,
        seen: Seen,
    }

    impl FakeVector {
        pub(crate) fn boxed() -> (Box<dyn Vector>, Seen) {
            let seen = Seen::default();
            (Box::new(Self { event: EventFd::new(EFD_NONBLOCK).unwrap(), seen: Arc::clone(&seen) }), seen)
        }
    }

    impl Vector for FakeVector {
        fn event(&self) -> &EventFd {
            &self.event
        }

        fn unmask(&mut self, message: MsiMessage) -> Result<(), interrupt::Error> {
            *self.seen.lock().unwrap() = Some(message);
            Ok(())
        }

        fn mask(&mut self) -> Result<(), interrupt::Error> {
            *self.seen.lock().unwrap() = None;
            Ok(())
        }

        fn is_pending(&self) -> bool {
            let count = self.event.read().unwrap_or(0);
            self.event.write(count).unwrap();
            count > 0
        }
    }

    fn msix(count: usize) -> (Msix, Vec<Seen>) {
        let (vectors, seen) = (0..count).map(|_| FakeVector::boxed()).unzip();
        (Msix::from_vectors(vectors), seen)
    }

    #[test]
    fn vector_is_bound_only_when_nothing_masks_it() {
        let (mut msix, seen) = msix(2);
        msix.table_write(16, &0xFEE0_1000u64.to_le_bytes());
        msix.table_write(24, &0x0000_0000_0000_0041u64.to_le_bytes());
        assert_eq!(*seen[1].lock().unwrap(), None, "off");
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK);
        assert_eq!(*seen[1].lock().unwrap(), None, "function masked");
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(*seen[1].lock().unwrap(), Some(MsiMessage { address: 0xFEE0_1000, data: 0x41 }));
        assert_eq!(*seen[0].lock().unwrap(), None, "the other is masked still");
        msix.table_write(28, &1u32.to_le_bytes());
        assert_eq!(*seen[1].lock().unwrap(), None);
        assert_eq!(msix.control(), CONTROL_ENABLE | 1);
    }

    #[test]
    fn pending_bits_show_masked_interrupts() {
        let (msix, _) = msix(10);
        msix.event(9).unwrap().write(1).unwrap();
        let mut bits = [0; 8];
        msix.pba_read(0, &mut bits);
        assert_eq!(u64::from_le_bytes(bits), 1 << 9);
    }

    #[test]
    fn vectors_come_back_with_what_waits_behind_their_masks() {
        let (mut before, _) = msix(2);
        before.table_write(0, &0xFEE0_1000u64.to_le_bytes());
        before.table_write(8, &0x41u64.to_le_bytes());
        before.set_control(CONTROL_ENABLE);
        before.event(1).unwrap().write(1).unwrap();
        let (mut after, seen) = msix(2);
        assert!(after.restore(&before.save()));
        assert_eq!(*seen[0].lock().unwrap(), Some(MsiMessage { address: 0xFEE0_1000, data: 0x41 }));
        assert_eq!(*seen[1].lock().unwrap(), None);
        assert_eq!(after.event(1).unwrap().read().unwrap(), 1);
        let (mut other, _) = msix(3);
        assert!(!other.restore(&before.save()));
    }

    #[test]
    fn reset_forgets_all() {
        let (mut msix, seen) = msix(1);
        msix.table_write(8, &7u64.to_le_bytes());
        msix.set_control(CONTROL_ENABLE);
        msix.event(0).unwrap().write(1).unwrap();
        msix.reset();
        assert_eq!(*seen[0].lock().unwrap(), None);
        assert!(msix.event(0).unwrap().read().is_err());
        let mut entry = [0; 16];
        msix.table_read(0, &mut entry);
        assert_eq!(u32::from_le_bytes(entry[12..].try_into().unwrap()), VECTOR_MASK);
    }

    proptest! {
        #[test]
        fn any_access_is_bounded(
            accesses in prop::collection::vec((any::<bool>(), 0u64..0x100, prop::collection::vec(any::<u8>(), 0..9)), 0..50),
        ) {
            let (mut msix, _) = msix(3);
            for (write, offset, mut data) in accesses {
                if write {
                    msix.table_write(offset, &data);
                } else {
                    msix.table_read(offset, &mut data);
                    msix.pba_read(offset, &mut data);
                }
            }
            let mut behind = [0xFF; 4];
            msix.table_read(48, &mut behind);
            prop_assert_eq!(behind, [0; 4]);
        }
    }
}
