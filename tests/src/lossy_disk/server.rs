//! Connections of a lossy disk: one thread accepts; each connection has one that reads requests and one that serves them.
//!
//! A request waits in its connection's queue until it is due: not while the disk is stalled, and not before its class's delay has
//! passed. Of the requests that are due a random one is served next, as the specification allows ("Ordering of messages and
//! writes"). A flush covers what was answered before it was *read*; see [`super::medium`].
//!
//! States of a connection:
//!
//! ```text
//! Open --NBD_CMD_DISC--> Leaving --queue empty--> (closed)
//!   \--end of stream, broken rule, swap--> Gone --> (closed; its queue is forgotten)
//! ```
//!
//! Invariants: everything is behind one lock, which is never held while a socket is read or written, so a client that does not read
//! its answers keeps nobody else waiting. What waits of one connection is bounded ([`MAX_WAITING`], [`MAX_WAITING_BYTES`]).
//! What a client that is gone has sent is not served any more: after the power cut of a test host (its QEMU is killed in a stall) its
//! requests must not reach the disk behind those of the next boot.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket;
use umbra_vmm::base::lock::lock;

use super::drive::{Drive, Request};
use super::handshake::{Chosen, Export, negotiate, violation};
use super::protocol::{
    Header, MAX_PAYLOAD, MAX_REFUSED, NBD_CMD_DISC, NBD_CMD_WRITE, NBD_FLAG_HAS_FLAGS, NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_FLUSH, NBD_FLAG_SEND_FUA, NBD_FLAG_SEND_TRIM, NBD_FLAG_SEND_WRITE_ZEROES, simple_reply,
};
use super::{Access, FirstRequest};
use crate::peer::now_us;
use crate::random::Random;

/// Connections at a time: a QEMU, the one that comes after it, and tools. A further one is closed at once.
const MAX_CONNECTIONS: usize = 8;

/// Requests of one connection that wait at most; QEMU has 16 under way (`MAX_NBD_REQUESTS`, `block/nbd.c`), Linux 128. Further ones
/// stay in the socket, and so does the connection's end: with a client that fills its queue it is noticed late.
const MAX_WAITING: usize = 128;

/// Bytes of data that wait at most, of one connection: 16 of the longest writes.
const MAX_WAITING_BYTES: usize = 16 * MAX_PAYLOAD as usize;

/// Sets the order of requests apart from the chances of sectors, which then depend on their seed and the requests alone.
const ORDER: u64 = 0x6f72_6465_7200_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Open,
    Leaving,
    Gone,
}

#[derive(Debug)]
struct Waiting {
    request: Request,
    since: Instant,
    /// No delay holds it up any more.
    is_released: bool,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    queue: Vec<Waiting>,
    fate: Fate,
}

impl Connection {
    fn has_room(&self) -> bool {
        let bytes: usize = self.queue.iter().map(|waiting| waiting.request.payload.len()).sum();
        self.queue.len() < MAX_WAITING && bytes < MAX_WAITING_BYTES
    }
}

/// What a thread that serves is to do next.
enum Next {
    Serve(Request),
    /// Nothing is due; something may be after this time.
    Wait(Option<Duration>),
    End,
}

/// All that the threads share.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) drive: Drive,
    pub(super) is_stalled: bool,
    pub(super) requests: u64,
    pub(super) connections_made: u64,
    pub(super) losses: u64,
    pub(super) first_after_loss: Option<FirstRequest>,
    is_stopping: bool,
    order: Random,
    connections: BTreeMap<u64, Connection>,
    next_id: u64,
}

impl Inner {
    pub(super) fn new(drive: Drive, seed: u64) -> Self {
        Self {
            drive,
            is_stalled: false,
            requests: 0,
            connections_made: 0,
            losses: 0,
            first_after_loss: None,
            is_stopping: false,
            order: Random::new(seed ^ ORDER),
            connections: BTreeMap::new(),
            next_id: 0,
        }
    }

    /// Requests that wait.
    pub(super) fn waiting(&self) -> usize {
        self.connections.values().map(|connection| connection.queue.len()).sum()
    }

