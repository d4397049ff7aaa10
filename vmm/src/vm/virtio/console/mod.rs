//! A console device with named ports (virtio 1.2, section 5.3), 1 and up. Port 0 is the VM's console (`hvc0`) where it has one here, and
//! else not announced: drivers may take it for a console. Invariant: the driver learns that a host's end is connected before data flows,
//! and that it is gone after the last byte. No resize, no emergency write.
//!
//! The queues of a port whose end is [`PortEnd::VhostUser`](crate::wire::messages::PortEnd::VhostUser) are served by another process:
//! this one keeps the control queues, shows the driver the port open while there is a connection, and closed without one, and has a
//! connection set up when a program in the guest has the port open. The program may close the port when it sees the host's end
//! closed, or not: the protocol on such a port has to begin each connection with a record that names it, and both sides skip
//! what is of an earlier one. A program that closes the port ends the connection: what the kernel had for it is lost.

pub mod control;
mod port;
mod state;

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, Events, MutEventSubscriber};
use serde_json::Value;
use thiserror::Error;
use umbra_shadow::LinkId;
use umbra_splitter::copy::{gather, scatter};
use umbra_splitter::log_limit::LogLimit;
use umbra_splitter::queue::{Chain, RingFault, Virtqueue};
use umbra_splitter::untrusted::Stream;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::control::{FromDriver, MESSAGE_SIZE, ToDriver};
use self::port::{End, Port};
use super::device::{self, QueueResources, QueueState, VirtioDevice};
use super::events::{self, FIRST_DEVICE_TAG, QueueEvents, Wake};
use super::vhost_user::{FrontEnd, Tags};
use super::{Outbox, queue, read_config};
use crate::vm::machine::legacy::SerialLine;
use crate::wire::messages::PortBackend;

pub use self::port::Error as PortError;

/// Device ID (section 5.3.1).
const DEVICE_ID: u16 = 3;
/// There are several ports and control queues.
const F_MULTIPORT: u64 = 1 << 1;
/// Of the transport; a back-end has to know of it.
const F_VERSION_1: u64 = 1 << 32;
/// Requests may be indirect descriptors; event indices save exits.
const F_RING: u64 = 1 << 28 | 1 << 29;
const QUEUE_SIZE: u16 = 128;
/// Control queues; those of port 0 are before, those of ports 1 and up behind.
const CONTROL_RX: u16 = 2;
const CONTROL_TX: u16 = 3;
/// Most ports: each takes two queues and two interrupt vectors.
pub const MAX_PORTS: usize = 31;
/// Tag of the eventfd that calls the event loop, below those of the ports' descriptors.
const WAKE: u32 = FIRST_DEVICE_TAG;
/// First tag of the ports' descriptors.
const FIRST_PORT_TAG: u32 = FIRST_DEVICE_TAG + 2;
/// Most messages that wait for the driver to take them; until then its own are not read either.
const MAX_PENDING: usize = 2 * MAX_PORTS;
/// Rounds of control messages in one turn: as many as the driver's queue holds messages.
const BUDGET: u16 = QUEUE_SIZE;

/// Errors of making a console device.
#[derive(Debug, Error)]
pub enum Error {
    /// Too many.
    #[error("{0} console ports; a VM has at most {MAX_PORTS}")]
    TooManyPorts(usize),
    /// One port's.
    #[error(transparent)]
    Port(#[from] PortError),
    /// No eventfd.
    #[error("create an eventfd for the console")]
    EventFd(#[source] std::io::Error),
}

/// What a queue, or a call of the event loop, is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    ControlRx,
    ControlTx,
    /// A port's, index into `ports`.
    Port(usize),
    /// Those of all ports.
    AllPorts,
    /// Those of port 0 where there is none.
    Unused,
}

/// How the ports are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Numbers {
    /// The first one is 0, a console.
    FromConsole,
    /// The first one is 1.
    FromOne,
}

/// The device.
pub struct Console {
    ports: Vec<Port>,
    numbers: Numbers,
    /// What the event loop watches of each port.
    watched: Vec<Watched>,
    queues: Vec<Option<Virtqueue>>,
    sizes: Vec<u16>,
    events: QueueEvents,
    /// Calls the event loop to look at every port.
    wake: EventFd,
    pending: VecDeque<ToDriver>,
    /// The driver asked for ports.
    driver_ready: bool,
    broken: bool,
    config_call: Option<EventFd>,
    log: LogLimit,
}

