//! Moves frames: from one virtqueue to another with one copy, from a virtqueue into the shadow's log, and from the
//! log into a virtqueue.
//!
//! Invariant: when a call returns, each chain it took is completed and each frame is wholly on one side; frames keep
//! their order; a call costs at most about [`BUDGET`] plus one frame. What is malformed is dropped and
//! counted if the guest wrote it (its own loss), and is a [`Fault`] if the driver VM did (it counts as failed), unless a host
//! on the wire may have caused it.

use thiserror::Error;
use umbra_shadow::net::rx_mode::Mac;

use crate::copy::{copy, gather, scatter};
use crate::header::{HEADER_LEN, Header, Malformed, Offloads};
use crate::queue::{Chain, ChainFault, Notified, Ring, RingFault, Virtqueue};

/// Descriptors, frames and [`BYTES_PER_WORK`] that one call may visit before other work of the event loop gets its turn. A 64 KiB
/// frame costs about 50: some 160 of them, or 2,000 small frames, a millisecond or two.
pub const BUDGET: usize = 8192;

/// Bytes of a frame that cost as much as a descriptor: copying 2 KiB takes longer than reading one.
const BYTES_PER_WORK: usize = 2048;

/// What notifying both ends costs beside it: two system calls.
const NOTIFYING: usize = 64;

/// Whose end a queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// The guest's driver.
    Guest,
    /// The driver VM's.
    DriverVm,
}

/// What a driver did that none may do.
#[derive(Debug, Error)]
pub enum Fault {
    /// The ring itself.
    #[error("broken ring")]
    Ring(#[from] RingFault),
    /// A descriptor chain.
    #[error("malformed descriptor chain")]
    Chain(#[from] ChainFault),
    /// A frame.
    #[error("malformed frame")]
    Frame(#[from] Malformed),
    /// A receive buffer without room for a header, or a full ring without room for one frame.
    #[error("receive buffers of {0} bytes")]
    Room(usize),
}

impl Fault {
    fn may_come_from_the_wire(&self) -> bool {
        matches!(self, Self::Frame(malformed) if malformed.may_come_from_the_wire())
    }
}

/// A fault and who is to blame.
#[derive(Debug, Error)]
#[error("{owner:?}'s queue")]
pub struct PumpError {
    /// Whose queue.
    pub owner: Owner,
    /// The rule that was broken.
    #[source]
    pub fault: Fault,
}

/// Why a call came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// No more frames; the source will kick.
    SourceEmpty,
    /// No more buffers; the target will kick.
    TargetFull,
    /// The budget is spent: call again.
    Budget,
}

/// What both ends agreed to.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Whose queue the frames come from; the target is the other's.
    pub source: Owner,
    /// Offloads that the source may ask for.
    pub negotiated: Offloads,
    /// Offloads that the target takes.
    pub accepted: Offloads,
    /// The target merges receive buffers.
    pub mergeable: bool,
}

impl Flow {
    fn target(&self) -> Owner {
        match self.source {
            Owner::Guest => Owner::DriverVm,
            Owner::DriverVm => Owner::Guest,
        }
    }
}

/// What was moved and what was not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames moved.
    pub frames: u64,
    /// Their bytes, without headers.
    pub bytes: u64,
    /// Dropped: the guest's chain or header was malformed, or the frame, whoever sent it, has too many segments.
    pub malformed: u64,
    /// Dropped: the target did not accept the offload that the frame needs.
    pub not_accepted: u64,
    /// Dropped: the target's buffers cannot hold the frame.
    pub no_room: u64,
    /// Dropped: the guest may not send with this source address.
    pub foreign_source: u64,
    /// What moving them took.
    pub work: Work,
}

/// What it takes to move frames, in calls and signals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Calls, also those that found nothing.
    pub pumps: u64,
    /// Calls that ended because the target had no buffers.
    pub full: u64,
    /// Signals to either end: an eventfd written, an interrupt of its VM.
    pub signals: u64,
    /// Signals left out, because that end did not want to hear.
    pub suppressed: u64,
}

