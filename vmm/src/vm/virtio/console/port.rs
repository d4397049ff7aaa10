//! The host's end of a port, and the two pumps between it and the port's queues. Bounded: what the host does
//! not read stays in the guest's queue but for one request of at most [`MAX_REQUEST`] bytes; what the guest
//! does not read stays in the socket.
//!
//! An attached port ([`End::Attached`]) is given its peers one after the other, and no byte of one reaches the next. What
//! has passed may still be in the guest's kernel, cut off in the middle of a message; the kernel forgets it when the
//! program in the guest closes the port, as it does when it reads the end of the stream. The next peer waits for that.
//!
//! The queues of a port with [`End::VhostUser`] are another process's: no byte passes here.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;
use umbra_splitter::copy::{gather, scatter};
use umbra_splitter::log_limit::LogLimit;
use umbra_splitter::queue::{Chain, RingFault, Virtqueue};
use umbra_splitter::untrusted::Stream;
use vmm_sys_util::eventfd::EventFd;

use crate::base::lock::lock;
use crate::base::unix_socket::{self, ListenError};
use crate::vm::machine::legacy::SerialLine;
use crate::vm::virtio::Outbox;
use crate::vm::virtio::vhost_user::{FrontEnd, Tags};
use crate::wire::messages::{Disconnect, PortBackend, PortEnd};

/// Largest request of the guest, in bytes: Linux writes up to 32 KiB, or a whole pipe (1 MiB) by `splice`. The
/// bound keeps a guest from making this process allocate gigabytes.
const MAX_REQUEST: usize = 1 << 20;
/// Most bytes read from the host's end at once.
const CHUNK: usize = 16 * 1024;
/// Most bytes kept of clients that are gone: as many as a socket holds by default.
const MAX_LEFT: usize = 208 * 1024;
/// Most requests handled before other devices get their turn.
const BUDGET: usize = 64;