    /// No delay holds up what has come.
    pub(super) fn release(&mut self) {
        let queues = self.connections.values_mut().flat_map(|connection| &mut connection.queue);
        queues.for_each(|waiting| waiting.is_released = true);
    }

    /// Ends all connections, as when a cable is pulled out.
    pub(super) fn hang_up(&mut self) {
        let ids: Vec<u64> = self.connections.keys().copied().collect();
        ids.into_iter().for_each(|id| self.end(id));
    }

    /// Ends one, and forgets what it has sent.
    fn end(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.fate = Fate::Gone;
        for waiting in connection.queue.drain(..) {
            self.drive.forget(&waiting.request);
        }
        let _ = connection.stream.shutdown(Shutdown::Both);
    }

    fn export(&self) -> Export {
        let access = if self.drive.medium.access() == Access::ReadOnly { NBD_FLAG_READ_ONLY } else { 0 };
        let features = NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES;
        (self.drive.medium.sectors() * super::SECTOR as u64, NBD_FLAG_HAS_FLAGS | features | access)
    }

    fn next(&mut self, id: u64) -> Next {
        let Some(connection) = self.connections.get_mut(&id) else { return Next::End };
        match connection.fate {
            Fate::Gone => return Next::End,
            Fate::Leaving if connection.queue.is_empty() => return Next::End,
            _ if self.is_stalled => return Next::Wait(None),
            _ => {}
        }
        let delays = &self.drive.faults;
        let left = |waiting: &Waiting| {
            let delay = delays.delay(waiting.request.class());
            if waiting.is_released { Duration::ZERO } else { delay.saturating_sub(waiting.since.elapsed()) }
        };
        let left: Vec<Duration> = connection.queue.iter().map(left).collect();
        let due: Vec<usize> = (0..left.len()).filter(|&n| left[n].is_zero()).collect();
        if due.is_empty() {
            return Next::Wait(left.into_iter().min());
        }
        let chosen = due[usize::try_from(self.order.below(due.len() as u64)).unwrap_or(0)];
        Next::Serve(connection.queue.swap_remove(chosen).request)
    }
}

/// The disk as its threads see it.
#[derive(Debug)]
pub(super) struct Shared {
    inner: Mutex<Inner>,
    /// Notified after each change that a thread may wait for.
    changed: Condvar,
}

impl Shared {
    pub(super) fn new(inner: Inner) -> Self {
        Self { inner: Mutex::new(inner), changed: Condvar::new() }
    }

