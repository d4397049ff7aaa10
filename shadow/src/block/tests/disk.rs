//! A disk to compare with: a medium, a volatile cache over it, and orders under way. As bad as a disk may be: it writes its cache back
//! in any order and in single sectors; a flush makes stable only what was answered before it came; a failed flush may lose what it
//! should have written, while reads still show it; what is under way at a crash is done in part, and may leave sectors unreadable; a
//! reset loses each sector of the cache with a probability.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::random::Random;
use crate::block::range::SectorRange;
use crate::block::{Answer, Command, Data, ErrorClass, Fingerprint, Order, Payload, Tag};

/// What a sector holds: which write, and which of its sectors. See [`super::history`].
pub(super) type Value = u32;
/// What a sector holds after write-zeroes.
pub(super) const ZERO: Value = Value::MAX;

impl Payload for Arc<[Value]> {
    fn fingerprint(&self, skip: u64, sectors: u64) -> Fingerprint {
        fingerprint(&self[at(skip)..at(skip + sectors)])
    }
}

pub(super) fn fingerprint(values: &[Value]) -> Fingerprint {
    Fingerprint(values.iter().fold(7, |hash, value| (hash ^ u64::from(*value)).wrapping_mul(0x0000_0100_0000_01b3)))
}

pub(super) fn at(sector: u64) -> usize {
    usize::try_from(sector).unwrap()
}

/// A version of a sector in the cache.
#[derive(Clone, Copy, Debug)]
struct Cached {
    value: Value,
    /// The order that wrote it, and when that was answered.
    order: u64,
    answered: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct Sector {
    stable: Value,
    /// Oldest first.
    cache: Vec<Cached>,
    /// What reads show although a failed flush has lost it.
    ghost: Option<Value>,
    /// A write was cut off in the middle of it.
    torn: bool,
}

impl Sector {
    fn value(&self) -> Value {
        self.cache.last().map(|cached| cached.value).or(self.ghost).unwrap_or(self.stable)
    }

    fn is_unreadable(&self) -> bool {
        self.torn && self.cache.is_empty() && self.ghost.is_none()
    }

    /// The first `count` versions of the cache reach the medium.
    fn write_back(&mut self, count: usize) {
        if let Some(last) = self.cache.drain(..count).next_back() {
            self.stable = last.value;
            self.torn = false;
        }
    }
}

/// What an order does, with the values already fetched.
#[derive(Clone, Debug)]
pub(super) enum Deed {
    Read(SectorRange),
    Write(SectorRange, Vec<Value>),
    Zeroes(SectorRange),
    Discard(SectorRange),
    Flush,
    Sample(SectorRange),
}

impl Deed {
    pub(super) fn range(&self) -> Option<SectorRange> {
        match self {
            Self::Read(range)
            | Self::Write(range, _)
            | Self::Zeroes(range)
            | Self::Discard(range)
            | Self::Sample(range) => Some(*range),
            Self::Flush => None,
        }
    }

    pub(super) fn changes(&self) -> bool {
        matches!(self, Self::Write(..) | Self::Zeroes(_) | Self::Discard(_))
    }

    /// What becomes of sector `n` of its range, if it changes anything.
    fn value(&self, n: usize, random: &mut Random) -> Option<Value> {
        match self {
            Self::Write(_, values) => Some(values[n]),
            Self::Zeroes(_) => Some(ZERO),
            Self::Discard(_) => random.percent(50).then_some(ZERO),
            Self::Read(_) | Self::Flush | Self::Sample(_) => None,
        }
    }
}

/// An order under way.
#[derive(Clone, Debug)]
pub(super) struct UnderWay {
    pub(super) tag: Tag,
    pub(super) deed: Deed,
    number: u64,
    came: u64,
}

/// An answer that the host has not read yet.
#[derive(Clone, Debug)]
pub(super) struct Posted {
    pub(super) tag: Tag,
    pub(super) deed: Deed,
    pub(super) answer: Answer,
    /// What was read.
    pub(super) values: Vec<Value>,
}

/// What goes wrong by itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Faults {
    /// Sectors that can be neither read nor written, and the driver says so.
    pub(super) bad: BTreeSet<u64>,
    /// Sectors for which the driver has no better word than `EIO`.
    pub(super) flaky: BTreeSet<u64>,
    /// Sectors that kill the driver when they are written.
    pub(super) deadly: BTreeSet<u64>,
    /// Of a hundred orders, so many fail with `EIO` once.
    pub(super) eio_percent: u64,
    /// Of a hundred changes, so many fail once because a sector cannot be written.
    pub(super) medium_percent: u64,
    /// Of a hundred flushes, so many fail.
    pub(super) flush_percent: u64,
    /// Of a hundred discards, so many fail.
    pub(super) discard_percent: u64,
}

