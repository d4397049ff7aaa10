//! `struct virtio_net_hdr_v1` (virtio 1.2, section 5.1.6): the only file that parses it. Pure: 12 untrusted bytes
//! and the frame's length in, a checked header or the reason against it out.
//!
//! Invariant: a header that leaves this file names no byte outside its frame, no offload that was not negotiated with
//! the side it came from, and no more segments than their receiver can bear. What the frame itself holds is the
//! receiver's to check, as on a wire.

use bitflags::bitflags;
use thiserror::Error;

/// Length of the header. With `VIRTIO_F_VERSION_1` it is the same with and without mergeable buffers.
pub const HEADER_LEN: usize = 12;

/// Longest frame behind a header: a 65,535-byte IP packet, an Ethernet header, two VLAN tags, and five bytes of
/// grace, which is also what Linux calls the largest receive buffer (`GOOD_PACKET_LEN` with GSO).
pub const MAX_FRAME: usize = 65_562;

/// Shortest frame: an Ethernet header.
pub const MIN_FRAME: usize = 14;

/// Most segments that a frame may be cut into. Whoever cuts it has a buffer of about 1 KiB for each of them: 1 MiB at most, where
/// 65,000 segments of one byte take 60 MiB, more than a driver VM has to spare. An honest kernel reaches it in frames above 48 KiB
/// alone, to a peer whose segments have 48 bytes (Linux's `TCP_MIN_SND_MSS`). It makes none that are smaller, but may pass them on,
/// where it merges what came in (GRO): so there is no bound of their size.
pub const MAX_SEGMENTS: usize = 1024;

/// Shortest headers of a frame that is cut into TCP segments: Ethernet, IPv4 and TCP, without options.
const MIN_SEGMENT_HEADERS: usize = 54;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_NONE`.
const GSO_NONE: u8 = 0;
/// `VIRTIO_NET_HDR_GSO_TCPV4`.
const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV6`.
const GSO_TCPV6: u8 = 4;

bitflags! {
    /// Offloads of one direction.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Offloads: u8 {
        /// Partial checksums.
        const CHECKSUM = 1;
        /// TCP segmentation over IPv4.
        const TSO4 = 2;
        /// TCP segmentation over IPv6.
        const TSO6 = 4;
    }
}

/// What is wrong with a header or its frame.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Malformed {
    /// Shorter than an Ethernet header.
    #[error("frame of {0} bytes, less than an Ethernet header")]
    TooShort(usize),
    /// Longer than [`MAX_FRAME`].
    #[error("frame of {0} bytes, more than the {MAX_FRAME} that a frame can have")]
    TooLong(usize),
    /// The checksum lies outside the frame.
    #[error("checksum at {start}+{offset} in a frame of {len} bytes")]
    Checksum {
        /// `csum_start`.
        start: u16,
        /// `csum_offset`.
        offset: u16,
        /// Length of the frame.
        len: usize,
    },
    /// An offload that was not negotiated.
    #[error("offload not negotiated: flags {flags:#x}, gso_type {gso_type:#x}")]
    NotNegotiated {
        /// `flags`.
        flags: u8,
        /// `gso_type`.
        gso_type: u8,
    },
    /// Segmentation with a segment size of 0, without a checksum to finish, or with more header than frame.
    #[error(
        "segmentation into {size} bytes with {header} bytes of headers in a frame of {len} bytes, flags {flags:#x}"
    )]
    Segmentation {
        /// `gso_size`.
        size: u16,
        /// `hdr_len`.
        header: u16,
        /// Length of the frame.
        len: usize,
        /// `flags`.
        flags: u8,
    },
    /// More segments than [`MAX_SEGMENTS`].
    #[error("a frame of {len} bytes in segments of {size}")]
    Segments {
        /// `gso_size`.
        size: u16,
        /// Length of the frame.
        len: usize,
    },
}

impl Malformed {
    /// True if the frame may be the doing of a host on the wire: a kernel merges what comes in, in whatever segments its sender
    /// chose. Such a frame is dropped, and proves nothing against the driver VM that brought it in.
    pub fn may_come_from_the_wire(&self) -> bool {
        matches!(self, Self::Segments { .. })
    }
}

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    bytes: [u8; HEADER_LEN],
    needs: Offloads,
}

impl Header {
    /// Checks the header of a frame of `len` bytes that comes from a driver with `negotiated` offloads. Flags that
    /// no offload here knows are cleared, as the specification asks of a device.
    pub fn check(bytes: [u8; HEADER_LEN], len: usize, negotiated: Offloads) -> Result<Self, Malformed> {
        if len < MIN_FRAME {
            return Err(Malformed::TooShort(len));
        }
        if len > MAX_FRAME {
            return Err(Malformed::TooLong(len));
        }
        let [flags, gso_type, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = bytes;
        let [header, size, start, offset] = [[h0, h1], [s0, s1], [c0, c1], [o0, o1]].map(u16::from_le_bytes);
        let mut needs = Offloads::empty();
        let mut clean = [0; HEADER_LEN];
        if flags & NEEDS_CSUM != 0 {
            if usize::from(start) + usize::from(offset) + 2 > len {
                return Err(Malformed::Checksum { start, offset, len });
            }
            needs |= Offloads::CHECKSUM;
            clean[0] = NEEDS_CSUM;
            clean[6..10].copy_from_slice(&bytes[6..10]);
        }
        needs |= match gso_type {
            GSO_NONE => Offloads::empty(),
            GSO_TCPV4 => Offloads::TSO4,
            GSO_TCPV6 => Offloads::TSO6,
            _ => return Err(Malformed::NotNegotiated { flags, gso_type }),
        };
        if !negotiated.contains(needs) {
            return Err(Malformed::NotNegotiated { flags, gso_type });
        }
        if gso_type != GSO_NONE {
            if size == 0 || usize::from(header) > len || flags & NEEDS_CSUM == 0 {
                return Err(Malformed::Segmentation { size, header, len, flags });
            }
            if len > MIN_SEGMENT_HEADERS + MAX_SEGMENTS * usize::from(size) {
                return Err(Malformed::Segments { size, len });
            }
            clean[1..6].copy_from_slice(&bytes[1..6]);
        }
        Ok(Self { bytes: clean, needs })
    }

    /// The offloads that the receiver must have.
    pub fn needs(&self) -> Offloads {
        self.needs
    }

    /// The header as the receiver gets it, the frame being in `buffers` buffers.
    pub fn to_bytes(self, buffers: u16) -> [u8; HEADER_LEN] {
        let mut bytes = self.bytes;
        bytes[10..].copy_from_slice(&buffers.to_le_bytes());
        bytes
    }
}
