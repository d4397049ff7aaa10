//! A port whose queues the splitter's own back-end serves.

use std::sync::mpsc::{Receiver, channel};

use nix::fcntl::SealFlag;
use umbra_splitter::link::{LinkEvent, LinkServer, What};
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::vm::virtio::vhost_user::testing::{backend, link, memory, next, up};
use crate::wire::messages::{Disconnect, FromVm};

const DISK: &str = "org.umbra.block.2";
/// Its place among the driver VM's ends.
const END: u16 = 2;
/// Queues of a console with that port alone.
const QUEUES: u64 = 6;

/// A guest whose driver knows the port and has been told its name; and what the device says to the supervisor.
struct Bench {
    guest: Guest,
    said: Receiver<FromVm>,
}

impl Bench {
    fn new() -> Self {
        Self::with(&memory(Some(SealFlag::F_SEAL_SHRINK), QUEUES))
    }

    fn with(memory: &GuestMemoryMmap) -> Self {
        let (sender, said) = channel();
        let outbox: Outbox = Arc::new(move |message| sender.send(message).unwrap_or(()));
        let port = PortBackend { name: DISK.into(), end: PortEnd::VhostUser };
        let mut console = Console::new(&[port], None, &outbox).unwrap();
        console.set_features(F_MULTIPORT | F_RING | F_VERSION_1);
        let mut guest = Guest::with(console, memory, 6);
        guest.control(1, 3, 1);
        assert_eq!(guest.messages().last().unwrap(), &(1, 7, 1, DISK.into()));
        Self { guest, said }
    }

    fn connect(&mut self, link: LinkId) -> (LinkServer, Receiver<LinkEvent>) {
        let (socket, server, receiver) = backend(link, QUEUES);
        self.guest.device.lock().unwrap().connect(DISK, (END, link), socket);
        self.guest.events.run();
        (server, receiver)
    }

    /// What the device says next.
    fn disconnected(&mut self) -> (LinkId, Disconnect) {
        let mut said = None;
        self.guest.events.run_until(|| {
            said = self.said.try_recv().ok();
            said.is_some()
        });
        match said {
            Some(FromVm::Disconnected { end: END, link, why }) => (link, why),
            other => panic!("{other:?}"),
        }
    }

    /// Turns until the set-up of a connection has ended.
    fn set_up(&mut self) {
        let device = Arc::clone(&self.guest.device);
        self.guest.events.run_until(|| device.lock().unwrap().ports[0].front().unwrap().is_up());
    }
}

fn is_quiet(receiver: &Receiver<LinkEvent>) -> bool {
    receiver.recv_timeout(std::time::Duration::from_millis(50)).is_err()
}

#[test]
fn the_port_is_open_while_there_is_a_connection_and_its_queues_are_the_back_ends() {
    let mut bench = Bench::new();
    bench.guest.control(1, 6, 1);
    assert!(told(&mut bench.guest).is_empty());
    let (server, receiver) = bench.connect(link());
    assert_eq!(told(&mut bench.guest), [true]);
    let mut link_up = up(&receiver);
    assert_eq!(link_up.features & (F_RING | F_VERSION_1), F_RING | F_VERSION_1);
    bench.set_up();
    // What the guest writes waits for the back-end, and what that writes comes to the guest.
    bench.guest.write(5, b"hello");
    assert_eq!((bench.guest.queues[5].used().len(), link_up.tx.open().unwrap().available().unwrap()), (0, 1));
    let head = bench.guest.queues[4].add(&[], &[64]);
    let mut ring = link_up.rx.open().unwrap();
    let mut chain = Chain::default();
    ring.walk(head, &mut chain).unwrap();
    scatter(b"record", chain.writable(), 0);
    ring.take(1);
    ring.complete(head, 6).unwrap();
    assert_eq!(bench.guest.read(4), b"record");
    // The next one goes on where that one stood.
    drop(server);
    assert_eq!(bench.disconnected(), (link(), Disconnect::Closed));
    bench.guest.events.run();
    assert_eq!(told(&mut bench.guest), [false]);
    let (_server, receiver) = bench.connect(link().next());
    let link_up = up(&receiver);
    assert_eq!((link_up.rx.position(), link_up.tx.position()), ((1, 1), (0, 0)));
    assert_eq!(told(&mut bench.guest), [true]);
    assert!(!bench.guest.device.lock().unwrap().needs_reset());
}

