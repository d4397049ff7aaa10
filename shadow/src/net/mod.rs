//! The shadow of a network device: one per guest device, through every life of its driver VM.
//!
//! ```text
//!                 GoLive(l)                 Drained
//!      Masking ──────────────> Replaying(l) ─────────> Passive(l)
//!       ^   ^ │                  │ ^   │ Lost(l)          │ Lost(l)
//!       │   └─│──────────────────│─│───┘                  │
//!       │     │       CarrierDown│ │CarrierUp             │
//!       │     │ GoLive(l)        v │                      │
//!       │     └─────────────> WaitingCarrier(l) ──┐       │
//!       │       no carrier                        │Lost(l)│
//!       └─────────────────────────────────────────┴───────┘
//!      each ── Quarantine ──> Quarantined ── GoLive(l) ──> as from Masking
//! ```
//! It starts in Masking, before the first driver VM. Invariants: a frame that was handed to a driver VM is never
//! handed out again; none of the log is handed to a NIC without carrier, and few to one that may not forward yet ([`pacing`]);
//! logged frames leave in the order in which they came; the log is bounded ([`log::MAX_BYTES`],
//! [`log::MAX_FRAMES`]); `logged = replayed + dropped + frames in the log now`; an event of a link that was
//! given up changes nothing.

pub mod log;
pub mod pacing;
pub mod rx_mode;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Generation, LinkId};
use log::TransmitLog;
use pacing::Pacing;
use rx_mode::{Mac, RxFilter};

/// What happened to frames during outages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaskedCounts {
    /// Accepted from the guest into the log.
    pub logged: u64,
    /// Sent: handed from the log to a new driver VM whose NIC had a carrier. Frames that wait in the log are not among them.
    pub replayed: u64,
    /// Lost from the log: it was full (oldest first), or its frames were suspects, or there was a quarantine.
    pub dropped: u64,
    /// Handed to a driver VM that died before it gave the buffer back; never sent again.
    pub unknown: u64,
}

impl MaskedCounts {
    /// Both together. Whoever has said them may have said anything: no count overflows.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            logged: self.logged.saturating_add(other.logged),
            replayed: self.replayed.saturating_add(other.replayed),
            dropped: self.dropped.saturating_add(other.dropped),
            unknown: self.unknown.saturating_add(other.unknown),
        }
    }
}

/// The mode, with what exists only in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// The driver VM is away: frames go into the log.
    Masking,
    /// The driver VM is ready and its NIC has no carrier: frames go on into the log.
    WaitingCarrier { link: LinkId, in_flight: u64 },
    /// The log is being handed to the driver VM; the guest's new frames wait in its queue.
    Replaying { link: LinkId, in_flight: u64 },
    /// Frames pass by.
    Passive { link: LinkId, in_flight: u64 },
    /// There will be no driver VM for now: link down, frames are discarded.
    Quarantined,
}

impl Mode {
    fn is_of(self, generation: Generation) -> bool {
        self.link().is_some_and(|link| link.generation == generation)
    }

    fn link(self) -> Option<LinkId> {
        match self {
            Self::Passive { link, .. } | Self::Replaying { link, .. } | Self::WaitingCarrier { link, .. } => Some(link),
            Self::Masking | Self::Quarantined => None,
        }
    }

    fn in_flight(self) -> u64 {
        match self {
            Self::Passive { in_flight, .. }
            | Self::Replaying { in_flight, .. }
            | Self::WaitingCarrier { in_flight, .. } => in_flight,
            Self::Masking | Self::Quarantined => 0,
        }
    }
}

/// What moves the state machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The driver VM behind this link is ready for the log, then for live frames.
    GoLive(LinkId),
    /// The NIC of this generation has found its carrier.
    CarrierUp(Generation),
    /// The NIC of this generation has lost its carrier.
    CarrierDown(Generation),
    /// The log is empty.
    Drained,
    /// This link is lost. If it has served, or stands for its whole life ([`LinkId::last`]), it and all before it are given up.
    Lost(LinkId),
    /// No further driver VM for now.
    Quarantine,
}

