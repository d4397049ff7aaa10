//! The sessions of one end: records of the host to actions, results to records. Pure: it neither reads the port nor asks the kernel.
//!
//! ```text
//!             Begin, the first                                  flushed: hello
//!   Waiting ──────────────────────────────────────> Serving <──────────────── Flushing(greet)
//!      ^                                               │                            ^
//!      │                  later Begin, host gone, nonsense                          │ no order is in flight
//!      │                                               v                            │
//!      │ flushed; after nonsense the port        Draining(greet, wait or close) ────┤
//!      │ is opened again                                                            v
//!      └───────────────────────────────────────────────────────────── Flushing(wait or close)
//! ```
//! Invariant: no order of a session is on its way to the disk when the next is greeted, and what an ended session wrote is flushed by
//! then. So an acknowledged write is stable even if the host's end was killed, and its log with it.

use std::collections::VecDeque;

use nix::errno::Errno;
use umbra_driver_vm::block_protocol::{
    FromService, Hello, MAX_BATCH, MAX_DEPTH, Operation, PIECE_ALIGNMENT, RECORD_BYTES, ToService, encode_hello,
    records,
};
use umbra_shadow::block::{Disk, ErrorClass, SECTOR_BYTES, SectorRange, Tag};
use umbra_shadow::{Generation, LinkId};

use super::pool::Share;
use super::ring::{Action, Extent, outcome};

/// The name of an action within its end: the order's tag, or the flush that the service does by itself.
pub type Name = u16;
const OWN_FLUSH: Name = MAX_DEPTH;

/// What one end serves.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The disk and the guest's part of it, and the pool.
    pub hello: Hello,
    /// The end's part of the pool.
    pub share: Share,
}

/// An order on its way to the disk.
#[derive(Clone, Copy, Debug)]
struct InFlight {
    action: Action,
    /// Bytes that the disk has moved, in a first part.
    moved: u64,
    /// It was done in part, or in a way that the disk does not have, and is being done again: once.
    again: bool,
}

/// What is at the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Reads and writes alone.
    Quick,
    /// Something that a disk may take long for.
    Slow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Serving(LinkId),
    Draining(Then),
    Flushing(Then),
    Closed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    /// The next session begins.
    Greet(LinkId),
    /// The host's end is closed.
    Wait,
    /// The host has broken the protocol: its end is to be closed.
    Close,
}

/// The sessions of an end.
#[derive(Debug)]
pub struct Sessions {
    offer: Offer,
    generation: Generation,
    state: State,
    /// Attempt of the last session that has begun; 0: none yet.
    attempt: u32,
    in_flight: [Option<InFlight>; MAX_DEPTH as usize],
    count: u16,
    /// Of these, those that a disk may take long for.
    slow: u16,
    /// What is to be handed to the ring.
    actions: VecDeque<(Name, Action)>,
    /// Buffers for the host. Answers are gathered in the last one.
    buffers: Vec<Vec<u8>>,
    answers: Vec<u8>,
    /// The driver has reset the controller, or a flush has failed, and the host does not know.
    cache_lost: bool,
    /// The session has begun, and nothing has been ordered in it.
    is_fresh: bool,
    /// The first error of this session that may be the driver's.
    error: Option<Errno>,
    /// The host knows of it.
    error_is_told: bool,
}

impl Sessions {
    /// None yet.
    pub fn new(offer: Offer, generation: Generation) -> Self {
        Self {
            offer,
            generation,
            state: State::Waiting,
            attempt: 0,
            in_flight: [None; MAX_DEPTH as usize],
            count: 0,
            slow: 0,
            actions: VecDeque::new(),
            buffers: Vec::new(),
            answers: Vec::new(),
            cache_lost: false,
            is_fresh: false,
            error: None,
            error_is_told: false,
        }
    }

    /// The disk that it offers.
    pub fn disk(&self) -> &Disk {
        &self.offer.hello.disk
    }

