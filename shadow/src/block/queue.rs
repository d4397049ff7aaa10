//! The parts of the guest's requests, from when they are taken until they are done: which may be handed to the driver VM, and in which
//! order.
//!
//! The overlap rule: two parts that have a sector in common, one of which changes the medium, are never in flight together, and go in
//! the order in which they came; what is clear of everything before it may pass. So "the last content" of a sector is well defined
//! over any number of lives. Reads are included: a read may have seen a write that is not acknowledged, and that has still to be
//! issued a second time.
//!
//! ```text
//!   Blocked ──────────────> Ready ───────────> InFlight ──> gone
//!     last blocker gone     │  ^ ^  handed       │
//!                 overlaps  │  │ └───────────────┘ life lost, suspect error
//!                 what is   v  │ rewritten
//!                 owed     Parked
//! ```
//! Invariant: a part is Blocked exactly while there is one before it that conflicts with it and is not gone. Who waits for whom is not
//! kept but found by the ranges, so that memory grows with the parts and not with the pairs of them.

use std::collections::{BTreeMap, BTreeSet};

use super::buffers::BufferId;
use super::errors::Tally;
use super::exchange::Access;
use super::overlap::Overlaps;
use super::range::SectorRange;

/// A request of the guest, numbered in the order in which they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct RequestId(pub(super) u64);

/// A part of a request, numbered in the order in which they came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PartId(u64);

impl PartId {
    /// Before all others.
    pub(super) const FIRST: Self = Self(0);

    #[cfg(test)]
    pub(super) fn nth(n: u64) -> Self {
        Self(n)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Blocked,
    Ready(Tier),
    Parked,
    InFlight,
}

/// In which order parts that are ready go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tier {
    /// Changes that were in flight in an earlier life, and have all that they need.
    Again = 0,
    /// Changes that still need room in the log, if the disk has a volatile cache.
    Change = 1,
    /// Reads.
    Read = 2,
}

/// A part of a request.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// Its request; none for an orphan, whose guest has reset its device.
    pub(super) request: Option<RequestId>,
    pub(super) access: Access,
    pub(super) range: SectorRange,
    /// Sectors of the request before this part.
    pub(super) skip: u64,
    /// The private copy of what it writes.
    pub(super) copy: Option<BufferId>,
    /// Whether room in the log is set aside for it.
    pub(super) has_room: bool,
    /// Whether it was ever handed to a driver VM: it may have changed the medium.
    pub(super) handed: bool,
    /// Whether it was in flight when a life was lost.
    pub(super) again: bool,
    /// Suspect errors.
    pub(super) strikes: Tally,
    /// Deaths in a row with this part in flight.
    pub(super) deaths: Tally,
    state: State,
    /// Parts before it that conflict with it and are not gone.
    blockers: u32,
}

impl Part {
    pub(super) fn new(request: RequestId, access: Access, range: SectorRange, skip: u64) -> Self {
        Self {
            request: Some(request),
            access,
            range,
            skip,
            copy: None,
            has_room: false,
            handed: false,
            again: false,
            strikes: Tally::default(),
            deaths: Tally::default(),
            state: State::Blocked,
            blockers: 0,
        }
    }

    pub(super) fn is_in_flight(&self) -> bool {
        self.state == State::InFlight
    }

    /// Whether it can be issued again without the guest's buffers.
    pub(super) fn is_whole(&self) -> bool {
        self.copy.is_some() || matches!(self.access, Access::WriteZeroes { .. } | Access::Discard)
    }

    fn tier(&self) -> Tier {
        match self.access {
            Access::Read => Tier::Read,
            _ if self.has_room => Tier::Again,
            _ => Tier::Change,
        }
    }
}

/// Two accesses to the same sectors that may not be in flight together.
fn conflicts(first: Access, second: Access) -> bool {
    if broken!(ReadsPassChanges) && (first == Access::Read || second == Access::Read) {
        return false;
    }
    if broken!(ChangesPassChanges) && first.changes() && second.changes() {
        return false;
    }
    first.conflicts(second)
}

/// The parts.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue {
    next: u64,
    parts: BTreeMap<PartId, Part>,
    overlaps: Overlaps,
    ready: [BTreeSet<PartId>; 3],
    /// Parts that were in flight when a life was lost.
    again: usize,
    /// Parts for which room in the log is set aside.
    with_room: usize,
}

impl Queue {
    /// Takes a part, behind all others.
    pub(super) fn push(&mut self, mut part: Part) {
        let id = PartId(self.next);
        self.next += 1;
        for other in self.overlaps.overlapping(part.range) {
            let is_blocker = self.parts.get(&other).is_some_and(|other| conflicts(other.access, part.access));
            part.blockers += u32::from(is_blocker);
        }
        self.overlaps.insert(part.range, id);
        let free = part.blockers == 0;
        self.parts.insert(id, part);
        if free {
            self.make_ready(id);
        }
    }

    fn make_ready(&mut self, id: PartId) {
        let Some(part) = self.parts.get_mut(&id) else { return };
        let tier = part.tier();
        part.state = State::Ready(tier);
        self.ready[tier as usize].insert(id);
    }

