//! Requests of a block device (virtio 1.2, section 5.2.6): from a descriptor chain to what is to be done where, checked against what
//! the guest was offered; and the answer.
//!
//! Invariant: header and ranges are read once; what [`Request::parse`] gives back lies within the disk, in whole logical blocks.

use umbra_shadow::block::{self, Access, SECTOR_BYTES, SectorRange};
use umbra_splitter::copy::{gather, scatter};
use umbra_splitter::queue::Chain;

use super::offer::{ID_SIZE, MAX_DISCARD_SECTORS, MAX_SEGMENTS, MAX_ZEROES_SECTORS, Offer};

/// Bytes of a request's header: type and reserved (32 bits each), sector (64).
pub const HEADER_SIZE: usize = 16;
/// Bytes of a range to discard or to fill with zeroes: sector (64 bits), number of sectors and flags (32 each).
const SEGMENT_SIZE: usize = 16;
/// The sectors may be deallocated: the only flag, and of write-zeroes alone.
const FLAG_UNMAP: u32 = 1;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;

/// How a request ended, as the driver reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// It failed.
    IoError = 1,
    /// The device does not offer such requests.
    Unsupported = 2,
}

impl From<block::Status> for Status {
    fn from(status: block::Status) -> Self {
        match status {
            block::Status::Ok => Self::Ok,
            block::Status::Unsupported => Self::Unsupported,
            block::Status::IoError => Self::IoError,
        }
    }
}

/// What a disk has to do for a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Job {
    /// Read or write these sectors, with the data in the chain.
    Transfer(Access, SectorRange),
    /// Do this to each of these ranges, 1 to [`MAX_SEGMENTS`] of them; there are no data.
    Ranges(Vec<(Access, SectorRange)>),
    /// Make stable what was written.
    Flush,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// One for the disk.
    Job(Job),
    /// Read the identifier.
    GetId,
    /// No sector at all.
    Nothing,
}

/// What a chain asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// This is to be done.
    Job(Job),
    /// Nothing: it is answered already; how many bytes were written to it.
    Answered(u32),
}

/// Bytes of data of a request, to the guest and from it.
#[derive(Clone, Copy, Debug)]
pub struct Lengths {
    /// To the guest: what it can be given beside the status.
    pub incoming: u64,
    /// From the guest: what is behind the header.
    pub outgoing: u64,
}

impl Request {
    /// Reads the request in a chain. One that is malformed is answered at once, as are those that take no disk.
    pub fn read(chain: &Chain<'_>, offer: &Offer) -> Asked {
        // The status is the last byte that the device writes; without room for it nothing can be said.
        let Some(incoming) = chain.writable_len().checked_sub(1) else { return Asked::Answered(0) };
        let mut header = [0; HEADER_SIZE];
        if gather(chain.readable(), 0, &mut header) < HEADER_SIZE {
            return Asked::Answered(answer(chain, Status::IoError, 0));
        }
        let outgoing = (chain.readable_len() - HEADER_SIZE) as u64;
        let lengths = Lengths { incoming: incoming as u64, outgoing };
        let segments = |into: &mut [u8]| gather(chain.readable(), HEADER_SIZE, into);
        match Self::parse(header, lengths, segments, offer) {
            Ok(Self::Nothing) => Asked::Answered(answer(chain, Status::Ok, 0)),
            Ok(Self::GetId) => Asked::Answered(answer(chain, Status::Ok, scatter(&offer.id, chain.writable(), 0))),
            Ok(Self::Job(job)) => Asked::Job(job),
            Err(status) => Asked::Answered(answer(chain, status, 0)),
        }
    }