/// The mode's name, as users see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModeName {
    /// Answering the guest in the driver VM's place.
    Masking,
    /// Keeping the log until the NIC of a new driver VM has a carrier.
    WaitingCarrier,
    /// Handing the log to a new driver VM.
    Replaying,
    /// Recording.
    Passive,
    /// Given up.
    Quarantined,
}

impl ModeName {
    /// In lower case, as in `umbra status`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Masking => "masking",
            Self::WaitingCarrier => "waiting-carrier",
            Self::Replaying => "replaying",
            Self::Passive => "passive",
            Self::Quarantined => "quarantined",
        }
    }
}

/// What to do with a frame that the guest transmits now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameVerdict {
    /// Hand it to the driver VM, then say [`NetShadow::handed`].
    Pass,
    /// Give it to [`NetShadow::log`] and complete it.
    Log,
    /// Leave it in the guest's queue: the log goes first.
    Hold,
    /// Complete it and forget it.
    Discard,
}

/// The shadow of one network device.
#[derive(Clone, Debug)]
pub struct NetShadow {
    mode: Mode,
    log: TransmitLog,
    /// The newest link that was given up after it had served, or whose whole life was; it and all older ones are barred.
    barred: Option<LinkId>,
    /// The newest link that was lost before it could serve. Of its life, it and those before are barred; the life before may be the one
    /// that is to serve, and be connected again.
    unserved: Option<LinkId>,
    /// The carrier as the guest sees it.
    link_up: bool,
    /// The carrier as a generation reports it that is not live yet; the last report counts.
    next_carrier: Option<(Generation, bool)>,
    /// The newest generation whose NIC brought something in before it was ordered to go live.
    heard: Option<Generation>,
    pacing: Pacing,
    features: u64,
    mtu: u16,
    filter: RxFilter,
    outage: MaskedCounts,
    total: MaskedCounts,
}

impl NetShadow {
    /// A device with this address and MTU; masking, and link down until its first NIC has a carrier: a driver asks for speed and
    /// duplex when it sees the link come up.
    pub fn new(mac: Mac, mtu: u16) -> Self {
        Self {
            mode: Mode::Masking,
            log: TransmitLog::default(),
            barred: None,
            unserved: None,
            link_up: false,
            next_carrier: None,
            heard: None,
            pacing: Pacing::default(),
            features: 0,
            mtu,
            filter: RxFilter::new(mac),
            outage: MaskedCounts::default(),
            total: MaskedCounts::default(),
        }
    }

    /// The transition function: all changes of mode happen here. Returns false if the event does not apply
    /// (an old generation, or not in this mode); nothing changes then.
    pub fn apply(&mut self, event: Event) -> bool {
        let next = match (self.mode, event) {
            (_, Event::GoLive(l) | Event::Lost(l)) if self.is_barred(l) => return false,
            (Mode::Masking | Mode::Quarantined, Event::GoLive(link)) => {
                let generation = link.generation;
                self.link_up = self.next_carrier.is_none_or(|(g, up)| g != generation || up);
                self.next_carrier = self.next_carrier.filter(|(g, _)| *g > generation);
                let heard = self.link_up && self.heard == Some(generation);
                self.pacing = if heard { Pacing::unbounded() } else { Pacing::default() };
                if self.link_up {
                    Mode::Replaying { link, in_flight: 0 }
                } else {
                    Mode::WaitingCarrier { link, in_flight: 0 }
                }
            }
            (mode, Event::CarrierUp(g)) if mode.is_of(g) && !self.link_up => {
                self.link_up = true;
                match mode {
                    Mode::WaitingCarrier { link, in_flight } => Mode::Replaying { link, in_flight },
                    _ => mode,
                }
            }
            (mode, Event::CarrierDown(g)) if mode.is_of(g) && self.link_up => {
                self.link_up = false;
                match mode {
                    Mode::Replaying { link, in_flight } => {
                        // What it has brought in says nothing about the link that it will find next.
                        self.pacing = Pacing::default();
                        Mode::WaitingCarrier { link, in_flight }
                    }
                    _ => mode,
                }
            }
            (Mode::Replaying { link, in_flight }, Event::Drained) if self.log.is_empty() => {
                Mode::Passive { link, in_flight }
            }
            (Mode::Passive { link, in_flight }, Event::Lost(l)) if l >= link => {
                // A new outage begins; a crash during replay goes on with the old one.
                self.outage = MaskedCounts::default();
                self.give_up(l, in_flight);
                Mode::Masking
            }
            (Mode::Replaying { link, in_flight } | Mode::WaitingCarrier { link, in_flight }, Event::Lost(l))
                if l >= link =>
            {
                self.give_up(l, in_flight);
                Mode::Masking
            }
            (Mode::Masking | Mode::Quarantined, Event::Lost(l)) => {
                if l == LinkId::last(l.generation) {
                    self.give_up(l, 0);
                } else {
                    self.unserved = Some(l);
                }
                self.mode
            }
            (Mode::Quarantined, Event::Quarantine) => return false,
            (mode, Event::Quarantine) => {
                if matches!(mode, Mode::Passive { .. }) {
                    self.outage = MaskedCounts::default();
                }
                if let Some(link) = mode.link() {
                    self.give_up(link, mode.in_flight());
                }
                self.drop_suspects();
                self.link_up = false;
                Mode::Quarantined
            }
            _ => return false,
        };
        self.mode = next;
        true
    }

