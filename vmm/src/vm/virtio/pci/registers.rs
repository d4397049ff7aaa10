//! The common configuration registers (virtio 1.2, section 4.1.4.3) and the device status (section 2.1), as
//! plain data: a write says what is to be done, the transport does it.
//!
//! ```text
//!   0 ──ACKNOWLEDGE, DRIVER──> features ──FEATURES_OK──> queues ──DRIVER_OK──> running
//!   ^                                                                            │
//!   └──────────────────────────────── status = 0 ────────────────────────────────┘
//! ```

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

use super::F_VERSION_1;

/// A vector field that names none.
pub(super) const NO_VECTOR: u16 = 0xFFFF;

bitflags! {
    /// Device status.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Status: u8 {
        /// Feature negotiation is done.
        const FEATURES_OK = 8;
        /// The driver is ready: queues run.
        const DRIVER_OK = 4;
        /// The device cannot go on without a reset.
        const NEEDS_RESET = 64;
        /// ACKNOWLEDGE, DRIVER and FAILED: only noted.
        const _ = 1 | 2 | 128;
    }
}

/// What a driver has set for a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) vector: u16,
    pub(super) enabled: bool,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        let vector = NO_VECTOR;
        Self { max_size, size: max_size, vector, enabled: false, descriptors: 0, driver: 0, device: 0 }
    }
}

/// What follows from a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RegisterWrite {
    /// Nothing more.
    Done,
    /// Configuration changes go to another vector.
    ConfigVector,
    /// Interrupts of this queue go to another vector.
    QueueVector(u16),
    /// This queue was enabled.
    QueueEnabled(u16),
    /// Feature negotiation ended with these features.
    FeaturesOk(u64),
    /// The driver is ready.
    DriverOk,
    /// The driver resets the device.
    Reset,
}

/// A snapshot's part.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct CommonState {
    offered: u64,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    config_vector: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