/// The stream that the event loop watches for a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Watched(Option<(RawFd, EventSet)>);

impl Console {
    /// A console with `ports`, which are joined to their host's ends at once; messages for the supervisor go to `outbox`.
    ///
    /// With a `line` the VM's console is here: port 0 prints and is typed at as that is.
    pub fn new(ports: &[PortBackend], line: Option<Arc<Mutex<SerialLine>>>, outbox: &Outbox) -> Result<Self, Error> {
        if ports.len() > MAX_PORTS {
            return Err(Error::TooManyPorts(ports.len()));
        }
        let numbers = if line.is_some() { Numbers::FromConsole } else { Numbers::FromOne };
        let console = line.map(Port::console);
        let first = usize::from(console.is_some());
        let make = |(index, port)| Port::new(port, tags(index), outbox);
        let ports = (first..).zip(ports).map(make);
        let ports: Vec<_> = console.into_iter().chain(ports).collect::<Result<_, _>>()?;
        let count = 2 * numbers.count(ports.len()) + 2;
        Ok(Self {
            numbers,
            watched: vec![Watched::default(); ports.len()],
            ports,
            queues: (0..count).map(|_| None).collect(),
            sizes: vec![QUEUE_SIZE; count],
            events: QueueEvents::new(count).map_err(Error::EventFd)?,
            wake: EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?,
            pending: VecDeque::new(),
            driver_ready: false,
            broken: false,
            config_call: None,
            log: LogLimit::default(),
        })
    }

    /// Whether the port of this name is given its peers by [`Self::connect`].
    pub fn takes_peers(&self, port_name: &str) -> bool {
        self.ports.iter().any(|port| port.name == port_name && port.takes_peers())
    }

    /// Gives the port of this name its peer: connection `link` of the driver VM's end `end`.
    ///
    /// With [`PortEnd::Attached`](crate::wire::messages::PortEnd::Attached) it is a stream. One that is there is closed; the guest sees
    /// the port closed until a program has closed it, and with it what is left of the older peer in the guest's kernel. With
    /// [`PortEnd::VhostUser`](crate::wire::messages::PortEnd::VhostUser) it is a vhost-user connection, which takes the place of one that
    /// is there.
    pub fn connect(&mut self, port_name: &str, (end, link): (u16, LinkId), socket: UnixStream) {
        let taker = |port: &&mut Port| port.name == port_name && port.takes_peers();
        let Some(port) = self.ports.iter_mut().find(taker) else {
            return tracing::error!("console port {port_name}: there is none that can be given a peer");
        };
        if let Some(front) = port.front() {
            front.connect(end, link, socket);
        } else {
            match Stream::new(socket) {
                Ok(stream) => port.give(stream),
                Err(error) => return tracing::error!("console port {port_name}: {error}"),
            }
        }
        self.call_loop();
    }

    /// The front-end that has queue `index`, and which of its two that is; `None`: the queue is served here.
    fn served_elsewhere(&mut self, index: u16) -> Option<(&mut FrontEnd, u16)> {
        let Role::Port(port) = self.numbers.role(index) else { return None };
        Some((self.ports.get_mut(port)?.front()?, index % 2))
    }

    fn call_loop(&self) {
        // Fails only when 2^64 - 2 calls wait: then one waits anyway.
        let _ = self.wake.write(1);
    }

    fn served(&mut self, role: Role) -> Result<(), RingFault> {
        match role {
            Role::ControlRx | Role::ControlTx => {
                let mut more = true;
                for _ in 0..BUDGET {
                    more = self.read_control()?;
                    self.announce();
                    self.write_control()?;
                    if !more {
                        break;
                    }
                }
                if more && let Some(queue) = &self.queues[usize::from(CONTROL_TX)] {
                    // As the driver would, which was not asked to. Fails only when 2^64 - 2 kicks wait: then one waits anyway.
                    let _ = queue.kick().write(1);
                }
                (0..self.ports.len()).try_for_each(|index| self.pump(index))?;
            }
            Role::Port(index) => self.pump(index)?,
            Role::AllPorts => (0..self.ports.len()).try_for_each(|index| self.pump(index))?,
            Role::Unused => {}
        }
        self.announce();
        self.write_control()?;
        // What waits for the driver may be the word that a port is open.
        if self.pending.is_empty() {
            self.ports.iter_mut().for_each(Port::set_up_if_ready);
        }
        Ok(())
    }

