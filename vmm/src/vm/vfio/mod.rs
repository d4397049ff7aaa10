//! Passing host PCI functions through to a VM (VFIO, <https://docs.kernel.org/driver-api/vfio.html>): a function inside a VM.
//! One [`Vfio`] a VM (DMA mappings), one [`VfioPciDevice`] a function. What the host knows of it is in [`crate::host`].
//!
//! The invariant: a function can do DMA only while the memory of its VM is mapped for it; bus mastering is
//! cleared before anything is unmapped. No device model is known here.

pub mod bars;
pub mod config;
pub mod container;
pub mod device;
pub mod events;
pub mod interrupts;
pub mod intx;
pub mod mapping;
pub mod msi;
pub mod msix;
mod storm;

pub use crate::host::{DeviceFiles, Error};
pub use container::{Vfio, VmResources};
pub use device::VfioPciDevice;
pub use events::{DeviceFailure, FailureWatch};
pub use storm::COUNTERS;
