//! The network of a driver VM, in its states: devices awaited, NIC up, forwarding.
//!
//! ```text
//!   Awaited --NIC appears--> Awaited, NIC up --ends appear--> Forwarding
//! ```
//! The NIC is brought up as soon as it is there, because its link takes longest; everything else happens meanwhile.

use anyhow::{Context, bail};
use umbra_driver_vm::protocol::{Mac, NetEnd, NetPlan, Offloads, RxMode};

use crate::ethtool::Features;
use crate::filter::{self, Filter};
use crate::forward;
use crate::interface::{self, IFF_NOARP, IFF_PROMISC, IFF_UP, Index, Interface};
use crate::kernel_log;
use crate::netlink::Netlink;

/// Merges frames so that they cannot be taken apart again; must be off where frames are forwarded.
const LRO: (&str, bool) = ("rx-lro", false);
/// Drops frames with VLAN tags that the NIC was not told of.
const VLAN_FILTER: &str = "rx-vlan-filter";

/// Fragments of one packet in the kernel (`MAX_SKB_FRAGS`). Received frames merged into more become a list of packets,
/// which virtio-net does not take: the kernel would cut them into single frames again, at a great cost.
const MAX_FRAGMENTS: u32 = 17;
/// The most that the kernel merges by default, bytes (`GRO_LEGACY_MAX_SIZE`).
const GRO_DEFAULT: u32 = 65536;

/// The physical NIC, up.
#[derive(Debug)]
pub struct Nic {
    /// Its interface number.
    pub index: Index,
    /// Its interface name.
    pub name: String,
    /// Its kernel driver.
    pub driver: String,
    /// Its permanent address.
    pub permanent: Mac,
    /// MTU in force.
    pub mtu: u32,
    own: Option<Mac>,
    tags_dropped: bool,
    filter: Filter,
}

/// A virtio-net end.
#[derive(Debug)]
struct End {
    index: Index,
    name: String,
    mode: RxMode,
}

/// NIC and ends joined.
#[derive(Debug)]
pub struct Network {
    nic: Nic,
    ends: Vec<End>,
}

impl Nic {
    /// Looks for the NIC; if it is there, brings it up.
    ///
    /// # Errors
    /// When it is there but cannot be set up.
    pub fn find(netlink: &mut Netlink, plan: &NetPlan) -> anyhow::Result<Option<Self>> {
        for found in interface::all(netlink)? {
            if let Some(driver) = interface::pci_driver(&found.name) {
                return Self::set_up(netlink, found, driver, plan).map(Some);
            }
        }
        Ok(None)
    }

    fn set_up(netlink: &mut Netlink, found: Interface, driver: String, plan: &NetPlan) -> anyhow::Result<Self> {
        let Interface { index, name, address, permanent, .. } = found;
        if let Some(mtu) = plan.mtu {
            interface::set_mtu(netlink, index, mtu.into())
                .with_context(|| format!("{driver} does not take an MTU of {mtu}"))?;
        }
        let features = Features::of(&name).with_context(|| format!("cannot read the features of {name}"))?;
        features.set(&[LRO, (VLAN_FILTER, false)]).with_context(|| format!("cannot set features of {name}"))?;
        let tags_dropped = features.is_on(VLAN_FILTER).unwrap_or(false);
        let mut filter = Filter::default();
        if let [end] = &plan.ends[..] {
            filter = Filter::of(&end.mode, address, tags_dropped)
                .apply(&filter, netlink, index)
                .with_context(|| format!("cannot set what {name} receives"))?;
        }
        let flags = IFF_UP | IFF_NOARP;
        interface::set_flags(netlink, index, flags, flags)
            .with_context(|| format!("cannot bring {name} ({driver}) up"))?;
        let mtu = interface::by_index(netlink, index)?.mtu;
        // Older kernels do not know this bound; they forward as well, but more slowly.
        let _ = interface::set_gro_max(netlink, index, (MAX_FRAGMENTS * mtu).min(GRO_DEFAULT));
        let permanent = permanent.or(address).unwrap_or(Mac([0; 6]));
        Ok(Self { index, name, driver, permanent, mtu, own: address, tags_dropped, filter })
    }
}