impl Faults {
    fn hits(set: &BTreeSet<u64>, range: SectorRange) -> bool {
        set.range(range.start()..range.end()).next().is_some()
    }
}

/// The disk.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    sectors: Vec<Sector>,
    has_cache: bool,
    pub(super) faults: Faults,
    pub(super) under_way: Vec<UnderWay>,
    pub(super) posted: Vec<Posted>,
    /// Nothing is answered any more.
    pub(super) is_stuck: bool,
    time: u64,
}

impl Disk {
    pub(super) fn new(sectors: u64, has_cache: bool) -> Self {
        Self {
            sectors: vec![Sector::default(); at(sectors)],
            has_cache,
            faults: Faults::default(),
            under_way: Vec::new(),
            posted: Vec::new(),
            is_stuck: false,
            time: 1,
        }
    }

    /// A session ends, and the driver VM lives on: it carries out what it was given, tells nobody, and flushes.
    pub(super) fn end_session(&mut self, random: &mut Random) {
        self.is_stuck = false;
        while !self.under_way.is_empty() {
            self.finish(0, random);
        }
        self.posted.clear();
        self.sectors.iter_mut().for_each(|sector| sector.write_back(sector.cache.len()));
    }

    /// Takes an order. `fetch` reads the guest's buffers.
    pub(super) fn take(&mut self, order: Order<Arc<[Value]>>, fetch: impl Fn(crate::block::GuestSpan) -> Vec<Value>) {
        let deed = match order.command {
            Command::Read { at, .. } => Deed::Read(at),
            Command::Write { at: range, data } => {
                let values: Vec<Value> = match data {
                    Data::Private(slices) => slices
                        .iter()
                        .flat_map(|slice| slice.payload[at(slice.skip)..at(slice.skip + slice.sectors)].to_vec())
                        .collect(),
                    Data::Guest(span) => fetch(span),
                };
                assert_eq!(values.len() as u64, range.count(), "data do not fit the range");
                Deed::Write(range, values)
            }
            Command::WriteZeroes { at, .. } => Deed::Zeroes(at),
            Command::Discard { at } => Deed::Discard(at),
            Command::Flush => Deed::Flush,
            Command::Sample { at } => Deed::Sample(at),
        };
        self.time += 1;
        self.under_way.push(UnderWay { tag: order.tag, deed, number: self.time, came: self.time });
    }

    fn put(&mut self, sector: u64, value: Value, order: u64) {
        let has_cache = self.has_cache;
        let sector = &mut self.sectors[at(sector)];
        if has_cache {
            sector.cache.push(Cached { value, order, answered: None });
        } else {
            (sector.stable, sector.torn) = (value, false);
        }
        sector.ghost = None;
    }

    /// An order under way is done in part: some of its sectors.
    fn do_some(&mut self, order: &UnderWay, random: &mut Random) {
        let Some(range) = order.deed.range().filter(|_| order.deed.changes()) else { return };
        for (n, sector) in (range.start()..range.end()).enumerate() {
            if random.percent(50)
                && let Some(value) = order.deed.value(n, random)
            {
                self.put(sector, value, order.number);
            }
        }
    }

    /// An order under way goes ahead, and is not at its end.
    pub(super) fn advance(&mut self, index: usize, random: &mut Random) {
        let order = self.under_way[index].clone();
        self.do_some(&order, random);
    }

    fn failure_of(&self, deed: &Deed, random: &mut Random) -> Option<ErrorClass> {
        let faults = &self.faults;
        if let Some(range) = deed.range() {
            let is_torn = |sector| self.sectors[at(sector)].is_unreadable();
            let is_read = !deed.changes();
            if Faults::hits(&faults.bad, range) || (is_read && (range.start()..range.end()).any(is_torn)) {
                return Some(ErrorClass::Medium);
            }
            if Faults::hits(&faults.flaky, range) {
                return Some(ErrorClass::Suspect);
            }
        }
        if deed.changes() && random.percent(faults.medium_percent) {
            return Some(ErrorClass::Medium);
        }
        let percent = match deed {
            Deed::Flush => faults.flush_percent,
            Deed::Discard(_) => faults.discard_percent.max(faults.eio_percent),
            _ => faults.eio_percent,
        };
        let classes = match deed {
            Deed::Discard(_) if faults.eio_percent == 0 => [ErrorClass::Unsupported; 2],
            Deed::Flush => [ErrorClass::Suspect, ErrorClass::Medium],
            _ => [ErrorClass::Suspect; 2],
        };
        random.percent(percent).then(|| random.pick(&classes))
    }

    /// Whether the driver dies of it.
    pub(super) fn is_deadly(&self, index: usize) -> bool {
        let deed = &self.under_way[index].deed;
        deed.changes() && deed.range().is_some_and(|range| Faults::hits(&self.faults.deadly, range))
    }

