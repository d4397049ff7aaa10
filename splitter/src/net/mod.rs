//! The splitter of a network device: the guest's three queues on one side, the driver VM's link on the other, the
//! shadow beside them.
//!
//! It runs in the guest's event loop. Invariants: the guest's device is never reset and its queues outlive every
//! link; the first sign of a lost link switches to masking, before anyone is asked; a frame goes to one driver VM at
//! most; after the switch to a new driver VM the log goes first. Calls never wait and do bounded work; what is left
//! over is done at the next turn of the loop ([`NetSplitter::wake`]).

mod announce;
pub mod features;
pub mod in_flight;
mod next;
mod probe;
mod replay;
pub mod source;
pub mod stall;
mod status;
mod traffic;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use umbra_shadow::net::rx_mode::{Mac, RxFilter};
use umbra_shadow::net::{Event, FrameVerdict, MaskedCounts, ModeName, NetShadow};
use umbra_shadow::{Generation, LinkId};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::call::CallWatch;
use crate::control::{self, Served};
use crate::header::Offloads;
use crate::link::{Cause, Link, LinkEvent, LinkQueue, LinkServer, Outlet, What};
use crate::log_limit::LogLimit;
use crate::pump::{self, Counts, Owner, PumpError, Stop};
use crate::queue::Virtqueue;
use crate::untrusted::Elsewhere;
use in_flight::InFlight;
use next::WaitingLink;
use replay::{Outcome, Replay};
use source::Sources;
use status::Kicks;
pub use status::Status;

/// The guest's queues, with their indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestQueue {
    /// 0: frames to the guest.
    Rx = 0,
    /// 1: frames from the guest.
    Tx = 1,
    /// 2: control commands.
    Control = 2,
}

impl GuestQueue {
    /// All, by index.
    pub const ALL: [Self; 3] = [Self::Rx, Self::Tx, Self::Control];
}

/// Who kicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kicker {
    /// The guest.
    Guest(GuestQueue),
    /// The driver VM.
    Link(LinkQueue),
    /// The driver VM that waits armed, or did when this was watched.
    Spare,
}

/// What the splitter reports. The listener is called in the caller's context and must not call back.
#[derive(Debug)]
pub enum Notice {
    /// The link is set up.
    LinkUp(LinkId),
    /// The link is lost; masking has begun, or, where it was one that waited, nothing has changed.
    LinkLost(LinkId, Cause),
    /// The log is replayed and frames flow; counters of the outage.
    Live(Generation, MaskedCounts),
    /// The armed link of this generation is on the same network as the serving one: it has brought in a frame that the
    /// guest sent there.
    SameNetwork(Generation),
    /// The receive mode has changed.
    RxMode(RxFilter),
    /// The guest's driver takes these offloads.
    Offloads(Offloads),
    /// The device configuration (link state) has changed.
    Config,
    /// The guest uses this address, which is another's on the NIC that it shares, or asks for its frames; it gets neither.
    ForeignAddress(Mac),
}

/// What becomes of the log when a driver VM goes live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Log {
    /// It is replayed.
    Replay,
    /// It is dropped: a driver VM has died while it was replayed, and what is in it is suspect.
    Drop,
}

/// Receives the notices; it must not call the splitter.
pub type Listener = Box<dyn FnMut(Notice) + Send>;

/// A clock that does not go back: the time since a zero of its own.
pub type Clock = Box<dyn Fn() -> Duration + Send>;

/// A link, as far as it has come.
#[derive(Default)]
enum LinkState {
    #[default]
    None,
    /// Being set up; `go_live`: the supervisor has said so already.
    Connecting {
        server: LinkServer,
        go_live: bool,
    },
    Up {
        server: LinkServer,
        link: Box<Link>,
        in_flight: InFlight,
    },
}

impl LinkState {
    fn id(&self) -> Option<LinkId> {
        match self {
            Self::None => None,
            Self::Connecting { server, .. } | Self::Up { server, .. } => Some(server.link()),
        }
    }

