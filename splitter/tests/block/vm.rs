//! A driver VM with a disk service: its rings, its front-end, its pool.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use umbra_driver_vm::block_protocol::{
    FromService, Hello, Operation, PoolRange, RECORD_BYTES, ToService, encode_hello, records,
};
use umbra_shadow::LinkId;
use umbra_shadow::block::{Disk, SectorRange, Tag};
use umbra_splitter::block::FEATURES;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress};

use crate::common::{Driver, RINGS_LEN, WRITE, sealed_memory};
use crate::medium::{Medium, disk};

pub const QUEUE: u16 = 32;
pub const MEMORY: u64 = 16 << 20;
const USER: u64 = 0x7f00_0000_0000;
const BUFFER: u64 = 4096;
const RX_DATA: u64 = 0x1000 + 2 * RINGS_LEN;
pub const TX_DATA: u64 = RX_DATA + QUEUE as u64 * BUFFER;
/// Where the pool begins: 2 MiB, a gap, and 1 MiB more.
pub const POOL: u64 = 4 << 20;
const SECOND: u64 = 8 << 20;

/// An order that is not answered.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    pub tag: Tag,
    /// None for a flush.
    pub access: Option<(Operation, SectorRange)>,
}

pub struct Vm {
    pub rx: Driver,
    pub tx: Driver,
    pub file: File,
    pub frontend: Frontend,
    pub link: LinkId,
    pub disk: Disk,
    pub asked: VecDeque<Asked>,
    /// Sessions that the host has begun and that were not greeted.
    pub begun: Vec<LinkId>,
    /// Offers each receive buffer again when it is used.
    pub offers: bool,
    /// Most records that the host has sent in one buffer.
    pub largest_batch: usize,
}

impl Vm {
    /// Prepared, not yet talking; and the connection's other end.
    pub fn new(link: LinkId) -> (Self, UnixStream) {
        let (memory, file) = sealed_memory(usize::try_from(MEMORY).unwrap());
        let queue = |n: u64| Driver::new(&memory, 0x1000 + n * RINGS_LEN, QUEUE, true);
        let (rx, tx) = (queue(0), queue(1));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let frontend = Frontend::from_stream(ours, 2);
        let (asked, begun) = (VecDeque::new(), Vec::new());
        let mut vm = Self { rx, tx, file, frontend, link, disk: disk(), asked, begun, offers: true, largest_batch: 0 };
        vm.offer_all();
        (vm, theirs)
    }

    pub fn offer_all(&mut self) {
        while self.rx.free() > 0 {
            self.offer();
        }
    }

    pub fn offer(&mut self) {
        let at = RX_DATA + u64::from(self.rx.next_head()) * BUFFER;
        self.rx.offer(&[(at, 4096, WRITE)]);
    }

    /// The available index at which the host wants to be kicked for receive buffers.
    pub fn kick_wanted_at(&self) -> u16 {
        let event = self.rx.used_ring() + 4 + 8 * u64::from(QUEUE);
        self.rx.memory.read_obj(GuestAddress(event)).unwrap()
    }

    /// Ends the connection and begins the next; memory and rings stay as they are.
    pub fn hang_up(&mut self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.frontend = Frontend::from_stream(ours, 2);
        self.link = self.link.next();
        theirs
    }

