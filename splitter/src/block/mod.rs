//! The block splitter: between a guest's virtio-blk device and the disk service of its driver VM, with a shadow beside.
//!
//! It masks at once when the link ends, whoever notices first, and replays as soon as the service at the next link has greeted with the
//! guest's disk, be it the service of the next driver VM or of the same again; no order is needed. All of it runs in the guest's event
//! loop: the caller puts requests in with [`BlockSplitter::submit`] and [`BlockSplitter::flush`], then calls [`BlockSplitter::service`],
//! which it also does when [`BlockSplitter::wake`] is readable, at a kick of [`BlockSplitter::kicks`], and at
//! [`BlockSplitter::deadline`]; and it takes the finished requests from [`BlockSplitter::take_done`] after each call. Time is
//! `CLOCK_MONOTONIC` in nanoseconds.
//!
//! ```text
//!   guest's buffers ──(private copy, logged)──> piece of the pool ──> driver VM: writes
//!   guest's buffers <────────────────────────── piece of the pool <── driver VM: reads
//! ```
//! Where the disk has no volatile cache there is no private copy. Invariants: nothing waits for the driver VM; the guest's buffers are
//! touched only for a request that is not answered, of a device that was not reset; what a driver VM says is checked for its form here
//! ([`link`], `session`) and for its truth by the shadow. Each call does bounded work; what is left over is done at the next turn
//! ([`BlockSplitter::wake`]). How long a driver VM may take to greet is for the supervisor to bound, who knows when it has booted.

mod data;
pub mod link;
mod notice;
pub mod pool;
mod serve;
mod session;

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use umbra_shadow::block::{
    Access, BlockShadow, CachePolicy, Counts, Disk, Done, Failure, Limits, ModeName, Out, SECTOR_BYTES, SectorRange,
    Token,
};
use umbra_shadow::{Generation, LinkId};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::call::CallWatch;
use crate::link::{Cause, Link, LinkEvent, LinkQueue, LinkServer, Outlet, What};
use crate::untrusted::Elsewhere;
use data::Copies;
pub use data::{GuestData, PrivateCopy};
use link::{LinkError, Port};
pub use notice::{Listener, Notice};
use pool::LARGEST_PIECE;
use session::Session;

/// Virtio features that a driver VM's console device is offered for the two queues of a disk.
pub const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Time after which a due order that found no room is tried again, ns. Room comes with an answer, or with a kick, and then it is tried
/// at once; this only keeps an order that is overdue from being tried without a pause.
const TRY_AGAIN_NS: u64 = 10_000_000;

/// A link, as far as it has come.
#[derive(Default)]
enum LinkState {
    #[default]
    None,
    /// Being set up.
    Connecting(LinkServer),
    Up {
        /// Ends the connection when it is dropped.
        server: LinkServer,
        session: Box<Session>,
    },
}

impl LinkState {
    fn id(&self) -> Option<LinkId> {
        match self {
            Self::None => None,
            Self::Connecting(server) | Self::Up { server, .. } => Some(server.link()),
        }
    }

    fn session(&self) -> Option<&Session> {
        match self {
            Self::Up { session, .. } => Some(session),
            _ => None,
        }
    }
}

/// The splitter of one disk.
pub struct BlockSplitter {
    shadow: BlockShadow<PrivateCopy>,
    copies: Copies,
    link: LinkState,
    /// The newest link that has ended or was given up: no older one is taken.
    barred: Option<LinkId>,
    /// Most bytes of a driver VM's memory.
    driver_memory: u64,
    /// [`Notice::Live`] is owed for this generation.
    announce: Option<Generation>,
    /// [`Notice::AtRest`] is owed.
    owes_rest: bool,
    /// Counters when the splitter began to mask.
    counted: Counts,
    /// When [`Self::service`] was called last, ns.
    serviced: u64,
    events: Receiver<LinkEvent>,
    sender: Sender<LinkEvent>,
    wake: EventFd,
    /// Looks after writes to eventfds of driver VMs.
    calls: Arc<CallWatch>,
    /// Kicks that the event loop may still watch.
    retired: Vec<EventFd>,
    done: Vec<Done>,
    listener: Listener,
}

