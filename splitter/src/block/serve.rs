//! A turn of the block splitter: news of the link, what is due, answers of the driver VM, then orders for it.

use umbra_driver_vm::block_protocol::{FromService, Hello};
use umbra_shadow::block::{
    Answer, ErrorClass, Failure, Fingerprint, ModeName, NotTaken, Out, SECTOR_BYTES, Tag, Violation,
};

use super::data::GuestData;
use super::link::LinkError;
use super::notice::{Notice, since};
use super::session::{Brings, Flight, Heard};
use super::{BlockSplitter, LinkState};
use crate::link::Cause;

/// Most bytes copied in each direction at one turn, beside those of one buffer of records: about a millisecond, so that a busy disk does
/// not hold up the guest's other devices.
const COPY_BUDGET: u64 = 4 << 20;

/// Most buffers of records that are read at one turn.
const BUFFER_BUDGET: usize = 64;

/// Whether a part of a turn's work is left over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Nothing,
    More,
}

impl BlockSplitter {
    /// One turn at `now` ns. `data` gives access to the data of the guest's requests.
    pub fn service(&mut self, now: u64, data: &mut dyn GuestData) {
        // Empty if another call was faster.
        let _ = self.wake.read();
        self.serviced = now;
        if self.is_live() {
            // Until it begins to mask.
            self.counted = self.shadow.counts();
        }
        self.take_events();
        // What the driver VM has said comes first: if it is this process that is late, the driver VM did not stand still.
        let result = self.exchange(now, data).and_then(|()| {
            let due = self.with_shadow(|shadow, out| shadow.tick(now, out));
            due.map_err(|failure| {
                self.report_unrest();
                failure.into()
            })
        });
        if let (Err(error), Some(id)) = (result, self.link.id()) {
            self.lose(id, error);
        }
        self.report();
    }

    /// Answers in, orders out.
    fn exchange(&mut self, now: u64, data: &mut dyn GuestData) -> Result<(), LinkError> {
        let left = [self.hear(now, data)?, self.hand_over(now, data)?];
        if left.contains(&Left::More) {
            self.wake_up();
        }
        match &mut self.link {
            LinkState::Up { session, .. } => session.notify(),
            _ => Ok(()),
        }
    }

    fn hear(&mut self, now: u64, data: &mut dyn GuestData) -> Result<Left, LinkError> {
        let mut copied = 0;
        for _ in 0..BUFFER_BUDGET {
            let LinkState::Up { session, .. } = &mut self.link else { return Ok(Left::Nothing) };
            match session.receive()? {
                None => return Ok(Left::Nothing),
                Some(Heard::Hello(hello)) => self.greeted(*hello, now)?,
                Some(Heard::Records(records)) => {
                    for record in records {
                        copied += self.heard(record, now, data)?;
                    }
                }
            }
            if copied >= COPY_BUDGET {
                break;
            }
        }
        Ok(Left::More)
    }

    /// The service has greeted: if it has the guest's disk, the session begins.
    fn greeted(&mut self, hello: Hello, now: u64) -> Result<(), LinkError> {
        let LinkState::Up { session, .. } = &mut self.link else { return Ok(()) };
        let link = session.id();
        let (identity, cache, depth) = (hello.disk.identity.clone(), hello.disk.cache, hello.depth);
        session.begin(hello)?;
        let taken = self.with_shadow(|shadow, out| shadow.attach(link, &identity, cache, depth, now, out));
        self.announce = Some(link.generation);
        taken.map_err(|why| match why {
            NotTaken::Old => Cause::GivenUp.into(),
            NotTaken::OtherDisk(mismatch) => Failure::from(mismatch).into(),
        })
    }

