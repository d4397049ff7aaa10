//! Asks a host again and again whether it is there (ICMP echo, RFC 792). Its answers are recorded as ticks are.
//!
//! The host's address on the wire is fixed, so that no question is broadcast: a host that is silent by itself stays silent, and the
//! network's switches learn nothing of it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::sync::PoisonError;
use std::thread;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use super::netns;
use super::ticks::{Tick, Ticks, now_us};

/// How often: an outage is known to a twentieth of a second.
const EVERY: Duration = Duration::from_millis(50);
/// Types of message.
const REQUEST: u8 = 8;
const REPLY: u8 = 0;
/// Bytes of the header: type, code, checksum, identifier, sequence number.
const HEADER: usize = 8;

/// Begins to ask `host`, whose address on the wire is `mac`.
pub(super) fn begin(host: Ipv4Addr, mac: [u8; 6], recorded: &Ticks) -> io::Result<()> {
    netns::neighbour(host, mac)?;
    let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)?;
    // A socket of any kind of datagram, with addresses whose port is nothing.
    let asking = UdpSocket::from(raw);
    let hearing = asking.try_clone()?;
    thread::Builder::new().name("ping".into()).spawn(move || {
        for seq in 0.. {
            // A wire without a carrier takes none.
            let _ = asking.send_to(&request(seq, now_us()), (host, 0));
            thread::sleep(EVERY);
        }
    })?;
    let recorded = Ticks::clone(recorded);
    thread::Builder::new().name("ping answers".into()).spawn(move || {
        let mut packet = [0; 256];
        while let Ok((length, from)) = hearing.recv_from(&mut packet) {
            let Some((seq, sent_us)) = reply(&packet[..length]).filter(|_| from.ip() == IpAddr::V4(host)) else {
                continue;
            };
            let tick = Tick { from: host, seq, sent_us, arrived_us: now_us() };
            recorded.lock().unwrap_or_else(PoisonError::into_inner).push_back(tick);
        }
    })?;
    Ok(())
}

fn request(seq: u64, now_us: u64) -> Vec<u8> {
    let mut message = vec![REQUEST, 0, 0, 0, 0, 0, 0, 0];
    message.extend(seq.to_be_bytes());
    message.extend(now_us.to_be_bytes());
    let sum = checksum(&message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    message
}

/// The ones' complement of the ones' complement sum of all 16-bit words.
fn checksum(message: &[u8]) -> u16 {
    let words = message.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// Number and time of an answer, from an IPv4 packet.
fn reply(packet: &[u8]) -> Option<(u64, u64)> {
    let message = packet.get(usize::from(packet.first()? & 0xf) * 4..)?;
    let number = |at: usize| message.get(at..at + 8)?.try_into().ok().map(u64::from_be_bytes);
    (*message.first()? == REPLY).then_some((number(HEADER)?, number(HEADER + 8)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_its_checksum_and_its_answer_is_read() {
        let mut message = request(7, 1 << 40);
        assert_eq!((checksum(&message), checksum(&[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7])), (0, 0x220d));
        message[0] = REPLY;
        let mut packet = vec![0x46; 24];
        packet.extend(&message);
        assert_eq!(reply(&packet), Some((7, 1 << 40)));
        packet[24] = REQUEST;
        assert_eq!((reply(&packet), reply(&packet[..30]), reply(&[])), (None, None, None));
    }
}