    fn pump(&mut self, index: usize) -> Result<(), RingFault> {
        let Some(port) = self.ports.get_mut(index) else { return Ok(()) };
        let [rx, tx] = self.numbers.queues(index);
        let mut settled = false;
        // Twice: the first round may end a peer, whose last bytes are dropped in the second.
        for _ in 0..2 {
            if let Some(queue) = self.queues[tx].as_mut().filter(|_| !settled) {
                port.pump_to_host(queue)?;
            }
            settled = port.settle();
        }
        if !settled {
            // Fails only when 2^64 - 2 calls wait: then one waits anyway.
            let _ = self.wake.write(1);
        }
        // Data before the announcement would be thrown away by the driver.
        if let Some(queue) = self.queues[rx].as_mut().filter(|_| port.announced) {
            port.pump_to_guest(queue)?;
        }
        Ok(())
    }

    /// Handles what the driver says; true if it has said more and there is room for answers.
    fn read_control(&mut self) -> Result<bool, RingFault> {
        let mut messages = Vec::new();
        // One message can make a message for each port; what there is no room for stays in the driver's queue.
        let room = MAX_PENDING.saturating_sub(self.pending.len()) / (self.ports.len() + 1);
        let mut more = false;
        if let Some(queue) = self.queues[usize::from(CONTROL_TX)].as_mut().filter(|_| room > 0) {
            more = take_messages(queue, room, &mut messages)?;
            queue.notify()?;
        }
        messages.into_iter().for_each(|message| self.control(FromDriver::parse(message)));
        Ok(more)
    }

    fn control(&mut self, message: FromDriver) {
        tracing::trace!("console: {message:?}");
        match message {
            FromDriver::DeviceReady(true) if !self.driver_ready => {
                self.driver_ready = true;
                self.pending.extend(self.numbers.ids().zip(&self.ports).map(|(id, _)| ToDriver::Add(id)));
            }
            FromDriver::PortReady { port: id, ready } => {
                let index = self.numbers.index(id);
                let Some(port) = index.and_then(|index| self.ports.get_mut(index)) else { return };
                port.ready = ready;
                port.announced = false;
                if ready {
                    let name = || ToDriver::Name(id, port.name.clone());
                    self.pending.push_back(if port.is_console() { ToDriver::Console(id) } else { name() });
                }
            }
            FromDriver::PortOpen { port: id, open } => {
                let index = self.numbers.index(id);
                if let Some(port) = index.and_then(|index| self.ports.get_mut(index)) {
                    tracing::debug!(
                        "console port {}: {} in the guest",
                        port.name,
                        if open { "opened" } else { "closed" }
                    );
                    port.open = open;
                    if !open {
                        port.closed();
                    }
                }
            }
            FromDriver::DeviceReady(_) => {}
            FromDriver::Unknown(event) => tracing::debug!("console: unknown control event {event}"),
        }
    }

    /// Informs the driver of host's ends that were connected or disconnected.
    fn announce(&mut self) {
        for (id, port) in self.numbers.ids().zip(&mut self.ports) {
            let connected = port.is_connected();
            if port.ready && port.announced != connected && self.pending.len() < MAX_PENDING {
                port.announced = connected;
                self.pending.push_back(ToDriver::Open(id, connected));
            }
        }
    }

    fn write_control(&mut self) -> Result<(), RingFault> {
        let Some(queue) = &mut self.queues[usize::from(CONTROL_RX)] else { return Ok(()) };
        give_messages(queue, &mut self.pending)?;
        queue.notify()
    }

    /// Serves what the event asks for.
    fn serve(&mut self, role: Role) {
        if self.broken {
            return;
        }
        // Twice: the first round may have announced a port, whose data can flow now.
        if let Err(error) = self.served(role).and_then(|()| self.served(role)) {
            self.log.warn(format_args!("console: the driver broke a rule of its queues: {error}"));
            self.broken = true;
            if let Some(call) = &self.config_call {
                // Fails only when 2^64 - 2 interrupts wait: then one waits anyway.
                let _ = call.write(1);
            }
        }
    }

