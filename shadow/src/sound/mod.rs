//! The sound shadow: one for every card, whatever its model.
//!
//! ```text
//!              replay            every running stream moves
//!   Masking ───────────> Replaying ───────────> Passive      from any: die ──> Dead
//!      ^                     │ mask                │ mask
//!      └─────────────────────┴─────────────────────┘
//! ```
//! *Passive* it records each stream's parameters, state, position, and the periods handed over but not yet heard. *Masking* it
//! answers in the card's place: it consumes playback at the sample rate ([`Policy::Skip`]) or keeps it for the next card
//! ([`Policy::Hold`]), and yields silence to capture. *Replaying* it has sent a new driver VM what to set, refill and start, and
//! goes on as while masking until the card moves. Control requests are answered at once in every mode; a card that cannot follow
//! counts as failed. A stream that the card cannot move, while it moves others, is dead alone. Time is `CLOCK_MONOTONIC` in
//! nanoseconds, given by the caller. Everything kept is bounded: per stream [`params::MAX_BUFFER_BYTES`] that the guest waits for, and
//! [`HELD_MAX_BYTES`] of which it has the messages back.

mod capture;
pub mod exchange;
pub mod lifecycle;
pub mod params;
mod playback;
mod stream;
mod unseen;

pub use exchange::{Done, Epoch, FromCard, Out, Outcome, StreamId, ToCard, Token, Violation};
pub use lifecycle::{State, Step};
pub use params::{Card, Direction, Format, Params, Rate, StreamInfo};
pub use playback::HELD_MAX_BYTES;

use crate::Generation;
use stream::{Stream, refuse};

/// Longest time that a card which has moved before may stand still with samples to play or record; after that it is stuck. Two
/// seconds, because on an overloaded host whole VMs have been seen to stand still for more than one, which is no fault of the
/// driver VM. The keep-alive carries the guest's player over that time.
const STALL_LIMIT_NS: u64 = 2_000_000_000;
/// The same limit before the first movement: codecs may need a while to power up.
const START_LIMIT_NS: u64 = 3_000_000_000;
/// Shortest time that Linux waits for a position to move before it reports `EIO`; with a longer buffer it waits for 1.1 buffers.
/// The keep-alive comes after seven tenths of this or of the buffer, whichever is longer; sooner where a card that has moved stands
/// still ([`standstill_ns`]), later for a message that lasts longer.
const PATIENCE_MIN_NS: u64 = 100_000_000;

fn keep_alive_ns(params: &Params) -> u64 {
    params.buffer_nanos().max(PATIENCE_MIN_NS) / 10 * 7
}

/// Part of its rate by which a card may play too fast, as a divisor: a quarter. AC97's driver measures the card's clock of 48 kHz
/// itself, and believes up to 60 kHz (`sound/pci/intel8x0.c`).
const FASTER: u64 = 4;
/// Time by which a card may be ahead of that rate: a buffer of its own, and what an emulated card makes up for at once.
const AHEAD_NS: u64 = 450_000_000;

/// Most frames that a card can have played in `nanos` nanoseconds.
fn at_most(params: &Params, nanos: u64) -> u64 {
    let frames = params.frames_in(nanos);
    frames.saturating_add(frames / FASTER).saturating_add(params.frames_in(AHEAD_NS))
}

/// Shortest time without movement that is a standstill: cards report every few milliseconds.
const STANDSTILL_MIN_NS: u64 = 20_000_000;

/// Time without movement after which a card stands still: one and a half periods, a quarter of the buffer, or
/// [`STANDSTILL_MIN_NS`], whichever is longest.
fn standstill_ns(params: &Params) -> u64 {
    let periods = params.nanos(params.period_frames()) / 2 * 3;
    periods.max(params.buffer_nanos() / 4).max(STANDSTILL_MIN_NS)
}

