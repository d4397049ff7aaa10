//! What KVM knows of a VM: the state of its vCPUs and chips, taken while no vCPU runs and put into a fresh VM before one
//! does.
//!
//! Invariants: time in the VM stands still between the two (TSC, KVM's clock and the timers go on where they stood, so that
//! no timer fires for the time between); whatever KVM refuses is an error with a name, and the VM is not started then.

mod chips;
mod vcpu;

use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::kvm;
pub use chips::ChipsState;
pub use vcpu::VcpuState;

/// Errors of taking or restoring the state.
#[derive(Debug, Error)]
pub enum Error {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// An MSR of the snapshot cannot be set.
    #[error("KVM does not let MSR {index:#x} be set to {value:#x}")]
    Msr {
        /// Its number.
        index: u32,
        /// Its value.
        value: u64,
    },
    /// The state is that of a VM with other vCPUs.
    #[error("the state has {have} vCPUs, the VM {should}")]
    VcpuCount {
        /// In the state.
        have: usize,
        /// In the VM.
        should: usize,
    },
    /// More MSRs than KVM takes in a call.
    #[error("make a list of MSRs")]
    MsrList,
}

impl Error {
    fn kvm(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| kvm::Error::ioctl(operation)(source).into()
    }
}

/// What KVM knows of a VM.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// Its vCPUs, by number.
    pub vcpus: Vec<VcpuState>,
    /// What they share.
    pub chips: ChipsState,
}

impl MachineState {
    /// Puts the state into `vm` with its `vcpus`, which have their CPUID and have not run.
    ///
    /// # Errors
    /// KVM refuses a part of it. The VM is of no use then.
    pub fn restore(&self, vm: &VmFd, vcpus: &[VcpuFd]) -> Result<(), Error> {
        if vcpus.len() != self.vcpus.len() {
            return Err(Error::VcpuCount { have: self.vcpus.len(), should: vcpus.len() });
        }
        if let (Some(vcpu), Some(state)) = (vcpus.first(), self.vcpus.first()) {
            state.prepare_tsc(vcpu)?;
        }
        for (vcpu, state) in vcpus.iter().zip(&self.vcpus) {
            state.restore(vcpu)?;
        }
        // Behind the local APICs: an interrupt that waits in the I/O APIC is delivered to them by this.
        self.chips.restore(vm)
    }
}

/// The MSRs of memory types (MTRRs; Intel SDM, volume 3, section 12.11): the variable ranges, the fixed ones, the default. KVM has them and
/// does not list them. Without them all memory of a restored VM would be uncached, where the IOMMU cannot make a device's accesses
/// coherent: before Linux 6.11 KVM heeds them there.
fn memory_types() -> impl Iterator<Item = u32> {
    (0x200..=0x20f).chain([0x250, 0x258, 0x259]).chain(0x268..=0x26f).chain([0x2ff])
}

/// The MSRs that hold state of a vCPU, by KVM's list, and those that it leaves out. Not all of them need be there.
///
/// # Errors
/// KVM refuses.
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let list = kvm.get_msr_index_list().map_err(Error::kvm("list the MSRs (KVM_GET_MSR_INDEX_LIST)"))?;
    let listed = list.as_slice();
    Ok(listed.iter().copied().chain(memory_types().filter(|index| !listed.contains(index))).collect())
}
