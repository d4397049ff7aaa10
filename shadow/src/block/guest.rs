//! Requests of the guest: taken, cut in parts, answered together; and the guest's reset of its device.

use super::bounds::{MAX_LOST, MAX_PARTS};
use super::epochs::Waiter;
use super::exchange::{Access, GuestSpan, Out, Payload, Status, Tag, Token};
use super::life::Work;
use super::queue::{Part, PartId, RequestId};
use super::range::SectorRange;
use super::{BlockShadow, Pending, State};
use crate::LinkId;

impl<P: Payload> BlockShadow<P> {
    /// Whether the guest's driver has accepted `VIRTIO_BLK_F_FLUSH`; true until it says otherwise. From then on writes are acknowledged
    /// when they are stable, or when they are done.
    pub fn set_guest_flushes(&mut self, accepted: bool) {
        self.guest_flushes = accepted;
    }

    /// A request of the guest, of whole logical blocks. Those that the disk does not offer fail at once.
    pub fn submit(&mut self, token: Token, access: Access, range: SectorRange, out: &mut Out) {
        let longest = self.limits.longest_of(access);
        let refused = matches!(self.state, State::Quarantined)
            || !self.identity.offers(range)
            || range.count().div_ceil(longest) > MAX_PARTS
            || (access.changes() && (self.identity.read_only || self.lost.len() >= MAX_LOST));
        if refused {
            self.counts.failed_requests += 1;
            return out.done(token, Status::IoError);
        }
        let left = range.count().div_ceil(longest);
        let request = self.add_request(Pending { token, access: Some((access, range)), left, status: Status::Ok });
        for part in range.parts(longest) {
            self.queue.push(Part::new(request, access, part, part.start() - range.start()));
        }
    }

    /// A flush of the guest. It covers the writes that are acknowledged by now.
    pub fn flush(&mut self, token: Token, out: &mut Out) {
        if matches!(self.state, State::Quarantined) || self.epochs.take_deferred_error() {
            self.counts.failed_requests += 1;
            return out.done(token, Status::IoError);
        }
        if self.log.is_empty() || broken!(FlushIsNotAwaited) {
            return out.done(token, Status::Ok);
        }
        let request = self.add_request(Pending { token, access: None, left: 0, status: Status::Ok });
        self.epochs.wait(Waiter::new(request, true));
    }

    fn add_request(&mut self, pending: Pending) -> RequestId {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.requests.insert(id, pending);
        id
    }

    /// Where in the guest's buffers the data of a finished read go; none if the guest does not want them any more, or `link` does not
    /// serve, or the order is no read.
    pub fn read_into(&self, link: LinkId, tag: Tag) -> Option<GuestSpan> {
        let life = self.life().filter(|life| life.link == link)?;
        let Work::Part(id) = life.get(tag)?.work else { return None };
        let part = self.queue.get(id).filter(|part| part.access == Access::Read)?;
        self.span_of(part)
    }

    /// The guest's buffers of a part.
    pub(super) fn span_of(&self, part: &Part) -> Option<GuestSpan> {
        let pending = self.requests.get(&part.request?)?;
        Some(GuestSpan { token: pending.token, skip: part.skip, sectors: part.range.count() })
    }

    /// A part has come to its end.
    pub(super) fn finish_part(&mut self, id: PartId, status: Status, out: &mut Out) -> Option<Part> {
        let part = self.queue.finish(id)?;
        if let Some(request) = part.request {
            self.note_part_done(request, status, out);
        }
        Some(part)
    }

    fn note_part_done(&mut self, id: RequestId, status: Status, out: &mut Out) {
        // Where the disk has no volatile cache, an earlier life's may have had one: the log then owes what was done there.
        let may_be_lost = self.life().is_some_and(|life| life.is_volatile) || !self.log.is_empty();
        let stable_first = self.is_stable_first() && may_be_lost;
        let Some(pending) = self.requests.get_mut(&id) else { return };
        pending.left -= 1;
        pending.status = pending.status.max(status);
        if pending.left > 0 && !broken!(OnePartIsEnough) {
            return;
        }
        let changes = pending.changes().is_some();
        if changes && stable_first && pending.status == Status::Ok {
            self.epochs.wait(Waiter::new(id, false));
        } else {
            let status = pending.status;
            self.answer(id, status, out);
        }
    }

    pub(super) fn answer(&mut self, id: RequestId, status: Status, out: &mut Out) {
        let Some(pending) = self.requests.remove(&id) else { return };
        self.counts.failed_requests += u64::from(status != Status::Ok);
        out.done(pending.token, status);
    }

    pub(super) fn answer_all(&mut self, waiters: Vec<Waiter>, status: Status, out: &mut Out) {
        for waiter in waiters {
            self.answer(waiter.request, if waiter.failed { Status::IoError } else { status }, out);
        }
    }

    /// What was done in `range` is lost before the requests that did it were answered: they fail. Those whose part there is still to be
    /// done write it anyway.
    pub(super) fn fail_unanswered(&mut self, range: SectorRange) {
        let to_be_done: Vec<RequestId> = self.queue.requests_in(range).collect();
        for (id, pending) in &mut self.requests {
            let did_it = pending.changes().is_some_and(|r| r.overlaps(range)) && !to_be_done.contains(id);
            if did_it && !broken!(LostPartsCountAsDone) {
                pending.status = Status::IoError;
            }
        }
    }

    /// What waits for a flush needs none where everything is stable.
    pub(super) fn answer_if_stable(&mut self, out: &mut Out) {
        if self.log.is_empty() {
            self.epochs.emptied();
            let waiting = self.epochs.take_waiting();
            self.answer_all(waiting, Status::Ok, out);
        }
    }

    /// The guest has reset its device (not the machine): its requests are gone and are not answered, its memory is not touched any
    /// more. Writes that a driver VM may have begun are carried to their end as orphans, and enter the log: the next read may see them.
    /// Those without a private copy (no volatile cache) are not issued again when their life is lost: what they wrote until then is
    /// stable. The log belongs to the disk and stays.
    pub fn reset_by_guest(&mut self) {
        self.epochs.forget_waiters();
        self.requests.clear();
        let is_left = |part: &Part| {
            let is_whole_change = part.access.changes() && part.handed && part.is_whole();
            (part.is_in_flight() || is_whole_change) && !(broken!(OrphansAreForgotten) && part.access.changes())
        };
        let parts = self.queue.iter().filter(|(_, part)| part.request.is_some() && !is_left(part));
        let forgotten: Vec<PartId> = parts.map(|(id, _)| id).collect();
        for id in forgotten {
            self.forget_part(id);
        }
        for part in self.queue.iter_mut() {
            self.counts.orphans += u64::from(part.request.is_some() && part.access.changes());
            part.request = None;
        }
    }

    /// What the model test does to a change that was just handed over, to break a rule.
    #[cfg(test)]
    pub(super) fn acknowledge_early(&mut self, id: PartId, out: &mut Out) {
        if let Some(request) = self.queue.get_mut(id).and_then(|part| part.request.take()) {
            self.note_part_done(request, Status::Ok, out);
        }
    }

    /// A part that nobody waits for and that will not be issued again.
    pub(super) fn forget_part(&mut self, id: PartId) {
        if let Some(copy) = self.queue.finish(id).and_then(|part| part.copy) {
            self.log.drop_copy(copy);
        }
    }
}
