//! One request, from its header to its answer: checks as the specification demands, ordered errors, then the medium.

use std::io;
use std::ops::Range;

use super::Access;
use super::faults::{Class, Faults};
use super::medium::{Medium, SECTOR};
use super::protocol::{
    Header, MAX_PAYLOAD, NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE, NBD_CMD_FLUSH, NBD_CMD_READ, NBD_CMD_TRIM,
    NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES, NBD_EINVAL, NBD_EIO, NBD_ENOSPC, NBD_EPERM,
};

/// A request that has been read from its connection.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) header: Header,
    /// The data of a write; empty if the header is to be refused.
    pub(super) payload: Vec<u8>,
    /// What the medium knows a flush by.
    pub(super) flush: Option<u64>,
    /// [`Medium::swaps`] when it came.
    swaps: u64,
}

impl Request {
    pub(super) fn class(&self) -> Class {
        match self.header.command {
            NBD_CMD_WRITE | NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES => Class::Write,
            NBD_CMD_FLUSH => Class::Flush,
            _ => Class::Read,
        }
    }
}

/// The medium, what it is to get wrong, and how often that happened.
#[derive(Debug)]
pub(super) struct Drive {
    pub(super) medium: Medium,
    pub(super) faults: Faults,
    /// Requests that met an ordered error.
    pub(super) failed: u64,
    /// Requests that failed because the base could not be read or written.
    pub(super) host_errors: u64,
}

impl Drive {
    pub(super) fn new(medium: Medium) -> Self {
        Self { medium, faults: Faults::default(), failed: 0, host_errors: 0 }
    }

    /// A request has come.
    pub(super) fn take(&mut self, header: Header, payload: Vec<u8>) -> Request {
        let flush = (header.command == NBD_CMD_FLUSH).then(|| self.medium.take_flush());
        Request { header, payload, flush, swaps: self.medium.swaps() }
    }

    /// Its client is gone: it is not served.
    pub(super) fn forget(&mut self, request: &Request) {
        if let Some(flush) = request.flush {
            self.medium.forget_flush(flush);
        }
    }

    /// Serves a request: the data of a read (else nothing), or an error value.
    pub(super) fn serve(&mut self, request: &Request) -> Result<Vec<u8>, u32> {
        let answer = match self.checked(&request.header) {
            // The disk that it was for has been pulled out.
            Ok(_) if request.swaps != self.medium.swaps() => Err(NBD_EIO),
            Ok(sectors) => self.meet(request, sectors),
            Err(error) => Err(error),
        };
        self.forget(request);
        answer
    }

    /// The sectors of a request that is as the specification demands ("Error values").
    fn checked(&self, header: &Header) -> Result<Range<u64>, u32> {
        let (may_change, beyond, flags) = match header.command {
            NBD_CMD_READ => (false, NBD_EINVAL, 0),
            NBD_CMD_WRITE => (true, NBD_ENOSPC, 0),
            NBD_CMD_TRIM => (true, NBD_EINVAL, 0),
            NBD_CMD_WRITE_ZEROES => (true, NBD_ENOSPC, NBD_CMD_FLAG_NO_HOLE),
            NBD_CMD_FLUSH if header.offset == 0 && header.length == 0 => (false, NBD_EINVAL, 0),
            _ => return Err(NBD_EINVAL),
        };
        let has_data = matches!(header.command, NBD_CMD_READ | NBD_CMD_WRITE);
        if header.flags & !(NBD_CMD_FLAG_FUA | flags) != 0 || (has_data && header.length > MAX_PAYLOAD) {
            return Err(NBD_EINVAL);
        }
        if may_change && self.medium.access() == Access::ReadOnly {
            return Err(NBD_EPERM);
        }
        let (offset, length, sector) = (header.offset, u64::from(header.length), SECTOR as u64);
        if !offset.is_multiple_of(sector) || !length.is_multiple_of(sector) {
            return Err(NBD_EINVAL);
        }
        let (first, count) = (offset / sector, length / sector);
        // Both are far from overflow now: 2^55 and 2^23 at most.
        if first + count > self.medium.sectors() {
            return Err(beyond);
        }
        Ok(first..first + count)
    }

    fn meet(&mut self, request: &Request, sectors: Range<u64>) -> Result<Vec<u8>, u32> {
        let Some(bad) = self.faults.meet(request.class(), &sectors) else {
            return self.run(request, sectors).unwrap_or_else(|_| {
                self.host_errors += 1;
                Err(NBD_EIO)
            });
        };
        self.failed += 1;
        if let Some(flush) = request.flush
            && self.medium.fail_flush(flush, &bad).is_err()
        {
            self.host_errors += 1;
        }
        Err(NBD_EIO)
    }

    fn run(&mut self, request: &Request, sectors: Range<u64>) -> io::Result<Result<Vec<u8>, u32>> {
        let is_durable = request.header.flags & NBD_CMD_FLAG_FUA != 0 && !self.medium.ignores_fua();
        match (request.header.command, is_durable) {
            (NBD_CMD_READ, _) => return self.medium.read(sectors).map(Ok),
            (NBD_CMD_WRITE, false) => self.medium.write(sectors.start, &request.payload)?,
            (NBD_CMD_WRITE, true) => self.medium.write_through(sectors.start, &request.payload)?,
            (NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES, false) => self.medium.zero(sectors)?,
            (NBD_CMD_TRIM | NBD_CMD_WRITE_ZEROES, true) => self.medium.zero_through(sectors)?,
            _ => {
                let has_held = request.flush.map(|flush| self.medium.flush(flush)).transpose()?;
                if has_held != Some(true) {
                    return Ok(Err(NBD_EIO));
                }
            }
        }
        Ok(Ok(Vec::new()))
    }
}