    /// True if a driver VM may still come to serve by this link: it is not given up and not older than one that serves.
    pub fn would_serve(&self, link: LinkId) -> bool {
        !self.is_barred(link) && self.link().is_none_or(|serving| link > serving)
    }

    fn is_barred(&self, link: LinkId) -> bool {
        let of_its_life = self.unserved.filter(|lost| lost.generation == link.generation);
        self.barred.max(of_its_life).is_some_and(|barred| link <= barred)
    }

    fn give_up(&mut self, link: LinkId, in_flight: u64) {
        self.barred = Some(link);
        self.count(|c| c.unknown += in_flight);
    }

    fn count(&mut self, change: impl Fn(&mut MaskedCounts)) {
        change(&mut self.outage);
        change(&mut self.total);
    }

    /// What to do with the guest's next frame.
    pub fn verdict(&self) -> FrameVerdict {
        match self.mode {
            Mode::Masking | Mode::WaitingCarrier { .. } => FrameVerdict::Log,
            Mode::Replaying { .. } => FrameVerdict::Hold,
            Mode::Passive { .. } => FrameVerdict::Pass,
            Mode::Quarantined => FrameVerdict::Discard,
        }
    }

    /// Takes a frame (virtio-net header first) into the log. Only where [`Self::verdict`] says so; otherwise it is ignored
    /// and false returned.
    pub fn log(&mut self, frame: Vec<u8>) -> bool {
        if self.verdict() != FrameVerdict::Log {
            return false;
        }
        let dropped = self.log.push(frame);
        self.count(|c| {
            c.logged += 1;
            c.dropped += dropped;
        });
        true
    }

    /// The next frame to hand over while replaying, at `now` (any clock that does not go back). None: the log is empty, or the
    /// rest of it has to wait ([`Self::is_paced`]).
    pub fn next_replay(&mut self, now: Duration) -> Option<&[u8]> {
        match self.mode {
            Mode::Replaying { .. } if self.pacing.allows(now) => self.log.front(),
            _ => None,
        }
    }

    /// Whether more of the log is kept back than goes out at once, until something comes in from the wire or time has passed.
    pub fn is_paced(&self) -> bool {
        matches!(self.mode, Mode::Replaying { .. }) && self.pacing.is_bounded() && !self.log.is_empty()
    }

    /// The NIC of `generation` has brought in a frame from the wire: it forwards.
    pub fn heard(&mut self, generation: Generation) {
        if self.mode.is_of(generation) {
            if matches!(self.mode, Mode::Replaying { .. }) {
                self.pacing.note_heard();
            }
        } else if !self.is_barred(LinkId::last(generation)) {
            self.heard = self.heard.max(Some(generation));
        }
    }

    /// The frames in the log, oldest first.
    pub fn logged(&self) -> impl Iterator<Item = &[u8]> {
        self.log.iter()
    }

