//! A guest's sound device (virtio 1.2, section 5.14) on the sound splitter: queue 0 control, 1 events, 2 playback,
//! 3 capture.
//!
//! The card that the guest sees is the one that its driver VM reported at first, for the guest's life. Control
//! requests are answered at once, by the shadow; nothing waits for a driver VM. Invariant: the device is reset by the
//! guest's driver alone. No events are sent: jacks stay plugged, and underruns are the card's own business.

mod queues;
pub mod request;
#[cfg(test)]
mod tests;

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use umbra_shadow::sound::{Card, Counts, Mode, Policy, Violation};
use umbra_shadow::{DeviceId, Generation, LinkId};
use umbra_splitter::log_limit::LogLimit;
use umbra_splitter::queue::RingFault;
use umbra_splitter::sound::link::{Link, LinkError};
use umbra_splitter::sound::{Notice, SoundSplitter};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::queues::{Message, Queues};
use self::request::{Request, describe};
use super::device::{Error, QueueResources, QueueState, VirtioDevice};
use super::events::{FIRST_DEVICE_TAG, QueueEvents, Wake};
use super::pace::{Moved, OutageTrace};
use super::shadowed::Shadowed;
use super::{Outbox, queue};
use crate::base::error::chain;
use crate::base::time::Time;
use crate::base::timer::DeadlineTimer;
use crate::wire::messages::{DeviceStatus, FromVm, LinkEnd, OutageCounts, ShadowMode, SoundCounts, ToVm};

/// Device ID of a sound device.
const DEVICE_ID: u16 = 25;

const CONTROL: u16 = 0;
const TX: u16 = 2;
const RX: u16 = 3;

/// Queue sizes. Linux sends one message a period, with as many descriptors as its pages; 64 periods are more than
/// it ever has under way, and 256 leave room for pages.
const QUEUE_SIZES: [u16; 4] = [64, 64, 256, 256];

/// Messages taken from a queue at one go: as many periods as Linux ever has under way.
const BATCH: usize = 64;

