//! What a guest asked its network device to receive (virtio 1.2, section 5.1.6.5): recorded from the control
//! commands and given whole to each new driver VM. Bounded: a table that does not fit widens the filter, as the
//! specification allows a device to do; nothing is received less than asked for.

use std::collections::BTreeSet;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Most addresses in each of the two tables. Linux itself asks for all when a guest has more.
pub const MAX_ADDRESSES: usize = 64;

/// VLAN identifiers are 12 bits wide.
pub const VLANS: u16 = 4096;

/// `VIRTIO_NET_F_CTRL_RX`.
const CTRL_RX: u64 = 1 << 18;
/// `VIRTIO_NET_F_CTRL_VLAN`.
const CTRL_VLAN: u64 = 1 << 19;

/// The receive filter of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RxFilter {
    mac: Mac,
    permanent: Mac,
    promiscuous: bool,
    all_multicast: bool,
    unicast: Vec<Mac>,
    unicast_overflow: bool,
    multicast: Vec<Mac>,
    multicast_overflow: bool,
    vlans: Option<BTreeSet<u16>>,
}

impl RxFilter {
    /// The filter of a device whose driver has said nothing yet: everything is received.
    pub fn new(mac: Mac) -> Self {
        Self {
            mac,
            permanent: mac,
            promiscuous: true,
            all_multicast: false,
            unicast: Vec::new(),
            unicast_overflow: false,
            multicast: Vec::new(),
            multicast_overflow: false,
            vlans: None,
        }
    }

    /// Back to the default for a driver that accepted these features. Without `VIRTIO_NET_F_CTRL_RX` a driver
    /// filters by itself and gets everything.
    pub fn reset(&mut self, features: u64) {
        *self = Self::new(self.permanent);
        self.vlans = (features & CTRL_VLAN != 0).then(BTreeSet::new);
        debug_assert!(features & CTRL_RX != 0 || self.promiscuous);
    }

    /// Sets the device's own address.
    pub fn set_mac(&mut self, mac: Mac) {
        self.mac = mac;
    }

    /// Takes away all unicast addresses but the permanent one.
    pub fn keep_permanent(&mut self) {
        self.mac = self.permanent;
        self.unicast.clear();
    }

    /// Promiscuous mode.
    pub fn set_promiscuous(&mut self, on: bool) {
        self.promiscuous = on;
    }

    /// All multicast frames.
    pub fn set_all_multicast(&mut self, on: bool) {
        self.all_multicast = on;
    }

    /// Replaces both tables.
    pub fn set_tables(&mut self, unicast: impl Iterator<Item = Mac>, multicast: impl Iterator<Item = Mac>) {
        (self.unicast, self.unicast_overflow) = bounded(unicast);
        (self.multicast, self.multicast_overflow) = bounded(multicast);
    }

    /// Lets a VLAN through, or no more. Returns false for a number that is none or if VLANs are not filtered.
    pub fn set_vlan(&mut self, vlan: u16, through: bool) -> bool {
        let Some(vlans) = &mut self.vlans else { return false };
        if vlan >= VLANS {
            return false;
        }
        if through {
            vlans.insert(vlan);
        } else {
            vlans.remove(&vlan);
        }
        true
    }

    /// The device's own address.
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Everything on the wire (asked for, or because the unicast table overflowed).
    pub fn promiscuous(&self) -> bool {
        self.promiscuous || self.unicast_overflow
    }

    /// All multicast frames (asked for, or because the table overflowed).
    pub fn all_multicast(&self) -> bool {
        self.all_multicast || self.multicast_overflow
    }

    /// Unicast addresses, the device's own first, at most [`MAX_ADDRESSES`].
    pub fn unicast(&self) -> Vec<Mac> {
        let others = self.unicast.iter().copied().filter(|m| *m != self.mac);
        std::iter::once(self.mac).chain(others).take(MAX_ADDRESSES).collect()
    }

    /// Multicast addresses, at most [`MAX_ADDRESSES`].
    pub fn multicast(&self) -> &[Mac] {
        &self.multicast
    }

    /// VLANs let through; `None` if the driver does not filter.
    pub fn vlans(&self) -> Option<Vec<u16>> {
        self.vlans.as_ref().map(|v| v.iter().copied().collect())
    }
}

/// The addresses, or none and `true` if there are too many. One place less than [`MAX_ADDRESSES`]: the device's own
/// address stands in the unicast table too.
fn bounded(addresses: impl Iterator<Item = Mac>) -> (Vec<Mac>, bool) {
    let kept: Vec<Mac> = addresses.take(MAX_ADDRESSES).collect();
    if kept.len() == MAX_ADDRESSES { (Vec::new(), true) } else { (kept, false) }
}
