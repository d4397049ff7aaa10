//! A block device on a raw file or a block device of the host. Invariant: a request
//! touches the disk only after its header was read once and checked against the disk's size; a failure is the
//! guest's `VIRTIO_BLK_S_IOERR` and nobody else's. The event loop takes and answers requests ([`serve`]) and waits for none:
//! threads of the disk carry them out ([`worker`]).
//!
//! A reset while requests are in flight takes effect at once, also when the host's file system does not answer: the threads have
//! buffers of their own, never the guest's. What follows the reset waits behind the request that is under way.

mod extent;
mod format;
pub mod image;
mod serve;
mod worker;

use std::path::PathBuf;
use std::slice::from_mut;
use std::sync::Arc;
use std::time::Instant;

use event_manager::{EventOps, Events, MutEventSubscriber};
use thiserror::Error;
use umbra_shadow::DeviceId;
use umbra_shadow::block::SECTOR_BYTES;
use umbra_splitter::log_limit::LogLimit;
use umbra_splitter::queue::Virtqueue;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::image::Image;
use self::serve::{End, InFlight, Server};
use self::worker::{Backing, News, Work, Worker};
use super::offer::{self, F_FLUSH, Offer};
use super::{DEVICE_ID, QUEUE_SIZE};
use crate::config::{Disk, OnFull};
use crate::vm::virtio::device::{self, QueueResources, QueueState, VirtioDevice};
use crate::vm::virtio::events::{self, FIRST_DEVICE_TAG, QueueEvents, Wake};
use crate::vm::virtio::{Outbox, queue, read_config};
use crate::wire::messages::FromVm;

/// One: the disk's thread does one thing after the other anyway.
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];
/// Tags of the device's own eventfds in the event loop.
const TAG_AGAIN: u32 = FIRST_DEVICE_TAG;
const TAG_DONE: u32 = FIRST_DEVICE_TAG + 1;
/// The tag of what is no request of the guest.
const RESIZE: worker::Tag = worker::Tag::MAX;