/// What becomes of playback during an outage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Stay in real time: what was due during the outage is not heard.
    #[default]
    Skip,
    /// Lose nothing: what the card had not played is played after the outage. Exact up to the card's last position
    /// report: what it played after that is heard twice.
    Hold,
}

/// A control request of the guest for one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Set the parameters.
    SetParams(Params),
    /// Prepare.
    Prepare,
    /// Start.
    Start,
    /// Stop or pause.
    Stop,
    /// Release.
    Release,
}

impl Command {
    fn step(self) -> Step {
        match self {
            Self::SetParams(_) => Step::SetParams,
            Self::Prepare => Step::Prepare,
            Self::Start => Step::Start,
            Self::Stop => Step::Stop,
            Self::Release => Step::Release,
        }
    }
}

/// Why a control request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No such stream (`VIRTIO_SND_S_BAD_MSG`).
    #[error("the card has no such stream")]
    NoSuchStream,
    /// The life cycle has no such step (`VIRTIO_SND_S_BAD_MSG`).
    #[error("not in state {0:?}")]
    WrongState(State),
    /// Parameters that the card does not offer (`VIRTIO_SND_S_NOT_SUPP`).
    #[error("the card does not offer these parameters")]
    Unsupported,
    /// The card is gone for good (`VIRTIO_SND_S_IO_ERR`).
    #[error("the card is gone")]
    Dead,
}

/// What the shadow does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Records; the driver VM of this generation plays.
    Passive(Generation),
    /// Answers in the card's place.
    Masking,
    /// Brings the driver VM of this generation up to date.
    Replaying(Generation),
    /// There will be no card again.
    Dead,
}

/// What happened to samples, in frames, summed over a stream's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Playback that was due while there was no card and was skipped.
    pub frames_skipped: u64,
    /// Silence given to capture.
    pub frames_silent: u64,
    /// Capture lost because the guest gave no room.
    pub frames_overrun: u64,
    /// Messages given back early, to keep the guest's player alive.
    pub kept_alive: u64,
    /// Underruns and overruns that the card reported.
    pub xruns: u64,
}

/// What cards have done, in frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Reported as heard.
    pub played: u64,
    /// Recorded.
    pub recorded: u64,
}

impl std::ops::Add for Counts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            frames_skipped: self.frames_skipped + other.frames_skipped,
            frames_silent: self.frames_silent + other.frames_silent,
            frames_overrun: self.frames_overrun + other.frames_overrun,
            kept_alive: self.kept_alive + other.kept_alive,
            xruns: self.xruns + other.xruns,
        }
    }
}

/// The shadow of one sound card.
#[derive(Debug)]
pub struct SoundShadow {
    card: Card,
    mode: Mode,
    streams: Vec<Stream>,
    /// Messages of streams that stand still.
    stuck: Vec<(StreamId, Token)>,
}

impl SoundShadow {
    /// For `card` as its first driver VM reported it; the guest sees this card for its life. Masking at first.
    pub fn new(card: Card, policy: Policy) -> Self {
        let streams = (0u16..).zip(&card.streams).map(|(id, info)| Stream::new(StreamId(id), *info, policy)).collect();
        Self { card, mode: Mode::Masking, streams, stuck: Vec::new() }
    }

    /// The card that the guest sees.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// What the shadow does.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Where a stream is in its life.
    pub fn state(&self, id: StreamId) -> Option<State> {
        self.stream(id).map(Stream::state)
    }

    /// Frames of a playback stream that were heard, or skipped, since it was prepared.
    pub fn heard(&self, id: StreamId) -> Option<u64> {
        Some(self.stream(id)?.playback()?.heard())
    }

    /// Frames of a playback stream whose messages the guest has back: the position that it sees.
    pub fn given_back(&self, id: StreamId) -> Option<u64> {
        let stream = self.stream(id)?;
        let position = stream.playback()?.given_back();
        Some(if stream.state().takes_messages() { position } else { 0 })
    }

