//! A block device on a raw file or a block device of the host (virtio 1.2, section 5.2). Invariant: a request
//! touches the disk only after its header was read once and checked against the disk's size; a failure is the
//! guest's `VIRTIO_BLK_S_IOERR` and nobody else's. Requests run one after the other in the event loop, a large one in
//! parts ([`turn`]).

pub mod image;
pub mod request;
mod turn;

use event_manager::{EventOps, Events, MutEventSubscriber};
use thiserror::Error;
use umbra_splitter::copy::{gather, scatter};
use umbra_splitter::log_limit::LogLimit;
use umbra_splitter::queue::{Chain, RingFault, Virtqueue};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::image::Image;
use self::request::{HEADER_SIZE, ID_SIZE, Limits, Request, Status};
use self::turn::{Moved, Turn};
use super::device::{self, QueueResources, QueueState, VirtioDevice};
use super::events::{self, FIRST_DEVICE_TAG, QueueEvents, Wake};
use super::{queue, read_config};
use crate::config::Disk;

/// Device ID (section 5.2.1).
const DEVICE_ID: u16 = 2;
const QUEUE_SIZES: [u16; 1] = [256];
/// The number of segments of a request is bounded.
const F_SEG_MAX: u64 = 1 << 2;
/// The disk cannot be written to.
const F_RO: u64 = 1 << 5;
/// The block size is in the configuration.
const F_BLK_SIZE: u64 = 1 << 6;
/// There is a cache, and a command to flush it.
const F_FLUSH: u64 = 1 << 9;
/// Requests may be indirect descriptors; event indices save exits.
const F_RING: u64 = 1 << 28 | 1 << 29;
/// Segments of a request: a queue's length without header and status.
const SEG_MAX: u32 = QUEUE_SIZES[0] as u32 - 2;
/// Block size that the guest sees; the host's page cache makes any other needless.
const BLOCK_SIZE: u32 = 512;
/// Requests served before other devices get their turn.
const BUDGET: usize = 32;
/// Tag of the device's own eventfd in the event loop.
const TAG_AGAIN: u32 = FIRST_DEVICE_TAG;

/// Errors of making a disk.
#[derive(Debug, Error)]
pub enum Error {
    /// The image.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// No eventfd.
    #[error("create an eventfd for a disk")]
    EventFd(#[source] std::io::Error),
}

/// The device.
pub struct Block {
    image: Image,
    id: [u8; ID_SIZE],
    queue: Option<Virtqueue>,
    /// Bytes moved so far of the request at the head of the queue.
    moved: u64,
    events: QueueEvents,
    /// Signalled by the device itself when requests are left for the next turn.
    again: EventFd,
    broken: bool,
    config_call: Option<EventFd>,
    log: LogLimit,
}

/// Whether requests may be left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Idle,
    Budget,
}

impl Block {
    /// Disk number `index` of its VM; the guest reads `umbra-disk<index>` as its identifier.
    pub fn new(disk: &Disk, index: usize) -> Result<Self, Error> {
        let image = Image::open(disk)?;
        let mut id = [0; ID_SIZE];
        id.iter_mut().zip(format!("umbra-disk{index}").bytes()).for_each(|(to, from)| *to = from);
        let again = EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?;
        let events = QueueEvents::new(QUEUE_SIZES.len()).map_err(Error::EventFd)?;
        let log = LogLimit::default();
        Ok(Self { image, id, queue: None, moved: 0, events, again, broken: false, config_call: None, log })
    }

    fn serve(&mut self) {
        let Some(queue) = self.queue.as_mut().filter(|_| !self.broken) else { return };
        let mut turn = Turn::new(self.moved);
        let served = Server { image: &self.image, id: &self.id, log: &mut self.log }.serve(queue, &mut turn);
        self.moved = turn.moved();
        match served.and_then(|end| queue.notify().map(|()| end)) {
            Ok(End::Idle) => {}
            Ok(End::Budget) => signal(&self.again),
            Err(fault) => {
                self.log.warn(format_args!("disk: the driver broke a rule of its queue: {fault}"));
                self.broken = true;
                self.config_call.iter().for_each(signal);
            }
        }
    }
}

fn signal(event: &EventFd) {
    // Fails only when 2^64 - 2 signals wait: then one waits anyway.
    let _ = event.write(1);
}

/// What serving takes beside the queue.
struct Server<'a> {
    image: &'a Image,
    id: &'a [u8],
    log: &'a mut LogLimit,
}