/// The registers.
#[derive(Clone, Debug)]
pub(super) struct Common {
    offered: u64,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    config_vector: u16,
    vectors: u16,
    status: Status,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

impl Common {
    pub(super) fn new(offered: u64, sizes: &[u16], vectors: u16) -> Self {
        Self {
            offered,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            config_vector: NO_VECTOR,
            vectors,
            status: Status::empty(),
            queue_select: 0,
            queues: sizes.iter().map(|&size| QueueRegisters::new(size)).collect(),
        }
    }

    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.offered, &sizes, self.vectors);
    }

    pub(super) fn save(&self) -> CommonState {
        CommonState {
            offered: self.offered,
            accepted: self.accepted,
            device_select: self.device_select,
            driver_select: self.driver_select,
            config_vector: self.config_vector,
            status: self.status.bits(),
            queue_select: self.queue_select,
            queues: self.queues.clone(),
        }
    }

    /// Takes what was saved. False: it is that of a device with other features or queues.
    pub(super) fn restore(&mut self, state: &CommonState) -> bool {
        let sizes = |queues: &[QueueRegisters]| queues.iter().map(|queue| queue.max_size).collect::<Vec<_>>();
        if state.offered != self.offered || sizes(&state.queues) != sizes(&self.queues) {
            return false;
        }
        self.accepted = state.accepted;
        (self.device_select, self.driver_select) = (state.device_select, state.driver_select);
        self.config_vector = state.config_vector;
        self.status = Status::from_bits_truncate(state.status);
        self.queue_select = state.queue_select;
        self.queues.clone_from(&state.queues);
        true
    }

    pub(super) fn status(&self) -> Status {
        self.status
    }

    pub(super) fn set_needs_reset(&mut self) {
        self.status |= Status::NEEDS_RESET;
    }

    pub(super) fn accepted(&self) -> u64 {
        self.accepted
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector
    }

    pub(super) fn queue_count(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    pub(super) fn queue(&self, index: u16) -> Option<QueueRegisters> {
        self.queues.get(usize::from(index)).copied()
    }

    pub(super) fn enabled_queues(&self) -> Vec<u16> {
        (0u16..).zip(&self.queues).filter(|(_, queue)| queue.enabled).map(|(index, _)| index).collect()
    }

    fn selected(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    /// Reads at byte `offset` with any width; 0 behind the end. The device's configuration is of this `generation`.
    pub(super) fn read(&self, offset: u32, generation: u8, data: &mut [u8]) {
        let image = self.image(generation);
        for (byte, at) in data.iter_mut().zip(offset as usize..) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    fn image(&self, generation: u8) -> [u8; 0x40] {
        let mut image = [0; 0x40];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_select.to_le_bytes());
        put(0x04, &half(self.offered, self.device_select).to_le_bytes());
        put(0x08, &self.driver_select.to_le_bytes());
        put(0x0C, &half(self.accepted, self.driver_select).to_le_bytes());
        put(0x10, &self.config_vector.to_le_bytes());
        put(0x12, &self.queue_count().to_le_bytes());
        // A field of the configuration is read under the device's lock; the size of a disk may be read in halves.
        put(0x14, &[self.status.bits(), generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size 0 (section 4.1.4.3.2).
        if let Some(queue) = self.queue(self.queue_select) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1A, &queue.vector.to_le_bytes());
            put(0x1C, &u16::from(queue.enabled).to_le_bytes());
            put(0x1E, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.driver.to_le_bytes());
            put(0x30, &queue.device.to_le_bytes());
        }
        image
    }

    /// Writes at byte `offset`. Fields are written whole, 64-bit ones in halves as well (section 4.1.3.1);
    /// other widths are ignored.
    pub(super) fn write(&mut self, offset: u32, data: &[u8]) -> RegisterWrite {
        match *data {
            [value] => self.write8(offset, value),
            [a, b] => self.write16(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if matches!(offset, 0x20 | 0x28 | 0x30) => {
                self.write32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write32(offset + 4, u32::from_le_bytes([e, f, g, h]))
            }
            _ => RegisterWrite::Done,
        }
    }

    fn write8(&mut self, offset: u32, value: u8) -> RegisterWrite {
        if offset != 0x14 {
            return RegisterWrite::Done;
        }
        if value == 0 {
            return RegisterWrite::Reset;
        }
        let mut new = Status::from_bits_truncate(value).difference(self.status | Status::NEEDS_RESET);
        // Refused features leave FEATURES_OK unset, which the driver checks (section 3.1.1).
        let unknown = self.accepted & !self.offered != 0 || self.accepted & F_VERSION_1 == 0;
        if new.contains(Status::FEATURES_OK) && unknown {
            new.remove(Status::FEATURES_OK);
        }
        if new.contains(Status::DRIVER_OK) && !self.status.contains(Status::FEATURES_OK) {
            new.remove(Status::DRIVER_OK);
        }
        self.status |= new;
        if new.contains(Status::DRIVER_OK) {
            RegisterWrite::DriverOk
        } else if new.contains(Status::FEATURES_OK) {
            RegisterWrite::FeaturesOk(self.accepted)
        } else {
            RegisterWrite::Done
        }
    }

    fn write16(&mut self, offset: u32, value: u16) -> RegisterWrite {
        let vector = if value < self.vectors { value } else { NO_VECTOR };
        let index = self.queue_select;
        match offset {
            0x10 => {
                self.config_vector = vector;
                return RegisterWrite::ConfigVector;
            }
            0x16 => self.queue_select = value,
            0x18 => self.set_queue(|queue| queue.size = value),
            0x1A => {
                if let Some(queue) = self.selected() {
                    queue.vector = vector;
                    return RegisterWrite::QueueVector(index);
                }
            }
            0x1C => {
                if let Some(queue) = self.selected().filter(|queue| value == 1 && !queue.enabled) {
                    queue.enabled = true;
                    return RegisterWrite::QueueEnabled(index);
                }
            }
            _ => {}
        }
        RegisterWrite::Done
    }

    fn write32(&mut self, offset: u32, value: u32) -> RegisterWrite {
        let low = |field: &mut u64| *field = *field >> 32 << 32 | u64::from(value);
        let high = |field: &mut u64| *field = u64::from(value) << 32 | *field & 0xFFFF_FFFF;
        match offset {
            0x00 => self.device_select = value,
            0x08 => self.driver_select = value,
            0x0C if !self.status.contains(Status::FEATURES_OK) => match self.driver_select {
                0 => low(&mut self.accepted),
                1 => high(&mut self.accepted),
                // Features above 63 are none of ours; accepting one is the driver's fault and harmless.
                _ => {}
            },
            0x20 => self.set_queue(|queue| low(&mut queue.descriptors)),
            0x24 => self.set_queue(|queue| high(&mut queue.descriptors)),
            0x28 => self.set_queue(|queue| low(&mut queue.driver)),
            0x2C => self.set_queue(|queue| high(&mut queue.driver)),
            0x30 => self.set_queue(|queue| low(&mut queue.device)),
            0x34 => self.set_queue(|queue| high(&mut queue.device)),
            _ => {}
        }
        RegisterWrite::Done
    }

    /// Changes the selected queue unless it is enabled already.
    fn set_queue(&mut self, change: impl FnOnce(&mut QueueRegisters)) {
        if let Some(queue) = self.selected().filter(|queue| !queue.enabled) {
            change(queue);
        }
    }
}

/// Half `select` of 64 feature bits; 0 from 2 on.
fn half(features: u64, select: u32) -> u32 {
    let half = match select {
        0 => features & 0xFFFF_FFFF,
        1 => features >> 32,
        _ => 0,
    };
    // At most 32 bits by the two arms above.
    u32::try_from(half).unwrap_or(0)
}