    /// Whether a buffer of the host may be read now.
    pub fn listens(&self) -> bool {
        matches!(self.state, State::Waiting | State::Serving(_))
    }

    /// Whether nothing is ordered, and what the last session wrote is flushed.
    pub fn is_idle(&self) -> bool {
        self.count == 0 && self.listens()
    }

    /// Whether a session has begun in which nothing was ordered yet. That its host is gone means nothing then: the kernel may have the
    /// host's first words before it knows that the host's end is open, and says until then that it is closed.
    pub fn is_fresh(&self) -> bool {
        self.is_fresh && matches!(self.state, State::Serving(_))
    }

    /// Whether something may be lost of which no host was told.
    pub fn hides_a_loss(&self) -> bool {
        self.cache_lost
    }

    /// Takes a buffer of the host's.
    ///
    /// # Errors
    /// When the host breaks the protocol, in a sentence's form; the session is over then.
    pub fn hear(&mut self, buffer: &[u8]) -> Result<(), String> {
        let heard = self.hear_records(buffer);
        if heard.is_err() {
            self.drain(Then::Close);
        }
        heard
    }

    fn hear_records(&mut self, buffer: &[u8]) -> Result<(), String> {
        for record in records(buffer).map_err(|error| error.to_string())? {
            let (link, message) = ToService::parse(record, self.generation).map_err(|error| error.to_string())?;
            match (message, self.state) {
                (ToService::Begin, State::Waiting | State::Serving(_)) if link.attempt > self.attempt => {
                    self.begin(link)
                }
                // Of a session that is over: it has waited in the kernel.
                (_, State::Waiting) if link.attempt <= self.attempt => {}
                _ if link.attempt < self.attempt => {}
                (ToService::Access { tag, operation, at }, State::Serving(current)) if link == current => {
                    let action = self.action(operation, at)?;
                    self.take(tag, action)?;
                }
                (ToService::Flush { tag }, State::Serving(current)) if link == current => {
                    self.take(tag, Action::Flush)?
                }
                _ => return Err(format!("a record of session {link} out of turn")),
            }
        }
        Ok(())
    }

    /// What an order asks of the disk.
    fn action(&self, operation: Operation, at: SectorRange) -> Result<Action, String> {
        let Disk { identity, .. } = self.disk();
        let window = SectorRange::new(identity.window.start, identity.window.sectors);
        let block = u64::from(identity.logical_block) / SECTOR_BYTES;
        let is_whole = at.start().is_multiple_of(block) && at.count().is_multiple_of(block);
        if !is_whole || !window.is_some_and(|window| window.start() <= at.start() && at.end() <= window.end()) {
            return Err(format!("an order for {at}, which are no blocks of its guest's part"));
        }
        if identity.read_only && !matches!(operation, Operation::Read { .. }) {
            return Err("a change of a disk that is only read".into());
        }
        // Within a disk, whose bytes fit 63 bits.
        let extent = Extent { start: at.start() * SECTOR_BYTES, length: at.bytes() };
        Ok(match operation {
            Operation::Read { place } => Action::Read { at: extent, place: self.place(place, extent.length)? },
            Operation::Write { place } => Action::Write { at: extent, place: self.place(place, extent.length)? },
            Operation::WriteZeroes { unmap: false } => Action::Zero(extent),
            Operation::WriteZeroes { unmap: true } => Action::Punch(extent),
            Operation::Discard => Action::Discard(extent),
        })
    }

    /// A place in the end's share as one in the pool.
    fn place(&self, place: u64, length: u64) -> Result<usize, String> {
        let Share { start, length: most } = self.offer.share;
        let is_inside = place.checked_add(length).is_some_and(|end| end <= most as u64);
        let wrong = || format!("{length} bytes at {place} of the pool, which has {most}");
        if !is_inside || !place.is_multiple_of(PIECE_ALIGNMENT) {
            return Err(wrong());
        }
        usize::try_from(place).map(|place| start + place).map_err(|_| wrong())
    }

