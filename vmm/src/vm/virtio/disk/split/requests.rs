//! The guest's requests that are in progress: taken off the queues, and answered; and access to their data meanwhile.
//!
//! Invariants: no more of a queue are in progress than it has descriptors, though a hostile driver offers one again and again; a
//! request's header was read once, and its chain is walked and checked again at each copy, as the driver may have changed it; the data
//! are touched in the event loop alone, while the queue runs.

use umbra_shadow::block::{Access, Done, GuestSpan, SECTOR_BYTES, Token};
use umbra_splitter::block::GuestData;
use umbra_splitter::copy::copy;
use umbra_splitter::queue::{Chain, RingFault, Virtqueue};
use vm_memory::VolatileSlice;

use crate::vm::virtio::disk::offer::{MAX_SEGMENTS, Offer};
use crate::vm::virtio::disk::request::{Asked, HEADER_SIZE, Job, Request, Status, answer};
use crate::vm::virtio::pace::Moved;

/// Tokens of one request: one for each of its ranges.
const TOKENS: u32 = MAX_SEGMENTS;

/// A request in progress.
#[derive(Clone, Copy, Debug)]
struct InProgress {
    queue: u16,
    head: u16,
    /// Tokens that are not done.
    left: usize,
    /// The worst of those that are.
    status: Status,
    /// Bytes for the guest, if all goes well.
    incoming: usize,
    /// What it counts as when it is done.
    moves: Moved,
}

impl InProgress {
    /// This job, for the chain at `head` of `queue`.
    fn new((queue, head): (u16, u16), job: &Job) -> Self {
        let (reads, changes) = (Moved { out: 0, into: 1 }, Moved { out: 1, into: 0 });
        let (left, moves, incoming) = match job {
            Job::Transfer(Access::Read, at) => (1, reads, at.bytes()),
            Job::Transfer(..) => (1, changes, 0),
            Job::Ranges(ranges) => (ranges.len(), changes, 0),
            Job::Flush => (1, Moved::default(), 0),
        };
        let incoming = usize::try_from(incoming).unwrap_or(usize::MAX);
        Self { queue, head, left, status: Status::Ok, incoming, moves }
    }
}

/// Requests in progress, by place: a token is its request's place times [`TOKENS`], plus the number of the range.
#[derive(Debug, Default)]
struct Places {
    slots: Vec<Option<InProgress>>,
    free: Vec<usize>,
}

impl Places {
    /// The first of the request's tokens.
    fn insert(&mut self, request: InProgress) -> Token {
        let place = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[place] = Some(request);
        // As many places as the queues have descriptors.
        Token(u32::try_from(place).unwrap_or(0) * TOKENS)
    }

    fn get(&self, token: Token) -> Option<&InProgress> {
        self.slots.get(place(token))?.as_ref()
    }

    /// One of a request's tokens is done; the request, if that was the last one.
    fn finish(&mut self, token: Token, status: Status) -> Option<InProgress> {
        let slot = self.slots.get_mut(place(token))?;
        let request = slot.as_mut()?;
        if status != Status::Ok {
            request.status = status;
        }
        request.left = request.left.saturating_sub(1);
        let finished = slot.take_if(|request| request.left == 0)?;
        self.free.push(place(token));
        Some(finished)
    }
}

fn place(Token(token): Token) -> usize {
    (token / TOKENS) as usize
}

/// The queues, and what was taken off them.
#[derive(Debug)]
pub(super) struct Requests {
    queues: Vec<Option<Virtqueue>>,
    places: Places,
    /// Of each queue.
    in_progress: Vec<u16>,
    moved: Moved,
}

impl Requests {
    /// For `queues` queues.
    pub(super) fn new(queues: usize) -> Self {
        Self {
            queues: (0..queues).map(|_| None).collect(),
            places: Places::default(),
            in_progress: vec![0; queues],
            moved: Moved::default(),
        }
    }

    /// The queues, by number; for those who start and stop them.
    pub(super) fn queues(&mut self) -> &mut [Option<Virtqueue>] {
        &mut self.queues
    }

    /// Requests that were done well since the start: those that write or change sectors as `out`, those that read as `into`.
    pub(super) fn moved(&self) -> Moved {
        self.moved
    }

    /// Whether requests of queue `index` are in progress.
    pub(super) fn has_any_of(&self, index: u16) -> bool {
        self.in_progress.get(usize::from(index)).is_some_and(|count| *count > 0)
    }

    /// Whether there are requests in progress whose queue does not run: their data cannot be had now.
    pub(super) fn wait_for_a_queue(&self) -> bool {
        self.queues.iter().zip(&self.in_progress).any(|(queue, count)| queue.is_none() && *count > 0)
    }

    /// Forgets what is in progress.
    pub(super) fn clear(&mut self) {
        self.places = Places::default();
        self.in_progress.fill(0);
    }

