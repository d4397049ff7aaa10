//! What the host knows of a PCI function: in sysfs, bound or not ([`sysfs`], [`bind`], [`reset`]), and through its open VFIO
//! files, which may outlive the VM that has it ([`files`], [`region`]); and whether it can confine processes ([`seccomp`]). [`doctor`]
//! tells people what is missing.
//!
//! No device model is known here, and nothing of a VM.

pub mod bind;
pub mod capabilities;
mod dma;
pub mod doctor;
pub mod error;
pub mod files;
mod hot_reset;
pub mod info;
pub mod irq;
pub mod persist;
pub mod region;
pub mod reset;
pub mod seccomp;
pub mod snapshot;
pub mod sysfs;
pub mod tap;
pub mod unserved;

pub use error::Error;
pub use files::DeviceFiles;
pub use snapshot::Snapshot;
pub use sysfs::HostDevice;