    fn generation(&self) -> Option<Generation> {
        self.id().map(|link| link.generation)
    }

    fn take_calls(&mut self) {
        if let Self::Up { link, .. } = self {
            link.take_calls();
        }
    }
}

/// The splitter of one network device.
pub struct NetSplitter {
    shadow: NetShadow,
    guest: [Option<Virtqueue>; 3],
    link: LinkState,
    /// The link of a driver VM that waits to take over.
    next: WaitingLink,
    /// Most bytes of a driver VM's memory.
    link_memory: u64,
    /// Generation whose going live is announced to the network.
    announce: Option<Generation>,
    events: Receiver<LinkEvent>,
    sender: Sender<LinkEvent>,
    wake: EventFd,
    /// Looks after writes to eventfds of driver VMs.
    calls: Arc<CallWatch>,
    /// Kicks that the event loop may still watch.
    retired: Vec<EventFd>,
    listener: Listener,
    outward: Counts,
    inward: Counts,
    kicks: Kicks,
    /// Progress of the frames that go out.
    progress: stall::Progress,
    broken: bool,
    log: LogLimit,
    sources: Sources,
    /// When neighbours were asked last, to show that the NIC forwards.
    asked: Option<Duration>,
    /// Gives the shadow and the guard of sources their times.
    clock: Clock,
}

impl NetSplitter {
    /// A device with this address and MTU, masking.
    pub fn new(mac: Mac, mtu: u16, listener: Listener, clock: Clock) -> std::io::Result<Self> {
        let (sender, events) = channel();
        Ok(Self {
            shadow: NetShadow::new(mac, mtu),
            guest: [None, None, None],
            link: LinkState::None,
            next: WaitingLink::default(),
            link_memory: u64::MAX,
            announce: None,
            events,
            sender,
            wake: EventFd::new(EFD_NONBLOCK)?,
            calls: Arc::new(CallWatch::new()?),
            retired: Vec::new(),
            listener,
            outward: Counts::default(),
            inward: Counts::default(),
            kicks: Kicks::default(),
            progress: stall::Progress::default(),
            broken: false,
            log: LogLimit::default(),
            sources: Sources::new(mac),
            asked: None,
            clock,
        })
    }

    /// The NIC has other ends, with these addresses, which the guest must not use unless it may use `any`.
    pub fn share(&mut self, neighbours: Vec<Mac>, any: bool) {
        self.sources.share(neighbours, any);
    }

    /// The NIC has a spare: when that takes over, hosts behind the guest are announced as well.
    pub fn keep_behind(&mut self) {
        self.sources.keep_behind();
    }

    /// Readable when [`Self::service`] is to be called, or when the set of kicks changed.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// The shadow.
    pub fn shadow(&self) -> &NetShadow {
        &self.shadow
    }

    /// The kicks to watch, edge-triggered (they are never read), each with who it is.
    pub fn kicks(&self) -> impl Iterator<Item = (Kicker, &EventFd)> {
        let guest = GuestQueue::ALL.into_iter().zip(&self.guest);
        let guest = guest.filter_map(|(name, queue)| Some((Kicker::Guest(name), queue.as_ref()?.kick())));
        let link = match &self.link {
            LinkState::Up { link, .. } => vec![(LinkQueue::Rx, link.rx.kick()), (LinkQueue::Tx, link.tx.kick())],
            _ => Vec::new(),
        };
        let link = link.into_iter().map(|(name, kick)| (Kicker::Link(name), kick));
        guest.chain(link).chain(self.next.armed_link().map(|link| (Kicker::Spare, link.tx.kick())))
    }

    /// Kicks that are no longer to be watched. They stay open until this is called.
    pub fn take_retired(&mut self) -> Vec<EventFd> {
        std::mem::take(&mut self.retired)
    }

    /// The guest's driver accepted these features.
    pub fn set_features(&mut self, accepted: u64) {
        self.shadow.set_features(accepted);
        (self.listener)(Notice::Offloads(features::receive(accepted)));
        self.tell_rx_mode();
    }