    /// Changes something that requests may wait for.
    pub(super) fn with<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let result = change(&mut lock(&self.inner));
        self.changed.notify_all();
        result
    }

    /// Looks at something.
    pub(super) fn look<T>(&self, look: impl FnOnce(&Inner) -> T) -> T {
        look(&lock(&self.inner))
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>, longest: Option<Duration>) -> MutexGuard<'a, Inner> {
        match longest {
            None => self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner),
            Some(longest) => self.changed.wait_timeout(inner, longest).unwrap_or_else(PoisonError::into_inner).0,
        }
    }

    /// Accepts connections until [`Shared::stop`]; returns when all have ended.
    pub(super) fn accept(self: &Arc<Self>, listener: &UnixListener) {
        let mut threads = Vec::new();
        loop {
            let accepted = listener.accept();
            if self.look(|inner| inner.is_stopping) {
                break;
            }
            threads.retain(|thread: &thread::JoinHandle<()>| !thread.is_finished());
            let Ok((stream, _)) = accepted else { continue };
            let Some(id) = self.register(&stream) else { continue };
            let shared = self.clone();
            match thread::Builder::new().name("lossy-disk".into()).spawn(move || shared.converse(id, &stream)) {
                Ok(thread) => threads.push(thread),
                Err(_) => self.close(id),
            }
        }
        threads.into_iter().for_each(|thread| drop(thread.join()));
    }

    /// Ends [`Shared::accept`] and all connections.
    pub(super) fn stop(&self, listener: &UnixListener) {
        self.with(|inner| {
            inner.is_stopping = true;
            inner.hang_up();
        });
        // Wakes the thread that accepts.
        let _ = socket::shutdown(listener.as_raw_fd(), socket::Shutdown::Both);
    }

    fn register(&self, stream: &UnixStream) -> Option<u64> {
        let stream = stream.try_clone().ok()?;
        self.with(|inner| {
            if inner.is_stopping || inner.connections.len() >= MAX_CONNECTIONS {
                return None;
            }
            inner.next_id += 1;
            inner.connections.insert(inner.next_id, Connection { stream, queue: Vec::new(), fate: Fate::Open });
            Some(inner.next_id)
        })
    }

    fn close(&self, id: u64) {
        self.with(|inner| {
            inner.end(id);
            inner.connections.remove(&id);
        });
    }

    /// One connection, from the greeting to its end.
    fn converse(&self, id: u64, stream: &UnixStream) {
        if let Ok(Chosen::Export) = negotiate(stream, || self.look(Inner::export)) {
            self.with(|inner| inner.connections_made += 1);
            thread::scope(|scope| {
                let name = thread::Builder::new().name("lossy-disk-read".into());
                if name.spawn_scoped(scope, || self.read(id, stream)).is_ok() {
                    self.serve(id, stream);
                }
            });
        }
        self.close(id);
    }

    /// Reads requests until there are no more.
    fn read(&self, id: u64, stream: &UnixStream) {
        let has_left = self.read_requests(id, stream).is_ok();
        self.with(|inner| match inner.connections.get_mut(&id) {
            Some(connection) if has_left && connection.fate == Fate::Open => connection.fate = Fate::Leaving,
            _ => inner.end(id),
        });
    }

    /// # Errors
    /// The connection is broken, or the client breaks a rule; not when it says that it leaves.
    fn read_requests(&self, id: u64, mut stream: &UnixStream) -> io::Result<()> {
        loop {
            let mut header = [0; Header::LEN];
            stream.read_exact(&mut header)?;
            let header = Header::parse(&header).ok_or_else(|| violation("no request"))?;
            match header.command {
                NBD_CMD_DISC => return Ok(()),
                NBD_CMD_WRITE => {
                    let payload = read_payload(stream, header.length)?;
                    self.enqueue(id, header, payload);
                }
                _ => self.enqueue(id, header, Vec::new()),
            }
        }
    }

    fn enqueue(&self, id: u64, header: Header, payload: Vec<u8>) {
        let mut inner = lock(&self.inner);
        inner.requests += 1;
        if inner.losses > 0 && inner.first_after_loss.is_none() {
            inner.first_after_loss = Some(FirstRequest { number: inner.requests, at_us: now_us() });
        }
        let request = inner.drive.take(header, payload);
        while inner.connections.get(&id).is_some_and(|c| c.fate == Fate::Open && !c.has_room()) {
            inner = self.wait(inner, None);
        }
        match inner.connections.get_mut(&id) {
            Some(connection) if connection.fate == Fate::Open => {
                connection.queue.push(Waiting { request, since: Instant::now(), is_released: false });
            }
            _ => inner.drive.forget(&request),
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Serves requests until the connection ends.
    fn serve(&self, id: u64, mut stream: &UnixStream) {
        let mut inner = lock(&self.inner);
        loop {
            match inner.next(id) {
                Next::End => break,
                Next::Wait(longest) => inner = self.wait(inner, longest),
                Next::Serve(request) => {
                    let answer = inner.drive.serve(&request);
                    drop(inner);
                    self.changed.notify_all();
                    let (error, data) = answer.map_or_else(|error| (error, Vec::new()), |data| (0, data));
                    let is_sent = stream.write_all(&simple_reply(error, request.header.cookie, &data)).is_ok();
                    inner = lock(&self.inner);
                    if !is_sent {
                        break;
                    }
                }
            }
        }
        inner.end(id);
    }
}

/// The data of a write; none, if they are longer than is served here.
fn read_payload(mut stream: &UnixStream, length: u32) -> io::Result<Vec<u8>> {
    if length > MAX_REFUSED {
        return Err(violation("a write too long"));
    }
    if length <= MAX_PAYLOAD {
        let mut data = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        stream.read_exact(&mut data)?;
        return Ok(data);
    }
    let skipped = io::copy(&mut stream.take(u64::from(length)), &mut io::sink())?;
    if skipped < u64::from(length) { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(Vec::new()) }
}
