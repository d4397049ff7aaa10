//! The shadow of a disk: one for each disk of a guest, through every life of its driver VM, whatever the controller's model.
//!
//! ```text
//!            attach               samples read            nothing owed, nothing to repeat
//!   Masking ───────> Identifying ─────────────> Replaying ───────────────────────────────> Passive
//!    ^  ^                 │ lost                    │ lost                                    │ lost
//!    │  └─────────────────┴─────────────────────────┴─────────────────────────────────────────┘
//!    └── any failure          each ── quarantine ──> Quarantined ── attach ──> as from Masking
//! ```
//! *Passive* it records each request in flight, and keeps everything that was written and is not known to be stable, in a log
//! (`extents`). *Masking* it lets new requests wait. *Replaying* it writes again what the log owes, issues again what was in
//! flight, and serves meanwhile what is clear of both. *Quiescing* (Passive, before a deliberate reset, or when the guest has ended) it
//! hands over no request, and makes everything stable. The guest sees no error, no reset and no older content; only time.
//!
//! Invariants:
//! - *Durability*: the last acknowledged content of each sector is on the medium by a flush that succeeded in a life after that write
//!   was done in it, or in the log. So a device may lose its volatile cache in the reset.
//! - *Register*: a read returns the last acknowledged content, or that of a write which it overlaps in time; once a read has returned
//!   a write, no later one returns an older write, over any number of lives. A write that *failed* leaves sectors of which this cannot
//!   be said until they are written again, as on any disk; content that the log has there is written again at once.
//! - *Flush*: when a flush is acknowledged, every write acknowledged before it was taken is on the medium (virtio 1.2, section 5.2.6.2).
//! - *Bound*: copies and extents stay within [`Limits`].
//! - *Silence*: no request fails because a driver VM did.
//!
//! The rules by which they hold stand where they are obeyed: overlap in `queue`, the log in `extents`, flushes in `epochs`, the order
//! of hand-over in `order`, answers and errors in `answer` and [`errors`], life and death in `outage`, [`bounds`], [`identity`].
//!
//! Taken as true: a completion is honest, the driver did not change the data on their way, the kernel reports the cache correctly. Time
//! is `CLOCK_MONOTONIC` in nanoseconds, given by the caller. The caller keeps the guest's memory and the driver VM's pool, and copies:
//! a write goes into a private copy when it is handed over, once, and that copy is what is logged and issued again. What the caller
//! owes the shadow, and the driver VM's end owes both:
//! - a life's device is fenced and reset before the next one is attached, and a disk is reported after its probe, never before;
//! - [`BlockShadow::cache_lost`] comes before any answer that the device gave after its own driver had begun to reset it;
//! - nothing of an earlier connection is on its way to the disk when the next is attached.

/// Whether the model test breaks this rule on purpose. Never outside that test.
#[cfg(test)]
macro_rules! broken {
    ($rule:ident) => {
        $crate::block::tests::broken::is_broken($crate::block::tests::broken::Rule::$rule)
    };
}
#[cfg(not(test))]
macro_rules! broken {
    ($rule:ident) => {
        false
    };
}

mod answer;
pub mod bounds;
mod buffers;
pub mod disk;
mod epochs;
pub mod errors;
pub mod exchange;
mod extents;
mod guest;
pub mod identity;
mod life;
mod order;
mod outage;
mod overlap;
mod queue;
pub mod range;
#[cfg(test)]
mod tests;

pub use bounds::Limits;
pub use disk::{Disk, MAX_SERIAL};
pub use errors::{ErrorClass, Failure, Violation};
pub use exchange::{
    Access, Answer, CachePolicy, Command, Data, Done, Fingerprint, GuestSpan, Order, Out, Payload, Slice, Status, Tag,
    Token, WriteCache,
};
pub use identity::{Identity, Mismatch, Window};
pub use outage::NotTaken;
pub use range::{SECTOR_BYTES, SectorRange};

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Generation, LinkId};
use epochs::Epochs;
use errors::Bad;
use extents::Log;
use identity::Samples;
use life::Life;
use queue::{Queue, RequestId};
use range::RangeSet;

/// What the shadow does, as users see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModeName {
    /// There is no driver VM: requests wait.
    Masking,
    /// Making sure that it is the same disk.
    Identifying,
    /// Writing again what is owed, and serving what is clear of it.
    Replaying,
    /// Recording.
    Passive,
    /// Coming to rest before a deliberate reset.
    Quiescing,
    /// Given up for now: requests fail, the log is kept.
    Quarantined,
}

impl ModeName {
    /// In lower case, as in `umbra status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Masking => "masking",
            Self::Identifying => "identifying",
            Self::Replaying => "replaying",
            Self::Passive => "passive",
            Self::Quiescing => "quiescing",
            Self::Quarantined => "quarantined",
        }
    }
}

/// What happened, summed over the shadow's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Orders that were in flight when a life was lost, and were kept for the next.
    pub kept_in_flight: u64,
    /// Sectors of the log that were written again.
    pub rewritten_sectors: u64,
    /// Flushes handed to driver VMs.
    pub flushes: u64,
    /// Those among them that no request waited for.
    pub own_flushes: u64,
    /// Flushes that failed.
    pub failed_flushes: u64,
    /// Suspect errors that no guest saw.
    pub masked_errors: u64,
    /// Requests that failed.
    pub failed_requests: u64,
    /// Sectors that were acknowledged, and could not be written again.
    pub lost_sectors: u64,
    /// Writes under way when the guest reset its device, and carried to their end.
    pub orphans: u64,
}

/// A request that is not answered yet.
#[derive(Clone, Copy, Debug)]
struct Pending {
    token: Token,
    /// What is to be done where; none for a flush.
    access: Option<(Access, SectorRange)>,
    /// Parts that are not done.
    left: u64,
    /// The worst of those that are.
    status: Status,
}