/// Errors of making a disk.
#[derive(Debug, Error)]
pub enum Error {
    /// The image.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// No eventfd.
    #[error("create an eventfd for a disk")]
    EventFd(#[source] std::io::Error),
    /// No threads.
    #[error("start the threads of a disk")]
    Worker(#[source] std::io::Error),
}

/// The device.
pub struct FileDisk {
    offer: Offer,
    /// Bytes of its file that may be written to.
    written: u64,
    queue: Option<Virtqueue>,
    worker: Worker,
    /// What was taken off the queue and is not answered. A queue that is stopped and goes on later gets the answers then.
    in_flight: InFlight,
    /// The driver does not flush: what it writes is durable when it is answered (section 5.2.6.2).
    writes_through: bool,
    events: QueueEvents,
    /// Signalled by the device itself when requests are left for the next turn.
    again: EventFd,
    broken: bool,
    config_call: Option<EventFd>,
    /// Of the configuration.
    generation: u8,
    messenger: Messenger,
    log: LogLimit,
}

/// Tells the supervisor what the host does to the disk.
struct Messenger {
    device: DeviceId,
    path: PathBuf,
    outbox: Outbox,
    limit: LogLimit,
}

impl Messenger {
    /// Says `what` of the disk, unless so much was said that this is left out.
    fn say(&mut self, what: &str) {
        if let Some(left_out) = self.limit.take(Instant::now()) {
            let more =
                if left_out > 0 { format!(" (and {left_out} such errors before, left out)") } else { String::new() };
            let news = format!("disk {}: {what}{more}", self.path.display());
            (self.outbox)(FromVm::Disk { device: self.device, news });
        }
    }
}

impl FileDisk {
    /// Disk number `index` of its VM; the guest reads `umbra-disk<index>` as its identifier.
    /// What its guest's people should know goes to `outbox`.
    pub fn new(disk: &Disk, index: u16, outbox: Outbox) -> Result<Self, Error> {
        let image = Image::open(disk)?;
        let offer = Offer { id: offer::id(&format!("umbra-disk{index}")), ..image.offer() };
        let written = image.written();
        let messenger =
            Messenger { device: DeviceId::block(index), path: disk.path.clone(), outbox, limit: LogLimit::default() };
        let mut new = Self::on(offer, (Arc::new(image), disk.on_full), messenger)?;
        new.written = written;
        Ok(new)
    }

    /// Bytes of its file, as it was opened, that may be written to; 0: it is a block device, or only read.
    pub fn written(&self) -> u64 {
        self.written
    }

    fn on(offer: Offer, (backing, on_full): (Arc<dyn Backing>, OnFull), messenger: Messenger) -> Result<Self, Error> {
        let name = format!("disk{}", messenger.device.index);
        let worker = Worker::start(&name, backing, on_full).map_err(Error::Worker)?;
        let again = EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?;
        let events = QueueEvents::new(QUEUE_SIZES.len()).map_err(Error::EventFd)?;
        let (in_flight, log) = (InFlight::default(), LogLimit::default());
        Ok(Self {
            offer,
            written: 0,
            queue: None,
            worker,
            in_flight,
            writes_through: false,
            events,
            again,
            broken: false,
            config_call: None,
            generation: 0,
            messenger,
            log,
        })
    }

    /// Makes the disk so large, or as large as its file or block device is now. The host's file system is not waited for: the answer is
    /// a message.
    pub fn resize(&mut self, bytes: Option<u64>) {
        self.worker.submit(RESIZE, Work::Resize(bytes));
    }

    fn take_news(&mut self) {
        while let Some(news) = self.worker.take_news() {
            match news {
                News::Resized(result) => {
                    if let Ok(bytes) = result {
                        self.offer.sectors = bytes / SECTOR_BYTES;
                        self.generation = self.generation.wrapping_add(1);
                        self.config_call.iter().for_each(signal);
                    }
                    (self.messenger.outbox)(FromVm::Resized { device: self.messenger.device, result });
                }
                News::Grown => (self.messenger.outbox)(FromVm::Grown { device: self.messenger.device }),
                News::Full => {
                    self.messenger.say("the host has no room for a write: the disk waits until there is some")
                }
                News::HasRoom => self.messenger.say("there is room again, and the disk goes on"),
            }
        }
    }

    fn serve(&mut self) {
        let Some(queue) = self.queue.as_mut().filter(|_| !self.broken) else { return };
        let mut server = Server {
            offer: &self.offer,
            worker: &self.worker,
            in_flight: &mut self.in_flight,
            writes_through: self.writes_through,
            messenger: &mut self.messenger,
        };
        match server.serve(queue).and_then(|end| queue.notify().map(|()| end)) {
            Ok(End::Idle) => {}
            Ok(End::Budget) => signal(&self.again),
            Err(fault) => {
                self.log.warn(format_args!("disk: the driver broke a rule of its queue: {fault}"));
                self.broken = true;
                self.config_call.iter().for_each(signal);
            }
        }
    }

    /// Of what is in flight nothing reaches the guest any more.
    fn forget(&mut self) {
        self.worker.forget();
        self.in_flight.clear();
    }
}

fn signal(event: &EventFd) {
    // Fails only when 2^64 - 2 signals wait: then one waits anyway.
    let _ = event.write(1);
}

impl MutEventSubscriber for FileDisk {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
        events::add(ops, Events::with_data(&self.again, TAG_AGAIN, EventSet::IN));
        events::add(ops, Events::with_data(self.worker.done_event(), TAG_DONE, EventSet::IN));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        for wake in self.events.process(events, ops) {
            // Empty already is fine.
            match wake {
                Wake::Device(TAG_AGAIN) => drop(self.again.read()),
                Wake::Device(TAG_DONE) => {
                    drop(self.worker.done_event().read());
                    self.take_news();
                }
                _ => {}
            }
            self.serve();
        }
    }
}

impl VirtioDevice for FileDisk {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.offer.features()
    }

    fn set_features(&mut self, accepted: u64) {
        self.writes_through = accepted & F_FLUSH == 0;
    }

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        read_config(&self.offer.config(), offset, data);
    }

    fn config_generation(&self) -> u8 {
        self.generation
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
        if state.is_none() {
            self.forget();
        }
        queue::start_in((from_mut(&mut self.queue), &mut self.events), index, resources, state)
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        queue::stop_in((from_mut(&mut self.queue), &mut self.events), index)
    }

    fn reset(&mut self) {
        self.forget();
        self.broken = false;
    }

    fn needs_reset(&self) -> bool {
        self.broken
    }
}

#[cfg(test)]
mod tests;