/// Errors of joining a port to its host's end.
#[derive(Debug, Error)]
pub enum Error {
    /// No listening at the path.
    #[error("console port {name}")]
    Listen {
        /// The port.
        name: String,
        /// The cause.
        #[source]
        source: ListenError,
    },
    /// The inherited descriptor is of no use.
    #[error("console port {name}: use inherited descriptor {fd}")]
    Inherited {
        /// The port.
        name: String,
        /// Number of the descriptor.
        fd: i32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No eventfd for its connections.
    #[error("console port {name}: create an eventfd")]
    EventFd {
        /// The port.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The host's end.
pub(super) enum End {
    /// Listens; one client at a time.
    Listen { listener: UnixListener },
    /// An inherited stream; once it is closed there is no other.
    Inherited,
    /// Peers are given, one after the other.
    Attached {
        /// The next peer, joined as soon as the guest has nothing left of the one before.
        next: Option<Stream>,
        /// Bytes have passed since the guest closed the port last.
        touched: bool,
        /// The guest has closed the port; what it wrote before may still be in its queue.
        hung_up: bool,
    },
    /// Another process serves the queues.
    VhostUser(Box<FrontEnd>),
    /// The VM's console: it prints and is typed at with the serial line's means.
    Console {
        line: Arc<Mutex<SerialLine>>,
        /// Readable when something was typed.
        typed: EventFd,
    },
}

/// A port.
pub(super) struct Port {
    pub(super) name: String,
    pub(super) end: End,
    /// The connected client.
    pub(super) stream: Option<Stream>,
    /// It has said all that it has to say, but may listen.
    pub(super) silent: bool,
    /// It does not listen, but may have said something before, or talk on.
    deaf: bool,
    /// Clients that are gone, closed once the event loop does not watch them any more.
    pub(super) gone: Vec<Stream>,
    /// The guest's driver uses the port.
    pub(super) ready: bool,
    /// A program in the guest has it open. The client stays connected when it closes: scripts open and close a port
    /// for each line that they write.
    pub(super) open: bool,
    /// State of the host's end as last announced to the driver.
    pub(super) announced: bool,
    /// Bytes have gone to the guest since the port was made.
    pub(super) told: bool,
    /// What clients that are gone have written and the guest has not read.
    left: VecDeque<u8>,
    /// What is left of the guest's last request.
    pub(super) to_host: Vec<u8>,
    /// The pump to the host stopped only to let other devices have their turn.
    more: bool,
    /// Bounds the warnings about what the guest does wrong.
    log: LogLimit,
}

impl Port {
    /// `tags` are those of its descriptors in the event loop; `outbox` takes the ends of connections.
    pub(super) fn new(backend: &PortBackend, tags: Tags, outbox: &Outbox) -> Result<Self, Error> {
        let name = backend.name.clone();
        let (end, stream) = match &backend.end {
            PortEnd::Listen(path) => (End::Listen { listener: listen(&name, path)? }, None),
            PortEnd::Fd(fd) => {
                let inherited = |source| Error::Inherited { name: name.clone(), fd: *fd, source };
                (End::Inherited, Some(inherit(*fd).map_err(inherited)?))
            }
            PortEnd::Attached => (End::Attached { next: None, touched: false, hung_up: false }, None),
            PortEnd::VhostUser => {
                let front = FrontEnd::new(format!("console port {name}"), tags, Outbox::clone(outbox));
                let front = front.map_err(|source| Error::EventFd { name: name.clone(), source })?;
                (End::VhostUser(Box::new(front)), None)
            }
        };
        Ok(Self::with(name, end, stream))
    }

    /// The console of a VM, as `line` is.
    pub(super) fn console(line: Arc<Mutex<SerialLine>>) -> Result<Self, Error> {
        let typed = lock(&line).type_at_hvc();
        let name = "hvc0".to_owned();
        let typed = typed.map_err(|source| Error::EventFd { name: name.clone(), source })?;
        Ok(Self::with(name, End::Console { line, typed }, None))
    }

    fn with(name: String, end: End, stream: Option<Stream>) -> Self {
        Self {
            name,
            end,
            stream,
            silent: false,
            deaf: false,
            gone: Vec::new(),
            ready: false,
            open: false,
            announced: false,
            told: false,
            left: VecDeque::new(),
            to_host: Vec::new(),
            more: false,
            log: LogLimit::default(),
        }
    }

    /// Whether it is the VM's console.
    pub(super) fn is_console(&self) -> bool {
        matches!(self.end, End::Console { .. })
    }

    /// The driver knows no ports but the console, which is open at once.
    pub(super) fn open_alone(&mut self) {
        (self.ready, self.open, self.announced) = (true, true, true);
    }

    /// The guest's side starts again; the host's end stays connected, except a given peer that has lost bytes by it.
    pub(super) fn reset(&mut self) {
        if let End::Attached { touched, hung_up, .. } = &mut self.end {
            *hung_up = false;
            if std::mem::take(touched) {
                self.disconnect();
            }
        }
        self.ready = false;
        self.open = false;
        self.announced = false;
        self.to_host.clear();
        self.more = false;
    }

    /// A client waits at the listener: takes it if there is none, else turns it away.
    pub(super) fn accept(&mut self) {
        let End::Listen { listener } = &self.end else { return };
        let client = match listener.accept().and_then(|(client, _)| Stream::new(client)) {
            Ok(client) => client,
            Err(error) => {
                if error.kind() != ErrorKind::WouldBlock {
                    tracing::warn!("console port {}: accept: {error}", self.name);
                }
                return;
            }
        };
        // The end of a client that the guest did not read from has not been seen yet; one that has said all, and may listen for ever,
        // gives way.
        if self.silent || self.stream.as_ref().is_some_and(has_hung_up) {
            self.keep_last_words();
            self.disconnect();
        }
        if self.stream.is_some() {
            tracing::debug!("console port {}: has a client already", self.name);
        } else {
            self.stream = Some(client);
        }
    }

    /// Takes what a client that is gone has written: it reaches the guest before what the next one writes.
    fn keep_last_words(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        let mut buffer = [0; CHUNK];
        while self.left.len() < MAX_LEFT {
            let room = CHUNK.min(MAX_LEFT - self.left.len());
            match stream.read(&mut buffer[..room]) {
                Ok(length) if length > 0 => self.left.extend(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return,
            }
        }
        self.log.warn(format_args!(
            "console port {}: what a client that is gone has written is dropped in part",
            self.name
        ));
    }

    /// Whether its peers are given.
    pub(super) fn takes_peers(&self) -> bool {
        matches!(self.end, End::Attached { .. } | End::VhostUser(_))
    }

    /// Gives an attached port its next peer, in place of the one that it has or waits for.
    pub(super) fn give(&mut self, stream: Stream) {
        if let End::Attached { next, .. } = &mut self.end {
            *next = Some(stream);
            self.disconnect();
        }
    }

    /// The guest has closed the port.
    pub(super) fn closed(&mut self) {
        match &mut self.end {
            End::Attached { hung_up, .. } => *hung_up = true,
            // The kernel has thrown away what was on its way to the program: whoever serves the port has to begin again.
            End::VhostUser(front) => front.end_session(Disconnect::Closed),
            End::Listen { .. } | End::Inherited | End::Console { .. } => {}
        }
    }

    /// The front-end of its queues, where another process serves them.
    pub(super) fn front(&mut self) -> Option<&mut FrontEnd> {
        if let End::VhostUser(front) = &mut self.end { Some(front) } else { None }
    }

    /// Whether the host's end is connected, as the driver is to see it.
    pub(super) fn is_connected(&self) -> bool {
        match &self.end {
            // As soon as there is a connection: the driver has to know before the first byte comes.
            End::VhostUser(front) => front.has_connection(),
            End::Listen { .. } | End::Inherited | End::Attached { .. } => self.stream.is_some(),
            End::Console { .. } => true,
        }
    }

    /// Has a connection that waits for it set up, once a program in the guest has the port open and the driver has been informed: what
    /// comes by it before is thrown away, or taken for the last words of an end that is gone.
    pub(super) fn set_up_if_ready(&mut self) {
        let ready = self.ready && self.open && self.announced;
        if let Some(front) = self.front().filter(|_| ready) {
            front.set_up_if_ready();
        }
    }

    /// To be called when the guest's queue was emptied: a guest that has hung up ends its peer, and the next peer is joined
    /// once nothing of the one before is left. False if the guest's queue has to be emptied once more before: the driver does not kick
    /// for what it has added meanwhile, and a stream that listens, which can be waited for, is not there.
    pub(super) fn settle(&mut self) -> bool {
        let unfinished = self.more && (self.stream.is_none() || self.deaf);
        let End::Attached { next, touched, hung_up } = &mut self.end else { return !unfinished };
        if *hung_up && *touched && self.stream.is_some() {
            // What the peer has not taken by now is lost.
            self.disconnect();
            return false;
        }
        if unfinished {
            return false;
        }
        if std::mem::take(hung_up) {
            *touched = false;
        }
        if self.stream.is_none() && !*touched {
            self.stream = next.take();
        }
        true
    }

    /// A byte has passed between the guest and its peer.
    fn touch(&mut self) {
        if let End::Attached { touched, .. } = &mut self.end {
            *touched = true;
        }
    }

    fn disconnect(&mut self) {
        self.gone.extend(self.stream.take());
        (self.silent, self.deaf) = (false, false);
        self.to_host.clear();
        self.more = false;
    }

    /// The pump to the host waits for the stream (or for its turn).
    pub(super) fn wants_to_write(&self) -> bool {
        self.stream.is_some() && !self.deaf && (self.more || !self.to_host.is_empty())
    }

    /// Host to guest.
    pub(super) fn pump_to_guest(&mut self, queue: &mut Virtqueue) -> Result<(), RingFault> {
        let pumped = self.fill(queue);
        queue.notify()?;
        pumped
    }

    fn fill(&mut self, queue: &mut Virtqueue) -> Result<(), RingFault> {
        let mut ring = queue.open()?;
        let mut chain = Chain::default();
        let mut buffer = [0; CHUNK];
        for _ in 0..BUDGET {
            if !self.open || !self.is_connected() {
                break;
            }
            if ring.available()? == 0 && !ring.listen(0)? {
                break;
            }
            let head = ring.head(0)?;
            // A chain that is wrong is given back empty.
            let room = ring.walk(head, &mut chain).map_or(0, |()| chain.writable_len().min(CHUNK));
            let mut written = 0;
            if room > 0 {
                let Some(length) = self.next_bytes(&mut buffer[..room]) else { break };
                written = scatter(&buffer[..length], chain.writable(), 0);
            }
            if written > 0 {
                self.told = true;
                self.touch();
            }
            ring.take(1);
            // At most `CHUNK`.
            ring.complete(head, u32::try_from(written).unwrap_or(0))?;
        }
        Ok(())
    }

    /// The next bytes for the guest, at least one; none if there are none now.
    fn next_bytes(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let left = self.left.read(buffer).unwrap_or_default();
        if left > 0 {
            return Some(left);
        }
        if let End::Console { line, .. } = &self.end {
            return Some(lock(line).take_typed(buffer)).filter(|length| *length > 0);
        }
        let stream = self.stream.as_mut()?;
        match stream.read(buffer) {
            Ok(length) if length > 0 => return Some(length),
            Ok(_) if !has_hung_up(stream) => self.silent = true,
            end if is_retry(&end) => {}
            _ => self.disconnect(),
        }
        None
    }

    /// Guest to host. Without a client that listens what the guest writes is lost, as on a cable with no other end.
    pub(super) fn pump_to_host(&mut self, queue: &mut Virtqueue) -> Result<(), RingFault> {
        let pumped = self.drain(queue);
        queue.notify()?;
        pumped
    }

    fn drain(&mut self, queue: &mut Virtqueue) -> Result<(), RingFault> {
        let mut ring = queue.open()?;
        let mut chain = Chain::default();
        self.more = false;
        for turn in 0..=BUDGET {
            if !self.flush() {
                break;
            }
            if ring.available()? == 0 && !ring.listen(0)? {
                break;
            }
            if turn == BUDGET {
                self.more = true;
                break;
            }
            let head = ring.head(0)?;
            match ring.walk(head, &mut chain) {
                Ok(()) if chain.readable_len() <= MAX_REQUEST => {
                    self.to_host.resize(chain.readable_len(), 0);
                    gather(chain.readable(), 0, &mut self.to_host);
                    if self.stream.is_some() {
                        self.touch();
                    }
                }
                Ok(()) => {
                    let length = chain.readable_len();
                    self.log.warn(format_args!("console port {}: a request of {length} bytes is dropped", self.name));
                }
                Err(fault) => {
                    self.log.warn(format_args!("console port {}: a request is dropped: {fault}", self.name));
                }
            }
            ring.take(1);
            ring.complete(head, 0)?;
        }
        Ok(())
    }

    /// Writes what is left of the last request; true once all of it is gone.
    fn flush(&mut self) -> bool {
        if let End::Console { line, .. } = &self.end {
            lock(line).print(&self.to_host);
        }
        while let Some(stream) = self.stream.as_mut().filter(|_| !self.deaf && !self.to_host.is_empty()) {
            match stream.write(&self.to_host) {
                Ok(length) if length > 0 => drop(self.to_host.drain(..length)),
                end if is_retry(&end) => return false,
                _ => self.deaf = true,
            }
        }
        self.to_host.clear();
        true
    }
}

/// The peer has closed the stream; what it wrote may still be there. One that has only said all that it has to say still listens.
fn has_hung_up(stream: &Stream) -> bool {
    let mut state = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    poll(&mut state, PollTimeout::ZERO).is_ok()
        && state[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
}

fn is_retry(result: &io::Result<usize>) -> bool {
    matches!(result, Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted))
}

fn listen(name: &str, path: &Path) -> Result<UnixListener, Error> {
    let error = |source| Error::Listen { name: name.into(), source };
    let listener = unix_socket::listen(path).map_err(error)?;
    let blocking = |source| error(ListenError::Io { path: path.into(), source });
    listener.set_nonblocking(true).map_err(blocking)?;
    Ok(listener)
}

/// Takes over a stream that the supervisor left open in this process under number `fd`.
fn inherit(fd: i32) -> io::Result<Stream> {
    // SAFETY: the borrow ends with the call, which only asks whether the number is open.
    let open = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd.max(0)) };
    fcntl(open, FcntlArg::F_GETFD)?;
    // SAFETY: open as just seen, and the supervisor names each inherited descriptor once in the VM's
    // specification, so nothing else in this process owns it.
    Stream::new(unsafe { UnixStream::from_raw_fd(fd) })
}