impl BlockSplitter {
    /// For a guest that sees `disk`. Driver VMs have at most `driver_memory` bytes of memory; a link with more is refused. It masks until
    /// the first link.
    ///
    /// # Errors
    /// There is no descriptor or thread for it.
    pub fn new(
        disk: &Disk,
        policy: CachePolicy,
        limits: Limits,
        driver_memory: u64,
        listener: Listener,
    ) -> std::io::Result<Self> {
        let limits = Limits { part_sectors: limits.part_sectors.min(LARGEST_PIECE / SECTOR_BYTES), ..limits };
        let (sender, events) = channel();
        Ok(Self {
            shadow: BlockShadow::new(disk.identity.clone(), policy, limits),
            copies: Copies::default(),
            link: LinkState::None,
            barred: None,
            driver_memory,
            announce: None,
            owes_rest: false,
            counted: Counts::default(),
            serviced: 0,
            events,
            sender,
            wake: EventFd::new(EFD_NONBLOCK)?,
            calls: Arc::new(CallWatch::new()?),
            retired: Vec::new(),
            done: Vec::new(),
            listener,
        })
    }

    /// The shadow: mode, counters, what is owed.
    pub fn shadow(&self) -> &BlockShadow<PrivateCopy> {
        &self.shadow
    }

    /// The disk as the present driver VM reports it.
    pub fn disk(&self) -> Option<&Disk> {
        self.link.session().and_then(Session::disk)
    }

    /// Whose driver VM serves, since [`Notice::Live`].
    pub fn serving(&self) -> Option<Generation> {
        self.shadow.link().map(|link| link.generation).filter(|_| self.is_live())
    }

    fn is_live(&self) -> bool {
        self.announce.is_none() && self.shadow.link().is_some()
    }

    /// Readable when [`Self::service`] is to be called, or when the set of kicks has changed. Not to be read.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// The kicks to watch, edge-triggered (they are never read).
    pub fn kicks(&self) -> impl Iterator<Item = (LinkQueue, &EventFd)> {
        self.link.session().map(Session::kicks).into_iter().flatten()
    }

    /// Kicks that are no longer to be watched. They stay open until this is called.
    pub fn take_retired(&mut self) -> Vec<EventFd> {
        std::mem::take(&mut self.retired)
    }

    /// The guest's requests that are finished, in order.
    pub fn take_done(&mut self) -> Vec<Done> {
        std::mem::take(&mut self.done)
    }

    /// When [`Self::service`] is due, ns.
    pub fn deadline(&self) -> Option<u64> {
        let is_blocked = self.link.session().is_some_and(|session| !session.has_room());
        let earliest = if is_blocked { self.serviced.saturating_add(TRY_AGAIN_NS) } else { 0 };
        self.shadow.deadline().map(|at| at.max(earliest))
    }

    /// A new connection: with a new driver VM, or with the same one again. It takes the place of an older one that is there; it is closed
    /// if it is not newer than all before.
    pub fn attach(&mut self, id: LinkId, socket: UnixStream) {
        let connection = Elsewhere::new(socket);
        self.take_events();
        if self.link.id().max(self.barred).is_some_and(|known| known >= id) {
            tracing::debug!(link = %id, "closed an old link of a disk");
            return;
        }
        if let Some(old) = self.link.id() {
            self.end(old);
        }
        let started = self.wake.try_clone().and_then(|wake| {
            let outlet = Outlet::new(id, self.sender.clone(), wake);
            LinkServer::start(connection, (FEATURES, self.driver_memory), outlet)
        });
        match started {
            Ok(server) => self.link = LinkState::Connecting(server),
            Err(error) => self.lose(id, Cause::Protocol(format!("cannot start the link: {error}")).into()),
        }
    }

    /// The driver VM of `generation` has failed, says the supervisor.
    pub fn mask(&mut self, generation: Generation) {
        self.take_events();
        self.end(LinkId::last(generation));
    }

    /// No driver VM until further notice: what waits and what comes fails, and what is not stable stays in the log. A later
    /// [`Self::attach`] ends that.
    pub fn quarantine(&mut self) {
        self.take_events();
        if let Some(link) = self.link.id() {
            self.end(link);
        }
        self.with_shadow(|shadow, out| shadow.quarantine(out));
        self.report_unrest();
    }