#[test]
fn a_connection_waits_until_a_program_has_the_port_open_and_the_driver_knows_of_it() {
    let mut bench = Bench::new();
    let (_server, receiver) = bench.connect(link());
    assert_eq!(told(&mut bench.guest), [true]);
    assert!(is_quiet(&receiver), "data for a port that no program has open are thrown away");
    bench.guest.control(1, 6, 1);
    up(&receiver);
    bench.set_up();

    // A driver without room for messages cannot know.
    let mut bench = Bench::new();
    bench.guest.control(1, 6, 1);
    for _ in 0..18 {
        bench.guest.control(1, 3, 1);
    }
    let (_server, receiver) = bench.connect(link());
    assert!(is_quiet(&receiver), "{:?}", bench.guest.messages());
    bench.guest.room(2, 64);
    up(&receiver);
    assert_eq!(told(&mut bench.guest), [true]);
}

#[test]
fn a_program_that_closes_the_port_ends_the_connection_but_not_one_that_waits() {
    let mut bench = Bench::new();
    let (_server, receiver) = bench.connect(link());
    bench.guest.control(1, 6, 0);
    bench.guest.control(1, 6, 1);
    up(&receiver);
    bench.set_up();
    bench.guest.control(1, 6, 0);
    assert_eq!(bench.disconnected(), (link(), Disconnect::Closed));
    assert!(matches!(next(&receiver), What::Lost(_)));
    assert_eq!(told(&mut bench.guest), [true, false]);
    bench.guest.control(1, 6, 1);
    let (_server, receiver) = bench.connect(link().next());
    up(&receiver);
    assert!(bench.said.try_recv().is_err(), "once");
}

#[test]
fn a_connection_takes_the_place_of_one_that_never_answers() {
    let mut bench = Bench::new();
    bench.guest.control(1, 6, 1);
    let (silent, _never_read) = UnixStream::pair().unwrap();
    bench.guest.device.lock().unwrap().connect(DISK, (END, link()), silent);
    bench.guest.events.run();
    let (_server, receiver) = bench.connect(link().next());
    up(&receiver);
    bench.set_up();
    assert_eq!(told(&mut bench.guest), [true], "there was a connection all the time");
    assert!(bench.said.try_recv().is_err(), "of one that was replaced there is nothing to say");
}

#[test]
fn a_driver_that_stops_the_queues_ends_the_connection() {
    let mut bench = Bench::new();
    bench.guest.control(1, 6, 1);
    let (_server, receiver) = bench.connect(link());
    up(&receiver);
    bench.set_up();
    let mut device = bench.guest.device.lock().unwrap();
    assert_eq!(device.stop_queue(4), Some(QueueState { next_avail: 0, next_used: 0 }));
    assert!(device.stop_queue(5).is_some() && device.stop_queue(5).is_none());
    device.reset();
    drop(device);
    assert_eq!(bench.disconnected(), (link(), Disconnect::Stopped));
    assert!(matches!(next(&receiver), What::Lost(_)));
    assert!(bench.said.try_recv().is_err(), "once");
}

#[test]
fn a_back_end_that_refuses_is_reported_and_the_port_closed() {
    let mut bench = Bench::with(&memory(None, QUEUES));
    bench.guest.control(1, 6, 1);
    let (_server, receiver) = bench.connect(link());
    assert!(matches!(next(&receiver), What::Lost(_)), "memory that is not sealed is refused");
    assert!(matches!(bench.disconnected(), (id, Disconnect::NoAnswer(_)) if id == link()));
    bench.guest.events.run();
    assert_eq!(told(&mut bench.guest), [true, false]);
    bench.guest.write(5, b"nobody");
    assert!(bench.guest.queues[5].used().is_empty());
}

#[test]
fn a_port_that_was_never_connected_is_saved_and_restored() {
    let mut bench = Bench::new();
    bench.guest.control(1, 6, 1);
    let state = bench.guest.device.lock().unwrap().save().unwrap();
    let mut restored = Bench::new();
    restored.guest.device.lock().unwrap().restore(state).unwrap();
    let (_server, receiver) = restored.connect(link());
    up(&receiver);
    assert_eq!(told(&mut restored.guest), [true], "it knows that a program has the port open");
    let refused = restored.guest.device.lock().unwrap().save().unwrap_err();
    assert!(refused.contains("has been connected with a guest"), "{refused}");
}
