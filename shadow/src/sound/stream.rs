//! One stream: its life cycle, its parameters, and its playback or capture side. Every message of the guest is
//! checked here before it reaches a side.

use super::capture::Capture;
use super::exchange::{Done, Epoch, Out, Outcome, StreamId, ToCard, Token, Violation};
use super::lifecycle::{State, Step};
use super::params::{Direction, MAX_BUFFER_BYTES, Params, StreamInfo};
use super::playback::Playback;
use super::{Command, Counts, Moved, Policy, Refusal};

#[derive(Debug)]
enum Side {
    Playback(Playback),
    Capture(Capture),
}

#[derive(Debug)]
pub(super) struct Stream {
    id: StreamId,
    info: StreamInfo,
    state: State,
    params: Option<Params>,
    epoch: Epoch,
    /// The guest has stopped, and perhaps closed, the stream; the card plays what it has yet to play.
    tail: bool,
    /// It ran when its card died, or it alone, and its guest has not asked for anything since.
    pub(super) stands_still: bool,
    side: Side,
}

impl Stream {
    pub(super) fn new(id: StreamId, info: StreamInfo, policy: Policy) -> Self {
        let side = match info.direction {
            Direction::Playback => Side::Playback(Playback::new(id, policy)),
            Direction::Capture => Side::Capture(Capture::new(id)),
        };
        Self { id, info, state: State::Unset, params: None, epoch: Epoch(0), tail: false, stands_still: false, side }
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    pub(super) fn moved(&self) -> Moved {
        match &self.side {
            Side::Playback(side) => Moved { played: side.played, recorded: 0 },
            Side::Capture(side) => Moved { played: 0, recorded: side.recorded },
        }
    }

    pub(super) fn counts(&self) -> Counts {
        match &self.side {
            Side::Playback(side) => side.counts,
            Side::Capture(side) => side.counts,
        }
    }

    pub(super) fn playback(&self) -> Option<&Playback> {
        match &self.side {
            Side::Playback(side) => Some(side),
            Side::Capture(_) => None,
        }
    }

    pub(super) fn pending_bytes(&self) -> usize {
        match &self.side {
            Side::Playback(side) => side.pending_bytes(),
            Side::Capture(side) => side.pending_bytes(),
        }
    }

    /// A control request of the guest. `live`: a driver VM listens.
    pub(super) fn command(&mut self, command: Command, now: u64, live: bool, out: &mut Out) -> Result<(), Refusal> {
        let stream = self.id;
        let step = command.step();
        let next = self.state.after(step).ok_or(Refusal::WrongState(self.state))?;
        if self.keeps_tail(step) {
            (self.tail, self.state) = (true, next);
            return Ok(());
        }
        if self.keeps_samples(step) {
            self.prepare_behind(now, live, out);
            self.state = next;
            return Ok(());
        }
        self.cut_tail(now, live, out);
        if let Command::SetParams(params) = command {
            if !params.fit(&self.info) {
                return Err(Refusal::Unsupported);
            }
            self.clear(Outcome::Ok, out);
            self.params = Some(params);
            if live {
                out.to_card.push(ToCard::SetParams { stream, params });
            }
        }
        let Some(params) = self.params else { return Err(Refusal::WrongState(self.state)) };
        match step {
            Step::SetParams => {}
            Step::Prepare => self.prepare(now, live, out),
            Step::Start => {
                match &mut self.side {
                    Side::Playback(side) => side.start(now, live),
                    Side::Capture(side) => side.start(now, live),
                }
                if live {
                    out.to_card.push(ToCard::Start { stream });
                }
            }
            Step::Stop => {
                match &mut self.side {
                    Side::Playback(side) => side.stop(&params, now, out),
                    Side::Capture(side) => side.stop(&params, now, out),
                }
                if live {
                    out.to_card.push(ToCard::Stop { stream });
                }
            }
            Step::Release => {
                self.clear(Outcome::Ok, out);
                if live {
                    out.to_card.push(ToCard::Release { stream });
                }
            }
        }
        self.state = next;
        Ok(())
    }

    /// True if the card is to play on although the guest stops or closes the stream.
    fn keeps_tail(&self, step: Step) -> bool {
        match (step, &self.side) {
            (Step::Stop, Side::Playback(side)) => side.has_tail(),
            (Step::Release, Side::Playback(side)) => self.tail && side.has_tail(),
            _ => false,
        }
    }

    /// True if a player prepares again that has every message back while the card has not played them all: it was late and recovers
    /// from an underrun. (A player that begins a new piece sets parameters.)
    fn keeps_samples(&self, step: Step) -> bool {
        step == Step::Prepare && matches!(&self.side, Side::Playback(side) if side.has_tail())
    }

    /// Prepares behind the samples that are kept; they are played first when the stream starts.
    fn prepare_behind(&mut self, now: u64, live: bool, out: &mut Out) {
        let flowed = self.flows();
        self.tail = false;
        let (Side::Playback(side), Some(params)) = (&mut self.side, &self.params) else { return };
        side.rebase();
        if live {
            if flowed {
                out.to_card.push(ToCard::Stop { stream: self.id });
            }
            self.epoch = Epoch(self.epoch.0.wrapping_add(1));
            out.to_card.push(ToCard::Prepare { stream: self.id, epoch: self.epoch });
            side.refill(self.epoch, params, now, out);
        }
    }

    /// Ends a tail: the stream is then where the guest has it.
    fn cut_tail(&mut self, now: u64, live: bool, out: &mut Out) {
        let Some(params) = self.params.filter(|_| std::mem::take(&mut self.tail)) else { return };
        let stream = self.id;
        if let Side::Playback(side) = &mut self.side {
            side.stop(&params, now, out);
        }
        if live {
            out.to_card.push(ToCard::Stop { stream });
        }
        if !self.state.takes_messages() {
            self.clear(Outcome::Ok, out);
            if live {
                out.to_card.push(ToCard::Release { stream });
            }
        }
    }

    /// True while samples flow: the stream runs, or plays its tail.
    fn flows(&self) -> bool {
        self.state == State::Running || self.tail
    }

    fn prepare(&mut self, now: u64, live: bool, out: &mut Out) {
        self.clear(Outcome::Ok, out);
        if live {
            self.begin_epoch(now, out);
        }
    }

    fn begin_epoch(&mut self, now: u64, out: &mut Out) {
        self.epoch = Epoch(self.epoch.0.wrapping_add(1));
        out.to_card.push(ToCard::Prepare { stream: self.id, epoch: self.epoch });
        match &mut self.side {
            Side::Playback(side) => side.hand_over(self.epoch, now),
            Side::Capture(side) => side.hand_over(self.epoch, now),
        }
    }

    /// The card is gone for good: gives every message back, and starts over.
    pub(super) fn die(&mut self, out: &mut Out) {
        let stands_still = self.stands_still || self.state == State::Running;
        self.clear(Outcome::IoError, out);
        self.reset();
        self.stands_still = stands_still;
    }

    /// The card moves others, not this one: it is dead until its guest asks for something of it. Nobody else is concerned.
    pub(super) fn stuck(&mut self, epoch: Epoch, out: &mut Out) {
        if epoch == self.epoch && self.flows() {
            self.die(out);
            out.to_card.push(ToCard::Release { stream: self.id });
        }
    }

    /// Gives every message back.
    fn clear(&mut self, outcome: Outcome, out: &mut Out) {
        match &mut self.side {
            Side::Playback(side) => side.clear(outcome, out),
            Side::Capture(side) => side.clear(outcome, out),
        }
    }

    /// As new, but for the epoch: messages of the past must not fit. What the guest waited for is forgotten.
    pub(super) fn reset(&mut self) {
        self.clear(Outcome::Ok, &mut Out::default());
        (self.state, self.params, self.tail, self.stands_still) = (State::Unset, None, false, false);
    }

    /// Samples of the guest. `live`: a driver VM listens.
    pub(super) fn play(&mut self, token: Token, samples: Vec<u8>, (now, live): (u64, bool), out: &mut Out) {
        if self.state.takes_messages() {
            self.cut_tail(now, live, out);
        }
        match (self.checked(samples.len()), &mut self.side) {
            (Some(params), Side::Playback(side)) => side.push(token, samples, &params, now, out),
            _ => refuse(token, Outcome::BadMessage, out),
        }
    }

    /// Room of the guest for samples.
    pub(super) fn record(&mut self, token: Token, bytes: usize, now: u64, out: &mut Out) {
        match (self.checked(bytes), &mut self.side) {
            (Some(params), Side::Capture(side)) => side.push(token, bytes, &params, now, out),
            _ => refuse(token, Outcome::BadMessage, out),
        }
    }

    /// The parameters, if a message of `bytes` bytes may come now. A driver may have more under way than its own buffer holds: nothing
    /// forbids it, and some have two whole buffers.
    fn checked(&self, bytes: usize) -> Option<Params> {
        let params = self.params.filter(|_| self.state.takes_messages())?;
        let fits = bytes > 0
            && bytes.is_multiple_of(params.frame_bytes() as usize)
            && self.pending_bytes().saturating_add(bytes) <= MAX_BUFFER_BYTES as usize;
        fits.then_some(params)
    }

    pub(super) fn position(&mut self, epoch: Epoch, heard: u64, now: u64, out: &mut Out) -> Result<(), Violation> {
        match (&mut self.side, &self.params) {
            (Side::Playback(side), Some(params)) => side.report(epoch, heard, params, now, out)?,
            // Under way when the guest reset its device, as at a reboot in the middle of a song.
            (Side::Playback(_), None) => {}
            _ => return Err(Violation::NoSuchStream(self.id.0)),
        }
        if self.tail && matches!(&self.side, Side::Playback(side) if !side.has_tail()) {
            self.cut_tail(now, true, out);
        }
        Ok(())
    }

    pub(super) fn captured(&mut self, epoch: Epoch, samples: &[u8], now: u64, out: &mut Out) -> Result<(), Violation> {
        match (&mut self.side, &self.params) {
            (Side::Capture(side), Some(params)) => side.captured(epoch, samples, params, now, out),
            // As a position that is late.
            (Side::Capture(_), None) => Ok(()),
            _ => Err(Violation::NoSuchStream(self.id.0)),
        }
    }

    pub(super) fn xrun(&mut self) {
        match &mut self.side {
            Side::Playback(side) => side.counts.xruns += 1,
            Side::Capture(side) => side.counts.xruns += 1,
        }
    }

    pub(super) fn mask(&mut self, now: u64, out: &mut Out) {
        match (&mut self.side, &self.params) {
            (Side::Playback(side), Some(params)) => side.mask(params, now, out),
            (Side::Capture(side), Some(_)) => side.mask(now),
            _ => {}
        }
    }

    /// Brings a new driver VM to where this stream is.
    pub(super) fn replay(&mut self, now: u64, out: &mut Out) {
        let stream = self.id;
        let Some(params) = self.params.filter(|_| self.state != State::Unset) else { return };
        out.to_card.push(ToCard::SetParams { stream, params });
        if !self.state.takes_messages() && !self.tail {
            return;
        }
        self.advance(now, out);
        self.begin_epoch(now, out);
        if let Side::Playback(side) = &mut self.side {
            side.refill(self.epoch, &params, now, out);
        }
        if self.flows() {
            out.to_card.push(ToCard::Start { stream });
            if let Side::Playback(side) = &mut self.side
                && side.is_empty()
            {
                // Nothing that it could report on yet.
                side.trust_card();
            }
        }
    }

    /// True while a running stream waits for the new card to take over.
    pub(super) fn waits_for_card(&self) -> bool {
        self.flows()
            && match &self.side {
                Side::Playback(side) => side.waits_for_card(),
                Side::Capture(side) => side.waits_for_card(),
            }
    }

    fn advance(&mut self, now: u64, out: &mut Out) {
        match (&mut self.side, &self.params) {
            (Side::Playback(side), Some(params)) => side.advance(params, now, out),
            (Side::Capture(side), Some(params)) => side.advance(params, now, out),
            _ => {}
        }
    }

    pub(super) fn tick(&mut self, now: u64, out: &mut Out) -> Result<(), Violation> {
        match (&mut self.side, &self.params) {
            (Side::Playback(side), Some(params)) => side.tick(params, now, out),
            (Side::Capture(side), Some(params)) => side.tick(params, now, out),
            _ => Ok(()),
        }
    }

    pub(super) fn taken(&mut self, all: bool, now: u64) {
        match &mut self.side {
            Side::Playback(side) => side.taken(all, now),
            Side::Capture(side) => side.taken(all, now),
        }
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        match (&self.side, &self.params) {
            (Side::Playback(side), Some(params)) => side.deadline(params),
            (Side::Capture(side), Some(params)) => side.deadline(params),
            _ => None,
        }
    }
}

pub(super) fn refuse(token: Token, outcome: Outcome, out: &mut Out) {
    out.done.push(Done { token, outcome, latency_bytes: 0, samples: Vec::new() });
}
