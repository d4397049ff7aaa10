//! The playback side of a stream: what the guest handed over and the card has not played.
//!
//! Three positions, in frames since the guest prepared the stream, never go back and keep this order but for one
//! exception: `heard <= queued`, `given_back <= queued`. As a rule `given_back` follows `heard` by whole periods. The
//! exception is the keep-alive: a blocking write in Linux fails with `EIO` when the position stands still for 1.1
//! buffers (`wait_for_avail` and `snd_pcm_drain` in `sound/core`), so a period is given back before that while the
//! card does not move. Its samples stay here until they are heard; how many may is bounded by [`HELD_MAX_BYTES`] and
//! [`HELD_MAX_MESSAGES`].

use std::collections::VecDeque;

use super::exchange::{Done, Epoch, Out, Outcome, StreamId, ToCard, Token, Violation};
use super::params::Params;
use super::unseen::Unseen;
use super::{Counts, Policy, STALL_LIMIT_NS, START_LIMIT_NS, at_most, keep_alive_ns, standstill_ns};

/// Most samples, in bytes, that are kept for the card although the guest has their messages back: 20 s of CD sound. Beyond that a
/// held stream stands still, and its player sees what a stuck card shows.
pub const HELD_MAX_BYTES: usize = 4 << 20;

/// Most messages whose samples are kept in that way. At 10 ms a period 4 MiB are 2,000 messages; without this bound, as many as
/// there are frames, at a hundred bytes each.
pub(super) const HELD_MAX_MESSAGES: usize = 1 << 15;

/// Bytes of samples in one message of a refill.
const REFILL_BYTES: usize = 64 * 1024;

#[derive(Debug)]
struct Period {
    /// `None` once given back.
    token: Option<Token>,
    /// Position behind its last frame.
    end: u64,
    samples: Vec<u8>,
}

/// What moves the position of a running stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Drive {
    /// Nothing: the stream does not run.
    Halted,
    /// The card's reports.
    Card,
    /// The clock: frame `from` was due at `at`.
    Clock { from: u64, at: u64 },
    /// Nothing but the keep-alive, until the next card reports (policy `hold`).
    Held,
}

/// What the driver VM holds of the present epoch.
#[derive(Clone, Copy, Debug)]
struct Handed {
    epoch: Epoch,
    /// Position of the epoch's first frame.
    base: u64,
    /// Frames handed over.
    frames: u64,
    /// Frames reported as heard.
    heard: u64,
    /// When it could first be played.
    since: u64,
}

#[derive(Debug)]
pub(super) struct Playback {
    id: StreamId,
    policy: Policy,
    drive: Drive,
    periods: VecDeque<Period>,
    /// How many of them, from the front, the guest has back already.
    returned: usize,
    /// Bytes of all of them.
    kept: usize,
    queued: u64,
    given_back: u64,
    /// Where the keep-alive lets the guest's position go, whatever was heard.
    let_go: u64,
    heard: u64,
    /// Where the guest's count begins: what lies before was left behind by a player that prepared again.
    origin: u64,
    handed: Option<Handed>,
    /// When the guest last got a message back, and last handed one over.
    done_at: u64,
    pushed_at: u64,
    unseen: Unseen,
    /// When the card last moved, or was last given a reason to.
    moved_at: u64,
    pub(super) counts: Counts,
    /// Frames that cards have reported as heard, ever.
    pub(super) played: u64,
}

impl Playback {
    pub(super) fn new(id: StreamId, policy: Policy) -> Self {
        Self {
            id,
            policy,
            drive: Drive::Halted,
            periods: VecDeque::new(),
            returned: 0,
            kept: 0,
            queued: 0,
            given_back: 0,
            let_go: 0,
            heard: 0,
            origin: 0,
            handed: None,
            done_at: 0,
            pushed_at: 0,
            unseen: Unseen::default(),
            moved_at: 0,
            counts: Counts::default(),
            played: 0,
        }
    }

    /// Frames heard since the guest prepared the stream.
    pub(super) fn heard(&self) -> u64 {
        self.heard.saturating_sub(self.origin)
    }

    /// Frames of the messages that the guest has back.
    pub(super) fn given_back(&self) -> u64 {
        self.given_back.saturating_sub(self.origin)
    }

    /// Bytes that the guest waits for.
    pub(super) fn pending_bytes(&self) -> usize {
        self.periods.iter().skip(self.returned).map(|p| p.samples.len()).sum()
    }

