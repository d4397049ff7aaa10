//! Features of virtio-net (virtio 1.2, section 5.1.3) as the splitter offers them to both sides, and what they mean
//! for frames. The sets mirror each other, so that offloads of the guest's driver and of the driver VM pass through.

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_SPEED_DUPLEX,
    VIRTIO_NET_F_STATUS,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::header::Offloads;

const fn bits(numbers: &[u32]) -> u64 {
    let (mut set, mut i) = (0, 0);
    while i < numbers.len() {
        set |= 1 << numbers[i];
        i += 1;
    }
    set
}

/// Offloads and queue formats, the same towards both sides.
const COMMON: u64 = bits(&[
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_RING_F_INDIRECT_DESC,
    VIRTIO_RING_F_EVENT_IDX,
]);

/// Offered to the guest (`VIRTIO_F_VERSION_1` is the transport's). Not `GUEST_ANNOUNCE`: a new driver VM has the same
/// address, mostly at the same port of the same switch; where it is another port the splitter announces the guest itself, which
/// is to notice nothing.
pub const GUEST: u64 = COMMON
    | bits(&[
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_MTU,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_SPEED_DUPLEX,
        VIRTIO_NET_F_CTRL_VQ,
        VIRTIO_NET_F_CTRL_RX,
        VIRTIO_NET_F_CTRL_VLAN,
        VIRTIO_NET_F_CTRL_MAC_ADDR,
    ]);

/// Offered to the guest where an interface of the host takes its frames: that has no speed to show.
pub const GUEST_ON_TAP: u64 = GUEST & !bits(&[VIRTIO_NET_F_SPEED_DUPLEX]);

/// Offered to the driver VM.
pub const DRIVER_VM: u64 = COMMON | bits(&[VIRTIO_F_VERSION_1]);

fn offloads(features: u64, checksum: u32, tso4: u32, tso6: u32) -> Offloads {
    let mut set = Offloads::empty();
    set.set(Offloads::CHECKSUM, features & (1 << checksum) != 0);
    set.set(Offloads::TSO4, features & (1 << tso4) != 0);
    set.set(Offloads::TSO6, features & (1 << tso6) != 0);
    set
}

/// Offloads that a driver may ask for in frames it transmits.
pub fn transmit(features: u64) -> Offloads {
    offloads(features, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6)
}

/// Offloads that a driver takes in frames it receives.
pub fn receive(features: u64) -> Offloads {
    offloads(features, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6)
}

/// True if the driver merges receive buffers.
pub fn mergeable(features: u64) -> bool {
    features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0
}