    /// Takes one of the guest's queues.
    pub fn start_queue(&mut self, name: GuestQueue, queue: Virtqueue) {
        self.stop_queue(name);
        self.guest[name as usize] = Some(queue);
        self.wake_up();
    }

    /// Gives one of the guest's queues up; its next available and used index, if it was there. Its memory is not
    /// touched any more.
    pub fn stop_queue(&mut self, name: GuestQueue) -> Option<(u16, u16)> {
        let queue = self.guest[name as usize].take()?;
        if name == GuestQueue::Tx && self.shadow.verdict() != FrameVerdict::Hold {
            // The frames that waited in it are gone; those of the log wait on.
            self.progress.note(false);
        }
        let position = queue.position();
        self.retired.push(queue.into_kick());
        self.wake_up();
        Some(position)
    }

    /// A new connection with a driver VM. A connection older than what has served is closed; one of a later generation than the
    /// present link waits until that link is lost; one of the same generation takes the present link's place, as does one of an
    /// earlier generation: the present one has only waited so far.
    pub fn attach(&mut self, link: LinkId, connection: UnixStream) {
        let connection = Elsewhere::new(connection);
        self.take_events();
        let mut known = [self.link.id(), self.next.id()].into_iter().flatten();
        let stale = known.any(|known| known.generation == link.generation && known >= link);
        if stale || !self.shadow.would_serve(link) {
            tracing::debug!(%link, "closed the link of an old generation");
            return;
        }
        let started = self.wake.try_clone().and_then(|wake| {
            let outlet = Outlet::new(link, self.sender.clone(), wake);
            LinkServer::start(connection, (features::DRIVER_VM, self.link_memory), outlet)
        });
        match started {
            Ok(server) => self.connecting(server),
            Err(error) => self.lose_new(link, Cause::Protocol(format!("cannot start the link: {error}"))),
        }
    }

    /// The driver VM forwards: replays the log, then goes live. If the link is not up yet, that is done when it is. If the link is
    /// gone, [`Notice::LinkLost`] has said so, and the next link waits for another call.
    pub fn go_live(&mut self, generation: Generation, log: Log) {
        self.take_events();
        self.pass_over(generation);
        if let Some(link) = self.link.id().filter(|link| link.generation == generation)
            && self.shadow.link() != Some(link)
        {
            self.go_live_now(link, log);
        }
    }

    fn go_live_now(&mut self, id: LinkId, log: Log) {
        if log == Log::Drop {
            self.shadow.drop_suspects();
        }
        match &mut self.link {
            LinkState::Connecting { go_live, .. } => *go_live = true,
            LinkState::Up { .. } => {
                let was_up = self.shadow.link_up();
                if self.shadow.apply(Event::GoLive(id)) {
                    self.tell_config(was_up);
                    self.replay();
                }
            }
            LinkState::None => {}
        }
    }

    /// The supervisor gives this generation up.
    pub fn mask(&mut self, generation: Generation) {
        self.take_events();
        self.lose(LinkId::last(generation), Cause::GivenUp);
    }

    /// The carrier that the NIC of `generation` reports. The log waits for it.
    pub fn carrier(&mut self, generation: Generation, up: bool) {
        // What has come in says nothing about a carrier that is lost, or is found now.
        self.inward();
        if self.shadow.carrier(generation, up) {
            (self.listener)(Notice::Config);
            if self.shadow.verdict() == FrameVerdict::Log {
                // A log that waits for a carrier does not wait for the driver VM.
                self.progress.note(false);
            }
            self.replay();
            self.outward();
        }
    }

    /// No further driver VM for now: link down; what the guest sends is discarded.
    pub fn quarantine(&mut self) {
        let was_up = self.shadow.link_up();
        self.next.disarm();
        if let Some(link) = self.link.id() {
            self.lose(link, Cause::GivenUp);
        }
        self.shadow.apply(Event::Quarantine);
        self.tell_config(was_up);
        self.outward();
    }

