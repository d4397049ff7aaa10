//! Breakpoints on the functions with which a driver VM's kernel begins to die (`oops_enter`, `panic`): a panic is seen as its first
//! instruction is about to run, before the kernel has printed a word of it. Each character that it prints is an exit, and pvpanic comes
//! behind all of them.
//!
//! The vCPU that has come to one stands still until the device is out of the VM, or for a quarter of a second: what it would print takes
//! the processor from the recovery, and a kernel that dies is not to touch its device. Then it goes on, for its last words.
//!
//! They are the vCPU's debug registers (`KVM_SET_GUEST_DEBUG` with `KVM_GUESTDBG_USE_HW_BP`), so that nothing of the guest is changed; a
//! debugger in the guest has none of its own meanwhile. Where a function is, the driver VM's agent says; one that lies ends
//! its own life, when its kernel comes by.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug, kvm_guest_debug_arch};
use kvm_ioctls::VcpuFd;
use umbra_driver_vm::protocol::MAX_PANIC_ENTRIES;
use vmm_sys_util::eventfd::EventFd;

use crate::base::lock::lock;

/// Longest time that a vCPU stands still: the supervisor waits no longer for a device to be given up.
const STAND_STILL: Duration = Duration::from_millis(250);
/// Bits of DR7 that are always set.
const DR7_FIXED: u64 = 1 << 10;

/// The breakpoints of a VM's vCPUs.
#[derive(Debug)]
pub struct PanicWatch {
    entries: Mutex<Vec<u64>>,
    /// How often the entries were set.
    version: AtomicU32,
    /// vCPUs that have the last.
    pub(super) done: AtomicUsize,
    /// A breakpoint was hit; the others say no more.
    told: AtomicBool,
    /// Signalled when the first is hit.
    hit: EventFd,
    /// Nobody stands still any more.
    let_go: Mutex<bool>,
    changed: Condvar,
}

impl PanicWatch {
    /// No breakpoints yet. `hit` is signalled when one is hit for the first time.
    pub fn new(hit: EventFd) -> Self {
        let (entries, version) = (Mutex::default(), AtomicU32::new(0));
        let (done, told) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { entries, version, done, told, hit, let_go: Mutex::default(), changed: Condvar::new() }
    }

    /// Has all vCPUs stop at `entries`, of which [`MAX_PANIC_ENTRIES`] can be had, once each has taken them.
    pub(super) fn set(&self, entries: &[u64]) {
        *lock(&self.entries) = entries.to_vec();
        self.done.store(0, Ordering::Release);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Gives `vcpu` the breakpoints, if it has not had them: those that it has had are `version`.
    pub(super) fn arm(&self, vcpu: &VcpuFd, version: &mut u32) {
        let present = self.version.load(Ordering::Acquire);
        if *version == present {
            return;
        }
        *version = present;
        if let Err(error) = vcpu.set_guest_debug(&debug(&lock(&self.entries))) {
            tracing::debug!(%error, "a panic will be seen by its text: set breakpoints (KVM_SET_GUEST_DEBUG)");
        }
        self.done.fetch_add(1, Ordering::Release);
    }

    /// Lets vCPUs go on that stand still, and those that would.
    pub fn let_go(&self) {
        *lock(&self.let_go) = true;
        self.changed.notify_all();
    }

    /// `vcpu` has stopped at one, and stands still. It goes on without any.
    ///
    /// # Errors
    /// KVM does not take the breakpoints away, so that it would stop there for ever.
    pub(super) fn on_hit(&self, vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
        vcpu.set_guest_debug(&debug(&[]))?;
        if !self.told.swap(true, Ordering::Relaxed)
            && let Err(error) = self.hit.write(1)
        {
            tracing::warn!(%error, "tell of the guest's panic");
        }
        // Whether the wait ended in time says nothing that is of use.
        drop(self.changed.wait_timeout_while(lock(&self.let_go), STAND_STILL, |let_go| !*let_go));
        Ok(())
    }
}

/// Breakpoints at `entries`; none of them: no debugging.
fn debug(entries: &[u64]) -> kvm_guest_debug {
    let mut registers = [0; 8];
    for (n, entry) in entries.iter().enumerate().take(MAX_PANIC_ENTRIES) {
        registers[n] = *entry;
        // Enabled for all tasks (bit G), on execution (R/W and LEN are 0).
        registers[7] |= DR7_FIXED | 2 << (2 * n);
    }
    let control = if entries.is_empty() { 0 } else { KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP };
    kvm_guest_debug { control, pad: 0, arch: kvm_guest_debug_arch { debugreg: registers } }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_entry_has_a_register_and_none_switches_debugging_off() {
        let none = debug(&[]);
        assert_eq!((none.control, none.arch.debugreg), (0, [0; 8]));
        let two = debug(&[0xffff_ffff_8100_0000, 0xffff_ffff_8100_1000]);
        assert_eq!(two.arch.debugreg, [0xffff_ffff_8100_0000, 0xffff_ffff_8100_1000, 0, 0, 0, 0, 0, 0x40a]);
        assert_eq!(two.control, 0x0002_0001);
        assert_eq!(debug(&[1, 2, 3, 4, 5]).arch.debugreg, [1, 2, 3, 4, 0, 0, 0, 0x4aa]);
    }
}
