//! The driver's side of a virtio-net device, for tests and benchmarks: rings and buffers in a memory of its own, as
//! a guest's or a driver VM's kernel keeps them.
#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation)]

pub mod vm;

use std::collections::HashMap;
use std::fs::File;
use std::io::{IoSlice, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg, setsockopt, sockopt};
use umbra_splitter::header::HEADER_LEN;
use umbra_splitter::queue::Virtqueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const WRITE: u16 = 2;
const NEXT: u16 = 1;

/// A memory of `size` bytes from a sealed memfd, and the file.
pub fn sealed_memory(size: usize) -> (Arc<GuestMemoryMmap>, File) {
    let file = memfd(size, SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW);
    let ranges = [(GuestAddress(0), size, Some(FileOffset::new(file.try_clone().unwrap(), 0)))];
    (Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()), file)
}

pub fn memfd(size: usize, seals: SealFlag) -> File {
    let file: File = memfd_create("test", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap().into();
    file.set_len(size as u64).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    file
}

pub fn memory(size: usize) -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap())
}

pub fn clone_event(event: &EventFd) -> EventFd {
    event.try_clone().unwrap()
}

/// Room that the rings of one queue take, from their base.
pub const RINGS_LEN: u64 = 0x8000;

/// The driver's side of one split virtqueue.
pub struct Driver {
    pub memory: Arc<GuestMemoryMmap>,
    pub base: u64,
    pub size: u16,
    pub event_idx: bool,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    pub avail_idx: u16,
    pub last_used: u16,
    pub kick: EventFd,
    pub call: EventFd,
}

impl Driver {
    pub fn new(memory: &Arc<GuestMemoryMmap>, base: u64, size: u16, event_idx: bool) -> Self {
        Self {
            memory: Arc::clone(memory),
            base,
            size,
            event_idx,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            avail_idx: 0,
            last_used: 0,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    pub fn descriptors(&self) -> u64 {
        self.base
    }

    pub fn avail(&self) -> u64 {
        self.base + 0x4000
    }

    pub fn used_ring(&self) -> u64 {
        self.base + 0x5000
    }

    /// The device's end, as a transport hands it over.
    pub fn device(&self) -> Virtqueue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(u32::try_from(self.descriptors()).unwrap()), Some(0));
        queue.set_avail_ring_address(Some(u32::try_from(self.avail()).unwrap()), Some(0));
        queue.set_used_ring_address(Some(u32::try_from(self.used_ring()).unwrap()), Some(0));
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        Virtqueue::new(Arc::clone(&self.memory), &queue, clone_event(&self.kick), Some(clone_event(&self.call)))
            .unwrap()
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Number of the descriptor that the next chain will start with.
    pub fn next_head(&self) -> u16 {
        *self.free.last().unwrap()
    }

    pub fn write_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(self.descriptors() + 16 * u64::from(index));
        let word = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.memory.write_obj(address, at).unwrap();
        self.memory.write_obj(word, GuestAddress(at.0 + 8)).unwrap();
    }

    /// Offers a chain of (address, length, flags); returns its head.
    pub fn offer(&mut self, buffers: &[(u64, u32, u16)]) -> u16 {
        let indices: Vec<u16> = buffers.iter().map(|_| self.free.pop().unwrap()).collect();
        for (place, (address, len, flags)) in buffers.iter().enumerate() {
            let (flags, next) = match indices.get(place + 1) {
                Some(next) => (flags | NEXT, *next),
                None => (*flags, 0),
            };
            self.write_descriptor(indices[place], *address, *len, flags, next);
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        self.offer_head(head);
        head
    }

    /// Puts any number into the available ring.
    pub fn offer_head(&mut self, head: u16) {
        let place = u64::from(self.avail_idx % self.size);
        self.memory.write_obj(head, GuestAddress(self.avail() + 4 + 2 * place)).unwrap();
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    pub fn set_avail_idx(&mut self, idx: u16) {
        self.avail_idx = idx;
        self.memory.store(idx, GuestAddress(self.avail() + 2), Ordering::Release).unwrap();
    }

    /// Whether the device wants to hear of what was offered since the available index was `old`: as a driver asks, after it has shown
    /// its index (virtio 1.2, section 2.7.10).
    pub fn wants_kick(&self, old: u16) -> bool {
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = GuestAddress(self.used_ring() + 4 + 8 * u64::from(self.size));
            let event: u16 = self.memory.load(at, Ordering::Relaxed).unwrap();
            let new = self.avail_idx;
            return new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        }
        let flags: u16 = self.memory.load(GuestAddress(self.used_ring()), Ordering::Relaxed).unwrap();
        flags & 1 == 0
    }

    /// Whether there is a used element to take.
    pub fn has_used(&self) -> bool {
        let idx: u16 = self.memory.load(GuestAddress(self.used_ring() + 2), Ordering::Acquire).unwrap();
        idx != self.last_used
    }

    /// Takes one used element: head and length.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        let idx: u16 = self.memory.load(GuestAddress(self.used_ring() + 2), Ordering::Acquire).unwrap();
        if idx == self.last_used {
            return None;
        }
        let at = self.used_ring() + 4 + 8 * u64::from(self.last_used % self.size);
        let id: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.last_used = self.last_used.wrapping_add(1);
        // As Linux does with event index: interrupt at the next used element.
        let event = GuestAddress(self.avail() + 4 + 2 * u64::from(self.size));
        self.memory.write_obj(self.last_used, event).unwrap();
        let head = u16::try_from(id).unwrap();
        let indices = self.chains.remove(&head).expect("a used chain that was never offered, or twice");
        self.free.extend(indices);
        Some((head, len))
    }