    /// Bytes kept.
    pub(super) fn kept_bytes(&self) -> usize {
        self.kept
    }

    /// The oldest message that the guest waits for.
    fn oldest(&self) -> Option<&Period> {
        self.periods.get(self.returned)
    }

    /// Gives every message back and forgets the samples.
    pub(super) fn clear(&mut self, outcome: Outcome, out: &mut Out) {
        for token in self.periods.drain(..).filter_map(|p| p.token) {
            out.done.push(Done { token, outcome, latency_bytes: 0, samples: Vec::new() });
        }
        (self.returned, self.kept) = (0, 0);
        self.drive = Drive::Halted;
        self.handed = None;
        (self.queued, self.given_back, self.let_go, self.heard, self.origin) = (0, 0, 0, 0, 0);
        self.unseen = Unseen::default();
    }

    /// The guest prepares again and counts from 0; what it left behind ([`Self::has_tail`]) comes first.
    pub(super) fn rebase(&mut self) {
        self.drive = Drive::Halted;
        self.handed = None;
        self.origin = self.queued;
    }

    /// The driver VM holds epoch `epoch` from here on.
    pub(super) fn hand_over(&mut self, epoch: Epoch, now: u64) {
        let frames = self.queued - self.heard;
        self.handed = Some(Handed { epoch, base: self.heard, frames, heard: 0, since: now });
    }

    pub(super) fn start(&mut self, now: u64, live: bool) {
        (self.done_at, self.moved_at) = (now, now);
        // A stream that starts has had all the time in the world to be filled: not draining.
        self.pushed_at = now;
        if let Some(handed) = self.handed.as_mut().filter(|handed| handed.heard == 0) {
            handed.since = now;
        }
        self.drive = if live { Drive::Card } else { self.masked(now) };
    }

    pub(super) fn stop(&mut self, params: &Params, now: u64, out: &mut Out) {
        self.advance(params, now, out);
        self.drive = Drive::Halted;
        // A stream that is stopped is looked at no more.
        self.unseen = Unseen::default();
        self.settle(params, now, out);
    }

    pub(super) fn mask(&mut self, params: &Params, now: u64, out: &mut Out) {
        self.handed = None;
        if self.drive == Drive::Card {
            self.drive = self.masked(now);
        }
        self.settle(params, now, out);
    }

    fn masked(&mut self, now: u64) -> Drive {
        match self.policy {
            Policy::Skip => {
                // What the guest has back already is in the past.
                self.lose_until(self.given_back);
                Drive::Clock { from: self.heard, at: now }
            }
            Policy::Hold => Drive::Held,
        }
    }

    /// Takes samples, checked by the stream: whole frames, within the buffer.
    pub(super) fn push(&mut self, token: Token, samples: Vec<u8>, params: &Params, now: u64, out: &mut Out) {
        self.advance(params, now, out);
        if self.heard == self.queued
            && let Drive::Clock { from, at } = &mut self.drive
        {
            // The clock waited for this.
            (*from, *at) = (self.queued, now);
        }
        let frames = params.frames(samples.len());
        self.pushed_at = now;
        if self.oldest().is_none() {
            // The guest begins to wait just now.
            self.done_at = now;
        }
        self.queued += frames;
        if let Some(handed) = &mut self.handed {
            if handed.base + handed.heard == self.queued - frames {
                self.moved_at = now;
            }
            handed.frames += frames;
            out.to_card.push(ToCard::Play { stream: self.id, epoch: handed.epoch, samples: samples.clone() });
        }
        self.kept += samples.len();
        self.unseen.hand(samples.len(), params);
        self.periods.push_back(Period { token: Some(token), end: self.queued, samples });
        // One that stayed as the last is it no more.
        self.settle(params, now, out);
    }

    /// What the next driver VM needs to go on where this stream is: every sample not yet heard.
    pub(super) fn refill(&mut self, epoch: Epoch, params: &Params, now: u64, out: &mut Out) {
        self.advance(params, now, out);
        self.hand_over(epoch, now);
        self.moved_at = now;
        let (mut position, mut all) = (self.heard, Vec::with_capacity(self.kept));
        for period in &self.periods {
            all.extend_from_slice(&period.samples[skipped(period, position, params)..]);
            position = position.max(period.end);
        }
        // Few messages, however small those of the guest: a service counts them against its host.
        let whole = REFILL_BYTES - REFILL_BYTES % params.frame_bytes() as usize;
        for samples in all.chunks(whole) {
            out.to_card.push(ToCard::Play { stream: self.id, epoch, samples: samples.to_vec() });
        }
    }

