//! The front-end against the splitter's own back-end.

#![allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use umbra_shadow::Generation;
use umbra_splitter::link::{LinkEvent, LinkServer, Outlet, What};
use umbra_splitter::net::features;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::vm::virtio::testing::{DriverQueue, Loop, SPAN};

const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

fn backend() -> (UnixStream, LinkServer, Receiver<LinkEvent>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (sender, receiver) = channel();
    let outlet = Outlet::new(Generation::FIRST, sender, EventFd::new(EFD_NONBLOCK).unwrap());
    (ours, LinkServer::start(theirs, features::DRIVER_VM, outlet).unwrap(), receiver)
}

fn sealed_memory() -> GuestMemoryMmap {
    let file = std::fs::File::from(memfd_create("test", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.set_len(2 * SPAN).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    let range = (GuestAddress(0), 2 * SPAN as usize, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([range]).unwrap()
}

fn next(receiver: &Receiver<LinkEvent>) -> What {
    receiver.recv_timeout(Duration::from_secs(5)).unwrap().what
}

#[test]
fn back_end_gets_both_queues_with_kick_and_call() {
    let (socket, server, receiver) = backend();
    let mut device = VhostUserNet::new(MAC, 1500, socket).unwrap();
    let offered = device.features();
    assert_eq!(offered & !(F_MAC | F_MTU), features::DRIVER_VM);
    device.set_features(offered);
    let memory = sealed_memory();
    for index in 0..2 {
        let queue = DriverQueue::new(&memory, index.into(), 256);
        device.start_queue(index, queue.resources(), None).unwrap();
    }
    let What::Up(link) = next(&receiver) else { panic!("the link is not up") };
    assert_eq!(link.features & !(1 << 30), offered & features::DRIVER_VM);
    let guest = std::thread::spawn(move || {
        let lost = matches!(next(&receiver), What::Lost(_));
        drop(server);
        lost
    });
    assert!(device.stop_queue(0).is_none(), "this back-end takes a stop for the end of the link");
    assert!(device.stop_queue(0).is_none());
    assert!(guest.join().unwrap());
    assert!(device.stop_queue(1).is_none());
}

#[test]
fn reset_before_the_first_start_says_nothing() {
    let (socket, _server, receiver) = backend();
    let mut device = VhostUserNet::new(MAC, 1500, socket).unwrap();
    assert!(device.stop_queue(0).is_none());
    device.reset();
    assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
}

#[test]
fn memory_that_is_not_sealed_is_an_error_of_the_start() {
    let (socket, server, receiver) = backend();
    let mut device = VhostUserNet::new(MAC, 1500, socket).unwrap();
    std::thread::spawn(move || {
        next(&receiver);
        drop(server);
    });
    device.set_features(device.features());
    let file = std::fs::File::from(memfd_create("test", MFdFlags::empty()).unwrap());
    file.set_len(SPAN).unwrap();
    let range = (GuestAddress(0), SPAN as usize, Some(FileOffset::new(file, 0)));
    let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
    let queue = DriverQueue::new(&memory, 0, 256);
    assert!(device.start_queue(0, queue.resources(), None).is_err());
}

#[test]
fn closed_link_is_noticed_once_and_is_no_error() {
    let (socket, server, _receiver) = backend();
    let device = Arc::new(Mutex::new(VhostUserNet::new(MAC, 1500, socket).unwrap()));
    let mut events = Loop::new(&device);
    events.run();
    assert!(device.lock().unwrap().watched.is_some());
    drop(server);
    events.run();
    assert!(device.lock().unwrap().watched.is_none());
    assert!(!device.lock().unwrap().needs_reset());
}

#[test]
fn closed_socket_is_an_error_of_making_the_device() {
    let (socket, other) = UnixStream::pair().unwrap();
    drop(other);
    let error = VhostUserNet::new(MAC, 1500, socket).err().unwrap();
    assert!(error.to_string().contains("02:00:00:00:00:01"), "{error}");
}