    /// Parses a header; `segments` reads what is behind it.
    ///
    /// # Errors
    /// How it is to be answered.
    pub fn parse(
        header: [u8; HEADER_SIZE],
        Lengths { incoming, outgoing }: Lengths,
        segments: impl FnOnce(&mut [u8]) -> usize,
        offer: &Offer,
    ) -> Result<Self, Status> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            TYPE_IN => transfer(Access::Read, sector, incoming, offer),
            TYPE_OUT if offer.read_only => Err(Status::IoError),
            TYPE_OUT => transfer(Access::Write, sector, outgoing, offer),
            TYPE_FLUSH => Ok(Self::Job(Job::Flush)),
            TYPE_GET_ID if incoming >= ID_SIZE as u64 => Ok(Self::GetId),
            TYPE_GET_ID => Err(Status::IoError),
            TYPE_DISCARD if offer.takes_discards() => ranges(outgoing, segments, |segment| segment.discard(offer)),
            TYPE_WRITE_ZEROES if !offer.read_only => ranges(outgoing, segments, |segment| segment.zeroes(offer)),
            _ => Err(Status::Unsupported),
        }
    }
}

fn transfer(access: Access, sector: u64, bytes: u64, offer: &Offer) -> Result<Request, Status> {
    if !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Status::IoError);
    }
    let at = place(sector, bytes / SECTOR_BYTES, offer)?;
    Ok(at.map_or(Request::Nothing, |at| Request::Job(Job::Transfer(access, at))))
}

/// These sectors, if they are whole logical blocks of the disk; none for no sectors.
fn place(sector: u64, count: u64, offer: &Offer) -> Result<Option<SectorRange>, Status> {
    let end = sector.checked_add(count).filter(|end| *end <= offer.sectors).ok_or(Status::IoError)?;
    let is_whole = [sector, count].iter().all(|at| at.is_multiple_of(offer.block_sectors()));
    if is_whole { Ok(SectorRange::between(sector, end)) } else { Err(Status::IoError) }
}

/// A range of a request without data.
#[derive(Clone, Copy, Debug)]
struct Segment {
    sector: u64,
    count: u32,
    flags: u32,
}

impl Segment {
    fn discard(self, offer: &Offer) -> Result<Option<(Access, SectorRange)>, Status> {
        // The flag is meaningless here (section 5.2.6.2), and what is meaningless is unsupported.
        self.at_most(MAX_DISCARD_SECTORS, 0, offer).map(|at| at.map(|at| (Access::Discard, at)))
    }

    fn zeroes(self, offer: &Offer) -> Result<Option<(Access, SectorRange)>, Status> {
        let unmap = self.flags & FLAG_UNMAP != 0;
        let at = self.at_most(MAX_ZEROES_SECTORS, FLAG_UNMAP, offer)?;
        Ok(at.map(|at| (Access::WriteZeroes { unmap }, at)))
    }

    fn at_most(self, longest: u32, flags: u32, offer: &Offer) -> Result<Option<SectorRange>, Status> {
        if self.flags & !flags != 0 {
            return Err(Status::Unsupported);
        }
        if self.count > longest {
            return Err(Status::IoError);
        }
        place(self.sector, self.count.into(), offer)
    }
}

fn ranges(
    bytes: u64,
    segments: impl FnOnce(&mut [u8]) -> usize,
    check: impl Fn(Segment) -> Result<Option<(Access, SectorRange)>, Status>,
) -> Result<Request, Status> {
    let mut buffer = [0; MAX_SEGMENTS as usize * SEGMENT_SIZE];
    let length = usize::try_from(bytes).ok().filter(|length| (1..=buffer.len()).contains(length));
    let buffer = length.and_then(|length| buffer.get_mut(..length)).ok_or(Status::IoError)?;
    let read = segments(buffer);
    let (whole, rest) = buffer.as_chunks::<SEGMENT_SIZE>();
    if !rest.is_empty() || read < whole.len() * SEGMENT_SIZE {
        return Err(Status::IoError);
    }
    let mut ranges = Vec::with_capacity(whole.len());
    for segment in whole {
        let [sector @ .., c0, c1, c2, c3, f0, f1, f2, f3] = *segment;
        let (count, flags) = (u32::from_le_bytes([c0, c1, c2, c3]), u32::from_le_bytes([f0, f1, f2, f3]));
        ranges.extend(check(Segment { sector: u64::from_le_bytes(sector), count, flags })?);
    }
    Ok(if ranges.is_empty() { Request::Nothing } else { Request::Job(Job::Ranges(ranges)) })
}

