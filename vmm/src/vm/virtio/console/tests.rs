//! The device with a driver's side and real sockets.

#![allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]

use std::io::{Read, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use vm_memory::GuestMemoryMmap;

use super::*;
use crate::vm::virtio::testing::{DriverQueue, Loop, memory};
use crate::vm::virtio::vhost_user::testing::link;
use crate::wire::messages::PortEnd;

struct Guest {
    device: Arc<Mutex<Console>>,
    events: Loop,
    queues: Vec<DriverQueue>,
}

/// A console that has nothing to say to the supervisor.
fn console(ports: &[PortBackend]) -> Result<Console, Error> {
    let outbox: Outbox = Arc::new(|message| panic!("{message:?}"));
    Console::new(ports, None, &outbox)
}

impl Guest {
    fn new(ports: &[PortBackend]) -> Self {
        let count = 2 * ports.len() + 4;
        Self::with(console(ports).unwrap(), &memory(count as u64), count)
    }

    /// A driver that runs `count` queues in `memory`.
    fn with(console: Console, memory: &GuestMemoryMmap, count: usize) -> Self {
        let device = Arc::new(Mutex::new(console));
        let events = Loop::new(&device);
        let mut guest = Self { device, events, queues: Vec::new() };
        for index in 0..count {
            let queue = DriverQueue::new(memory, index as u64, QUEUE_SIZE);
            let mut device = guest.device.lock().unwrap();
            device.start_queue(index as u16, queue.resources(), None).unwrap();
            drop(device);
            guest.queues.push(queue);
        }
        for _ in 0..20 {
            guest.queues[2].add(&[], &[64]);
        }
        guest.control(0, 0, 1);
        guest
    }

    fn control(&mut self, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.queues[3].add(&[&message], &[]);
        self.queues[3].kick();
        self.events.run();
    }

    /// Control messages since the last call: port, event, value, name.
    fn messages(&mut self) -> Vec<(u32, u16, u16, String)> {
        let queue = &mut self.queues[2];
        let parse = |bytes: Vec<u8>| {
            let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            (half(0).into(), half(4), half(6), String::from_utf8_lossy(&bytes[8..]).into_owned())
        };
        queue.used().into_iter().map(|(head, length)| parse(queue.buffer(head, length))).collect()
    }

    fn write(&mut self, queue: usize, bytes: &[u8]) {
        self.queues[queue].add(&[bytes], &[]);
        self.queues[queue].kick();
        self.events.run();
    }

    fn read(&mut self, queue: usize) -> Vec<u8> {
        let queue = &mut self.queues[queue];
        queue.used().into_iter().flat_map(|(head, length)| queue.buffer(head, length)).collect()
    }

    fn room(&mut self, queue: usize, size: u32) {
        self.queues[queue].add(&[], &[size]);
        self.queues[queue].kick();
        self.events.run();
    }
}

fn inherited() -> (UnixStream, PortBackend) {
    let (host, end) = UnixStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    (host, PortBackend { name: "org.umbra.control".into(), end: PortEnd::Fd(end.into_raw_fd()) })
}

fn listening() -> (tempfile::TempDir, PathBuf, PortBackend) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("port.sock");
    (folder, path.clone(), PortBackend { name: "agent".into(), end: PortEnd::Listen(path) })
}

fn read_now(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 20];
    let length = stream.read(&mut bytes).unwrap();
    bytes.truncate(length);
    bytes
}

#[test]
fn port_is_announced_named_and_open() {
    let (_host, backend) = inherited();
    let mut guest = Guest::new(&[backend]);
    assert_eq!(guest.messages(), [(1, 1, 1, String::new())]);
    guest.control(1, 3, 1);
    assert_eq!(guest.messages(), [(1, 7, 1, "org.umbra.control".into()), (1, 6, 1, String::new())]);
    let mut ports = [0; 4];
    guest.device.lock().unwrap().config_read(4, &mut ports);
    assert_eq!(u32::from_le_bytes(ports), 2);
}

impl Guest {
    /// Gives queue `index` the place of a longer one: what its driver adds to it while the device empties it.
    fn lengthen(&mut self, index: u16, memory: &GuestMemoryMmap) {
        let mut device = self.device.lock().unwrap();
        device.stop_queue(index);
        let queue = DriverQueue::new(memory, u64::from(index) + 100, 1024);
        device.start_queue(index, queue.resources(), None).unwrap();
        drop(device);
        self.queues[usize::from(index)] = queue;
        self.events.run();
    }

