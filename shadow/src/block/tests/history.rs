//! What a guest may expect of its disk: each sector is a register (I2), and what was acknowledged is at least as new as a given change.
//!
//! Values are unique to a change and to a sector of it, so that what is read names its writer. Times are a count of events.

use super::disk::{Value, ZERO, at};
use crate::block::range::SectorRange;

/// Changes of one case, and sectors of one change, for which values suffice.
const SECTORS_OF_A_CHANGE: u32 = 64;

/// A change, numbered in the order in which the guest asked for them.
pub(super) type Id = u32;

/// The change that made the disk.
const MADE: Id = 0;

/// The value of sector `n` of change `id`.
pub(super) fn value(id: Id, n: u64) -> Value {
    id * SECTORS_OF_A_CHANGE + u32::try_from(n).unwrap()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Write,
    Zeroes,
    Discard,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Pending,
    Acknowledged,
    Failed,
    /// The guest reset its device meanwhile: it may still happen, and may be seen from then on.
    Orphaned,
}

#[derive(Clone, Copy, Debug)]
struct Change {
    kind: Kind,
    range: SectorRange,
    begin: u64,
    end: u64,
    outcome: Outcome,
}

/// What happened to one sector.
#[derive(Clone, Debug, Default)]
struct Register {
    changes: Vec<Id>,
    /// Changes that a read returned, and when that read ended.
    seen: Vec<(Id, u64)>,
    /// Changes that failed and that the log has written over.
    undone: Vec<Id>,
}

/// All that the guest did.
#[derive(Clone, Debug)]
pub(super) struct History {
    changes: Vec<Change>,
    registers: Vec<Register>,
    now: u64,
}

impl History {
    pub(super) fn new(sectors: u64) -> Self {
        let range = SectorRange::new(0, sectors).unwrap();
        let made = Change { kind: Kind::Write, range, begin: 0, end: 0, outcome: Outcome::Acknowledged };
        let registers = vec![Register { changes: vec![MADE], ..Register::default() }; at(sectors)];
        Self { changes: vec![made], registers, now: 0 }
    }

    /// The next moment.
    pub(super) fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// The guest asks for a change.
    pub(super) fn begin(&mut self, kind: Kind, range: SectorRange) -> Id {
        let id = Id::try_from(self.changes.len()).unwrap();
        let begin = self.tick();
        self.changes.push(Change { kind, range, begin, end: u64::MAX, outcome: Outcome::Pending });
        for sector in range.start()..range.end() {
            self.registers[at(sector)].changes.push(id);
        }
        id
    }

    fn end(&mut self, id: Id, outcome: Outcome) {
        let end = self.tick();
        let change = &mut self.changes[id as usize];
        (change.end, change.outcome) = (end, outcome);
    }

    pub(super) fn acknowledged(&mut self, id: Id) {
        self.end(id, Outcome::Acknowledged);
    }

    pub(super) fn failed(&mut self, id: Id) {
        self.end(id, Outcome::Failed);
    }

    pub(super) fn orphaned(&mut self, id: Id) {
        self.end(id, Outcome::Orphaned);
    }

    /// Changes that the guest abandoned, and that are not known to have failed.
    pub(super) fn orphans(&self) -> Vec<Id> {
        let orphans = (MADE..).zip(&self.changes).filter(|(_, change)| change.outcome == Outcome::Orphaned);
        orphans.map(|(id, _)| id).collect()
    }

    /// An orphan may have failed: nobody hears of it.
    pub(super) fn orphan_failed(&mut self, id: Id) {
        self.changes[id as usize].outcome = Outcome::Failed;
    }

    pub(super) fn range(&self, id: Id) -> SectorRange {
        self.changes[id as usize].range
    }

    pub(super) fn begun(&self, id: Id) -> u64 {
        self.changes[id as usize].begin
    }

    fn change(&self, id: Id) -> &Change {
        &self.changes[id as usize]
    }

    /// Whether `sector` may hold `value` because of change `id`.
    fn explains(&self, id: Id, sector: u64, value: Value) -> bool {
        let change = self.change(id);
        match change.kind {
            _ if id == MADE => value == 0,
            Kind::Write => value == self::value(id, sector - change.range.start()),
            Kind::Zeroes => value == ZERO,
            Kind::Discard => true,
        }
    }

    /// A read that began at `begin` returns `value` for `sector` now.
    pub(super) fn read(&mut self, begin: u64, sector: u64, value: Value) -> Result<(), String> {
        let register = &self.registers[at(sector)];
        let changes = || register.changes.iter().map(|&id| (id, self.change(id)));
        let acknowledged = changes().filter(|(_, c)| c.outcome == Outcome::Acknowledged && c.end < begin);
        let superseded = acknowledged.map(|(_, c)| c.begin).max().unwrap_or(0);
        let seen = register.seen.iter().filter(|(id, end)| *end < begin && self.change(*id).outcome != Outcome::Failed);
        let newest_seen = seen.map(|(id, _)| *id).max().unwrap_or(MADE);
        let is_undone = |id: &Id| register.undone.contains(id);
        let mut allowed = changes().filter(|(id, c)| c.end >= superseded && *id >= newest_seen && !is_undone(id));
        let Some((id, _)) = allowed.find(|(id, _)| self.explains(*id, sector, value)) else {
            return Err(format!("sector {sector}: read {}", self.describe(sector, value)));
        };
        let end = self.now;
        self.registers[at(sector)].seen.push((id, end));
        Ok(())
    }

    /// The newest change of `sector` that was acknowledged before `before`.
    pub(super) fn newest_acknowledged(&self, sector: u64, before: u64) -> Id {
        let ids = self.registers[at(sector)].changes.iter().rev();
        let mut done = ids.filter(|id| {
            let change = self.change(**id);
            change.outcome == Outcome::Acknowledged && change.end < before
        });
        done.next().copied().unwrap_or(MADE)
    }

    /// The newest change of `sector` that the guest asked for.
    pub(super) fn newest(&self, sector: u64) -> Id {
        self.registers[at(sector)].changes.last().copied().unwrap_or(MADE)
    }

    /// Whether `value` in `sector` is change `id` or a newer one.
    pub(super) fn is_at_least(&self, id: Id, sector: u64, value: Value) -> bool {
        let ids = self.registers[at(sector)].changes.iter().rev().take_while(|newer| **newer >= id);
        ids.into_iter().any(|newer| self.explains(*newer, sector, value))
    }

    /// Whether `sector` may be unreadable although `id` was acknowledged: a newer change may have been cut off in the middle of it, or
    /// nobody cares since a discard.
    pub(super) fn may_be_torn(&self, id: Id, sector: u64) -> bool {
        self.change(id).kind == Kind::Discard || self.registers[at(sector)].changes.last() > Some(&id)
    }

    /// The change failed, and what the log has of `sector` is written again: no read may return it.
    pub(super) fn undone(&mut self, id: Id, sector: u64) {
        self.registers[at(sector)].undone.push(id);
    }

    /// Changes of sectors of `range`, and whether they are known to have failed.
    pub(super) fn changes_in(&self, range: SectorRange) -> impl Iterator<Item = (Id, bool)> {
        let ids = (range.start()..range.end()).flat_map(|sector| &self.registers[at(sector)].changes);
        ids.map(|&id| (id, self.change(id).outcome == Outcome::Failed))
    }

    fn describe(&self, sector: u64, value: Value) -> String {
        let changes: Vec<_> = self.registers[at(sector)].changes.iter().map(|id| (*id, self.change(*id))).collect();
        format!("{value} (change {}); changes: {changes:?}", value / SECTORS_OF_A_CHANGE)
    }
}