    /// A record of the service; how many bytes were copied for it.
    fn heard(&mut self, record: FromService, now: u64, data: &mut dyn GuestData) -> Result<u64, LinkError> {
        let LinkState::Up { session, .. } = &mut self.link else { return Ok(0) };
        let (tag, errno, bytes) = match record {
            FromService::Done { tag, errno, bytes } => (tag, errno, bytes),
            FromService::AtWork { tag } => {
                session.check_sent(tag).map_err(Failure::from)?;
                let link = session.id();
                self.with_shadow(|shadow, out| shadow.at_work(link, tag, now, out))?;
                return Ok(0);
            }
            FromService::CacheLost if session.cache_is_lost() => {
                self.shadow.cache_lost(session.id());
                // A walk of the whole log: enough for one turn, so that a driver VM which says so at each answer holds up no other device.
                return Ok(COPY_BUDGET);
            }
            FromService::CacheLost => return Ok(0),
        };
        let flight = session.take_flight(tag).map_err(Failure::from)?;
        let copied = if flight.brings == Brings::Nothing { 0 } else { flight.bytes };
        let answered = match errno {
            0 => self.done(tag, &flight, bytes, now, data),
            errno => self.answered(tag, Answer::Failed(ErrorClass::of_errno(errno)), now),
        };
        if let LinkState::Up { session, .. } = &mut self.link {
            session.finish(flight);
        }
        answered.map(|()| copied)
    }

    /// An order is done: takes what was read.
    fn done(
        &mut self,
        tag: Tag,
        flight: &Flight,
        bytes: u64,
        now: u64,
        data: &mut dyn GuestData,
    ) -> Result<(), LinkError> {
        let LinkState::Up { session, .. } = &mut self.link else { return Ok(()) };
        let is_whole = bytes == flight.bytes;
        if is_whole && flight.brings == Brings::Data {
            let wanted = self.shadow.read_into(session.id(), tag);
            if let Some(span) = wanted.filter(|span| span.sectors * SECTOR_BYTES == bytes) {
                data.copy_to_guest(span, &session.data_of(flight)?);
            }
        }
        if flight.brings == Brings::Sample {
            if !is_whole {
                let wrong = Violation::WrongLength { expected: flight.bytes, got: bytes };
                return Err(Failure::from(wrong).into());
            }
            let (link, there) = (session.id(), session.data_of(flight)?);
            let mut block = vec![0; there.len()];
            there.copy_to(&mut block);
            let found = Fingerprint::of(&block);
            return Ok(self.with_shadow(|shadow, out| shadow.sampled(link, tag, found, now, out))?);
        }
        self.answered(tag, Answer::Done { bytes }, now)
    }

    fn answered(&mut self, tag: Tag, answer: Answer, now: u64) -> Result<(), LinkError> {
        let Some(link) = self.link.id() else { return Ok(()) };
        Ok(self.with_shadow(|shadow, out| shadow.answered(link, tag, answer, now, out))?)
    }

    /// Hands orders over as far as there is room for them.
    fn hand_over(&mut self, now: u64, data: &mut dyn GuestData) -> Result<Left, LinkError> {
        let LinkState::Up { session, .. } = &mut self.link else { return Ok(Left::Nothing) };
        let (mut out, mut copied) = (Out::default(), 0);
        let mut put = || {
            while session.has_room() && copied < COPY_BUDGET {
                let copy = |span| self.copies.copy(data, span);
                let Some(order) = self.shadow.next_order(now, copy, &mut out) else { break };
                copied += order.command.bytes();
                session.put(&order, data)?;
                if !session.has_room() {
                    session.send()?;
                }
            }
            session.send()
        };
        let result = put();
        self.done.append(&mut out.done);
        result?;
        Ok(if copied < COPY_BUDGET { Left::Nothing } else { Left::More })
    }

    /// Says what the supervisor waits for.
    fn report(&mut self) {
        let serves = matches!(self.shadow.mode(), ModeName::Replaying | ModeName::Passive | ModeName::Quiescing);
        if let Some(generation) = self.announce.filter(|_| serves) {
            self.announce = None;
            let counts = since(self.shadow.counts(), self.counted);
            (self.listener)(Notice::Live(generation, counts));
        }
        if self.owes_rest && self.shadow.is_at_rest() {
            self.owes_rest = false;
            (self.listener)(Notice::AtRest { stable: true });
        }
    }
}
