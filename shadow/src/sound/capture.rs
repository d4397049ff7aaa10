//! The capture side of a stream: room that the guest handed over, filled in order by the card's samples, or with
//! silence at the stream's rate while there is no card. A message goes back only when it is full. What the card
//! records while there is no room is kept up to one buffer, then the oldest is lost, as on a card.

use std::collections::VecDeque;

use super::exchange::{Done, Epoch, Out, Outcome, StreamId, Token, Violation};
use super::params::Params;
use super::unseen::Unseen;
use super::{Counts, STALL_LIMIT_NS, START_LIMIT_NS, keep_alive_ns};

#[derive(Debug)]
struct Room {
    token: Token,
    bytes: usize,
    samples: Vec<u8>,
}

impl Room {
    /// Bytes that are still to come.
    fn missing(&self) -> usize {
        self.bytes - self.samples.len()
    }
}

/// Where a running stream's samples come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Nowhere: the stream does not run.
    Halted,
    /// The card.
    Card,
    /// Silence: `made` frames since `since`.
    Silence { since: u64, made: u64 },
}

#[derive(Debug)]
pub(super) struct Capture {
    id: StreamId,
    source: Source,
    rooms: VecDeque<Room>,
    backlog: VecDeque<u8>,
    /// The epoch that the driver VM holds.
    epoch: Option<Epoch>,
    /// The card has sent something in this epoch.
    heard_of: bool,
    done_at: u64,
    unseen: Unseen,
    moved_at: u64,
    pub(super) counts: Counts,
    /// Frames that cards have recorded, ever.
    pub(super) recorded: u64,
}

impl Capture {
    pub(super) fn new(id: StreamId) -> Self {
        Self {
            id,
            source: Source::Halted,
            rooms: VecDeque::new(),
            backlog: VecDeque::new(),
            epoch: None,
            heard_of: false,
            done_at: 0,
            unseen: Unseen::default(),
            moved_at: 0,
            counts: Counts::default(),
            recorded: 0,
        }
    }

    /// Bytes of room that the guest waits for.
    pub(super) fn pending_bytes(&self) -> usize {
        self.rooms.iter().map(|r| r.bytes).sum()
    }

    pub(super) fn clear(&mut self, outcome: Outcome, out: &mut Out) {
        for room in self.rooms.drain(..) {
            out.done.push(Done { token: room.token, outcome, latency_bytes: 0, samples: Vec::new() });
        }
        self.backlog.clear();
        self.unseen = Unseen::default();
        self.source = Source::Halted;
        self.epoch = None;
    }

    pub(super) fn hand_over(&mut self, epoch: Epoch, now: u64) {
        (self.epoch, self.heard_of, self.moved_at) = (Some(epoch), false, now);
    }

    pub(super) fn start(&mut self, now: u64, live: bool) {
        (self.done_at, self.moved_at) = (now, now);
        self.source = if live { Source::Card } else { Source::Silence { since: now, made: 0 } };
    }

    pub(super) fn stop(&mut self, params: &Params, now: u64, out: &mut Out) {
        self.advance(params, now, out);
        self.source = Source::Halted;
        // A stream that is stopped is looked at no more.
        self.unseen = Unseen::default();
        self.fill(&[], params, now, out);
    }

    pub(super) fn mask(&mut self, now: u64) {
        self.epoch = None;
        if self.source == Source::Card {
            self.source = Source::Silence { since: now, made: 0 };
        }
    }

    /// Takes room, checked by the stream: whole frames, within the buffer.
    pub(super) fn push(&mut self, token: Token, bytes: usize, params: &Params, now: u64, out: &mut Out) {
        self.advance(params, now, out);
        self.unseen.hand(bytes, params);
        self.rooms.push_back(Room { token, bytes, samples: Vec::new() });
        let kept: Vec<u8> = std::mem::take(&mut self.backlog).into();
        self.fill(&kept, params, now, out);
    }

    /// True while the next card has not yet sent anything.
    pub(super) fn waits_for_card(&self) -> bool {
        matches!(self.source, Source::Silence { .. })
    }

