//! The driver's side of a device for tests: queues in plain memory, and an event loop that runs until it is idle.

#![allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventSubscriber, MutEventSubscriber, SubscriberOps};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::QueueResources;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Memory of one queue: rings and buffers.
pub const SPAN: u64 = 1 << 20;

/// Memory for `queues` queues.
pub fn memory(queues: u64) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (queues * SPAN) as usize)]).unwrap()
}

/// A queue as its driver sees it. Descriptors and buffers are used once, which is enough for a test.
pub struct DriverQueue {
    memory: GuestMemoryMmap,
    base: u64,
    size: u16,
    next_descriptor: u16,
    next_buffer: u64,
    avail: u16,
    seen: u16,
    pub kick: EventFd,
    pub call: EventFd,
}

impl DriverQueue {
    /// Queue number `index` in `memory`.
    pub fn new(memory: &GuestMemoryMmap, index: u64, size: u16) -> Self {
        let base = index * SPAN;
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            memory: memory.clone(),
            base,
            size,
            next_descriptor: 0,
            next_buffer: base + 0x8000,
            avail: 0,
            seen: 0,
            kick: event(),
            call: event(),
        }
    }

    /// A fresh queue number `index` in the same memory, which is cleared there.
    pub fn another(&self, index: u64, size: u16) -> Self {
        self.memory.write_slice(&vec![0; SPAN as usize], GuestAddress(index * SPAN)).unwrap();
        Self::new(&self.memory, index, size)
    }

    /// Index of the last descriptor.
    pub fn last(&self) -> u16 {
        self.next_descriptor - 1
    }

    fn rings(&self) -> [u64; 3] {
        [self.base, self.base + 0x4000, self.base + 0x6000]
    }

    pub fn resources(&self) -> QueueResources {
        let mut queue = Queue::new(self.size).unwrap();
        let [descriptors, avail, used] = self.rings();
        queue.try_set_desc_table_address(GuestAddress(descriptors)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        queue.set_ready(true);
        let kick = self.kick.try_clone().unwrap();
        QueueResources { memory: self.memory.clone(), queue, kick, call: self.call.try_clone().unwrap() }
    }

    /// Offers a chain: readable parts with these bytes, then writable parts of these sizes. Returns its head.
    pub fn add(&mut self, readable: &[&[u8]], writable: &[u32]) -> u16 {
        let head = self.next_descriptor;
        let parts = readable.len() + writable.len();
        for part in 0..parts {
            let (length, flag) = match readable.get(part) {
                Some(bytes) => {
                    self.memory.write_slice(bytes, GuestAddress(self.next_buffer)).unwrap();
                    (u32::try_from(bytes.len()).unwrap(), 0)
                }
                None => (writable[part - readable.len()], WRITE),
            };
            let flags = flag | if part + 1 < parts { NEXT } else { 0 };
            self.descriptor(self.next_buffer, length, flags);
            self.next_buffer += u64::from(length).next_multiple_of(16);
        }
        self.offer(head);
        head
    }

    /// Writes a raw descriptor, chained to the one behind it.
    pub fn descriptor(&mut self, address: u64, length: u32, flags: u16) {
        let index = self.next_descriptor;
        assert!(index < self.size, "descriptors are used once");
        let at = GuestAddress(self.rings()[0] + u64::from(index) * 16);
        let low = u128::from(address) | u128::from(length) << 64;
        let next = u128::from((index + 1) % self.size);
        self.memory.write_obj(low | u128::from(flags) << 96 | next << 112, at).unwrap();
        self.next_descriptor += 1;
    }

    /// Puts a head on the available ring.
    pub fn offer(&mut self, head: u16) {
        let ring = self.rings()[1];
        let slot = ring + 4 + u64::from(self.avail % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        self.memory.write_obj(self.avail, GuestAddress(ring + 2)).unwrap();
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// An impossible index on the available ring.
    pub fn break_ring(&self) {
        self.memory.write_obj(self.avail.wrapping_add(self.size + 1), GuestAddress(self.rings()[1] + 2)).unwrap();
    }

    /// Writes anything: descriptors (address, length, flags, next), heads, an available index `jump` ahead of them,
    /// and the first bytes of the buffers.
    pub fn overwrite(&mut self, descriptors: &[(u64, u32, u16, u16)], heads: &[u16], jump: u16, data: &[u8]) {
        for (&(address, length, flags, next), place) in descriptors.iter().zip(0u64..) {
            // Small addresses are offsets into this queue's memory.
            let address = if address < SPAN { self.base + address } else { address };
            let low = u128::from(address) | u128::from(length) << 64;
            let whole = low | u128::from(flags) << 96 | u128::from(next) << 112;
            self.memory.write_obj(whole, GuestAddress(self.base + place * 16)).unwrap();
        }
        heads.iter().for_each(|&head| self.offer(head));
        self.memory.write_obj(self.avail.wrapping_add(jump), GuestAddress(self.rings()[1] + 2)).unwrap();
        self.memory.write_slice(data, GuestAddress(self.base + 0x8000)).unwrap();
    }

    /// Requests given back since the last call: head and bytes written.
    pub fn used(&mut self) -> Vec<(u16, u32)> {
        let ring = self.rings()[2];
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let mut done = Vec::new();
        while self.seen != index {
            let at = ring + 4 + u64::from(self.seen % self.size) * 8;
            let element: u64 = self.memory.read_obj(GuestAddress(at)).unwrap();
            done.push(((element & 0xFFFF) as u16, (element >> 32) as u32));
            self.seen = self.seen.wrapping_add(1);
        }
        done
    }

    /// What is in descriptor `index` of the table, up to `length` bytes.
    pub fn buffer(&self, index: u16, length: u32) -> Vec<u8> {
        let at = GuestAddress(self.rings()[0] + u64::from(index) * 16);
        let address: u64 = self.memory.read_obj(at).unwrap();
        let mut bytes = vec![0; length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// An event loop with one device.
pub struct Loop(EventManager<Arc<dyn EventSubscriber>>);

impl Loop {
    pub fn new<D: MutEventSubscriber + Send + 'static>(device: &Arc<Mutex<D>>) -> Self {
        let mut manager = EventManager::<Arc<dyn EventSubscriber>>::new().unwrap();
        manager.add_subscriber(device.clone());
        Self(manager)
    }

    /// Does what is there, once.
    pub fn turn(&mut self) {
        self.0.run_with_timeout(1).unwrap();
    }

    /// Runs until there is nothing to do; fails if that never comes.
    pub fn run(&mut self) {
        for _ in 0..10_000 {
            if self.0.run_with_timeout(1).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop spins");
    }

    /// Runs until `done` says so, which takes other threads; fails if that never comes.
    pub fn run_until(&mut self, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(60), "what is waited for does not come");
            self.0.run_with_timeout(1).unwrap();
        }
    }
}
