//! Forwarding inside the kernel: with one virtio-net end, each frame that arrives at one side is redirected to the
//! other before the network stack sees it (ingress qdisc, classifier `matchall`, action `mirred`); with several ends, a
//! bridge.

use anyhow::Context;

use crate::interface::{self, IFF_NOARP, IFF_UP, Index};
use crate::netlink::{Netlink, NetlinkError, Request};

/// Handle of the ingress qdisc and its parent (`TC_H_INGRESS`, linux/pkt_sched.h).
const INGRESS_HANDLE: u32 = 0xffff_0000;
const INGRESS_PARENT: u32 = 0xffff_fff1;
/// Attributes of a qdisc and of a filter.
pub const TCA_KIND: u16 = 1;
pub const TCA_OPTIONS: u16 = 2;
/// Attributes of `matchall`, of an action, and of `mirred`.
const TCA_MATCHALL_ACT: u16 = 2;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
/// `TCA_EGRESS_REDIR` and `TC_ACT_STOLEN`.
const EGRESS_REDIRECT: i32 = 1;
const STOLEN: i32 = 4;

/// What is made is not there yet.
const CREATE: i32 = libc::NLM_F_CREATE | libc::NLM_F_EXCL;

/// The bridge's name.
const BRIDGE: &str = "umbra0";

/// Prepares an interface for what [`join`] adds (its ingress qdisc).
///
/// # Errors
/// When the kernel refuses, as when a module is missing.
pub fn listen(netlink: &mut Netlink, at: Index) -> Result<(), NetlinkError> {
    let qdisc = tcmsg(at, INGRESS_HANDLE, INGRESS_PARENT, 0);
    netlink.call(Request::new(libc::RTM_NEWQDISC, CREATE, &qdisc).text(TCA_KIND, "ingress")).map(drop)
}

/// Redirects whatever one of the two receives to the other; the end listens already.
///
/// # Errors
/// When the kernel refuses, as when a module is missing.
pub fn join(netlink: &mut Netlink, nic: Index, end: Index) -> anyhow::Result<()> {
    listen(netlink, nic).context("cannot listen at the NIC")?;
    redirect(netlink, nic, end).context("cannot redirect from the NIC")?;
    redirect(netlink, end, nic).context("cannot redirect to the NIC")
}

/// Joins the NIC and several ends by a bridge.
///
/// # Errors
/// When the kernel refuses, as when a module is missing.
pub fn bridge(netlink: &mut Netlink, ports: &[Index]) -> anyhow::Result<()> {
    let bridge = interface::make_bridge(netlink, BRIDGE).context("cannot make a bridge")?;
    for port in ports {
        interface::set_master(netlink, *port, bridge).context("cannot add a port to the bridge")?;
    }
    let flags = IFF_UP | IFF_NOARP;
    interface::set_flags(netlink, bridge, flags, flags).context("cannot bring the bridge up")
}

fn redirect(netlink: &mut Netlink, from: Index, to: Index) -> Result<(), NetlinkError> {
    // struct tc_mirred: index, capabilities, what becomes of the frame here, two counts, what to do, with whom
    let mut mirred = [0; 28];
    mirred[8..12].copy_from_slice(&STOLEN.to_ne_bytes());
    mirred[20..24].copy_from_slice(&EGRESS_REDIRECT.to_ne_bytes());
    mirred[24..28].copy_from_slice(&to.to_bytes());
    // Priority 1 in the upper half, every protocol in the lower, in network order.
    let protocol = u16::try_from(libc::ETH_P_ALL).unwrap_or(0).to_be();
    let filter = tcmsg(from, 0, INGRESS_HANDLE, 1 << 16 | u32::from(protocol));
    let request = Request::new(libc::RTM_NEWTFILTER, CREATE, &filter)
        .text(TCA_KIND, "matchall")
        .nest(TCA_OPTIONS)
        .nest(TCA_MATCHALL_ACT)
        .nest(1) // the first action
        .text(TCA_ACT_KIND, "mirred")
        .nest(TCA_ACT_OPTIONS)
        .attribute(TCA_MIRRED_PARMS, &mirred)
        .end()
        .end()
        .end()
        .end();
    netlink.call(request).map(drop)
}

/// `struct tcmsg`.
pub fn tcmsg(index: Index, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut bytes = [0; 20];
    bytes[4..8].copy_from_slice(&index.to_bytes());
    bytes[8..12].copy_from_slice(&handle.to_ne_bytes());
    bytes[12..16].copy_from_slice(&parent.to_ne_bytes());
    bytes[16..].copy_from_slice(&info.to_ne_bytes());
    bytes
}
