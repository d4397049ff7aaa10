//! Virtio devices (virtio 1.2) and their PCI transport.

pub mod device;
pub mod events;
pub mod pci;
pub mod queue;
pub mod split_net;
