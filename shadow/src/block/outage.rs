//! Lives of the disk: attached, brought to rest, lost; and the quarantine, when there is to be none. A life that is lost leaves all that
//! it was given to the next.

use super::errors::{DEATHS, Failure, Tally};
use super::exchange::{Access, Out, Payload, Status, WriteCache};
use super::identity::{Identity, Mismatch};
use super::life::{Life, Work};
use super::queue::PartId;
use super::{BlockShadow, CachePolicy, Replay, State};
use crate::{Generation, LinkId};

/// Why a driver VM's disk is not taken. Nothing is handed to it; what the shadow keeps is as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// A link that was given up, or is older than the one that serves.
    #[error("an old connection")]
    Old,
    /// Another disk: to be quarantined.
    #[error(transparent)]
    OtherDisk(#[from] Mismatch),
}

impl<P: Payload> BlockShadow<P> {
    /// A driver VM has the disk ready at `now` ns, with room for `depth` orders in flight. Its device was fenced and reset before, and
    /// nothing of an earlier connection is on its way to it. It serves from now on; also after a quarantine.
    ///
    /// # Errors
    /// When the link is old, or it is not the disk that the guest was given.
    pub fn attach(
        &mut self,
        link: LinkId,
        disk: &Identity,
        cache: WriteCache,
        depth: u16,
        now: u64,
        out: &mut Out,
    ) -> Result<(), NotTaken> {
        if self.barred.is_some_and(|barred| link <= barred) || self.link().is_some_and(|serving| link <= serving) {
            return Err(NotTaken::Old);
        }
        self.lose_life(out);
        if let Err(mismatch) = self.identity.check(disk)
            && !broken!(AnyDiskIsTaken)
        {
            self.barred = Some(link);
            return Err(mismatch.into());
        }
        let is_volatile = cache == WriteCache::Volatile || self.policy == CachePolicy::Volatile;
        self.state = State::Alive(Box::new(Life::new(link, is_volatile, depth, now)));
        self.samples.begin_check();
        self.note_replay();
        Ok(())
    }

    /// Whether a death would be one during a replay; and with the replay ends its going one by one.
    pub(super) fn note_replay(&mut self) {
        if self.life().is_some() {
            self.replay.is_under_way = self.is_replaying();
            self.replay.one_by_one &= self.replay.is_under_way;
        }
    }

    /// `link` is lost, and with it all before.
    pub fn lost(&mut self, link: LinkId, out: &mut Out) {
        self.barred = self.barred.max(Some(link));
        if self.link().is_some_and(|serving| serving <= link) {
            self.lose_life(out);
        }
    }

    /// The life that serves has failed.
    pub(super) fn fail(&mut self, failure: Failure, out: &mut Out) -> Failure {
        self.barred = self.barred.max(self.link());
        self.lose_life(out);
        failure
    }

    /// Nothing that is on the device is known to stay there, and of what is in flight nothing is known: all is written, or issued,
    /// again in the next life. What the life did and could not report is simply done twice.
    fn lose_life(&mut self, out: &mut Out) {
        if self.life().is_none() {
            return;
        }
        let State::Alive(life) = std::mem::replace(&mut self.state, State::Masking) else { return };
        self.replay = Replay { one_by_one: self.replay.is_under_way, is_logs_turn: true, ..self.replay };
        self.rest_by = None;
        for part in self.queue.iter_mut().filter(|part| !part.is_in_flight()) {
            part.deaths = Tally::default();
        }
        let (has_worked, of) = (life.has_worked, life.link.generation);
        for flight in life.take_all() {
            match flight.work {
                Work::Part(id) => self.lose_part(id, of, out),
                Work::Sample(range) => self.samples.read_failed(range),
                Work::Replay(_) | Work::Flush => {}
            }
        }
        let gone = self.log.lose_life(has_worked.then_some(of));
        self.lose_ranges(gone);
        let given_up = self.epochs.lose_life(of);
        self.answer_all(given_up, Status::IoError, out);
        self.answer_if_stable(out);
    }

