//! What is right: the invariants, and which failure has a reason.

use std::collections::BTreeSet;

use super::{Reason, Request, Rig, Wish, in_guest};
use crate::block::extents::Content;
use crate::block::range::SectorRange;
use crate::block::tests::disk::{Deed, ZERO, at};
use crate::block::tests::history::Id;
use crate::block::tests::plan::{SECTORS, START};
use crate::block::{ErrorClass, ModeName};

/// What a case can come to; see [`Rig::reached`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::block::tests) enum Reached {
    Stall,
    Rest,
    Recognised,
    Quarantine,
    Poison,
    VoidAnswer,
    DeathInReplay,
    KeptInFlight,
    Rewritten,
    OwnFlush,
    FailedFlush,
    MaskedError,
    FailedRequest,
    Lost,
    Orphan,
    OtherGuest,
    EndOfGuest,
    AnotherDisk,
}

impl Rig {
    /// What this case has come to.
    pub(in crate::block::tests) fn reached(&self) -> BTreeSet<Reached> {
        let counts = self.shadow.counts();
        let counted = [
            (counts.kept_in_flight, Reached::KeptInFlight),
            (counts.rewritten_sectors, Reached::Rewritten),
            (counts.own_flushes, Reached::OwnFlush),
            (counts.failed_flushes, Reached::FailedFlush),
            (counts.masked_errors, Reached::MaskedError),
            (counts.failed_requests, Reached::FailedRequest),
            (counts.lost_sectors, Reached::Lost),
            (counts.orphans, Reached::Orphan),
        ];
        let counted = counted.into_iter().filter(|(count, _)| *count > 0).map(|(_, reached)| reached);
        self.reached.iter().copied().chain(counted).collect()
    }

    /// What a disk must not be asked: anything outside the guest's part, or two things at once of which one changes the other.
    pub(super) fn check_order(&self) -> Result<(), String> {
        let Some((new, before)) = self.disk.under_way.split_last() else { return Ok(()) };
        let Some(range) = new.deed.range() else { return Ok(()) };
        if range.start() < START || range.end() > START + SECTORS {
            return Err(format!("{range} is not the guest's"));
        }
        let posted = self.disk.posted.iter().map(|posted| &posted.deed);
        let mut others = before.iter().map(|order| &order.deed).chain(posted);
        let conflict = others
            .find(|other| other.range().is_some_and(|r| r.overlaps(range)) && (other.changes() || new.deed.changes()));
        match conflict.filter(|_| self.plan.is_strict) {
            Some(other) => Err(format!("{:?} and {other:?} in flight together", new.deed)),
            None => Ok(()),
        }
    }

    pub(super) fn note_error(&mut self, time: u64, deed: &Deed, class: ErrorClass) {
        let Some(life) = self.link.map(|link| link.generation) else { return };
        let reason = if class.is_suspect() { Reason::Suspect(life) } else { Reason::Medium };
        let range = deed.range().map(in_guest);
        let is_excuse = match (reason, range) {
            (Reason::Medium, Some(range)) => self.plan.has_medium_errors() || self.may_have_failed(range),
            _ => true,
        };
        if is_excuse {
            self.reasons.push((time, range, reason));
        }
        self.review_orphans();
    }

    /// What went wrong with requests of `range`, or with flushes, since `begin`.
    pub(super) fn reasons_for(&self, range: Option<SectorRange>, begin: u64) -> Vec<Reason> {
        let is_its_own = |r: &Option<SectorRange>| match (range, r) {
            (Some(range), Some(r)) => r.overlaps(range),
            (_, None) => self.plan.is_stable_first() || range.is_none(),
            (None, Some(_)) => false,
        };
        let mine = self.reasons.iter().filter(|(time, r, _)| *time >= begin && is_its_own(r));
        mine.map(|(_, _, reason)| *reason).collect()
    }

    /// Whether that is enough for a failure: an error of the disk, two lives with suspect ones, three deaths. Any error of a flush is
    /// suspect.
    pub(super) fn is_enough(range: Option<SectorRange>, reasons: &[Reason]) -> bool {
        let medium = reasons.iter().filter(|reason| **reason == Reason::Medium).count();
        let errors = if range.is_none() { medium } else { 0 } + Self::suspects(reasons);
        (range.is_some() && medium > 0) || errors >= 2 || Self::deaths(reasons) >= 3
    }