impl Work {
    fn note(&mut self, notified: Notified) {
        match notified {
            Notified::Sent => self.signals += 1,
            Notified::Unwanted => self.suppressed += 1,
            Notified::NothingNew => {}
        }
    }
}

/// Where a frame is to go and where it says that it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The receiver.
    pub destination: Mac,
    /// The sender.
    pub source: Mac,
}

/// Bytes of both, at the beginning of an Ethernet frame.
const ADDRESSES_LEN: usize = 12;

impl Addresses {
    /// Of a frame behind its virtio-net header; it is at least [`crate::header::MIN_FRAME`] long.
    fn of(chain: &Chain<'_>) -> Self {
        let mut bytes = [0; ADDRESSES_LEN];
        match chain.readable().first().and_then(|first| first.subslice(HEADER_LEN, ADDRESSES_LEN).ok()) {
            Some(all) => all.copy_to(&mut bytes[..]),
            None => gather(chain.readable(), HEADER_LEN, &mut bytes),
        };
        let [a, b, c, d, e, f, source @ ..] = bytes;
        Self { destination: [a, b, c, d, e, f], source }
    }

    fn to_bytes(self) -> [u8; ADDRESSES_LEN] {
        let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (self.destination, self.source);
        [a, b, c, d, e, f, g, h, i, j, k, l]
    }
}

/// Learns of each frame that is moved, and may refuse it.
pub trait HandoverLog {
    /// Whether [`Self::admits`] is asked: where it is not, frames are not looked into.
    const LOOKS: bool = false;

    /// Whether a frame may pass. It passes with these addresses, whatever its owner writes there meanwhile.
    #[inline]
    fn admits(&mut self, _addresses: &Addresses) -> bool {
        true
    }

    /// A frame was put into buffers with these heads; `used` is the used index of the first.
    fn handed(&mut self, used: u16, heads: impl Iterator<Item = u16>);
}

/// Records nothing: frames towards the guest, and the measure for what recording costs.
pub struct Off;

impl HandoverLog for Off {
    #[inline]
    fn handed(&mut self, _used: u16, _heads: impl Iterator<Item = u16>) {}
}

/// Moves frames from `source` to `target` until one of them is at its end or the budget is spent.
pub fn pump<T: HandoverLog>(
    source: &mut Virtqueue,
    target: &mut Virtqueue,
    flow: &Flow,
    tap: &mut T,
    counts: &mut Counts,
) -> Result<Stop, PumpError> {
    counts.work.pumps += 1;
    let mut work = 0;
    loop {
        let moved = move_frames(source, target, flow, tap, counts, &mut work);
        // Each side is notified of what was done for it, whatever the other did; and before either is asked for a kick: what comes
        // meanwhile needs none.
        let told_source = source.tell().map(|told| counts.work.note(told)).map_err(blame(flow.source));
        let told_target = target.tell().map(|told| counts.work.note(told)).map_err(blame(flow.target()));
        work += NOTIFYING;
        let pause = moved?;
        told_source.and(told_target)?;
        let (queue, owner, known, stop) = match pause {
            Pause::Budget => return Ok(Stop::Budget),
            Pause::Empty => (&mut *source, flow.source, 0, Stop::SourceEmpty),
            Pause::Full(known) => (&mut *target, flow.target(), known, Stop::TargetFull),
        };
        if !queue.open().and_then(|mut ring| more_than(&mut ring, known)).map_err(blame(owner))? {
            counts.work.full += u64::from(stop == Stop::TargetFull);
            return Ok(stop);
        }
    }
}

/// Why frames are not moved for the moment. Nobody has been asked for a kick yet.
enum Pause {
    /// No more frames.
    Empty,
    /// No buffers beyond this many, which are too few.
    Full(u16),
    /// The budget is spent.
    Budget,
}

fn blame<F: Into<Fault>>(owner: Owner) -> impl Fn(F) -> PumpError {
    move |fault| PumpError { owner, fault: fault.into() }
}

