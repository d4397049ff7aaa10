//! One session with a disk service: greeted, then orders and answers as records, with their data in the pool.
//!
//! ```text
//!   Greeting ── hello ──> Serving
//! ```
//! Orders are put into a *batch* first, with their data in the pool; a batch goes out as soon as the driver VM has a buffer for it. At
//! most [`MAX_BATCH`] orders wait so. The link comes up when the service has opened its port, so that no record is lost to the driver
//! VM's kernel.
//!
//! Invariants: an order's piece of the pool is its own until its answer is taken; an answer counts only for an order that was sent;
//! nothing but `Begin` is sent before the hello.

use umbra_driver_vm::block_protocol::{
    FromService, Hello, MAX_BATCH, MAX_HELLO, Operation, ProtocolError, RECORD_BYTES, ToService, parse_hello, records,
};
use umbra_shadow::LinkId;
use umbra_shadow::block::{Command, Data, Disk, Order, Payload, SECTOR_BYTES, Tag, Violation};
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::EventFd;

use super::data::GuestData;
use super::link::{LinkError, Port};
use super::pool::{Piece, Pool, PoolError};
use crate::link::LinkQueue;

/// What an order brings back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Brings {
    /// Data for the guest.
    Data,
    /// A block by which the disk is recognised.
    Sample,
    /// No data.
    Nothing,
}

/// An order in flight.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) brings: Brings,
    /// Bytes that it reads or writes.
    pub(super) bytes: u64,
    piece: Option<Piece>,
    is_sent: bool,
}

/// Records that wait for a buffer.
#[derive(Debug, Default)]
struct Batch {
    records: Vec<u8>,
    /// The order that each of them is about; none for `Begin`.
    orders: Vec<Option<Tag>>,
}

impl Batch {
    fn push(&mut self, record: [u8; RECORD_BYTES], order: Option<Tag>) {
        self.records.extend(record);
        self.orders.push(order);
    }

    /// Takes the first `count` records out; the orders that they are about.
    fn take(&mut self, count: usize) -> impl Iterator<Item = Tag> {
        self.records.drain(..count * RECORD_BYTES);
        self.orders.drain(..count).flatten()
    }
}

#[derive(Debug)]
struct Service {
    disk: Disk,
    pool: Pool,
    /// By tag.
    flights: Vec<Option<Flight>>,
}

#[derive(Debug)]
enum Phase {
    Greeting,
    Serving(Box<Service>),
}

/// A session, from the set-up of its link to its end.
#[derive(Debug)]
pub(super) struct Session {
    port: Port,
    phase: Phase,
    batch: Batch,
    /// Nothing was handed over or answered since the cache was lost.
    is_cache_lost: bool,
}

/// What a buffer of the service says.
#[derive(Debug)]
pub(super) enum Heard {
    /// It greets.
    Hello(Box<Hello>),
    /// Records of this session.
    Records(Vec<FromService>),
}

impl Session {
    /// A session on this link; its `Begin` waits to be sent.
    pub(super) fn new(port: Port) -> Self {
        let mut batch = Batch::default();
        batch.push(ToService::Begin.encode(port.id()), None);
        Self { port, phase: Phase::Greeting, batch, is_cache_lost: false }
    }

    pub(super) fn id(&self) -> LinkId {
        self.port.id()
    }

    pub(super) fn kicks(&self) -> [(LinkQueue, &EventFd); 2] {
        self.port.kicks()
    }

    pub(super) fn into_kicks(self) -> [EventFd; 2] {
        self.port.into_kicks()
    }

    pub(super) fn take_calls(&mut self) {
        self.port.take_calls();
    }

    /// The disk as the service has reported it.
    pub(super) fn disk(&self) -> Option<&Disk> {
        match &self.phase {
            Phase::Greeting => None,
            Phase::Serving(service) => Some(&service.disk),
        }
    }

    /// Goes on with the disk and the pool of a hello.
    pub(super) fn begin(&mut self, hello: Hello) -> Result<(), LinkError> {
        let pool = Pool::new(&hello.pool, self.port.memory())?;
        let flights = (0..hello.depth).map(|_| None).collect();
        self.phase = Phase::Serving(Box::new(Service { disk: hello.disk, pool, flights }));
        Ok(())
    }

    /// Whether one more order can be taken, whatever it is.
    pub(super) fn has_room(&self) -> bool {
        match &self.phase {
            Phase::Greeting => false,
            Phase::Serving(service) => self.batch.orders.len() < MAX_BATCH && service.pool.has_room(),
        }
    }

    /// Takes an order, for which there is room, and copies its data.
    pub(super) fn put<P: Payload + AsRef<[u8]>>(
        &mut self,
        order: &Order<P>,
        data: &mut dyn GuestData,
    ) -> Result<(), LinkError> {
        let Phase::Serving(service) = &mut self.phase else { return Ok(()) };
        self.is_cache_lost = false;
        let message = service.take(order, self.port.memory(), data)?;
        self.batch.push(message.encode(self.port.id()), Some(order.tag));
        Ok(())
    }

    /// Sends what waits as far as there are buffers for it.
    pub(super) fn send(&mut self) -> Result<(), LinkError> {
        while !self.batch.orders.is_empty() {
            let sent = self.port.send(&self.batch.records)? / RECORD_BYTES;
            if sent == 0 {
                break;
            }
            for tag in self.batch.take(sent) {
                if let Some(flight) = flight_of(&mut self.phase, tag) {
                    flight.is_sent = true;
                }
            }
        }
        Ok(())
    }

