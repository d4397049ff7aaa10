//! The log: for each sector, the last content that was written, unless it is known to be stable. A map, not a journal: its size is
//! bounded by the sectors that were written, and the order of its replay is free.
//!
//! ```text
//!              life lost, cache lost, failed write          handed
//!   Here(t) ─────────────────────────────────────> Owed ────────────> Rewriting
//!      ^                                            ^                  │  │
//!      │                                            └── life lost,─────┘  │ done
//!      │                                                failed once       │
//!      └──────────────────────────────────────────────────────────────────┘
//!   leaves the log: overwritten; Here(t) by a flush handed out later than t; Owed when it cannot be rewritten (it is *lost* then)
//! ```
//! Invariants: extents do not overlap; `owed` and `rewriting` hold the starts of those extents; none is Here while there is no life.
//! Every search costs O(log n), what is done to a range as much for each of its extents; only a flush and a death go through all.

use std::collections::{BTreeMap, BTreeSet};

use super::buffers::{BufferId, Buffers};
use super::epochs::Epoch;
use super::errors::{DEATHS, STRIKES, Tally};
use super::exchange::Slice;
use super::range::{SECTOR_BYTES, SectorRange};
use crate::Generation;

/// What a range of sectors holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// The bytes of a private copy, from a sector of it on.
    Data {
        /// The copy.
        buffer: BufferId,
        /// Sectors of the copy before the range.
        skip: u64,
    },
    /// Zeroes.
    Zeroes {
        /// Whether the device may deallocate.
        unmap: bool,
    },
    /// Anything.
    Discarded,
}

impl Content {
    /// Of the rest of the range from `sectors` sectors on.
    pub(super) fn after(self, sectors: u64) -> Self {
        match self {
            Self::Data { buffer, .. } if broken!(CutsKeepTheirStart) => Self::Data { buffer, skip: 0 },
            Self::Data { buffer, skip } => Self::Data { buffer, skip: skip + sectors },
            other => other,
        }
    }

    /// Whether both can be written by one order.
    fn joins(self, other: Self) -> bool {
        match (self, other) {
            (Self::Data { .. }, Self::Data { .. }) => true,
            _ => self == other,
        }
    }
}

/// Where the content is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    /// On the present device since this epoch, perhaps in a volatile cache.
    Here(Epoch),
    /// Perhaps nowhere: it has to be written again.
    Owed,
    /// Being written again.
    Rewriting,
}

#[derive(Clone, Copy, Debug)]
struct Extent {
    end: u64,
    content: Content,
    presence: Presence,
    /// Failures to write it again.
    strikes: Tally,
    /// Deaths in a row while it was written again.
    deaths: Tally,
}

impl Extent {
    fn is_clean(&self) -> bool {
        self.strikes.lives() == 0 && self.deaths.lives() == 0
    }
}

/// What one order writes again.
#[derive(Clone, Debug)]
pub(super) struct Run<P> {
    /// What goes there; for data, what its first extent holds.
    pub(super) content: Content,
    /// The data, if it is data.
    pub(super) slices: Vec<Slice<P>>,
}

/// Most sectors of an order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Longest {
    /// With data.
    pub(super) data: u64,
    /// Without data.
    pub(super) wide: u64,
}

/// The log.
#[derive(Clone, Debug)]
pub(super) struct Log<P> {
    map: BTreeMap<u64, Extent>,
    /// Where the Owed extents begin.
    owed: BTreeSet<u64>,
    /// Where the extents begin that are Rewriting.
    rewriting: BTreeSet<u64>,
    buffers: Buffers<P>,
    /// Sectors of copies that are not in the map: writes in flight, or waiting for their next issue.
    copied: u64,
}

impl<P> Default for Log<P> {
    fn default() -> Self {
        Self {
            map: BTreeMap::new(),
            owed: BTreeSet::new(),
            rewriting: BTreeSet::new(),
            buffers: Buffers::default(),
            copied: 0,
        }
    }
}

impl<P: Clone> Log<P> {
    /// Keeps the private copy of a write that is about to be handed over.
    pub(super) fn hold(&mut self, payload: P, sectors: u64) -> BufferId {
        self.copied += sectors;
        self.buffers.insert(payload, sectors)
    }

    /// Drops a copy that does not enter the log.
    pub(super) fn drop_copy(&mut self, copy: BufferId) {
        self.copied -= self.buffers.sectors_of(copy);
        self.buffers.release(copy);
    }

    /// A piece of a copy, for an order.
    pub(super) fn slice(&self, buffer: BufferId, skip: u64, sectors: u64) -> Option<Slice<P>> {
        self.buffers.get(buffer).map(|payload| Slice { payload: payload.clone(), skip, sectors })
    }

    /// `range` holds `content` now: what was there before is cut away. A held copy becomes the log's.
    pub(super) fn insert(&mut self, range: SectorRange, content: Content, presence: Presence) {
        if let Content::Data { buffer, .. } = content {
            self.copied -= self.buffers.sectors_of(buffer);
        }
        if broken!(TheOldContentStays) && self.overlaps(range) {
            return;
        }
        self.cut(range);
        let extent =
            Extent { end: range.end(), content, presence, strikes: Tally::default(), deaths: Tally::default() };
        self.note(range.start(), presence);
        self.map.insert(range.start(), extent);
    }

