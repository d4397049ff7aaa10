//! What is handed to the driver VM next: blocks to recognise the disk by, before everything; then a flush if one is due; then what the
//! log owes and what the guest asked for, in turns, so that neither a long replay stops the guest nor a busy guest the replay. After a
//! death during a replay it is one order at a time: the log first, then what was in flight, then the rest.

use super::BlockShadow;
use super::exchange::{Access, Command, Data, GuestSpan, Order, Out, Payload, Status};
use super::extents::{Content, Run};
use super::life::Work;
use super::queue::{Part, PartId};
use super::range::SectorRange;

impl<P: Payload> BlockShadow<P> {
    /// The next order for the driver VM at `now` ns, which is in flight from then on; none if there is nothing to do, or the driver
    /// VM's queue is full. To be called until it returns none, after each call that may have changed something. `copy` makes a private
    /// copy of what the guest writes.
    pub fn next_order(&mut self, now: u64, mut copy: impl FnMut(GuestSpan) -> P, out: &mut Out) -> Option<Order<P>> {
        if !self.life()?.has_room(self.replay.one_by_one) {
            return None;
        }
        if !self.samples.are_checked() {
            return self.sample(now);
        }
        if self.is_flush_due(now) {
            return self.hand_flush(now);
        }
        if self.replay.one_by_one && self.log.owes_any() {
            return self.rewrite(now);
        }
        if self.replay.is_logs_turn {
            self.rewrite(now).or_else(|| self.hand_part(now, &mut copy, out))
        } else {
            self.hand_part(now, &mut copy, out).or_else(|| self.rewrite(now))
        }
    }

    /// Puts an order in flight.
    fn hand(&mut self, work: Work, command: Command<P>, now: u64) -> Option<Order<P>> {
        let bytes = command.bytes();
        let is_slow = command.is_slow();
        Some(Order { tag: self.life_mut()?.hand(work, bytes, is_slow, now)?, command })
    }

    /// Where a range of the guest's disk is on the driver VM's.
    fn locate(&self, range: SectorRange) -> Option<SectorRange> {
        self.identity.window.locate(range)
    }

    fn sample(&mut self, now: u64) -> Option<Order<P>> {
        let range = self.samples.next_unread()?;
        let at = self.locate(range)?;
        self.hand(Work::Sample(range), Command::Sample { at }, now)
    }

    /// A flush is due when a request waits for it, when the last one died with its life, when half of a bound or the age is reached, when
    /// a change waits for room, or when everything is to come to rest; but never while something is owed: the flush would not cover it.
    fn is_flush_due(&self, now: u64) -> bool {
        if !self.can_flush() {
            return false;
        }
        self.epochs.is_wanted()
            || self.epochs.is_repeated()
            || self.limits.is_half(self.log.logged_bytes(), self.log.len())
            || self.epochs.aged_at(self.limits.age_ns).is_some_and(|at| at <= now)
            || self.rests()
            || self.queue.first_without_room().is_some_and(|part| !self.has_room_for(part))
    }

    pub(super) fn can_flush(&self) -> bool {
        let owes = self.log.owes_any() && !broken!(FlushesWhileOwing);
        self.life().is_some() && !owes && !self.epochs.is_under_way() && !self.log.is_empty()
    }

    fn hand_flush(&mut self, now: u64) -> Option<Order<P>> {
        self.counts.flushes += 1;
        self.counts.own_flushes += u64::from(!self.epochs.is_wanted());
        self.epochs.begin();
        self.hand(Work::Flush, Command::Flush, now)
    }

    /// The next order that writes owed content again, in the order of the disk's sectors.
    fn rewrite(&mut self, now: u64) -> Option<Order<P>> {
        let range = self.next_owed()?;
        let Run { content, slices } = self.log.rewrite(range)?;
        let at = self.locate(range)?;
        self.replay.cursor = range.end();
        self.replay.is_logs_turn = false;
        let command = match content {
            Content::Data { .. } => Command::Write { at, data: Data::Private(slices) },
            Content::Zeroes { unmap } => Command::WriteZeroes { at, unmap },
            Content::Discarded => Command::Discard { at },
        };
        self.hand(Work::Replay(range), command, now)
    }

