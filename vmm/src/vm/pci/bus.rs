//! The root bus of a VM: configuration by ECAM and by ports 0xCF8/0xCFC (PCI 3.0, section 3.2.2.3.2), and
//! the decoding of BARs. Invariant: decoded ranges are disjoint and inside the bus's windows, wherever a guest
//! points a BAR; one that would break this is not decoded, so that no device can cover the VM's memory.
//! There are no bridges, no multi-function devices and no expansion ROMs.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::allocator::Allocator;
use super::config::{BAR0, ConfigSpace, Identity};
use super::device::{Bar, BarChange, BarIndex, BarKind, PciDevice};
use crate::base::lock::lock;
use crate::base::pci_address::{DEVICES, Slot};
use crate::vm::snapshot::device::{self, StateError};

/// Size of the ECAM window of one bus: 32 slots, 8 functions, 4 KiB each.
pub const ECAM_SIZE: u64 = 1 << 20;
/// `CONFIG_ADDRESS`, 4 bytes; `CONFIG_DATA` is behind it.
const CONFIG_ADDRESS: u16 = 0xCF8;
const CONFIG_DATA: Range<u16> = 0xCFC..0xD00;
/// `CONFIG_ADDRESS`: the access goes to configuration space.
const CONFIG_ENABLE: u32 = 1 << 31;
/// Least alignment of memory BARs, so that a device's BAR does not share a page with another's.
const PAGE: u64 = 4096;

/// A device on the bus.
pub type SharedDevice = Arc<Mutex<dyn PciDevice>>;

/// Where BARs may decode.
#[derive(Clone, Debug)]
pub struct Windows {
    /// Memory below 4 GiB.
    pub memory32: Range<u64>,
    /// Memory above 4 GiB; may be empty: then large BARs must fit below.
    pub memory64: Range<u64>,
    /// I/O ports.
    pub io: Range<u64>,
}

/// Errors of adding a device.
#[derive(Debug, Error)]
pub enum Error {
    /// The slot is taken.
    #[error("PCI slot {0} is taken")]
    SlotTaken(u8),
    /// A window is full.
    #[error("{device}: no room for BAR {bar} of {size:#x} bytes in the VM's {window} window")]
    NoRoom {
        /// The device.
        device: String,
        /// Index of its BAR.
        bar: u8,
        /// Size of the BAR.
        size: u64,
        /// Which window: `I/O`, `32-bit memory` or `64-bit memory`.
        window: &'static str,
    },
}

/// Which of the two decoders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Space {
    Memory,
    Io,
}

/// A decoded BAR.
#[derive(Clone, Debug)]
struct Decoded {
    range: Range<u64>,
    slot: Slot,
    bar: BarIndex,
}

/// The decoded BARs of both spaces, each sorted by address.
#[derive(Debug, Default)]
struct Decoder {
    memory: Vec<Decoded>,
    io: Vec<Decoded>,
}

impl Decoder {
    fn list(&mut self, space: Space) -> &mut Vec<Decoded> {
        match space {
            Space::Memory => &mut self.memory,
            Space::Io => &mut self.io,
        }
    }

    fn find(&self, space: Space, address: u64) -> Option<&Decoded> {
        let list = match space {
            Space::Memory => &self.memory,
            Space::Io => &self.io,
        };
        let index = list.partition_point(|decoded| decoded.range.end <= address);
        list.get(index).filter(|decoded| decoded.range.contains(&address))
    }

    fn remove(&mut self, slot: Slot, bar: Bar) {
        self.list(space(bar.kind)).retain(|decoded| decoded.slot != slot || decoded.bar != bar.index);
    }

    /// Adds a range unless it overlaps another.
    fn insert(&mut self, slot: Slot, bar: Bar, range: Range<u64>) -> bool {
        let list = self.list(space(bar.kind));
        let index = list.partition_point(|decoded| decoded.range.end <= range.start);
        if list.get(index).is_some_and(|next| next.range.start < range.end) {
            return false;
        }
        list.insert(index, Decoded { range, slot, bar: bar.index });
        true
    }
}

fn space(kind: BarKind) -> Space {
    match kind {
        BarKind::Io => Space::Io,
        BarKind::Memory32 { .. } | BarKind::Memory64 { .. } => Space::Memory,
    }
}

/// Addresses given out as firmware would.
#[derive(Debug)]
struct Firmware {
    memory32: Allocator,
    memory64: Allocator,
    io: Allocator,
}

