//! The machine at the other end of the wire: the kernel of the host that runs the bench, in a network namespace of
//! its own, with a TAP interface for each NIC of the test host.
//!
//! A child process holds the namespace (`umbra-probe peer`), so that neither root nor the caller's network is
//! touched. It hands the TAP descriptors to the bench, which gives them to QEMU: QEMU itself needs no namespace.
//! NIC `n` has the network 10.77.n.0/24; the peer is .1, guests are .2 and up. Or all NICs are on the network of NIC 0,
//! behind a bridge, which learns addresses as a switch does.

mod bulk;
mod download;
mod flood;
mod handle;
mod netns;
mod ping;
mod server;
mod ticks;

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

pub use download::{Content, DEFAULT_RATE};
pub use handle::{Peer, PeerError};
pub use server::main;
pub use ticks::{Tick, now_us};

/// Where the peer listens, on every network.
pub mod ports {
    /// HTTP: one file, paced.
    pub const HTTP: u16 = 8000;
    /// UDP: ticks are recorded.
    pub const TICKS: u16 = 7000;
    /// UDP: datagrams come back.
    pub const ECHO: u16 = 7001;
    /// TCP: takes all, answers with what arrived.
    pub const SINK: u16 = 7002;
    /// TCP: sends for as many milliseconds as the first four bytes say.
    pub const SOURCE: u16 = 7003;
    /// UDP, at a guest: where nobody listens.
    pub const NOBODY: u16 = 7004;
}

/// The argument of `umbra-probe peer` that puts all NICs on one network.
pub const ONE_WIRE: &str = "one-wire";

/// The peer's address on the network of NIC `nic`.
pub fn peer_address(nic: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, u8::try_from(nic).unwrap_or(u8::MAX), 1)
}

/// The address of the `guest`th guest (from 0) on the network of NIC `nic`.
pub fn guest_address(nic: usize, guest: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, u8::try_from(nic).unwrap_or(u8::MAX), 2 + guest)
}

/// Bench to peer process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Request {
    /// What HTTP clients get from now on, and how fast.
    Offer {
        /// Size of the file, bytes.
        bytes: u64,
        /// Bytes a second.
        rate: u64,
        /// No more than this many bytes until the next `Allow`.
        allow: u64,
    },
    /// The download may go on to this many bytes.
    Allow {
        /// Bytes from the file's start.
        bytes: u64,
    },
    /// Begin to measure the longest stall anew.
    MarkStall,
    /// How far are the downloads?
    Progress,
    /// Ask this host 20 times a second whether it is there; each answer is a tick of it.
    Ping {
        /// Its address.
        host: Ipv4Addr,
        /// Its address on the wire, which is never asked for.
        mac: [u8; 6],
    },
    /// Send this host more than it takes, and answer then.
    Flood {
        /// Its address.
        host: Ipv4Addr,
        /// Its address on the wire.
        mac: [u8; 6],
        /// For so long, milliseconds.
        millis: u64,
    },
    /// The ticks that arrived since the last such question, or as many of them as one answer has.
    TakeTicks,
}

/// Peer process to bench.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Reply {
    /// The namespace stands; the TAP descriptors come with this message.
    Ready,
    /// It does not, and why.
    Failed {
        /// For the user.
        what: String,
    },
    /// Done.
    Done,
    /// Answer to [`Request::Flood`].
    Flooded {
        /// Datagrams that were sent.
        datagrams: u64,
    },
    /// Answer to [`Request::Progress`].
    Progress(Progress),
    /// Answer to [`Request::TakeTicks`].
    Ticks {
        /// In order of arrival.
        ticks: Vec<Tick>,
        /// More of them are there.
        more: bool,
    },
}

/// How far the HTTP downloads are, all connections since the last offer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Connections taken.
    pub connections: u32,
    /// Bytes of the file handed to the kernel (latest connection).
    pub sent: u64,
    /// Of these, acknowledged by the guest.
    pub acknowledged: u64,
    /// Connections that delivered the whole file.
    pub complete: u32,
    /// Connections that ended with a reset.
    pub resets: u32,
    /// Longest time without a newly acknowledged byte while some were under way, since the last mark, milliseconds.
    pub longest_stall_ms: u64,
}