    /// Whether these are enough, or are an error in a range that is known to be bad.
    fn is_reason(&self, range: Option<SectorRange>, reasons: &[Reason]) -> bool {
        let is_known = range.is_some() && Self::suspects(&self.reasons_for(range, 0)) >= 2;
        Self::is_enough(range, reasons) || (is_known && Self::suspects(reasons) > 0)
    }

    /// Lives with a suspect error among these.
    fn suspects(reasons: &[Reason]) -> usize {
        let lives =
            reasons.iter().filter_map(|reason| if let Reason::Suspect(life) = reason { Some(life) } else { None });
        lives.map(|life| life.get()).collect::<BTreeSet<_>>().len()
    }

    /// Lives whose death is among these.
    fn deaths(reasons: &[Reason]) -> usize {
        let lives =
            reasons.iter().filter_map(|reason| if let Reason::Death(life) = reason { Some(life) } else { None });
        lives.map(|life| life.get()).collect::<BTreeSet<_>>().len()
    }

    /// Whether a change of `range` has failed, or a part of it: it may have left a sector that cannot be read.
    pub(super) fn may_have_failed(&self, range: SectorRange) -> bool {
        self.history.changes_in(range).any(|(id, has_failed)| has_failed || self.has_reason(id))
    }

    pub(super) fn has_reason(&self, id: Id) -> bool {
        let range = Some(self.history.range(id));
        self.is_reason(range, &self.reasons_for(range, self.history.begun(id)))
    }

    /// Orphans fail as others do, and nobody hears of it.
    pub(super) fn review_orphans(&mut self) {
        for id in self.history.orphans() {
            if self.has_reason(id) {
                self.history.orphan_failed(id);
            }
        }
    }

    pub(super) fn succeeded(&mut self, request: Request) -> Result<(), String> {
        match request.wish {
            Wish::Read { range, values } => {
                for (sector, value) in (range.start()..range.end()).zip(values) {
                    let value = value.ok_or_else(|| format!("sector {sector} of a read was not filled"))?;
                    self.history.read(request.begin, sector, value)?;
                }
            }
            Wish::Change(id) => {
                self.history.acknowledged(id);
                let range = self.history.range(id);
                if self.shadow.lost.overlaps(range) {
                    return Err(format!("change {id} is acknowledged and lost"));
                }
                if self.plan.is_stable_first() {
                    (range.start()..range.end()).try_for_each(|sector| self.must_be_stable(sector, id))?;
                }
            }
            Wish::Flush => self.check_stable(request.begin)?,
        }
        Ok(())
    }

    /// A request failed: there must be a reason.
    pub(super) fn failed(&mut self, request: &Request) -> Result<(), String> {
        let (range, begin) = match &request.wish {
            Wish::Read { range, .. } => (Some(*range), request.begin),
            Wish::Change(id) => (Some(self.history.range(*id)), self.history.begun(*id)),
            Wish::Flush => (None, request.begin),
        };
        let mine = self.reasons_for(range, begin);
        let is_lost = match (&request.wish, range) {
            (Wish::Read { .. }, Some(range)) => self.lost.overlaps(range),
            _ => !self.lost.is_empty(),
        };
        let is_known = self.is_reason(range, &mine) || is_lost;
        self.reached.extend((Self::deaths(&mine) == 3 && mine.len() == 3).then_some(Reached::Poison));
        if let Wish::Change(id) = request.wish {
            self.history.failed(id);
            self.undo_where_logged(id);
        }
        if (is_known && !self.plan.is_calm) || self.shadow.mode() == ModeName::Quarantined {
            return Ok(());
        }
        Err(format!("a request failed without reason: {request:?}, {mine:?}"))
    }

    /// A change has failed: what the log has of older changes in its sectors is written again.
    pub(super) fn undo_where_logged(&mut self, id: Id) {
        let range = self.history.range(id);
        for (sector, content) in (0..).zip(self.logged()) {
            if range.overlaps(one(sector))
                && let Some(Content::Data { buffer, skip }) = content
                && let Some(slice) = self.shadow.log.slice(buffer, skip, 1)
                && !self.history.is_at_least(id, sector, slice.payload[at(slice.skip)])
            {
                self.history.undone(id, sector);
                self.note(|| format!("undone {id} {sector}"));
            }
        }
    }

