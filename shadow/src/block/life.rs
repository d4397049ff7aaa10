//! One life of the disk, as the shadow sees it: a connection with a driver VM, and what is in flight on it.
//!
//! A second connection with the same driver VM is a life of its own: what was in flight on the first has an unknown fate. The driver
//! VM's end answers for its part that nothing of the first is still on its way to the disk when it greets on the second.

use std::collections::BTreeMap;

use super::bounds::Limits;
use super::errors::Violation;
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
    /// It may take long, on a disk that is in order.
    is_slow: bool,
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
    /// When the driver VM said last that a slow order is under way, ns.
    at_work_ns: u64,
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
            at_work_ns: now,
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

    /// Puts an order in flight at `now` ns, which `is_slow` or not.
    pub(super) fn hand(&mut self, work: Work, bytes: u64, is_slow: bool, now: u64) -> Option<Tag> {
        let tag = Tag(self.free.pop()?);
        let serial = self.next_serial;
        self.next_serial += 1;
        self.flights[usize::from(tag.0)] = Some(Flight { work, bytes, is_void: false, is_slow, serial });
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

    /// The driver VM says at `now` ns that `tag` is under way.
    pub(super) fn at_work(&mut self, tag: Tag, now: u64) -> Result<(), Violation> {
        match self.get(tag) {
            Some(flight) if flight.is_slow => self.at_work_ns = now,
            Some(_) => return Err(Violation::WrongKind(tag.0)),
            None => return Err(Violation::UnknownTag(tag.0)),
        }
        Ok(())
    }

    /// When the life counts as stalled, if nothing is answered until then, nor said to be under way.
    pub(super) fn stalls_at(&self, limits: &Limits) -> Option<u64> {
        let (_, oldest) = self.handed.first_key_value()?;
        let silent_since = self.answered_ns.max(*oldest);
        let at = silent_since.max(self.at_work_ns).saturating_add(limits.stall_ns);
        Some(at.min(silent_since.saturating_add(limits.slow_ns)))
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
        let limits = Limits { stall_ns: 10, slow_ns: 25, ..Limits::default() };
        let mut life = Life::new(LinkId::first(Generation::FIRST), true, 2, 5);
        assert_eq!(life.stalls_at(&limits), None);
        let first = life.hand(Work::Flush, 0, true, 20).unwrap();
        let second = life.hand(Work::Flush, 0, true, 30).unwrap();
        assert_eq!((life.hand(Work::Flush, 0, true, 31), life.has_room(false)), (None, false));
        assert_eq!(life.stalls_at(&limits), Some(30));
        assert!(life.take(first, 32).is_some() && life.take(first, 33).is_none());
        assert!(life.take(Tag(7), 33).is_none());
        assert_eq!(life.stalls_at(&limits), Some(42));
        assert!(life.has_room(false) && !life.has_room(true));
        assert_eq!(life.hand(Work::Flush, 0, true, 40), Some(first));
        assert!(life.take(second, 41).is_some());
        assert_eq!(life.stalls_at(&limits), Some(51));
        assert_eq!(life.silence(60), 19);
    }
    #[test]
    fn a_slow_order_that_is_said_to_be_under_way_has_more_time_and_not_all() {
        let limits = Limits { stall_ns: 10, slow_ns: 25, ..Limits::default() };
        let mut life = Life::new(LinkId::first(Generation::FIRST), true, 4, 0);
        let flush = life.hand(Work::Flush, 0, true, 20).unwrap();
        let sample = SectorRange::new(0, 8).unwrap();
        let read = life.hand(Work::Sample(sample), 4096, false, 21).unwrap();
        assert_eq!(life.at_work(read, 22), Err(Violation::WrongKind(read.0)));
        assert_eq!(life.at_work(Tag(3), 22), Err(Violation::UnknownTag(3)));
        assert_eq!(life.stalls_at(&limits), Some(30));
        assert_eq!((life.at_work(flush, 28), life.stalls_at(&limits)), (Ok(()), Some(38)));
        assert_eq!((life.at_work(flush, 37), life.stalls_at(&limits)), (Ok(()), Some(45)));
        assert!(life.take(read, 40).is_some());
        assert_eq!(life.stalls_at(&limits), Some(50));
        assert!(life.take(flush, 41).is_some());
        assert!(life.hand(Work::Sample(sample), 4096, false, 50).is_some());
        assert_eq!(life.stalls_at(&limits), Some(60), "what was said of another order does not count");
    }
}