    /// An order comes to its end, good or bad, and its answer is on its way.
    pub(super) fn finish(&mut self, index: usize, random: &mut Random) {
        let order = self.under_way.swap_remove(index);
        self.time += 1;
        let failure = self.failure_of(&order.deed, random);
        if failure.is_some() {
            self.fail(&order, random);
        } else {
            self.complete(&order, random);
        }
        let range = order.deed.range();
        let reads = matches!(order.deed, Deed::Read(_) | Deed::Sample(_)) && failure.is_none();
        let values = range.filter(|_| reads).map(|range| self.values(range)).unwrap_or_default();
        let bytes = match order.deed {
            Deed::Read(range) | Deed::Write(range, _) | Deed::Sample(range) => range.bytes(),
            Deed::Zeroes(_) | Deed::Discard(_) | Deed::Flush => 0,
        };
        let answer = failure.map_or(Answer::Done { bytes }, Answer::Failed);
        self.posted.push(Posted { tag: order.tag, deed: order.deed, answer, values });
    }

    /// Another guest, which has another part of the disk, flushes; whether that fails.
    pub(super) fn flush_by_another(&mut self, random: &mut Random) -> bool {
        self.time += 1;
        let fails = random.percent(50);
        if fails {
            self.fail_to_flush(random)
        } else {
            self.flush(self.time, random)
        }
        fails
    }

    /// What was answered before `came` becomes stable, and perhaps more.
    fn flush(&mut self, came: u64, random: &mut Random) {
        for sector in &mut self.sectors {
            let covered = sector.cache.iter().rposition(|c| c.answered.is_some_and(|when| when < came));
            let least = covered.map_or(0, |last| last + 1);
            let extra = random.index(sector.cache.len() - least + 1);
            sector.write_back(least + extra);
        }
    }

    fn fail_to_flush(&mut self, random: &mut Random) {
        for sector in self.sectors.iter_mut().filter(|sector| !sector.cache.is_empty()) {
            if random.percent(60) {
                sector.ghost = Some(sector.value());
                sector.cache.clear();
            }
        }
    }

    fn complete(&mut self, order: &UnderWay, random: &mut Random) {
        if let Deed::Flush = order.deed {
            return self.flush(order.came, random);
        }
        let Some(range) = order.deed.range().filter(|_| order.deed.changes()) else { return };
        for (n, sector) in (range.start()..range.end()).enumerate() {
            if let Some(value) = order.deed.value(n, random) {
                self.put(sector, value, order.number);
            } else {
                // A discard that changes nothing: the sector can be read at least.
                self.sectors[at(sector)].torn = false;
            }
            for cached in &mut self.sectors[at(sector)].cache {
                if cached.order == order.number {
                    cached.answered = Some(self.time);
                }
            }
        }
    }

    fn fail(&mut self, order: &UnderWay, random: &mut Random) {
        if let Deed::Flush = order.deed {
            self.fail_to_flush(random);
        } else {
            self.do_some(order, random);
        }
    }

    /// A sector of the cache reaches the medium by itself.
    pub(super) fn write_back(&mut self, random: &mut Random) {
        let index = random.index(self.sectors.len());
        let sector = &mut self.sectors[index];
        let count = random.index(sector.cache.len() + 1);
        sector.write_back(count);
    }

    /// The driver VM dies and the device is reset: what is under way is done in part, and each sector of the cache is lost with this
    /// probability. The next life does not hear of it.
    pub(super) fn reset(&mut self, percent: u64, random: &mut Random) {
        for order in std::mem::take(&mut self.under_way) {
            self.do_some(&order, random);
            if self.has_cache
                && let Deed::Write(range, _) = order.deed
                && random.percent(40)
            {
                let sector = &mut self.sectors[at(range.start() + random.below(range.count()))];
                if sector.cache.is_empty() && sector.ghost.is_none() {
                    sector.torn = true;
                }
            }
        }
        self.posted.clear();
        self.is_stuck = false;
        self.lose_cache(percent, random);
    }

    /// The device is reset by its own driver, which issues again what it was about.
    pub(super) fn lose_cache(&mut self, percent: u64, random: &mut Random) {
        for sector in &mut self.sectors {
            if random.percent(percent) {
                sector.cache.clear();
                sector.ghost = None;
            }
        }
    }

    /// The next life uses the cache, or does without: then there is nothing in it.
    pub(super) fn use_cache(&mut self, has_cache: bool, random: &mut Random) {
        if !has_cache {
            self.lose_cache(100, random);
        }
        self.has_cache = has_cache;
    }

    fn values(&self, range: SectorRange) -> Vec<Value> {
        (range.start()..range.end()).map(|sector| self.sectors[at(sector)].value()).collect()
    }

    /// What the medium holds whatever happens to the cache; none if it is unreadable.
    pub(super) fn stable(&self, sector: u64) -> Option<Value> {
        let sector = &self.sectors[at(sector)];
        (!sector.torn).then_some(sector.stable)
    }
}
