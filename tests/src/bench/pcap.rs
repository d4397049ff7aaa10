//! Reads the captures of `filter-dump` (libpcap, little endian, Ethernet) as far as the bench asks: which TCP segments
//! carry a reset, and where frames of a kind went. Captured frames may be cut; headers up to the TCP flags are within the first 64 bytes.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
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

/// All TCP resets in a capture.
///
/// # Errors
/// The file cannot be read or is no capture.
pub fn resets(path: &Path) -> io::Result<Vec<Reset>> {
    let reset = |(at_s, frame): (u32, Vec<u8>)| reset_in(&frame).map(|(from, to)| Reset { from, to, at_s });
    Ok(frames(path)?.into_iter().filter_map(reset).collect())
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

fn reset_in(frame: &[u8]) -> Option<(Ipv4Addr, Ipv4Addr)> {
    const ETHERNET: usize = 14;
    const TCP: u8 = 6;
    const RST: u8 = 0x04;
    let ip = frame.get(ETHERNET..)?;
    if frame.get(12..14)? != [8, 0] || *ip.get(9)? != TCP {
        return None;
    }
    let length = usize::from(ip.first()? & 0xf) * 4;
    let flags = *ip.get(length + 13)?;
    let address = |at: usize| ip.get(at..at + 4)?.try_into().ok().map(<[u8; 4]>::into).map(|a: Ipv4Addr| a);
    (flags & RST != 0).then_some((address(12)?, address(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(flags: u8) -> Vec<u8> {
        let mut frame = vec![0; 54];
        frame[12] = 8;
        frame[14] = 0x45;
        frame[23] = 6;
        frame[26..34].copy_from_slice(&[10, 77, 0, 2, 10, 77, 0, 1]);
        frame[47] = flags;
        let mut file = MAGIC.to_vec();
        file.resize(GLOBAL_HEADER, 0);
        for value in [9u32, 0, 54, 54] {
            file.extend(value.to_le_bytes());
        }
        file.extend(&frame);
        file
    }

    #[test]
    fn a_reset_is_seen_and_a_plain_segment_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pcap");
        fs::write(&path, capture(0x14)).unwrap();
        let reset = Reset { from: [10, 77, 0, 2].into(), to: [10, 77, 0, 1].into(), at_s: 9 };
        assert_eq!(resets(&path).unwrap(), [reset]);
        fs::write(&path, capture(0x10)).unwrap();
        assert_eq!(resets(&path).unwrap(), []);
    }
}
