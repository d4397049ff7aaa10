//! The network of a driver VM, in its states: devices awaited, NIC up, forwarding.
//!
//! ```text
//!   Awaited --ends appear--> Awaited, ends up --NIC appears, is brought up--> Forwarding
//!           (or the NIC first)
//! ```
//! NIC and ends are brought up as soon as they are there: the NIC, because its link takes longest; the ends, because in a standby
//! they wait for the NIC.
//!
//! There is an end for each guest device, also while no guest is there: such an end has no carrier, and is part of the network
//! all the same. A frame for it is dropped (`mirred`, a bridge's port, the queue of a device without carrier: none of them keeps
//! it, once the kernel has acted on the loss), and it takes part again as soon as its carrier is back.

use std::time::Instant;

use anyhow::{Context, bail};
use umbra_driver_vm::calls::Calls;
use umbra_driver_vm::protocol::{LinkMode, Mac, NetEnd, NetPlan, Offloads, RxMode};

use crate::ethtool::Features;
use crate::filter::{self, Filter};
use crate::forward;
use crate::interface::{self, IFF_NOARP, IFF_PROMISC, IFF_UP, Index, Interface};
use crate::kernel_log;
use crate::netlink::Netlink;
use crate::{queue, receive, transmit};

/// Feature of a NIC that merges frames so that they cannot be taken apart again; must be off where frames are forwarded.
const LRO: (&str, bool) = ("rx-lro", false);
/// Feature of a NIC that drops frames whose VLAN tag is not in its filter.
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
    mtu: u32,
    mode: RxMode,
}

/// The virtio-net ends, up.
#[derive(Debug)]
pub struct Ends(Vec<End>);

/// NIC and ends joined.
#[derive(Debug)]
pub struct Network {
    nic: Nic,
    ends: Vec<End>,
    transmit: transmit::Watch,
    receive: receive::Watch,
}

impl Nic {
    /// Looks for the NIC. If it is there, calls `tell` and brings it up.
    ///
    /// # Errors
    /// When it is there but cannot be set up.
    pub fn find(netlink: &mut Netlink, plan: &NetPlan, tell: impl FnOnce()) -> anyhow::Result<Option<Self>> {
        for found in interface::all(netlink)? {
            if let Some(driver) = interface::pci_driver(&found.name) {
                tell();
                return Self::set_up(netlink, found, driver, plan).map(Some);
            }
        }
        Ok(None)
    }

    fn set_up(netlink: &mut Netlink, found: Interface, driver: String, plan: &NetPlan) -> anyhow::Result<Self> {
        queue::limit(netlink, &found, queue::bound(queues(plan)));
        let Interface { index, name, address, permanent, mtu: own_mtu, .. } = found;
        // Only what differs is set, and before the NIC is up, because some drivers restart it for a change.
        let mtu = plan.mtu.map_or(own_mtu, u32::from);
        if mtu != own_mtu {
            interface::set_mtu(netlink, index, mtu)
                .with_context(|| format!("{driver} does not take an MTU of {mtu}"))?;
        }
        let features =
            Features::of(netlink.calls(), &name).with_context(|| format!("cannot read the features of {name}"))?;
        let (lro, off) = (LRO.0, |feature| features.is_on(feature).map(|on| !on));
        let mut tags_dropped = !off(VLAN_FILTER).unwrap_or(true);
        if tags_dropped || !off(lro).unwrap_or(true) {
            features.set(&[LRO, (VLAN_FILTER, false)]).with_context(|| format!("cannot set features of {name}"))?;
            tags_dropped = !off(VLAN_FILTER).unwrap_or(true);
        }
        let permanent = permanent.or(address).unwrap_or(Mac([0; 6]));
        let filter = Filter::default();
        let mut nic = Self { index, name, driver, permanent, mtu, own: address, tags_dropped, filter };
        if let [end] = &plan.ends[..] {
            nic.receive(netlink, &end.mode)?;
        }
        let flags = IFF_UP | IFF_NOARP;
        interface::set_flags(netlink, index, flags, flags)
            .with_context(|| format!("cannot bring {} ({}) up", nic.name, nic.driver))?;
        // Older kernels do not know this bound; they forward as well, but more slowly.
        let _ = interface::set_gro_max(netlink, index, (MAX_FRAGMENTS * mtu).min(GRO_DEFAULT));
        Ok(nic)
    }

    /// Receives what its only guest asks for.
    ///
    /// # Errors
    /// When the NIC refuses.
    pub fn receive(&mut self, netlink: &mut Netlink, mode: &RxMode) -> anyhow::Result<()> {
        let wanted = Filter::of(mode, self.own, self.tags_dropped);
        if wanted != self.filter {
            self.filter = wanted
                .apply(&self.filter, netlink, self.index)
                .with_context(|| format!("cannot set what {} receives", self.name))?;
        }
        Ok(())
    }
}