fn move_frames<T: HandoverLog>(
    source: &mut Virtqueue,
    target: &mut Virtqueue,
    flow: &Flow,
    tap: &mut T,
    counts: &mut Counts,
    work: &mut usize,
) -> Result<Pause, PumpError> {
    let (at_source, at_target) = (blame(flow.source), blame(flow.target()));
    let mut from = source.open().map_err(&at_source)?;
    let mut to = target.open().map_err(&at_target)?;
    let (mut chain, mut space) = (Chain::default(), Space::default());
    from.mute().map_err(&at_source)?;
    to.mute().map_err(&at_target)?;
    let mut waiting = 0;
    while *work < BUDGET {
        if waiting == 0 {
            waiting = from.available().map_err(&at_source)?;
            if waiting == 0 {
                return Ok(Pause::Empty);
            }
        }
        let head = from.head(0).map_err(&at_source)?;
        let read = read_frame(&from, head, flow.negotiated, &mut chain);
        *work += 1 + chain.cost;
        let put = match read {
            Ok((header, len)) if flow.accepted.contains(header.needs()) => {
                let addresses = T::LOOKS.then(|| Addresses::of(&chain));
                if addresses.is_some_and(|addresses| !tap.admits(&addresses)) {
                    Put::Foreign
                } else {
                    // What a driver VM writes there meanwhile decides nothing.
                    let payload = Payload::Chain(&chain, len, addresses.filter(|_| flow.source == Owner::Guest));
                    let put = put_frame(&mut to, flow, &header, &payload, &mut space, tap);
                    *work += space.chain.cost;
                    put?
                }
            }
            Ok(_) => Put::NotAccepted,
            Err(fault) if flow.source == Owner::Guest || fault.may_come_from_the_wire() => {
                tracing::debug!(%fault, "dropped a malformed frame");
                Put::Malformed
            }
            Err(fault) => return Err(PumpError { owner: flow.source, fault }),
        };
        match put {
            Put::Done(len) => {
                counts.frames += 1;
                counts.bytes += len as u64;
                *work += len / BYTES_PER_WORK;
            }
            Put::Full(known) => return Ok(Pause::Full(known)),
            Put::NotAccepted => counts.not_accepted += 1,
            Put::NoRoom => counts.no_room += 1,
            Put::Malformed => counts.malformed += 1,
            Put::Foreign => counts.foreign_source += 1,
        }
        from.take(1);
        from.complete(head, 0).map_err(blame(flow.source))?;
        waiting -= 1;
    }
    Ok(Pause::Budget)
}

/// Chains that wait; if none, asks for a kick and looks again.
pub(crate) fn more(ring: &mut Ring<'_>) -> Result<u16, RingFault> {
    if more_than(ring, 0)? { ring.available() } else { Ok(0) }
}

/// Whether more than `known` chains wait; if not, asks for a kick and looks again.
fn more_than(ring: &mut Ring<'_>, known: u16) -> Result<bool, RingFault> {
    if ring.available()? > known {
        return Ok(true);
    }
    let more = ring.listen(known)?;
    if more {
        ring.mute()?;
    }
    Ok(more)
}

/// A checked frame where its owner has put it. Its bytes may change at any time.
pub struct InPlace<'a, 'm> {
    header: Header,
    chain: &'a Chain<'m>,
    len: usize,
}

impl InPlace<'_, '_> {
    /// The addresses of its Ethernet header.
    pub fn addresses(&self) -> Addresses {
        Addresses::of(self.chain)
    }

    /// A copy, checked header first. Its source address is that of [`copied_source`], not of [`Self::addresses`], which may
    /// have changed meanwhile.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut frame = vec![0; HEADER_LEN + self.len];
        frame[..HEADER_LEN].copy_from_slice(&self.header.to_bytes(1));
        gather(self.chain.readable(), HEADER_LEN, &mut frame[HEADER_LEN..]);
        frame
    }
}

/// The source address in a copy that [`InPlace::to_vec`] made.
pub fn copied_source(frame: &[u8]) -> Mac {
    frame.get(HEADER_LEN + 6..).and_then(|rest| rest.first_chunk()).copied().unwrap_or_default()
}

