//! The front-end of a pair of queues: its connections with another process come and go while the device lives.
//!
//! ```text
//!           connect              set_up_if_ready            set up
//!   Absent ---------> Waiting ----------------------> SettingUp ------> Up
//!     ^                                                    | time over,    | closed, or a queue is stopped
//!     +----------------------------------------------------+ refused ------+
//! ```
//! The device decides when a connection that waits may be set up; both queues run then. What a connection means to the device's
//! driver, as a link that is up or a port that is open, is the device's to show.
//!
//! This process is not in the data path: kicks and interrupts are eventfds that the back-end gets. Invariants: nothing here
//! waits for a back-end (the set-up has a thread of its own, bounded in time); a connection's rings go on where the used ring
//! in memory stands; the loss of a connection is no error of this VM.

use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use event_manager::{EventOps, Events};
use umbra_shadow::LinkId;
use umbra_splitter::threads::{self, Purpose};
use umbra_splitter::untrusted::Elsewhere;
use vhost::vhost_user::Frontend;
use virtio_queue::QueueT;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::set_up::{Error, SetUp, Vring, used_index};
use crate::base::error::chain;
use crate::base::high_duplicate::high_duplicate;
use crate::vm::virtio::device::{self, QueueResources, QueueState};
use crate::vm::virtio::{Outbox, events};
use crate::wire::messages::{Disconnect, FromVm};

/// Receive and transmit queue.
const QUEUES: usize = 2;

/// How the set-up of a connection has ended.
type Outcome = (LinkId, Result<Elsewhere<Frontend>, Error>);

/// Tags of a front-end's descriptors in the event loop, which are the device's to choose.
#[derive(Clone, Copy, Debug)]
pub struct Tags {
    /// Of the eventfd by which it calls the event loop.
    pub wake: u32,
    /// Of the socket of the connection that is up.
    pub socket: u32,
}

/// How far the connection is.
enum Connection {
    Absent,
    /// For the device.
    Waiting {
        socket: Elsewhere<UnixStream>,
    },
    /// In a thread, which has a duplicate of the socket.
    SettingUp {
        socket: Elsewhere<UnixStream>,
    },
    /// The event loop watches the socket for its end.
    Up {
        socket: Elsewhere<UnixStream>,
        _frontend: Elsewhere<Frontend>,
    },
}

/// A connection's place among the driver VM's ends, and its number.
#[derive(Clone, Copy, Debug)]
struct Peer {
    end: u16,
    link: LinkId,
}

/// The front-end of two queues.
pub struct FrontEnd {
    /// What the log calls it.
    name: String,
    /// Features that the driver has accepted, of those that a back-end has to know of.
    features: u64,
    queues: [Option<QueueResources>; QUEUES],
    connection: Connection,
    /// The present connection, or the last one.
    peer: Option<Peer>,
    /// For the event loop: a set-up has ended, or a socket is to be watched no more.
    wake: EventFd,
    tags: Tags,
    set_up: (Sender<Outcome>, Receiver<Outcome>),
    /// Sockets that the event loop may still watch.
    retired: Vec<Elsewhere<UnixStream>>,
    outbox: Outbox,
}

impl FrontEnd {
    /// Without a connection. Ends of connections are reported to `outbox`.
    ///
    /// # Errors
    /// The host has no more descriptors.
    pub fn new(name: String, tags: Tags, outbox: Outbox) -> std::io::Result<Self> {
        Ok(Self {
            name,
            features: 0,
            queues: Default::default(),
            connection: Connection::Absent,
            peer: None,
            wake: EventFd::new(EFD_NONBLOCK)?,
            tags,
            set_up: channel(),
            retired: Vec::new(),
            outbox,
        })
    }

    /// Features that the driver has accepted, of those that a back-end has to know of and is required to offer.
    pub fn set_features(&mut self, features: u64) {
        self.features = features;
    }

    /// Ends the connection that is there, without a report, and lets this one wait: connection `link` of the driver VM's end `end`
    /// ([`ToVm::Connect`](crate::wire::messages::ToVm::Connect)).
    pub fn connect(&mut self, end: u16, link: LinkId, socket: UnixStream) {
        self.hang_up();
        // The back-end's process notices by it that this process is gone.
        let socket = Elsewhere::new(high_duplicate(&socket).map_or(socket, UnixStream::from));
        self.peer = Some(Peer { end, link });
        self.connection = Connection::Waiting { socket };
    }

    /// Whether there is a connection, set up or not.
    pub fn has_connection(&self) -> bool {
        !matches!(self.connection, Connection::Absent)
    }

    /// Whether the connection is set up.
    pub fn is_up(&self) -> bool {
        matches!(self.connection, Connection::Up { .. })
    }

    /// Whether there has ever been a connection: the VM's memory may hold what came by it.
    pub fn was_connected(&self) -> bool {
        self.peer.is_some()
    }

    /// Queue `index` of the two runs.
    ///
    /// # Errors
    /// There is no such queue.
    pub fn start_queue(&mut self, index: u16, resources: QueueResources) -> Result<(), device::Error> {
        let place = self.queues.get_mut(usize::from(index)).ok_or(device::Error::NoSuchQueue(index))?;
        *place = Some(resources);
        Ok(())
    }

