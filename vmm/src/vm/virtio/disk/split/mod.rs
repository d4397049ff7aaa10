//! A guest's virtio-blk device on the block splitter: on a disk that a driver VM serves, through every life of that driver VM.
//!
//! The guest sees the disk that its driver VM reported at first, for the guest's life. Requests wait while there is no driver VM, and
//! nothing else does. Invariant: the device is reset by the guest's driver alone.
//!
//! A queue that stops while requests of it are in progress, as at a reset or when the driver chooses another interrupt vector, holds
//! the splitter up until it goes on, or until the reset: the data of those requests cannot be had meanwhile.

mod requests;
#[cfg(test)]
pub(in crate::vm::virtio) mod tests;

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use umbra_shadow::block::{CachePolicy, Disk, Limits, ModeName, SECTOR_BYTES, Token};
use umbra_shadow::{DeviceId, Generation, LinkId};
use umbra_splitter::block::{BlockSplitter, Notice};
use umbra_splitter::log_limit::LogLimit;
use umbra_splitter::queue::RingFault;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::requests::Requests;
use super::offer::{self, F_FLUSH, Offer};
use super::request::Job;
use super::{DEVICE_ID, QUEUE_SIZE};
use crate::base::error::chain;
use crate::base::time::Time;
use crate::base::timer::DeadlineTimer;
use crate::config::MemorySize;
use crate::vm::virtio::device::{Error, QueueResources, QueueState, VirtioDevice};
use crate::vm::virtio::events::{self, FIRST_DEVICE_TAG, QueueEvents, Wake};
use crate::vm::virtio::pace::OutageTrace;
use crate::vm::virtio::shadowed::Shadowed;
use crate::vm::virtio::{Outbox, queue, read_config};
use crate::wire::messages::{DeviceStatus, FromVm, LinkEnd, OutageCounts, ToVm};

/// Most queues: a driver VM has one queue behind them all, so that more only spread the guest's interrupts.
pub const MAX_QUEUES: u8 = 4;

/// Requests taken from a queue at one go: a guest that fills its queue without end does not keep its other devices from being served.
const BATCH: usize = 64;

/// Tags of the event loop.
const WAKE: u32 = FIRST_DEVICE_TAG;
const TIMER: u32 = FIRST_DEVICE_TAG + 1;
const PACE: u32 = FIRST_DEVICE_TAG + 2;
const SPLITTER: u32 = FIRST_DEVICE_TAG + 3;
const KICK: u32 = FIRST_DEVICE_TAG + 4;

/// A disk as its guest gets it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What the driver VM reported.
    pub disk: Disk,
    /// How its write cache is treated.
    pub cache: CachePolicy,
    /// Memory of its driver VM: a link with more is refused.
    pub driver_memory: MemorySize,
    /// Longest time without an answer to reads and writes before the driver VM counts as failed.
    pub io_timeout: Duration,
    /// Number of queues, 1 to [`MAX_QUEUES`].
    pub queues: u8,
}

/// The block device of a guest.
pub struct SplitDisk {
    device: DeviceId,
    offer: Offer,
    sizes: Vec<u16>,
    splitter: BlockSplitter,
    requests: Requests,
    events: QueueEvents,
    /// Wakes the event loop, which alone can change its watch list and the timer.
    wake: EventFd,
    timer: DeadlineTimer,
    /// Kicks of the driver VM that are watched.
    kicks: Vec<RawFd>,
    broken: bool,
    /// Queues in which more may wait than was taken at one go.
    unserved: Vec<u16>,
    config_call: Option<EventFd>,
    pace: OutageTrace,
    log: LogLimit,
    outbox: Outbox,
}