    fn watch(&mut self, ops: &mut EventOps) {
        for (index, (port, watched)) in self.ports.iter_mut().zip(&mut self.watched).enumerate() {
            let [rx, _] = self.numbers.queues(index);
            let room = self.queues[rx].as_mut().is_some_and(|queue| has_requests(queue).unwrap_or(false));
            let reads = port.open && port.announced && room && !self.broken;
            let mut set = EventSet::empty();
            set.set(EventSet::IN, reads && !port.silent);
            set.set(EventSet::OUT, port.wants_to_write() && !self.broken);
            // A stream that nobody waits for is not watched at all: its end, which is part of every set, would be reported without pause.
            let stream = port.stream.as_ref().filter(|_| reads || !set.is_empty());
            watched.change(stream.map(|stream| (stream.as_raw_fd(), set)), stream_tag(index), ops);
            port.gone.clear();
        }
    }
}

impl Watched {
    fn change(&mut self, wanted: Option<(RawFd, EventSet)>, tag: u32, ops: &mut EventOps) {
        if self.0 == wanted {
            return;
        }
        match (self.0, wanted) {
            (Some((old, _)), Some((new, set))) if old == new => {
                events::modify(ops, Events::with_data_raw(new, tag, set));
            }
            (old, new) => {
                if let Some((fd, _)) = old {
                    events::remove(ops, Events::empty_raw(fd));
                }
                if let Some((fd, set)) = new {
                    events::add(ops, Events::with_data_raw(fd, tag, set));
                }
            }
        }
        self.0 = wanted;
    }
}

/// Takes up to `most` messages of the driver; true if there are more.
fn take_messages(queue: &mut Virtqueue, most: usize, into: &mut Vec<[u8; MESSAGE_SIZE]>) -> Result<bool, RingFault> {
    let mut ring = queue.open()?;
    let mut chain = Chain::default();
    for _ in 0..most {
        if ring.available()? == 0 && !ring.listen(0)? {
            return Ok(false);
        }
        let head = ring.head(0)?;
        let mut bytes = [0; MESSAGE_SIZE];
        let sound = ring.walk(head, &mut chain).is_ok();
        if sound && gather(chain.readable(), 0, &mut bytes) == MESSAGE_SIZE {
            into.push(bytes);
        }
        ring.take(1);
        ring.complete(head, 0)?;
    }
    Ok(ring.available()? > 0 || ring.listen(0)?)
}

/// Gives the driver the messages that it has buffers for. A buffer that is too small gets nothing and its message
/// is lost: the driver's doing.
fn give_messages(queue: &mut Virtqueue, messages: &mut VecDeque<ToDriver>) -> Result<(), RingFault> {
    let mut ring = queue.open()?;
    let mut chain = Chain::default();
    while let Some(message) = messages.front() {
        if ring.available()? == 0 && !ring.listen(0)? {
            break;
        }
        let head = ring.head(0)?;
        let bytes = message.bytes();
        let sound = ring.walk(head, &mut chain).is_ok() && chain.writable_len() >= bytes.len();
        let written = if sound { scatter(&bytes, chain.writable(), 0) } else { 0 };
        ring.take(1);
        ring.complete(head, u32::try_from(written).unwrap_or(0))?;
        messages.pop_front();
    }
    Ok(())
}

/// True if a buffer waits; else the driver kicks when one comes.
fn has_requests(queue: &mut Virtqueue) -> Result<bool, RingFault> {
    let mut ring = queue.open()?;
    Ok(ring.available()? > 0 || ring.listen(0)?)
}

impl Numbers {
    /// What the driver calls the ports, one after the other.
    fn ids(self) -> std::ops::RangeFrom<u32> {
        match self {
            Self::FromConsole => 0..,
            Self::FromOne => 1..,
        }
    }

    /// Number of ports for the driver, which counts a port 0 that is not there as well, if there are `ports`.
    fn count(self, ports: usize) -> usize {
        ports + usize::from(self == Self::FromOne)
    }

    /// Index into `ports` of the port that the driver calls `id`.
    fn index(self, id: u32) -> Option<usize> {
        usize::try_from(id.checked_sub(self.ids().start)?).ok()
    }

    fn role(self, queue: u16) -> Role {
        match queue {
            0 | 1 if self == Self::FromConsole => Role::Port(0),
            0 | 1 => Role::Unused,
            CONTROL_RX => Role::ControlRx,
            CONTROL_TX => Role::ControlTx,
            other => self.index(u32::from(other / 2 - 1)).map_or(Role::Unused, Role::Port),
        }
    }