impl Firmware {
    fn assign(&mut self, device: &str, bar: Bar) -> Result<u64, Error> {
        let size = if bar.kind == BarKind::Io { bar.size } else { bar.size.max(PAGE) };
        let (address, window) = match bar.kind {
            BarKind::Io => (self.io.take(size), "I/O"),
            BarKind::Memory32 { .. } => (self.memory32.take(size), "32-bit memory"),
            BarKind::Memory64 { .. } => {
                (self.memory64.take(size).or_else(|| self.memory32.take(size)), "64-bit memory")
            }
        };
        let device = device.to_owned();
        address.ok_or(Error::NoRoom { device, bar: bar.index.0, size: bar.size, window })
    }

    fn give_back(&mut self, bar: Bar, address: u64) {
        match bar.kind {
            BarKind::Io => self.io.give_back(address),
            BarKind::Memory32 { .. } => self.memory32.give_back(address),
            BarKind::Memory64 { .. } => {
                self.memory64.give_back(address);
                self.memory32.give_back(address);
            }
        }
    }
}

/// A snapshot's part of the bus.
#[derive(Debug, Serialize, Deserialize)]
pub struct BusState {
    config_address: u32,
    /// The devices by slot, each with its name and state.
    devices: Vec<(u8, String, Value)>,
}

/// A device and the addresses that it got when it was added.
struct Added {
    device: SharedDevice,
    assigned: Vec<(Bar, u64)>,
}

/// The root bus. All methods take `&self`: vCPU threads share it.
///
/// Locks are taken in the order device, then decoder; a BAR access gives the decoder's lock back before it
/// takes the device's.
pub struct PciBus {
    windows: Windows,
    slots: RwLock<[Option<Added>; DEVICES as usize]>,
    decoder: RwLock<Decoder>,
    firmware: Mutex<Firmware>,
    config_address: Mutex<u32>,
}

impl PciBus {
    /// A bus with a host bridge in slot 0.
    pub fn new(windows: Windows) -> Self {
        let firmware = Firmware {
            memory32: Allocator::new(windows.memory32.clone()),
            memory64: Allocator::new(windows.memory64.clone()),
            io: Allocator::new(windows.io.clone()),
        };
        let mut slots = [const { None }; DEVICES as usize];
        slots[0] = Some(Added { device: Arc::new(Mutex::new(HostBridge::new())), assigned: Vec::new() });
        Self {
            windows,
            slots: RwLock::new(slots),
            decoder: RwLock::default(),
            firmware: Mutex::new(firmware),
            config_address: Mutex::new(0),
        }
    }

