//! A network device whose queues another process serves by vhost-user: a driver VM's end. The device is there from the
//! start, with its link down; connections with a guest's splitter come and go while the driver VM lives.
//!
//! ```text
//!           connect               both queues run            set up
//!   Absent ---------> Waiting ----------------------> SettingUp ------> Up (link up)
//!     ^                                                    | time over,    | closed, or the driver stops a queue
//!     +----------------------------------------------------+ refused ------+
//! ```
//! This process is not in the data path: kicks and interrupts are eventfds that the back-end gets. Invariants: nothing here
//! waits for a back-end (the set-up has a thread of its own, bounded in time); a connection's rings go on where the used ring
//! in memory stands; the loss of a connection is no error of this VM. Two queues, no control queue.

mod frontend;

use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use event_manager::{EventOps, Events, MutEventSubscriber};
use serde_json::Value;
use umbra_driver_vm::protocol::Mac;
use umbra_shadow::LinkId;
use umbra_splitter::untrusted::Elsewhere;
use vhost::vhost_user::Frontend;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::frontend::{SetUp, Vring, used_index};
use super::config::{F_MAC, F_MTU, F_STATUS, NetConfig};
use crate::base::error::chain;
use crate::base::high_duplicate::high_duplicate;
use crate::vm::virtio::device::{self, QueueResources, QueueState, VirtioDevice};
use crate::vm::virtio::{Outbox, events};
use crate::wire::messages::{Disconnect, FromVm};

pub use self::frontend::Error as LinkError;

/// Device ID of a network device (virtio 1.2, section 5.1.1).
const DEVICE_ID: u16 = 1;
/// Receive and transmit; as large as the guest's own.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Features that make sense with two queues and a back-end that only moves frames: checksum and segmentation offloads both ways,
/// mergeable buffers, indirect descriptors, event indices. They are offered whether a back-end is there or not, and required of
/// each: they are the splitter's own.
const PASSED: u64 = umbra_splitter::net::features::DRIVER_VM;

/// Tags in the event loop.
const TAG_WAKE: u32 = 0;
const TAG_SOCKET: u32 = 1;

/// How the set-up of a connection has ended.
type Outcome = (LinkId, Result<Elsewhere<Frontend>, LinkError>);

/// How far the connection is.
enum Connection {
    Absent,
    /// For the driver to start both queues.
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

/// The device.
pub struct VhostUserNet {
    end: u16,
    config: NetConfig,
    accepted: u64,
    queues: [Option<QueueResources>; QUEUE_SIZES.len()],
    connection: Connection,
    /// Number of the present connection, or of the last one.
    link: Option<LinkId>,
    config_call: Option<EventFd>,
    /// For the event loop: a set-up has ended, or a socket is to be watched no more.
    wake: EventFd,
    set_up: (Sender<Outcome>, Receiver<Outcome>),
    /// Sockets that the event loop may still watch.
    retired: Vec<Elsewhere<UnixStream>>,
    outbox: Outbox,
}

impl VhostUserNet {
    /// End `end` of its driver VM, with address `mac`; messages for the supervisor go to `outbox`.
    pub fn new(end: u16, mac: Mac, mtu: u16, outbox: Outbox) -> std::io::Result<Self> {
        Ok(Self {
            end,
            config: NetConfig { mac, mtu, link_up: false },
            accepted: 0,
            queues: Default::default(),
            connection: Connection::Absent,
            link: None,
            config_call: None,
            wake: EventFd::new(EFD_NONBLOCK)?,
            set_up: channel(),
            retired: Vec::new(),
            outbox,
        })
    }

    /// [`ToVm::Connect`](crate::wire::messages::ToVm::Connect).
    pub fn connect(&mut self, link: LinkId, socket: UnixStream) {
        self.hang_up();
        // The guest notices by it that this process is gone.
        let socket = Elsewhere::new(high_duplicate(&socket).map_or(socket, UnixStream::from));
        self.link = Some(link);
        self.connection = Connection::Waiting { socket };
        self.set_up_if_ready();
    }

    /// Ends the connection, if there is one; its number.
    fn hang_up(&mut self) -> Option<LinkId> {
        let socket = match std::mem::replace(&mut self.connection, Connection::Absent) {
            Connection::Absent => return None,
            Connection::Waiting { socket } | Connection::SettingUp { socket } => {
                // Fails only if the peer was faster.
                let _ = socket.shutdown(Shutdown::Both);
                return self.link;
            }
            Connection::Up { socket, .. } => socket,
        };
        let _ = socket.shutdown(Shutdown::Both);
        self.retired.push(socket);
        self.wake_up();
        self.show_link(false);
        self.link
    }