impl Ends {
    /// Brings the ends of the plan up; `None`: not all of them are there yet.
    ///
    /// # Errors
    /// When an end cannot be set up.
    pub fn find(netlink: &mut Netlink, plan: &NetPlan) -> anyhow::Result<Option<Self>> {
        let interfaces = interface::all(netlink)?;
        // The NIC may have the same address: it is a PCI device's interface, the ends are not.
        let of = |end: &NetEnd| {
            let found = interfaces.iter().filter(|i| i.address == Some(end.device_mac));
            found.into_iter().find(|i| interface::pci_driver(&i.name).is_none())
        };
        let Some(found) = plan.ends.iter().map(of).collect::<Option<Vec<_>>>() else { return Ok(None) };
        let bound = queue::bound(queues(plan));
        let set_up = |(found, end): (&Interface, &NetEnd)| {
            queue::limit(netlink, found, bound);
            End::set_up(netlink, found, end, plan.mtu)
        };
        let ends = found.into_iter().zip(&plan.ends).map(set_up);
        let ends = ends.collect::<anyhow::Result<Vec<_>>>()?;
        match &ends[..] {
            [] => bail!("the plan names no virtio-net end"),
            [end] => forward::listen(netlink, end.index).with_context(|| format!("cannot listen at {}", end.name))?,
            _ => {}
        }
        Ok(Some(Self(ends)))
    }