    /// The lowest free slot.
    pub fn free_slot(&self) -> Option<Slot> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        Slot::all().find(|slot| slots[usize::from(slot.get())].is_none())
    }

    /// Puts `device` into `slot` and gives its BARs addresses, as firmware does; decoding stays off until the
    /// guest turns it on.
    pub fn add(&self, slot: Slot, device: SharedDevice) -> Result<(), Error> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let place = &mut slots[usize::from(slot.get())];
        if place.is_some() {
            return Err(Error::SlotTaken(slot.get()));
        }
        let assigned = self.assign(&device)?;
        program(&mut *lock(&device), &assigned);
        *place = Some(Added { device, assigned });
        Ok(())
    }

    /// All devices back to their state after power-on, with the addresses that they got first.
    pub fn reset(&self) {
        *lock(&self.config_address) = 0;
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        for slot in Slot::all() {
            let Some(Added { device, assigned }) = &slots[usize::from(slot.get())] else { continue };
            let mut device = lock(device);
            for &(bar, _) in assigned {
                self.decode(slot, &mut *device, BarChange { bar, base: None });
            }
            device.reset();
            program(&mut *device, assigned);
        }
    }

    /// The state of all devices; no vCPU runs.
    ///
    /// # Errors
    /// One of them cannot be saved.
    pub fn save(&self) -> Result<BusState, StateError> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let mut devices = Vec::new();
        for (slot, added) in (0u8..).zip(slots.iter()) {
            let Some(added) = added else { continue };
            let mut device = lock(&added.device);
            let state = device.save()?;
            devices.push((slot, device.name().to_owned(), state));
        }
        Ok(BusState { config_address: *lock(&self.config_address), devices })
    }

    /// Puts a saved state into the devices, which are as they were made; no vCPU has run.
    ///
    /// # Errors
    /// There are other devices, or one cannot take its state.
    pub fn restore(&self, state: BusState) -> Result<(), StateError> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        *lock(&self.config_address) = state.config_address;
        if slots.iter().flatten().count() != state.devices.len() {
            return Err(StateError::new("the PCI bus", "has other devices than when it was saved"));
        }
        for (slot, name, state) in state.devices {
            let missing = || StateError::new(&name, "is not where it was when it was saved");
            let place = Slot::new(slot).ok_or_else(missing)?;
            let added = slots.get(usize::from(slot)).and_then(Option::as_ref).ok_or_else(missing)?;
            let mut device = lock(&added.device);
            if device.name() != name {
                return Err(missing());
            }
            for change in device.restore(state)? {
                self.decode(place, &mut *device, change);
            }
        }
        Ok(())
    }

    /// All devices are restored, and interrupts are delivered.
    pub fn restored(&self) {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots.iter().flatten().for_each(|added| lock(&added.device).restored());
    }

    fn assign(&self, device: &SharedDevice) -> Result<Vec<(Bar, u64)>, Error> {
        let (name, bars) = {
            let device = lock(device);
            (device.name().to_owned(), device.bars())
        };
        let mut firmware = lock(&self.firmware);
        let mut assigned = Vec::new();
        for bar in bars {
            match firmware.assign(&name, bar) {
                Ok(address) => assigned.push((bar, address)),
                Err(error) => {
                    assigned.iter().for_each(|&(bar, address)| firmware.give_back(bar, address));
                    return Err(error);
                }
            }
        }
        Ok(assigned)
    }

    fn device(&self, slot: Slot) -> Option<SharedDevice> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots[usize::from(slot.get())].as_ref().map(|added| Arc::clone(&added.device))
    }

    /// Acts on a change of decoding, with the device's lock held.
    fn decode(&self, slot: Slot, device: &mut dyn PciDevice, change: BarChange) {
        let BarChange { bar, base } = change;
        let mut decoder = self.decoder.write().unwrap_or_else(PoisonError::into_inner);
        decoder.remove(slot, bar);
        // Old mappings must be gone before another device may take the range.
        device.bar_moved(bar.index, None);
        let Some(base) = base else { return };
        let range = base.checked_add(bar.size).map(|end| base..end).filter(|range| self.in_window(bar.kind, range));
        if range.is_some_and(|range| decoder.insert(slot, bar, range)) {
            device.bar_moved(bar.index, Some(base));
        } else {
            let name = device.name();
            tracing::debug!(
                "{name}: BAR {} at {base:#x} is outside of the bus's windows or in use, not decoded",
                bar.index.0
            );
        }
    }

    fn in_window(&self, kind: BarKind, range: &Range<u64>) -> bool {
        let inside = |window: &Range<u64>| window.start <= range.start && range.end <= window.end;
        match kind {
            BarKind::Io => inside(&self.windows.io),
            BarKind::Memory32 { .. } => inside(&self.windows.memory32),
            BarKind::Memory64 { .. } => inside(&self.windows.memory32) || inside(&self.windows.memory64),
        }
    }

    /// Reads ECAM at byte `offset` of its window.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        let chunk = data.len().clamp(1, 4);
        for (piece, at) in data.chunks_mut(chunk).zip((offset..).step_by(chunk)) {
            match ecam_target(at) {
                Some((slot, register)) => self.config_read(slot, register, piece),
                None => piece.fill(0xFF),
            }
        }
    }

    /// Writes ECAM at byte `offset` of its window.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        let chunk = data.len().clamp(1, 4);
        for (piece, at) in data.chunks(chunk).zip((offset..).step_by(chunk)) {
            if let Some((slot, register)) = ecam_target(at) {
                self.config_write(slot, register, piece);
            }
        }
    }

    fn config_read(&self, slot: Slot, register: u16, data: &mut [u8]) {
        data.fill(0xFF);
        if !aligned(register, data.len()) {
            return;
        }
        if let Some(device) = self.device(slot) {
            lock(&device).config_read(register, data);
        }
    }

    fn config_write(&self, slot: Slot, register: u16, data: &[u8]) {
        if !aligned(register, data.len()) {
            return;
        }
        if let Some(device) = self.device(slot) {
            let mut device = lock(&device);
            for change in device.config_write(register, data) {
                self.decode(slot, &mut *device, change);
            }
        }
    }

    /// Reads guest physical memory; false if no BAR decodes `address`.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool {
        self.access(Space::Memory, address, data.len(), |device, bar, offset| device.bar_read(bar, offset, data))
    }

    /// Writes guest physical memory; false if no BAR decodes `address`.
    pub fn mmio_write(&self, address: u64, data: &[u8]) -> bool {
        self.access(Space::Memory, address, data.len(), |device, bar, offset| device.bar_write(bar, offset, data))
    }

    /// Reads a port; false if it is none of the bus's.
    pub fn pio_read(&self, port: u16, data: &mut [u8]) -> bool {
        if port == CONFIG_ADDRESS && data.len() == 4 {
            data.copy_from_slice(&lock(&self.config_address).to_le_bytes());
            return true;
        }
        if CONFIG_DATA.contains(&port) {
            match self.config_target(port) {
                Some((slot, register)) => self.config_read(slot, register, data),
                None => data.fill(0xFF),
            }
            return true;
        }
        self.access(Space::Io, port.into(), data.len(), |device, bar, offset| device.bar_read(bar, offset, data))
    }

    /// Writes a port; false if it is none of the bus's.
    pub fn pio_write(&self, port: u16, data: &[u8]) -> bool {
        if port == CONFIG_ADDRESS
            && let Ok(bytes) = data.try_into()
        {
            *lock(&self.config_address) = u32::from_le_bytes(bytes);
            return true;
        }
        if CONFIG_DATA.contains(&port) {
            if let Some((slot, register)) = self.config_target(port) {
                self.config_write(slot, register, data);
            }
            return true;
        }
        self.access(Space::Io, port.into(), data.len(), |device, bar, offset| device.bar_write(bar, offset, data))
    }

    fn config_target(&self, port: u16) -> Option<(Slot, u16)> {
        let address = *lock(&self.config_address);
        let [register, function, bus, _] = address.to_le_bytes();
        if address & CONFIG_ENABLE == 0 || bus != 0 || function & 0b111 != 0 {
            return None;
        }
        Some((Slot::new(function >> 3)?, u16::from(register & !0b11) + (port - CONFIG_DATA.start)))
    }

    fn access(
        &self,
        space: Space,
        address: u64,
        length: usize,
        act: impl FnOnce(&mut dyn PciDevice, BarIndex, u64),
    ) -> bool {
        let decoder = self.decoder.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Decoded { range, slot, bar }) = decoder.find(space, address).cloned() else { return false };
        drop(decoder);
        if range.end - address < length as u64 {
            return false;
        }
        let Some(device) = self.device(slot) else { return false };
        act(&mut *lock(&device), bar, address - range.start);
        true
    }
}

