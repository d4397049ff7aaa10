//! The disk protocol: records over the two queues of the virtio-console port [`BLOCK_PORT`]`.N`, one port a guest's disk, and data in a
//! *pool* in the driver VM's memory.
//!
//! ```text
//!   host:   Begin ---------------- Read, Write, Zeroes, Discard, Flush (tag, range, place in the pool) ...
//!   agent:         Hello ----------------------- AtWork (tag) ... Done (tag, errno, bytes) ... CacheLost ...
//! ```
//! A record has [`RECORD_BYTES`], all little-endian:
//!
//! ```text
//!   0 kind (1)   1 flags (1)   2 tag (2)   4 generation (4)   8 attempt (4)   12 errno (4)
//!   16 first sector (8)   24 sectors (8)   32 place in the pool, bytes (8)   40 bytes moved (8)   48 zero (16)
//! ```
//! One buffer of a queue holds whole records, at most [`MAX_BATCH`]; a [`Hello`] has a buffer of its own: a record of kind `HELLO`, and
//! behind it JSON. Generation and attempt are the [`LinkId`] of the session. A session begins with the host's [`ToService::Begin`]; the
//! agent answers with its hello when nothing of an earlier session is on its way to the disk any more. Records of an earlier session of
//! the same life may have waited in the driver VM's kernel; both sides skip them.
//!
//! The driver VM's kernel sees the host's end open while the host has a connection for the port, which is set up when the service has
//! the port open. A service that closes the port ends the session, for what was on its way to it is lost: it keeps the port open from
//! session to session, and takes neither the end of the stream nor a closed host's end for anything but silence.
//!
//! Sectors count from the start of the *disk* (the window's start is added by the host, and the bounds are checked again by the agent).
//! The pool is the host's to give out: it copies what is to be written into it before the record is sent, and what was read out of it
//! after the answer. Each piece lies within one of the pool's ranges. Invariant: what [`FromService::parse`] and [`ToService::parse`]
//! give back has every field in range; whether it is true is for the shadow to judge.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use umbra_shadow::block::{Disk, SectorRange, Tag};
use umbra_shadow::{Generation, LinkId};

/// Beginning of the names of the virtio-console ports that carry this protocol; the index of the guest's end follows after a dot.
pub const BLOCK_PORT: &str = "org.umbra.block";

/// Bytes of a record.
pub const RECORD_BYTES: usize = 64;

/// Most records in one buffer: those that fit into the receive buffers of Linux's console driver, a page of 4 KiB.
pub const MAX_BATCH: usize = 64;

/// Longest hello with its record, in bytes: one buffer of a page.
pub const MAX_HELLO: usize = 4096;

/// Most orders in flight of a session: the deepest queue that a guest's disk has.
pub const MAX_DEPTH: u16 = 256;

/// Most ranges of a pool: 16 MiB in huge pages of 2 MiB, or fewer where some lie side by side.
pub const MAX_POOL_RANGES: usize = 8;

/// Interval of [`FromService::AtWork`]: a fifth of the shortest time after which a host takes a disk that says nothing for stalled.
pub const AT_WORK_INTERVAL: Duration = Duration::from_secs(1);

/// Alignment of a piece of the pool, in bytes: the largest logical block, so that the driver can transfer from it directly.
pub const PIECE_ALIGNMENT: u64 = 4096;

const BEGIN: u8 = 0x01;
const READ: u8 = 0x02;
const WRITE: u8 = 0x03;
const WRITE_ZEROES: u8 = 0x04;
const DISCARD: u8 = 0x05;
const FLUSH: u8 = 0x06;
const HELLO: u8 = 0x81;
const DONE: u8 = 0x82;
const CACHE_LOST: u8 = 0x83;
const AT_WORK: u8 = 0x84;

/// The device may deallocate the sectors of a `WRITE_ZEROES`.
const FLAG_UNMAP: u8 = 1;

/// A range of the driver VM's memory that belongs to the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolRange {
    /// Guest physical address in the driver VM, a multiple of [`PIECE_ALIGNMENT`].
    pub start: u64,
    /// Bytes, a multiple of [`PIECE_ALIGNMENT`] and not 0.
    pub length: u64,
}