    /// Whether the kernel sends on each end that has a link; it begins up to a second after the link has come, and a bridge
    /// leaves the end out until then. An end without a link has no guest, and is not waited for.
    ///
    /// # Errors
    /// When an end is gone.
    pub fn are_settled(&self, netlink: &mut Netlink) -> anyhow::Result<bool> {
        for end in &self.0 {
            let now = interface::by_index(netlink, end.index).with_context(|| format!("{} is gone", end.name))?;
            if now.link != now.carrier {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Sets what a guest can take.
    ///
    /// # Errors
    /// When there is no such end, or its driver refuses.
    pub fn set_offloads(&self, calls: &Calls, end: u16, offloads: Offloads) -> anyhow::Result<()> {
        let end = self.0.get(usize::from(end)).with_context(|| format!("there is no end {end}"))?;
        set_offloads(calls, &end.name, offloads)
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

    /// Joins the NIC with the ends of the plan.
    ///
    /// # Errors
    /// When the kernel cannot forward.
    pub fn join(netlink: &mut Netlink, nic: Nic, ends: Ends, plan: &NetPlan) -> anyhow::Result<Self> {
        let Ends(mut ends) = ends;
        for (end, planned) in ends.iter_mut().zip(&plan.ends) {
            end.fit(netlink, nic.mtu);
            end.mode.clone_from(&planned.mode);
        }
        if let [end] = &ends[..] {
            forward::join(netlink, nic.index, end.index)?;
        } else {
            let ports: Vec<_> = std::iter::once(nic.index).chain(ends.iter().map(|end| end.index)).collect();
            forward::bridge(netlink, &ports)?;
            for end in &ends {
                filter::place_at_port(netlink, end.index, &[], &end.mode.unicast);
            }
        }
        Ok(Self { nic, ends, transmit: transmit::Watch::default(), receive: receive::Watch::default() })
    }

    /// Whether the NIC's link is up.
    ///
    /// # Errors
    /// When the NIC is gone.
    pub fn carrier(&self, netlink: &mut Netlink) -> anyhow::Result<bool> {
        let nic = interface::by_index(netlink, self.nic.index);
        Ok(nic.with_context(|| format!("the NIC {} is gone", self.nic.name))?.carrier)
    }

    /// As what that link has come up. To be asked as [`Self::check_queues`] is: it waits for the lock of the network stack.
    pub fn link_mode(&self) -> Option<LinkMode> {
        interface::link_mode(&self.nic.name)
    }

    /// Has the kernel act at once on an end that has lost its link: it waits for up to a second otherwise, and keeps what comes for
    /// that end in the meantime, to send it to whoever is there next.
    ///
    /// # Errors
    /// When an end is gone.
    pub fn look_at_ends(&self, netlink: &mut Netlink) -> anyhow::Result<()> {
        for end in &self.ends {
            interface::by_index(netlink, end.index).with_context(|| format!("{} is gone", end.name))?;
        }
        Ok(())
    }

    /// Looks whether the NIC sends and receives, as it should while there is a `carrier`. To be called once a second.
    ///
    /// # Errors
    /// When its transmit queue stands still although its driver has reset the NIC, or its receive queue although frames come.
    pub fn check_queues(&mut self, carrier: bool) -> anyhow::Result<()> {
        if !carrier {
            self.transmit.pause();
            self.receive.pause();
            return Ok(());
        }
        match self.stuck_sending().or_else(|| self.stuck_receiving()) {
            Some(why) => bail!("the driver of {} is stuck: {why}", self.nic.name),
            None => Ok(()),
        }
    }

    fn stuck_sending(&mut self) -> Option<String> {
        let name = &self.nic.name;
        let timeouts = transmit::timeouts(name)?;
        // What several guests send may be for one another, and never come to the NIC.
        let flow = || if let [end] = &self.ends[..] { transmit::flow(name, &end.name) } else { None };
        self.transmit.look(Instant::now(), timeouts, flow)
    }

    fn stuck_receiving(&mut self) -> Option<String> {
        let name = &self.nic.name;
        self.receive.look(receive::received(name)?, || receive::missed(name))
    }

    /// Sets what a guest receives.
    ///
    /// # Errors
    /// When there is no such end, or the NIC refuses.
    pub fn set_mode(&mut self, netlink: &mut Netlink, end: u16, mode: RxMode) -> anyhow::Result<()> {
        let one = self.ends.len() == 1;
        let end = self.ends.get_mut(usize::from(end)).with_context(|| format!("there is no end {end}"))?;
        if one {
            self.nic.receive(netlink, &mode)?;
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
    pub fn set_offloads(&self, calls: &Calls, end: u16, offloads: Offloads) -> anyhow::Result<()> {
        let end = self.ends.get(usize::from(end)).with_context(|| format!("there is no end {end}"))?;
        set_offloads(calls, &end.name, offloads)
    }
}

impl End {
    fn set_up(netlink: &mut Netlink, found: &Interface, end: &NetEnd, mtu: Option<u16>) -> anyhow::Result<Self> {
        let (index, name) = (found.index, found.name.clone());
        let mut new = Self { index, name, mtu: found.mtu, mode: end.mode.clone() };
        if let Some(mtu) = mtu {
            new.fit(netlink, mtu.into());
        }
        set_offloads(netlink.calls(), &new.name, end.offloads)?;
        // Promiscuous: what comes from the guest is for the wire, not for this end's own address.
        let flags = IFF_UP | IFF_NOARP | IFF_PROMISC;
        interface::set_flags(netlink, index, flags, flags).with_context(|| format!("cannot bring {} up", new.name))?;
        Ok(new)
    }

    /// Gives it the NIC's MTU. A virtio device may state an MTU of its own, and then takes no larger one; the host made it
    /// fit the NIC's.
    fn fit(&mut self, netlink: &mut Netlink, mtu: u32) {
        if self.mtu == mtu {
            return;
        }
        match interface::set_mtu(netlink, self.index, mtu) {
            Ok(()) => self.mtu = mtu,
            Err(error) => {
                kernel_log::error(&format!("{} keeps its MTU of {}, not {mtu}: {error}", self.name, self.mtu));
            }
        }
    }
}

/// Interfaces that may keep frames: the NIC and the ends.
fn queues(plan: &NetPlan) -> usize {
    1 + plan.ends.len()
}

/// The kernel computes checksums and cuts segments for what the guest does not take. What the virtio device does not
/// offer stays off whatever is asked.
fn set_offloads(calls: &Calls, name: &str, offloads: Offloads) -> anyhow::Result<()> {
    let features = [
        ("tx-checksum-ip-generic", offloads.checksum),
        ("tx-tcp-segmentation", offloads.checksum && offloads.tso4),
        ("tx-tcp6-segmentation", offloads.checksum && offloads.tso6),
    ];
    Features::of(calls, name)
        .and_then(|of| of.set(&features))
        .with_context(|| format!("cannot set the offloads of {name}"))
}

/// A NIC for the tests of the network thread.
#[cfg(test)]
pub mod testing {
    use super::*;

    impl Nic {
        /// The loopback interface in the place of a NIC; it is promiscuous if it is asked for an address.
        pub fn loopback(netlink: &mut Netlink) -> Self {
            let all = interface::all(netlink).unwrap();
            let Interface { index, name, mtu, .. } = all.into_iter().find(|interface| interface.name == "lo").unwrap();
            let (driver, permanent, own, tags_dropped) = ("loopback".into(), Mac([0; 6]), None, false);
            Self { index, name, driver, permanent, mtu, own, tags_dropped, filter: Filter::default() }
        }

        /// Whether it receives what this mode asks for, and no more.
        pub fn is_set_to(&self, mode: &RxMode) -> bool {
            self.filter == Filter::of(mode, self.own, self.tags_dropped)
        }
    }
}