    /// The frame of [`Self::next_replay`] was handed over (it is out of the log from now on).
    pub fn replayed(&mut self) {
        let Mode::Replaying { in_flight, .. } = &mut self.mode else { return };
        if self.log.pop() {
            *in_flight = in_flight.saturating_add(1);
            self.pacing.note_handed();
            self.count(|c| c.replayed += 1);
        }
    }

    /// A frame that cannot be handed to this driver VM was taken from the front of the log and is lost.
    pub fn skip_replay(&mut self) {
        if matches!(self.mode, Mode::Replaying { .. }) && self.log.pop() {
            self.count(|c| c.dropped += 1);
        }
    }

    /// `frames` live frames were handed to the driver VM.
    #[inline]
    pub fn handed(&mut self, frames: u64) {
        if let Mode::Passive { in_flight, .. } = &mut self.mode {
            *in_flight = in_flight.saturating_add(frames);
        }
    }

    /// At the end of a driver VM, before [`Event::Lost`]: of the frames handed over, only `in_flight` have not been
    /// taken. Without this call all are held for unknown.
    pub fn settle(&mut self, in_flight: u64) {
        if let Mode::Passive { in_flight: held, .. }
        | Mode::Replaying { in_flight: held, .. }
        | Mode::WaitingCarrier { in_flight: held, .. } = &mut self.mode
        {
            *held = in_flight.min(*held);
        }
    }

    /// Drops the log (counted): after a crash during replay the requests in it are suspects, and the next
    /// generation is to get the configuration alone. Frames that the dead generation got need no dropping: they
    /// are never handed out again anyway.
    pub fn drop_suspects(&mut self) -> u64 {
        let dropped = self.log.clear();
        self.count(|c| c.dropped += dropped);
        dropped
    }

    /// The carrier that the NIC of `generation` reports. The guest sees only that of the live generation; the carrier of a later
    /// generation is kept until that goes live. Returns true if what the guest sees has changed.
    pub fn carrier(&mut self, generation: Generation, up: bool) -> bool {
        if self.is_barred(LinkId::last(generation)) {
            return false;
        }
        if self.link().is_some_and(|live| generation <= live.generation) {
            return self.apply(if up { Event::CarrierUp(generation) } else { Event::CarrierDown(generation) });
        }
        self.next_carrier = Some((generation, up));
        false
    }

    /// The guest's driver accepted these features: a fresh start, its receive mode is at its default.
    pub fn set_features(&mut self, accepted: u64) {
        self.features = accepted;
        self.filter.reset(accepted);
    }

    /// Features that the guest's driver accepted.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// MTU, bytes.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// The link state that the guest sees.
    pub fn link_up(&self) -> bool {
        self.link_up
    }

    /// The receive mode and filters.
    pub fn filter(&self) -> &RxFilter {
        &self.filter
    }

    /// The receive mode and filters, to be changed by control commands.
    pub fn filter_mut(&mut self) -> &mut RxFilter {
        &mut self.filter
    }

    /// The mode's name.
    pub fn mode(&self) -> ModeName {
        match self.mode {
            Mode::Masking => ModeName::Masking,
            Mode::WaitingCarrier { .. } => ModeName::WaitingCarrier,
            Mode::Replaying { .. } => ModeName::Replaying,
            Mode::Passive { .. } => ModeName::Passive,
            Mode::Quarantined => ModeName::Quarantined,
        }
    }

    /// The link that was ordered to go live, and has not been given up.
    pub fn link(&self) -> Option<LinkId> {
        self.mode.link()
    }

    /// Frames handed to the driver VM that are not known to have been taken.
    pub fn in_flight(&self) -> u64 {
        self.mode.in_flight()
    }

    /// Frames in the log.
    pub fn logged_now(&self) -> usize {
        self.log.len()
    }

    /// Bytes in the log.
    pub fn logged_bytes(&self) -> usize {
        self.log.bytes()
    }

    /// Counters since masking last began.
    pub fn outage(&self) -> MaskedCounts {
        self.outage
    }

    /// Sums over all outages.
    pub fn total(&self) -> MaskedCounts {
        self.total
    }
}