    /// Tells the driver VM of what was sent and received.
    pub(super) fn notify(&mut self) -> Result<(), LinkError> {
        self.port.notify()
    }

    /// What the next buffer says; none if there is no further one.
    pub(super) fn receive(&mut self) -> Result<Option<Heard>, LinkError> {
        let mut buffer = [0; MAX_HELLO];
        let Some(length) = self.port.receive(&mut buffer)? else { return Ok(None) };
        Ok(Some(self.understand(&buffer[..length])?))
    }

    fn understand(&self, buffer: &[u8]) -> Result<Heard, ProtocolError> {
        let link = self.port.id();
        if let Phase::Greeting = self.phase {
            let hello = parse_hello(buffer, link)?;
            return Ok(hello.map_or(Heard::Records(Vec::new()), |hello| Heard::Hello(Box::new(hello))));
        }
        let parsed = records(buffer)?.map(|record| FromService::parse(record, link));
        Ok(Heard::Records(parsed.filter_map(Result::transpose).collect::<Result<_, _>>()?))
    }

    /// The service says that the cache is lost; whether that is news. Said again and again it costs the shadow, which goes through its
    /// whole log, nothing.
    pub(super) fn cache_is_lost(&mut self) -> bool {
        !std::mem::replace(&mut self.is_cache_lost, true)
    }

    /// Takes an order that is answered out of flight.
    pub(super) fn take_flight(&mut self, tag: Tag) -> Result<Flight, Violation> {
        let unknown = Violation::UnknownTag(tag.0);
        let Phase::Serving(service) = &mut self.phase else { return Err(unknown) };
        let slot = service.flights.get_mut(usize::from(tag.0)).ok_or(unknown)?;
        self.is_cache_lost = false;
        slot.take_if(|flight| flight.is_sent).ok_or(unknown)
    }

    /// Whether an order is in flight and was sent.
    pub(super) fn check_sent(&mut self, tag: Tag) -> Result<(), Violation> {
        let is_sent = flight_of(&mut self.phase, tag).is_some_and(|flight| flight.is_sent);
        if is_sent { Ok(()) } else { Err(Violation::UnknownTag(tag.0)) }
    }

    /// The data of an order.
    pub(super) fn data_of(&self, flight: &Flight) -> Result<VolatileSlice<'_>, PoolError> {
        match (&self.phase, &flight.piece) {
            (Phase::Serving(service), Some(piece)) => service.pool.bytes(piece, self.port.memory()),
            _ => Err(PoolError::TooSmall),
        }
    }

    /// An order has come to its end: its piece of the pool is free.
    pub(super) fn finish(&mut self, flight: Flight) {
        if let (Phase::Serving(service), Some(piece)) = (&mut self.phase, flight.piece) {
            service.pool.give_back(&piece);
        }
    }
}

fn flight_of(phase: &mut Phase, tag: Tag) -> Option<&mut Flight> {
    match phase {
        Phase::Greeting => None,
        Phase::Serving(service) => service.flights.get_mut(usize::from(tag.0))?.as_mut(),
    }
}

impl Service {
    /// Puts an order in flight; its record.
    fn take<P: Payload + AsRef<[u8]>>(
        &mut self,
        order: &Order<P>,
        memory: &vm_memory::GuestMemoryMmap,
        data: &mut dyn GuestData,
    ) -> Result<ToService, LinkError> {
        let (tag, bytes) = (order.tag, order.command.bytes());
        let piece = if bytes > 0 { Some(self.pool.take(bytes).ok_or(PoolError::TooSmall)?) } else { None };
        if let (Some(piece), Command::Write { data: source, .. }) = (&piece, &order.command) {
            fill(&self.pool.bytes(piece, memory)?, source, data);
        }
        let place = piece.as_ref().map_or(0, |piece| self.pool.place(piece));
        let brings = match order.command {
            Command::Read { .. } => Brings::Data,
            Command::Sample { .. } => Brings::Sample,
            _ => Brings::Nothing,
        };
        if let Some(slot) = self.flights.get_mut(usize::from(tag.0)) {
            *slot = Some(Flight { brings, bytes, piece, is_sent: false });
        }
        Ok(message(order, place))
    }
}

/// Copies what is to be written.
fn fill<P: AsRef<[u8]>>(to: &VolatileSlice<'_>, source: &Data<P>, data: &mut dyn GuestData) {
    let slices = match source {
        Data::Guest(span) => return data.copy_from_guest(*span, to),
        Data::Private(slices) => slices,
    };
    let byte = |sectors: u64| usize::try_from(sectors * SECTOR_BYTES).unwrap_or(usize::MAX);
    let mut at = 0;
    for slice in slices {
        let bytes = slice.payload.as_ref().get(byte(slice.skip)..byte(slice.skip + slice.sectors)).unwrap_or_default();
        if let Ok(part) = to.offset(at) {
            part.copy_from(bytes);
        }
        at += bytes.len();
    }
}

fn message<P>(order: &Order<P>, place: u64) -> ToService {
    let tag = order.tag;
    let (operation, at) = match order.command {
        Command::Flush => return ToService::Flush { tag },
        Command::Read { at, .. } | Command::Sample { at } => (Operation::Read { place }, at),
        Command::Write { at, .. } => (Operation::Write { place }, at),
        Command::WriteZeroes { at, unmap } => (Operation::WriteZeroes { unmap }, at),
        Command::Discard { at } => (Operation::Discard, at),
    };
    ToService::Access { tag, operation, at }
}
