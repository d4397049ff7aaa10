//! The state of one vCPU. The order of restoring is KVM's: the APIC base (special registers) before the local APIC, both
//! before the MSRs, the TSC before the timer that is measured by it, events last.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::Error;

/// The time-stamp counter.
const TSC: u32 = 0x10;
/// Milliseconds that are long to KVM: a TSC that is set to within a second of what it would be is taken for one that is meant to be in
/// step with it, and is not set (`kvm_synchronize_tsc`).
const FAR: u64 = 10_000;
/// Cycles in a millisecond where KVM does not say: as many as no processor has.
const FAST_KHZ: u32 = 10_000_000;
/// The deadline of the local APIC's timer, in cycles of the TSC.
const TSC_DEADLINE: u32 = 0x6e0;
/// Most MSRs in a call, below KVM's own limit of 256.
const MSRS_AT_ONCE: usize = 128;

/// The state of a vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Numbers and values.
    msrs: Vec<(u32, u64)>,
    /// Cycles of the TSC in a millisecond; `None` where KVM does not say.
    tsc_khz: Option<u32>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Takes the state of `vcpu`, which is between two instructions (KVM has completed its last exit), with the MSRs of `indices`
    /// that can be read.
    ///
    /// # Errors
    /// KVM refuses.
    pub fn take(vcpu: &VcpuFd, indices: &[u32]) -> Result<Self, Error> {
        Ok(Self {
            // First: KVM works off what has been signalled to the local APIC before it answers.
            mp_state: vcpu.get_mp_state().map_err(Error::kvm("KVM_GET_MP_STATE"))?,
            regs: vcpu.get_regs().map_err(Error::kvm("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?,
            xsave: vcpu.get_xsave().map_err(Error::kvm("KVM_GET_XSAVE"))?,
            xcrs: vcpu.get_xcrs().map_err(Error::kvm("KVM_GET_XCRS"))?,
            debug: vcpu.get_debug_regs().map_err(Error::kvm("KVM_GET_DEBUGREGS"))?,
            lapic: vcpu.get_lapic().map_err(Error::kvm("KVM_GET_LAPIC"))?,
            tsc_khz: vcpu.get_tsc_khz().ok(),
            msrs: read_msrs(vcpu, indices)?,
            events: vcpu.get_vcpu_events().map_err(Error::kvm("KVM_GET_VCPU_EVENTS"))?,
        })
    }

    /// Makes sure that the TSC can be set, whatever the VM's age: to be called for the first vCPU alone, since the others are meant
    /// to be in step with it.
    pub(super) fn prepare_tsc(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let Some(&(_, value)) = self.msrs.iter().find(|(index, _)| *index == TSC) else { return Ok(()) };
        let far = u64::from(self.tsc_khz.unwrap_or(FAST_KHZ)).saturating_mul(FAR);
        let msrs = entries(std::iter::once((TSC, value.wrapping_add(far))))?;
        vcpu.set_msrs(&msrs).map(drop).map_err(Error::kvm("set the TSC (KVM_SET_MSRS)"))
    }

    /// Puts the state into `vcpu`, which has its CPUID and has not run.
    pub(super) fn restore(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        if let Some(khz) = self.tsc_khz.filter(|khz| vcpu.get_tsc_khz().ok() != Some(*khz)) {
            vcpu.set_tsc_khz(khz).map_err(Error::kvm("set the speed of the TSC (KVM_SET_TSC_KHZ)"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(Error::kvm("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(Error::kvm("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(Error::kvm("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads as many bytes as a vCPU's state has. That is more than a `kvm_xsave` only for processes that have asked
        // the kernel for features with a larger state (arch_prctl(2)), which this program never does; the kernel refuses to
        // read the state of such a vCPU by KVM_GET_XSAVE, by which this one was taken.
        let set = unsafe { vcpu.set_xsave(&self.xsave) };
        set.map_err(Error::kvm("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(Error::kvm("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug).map_err(Error::kvm("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(Error::kvm("KVM_SET_LAPIC"))?;
        let (deadline, others): (Vec<_>, Vec<_>) = self.msrs.iter().partition(|(index, _)| *index == TSC_DEADLINE);
        write_msrs(vcpu, &others)?;
        write_msrs(vcpu, &deadline)?;
        vcpu.set_vcpu_events(&self.events).map_err(Error::kvm("KVM_SET_VCPU_EVENTS"))
    }
}

fn entries(msrs: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, Error> {
    let entries: Vec<_> = msrs.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| Error::MsrList)
}

/// The MSRs of `indices` that can be read: KVM's list names some that only another CPU or another VM has.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
    let (mut found, mut rest) = (Vec::with_capacity(indices.len()), indices);
    while !rest.is_empty() {
        let wanted = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let mut msrs = entries(wanted.iter().map(|index| (*index, 0)))?;
        // KVM stops at the first that cannot be read.
        let count = vcpu.get_msrs(&mut msrs).map_err(Error::kvm("read MSRs (KVM_GET_MSRS)"))?.min(wanted.len());
        found.extend(msrs.as_slice()[..count].iter().map(|entry| (entry.index, entry.data)));
        rest = &rest[(count + usize::from(count < wanted.len()))..];
    }
    Ok(found)
}

/// Sets MSRs. One that cannot be set must have its value already: it is constant, or follows from another.
fn write_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), Error> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let wanted = &rest[..rest.len().min(MSRS_AT_ONCE)];
        let set = vcpu.set_msrs(&entries(wanted.iter().copied())?).map_err(Error::kvm("set MSRs (KVM_SET_MSRS)"))?;
        let count = set.min(wanted.len());
        if let Some(&(index, value)) = wanted.get(count)
            && read_msrs(vcpu, &[index])? != [(index, value)]
        {
            return Err(Error::Msr { index, value });
        }
        rest = &rest[(count + usize::from(count < wanted.len()))..];
    }
    Ok(())
}