    fn is_emptied_though_its_driver_writes_on_and_on(&mut self, memory: &GuestMemoryMmap) {
        self.lengthen(5, memory);
        // Kicked once: with event index a driver does not kick again before it was asked to.
        for _ in 0..1000 {
            self.queues[5].add(&[b"x"], &[]);
        }
        self.queues[5].kick();
        self.events.run();
        assert_eq!(self.queues[5].used().len(), 1000);
    }
}

#[test]
fn a_port_without_a_client_is_emptied_though_its_driver_writes_on_and_on() {
    let (_folder, _path, backend) = listening();
    let memory = memory(110);
    let mut guest = Guest::with(console(&[backend]).unwrap(), &memory, 6);
    guest.control(1, 3, 1);
    guest.control(1, 6, 1);
    guest.is_emptied_though_its_driver_writes_on_and_on(&memory);
}

#[test]
fn all_control_messages_are_read_though_the_driver_writes_on_and_on() {
    let ports: Vec<_> = (0..MAX_PORTS).map(|n| PortBackend { name: n.to_string(), end: PortEnd::Attached }).collect();
    let memory = memory(110);
    let mut guest = Guest::with(console(&ports).unwrap(), &memory, 2 * MAX_PORTS + 4);
    // What was said before the driver gave room for it.
    for _ in 0..40 {
        guest.queues[2].add(&[], &[64]);
    }
    guest.queues[2].kick();
    guest.events.run();
    guest.lengthen(3, &memory);
    for _ in 0..1000 {
        guest.queues[3].add(&[&[0; 2 * MESSAGE_SIZE]], &[]);
    }
    guest.queues[3].kick();
    guest.events.run();
    assert_eq!(guest.queues[3].used().len(), 1000);
}

#[test]
fn bytes_pass_both_ways_in_order() {
    let (mut host, backend) = inherited();
    let mut guest = Guest::new(&[backend]);
    guest.control(1, 3, 1);
    guest.control(1, 6, 1);
    guest.write(5, b"hello ");
    guest.write(5, b"host");
    assert_eq!(read_now(&mut host), b"hello host");
    host.write_all(b"hello guest").unwrap();
    guest.events.run();
    guest.room(4, 5);
    guest.room(4, 64);
    assert_eq!(guest.read(4), b"hello guest");
    assert!(guest.queues[4].call.read().is_ok(), "the driver is interrupted");
}

#[test]
fn bytes_wait_in_the_socket_until_the_guest_opens() {
    let (mut host, backend) = inherited();
    let mut guest = Guest::new(&[backend]);
    guest.control(1, 3, 1);
    guest.room(4, 64);
    host.write_all(b"early").unwrap();
    guest.events.run();
    assert_eq!(guest.read(4), b"");
    guest.control(1, 6, 1);
    assert_eq!(guest.read(4), b"early");
}

#[test]
fn a_slow_host_stops_the_guest_and_loses_nothing() {
    let (mut host, backend) = inherited();
    let mut guest = Guest::new(&[backend]);
    guest.control(1, 3, 1);
    guest.control(1, 6, 1);
    let block: Vec<u8> = (0..30_000).map(|i: u32| (i % 251) as u8).collect();
    for _ in 0..30 {
        guest.queues[5].add(&[&block], &[]);
    }
    guest.queues[5].kick();
    guest.events.run();
    let taken = guest.queues[5].used().len();
    assert!(taken < 30, "the socket cannot hold all of it");
    let mut received = Vec::new();
    while received.len() < 30 * block.len() {
        received.extend(read_now(&mut host));
        guest.events.run();
    }
    assert_eq!(received, block.repeat(30));
    assert_eq!(guest.queues[5].used().len(), 30 - taken);
}

#[test]
fn end_of_the_host_is_told_after_its_last_byte() {
    let (mut host, backend) = inherited();
    let mut guest = Guest::new(&[backend]);
    guest.control(1, 3, 1);
    guest.control(1, 6, 1);
    guest.messages();
    host.write_all(b"bye").unwrap();
    drop(host);
    guest.events.run();
    assert_eq!(guest.messages(), [], "the last bytes still wait");
    guest.room(4, 64);
    guest.room(4, 64);
    assert_eq!(guest.read(4), b"bye");
    assert_eq!(guest.messages(), [(1, 6, 0, String::new())]);
    guest.write(5, b"into the void");
    assert_eq!(guest.queues[5].used().len(), 1);
}