    fn take(&mut self, tag: Tag, action: Action) -> Result<(), String> {
        if self.count >= self.offer.hello.depth {
            return Err(format!("more than {} orders in flight", self.offer.hello.depth));
        }
        match self.in_flight.get_mut(usize::from(tag.0)) {
            Some(free @ None) => *free = Some(InFlight { action, moved: 0, again: false }),
            _ => return Err(format!("a second order {} in flight", tag.0)),
        }
        self.count += 1;
        self.slow += u16::from(action.is_slow());
        self.is_fresh = false;
        self.actions.push_back((tag.0, action));
        Ok(())
    }

    /// A session begins, at once if it is the first.
    fn begin(&mut self, link: LinkId) {
        if std::mem::replace(&mut self.attempt, link.attempt) == 0 {
            self.greet(link);
        } else {
            self.drain(Then::Greet(link));
        }
    }

    /// The host has closed its end, or was gone for a moment.
    /// Whether what waits for it is to be forgotten: a session in which nothing was ordered yet goes on.
    pub fn host_is_gone(&mut self) -> bool {
        let is_gone = !self.is_fresh();
        if is_gone && matches!(self.state, State::Serving(_)) {
            self.drain(Then::Wait);
        }
        is_gone
    }

    /// Lets everything that is in flight come back; nobody waits for the answers.
    fn drain(&mut self, then: Then) {
        self.state = State::Draining(then);
        self.buffers.clear();
        self.answers.clear();
        self.settle();
    }

    fn settle(&mut self) {
        if let State::Draining(then) = self.state
            && self.count == 0
        {
            self.state = State::Flushing(then);
            self.actions.push_back((OWN_FLUSH, Action::Flush));
        }
    }

    fn flushed(&mut self) {
        match self.state {
            State::Flushing(Then::Greet(link)) => self.greet(link),
            State::Flushing(Then::Close) => self.state = State::Closed,
            _ => self.state = State::Waiting,
        }
    }

    fn greet(&mut self, link: LinkId) {
        (self.state, self.is_fresh) = (State::Serving(link), true);
        (self.error, self.error_is_told) = (None, false);
        match encode_hello(&self.offer.hello, link) {
            Ok(hello) => self.buffers.push(hello),
            // Every field is bounded far below what a hello holds.
            Err(_) => self.drain(Then::Close),
        }
    }

    /// What is to be handed to the ring next.
    pub fn next_action(&mut self) -> Option<(Name, Action)> {
        self.actions.pop_front()
    }

    /// The result of an action.
    ///
    /// # Errors
    /// When a flush has failed, of a host or after a session: the device may have dropped what any end has written to this disk, and a
    /// later flush proves nothing of that. A host that has its log writes it again.
    pub fn result(&mut self, name: Name, result: i32) -> Result<(), Errno> {
        if name == OWN_FLUSH {
            let flushed = outcome(result).map(drop);
            self.cache_lost |= flushed.is_err();
            self.flushed();
            return flushed;
        }
        let Some(in_flight) = self.in_flight.get_mut(usize::from(name)) else { return Ok(()) };
        let Some(order) = in_flight else { return Ok(()) };
        let (errno, bytes) = match next(order, result) {
            Next::Again(action) => {
                self.actions.push_back((name, action));
                return Ok(());
            }
            Next::Done(bytes) => (0, bytes),
            Next::Failed(errno) => (errno as i32, 0),
        };
        let action = order.action;
        *in_flight = None;
        self.count -= 1;
        self.slow -= u16::from(action.is_slow());
        if let State::Serving(link) = self.state {
            if errno != 0 && (action == Action::Flush || ErrorClass::of_errno(errno).is_suspect()) {
                self.error.get_or_insert(Errno::from_raw(errno));
            }
            self.answers.extend(FromService::Done { tag: Tag(name), errno, bytes }.encode(link));
        }
        self.settle();
        if action == Action::Flush && errno != 0 {
            self.cache_lost = true;
            return Err(Errno::from_raw(errno));
        }
        Ok(())
    }

