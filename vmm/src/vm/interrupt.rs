//! Interrupts towards a VM: MSI routes and INTx lines on KVM's in-kernel irqchip.
//!
//! Every interrupt is an `eventfd` bound to a GSI by `KVM_IRQFD`, so that a device, a vhost-user back-end in
//! another process and VFIO in the kernel all interrupt in the same way. A masked MSI vector is one whose
//! irqfd is not assigned: its `eventfd` keeps the count, and KVM injects it when the irqfd is assigned again
//! (`kvm_irqfd_assign` polls the eventfd), so no pending bit is lost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Number of input pins of the I/O APIC that KVM emulates; MSI routes use the GSIs behind them.
const IOAPIC_PINS: u32 = 24;
/// Number of GSIs that KVM accepts (`KVM_MAX_IRQ_ROUTES`): a bound against a device with absurd vector counts.
const MAX_GSI: u32 = 4096;
/// First I/O APIC pin that PCI INTx lines use; 16 to 23 are free of ISA devices.
const INTX_FIRST_PIN: u32 = 16;
/// Number of I/O APIC pins that PCI INTx lines share.
const INTX_PINS: u32 = 8;

/// Errors of interrupt set-up.
#[derive(Debug, Error)]
pub enum Error {
    /// An `eventfd` could not be made.
    #[error("create an eventfd for an interrupt")]
    EventFd(#[source] std::io::Error),
    /// All GSIs are taken.
    #[error("no free GSI for an MSI vector (limit {MAX_GSI})")]
    NoGsi,
    /// KVM refused the routing table.
    #[error("set the GSI routing table (KVM_SET_GSI_ROUTING)")]
    Routing(#[source] kvm_ioctls::Error),
    /// The routing table cannot hold the entries.
    #[error("build the GSI routing table")]
    Table,
    /// KVM refused an irqfd.
    #[error("bind an eventfd to GSI {gsi} (KVM_IRQFD)")]
    Irqfd {
        /// The GSI.
        gsi: u32,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refused an ioeventfd.
    #[error("bind an eventfd to the guest's {doorbell} (KVM_IOEVENTFD)")]
    Ioeventfd {
        /// Where the guest writes.
        doorbell: Doorbell,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
}

/// Where a guest's write is a signal. On AMD, KVM passes a write to a port on with less work than one to memory: the processor says
/// what was written to a port, while the instruction that writes to memory is decoded and run by KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbell {
    /// At this guest physical address.
    Memory(u64),
    /// At this port.
    Port(u64),
}

impl Doorbell {
    fn for_kvm(self) -> IoEventAddress {
        match self {
            Self::Memory(address) => IoEventAddress::Mmio(address),
            Self::Port(port) => IoEventAddress::Pio(port),
        }
    }
}

impl std::fmt::Display for Doorbell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Memory(address) => write!(f, "address {address:#x}"),
            Self::Port(port) => write!(f, "port {port:#x}"),
        }
    }
}

/// The interrupt router of one VM.
#[derive(Debug)]
pub struct Interrupts {
    vm: Arc<VmFd>,
    routes: Mutex<Vec<Option<kvm_irq_routing_entry>>>,
    /// Changes of routes are given to KVM later, all at once.
    deferred: AtomicBool,
}

/// Where an MSI is sent: address and data as the guest wrote them (PCI 3.0, section 6.8.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address, 64 bits.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

impl Interrupts {
    /// Routes the I/O APIC and PIC pins as on a PC. The in-kernel irqchip must exist.
    pub fn new(vm: Arc<VmFd>) -> Result<Arc<Self>, Error> {
        let this = Self { vm, routes: Mutex::new(Vec::new()), deferred: AtomicBool::new(false) };
        this.commit(&this.lock())?;
        Ok(Arc::new(this))
    }

    /// Gives KVM the changes of routes that `change` makes when it is done, all at once: each call costs KVM a wait for all vCPUs.
    /// What is signalled in `change` may be lost.
    pub fn at_once<T>(&self, change: impl FnOnce() -> T) -> Result<T, Error> {
        self.deferred.store(true, Ordering::Relaxed);
        let result = change();
        self.deferred.store(false, Ordering::Relaxed);
        self.commit(&self.lock())?;
        Ok(result)
    }