    /// How often the device kicked... interrupted since last asked.
    pub fn interrupts(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }
}

/// A header without offloads.
pub const PLAIN: [u8; HEADER_LEN] = [0; HEADER_LEN];

/// A transmit queue with one slot of 64 KiB and more for each descriptor.
pub struct Tx {
    pub driver: Driver,
    data: u64,
}

pub const TX_SLOT: u64 = 0x1_1000;

impl Tx {
    pub fn new(driver: Driver, data: u64) -> Self {
        Self { driver, data }
    }

    pub fn send(&mut self, frame: &[u8]) {
        self.send_with(PLAIN, frame);
    }

    pub fn send_with(&mut self, header: [u8; HEADER_LEN], frame: &[u8]) {
        while self.driver.take_used().is_some() {}
        let at = self.data + u64::from(self.driver.next_head()) * TX_SLOT;
        self.driver.memory.write_slice(&header, GuestAddress(at)).unwrap();
        self.driver.memory.write_slice(frame, GuestAddress(at + HEADER_LEN as u64)).unwrap();
        self.driver.offer(&[(at, u32::try_from(HEADER_LEN + frame.len()).unwrap(), 0)]);
    }

    /// Frames that the device completed since the queue was made.
    pub fn completed(&mut self) -> u16 {
        while self.driver.take_used().is_some() {}
        self.driver.last_used
    }
}

/// A receive queue with one buffer of `len` bytes for each descriptor.
pub struct Rx {
    pub driver: Driver,
    data: u64,
    len: u32,
}

impl Rx {
    pub fn new(driver: Driver, data: u64, len: u32) -> Self {
        Self { driver, data, len }
    }

    /// Offers `count` buffers.
    pub fn offer(&mut self, count: usize) {
        for _ in 0..count.min(self.driver.free()) {
            let at = self.data + u64::from(self.driver.next_head()) * u64::from(self.len);
            self.driver.offer(&[(at, self.len, WRITE)]);
        }
    }

    pub fn offer_all(&mut self) {
        self.offer(usize::MAX);
    }

    /// Takes one frame: header and bytes. All its buffers must be there when the first is.
    pub fn receive(&mut self) -> Option<([u8; HEADER_LEN], Vec<u8>)> {
        let (head, len) = self.driver.take_used()?;
        let mut bytes = self.read(head, len);
        let header: [u8; HEADER_LEN] = bytes[..HEADER_LEN].try_into().unwrap();
        for _ in 1..u16::from_le_bytes([header[10], header[11]]) {
            let (head, len) = self.driver.take_used().expect("a frame came in part");
            bytes.extend(self.read(head, len));
        }
        Some((header, bytes.split_off(HEADER_LEN)))
    }

    fn read(&self, head: u16, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.driver
            .memory
            .read_slice(&mut bytes, GuestAddress(self.data + u64::from(head) * u64::from(self.len)))
            .unwrap();
        bytes
    }

    pub fn receive_all(&mut self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.receive().map(|(_, frame)| frame)).collect()
    }
}

/// Frame number `number` of `len` bytes: its number stands behind the Ethernet header, the rest follows from it.
pub fn frame(number: u32, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(number as u8)).collect();
    bytes[14..18].copy_from_slice(&number.to_le_bytes());
    bytes
}

/// The number in a frame.
pub fn number(frame: &[u8]) -> u32 {
    u32::from_le_bytes(frame[14..18].try_into().unwrap())
}

/// A copy of an eventfd as a file, for a vhost-user message.
pub fn as_file(event: &EventFd) -> File {
    let copy = clone_event(event);
    assert!(copy.as_raw_fd() >= 0);
    // SAFETY: the descriptor is valid and given up by `copy`.
    unsafe { File::from_raw_fd(copy.into_raw_fd()) }
}

/// Sends a byte with the only descriptor of a TCP socket whose last close takes a minute, because its peer, which is returned, reads
/// nothing.
pub fn send_lingering(to: &UnixStream) -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (deaf, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    while stream.write(&[0; 65536]).is_ok() {}
    setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 60 }).unwrap();
    let raw = [stream.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&raw)];
    sendmsg::<UnixAddr>(to.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None).unwrap();
    deaf
}
