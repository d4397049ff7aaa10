//! The file of a snapshot: bytes to structures and back, pure. All numbers are little-endian; a page has 4 KiB.
//!
//! ```text
//!   0                             4096               4096 + pages * 4096
//!   | header, description, zeros  | pages            | run table        | state (JSON) |
//! ```
//! The description says in a few words what the snapshot is of ([`super::description`]): who lists snapshots reads a page of each.
//! Pages that hold zeros alone are left out. The run table says where in the VM's memory each run of pages belongs, with a
//! checksum for each run, so that several threads fill memory side by side; the header has the checksums of everything else.
//!
//! Invariants: every length is bounded before anything is allocated for it; the parts fill the file exactly; runs are in
//! ascending order, disjoint, and inside of the memory. No input makes the reader panic. The checksums find damage, not malice:
//! who may write to the cache folder is checked where it is opened ([`super::cache`]).

use std::fs::File;
use std::hash::Hasher;
use std::io;
use std::os::unix::fs::FileExt;

use thiserror::Error;
use twox_hash::XxHash64;
use zerocopy::byteorder::{LE, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Most pages of a run: 1 MiB, a piece of work that is small enough to be spread over threads.
pub const MAX_RUN: usize = 256;
/// Longest state, in bytes: some 30 KiB for each of 254 vCPUs, and as much again for devices.
pub const MAX_STATE: u64 = 16 << 20;
/// Most memory of a VM with a snapshot, in bytes: many times what a driver VM has.
pub const MAX_MEMORY: u64 = 64 << 30;

const MAGIC: [u8; 8] = *b"UMBRASNP";
/// Changed with every change of the layout or of the state's fields.
pub const VERSION: u32 = 4;

/// What a snapshot is of: SHA-256 over everything that a restored VM has to agree with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Key(pub [u8; 32]);

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// Why a file is no snapshot that can be used.
#[derive(Debug, Error)]
pub enum FormatError {
    /// It cannot be read.
    #[error("read the snapshot")]
    Read(#[source] io::Error),
    /// It is something else, or only its beginning.
    #[error("it is no snapshot")]
    NotASnapshot,
    /// It was written by another version of this program.
    #[error("it has format {0}; this program writes and reads format {VERSION}")]
    Version(u32),
    /// It is of another VM, another host or another version of this program.
    #[error("it is of another VM or another host")]
    OtherKey,
    /// A checksum does not agree.
    #[error("its {0} is damaged")]
    Damaged(&'static str),
    /// A length or position is impossible.
    #[error("its {0} cannot be true")]
    Impossible(&'static str),
    /// The file ends too early or too late.
    #[error("it has {have} bytes and should have {should}")]
    Length {
        /// Bytes of the file.
        have: u64,
        /// Bytes by its header.
        should: u64,
    },
}

/// Something that can be read at any place.
pub trait Source {
    /// Bytes.
    fn length(&self) -> io::Result<u64>;
    /// Fills `bytes` from `offset` on.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Source for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(bytes, offset)
    }
}

impl Source for [u8] {
    fn length(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let part = start.checked_add(bytes.len()).and_then(|end| self.get(start..end));
        bytes.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// The begin of the file.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Header {
    magic: [u8; 8],
    version: U32<LE>,
    /// Bytes of the description.
    description: U32<LE>,
    key: [u8; 32],
    /// Bytes of the VM's memory.
    memory: U64<LE>,
    /// Pages in the file.
    pages: U64<LE>,
    /// Entries of the run table.
    runs: U64<LE>,
    /// Bytes of the state.
    state: U64<LE>,
    runs_sum: U64<LE>,
    state_sum: U64<LE>,
    description_sum: U64<LE>,
    /// Of all fields before.
    sum: U64<LE>,
}

const HEADER: usize = size_of::<Header>();

/// Longest description, in bytes: it is in the first page, behind the header.
pub const MAX_DESCRIPTION: usize = PAGE - HEADER;

/// Consecutive pages of the memory, as the run table has them. Where they are in the file follows from those before.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct RunEntry {
    first: U64<LE>,
    pages: U64<LE>,
    sum: U64<LE>,
}

const RUN: u64 = size_of::<RunEntry>() as u64;

/// A run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Offset in the VM's memory (which has no hole), in bytes.
    pub memory: u64,
    /// Offset in the file, in bytes.
    pub file: u64,
    /// Length in bytes, at most [`MAX_RUN`] pages.
    pub length: usize,
    /// Checksum of its bytes.
    pub sum: u64,
}

/// The checksum that the format uses: XXH64, which is as fast as memory on any processor, emulated ones included.
pub struct Checksum(XxHash64);

impl Default for Checksum {
    fn default() -> Self {
        Self(XxHash64::with_seed(0))
    }
}

impl Checksum {
    /// Adds the next bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    /// That of all bytes so far.
    pub fn get(&self) -> u64 {
        self.0.finish()
    }
}

/// The checksum of `bytes`.
pub fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = Checksum::default();
    sum.add(bytes);
    sum.get()
}

/// A snapshot's table of contents and its state, read and checked; the pages are still in the file.
#[derive(Debug)]
pub struct Contents {
    /// Where each run of pages goes.
    pub runs: Vec<Run>,
    /// The state of vCPUs and devices.
    pub state: Vec<u8>,
}

impl Contents {
    /// Reads the snapshot with `key`, of a VM with `memory` bytes, from `source`.
    ///
    /// # Errors
    /// It cannot be read, or is anything but a whole snapshot with that key.
    pub fn read(source: &(impl Source + ?Sized), key: &Key, memory: u64) -> Result<Self, FormatError> {
        let length = source.length().map_err(FormatError::Read)?;
        let (header, _) = read_header(source, length)?;
        if header.key != key.0 {
            return Err(FormatError::OtherKey);
        }
        let places = Places::of(&header, memory)?;
        places.check_end(length)?;
        let table = read_part(source, places.runs, header.runs.get() * RUN)?;
        if checksum(&table) != header.runs_sum.get() {
            return Err(FormatError::Damaged("table of pages"));
        }
        let state = read_part(source, places.state, header.state.get())?;
        if checksum(&state) != header.state_sum.get() {
            return Err(FormatError::Damaged("state"));
        }
        Ok(Self { runs: runs(&table, header.pages.get(), memory)?, state })
    }
}

/// What a snapshot's first page says of it.
#[derive(Debug)]
pub struct Summary {
    /// What it is of.
    pub key: Key,
    /// The same in words, at most [`MAX_DESCRIPTION`] bytes.
    pub description: Vec<u8>,
}

impl Summary {
    /// Reads and checks the first page of `source`, and that the file is as long as that page says.
    ///
    /// # Errors
    /// It cannot be read, is no snapshot of this format, or is cut short.
    pub fn read(source: &(impl Source + ?Sized)) -> Result<Self, FormatError> {
        let length = source.length().map_err(FormatError::Read)?;
        let (header, description) = read_header(source, length)?;
        Places::of(&header, header.memory.get())?.check_end(length)?;
        Ok(Self { key: Key(header.key), description })
    }
}

/// The header and the description.
fn read_header(source: &(impl Source + ?Sized), length: u64) -> Result<(Header, Vec<u8>), FormatError> {
    let mut first = [0; PAGE];
    if length < first.len() as u64 {
        return Err(FormatError::NotASnapshot);
    }
    source.read_at(&mut first, 0).map_err(FormatError::Read)?;
    let (header, rest) = Header::read_from_prefix(&first).map_err(|_| FormatError::NotASnapshot)?;
    if header.magic != MAGIC {
        return Err(FormatError::NotASnapshot);
    }
    let version = header.version.get();
    if version != VERSION {
        return Err(FormatError::Version(version));
    }
    if checksum(&header.as_bytes()[..HEADER - 8]) != header.sum.get() {
        return Err(FormatError::Damaged("header"));
    }
    let described = usize::try_from(header.description.get()).unwrap_or(usize::MAX);
    let (description, zeros) =
        rest.split_at_checked(described).ok_or(FormatError::Impossible("length of the description"))?;
    if checksum(description) != header.description_sum.get() || zeros.iter().any(|byte| *byte != 0) {
        return Err(FormatError::Damaged("description"));
    }
    Ok((header, description.to_vec()))
}

/// Most bytes of the snapshot of a VM with `memory` bytes.
pub fn most_bytes(memory: u64) -> u64 {
    let pages = memory.min(MAX_MEMORY) / PAGE as u64;
    (pages + 1) * PAGE as u64 + pages * RUN + MAX_STATE
}

/// Where the parts are, each length bounded.
struct Places {
    runs: u64,
    state: u64,
    end: u64,
}

impl Places {
    fn of(header: &Header, memory: u64) -> Result<Self, FormatError> {
        let (pages, runs, state) = (header.pages.get(), header.runs.get(), header.state.get());
        if header.memory.get() != memory || memory > MAX_MEMORY {
            return Err(FormatError::Impossible("size of the memory"));
        }
        if pages > memory / PAGE as u64 || runs > pages {
            return Err(FormatError::Impossible("number of pages"));
        }
        if state > MAX_STATE {
            return Err(FormatError::Impossible("length of the state"));
        }
        // No overflow: pages and runs are bounded by MAX_MEMORY.
        let runs_at = (pages + 1) * PAGE as u64;
        let state_at = runs_at + runs * RUN;
        Ok(Self { runs: runs_at, state: state_at, end: state_at + state })
    }

    fn check_end(&self, length: u64) -> Result<(), FormatError> {
        if self.end == length { Ok(()) } else { Err(FormatError::Length { have: length, should: self.end }) }
    }
}

/// Reads a part whose place and length are inside of the file.
fn read_part(source: &(impl Source + ?Sized), offset: u64, length: u64) -> Result<Vec<u8>, FormatError> {
    let length = usize::try_from(length).map_err(|_| FormatError::Impossible("length"))?;
    let mut bytes = vec![0; length];
    source.read_at(&mut bytes, offset).map_err(FormatError::Read)?;
    Ok(bytes)
}

fn runs(table: &[u8], pages: u64, memory: u64) -> Result<Vec<Run>, FormatError> {
    let wrong = || FormatError::Impossible("table of pages");
    let entries = <[RunEntry]>::ref_from_bytes(table).map_err(|_| wrong())?;
    let (mut runs, mut free, mut taken) = (Vec::with_capacity(entries.len()), 0, 0);
    for entry in entries {
        let (first, count) = (entry.first.get(), entry.pages.get());
        let end = first.checked_add(count).ok_or_else(wrong)?;
        if first < free || !(1..=MAX_RUN as u64).contains(&count) || end > memory / PAGE as u64 {
            return Err(wrong());
        }
        let file = (taken + 1) * PAGE as u64;
        (free, taken) = (end, taken + count);
        let length = usize::try_from(count).map_err(|_| wrong())? * PAGE;
        runs.push(Run { memory: first * PAGE as u64, file, length, sum: entry.sum.get() });
    }
    if taken != pages { Err(wrong()) } else { Ok(runs) }
}

/// Writes a snapshot into an empty file: pages first, then [`Self::finish`].
pub struct Writer<'a> {
    file: &'a File,
    runs: Vec<RunEntry>,
    /// Pages written so far.
    pages: u64,
}

