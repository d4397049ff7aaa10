//! How fast the log is handed to a driver VM whose NIC has just found its carrier. Pure: times go in.
//!
//! Some NICs, and some switch ports, report a carrier a second or two before they forward. A log that is handed over at once is lost
//! there as a whole. A frame that was handed over is never handed over again (it may have arrived, and a second one may do harm), so
//! the only frames that can still be saved are those that have *not* been handed over. Hence a slow start:
//!
//! - [`BATCH`] frames go at once, and [`BATCH`] more each time that the silence has lasted twice as long: at 100, 200, 400, 800 and
//!   1600 ms. At most 24 frames are lost in a NIC that forwards nothing.
//! - The first frame that comes *in* from the wire shows that the NIC forwards: the rest of the log goes at once. A network that answers
//!   does so within its round-trip time, so that a recovery takes no longer than without this. The splitter asks the guest's neighbours
//!   for an answer, because a guest that only sends would get none.
//! - After [`LONGEST`] without a frame the rest goes too: a silent network is not a reason to keep frames back.
//!
//! A log of [`BATCH`] frames or fewer is not held back at all.

use std::time::Duration;

/// Frames handed over at a time to a NIC from which nothing has come in: enough for the first frame of each of a guest's few
/// conversations, any one of which may draw an answer; few enough to lose.
pub const BATCH: u64 = 4;

/// The first silence after which more frames are handed over, and the interval at which the splitter asks for an answer.
pub const STEP: Duration = Duration::from_millis(100);

/// Longest time that frames are kept back, counted from the first frame of a replay. NICs that were seen to report a carrier too
/// early forwarded one to two seconds later.
pub const LONGEST: Duration = Duration::from_secs(2);

/// The pace of one replay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pacing {
    /// When the first frame was asked for.
    since: Option<Duration>,
    /// Frames handed over.
    handed: u64,
    /// Something has come in, or nothing for too long.
    open: bool,
}

impl Pacing {
    /// No bound: something has come in through this NIC before.
    pub fn unbounded() -> Self {
        Self { open: true, ..Self::default() }
    }

    /// Whether one more frame may be handed over at `now` (any clock that does not go back).
    pub fn allows(&mut self, now: Duration) -> bool {
        let silence = now.saturating_sub(*self.since.get_or_insert(now));
        self.open |= silence >= LONGEST;
        self.open || self.handed < Self::bound(silence)
    }

    /// Frames that may have been handed over after this silence.
    fn bound(silence: Duration) -> u64 {
        let steps = u64::try_from(silence.as_millis() / STEP.as_millis()).unwrap_or(u64::MAX);
        let doublings = u64::BITS - steps.leading_zeros();
        BATCH * (1 + u64::from(doublings))
    }

    /// A frame was handed over.
    pub fn note_handed(&mut self) {
        self.handed = self.handed.saturating_add(1);
    }

    /// A frame has come in from the wire.
    pub fn note_heard(&mut self) {
        self.open = true;
    }

    /// Whether frames may have to wait.
    pub fn is_bounded(&self) -> bool {
        !self.open
    }
}