    pub(super) fn captured(
        &mut self,
        epoch: Epoch,
        samples: &[u8],
        params: &Params,
        now: u64,
        out: &mut Out,
    ) -> Result<(), Violation> {
        if self.epoch != Some(epoch) || self.source == Source::Halted {
            return Ok(());
        }
        if samples.is_empty() || !samples.len().is_multiple_of(params.frame_bytes() as usize) {
            return Err(Violation::Malformed(self.id.0));
        }
        self.advance(params, now, out);
        self.source = Source::Card;
        (self.heard_of, self.moved_at) = (true, now);
        self.recorded += params.frames(samples.len());
        self.fill(samples, params, now, out);
        Ok(())
    }

    pub(super) fn advance(&mut self, params: &Params, now: u64, out: &mut Out) {
        let Source::Silence { since, made } = self.source else { return };
        let due = params.frames_in(now.saturating_sub(since)).max(made);
        self.source = Source::Silence { since, made: due };
        let room: usize = self.rooms.iter().map(Room::missing).sum();
        let bytes = params.bytes(due - made).min(room);
        self.counts.frames_silent += params.frames(bytes);
        self.fill(&params.silence(bytes), params, now, out);
    }

    pub(super) fn tick(&mut self, params: &Params, now: u64, out: &mut Out) -> Result<(), Violation> {
        self.advance(params, now, out);
        self.unseen.not_asked(now);
        self.fill(&[], params, now, out);
        if self.keep_alive_at(params).is_some_and(|at| now >= at)
            && let Some(first) = self.rooms.front()
        {
            let bytes = first.missing();
            self.counts.kept_alive += 1;
            self.counts.frames_silent += params.frames(bytes);
            self.fill(&params.silence(bytes), params, now, out);
        }
        match self.stalled_at() {
            Some(at) if now >= at => {
                Err(Violation::Stalled { stream: self.id.0, ms: (now - self.moved_at) / 1_000_000 })
            }
            _ => Ok(()),
        }
    }

    pub(super) fn deadline(&self, params: &Params) -> Option<u64> {
        let silence = match (self.source, self.rooms.front()) {
            (Source::Silence { since, made }, Some(first)) if first.missing() > 0 => {
                let missing = params.frames(first.missing());
                Some(since.saturating_add(params.nanos(made + missing)))
            }
            _ => None,
        };
        let again = self.is_unseen().then(|| self.unseen.again_at());
        [silence, self.keep_alive_at(params), self.stalled_at(), again].into_iter().flatten().min()
    }

    fn keep_alive_at(&self, params: &Params) -> Option<u64> {
        (self.source == Source::Card && self.rooms.front().is_some_and(|first| first.missing() > 0))
            .then(|| self.done_at.max(self.moved_at).saturating_add(keep_alive_ns(params)))
    }

    /// Room that is full stays until the guest has looked.
    fn is_unseen(&self) -> bool {
        self.rooms.front().is_some_and(|first| first.missing() == 0)
    }

    /// As [`Unseen::taken`].
    pub(super) fn taken(&mut self, all: bool, now: u64) {
        self.unseen.taken(all, now);
    }

    fn stalled_at(&self) -> Option<u64> {
        let limit = if self.heard_of { STALL_LIMIT_NS } else { START_LIMIT_NS };
        (self.epoch.is_some() && self.source != Source::Halted).then(|| self.moved_at.saturating_add(limit))
    }

    fn fill(&mut self, mut samples: &[u8], params: &Params, now: u64, out: &mut Out) {
        while !samples.is_empty() || self.is_unseen() {
            let is_last = self.rooms.len() == 1;
            let Some(first) = self.rooms.front_mut() else { break };
            let (now_in, rest) = samples.split_at(samples.len().min(first.missing()));
            first.samples.extend_from_slice(now_in);
            samples = rest;
            if first.missing() > 0 || !self.unseen.give(first.bytes, is_last, params, now) {
                break;
            }
            if let Some(full) = self.rooms.pop_front() {
                self.done_at = now;
                let done = Done { token: full.token, outcome: Outcome::Ok, latency_bytes: 0, samples: full.samples };
                out.done.push(done);
            }
        }
        self.backlog.extend(samples);
        let excess = self.backlog.len().saturating_sub(params.buffer_bytes as usize);
        self.counts.frames_overrun += params.frames(excess);
        self.backlog.drain(..excess);
    }
}
