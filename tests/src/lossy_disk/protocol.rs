//! NBD on the wire: the numbers and names of its specification
//! (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, "Values"), and the layouts of its messages.
//!
//! Pure: bytes in, values out; every number is big-endian. Invariant: what is parsed here is of a fixed size, or a slice whose
//! length the caller has bounded; nothing is allocated by a length that a client names.

/// Begins the server's greeting (`NBDMAGIC`).
pub(super) const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Follows it, and begins each option (`IHAVEOPT`).
pub(super) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Begins each reply to an option.
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins each request.
pub(super) const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins each reply to a request.
pub(super) const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

// Handshake flags, of the server and of the client (`NBD_FLAG_C_...` have the same bits).
pub(super) const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub(super) const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;

// Transmission flags.
pub(super) const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
pub(super) const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
pub(super) const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
pub(super) const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
pub(super) const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
pub(super) const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;

// Options.
pub(super) const NBD_OPT_EXPORT_NAME: u32 = 1;
pub(super) const NBD_OPT_ABORT: u32 = 2;
pub(super) const NBD_OPT_LIST: u32 = 3;
pub(super) const NBD_OPT_INFO: u32 = 6;
pub(super) const NBD_OPT_GO: u32 = 7;

// Replies to options.
pub(super) const NBD_REP_ACK: u32 = 1;
pub(super) const NBD_REP_SERVER: u32 = 2;
pub(super) const NBD_REP_INFO: u32 = 3;
pub(super) const NBD_REP_ERR_UNSUP: u32 = (1 << 31) + 1;
pub(super) const NBD_REP_ERR_INVALID: u32 = (1 << 31) + 3;
pub(super) const NBD_REP_ERR_UNKNOWN: u32 = (1 << 31) + 6;

// Kinds of information about an export.
pub(super) const NBD_INFO_EXPORT: u16 = 0;
pub(super) const NBD_INFO_BLOCK_SIZE: u16 = 3;

// Commands.
pub(super) const NBD_CMD_READ: u16 = 0;
pub(super) const NBD_CMD_WRITE: u16 = 1;
pub(super) const NBD_CMD_DISC: u16 = 2;
pub(super) const NBD_CMD_FLUSH: u16 = 3;
pub(super) const NBD_CMD_TRIM: u16 = 4;
pub(super) const NBD_CMD_WRITE_ZEROES: u16 = 6;

// Command flags.
pub(super) const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
pub(super) const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;

// Error values.
pub(super) const NBD_EPERM: u32 = 1;
pub(super) const NBD_EIO: u32 = 5;
pub(super) const NBD_EINVAL: u32 = 22;
pub(super) const NBD_ENOSPC: u32 = 28;

/// Most bytes of a read or a write. The specification wants 1 MiB at least; QEMU splits what is longer. 16 requests, the most that
/// QEMU has under way, then hold 64 MiB.
pub(super) const MAX_PAYLOAD: u32 = 4 << 20;
/// A write of up to so many bytes "SHOULD NOT be considered a denial of service" ("Size constraints"): above [`MAX_PAYLOAD`] it is
/// refused with an error, above this its connection is closed.
pub(super) const MAX_REFUSED: u32 = 32 << 20;
/// Most bytes of an option. Names are of 4,096 bytes at most ("Conventions"), so nothing that is served here is longer.
pub(super) const MAX_OPTION: u32 = 8192;

/// The smallest unit of a request, bytes.
pub(super) const MIN_BLOCK: u32 = 512;
/// The unit in which requests are best made, bytes.
const PREFERRED_BLOCK: u32 = 4096;

/// What the server says first.
pub(super) fn greeting() -> Vec<u8> {
    let flags = NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES;
    [&NBDMAGIC.to_be_bytes()[..], &IHAVEOPT.to_be_bytes(), &flags.to_be_bytes()].concat()
}

/// An option's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OptionHeader {
    pub(super) option: u32,
    pub(super) length: u32,
}

impl OptionHeader {
    pub(super) const LEN: usize = 16;

    /// `None`: not an option.
    pub(super) fn parse(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let [.., a, b, c, d, e, f, g, h] = *bytes;
        let is_option = bytes.starts_with(&IHAVEOPT.to_be_bytes());
        let header = Self { option: u32::from_be_bytes([a, b, c, d]), length: u32::from_be_bytes([e, f, g, h]) };
        is_option.then_some(header)
    }
}

