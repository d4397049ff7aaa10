//! Port writes that KVM collects in a ring of the VM (KVM API, `KVM_REGISTER_COALESCED_MMIO` with `KVM_CAP_COALESCED_PIO`) instead
//! of returning from `KVM_RUN` with each: they are served in their order before the next exit of any vCPU is.
//!
//! Only for a port whose writer accesses something else soon afterwards, as a Linux kernel that prints does: it asks the serial line
//! after each FIFO whether it is empty. What is written last would wait for the next exit.
//!
//! The ring of kvm-ioctls is one vCPU's, which has to be borrowed whole for it, and an exit borrows the vCPU. This one is the VM's.

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio, kvm_coalesced_mmio_ring};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use super::kvm::Error;
use crate::base::lock::lock;

/// Bytes of the ring's page.
const PAGE: usize = 4096;
/// Entries of the ring.
#[expect(clippy::cast_possible_truncation, reason = "fewer than bytes in a page")]
const ENTRIES: u32 = ((PAGE - size_of::<kvm_coalesced_mmio_ring>()) / size_of::<kvm_coalesced_mmio>()) as u32;

/// The ring of one VM.
pub struct CoalescedWrites {
    ring: Ring,
    /// Held while writes are served: their order is that of the ring, whichever vCPU finds them.
    serving: Mutex<()>,
}

impl CoalescedWrites {
    /// Has writes of a byte to `port` collected. `None`: KVM cannot.
    ///
    /// # Errors
    /// KVM refuses, or the ring cannot be mapped.
    pub fn of_port(port: u16, (kvm, vm, vcpu): (&Kvm, &VmFd, &VcpuFd)) -> Result<Option<Self>, Error> {
        if !kvm.check_extension(Cap::CoalescedPio) {
            return Ok(None);
        }
        let ring = Ring::map(vcpu)
            .map_err(|error| Error::ioctl("map the ring of coalesced writes")(kvm_ioctls::Error::new(error as i32)))?;
        vm.register_coalesced_mmio(IoEventAddress::Pio(port.into()), 1)
            .map_err(Error::ioctl("coalesce port writes (KVM_REGISTER_COALESCED_MMIO)"))?;
        Ok(Some(Self { ring, serving: Mutex::new(()) }))
    }

    /// Hands over what has been written since the last call: port and bytes of each write.
    pub fn serve(&self, mut write: impl FnMut(u16, &[u8])) {
        if self.ring.is_empty() {
            return;
        }
        let _serving = lock(&self.serving);
        while let Some(entry) = self.ring.oldest() {
            let length = usize::try_from(entry.len).map_or(entry.data.len(), |length| length.min(entry.data.len()));
            // Ports have 16 bits; KVM reports only what was registered.
            if let Ok(port) = u16::try_from(entry.phys_addr) {
                write(port, &entry.data[..length]);
            }
            // Only now: who finds the ring empty serves an exit that comes after this write.
            self.ring.remove_oldest();
        }
    }
}

/// The mapped page: KVM adds entries at `last`, we take those at `first`.
struct Ring(NonNull<kvm_coalesced_mmio_ring>);

// SAFETY: the page belongs to no thread; its indices are accessed atomically, and an entry is read only between the two.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd) -> nix::Result<Self> {
        let length = NonZeroUsize::new(PAGE).ok_or(nix::errno::Errno::EINVAL)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let position = i64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * PAGE as i64;
        // SAFETY: `vcpu` is open for the time of the call.
        let file = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
        // SAFETY: a fresh mapping at an address that the kernel chooses touches no existing memory.
        let page = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, file, position) }?;
        Ok(Self(page.cast()))
    }

    fn first(&self) -> &AtomicU32 {
        // SAFETY: inside the mapped page, aligned, alive as long as `self`, and accessed atomically by everybody.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.0.as_ptr()).first) }
    }

    fn last(&self) -> &AtomicU32 {
        // SAFETY: as for `first`.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.0.as_ptr()).last) }
    }

    fn is_empty(&self) -> bool {
        self.first().load(Ordering::Acquire) == self.last().load(Ordering::Acquire)
    }

    /// The oldest entry, which stays. To be called by one thread at a time.
    fn oldest(&self) -> Option<kvm_coalesced_mmio> {
        if self.is_empty() {
            return None;
        }
        let first = self.first().load(Ordering::Relaxed) % ENTRIES;
        // SAFETY: an entry of the mapped page, as the index is below `ENTRIES`; KVM wrote it before it moved `last` and leaves it
        // alone until `first` is moved.
        Some(unsafe {
            let entries = (&raw const (*self.0.as_ptr()).coalesced_mmio).cast::<kvm_coalesced_mmio>();
            entries.add(first as usize).read()
        })
    }

    /// Gives the place of the oldest entry back to KVM. To be called by the thread that has served it.
    fn remove_oldest(&self) {
        let first = self.first().load(Ordering::Relaxed) % ENTRIES;
        self.first().store((first + 1) % ENTRIES, Ordering::Release);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; nothing refers to the page any more.
        if let Err(error) = unsafe { munmap(self.0.cast(), PAGE) } {
            tracing::warn!("unmap the ring of coalesced writes: {error}");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cell::RefCell;

    use nix::sys::mman::mmap_anonymous;

    use super::*;

    /// A page in which the test adds entries, as KVM does.
    fn ring() -> Ring {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh mapping at an address that the kernel chooses touches no existing memory.
        let page = unsafe { mmap_anonymous(None, NonZeroUsize::new(PAGE).unwrap(), access, MapFlags::MAP_PRIVATE) };
        Ring(page.unwrap().cast())
    }

    fn add(ring: &Ring, port: u16, byte: u8) {
        let last = ring.last().load(Ordering::Relaxed);
        let entry = kvm_coalesced_mmio { phys_addr: port.into(), len: 1, data: [byte; 8], ..Default::default() };
        // SAFETY: an entry of the test's own page.
        unsafe {
            let entries = (&raw mut (*ring.0.as_ptr()).coalesced_mmio).cast::<kvm_coalesced_mmio>();
            entries.add(last as usize).write(entry);
        }
        ring.last().store((last + 1) % ENTRIES, Ordering::Release);
    }

    #[test]
    fn writes_are_served_in_order_around_the_ring_s_end() {
        let writes = CoalescedWrites { ring: ring(), serving: Mutex::new(()) };
        for round in 0..5u8 {
            (0..100).for_each(|n| add(&writes.ring, 0x3f8, n + round));
            let mut served = Vec::new();
            writes.serve(|port, data| served.push((port, data.to_vec())));
            assert!(served.into_iter().eq((0..100).map(|n| (0x3f8, vec![n + round]))));
        }
    }

    #[test]
    fn a_write_is_in_the_ring_until_it_has_been_served() {
        let writes = CoalescedWrites { ring: ring(), serving: Mutex::new(()) };
        add(&writes.ring, 0x3f8, b'x');
        // What another vCPU would see meanwhile, which serves its own exit where the ring is empty.
        let seen = RefCell::new(Vec::new());
        writes.serve(|_, _| seen.borrow_mut().push(writes.ring.is_empty()));
        assert_eq!((seen.into_inner(), writes.ring.is_empty()), (vec![false], true));
    }
}