impl<'a> Writer<'a> {
    /// A snapshot in `file`, which is empty.
    pub fn new(file: &'a File) -> Self {
        Self { file, runs: Vec::new(), pages: 0 }
    }

    /// Adds those pages of `bytes` that hold something; `bytes` are whole pages from `offset` of the memory on, at most
    /// [`MAX_RUN`] of them, and behind those added before.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut pages = bytes.chunks_exact(PAGE).enumerate().peekable();
        while let Some((start, page)) = pages.next() {
            if is_zero(page) {
                continue;
            }
            let mut end = start + 1;
            while pages.next_if(|(_, page)| !is_zero(page)).is_some() {
                end += 1;
            }
            self.add_run(&bytes[start * PAGE..end * PAGE], offset / PAGE as u64 + start as u64)?;
        }
        Ok(())
    }

    fn add_run(&mut self, bytes: &[u8], first: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, (self.pages + 1) * PAGE as u64)?;
        let pages = (bytes.len() / PAGE) as u64;
        self.runs.push(RunEntry { first: first.into(), pages: pages.into(), sum: checksum(bytes).into() });
        self.pages += pages;
        Ok(())
    }

    /// Adds the rest; without it the file is no snapshot. Returns its length in bytes.
    ///
    /// # Errors
    /// The file cannot be written, or the description is too long.
    pub fn finish(self, key: &Key, memory: u64, (state, description): (&[u8], &[u8])) -> io::Result<u64> {
        let described = u32::try_from(description.len()).unwrap_or(u32::MAX);
        let mut first = [0; PAGE];
        let place = first.get_mut(HEADER..HEADER + description.len()).ok_or(io::ErrorKind::InvalidInput)?;
        place.copy_from_slice(description);
        let table = self.runs.as_bytes();
        let runs_at = (self.pages + 1) * PAGE as u64;
        let state_at = runs_at + table.len() as u64;
        self.file.write_all_at(table, runs_at)?;
        self.file.write_all_at(state, state_at)?;
        let mut header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            description: described.into(),
            key: key.0,
            memory: memory.into(),
            pages: self.pages.into(),
            runs: (self.runs.len() as u64).into(),
            state: (state.len() as u64).into(),
            runs_sum: checksum(table).into(),
            state_sum: checksum(state).into(),
            description_sum: checksum(description).into(),
            sum: 0.into(),
        };
        header.sum = checksum(&header.as_bytes()[..HEADER - 8]).into();
        first[..HEADER].copy_from_slice(header.as_bytes());
        self.file.write_all_at(&first, 0)?;
        Ok(state_at + state.len() as u64)
    }
}

fn is_zero(page: &[u8]) -> bool {
    // By words: the compiler makes wide loads of it.
    page.chunks_exact(64).all(|line| line.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
