//! The splitter's own back-end and a driver VM's memory, for tests of devices with a front-end.

#![allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use umbra_shadow::{Generation, LinkId};
use umbra_splitter::link::{Link, LinkEvent, LinkServer, Outlet, What};
use umbra_splitter::net::features;
use umbra_splitter::untrusted::Elsewhere;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::vm::virtio::testing::SPAN;

/// The first connection of a driver VM's first life.
pub fn link() -> LinkId {
    LinkId::first(Generation::FIRST)
}

/// Serves `connection` as a guest's splitter does, to a driver VM with memory for `queues` queues.
pub fn serve(connection: UnixStream, link: LinkId, queues: u64) -> (LinkServer, Receiver<LinkEvent>) {
    let (sender, receiver) = channel();
    let outlet = Outlet::new(link, sender, EventFd::new(EFD_NONBLOCK).unwrap());
    let limits = (features::DRIVER_VM, (queues + 1) * SPAN);
    (LinkServer::start(Elsewhere::new(connection), limits, outlet).unwrap(), receiver)
}

/// Such a back-end, with the socket for the front-end.
pub fn backend(link: LinkId, queues: u64) -> (UnixStream, LinkServer, Receiver<LinkEvent>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (server, receiver) = serve(theirs, link, queues);
    (ours, server, receiver)
}

/// The next thing that a back-end says.
pub fn next(receiver: &Receiver<LinkEvent>) -> What {
    receiver.recv_timeout(Duration::from_secs(60)).unwrap().what
}

/// The link of which a back-end says that it is up.
pub fn up(receiver: &Receiver<LinkEvent>) -> Box<Link> {
    match next(receiver) {
        What::Up(link) => link,
        other => panic!("{other:?}"),
    }
}

/// Memory for `queues` queues in a file with these seals, as a driver VM's process has it.
pub fn memory(seals: Option<SealFlag>, queues: u64) -> GuestMemoryMmap {
    let flags = if seals.is_some() { MFdFlags::MFD_ALLOW_SEALING } else { MFdFlags::empty() };
    let file = std::fs::File::from(memfd_create("test", flags).unwrap());
    file.set_len(queues * SPAN).unwrap();
    if let Some(seals) = seals {
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    }
    let range = (GuestAddress(0), (queues * SPAN) as usize, Some(FileOffset::new(file, 0)));
    GuestMemoryMmap::from_ranges_with_files([range]).unwrap()
}
