//! The link to a driver VM: the back-end of a vhost-user connection whose front-end is the driver VM's process.
//!
//! One small thread per link speaks the protocol, so that a peer that stops in the middle of a message holds up
//! nothing but its own link. When both queues are enabled it hands them over as a [`Link`]; from then on it only
//! waits for the end of the connection. Invariant: what it hands over was checked ([`memory`], [`handler`]): sealed
//! memory, rings inside it, true eventfds. The data path trusts no byte in that memory for it.

mod handler;
mod memory;

use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use umbra_shadow::LinkId;
use vhost::vhost_user::{BackendReqHandler, Error};
use vmm_sys_util::eventfd::EventFd;

use crate::call::CallWatch;
use crate::queue::{RingFault, Virtqueue};
use crate::threads::{self, Purpose};
use crate::untrusted::Elsewhere;
use handler::Handler;

/// A link that is set up.
#[derive(Debug)]
pub struct Link {
    /// Number of the link.
    pub id: LinkId,
    /// Virtio features that the driver VM's driver accepted.
    pub features: u64,
    /// The driver VM's receive queue: what is for the driver VM goes here.
    pub rx: Virtqueue,
    /// The driver VM's transmit queue: what the driver VM sends comes from here.
    pub tx: Virtqueue,
    calls: Arc<NewCalls>,
}

impl Link {
    /// From now on writes to the eventfds of the driver VM's interrupts are looked after.
    pub fn set_watch(&mut self, watch: &Arc<CallWatch>) {
        self.rx.set_watch(Arc::clone(watch));
        self.tx.set_watch(Arc::clone(watch));
    }

    /// Takes the eventfds that the front-end has changed ([`What::Calls`]).
    pub fn take_calls(&mut self) {
        let [rx, tx] = self.calls.take();
        rx.into_iter().for_each(|call| self.rx.set_call(call));
        tx.into_iter().for_each(|call| self.tx.set_call(call));
    }
}

/// Eventfds of the queues' interrupts, as the front-end has changed them since they were last taken: the last of each queue, so
/// that a front-end which changes them without end fills nothing.
#[derive(Debug, Default)]
struct NewCalls(Mutex<[NewCall; 2]>);

/// `None`: as before; `Some(None)`: the queue has no interrupt any more.
type NewCall = Option<Option<EventFd>>;

impl NewCalls {
    /// Keeps the new eventfd of `queue`. Whether nothing waited to be taken: only then has it to be told.
    fn put(&self, queue: LinkQueue, call: Option<EventFd>) -> bool {
        let mut calls = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = calls.iter().all(Option::is_none);
        let before = calls[queue as usize].replace(call);
        // Closed without the lock, for which the event loop may wait.
        drop(calls);
        drop(before);
        first
    }

    fn take(&self) -> [NewCall; 2] {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The queue's place in the vhost-user connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkQueue {
    /// Queue 0, the driver VM's receive queue.
    Rx = 0,
    /// Queue 1, its transmit queue.
    Tx = 1,
}

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The peer closed the connection: its process is gone.
    #[error("closed")]
    Closed,
    /// The driver VM's driver reset its device.
    #[error("the driver VM reset its device")]
    Stopped,
    /// Memory without `F_SEAL_SHRINK` could be taken away under us.
    #[error("memory region {0} is not sealed against shrinking")]
    NotSealed(usize),
    /// A file that is no memory file, or too short, or that cannot be mapped.
    #[error("memory region {index} cannot be used: {why}")]
    Memory {
        /// Index of the region in the memory table.
        index: usize,
        /// What is wrong with it, for people.
        why: String,
    },
    /// Rings that are no rings.
    #[error("queue {index} cannot be used")]
    Queue {
        /// Index of the queue.
        index: u32,
        /// Why.
        #[source]
        source: RingFault,
    },
    /// A message that is out of place.
    #[error("vhost-user: {0}")]
    Protocol(String),
    /// The data path found a violation.
    #[error(transparent)]
    Data(#[from] crate::pump::PumpError),
    /// Something waits to be sent to the driver VM, and it offers no buffers.
    #[error("the driver VM has taken nothing for {} s, though something waits for it", .0.as_secs())]
    Stalled(std::time::Duration),
    /// The supervisor gave the link up, or attached the next one.
    #[error("given up")]
    GivenUp,
}

/// What a link's thread says.
#[derive(Debug)]
pub enum What {
    /// Set up: both queues are enabled.
    Up(Box<Link>),
    /// The front-end has changed eventfds: [`Link::take_calls`]. Not said again before they are taken.
    Calls,
    /// It is over; the last word.
    Lost(Cause),
}

/// A message of a link's thread.
#[derive(Debug)]
pub struct LinkEvent {
    /// Which link.
    pub link: LinkId,
    /// The news of it.
    pub what: What,
}

/// Where a link's thread sends to.
#[derive(Debug)]
pub struct Outlet {
    link: LinkId,
    sender: Sender<LinkEvent>,
    wake: EventFd,
}

impl Outlet {
    /// Events of `link` go into `sender`, each followed by a write to `wake`.
    pub fn new(link: LinkId, sender: Sender<LinkEvent>, wake: EventFd) -> Self {
        Self { link, sender, wake }
    }

    fn send(&self, what: What) {
        // The receiver is gone only with the whole device; full the eventfd is only when a wake-up is due.
        let _ = self.sender.send(LinkEvent { link: self.link, what });
        let _ = self.wake.write(1);
    }
}

/// The running back-end of one link. Dropping it ends the connection.
#[derive(Debug)]
pub struct LinkServer {
    link: LinkId,
    connection: Elsewhere<UnixStream>,
}

impl LinkServer {
    /// Serves `connection`, offering `features`, to a driver VM with at most `memory` bytes of memory.
    ///
    /// # Errors
    /// There is no thread for it, or no descriptor.
    pub fn start(
        connection: Elsewhere<UnixStream>,
        (features, memory): (u64, u64),
        outlet: Outlet,
    ) -> std::io::Result<Self> {
        let link = outlet.link;
        let serves = connection.try_clone()?;
        serves.set_nonblocking(false)?;
        let handler = Arc::new(Mutex::new(Handler::new((features, memory), outlet)));
        // Not joined: a hostile peer's file descriptors can make even a close() wait, and that may hold up this
        // thread, but not the guest. It ends with the connection.
        threads::spawn(Purpose::Link, format!("link-{link}"), move || serve(serves, &handler))?;
        Ok(Self { link, connection })
    }

    /// Number of the link.
    pub fn link(&self) -> LinkId {
        self.link
    }
}

impl Drop for LinkServer {
    fn drop(&mut self) {
        // Fails only if the peer was faster.
        let _ = self.connection.shutdown(Shutdown::Both);
    }
}

fn serve(connection: UnixStream, handler: &Arc<Mutex<Handler>>) {
    let mut requests = BackendReqHandler::from_stream(connection, Arc::clone(handler));
    let error = loop {
        match requests.handle_request() {
            Ok(()) => {}
            Err(Error::SocketRetry(why)) if why.kind() == ErrorKind::Interrupted => {}
            Err(error) => break error,
        }
    };
    // A front-end that waits for an answer learns of the end now, not when the event loop comes round.
    let _ = requests.try_clone_connection().and_then(|connection| connection.shutdown(Shutdown::Both));
    handler.lock().unwrap_or_else(PoisonError::into_inner).end(&error);
}
