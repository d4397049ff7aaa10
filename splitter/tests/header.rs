//! The virtio-net header check, on its own: whatever the bytes, a header that passes names nothing outside its frame.
#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)]

use proptest::prelude::*;
use umbra_splitter::header::{HEADER_LEN, Header, MAX_FRAME, MAX_SEGMENTS, MIN_FRAME, Malformed, Offloads};

fn header(flags: u8, gso_type: u8, hdr_len: u16, gso_size: u16, start: u16, offset: u16) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    (bytes[0], bytes[1]) = (flags, gso_type);
    for (place, value) in [hdr_len, gso_size, start, offset].into_iter().enumerate() {
        bytes[2 + 2 * place..4 + 2 * place].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

#[test]
fn a_tcp_segment_passes_as_it_is() {
    let bytes = header(1, 1, 54, 1448, 34, 16);
    let checked = Header::check(bytes, 60_000, Offloads::all()).unwrap();
    assert_eq!(checked.needs(), Offloads::CHECKSUM | Offloads::TSO4);
    let mut expected = bytes;
    expected[10] = 3;
    assert_eq!(checked.to_bytes(3), expected);
}

#[test]
fn lengths_are_bounded() {
    let plain = [0; HEADER_LEN];
    assert_eq!(Header::check(plain, MIN_FRAME - 1, Offloads::all()), Err(Malformed::TooShort(13)));
    assert!(Header::check(plain, MIN_FRAME, Offloads::empty()).is_ok());
    assert!(Header::check(plain, MAX_FRAME, Offloads::empty()).is_ok());
    assert_eq!(Header::check(plain, MAX_FRAME + 1, Offloads::all()), Err(Malformed::TooLong(MAX_FRAME + 1)));
}

#[test]
fn a_checksum_outside_the_frame_is_refused() {
    assert!(Header::check(header(1, 0, 0, 0, 50, 8), 60, Offloads::all()).is_ok());
    assert!(Header::check(header(1, 0, 0, 0, 50, 9), 60, Offloads::all()).is_err());
    assert!(Header::check(header(1, 0, 0, 0, u16::MAX, u16::MAX), 60, Offloads::all()).is_err());
}

#[test]
fn what_was_not_negotiated_is_refused() {
    let tso6 = header(1, 4, 74, 1440, 54, 16);
    assert!(Header::check(tso6, 5000, Offloads::CHECKSUM | Offloads::TSO4).is_err());
    assert!(Header::check(tso6, 5000, Offloads::CHECKSUM | Offloads::TSO6).is_ok());
    // UDP fragmentation, ECN, USO: nobody offers them.
    for gso_type in [3, 0x81, 5, 0x80, 2, 255] {
        assert!(Header::check(header(1, gso_type, 54, 1448, 34, 16), 5000, Offloads::all()).is_err());
    }
    // A segment without a checksum to finish, or into segments of nothing.
    assert!(Header::check(header(0, 1, 54, 1448, 34, 16), 5000, Offloads::all()).is_err());
    assert!(Header::check(header(1, 1, 54, 0, 34, 16), 5000, Offloads::all()).is_err());
}

#[test]
fn a_frame_of_too_many_segments_is_refused() {
    let check = |size, len| Header::check(header(1, 1, 54, size, 34, 16), len, Offloads::all());
    // The attack: 65,000 buffers of the kernel that cuts the frame.
    assert_eq!(check(1, MAX_FRAME), Err(Malformed::Segments { size: 1, len: MAX_FRAME }));
    for size in 1..=100u16 {
        let longest = 54 + MAX_SEGMENTS * usize::from(size);
        assert!(check(size, longest.min(MAX_FRAME)).is_ok(), "{size}");
        assert!(longest >= MAX_FRAME || check(size, longest + 1).is_err(), "{size}");
    }
    // Two short messages of one stream that a forwarding kernel has merged; a full frame at the smallest usual MTU.
    assert!(check(5, 66 + 10).is_ok());
    assert!(check(536, MAX_FRAME).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_passes_is_within_the_frame_and_the_offloads(
        bytes in any::<[u8; HEADER_LEN]>(),
        len in 0usize..70_000,
        offloads in 0u8..8,
        buffers in 1u16..100,
    ) {
        let negotiated = Offloads::from_bits_truncate(offloads);
        if let Ok(checked) = Header::check(bytes, len, negotiated) {
            let out = checked.to_bytes(buffers);
            prop_assert!((MIN_FRAME..=MAX_FRAME).contains(&len));
            prop_assert!(negotiated.contains(checked.needs()));
            prop_assert!(out[0] <= 1);
            let field = |at: usize| usize::from(u16::from_le_bytes([out[at], out[at + 1]]));
            if out[0] == 1 {
                prop_assert!(field(6) + field(8) + 2 <= len);
            } else {
                prop_assert_eq!((field(6), field(8), out[1]), (0, 0, 0));
            }
            prop_assert!(field(2) <= len);
            prop_assert!(out[1] == 0 || len <= 54 + MAX_SEGMENTS * field(4));
            prop_assert_eq!(field(10), usize::from(buffers));
            // Checked again it is the same: a logged frame can be checked when it is replayed.
            prop_assert_eq!(Header::check(out, len, negotiated).map(|h| h.to_bytes(buffers)), Ok(out));
        }
    }
}
