//! Errors of passthrough. Those that a user can cause say what to do next; the rest name operation and device.

use std::path::PathBuf;

use thiserror::Error;

use super::unserved::Unserved;
use crate::base::pci_address::Bdf;

/// Why a function cannot be passed through, or stopped working.
#[derive(Debug, Error)]
pub enum Error {
    /// No such function.
    #[error("no PCI device {0} in this host; `lspci -D` lists them")]
    NoSuchDevice(Bdf),
    /// No driver VM can serve it.
    #[error("{bdf} {}", why.why())]
    Unserved {
        /// The function.
        bdf: Bdf,
        /// Why.
        why: Unserved,
    },
    /// A file in sysfs could not be read or written.
    #[error("{operation} {}", path.display())]
    Sysfs {
        /// `read`, `write`, ...
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file in sysfs holds something else than expected.
    #[error("{} holds {text:?}, which is not {expected}", path.display())]
    SysfsContent {
        /// The file.
        path: PathBuf,
        /// What it holds.
        text: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// Another driver holds the function.
    #[error("{bdf} is bound to {driver}, not vfio-pci: `umbra bind {bdf}` takes it from there")]
    WrongDriver {
        /// The function.
        bdf: Bdf,
        /// Its driver.
        driver: String,
    },
    /// No driver holds the function.
    #[error("{bdf} is bound to no driver, it has to be bound to vfio-pci: run `umbra bind {bdf}`")]
    NoDriver {
        /// The function.
        bdf: Bdf,
    },
    /// The function was not taken by the driver.
    #[error("{bdf} was offered to {wanted}, but {}", match actual { Some(d) => format!("{d} took it"), None => "it did not \
        take it (see `dmesg`)".into() })]
    NotTaken {
        /// The function.
        bdf: Bdf,
        /// The driver that should have taken it.
        wanted: &'static str,
        /// The driver that has it.
        actual: Option<String>,
    },
    /// The function was given back, and `vfio-pci` has it again.
    #[error(
        "{bdf} was given back, and {driver} has taken it again: it is told to by `vfio-pci.ids=` on the kernel's command line, by \
         `options vfio-pci ids=` in /etc/modprobe.d, or by a `new_id`"
    )]
    TakenAgain {
        /// The function.
        bdf: Bdf,
        /// The VFIO driver.
        driver: String,
    },
    /// The vfio-pci module is not there.
    #[error(
        "the kernel has no vfio-pci driver: run `modprobe vfio-pci` (if that fails, the kernel lacks CONFIG_VFIO_PCI)"
    )]
    NoVfioDriver,
    /// `/dev/vfio/vfio` does not exist.
    #[error("/dev/vfio/vfio does not exist: run `modprobe vfio-pci`, then bind the device to vfio-pci")]
    NoVfio,
    /// The IOMMU is off or missing.
    #[error(
        "{0} has no IOMMU group, so its DMA cannot be confined: switch the IOMMU (Intel VT-d, AMD-Vi) on in the firmware's \
         setup and boot with `intel_iommu=on iommu=pt` (on AMD `iommu=pt`); then /sys/kernel/iommu_groups is not empty"
    )]
    NoIommu(Bdf),
    /// Functions of the group belong to host drivers.
    #[error(
        "{bdf} shares IOMMU group {group} with {}: everything in a group passes through together, so bind these to \
         vfio-pci too (`umbra bind {bdf} {}`), unbind them from their drivers, or put the device into another slot",
        list(others),
        addresses(others)
    )]
    GroupNotViable {
        /// The function.
        bdf: Bdf,
        /// Its group.
        group: u32,
        /// The other functions and their drivers.
        others: Vec<(Bdf, String)>,
    },
    /// The group device is open elsewhere.
    #[error(
        "{bdf} is in use: IOMMU group {group} is open already, and one VM alone can have it (`fuser -v /dev/vfio/{group}` \
         names the processes)"
    )]
    GroupBusy {
        /// The function.
        bdf: Bdf,
        /// Its group.
        group: u32,
    },
    /// No permission for `/dev/vfio/vfio`.
    #[error("no permission to open {}: anybody may, by udev's own rules (`chmod 666`); or run as root", path.display())]
    Permission {
        /// The file.
        path: PathBuf,
    },
    /// No permission for the function's IOMMU group.
    #[error("{bdf}: no permission to open {}: `sudo umbra bind --for USER {bdf}` gives it to a user; or run as root", path.display())]
    NotOurs {
        /// The function.
        bdf: Bdf,
        /// The group's file.
        path: PathBuf,
    },
    /// The IOMMU does not remap interrupts.
    #[error(
        "the IOMMU of this host does not remap interrupts, so a passed-through device could forge them and the kernel \
         refuses {0}: enable interrupt remapping (x2APIC, `intremap`) in the firmware's setup; if you trust the device's \
         VM, `echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts`"
    )]
    UnsafeInterrupts(Bdf),
    /// The locked-memory limit.
    #[error(
        "memory that a device writes to must be locked: the VM needs {needed_mib} MiB, the limit is {limit_kib} KiB. Raise it \
         with `ulimit -l {}` as root before starting, `LimitMEMLOCK=infinity` in a systemd unit, or a `memlock` line in \
         /etc/security/limits.conf", needed_mib * 1024
    )]
    LockedMemory {
        /// What the VM needs.
        needed_mib: u64,
        /// The limit now.
        limit_kib: u64,
    },
    /// VFIO refused an operation.
    #[error("{operation} for {bdf}")]
    Vfio {
        /// What was tried.
        operation: &'static str,
        /// The function.
        bdf: Bdf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// KVM refused an operation.
    #[error("{operation}")]
    Kvm {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A BAR could not be mapped.
    #[error("map BAR {bar} of {bdf} into this process")]
    MapBar {
        /// The function.
        bdf: Bdf,
        /// The BAR's index.
        bar: u8,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// An eventfd could not be made.
    #[error("create an eventfd for {bdf}")]
    EventFd {
        /// The function.
        bdf: Bdf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Interrupt set-up.
    #[error("set up interrupts of {bdf}")]
    Interrupt {
        /// The function.
        bdf: Bdf,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// MSI-X set-up.
    #[error("set up MSI-X of {bdf}")]
    Vectors {
        /// The function.
        bdf: Bdf,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The host's kernel did not switch interrupts on.
    #[error("switch on {kind} of {bdf}")]
    HostInterrupt {
        /// The kind of interrupt.
        kind: &'static str,
        /// The function.
        bdf: Bdf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// An access to the function failed: it is gone or turned off.
    #[error("{operation} at {offset:#x} of region {region}")]
    Access {
        /// `read` or `write`.
        operation: &'static str,
        /// VFIO's region index.
        region: u32,
        /// Byte offset in it.
        offset: u64,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The configuration space makes no sense.
    #[error("{bdf}: {what}")]
    Malformed {
        /// The function.
        bdf: Bdf,
        /// What is wrong.
        what: String,
    },
    /// A reset did not come back.
    #[error("the reset of {bdf} did not finish within {limit_s} s; the device may need a power cycle of the host")]
    ResetTimeout {
        /// The function.
        bdf: Bdf,
        /// The limit, seconds.
        limit_s: u64,
    },
}

fn addresses(others: &[(Bdf, String)]) -> String {
    let addresses: Vec<_> = others.iter().map(|(bdf, _)| bdf.to_string()).collect();
    addresses.join(" ")
}

fn list(others: &[(Bdf, String)]) -> String {
    let names: Vec<_> = others.iter().map(|(bdf, driver)| format!("{bdf} ({driver})")).collect();
    names.join(", ")
}
