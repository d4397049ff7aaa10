//! The frame by which a network learns behind which port an address is now: a reverse ARP request (RFC 903) that asks,
//! as broadcast, for the address of the sender itself. Switches learn from its source; nobody has to answer it.

use umbra_shadow::net::rx_mode::Mac;

use crate::header::HEADER_LEN;

/// Bytes of an Ethernet frame without its checksum that a network takes: shorter ones are padded.
pub(super) const SHORTEST: usize = 60;

/// What stands between the Ethernet addresses and the first hardware address (RFC 903, RFC 826): EtherType 0x8035,
/// Ethernet and IPv4 with lengths 6 and 4, operation 3 (`request reverse`).
const REQUEST_REVERSE: [u8; 10] = [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3];

/// The announcement of `mac`, behind an empty virtio-net header.
pub(super) fn announcement(mac: Mac) -> Vec<u8> {
    let mut frame = vec![0; HEADER_LEN];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend(REQUEST_REVERSE);
    for _sender_and_target in 0..2 {
        frame.extend(mac);
        frame.extend([0; 4]);
    }
    frame.resize(HEADER_LEN + SHORTEST, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_broadcast_of_the_shortest_length_with_the_address_as_source() {
        let frame = announcement([2, 0, 0, 0, 0, 7]);
        let (header, frame) = frame.split_at(HEADER_LEN);
        assert!(header.iter().all(|byte| *byte == 0));
        assert_eq!(frame.len(), 60);
        assert_eq!(
            (&frame[..6], &frame[6..12], &frame[12..14]),
            (&[0xff; 6][..], &[2, 0, 0, 0, 0, 7][..], &[0x80, 0x35][..])
        );
        assert_eq!((frame[21], &frame[22..28], &frame[32..38]), (3, &[2, 0, 0, 0, 0, 7][..], &[2, 0, 0, 0, 0, 7][..]));
    }
}
