//! From the queue to the worker and back: takes requests, hands them over in parts, answers those that are done.
//!
//! Invariants: a request's header is read once and checked against the disk's size before anything else is done; its buffers are
//! walked and checked again at each part, as the driver could have changed them, and are touched in the event loop alone, at most
//! [`TURN_BYTES`] and a part at a turn. What is in flight is bounded in requests and bytes: the rest waits in the ring.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};

use umbra_shadow::block::{Access, SECTOR_BYTES, SectorRange};
use umbra_splitter::copy::{gather, scatter};
use umbra_splitter::queue::{Chain, Ring, RingFault, Virtqueue};

use super::Messenger;
use super::worker::{Done, Tag, Work, Worker};
use crate::vm::virtio::disk::offer::Offer;
use crate::vm::virtio::disk::request::{Asked, HEADER_SIZE, Job, Request, Status, answer};

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
#[derive(Clone, Debug)]
struct Pending {
    head: u16,
    job: Job,
    /// Bytes of data, or ranges, that are done.
    done: usize,
    /// Bytes of data of the part under way.
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
    pub offer: &'a Offer,
    pub worker: &'a Worker,
    pub in_flight: &'a mut InFlight,
    /// What is written is flushed before it is answered.
    pub writes_through: bool,
    pub messenger: &'a mut Messenger,
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
        match Request::read(chain, self.offer) {
            Asked::Answered(written) => Step::Answered(written),
            Asked::Job(Job::Flush) => {
                self.hand_over(Pending { head, job: Job::Flush, done: 0, part: 0 }, Work::Flush);
                Step::HandedOver(0)
            }
            Asked::Job(job) => self.go_on(Pending { head, job, done: 0, part: 0 }, chain),
        }
    }

    /// Hands the next part over, or answers.
    fn go_on(&mut self, pending: Pending, chain: &Chain<'_>) -> Step {
        match &pending.job {
            Job::Transfer(access, at) => {
                let (reads, at) = (*access == Access::Read, *at);
                self.transfer(pending, reads, at, chain)
            }
            Job::Ranges(ranges) => match ranges.get(pending.done) {
                Some((access, at)) => {
                    let (position, length) = (at.start() * SECTOR_BYTES, at.bytes());
                    let work = match access {
                        Access::WriteZeroes { unmap } => Work::Zeroes { position, length, unmap: *unmap },
                        _ => Work::Discard { position, length },
                    };
                    self.hand_over(pending, work);
                    Step::HandedOver(0)
                }
                None => self.written(&pending, chain),
            },
            Job::Flush => Step::Answered(answer(chain, Status::Ok, 0)),
        }
    }

    fn transfer(&mut self, pending: Pending, reads: bool, at: SectorRange, chain: &Chain<'_>) -> Step {
        let length = usize::try_from(at.bytes()).unwrap_or(usize::MAX);
        let part = (length - pending.done).min(PART);
        if part == 0 && reads {
            return Step::Answered(answer(chain, Status::Ok, length));
        }
        if part == 0 {
            return self.written(&pending, chain);
        }
        let position = at.start() * SECTOR_BYTES + pending.done as u64;
        let mut copied = 0;
        let work = if reads {
            Work::Read { position, length: part }
        } else {
            let mut bytes = vec![0; part];
            copied = gather(chain.readable(), HEADER_SIZE + pending.done, &mut bytes);
            if copied < part {
                return Step::Answered(answer(chain, Status::IoError, 0));
            }
            Work::Write { position, bytes }
        };
        self.hand_over(Pending { part, ..pending }, work);
        Step::HandedOver(copied)
    }

    /// What changes sectors is done: answers it, or has it flushed before.
    fn written(&mut self, pending: &Pending, chain: &Chain<'_>) -> Step {
        if !self.writes_through {
            return Step::Answered(answer(chain, Status::Ok, 0));
        }
        self.hand_over(Pending { job: Job::Flush, part: 0, ..*pending }, Work::Flush);
        Step::HandedOver(0)
    }

    fn hand_over(&mut self, pending: Pending, work: Work) {
        let tag = self.in_flight.insert(pending);
        self.worker.submit(tag, work);
    }

    /// Goes on with what the worker has done; returns how many bytes were copied.
    fn finish<'m>(&mut self, ring: &mut Ring<'m>, chain: &mut Chain<'m>, done: Done) -> Result<usize, RingFault> {
        let Some(mut pending) = self.in_flight.remove(done.tag) else { return Ok(0) };
        let (head, mut copied) = (pending.head, 0);
        let step = match (ring.walk(head, chain), done.result) {
            // The driver has broken it meanwhile.
            (Err(_), _) => Step::Answered(0),
            (Ok(()), Err(error)) => Step::Answered(answer(chain, self.failed(&pending.job, &error), 0)),
            (Ok(()), Ok(bytes)) => {
                copied = scatter(&bytes, chain.writable(), pending.done);
                pending.done += if matches!(pending.job, Job::Ranges(_)) { 1 } else { pending.part };
                self.go_on(pending, chain)
            }
        };
        Ok(copied + complete(ring, head, step)?)
    }

    fn failed(&mut self, job: &Job, error: &io::Error) -> Status {
        if error.kind() == ErrorKind::Unsupported && matches!(job, Job::Ranges(_)) {
            return Status::Unsupported;
        }
        let what = match job {
            Job::Transfer(Access::Read, at) => format!("cannot read {at}"),
            Job::Transfer(_, at) => format!("cannot write {at}"),
            Job::Ranges(_) => "cannot discard sectors, or fill them with zeroes".into(),
            Job::Flush => "cannot make durable what was written".into(),
        };
        self.messenger.say(&format!("{what}: {error}"));
        Status::IoError
    }
}

/// Gives a request that is answered back; returns how many bytes the step has copied.
fn complete(ring: &mut Ring<'_>, head: u16, step: Step) -> Result<usize, RingFault> {
    match step {
        Step::Answered(written) => ring.complete(head, written).map(|()| 0),
        Step::HandedOver(copied) => Ok(copied),
    }
}
