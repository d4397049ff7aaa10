//! One life of the disk, as the shadow sees it: a connection with a driver VM, and what is in flight on it.
//!
//! A second connection with the same driver VM is a life of its own: what was in flight on the first has an unknown fate. The driver
//! VM's end answers for its part that nothing of the first is still on its way to the disk when it greets on the second.

use std::collections::BTreeMap;

use super::exchange::Tag;
use super::queue::PartId;
use super::range::SectorRange;
use crate::LinkId;

/// What an order is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// A part of a request.
    Part(PartId),
    /// Owed content is written again.
    Replay(SectorRange),
    /// A flush, the guest's or one of the shadow's own.
    Flush,
    /// A block is read to recognise the disk.
    Sample(SectorRange),
}

/// An order in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flight {
    pub(super) work: Work,
    /// Bytes that it reads or writes.
    pub(super) bytes: u64,
    /// The device may have lost its cache since: done does not mean that it is there.
    pub(super) is_void: bool,
    serial: u64,
}

/// One life.
#[derive(Clone, Debug)]
pub(super) struct Life {
    pub(super) link: LinkId,
    /// Whether the disk has a volatile cache.
    pub(super) is_volatile: bool,
    flights: Vec<Option<Flight>>,
    free: Vec<u16>,
    /// When each order in flight was handed over, by its number, ns.
    handed: BTreeMap<u64, u64>,
    next_serial: u64,
    answered_ns: u64,
    /// It has done something of what was ordered: it works, and what fails alone fails by itself.
    pub(super) has_worked: bool,
}

impl Life {
    /// With room for `depth` orders in flight (at least 1).
    pub(super) fn new(link: LinkId, is_volatile: bool, depth: u16, now: u64) -> Self {
        let depth = depth.max(1);
        Self {
            link,
            is_volatile,
            flights: vec![None; usize::from(depth)],
            free: (0..depth).rev().collect(),
            handed: BTreeMap::new(),
            next_serial: 0,
            answered_ns: now,
            has_worked: false,
        }
    }

    /// Number of orders in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Whether one more order may be in flight; with `alone`, only if there is none.
    pub(super) fn has_room(&self, alone: bool) -> bool {
        let is_idle = self.in_flight() == 0;
        !self.free.is_empty() && (is_idle || !alone)
    }

    /// Puts an order in flight at `now` ns.
    pub(super) fn hand(&mut self, work: Work, bytes: u64, now: u64) -> Option<Tag> {
        let tag = Tag(self.free.pop()?);
        let serial = self.next_serial;
        self.next_serial += 1;
        self.flights[usize::from(tag.0)] = Some(Flight { work, bytes, is_void: false, serial });
        self.handed.insert(serial, now);
        Some(tag)
    }

    /// What `tag` names.
    pub(super) fn get(&self, tag: Tag) -> Option<&Flight> {
        self.flights.get(usize::from(tag.0))?.as_ref()
    }

    /// An order is answered at `now` ns.
    pub(super) fn take(&mut self, tag: Tag, now: u64) -> Option<Flight> {
        let flight = self.flights.get_mut(usize::from(tag.0))?.take()?;
        self.free.push(tag.0);
        self.answered_ns = now;
        self.handed.remove(&flight.serial);
        Some(flight)
    }

    /// All that is in flight, in the order in which it was handed over.
    pub(super) fn take_all(self) -> Vec<Flight> {
        let mut flights: Vec<_> = self.flights.into_iter().flatten().collect();
        flights.sort_unstable_by_key(|flight| flight.serial);
        flights
    }

    /// The device may have lost its cache: what is in flight proves nothing when it is done.
    pub(super) fn void_all(&mut self) {
        for flight in self.flights.iter_mut().flatten() {
            flight.is_void = true;
        }
    }

    /// When the life counts as stalled, if nothing is answered until then.
    pub(super) fn stalls_at(&self, limit: u64) -> Option<u64> {
        let (_, oldest) = self.handed.first_key_value()?;
        Some(self.answered_ns.max(*oldest).saturating_add(limit))
    }

    /// Time without an answer, ns.
    pub(super) fn silence(&self, now: u64) -> u64 {
        let oldest = self.handed.first_key_value().map_or(now, |(_, &handed)| handed);
        now.saturating_sub(self.answered_ns.max(oldest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Generation;

    #[test]
    fn tags_are_used_again_and_the_oldest_order_in_flight_is_known() {
        let mut life = Life::new(LinkId::first(Generation::FIRST), true, 2, 5);
        assert_eq!(life.stalls_at(10), None);
        let first = life.hand(Work::Flush, 0, 20).unwrap();
        let second = life.hand(Work::Flush, 0, 30).unwrap();
        assert_eq!((life.hand(Work::Flush, 0, 31), life.has_room(false)), (None, false));
        assert_eq!(life.stalls_at(10), Some(30));
        assert!(life.take(first, 32).is_some() && life.take(first, 33).is_none());
        assert!(life.take(Tag(7), 33).is_none());
        assert_eq!(life.stalls_at(10), Some(42));
        assert!(life.has_room(false) && !life.has_room(true));
        assert_eq!(life.hand(Work::Flush, 0, 40), Some(first));
        assert!(life.take(second, 41).is_some());
        assert_eq!(life.stalls_at(10), Some(51));
        assert_eq!(life.silence(60), 19);
    }
}