/// Takes frames out of `source` and shows each to `see` until it is empty or the budget is spent.
pub fn drain(
    source: &mut Virtqueue,
    negotiated: Offloads,
    counts: &mut Counts,
    mut see: impl FnMut(&InPlace<'_, '_>),
) -> Result<Stop, RingFault> {
    let stop = drain_frames(source, negotiated, counts, &mut see);
    let told = source.tell().map(|told| counts.work.note(told));
    counts.work.pumps += 1;
    let stop = stop?;
    told.map(|()| stop)
}

fn drain_frames(
    source: &mut Virtqueue,
    negotiated: Offloads,
    counts: &mut Counts,
    see: &mut impl FnMut(&InPlace<'_, '_>),
) -> Result<Stop, RingFault> {
    let mut from = source.open()?;
    let mut chain = Chain::default();
    from.mute()?;
    let mut work = 0;
    while work < BUDGET {
        if more(&mut from)? == 0 {
            return Ok(Stop::SourceEmpty);
        }
        let head = from.head(0)?;
        let read = read_frame(&from, head, negotiated, &mut chain);
        work += 1 + chain.cost;
        match read {
            Ok((header, len)) => {
                work += len / BYTES_PER_WORK;
                see(&InPlace { header, chain: &chain, len });
            }
            Err(fault) => {
                tracing::debug!(%fault, "dropped a malformed frame of the guest");
                counts.malformed += 1;
            }
        }
        from.take(1);
        from.complete(head, 0)?;
    }
    Ok(Stop::Budget)
}

/// What became of a logged frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handed {
    /// It is in the target's buffers.
    Yes,
    /// The target has no buffers now; it will kick.
    Full,
    /// The target can never take it.
    Never,
}

/// Hands one logged frame (header first) to the driver VM. The caller notifies it after the last.
pub fn hand<T: HandoverLog>(
    target: &mut Virtqueue,
    flow: &Flow,
    frame: &[u8],
    tap: &mut T,
) -> Result<Handed, PumpError> {
    let mut to = target.open().map_err(blame(flow.target()))?;
    let Some((header, payload)) = frame.split_first_chunk::<HEADER_LEN>() else { return Ok(Handed::Never) };
    let Ok(header) = Header::check(*header, payload.len(), flow.accepted) else { return Ok(Handed::Never) };
    let mut space = Space::default();
    loop {
        match put_frame(&mut to, flow, &header, &Payload::Bytes(payload), &mut space, tap)? {
            Put::Done(_) => return Ok(Handed::Yes),
            Put::Full(known) if to.listen(known).map_err(blame(flow.target()))? => {}
            Put::Full(_) => return Ok(Handed::Full),
            Put::NotAccepted | Put::NoRoom | Put::Malformed | Put::Foreign => return Ok(Handed::Never),
        }
    }
}

fn read_frame<'m>(
    from: &Ring<'m>,
    head: u16,
    negotiated: Offloads,
    chain: &mut Chain<'m>,
) -> Result<(Header, usize), Fault> {
    from.walk(head, chain)?;
    if !chain.writable().is_empty() {
        return Err(ChainFault::Direction.into());
    }
    let mut bytes = [0; HEADER_LEN];
    gather(chain.readable(), 0, &mut bytes);
    let len = chain.readable_len().saturating_sub(HEADER_LEN);
    Ok((Header::check(bytes, len, negotiated)?, len))
}

/// A frame without its header, wherever it is.
enum Payload<'a, 'm> {
    /// With its length, and the addresses that it passes with if they were looked at.
    Chain(&'a Chain<'m>, usize, Option<Addresses>),
    Bytes(&'a [u8]),
}

impl Payload<'_, '_> {
    fn len(&self) -> usize {
        match self {
            Self::Chain(_, len, _) => *len,
            Self::Bytes(bytes) => bytes.len(),
        }
    }

    fn copy_to(&self, space: &Chain<'_>) {
        match self {
            Self::Chain(chain, len, addresses) => {
                copy(chain.readable(), HEADER_LEN, space.writable(), HEADER_LEN, *len);
                if let Some(addresses) = addresses {
                    scatter(&addresses.to_bytes(), space.writable(), HEADER_LEN);
                }
            }
            Self::Bytes(bytes) => {
                scatter(bytes, space.writable(), HEADER_LEN);
            }
        }
    }
}

/// Receive buffers for one frame. Reused from frame to frame.
#[derive(Default)]
struct Space<'m> {
    chain: Chain<'m>,
    /// Head and capacity of each.
    buffers: Vec<(u16, usize)>,
}