#[test]
fn listener_serves_one_client_after_the_other() {
    let (_folder, path, backend) = listening();
    let mut guest = Guest::new(&[backend]);
    guest.control(1, 3, 1);
    guest.messages();
    let mut first = UnixStream::connect(&path).unwrap();
    guest.events.run();
    assert_eq!(guest.messages(), [(1, 6, 1, String::new())]);
    guest.control(1, 6, 1);
    guest.write(5, b"one");
    assert_eq!(read_now(&mut first), b"one");
    let mut second = UnixStream::connect(&path).unwrap();
    guest.events.run();
    assert_eq!(second.read(&mut [0; 1]).unwrap(), 0, "turned away");
    guest.control(1, 6, 0);
    guest.control(1, 6, 1);
    guest.write(5, b"two");
    assert_eq!(read_now(&mut first), b"two", "the client stays when a program in the guest closes the port");
    drop(first);
    guest.room(4, 64);
    assert_eq!(guest.messages(), [(1, 6, 0, String::new())]);
    let mut third = UnixStream::connect(&path).unwrap();
    guest.events.run();
    assert_eq!(guest.messages(), [(1, 6, 1, String::new())]);
    guest.write(5, b"three");
    assert_eq!(read_now(&mut third), b"three");
}

#[test]
fn client_that_left_before_the_guest_opened_makes_room() {
    let (_folder, path, backend) = listening();
    let mut guest = Guest::new(&[backend]);
    guest.control(1, 3, 1);
    drop(UnixStream::connect(&path).unwrap());
    guest.events.run();
    let mut second = UnixStream::connect(&path).unwrap();
    guest.events.run();
    guest.control(1, 6, 1);
    guest.write(5, b"hello");
    assert_eq!(read_now(&mut second), b"hello");
}

#[test]
fn what_a_client_left_is_read_before_the_next_one_s_words() {
    let (_folder, path, backend) = listening();
    let mut guest = Guest::new(&[backend]);
    guest.control(1, 3, 1);
    for words in [b"one", b"two"] {
        UnixStream::connect(&path).unwrap().write_all(words).unwrap();
        guest.events.run();
    }
    let mut third = UnixStream::connect(&path).unwrap();
    // It has said all, but listens.
    third.write_all(b"three").unwrap();
    third.shutdown(std::net::Shutdown::Write).unwrap();
    guest.events.run();
    let mut fourth = UnixStream::connect(&path).unwrap();
    guest.events.run();
    assert_eq!(fourth.read(&mut [0; 1]).unwrap(), 0, "turned away");
    guest.control(1, 6, 1);
    guest.write(5, b"hello");
    assert_eq!(read_now(&mut third), b"hello");
    (0..3).for_each(|_| guest.room(4, 64));
    let buffers = guest.queues[4].used();
    let heard: Vec<u8> = buffers.into_iter().flat_map(|(head, length)| guest.queues[4].buffer(head, length)).collect();
    assert_eq!(heard, b"onetwothree");
}

#[test]
fn broken_ring_asks_for_a_reset_and_reset_helps() {
    let (mut host, backend) = inherited();
    let mut guest = Guest::new(&[backend]);
    let call = EventFd::new(0).unwrap();
    guest.device.lock().unwrap().set_config_interrupt(call.try_clone().unwrap());
    guest.control(1, 3, 1);
    guest.queues[5].break_ring();
    guest.queues[5].kick();
    guest.events.run();
    assert!(guest.device.lock().unwrap().needs_reset());
    assert_eq!(call.read().unwrap(), 1);
    {
        let mut device = guest.device.lock().unwrap();
        for index in 0..6 {
            assert!(device.stop_queue(index).is_some());
            assert!(device.stop_queue(index).is_none());
        }
        device.reset();
        assert!(!device.needs_reset());
    }
    guest.events.run();
    host.write_all(b"still there").unwrap();
    guest.events.run();
}

