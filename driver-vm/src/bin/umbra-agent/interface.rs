//! Network interfaces: listing, finding the physical NIC and the virtio-net ends, and changing them by route netlink.

use std::fs;
use std::path::Path;

use nix::errno::Errno;
use umbra_driver_vm::protocol::{LinkMode, Mac};

use crate::netlink::{Message, Netlink, NetlinkError, Request, attributes};

/// Attributes of a link (`IFLA_*`, linux/if_link.h).
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_PERM_ADDRESS: u16 = 54;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_GRO_MAX_SIZE: u16 = 58;
/// Leave the counters out of the answer.
const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;
/// Attributes of a bridge (`IFLA_BR_*`).
const IFLA_BR_FORWARD_DELAY: u16 = 1;
const IFLA_BR_STP_STATE: u16 = 5;
const IFLA_BR_GROUP_FWD_MASK: u16 = 9;
const IFLA_BR_MCAST_SNOOPING: u16 = 23;
/// Frames to 01:80:c2:00:00:03 and up (LLDP among them) pass the bridge; the three below never do.
const GROUP_FORWARD_ALL: u16 = 0xfff8;

/// Interface flags that are set or cleared.
pub const IFF_UP: u32 = libc::IFF_UP.cast_unsigned();
/// No address resolution: this interface answers and asks nothing.
pub const IFF_NOARP: u32 = libc::IFF_NOARP.cast_unsigned();
/// Everything on the wire.
pub const IFF_PROMISC: u32 = libc::IFF_PROMISC.cast_unsigned();
const IFF_LOWER_UP: u32 = libc::IFF_LOWER_UP.cast_unsigned();
const IFF_RUNNING: u32 = libc::IFF_RUNNING.cast_unsigned();
/// All multicast frames.
pub const IFF_ALLMULTI: u32 = libc::IFF_ALLMULTI.cast_unsigned();

/// An interface's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Index(i32);

impl Index {
    /// As a link attribute or in `struct tc_mirred`.
    pub fn to_bytes(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }
}

/// An interface as the kernel describes it.
#[derive(Clone, Debug)]
pub struct Interface {
    /// Its number.
    pub index: Index,
    /// Its name.
    pub name: String,
    /// Its address now.
    pub address: Option<Mac>,
    /// The address of the hardware.
    pub permanent: Option<Mac>,
    /// MTU, bytes.
    pub mtu: u32,
    /// The driver says that the link is up.
    pub link: bool,
    /// The link is up and the kernel sends on it.
    pub carrier: bool,
}

