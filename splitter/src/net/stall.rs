//! Frames that make no progress: a driver VM that offers no buffers while the guest's frames wait for them.
//!
//! Its kernel may be alive, and its agent with it, while its network device stands still. A NIC that is merely slow does
//! not look like this: the driver VM's queueing discipline drops what the NIC cannot take.

use std::time::Duration;

/// Interval of the checks while frames wait.
pub const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Consecutive checks without a frame taken, after the first, before a link counts as stalled: 4 s at least, longer than the
/// default heartbeat time-out, so that a driver VM that gets no processor time is reported as `heartbeat`, not as `link`.
const LOOKS: u32 = 8;

/// Time without progress when a stall is reported.
pub(super) const STALLED_FOR: Duration = LOOK_EVERY.saturating_mul(LOOKS);

/// Watches one direction.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Frames wait for buffers.
    waiting: bool,
    /// Count of frames at the last check; `None` before the first check of this wait.
    frames: Option<u64>,
    looks: u32,
}

impl Progress {
    /// How the last attempt to hand frames over ended.
    pub(super) fn note(&mut self, waiting: bool) {
        self.waiting = waiting;
        if !waiting {
            (self.frames, self.looks) = (None, 0);
        }
    }

    /// Whether checks are needed at all.
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// Checks for progress; `frames` is the number handed over so far. True: stalled, and the watch starts over.
    pub(super) fn look(&mut self, frames: u64) -> bool {
        if !self.waiting || self.frames != Some(frames) {
            (self.frames, self.looks) = (Some(frames).filter(|_| self.waiting), 0);
            return false;
        }
        self.looks += 1;
        let stalled = self.looks >= LOOKS;
        if stalled {
            *self = Self::default();
        }
        stalled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_frames_that_wait_in_vain_are_a_stall() {
        let mut progress = Progress::default();
        assert!((0..100).all(|_| !progress.look(7)), "nothing waits");
        progress.note(true);
        assert!((0..100).all(|n| !progress.look(8 + n)), "each look sees another count");
        let looks = (0..).position(|_| progress.look(107)).unwrap();
        assert_eq!(looks + 1, LOOKS as usize);
        assert!(!progress.look(107), "told once");
    }

    #[test]
    fn buffers_that_come_in_between_begin_it_anew() {
        let mut progress = Progress::default();
        for _ in 0..10 {
            progress.note(true);
            assert!((0..LOOKS).all(|_| !progress.look(0)), "the first look may come at once: it only counts");
            progress.note(false);
        }
    }
}