    /// A deliberate reset is to come: no request is handed over any more, and everything becomes stable. [`Notice::AtRest`] is the end of
    /// it, after [`Limits::quiesce_ns`] from `now` at the latest.
    pub fn quiesce(&mut self, now: u64) {
        if self.shadow.mode() == ModeName::Quarantined {
            // Nothing is begun already, and what is owed stays so.
            (self.listener)(Notice::AtRest { stable: self.shadow.logged_extents() == 0 });
            return;
        }
        self.shadow.quiesce(now);
        self.owes_rest = true;
        self.wake_up();
    }

    /// The deliberate reset does not come: serve again.
    pub fn go_on(&mut self) {
        self.shadow.go_on();
        self.owes_rest = false;
        self.wake_up();
    }

    /// The guest has ended: its requests are gone, and what it was told is done becomes stable, whatever happens to the driver VM
    /// meanwhile.
    pub fn finish(&mut self) {
        self.reset();
        self.shadow.finish();
    }

    /// The guest's driver has reset its device: its requests are gone, and its buffers are not touched any more.
    pub fn reset(&mut self) {
        self.shadow.reset_by_guest();
        self.done.clear();
        self.wake_up();
    }

    /// Whether the guest's driver has accepted `VIRTIO_BLK_F_FLUSH`.
    pub fn set_guest_flushes(&mut self, accepted: bool) {
        self.shadow.set_guest_flushes(accepted);
    }

    /// A request of the guest, by sectors of its disk; `token` is not in use. [`Self::service`] goes on with it.
    pub fn submit(&mut self, token: Token, access: Access, range: SectorRange) {
        self.with_shadow(|shadow, out| shadow.submit(token, access, range, out));
    }

    /// A flush of the guest. [`Self::service`] goes on with it.
    pub fn flush(&mut self, token: Token) {
        self.with_shadow(|shadow, out| shadow.flush(token, out));
    }

    /// Runs `act` and keeps the requests that it finishes.
    fn with_shadow<R>(&mut self, act: impl FnOnce(&mut BlockShadow<PrivateCopy>, &mut Out) -> R) -> R {
        let mut out = Out::default();
        let result = act(&mut self.shadow, &mut out);
        self.done.append(&mut out.done);
        result
    }

    fn wake_up(&self) {
        // Full only if a wake-up is due anyway.
        let _ = self.wake.write(1);
    }

    fn take_events(&mut self) {
        while let Ok(LinkEvent { link: id, what }) = self.events.try_recv() {
            match what {
                What::Up(link) if self.link.id() == Some(id) => self.link_up(link),
                What::Up(link) => self.retire(Port::new(link).into_kicks()),
                _ if self.link.id() != Some(id) => {}
                What::Lost(cause) => self.lose(id, cause.into()),
                What::Calls => {
                    if let LinkState::Up { session, .. } = &mut self.link {
                        session.take_calls();
                    }
                }
            }
        }
    }

    fn link_up(&mut self, mut link: Box<Link>) {
        link.set_watch(&self.calls);
        let port = Port::new(link);
        match std::mem::take(&mut self.link) {
            LinkState::Connecting(server) => {
                let session = Box::new(Session::new(port));
                self.link = LinkState::Up { server, session };
                // The set of kicks has changed.
                self.wake_up();
            }
            other => {
                self.link = other;
                self.retire(port.into_kicks());
            }
        }
    }

    fn retire(&mut self, kicks: [EventFd; 2]) {
        self.retired.extend(kicks);
        self.wake_up();
    }

    /// Gives `id` and all older links up, and masks.
    fn end(&mut self, id: LinkId) {
        self.barred = self.barred.max(Some(id));
        self.with_shadow(|shadow, out| shadow.lost(id, out));
        if self.link.id().is_none_or(|known| known > id) {
            return;
        }
        self.announce = None;
        if let LinkState::Up { session, .. } = std::mem::take(&mut self.link) {
            let served = session.disk().is_some();
            self.retire(session.into_kicks());
            if served {
                self.report_unrest();
            }
        }
    }

    /// The link `id` has ended by itself, or has to end.
    fn lose(&mut self, id: LinkId, error: LinkError) {
        self.end(id);
        (self.listener)(match error {
            LinkError::Failed(Failure::OtherDisk(mismatch)) => Notice::OtherDisk(id, mismatch),
            error => Notice::Lost(id, error),
        });
    }

    /// The disk will not come to rest.
    fn report_unrest(&mut self) {
        if std::mem::take(&mut self.owes_rest) {
            (self.listener)(Notice::AtRest { stable: false });
        }
    }
}