/// The agent's answer to [`ToService::Begin`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// The disk as it is now.
    pub disk: Disk,
    /// The pool of this session. Places count from the start of the first range, through all of them in order.
    pub pool: Vec<PoolRange>,
    /// Most orders in flight, 1 to [`MAX_DEPTH`].
    pub depth: u16,
}

impl Hello {
    /// Whether there can be such a session: a driver VM may say anything. Whether the pool lies in the driver VM's memory is for the
    /// host to see at each use.
    pub fn is_sane(&self) -> bool {
        let is_aligned = |bytes: u64| bytes.is_multiple_of(PIECE_ALIGNMENT);
        let is_range = |range: &PoolRange| {
            let PoolRange { start, length } = *range;
            is_aligned(start) && is_aligned(length) && length > 0 && start.checked_add(length).is_some()
        };
        (1..=MAX_DEPTH).contains(&self.depth)
            && (1..=MAX_POOL_RANGES).contains(&self.pool.len())
            && self.pool.iter().all(is_range)
            && self.pool.iter().try_fold(0u64, |sum, range| sum.checked_add(range.length)).is_some()
            && self.disk.is_sane()
    }
}

/// What an order is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read into the pool.
    Read {
        /// Place in the pool, bytes.
        place: u64,
    },
    /// Write from the pool.
    Write {
        /// Place in the pool, bytes.
        place: u64,
    },
    /// Write zeroes.
    WriteZeroes {
        /// Whether the device may deallocate the sectors.
        unmap: bool,
    },
    /// Discard.
    Discard,
}

/// What the host sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToService {
    /// First record: a session begins, and whatever was of an earlier one at this port is over.
    Begin,
    /// Do this to these sectors of the disk.
    Access {
        /// The order's name until it is answered.
        tag: Tag,
        /// What to do.
        operation: Operation,
        /// Where.
        at: SectorRange,
    },
    /// Make stable what is done.
    Flush {
        /// The order's name until it is answered.
        tag: Tag,
    },
}

/// What the agent sends, but for its hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromService {
    /// The answer to an order.
    Done {
        /// Which.
        tag: Tag,
        /// 0, or Linux's number of the error.
        errno: i32,
        /// Bytes read or written; 0 where there are no data.
        bytes: u64,
    },
    /// The driver has reset the controller by itself: the cache may be lost. Sent before any answer that the device gave since.
    CacheLost,
    /// The disk has this order, and no result yet. Said again and again ([`AT_WORK_INTERVAL`]) of what a disk may take long for: a flush,
    /// zeroes, a discard.
    AtWork {
        /// Which.
        tag: Tag,
    },
}

/// Why bytes are no record of the protocol.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ProtocolError {
    /// Not whole records, too many of them, or none.
    #[error("a buffer of {0} bytes, which are not 1 to {MAX_BATCH} records of {RECORD_BYTES} bytes")]
    Length(usize),
    /// No such kind, in this direction.
    #[error("a record of unknown kind {0:#x}")]
    Kind(u8),
    /// A field is out of range.
    #[error("a record of kind {kind:#x} with a wrong {field}")]
    Field {
        /// Kind of the record.
        kind: u8,
        /// Which field.
        field: &'static str,
    },
    /// Of another life, or of a session that has not begun: generation and attempt.
    #[error("a record of session {0}.{1}")]
    Session(u32, u32),
    /// The hello is none.
    #[error("a hello that cannot be: {0}")]
    Hello(String),
}

/// A record, taken apart.
#[derive(Clone, Copy, Debug, Default)]
struct Record {
    kind: u8,
    flags: u8,
    tag: u16,
    generation: u32,
    attempt: u32,
    errno: i32,
    start: u64,
    sectors: u64,
    place: u64,
    bytes: u64,
}

