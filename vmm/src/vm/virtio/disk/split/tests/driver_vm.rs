//! A driver VM with one disk: its console device with the port's queues over vhost-user, and an agent that carries orders out in memory.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use nix::fcntl::SealFlag;
use umbra_driver_vm::block_protocol::{
    BLOCK_PORT, FromService, Hello, MAX_BATCH, Operation, PoolRange, RECORD_BYTES, ToService, encode_hello, records,
};
use umbra_shadow::LinkId;
use umbra_shadow::block::{Disk, SECTOR_BYTES, SectorRange};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::disk;
use crate::vm::virtio::Outbox;
use crate::vm::virtio::console::Console;
use crate::vm::virtio::device::VirtioDevice;
use crate::vm::virtio::testing::{DriverQueue, Loop, SPAN};
use crate::vm::virtio::vhost_user::testing::memory;
use crate::wire::messages::{PortBackend, PortEnd};

/// Queues of a console with one port.
const QUEUES: u64 = 6;
const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;
const RX: usize = 4;
const TX: usize = 5;
/// The pool lies behind the queues.
const POOL: PoolRange = PoolRange { start: QUEUES * SPAN, length: 2 * SPAN };
const DEPTH: u16 = 32;
/// The port of the driver VM's first end.
fn name() -> String {
    format!("{BLOCK_PORT}.0")
}

/// Features that a console's driver accepts: several ports, both of rings, virtio 1.
const FEATURES: u64 = 1 << 1 | 1 << 28 | 1 << 29 | 1 << 32;

pub struct DriverVm {
    link: LinkId,
    /// What it reports; taken at the greeting.
    pub report: Disk,
    console: Arc<Mutex<Console>>,
    events: Loop,
    queues: Vec<DriverQueue>,
    memory: GuestMemoryMmap,
    /// As reads see it, and as it is without its cache.
    medium: Vec<u8>,
    stable: Vec<u8>,
    holds: bool,
    waiting: VecDeque<ToService>,
    /// Records to be sent.
    answers: Vec<u8>,
    orders: usize,
}

impl DriverVm {
    /// Connected by `socket`, with a disk of this content. Its program has the port open.
    pub fn new(link: LinkId, socket: UnixStream, medium: Vec<u8>) -> Self {
        let memory = memory(Some(SealFlag::F_SEAL_SHRINK), QUEUES + 2);
        let name = name();
        let outbox: Outbox = Arc::new(|_| {});
        let mut console =
            Console::new(&[PortBackend { name: name.clone(), end: PortEnd::VhostUser }], None, &outbox).unwrap();
        console.set_features(FEATURES);
        let mut queues: Vec<_> = (0..QUEUES).map(|index| DriverQueue::new(&memory, index, 128)).collect();
        for (index, queue) in (0..).zip(&queues) {
            console.start_queue(index, queue.resources(), None).unwrap();
        }
        for _ in 0..20 {
            queues[CONTROL_RX].add(&[], &[64]);
        }
        for _ in 0..100 {
            queues[RX].add(&[], &[4096]);
        }
        // Device ready; then the port is ready, and open.
        for (port, event) in [(0u32, 0u16), (1, 3), (1, 6)] {
            let message = [&port.to_le_bytes()[..], &event.to_le_bytes(), &1u16.to_le_bytes()].concat();
            queues[CONTROL_TX].add(&[&message], &[]);
        }
        queues[CONTROL_TX].kick();
        console.connect(&name, (0, link), socket);
        let console = Arc::new(Mutex::new(console));
        let events = Loop::new(&console);
        let stable = medium.clone();
        let (waiting, answers, report) = (VecDeque::new(), Vec::new(), disk());
        Self {
            link,
            report,
            console,
            events,
            queues,
            memory,
            medium,
            stable,
            holds: false,
            waiting,
            answers,
            orders: 0,
        }
    }

    /// The next connection of this life.
    pub fn connect(&mut self, link: LinkId, socket: UnixStream) {
        self.console.lock().unwrap().connect(&name(), (0, link), socket);
    }

    /// Carries the first order that waits out, and says so to nobody: the answer is in the queue, and its reader does not look.
    pub fn answer_unheard(&mut self) {
        self.answer_one();
        let answers = std::mem::take(&mut self.answers);
        self.queues[TX].add(&[&answers], &[]);
    }

    /// Whether orders wait from now on.
    pub fn hold(&mut self, holds: bool) {
        self.holds = holds;
    }

    /// Orders that wait.
    pub fn held(&self) -> usize {
        self.waiting.len()
    }

    /// Orders that came.
    pub fn orders(&self) -> usize {
        self.orders
    }

    /// What is on the disk without its cache.
    pub fn stable(&self) -> &[u8] {
        &self.stable
    }

    /// Its end; what is on the disk then.
    pub fn end(self, keep_cache: bool) -> Vec<u8> {
        if keep_cache { self.medium } else { self.stable }
    }

    pub fn turn(&mut self) {
        self.events.run();
        for (head, length) in self.queues[RX].used() {
            let buffer = self.queues[RX].buffer(head, length);
            for record in records(&buffer).unwrap() {
                let (link, order) = ToService::parse(record, self.link.generation).unwrap();
                if order == ToService::Begin {
                    (self.link, self.orders) = (link, 0);
                    self.waiting.clear();
                    self.answers.clear();
                }
                if link == self.link {
                    self.hear(order);
                }
            }
        }
        while !self.holds && !self.waiting.is_empty() {
            self.answer_one();
        }
        for batch in std::mem::take(&mut self.answers).chunks(MAX_BATCH * RECORD_BYTES) {
            self.say(batch);
        }
    }

    fn hear(&mut self, order: ToService) {
        if order == ToService::Begin {
            let hello = Hello { disk: self.report.clone(), pool: vec![POOL], depth: DEPTH };
            self.say(&encode_hello(&hello, self.link).unwrap());
            return;
        }
        self.orders += 1;
        self.waiting.push_back(order);
    }

    /// Carries the first order that waits out; the next turn says so.
    pub fn answer_one(&mut self) {
        let Some(order) = self.waiting.pop_front() else { return };
        let (tag, bytes) = match order {
            ToService::Access { tag, operation, at } => (tag, self.access(operation, at)),
            ToService::Flush { tag } => {
                self.stable.clone_from(&self.medium);
                (tag, 0)
            }
            ToService::Begin => return,
        };
        self.answers.extend(FromService::Done { tag, errno: 0, bytes }.encode(self.link));
    }

    fn say(&mut self, bytes: &[u8]) {
        self.queues[TX].add(&[bytes], &[]);
        self.queues[TX].kick();
    }

    /// How many bytes were moved.
    fn access(&mut self, operation: Operation, at: SectorRange) -> u64 {
        let start = usize::try_from(at.start() * SECTOR_BYTES).unwrap();
        let extent = start..start + usize::try_from(at.bytes()).unwrap();
        let medium = &mut self.medium[extent];
        let place = |place| GuestAddress(POOL.start + place);
        match operation {
            Operation::Read { place: from } => self.memory.write_slice(medium, place(from)).unwrap(),
            Operation::Write { place: from } => self.memory.read_slice(medium, place(from)).unwrap(),
            Operation::WriteZeroes { .. } | Operation::Discard => {
                medium.fill(0);
                return 0;
            }
        }
        at.bytes()
    }
}
