//! Opening KVM and making a VM with an in-kernel irqchip and PIT, with errors that say what to do.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use thiserror::Error;

use super::layout;

/// Errors of KVM's set-up.
#[derive(Debug, Error)]
pub enum Error {
    /// No device node.
    #[error(
        "there is no /dev/kvm: load the module kvm_intel or kvm_amd (as root: modprobe kvm_intel), and turn \
         virtualisation (VT-x or AMD-V) on in the firmware, or nested virtualisation if this is a VM"
    )]
    NoKvm,
    /// Not allowed.
    #[error("no permission to open /dev/kvm: run as root, or add the user to the group that owns it (usually `kvm`)")]
    NoPermission,
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("open /dev/kvm")]
    Open(#[source] kvm_ioctls::Error),
    /// Not the API this program speaks.
    #[error("/dev/kvm speaks API version {0}, and 12 is needed")]
    ApiVersion(i32),
    /// A capability is missing.
    #[error("this kernel's KVM lacks {0}, which is needed: use Linux 5.10 or later with CONFIG_KVM")]
    Missing(&'static str),
    /// An ioctl of the set-up failed.
    #[error("{operation}")]
    Ioctl {
        /// What was tried.
        operation: &'static str,
        /// The cause.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// More vCPUs than KVM supports.
    #[error("{asked} vCPUs are more than the {max} that KVM supports here")]
    TooManyCpus {
        /// Configured.
        asked: usize,
        /// KVM's limit.
        max: usize,
    },
}

impl Error {
    pub(super) fn ioctl(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Ioctl { operation, source }
    }
}

/// Capabilities without which no VM runs, with the names that KVM's documentation gives them.
const NEEDED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqfdResample, "KVM_CAP_IRQFD_RESAMPLE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Opens `/dev/kvm` and checks what it can do.
pub fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|source| match source.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::NoKvm,
        libc::EACCES | libc::EPERM => Error::NoPermission,
        _ => Error::Open(source),
    })?;
    match kvm.get_api_version() {
        12 => {}
        other => return Err(Error::ApiVersion(other)),
    }
    match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(Error::Missing(name)),
        None => Ok(kvm),
    }
}

/// Makes a VM with irqchip and PIT in the kernel, and without performance counters.
pub fn create_vm(kvm: &Kvm, cpus: u8) -> Result<Arc<VmFd>, Error> {
    let (asked, max) = (usize::from(cpus), kvm.get_max_vcpus());
    if asked > max {
        return Err(Error::TooManyCpus { asked, max });
    }
    let vm = kvm.create_vm().map_err(Error::ioctl("create a VM (KVM_CREATE_VM)"))?;
    switch_counters_off(kvm, &vm)?;
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(Error::ioctl("place the identity map (KVM_SET_IDENTITY_MAP_ADDR)"))?;
    vm.set_tss_address(layout::TSS_ADDRESS).map_err(Error::ioctl("place the TSS (KVM_SET_TSS_ADDR)"))?;
    vm.create_irq_chip().map_err(Error::ioctl("create the interrupt controllers (KVM_CREATE_IRQCHIP)"))?;
    // KVM answers port 0x61 itself, so that a guest's timer calibration makes no exits to us.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(Error::ioctl("create the timer (KVM_CREATE_PIT2)"))?;
    Ok(Arc::new(vm))
}

/// Switches the performance counters of all vCPUs off, those of the first AMD64 processors among them, which no CPUID leaf names.
/// Before Linux 5.18 that is not possible, and only CPUID hides the others.
fn switch_counters_off(kvm: &Kvm, vm: &VmFd) -> Result<(), Error> {
    let offered = kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if offered <= 0 || offered.cast_unsigned() & KVM_PMU_CAP_DISABLE == 0 {
        return Ok(());
    }
    let mut off = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
    off.args[0] = KVM_PMU_CAP_DISABLE.into();
    vm.enable_cap(&off).map_err(Error::ioctl("switch the performance counters off (KVM_CAP_PMU_CAPABILITY)"))
}
