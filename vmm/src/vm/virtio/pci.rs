//! The PCI transport of virtio devices (virtio 1.2, section 4.1): modern only, two ioeventfds a queue; MSI-X, or
//! `INTA#` for a driver without (`line`). Invariant: a queue runs between `DRIVER_OK` and reset, with addresses that were checked
//! against the VM's memory; the device behind sees registers never, only [`VirtioDevice`]'s calls. No legacy interface, no
//! packed rings, no queue reset.

mod line;
mod registers;
mod state;

use std::sync::{Arc, Mutex};

use serde_json::Value;
use thiserror::Error;
use umbra_splitter::log_limit::LogLimit;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::line::{About, Gsi, Line, Pin};
use self::registers::{Common, QueueRegisters, RegisterWrite, Status};
use super::device::{QueueResources, QueueState, VirtioDevice};
use crate::base::error::chain;
use crate::base::lock::lock;
use crate::base::pci_address::Slot;
use crate::base::pci_config::{COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE};
use crate::vm::interrupt::{self, Doorbell, Interrupts};
use crate::vm::pci::config::{CapabilityError, ConfigSpace, Identity, STATUS, STATUS_INTERRUPT, memory_bar};
use crate::vm::pci::device::{Bar, BarChange, BarIndex, BarKind, PciDevice};
use crate::vm::pci::msix::{self, Msix};
use crate::vm::snapshot::device::StateError;

/// PCI vendor of virtio devices, and the device ID of virtio device 0 (section 4.1.2).
const VENDOR: u16 = 0x1AF4;
const DEVICE_BASE: u16 = 0x1040;
/// Transitional devices end at 0; a modern one has 1 or more (section 4.1.2.1).
const REVISION: u8 = 1;
/// Subsystem ID of modern devices: 0x40 or more (section 4.1.2.1).
const SUBSYSTEM: u16 = 0x1100;

/// The BAR of ports: notifications alone, at the same distances as in memory. A driver takes the first capability of a kind that it can
/// use, so that Linux kicks by a port.
const PORTS: u8 = 1;
/// Least size of it, as of any BAR of ports.
const LEAST_PORTS: u64 = 4;

/// The BAR of memory and its parts, a page or more each.
const BAR: u8 = 0;
const BAR_SIZE: u64 = 0x8000;
const COMMON: u32 = 0x0000;
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PBA: u32 = 0x6000;
const PART_SIZE: u32 = 0x1000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Most queues: as many as MSI-X vectors fit into the table's part, but for the configuration vector.
const MAX_QUEUES: usize = 511;

/// Interrupt pin (PCI 3.0, section 6.2.4).
const INTA: u8 = 1;

/// Capability ID and types (section 4.1.4).
const CAPABILITY_VENDOR: u8 = 0x09;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI: u8 = 5;
/// Offsets in the PCI configuration access capability.
const PCI_CFG_BAR: u16 = 4;
const PCI_CFG_DATA: u16 = 16;

/// Driver and device follow the specification's version 1.
const F_VERSION_1: u64 = 1 << 32;
/// Interrupts and kicks are suppressed by event index.
const F_EVENT_IDX: u64 = 1 << 29;