impl Record {
    fn new(link: LinkId, kind: u8) -> Self {
        Self { kind, generation: link.generation.get(), attempt: link.attempt, ..Self::default() }
    }

    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut record = [0; RECORD_BYTES];
        record[0] = self.kind;
        record[1] = self.flags;
        record[2..4].copy_from_slice(&self.tag.to_le_bytes());
        record[4..8].copy_from_slice(&self.generation.to_le_bytes());
        record[8..12].copy_from_slice(&self.attempt.to_le_bytes());
        record[12..16].copy_from_slice(&self.errno.to_le_bytes());
        for (at, number) in (16..).step_by(8).zip([self.start, self.sectors, self.place, self.bytes]) {
            record[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        record
    }

    fn decode(record: &[u8; RECORD_BYTES]) -> Result<Self, ProtocolError> {
        let number = |at: usize| u64::from_le_bytes(array(record, at));
        let decoded = Self {
            kind: record[0],
            flags: record[1],
            tag: u16::from_le_bytes(array(record, 2)),
            generation: u32::from_le_bytes(array(record, 4)),
            attempt: u32::from_le_bytes(array(record, 8)),
            errno: i32::from_le_bytes(array(record, 12)),
            start: number(16),
            sectors: number(24),
            place: number(32),
            bytes: number(40),
        };
        let is_zero = record[48..].iter().all(|byte| *byte == 0);
        if is_zero { Ok(decoded) } else { Err(decoded.wrong("reserved field")) }
    }

    fn wrong(&self, field: &'static str) -> ProtocolError {
        ProtocolError::Field { kind: self.kind, field }
    }

    fn tag(&self) -> Result<Tag, ProtocolError> {
        if self.tag < MAX_DEPTH { Ok(Tag(self.tag)) } else { Err(self.wrong("tag")) }
    }

    /// Whether it belongs to session `link`; an error for one of another life, or of a session that has not begun.
    fn is_of(&self, link: LinkId) -> Result<bool, ProtocolError> {
        if self.generation != link.generation.get() || self.attempt == 0 || self.attempt > link.attempt {
            return Err(ProtocolError::Session(self.generation, self.attempt));
        }
        Ok(self.attempt == link.attempt)
    }
}

/// `N` bytes of a record from `at`; zeros past its end.
fn array<const N: usize>(record: &[u8; RECORD_BYTES], at: usize) -> [u8; N] {
    let mut array = [0; N];
    for (to, from) in array.iter_mut().zip(record.iter().skip(at)) {
        *to = *from;
    }
    array
}

/// The records of a buffer, whatever they say.
///
/// # Errors
/// When it is not whole records, or too many.
pub fn records(buffer: &[u8]) -> Result<impl Iterator<Item = &[u8; RECORD_BYTES]>, ProtocolError> {
    let (records, rest) = buffer.as_chunks::<RECORD_BYTES>();
    if records.is_empty() || records.len() > MAX_BATCH || !rest.is_empty() {
        return Err(ProtocolError::Length(buffer.len()));
    }
    Ok(records.iter())
}

impl ToService {
    /// The record of session `link`.
    pub fn encode(&self, link: LinkId) -> [u8; RECORD_BYTES] {
        let record = match *self {
            Self::Begin => Record::new(link, BEGIN),
            Self::Flush { tag } => Record { tag: tag.0, ..Record::new(link, FLUSH) },
            Self::Access { tag, operation, at } => {
                let (kind, flags, place) = match operation {
                    Operation::Read { place } => (READ, 0, place),
                    Operation::Write { place } => (WRITE, 0, place),
                    Operation::WriteZeroes { unmap } => (WRITE_ZEROES, if unmap { FLAG_UNMAP } else { 0 }, 0),
                    Operation::Discard => (DISCARD, 0, 0),
                };
                let (start, sectors) = (at.start(), at.count());
                Record { flags, tag: tag.0, start, sectors, place, ..Record::new(link, kind) }
            }
        };
        record.encode()
    }