    /// What the log has of each sector.
    pub(super) fn logged(&self) -> Vec<Option<Content>> {
        let mut logged = vec![None; at(SECTORS)];
        for (range, content) in self.shadow.log.extents() {
            for sector in range.start()..range.end() {
                logged[at(sector)] = Some(content.after(sector - range.start()));
            }
        }
        logged
    }

    /// Whether the guest knows that `sector` has lost change `id`.
    fn is_lost(&self, sector: u64, id: Id) -> bool {
        self.lost_until[at(sector)].is_some_and(|until| id <= until)
    }

    /// What the shadow reports as lost, and did not before, must have failed twice, or have been in flight at three deaths.
    pub(super) fn check_lost(&mut self) -> Result<(), String> {
        for range in self.shadow.lost_ranges().collect::<Vec<_>>() {
            for sector in range.start()..range.end() {
                if self.lost_before.overlaps(one(sector)) {
                    continue;
                }
                self.lost_until[at(sector)] = Some(self.history.newest(sector));
                let reasons = self.reasons_for(Some(one(sector)), 0);
                let medium = reasons.iter().filter(|reason| **reason == Reason::Medium).count();
                let errors = medium + Self::suspects(&reasons);
                if self.plan.is_calm || (Self::deaths(&reasons) < 3 && errors < 2) {
                    return Err(format!("sector {sector} is lost without reason: {reasons:?}"));
                }
                self.lost.insert(one(sector));
            }
        }
        self.lost_before = self.shadow.lost.clone();
        Ok(())
    }

    /// I3: what was acknowledged before `before` is on the medium; and stays there.
    pub(super) fn check_stable(&mut self, before: u64) -> Result<(), String> {
        (0..SECTORS).try_for_each(|sector| {
            let id = self.history.newest_acknowledged(sector, before);
            self.must_be_stable(sector, id)
        })
    }

    pub(super) fn must_be_stable(&mut self, sector: u64, id: Id) -> Result<(), String> {
        self.check_sector_stable(sector, id)?;
        if !self.is_lost(sector, id) {
            let known = &mut self.stable[at(sector)];
            *known = id.max(*known);
        }
        Ok(())
    }

    pub(super) fn check_sector_stable(&self, sector: u64, id: Id) -> Result<(), String> {
        let is_there = match self.disk.stable(START + sector) {
            Some(value) => self.history.is_at_least(id, sector, value),
            None => self.history.may_be_torn(id, sector),
        };
        if is_there || self.is_lost(sector, id) {
            return Ok(());
        }
        Err(format!("sector {sector}: change {id} is not stable"))
    }

    /// I1, I4 and I6.
    pub(super) fn check(&mut self) -> Result<(), String> {
        let logged = self.logged();
        for sector in 0..SECTORS {
            let id = self.history.newest_acknowledged(sector, u64::MAX);
            self.check_sector_stable(sector, self.stable[at(sector)]).map_err(|e| format!("{e} any more"))?;
            match logged[at(sector)] {
                None => self.check_sector_stable(sector, id).map_err(|e| format!("{e}, nor logged"))?,
                Some(content) => self.check_logged(sector, id, content)?,
            }
        }
        let (kept, extents) = (self.shadow.kept_bytes(), self.shadow.logged_extents());
        if kept > self.plan.limits.bytes || extents > self.plan.limits.extents {
            return Err(format!("{kept} bytes in {extents} extents are kept"));
        }
        Ok(())
    }

    pub(super) fn check_logged(&self, sector: u64, id: Id, content: Content) -> Result<(), String> {
        let value = match content {
            Content::Data { buffer, skip } => {
                let slice = self.shadow.log.slice(buffer, skip, 1).ok_or("an extent without its copy")?;
                slice.payload[at(slice.skip)]
            }
            Content::Zeroes { .. } => ZERO,
            Content::Discarded => return Ok(()),
        };
        if self.history.is_at_least(id, sector, value) || self.is_lost(sector, id) {
            return Ok(());
        }
        Err(format!("sector {sector}: the log has {value}, not change {id}"))
    }
}

fn one(sector: u64) -> SectorRange {
    SectorRange::new(sector, 1).unwrap()
}
