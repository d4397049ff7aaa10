//! A network device on a TAP interface of the host (virtio 1.2, section 5.1). Queue 0 receives, 1 transmits, 2
//! is the control queue, whose receive modes are acknowledged and change nothing: a TAP passes what its bridge
//! gives it. Invariant: a frame is read from the host only when there is a buffer of the guest for it.
//!
//! An interface that is removed under the guest, as by a restart of the host's network, is a cable that is pulled: the guest sees its
//! link down until there is an interface of that name again, which the supervisor opens.

mod frames;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use nix::sys::timerfd::{Expiration, TimerFd, TimerSetTimeFlags};
use thiserror::Error;
use umbra_driver_vm::protocol::Mac;
use umbra_shadow::net::rx_mode::RxFilter;
use umbra_splitter::control;
use umbra_splitter::header::Offloads;
use umbra_splitter::log_limit::LogLimit;
use umbra_splitter::net::features;
use umbra_splitter::queue::Virtqueue;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use self::frames::{End, Receiver, Sender};
use crate::base::timer;
use crate::host::tap::{self, Tap};
use crate::vm::virtio::device::{self, QueueResources, QueueState, VirtioDevice};
use crate::vm::virtio::events::{self, FIRST_DEVICE_TAG, QueueEvents, Wake};
use crate::vm::virtio::net::config::NetConfig;
use crate::vm::virtio::{Outbox, queue};
use crate::wire::messages::FromVm;

/// Device ID (section 5.1.1).
const DEVICE_ID: u16 = 1;
/// Queue sizes. 256 as everywhere for a network device; control commands come one at a time.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const CONTROL: u16 = 2;

/// Tags of the device's own descriptors in the event loop.
const TAG_TAP: u32 = FIRST_DEVICE_TAG;
const TAG_AGAIN: u32 = FIRST_DEVICE_TAG + 1;
const TAG_LOOK: u32 = FIRST_DEVICE_TAG + 2;

/// Interval at which an interface that is gone is looked for. A restart of the host's network takes seconds.
const LOOK: Duration = Duration::from_millis(500);

