//! Virtio devices (virtio 1.2) and their PCI transport.

pub mod console;
pub mod device;
pub mod disk;
pub mod events;
#[cfg(test)]
mod hostile_tests;
pub mod net;
pub mod pace;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod shadowed;
pub mod sound;
#[cfg(test)]
mod testing;
mod vhost_user;

/// Takes a device's messages for the supervisor, in the device's lock; it must not block or call the device.
pub type Outbox = std::sync::Arc<dyn Fn(crate::wire::messages::FromVm) + Send + Sync>;

/// Reads `data` from a device's configuration at byte `offset`; bytes past its end read as 0.
fn read_config(config: &[u8], offset: u32, data: &mut [u8]) {
    let from = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
    let length = data.len().min(config.len() - from);
    data.fill(0);
    data[..length].copy_from_slice(&config[from..from + length]);
}