impl Network {
    /// Switches the ends off, so that nobody takes the guests' frames: a failure to be noticed by the host.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn stall(&self, netlink: &mut Netlink) -> anyhow::Result<()> {
        for end in &self.ends {
            interface::set_flags(netlink, end.index, 0, IFF_UP)
                .with_context(|| format!("cannot switch {} off", end.name))?;
        }
        Ok(())
    }

    /// Joins the NIC with the ends of the plan, or gives the NIC back when not all of them are there and up yet.
    ///
    /// # Errors
    /// When an end cannot be set up, or the kernel cannot forward.
    pub fn join(netlink: &mut Netlink, nic: Nic, plan: &NetPlan) -> anyhow::Result<Result<Self, Nic>> {
        let interfaces = interface::all(netlink)?;
        let mut ends = Vec::new();
        for end in &plan.ends {
            // The NIC may have the same address: it is a PCI device's interface, the ends are not.
            let found = interfaces
                .iter()
                .find(|i| i.address == Some(end.device_mac) && interface::pci_driver(&i.name).is_none());
            match found {
                Some(found) => ends.push(End::set_up(netlink, found, end, nic.mtu)?),
                None => return Ok(Err(nic)),
            }
        }
        for end in &ends {
            if !interface::by_index(netlink, end.index)?.carrier {
                return Ok(Err(nic)); // a bridge would leave it out
            }
        }
        match &ends[..] {
            [] => bail!("the plan names no virtio-net end"),
            [end] => forward::join(netlink, nic.index, end.index)?,
            several => {
                let ports: Vec<_> = std::iter::once(nic.index).chain(several.iter().map(|e| e.index)).collect();
                forward::bridge(netlink, &ports)?;
                for end in several {
                    filter::place_at_port(netlink, end.index, &[], &end.mode.unicast);
                }
            }
        }
        Ok(Ok(Self { nic, ends }))
    }

    /// Whether the NIC's link is up.
    ///
    /// # Errors
    /// When the NIC is gone.
    pub fn carrier(&self, netlink: &mut Netlink) -> anyhow::Result<bool> {
        let nic = interface::by_index(netlink, self.nic.index);
        Ok(nic.with_context(|| format!("the NIC {} is gone", self.nic.name))?.carrier)
    }

    /// Sets what a guest receives.
    ///
    /// # Errors
    /// When there is no such end, or the NIC refuses.
    pub fn set_mode(&mut self, netlink: &mut Netlink, end: u16, mode: RxMode) -> anyhow::Result<()> {
        let one = self.ends.len() == 1;
        let end = self.ends.get_mut(usize::from(end)).with_context(|| format!("there is no end {end}"))?;
        if one {
            self.nic.filter = Filter::of(&mode, self.nic.own, self.nic.tags_dropped)
                .apply(&self.nic.filter, netlink, self.nic.index)
                .with_context(|| format!("cannot set what {} receives", self.nic.name))?;
        } else {
            filter::place_at_port(netlink, end.index, &end.mode.unicast, &mode.unicast);
        }
        end.mode = mode;
        Ok(())
    }

    /// Sets what a guest can take.
    ///
    /// # Errors
    /// When there is no such end, or its driver refuses.
    pub fn set_offloads(&self, end: u16, offloads: Offloads) -> anyhow::Result<()> {
        let end = self.ends.get(usize::from(end)).with_context(|| format!("there is no end {end}"))?;
        set_offloads(&end.name, offloads)
    }
}

impl End {
    fn set_up(netlink: &mut Netlink, found: &Interface, end: &NetEnd, mtu: u32) -> anyhow::Result<Self> {
        let (index, name) = (found.index, found.name.clone());
        // A virtio device may state an MTU of its own, and then takes no larger one; the host made it fit the NIC's.
        if found.mtu != mtu
            && let Err(error) = interface::set_mtu(netlink, index, mtu)
        {
            kernel_log::error(&format!("{name} keeps its MTU of {}, not {mtu}: {error}", found.mtu));
        }
        set_offloads(&name, end.offloads)?;
        // Promiscuous: what comes from the guest is for the wire, not for this end's own address.
        let flags = IFF_UP | IFF_NOARP | IFF_PROMISC;
        interface::set_flags(netlink, index, flags, flags).with_context(|| format!("cannot bring {name} up"))?;
        Ok(Self { index, name, mode: end.mode.clone() })
    }
}

/// The kernel computes checksums and cuts segments for what the guest does not take. What the virtio device does not
/// offer stays off whatever is asked.
fn set_offloads(name: &str, offloads: Offloads) -> anyhow::Result<()> {
    let features = [
        ("tx-checksum-ip-generic", offloads.checksum),
        ("tx-tcp-segmentation", offloads.checksum && offloads.tso4),
        ("tx-tcp6-segmentation", offloads.checksum && offloads.tso6),
    ];
    Features::of(name).and_then(|of| of.set(&features)).with_context(|| format!("cannot set the offloads of {name}"))
}