/// Errors of making the device.
#[derive(Debug, Error)]
pub enum Error {
    /// The interface.
    #[error(transparent)]
    Tap(#[from] tap::Error),
    /// No eventfd, or no timer.
    #[error("create an eventfd and a timer for a network device")]
    EventFd(#[source] std::io::Error),
}

/// The device.
pub struct TapNet {
    tap: Tap,
    filter: RxFilter,
    mtu: u16,
    queues: [Option<Virtqueue>; QUEUE_SIZES.len()],
    events: QueueEvents,
    receiver: Receiver,
    sender: Sender,
    /// Signalled by the device itself when frames to send or commands are left for the next turn.
    again: EventFd,
    /// The event loop watches the interface.
    watched: bool,
    /// The interface is gone.
    gone: bool,
    /// Set while it is looked for.
    look: TimerFd,
    /// Why the interface that is there again cannot be used, as it was last reported.
    refused: String,
    /// What the supervisor has answered to the question for it, and was not looked at yet.
    answer: Option<Result<File, String>>,
    accepted: u64,
    broken: bool,
    config_call: Option<EventFd>,
    log: LogLimit,
    outbox: Outbox,
}

impl TapNet {
    /// The device with address `mac` on the TAP interface `interface`.
    /// Messages for the supervisor go to `outbox`.
    pub fn new(interface: &str, mac: Mac, mtu: u16, outbox: Outbox) -> Result<Self, Error> {
        Self::on(Tap::open(interface, mtu)?, mac, mtu, outbox).map_err(Error::EventFd)
    }

    fn on(tap: Tap, mac: Mac, mtu: u16, outbox: Outbox) -> std::io::Result<Self> {
        Ok(Self {
            tap,
            filter: RxFilter::new(mac.0),
            mtu,
            queues: [const { None }; QUEUE_SIZES.len()],
            events: QueueEvents::new(QUEUE_SIZES.len())?,
            receiver: Receiver::new(),
            sender: Sender::new(),
            again: EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK)?,
            watched: false,
            gone: false,
            look: timer::monotonic()?,
            refused: String::new(),
            answer: None,
            accepted: 0,
            broken: false,
            config_call: None,
            log: LogLimit::default(),
            outbox,
        })
    }

    fn served(&mut self, queue: u16) -> Result<(), frames::Error> {
        let tap = self.tap.file().as_raw_fd();
        let Some(Some(active)) = self.queues.get_mut(usize::from(queue)) else { return Ok(()) };
        let (more, done) = match queue {
            CONTROL => (control::serve(active, &mut self.filter)?.more, Ok(())),
            TRANSMIT => {
                let sent = self.sender.transmit(tap, active);
                // An interface that is gone takes the rest as well: the queue is emptied, or its driver would wait for ever.
                let more = matches!(sent, Ok(End::Budget) | Err(frames::Error::Gone(_)));
                (more, sent.map(drop))
            }
            _ => (false, Ok(())),
        };
        if more {
            // Fails only when 2^64 - 2 wake-ups wait: then one waits anyway.
            let _ = self.again.write(1);
        }
        done
    }

    /// Moves received frames; true if the interface is to be watched for more.
    fn received(&mut self) -> Result<bool, frames::Error> {
        let tap = self.tap.file().as_raw_fd();
        let Some(queue) = self.queues[usize::from(RECEIVE)].as_mut().filter(|_| !self.gone) else { return Ok(false) };
        Ok(self.receiver.receive(tap, queue)? != End::NoBuffers)
    }

    fn serve(&mut self, wake: Wake, ops: &mut EventOps) {
        if wake == Wake::Device(TAG_AGAIN) {
            // Empty already is fine. Left full it would wake the loop without end.
            let _ = self.again.read();
            if self.take_interface(ops) && !self.broken {
                // The guest's buffers are from before: it announces none for the new interface.
                return self.serve(Wake::Started(RECEIVE), ops);
            }
        }
        if wake == Wake::Device(TAG_LOOK) {
            let _ = self.look.wait();
            let interface = self.tap.interface().into();
            (self.outbox)(FromVm::WantTap { interface });
        }
        if self.broken {
            return;
        }
        let done = match wake {
            Wake::Device(TAG_AGAIN) => {
                let sent = self.served(TRANSMIT);
                self.served(CONTROL).and(sent)
            }
            Wake::Started(RECEIVE) | Wake::Kicked(RECEIVE) | Wake::Device(_) => {
                self.received().map(|more| self.watch(more, ops))
            }
            Wake::Started(queue) | Wake::Kicked(queue) => self.served(queue),
        };
        match done {
            Ok(()) => {}
            Err(frames::Error::Gone(error)) => self.lose_interface(&error, ops),
            Err(frames::Error::Ring(fault)) => self.fail(&fault, ops),
        }
    }

    /// The interface is gone: the guest's link is down until it is there again.
    fn lose_interface(&mut self, error: &std::io::Error, ops: &mut EventOps) {
        if std::mem::replace(&mut self.gone, true) {
            return;
        }
        self.log.warn(format_args!("network device: TAP {} is gone: {error}", self.tap.interface()));
        self.watch(false, ops);
        let every = Expiration::Interval(LOOK.into());
        if let Err(error) = self.look.set(every, TimerSetTimeFlags::empty()) {
            tracing::error!(%error, "set the timer of a network device");
        }
        self.tell_link("is gone".into());
    }

    /// The interface's name.
    pub fn interface(&self) -> &str {
        self.tap.interface()
    }

    /// The supervisor's answer to [`FromVm::WantTap`]: the interface, or why it cannot be used.
    pub fn answered(&mut self, answer: Result<File, String>) {
        self.answer = Some(answer);
        // Fails only when 2^64 - 2 wake-ups wait: then one waits anyway.
        let _ = self.again.write(1);
    }

    /// Looks at the supervisor's answer; true if the interface is there again, and nothing has come from it yet.
    fn take_interface(&mut self, ops: &mut EventOps) -> bool {
        match self.answer.take().filter(|_| self.gone) {
            Some(Ok(file)) => {
                self.watch(false, ops);
                (self.tap, self.gone) = (Tap::from_file(self.tap.interface(), file), false);
                self.refused.clear();
                let _ = self.look.unset();
                self.set_offloads(self.accepted);
                self.tell_link("is there again".into());
                // What else was left for this turn is done in the next one.
                let _ = self.again.write(1);
                return true;
            }
            Some(Err(why)) if self.refused != why => {
                self.refused.clone_from(&why);
                self.tell_link(format!("is there again, but cannot be used: {why}"));
            }
            Some(Err(_)) | None => {}
        }
        false
    }

    /// Shows guest and supervisor what has become of the link.
    fn tell_link(&self, news: String) {
        (self.outbox)(FromVm::Tap { interface: self.tap.interface().into(), there: !self.gone, news });
        if let Some(call) = &self.config_call {
            // Full only if an interrupt is due anyway.
            let _ = call.write(1);
        }
    }

    fn fail(&mut self, fault: &umbra_splitter::queue::RingFault, ops: &mut EventOps) {
        self.log.warn(format_args!("network device: the driver broke a rule of its queues: {fault}"));
        self.broken = true;
        self.watch(false, ops);
        if let Some(call) = &self.config_call {
            // Fails only when 2^64 - 2 interrupts wait: then one waits anyway.
            let _ = call.write(1);
        }
    }

    fn watch(&mut self, wanted: bool, ops: &mut EventOps) {
        if wanted == self.watched {
            return;
        }
        let interest = Events::with_data(self.tap.file(), TAG_TAP, EventSet::IN);
        if wanted {
            events::add(ops, interest)
        } else {
            events::remove(ops, interest)
        }
        self.watched = wanted;
    }

    fn set_offloads(&self, features: u64) {
        if self.gone {
            return;
        }
        if let Err(error) = self.tap.set_offloads(features::receive(features)) {
            tracing::warn!("network device: set the offloads of its TAP: {error}");
        }
    }
}

impl MutEventSubscriber for TapNet {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
        events::add(ops, Events::with_data(&self.again, TAG_AGAIN, EventSet::IN));
        events::add(ops, Events::with_data(&self.look.as_fd(), TAG_LOOK, EventSet::IN));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        for wake in self.events.process(events, ops) {
            self.serve(wake, ops);
        }
        if self.queues[usize::from(RECEIVE)].is_none() {
            self.watch(false, ops);
        }
    }
}

impl VirtioDevice for TapNet {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        features::GUEST_ON_TAP
    }

    fn set_features(&mut self, accepted: u64) {
        self.accepted = accepted;
        self.filter.reset(accepted);
        self.receiver.mergeable = features::mergeable(accepted);
        self.sender.negotiated = features::transmit(accepted);
        self.set_offloads(accepted);
    }

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        let mac = Mac(self.filter.mac());
        NetConfig { mac, mtu: self.mtu, link_up: !self.gone }.read(offset, data);
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
        queue::start_in((&mut self.queues, &mut self.events), index, resources, state)
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        queue::stop_in((&mut self.queues, &mut self.events), index)
    }

    fn reset(&mut self) {
        self.broken = false;
        self.receiver.mergeable = false;
        self.sender.negotiated = Offloads::empty();
        self.filter.reset(0);
        self.accepted = 0;
        self.set_offloads(0);
    }

    fn needs_reset(&self) -> bool {
        self.broken
    }
}

#[cfg(test)]
pub(in crate::vm::virtio) mod tests;