    /// The next owed range that is clear of what is in flight. Where the device lost its cache within a life, parts that were in flight
    /// before may overlap what is owed since.
    fn next_owed(&self) -> Option<SectorRange> {
        let (alone, longest) = (self.replay.one_by_one, self.limits.longest());
        let mut range = self.log.next_owed(self.replay.cursor, alone, longest)?;
        let mut is_second_round = false;
        while self.queue.in_flight_in(range) {
            let next = self.log.next_owed(range.end(), alone, longest)?;
            let begins_again = next.start() <= range.start();
            if begins_again && is_second_round {
                return None;
            }
            is_second_round |= begins_again;
            range = next;
        }
        Some(range)
    }

    fn hand_part(&mut self, now: u64, copy: &mut impl FnMut(GuestSpan) -> P, out: &mut Out) -> Option<Order<P>> {
        if self.rests() {
            return None;
        }
        let id = self.next_part(out)?;
        if self.life()?.is_volatile {
            self.give_room(id, copy);
        }
        let part = self.queue.get(id)?;
        let (access, range) = (part.access, part.range);
        let command = self.command_for(part)?;
        self.queue.hand(id);
        #[cfg(test)]
        if broken!(ChangesAreDoneWhenHanded) && access.changes() {
            self.acknowledge_early(id, out);
        }
        self.replay.is_logs_turn = true;
        if access.changes() {
            self.samples.overwritten(range);
        }
        self.hand(Work::Part(id), command, now)
    }

    /// The next part that is clear of what is owed. Reads of what is lost fail here.
    fn next_part(&mut self, out: &mut Out) -> Option<PartId> {
        loop {
            let id = self.queue.next_ready(|part| self.has_room_for(part))?;
            let part = self.queue.get(id)?;
            if self.log.owes(part.range) && !(broken!(ReadsPassTheOwed) && part.access == Access::Read) {
                self.queue.park(id);
            } else if part.access == Access::Read && self.lost.overlaps(part.range) {
                self.finish_part(id, Status::IoError, out);
            } else {
                return Some(id);
            }
        }
    }

    /// Whether a change can enter the log when it is done.
    fn has_room_for(&self, part: &Part) -> bool {
        let is_volatile = self.life().is_some_and(|life| life.is_volatile);
        if !is_volatile || part.has_room {
            return true;
        }
        let bytes = if part.access == Access::Write && part.copy.is_none() { part.range.bytes() } else { 0 };
        self.limits.has_room(bytes, self.log.kept_bytes(), self.log.len(), self.queue.with_room())
    }

    /// Sets room in the log aside for a change, and makes the private copy of what it writes.
    fn give_room(&mut self, id: PartId, copy: &mut impl FnMut(GuestSpan) -> P) {
        let Some(part) = self.queue.get(id).filter(|part| part.access.changes()) else { return };
        let held = match (part.access, part.copy, self.span_of(part)) {
            (Access::Write, None, Some(span)) => Some(self.log.hold(copy(span), span.sectors)),
            _ => None,
        };
        self.queue.give_room(id, held);
    }

    fn command_for(&self, part: &Part) -> Option<Command<P>> {
        let at = self.locate(part.range)?;
        Some(match part.access {
            Access::Read => Command::Read { at, into: self.span_of(part)? },
            Access::Write => Command::Write { at, data: self.data_of(part)? },
            Access::WriteZeroes { unmap } => Command::WriteZeroes { at, unmap },
            Access::Discard => Command::Discard { at },
        })
    }

    fn data_of(&self, part: &Part) -> Option<Data<P>> {
        match part.copy {
            Some(buffer) => Some(Data::Private(vec![self.log.slice(buffer, 0, part.range.count())?])),
            None => Some(Data::Guest(self.span_of(part)?)),
        }
    }
}