    /// A record of the host for the life `generation`, with its session.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(record: &[u8; RECORD_BYTES], generation: Generation) -> Result<(LinkId, Self), ProtocolError> {
        let record = Record::decode(record)?;
        if record.generation != generation.get() || record.attempt == 0 {
            return Err(ProtocolError::Session(record.generation, record.attempt));
        }
        if record.flags != 0 && !(record.kind == WRITE_ZEROES && record.flags == FLAG_UNMAP) {
            return Err(record.wrong("flag"));
        }
        let operation = match record.kind {
            BEGIN => None,
            FLUSH => None,
            READ => Some(Operation::Read { place: record.place }),
            WRITE => Some(Operation::Write { place: record.place }),
            WRITE_ZEROES => Some(Operation::WriteZeroes { unmap: record.flags == FLAG_UNMAP }),
            DISCARD => Some(Operation::Discard),
            kind => return Err(ProtocolError::Kind(kind)),
        };
        let message = match (operation, record.kind) {
            (Some(operation), _) => {
                let at = SectorRange::new(record.start, record.sectors).ok_or_else(|| record.wrong("range"))?;
                Self::Access { tag: record.tag()?, operation, at }
            }
            (None, FLUSH) => Self::Flush { tag: record.tag()? },
            (None, _) => Self::Begin,
        };
        Ok((LinkId { generation, attempt: record.attempt }, message))
    }
}

impl FromService {
    /// The record of session `link`.
    pub fn encode(&self, link: LinkId) -> [u8; RECORD_BYTES] {
        let record = match *self {
            Self::CacheLost => Record::new(link, CACHE_LOST),
            Self::AtWork { tag } => Record { tag: tag.0, ..Record::new(link, AT_WORK) },
            Self::Done { tag, errno, bytes } => Record { tag: tag.0, errno, bytes, ..Record::new(link, DONE) },
        };
        record.encode()
    }

    /// A record of the agent; `None`: of an earlier session of the life of `link`.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(record: &[u8; RECORD_BYTES], link: LinkId) -> Result<Option<Self>, ProtocolError> {
        let record = Record::decode(record)?;
        if !record.is_of(link)? {
            return Ok(None);
        }
        match record.kind {
            CACHE_LOST => Ok(Some(Self::CacheLost)),
            AT_WORK => Ok(Some(Self::AtWork { tag: record.tag()? })),
            DONE if record.errno < 0 => Err(record.wrong("errno")),
            DONE => Ok(Some(Self::Done { tag: record.tag()?, errno: record.errno, bytes: record.bytes })),
            kind => Err(ProtocolError::Kind(kind)),
        }
    }
}

/// The buffer of a hello of session `link`.
///
/// # Errors
/// When it is longer than [`MAX_HELLO`].
pub fn encode_hello(hello: &Hello, link: LinkId) -> Result<Vec<u8>, ProtocolError> {
    let mut buffer = Record::new(link, HELLO).encode().to_vec();
    serde_json::to_writer(&mut buffer, hello).map_err(|error| ProtocolError::Hello(error.to_string()))?;
    if buffer.len() > MAX_HELLO { Err(ProtocolError::Length(buffer.len())) } else { Ok(buffer) }
}