fn aligned(register: u16, length: usize) -> bool {
    matches!(length, 1 | 2 | 4) && usize::from(register).is_multiple_of(length)
}

/// Slot and register of an ECAM offset on bus 0, function 0.
fn ecam_target(offset: u64) -> Option<(Slot, u16)> {
    let function = offset >> 12 & 0b111;
    let slot = u8::try_from(offset >> 15).ok().and_then(Slot::new)?;
    let register = u16::try_from(offset & 0xFFF).ok()?;
    (function == 0).then_some((slot, register))
}

/// Writes the addresses into the BARs.
fn program(device: &mut dyn PciDevice, assigned: &[(Bar, u64)]) {
    for &(bar, address) in assigned {
        let offset = BAR0 + u16::from(bar.index.0) * 4;
        let bytes = address.to_le_bytes();
        device.config_write(offset, &bytes[..4]);
        if matches!(bar.kind, BarKind::Memory64 { .. }) {
            device.config_write(offset + 4, &bytes[4..]);
        }
    }
}

/// The host bridge: a header and nothing behind it.
struct HostBridge(ConfigSpace);

impl HostBridge {
    fn new() -> Self {
        let identity = Identity {
            // Red Hat's generic PCI Express host bridge, which no kernel has quirks for.
            id: (0x1B36, 0x0008),
            subsystem: (0x1AF4, 0x1100),
            class: (0x06, 0x00, 0x00),
            revision: 0,
            interrupt_pin: 0,
        };
        Self(ConfigSpace::new(identity, &[]))
    }
}

impl PciDevice for HostBridge {
    fn name(&self) -> &str {
        "host bridge"
    }

    fn bars(&self) -> Vec<Bar> {
        Vec::new()
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        self.0.write(offset, data)
    }

    fn bar_read(&mut self, _: BarIndex, _: u64, data: &mut [u8]) {
        data.fill(0xFF);
    }

    fn bar_write(&mut self, _: BarIndex, _: u64, _: &[u8]) {}

    fn bar_moved(&mut self, _: BarIndex, _: Option<u64>) {}

    fn reset(&mut self) {
        *self = Self::new();
    }

    fn save(&mut self) -> Result<Value, StateError> {
        device::save(self.name(), &self.0.image())
    }

    fn restore(&mut self, state: Value) -> Result<Vec<BarChange>, StateError> {
        let image: Vec<u8> = device::restore(self.name(), state)?;
        self.0.restore(&image).ok_or_else(|| StateError::new("host bridge", "is another one"))
    }
}

#[cfg(test)]
#[path = "bus_tests.rs"]
mod tests;