/// What came of a request.
enum Answer {
    /// It is answered, with so many bytes written.
    Whole(u32),
    /// The turn is over first.
    Part,
}

impl Server<'_> {
    fn serve(&mut self, queue: &mut Virtqueue, turn: &mut Turn) -> Result<End, RingFault> {
        let mut ring = queue.open()?;
        let mut chain = Chain::default();
        for _ in 0..BUDGET {
            if ring.available()? == 0 && !ring.listen(0)? {
                return Ok(End::Idle);
            }
            if turn.is_over() {
                return Ok(End::Budget);
            }
            let head = ring.head(0)?;
            let answer = match ring.walk(head, &mut chain) {
                Ok(()) => self.answer(&chain, turn),
                Err(fault) => {
                    tracing::debug!("disk: a request is given back: {fault}");
                    Answer::Whole(0)
                }
            };
            let Answer::Whole(written) = answer else { return Ok(End::Budget) };
            turn.next_request();
            ring.take(1);
            ring.complete(head, written)?;
        }
        Ok(End::Budget)
    }

    /// Carries a request out and writes its status.
    fn answer(&mut self, chain: &Chain<'_>, turn: &mut Turn) -> Answer {
        // The status is the last byte that the device writes; without room for it nothing can be said.
        let Some(incoming) = chain.writable_len().checked_sub(1) else { return Answer::Whole(0) };
        let mut header = [0; HEADER_SIZE];
        let (status, data) = if gather(chain.readable(), 0, &mut header) < HEADER_SIZE {
            (Status::IoError, 0)
        } else {
            match self.carry_out(chain, header, incoming, turn) {
                Ok((_, Moved::Part)) => return Answer::Part,
                Ok((data, Moved::All)) => (Status::Ok, data),
                Err(status) => (status, 0),
            }
        };
        scatter(&[status as u8], chain.writable(), incoming);
        Answer::Whole(u32::try_from(data + 1).unwrap_or(u32::MAX))
    }

    /// Carries a request out, or a part; returns the bytes of data for the guest.
    fn carry_out(
        &mut self,
        chain: &Chain<'_>,
        header: [u8; HEADER_SIZE],
        incoming: usize,
        turn: &mut Turn,
    ) -> Result<(usize, Moved), Status> {
        let Self { image, id, log } = self;
        let outgoing = chain.readable_len() - HEADER_SIZE;
        let limits = Limits { sectors: image.sectors(), read_only: image.read_only() };
        let request = Request::parse(header, incoming as u64, outgoing as u64, limits)?;
        let done = match request {
            Request::Read(position) => turn
                .step(chain.writable(), 0, incoming, |at, slices| image.read(position + at, slices))
                .map(|moved| (incoming, moved)),
            Request::Write(position) => turn
                .step(chain.readable(), HEADER_SIZE, outgoing, |at, slices| image.write(position + at, slices))
                .map(|moved| (0, moved)),
            Request::Flush => image.flush().map(|()| (0, Moved::All)),
            Request::GetId => Ok((scatter(id, chain.writable(), 0), Moved::All)),
        };
        done.map_err(|error| {
            log.warn(format_args!("disk: {request:?}: {error}"));
            Status::IoError
        })
    }
}

impl MutEventSubscriber for Block {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
        events::add(ops, Events::with_data(&self.again, TAG_AGAIN, EventSet::IN));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        for wake in self.events.process(events, ops) {
            if wake == Wake::Device(TAG_AGAIN) {
                // Empty already is fine.
                let _ = self.again.read();
            }
            self.serve();
        }
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let read_only = if self.image.read_only() { F_RO } else { 0 };
        F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_RING | read_only
    }

    fn set_features(&mut self, _: u64) {}

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        // Capacity, then the largest number of segments and the block size (section 5.2.4).
        let mut config = [0; 24];
        config[..8].copy_from_slice(&self.image.sectors().to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        config[20..].copy_from_slice(&BLOCK_SIZE.to_le_bytes());
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
        if index != 0 {
            return Err(device::Error::NoSuchQueue(index));
        }
        let (queue, kick) = queue::start(index, resources, state)?;
        (self.queue, self.moved) = (Some(queue), 0);
        self.events.start(index, kick);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        self.events.stop(index);
        self.queue.take_if(|_| index == 0).as_ref().map(queue::stop)
    }

    fn reset(&mut self) {
        self.broken = false;
    }

    fn needs_reset(&self) -> bool {
        self.broken
    }
}

#[cfg(test)]
mod tests;
