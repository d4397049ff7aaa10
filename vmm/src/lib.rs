//! Umbra's virtual machine monitor: KVM virtual machines, their devices, and the supervisor that lets a
//! guest outlive the drivers of its devices. The binary is `umbra`.

pub mod background_writer;
pub mod cli;
pub mod doctor;
pub mod history;
pub mod interrupt;
pub mod machine;
pub mod metrics;
pub mod pci;
pub mod process;
pub mod rotating_file;
pub mod spec;
pub mod supervisor;
pub mod unix_socket;
pub mod vfio;
pub mod virtio;