    /// True if the guest has every message back although the card has not played them all: it was kept waiting during
    /// an outage and is ahead by that much. Policy `hold` plays on to their end though the guest stops and closes.
    pub(super) fn has_tail(&self) -> bool {
        self.policy == Policy::Hold && self.oldest().is_none() && !self.is_empty()
    }

    /// True while the next card has not yet taken over from the clock.
    pub(super) fn waits_for_card(&self) -> bool {
        matches!(self.drive, Drive::Clock { .. } | Drive::Held)
    }

    /// True if the card has been given all that there is, and that is nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.heard == self.queued
    }

    /// The card drives from now on.
    pub(super) fn trust_card(&mut self) {
        if matches!(self.drive, Drive::Clock { .. } | Drive::Held) {
            self.drive = Drive::Card;
        }
    }

    pub(super) fn report(
        &mut self,
        epoch: Epoch,
        heard: u64,
        params: &Params,
        now: u64,
        out: &mut Out,
    ) -> Result<(), Violation> {
        self.advance(params, now, out);
        let stream = self.id.0;
        let Some(handed) = self.handed.as_mut().filter(|h| h.epoch == epoch) else { return Ok(()) };
        if heard < handed.heard {
            return Err(Violation::PositionBack { stream, before: handed.heard, now: heard });
        }
        if heard > handed.frames {
            return Err(Violation::PositionAhead { stream, heard, handed: handed.frames });
        }
        if heard == handed.heard {
            return Ok(());
        }
        let elapsed = now.saturating_sub(handed.since);
        if heard > at_most(params, elapsed) {
            return Err(Violation::TooFast { stream, heard, ms: elapsed / 1_000_000 });
        }
        self.played += heard - handed.heard;
        handed.heard = heard;
        let position = handed.base + heard;
        self.moved_at = now;
        if matches!(self.drive, Drive::Clock { .. }) {
            // What was due since this card got its samples is heard after all, late.
            let late = self.heard - handed.base;
            self.counts.frames_skipped = self.counts.frames_skipped.saturating_sub(late);
        }
        self.trust_card();
        self.heard = self.heard.max(position);
        self.settle(params, now, out);
        Ok(())
    }

    /// Moves the position to `now` where the clock moves it.
    pub(super) fn advance(&mut self, params: &Params, now: u64, out: &mut Out) {
        if let Drive::Clock { from, at } = self.drive {
            let due = from.saturating_add(params.frames_in(now.saturating_sub(at)));
            if due >= self.queued {
                // The guest is behind: its next frame is due when it comes.
                self.drive = Drive::Clock { from: self.queued, at: now.max(at) };
            }
            self.lose_until(due.min(self.queued));
            self.settle(params, now, out);
        }
    }

    /// As [`Self::advance`], and keeps the guest's player alive while nothing moves.
    pub(super) fn tick(&mut self, params: &Params, now: u64, out: &mut Out) -> Result<(), Violation> {
        self.advance(params, now, out);
        if self.is_unseen() {
            self.unseen.not_asked(now);
            self.settle(params, now, out);
        } else if self.drained_at(params).is_some_and(|at| now >= at) {
            while self.give_back_one(params, now, out) {}
        } else if self.keep_alive_at(params).is_some_and(|at| now >= at) {
            self.give_back_one(params, now, out);
        }
        match self.stalled_at() {
            Some(at) if now >= at => {
                Err(Violation::Stalled { stream: self.id.0, ms: (now - self.moved_at) / 1_000_000 })
            }
            _ => Ok(()),
        }
    }

    /// When [`Self::tick`] has something to do next.
    pub(super) fn deadline(&self, params: &Params) -> Option<u64> {
        let clock = match self.drive {
            Drive::Clock { from, at } if !self.is_unseen() => {
                self.oldest().map(|p| at.saturating_add(params.nanos(p.end.saturating_sub(from))))
            }
            _ => None,
        };
        let again = self.is_unseen().then(|| self.unseen.again_at());
        let others = [self.keep_alive_at(params), self.drained_at(params), self.stalled_at(), again];
        others.into_iter().chain([clock]).flatten().min()
    }

    /// When a period is to be given back although it was not heard: early where the card stands still, so that there is time left
    /// if this process comes late as well; otherwise only when the guest has waited long.
    fn keep_alive_at(&self, params: &Params) -> Option<u64> {
        // A message that itself lasts longer, as one that is a whole buffer, is not late before it can have been heard.
        let lasts = params.nanos(params.frames(self.oldest()?.samples.len()));
        let waited = self.done_at.saturating_add(keep_alive_ns(params).max(lasts / 10 * 12));
        let at = match self.drive {
            Drive::Held => waited,
            Drive::Card if self.handed.is_some_and(|handed| handed.heard > 0) => {
                waited.min(self.done_at.max(self.moved_at).saturating_add(standstill_ns(params)))
            }
            Drive::Card => waited,
            Drive::Halted | Drive::Clock { .. } => return None,
        };
        self.may_give_back(params).then_some(at)
    }

    /// When a held stream is taken to be draining, because its guest did not refill after it got a message back: a player at its
    /// end waits for the whole buffer at once. A player that is merely late still has time: it gets the message after seven tenths
    /// of the buffer, these three tenths follow, and Linux waits for another tenth.
    fn drained_at(&self, params: &Params) -> Option<u64> {
        let patience = params.buffer_nanos() / 10 * 3;
        (self.drive == Drive::Held && self.done_at > self.pushed_at && self.may_give_back(params))
            .then(|| self.done_at.saturating_add(patience))
    }

    fn may_give_back(&self, params: &Params) -> bool {
        let held = self.kept <= params.buffer_bytes as usize + HELD_MAX_BYTES && self.returned < HELD_MAX_MESSAGES;
        self.oldest().is_some() && held && !self.is_unseen()
    }

    /// A message that is due stays until the guest has looked.
    fn is_unseen(&self) -> bool {
        self.oldest().is_some_and(|period| period.end <= self.due())
    }

    /// Position up to which the guest is to have its messages back.
    fn due(&self) -> u64 {
        self.heard.max(self.let_go)
    }

    /// As [`Unseen::taken`].
    pub(super) fn taken(&mut self, all: bool, now: u64) {
        self.unseen.taken(all, now);
    }

    fn stalled_at(&self) -> Option<u64> {
        let handed = self.handed.filter(|h| self.drive != Drive::Halted && h.heard < h.frames)?;
        let limit = if handed.heard == 0 { START_LIMIT_NS } else { STALL_LIMIT_NS };
        Some(self.moved_at.saturating_add(limit))
    }

    fn give_back_one(&mut self, params: &Params, now: u64, out: &mut Out) -> bool {
        if !self.may_give_back(params) {
            return false;
        }
        let Some(period) = self.oldest() else { return false };
        self.let_go = self.let_go.max(period.end);
        self.counts.kept_alive += 1;
        self.settle(params, now, out);
        true
    }

    /// Samples up to `position` will not be heard.
    fn lose_until(&mut self, position: u64) {
        self.counts.frames_skipped += position.saturating_sub(self.heard);
        self.heard = self.heard.max(position);
    }

    /// Gives back what is heard and forgets its samples.
    fn settle(&mut self, params: &Params, now: u64, out: &mut Out) {
        let due = self.due();
        let all = self.periods.len();
        for period in self.periods.iter_mut().skip(self.returned).take_while(|p| p.end <= due) {
            if !self.unseen.give(period.samples.len(), self.returned + 1 == all, params, now) {
                break;
            }
            self.returned += 1;
            let Some(token) = period.token.take() else { continue };
            self.given_back = self.given_back.max(period.end);
            self.done_at = now;
            let ahead = params.bytes(self.given_back.saturating_sub(self.heard));
            out.done.push(Done {
                token,
                outcome: Outcome::Ok,
                latency_bytes: u32::try_from(ahead).unwrap_or(u32::MAX),
                samples: Vec::new(),
            });
        }
        while let Some(period) = self.periods.front().filter(|p| p.end <= self.heard && p.token.is_none()) {
            self.returned -= 1;
            self.kept -= period.samples.len();
            self.periods.pop_front();
        }
    }
}

/// Bytes of `period` that lie before `position`.
fn skipped(period: &Period, position: u64, params: &Params) -> usize {
    let start = period.end - params.frames(period.samples.len());
    params.bytes(position.saturating_sub(start)).min(period.samples.len())
}
