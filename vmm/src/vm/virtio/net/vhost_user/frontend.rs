//! The front-end's side of a vhost-user connection: one method a step of the protocol, each acknowledged by
//! the back-end where it can. Every wait is bounded, so that a back-end that hangs cannot hang this VM.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use thiserror::Error;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

use crate::base::high_duplicate::twin;
use crate::vm::virtio::device::QueueResources;

/// Longest wait for the answers of one step. The back-end's thread answers at once, but its process may be
/// starting just now on a busy host.
const TIMEOUT: Duration = Duration::from_secs(10);
/// `VHOST_USER_F_PROTOCOL_FEATURES`, a feature bit of the connection, not of the device.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// A step that failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The socket cannot be prepared.
    #[error("prepare the socket")]
    Socket(#[source] std::io::Error),
    /// A message failed.
    #[error("{message}")]
    Message {
        /// The protocol's name of it.
        message: &'static str,
        /// The cause.
        #[source]
        source: vhost::Error,
    },
    /// The back-end does not speak of enabling queues.
    #[error("the back-end does not offer protocol features")]
    TooOld,
    /// The thread that bounds the wait could not be made.
    #[error("start a thread that bounds the wait for the back-end")]
    Thread(#[source] std::io::Error),
    /// A ring is not in the VM's memory.
    #[error("find a ring at guest address {address:#x}")]
    Ring {
        /// Where it should be.
        address: u64,
        /// The cause.
        #[source]
        source: GuestMemoryError,
    },
}

/// Names the message that failed.
fn at<T>(message: &'static str) -> impl FnOnce(vhost::Error) -> Result<T, Error> {
    move |source| Err(Error::Message { message, source })
}

/// Ends the connection unless it is dropped within [`TIMEOUT`]: the protocol's crate itself waits without end.
struct Deadline(#[expect(dead_code, reason = "its end is the message")] Sender<()>);

impl Deadline {
    fn start(socket: &UnixStream) -> Result<Self, Error> {
        let socket = socket.try_clone().map_err(Error::Socket)?;
        let (sender, receiver) = channel();
        let wait = move || {
            if receiver.recv_timeout(TIMEOUT) == Err(RecvTimeoutError::Timeout) {
                tracing::warn!("vhost-user: no answer within {} s, the link is closed", TIMEOUT.as_secs());
                // Fails only if the peer was faster.
                let _ = socket.shutdown(Shutdown::Both);
            }
        };
        std::thread::Builder::new().name("link-deadline".into()).spawn(wait).map_err(Error::Thread)?;
        Ok(Self(sender))
    }
}

/// The connection, from the first message on.
pub(super) struct Connection {
    frontend: Frontend,
    socket: UnixStream,
    features: u64,
}

impl Connection {
    /// Takes the session and asks for the features of the back-end.
    pub(super) fn open(socket: UnixStream, queues: u64) -> Result<Self, Error> {
        socket.set_nonblocking(false).map_err(Error::Socket)?;
        let _deadline = Deadline::start(&socket)?;
        let mut frontend = Frontend::from_stream(twin(&socket).map_err(Error::Socket)?.into(), queues);
        frontend.set_owner().or_else(at("SET_OWNER"))?;
        let features = frontend.get_features().or_else(at("GET_FEATURES"))?;
        if features & PROTOCOL_FEATURES == 0 {
            return Err(Error::TooOld);
        }
        let protocol = frontend.get_protocol_features().or_else(at("GET_PROTOCOL_FEATURES"))?;
        let wanted = protocol & VhostUserProtocolFeatures::REPLY_ACK;
        frontend.set_protocol_features(wanted).or_else(at("SET_PROTOCOL_FEATURES"))?;
        if !wanted.is_empty() {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        Ok(Self { frontend, socket, features: features & !PROTOCOL_FEATURES })
    }

    /// Device features of the back-end.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Tells the features in force and shares the VM's memory.
    pub(super) fn set_up(&self, accepted: u64, memory: &GuestMemoryMmap) -> Result<(), Error> {
        let _deadline = Deadline::start(&self.socket)?;
        let features = accepted & self.features | PROTOCOL_FEATURES;
        self.frontend.set_features(features).or_else(at("SET_FEATURES"))?;
        let regions: Result<Vec<_>, _> = memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect();
        let regions = regions.or_else(at("SET_MEM_TABLE"))?;
        self.frontend.set_mem_table(&regions).or_else(at("SET_MEM_TABLE"))?;
        Ok(())
    }

    /// Hands a queue over; the back-end serves it from then on.
    pub(super) fn start(&mut self, index: usize, base: u16, resources: &QueueResources) -> Result<(), Error> {
        let QueueResources { memory, queue, kick, call } = resources;
        let host = |address| {
            let host = memory.get_host_address(GuestAddress(address));
            host.map(|pointer| pointer as u64).map_err(|source| Error::Ring { address, source })
        };
        let config = VringConfigData {
            queue_max_size: queue.max_size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: host(queue.desc_table())?,
            used_ring_addr: host(queue.used_ring())?,
            avail_ring_addr: host(queue.avail_ring())?,
            log_addr: None,
        };
        let _deadline = Deadline::start(&self.socket)?;
        self.frontend.set_vring_num(index, queue.size()).or_else(at("SET_VRING_NUM"))?;
        self.frontend.set_vring_addr(index, &config).or_else(at("SET_VRING_ADDR"))?;
        self.frontend.set_vring_base(index, base).or_else(at("SET_VRING_BASE"))?;
        self.frontend.set_vring_call(index, call).or_else(at("SET_VRING_CALL"))?;
        self.frontend.set_vring_kick(index, kick).or_else(at("SET_VRING_KICK"))?;
        self.frontend.set_vring_enable(index, true).or_else(at("SET_VRING_ENABLE"))
    }

    /// Takes a queue back: the back-end stops and says where it stood.
    pub(super) fn stop(&self, index: usize) -> Result<u16, Error> {
        let _deadline = Deadline::start(&self.socket)?;
        let base = self.frontend.get_vring_base(index).or_else(at("GET_VRING_BASE"))?;
        // 16 bits by the protocol; what is above them is the back-end's nonsense.
        Ok(u16::try_from(base & 0xFFFF).unwrap_or(0))
    }
}
