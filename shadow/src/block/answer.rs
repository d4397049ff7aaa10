//! What the driver VM answers. What is done enters the log first and is acknowledged then; what failed is the disk's error, or a sign
//! that the life has failed ([`super::errors`]).

use super::epochs::Waiter;
use super::errors::{ErrorClass, Failure, STRIKES, Violation};
use super::exchange::{Access, Answer, Fingerprint, Out, Payload, Status, Tag};
use super::extents::{Content, Presence};
use super::life::{Flight, Work};
use super::queue::PartId;
use super::range::SectorRange;
use super::{BlockShadow, Samples};
use crate::LinkId;

impl ErrorClass {
    fn status(self) -> Status {
        match self {
            Self::Unsupported => Status::Unsupported,
            _ => Status::IoError,
        }
    }
}

impl<P: Payload> BlockShadow<P> {
    /// The driver VM of `link` answers an order at `now` ns; ignored unless that is the one that serves. The data of a read have been
    /// copied by then, where [`Self::read_into`] said.
    ///
    /// # Errors
    /// When the life has failed; the shadow masks from then on.
    pub fn answered(&mut self, link: LinkId, tag: Tag, answer: Answer, now: u64, out: &mut Out) -> Result<(), Failure> {
        if !self.is_of_present(link) {
            return Ok(());
        }
        let result = match self.take_flight(tag, answer, now) {
            Ok(flight) => self.conclude(flight, answer, now, out),
            Err(violation) => Err(violation.into()),
        };
        self.settle(result, out)
    }

    /// The driver VM of `link` has read a block ([`Command::Sample`](super::Command::Sample)) at `now` ns, with this fingerprint.
    ///
    /// # Errors
    /// When it is another disk, or the answer cannot be.
    pub fn sampled(
        &mut self,
        link: LinkId,
        tag: Tag,
        found: Fingerprint,
        now: u64,
        out: &mut Out,
    ) -> Result<(), Failure> {
        if !self.is_of_present(link) {
            return Ok(());
        }
        let result = match self.life_mut().and_then(|life| life.get(tag).map(|flight| flight.work)) {
            Some(Work::Sample(range)) => {
                if let Some(life) = self.life_mut() {
                    life.take(tag, now);
                    life.has_worked = true;
                }
                self.samples.read(range, found).map_err(Failure::from)
            }
            Some(_) => Err(Violation::WrongKind(tag.0).into()),
            None => Err(Violation::UnknownTag(tag.0).into()),
        };
        self.settle(result, out)
    }

    /// The driver VM of `link` says at `now` ns that it has handed this order to the disk, and that there is no result yet. Of a flush, of
    /// zeroes and of a discard it says so again and again: a disk that is in order may take long for them.
    ///
    /// # Errors
    /// When the order is not in flight, or is none of these.
    pub fn at_work(&mut self, link: LinkId, tag: Tag, now: u64, out: &mut Out) -> Result<(), Failure> {
        if !self.is_of_present(link) {
            return Ok(());
        }
        let result = self.life_mut().map_or(Ok(()), |life| life.at_work(tag, now));
        result.map_err(|violation| self.fail(violation.into(), out))
    }

    fn is_of_present(&self, link: LinkId) -> bool {
        self.life().is_some_and(|life| life.link == link || broken!(TheDeadMayAnswer))
    }

    /// Does what follows from an answer, whatever it was.
    fn settle(&mut self, result: Result<(), Failure>, out: &mut Out) -> Result<(), Failure> {
        let result = result.map_err(|failure| self.fail(failure, out));
        self.answer_if_stable(out);
        self.note_replay();
        result
    }

