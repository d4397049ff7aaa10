//! The front-end against the splitter's own back-end.

#![allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::fcntl::SealFlag;
use umbra_splitter::link::What;
use umbra_splitter::net::features;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::vm::virtio::testing::{DriverQueue, Loop};
use crate::vm::virtio::vhost_user::testing::{backend, link, memory, next, serve, up};
use crate::wire::messages::{Disconnect, FromVm};

const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

/// The device in an event loop, and what it has to say to the supervisor.
struct Bench {
    device: Arc<Mutex<VhostUserNet>>,
    events: Loop,
    said: Receiver<FromVm>,
    call: EventFd,
    memory: GuestMemoryMmap,
}

impl Bench {
    fn new() -> Self {
        Self::with(memory(Some(SealFlag::F_SEAL_SHRINK), 2))
    }

    fn with(memory: GuestMemoryMmap) -> Self {
        let (sender, said) = channel();
        let outbox: Outbox = Arc::new(move |message| sender.send(message).unwrap_or(()));
        let mut device = VhostUserNet::new(3, MAC, 1500, outbox).unwrap();
        let call = EventFd::new(EFD_NONBLOCK).unwrap();
        device.set_config_interrupt(call.try_clone().unwrap());
        device.set_features(device.features());
        let device = Arc::new(Mutex::new(device));
        let events = Loop::new(&device);
        Self { device, events, said, call, memory }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VhostUserNet> {
        self.device.lock().unwrap()
    }

    fn start_queues(&self) {
        for index in 0..2 {
            let queue = DriverQueue::new(&self.memory, index.into(), 256);
            self.lock().start_queue(index, queue.resources(), None).unwrap();
        }
    }

    /// Has both used rings stand at `index`.
    fn write_used(&self, index: u16) {
        for queue in 0..2 {
            let resources = DriverQueue::new(&self.memory, queue, 256).resources();
            self.memory.write_obj(index, GuestAddress(resources.queue.used_ring() + 2)).unwrap();
        }
    }

    /// Turns until `wanted`.
    fn turn_until(&mut self, what: &str, wanted: impl Fn(&Self) -> bool) {
        let until = Instant::now() + Duration::from_secs(60);
        while !wanted(self) {
            assert!(Instant::now() < until, "waited in vain for {what}");
            self.events.run();
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn is_up(&self) -> bool {
        let mut status = [0; 2];
        self.lock().config_read(6, &mut status);
        status[0] == 1
    }

    fn said(&mut self) -> (LinkId, Disconnect) {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            self.events.run();
            match self.said.try_recv() {
                Ok(FromVm::Disconnected { end: 3, link, why }) => return (link, why),
                Ok(other) => panic!("{other:?}"),
                Err(_) => assert!(Instant::now() < until, "it says nothing"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn the_device_is_there_without_a_guest_and_its_link_comes_and_goes_with_one() {
    let mut bench = Bench::new();
    assert_eq!(bench.lock().features() & !(F_MAC | F_MTU | F_STATUS), features::DRIVER_VM);
    bench.start_queues();
    assert!(!bench.is_up());
    let mut id = link();
    for used in [0_u16, 7, 8] {
        // Where the rings stand is in memory.
        bench.write_used(used);
        let (socket, server, receiver) = backend(id, 2);
        bench.lock().connect(id, socket);
        let up = up(&receiver);
        assert_eq!((up.id, up.rx.position(), up.tx.position()), (id, (used, used), (used, used)));
        bench.turn_until("the link", Bench::is_up);
        assert_eq!(bench.call.read().unwrap(), 1, "the driver is told");
        drop(server);
        assert_eq!(bench.said(), (id, Disconnect::Closed));
        assert!(!bench.is_up());
        assert_eq!(bench.call.read().unwrap(), 1);
        assert!(!bench.lock().needs_reset());
        id = id.next();
    }
}

#[test]
fn a_connection_may_come_before_the_driver_and_ends_when_the_driver_stops_a_queue() {
    let mut bench = Bench::new();
    let (socket, _server, receiver) = backend(link(), 2);
    bench.lock().connect(link(), socket);
    assert!(bench.lock().stop_queue(0).is_none());
    bench.lock().reset();
    assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
    bench.start_queues();
    assert!(matches!(next(&receiver), What::Up(_)));
    bench.turn_until("the link", Bench::is_up);
    assert_eq!(bench.lock().stop_queue(0), Some(QueueState { next_avail: 0, next_used: 0 }));
    assert_eq!(bench.said(), (link(), Disconnect::Stopped));
    assert!(matches!(next(&receiver), What::Lost(_)));
    assert!(bench.lock().stop_queue(0).is_none() && bench.lock().stop_queue(1).is_some());
    assert!(bench.said.try_recv().is_err(), "once");
}

#[test]
fn a_new_connection_takes_the_place_of_one_whose_guest_never_answers() {
    let mut bench = Bench::new();
    bench.start_queues();
    // The guest's process is stopped: nobody answers, and nothing here waits.
    let (silent, _never_read) = UnixStream::pair().unwrap();
    bench.lock().connect(link(), silent);
    let (socket, _server, receiver) = backend(link().next(), 2);
    bench.lock().connect(link().next(), socket);
    assert!(matches!(next(&receiver), What::Up(_)));
    bench.turn_until("the link", Bench::is_up);
    assert!(bench.said.try_recv().is_err(), "of one that was replaced there is nothing to say");
}

#[test]
fn rings_go_on_where_they_stand_when_the_back_end_answers() {
    let mut bench = Bench::new();
    bench.start_queues();
    let (socket, theirs) = UnixStream::pair().unwrap();
    bench.lock().connect(link(), socket);
    // Its process serves an older connection until it has heard of this one.
    bench.write_used(9);
    let (_server, receiver) = serve(theirs, link(), 2);
    let up = up(&receiver);
    assert_eq!((up.rx.position(), up.tx.position()), ((9, 9), (9, 9)));
    bench.turn_until("the link", Bench::is_up);
}

#[test]
fn a_back_end_that_refuses_or_is_gone_is_told_and_harms_nobody() {
    let mut bench = Bench::with(memory(None, 2));
    bench.start_queues();
    let (socket, server, receiver) = backend(link(), 2);
    bench.lock().connect(link(), socket);
    assert!(matches!(next(&receiver), What::Lost(_)), "memory that is not sealed is refused");
    drop(server);
    assert!(matches!(bench.said(), (id, Disconnect::NoAnswer(_)) if id == link()));
    let (socket, other) = UnixStream::pair().unwrap();
    drop(other);
    bench.lock().connect(link().next(), socket);
    assert!(matches!(bench.said(), (id, Disconnect::NoAnswer(_)) if id == link().next()));
    assert!(!bench.is_up());
}
