//! The IOMMU side of one VM: a VFIO container whose I/O page table maps the VM's memory at its guest physical
//! addresses, for all functions passed to that VM. Its files are opened here, or were handed over by the supervisor, which
//! keeps them for the next life.
//!
//! The invariant: memory is mapped once the first function is open (its bus mastering is off then) and
//! unmapped when the last one is released, whose bus mastering has been cleared then.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::base::lock::lock;
use crate::host::error::Error;
use crate::host::files::{DeviceFiles, Opener};
use crate::host::sysfs::HostDevice;
use crate::vm::interrupt::Interrupts;
use crate::vm::machine::memory::MemorySlots;
use crate::vm::machine::unused::Unused;

/// Memory that is locked beside the VM's, in bytes: ring buffers of other libraries, and the kernel's accounting rounds up.
const LOCKED_SLACK: u64 = 16 << 20;

/// What passthrough needs of a VM.
#[derive(Clone)]
pub struct VmResources {
    /// The VM, with an in-kernel irqchip.
    pub vm: Arc<VmFd>,
    /// All of its memory.
    pub memory: GuestMemoryMmap,
    /// What of it has been given up: no device reaches that.
    pub unused: Arc<Unused>,
    /// Its interrupt router.
    pub interrupts: Arc<Interrupts>,
    /// Its KVM memory slots.
    pub slots: Arc<MemorySlots>,
}

/// VFIO of one VM.
pub struct Vfio {
    /// KVM's side of it.
    kvm: DeviceFd,
    resources: VmResources,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    opener: Opener,
    /// Groups that KVM knows of.
    groups: Vec<Arc<OwnedFd>>,
    /// Functions open now.
    open: usize,
}

impl Vfio {
    /// For the VM, without a function yet.
    pub fn new(resources: VmResources) -> Result<Arc<Self>, Error> {
        let mut request = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
        let kvm = |source| Error::Kvm { operation: "create KVM's VFIO device (KVM_CREATE_DEVICE)", source };
        let device = resources.vm.create_device(&mut request).map_err(kvm)?;
        Ok(Arc::new(Self { kvm: device, resources, state: Mutex::default() }))
    }

    /// The VM's interrupt router.
    pub(super) fn interrupts(&self) -> &Arc<Interrupts> {
        &self.resources.interrupts
    }

    /// The VM's memory slots.
    pub(super) fn slots(&self) -> &Arc<MemorySlots> {
        &self.resources.slots
    }

    /// Opens a function. Is followed by [`Self::join`].
    pub(super) fn open(&self, host: &HostDevice) -> Result<DeviceFiles, Error> {
        lock(&self.state).opener.open(host)
    }

    /// An open function comes to the VM, whose memory is mapped for it. Pairs with [`Self::release`].
    pub(super) fn join(&self, files: &DeviceFiles) -> Result<(), Error> {
        let mut state = lock(&self.state);
        if !state.groups.iter().any(|group| Arc::ptr_eq(group, files.group())) {
            let kvm = |source| Error::Kvm { operation: "tell KVM of an IOMMU group (KVM_DEV_VFIO_FILE_ADD)", source };
            self.tell_kvm(KVM_DEV_VFIO_FILE_ADD, files.group()).map_err(kvm)?;
            state.groups.push(Arc::clone(files.group()));
        }
        if state.open == 0 {
            self.map(files)?;
        }
        state.open += 1;
        Ok(())
    }

    /// A function's DMA has been switched off. The last one: unmaps the VM's memory.
    pub(super) fn release(&self, files: &DeviceFiles) {
        let mut state = lock(&self.state);
        state.open = state.open.saturating_sub(1);
        if state.open > 0 {
            return;
        }
        if let Err(error) = files.unmap_all() {
            // Closing the container unmaps whatever is left.
            tracing::warn!("unmap the VM's memory for DMA: {error}");
        }
        for group in std::mem::take(&mut *state).groups {
            if let Err(error) = self.tell_kvm(KVM_DEV_VFIO_FILE_DEL, &group) {
                tracing::debug!("KVM_DEV_VFIO_FILE_DEL: {error}");
            }
        }
    }

    fn tell_kvm(&self, what: u32, group: &OwnedFd) -> Result<(), kvm_ioctls::Error> {
        let number = group.as_raw_fd();
        let addr = std::ptr::from_ref(&number) as u64;
        self.kvm.set_device_attr(&kvm_device_attr { flags: 0, group: KVM_DEV_VFIO_FILE, attr: what.into(), addr })
    }

    fn map(&self, files: &DeviceFiles) -> Result<(), Error> {
        let VmResources { memory, unused, .. } = &self.resources;
        let used: Vec<_> = unused.rest(memory, usize::MAX).collect();
        let size: u64 = used.iter().map(|(_, length)| *length as u64).sum();
        raise_locked_memory(size + LOCKED_SLACK);
        let (start, bdf) = (Instant::now(), files.bdf());
        let mapped = used.iter().try_for_each(|&(start, length)| {
            let address = memory.get_host_address(start).map_err(io::Error::other)?;
            // SAFETY: the part is guest memory, inside of one region, which is only ever accessed by volatile and atomic
            // operations and by the kernel (the contract of vm-memory), and which `self.resources` keeps mapped until after
            // `release` or the end of the process.
            unsafe { files.map(start.0, length as u64, address) }
        });
        tracing::debug!("{bdf}: {} MiB locked and mapped for DMA in {:?}", size >> 20, start.elapsed());
        mapped.map_err(|source| match source.raw_os_error() {
            Some(libc::ENOMEM) => {
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