#[test]
fn many_control_messages_at_once_are_all_answered() {
    let (_host, backend) = inherited();
    let mut guest = Guest::new(&[backend]);
    guest.messages();
    let ready = [1, 0, 0, 0, 3, 0, 1, 0];
    for _ in 0..100 {
        guest.queues[3].add(&[&ready], &[]);
    }
    for _ in 0..105 {
        guest.queues[2].add(&[], &[64]);
    }
    guest.queues[3].kick();
    guest.events.run();
    assert_eq!(guest.queues[3].used().len(), 101, "with the first one");
    assert_eq!(guest.messages().iter().filter(|message| message.1 == 7).count(), 100, "names");
}

#[test]
fn socket_in_use_is_said_and_a_stale_one_replaced() {
    let (_folder, path, backend) = listening();
    let first = console(std::slice::from_ref(&backend)).unwrap();
    let error = format!("{:#}", anyhow::Error::new(console(std::slice::from_ref(&backend)).err().unwrap()));
    assert!(error.contains("another process listens") && error.contains("port.sock"), "{error}");
    drop(first);
    assert!(path.exists(), "the supervisor removes it");
    console(&[backend]).unwrap();
}

#[test]
fn absurd_requests_are_dropped() {
    let (mut host, backend) = inherited();
    let mut guest = Guest::new(&[backend]);
    guest.control(1, 3, 1);
    guest.control(1, 6, 1);
    let queue = &mut guest.queues[5];
    queue.descriptor(0, 0xFFFF_FFFF, 0);
    queue.offer(0);
    queue.descriptor(0, 0x3F_FFFF, 0);
    queue.offer(1);
    guest.write(5, b"ok");
    assert_eq!(read_now(&mut host), b"ok");
    assert_eq!(guest.queues[5].used().len(), 3);
}

const PORT: &str = "org.umbra.sound.0";

fn attached() -> Guest {
    let mut guest = Guest::new(&[PortBackend { name: PORT.into(), end: PortEnd::Attached }]);
    guest.control(1, 3, 1);
    guest.messages();
    guest
}

/// Gives the port a peer; the other end of it.
fn connect(guest: &mut Guest) -> UnixStream {
    let (host, end) = UnixStream::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    guest.device.lock().unwrap().connect(PORT, (0, link()), end);
    guest.events.run();
    host
}

/// What the guest was told of the host's end.
fn told(guest: &mut Guest) -> Vec<bool> {
    guest.messages().into_iter().filter(|message| message.1 == 6).map(|message| message.2 == 1).collect()
}

