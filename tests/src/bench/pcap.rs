//! Reads the captures of `filter-dump` (libpcap, little endian, Ethernet) as far as the bench asks: which TCP segments
//! carry a reset, and where frames of a kind went. Captured frames may be cut; headers up to the TCP flags are within the first 64 bytes.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

/// A reset on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// Sender.
    pub from: Ipv4Addr,
    /// Receiver.
    pub to: Ipv4Addr,
    /// Seconds since the epoch.
    pub at_s: u32,
}

const GLOBAL_HEADER: usize = 24;
const RECORD_HEADER: usize = 16;
const MAGIC: [u8; 4] = 0xa1b2_c3d4_u32.to_le_bytes();

/// All TCP connections in a capture that were reset. One that both ends have closed is over: where acknowledgements are late, an end that
/// has forgotten it answers the last of them by a reset (RFC 9293, section 3.5.2).
///
/// # Errors
/// The file cannot be read or is no capture.
pub fn resets(path: &Path) -> io::Result<Vec<Reset>> {
    let (mut closed, mut resets) = (BTreeSet::new(), Vec::new());
    for (at_s, frame) in frames(path)? {
        let Some(Segment { from, to, flags }) = segment_in(&frame) else { continue };
        if flags & SYN != 0 {
            closed.remove(&(from, to));
        }
        if flags & FIN != 0 {
            closed.insert((from, to));
        }
        if flags & RST != 0 && !(closed.contains(&(from, to)) && closed.contains(&(to, from))) {
            resets.push(Reset { from: *from.ip(), to: *to.ip(), at_s });
        }
    }
    Ok(resets)
}

/// The destinations of all frames of this `EtherType`.
///
/// # Errors
/// As [`resets`].
pub fn destinations(path: &Path, ether_type: u16) -> io::Result<Vec<[u8; 6]>> {
    let of_type = |frame: &Vec<u8>| frame.get(12..14) == Some(&ether_type.to_be_bytes()[..]);
    let destination = |frame: Vec<u8>| frame.get(..6)?.try_into().ok();
    Ok(frames(path)?.into_iter().map(|(_, frame)| frame).filter(of_type).filter_map(destination).collect())
}

/// All frames, with their seconds since the epoch.
fn frames(path: &Path) -> io::Result<Vec<(u32, Vec<u8>)>> {
    let bytes = fs::read(path)?;
    if !bytes.starts_with(&MAGIC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{} is no capture", path.display())));
    }
    let mut rest = bytes.get(GLOBAL_HEADER..).unwrap_or_default();
    let mut found = Vec::new();
    while let Some((header, tail)) = rest.split_at_checked(RECORD_HEADER) {
        let Some((frame, next)) = tail.split_at_checked(word(header, 8) as usize) else { break };
        rest = next;
        found.push((word(header, 0), frame.to_vec()));
    }
    Ok(found)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;

/// A TCP segment.
struct Segment {
    from: SocketAddrV4,
    to: SocketAddrV4,
    flags: u8,
}

fn segment_in(frame: &[u8]) -> Option<Segment> {
    const ETHERNET: usize = 14;
    const TCP: u8 = 6;
    let ip = frame.get(ETHERNET..)?;
    if frame.get(12..14)? != [8, 0] || *ip.get(9)? != TCP {
        return None;
    }
    let tcp = ip.get(usize::from(ip.first()? & 0xf) * 4..)?;
    let end = |address: usize, port: usize| {
        let address: [u8; 4] = ip.get(address..address + 4)?.try_into().ok()?;
        let port: [u8; 2] = tcp.get(port..port + 2)?.try_into().ok()?;
        Some(SocketAddrV4::new(address.into(), u16::from_be_bytes(port)))
    };
    Some(Segment { from: end(12, 0)?, to: end(16, 2)?, flags: *tcp.get(13)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: [u8; 6] = [10, 77, 0, 2, 0, 9];
    const PEER: [u8; 6] = [10, 77, 0, 1, 0, 80];

    /// A capture of segments: sender, receiver, flags.
    fn capture(segments: &[([u8; 6], [u8; 6], u8)]) -> Vec<u8> {
        let mut file = MAGIC.to_vec();
        file.resize(GLOBAL_HEADER, 0);
        for (from, to, flags) in segments {
            let mut frame = vec![0; 54];
            frame[12] = 8;
            frame[14] = 0x45;
            frame[23] = 6;
            frame[26..30].copy_from_slice(&from[..4]);
            frame[30..34].copy_from_slice(&to[..4]);
            frame[34..36].copy_from_slice(&from[4..]);
            frame[36..38].copy_from_slice(&to[4..]);
            frame[47] = *flags;
            for value in [9u32, 0, 54, 54] {
                file.extend(value.to_le_bytes());
            }
            file.extend(&frame);
        }
        file
    }

    #[test]
    fn a_reset_is_seen_but_for_one_behind_the_end_of_its_connection() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pcap");
        let found = |segments: &[([u8; 6], [u8; 6], u8)]| {
            fs::write(&path, capture(segments)).unwrap();
            resets(&path).unwrap()
        };
        let reset = Reset { from: [10, 77, 0, 2].into(), to: [10, 77, 0, 1].into(), at_s: 9 };
        let (fin, rst, syn) = (0x11, 0x14, 0x02);
        assert_eq!(found(&[(GUEST, PEER, rst)]), [reset]);
        assert_eq!(found(&[(GUEST, PEER, 0x10)]), []);
        assert_eq!(found(&[(PEER, GUEST, fin), (GUEST, PEER, rst)]), [reset], "one end has closed");
        let closed = [(PEER, GUEST, fin), (GUEST, PEER, fin), (GUEST, PEER, rst)];
        assert_eq!(found(&closed), [], "both have");
        let other = [PEER[0], PEER[1], PEER[2], PEER[3], 0, 81];
        assert_eq!(found(&[closed[0], closed[1], (GUEST, other, rst)]), [reset], "another connection");
        assert_eq!(
            found(&[closed[0], closed[1], (GUEST, PEER, syn), closed[2]]),
            [reset],
            "the next one of these ports"
        );
    }
}