    /// Takes at most `most` requests of queue `index` and has `begin` begin what is to be done for each, under the first of its tokens.
    /// Whether more may wait; where none does, the driver is asked for a kick.
    pub(super) fn take(
        &mut self,
        index: u16,
        most: usize,
        offer: &Offer,
        mut begin: impl FnMut(Token, Job),
    ) -> Result<bool, RingFault> {
        let Self { queues, places, in_progress, .. } = self;
        let at = usize::from(index);
        let (Some(Some(queue)), Some(in_progress)) = (queues.get_mut(at), in_progress.get_mut(at)) else {
            return Ok(false);
        };
        let mut ring = queue.open()?;
        let mut chain = Chain::default();
        for _ in 0..most {
            if ring.available()? == 0 && !ring.listen(0)? {
                return Ok(false);
            }
            if *in_progress >= ring.size() {
                return Err(RingFault::InFlight { size: ring.size() });
            }
            let head = ring.head(0)?;
            ring.take(1);
            let asked = match ring.walk(head, &mut chain) {
                Ok(()) => Request::read(&chain, offer),
                Err(fault) => {
                    tracing::debug!("disk: a request is given back: {fault}");
                    Asked::Answered(0)
                }
            };
            match asked {
                Asked::Answered(written) => ring.complete(head, written)?,
                Asked::Job(job) => {
                    *in_progress += 1;
                    begin(places.insert(InProgress::new((index, head), &job)), job);
                }
            }
        }
        Ok(true)
    }

    /// The splitter is done with these.
    pub(super) fn finish(&mut self, done: Vec<Done>) -> Result<(), RingFault> {
        done.into_iter().try_for_each(|done| self.finish_one(done))
    }

    fn finish_one(&mut self, Done { token, status }: Done) -> Result<(), RingFault> {
        let Some(request) = self.places.finish(token, status.into()) else { return Ok(()) };
        let InProgress { queue, head, status, incoming, moves, .. } = request;
        if let Some(count) = self.in_progress.get_mut(usize::from(queue)) {
            *count = count.saturating_sub(1);
        }
        let is_ok = status == Status::Ok;
        if is_ok {
            self.moved = Moved { out: self.moved.out + moves.out, into: self.moved.into + moves.into };
        }
        let Some(Some(queue)) = self.queues.get_mut(usize::from(queue)) else { return Ok(()) };
        let mut ring = queue.open()?;
        let mut chain = Chain::default();
        // One that the driver has broken meanwhile has no place for a status.
        let intact = ring.walk(head, &mut chain).is_ok();
        let written = if intact { answer(&chain, status, if is_ok { incoming } else { 0 }) } else { 0 };
        ring.complete(head, written)
    }

    /// Interrupts the guest where it waits.
    pub(super) fn notify(&mut self) -> Result<(), RingFault> {
        self.queues.iter_mut().flatten().try_for_each(Virtqueue::notify)
    }

    /// Runs `act` on the chain of a request in progress, if its driver has left it one.
    fn with_chain(&mut self, token: Token, act: impl FnOnce(&Chain<'_>)) {
        let Some(InProgress { queue, head, .. }) = self.places.get(token) else { return };
        let Some(Some(queue)) = self.queues.get_mut(usize::from(*queue)) else { return };
        let Ok(ring) = queue.open() else { return };
        let mut chain = Chain::default();
        if ring.walk(*head, &mut chain).is_ok() {
            act(&chain);
        }
    }
}

fn bytes(sectors: u64) -> usize {
    usize::try_from(sectors.saturating_mul(SECTOR_BYTES)).unwrap_or(usize::MAX)
}

impl GuestData for Requests {
    fn copy_from_guest(&mut self, span: GuestSpan, to: &VolatileSlice<'_>) {
        let (length, mut copied) = (bytes(span.sectors).min(to.len()), 0);
        self.with_chain(span.token, |chain| {
            let skip = HEADER_SIZE.saturating_add(bytes(span.skip));
            copied = copy(chain.readable(), skip, std::slice::from_ref(to), 0, length);
        });
        // A driver that takes its data away writes zeroes, not what was here before.
        if copied < length
            && let Ok(rest) = to.offset(copied)
        {
            rest.copy_from(&vec![0u8; rest.len()]);
        }
    }

    fn copy_to_guest(&mut self, span: GuestSpan, from: &VolatileSlice<'_>) {
        self.with_chain(span.token, |chain| {
            // The last byte is the status's.
            let skip = bytes(span.skip);
            let room = chain.writable_len().saturating_sub(1).saturating_sub(skip);
            let length = bytes(span.sectors).min(from.len()).min(room);
            copy(std::slice::from_ref(from), 0, chain.writable(), skip, length);
        });
    }
}