/// `VIRTIO_RING_F_INDIRECT_DESC`: a message in one descriptor of the ring, however many pages it has.
const INDIRECT: u64 = 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX`.
const EVENT_IDX: u64 = 1 << 29;

/// Bytes of `struct virtio_snd_config`.
const CONFIG_BYTES: usize = 12;

/// Tags of the event loop.
const WAKE: u32 = FIRST_DEVICE_TAG;
const TIMER: u32 = FIRST_DEVICE_TAG + 1;
const LINK: u32 = FIRST_DEVICE_TAG + 2;
const PACE: u32 = FIRST_DEVICE_TAG + 3;

/// The sound device of a guest.
pub struct Sound {
    device: DeviceId,
    splitter: SoundSplitter,
    queues: Queues,
    events: QueueEvents,
    /// Wakes the event loop, which alone can change its watch list and the timer.
    wake: EventFd,
    timer: DeadlineTimer,
    /// The link that is watched, and whether for writing.
    watched: Option<(RawFd, EventSet)>,
    broken: bool,
    /// Queues in which more may wait than was taken at one go.
    unserved: Vec<u16>,
    config_call: Option<EventFd>,
    pace: OutageTrace,
    log: LogLimit,
    outbox: Outbox,
}

impl Sound {
    /// Sound device `index` of its guest.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(index: u16, card: Card, policy: Policy, outbox: Outbox) -> Result<Self, Error> {
        let failed = |source: std::io::Error| Error::Backend {
            operation: format!("cannot make sound device {index}"),
            source: source.into(),
        };
        let notices = Arc::clone(&outbox);
        let device = DeviceId::sound(index);
        let listener = Box::new(move |notice| notices(message(device, notice)));
        Ok(Self {
            device,
            splitter: SoundSplitter::new(card, policy, listener),
            queues: Queues::default(),
            events: QueueEvents::new(QUEUE_SIZES.len()).map_err(failed)?,
            wake: EventFd::new(EFD_NONBLOCK).map_err(failed)?,
            timer: DeadlineTimer::new().map_err(|errno| failed(errno.into()))?,
            watched: None,
            broken: false,
            unserved: Vec::new(),
            config_call: None,
            pace: OutageTrace::new().map_err(failed)?,
            log: LogLimit::default(),
            outbox,
        })
    }

    fn call_loop(&self) {
        // Fails only when 2^64 - 2 calls wait: then one waits anyway.
        let _ = self.wake.write(1);
    }

    /// Takes what a queue holds, at most [`BATCH`] messages: a guest that fills it without end does not keep its other
    /// devices from being served.
    fn serve(&mut self, index: u16) -> Result<(), RingFault> {
        for _ in 0..BATCH {
            if !self.serve_one(index)? {
                return Ok(());
            }
        }
        self.unserved.push(index);
        self.call_loop();
        Ok(())
    }

    /// `false`: the queue holds nothing.
    fn serve_one(&mut self, index: u16) -> Result<bool, RingFault> {
        match index {
            CONTROL => {
                let Some(control) = self.queues.next_control()? else { return Ok(false) };
                let answer = self.control(&control.bytes);
                // Messages that a release gives back come before its answer: Linux waits for both.
                self.give_back()?;
                self.queues.answer(&control, &answer)?;
            }
            TX | RX => match self.queues.next_message(index)? {
                Message::Play(stream, token, samples) => self.splitter.play(stream, token, samples, now()),
                Message::Record(stream, token, bytes) => self.splitter.record(stream, token, bytes, now()),
                Message::Malformed => {}
                Message::None => return Ok(false),
            },
            // The event queue's buffers stay with the device: there is nothing to report.
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn control(&mut self, bytes: &[u8]) -> Result<Vec<u8>, request::Status> {
        match Request::parse(bytes)? {
            Request::Describe(query) => describe(self.splitter.shadow().card(), query),
            Request::Stream(stream, command) => {
                tracing::debug!(?stream, ?command, "sound");
                self.splitter.command(stream, command, now())?;
                Ok(Vec::new())
            }
        }
    }

    fn give_back(&mut self) -> Result<(), RingFault> {
        self.queues.give_back(self.splitter.take_done())
    }

    fn event(&mut self, wake: Wake) -> Result<(), RingFault> {
        if !self.broken {
            self.splitter.taken(self.queues.all_taken()?, now());
        }
        match wake {
            // The queues of a broken device wait for its reset.
            Wake::Started(_) | Wake::Kicked(_) if self.broken => {}
            Wake::Started(index) | Wake::Kicked(index) => self.serve(index)?,
            Wake::Device(TIMER) => self.timer.expired(),
            Wake::Device(WAKE) => {
                let _ = self.wake.read();
                for index in std::mem::take(&mut self.unserved) {
                    self.serve(index)?;
                }
            }
            Wake::Device(PACE) => self.tell_pace(),
            Wake::Device(_) => self.splitter.service(now()),
        }
        if self.splitter.deadline().is_some_and(|at| at <= now()) {
            // What the card has said comes first: if it is this process that is late, the card did not stand still.
            self.splitter.service(now());
            self.splitter.tick(now());
        }
        self.note_pace();
        if self.broken {
            return Ok(());
        }
        self.give_back()?;
        self.queues.notify()
    }

    /// The guest broke a rule: its queues are looked at no more until it resets the device.
    fn set_broken(&mut self) {
        self.broken = true;
        self.unserved.clear();
        self.splitter.reset(now());
        if let Some(call) = &self.config_call {
            // Full only if an interrupt is due anyway.
            let _ = call.write(1);
        }
    }

    fn serving(&self) -> Option<Generation> {
        if let Mode::Passive(generation) = self.splitter.shadow().mode() { Some(generation) } else { None }
    }

    fn note_pace(&mut self) {
        let moved = self.splitter.shadow().moved();
        self.pace.note(now(), Moved { out: moved.played, into: moved.recorded }, self.serving());
    }

    /// Reports what moved around an outage.
    fn tell_pace(&mut self) {
        if let (Some(steps), Some(generation)) = (self.pace.take(now()), self.serving()) {
            (self.outbox)(FromVm::Pace { device: self.device, generation, steps });
        }
    }

    /// Brings the event loop's watch list up to date with the link.
    fn watch(&mut self, ops: &mut EventOps<'_>) {
        for old in self.splitter.take_retired() {
            self.forget(&old, ops);
        }
        let Some(link) = self.splitter.link() else { return };
        let wants = if link.wants_to_write() { EventSet::IN | EventSet::OUT } else { EventSet::IN };
        let fd = link.as_raw_fd();
        let events = Events::with_data(link, LINK, wants);
        match self.watched {
            Some((watched, set)) if watched == fd && set == wants => return,
            Some((watched, _)) if watched == fd => super::events::modify(ops, events),
            _ => super::events::add(ops, events),
        }
        self.watched = Some((fd, wants));
    }

    fn forget(&mut self, link: &Link, ops: &mut EventOps<'_>) {
        if self.watched.take_if(|(fd, _)| *fd == link.as_raw_fd()).is_some() {
            super::events::remove(ops, Events::empty(link));
        }
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
fn now() -> u64 {
    Time::now().0
}

fn counts(counts: Counts) -> SoundCounts {
    let Counts { frames_skipped, frames_silent, frames_overrun, kept_alive, xruns } = counts;
    SoundCounts { frames_skipped, frames_silent, frames_overrun, kept_alive, xruns }
}

fn message(device: DeviceId, notice: Notice) -> FromVm {
    let at = now();
    match notice {
        Notice::Live(generation, masked) => {
            FromVm::Live { device, generation, at, outage: OutageCounts::Sound(counts(masked)) }
        }
        Notice::Lost(link, error) => {
            let cause = match error {
                LinkError::Closed => LinkEnd::Closed,
                LinkError::NotReading | LinkError::Violation(Violation::Stalled { .. }) => {
                    LinkEnd::Stalled(chain(&error))
                }
                other => LinkEnd::Broken(chain(&other)),
            };
            FromVm::Lost { device, link, at, cause }
        }
    }
}

impl Shadowed for Sound {
    fn attach(&mut self, link: LinkId, socket: UnixStream) {
        self.splitter.attach(link, socket, now());
        self.call_loop();
    }

    fn mask(&mut self, generation: Generation) {
        self.splitter.mask(generation, now());
        self.call_loop();
    }

    fn quarantine(&mut self) {
        self.splitter.quarantine(now());
        self.call_loop();
    }

    fn order(&mut self, message: &ToVm) {
        tracing::error!(?message, "an order that a sound device does not know");
    }

    fn status(&self) -> FromVm {
        let shadow = self.splitter.shadow();
        let mode = match shadow.mode() {
            Mode::Passive(_) => ShadowMode::Passive,
            Mode::Masking => ShadowMode::Masking,
            Mode::Replaying(_) => ShadowMode::Replaying,
            Mode::Dead => ShadowMode::Quarantined,
        };
        let kept_bytes = u64::try_from(shadow.kept_bytes()).unwrap_or(u64::MAX);
        let status = DeviceStatus::Sound { mode, kept_bytes, sums: counts(shadow.counts()) };
        FromVm::Status { device: self.device, status }
    }
}

impl VirtioDevice for Sound {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        INDIRECT | EVENT_IDX
    }

    fn set_features(&mut self, _accepted: u64) {}

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        // jacks, streams, chmaps: one of each a stream.
        let streams = u32::try_from(self.splitter.shadow().card().streams.len()).unwrap_or(0).to_le_bytes();
        for (place, byte) in (offset as usize..).zip(data) {
            *byte = if place < CONFIG_BYTES { streams[place % 4] } else { 0 };
        }
    }

    fn set_config_interrupt(&mut self, call: EventFd) {
        self.config_call = Some(call);
    }

    fn start_queue(&mut self, index: u16, resources: QueueResources, state: Option<QueueState>) -> Result<(), Error> {
        if usize::from(index) >= QUEUE_SIZES.len() {
            return Err(Error::NoSuchQueue(index));
        }
        let (queue, kick) = queue::start(index, resources, state)?;
        self.queues.start(index, queue);
        self.events.start(index, kick);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        self.events.stop(index);
        self.queues.stop(index).as_ref().map(queue::stop)
    }

    fn reset(&mut self) {
        self.broken = false;
        self.unserved.clear();
        self.splitter.reset(now());
        self.call_loop();
    }

    fn needs_reset(&self) -> bool {
        self.broken
    }
}

impl MutEventSubscriber for Sound {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.events.init(ops);
        super::events::add(ops, Events::with_data(&self.wake, WAKE, EventSet::IN));
        super::events::add(ops, Events::with_data(&self.timer.descriptor(), TIMER, EventSet::IN));
        super::events::add(ops, Events::with_data(&self.pace.timer(), PACE, EventSet::IN));
        self.watch(ops);
        self.timer.set(self.splitter.deadline());
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        for wake in self.events.process(events, ops) {
            if let Err(error) = self.event(wake) {
                self.log.warn(format_args!("sound device: the guest broke a rule of its queues: {error}"));
                self.set_broken();
            }
        }
        self.watch(ops);
        self.timer.set(self.splitter.deadline());
    }
}