impl Pending {
    /// Where it changes the medium, if it does.
    fn changes(&self) -> Option<SectorRange> {
        self.access.filter(|(access, _)| access.changes()).map(|(_, range)| range)
    }
}

/// Whether there is a life.
#[derive(Clone, Debug)]
enum State {
    Masking,
    Alive(Box<Life>),
    Quarantined,
}

/// How the replay goes on.
#[derive(Clone, Copy, Debug, Default)]
struct Replay {
    /// Where the search for the next owed extent begins. Kept over deaths: what was in flight at one goes last in the next life, so
    /// that the others show whether that life works at all.
    cursor: u64,
    /// Something of an earlier life is still to be done, as of the last answer.
    is_under_way: bool,
    /// A life died replaying: one order at a time until the replay is over.
    one_by_one: bool,
    /// The last order was the guest's, so that the next one is the log's.
    is_logs_turn: bool,
}

/// The shadow of one disk of a guest; `P` is what keeps a private copy.
#[derive(Clone, Debug)]
pub struct BlockShadow<P> {
    identity: Identity,
    policy: CachePolicy,
    limits: Limits,
    /// Whether the guest's driver sends flushes (`VIRTIO_BLK_F_FLUSH` accepted).
    guest_flushes: bool,
    state: State,
    /// The newest link that was given up, and with it all before.
    barred: Option<LinkId>,
    next_request: u64,
    requests: BTreeMap<RequestId, Pending>,
    queue: Queue,
    log: Log<P>,
    lost: RangeSet,
    bad: Bad,
    epochs: Epochs,
    samples: Samples,
    replay: Replay,
    /// A deliberate reset is to come: no request of the guest is handed over, and at this time patience ends, ns.
    rest_by: Option<u64>,
    /// The guest has ended: as before a deliberate reset, in this life and in those behind it.
    has_ended: bool,
    counts: Counts,
}

impl<P: Payload> BlockShadow<P> {
    /// For the disk that the first driver VM reported; the guest sees this disk for its life. Masking at first.
    pub fn new(identity: Identity, policy: CachePolicy, limits: Limits) -> Self {
        Self {
            identity,
            policy,
            limits: limits.sound(),
            guest_flushes: true,
            state: State::Masking,
            barred: None,
            next_request: 0,
            requests: BTreeMap::new(),
            queue: Queue::default(),
            log: Log::default(),
            lost: RangeSet::default(),
            bad: Bad::default(),
            epochs: Epochs::default(),
            samples: Samples::default(),
            replay: Replay::default(),
            rest_by: None,
            has_ended: false,
            counts: Counts::default(),
        }
    }

    fn life(&self) -> Option<&Life> {
        match &self.state {
            State::Alive(life) => Some(life),
            State::Masking | State::Quarantined => None,
        }
    }

    fn life_mut(&mut self) -> Option<&mut Life> {
        match &mut self.state {
            State::Alive(life) => Some(life),
            State::Masking | State::Quarantined => None,
        }
    }

    /// The driver VM's life that serves.
    fn generation(&self) -> Option<Generation> {
        self.life().map(|life| life.link.generation)
    }

    /// Whether something of an earlier life is still to be done before the present one only records.
    fn is_replaying(&self) -> bool {
        self.log.owes_any() || self.queue.has_again() || self.epochs.is_repeated() || !self.samples.are_checked()
    }

    /// Whether no request of the guest is handed over, and everything is to become stable.
    fn rests(&self) -> bool {
        self.rest_by.is_some() || self.has_ended
    }

    /// Whether a write is acknowledged only when a flush has made it stable: the specification asks for that where the guest's driver
    /// does not flush (virtio 1.2, section 5.2.6.2), users by [`CachePolicy::Through`].
    fn is_stable_first(&self) -> bool {
        !broken!(ThroughIsNotAwaited) && (self.policy == CachePolicy::Through || !self.guest_flushes)
    }

    /// The disk that the guest sees.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What the shadow does.
    pub fn mode(&self) -> ModeName {
        match &self.state {
            State::Masking => ModeName::Masking,
            State::Quarantined => ModeName::Quarantined,
            State::Alive(_) if !self.samples.are_checked() => ModeName::Identifying,
            State::Alive(_) if self.is_replaying() => ModeName::Replaying,
            State::Alive(_) if self.rests() => ModeName::Quiescing,
            State::Alive(_) => ModeName::Passive,
        }
    }

    /// The link that serves.
    pub fn link(&self) -> Option<LinkId> {
        self.life().map(|life| life.link)
    }

    /// Orders in flight.
    pub fn in_flight(&self) -> usize {
        self.life().map_or(0, Life::in_flight)
    }

    /// Requests of the guest that are not answered.
    pub fn pending(&self) -> usize {
        self.requests.len()
    }

    /// Bytes of memory of all private copies, those of writes in flight included.
    pub fn kept_bytes(&self) -> u64 {
        self.log.kept_bytes()
    }

    /// Extents of the log.
    pub fn logged_extents(&self) -> usize {
        self.log.len()
    }

    /// Bytes to be written again; while there is no life, all that is not stable.
    pub fn owed_bytes(&self) -> u64 {
        self.log.owed_sectors() * SECTOR_BYTES
    }

    /// Ranges that were acknowledged and could not be written again: reads of them fail until they are written again.
    pub fn lost_ranges(&self) -> impl Iterator<Item = SectorRange> {
        self.lost.iter()
    }

    /// Blocks by which the disk is recognised.
    pub fn samples(&self) -> usize {
        self.samples.len()
    }

    /// What happened.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}
