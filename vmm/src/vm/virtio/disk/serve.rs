//! From the queue to the worker and back: takes requests, hands them over in parts, answers those that are done.
//!
//! Invariants: a request's header is read once and checked against the disk's size before anything else is done; its buffers are
//! walked and checked again at each part, as the driver could have changed them, and are touched in the event loop alone, at most
//! [`TURN_BYTES`] and a part at a turn. What is in flight is bounded in requests and bytes: the rest waits in the ring.

use std::collections::BTreeMap;

use umbra_splitter::copy::{gather, scatter};
use umbra_splitter::log_limit::LogLimit;
use umbra_splitter::queue::{Chain, Ring, RingFault, Virtqueue};

use super::request::{HEADER_SIZE, ID_SIZE, Limits, Request, Status};
use super::worker::{Done, Tag, Work, Worker};

/// Longest part of a request, in bytes, and so the longest buffer: a quarter of a millisecond to copy.
pub(super) const PART: usize = 1 << 20;
/// Bytes copied at a turn of the event loop, give or take a part: the VM's network devices wait meanwhile.
const TURN_BYTES: usize = 1 << 20;
/// Most requests begun at a turn.
const TURN_REQUESTS: usize = 32;
/// Bytes in flight beyond which no request is begun: buffers for the disk's thread while the loop copies others.
const MOST_BYTES: usize = 4 << 20;
/// Requests in flight beyond which none is begun: the queue's length, which an honest driver cannot exceed.
const MOST_REQUESTS: usize = 256;

/// Whether requests may be left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// None, or they wait for those in flight.
    Idle,
    /// The turn is over first.
    Budget,
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Pending {
    head: u16,
    request: Request,
    /// Bytes of data in all.
    length: usize,
    /// Bytes of data done.
    moved: usize,
    /// Bytes of the part under way.
    part: usize,
}

/// The requests in flight.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    next: Tag,
    requests: BTreeMap<Tag, Pending>,
    bytes: usize,
}

impl InFlight {
    pub fn clear(&mut self) {
        self.requests.clear();
        self.bytes = 0;
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    fn is_full(&self) -> bool {
        self.requests.len() >= MOST_REQUESTS || self.bytes >= MOST_BYTES
    }

    fn insert(&mut self, pending: Pending) -> Tag {
        let tag = self.next;
        self.next += 1;
        self.bytes += pending.part;
        self.requests.insert(tag, pending);
        tag
    }

    fn remove(&mut self, tag: Tag) -> Option<Pending> {
        let pending = self.requests.remove(&tag)?;
        self.bytes -= pending.part;
        Some(pending)
    }
}

/// What becomes of a request at a turn.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// It is answered; how many bytes were written.
    Answered(u32),
    /// The worker has it; how many bytes were copied for that.
    HandedOver(usize),
}

/// What serving takes beside the queue.
pub(super) struct Server<'a> {
    pub limits: Limits,
    pub id: &'a [u8; ID_SIZE],
    pub worker: &'a Worker,
    pub in_flight: &'a mut InFlight,
    pub log: &'a mut LogLimit,
}