    /// True if the guest broke a queue's rules: that queue stands still until [`Self::reset`].
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The guest's driver has reset its device.
    pub fn reset(&mut self) {
        self.broken = false;
    }

    /// Whether frames wait for the driver VM: [`Self::check_progress`] is to be called every [`stall::LOOK_EVERY`].
    pub fn waits_for_driver_vm(&self) -> bool {
        self.progress.is_waiting()
    }

    /// Whether a part of the log is kept back: [`Self::go_on_replaying`] is to be called every [`umbra_shadow::net::pacing::STEP`].
    pub fn is_paced(&self) -> bool {
        self.shadow.is_paced()
    }

    /// Continues the replay, after time in which a part of the log was kept back.
    pub fn go_on_replaying(&mut self) {
        self.replay();
    }

    /// Gives a driver VM up that has taken no frame for 4 s though some wait.
    pub fn check_progress(&mut self) {
        // What came meanwhile is no stall.
        self.replay();
        self.outward();
        if self.progress.look(self.outward.frames)
            && let Some(link) = self.link.id()
        {
            self.lose(link, Cause::Stalled(stall::STALLED_FOR));
        }
    }

    /// A kick.
    pub fn kicked(&mut self, source: Kicker) {
        self.kicks.note(source);
        match source {
            Kicker::Guest(GuestQueue::Tx) => self.outward(),
            Kicker::Guest(GuestQueue::Rx) | Kicker::Link(LinkQueue::Tx) => {
                self.replay();
                self.inward();
            }
            Kicker::Guest(GuestQueue::Control) => self.control(),
            Kicker::Link(LinkQueue::Rx) => {
                self.replay();
                self.outward();
            }
            Kicker::Spare => {
                self.discard();
                // It may serve by now.
                self.replay();
                self.inward();
            }
        }
    }

    /// After [`Self::wake`]: news of the link, and work left over.
    pub fn service(&mut self) {
        // Empty if another call was faster.
        let _ = self.wake.read();
        self.take_events();
        self.control();
        self.replay();
        self.outward();
        self.inward();
        self.discard();
    }

    fn wake_up(&self) {
        // Full only if a wake-up is due anyway.
        let _ = self.wake.write(1);
    }

    fn tell_rx_mode(&mut self) {
        self.sources.set_time((self.clock)());
        let mode = self.sources.narrowed(self.shadow.filter());
        (self.listener)(Notice::RxMode(mode));
        self.tell_foreign();
    }

    fn tell_foreign(&mut self) {
        if let Some(mac) = self.sources.take_warning() {
            (self.listener)(Notice::ForeignAddress(mac));
        }
    }

    fn tell_config(&mut self, was_up: bool) {
        if self.shadow.link_up() != was_up {
            (self.listener)(Notice::Config);
        }
    }

    fn take_events(&mut self) {
        while let Ok(LinkEvent { link: id, mut what }) = self.events.try_recv() {
            if let What::Up(link) = &mut what {
                link.set_watch(&self.calls);
            }
            match what {
                _ if self.next.id() == Some(id) => self.next_event(what),
                What::Up(link) if self.link.id() != Some(id) => self.retire(*link),
                _ if self.link.id() != Some(id) => {}
                What::Up(link) => self.link_up(id, link),
                What::Lost(cause) => self.lose(id, cause),
                What::Calls => self.link.take_calls(),
            }
        }
    }

    fn link_up(&mut self, id: LinkId, mut link: Box<Link>) {
        let LinkState::Connecting { server, go_live } = std::mem::take(&mut self.link) else {
            return;
        };
        // What waits there came while nobody was connected: it is of another time.
        let stale = pump::drain(&mut link.tx, features::transmit(link.features), &mut Counts::default(), |_| {});
        self.link = LinkState::Up { server, link, in_flight: InFlight::default() };
        if let Err(fault) = stale {
            return self.lose(id, PumpError { owner: Owner::DriverVm, fault: fault.into() }.into());
        }
        self.wake_up();
        (self.listener)(Notice::LinkUp(id));
        let was_up = self.shadow.link_up();
        if go_live && self.shadow.apply(Event::GoLive(id)) {
            self.tell_config(was_up);
            self.replay();
        }
    }

