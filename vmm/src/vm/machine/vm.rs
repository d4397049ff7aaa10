//! A VM put together: KVM, memory, interrupts, buses, tables and kernel, in the order in which they need each
//! other. Devices come from [`crate::vm::devices`].

use std::io;
use std::sync::{Arc, Mutex, OnceLock};

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::acpi::{self, Platform};
use super::bus::Bus;
use super::coalesced::CoalescedWrites;
use super::end::End;
use super::legacy::{Backlog, Legacy, SerialError, SerialLine};
use super::memory::{self, MemorySlot, MemorySlots};
use super::panic_watch::PanicWatch;
use super::unused::Unused;
use super::vcpu::{self, Shared, Vcpus};
use super::vcpu_stats::VcpuStats;
use super::{boot, cpuid, generation_id, kvm, layout, state};
use crate::vm::interrupt::{self, Interrupts};
use crate::vm::pci::bus::{PciBus, Windows};
use crate::wire::messages::{VcpuCounts, VmSpec};

/// Errors of building a VM.
#[derive(Debug, Error)]
pub enum Error {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// Kernel, initial RAM disks, command line.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// First registers.
    #[error("set up a vCPU")]
    Registers(#[from] boot::RegistersError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] acpi::Error),
    /// VM generation ID.
    #[error(transparent)]
    GenerationId(#[from] generation_id::Error),
    /// Interrupts.
    #[error(transparent)]
    Interrupts(#[from] interrupt::Error),
    /// Serial line.
    #[error(transparent)]
    Serial(#[from] SerialError),
    /// vCPU threads.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// An eventfd.
    #[error("create an eventfd")]
    EventFd(#[source] io::Error),
    /// What belongs to the state of a vCPU.
    #[error(transparent)]
    State(#[from] state::Error),
}

impl Error {
    /// Whether kernel, initial RAM disks, command line or the size of the memory are wrong.
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Boot(why) => why.is_configuration(),
            Self::Memory(memory::Error::Size(_) | memory::Error::TooLarge(_)) => true,
            _ => false,
        }
    }
}

/// A VM; vCPUs run from [`Vm::start`] on.
pub struct Vm {
    /// KVM's VM.
    pub fd: Arc<VmFd>,
    /// The guest's memory.
    pub memory: GuestMemoryMmap,
    /// What of it the guest has given up.
    pub unused: Arc<Unused>,
    /// KVM's memory slots.
    pub slots: Arc<MemorySlots>,
    /// Interrupts towards the guest.
    pub interrupts: Arc<Interrupts>,
    /// Address decoding.
    pub bus: Arc<Bus>,
    /// How the VM ends.
    pub end: Arc<End>,
    /// COM1.
    pub serial: Arc<Mutex<SerialLine>>,
    /// What it has printed last, where it may be viewed.
    pub backlog: Option<Arc<Backlog>>,
    /// Readable when the guest says that it has panicked.
    pub panicked: EventFd,
    /// Readable when a vCPU has come to a breakpoint of [`Vcpus::watch_for_panic`].
    pub panicking: EventFd,
    /// Those breakpoints.
    pub panic_watch: Arc<PanicWatch>,
    kvm: Kvm,
    platform: Platform,
    /// What KVM counts, once vCPUs run.
    stats: OnceLock<VcpuStats>,
    /// Bytes to the serial line are handed over together.
    coalesces: bool,
    _ram: Vec<MemorySlot>,
}

fn eventfd() -> Result<EventFd, Error> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::EventFd)
}

impl Vm {
    /// Everything but PCI devices and a kernel, with `memory`, which is that of `spec` and holds zeros or what a snapshot held, and of
    /// which nothing or what the snapshot says is `unused`.
    pub fn new(spec: &VmSpec, memory: GuestMemoryMmap, unused: Unused) -> Result<Self, Error> {
        let kvm = kvm::open()?;
        let fd = kvm::create_vm(&kvm, spec.cpus)?;
        let slots = MemorySlots::new(Arc::clone(&fd), kvm.get_nr_memslots());
        let ram = slots.map_ram(&memory)?;
        let interrupts = Interrupts::new(Arc::clone(&fd))?;
        let end = Arc::new(End::new().map_err(Error::EventFd)?);

        let serial_irq = eventfd()?;
        interrupts.bind_edge(layout::COM1_IRQ, &serial_irq)?;
        let backlog =
            spec.console_socket.as_ref().map(|_| Backlog::new()).transpose().map_err(Error::EventFd)?.map(Arc::new);
        let serial = SerialLine::new(&spec.console, backlog.clone(), serial_irq)?;
        let serial = Arc::new(Mutex::new(serial));
        let panicked = eventfd()?;
        let signal = panicked.try_clone().map_err(Error::EventFd)?;
        let panicking = eventfd()?;
        let panic_watch = Arc::new(PanicWatch::new(panicking.try_clone().map_err(Error::EventFd)?));
        let legacy = Legacy::new(Arc::clone(&fd), Arc::clone(&end), Arc::clone(&serial), signal);

        let mmio64_end = mmio64_end(&kvm)?;
        let platform = Platform { cpus: spec.cpus, mmio64_end, generation_id: spec.snapshot_of.is_some() };
        let bus = Arc::new(Bus { legacy, pci: PciBus::new(windows(mmio64_end)) });
        let (coalesces, unused) = (spec.polls_console, Arc::new(unused));
        Ok(Self {
            fd,
            memory,
            unused,
            slots,
            interrupts,
            bus,
            end,
            serial,
            backlog,
            panicked,
            panicking,
            panic_watch,
            kvm,
            platform,
            stats: OnceLock::new(),
            coalesces,
            _ram: ram,
        })
    }

    /// Loads the kernel; the vCPUs as they start it. Devices must be on the bus.
    pub fn load(&self, spec: &VmSpec) -> Result<Vec<VcpuFd>, Error> {
        let rsdp = acpi::write(&self.memory, &self.platform)?;
        if self.platform.generation_id {
            generation_id::renew(&self.memory)?;
        }
        let entry = boot::load(&self.memory, &spec.kernel, &spec.initrd, &spec.cmdline, rsdp)?;
        tracing::debug!(?entry, "kernel is loaded");
        let vcpus = self.create_vcpus()?;
        for (id, vcpu) in vcpus.iter().enumerate() {
            boot::set_up_registers(vcpu, &self.memory, (id == 0).then_some(entry))?;
        }
        Ok(vcpus)
    }

    /// The vCPUs, as after power-on but for their CPUID.
    pub fn create_vcpus(&self) -> Result<Vec<VcpuFd>, Error> {
        let supported = cpuid::supported(&self.kvm)?;
        let create = |id: u8| {
            let vcpu = self.fd.create_vcpu(id.into()).map_err(kvm::Error::ioctl("create a vCPU (KVM_CREATE_VCPU)"))?;
            let table = cpuid::for_vcpu(&self.kvm, &supported, id, self.platform.cpus);
            vcpu.set_cpuid2(&table).map_err(kvm::Error::ioctl("set CPUID (KVM_SET_CPUID2)"))?;
            Ok(vcpu)
        };
        (0..self.platform.cpus).map(create).collect()
    }

    /// Lets the vCPUs run, after `first`, which is done when all is ready for them.
    ///
    /// # Errors
    /// That of `first`, or they cannot be started.
    pub fn start<E: From<Error> + From<vcpu::Error>>(
        &self,
        vcpus: Vec<VcpuFd>,
        first: impl FnOnce() -> Result<(), E>,
    ) -> Result<Vcpus, E> {
        let _ = self.stats.set(VcpuStats::of(&vcpus));
        let shared = self.shared(&vcpus)?;
        Vcpus::start(vcpus, &shared, first)
    }

    fn shared(&self, vcpus: &[VcpuFd]) -> Result<Shared, Error> {
        let msrs = state::msr_indices(&self.kvm)?.into();
        let shared = Shared::new(&self.bus, &self.end, &self.memory, msrs, &self.panic_watch);
        let of_console = |vcpu| CoalescedWrites::of_port(layout::COM1, (&self.kvm, &self.fd, vcpu));
        let coalesced = vcpus.first().filter(|_| self.coalesces).map(of_console).transpose()?.flatten();
        vcpu::expect_kicks()?;
        Ok(shared.with_coalesced(coalesced))
    }

    /// What KVM has counted of its vCPUs.
    pub fn vcpu_counts(&self) -> VcpuCounts {
        self.stats.get().map(VcpuStats::counts).unwrap_or_default()
    }
}

/// End of the 64-bit PCI window, if the CPU can address it.
fn mmio64_end(kvm: &Kvm) -> Result<Option<u64>, Error> {
    let bits = cpuid::physical_bits(&cpuid::supported(kvm)?).min(63);
    let end = layout::PCI_MMIO64_START + layout::PCI_MMIO64_SIZE;
    Ok((end <= 1 << bits).then_some(end))
}

fn windows(mmio64_end: Option<u64>) -> Windows {
    let start64 = layout::PCI_MMIO64_START;
    Windows {
        memory32: layout::PCI_MMIO32_START..layout::PCI_MMIO32_END,
        memory64: start64..mmio64_end.unwrap_or(start64),
        io: layout::PCI_IO_START.into()..u64::from(layout::PCI_IO_LAST) + 1,
    }
}