fn has_ended(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0; 1]) {
        Ok(length) => length == 0,
        // It ended with something that it had said and nobody has read.
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn attached_port_is_closed_until_a_peer_is_given() {
    let mut guest = attached();
    guest.control(1, 6, 1);
    assert!(told(&mut guest).is_empty());
    guest.write(5, b"into the void");
    assert_eq!(guest.queues[5].used().len(), 1);
    let mut host = connect(&mut guest);
    assert_eq!(told(&mut guest), [true]);
    guest.write(5, b"hello host");
    assert_eq!(read_now(&mut host), b"hello host", "and nothing of what was written before");
    host.write_all(b"hello guest").unwrap();
    guest.room(4, 64);
    assert_eq!(guest.read(4), b"hello guest");
}

#[test]
fn peer_given_before_the_guest_opens_waits_with_what_it_says() {
    let mut guest = attached();
    let mut host = connect(&mut guest);
    host.write_all(b"begin").unwrap();
    guest.room(4, 64);
    assert_eq!(guest.read(4), b"");
    guest.control(1, 6, 1);
    assert_eq!(guest.read(4), b"begin");
}

#[test]
fn next_peer_is_joined_once_the_guest_has_let_go_of_the_one_before() {
    let mut guest = attached();
    guest.control(1, 6, 1);
    let mut first = connect(&mut guest);
    first.write_all(b"half a mess").unwrap();
    guest.room(4, 64);
    assert_eq!(guest.read(4), b"half a mess");
    first.write_all(b"age").unwrap();
    guest.messages();
    let mut second = connect(&mut guest);
    second.write_all(b"begin").unwrap();
    assert!(has_ended(&mut first));
    guest.room(4, 64);
    assert_eq!((told(&mut guest), guest.read(4)), (vec![false], Vec::new()));
    guest.write(5, b"an answer to the first");
    // The program reads the end, closes the port and opens it again.
    guest.control(1, 6, 0);
    guest.control(1, 6, 1);
    assert_eq!(told(&mut guest), [true]);
    assert_eq!(guest.read(4), b"begin");
    guest.write(5, b"an answer to the second");
    assert_eq!(read_now(&mut second), b"an answer to the second");
}

#[test]
fn peer_that_said_and_heard_nothing_is_replaced_without_a_word() {
    let mut guest = attached();
    guest.control(1, 6, 1);
    let mut first = connect(&mut guest);
    assert_eq!(told(&mut guest), [true]);
    let mut second = connect(&mut guest);
    assert!(has_ended(&mut first));
    second.write_all(b"begin").unwrap();
    guest.room(4, 64);
    assert_eq!((told(&mut guest), guest.read(4)), (Vec::new(), b"begin".to_vec()));
}

#[test]
fn of_peers_that_wait_the_last_one_is_joined() {
    let mut guest = attached();
    guest.control(1, 6, 1);
    let mut first = connect(&mut guest);
    first.write_all(b"x").unwrap();
    guest.room(4, 64);
    assert_eq!(guest.read(4), b"x");
    let mut second = connect(&mut guest);
    let mut third = connect(&mut guest);
    assert!(has_ended(&mut second));
    guest.control(1, 6, 0);
    guest.control(1, 6, 1);
    guest.write(5, b"third?");
    assert_eq!(read_now(&mut third), b"third?");
}

#[test]
fn peer_that_goes_closes_the_port_until_another_comes() {
    let mut guest = attached();
    guest.control(1, 6, 1);
    let mut first = connect(&mut guest);
    first.write_all(b"x").unwrap();
    drop(first);
    guest.room(4, 64);
    guest.room(4, 64);
    assert_eq!((told(&mut guest), guest.read(4)), (vec![true, false], b"x".to_vec()));
    guest.control(1, 6, 0);
    guest.control(1, 6, 1);
    let mut second = connect(&mut guest);
    assert_eq!(told(&mut guest), [true]);
    second.write_all(b"y").unwrap();
    guest.events.run();
    assert_eq!(guest.read(4), b"y");
}

#[test]
fn guest_that_closes_the_port_hangs_up_even_if_the_peer_does_not_read() {
    let mut guest = attached();
    guest.control(1, 6, 1);
    let mut first = connect(&mut guest);
    for _ in 0..QUEUE_SIZE {
        guest.queues[5].add(&[&[1; 7000]], &[]);
    }
    guest.queues[5].kick();
    guest.events.run();
    let before = guest.queues[5].used().len();
    assert!(before < usize::from(QUEUE_SIZE), "the socket cannot hold all of it");
    guest.messages();
    guest.control(1, 6, 0);
    assert_eq!(before + guest.queues[5].used().len(), usize::from(QUEUE_SIZE), "the rest is dropped");
    assert_eq!(told(&mut guest), [false]);
    while !has_ended(&mut first) {}
    guest.control(1, 6, 1);
    let mut second = connect(&mut guest);
    assert_eq!(told(&mut guest), [true]);
    assert!(second.read(&mut [0; 1]).is_err(), "nothing of the first reaches it");
}

#[test]
fn guest_that_starts_anew_ends_a_peer_that_has_lost_bytes() {
    let mut guest = attached();
    guest.control(1, 6, 1);
    let mut first = connect(&mut guest);
    first.write_all(b"x").unwrap();
    guest.room(4, 64);
    guest.device.lock().unwrap().reset();
    assert!(!has_ended(&mut first), "closed when the event loop has forgotten it");
    let mut second = connect(&mut guest);
    guest.device.lock().unwrap().reset();
    guest.events.run();
    assert!(has_ended(&mut first) && !has_ended(&mut second));
}

#[test]
fn connecting_a_port_that_takes_no_peers_changes_nothing() {
    let (mut host, backend) = inherited();
    let mut guest = Guest::new(&[backend]);
    guest.control(1, 3, 1);
    guest.control(1, 6, 1);
    for name in ["org.umbra.control", "nobody"] {
        let (mut other, end) = UnixStream::pair().unwrap();
        guest.device.lock().unwrap().connect(name, (0, link()), end);
        assert!(has_ended(&mut other));
    }
    guest.write(5, b"still there");
    assert_eq!(read_now(&mut host), b"still there");
}

mod clients;
pub(in crate::vm::virtio) mod hvc;
mod vhost_user;