impl SplitDisk {
    /// Disk `index` among all disks of its guest.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new(index: u16, settings: &Settings, outbox: Outbox) -> Result<Self, Error> {
        let failed = |source: std::io::Error| Error::Backend {
            operation: format!("cannot make disk {index}"),
            source: source.into(),
        };
        let Settings { disk, cache, driver_memory, io_timeout, queues } = settings;
        let queues = (*queues).clamp(1, MAX_QUEUES);
        let device = DeviceId::block(index);
        let notices = Arc::clone(&outbox);
        let listener = Box::new(move |notice| notices(message(device, notice)));
        let stall_ns = u64::try_from(io_timeout.as_nanos()).unwrap_or(u64::MAX);
        let limits = Limits { stall_ns, ..Limits::default() };
        let splitter = BlockSplitter::new(disk, *cache, limits, driver_memory.0, listener);
        Ok(Self {
            device,
            offer: offer(disk, queues.into()),
            sizes: vec![QUEUE_SIZE; queues.into()],
            splitter: splitter.map_err(failed)?,
            requests: Requests::new(queues.into()),
            events: QueueEvents::new(queues.into()).map_err(failed)?,
            wake: EventFd::new(EFD_NONBLOCK).map_err(failed)?,
            timer: DeadlineTimer::new().map_err(|errno| failed(errno.into()))?,
            kicks: Vec::new(),
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

    /// Takes what a queue holds, at most [`BATCH`] requests.
    fn serve(&mut self, index: u16) -> Result<(), RingFault> {
        let Self { requests, splitter, offer, .. } = self;
        if requests.take(index, BATCH, offer, |token, job| begin(splitter, token, job))? {
            if !self.unserved.contains(&index) {
                self.unserved.push(index);
            }
            self.call_loop();
        }
        Ok(())
    }

    fn event(&mut self, wake: Wake) -> Result<(), RingFault> {
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
            // A kick of the driver VM, or the splitter's own call.
            Wake::Device(_) => {}
        }
        self.turn()
    }

    /// A turn of the splitter; what it has finished goes back to the guest.
    fn turn(&mut self) -> Result<(), RingFault> {
        if self.requests.wait_for_a_queue() {
            // The queue's start, or the reset, calls the event loop.
            let _ = self.splitter.wake().read();
            return Ok(());
        }
        self.splitter.service(now(), &mut self.requests);
        let done = self.splitter.take_done();
        // A broken device has nothing in progress.
        let finished = if self.broken { Ok(()) } else { self.requests.finish(done) };
        self.pace.note(now(), self.requests.moved(), self.splitter.serving());
        finished?;
        if self.broken { Ok(()) } else { self.requests.notify() }
    }

    /// The guest broke a rule: its queues are looked at no more until it resets the device.
    fn set_broken(&mut self) {
        self.broken = true;
        self.forget();
        if let Some(call) = &self.config_call {
            // Full only if an interrupt is due anyway.
            let _ = call.write(1);
        }
    }

    /// Of what is in progress nothing is answered any more, and no buffer of it is touched.
    fn forget(&mut self) {
        self.unserved.clear();
        self.requests.clear();
        self.splitter.reset();
        self.call_loop();
    }

    /// Reports what moved around an outage.
    fn tell_pace(&mut self) {
        if let (Some(steps), Some(generation)) = (self.pace.take(now()), self.splitter.serving()) {
            (self.outbox)(FromVm::Pace { device: self.device, generation, steps });
        }
    }

    /// Brings the event loop's set of kicks up to date.
    fn watch(&mut self, ops: &mut EventOps<'_>) {
        for kick in self.splitter.take_retired() {
            if let Some(place) = self.kicks.iter().position(|watched| *watched == kick.as_raw_fd()) {
                self.kicks.swap_remove(place);
                events::remove(ops, Events::empty(&kick));
            }
        }
        for (_, kick) in self.splitter.kicks() {
            let fd = kick.as_raw_fd();
            if !self.kicks.contains(&fd) {
                // A kick that came before fires at once: it is never read.
                events::add(ops, Events::with_data(kick, KICK, EventSet::IN | EventSet::EDGE_TRIGGERED));
                self.kicks.push(fd);
            }
        }
    }
}

fn begin(splitter: &mut BlockSplitter, token: Token, job: Job) {
    match job {
        Job::Transfer(access, at) => splitter.submit(token, access, at),
        Job::Ranges(ranges) => {
            for (number, (access, at)) in (token.0..).zip(ranges) {
                splitter.submit(Token(number), access, at);
            }
        }
        Job::Flush => splitter.flush(token),
    }
}

/// What the guest is offered of a disk.
fn offer(disk: &Disk, queues: u16) -> Offer {
    let identity = &disk.identity;
    let physical = u64::from(disk.physical_block).max(1);
    let begins = identity.window.start.saturating_mul(SECTOR_BYTES) % physical;
    Offer {
        sectors: identity.window.sectors,
        read_only: identity.read_only,
        logical_block: identity.logical_block,
        physical_block: disk.physical_block,
        // Less than a physical block.
        offset: u32::try_from((physical - begins) % physical).unwrap_or(0),
        optimal_io: disk.optimal_io,
        discards: disk.discards,
        queues,
        id: offer::id(&identity.serial),
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
fn now() -> u64 {
    Time::now().0
}

fn message(device: DeviceId, notice: Notice) -> FromVm {
    let at = now();
    match notice {
        Notice::Live(generation, counts) => {
            FromVm::Live { device, generation, at, outage: OutageCounts::Block(counts) }
        }
        Notice::Lost(link, error) => {
            let cause = if error.is_closed() {
                LinkEnd::Closed
            } else if error.is_stalled() {
                LinkEnd::Stalled(chain(&error))
            } else if error.is_suspect() {
                LinkEnd::Suspect(chain(&error))
            } else {
                LinkEnd::Broken(chain(&error))
            };
            FromVm::Lost { device, link, at, cause }
        }
        Notice::OtherDisk(link, mismatch) => {
            FromVm::Lost { device, link, at, cause: LinkEnd::OtherDisk(mismatch.to_string()) }
        }
        Notice::AtRest { stable } => FromVm::AtRest { device, stable },
    }
}

impl Shadowed for SplitDisk {
    fn attach(&mut self, link: LinkId, socket: UnixStream) {
        self.splitter.attach(link, socket);
        self.call_loop();
    }

    fn mask(&mut self, generation: Generation) {
        self.splitter.mask(generation);
        self.call_loop();
    }

    fn quarantine(&mut self) {
        self.splitter.quarantine();
        self.call_loop();
    }

    fn order(&mut self, message: &ToVm) {
        match message {
            ToVm::Quiesce { .. } => self.splitter.quiesce(now()),
            ToVm::GoOn { .. } => self.splitter.go_on(),
            _ => tracing::error!(?message, "an order that a disk does not know"),
        }
        self.call_loop();
    }

    fn status(&self) -> FromVm {
        let shadow = self.splitter.shadow();
        let status = DeviceStatus::Block {
            mode: shadow.mode(),
            kept_bytes: shadow.kept_bytes(),
            owed_bytes: shadow.owed_bytes(),
            pending: shadow.pending() as u64,
            sums: shadow.counts(),
        };
        FromVm::Status { device: self.device, status }
    }

    fn finish(&mut self) {
        self.requests.clear();
        self.unserved.clear();
        self.splitter.finish();
        self.call_loop();
    }

    fn keeps(&self) -> bool {
        let shadow = self.splitter.shadow();
        shadow.mode() != ModeName::Quarantined && shadow.logged_extents() > 0
    }
}

impl VirtioDevice for SplitDisk {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn features(&self) -> u64 {
        self.offer.features()
    }

    fn set_features(&mut self, accepted: u64) {
        self.splitter.set_guest_flushes(accepted & F_FLUSH != 0);
    }

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        read_config(&self.offer.config(), offset, data);
    }

    fn set_config_interrupt(&mut self, call: EventFd) {
        self.config_call = Some(call);
    }

    fn start_queue(&mut self, index: u16, resources: QueueResources, state: Option<QueueState>) -> Result<(), Error> {
        if state.is_none() && self.requests.has_any_of(index) {
            self.forget();
        }
        queue::start_in((self.requests.queues(), &mut self.events), index, resources, state)?;
        self.call_loop();
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        queue::stop_in((self.requests.queues(), &mut self.events), index)
    }

    fn reset(&mut self) {
        self.broken = false;
        self.forget();
    }

    fn needs_reset(&self) -> bool {
        self.broken
    }
}

impl MutEventSubscriber for SplitDisk {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.events.init(ops);
        events::add(ops, Events::with_data(&self.wake, WAKE, EventSet::IN));
        events::add(ops, Events::with_data(&self.timer.descriptor(), TIMER, EventSet::IN));
        events::add(ops, Events::with_data(&self.pace.timer(), PACE, EventSet::IN));
        events::add(ops, Events::with_data(self.splitter.wake(), SPLITTER, EventSet::IN));
        self.watch(ops);
        self.timer.set(self.splitter.deadline().filter(|_| !self.requests.wait_for_a_queue()));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        for wake in self.events.process(events, ops) {
            if let Err(error) = self.event(wake) {
                self.log.warn(format_args!("disk: the guest broke a rule of its queues: {error}"));
                self.set_broken();
            }
        }
        self.watch(ops);
        self.timer.set(self.splitter.deadline().filter(|_| !self.requests.wait_for_a_queue()));
    }
}