    /// A part was in flight when its life was lost.
    fn lose_part(&mut self, id: PartId, life: Generation, out: &mut Out) {
        let Some(part) = self.queue.get_mut(id) else { return };
        part.deaths.add(life);
        if part.deaths.lives() >= DEATHS || broken!(OneDeathIsEnough) {
            self.fail_part(id, Status::IoError, out);
        } else if broken!(InFlightCountsAsDone) && part.access.changes() {
            self.fail_part(id, Status::Ok, out);
        } else {
            self.keep_for_next_life(id);
        }
    }

    /// A part is to be issued again, in its old place, if somebody still wants it and it can be.
    pub(super) fn keep_for_next_life(&mut self, id: PartId) {
        let Some(part) = self.queue.get(id) else { return };
        if part.request.is_none() && (part.access == Access::Read || !part.is_whole()) {
            self.forget_part(id);
        } else {
            self.counts.kept_in_flight += 1;
            self.queue.requeue_in_next_life(id);
        }
    }

    /// The driver of `link` has reset the disk's controller by itself: the cache may be lost, and the life goes on. To be called before
    /// any answer that the device gave since that reset began. Everything is written again in place; answers to what is in flight
    /// prove nothing.
    pub fn cache_lost(&mut self, link: LinkId) {
        match self.life_mut() {
            Some(life) if life.link == link && life.is_volatile => life.void_all(),
            _ => return,
        }
        self.log.owe_all();
        self.note_replay();
    }

    /// No driver VM until further notice ([`Self::attach`]): what waits and what comes fails. The log is kept.
    pub fn quarantine(&mut self, out: &mut Out) {
        if let Some(link) = self.link() {
            self.lost(link, out);
        }
        let parts: Vec<PartId> = self.queue.iter().map(|(id, _)| id).collect();
        for id in parts {
            self.forget_part(id);
        }
        self.epochs.forget_waiters();
        let requests: Vec<_> = self.requests.keys().copied().collect();
        for id in requests {
            self.answer(id, Status::IoError, out);
        }
        self.state = State::Quarantined;
        self.rest_by = None;
    }

    /// A deliberate reset is to come: no request is handed over any more, what is in flight ends, and a flush makes everything stable.
    /// Then [`Self::is_at_rest`]. After [`super::Limits::quiesce_ns`] from `now` [`Self::tick`] fails.
    pub fn quiesce(&mut self, now: u64) {
        self.rest_by.get_or_insert(now.saturating_add(self.limits.quiesce_ns));
    }

    /// The deliberate reset does not come: serve again.
    pub fn go_on(&mut self) {
        self.rest_by = None;
    }

    /// The guest has ended, and nothing more comes of it: makes everything that it was told is done stable, as soon as can be, over as many
    /// lives as that takes. Until then the log is not empty ([`Self::logged_extents`]).
    pub fn finish(&mut self) {
        self.has_ended = true;
    }

    /// Whether the disk was to come to rest and has: nothing is in flight, and everything that was acknowledged is stable. Ends with the
    /// life.
    pub fn is_at_rest(&self) -> bool {
        let is_stable = self.log.is_empty() || broken!(RestNeedsNoFlush);
        self.rest_by.is_some() && self.in_flight() == 0 && is_stable && !matches!(self.state, State::Quarantined)
    }

    /// Does what is due at `now` ns.
    ///
    /// # Errors
    /// When the life is stuck, or did not come to rest.
    pub fn tick(&mut self, now: u64, out: &mut Out) -> Result<(), Failure> {
        let stalled = self.life().filter(|life| life.stalls_at(&self.limits).is_some_and(|at| at <= now));
        if let Some(ms) = stalled.map(|life| life.silence(now) / 1_000_000) {
            return Err(self.fail(Failure::Stalled { ms }, out));
        }
        if self.rest_by.is_some_and(|by| by <= now) && !self.is_at_rest() {
            self.rest_by = None;
            return Err(self.fail(Failure::NotQuiesced, out));
        }
        Ok(())
    }

    /// When [`Self::tick`] and [`Self::next_order`] are to be called at the latest, ns.
    pub fn deadline(&self) -> Option<u64> {
        let stall = self.life().and_then(|life| life.stalls_at(&self.limits));
        let rest = self.rest_by.filter(|_| !self.is_at_rest());
        let has_room = self.life().is_some_and(|life| life.has_room(self.replay.one_by_one));
        let age = self.epochs.aged_at(self.limits.age_ns).filter(|_| has_room && self.can_flush());
        [stall, rest, age].into_iter().flatten().min()
    }
}