    /// Takes `range` out of the log.
    pub(super) fn cut(&mut self, range: SectorRange) {
        self.split_around(range);
        while let Some((&start, _)) = self.map.range(range.start()..range.end()).next() {
            self.remove(start);
        }
    }

    fn remove(&mut self, start: u64) {
        let Some(extent) = self.map.remove(&start) else { return };
        self.forget(start, extent.presence);
        if let Content::Data { buffer, .. } = extent.content {
            self.buffers.release(buffer);
        }
    }

    /// Makes `range` begin and end with an extent, where it has any.
    fn split_around(&mut self, range: SectorRange) {
        self.split_at(range.start());
        self.split_at(range.end());
    }

    fn split_at(&mut self, sector: u64) {
        let Some((&start, extent)) = self.map.range_mut(..sector).next_back().filter(|(_, e)| e.end > sector) else {
            return;
        };
        let rest = Extent { content: extent.content.after(sector - start), ..*extent };
        extent.end = sector;
        if broken!(CutsDropTheRest) {
            return;
        }
        if let Content::Data { buffer, .. } = rest.content {
            self.buffers.share(buffer);
        }
        self.note(sector, rest.presence);
        self.map.insert(sector, rest);
    }

    /// Counts an extent that is in the map from now on.
    fn note(&mut self, start: u64, presence: Presence) {
        match presence {
            Presence::Here(_) => {}
            Presence::Owed => _ = self.owed.insert(start),
            Presence::Rewriting => _ = self.rewriting.insert(start),
        }
    }

    fn forget(&mut self, start: u64, presence: Presence) {
        match presence {
            Presence::Here(_) => {}
            Presence::Owed => _ = self.owed.remove(&start),
            Presence::Rewriting => _ = self.rewriting.remove(&start),
        }
    }

    /// Changes the presence of all extents of `range`, which begins and ends with one.
    fn set(&mut self, range: SectorRange, presence: impl Fn(&mut Extent) -> Presence) {
        let starts: Vec<u64> = self.map.range(range.start()..range.end()).map(|(&start, _)| start).collect();
        for start in starts {
            let Some(extent) = self.map.get_mut(&start) else { continue };
            let before = extent.presence;
            let after = presence(extent);
            extent.presence = after;
            self.forget(start, before);
            self.note(start, after);
        }
    }

    /// Whether the log knows a sector of `range`.
    pub(super) fn overlaps(&self, range: SectorRange) -> bool {
        self.map.range(..range.end()).next_back().is_some_and(|(_, extent)| extent.end > range.start())
    }

    /// Whether a sector of `range` is owed, or being rewritten.
    pub(super) fn owes(&self, range: SectorRange) -> bool {
        // Extents do not overlap: only the last one that begins before the end of `range` can reach into it, if any does.
        [&self.owed, &self.rewriting].into_iter().any(|starts| {
            let last = starts.range(..range.end()).next_back();
            last.and_then(|start| self.map.get(start)).is_some_and(|extent| extent.end > range.start())
        })
    }

    /// Whether anything is owed, or being rewritten.
    pub(super) fn owes_any(&self) -> bool {
        !self.rewriting.is_empty() || !self.owed.is_empty()
    }

    /// A flush that was handed out in epoch `covers` has succeeded: what was there before is stable and leaves the log, to `freed`
    /// if it is data.
    pub(super) fn prune(&mut self, covers: Epoch, mut freed: impl FnMut(SectorRange, Slice<P>)) {
        let Self { map, buffers, .. } = self;
        map.retain(|&start, extent| {
            let stable = match extent.presence {
                Presence::Here(since) if broken!(PruneOneEpochMore) => since <= covers,
                Presence::Here(since) => since < covers,
                _ => false,
            };
            if stable
                && let Content::Data { buffer, skip } = extent.content
                && let Some(range) = SectorRange::between(start, extent.end)
            {
                if let Some(payload) = buffers.get(buffer) {
                    freed(range, Slice { payload: payload.clone(), skip, sectors: range.count() });
                }
                buffers.release(buffer);
            }
            !stable
        });
    }

    /// The content of `range` may be gone or half overwritten: what the log has of it is to be written again.
    pub(super) fn owe(&mut self, range: SectorRange) {
        self.split_around(range);
        self.set(range, |extent| match extent.presence {
            Presence::Here(_) => Presence::Owed,
            other => other,
        });
    }

    /// The device may have lost its cache, and lives on: everything is to be written again.
    pub(super) fn owe_all(&mut self) {
        if let Some(all) = self.span() {
            self.owe(all);
        }
    }