/// All interfaces.
///
/// # Errors
/// When the kernel does not answer.
pub fn all(netlink: &mut Netlink) -> Result<Vec<Interface>, NetlinkError> {
    let request = Request::new(libc::RTM_GETLINK, libc::NLM_F_DUMP, &ifinfo(Index(0), 0, 0))
        .attribute(IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    Ok(netlink.call(request)?.iter().filter_map(parse).collect())
}

/// The interface with this number, freshly read. Since Linux 6.8, asking also makes the kernel act at once on a link that has just
/// changed, where it might let up to a second pass otherwise.
///
/// # Errors
/// When there is none any more.
pub fn by_index(netlink: &mut Netlink, index: Index) -> Result<Interface, NetlinkError> {
    let request = Request::new(libc::RTM_GETLINK, 0, &ifinfo(index, 0, 0))
        .attribute(IFLA_EXT_MASK, &RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    netlink.call(request)?.iter().find_map(parse).ok_or(NetlinkError::Socket(Errno::ENODEV))
}

/// Sets those of the flags in `mask` to what they are in `flags`.
///
/// # Errors
/// When the kernel or the driver refuses.
pub fn set_flags(netlink: &mut Netlink, index: Index, flags: u32, mask: u32) -> Result<(), NetlinkError> {
    netlink.call(Request::new(libc::RTM_NEWLINK, 0, &ifinfo(index, flags, mask))).map(drop)
}

/// Sets the MTU.
///
/// # Errors
/// When the driver does not take it.
pub fn set_mtu(netlink: &mut Netlink, index: Index, mtu: u32) -> Result<(), NetlinkError> {
    let request = Request::new(libc::RTM_NEWLINK, 0, &ifinfo(index, 0, 0));
    netlink.call(request.attribute(IFLA_MTU, &mtu.to_ne_bytes())).map(drop)
}

/// Bounds what the kernel merges of received frames (GRO), bytes; Linux 5.19 and later.
///
/// # Errors
/// When the kernel does not know the attribute.
pub fn set_gro_max(netlink: &mut Netlink, index: Index, bytes: u32) -> Result<(), NetlinkError> {
    let request = Request::new(libc::RTM_NEWLINK, 0, &ifinfo(index, 0, 0));
    netlink.call(request.attribute(IFLA_GRO_MAX_SIZE, &bytes.to_ne_bytes())).map(drop)
}

/// Makes a bridge that forwards at once, learns, and says nothing of its own.
///
/// # Errors
/// When the kernel refuses.
pub fn make_bridge(netlink: &mut Netlink, name: &str) -> Result<Index, NetlinkError> {
    let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    let request = Request::new(libc::RTM_NEWLINK, flags, &ifinfo(Index(0), 0, 0))
        .text(IFLA_IFNAME, name)
        .nest(IFLA_LINKINFO)
        .text(IFLA_INFO_KIND, "bridge")
        .nest(IFLA_INFO_DATA)
        .attribute(IFLA_BR_STP_STATE, &0u32.to_ne_bytes())
        .attribute(IFLA_BR_FORWARD_DELAY, &0u32.to_ne_bytes())
        .attribute(IFLA_BR_GROUP_FWD_MASK, &GROUP_FORWARD_ALL.to_ne_bytes())
        .attribute(IFLA_BR_MCAST_SNOOPING, &[0])
        .end()
        .end();
    netlink.call(request)?;
    let bridge = all(netlink)?.into_iter().find(|interface| interface.name == name);
    bridge.map(|bridge| bridge.index).ok_or(NetlinkError::Socket(Errno::ENODEV))
}

/// Makes an interface a port of a bridge.
///
/// # Errors
/// When the kernel refuses.
pub fn set_master(netlink: &mut Netlink, index: Index, bridge: Index) -> Result<(), NetlinkError> {
    let request = Request::new(libc::RTM_NEWLINK, 0, &ifinfo(index, 0, 0));
    netlink.call(request.attribute(IFLA_MASTER, &bridge.to_bytes())).map(drop)
}

/// The kernel driver of an interface whose device is on the PCI bus; `None` for any other, virtio-net among them.
pub fn pci_driver(name: &str) -> Option<String> {
    let device = Path::new("/sys/class/net").join(name).join("device");
    let target = |link: &str| fs::read_link(device.join(link)).ok()?.file_name()?.to_str().map(str::to_owned);
    target("driver").filter(|_| target("subsystem").as_deref() == Some("pci"))
}

/// As what the link of an interface has come up, if its driver says.
pub fn link_mode(name: &str) -> Option<LinkMode> {
    let folder = Path::new("/sys/class/net").join(name);
    let read = |file: &str| fs::read_to_string(folder.join(file)).ok();
    link_mode_of(&read("speed")?, &read("duplex")?)
}

/// Of the texts of `speed` and `duplex` (sysfs-class-net).
fn link_mode_of(speed: &str, duplex: &str) -> Option<LinkMode> {
    // -1: unknown.
    let speed = speed.trim().parse::<i32>().ok().and_then(|speed| u32::try_from(speed).ok())?;
    let full_duplex = match duplex.trim() {
        "full" => true,
        "half" => false,
        _ => return None,
    };
    (speed > 0).then_some(LinkMode { speed, full_duplex })
}

/// `struct ifinfomsg`.
fn ifinfo(index: Index, flags: u32, mask: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[4..8].copy_from_slice(&index.to_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..].copy_from_slice(&mask.to_ne_bytes());
    bytes
}

fn parse(message: &Message) -> Option<Interface> {
    if message.kind != libc::RTM_NEWLINK {
        return None;
    }
    let index = Index(i32::from_ne_bytes(*message.payload.get(4..)?.first_chunk()?));
    let flags = u32::from_ne_bytes(*message.payload.get(8..)?.first_chunk()?);
    // LOWER_UP is the driver's word; RUNNING follows once the kernel has attached its queues.
    let link = flags & IFF_LOWER_UP != 0;
    let carrier = link && flags & IFF_RUNNING != 0;
    let (mut name, mut address, mut permanent, mut mtu) = (String::new(), None, None, 0);
    for (kind, value) in attributes(message.payload.get(16..)?) {
        match kind {
            IFLA_IFNAME => name = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned(),
            IFLA_ADDRESS => address = value.try_into().ok().map(Mac),
            IFLA_PERM_ADDRESS => permanent = value.try_into().ok().map(Mac),
            IFLA_MTU => mtu = u32::from_ne_bytes(*value.first_chunk()?),
            _ => {}
        }
    }
    Some(Interface { index, name, address, permanent, mtu, link, carrier })
}

#[cfg(test)]
mod tests {
    use umbra_driver_vm::calls::Calls;

    use super::*;

    #[test]
    fn the_loopback_interface_is_listed() {
        let mut netlink = Netlink::requests(Calls::default()).unwrap();
        let found = all(&mut netlink).unwrap();
        let loopback = found.iter().find(|interface| interface.name == "lo").unwrap();
        assert_eq!(by_index(&mut netlink, loopback.index).unwrap().name, "lo");
        assert_eq!(pci_driver("lo"), None);
        assert_eq!(link_mode("lo"), None);
    }

    #[test]
    fn speed_and_duplex_are_what_the_driver_says_or_nothing() {
        assert_eq!(link_mode_of("1000\n", "full\n"), Some(LinkMode { speed: 1000, full_duplex: true }));
        assert_eq!(link_mode_of("10\n", "half\n"), Some(LinkMode { speed: 10, full_duplex: false }));
        for (speed, duplex) in [("-1", "full"), ("0", "full"), ("100", "unknown"), ("", "full"), ("9999999999", "full")]
        {
            assert_eq!(link_mode_of(speed, duplex), None, "{speed} {duplex}");
        }
    }
}
