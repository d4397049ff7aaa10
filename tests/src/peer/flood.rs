//! Sends a host more than it takes: datagrams to a port of its that nobody listens at, as fast as a NIC takes them.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use super::netns;
use super::ports;

/// Content of a datagram, bytes: with its headers it fills a frame.
const BYTES: usize = 1400;
/// Datagrams between two rests: fewer than wait at a TAP interface (`txqueuelen`), which drops what is too much.
const BURST: usize = 256;
/// A rest. Some 200,000 datagrams a second are more than any NIC here takes.
const REST: Duration = Duration::from_millis(1);

/// Sends to `host`, whose address on the wire is `mac` and is never asked for, for so long; how many datagrams.
pub(super) fn send(host: Ipv4Addr, mac: [u8; 6], time: Duration) -> io::Result<u64> {
    netns::neighbour(host, mac)?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let (start, datagram, mut sent) = (Instant::now(), [0; BYTES], 0);
    while start.elapsed() < time {
        // What the interface drops is an error here.
        let took = (0..BURST).filter(|_| socket.send_to(&datagram, (host, ports::NOBODY)).is_ok()).count();
        sent += u64::try_from(took).unwrap_or(0);
        thread::sleep(REST);
    }
    Ok(sent)
}