/// Writes the status of a request with `data` bytes for the driver; how many bytes that are in all.
pub fn answer(chain: &Chain<'_>, status: Status, data: usize) -> u32 {
    let Some(last) = chain.writable_len().checked_sub(1) else { return 0 };
    scatter(&[status as u8], chain.writable(), last);
    u32::try_from(data.min(last) + 1).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::super::offer::tests::OFFER;
    use super::*;

    fn header(kind: u32, sector: u64) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    }

    fn parse(header: [u8; HEADER_SIZE], incoming: u64, outgoing: u64, offer: Offer) -> Result<Request, Status> {
        Request::parse(header, Lengths { incoming, outgoing }, |_| 0, &offer)
    }

    fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    /// A request of this type with these bytes behind the header.
    fn with_segments(kind: u32, bytes: &[u8], offer: Offer) -> Result<Request, Status> {
        let lengths = Lengths { incoming: 0, outgoing: bytes.len() as u64 };
        let read = |into: &mut [u8]| {
            into.copy_from_slice(&bytes[..into.len()]);
            into.len()
        };
        Request::parse(header(kind, 0), lengths, read, &offer)
    }

    fn at(start: u64, count: u64) -> SectorRange {
        SectorRange::new(start, count).unwrap()
    }

    #[test]
    fn reads_and_writes_stay_on_the_disk() {
        assert_eq!(parse(header(0, 99), 512, 0, OFFER), Ok(Request::Job(Job::Transfer(Access::Read, at(99, 1)))));
        assert_eq!(parse(header(1, 0), 0, 51_200, OFFER), Ok(Request::Job(Job::Transfer(Access::Write, at(0, 100)))));
        assert_eq!(parse(header(0, 99), 1024, 0, OFFER), Err(Status::IoError));
        assert_eq!(parse(header(0, u64::MAX), 512, 0, OFFER), Err(Status::IoError));
        assert_eq!(parse(header(0, 0), 511, 0, OFFER), Err(Status::IoError));
        assert_eq!(parse(header(0, 100), 0, 0, OFFER), Ok(Request::Nothing));
        let read_only = Offer { read_only: true, ..OFFER };
        assert_eq!(parse(header(1, 0), 0, 512, read_only), Err(Status::IoError));
    }

    #[test]
    fn requests_are_of_whole_logical_blocks() {
        let offer = Offer { logical_block: 4096, sectors: 96, ..OFFER };
        assert_eq!(parse(header(1, 8), 0, 4096, offer), Ok(Request::Job(Job::Transfer(Access::Write, at(8, 8)))));
        for (sector, bytes) in [(8, 512), (1, 4096), (8, 4608)] {
            assert_eq!(parse(header(1, sector), 0, bytes, offer), Err(Status::IoError));
        }
        assert_eq!(with_segments(TYPE_DISCARD, &segment(8, 4, 0), offer), Err(Status::IoError));
    }

    #[test]
    fn other_types() {
        assert_eq!(parse(header(4, 0), 0, 0, OFFER), Ok(Request::Job(Job::Flush)));
        assert_eq!(parse(header(8, 0), 20, 0, OFFER), Ok(Request::GetId));
        assert_eq!(parse(header(8, 0), 19, 0, OFFER), Err(Status::IoError));
        for kind in [2, 10, 14, 15, 16, u32::MAX] {
            assert_eq!(parse(header(kind, 0), 0, 16, OFFER), Err(Status::Unsupported));
        }
    }

    #[test]
    fn ranges_are_all_checked_before_any_is_touched() {
        let two = [segment(0, 8, 0), segment(92, 8, 0)].concat();
        let ranges = [at(0, 8), at(92, 8)].map(|at| (Access::Discard, at)).to_vec();
        assert_eq!(with_segments(TYPE_DISCARD, &two, OFFER), Ok(Request::Job(Job::Ranges(ranges))));
        let unmap = (Access::WriteZeroes { unmap: true }, at(1, 2));
        assert_eq!(
            with_segments(TYPE_WRITE_ZEROES, &segment(1, 2, 1), OFFER),
            Ok(Request::Job(Job::Ranges(vec![unmap])))
        );
        assert_eq!(with_segments(TYPE_DISCARD, &segment(7, 0, 0), OFFER), Ok(Request::Nothing));
        let outside = [segment(0, 8, 0), segment(93, 8, 0)].concat();
        assert_eq!(with_segments(TYPE_DISCARD, &outside, OFFER), Err(Status::IoError));
    }

    #[test]
    fn ranges_that_are_none_are_refused() {
        let large = Offer { sectors: u64::MAX, ..OFFER };
        let many = vec![0; (MAX_SEGMENTS as usize + 1) * SEGMENT_SIZE];
        for bytes in [&[][..], &[0; 15], &[0; 24], &many, &segment(0, MAX_DISCARD_SECTORS + 1, 0)] {
            assert_eq!(with_segments(TYPE_DISCARD, bytes, large), Err(Status::IoError));
        }
        assert_eq!(
            with_segments(TYPE_WRITE_ZEROES, &segment(0, MAX_ZEROES_SECTORS + 1, 0), large),
            Err(Status::IoError)
        );
        assert_eq!(with_segments(TYPE_DISCARD, &segment(0, 8, 1), OFFER), Err(Status::Unsupported), "unmap");
        assert_eq!(with_segments(TYPE_WRITE_ZEROES, &segment(0, 8, 2), OFFER), Err(Status::Unsupported));
        let plain = Offer { discards: false, ..OFFER };
        assert_eq!(with_segments(TYPE_DISCARD, &segment(0, 8, 0), plain), Err(Status::Unsupported));
        let read_only = Offer { read_only: true, ..OFFER };
        for kind in [TYPE_DISCARD, TYPE_WRITE_ZEROES] {
            assert_eq!(with_segments(kind, &segment(0, 8, 0), read_only), Err(Status::Unsupported));
        }
    }

    proptest! {
        #[test]
        fn what_parses_lies_inside(
            bytes: [u8; HEADER_SIZE], kind in 0u32..16, incoming: u32, outgoing in 0u32..1 << 20, sectors in 0u64..1 << 40,
            behind in prop::collection::vec(any::<u8>(), MAX_SEGMENTS as usize * SEGMENT_SIZE), exponent in 0u32..4,
        ) {
            let mut bytes = bytes;
            bytes[..4].copy_from_slice(&kind.to_le_bytes());
            let offer = Offer { sectors, logical_block: 512 << exponent, ..OFFER };
            let lengths = Lengths { incoming: incoming.into(), outgoing: outgoing.into() };
            let read = |into: &mut [u8]| { into.copy_from_slice(&behind[..into.len()]); into.len() };
            let inside = |at: SectorRange| at.end() <= sectors && at.start().is_multiple_of(offer.block_sectors());
            match Request::parse(bytes, lengths, read, &offer) {
                Ok(Request::Job(Job::Transfer(access, at))) => {
                    let length = if access == Access::Read { incoming } else { outgoing };
                    prop_assert!(inside(at) && at.bytes() == u64::from(length));
                }
                Ok(Request::Job(Job::Ranges(ranges))) => {
                    prop_assert!((1..=MAX_SEGMENTS as usize).contains(&ranges.len()) && ranges.iter().all(|(_, at)| inside(*at)));
                }
                _ => {}
            }
        }
    }
}