    /// Queue `index` of the two runs no more; where it stood. The back-end stops with its connection, within a turn of its event
    /// loop.
    pub fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let resources = self.queues.get_mut(usize::from(index))?.take()?;
        self.end_session(Disconnect::Stopped);
        let at = used_index(&resources.memory, resources.queue.used_ring()).ok()?;
        Some(QueueState { next_avail: at, next_used: at })
    }

    /// Ends the connection, unless it waits: nothing of this driver's has been said over it then.
    pub fn end_session(&mut self, why: Disconnect) {
        if !matches!(self.connection, Connection::Waiting { .. }) {
            self.disconnected(why);
        }
    }

    /// Begins to set a connection that waits up, if both queues run.
    pub fn set_up_if_ready(&mut self) {
        let Some(Peer { link, .. }) = self.peer else { return };
        if !(matches!(self.connection, Connection::Waiting { .. }) && self.queues.iter().all(Option::is_some)) {
            return;
        }
        match self.begin_set_up(link) {
            Ok(socket) => self.connection = Connection::SettingUp { socket },
            Err(error) => self.disconnected(Disconnect::NoAnswer(chain(&error))),
        }
    }

    fn begin_set_up(&self, link: LinkId) -> Result<Elsewhere<UnixStream>, Error> {
        let Connection::Waiting { socket } = &self.connection else { unreachable!("asked for before") };
        let queues: Vec<_> = self.queues.iter().flatten().collect();
        let vrings = queues.iter().map(|queue| Vring::new(queue)).collect::<Result<_, _>>()?;
        let Some(memory) = queues.first().map(|queue| queue.memory.clone()) else { unreachable!("both queues run") };
        let set_up = SetUp { features: self.features, memory, vrings };
        let (ours, theirs) = (high_duplicate(&**socket).map(UnixStream::from), socket.try_clone());
        let (ours, theirs) = (Elsewhere::new(ours.map_err(Error::Socket)?), theirs.map_err(Error::Socket)?);
        let wake = self.wake.try_clone().map_err(Error::EventFd)?;
        let sender = self.set_up.0.clone();
        let run = move || {
            // The receiver is gone only with the whole device.
            let _ = sender.send((link, set_up.run(&theirs).map(Elsewhere::new)));
            let _ = wake.write(1);
        };
        threads::spawn(Purpose::Brief, "link-set-up", run).map_err(Error::Thread)?;
        Ok(ours)
    }

    /// Ends the connection, if there is one; which it was.
    fn hang_up(&mut self) -> Option<Peer> {
        let socket = match std::mem::replace(&mut self.connection, Connection::Absent) {
            Connection::Absent => return None,
            Connection::Waiting { socket } | Connection::SettingUp { socket } => {
                // Fails only if the peer was faster.
                let _ = socket.shutdown(Shutdown::Both);
                return self.peer;
            }
            Connection::Up { socket, .. } => socket,
        };
        let _ = socket.shutdown(Shutdown::Both);
        self.retired.push(socket);
        // Full only if a wake-up is due anyway.
        let _ = self.wake.write(1);
        self.peer
    }

    /// The connection is over, or could not be set up.
    fn disconnected(&mut self, why: Disconnect) {
        if let Some(Peer { end, link }) = self.hang_up() {
            tracing::info!("{}: connection {link} is over: {why:?}", self.name);
            (self.outbox)(FromVm::Disconnected { end, link, why });
        }
    }

    /// Set-ups that have ended.
    fn take_set_ups(&mut self, ops: &mut EventOps) {
        while let Ok((link, outcome)) = self.set_up.1.try_recv() {
            // The result of a connection that was given up meanwhile.
            let current = self.peer.is_some_and(|peer| peer.link == link);
            if !current || !matches!(self.connection, Connection::SettingUp { .. }) {
                continue;
            }
            match outcome {
                Ok(frontend) => self.up(frontend, ops),
                Err(error) => self.disconnected(Disconnect::NoAnswer(chain(&error))),
            }
        }
    }

    fn up(&mut self, frontend: Elsewhere<Frontend>, ops: &mut EventOps) {
        let Connection::SettingUp { socket } = std::mem::replace(&mut self.connection, Connection::Absent) else {
            return;
        };
        events::add(ops, Events::with_data(&*socket, self.tags.socket, EventSet::READ_HANG_UP));
        self.connection = Connection::Up { socket, _frontend: frontend };
    }

    /// To be called in the device's `MutEventSubscriber::init`.
    pub fn init(&self, ops: &mut EventOps) {
        events::add(ops, Events::with_data(&self.wake, self.tags.wake, EventSet::IN));
    }

    /// To be called for an event with one of its tags.
    pub fn process(&mut self, event: Events, ops: &mut EventOps) {
        if event.data() == self.tags.socket {
            // A connection that was given up a moment ago has nothing more to report.
            let current = matches!(&self.connection, Connection::Up { socket, .. } if socket.as_raw_fd() == event.fd());
            if current {
                self.disconnected(Disconnect::Closed);
            }
        } else {
            let _ = self.wake.read();
            self.take_set_ups(ops);
        }
        for socket in std::mem::take(&mut self.retired) {
            events::remove(ops, Events::empty(&*socket));
        }
    }
}