    /// Receive and transmit queue of `ports[index]`.
    fn queues(self, index: usize) -> [usize; 2] {
        match (self, index) {
            (Self::FromConsole, 0) => [0, 1],
            (Self::FromConsole, _) => [2 * index + 2, 2 * index + 3],
            (Self::FromOne, _) => [2 * index + 4, 2 * index + 5],
        }
    }
}

/// Tags of a port's descriptors in the event loop: even for the listener, odd for the stream.
fn listener_tag(index: usize) -> u32 {
    // At most `MAX_PORTS`.
    FIRST_PORT_TAG + 2 * u32::try_from(index).unwrap_or(0)
}

fn stream_tag(index: usize) -> u32 {
    listener_tag(index) + 1
}

/// Tags of the descriptors of a port whose queues another process serves: the same two.
fn tags(index: usize) -> Tags {
    Tags { wake: listener_tag(index), socket: stream_tag(index) }
}

impl MutEventSubscriber for Console {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
        events::add(ops, Events::with_data(&self.wake, WAKE, EventSet::IN));
        for (index, port) in self.ports.iter().enumerate() {
            match &port.end {
                End::Listen { listener, .. } => {
                    events::add(ops, Events::with_data(listener, listener_tag(index), EventSet::IN));
                }
                End::VhostUser(front) => front.init(ops),
                End::Console { typed, .. } => {
                    events::add(ops, Events::with_data(typed, listener_tag(index), EventSet::IN));
                }
                End::Inherited | End::Attached { .. } => {}
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        for wake in self.events.process(events, ops) {
            match wake {
                Wake::Started(queue) | Wake::Kicked(queue) => self.serve(self.numbers.role(queue)),
                Wake::Device(WAKE) => {
                    let _ = self.wake.read();
                    self.serve(Role::AllPorts);
                }
                Wake::Device(tag) => {
                    let index = (tag.saturating_sub(FIRST_PORT_TAG) / 2) as usize;
                    if let Some(port) = self.ports.get_mut(index) {
                        match &mut port.end {
                            End::VhostUser(front) => front.process(events, ops),
                            End::Console { typed, .. } => drop(typed.read()),
                            _ if tag == listener_tag(index) => port.accept(),
                            _ => {}
                        }
                    }
                    self.serve(Role::Port(index));
                }
            }
        }
        self.watch(ops);
    }
}

impl VirtioDevice for Console {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn features(&self) -> u64 {
        F_MULTIPORT | F_RING
    }

    fn set_features(&mut self, accepted: u64) {
        if accepted & F_MULTIPORT == 0 {
            self.ports.iter_mut().filter(|port| port.is_console()).for_each(Port::open_alone);
        }
        for front in self.ports.iter_mut().filter_map(Port::front) {
            front.set_features(accepted & (F_RING | F_VERSION_1));
        }
    }

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        // Columns and rows (not offered), then the number of ports, port 0 among them (section 5.3.4).
        let mut config = [0; 12];
        let ports = u32::try_from(self.numbers.count(self.ports.len())).unwrap_or(1);
        config[4..8].copy_from_slice(&ports.to_le_bytes());
        read_config(&config, offset, data);
    }

    fn set_config_interrupt(&mut self, call: EventFd) {
        self.config_call = Some(call);
    }

    fn start_queue(
        &mut self,
        index: u16,
        resources: QueueResources,
        state: Option<QueueState>,
    ) -> Result<(), device::Error> {
        if let Some((front, queue)) = self.served_elsewhere(index) {
            front.start_queue(queue, resources)?;
            self.call_loop();
            return Ok(());
        }
        queue::start_in((&mut self.queues, &mut self.events), index, resources, state)
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        if let Some((front, queue)) = self.served_elsewhere(index) {
            return front.stop_queue(queue);
        }
        queue::stop_in((&mut self.queues, &mut self.events), index)
    }

    fn reset(&mut self) {
        self.pending.clear();
        self.driver_ready = false;
        self.broken = false;
        self.ports.iter_mut().for_each(Port::reset);
    }

    fn save(&self) -> Result<Value, String> {
        self.save_state()
    }

    fn restore(&mut self, state: Value) -> Result<(), String> {
        self.restore_state(state)
    }

    fn needs_reset(&self) -> bool {
        self.broken
    }
}

#[cfg(test)]
pub(super) mod tests;