    /// Makes an MSI vector: an eventfd and a GSI. It is masked until [`MsiVector::unmask`].
    pub fn msi_vector(self: &Arc<Self>) -> Result<MsiVector, Error> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?;
        let mut routes = self.lock();
        let index = routes.iter().position(Option::is_none).unwrap_or(routes.len());
        let gsi = IOAPIC_PINS + u32::try_from(index).map_err(|_| Error::NoGsi)?;
        if gsi >= MAX_GSI {
            return Err(Error::NoGsi);
        }
        // A place in the table, taken by an entry that goes nowhere until the guest programs the vector.
        let entry = msi_entry(gsi, MsiMessage::default());
        if index == routes.len() {
            routes.push(Some(entry));
        } else {
            routes[index] = Some(entry);
        }
        drop(routes);
        Ok(MsiVector { interrupts: Arc::clone(self), event, gsi, message: MsiMessage::default(), assigned: false })
    }

    /// The I/O APIC pin (= GSI) of `INTA#` of the PCI device in `slot` on bus 0; `_PRT` says the same.
    pub fn intx_gsi(slot: u8) -> u32 {
        INTX_FIRST_PIN + u32::from(slot) % INTX_PINS
    }

    /// Binds `trigger` to the level-triggered `gsi`; KVM signals `resample` at the guest's EOI
    /// (`KVM_IRQFD_FLAG_RESAMPLE`).
    pub fn bind_intx(&self, gsi: u32, trigger: &EventFd, resample: &EventFd) -> Result<(), Error> {
        self.vm.register_irqfd_with_resample(trigger, resample, gsi).map_err(|source| Error::Irqfd { gsi, source })
    }

    /// Undoes [`Self::bind_intx`].
    pub fn unbind(&self, gsi: u32, trigger: &EventFd) -> Result<(), Error> {
        self.vm.unregister_irqfd(trigger, gsi).map_err(|source| Error::Irqfd { gsi, source })
    }

    /// Binds `trigger` to an edge on `gsi` (legacy devices: serial, SCI).
    pub fn bind_edge(&self, gsi: u32, trigger: &EventFd) -> Result<(), Error> {
        self.vm.register_irqfd(trigger, gsi).map_err(|source| Error::Irqfd { gsi, source })
    }

    /// Signals `event` at each write of the guest to `doorbell`, in place of an exit (`KVM_IOEVENTFD`).
    pub fn bind_kick(&self, event: &EventFd, doorbell: Doorbell) -> Result<(), Error> {
        let bound = self.vm.register_ioevent(event, &doorbell.for_kvm(), NoDatamatch);
        bound.map_err(|source| Error::Ioeventfd { doorbell, source })
    }

    /// Undoes [`Self::bind_kick`].
    pub fn unbind_kick(&self, event: &EventFd, doorbell: Doorbell) -> Result<(), Error> {
        let unbound = self.vm.unregister_ioevent(event, &doorbell.for_kvm(), NoDatamatch);
        unbound.map_err(|source| Error::Ioeventfd { doorbell, source })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<kvm_irq_routing_entry>>> {
        lock(&self.routes)
    }

    fn commit(&self, msi: &[Option<kvm_irq_routing_entry>]) -> Result<(), Error> {
        let mut entries: Vec<_> = (0..IOAPIC_PINS).map(|pin| pin_entry(pin, KVM_IRQCHIP_IOAPIC, pin)).collect();
        entries.extend((0..8).map(|pin| pin_entry(pin, KVM_IRQCHIP_PIC_MASTER, pin)));
        entries.extend((8..16).map(|pin| pin_entry(pin, KVM_IRQCHIP_PIC_SLAVE, pin - 8)));
        entries.extend(msi.iter().flatten().copied());
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| Error::Table)?;
        self.vm.set_gsi_routing(&table).map_err(Error::Routing)
    }

    fn route(&self, gsi: u32, message: Option<MsiMessage>) -> Result<(), Error> {
        let mut routes = self.lock();
        let index = (gsi - IOAPIC_PINS) as usize;
        routes[index] = message.map(|m| msi_entry(gsi, m));
        if self.deferred.load(Ordering::Relaxed) { Ok(()) } else { self.commit(&routes) }
    }
}

/// One MSI or MSI-X vector of a device.
#[derive(Debug)]
pub struct MsiVector {
    interrupts: Arc<Interrupts>,
    event: EventFd,
    gsi: u32,
    message: MsiMessage,
    assigned: bool,
}

impl MsiVector {
    /// The eventfd: a write of 1 is one interrupt. Clones of it may go to other threads and processes.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// True while an interrupt waits behind the mask (the PBA bit).
    pub fn is_pending(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::{AsRawFd, BorrowedFd};
        if self.assigned {
            return false;
        }
        // SAFETY: `self.event` owns the descriptor and outlives the borrow, which ends with this call.
        let fd = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
        poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|n| n > 0)
    }

    /// Sends interrupts to `message` from now on; those that waited are injected.
    pub fn unmask(&mut self, message: MsiMessage) -> Result<(), Error> {
        if self.message != message || !self.assigned {
            self.interrupts.route(self.gsi, Some(message))?;
            self.message = message;
        }
        if !self.assigned {
            // KVM injects what it finds in the eventfd but does not take it out, so that it would look pending again after the next
            // mask: take it out and signal it again.
            let waited = self.event.read().is_ok();
            let bound = self.interrupts.vm.register_irqfd(&self.event, self.gsi);
            bound.map_err(|source| Error::Irqfd { gsi: self.gsi, source })?;
            self.assigned = true;
            if waited {
                // Fails only when 2^64 - 2 interrupts wait: then one waits anyway.
                let _ = self.event.write(1);
            }
        }
        Ok(())
    }

    /// Holds interrupts back; the eventfd counts them.
    pub fn mask(&mut self) -> Result<(), Error> {
        if self.assigned {
            self.interrupts.unbind(self.gsi, &self.event)?;
            self.assigned = false;
        }
        Ok(())
    }
}

impl Drop for MsiVector {
    fn drop(&mut self) {
        // Best effort: the VM may be gone already, and with it every route.
        let _ = self.mask();
        let mut routes = self.interrupts.lock();
        let index = (self.gsi - IOAPIC_PINS) as usize;
        routes[index] = None;
    }
}

fn pin_entry(gsi: u32, chip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    entry
}

fn msi_entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    // The low and high half of the address: truncation is the meaning.
    #[allow(clippy::cast_possible_truncation)]
    {
        entry.u.msi.address_lo = message.address as u32;
        entry.u.msi.address_hi = (message.address >> 32) as u32;
    }
    entry.u.msi.data = message.data;
    entry
}
use crate::base::lock::lock;
