//! The front-end's side of a vhost-user connection: the whole set-up, each message acknowledged by the back-end where it
//! can. It runs in a thread of its own and is bounded in time, so that a back-end that hangs holds up nothing of this VM.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use thiserror::Error;
use umbra_splitter::threads::{self, Purpose};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::base::high_duplicate::high_duplicate;
use crate::vm::virtio::device::QueueResources;

/// Longest time for the set-up of a connection. The back-end's thread answers within microseconds. A back-end whose process is
/// stopped or starved does not; it is connected again when it reports that it lost this connection, so the limit costs nobody
/// anything.
const TIMEOUT: Duration = Duration::from_secs(10);
/// `VHOST_USER_F_PROTOCOL_FEATURES`, a feature bit of the connection, not of the device.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// A set-up that failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The socket cannot be prepared.
    #[error("prepare the socket")]
    Socket(#[source] std::io::Error),
    /// An eventfd of a queue cannot be handed over.
    #[error("duplicate an eventfd of a queue")]
    EventFd(#[source] std::io::Error),
    /// A message failed.
    #[error("{message}")]
    Message {
        /// The message's name in the protocol.
        message: &'static str,
        /// The cause.
        #[source]
        source: vhost::Error,
    },
    /// The back-end does not offer protocol features, without which queues cannot be enabled.
    #[error("the back-end does not offer protocol features")]
    TooOld,
    /// The driver VM's driver has accepted what this back-end cannot do.
    #[error("the back-end lacks features {0:#x} that the driver VM uses")]
    Features(u64),
    /// A thread could not be made.
    #[error("start a thread for the connection")]
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
                // Fails only if the peer was faster.
                let _ = socket.shutdown(Shutdown::Both);
            }
        };
        threads::spawn(Purpose::Brief, "link-deadline", wait).map_err(Error::Thread)?;
        Ok(Self(sender))
    }
}

/// A queue as it is described to the back-end.
pub(super) struct Vring {
    config: VringConfigData,
    /// The used ring's guest address.
    used: u64,
    kick: EventFd,
    call: EventFd,
}

impl Vring {
    /// The queue of these resources.
    pub(super) fn new(resources: &QueueResources) -> Result<Self, Error> {
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
        let duplicate = |event: &EventFd| event.try_clone().map_err(Error::EventFd);
        Ok(Self { config, used: queue.used_ring(), kick: duplicate(kick)?, call: duplicate(call)? })
    }
}

/// The index that the used ring at guest address `used` shows (virtio 1.2, section 2.7.8).
pub(super) fn used_index(memory: &GuestMemoryMmap, used: u64) -> Result<u16, Error> {
    let index = memory.read_obj::<u16>(GuestAddress(used.wrapping_add(2)));
    index.map(u16::from_le).map_err(|source| Error::Ring { address: used, source })
}

/// Everything that a back-end gets in a set-up.
pub(super) struct SetUp {
    /// Features that the driver VM's driver has accepted, of those that the back-end needs to know.
    pub(super) features: u64,
    pub(super) memory: GuestMemoryMmap,
    pub(super) vrings: Vec<Vring>,
}

impl SetUp {
    /// Sets the connection up; from then on the back-end serves the queues. The connection lasts as long as its sockets.
    pub(super) fn run(&self, socket: &UnixStream) -> Result<Frontend, Error> {
        socket.set_nonblocking(false).map_err(Error::Socket)?;
        let _deadline = Deadline::start(socket)?;
        let queues = self.vrings.len() as u64;
        let mut frontend = Frontend::from_stream(high_duplicate(socket).map_err(Error::Socket)?.into(), queues);
        frontend.set_owner().or_else(at("SET_OWNER"))?;
        let offered = frontend.get_features().or_else(at("GET_FEATURES"))?;
        if offered & PROTOCOL_FEATURES == 0 {
            return Err(Error::TooOld);
        }
        if self.features & !offered != 0 {
            return Err(Error::Features(self.features & !offered));
        }
        let protocol = frontend.get_protocol_features().or_else(at("GET_PROTOCOL_FEATURES"))?;
        let wanted = protocol & VhostUserProtocolFeatures::REPLY_ACK;
        frontend.set_protocol_features(wanted).or_else(at("SET_PROTOCOL_FEATURES"))?;
        if !wanted.is_empty() {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_features(self.features | PROTOCOL_FEATURES).or_else(at("SET_FEATURES"))?;
        let regions: Result<Vec<_>, _> = self.memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect();
        let regions = regions.or_else(at("SET_MEM_TABLE"))?;
        frontend.set_mem_table(&regions).or_else(at("SET_MEM_TABLE"))?;
        for (index, vring) in self.vrings.iter().enumerate() {
            let Vring { config, used, kick, call } = vring;
            frontend.set_vring_num(index, config.queue_size).or_else(at("SET_VRING_NUM"))?;
            frontend.set_vring_addr(index, config).or_else(at("SET_VRING_ADDR"))?;
            // The queue goes on where its used ring stands: buffers come back in order, so whatever is not in that ring was not taken.
            // The back-end's process has given up the connection before, so that ring stands still, when it answers on this one.
            let base = used_index(&self.memory, *used)?;
            frontend.set_vring_base(index, base).or_else(at("SET_VRING_BASE"))?;
            frontend.set_vring_call(index, call).or_else(at("SET_VRING_CALL"))?;
            frontend.set_vring_kick(index, kick).or_else(at("SET_VRING_KICK"))?;
            frontend.set_vring_enable(index, true).or_else(at("SET_VRING_ENABLE"))?;
        }
        Ok(frontend)
    }
}