    /// The driver has reset the controller since the last results were looked at, or another end's flush has failed.
    pub fn cache_lost(&mut self) {
        self.cache_lost = true;
    }

    /// Takes the buffers for the host.
    pub fn take_buffers(&mut self) -> Vec<Vec<u8>> {
        let mut buffers = std::mem::take(&mut self.buffers);
        if let State::Serving(link) = self.state {
            let mut answers = Vec::new();
            if std::mem::take(&mut self.cache_lost) {
                answers.extend(FromService::CacheLost.encode(link));
            }
            answers.append(&mut self.answers);
            buffers.extend(answers.chunks(MAX_BATCH * RECORD_BYTES).map(<[u8]>::to_vec));
        }
        buffers
    }

    /// What is at the disk, if anything is.
    pub fn work(&self) -> Option<Work> {
        if matches!(self.state, State::Flushing(_)) || self.slow > 0 {
            Some(Work::Slow)
        } else {
            (self.count > 0).then_some(Work::Quick)
        }
    }

    /// Says of an order that may take long that the disk has it.
    pub fn say_at_work(&mut self) {
        let State::Serving(link) = self.state else { return };
        if self.slow == 0 {
            return;
        }
        let is_slow = |order: &Option<InFlight>| order.is_some_and(|order| order.action.is_slow());
        if let Some(name) = self.in_flight.iter().position(is_slow).and_then(|at| Name::try_from(at).ok()) {
            self.answers.extend(FromService::AtWork { tag: Tag(name) }.encode(link));
        }
    }

    /// The first error of a session that may be the driver's, once: number of the session, and the error.
    pub fn take_error(&mut self) -> Option<(u32, Errno)> {
        let error = self.error.filter(|_| !self.error_is_told)?;
        self.error_is_told = true;
        Some((self.attempt, error))
    }

    /// A session that broke the protocol is over and flushed: the port is to be closed and opened again, once.
    pub fn is_closed(&mut self) -> bool {
        let closed = self.state == State::Closed;
        if closed {
            self.state = State::Waiting;
        }
        closed
    }
}

enum Next {
    Done(u64),
    Failed(Errno),
    Again(Action),
}

/// What becomes of an order after a result. The rest of a transfer that was done in part is tried once: only the end of a disk, or a
/// medium that fails in between, gives such a result.
fn next(order: &mut InFlight, result: i32) -> Next {
    let bytes = match outcome(result) {
        Ok(bytes) => bytes,
        Err(Errno::EOPNOTSUPP) if !order.again => {
            let Action::Punch(at) = order.action else { return Next::Failed(Errno::EOPNOTSUPP) };
            // The unmap flag is a permission, not a wish (virtio 1.2, section 5.2.6.2).
            (order.action, order.again) = (Action::Zero(at), true);
            return Next::Again(order.action);
        }
        Err(errno) => return Next::Failed(errno),
    };
    let rest = |at: Extent| Extent { start: at.start + bytes, length: at.length.saturating_sub(bytes) };
    let (at, action) = match order.action {
        Action::Read { at, place } => (at, Action::Read { at: rest(at), place: place + moved(bytes) }),
        Action::Write { at, place } => (at, Action::Write { at: rest(at), place: place + moved(bytes) }),
        Action::Zero(_) | Action::Punch(_) | Action::Discard(_) | Action::Flush => return Next::Done(0),
    };
    order.moved += bytes;
    if bytes == at.length {
        return Next::Done(order.moved);
    }
    if order.again || bytes > at.length || !bytes.is_multiple_of(SECTOR_BYTES) {
        return Next::Failed(Errno::EIO);
    }
    (order.action, order.again) = (action, true);
    Next::Again(action)
}

/// A part of a piece of the pool, which is smaller than a huge page.
fn moved(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(0)
}
