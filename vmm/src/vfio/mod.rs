//! Passing host PCI functions through to a VM (VFIO, <https://docs.kernel.org/driver-api/vfio.html>).
//!
//! Three parts. What the host knows about a function, bound or not: [`sysfs`], [`bind`], [`reset`]. The files of an open
//! one, which may outlive the VM that has it: [`files`]. A function inside a VM: one [`Vfio`] a VM (DMA mappings), one
//! [`VfioPciDevice`] a function.
//!
//! The invariant: a function can do DMA only while the memory of its VM is mapped for it; bus mastering is
//! cleared before anything is unmapped. No device model is known here.

pub mod bars;
pub mod bind;
pub mod config;
pub mod container;
pub mod device;
mod dma;
pub mod error;
pub mod events;
pub mod files;
mod hot_reset;
mod info;
pub mod interrupts;
pub mod intx;
pub mod irq;
pub mod mapping;
pub mod msi;
pub mod msix;
pub mod region;
pub mod reset;
pub mod snapshot;
mod storm;
pub mod sysfs;

pub use container::{Vfio, VmResources};
pub use device::VfioPciDevice;
pub use error::Error;
pub use events::{Failure, FailureWatch};
pub use files::DeviceFiles;
pub use snapshot::Snapshot;
pub use sysfs::HostDevice;