impl Server<'_> {
    /// A turn.
    pub fn serve(&mut self, queue: &mut Virtqueue) -> Result<End, RingFault> {
        let mut ring = queue.open()?;
        let mut chain = Chain::default();
        let mut copied = 0;
        while copied < TURN_BYTES {
            let Some(done) = self.worker.take_done() else { break };
            copied += self.finish(&mut ring, &mut chain, done)?;
        }
        for _ in 0..TURN_REQUESTS {
            if copied >= TURN_BYTES {
                return Ok(End::Budget);
            }
            // Full, the next that is done brings the next turn.
            if self.in_flight.is_full() || ring.available()? == 0 && !ring.listen(0)? {
                return Ok(End::Idle);
            }
            let head = ring.head(0)?;
            ring.take(1);
            copied += self.begin(&mut ring, &mut chain, head)?;
        }
        Ok(End::Budget)
    }

    /// Takes a request that is new; returns how many bytes were copied.
    fn begin<'m>(&mut self, ring: &mut Ring<'m>, chain: &mut Chain<'m>, head: u16) -> Result<usize, RingFault> {
        let step = match ring.walk(head, chain) {
            Ok(()) => self.start(head, chain),
            Err(fault) => {
                tracing::debug!("disk: a request is given back: {fault}");
                Step::Answered(0)
            }
        };
        complete(ring, head, step)
    }

    fn start(&mut self, head: u16, chain: &Chain<'_>) -> Step {
        // The status is the last byte that the device writes; without room for it nothing can be said.
        let Some(incoming) = chain.writable_len().checked_sub(1) else { return Step::Answered(0) };
        let mut header = [0; HEADER_SIZE];
        if gather(chain.readable(), 0, &mut header) < HEADER_SIZE {
            return answer(chain, Status::IoError, 0);
        }
        let outgoing = chain.readable_len() - HEADER_SIZE;
        let request = match Request::parse(header, incoming as u64, outgoing as u64, self.limits) {
            Ok(request) => request,
            Err(status) => return answer(chain, status, 0),
        };
        let length = match request {
            Request::Read(_) => incoming,
            Request::Write(_) => outgoing,
            Request::GetId => return answer(chain, Status::Ok, scatter(self.id, chain.writable(), 0)),
            Request::Flush => {
                let tag = self.in_flight.insert(Pending { head, request, length: 0, moved: 0, part: 0 });
                self.worker.submit(tag, Work::Flush);
                return Step::HandedOver(0);
            }
        };
        self.go_on(Pending { head, request, length, moved: 0, part: 0 }, chain)
    }

    /// Hands the next part over, or answers.
    fn go_on(&mut self, pending: Pending, chain: &Chain<'_>) -> Step {
        let Pending { request, length, moved, .. } = pending;
        let part = (length - moved).min(PART);
        let work = match request {
            Request::Read(_) if part == 0 => return answer(chain, Status::Ok, length),
            Request::Read(start) => Work::Read { position: start + moved as u64, length: part },
            Request::Write(start) if part > 0 => {
                let mut bytes = vec![0; part];
                if gather(chain.readable(), HEADER_SIZE + moved, &mut bytes) < part {
                    return answer(chain, Status::IoError, 0);
                }
                Work::Write { position: start + moved as u64, bytes }
            }
            Request::Write(_) | Request::Flush | Request::GetId => return answer(chain, Status::Ok, 0),
        };
        let copied = if let Work::Write { bytes, .. } = &work { bytes.len() } else { 0 };
        let tag = self.in_flight.insert(Pending { part, ..pending });
        self.worker.submit(tag, work);
        Step::HandedOver(copied)
    }

    /// Goes on with what the worker has done; returns how many bytes were copied.
    fn finish<'m>(&mut self, ring: &mut Ring<'m>, chain: &mut Chain<'m>, done: Done) -> Result<usize, RingFault> {
        let Some(mut pending) = self.in_flight.remove(done.tag) else { return Ok(0) };
        let mut copied = 0;
        let step = match (ring.walk(pending.head, chain), done.result) {
            // The driver has broken it meanwhile.
            (Err(_), _) => Step::Answered(0),
            (Ok(()), Err(error)) => {
                self.log.warn(format_args!("disk: {:?}: {error}", pending.request));
                answer(chain, Status::IoError, 0)
            }
            (Ok(()), Ok(bytes)) => {
                copied = scatter(&bytes, chain.writable(), pending.moved);
                pending.moved += pending.part;
                self.go_on(pending, chain)
            }
        };
        Ok(copied + complete(ring, pending.head, step)?)
    }
}

/// Writes the status of a request with `data` bytes for the driver.
fn answer(chain: &Chain<'_>, status: Status, data: usize) -> Step {
    let Some(last) = chain.writable_len().checked_sub(1) else { return Step::Answered(0) };
    scatter(&[status as u8], chain.writable(), last);
    Step::Answered(u32::try_from(data.min(last) + 1).unwrap_or(u32::MAX))
}

/// Gives a request that is answered back; returns how many bytes the step has copied.
fn complete(ring: &mut Ring<'_>, head: u16, step: Step) -> Result<usize, RingFault> {
    match step {
        Step::Answered(written) => ring.complete(head, written).map(|()| 0),
        Step::HandedOver(copied) => Ok(copied),
    }
}
