//! Requests of a block device (virtio 1.2, section 5.2.6): bytes to enum, pure, and checked against the disk.

/// Bytes of a request's header: type and reserved (32 bits each), sector (64).
pub const HEADER_SIZE: usize = 16;
/// Unit of sectors, whatever the block size (section 5.2.4).
pub const SECTOR: u64 = 512;
/// Length of the identifier.
pub const ID_SIZE: usize = 20;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;

/// How a request ended, as the driver reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// It failed.
    IoError = 1,
    /// The device does not know such requests.
    Unsupported = 2,
}

/// A request; positions in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read from byte `.0` on.
    Read(u64),
    /// Write from byte `.0` on.
    Write(u64),
    /// Make what was written durable.
    Flush,
    /// Read the identifier.
    GetId,
}

/// What a request may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Size of the disk, in sectors.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
}

impl Request {
    /// Parses a header; `incoming` bytes of data go to the guest, `outgoing` come from it.
    pub fn parse(header: [u8; HEADER_SIZE], incoming: u64, outgoing: u64, limits: Limits) -> Result<Self, Status> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            TYPE_IN => position(sector, incoming, limits).map(Self::Read),
            TYPE_OUT if limits.read_only => Err(Status::IoError),
            TYPE_OUT => position(sector, outgoing, limits).map(Self::Write),
            TYPE_FLUSH => Ok(Self::Flush),
            TYPE_GET_ID if incoming >= ID_SIZE as u64 => Ok(Self::GetId),
            TYPE_GET_ID => Err(Status::IoError),
            _ => Err(Status::Unsupported),
        }
    }
}

/// The byte at which `length` bytes from `sector` on begin, if they are whole sectors of the disk.
fn position(sector: u64, length: u64, limits: Limits) -> Result<u64, Status> {
    let end = sector.checked_add(length / SECTOR);
    let inside = length.is_multiple_of(SECTOR) && end.is_some_and(|end| end <= limits.sectors);
    if inside { sector.checked_mul(SECTOR).ok_or(Status::IoError) } else { Err(Status::IoError) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DISK: Limits = Limits { sectors: 100, read_only: false };

    fn header(kind: u32, sector: u64) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    }

    #[test]
    fn reads_and_writes_stay_on_the_disk() {
        assert_eq!(Request::parse(header(0, 99), 512, 0, DISK), Ok(Request::Read(99 * 512)));
        assert_eq!(Request::parse(header(1, 0), 0, 51_200, DISK), Ok(Request::Write(0)));
        assert_eq!(Request::parse(header(0, 99), 1024, 0, DISK), Err(Status::IoError));
        assert_eq!(Request::parse(header(0, u64::MAX), 512, 0, DISK), Err(Status::IoError));
        assert_eq!(Request::parse(header(0, 0), 511, 0, DISK), Err(Status::IoError));
        let read_only = Limits { read_only: true, ..DISK };
        assert_eq!(Request::parse(header(1, 0), 0, 512, read_only), Err(Status::IoError));
    }

    #[test]
    fn other_types() {
        assert_eq!(Request::parse(header(4, 0), 0, 0, DISK), Ok(Request::Flush));
        assert_eq!(Request::parse(header(8, 0), 20, 0, DISK), Ok(Request::GetId));
        assert_eq!(Request::parse(header(8, 0), 19, 0, DISK), Err(Status::IoError));
        assert_eq!(Request::parse(header(11, 0), 0, 16, DISK), Err(Status::Unsupported));
    }

    proptest! {
        #[test]
        fn what_parses_lies_inside(bytes: [u8; HEADER_SIZE], kind in 0u32..10, incoming: u32, outgoing: u32, sectors in 0u64..1 << 40) {
            let mut bytes = bytes;
            bytes[..4].copy_from_slice(&kind.to_le_bytes());
            let limits = Limits { sectors, read_only: false };
            match Request::parse(bytes, incoming.into(), outgoing.into(), limits) {
                Ok(Request::Read(at)) => prop_assert!(at + u64::from(incoming) <= sectors * SECTOR),
                Ok(Request::Write(at)) => prop_assert!(at + u64::from(outgoing) <= sectors * SECTOR),
                _ => {}
            }
        }
    }
}
