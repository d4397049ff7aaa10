//! The transmit log: what the guest sent while its driver VM was away, in order, bounded. When it is full the
//! oldest frames go first: a peer's retransmission asks for the newest state, and a stale frame is worth least.

use std::collections::VecDeque;

/// Most bytes in the log (headers included), 4 MiB: what a 10 Gbit/s sender fills in 3 ms and a window-limited TCP
/// sender never does; small enough that every device of a host can have one.
pub const MAX_BYTES: usize = 4 << 20;

/// Most frames in the log: 16 times a queue of 256, so that the bookkeeping for tiny frames is bounded as well.
pub const MAX_FRAMES: usize = 4096;

/// A bounded queue of frames.
#[derive(Clone, Debug, Default)]
pub struct TransmitLog {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl TransmitLog {
    /// Appends `frame`; returns how many frames were dropped to make room (the frame itself counts if it can
    /// never fit).
    pub fn push(&mut self, frame: Vec<u8>) -> u64 {
        if frame.len() > MAX_BYTES {
            return 1;
        }
        let mut dropped = 0;
        while self.frames.len() >= MAX_FRAMES || self.bytes + frame.len() > MAX_BYTES {
            self.pop();
            dropped += 1;
        }
        self.bytes += frame.len();
        self.frames.push_back(frame);
        dropped
    }

    /// The oldest frame.
    pub fn front(&self) -> Option<&[u8]> {
        self.frames.front().map(Vec::as_slice)
    }

    /// All frames, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.frames.iter().map(Vec::as_slice)
    }

    /// Removes the oldest frame; false if there was none.
    pub fn pop(&mut self) -> bool {
        let Some(frame) = self.frames.pop_front() else { return false };
        self.bytes -= frame.len();
        true
    }

    /// Removes all; returns how many there were.
    pub fn clear(&mut self) -> u64 {
        let count = self.frames.len() as u64;
        *self = Self::default();
        count
    }

    /// Number of frames.
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Sum of the frames' lengths.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}
