//! A network device whose queues another process serves by vhost-user: the driver VM's end of a link. This
//! process is not in the data path: kicks and interrupts are eventfds that the back-end gets. Invariant: the
//! loss of the link is no error of this VM, whose device then stands still (the supervisor decides what
//! follows). Two queues, no control queue.

mod frontend;

use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;

use event_manager::{EventOps, Events, MutEventSubscriber};
use thiserror::Error;
use umbra_driver_vm::protocol::Mac;
use vmm_sys_util::epoll::EventSet;

use self::frontend::Connection;
use crate::base::high_duplicate::twin;
use crate::vm::virtio::device::{self, QueueResources, QueueState, VirtioDevice};
use crate::vm::virtio::events;

use super::config::{F_MAC, F_MTU, NetConfig};

pub use self::frontend::Error as LinkError;

/// Device ID of a network device (virtio 1.2, section 5.1.1).
const DEVICE_ID: u16 = 1;
/// Receive and transmit; as large as the guest's own.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Features that make sense with two queues and a back-end that only moves frames: checksum and segmentation
/// offloads both ways, mergeable buffers, indirect descriptors, event indices.
const PASSED: u64 = 1 << 0 | 1 << 1 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 12 | 1 << 15 | 1 << 28 | 1 << 29 | 1 << 32;

/// The device cannot be made.
#[derive(Debug, Error)]
#[error("connect the driver VM's network device {mac} to its guest by vhost-user")]
pub struct Error {
    mac: Mac,
    #[source]
    source: LinkError,
}

/// The device.
pub struct VhostUserNet {
    connection: Connection,
    /// The same socket, watched for its end; `None` once that has come.
    watched: Option<UnixStream>,
    config: NetConfig,
    accepted: u64,
    /// Features and memory are told.
    set_up: bool,
    running: [bool; QUEUE_SIZES.len()],
}

impl VhostUserNet {
    /// The device with address `mac`, over a connected socket whose other end is (or will be within seconds) a
    /// back-end's.
    #[expect(clippy::needless_pass_by_value, reason = "the socket is the device's: nobody else is to use it")]
    pub fn new(mac: Mac, mtu: u16, socket: UnixStream) -> Result<Self, Error> {
        let open = || {
            let twin = || twin(&socket).map(UnixStream::from).map_err(LinkError::Socket);
            // The guest notices by it that this process is gone.
            let (socket, watched) = (twin()?, twin()?);
            Ok((Connection::open(socket, QUEUE_SIZES.len() as u64)?, watched))
        };
        let (connection, watched) = open().map_err(|source| Error { mac, source })?;
        let config = NetConfig { mac, mtu, link_up: true };
        let running = [false; QUEUE_SIZES.len()];
        Ok(Self { connection, watched: Some(watched), config, accepted: 0, set_up: false, running })
    }

    /// The device over the socket that this process inherited under number `fd`.
    ///
    /// # Safety
    /// Nothing else in this process may own `fd`.
    pub unsafe fn from_inherited(mac: Mac, mtu: u16, fd: i32) -> Result<Self, Error> {
        // SAFETY: the caller's promise.
        let socket = unsafe { UnixStream::from_raw_fd(fd) };
        Self::new(mac, mtu, socket)
    }

    fn start(&mut self, index: usize, resources: &QueueResources, state: Option<QueueState>) -> Result<(), LinkError> {
        if !self.set_up {
            self.connection.set_up(self.accepted, &resources.memory)?;
            self.set_up = true;
        }
        self.connection.start(index, state.map_or(0, |state| state.next_avail), resources)
    }
}

impl MutEventSubscriber for VhostUserNet {
    fn init(&mut self, ops: &mut EventOps) {
        if let Some(socket) = &self.watched {
            events::add(ops, Events::new(socket, EventSet::READ_HANG_UP));
        }
    }

    fn process(&mut self, _: Events, ops: &mut EventOps) {
        if let Some(socket) = self.watched.take() {
            events::remove(ops, Events::empty(&socket));
            tracing::info!("network device {}: the guest has closed the link", self.config.mac);
        }
    }
}

impl VirtioDevice for VhostUserNet {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.connection.features() & PASSED | F_MAC | F_MTU
    }

    fn set_features(&mut self, accepted: u64) {
        self.accepted = accepted;
    }

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn start_queue(
        &mut self,
        index: u16,
        resources: QueueResources,
        state: Option<QueueState>,
    ) -> Result<(), device::Error> {
        let place = usize::from(index);
        if place >= QUEUE_SIZES.len() {
            return Err(device::Error::NoSuchQueue(index));
        }
        self.start(place, &resources, state).map_err(|source| device::Error::Backend {
            operation: format!("hand queue {index} of network device {} over by vhost-user", self.config.mac),
            source: source.into(),
        })?;
        self.running[place] = true;
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let running = self.running.get_mut(usize::from(index))?;
        if !std::mem::take(running) {
            return None;
        }
        match self.connection.stop(index.into()) {
            // A back-end stops when it has completed what it took.
            Ok(base) => Some(QueueState { next_avail: base, next_used: base }),
            Err(error) => {
                tracing::info!("network device {}: queue {index} is not given back: {error}", self.config.mac);
                None
            }
        }
    }

    fn reset(&mut self) {
        self.set_up = false;
    }
}

#[cfg(test)]
mod tests;