    /// The life is lost; `counts` if it has worked. What was being rewritten at too many deaths in a row leaves the log and is returned.
    pub(super) fn lose_life(&mut self, counts: Option<Generation>) -> Vec<(SectorRange, Content)> {
        let Some(all) = self.span() else { return Vec::new() };
        self.set(all, |extent| {
            match counts {
                _ if extent.presence != Presence::Rewriting => extent.deaths = Tally::default(),
                Some(life) => extent.deaths.add(life),
                None => {}
            }
            match extent.presence {
                Presence::Here(since) if broken!(HereOutlivesTheDevice) => Presence::Here(since),
                _ => Presence::Owed,
            }
        });
        self.take_those(all, |extent| extent.deaths.lives() >= DEATHS)
    }

    /// `range` was rewritten in `epoch`; with `stable`, it cannot be lost any more and leaves the log.
    pub(super) fn rewritten(&mut self, range: SectorRange, epoch: Epoch, stable: bool) {
        if stable {
            return self.cut(range);
        }
        self.set(range, |extent| {
            (extent.strikes, extent.deaths) = (Tally::default(), Tally::default());
            Presence::Here(epoch)
        });
    }

    /// `range` could not be rewritten, or its rewriting proves nothing: it is owed as before. `strike` notes a failure against it; what has
    /// failed for the second time leaves the log and is returned.
    pub(super) fn rewrite_failed(
        &mut self,
        range: SectorRange,
        strike: impl Fn(&mut Tally),
    ) -> Vec<(SectorRange, Content)> {
        self.set(range, |extent| {
            strike(&mut extent.strikes);
            Presence::Owed
        });
        self.take_those(range, |extent| {
            extent.strikes.lives() >= STRIKES || (extent.strikes.lives() > 0 && broken!(OneFailureLoses))
        })
    }

    fn take_those(&mut self, range: SectorRange, which: impl Fn(&Extent) -> bool) -> Vec<(SectorRange, Content)> {
        let extents = self.map.range(range.start()..range.end()).filter(|(_, extent)| which(extent));
        let taken =
            extents.filter_map(|(&start, extent)| Some((SectorRange::between(start, extent.end)?, extent.content)));
        let taken: Vec<_> = taken.collect();
        for (range, _) in &taken {
            self.remove(range.start());
        }
        taken
    }

    /// What the log has at `sector`, where an extent begins.
    pub(super) fn content_at(&self, sector: u64) -> Option<Content> {
        self.map.get(&sector).map(|extent| extent.content)
    }

    /// The next range to rewrite from sector `from` on, in order, beginning again at the start: one extent, and those that can be
    /// joined to it unless it goes `alone`. What failed before, or was in flight at a death, always goes alone.
    pub(super) fn next_owed(&self, from: u64, alone: bool, longest: Longest) -> Option<SectorRange> {
        let start = *self.owed.range(from..).next().or_else(|| self.owed.first())?;
        let first = self.map.get(&start)?;
        let most = match first.content {
            Content::Data { .. } => longest.data,
            Content::Zeroes { .. } | Content::Discarded => longest.wide,
        };
        let mut end = first.end;
        if !alone && first.is_clean() {
            for (&at, extent) in self.map.range(end..) {
                let joins = at == end && extent.presence == Presence::Owed && extent.is_clean();
                if !joins || !extent.content.joins(first.content) || extent.end - start > most {
                    break;
                }
                end = extent.end;
            }
        }
        SectorRange::between(start, end)
    }

    /// Takes a range of [`Self::next_owed`] for rewriting.
    pub(super) fn rewrite(&mut self, range: SectorRange) -> Option<Run<P>> {
        let content = self.map.get(&range.start())?.content;
        let data = self.map.range(range.start()..range.end()).filter_map(|(&start, extent)| match extent.content {
            Content::Data { buffer, skip } => self.slice(buffer, skip, extent.end - start),
            Content::Zeroes { .. } | Content::Discarded => None,
        });
        let slices = data.collect();
        self.set(range, |_| Presence::Rewriting);
        Some(Run { content, slices })
    }

    /// From the first to the last extent.
    fn span(&self) -> Option<SectorRange> {
        let (&start, _) = self.map.first_key_value()?;
        SectorRange::between(start, self.map.last_key_value()?.1.end)
    }

    /// Number of extents.
    pub(super) fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether everything that was acknowledged is stable.
    pub(super) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Bytes of memory of all copies, those in flight included.
    pub(super) fn kept_bytes(&self) -> u64 {
        self.buffers.sectors() * SECTOR_BYTES
    }

    /// Bytes of memory of the copies in the log.
    pub(super) fn logged_bytes(&self) -> u64 {
        (self.buffers.sectors() - self.copied) * SECTOR_BYTES
    }

    /// Sectors to be written again.
    pub(super) fn owed_sectors(&self) -> u64 {
        let owed = self.map.iter().filter(|(_, extent)| !matches!(extent.presence, Presence::Here(_)));
        owed.map(|(start, extent)| extent.end - start).sum()
    }

    /// Each extent with its content.
    #[cfg(test)]
    pub(super) fn extents(&self) -> impl Iterator<Item = (SectorRange, Content)> {
        let range = |start, end| SectorRange::between(start, end).expect("no extent is empty");
        self.map.iter().map(move |(&start, extent)| (range(start, extent.end), extent.content))
    }
}