/// A reply to an option.
pub(super) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let numbers = [option, kind, length].map(u32::to_be_bytes);
    [&OPTION_REPLY_MAGIC.to_be_bytes()[..], numbers.as_flattened(), data].concat()
}

/// The export that the data of `NBD_OPT_INFO` or `NBD_OPT_GO` name. `None`: they are malformed. Which information is asked for does
/// not matter here: the client gets all that there is.
pub(super) fn export_of_info(data: &[u8]) -> Option<&[u8]> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    let (name, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    let (count, kinds) = rest.split_first_chunk::<2>()?;
    (kinds.len() == 2 * usize::from(u16::from_be_bytes(*count))).then_some(name)
}

/// Data of the `NBD_REP_INFO` about size and flags.
pub(super) fn info_export(bytes: u64, flags: u16) -> Vec<u8> {
    [&NBD_INFO_EXPORT.to_be_bytes()[..], &export(bytes, flags)].concat()
}

/// Size and flags, which are also the beginning of the reply to `NBD_OPT_EXPORT_NAME`.
pub(super) fn export(bytes: u64, flags: u16) -> Vec<u8> {
    [&bytes.to_be_bytes()[..], &flags.to_be_bytes()].concat()
}

/// Data of the `NBD_REP_INFO` about the sizes of requests.
pub(super) fn info_block_size() -> Vec<u8> {
    let sizes = [MIN_BLOCK, PREFERRED_BLOCK, MAX_PAYLOAD].map(u32::to_be_bytes);
    [&NBD_INFO_BLOCK_SIZE.to_be_bytes()[..], sizes.as_flattened()].concat()
}

/// A request, without the data of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Header {
    pub(super) const LEN: usize = 28;

    /// `None`: not a request.
    pub(super) fn parse(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk()?;
        let (flags, rest) = rest.split_first_chunk()?;
        let (command, rest) = rest.split_first_chunk()?;
        let (cookie, rest) = rest.split_first_chunk()?;
        let (offset, rest) = rest.split_first_chunk()?;
        let header = Self {
            flags: u16::from_be_bytes(*flags),
            command: u16::from_be_bytes(*command),
            cookie: u64::from_be_bytes(*cookie),
            offset: u64::from_be_bytes(*offset),
            length: u32::from_be_bytes(rest.try_into().ok()?),
        };
        (u32::from_be_bytes(*magic) == NBD_REQUEST_MAGIC).then_some(header)
    }
}

/// A reply to a request: an error value (0: none), and the data of a successful read.
pub(super) fn simple_reply(error: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
    let head = [NBD_SIMPLE_REPLY_MAGIC, error].map(u32::to_be_bytes);
    [head.as_flattened(), &cookie.to_be_bytes(), data].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_parsed_field_by_field() {
        let mut bytes = [0; Header::LEN];
        bytes[..8].copy_from_slice(b"\x25\x60\x95\x13\0\x01\0\x06");
        bytes[8..16].copy_from_slice(b"\xff\0\0\0\0\0\0\x01");
        bytes[16..].copy_from_slice(b"\0\0\0\x01\0\0\0\0\0\0\x02\0");
        let want = Header {
            flags: NBD_CMD_FLAG_FUA,
            command: NBD_CMD_WRITE_ZEROES,
            cookie: 0xff00_0000_0000_0001,
            offset: 1 << 32,
            length: 512,
        };
        assert_eq!(Header::parse(&bytes), Some(want));
        bytes[3] = 0x12;
        assert_eq!(Header::parse(&bytes), None);
    }

    #[test]
    fn the_name_of_an_export_never_reaches_beyond_the_option() {
        assert_eq!(export_of_info(b"\0\0\0\0\0\0"), Some(&b""[..]));
        assert_eq!(export_of_info(b"\0\0\0\x01x\0\x01\0\x03"), Some(&b"x"[..]));
        for malformed in [
            &b""[..],
            b"\0\0\0",
            b"\0\0\0\0",
            b"\0\0\0\0\0\x01",
            b"\0\0\0\0\0\0\0\0",
            b"\0\0\0\x02x\0\0",
            b"\xff\xff\xff\xff\0\0",
        ] {
            assert_eq!(export_of_info(malformed), None, "{malformed:?}");
        }
    }
}