/// The hello in a buffer; `None`: the buffer is of an earlier session of the life of `link`, whatever it holds.
///
/// # Errors
/// When it is no hello, or one that cannot be.
pub fn parse_hello(buffer: &[u8], link: LinkId) -> Result<Option<Hello>, ProtocolError> {
    let (first, json) = buffer.split_first_chunk::<RECORD_BYTES>().ok_or(ProtocolError::Length(buffer.len()))?;
    let record = Record::decode(first)?;
    if !record.is_of(link)? {
        return Ok(None);
    }
    if record.kind != HELLO {
        return Err(ProtocolError::Kind(record.kind));
    }
    if buffer.len() > MAX_HELLO {
        return Err(ProtocolError::Length(buffer.len()));
    }
    let hello: Hello = serde_json::from_slice(json).map_err(|error| ProtocolError::Hello(error.to_string()))?;
    if hello.is_sane() { Ok(Some(hello)) } else { Err(ProtocolError::Hello("its numbers do not fit".into())) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use umbra_shadow::block::{Identity, Window, WriteCache};

    use super::*;

    fn link() -> LinkId {
        LinkId { generation: Generation::FIRST.next(), attempt: 3 }
    }

    fn hello() -> Hello {
        let window = Window { start: 0, sectors: 1_000 };
        let identity = Identity { serial: "S1".into(), sectors: 1_000, logical_block: 512, read_only: false, window };
        let cache = WriteCache::Volatile;
        let disk = Disk { identity, cache, physical_block: 512, optimal_io: 0, discards: false, rotational: false };
        Hello { disk, pool: vec![PoolRange { start: 2 << 20, length: 2 << 20 }; MAX_POOL_RANGES], depth: 128 }
    }

    fn orders() -> Vec<ToService> {
        let (tag, at) = (Tag(255), SectorRange::new(8, 16).unwrap());
        let operations = [
            Operation::Read { place: 4096 },
            Operation::Write { place: 1 << 20 },
            Operation::WriteZeroes { unmap: true },
            Operation::WriteZeroes { unmap: false },
            Operation::Discard,
        ];
        let accesses = operations.map(|operation| ToService::Access { tag, operation, at });
        accesses.into_iter().chain([ToService::Begin, ToService::Flush { tag }]).collect()
    }

    #[test]
    fn records_are_read_back_as_they_were_written() {
        for order in orders() {
            assert_eq!(ToService::parse(&order.encode(link()), link().generation), Ok((link(), order)));
        }
        let at_work = FromService::AtWork { tag: Tag(4) };
        for answer in [FromService::Done { tag: Tag(3), errno: 5, bytes: 512 }, FromService::CacheLost, at_work] {
            assert_eq!(FromService::parse(&answer.encode(link()), link()), Ok(Some(answer)));
        }
        let buffer = encode_hello(&hello(), link()).unwrap();
        assert_eq!(parse_hello(&buffer, link()), Ok(Some(hello())));
    }

    #[test]
    fn what_is_of_an_earlier_session_is_skipped_and_of_another_life_refused() {
        let later = link().next();
        let done = FromService::Done { tag: Tag(3), errno: 0, bytes: 0 };
        assert_eq!(FromService::parse(&done.encode(link()), later), Ok(None));
        assert_eq!(parse_hello(&encode_hello(&hello(), link()).unwrap(), later), Ok(None));
        assert!(FromService::parse(&done.encode(later), link()).is_err());
        let other_life = LinkId { generation: link().generation.next(), ..link() };
        assert!(FromService::parse(&done.encode(other_life), link()).is_err());
        assert!(ToService::parse(&ToService::Begin.encode(other_life), link().generation).is_err());
    }

    #[test]
    fn fields_out_of_range_are_refused() {
        let tag = Tag(MAX_DEPTH);
        let at = SectorRange::new(0, 1).unwrap();
        let order = ToService::Access { tag, operation: Operation::Discard, at };
        assert!(ToService::parse(&order.encode(link()), link().generation).is_err());
        assert!(FromService::parse(&FromService::Done { tag, errno: 0, bytes: 0 }.encode(link()), link()).is_err());
        let mut record = ToService::Begin.encode(link());
        record[60] = 1;
        assert!(ToService::parse(&record, link().generation).is_err());
        for wrong in [Hello { depth: 0, ..hello() }, Hello { pool: Vec::new(), ..hello() }] {
            assert!(parse_hello(&encode_hello(&wrong, link()).unwrap(), link()).is_err());
        }
        assert!(records(&[0; RECORD_BYTES + 1]).is_err());
        assert!(records(&[]).is_err());
    }

    proptest! {
        #[test]
        fn no_record_makes_a_parser_panic(bytes: [u8; RECORD_BYTES], kind in 0u8..8, json: Vec<u8>) {
            let mut record = ToService::Begin.encode(link());
            record[12..48].copy_from_slice(&bytes[12..48]);
            (record[0], record[2]) = (kind | (bytes[0] & 0x80), bytes[2]);
            for record in [record, bytes] {
                let _ = ToService::parse(&record, link().generation);
                let _ = FromService::parse(&record, link());
            }
            let mut buffer = record.to_vec();
            buffer[0] = HELLO;
            buffer.extend(json);
            let _ = parse_hello(&buffer, link());
        }
    }
}