    /// Bytes of samples kept for all playback streams.
    pub fn kept_bytes(&self) -> usize {
        self.streams.iter().filter_map(Stream::playback).map(playback::Playback::kept_bytes).sum()
    }

    /// Bytes of all messages that the guest waits for.
    pub fn pending_bytes(&self) -> usize {
        self.streams.iter().map(Stream::pending_bytes).sum()
    }

    /// What the cards of all generations have played and recorded, summed over all streams.
    pub fn moved(&self) -> Moved {
        self.streams.iter().map(Stream::moved).fold(Moved::default(), |sum, one| Moved {
            played: sum.played + one.played,
            recorded: sum.recorded + one.recorded,
        })
    }

    /// Sums over all streams.
    pub fn counts(&self) -> Counts {
        self.streams.iter().map(Stream::counts).fold(Counts::default(), |sum, one| sum + one)
    }

    /// A control request of the guest.
    ///
    /// # Errors
    /// Why the guest is refused.
    pub fn command(&mut self, id: StreamId, command: Command, now: u64, out: &mut Out) -> Result<(), Refusal> {
        self.free(id, out);
        if self.mode == Mode::Dead {
            return Err(Refusal::Dead);
        }
        let live = self.is_live();
        let answer = self.stream_mut(id).ok_or(Refusal::NoSuchStream)?.command(command, now, live, out);
        // What stops does not wait for the card.
        self.finish_replay();
        answer
    }

    /// Samples that the guest wants played.
    pub fn play(&mut self, id: StreamId, token: Token, samples: Vec<u8>, now: u64, out: &mut Out) {
        let live = self.is_live();
        match self.alive(id) {
            Ok(stream) => stream.play(token, samples, (now, live), out),
            Err(outcome) => self.refuse(id, token, outcome, out),
        }
        self.finish_replay();
    }

    /// Room of `bytes` bytes that the guest wants filled.
    pub fn record(&mut self, id: StreamId, token: Token, bytes: usize, now: u64, out: &mut Out) {
        match self.alive(id) {
            Ok(stream) => stream.record(token, bytes, now, out),
            Err(outcome) => self.refuse(id, token, outcome, out),
        }
    }

    /// A message of the driver VM of `generation`; dropped unless that is the one at work.
    ///
    /// # Errors
    /// When it cannot be true; the caller then masks.
    pub fn from_card(
        &mut self,
        generation: Generation,
        message: FromCard,
        now: u64,
        out: &mut Out,
    ) -> Result<(), Violation> {
        if !matches!(self.mode, Mode::Passive(g) | Mode::Replaying(g) if g == generation) {
            return Ok(());
        }
        let (FromCard::Position { stream: id, .. }
        | FromCard::Captured { stream: id, .. }
        | FromCard::Stuck { stream: id, .. }
        | FromCard::Xrun { stream: id, .. }) = message;
        let stream = self.stream_mut(id).ok_or(Violation::NoSuchStream(id.0))?;
        match message {
            FromCard::Position { epoch, heard, .. } => stream.position(epoch, heard, now, out)?,
            FromCard::Captured { epoch, samples, .. } => stream.captured(epoch, &samples, now, out)?,
            FromCard::Stuck { epoch, .. } => stream.stuck(epoch, out),
            FromCard::Xrun { .. } => stream.xrun(),
        }
        self.finish_replay();
        Ok(())
    }

    /// The driver VM is gone: answer in its place from now on. Idempotent.
    pub fn mask(&mut self, now: u64, out: &mut Out) {
        if !self.is_live() {
            return;
        }
        self.mode = Mode::Masking;
        for stream in &mut self.streams {
            stream.mask(now, out);
        }
    }