    /// Takes an order out of flight, if the answer may be true.
    fn take_flight(&mut self, tag: Tag, answer: Answer, now: u64) -> Result<Flight, Violation> {
        let unknown = Violation::UnknownTag(tag.0);
        let life = self.life_mut().ok_or(unknown)?;
        let flight = life.get(tag).ok_or(unknown)?;
        if let Answer::Done { bytes } = answer {
            if matches!(flight.work, Work::Sample(_)) {
                return Err(Violation::WrongKind(tag.0));
            }
            if bytes != flight.bytes {
                return Err(Violation::WrongLength { expected: flight.bytes, got: bytes });
            }
        }
        let flight = life.take(tag, now).ok_or(unknown)?;
        life.has_worked |= matches!(answer, Answer::Done { .. });
        Ok(flight)
    }

    fn conclude(&mut self, flight: Flight, answer: Answer, now: u64, out: &mut Out) -> Result<(), Failure> {
        match (flight.work, answer) {
            (Work::Part(id), Answer::Done { .. }) => self.part_done(id, flight.is_void, now, out),
            (Work::Part(id), Answer::Failed(class)) => self.part_failed(id, class, flight.is_void, out)?,
            (Work::Replay(range), Answer::Done { .. }) => self.rewritten(range, flight.is_void, now),
            (Work::Replay(range), Answer::Failed(class)) => self.rewrite_failed(range, class, now)?,
            (Work::Flush, Answer::Done { .. }) => self.flushed(flight.is_void, now, out),
            (Work::Flush, Answer::Failed(_)) => self.flush_failed(out)?,
            (Work::Sample(range), _) => {
                self.samples.read_failed(range);
                if answer == Answer::Failed(ErrorClass::Suspect) {
                    return Err(Failure::Suspect);
                }
            }
        }
        Ok(())
    }

    fn part_done(&mut self, id: PartId, is_void: bool, now: u64, out: &mut Out) {
        let Some(part) = self.queue.get(id) else { return };
        let (access, range, is_wanted) = (part.access, part.range, part.request.is_some());
        self.bad.worked(access, range);
        if access.changes() {
            self.land(id, is_void, now);
        } else if is_void && is_wanted && self.log.overlaps(range) && !broken!(VoidAnswersCount) {
            // It may have read what the device had lost by then.
            return self.queue.requeue(id);
        }
        self.finish_part(id, Status::Ok, out);
    }

    /// A change is done: it is the last content of its sectors from now on.
    fn land(&mut self, id: PartId, is_void: bool, now: u64) {
        let Some(part) = self.queue.get_mut(id) else { return };
        let (access, range, copy) = (part.access, part.range, part.copy.take());
        self.lost.remove(range);
        let content = match (access, copy) {
            (Access::WriteZeroes { unmap }, _) => Some(Content::Zeroes { unmap }),
            (Access::Discard, _) => Some(Content::Discarded),
            (_, Some(buffer)) => Some(Content::Data { buffer, skip: 0 }),
            (_, None) => None,
        };
        let is_volatile = self.life().is_some_and(|life| life.is_volatile);
        match content.filter(|_| is_volatile && !broken!(DoneIsNotLogged)) {
            Some(content) => {
                let is_here = !is_void || broken!(VoidAnswersCount);
                let presence = if is_here { Presence::Here(self.epochs.now()) } else { Presence::Owed };
                self.log.insert(range, content, presence);
                self.epochs.logged(now);
            }
            None => {
                self.log.cut(range);
                if let Some(copy) = copy {
                    self.log.drop_copy(copy);
                }
            }
        }
    }

    fn part_failed(&mut self, id: PartId, class: ErrorClass, is_void: bool, out: &mut Out) -> Result<(), Failure> {
        let Some((life, has_worked)) = self.life().map(|life| (life.link.generation, life.has_worked)) else {
            return Ok(());
        };
        let Some(part) = self.queue.get_mut(id) else { return Ok(()) };
        let is_wanted_read = part.access == Access::Read && part.request.is_some();
        let is_healed = is_wanted_read && self.log.overlaps(part.range);
        if is_void && is_healed && !class.is_suspect() {
            // A sector that was torn, and healed in the cache only.
            self.queue.requeue(id);
            return Ok(());
        }
        part.strikes.add(life);
        let (access, range) = (part.access, part.range);
        let is_second = part.strikes.lives() >= STRIKES || (has_worked && self.bad.is_known(access, range));
        if !class.is_suspect() || is_second || broken!(SuspectErrorsAreTheDisks) {
            if class.is_suspect() {
                self.bad.add(access, range);
            }
            self.fail_part(id, class.status(), out);
            return Ok(());
        }
        self.counts.masked_errors += 1;
        self.keep_for_next_life(id);
        Err(Failure::Suspect)
    }

