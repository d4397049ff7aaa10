//! What the NIC is to receive: computed from what the guest asks for (pure), and applied by difference.
//!
//! Addresses go into the NIC's own lists (`RTM_NEWNEIGH` with `NTF_SELF`); the kernel makes a NIC promiscuous by itself
//! where its lists are full or it has none. So a guest may get more than it asked for (virtio 1.2, 5.1.6.5.1: filtering
//! is best effort), never less.

use std::collections::BTreeSet;

use nix::errno::Errno;
use umbra_driver_vm::protocol::{Mac, RxMode};

use crate::interface::{self, IFF_ALLMULTI, IFF_PROMISC, Index};
use crate::netlink::{Netlink, NetlinkError, Request};

/// Most addresses in a list; more turn into "all" (as the protocol says; NICs have 16 to 128 places).
const MAX_ADDRESSES: usize = 64;
/// `NDA_LLADDR`.
const NDA_LLADDR: u16 = 2;
/// `NUD_PERMANENT`: the only state that device lists know.
const NUD_PERMANENT: u16 = 0x80;
/// `NUD_NOARP`: in a bridge's table, an entry that is neither learned nor forgotten.
const NUD_NOARP: u16 = 0x40;

/// A NIC's receive filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    promiscuous: bool,
    all_multicast: bool,
    addresses: BTreeSet<Mac>,
}

impl Filter {
    /// The filter for a guest's mode, on a NIC that has `own` address. `tags_dropped`: the NIC drops frames with VLAN tags unless
    /// it is promiscuous, and that cannot be switched off.
    pub fn of(mode: &RxMode, own: Option<Mac>, tags_dropped: bool) -> Self {
        let wants_tags = mode.vlans.as_ref().is_none_or(|vlans| vlans.iter().any(|&vlan| vlan != 0));
        let promiscuous = mode.promiscuous || mode.unicast.len() > MAX_ADDRESSES || (wants_tags && tags_dropped);
        let all_multicast = mode.all_multicast || mode.multicast.len() > MAX_ADDRESSES;
        let unicast = mode.unicast.iter().filter(|mac| !promiscuous && Some(**mac) != own);
        let multicast = mode.multicast.iter().filter(|_| !promiscuous && !all_multicast);
        Self { promiscuous, all_multicast, addresses: unicast.chain(multicast).copied().collect() }
    }

    /// Changes the NIC from `before` to this filter. If an address cannot be added, the NIC becomes promiscuous; the address is not
    /// in the filter that is returned, so that the next one asks for it again, or keeps the NIC promiscuous.
    ///
    /// # Errors
    /// When not even the flags can be set.
    pub fn apply(mut self, before: &Self, netlink: &mut Netlink, nic: Index) -> Result<Self, NetlinkError> {
        self.place(before, |mac| {
            match neighbour(netlink, libc::RTM_NEWNEIGH, nic, mac, NUD_PERMANENT, libc::NTF_SELF) {
                Ok(()) => true,
                Err(error) => error.errno() == Errno::EEXIST,
            }
        });
        let flag = |on, flag| if on { flag } else { 0 };
        let flags = flag(self.promiscuous, IFF_PROMISC) | flag(self.all_multicast, IFF_ALLMULTI);
        interface::set_flags(netlink, nic, flags, IFF_PROMISC | IFF_ALLMULTI)?;
        for mac in before.addresses.difference(&self.addresses) {
            // One too many in the NIC's list does no harm.
            let _ = neighbour(netlink, libc::RTM_DELNEIGH, nic, *mac, NUD_PERMANENT, libc::NTF_SELF);
        }
        Ok(self)
    }

    /// Adds what `before` has not; `add` says whether the NIC has the address.
    fn place(&mut self, before: &Self, mut add: impl FnMut(Mac) -> bool) {
        let wanted = self.addresses.len();
        self.addresses.retain(|mac| before.addresses.contains(mac) || add(*mac));
        self.promiscuous |= self.addresses.len() < wanted;
    }
}

