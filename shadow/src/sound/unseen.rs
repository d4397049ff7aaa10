//! What a guest may not have seen yet of the messages that it got back.
//!
//! Linux knows the position of a stream modulo its buffer (`virtsnd_pcm_msg_complete`, `snd_pcm_indirect_playback_pointer`). A guest
//! that gets a whole buffer back between two looks at it sees that nothing has moved: it waits for the device, and the device for
//! it, for ever. That takes a guest whose processor is away for as long as its buffer lasts, while the card plays on, or a card or
//! a process of ours that was late and gives many messages back at once. So the last message that a guest waits for stays until it
//! has looked, where a whole buffer would be complete with it. A player sees this at its end, and where it is too late anyway, as a
//! position that moves a moment later.

use super::params::Params;

/// How long a guest may need to look, after it has taken a message from its queue: for a piece of deferred work.
const LOOK_NS: u64 = 20_000_000;
/// How often it is found out whether a guest has taken what it got back, while a message stays for it.
const AGAIN_NS: u64 = 5_000_000;
/// Longest time for which a message stays: for a guest that takes nothing from its queue, or does not show that it does.
const STAYS_AT_MOST_NS: u64 = 1_000_000_000;

/// The messages of one stream. Invariant: `seen <= given <= handed`, all bytes since the stream was cleared.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unseen {
    /// Bytes of all messages of the guest.
    handed: u64,
    /// Of those that it has back.
    given: u64,
    /// As much of that it has surely seen.
    seen: u64,
    /// When it last got a message back.
    given_at: u64,
    /// When it was first known to have taken that.
    taken_at: Option<u64>,
    /// When that was last found out.
    asked_at: u64,
}

impl Unseen {
    /// The guest hands over a message of so many bytes. It has seen that there is room in its buffer for it.
    pub(super) fn hand(&mut self, bytes: usize, params: &Params) {
        self.handed += bytes as u64;
        self.seen = self.seen.max(self.handed.saturating_sub(params.buffer_bytes.into()).min(self.given));
    }

    /// Gives back the message of so many bytes, the `last` one that the guest waits for or another; false if it is to stay for now.
    pub(super) fn give(&mut self, bytes: usize, last: bool, params: &Params, now: u64) -> bool {
        if now >= self.latest() || self.taken_at.is_some_and(|at| now >= at.saturating_add(LOOK_NS)) {
            self.seen = self.given;
        }
        let (given, buffer) = (self.given + bytes as u64, u64::from(params.buffer_bytes));
        // A guest whose messages are whole buffers has no such position.
        if last && (bytes as u64) < buffer && given - self.seen >= buffer {
            return false;
        }
        (self.given, self.given_at, self.taken_at, self.asked_at) = (given, now, None, now);
        true
    }

    /// The guest has taken `all` that it got back from its queue, as far as it shows, or not.
    pub(super) fn taken(&mut self, all: bool, now: u64) {
        self.asked_at = now;
        self.taken_at = self.taken_at.filter(|_| all).or(all.then_some(now));
    }

    /// Nobody has found out.
    pub(super) fn not_asked(&mut self, now: u64) {
        self.asked_at = self.asked_at.max(now);
    }

    /// When a message that stays is to be looked at again.
    pub(super) fn again_at(&self) -> u64 {
        let again = self.taken_at.map_or(self.asked_at.saturating_add(AGAIN_NS), |at| at.saturating_add(LOOK_NS));
        again.min(self.latest())
    }

    fn latest(&self) -> u64 {
        self.given_at.saturating_add(STAYS_AT_MOST_NS)
    }
}