    /// A part fails for good. A change that failed may have left anything in its sectors: what the log has there is written again, so
    /// that no read sees something that the next life does not have.
    pub(super) fn fail_part(&mut self, id: PartId, status: Status, out: &mut Out) {
        let Some(part) = self.finish_part(id, status, out) else { return };
        if let Some(copy) = part.copy {
            self.log.drop_copy(copy);
        }
        if part.access.changes() && !broken!(FailedChangesLeaveNoTrace) {
            self.log.owe(part.range);
        }
    }

    fn rewritten(&mut self, range: SectorRange, is_void: bool, now: u64) {
        if is_void && !broken!(VoidAnswersCount) {
            self.log.rewrite_failed(range, |_| ());
            return;
        }
        self.counts.rewritten_sectors += range.count();
        let is_stable = self.life().is_some_and(|life| !life.is_volatile) || broken!(ReplayIsStable);
        self.log.rewritten(range, self.epochs.now(), is_stable);
        self.epochs.logged(now);
        self.queue.wake(range);
    }

    fn rewrite_failed(&mut self, range: SectorRange, class: ErrorClass, now: u64) -> Result<(), Failure> {
        if self.log.content_at(range.start()) == Some(Content::Discarded) {
            // Advice that was not taken.
            self.rewritten(range, false, now);
            return Ok(());
        }
        let life = self.life().filter(|life| life.has_worked).map(|life| life.link.generation);
        let gone = self.log.rewrite_failed(range, |strikes| match life {
            _ if !class.is_suspect() => strikes.add_once_more(),
            Some(life) => strikes.add(life),
            None => {}
        });
        if class.is_suspect() && gone.is_empty() {
            self.counts.masked_errors += 1;
            return Err(Failure::Suspect);
        }
        self.lose_ranges(gone);
        Ok(())
    }

    /// These left the log and are on no medium. Reads of them fail, and so does the next flush, as with a disk's deferred error; and the
    /// requests that are not answered yet.
    pub(super) fn lose_ranges(&mut self, gone: Vec<(SectorRange, Content)>) {
        for (range, content) in gone {
            if content != Content::Discarded && !broken!(LostInSilence) {
                self.counts.lost_sectors += range.count();
                self.lost.insert(range);
                self.epochs.lose_range();
                self.fail_unanswered(range);
            }
            self.queue.wake(range);
        }
    }

    fn flushed(&mut self, is_void: bool, now: u64, out: &mut Out) {
        if is_void && !broken!(VoidAnswersCount) {
            return self.epochs.void();
        }
        let Some((covers, waiters)) = self.epochs.succeed() else { return };
        let Self { log, samples, queue, identity, .. } = self;
        let mut is_wanted = identity.can_be_sampled() && Samples::are_wanted(samples, now);
        log.prune(covers, |range, data| {
            is_wanted = is_wanted && !samples.offer(range, &data, now, |block| !queue.changes_in(block));
        });
        self.answer_all(waiters, Status::Ok, out);
    }

    /// A flush failed. The device may have dropped anything: all is written again in the next life, before a flush counts.
    fn flush_failed(&mut self, out: &mut Out) -> Result<(), Failure> {
        self.counts.failed_flushes += 1;
        if broken!(FailedFlushesAreRepeated) {
            self.epochs.void();
            return Ok(());
        }
        let Some(life) = self.generation() else { return Ok(()) };
        let given_up: Vec<Waiter> = self.epochs.fail(life);
        self.answer_all(given_up, Status::IoError, out);
        Err(Failure::FlushFailed)
    }
}
