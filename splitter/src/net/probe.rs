//! A question to a guest's neighbour, asked in the guest's name when its driver VM's NIC has found its carrier: the answer shows
//! that the NIC forwards ([`umbra_shadow::net::pacing`]). It is an ARP request (RFC 826) sent to the neighbour's own address, as a
//! kernel sends to confirm what it knows (RFC 1122, section 2.3.2.1). It is made from a frame that the guest has sent to that
//! neighbour, and shows the neighbour nothing that this frame does not.

use umbra_shadow::net::rx_mode::Mac;

use crate::header::HEADER_LEN;

use super::announce::SHORTEST;

/// Most neighbours asked at a time, and most frames of the log searched for them: one answer is enough.
pub(super) const MOST: usize = 4;
pub(super) const LOOK_AT: usize = 64;

const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
/// IEEE 802.1Q.
const VLAN: [u8; 2] = [0x81, 0x00];

/// Ethernet and IPv4 with lengths 6 and 4, operation 1 (request).
const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];

/// Who is asked by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    to: Mac,
    from: Mac,
    /// The VLAN tag's last two bytes.
    tag: Option<[u8; 2]>,
    sender: [u8; 4],
    target: [u8; 4],
}

impl Question {
    /// To the neighbour that `frame` (virtio-net header first) is for. `None`: it is no IPv4 packet from one host to another.
    pub(super) fn of(frame: &[u8]) -> Option<Self> {
        let (to, rest) = frame.get(HEADER_LEN..)?.split_first_chunk::<6>()?;
        let (from, rest) = rest.split_first_chunk::<6>()?;
        let (kind, rest) = rest.split_first_chunk::<2>()?;
        let (tag, kind, packet) = match *kind {
            VLAN => {
                let (tag, rest) = rest.split_first_chunk::<2>()?;
                let (kind, rest) = rest.split_first_chunk::<2>()?;
                (Some(*tag), *kind, rest)
            }
            kind => (None, kind, rest),
        };
        let addresses: &[u8; 8] = packet.get(12..20)?.try_into().ok()?;
        let &[a, b, c, d, e, f, g, h] = addresses;
        let (sender, target) = ([a, b, c, d], [e, f, g, h]);
        // Group and limited-broadcast targets are Ethernet group addresses as well.
        let hosts = to[0] & 1 == 0 && from[0] & 1 == 0 && sender != [0; 4] && target != [0; 4];
        let is_ipv4 = kind == IPV4 && packet[0] >> 4 == 4;
        (hosts && is_ipv4).then_some(Self { to: *to, from: *from, tag, sender, target })
    }

    /// The neighbours that the frames are for, each once.
    pub(super) fn all<'a>(frames: impl Iterator<Item = &'a [u8]>) -> Vec<Self> {
        let mut all = Vec::with_capacity(MOST);
        for question in frames.take(LOOK_AT).filter_map(Self::of) {
            if all.len() < MOST && !all.contains(&question) {
                all.push(question);
            }
        }
        all
    }

    /// The frame, behind an empty virtio-net header.
    pub(super) fn frame(&self) -> Vec<u8> {
        let mut frame = vec![0; HEADER_LEN];
        frame.extend(self.to);
        frame.extend(self.from);
        if let Some(tag) = self.tag {
            frame.extend(VLAN);
            frame.extend(tag);
        }
        frame.extend(ARP);
        frame.extend(REQUEST);
        frame.extend(self.from);
        frame.extend(self.sender);
        frame.extend([0; 6]);
        frame.extend(self.target);
        frame.resize(frame.len().max(HEADER_LEN + SHORTEST), 0);
        frame
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TO: Mac = [2, 0, 0, 0, 0, 9];
    const FROM: Mac = [2, 0, 0, 0, 0, 7];

    /// A datagram from 10.0.0.7 to 10.0.0.9, behind its headers.
    fn datagram(to: Mac, tag: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; HEADER_LEN];
        frame.extend(to);
        frame.extend(FROM);
        frame.extend(tag);
        frame.extend([0x08, 0x00, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0]);
        frame.extend([10, 0, 0, 7, 10, 0, 0, 9, 0, 1, 0, 2, 0, 8, 0, 0]);
        frame
    }

    #[test]
    fn a_datagram_gives_a_request_to_its_receiver() {
        let frame = Question::of(&datagram(TO, &[])).unwrap().frame();
        let (header, frame) = frame.split_at(HEADER_LEN);
        assert!(header.iter().all(|byte| *byte == 0));
        assert_eq!(frame.len(), 60);
        assert_eq!((&frame[..6], &frame[6..12], &frame[12..14]), (&TO[..], &FROM[..], &[8, 6][..]));
        assert_eq!((frame[21], &frame[22..28], &frame[28..32]), (1, &FROM[..], &[10, 0, 0, 7][..]));
        assert_eq!((&frame[32..38], &frame[38..42]), (&[0; 6][..], &[10, 0, 0, 9][..]));
    }

    #[test]
    fn a_tag_is_kept() {
        let frame = Question::of(&datagram(TO, &[0x81, 0, 0x20, 5])).unwrap().frame();
        assert_eq!(frame[HEADER_LEN + 12..][..6], [0x81, 0, 0x20, 5, 8, 6]);
    }

    #[test]
    fn each_neighbour_is_asked_once_and_few_are() {
        let frames: Vec<_> = (0..20).map(|n| datagram([2, 0, 0, 0, 1, n / 2], &[])).collect();
        let asked = Question::all(frames.iter().map(Vec::as_slice));
        assert_eq!(asked.iter().map(|question| question.to[5]).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(Question::of(&datagram([0xff; 6], &[])), None);
    }

    proptest! {
        #[test]
        fn no_frame_is_too_short_or_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..80), cut in 0usize..60) {
            let _ = Question::of(&bytes);
            let whole = datagram(TO, &[]);
            prop_assert_eq!(Question::of(&whole[..cut.min(HEADER_LEN + 33)]), None);
        }
    }
}
