//! Virtio devices (virtio 1.2) and their PCI transport.

pub mod device;
