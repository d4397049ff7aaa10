//! A guest and driver VMs as the splitter meets them: rings in memories of their own, a real vhost-user front-end.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use umbra_shadow::{Generation, LinkId};
use umbra_splitter::net::{GuestQueue, NetSplitter, Notice, features};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress};

use super::{Driver, RINGS_LEN, Rx, TX_SLOT, Tx, memory, sealed_memory};

pub const SIZE: u16 = 64;
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

pub fn generation(n: u32) -> Generation {
    Generation::new(n).unwrap()
}

/// The first connection of a generation.
pub fn link(n: u32) -> LinkId {
    LinkId::first(generation(n))
}

/// A guest with its network device.
pub struct Guest {
    pub splitter: NetSplitter,
    /// What the splitter's clock shows, in milliseconds. It moves when a test moves it, whatever the machine's speed.
    now: Arc<AtomicU64>,
    pub tx: Tx,
    pub rx: Rx,
    pub control: Driver,
    pub notices: Receiver<Notice>,
}

impl Guest {
    pub fn new() -> Self {
        Self::with_features(features::GUEST)
    }

    pub fn with_features(accepted: u64) -> Self {
        let memory = memory(16 << 20);
        let (sender, notices) = channel();
        let listener = Box::new(move |notice| sender.send(notice).unwrap_or(()));
        let now = Arc::new(AtomicU64::new(0));
        let shown = Arc::clone(&now);
        let clock = Box::new(move || Duration::from_millis(shown.load(Ordering::Relaxed)));
        let mut splitter = NetSplitter::new(MAC, 1500, listener, clock).unwrap();
        let queue = |n: u64| Driver::new(&memory, 0x1000 + n * RINGS_LEN, SIZE, true);
        let data = 0x1000 + 3 * RINGS_LEN;
        let tx_data = data + u64::from(SIZE) * 0x1000;
        let (rx, tx, control) = (Rx::new(queue(0), data, 2048), Tx::new(queue(1), tx_data), queue(2));
        splitter.set_features(accepted);
        splitter.start_queue(GuestQueue::Rx, rx.driver.device());
        splitter.start_queue(GuestQueue::Tx, tx.driver.device());
        splitter.start_queue(GuestQueue::Control, control.device());
        Self { splitter, now, tx, rx, control, notices }
    }

    /// Moves the splitter's clock on.
    pub fn pass(&self, time: Duration) {
        self.now.fetch_add(u64::try_from(time.as_millis()).unwrap(), Ordering::Relaxed);
    }

    /// One turn of the event loop: everything that is due.
    pub fn turn(&mut self) {
        self.splitter.service();
        drop(self.splitter.take_retired());
    }

    /// Turns until a notice comes; the splitter's clock moves on while nothing happens.
    pub fn notice(&mut self) -> Notice {
        for _ in 0..600 {
            if let Ok(notice) = self.notices.try_recv() {
                return notice;
            }
            let wake = self.splitter.wake();
            // SAFETY: `wake` owns the descriptor and outlives the borrow.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(wake.as_raw_fd()) };
            if poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(100u16)).unwrap() == 0 {
                self.pass(Duration::from_millis(100));
            }
            self.turn();
        }
        panic!("no notice came");
    }

    /// Sends a control command; the device's answer.
    pub fn command(&mut self, bytes: &[u8]) -> u8 {
        let at = 0x1000 + 3 * RINGS_LEN + u64::from(SIZE) * (0x1000 + TX_SLOT);
        self.control.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.control.memory.write_obj(0xffu8, GuestAddress(at - 1)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.control.offer(&[(at, 2, 0), (at + 2, len - 2, 0), (at - 1, 1, super::WRITE)]);
        self.turn();
        self.control.take_used().unwrap();
        self.control.memory.read_obj(GuestAddress(at - 1)).unwrap()
    }
}

/// A driver VM's end: its memory, queues, and the front-end.
pub struct DriverVm {
    pub rx: Rx,
    pub tx: Tx,
    pub file: File,
    pub frontend: Frontend,
}