/// Tells the bridge which port the addresses in `after` are at, so that frames to a guest are not shown to the others.
/// Best effort: what the bridge does not know it floods, and then learns.
pub fn place_at_port(netlink: &mut Netlink, port: Index, before: &[Mac], after: &[Mac]) {
    for mac in after.iter().filter(|mac| !before.contains(mac)) {
        let _ = neighbour(netlink, libc::RTM_NEWNEIGH, port, *mac, NUD_NOARP, libc::NTF_MASTER);
    }
    for mac in before.iter().filter(|mac| !after.contains(mac)) {
        let _ = neighbour(netlink, libc::RTM_DELNEIGH, port, *mac, NUD_NOARP, libc::NTF_MASTER);
    }
}

fn neighbour(
    netlink: &mut Netlink,
    kind: u16,
    index: Index,
    mac: Mac,
    state: u16,
    flags: u8,
) -> Result<(), NetlinkError> {
    // struct ndmsg: family, 3 bytes of padding, interface, state, flags, type
    let mut fixed = [0; 12];
    fixed[0] = libc::AF_BRIDGE.to_ne_bytes()[0];
    fixed[4..8].copy_from_slice(&index.to_bytes());
    fixed[8..10].copy_from_slice(&state.to_ne_bytes());
    fixed[10] = flags;
    let create = if kind == libc::RTM_NEWNEIGH { libc::NLM_F_CREATE } else { 0 };
    netlink.call(Request::new(kind, create, &fixed).attribute(NDA_LLADDR, &mac.0)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);
    const GROUP: Mac = Mac([1, 0, 0x5e, 0, 0, 251]);

    fn mode() -> RxMode {
        RxMode { unicast: vec![OWN, OTHER], multicast: vec![GROUP], vlans: Some(vec![]), ..RxMode::default() }
    }

    #[test]
    fn the_nics_own_address_needs_no_place() {
        let filter = Filter::of(&mode(), Some(OWN), false);
        assert_eq!(filter.addresses.into_iter().collect::<Vec<_>>(), [GROUP, OTHER]);
    }

    #[test]
    fn what_is_all_needs_no_addresses() {
        let all = RxMode { promiscuous: true, ..mode() };
        assert_eq!(Filter::of(&all, Some(OWN), false), Filter { promiscuous: true, ..Filter::default() });
        let all = RxMode { all_multicast: true, ..mode() };
        let filter = Filter::of(&all, Some(OWN), false);
        assert!(filter.all_multicast && filter.addresses.into_iter().eq([OTHER]));
    }

    #[test]
    fn too_many_addresses_are_all() {
        let many = (0..65).map(|n| Mac([2, 1, 0, 0, 0, n])).collect();
        assert!(Filter::of(&RxMode { unicast: many, ..mode() }, None, false).promiscuous);
    }

    /// As drivers of some server NICs, which take no address into their lists unless they have virtual functions.
    #[test]
    fn a_nic_that_refuses_an_address_stays_promiscuous_as_long_as_the_guest_has_it() {
        let refuses = |mac: Mac| mac != OTHER;
        let then = |before: &Filter, mode: &RxMode| {
            let mut filter = Filter::of(mode, Some(OWN), false);
            filter.place(before, refuses);
            filter
        };
        let first = then(&Filter::default(), &mode());
        assert!(first.promiscuous && first.addresses.iter().eq([&GROUP]), "{first:?}");
        let left = then(&first, &RxMode { multicast: vec![], ..mode() });
        assert!(left.promiscuous, "it has left a group, and still has the address: {left:?}");
        let without = then(&left, &RxMode { unicast: vec![OWN], ..mode() });
        assert!(!without.promiscuous && without.addresses.iter().eq([&GROUP]), "{without:?}");
    }

    #[test]
    fn tags_that_the_nic_would_drop_make_it_promiscuous() {
        let with = |vlans| RxMode { vlans, ..mode() };
        assert!(Filter::of(&with(None), Some(OWN), true).promiscuous);
        assert!(Filter::of(&with(Some(vec![0, 5])), Some(OWN), true).promiscuous);
        assert!(!Filter::of(&with(Some(vec![0])), Some(OWN), true).promiscuous);
        assert!(!Filter::of(&with(None), Some(OWN), false).promiscuous);
    }
}