    /// The connection is over, or could not be set up.
    fn disconnected(&mut self, why: Disconnect) {
        if let Some(link) = self.hang_up() {
            tracing::info!("network device {}: connection {link} is over: {why:?}", self.config.mac);
            (self.outbox)(FromVm::Disconnected { end: self.end, link, why });
        }
    }

    fn wake_up(&self) {
        // Full only if a wake-up is due anyway.
        let _ = self.wake.write(1);
    }

    /// Shows the driver VM's driver whether there is a guest.
    fn show_link(&mut self, up: bool) {
        if std::mem::replace(&mut self.config.link_up, up) != up
            && let Some(call) = &self.config_call
        {
            // Full only if an interrupt is due anyway.
            let _ = call.write(1);
        }
    }

    /// Begins to set the connection up, once the driver runs both queues.
    fn set_up_if_ready(&mut self) {
        let Some(link) = self.link else { return };
        if !(matches!(self.connection, Connection::Waiting { .. }) && self.queues.iter().all(Option::is_some)) {
            return;
        }
        match self.begin_set_up(link) {
            Ok(socket) => self.connection = Connection::SettingUp { socket },
            Err(error) => self.disconnected(Disconnect::NoAnswer(chain(&error))),
        }
    }

    fn begin_set_up(&self, link: LinkId) -> Result<Elsewhere<UnixStream>, LinkError> {
        let Connection::Waiting { socket } = &self.connection else { unreachable!("asked for before") };
        let queues: Vec<_> = self.queues.iter().flatten().collect();
        let vrings = queues.iter().map(|queue| Vring::new(queue)).collect::<Result<_, _>>()?;
        let Some(memory) = queues.first().map(|queue| queue.memory.clone()) else { unreachable!("both queues run") };
        let set_up = SetUp { features: self.accepted & PASSED, memory, vrings };
        let (ours, theirs) = (high_duplicate(&**socket).map(UnixStream::from), socket.try_clone());
        let (ours, theirs) = (Elsewhere::new(ours.map_err(LinkError::Socket)?), theirs.map_err(LinkError::Socket)?);
        let wake = self.wake.try_clone().map_err(LinkError::EventFd)?;
        let sender = self.set_up.0.clone();
        let run = move || {
            // The receiver is gone only with the whole device.
            let _ = sender.send((link, set_up.run(&theirs).map(Elsewhere::new)));
            let _ = wake.write(1);
        };
        std::thread::Builder::new().name("link-set-up".into()).spawn(run).map_err(LinkError::Thread)?;
        Ok(ours)
    }

    /// Set-ups that have ended.
    fn take_set_ups(&mut self, ops: &mut EventOps) {
        while let Ok((link, outcome)) = self.set_up.1.try_recv() {
            // The result of a connection that was given up meanwhile.
            if self.link != Some(link) || !matches!(self.connection, Connection::SettingUp { .. }) {
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
        events::add(ops, Events::with_data(&*socket, TAG_SOCKET, EventSet::READ_HANG_UP));
        self.connection = Connection::Up { socket, _frontend: frontend };
        self.show_link(true);
    }
}

impl MutEventSubscriber for VhostUserNet {
    fn init(&mut self, ops: &mut EventOps) {
        events::add(ops, Events::with_data(&self.wake, TAG_WAKE, EventSet::IN));
    }

    fn process(&mut self, event: Events, ops: &mut EventOps) {
        if event.data() == TAG_SOCKET {
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

impl VirtioDevice for VhostUserNet {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        PASSED | F_MAC | F_MTU | F_STATUS
    }

    fn set_features(&mut self, accepted: u64) {
        self.accepted = accepted;
    }

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn set_config_interrupt(&mut self, call: EventFd) {
        self.config_call = Some(call);
    }

    fn start_queue(
        &mut self,
        index: u16,
        resources: QueueResources,
        _state: Option<QueueState>,
    ) -> Result<(), device::Error> {
        let place = self.queues.get_mut(usize::from(index)).ok_or(device::Error::NoSuchQueue(index))?;
        *place = Some(resources);
        self.set_up_if_ready();
        Ok(())
    }

    /// The back-end stops with its connection, within a turn of its event loop.
    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let resources = self.queues.get_mut(usize::from(index))?.take()?;
        if !matches!(self.connection, Connection::Waiting { .. }) {
            self.disconnected(Disconnect::Stopped);
        }
        let at = used_index(&resources).ok()?;
        Some(QueueState { next_avail: at, next_used: at })
    }

    fn reset(&mut self) {
        self.config_call = None;
    }

    /// Nothing but its queues, unless a guest has ever been connected: the VM's memory holds that guest's frames.
    fn save(&self) -> Result<Value, String> {
        if self.link.is_some() { Err("has been connected with a guest".into()) } else { Ok(Value::Null) }
    }

    fn restore(&mut self, _: Value) -> Result<(), String> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
