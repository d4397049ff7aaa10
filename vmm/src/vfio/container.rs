//! The IOMMU side of one VM: a VFIO container whose I/O page table maps the VM's memory at its guest physical
//! addresses, for all functions passed to that VM.
//!
//! The invariant: memory is mapped after the first function was opened (which clears its bus mastering) and
//! unmapped when the last one is released, whose bus mastering has been cleared then.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::VmFd;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioDeviceFd, VfioError};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::error::Error;
use super::sysfs::HostDevice;
use crate::interrupt::Interrupts;
use crate::machine::memory::MemorySlots;
use crate::pci::address::Bdf;

/// Locked beside the VM's memory: ring buffers of other libraries and the kernel's accounting round up.
const LOCKED_SLACK: u64 = 16 << 20;

/// What passthrough needs of a VM.
#[derive(Clone)]
pub struct VmResources {
    /// The VM, with an in-kernel irqchip.
    pub vm: Arc<VmFd>,
    /// All of its memory.
    pub memory: GuestMemoryMmap,
    /// Its interrupt router.
    pub interrupts: Arc<Interrupts>,
    /// Its KVM memory slots.
    pub slots: Arc<MemorySlots>,
}

/// VFIO of one VM.
pub struct Vfio {
    container: Arc<VfioContainer>,
    resources: VmResources,
    /// Functions open now.
    open: Mutex<usize>,
}

impl Vfio {
    /// Opens a container for the VM.
    pub fn new(resources: VmResources) -> Result<Arc<Self>, Error> {
        let mut request = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
        let kvm = |source| Error::Kvm { operation: "create KVM's VFIO device (KVM_CREATE_DEVICE)", source };
        let device = resources.vm.create_device(&mut request).map_err(kvm)?;
        let container =
            VfioContainer::new(Some(Arc::new(VfioDeviceFd::new_from_kvm(device)))).map_err(container_error)?;
        Ok(Arc::new(Self { container: Arc::new(container), resources, open: Mutex::new(0) }))
    }

    /// The VM's interrupt router.
    pub(super) fn interrupts(&self) -> &Arc<Interrupts> {
        &self.resources.interrupts
    }

    /// The VM's memory slots.
    pub(super) fn slots(&self) -> &Arc<MemorySlots> {
        &self.resources.slots
    }

    /// Checks and opens a function; the VM's memory is mapped for it. Pairs with [`Self::release`].
    pub(super) fn open(&self, host: &HostDevice) -> Result<VfioDevice, Error> {
        host.check_ready()?;
        let mut open = lock(&self.open);
        let container = Arc::clone(&self.container);
        let start = Instant::now();
        let device = VfioDevice::new(&host.directory(), container, true).map_err(|e| open_error(host, e))?;
        tracing::debug!("{}: opened (reset by {:?}) in {:?}", host.bdf(), host.reset().best(), start.elapsed());
        if *open == 0 {
            self.map(host.bdf())?;
        }
        *open += 1;
        Ok(device)
    }

    /// A function's DMA has been switched off. The last one: unmaps the VM's memory.
    pub(super) fn release(&self) {
        let mut open = lock(&self.open);
        *open = open.saturating_sub(1);
        if *open == 0
            && let Err(error) = self.container.vfio_unmap_guest_memory(&self.resources.memory)
        {
            // Closing the container unmaps whatever is left.
            tracing::warn!("unmap the VM's memory for DMA: {error}");
        }
    }

    fn map(&self, bdf: Bdf) -> Result<(), Error> {
        let size: u64 = self.resources.memory.iter().map(GuestMemoryRegion::len).sum();
        raise_locked_memory(size + LOCKED_SLACK);
        let start = Instant::now();
        // SAFETY: the regions are guest memory, which is only ever accessed by volatile and atomic operations
        // and by the kernel (the contract of vm-memory), and which `self.resources` keeps mapped until after
        // `release` or the end of the container.
        let mapped = unsafe { self.container.vfio_map_guest_memory(&self.resources.memory) };
        tracing::debug!("{bdf}: {} MiB locked and mapped for DMA in {:?}", size >> 20, start.elapsed());
        mapped.map_err(|source| match &source {
            VfioError::IommuDmaMap(e) if e.errno() == libc::ENOMEM => {
                let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
                Error::LockedMemory { needed_mib: (size + LOCKED_SLACK) >> 20, limit_kib: limit >> 10 }
            }
            _ => Error::Vfio { operation: "map the VM's memory for DMA", bdf, source },
        })
    }
}

/// Raises the limit of locked memory by `bytes`, as far as this process may.
fn raise_locked_memory(bytes: u64) {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK) else { return };
    if soft == RLIM_INFINITY {
        return;
    }
    let wanted = soft.saturating_add(bytes);
    // Without CAP_SYS_RESOURCE the hard limit stays where it is.
    if setrlimit(Resource::RLIMIT_MEMLOCK, wanted, wanted.max(hard)).is_err() && hard > soft {
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, wanted.min(hard), hard);
    }
}

fn container_error(error: VfioError) -> Error {
    let path = PathBuf::from("/dev/vfio/vfio");
    match error {
        VfioError::OpenContainer(e) if e.kind() == ErrorKind::PermissionDenied => Error::Permission { path },
        VfioError::OpenContainer(source) if !is_missing(&source) => Error::Sysfs { operation: "open", path, source },
        VfioError::OpenContainer(_) => Error::NoVfio,
        // Without an IOMMU the kernel offers no type 1 driver.
        _ => Error::NoVfio,
    }
}

fn is_missing(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn open_error(host: &HostDevice, error: VfioError) -> Error {
    let (bdf, group) = (host.bdf(), host.group().unwrap_or_default());
    match error {
        VfioError::OpenGroup(e, _) if e.raw_os_error() == Some(libc::EBUSY) => Error::GroupBusy { bdf, group },
        VfioError::OpenGroup(e, _) if e.kind() == ErrorKind::PermissionDenied => {
            Error::Permission { path: format!("/dev/vfio/{group}").into() }
        }
        VfioError::GroupViable => {
            Error::GroupNotViable { bdf, group, others: host.group_obstacles().unwrap_or_default() }
        }
        VfioError::ContainerSetIOMMU(e) if e.errno() == libc::EPERM => Error::UnsafeInterrupts(bdf),
        source => Error::Vfio { operation: "open the device", bdf, source },
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