    /// The driver VM of `generation` has `card` ready: bring it up to date.
    ///
    /// # Errors
    /// When its card cannot do what the guest was offered; the shadow goes on masking.
    pub fn replay(&mut self, generation: Generation, card: &Card, now: u64, out: &mut Out) -> Result<(), Violation> {
        if !card.covers(&self.card) {
            return Err(Violation::OtherCard(card.name.clone()));
        }
        self.mask(now, out);
        self.mode = Mode::Replaying(generation);
        for stream in &mut self.streams {
            stream.replay(now, out);
        }
        self.finish_replay();
        Ok(())
    }

    /// There will be no card until further notice ([`Self::replay`]): give everything back and refuse what comes; streams start over. A
    /// stream that ran stands still, also when there is a card again, until its guest asks for something: its messages are kept. A guest
    /// that got them back at once would take that for a card as fast as it likes, for Linux does not look at what became of a message.
    /// So its player sees a card that stands still (`EIO`).
    pub fn die(&mut self, out: &mut Out) {
        self.mode = Mode::Dead;
        for stream in &mut self.streams {
            stream.die(out);
        }
    }

    /// A guest that resets its device starts over: streams as new, nothing given back (its queues are gone).
    pub fn reset(&mut self, out: &mut Out) {
        let live = self.is_live();
        self.stuck.clear();
        for (id, stream) in (0u16..).zip(&mut self.streams) {
            stream.reset();
            if live {
                out.to_card.push(ToCard::Release { stream: StreamId(id) });
            }
        }
        self.finish_replay();
    }

    /// The guest has taken from its queues `all` that it got back, as far as it shows, or not: what it has not taken it cannot have
    /// seen. To be told before anything else that happens at `now`.
    pub fn taken(&mut self, all: bool, now: u64) {
        self.streams.iter_mut().for_each(|stream| stream.taken(all, now));
    }

    /// Does what is due at `now`.
    ///
    /// # Errors
    /// When a stream of the card is stuck; the caller then masks.
    pub fn tick(&mut self, now: u64, out: &mut Out) -> Result<(), Violation> {
        let result = self.streams.iter_mut().try_for_each(|stream| stream.tick(now, out));
        self.finish_replay();
        result
    }

    /// When [`Self::tick`] is to be called at the latest.
    pub fn deadline(&self) -> Option<u64> {
        self.streams.iter().filter_map(Stream::deadline).min()
    }

    /// Gives back, or keeps, a message that no stream takes.
    fn refuse(&mut self, id: StreamId, token: Token, outcome: Outcome, out: &mut Out) {
        if self.stream(id).is_some_and(|stream| stream.stands_still) {
            self.stuck.push((id, token));
        } else {
            refuse(token, outcome, out);
        }
    }

    /// The guest asks something of a stream, which stands still no more.
    fn free(&mut self, id: StreamId, out: &mut Out) {
        if let Some(stream) = self.stream_mut(id) {
            stream.stands_still = false;
        }
        for (_, token) in self.stuck.extract_if(.., |(of, _)| *of == id) {
            refuse(token, Outcome::IoError, out);
        }
    }

    fn finish_replay(&mut self) {
        if let Mode::Replaying(generation) = self.mode
            && !self.streams.iter().any(Stream::waits_for_card)
        {
            self.mode = Mode::Passive(generation);
        }
    }

    fn is_live(&self) -> bool {
        matches!(self.mode, Mode::Passive(_) | Mode::Replaying(_))
    }

    fn stream(&self, id: StreamId) -> Option<&Stream> {
        self.streams.get(usize::from(id.0))
    }

    fn stream_mut(&mut self, id: StreamId) -> Option<&mut Stream> {
        self.streams.get_mut(usize::from(id.0))
    }

    fn alive(&mut self, id: StreamId) -> Result<&mut Stream, Outcome> {
        let dead = self.mode == Mode::Dead;
        let stream = self.stream_mut(id).ok_or(Outcome::BadMessage)?;
        if dead || stream.stands_still { Err(Outcome::IoError) } else { Ok(stream) }
    }
}

#[cfg(test)]
mod tests;
