//! What runs in the process of a VM (`umbra vm`): the machine, its devices and the event loop. It never names the supervisor.

mod assemble;
pub mod confine;
pub mod devices;
pub mod group;
pub mod host;
pub mod interrupt;
pub mod machine;
pub mod pci;
pub mod process;
pub mod snapshot;
pub mod vfio;
pub mod virtio;
