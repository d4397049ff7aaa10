//! The front-end against the splitter's own back-end.

#![allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use umbra_shadow::Generation;
use umbra_splitter::link::{LinkEvent, LinkServer, Outlet, What};
use umbra_splitter::net::features;
use virtio_queue::QueueT;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::vm::virtio::testing::{DriverQueue, Loop, SPAN};

const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

fn link() -> LinkId {
    LinkId::first(Generation::FIRST)
}

fn backend(link: LinkId) -> (UnixStream, LinkServer, Receiver<LinkEvent>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (sender, receiver) = channel();
    let outlet = Outlet::new(link, sender, EventFd::new(EFD_NONBLOCK).unwrap());
    (ours, LinkServer::start(Elsewhere::new(theirs), (features::DRIVER_VM, 3 * SPAN), outlet).unwrap(), receiver)
}

fn memory(seals: Option<SealFlag>) -> GuestMemoryMmap {
    let flags = if seals.is_some() { MFdFlags::MFD_ALLOW_SEALING } else { MFdFlags::empty() };
    let file = std::fs::File::from(memfd_create("test", flags).unwrap());
    file.set_len(2 * SPAN).unwrap();
    if let Some(seals) = seals {
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    }
    let range = (GuestAddress(0), 2 * SPAN as usize, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([range]).unwrap()
}

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
        Self::with(memory(Some(SealFlag::F_SEAL_SHRINK)))
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

fn next(receiver: &Receiver<LinkEvent>) -> What {
    receiver.recv_timeout(Duration::from_secs(60)).unwrap().what
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
        for index in 0..2 {
            let at = bench.lock().queues[index].as_ref().unwrap().queue.used_ring();
            bench.memory.write_obj(used, GuestAddress(at + 2)).unwrap();
        }
        let (socket, server, receiver) = backend(id);
        bench.lock().connect(id, socket);
        let What::Up(up) = next(&receiver) else { panic!("the link is not up") };
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
    let (socket, _server, receiver) = backend(link());
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
    let (socket, _server, receiver) = backend(link().next());
    bench.lock().connect(link().next(), socket);
    assert!(matches!(next(&receiver), What::Up(_)));
    bench.turn_until("the link", Bench::is_up);
    assert!(bench.said.try_recv().is_err(), "of one that was replaced there is nothing to say");
}

#[test]
fn a_back_end_that_refuses_or_is_gone_is_told_and_harms_nobody() {
    let mut bench = Bench::with(memory(None));
    bench.start_queues();
    let (socket, server, receiver) = backend(link());
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