enum Put {
    Done(usize),
    /// No buffers beyond this many.
    Full(u16),
    NotAccepted,
    NoRoom,
    Malformed,
    Foreign,
}

#[inline]
fn put_frame<'m, T: HandoverLog>(
    to: &mut Ring<'m>,
    flow: &Flow,
    header: &Header,
    payload: &Payload<'_, '_>,
    space: &mut Space<'m>,
    tap: &mut T,
) -> Result<Put, PumpError> {
    let owner = flow.target();
    let len = payload.len();
    match find_space(to, HEADER_LEN + len, flow.mergeable, space) {
        Ok(Found::Enough) => {}
        Ok(Found::More(known)) => return Ok(Put::Full(known)),
        Ok(Found::Never) => return Ok(Put::NoRoom),
        Err(Fault::Ring(fault)) => return Err(PumpError { owner, fault: fault.into() }),
        Err(fault) if owner == Owner::DriverVm => return Err(PumpError { owner, fault }),
        Err(fault) => {
            tracing::debug!(%fault, "gave malformed receive buffers back to the guest");
            give_back(to, space).map_err(blame(owner))?;
            return Ok(Put::Malformed);
        }
    }
    let count = u16::try_from(space.buffers.len()).unwrap_or(u16::MAX);
    scatter(&header.to_bytes(count), space.chain.writable(), 0);
    payload.copy_to(&space.chain);
    finish(to, space, HEADER_LEN + len, tap).map_err(blame(owner))?;
    Ok(Put::Done(len))
}

#[inline]
fn finish<T: HandoverLog>(to: &mut Ring<'_>, space: &Space<'_>, len: usize, tap: &mut T) -> Result<(), RingFault> {
    let mut left = len;
    tap.handed(to.next_used(), space.buffers.iter().map(|(head, _)| *head));
    for (head, capacity) in &space.buffers {
        let count = left.min(*capacity);
        // A frame's length fits: it is bounded by MAX_FRAME.
        to.put_used(*head, u32::try_from(count).unwrap_or(0))?;
        left -= count;
    }
    to.take(u16::try_from(space.buffers.len()).unwrap_or(0));
    to.publish()
}

/// Completes the buffers looked at so far, unused.
fn give_back(to: &mut Ring<'_>, space: &Space<'_>) -> Result<(), RingFault> {
    for (head, _) in &space.buffers {
        to.put_used(*head, 0)?;
    }
    to.take(u16::try_from(space.buffers.len()).unwrap_or(0));
    to.publish()
}

enum Found {
    Enough,
    /// Not enough; this many were there.
    More(u16),
    /// Not enough, and there cannot be more.
    Never,
}

/// Collects buffers for `need` bytes, without taking them. After a chain fault `space.buffers` ends with the faulty
/// one.
#[inline]
fn find_space<'m>(to: &Ring<'m>, need: usize, mergeable: bool, space: &mut Space<'m>) -> Result<Found, Fault> {
    space.chain.clear();
    space.buffers.clear();
    let waiting = to.available()?;
    for ahead in 0..waiting {
        let head = to.head(ahead)?;
        let before = space.chain.writable_len();
        space.buffers.push((head, 0));
        to.walk_on(head, &mut space.chain)?;
        if !space.chain.readable().is_empty() {
            return Err(ChainFault::Direction.into());
        }
        let capacity = space.chain.writable_len() - before;
        if ahead == 0 && capacity < HEADER_LEN {
            return Err(Fault::Room(capacity));
        }
        if let Some(last) = space.buffers.last_mut() {
            last.1 = capacity;
        }
        if space.chain.writable_len() >= need {
            return Ok(Found::Enough);
        }
        if !mergeable {
            return Ok(Found::Never);
        }
    }
    Ok(if waiting == to.size() { Found::Never } else { Found::More(waiting) })
}