pub const DRIVER_MEMORY: usize = 16 << 20;

impl DriverVm {
    /// Prepared, not yet talking; and the connection's other end.
    pub fn new() -> (Self, UnixStream) {
        Self::on(DRIVER_MEMORY)
    }

    pub fn on(bytes: usize) -> (Self, UnixStream) {
        let (memory, file) = sealed_memory(bytes);
        let queue = |n: u64| Driver::new(&memory, 0x1000 + n * RINGS_LEN, SIZE, true);
        let data = 0x1000 + 2 * RINGS_LEN;
        let rx = Rx::new(queue(0), data, 2048);
        let tx = Tx::new(queue(1), data + u64::from(SIZE) * 2048);
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Self { rx, tx, file, frontend: Frontend::from_stream(ours, 2) }, theirs)
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: DRIVER_MEMORY as u64,
            userspace_addr: 0x7f00_0000_0000,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Ends the connection and begins another, whose other end is returned; memory and rings stay as they are.
    pub fn hang_up(&mut self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.frontend = Frontend::from_stream(ours, 2);
        theirs
    }

    /// The protocol up to enabled queues.
    pub fn connect(&mut self) {
        self.negotiate();
        self.frontend.set_mem_table(&[self.region()]).unwrap();
        for index in 0..2 {
            self.set_up_queue(index, SIZE).unwrap();
        }
        for index in 0..2 {
            self.frontend.set_vring_enable(index, true).unwrap();
        }
    }

    pub fn negotiate(&mut self) {
        self.frontend.set_owner().unwrap();
        let offered = self.frontend.get_features().unwrap();
        assert_eq!(offered, features::DRIVER_VM | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits());
        self.frontend.set_features(offered).unwrap();
        let protocol = self.frontend.get_protocol_features().unwrap();
        assert_eq!(protocol, VhostUserProtocolFeatures::REPLY_ACK);
        self.frontend.set_protocol_features(protocol).unwrap();
        self.frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    }

    pub fn set_up_queue(&mut self, index: usize, size: u16) -> vhost::Result<()> {
        let driver = if index == 0 { &self.rx.driver } else { &self.tx.driver };
        let user = self.region().userspace_addr;
        self.frontend.set_vring_num(index, size)?;
        self.frontend.set_vring_addr(
            index,
            &VringConfigData {
                queue_max_size: size,
                queue_size: size,
                flags: 0,
                desc_table_addr: user + driver.descriptors(),
                used_ring_addr: user + driver.used_ring(),
                avail_ring_addr: user + driver.avail(),
                log_addr: None,
            },
        )?;
        let used = driver.memory.read_obj::<u16>(GuestAddress(driver.used_ring() + 2)).unwrap();
        self.frontend.set_vring_base(index, used)?;
        self.frontend.set_vring_call(index, &driver.call)?;
        self.frontend.set_vring_kick(index, &driver.kick)
    }
}

/// A driver VM that is connected and known to the guest.
pub fn attached(guest: &mut Guest, number: u32) -> DriverVm {
    attached_as(guest, link(number))
}

/// The same, by this link.
pub fn attached_as(guest: &mut Guest, id: LinkId) -> DriverVm {
    let (mut vm, socket) = DriverVm::new();
    connected(guest, &mut vm, socket, id);
    vm
}

/// The same driver VM, whose rings go on where they stand, by another link.
pub fn attached_again(guest: &mut Guest, vm: &mut DriverVm, id: LinkId) {
    let socket = vm.hang_up();
    connected(guest, vm, socket, id);
}

fn connected(guest: &mut Guest, vm: &mut DriverVm, socket: UnixStream, id: LinkId) {
    guest.splitter.attach(id, socket);
    vm.connect();
    loop {
        match guest.notice() {
            Notice::LinkUp(up) if up == id => return,
            Notice::LinkLost(lost, cause) => assert!(lost < id, "lost: {cause:?}"),
            _ => {}
        }
    }
}

/// Time for the link's thread.
pub fn pause() {
    std::thread::sleep(Duration::from_millis(20));
}