    fn retire(&mut self, link: Link) {
        self.retired.extend([link.rx.into_kick(), link.tx.into_kick()]);
        self.wake_up();
    }

    /// Gives the link and all older ones up, and masks, or goes over to the one that waits.
    fn lose(&mut self, id: LinkId, cause: Cause) {
        let served = self.part(id, cause);
        self.promote(served);
        self.outward();
    }

    /// Gives the link and all older ones up, and masks; reports that to the supervisor unless the supervisor asked for it. Whether it
    /// has served.
    fn part(&mut self, id: LinkId, cause: Cause) -> bool {
        if self.link.id().is_some_and(|known| known <= id)
            && let LinkState::Up { mut link, in_flight, .. } = std::mem::take(&mut self.link)
        {
            self.shadow.settle(in_flight.count(&mut link.rx));
            self.retire(*link);
            // Nothing waits for this driver VM any more.
            self.progress.note(false);
        }
        let served = self.shadow.mode() == ModeName::Passive;
        let applied = self.shadow.apply(Event::Lost(id));
        if applied && !matches!(cause, Cause::GivenUp) {
            (self.listener)(Notice::LinkLost(id, cause));
        }
        served && applied
    }

    /// Hands the log over, then goes live.
    fn replay(&mut self) {
        if self.shadow.verdict() != FrameVerdict::Hold {
            return;
        }
        if self.announce.is_some() && self.announce == self.link.generation() {
            self.announce = None;
            self.announce_here();
        }
        // First, because it shows whether the NIC forwards.
        self.inward();
        let now = (self.clock)();
        let LinkState::Up { link, in_flight, .. } = &mut self.link else { return };
        let id = link.id;
        let (shadow, counts, asked) = (&mut self.shadow, &mut self.outward, &mut self.asked);
        let outcome = Replay { shadow, link, in_flight, counts, asked }.hand_over(now);
        self.progress.note(matches!(outcome, Ok(Outcome::Full)));
        match outcome {
            Ok(Outcome::Empty) => {
                if self.shadow.apply(Event::Drained) {
                    (self.listener)(Notice::Live(id.generation, self.shadow.outage()));
                    self.outward();
                    self.inward();
                }
            }
            Ok(Outcome::Full | Outcome::Paced) => {}
            Err(error) => self.lose(id, error.into()),
        }
    }

    fn control(&mut self) {
        let Some(queue) = &mut self.guest[GuestQueue::Control as usize] else { return };
        match control::serve(queue, self.shadow.filter_mut()) {
            Ok(Served { changed, more }) => {
                if changed {
                    self.tell_rx_mode();
                }
                if more {
                    self.wake_up();
                }
            }
            Err(fault) => self.break_queue(GuestQueue::Control, &fault),
        }
    }

    /// What follows from a pump's end: more work at the next turn, a lost link, or a broken queue of the guest.
    fn after(&mut self, outcome: Result<Stop, PumpError>, queue: GuestQueue) {
        match outcome {
            Ok(Stop::Budget) => self.wake_up(),
            Ok(Stop::SourceEmpty | Stop::TargetFull) => {}
            Err(error) if error.owner == Owner::Guest => self.break_queue(queue, &error.fault),
            Err(error) => {
                if let Some(link) = self.link.id() {
                    self.lose(link, error.into());
                }
            }
        }
    }

    /// The guest broke its own ring: the queue stands still until its driver resets the device.
    fn break_queue(&mut self, name: GuestQueue, fault: &dyn std::error::Error) {
        let why = fault.source().map(|s| format!(": {s}")).unwrap_or_default();
        self.log.warn(format_args!("the guest broke its network queue {name:?}: {fault}{why}"));
        self.stop_queue(name);
        self.broken = true;
        (self.listener)(Notice::Config);
    }
}
