//! Configuration space of a network device (virtio 1.2, section 5.1.4), shared by devices of that class.

use umbra_driver_vm::protocol::Mac;

use crate::vm::virtio::read_config;

/// The MTU is in the configuration.
pub const F_MTU: u64 = 1 << 3;
/// The address is in the configuration.
pub const F_MAC: u64 = 1 << 5;
/// The link's state is in the configuration.
pub const F_STATUS: u64 = 1 << 16;

/// Status bit: the link is up.
const LINK_UP: u16 = 1;

/// What a driver reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Address.
    pub mac: Mac,
    /// MTU, bytes.
    pub mtu: u16,
    /// Link.
    pub link_up: bool,
}

impl NetConfig {
    /// Reads at byte `offset`.
    pub fn read(&self, offset: u32, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac.0);
        config[6..8].copy_from_slice(&(if self.link_up { LINK_UP } else { 0 }).to_le_bytes());
        // Pairs of queues: one.
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        read_config(&config, offset, data);
    }
}