/// Errors of making a transport.
#[derive(Debug, Error)]
pub enum Error {
    /// An eventfd could not be made.
    #[error("create an eventfd for a virtio queue")]
    EventFd(#[source] std::io::Error),
    /// The MSI-X vectors could not be made.
    #[error("set up MSI-X of a virtio device")]
    Msix(#[from] msix::Error),
    /// Too many queues.
    #[error("{0} queues in a virtio device; {MAX_QUEUES} are possible")]
    TooManyQueues(usize),
    /// The capabilities do not fit (cannot happen with the fixed set of them).
    #[error("lay out the configuration space of a virtio device")]
    Capability(#[from] CapabilityError),
}

/// Why a queue cannot start; the device then needs a reset.
#[derive(Debug, Error)]
enum StartError {
    #[error("size or addresses of the queue are wrong")]
    Invalid(#[source] virtio_queue::Error),
    #[error("the queue's rings are not in the VM's memory")]
    OutOfMemory,
    #[error("duplicate an eventfd")]
    EventFd(#[source] std::io::Error),
    #[error("the device refuses")]
    Device(#[source] super::device::Error),
}

/// Where the guest's writes to notification addresses are turned into eventfd signals without an exit.
trait Kicks: Send {
    fn bind(&self, kick: &EventFd, doorbell: Doorbell) -> Result<(), interrupt::Error>;
    fn unbind(&self, kick: &EventFd, doorbell: Doorbell) -> Result<(), interrupt::Error>;
}

impl Kicks for Arc<Interrupts> {
    fn bind(&self, kick: &EventFd, doorbell: Doorbell) -> Result<(), interrupt::Error> {
        self.bind_kick(kick, doorbell)
    }

    fn unbind(&self, kick: &EventFd, doorbell: Doorbell) -> Result<(), interrupt::Error> {
        self.unbind_kick(kick, doorbell)
    }
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    name: String,
    device: Arc<Mutex<dyn VirtioDevice>>,
    memory: GuestMemoryMmap,
    kicks: Box<dyn Kicks>,
    config: ConfigSpace,
    power_on: ConfigSpace,
    msix_capability: u16,
    pci_capability: u16,
    msix: Msix,
    common: Common,
    /// One a queue.
    queues: Vec<Kick>,
    /// Where `INTA#` goes.
    pin: Arc<dyn Pin>,
    /// `INTA#`, while a driver uses it.
    line: Option<Line>,
    /// Signalled where the driver wants no interrupt; nobody listens.
    silent: EventFd,
    /// Bounds the warnings about what the driver does wrong.
    log: LogLimit,
}

/// A queue's kick.
struct Kick {
    event: EventFd,
    /// Where KVM watches for it: in memory, and at a port.
    bound: [Option<Doorbell>; 2],
    running: bool,
}

impl VirtioPci {
    /// The function of `device`, which the event loop has as a subscriber too, for slot `slot`; `name` is for logs.
    pub fn new(
        name: String,
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: GuestMemoryMmap,
        (interrupts, slot): (&Arc<Interrupts>, Slot),
    ) -> Result<Self, Error> {
        let queues = lock(&device).queue_sizes().len();
        if queues > MAX_QUEUES {
            return Err(Error::TooManyQueues(queues));
        }
        // `MAX_QUEUES` is far below 2^16.
        let vectors = u16::try_from(queues + 1).unwrap_or(u16::MAX);
        let msix = Msix::new(interrupts, vectors)?;
        let pin = Arc::new(Gsi(Arc::clone(interrupts), Interrupts::intx_gsi(slot.get())));
        Self::with_parts(name, device, memory, (msix, pin), Box::new(Arc::clone(interrupts)))
    }

    fn with_parts(
        name: String,
        device: Arc<Mutex<dyn VirtioDevice>>,
        memory: GuestMemoryMmap,
        (msix, pin): (Msix, Arc<dyn Pin>),
        kicks: Box<dyn Kicks>,
    ) -> Result<Self, Error> {
        let (device_id, sizes, features) = {
            let device = lock(&device);
            (device.device_id(), device.queue_sizes().to_vec(), device.features() | F_VERSION_1)
        };
        let kick = |_: &u16| {
            let event = EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?;
            Ok(Kick { event, bound: [None; 2], running: false })
        };
        let queues = sizes.iter().map(kick).collect::<Result<_, Error>>()?;
        let (config, msix_capability, pci_capability) = config_space(device_id, &msix, sizes.len())?;
        Ok(Self {
            name,
            device,
            memory,
            kicks,
            power_on: config.clone(),
            config,
            msix_capability,
            pci_capability,
            common: Common::new(features, &sizes, msix.count()),
            msix,
            queues,
            pin,
            line: None,
            silent: EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?,
            log: LogLimit::default(),
        })
    }

    /// The eventfd of an interrupt: that of the MSI-X vector that the driver chose, or of the line.
    fn call(&self, about: About, vector: u16) -> &EventFd {
        match &self.line {
            Some(line) => line.call(about),
            None => self.msix.event(vector).unwrap_or(&self.silent),
        }
    }

    fn config_call(&self) -> &EventFd {
        self.call(About::Config, self.common.config_vector())
    }

    /// The driver runs without MSI-X: it is interrupted by the line.
    fn use_line(&mut self) {
        if self.msix.enabled() || self.line.is_some() {
            return;
        }
        match Line::new(Arc::clone(&self.pin), self.is_line_disabled()) {
            Ok(line) => {
                self.line = Some(line);
                self.set_config_vector();
            }
            Err(error) => self.log.warn(format_args!("{}: its line interrupt: {error}", self.name)),
        }
    }

    fn is_line_disabled(&self) -> bool {
        self.config.command() & COMMAND_INTX_DISABLE != 0
    }

    /// The driver has switched to MSI-X while it runs.
    fn leave_line(&mut self) {
        if self.msix.enabled() && self.line.take().is_some() {
            self.set_config_vector();
            (0..self.common.queue_count()).for_each(|index| self.restart_queue(index));
        }
    }

    fn set_config_vector(&mut self) {
        match self.config_call().try_clone() {
            Ok(call) => lock(&self.device).set_config_interrupt(call),
            Err(error) => tracing::error!("{}: duplicate the configuration interrupt: {error}", self.name),
        }
    }

    fn common_write(&mut self, offset: u32, data: &[u8]) {
        match self.common.write(offset, data) {
            RegisterWrite::Done => {}
            RegisterWrite::ConfigVector => self.set_config_vector(),
            RegisterWrite::QueueVector(index) => self.restart_queue(index),
            RegisterWrite::QueueEnabled(index) => {
                if self.common.status().contains(Status::DRIVER_OK) {
                    self.start_or_fail(index, None);
                }
            }
            RegisterWrite::FeaturesOk(accepted) => lock(&self.device).set_features(accepted),
            RegisterWrite::DriverOk => self.start(),
            RegisterWrite::Reset => self.reset_device(),
        }
    }

    fn start(&mut self) {
        tracing::debug!("{}: driver is ready, features {:#x}", self.name, self.common.accepted());
        self.use_line();
        for index in self.common.enabled_queues() {
            self.start_or_fail(index, None);
        }
    }

    /// The driver has chosen another vector; a running queue goes on with it.
    fn restart_queue(&mut self, index: u16) {
        if !self.queues.get(usize::from(index)).is_some_and(|queue| queue.running) {
            return;
        }
        let state = self.stop_queue(index);
        if state.is_some() {
            self.start_or_fail(index, state);
        }
    }

    fn start_or_fail(&mut self, index: u16, state: Option<QueueState>) {
        let Some(registers) = self.common.queue(index) else { return };
        if let Err(error) = self.start_queue(index, registers, state) {
            self.log.warn(format_args!("{}: queue {index}: {}", self.name, chain(&error)));
            self.fail();
        }
    }

    fn start_queue(
        &mut self,
        index: u16,
        registers: QueueRegisters,
        state: Option<QueueState>,
    ) -> Result<(), StartError> {
        let queue = checked_queue(&registers, self.common.accepted() & F_EVENT_IDX != 0, &self.memory)?;
        let call = self.call(About::Queue, registers.vector).try_clone().map_err(StartError::EventFd)?;
        let place = &mut self.queues[usize::from(index)];
        let kick = place.event.try_clone().map_err(StartError::EventFd)?;
        let resources = QueueResources { memory: self.memory.clone(), queue, kick, call };
        lock(&self.device).start_queue(index, resources, state).map_err(StartError::Device)?;
        place.running = true;
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        self.queues[usize::from(index)].running = false;
        lock(&self.device).stop_queue(index)
    }

    /// Shows the driver that only a reset helps (section 2.1.1).
    fn fail(&mut self) {
        self.common.set_needs_reset();
        // Fails only when 2^64 - 2 interrupts wait: then one waits anyway.
        let _ = self.config_call().write(1);
    }

    fn reset_device(&mut self) {
        tracing::debug!("{}: reset by the driver", self.name);
        for index in 0..self.common.queue_count() {
            self.stop_queue(index);
            // Kicks of the old life mean nothing; empty already is fine.
            let _ = self.queues[usize::from(index)].event.read();
        }
        lock(&self.device).reset();
        self.common.reset();
        self.line = None;
        self.set_config_vector();
    }

    /// Writes that KVM did not turn into a signal: through the PCI configuration capability, or without KVM.
    fn notify(&self, offset: u32) {
        if let Some(queue) = self.queues.get((offset / NOTIFY_MULTIPLIER) as usize) {
            // Fails only when 2^64 - 2 kicks wait: then one waits anyway.
            let _ = queue.event.write(1);
        }
    }

    fn region_read(&mut self, offset: u32, data: &mut [u8]) {
        data.fill(0);
        match region(offset) {
            (COMMON, at) => {
                let (needs_reset, generation) = {
                    let device = lock(&self.device);
                    (device.needs_reset(), device.config_generation())
                };
                if needs_reset {
                    self.common.set_needs_reset();
                }
                self.common.read(at, generation, data);
            }
            (DEVICE, at) => lock(&self.device).config_read(at, data),
            (MSIX_TABLE, at) => self.msix.table_read(at.into(), data),
            (MSIX_PBA, at) => self.msix.pba_read(at.into(), data),
            // For the line alone.
            (ISR, 0) => data[..1].fill(self.line.as_ref().map_or(0, Line::take_status)),
            _ => {}
        }
    }

    fn region_write(&mut self, offset: u32, data: &[u8]) {
        match region(offset) {
            (COMMON, at) => self.common_write(at, data),
            (DEVICE, at) => lock(&self.device).config_write(at, data),
            (NOTIFY, at) => self.notify(at),
            (MSIX_TABLE, at) => self.msix.table_write(at.into(), data),
            _ => {}
        }
    }

    /// The BAR access that the PCI configuration capability asks for (section 4.1.4.9): BAR, offset and length.
    fn pci_access(&self) -> Option<(BarIndex, u64, usize)> {
        let mut fields = [0; 12];
        self.config.read(self.pci_capability + PCI_CFG_BAR, &mut fields);
        let word = |at: usize| u32::from_le_bytes([fields[at], fields[at + 1], fields[at + 2], fields[at + 3]]);
        let (offset, length) = (word(4), word(8));
        let bar = self.config.bars().bars().iter().find(|bar| bar.index.0 == fields[0])?;
        let inside = u64::from(offset) + u64::from(length) <= bar.size;
        (matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length) && inside).then_some((
            bar.index,
            offset.into(),
            length as usize,
        ))
    }

    fn is_pci_data(&self, offset: u16) -> bool {
        (self.pci_capability + PCI_CFG_DATA..self.pci_capability + PCI_CFG_DATA + 4).contains(&offset)
    }
}

impl PciDevice for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }

    fn bars(&self) -> Vec<Bar> {
        self.config.bars().bars().to_vec()
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if self.is_pci_data(offset)
            && let Some((bar, at, length)) = self.pci_access()
        {
            let mut value = [0; 4];
            self.bar_read(bar, at, &mut value[..length]);
            data.copy_from_slice(&value[..data.len().min(4)]);
            return;
        }
        self.config.read(offset, data);
        if self.line.as_ref().is_some_and(Line::is_pending)
            && let Some(status) = STATUS.checked_sub(offset).and_then(|at| data.get_mut(usize::from(at)))
        {
            *status |= STATUS_INTERRUPT;
        }
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        let before = self.config.command();
        let changes = self.config.write(offset, data);
        // It may not touch memory any more, as Linux says to all devices before kexec. Nothing of this life goes on, for what comes
        // behind kexec lets it again before it resets it. (A driver that has never let it is served: old ones do not.)
        let is_stopped = before & !self.config.command() & COMMAND_BUS_MASTER != 0;
        if is_stopped && self.common.status().contains(Status::DRIVER_OK) {
            self.reset_device();
        }
        if let Some(line) = &self.line {
            line.set_disabled(self.is_line_disabled());
        }
        let control = self.msix_capability + u16::from(msix::CONTROL_OFFSET);
        if (offset..).take(data.len()).any(|at| at == control || at == control + 1) {
            let mut bytes = [0; 2];
            self.config.read(control, &mut bytes);
            self.msix.set_control(u16::from_le_bytes(bytes));
            self.leave_line();
        }
        if self.is_pci_data(offset)
            && let Some((bar, at, length)) = self.pci_access()
        {
            self.bar_write(bar, at, &data[..length.min(data.len())]);
        }
        changes
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        match bar {
            BarIndex(PORTS) => data.fill(0),
            _ => self.region_read(u32::try_from(offset).unwrap_or(u32::MAX), data),
        }
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        match bar {
            BarIndex(PORTS) => self.notify(offset),
            _ => self.region_write(offset, data),
        }
    }

    fn bar_moved(&mut self, bar: BarIndex, base: Option<u64>) {
        for (queue, index) in self.queues.iter_mut().zip(0u64..) {
            let bound = &mut queue.bound[usize::from(bar.0 == PORTS)];
            if let Some(doorbell) = bound.take()
                && let Err(error) = self.kicks.unbind(&queue.event, doorbell)
            {
                self.log.warn(format_args!("{}: {error}", self.name));
            }
            let Some(base) = base else { continue };
            let offset = index * u64::from(NOTIFY_MULTIPLIER);
            let doorbell = match bar {
                BarIndex(PORTS) => Doorbell::Port(base + offset),
                _ => Doorbell::Memory(base + u64::from(NOTIFY) + offset),
            };
            match self.kicks.bind(&queue.event, doorbell) {
                Ok(()) => *bound = Some(doorbell),
                // Slower, not wrong: the write exits to `notify`.
                Err(error) => self.log.warn(format_args!("{}: {error}", self.name)),
            }
        }
    }

    fn reset(&mut self) {
        self.reset_device();
        self.msix.reset();
        self.config = self.power_on.clone();
    }

    fn save(&mut self) -> Result<Value, StateError> {
        self.save_state()
    }

    fn restore(&mut self, state: Value) -> Result<Vec<BarChange>, StateError> {
        self.restore_state(state)
    }

    fn restored(&mut self) {
        self.interrupt_all();
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        for bar in [BAR, PORTS] {
            self.bar_moved(BarIndex(bar), None);
        }
    }
}

/// The part of the BAR that `offset` lies in, and where in it.
fn region(offset: u32) -> (u32, u32) {
    let start = match offset {
        MSIX_TABLE..MSIX_PBA => MSIX_TABLE,
        MSIX_PBA.. => MSIX_PBA,
        _ => offset / PART_SIZE * PART_SIZE,
    };
    (start, offset - start)
}

fn checked_queue(registers: &QueueRegisters, event_idx: bool, memory: &GuestMemoryMmap) -> Result<Queue, StartError> {
    let mut queue = Queue::new(registers.max_size).map_err(StartError::Invalid)?;
    queue.try_set_size(registers.size).map_err(StartError::Invalid)?;
    queue.try_set_desc_table_address(GuestAddress(registers.descriptors)).map_err(StartError::Invalid)?;
    queue.try_set_avail_ring_address(GuestAddress(registers.driver)).map_err(StartError::Invalid)?;
    queue.try_set_used_ring_address(GuestAddress(registers.device)).map_err(StartError::Invalid)?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    queue.is_valid(memory).then_some(queue).ok_or(StartError::OutOfMemory)
}

/// Class codes by virtio device ID, for `lspci` and for kernels that look at them.
fn class(device_id: u16) -> (u8, u8, u8) {
    match device_id {
        1 => (0x02, 0x00, 0x00),
        2 => (0x01, 0x80, 0x00),
        3 => (0x07, 0x80, 0x00),
        25 => (0x04, 0x01, 0x00),
        _ => (0xFF, 0x00, 0x00),
    }
}

/// Configuration space of a device with so many queues, and where the MSI-X and PCI access capabilities are.
fn config_space(device_id: u16, msix: &Msix, queues: usize) -> Result<(ConfigSpace, u16, u16), CapabilityError> {
    let identity = Identity {
        id: (VENDOR, DEVICE_BASE + device_id),
        subsystem: (VENDOR, SUBSYSTEM),
        class: class(device_id),
        revision: REVISION,
        interrupt_pin: INTA,
    };
    let size = (queues as u64 * u64::from(NOTIFY_MULTIPLIER)).next_power_of_two().max(LEAST_PORTS);
    let ports = Bar { index: BarIndex(PORTS), kind: BarKind::Io, size };
    let mut config = ConfigSpace::new(identity, &[memory_bar(BAR, BAR_SIZE), ports]);
    let body = msix.capability((BAR, MSIX_TABLE), (BAR, MSIX_PBA));
    let msix_at = config.add_capability(msix::CAPABILITY_ID, &body, &msix::CAPABILITY_WRITABLE)?;
    for (kind, offset) in [(TYPE_COMMON, COMMON), (TYPE_ISR, ISR), (TYPE_DEVICE, DEVICE)] {
        config.add_capability(CAPABILITY_VENDOR, &capability(kind, 16, (BAR, offset), PART_SIZE), &[])?;
    }
    let by_port = capability(TYPE_NOTIFY, 20, (PORTS, 0), u32::try_from(size).unwrap_or(u32::MAX));
    for notify in [by_port, capability(TYPE_NOTIFY, 20, (BAR, NOTIFY), PART_SIZE)] {
        let body = [&notify[..], &NOTIFY_MULTIPLIER.to_le_bytes()].concat();
        config.add_capability(CAPABILITY_VENDOR, &body, &[])?;
    }
    let mut access = capability(TYPE_PCI, 20, (BAR, 0), 0).to_vec();
    access.extend([0; 4]);
    // BAR, offset and length are the driver's to write; the data window is handled above.
    let writable = [0, 0, 0xFF, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF];
    let pci_at = config.add_capability(CAPABILITY_VENDOR, &access, &writable)?;
    Ok((config, msix_at.into(), pci_at.into()))
}

/// `struct virtio_pci_cap` behind ID and next pointer (section 4.1.4).
fn capability(kind: u8, length: u8, (bar, offset): (u8, u32), size: u32) -> [u8; 14] {
    let mut body = [0; 14];
    body[..3].copy_from_slice(&[length, kind, bar]);
    body[6..10].copy_from_slice(&offset.to_le_bytes());
    body[10..].copy_from_slice(&size.to_le_bytes());
    body
}

#[cfg(test)]
mod tests;