    /// A part is done, failed or forgotten: what waited for it may go.
    pub(super) fn finish(&mut self, id: PartId) -> Option<Part> {
        let part = self.parts.remove(&id)?;
        self.overlaps.remove(part.range, id);
        if let State::Ready(tier) = part.state {
            self.ready[tier as usize].remove(&id);
        }
        self.again -= usize::from(part.again);
        self.with_room -= usize::from(part.has_room);
        let behind: Vec<PartId> = self.overlaps.overlapping(part.range).filter(|other| *other > id).collect();
        for waiter in behind {
            let Some(waiting) = self.parts.get_mut(&waiter).filter(|w| conflicts(part.access, w.access)) else {
                continue;
            };
            waiting.blockers -= 1;
            if waiting.blockers == 0 {
                self.make_ready(waiter);
            }
        }
        Some(part)
    }

    /// The part that goes next: what was in flight before goes first, else the oldest. `room` says whether the log has room for a
    /// change that does not have its room yet; where the first of them finds none, those behind it do not pass.
    pub(super) fn next_ready(&self, room: impl Fn(&Part) -> bool) -> Option<PartId> {
        let first = |tier: Tier| self.ready[tier as usize].first().copied();
        if let Some(again) = first(Tier::Again) {
            return Some(again);
        }
        let change = first(Tier::Change).filter(|id| self.parts.get(id).is_some_and(room));
        let read = first(Tier::Read);
        match (change, read) {
            (Some(change), Some(read)) => Some(change.min(read)),
            (change, read) => change.or(read),
        }
    }

    /// The first change that still needs room, if there is one.
    pub(super) fn first_without_room(&self) -> Option<&Part> {
        self.parts.get(self.ready[Tier::Change as usize].first()?)
    }

    fn leave_ready(&mut self, id: PartId, state: State) {
        let Some(part) = self.parts.get_mut(&id) else { return };
        if let State::Ready(tier) = part.state {
            self.ready[tier as usize].remove(&id);
        }
        part.state = state;
    }

    /// A ready part overlaps what is owed: it waits until [`Self::wake`].
    pub(super) fn park(&mut self, id: PartId) {
        self.leave_ready(id, State::Parked);
    }

    /// Something in `range` is owed no more.
    pub(super) fn wake(&mut self, range: SectorRange) {
        let parked = |id: &PartId| self.parts.get(id).is_some_and(|part| part.state == State::Parked);
        let woken: Vec<PartId> = self.overlaps.overlapping(range).filter(parked).collect();
        for id in woken {
            self.make_ready(id);
        }
    }

    /// A ready part is handed to a driver VM.
    pub(super) fn hand(&mut self, id: PartId) {
        self.leave_ready(id, State::InFlight);
        if let Some(part) = self.parts.get_mut(&id) {
            part.handed = true;
        }
    }

    /// Room in the log is set aside for a part.
    pub(super) fn give_room(&mut self, id: PartId, copy: Option<BufferId>) {
        let Some(part) = self.parts.get_mut(&id) else { return };
        part.copy = part.copy.or(copy);
        self.with_room += usize::from(!part.has_room);
        part.has_room = true;
    }

    /// A part that was in flight waits for its next issue, in its old place.
    pub(super) fn requeue(&mut self, id: PartId) {
        self.make_ready(id);
    }

    /// The same because the life was lost.
    pub(super) fn requeue_in_next_life(&mut self, id: PartId) {
        let Some(part) = self.parts.get_mut(&id) else { return };
        self.again += usize::from(!part.again);
        part.again = true;
        self.make_ready(id);
    }

    pub(super) fn get(&self, id: PartId) -> Option<&Part> {
        self.parts.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: PartId) -> Option<&mut Part> {
        self.parts.get_mut(&id)
    }

    /// All parts, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (PartId, &Part)> {
        self.parts.iter().map(|(&id, part)| (id, part))
    }

    /// All parts, in order, to be changed.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Part> {
        self.parts.values_mut()
    }

    /// Whether a part that overlaps `range` is in flight.
    pub(super) fn in_flight_in(&self, range: SectorRange) -> bool {
        self.overlaps.overlapping(range).any(|id| self.parts.get(&id).is_some_and(Part::is_in_flight))
    }

    /// Whether a part that changes something in `range` is not done.
    pub(super) fn changes_in(&self, range: SectorRange) -> bool {
        self.overlaps.overlapping(range).any(|id| self.parts.get(&id).is_some_and(|part| part.access.changes()))
    }

    /// The requests that have a part in `range` that is not done.
    pub(super) fn requests_in(&self, range: SectorRange) -> impl Iterator<Item = RequestId> {
        self.overlaps.overlapping(range).filter_map(|id| self.parts.get(&id)?.request)
    }

    /// Whether a part that was in flight when a life was lost is not done.
    pub(super) fn has_again(&self) -> bool {
        self.again > 0
    }

    /// Parts with room set aside in the log.
    pub(super) fn with_room(&self) -> usize {
        self.with_room
    }
}