    /// The protocol up to enabled queues.
    pub fn connect(&mut self) {
        self.frontend.set_owner().unwrap();
        let offered = self.frontend.get_features().unwrap();
        assert_eq!(offered, FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());
        self.frontend.set_features(offered).unwrap();
        let protocol = self.frontend.get_protocol_features().unwrap();
        self.frontend.set_protocol_features(protocol).unwrap();
        self.frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: USER,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        };
        self.frontend.set_mem_table(&[region]).unwrap();
        self.set_up_queue(0);
        self.set_up_queue(1);
        for index in 0..2 {
            self.frontend.set_vring_enable(index, true).unwrap();
        }
    }

    fn set_up_queue(&mut self, index: usize) {
        let driver = if index == 0 { &self.rx } else { &self.tx };
        let config = VringConfigData {
            queue_max_size: QUEUE,
            queue_size: QUEUE,
            flags: 0,
            desc_table_addr: USER + driver.descriptors(),
            used_ring_addr: USER + driver.used_ring(),
            avail_ring_addr: USER + driver.avail(),
            log_addr: None,
        };
        self.frontend.set_vring_num(index, QUEUE).unwrap();
        self.frontend.set_vring_addr(index, &config).unwrap();
        let used = driver.memory.read_obj::<u16>(GuestAddress(driver.used_ring() + 2)).unwrap();
        self.frontend.set_vring_base(index, used).unwrap();
        self.frontend.set_vring_call(index, &driver.call).unwrap();
        self.frontend.set_vring_kick(index, &driver.kick).unwrap();
    }

    pub fn hello(&self) -> Hello {
        let pool = vec![PoolRange { start: POOL, length: 2 << 20 }, PoolRange { start: SECOND, length: 1 << 20 }];
        Hello { disk: self.disk.clone(), pool, depth: 24 }
    }

    pub fn greet(&mut self) {
        let hello = encode_hello(&self.hello(), self.link).unwrap();
        self.send(&hello);
    }

    /// Takes what the host has sent.
    pub fn receive(&mut self) {
        while let Some((head, length)) = self.rx.take_used() {
            let mut bytes = vec![0; length as usize];
            self.rx.memory.read_slice(&mut bytes, GuestAddress(RX_DATA + u64::from(head) * BUFFER)).unwrap();
            self.largest_batch = self.largest_batch.max(bytes.len() / RECORD_BYTES);
            for record in records(&bytes).unwrap() {
                let (link, message) = ToService::parse(record, self.link.generation).unwrap();
                self.take(link, message);
            }
            if self.offers {
                self.offer();
            }
        }
    }

    fn take(&mut self, link: LinkId, message: ToService) {
        let asked = match message {
            ToService::Begin => {
                self.asked.clear();
                return self.begun.push(link);
            }
            _ if link != self.link => return,
            ToService::Flush { tag } => Asked { tag, access: None },
            ToService::Access { tag, operation, at } => Asked { tag, access: Some((operation, at)) },
        };
        assert!(self.begun.is_empty(), "orders before the hello");
        assert!(self.asked.iter().all(|other| other.tag != asked.tag), "a tag twice");
        self.asked.push_back(asked);
    }

    /// Sends a buffer.
    pub fn send(&mut self, bytes: &[u8]) {
        while self.tx.take_used().is_some() {}
        let at = TX_DATA + u64::from(self.tx.next_head()) * BUFFER;
        self.tx.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.tx.offer(&[(at, u32::try_from(bytes.len()).unwrap(), 0)]);
    }

    pub fn say(&mut self, message: FromService) {
        let record = message.encode(self.link);
        self.send(&record);
    }

    /// The place of the pool in this VM's memory.
    fn address(place: u64) -> GuestAddress {
        GuestAddress(if place < 2 << 20 { POOL + place } else { SECOND + place - (2 << 20) })
    }

    /// Does an order; its answer is to be sent.
    pub fn carry_out(&mut self, asked: &Asked, medium: &mut Medium) -> FromService {
        let Asked { tag, access } = *asked;
        let mut bytes = 0;
        match access {
            None => medium.flush(),
            Some((Operation::Read { place }, at)) => {
                bytes = at.bytes();
                self.rx.memory.write_slice(&medium.read(at), Self::address(place)).unwrap();
            }
            Some((Operation::Write { place }, at)) => {
                bytes = at.bytes();
                let mut content = vec![0; usize::try_from(bytes).unwrap()];
                self.rx.memory.read_slice(&mut content, Self::address(place)).unwrap();
                medium.write(at, &content);
            }
            Some((Operation::WriteZeroes { .. } | Operation::Discard, at)) => {
                medium.write(at, &vec![0; usize::try_from(at.bytes()).unwrap()]);
            }
        }
        FromService::Done { tag, errno: 0, bytes }
    }

    /// Does the oldest order and answers it; whether there was one.
    pub fn work(&mut self, medium: &mut Medium) -> bool {
        let Some(asked) = self.asked.pop_front() else { return false };
        let answer = self.carry_out(&asked, medium);
        self.say(answer);
        true
    }

    /// Answers the oldest order with an error.
    pub fn fail(&mut self, errno: i32) -> Asked {
        let asked = self.asked.pop_front().unwrap();
        self.say(FromService::Done { tag: asked.tag, errno, bytes: 0 });
        asked
    }
}
