//! What the back-end answers to each vhost-user request, until both queues are enabled; after that only the
//! interrupt eventfds may change. Anything else is the end of the link.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::memory::MemoryTable;
use super::{Cause, Link, LinkQueue, NewCalls, Outlet, What};
use crate::queue::{MAX_SIZE, RingFault, Virtqueue};

/// Receive and transmit.
const QUEUES: usize = 2;

/// One queue on its way.
#[derive(Debug, Default)]
struct Vring {
    size: u16,
    /// Descriptor table, available ring, used ring, as the front-end sees them.
    addresses: Option<[u64; 3]>,
    base: u16,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    enabled: bool,
}

/// How far the link has come.
#[derive(Debug)]
enum Phase {
    SettingUp { memory: Option<MemoryTable>, vrings: [Vring; QUEUES] },
    Up,
}

/// The request handler of one link.
#[derive(Debug)]
pub(super) struct Handler {
    offered: u64,
    memory_limit: u64,
    accepted: u64,
    phase: Phase,
    cause: Option<Cause>,
    outlet: Outlet,
    calls: Arc<NewCalls>,
}

impl Handler {
    pub(super) fn new((features, memory_limit): (u64, u64), outlet: Outlet) -> Self {
        let offered = features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let phase = Phase::SettingUp { memory: None, vrings: Default::default() };
        Self { offered, memory_limit, accepted: 0, phase, cause: None, outlet, calls: Arc::default() }
    }

    /// The connection is over: says why, once.
    pub(super) fn end(&mut self, error: &Error) {
        let cause = self.cause.take().unwrap_or_else(|| match error {
            Error::Disconnected | Error::SocketBroken(_) | Error::PartialMessage => Cause::Closed,
            other => Cause::Protocol(other.to_string()),
        });
        self.outlet.send(What::Lost(cause));
    }

    fn refuse<T>(&mut self, cause: Cause) -> Result<T> {
        self.cause = Some(cause);
        Err(Error::InvalidParam)
    }

    fn out_of_place<T>(&mut self, request: &str) -> Result<T> {
        self.refuse(Cause::Protocol(format!("{request} is out of place or not offered")))
    }

    /// The queue `index`, while they are being set up.
    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let place = usize::try_from(index).ok().filter(|i| *i < QUEUES);
        match (&mut self.phase, place) {
            (Phase::SettingUp { vrings, .. }, Some(place)) => Ok(&mut vrings[place]),
            _ => {
                self.cause = Some(Cause::Protocol(format!("queue {index} cannot be set up (now)")));
                Err(Error::InvalidParam)
            }
        }
    }

    /// Hands the link over if it is complete.
    fn go_up(&mut self) -> Result<()> {
        let Phase::SettingUp { memory: Some(table), vrings } = &mut self.phase else { return Ok(()) };
        if !vrings.iter().all(|v| v.enabled && v.kick.is_some() && v.addresses.is_some()) {
            return Ok(());
        }
        let memory = Arc::new(table.memory().clone());
        let [rx, tx] = std::mem::take(vrings);
        let event_idx = self.accepted & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let make = |index, vring| {
            make_queue(table, &memory, vring, event_idx).map_err(|source| Cause::Queue { index, source })
        };
        let made = make(0, rx).and_then(|rx| Ok((rx, make(1, tx)?)));
        let (rx, tx) = match made {
            Ok(queues) => queues,
            Err(cause) => return self.refuse(cause),
        };
        self.phase = Phase::Up;
        let calls = Arc::clone(&self.calls);
        let link = Link { id: self.outlet.link, features: self.accepted, rx, tx, calls };
        self.outlet.send(What::Up(Box::new(link)));
        Ok(())
    }
}

fn make_queue(
    table: &MemoryTable,
    memory: &Arc<vm_memory::GuestMemoryMmap>,
    vring: Vring,
    event_idx: bool,
) -> std::result::Result<Virtqueue, RingFault> {
    let mut queue = Queue::new(MAX_SIZE).map_err(|_| RingFault::Size(MAX_SIZE))?;
    queue.try_set_size(vring.size).map_err(|_| RingFault::Size(vring.size))?;
    let [descriptors, avail, used] = vring.addresses.unwrap_or_default();
    let place = |part, address| {
        let missing = vm_memory::GuestMemoryError::InvalidGuestAddress(vm_memory::GuestAddress(address));
        table.translate(address).ok_or(RingFault::Place { part, address, source: missing })
    };
    let split = |address: u64| {
        // The two halves of the address: truncation is the meaning.
        #[allow(clippy::cast_possible_truncation)]
        (Some(address as u32), Some((address >> 32) as u32))
    };
    let (low, high) = split(aligned("descriptor table", place("descriptor table", descriptors)?, 16)?);
    queue.set_desc_table_address(low, high);
    let (low, high) = split(aligned("available ring", place("available ring", avail)?, 2)?);
    queue.set_avail_ring_address(low, high);
    let (low, high) = split(aligned("used ring", place("used ring", used)?, 4)?);
    queue.set_used_ring_address(low, high);
    queue.set_event_idx(event_idx);
    queue.set_next_avail(vring.base);
    queue.set_next_used(vring.base);
    let kick = vring.kick.ok_or(RingFault::Size(vring.size))?;
    Virtqueue::new(Arc::clone(memory), &queue, kick, vring.call)
}

fn aligned(part: &'static str, address: u64, to: u64) -> std::result::Result<u64, RingFault> {
    if address.is_multiple_of(to) { Ok(address) } else { Err(RingFault::Alignment { part, address }) }
}

/// Takes a descriptor as an eventfd, if it is one: on anything else a poll or a write could wait for its owner.
fn event_fd(file: File) -> std::result::Result<EventFd, Cause> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    if !link.is_ok_and(|name| name.as_os_str() == "anon_inode:[eventfd]") {
        return Err(Cause::Protocol("a kick or call descriptor that is no eventfd".into()));
    }
    let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
    let set = flags.and_then(|flags| fcntl(file.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)));
    set.map_err(|error| Cause::Protocol(format!("eventfd: {error}")))?;
    // SAFETY: the descriptor is an eventfd (checked above) and `into_raw_fd` gives its ownership up.
    Ok(unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.out_of_place("RESET_OWNER")
    }

    fn reset_device(&mut self) -> Result<()> {
        self.refuse(Cause::Stopped)
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered != 0 {
            return self.refuse(Cause::Protocol(format!("features {features:#x} that were not offered")));
        }
        if matches!(self.phase, Phase::Up) && features != self.accepted {
            return self.out_of_place("SET_FEATURES");
        }
        self.accepted = features;
        // Without protocol features there is no enabling: queues start enabled.
        let enabled = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        if let Phase::SettingUp { vrings, .. } = &mut self.phase {
            vrings.iter_mut().for_each(|v| v.enabled |= enabled);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let mapped = MemoryTable::map(regions, files, self.memory_limit);
        match (&mut self.phase, mapped) {
            (Phase::SettingUp { memory, .. }, Ok(table)) => *memory = Some(table),
            (Phase::SettingUp { .. }, Err(cause)) => return self.refuse(cause),
            (Phase::Up, _) => return self.out_of_place("SET_MEM_TABLE"),
        }
        self.go_up().map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        match u16::try_from(num).ok().filter(|n| n.is_power_of_two() && *n <= MAX_SIZE) {
            Some(size) => self.vring(index).map(|vring| vring.size = size),
            None => self.refuse(Cause::Protocol(format!("queue of {num} entries"))),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.vring(index)?.addresses = Some([descriptor, available, used]);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        match u16::try_from(base) {
            Ok(base) => self.vring(index).map(|vring| vring.base = base),
            Err(_) => self.refuse(Cause::Protocol(format!("queue base {base}"))),
        }
    }

    fn get_vring_base(&mut self, _index: u32) -> Result<VhostUserVringState> {
        // The driver VM resets its device. A new start would be a new driver state: that is a new generation.
        self.refuse(Cause::Stopped)
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let Some(file) = fd else { return self.refuse(Cause::Protocol("a queue without a kick eventfd".into())) };
        match event_fd(file) {
            Ok(kick) => self.vring(u32::from(index))?.kick = Some(kick),
            Err(cause) => return self.refuse(cause),
        }
        self.go_up()
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = match fd.map(event_fd).transpose() {
            Ok(call) => call,
            Err(cause) => return self.refuse(cause),
        };
        let queue = match (&self.phase, index) {
            (Phase::Up, 0) => LinkQueue::Rx,
            (Phase::Up, 1) => LinkQueue::Tx,
            _ => {
                self.vring(u32::from(index))?.call = call;
                return Ok(());
            }
        };
        if self.calls.put(queue, call) {
            self.outlet.send(What::Calls);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> Result<()> {
        // An error ends the connection, which says more.
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !VhostUserProtocolFeatures::REPLY_ACK.bits() != 0 {
            return self.refuse(Cause::Protocol(format!("protocol features {features:#x} that were not offered")));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(QUEUES as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        match (&self.phase, enable) {
            (Phase::Up, true) => return Ok(()),
            (Phase::Up, false) => return self.refuse(Cause::Stopped),
            (Phase::SettingUp { .. }, _) => {}
        }
        if enable && self.accepted & (1 << VIRTIO_F_VERSION_1) == 0 {
            return self.refuse(Cause::Protocol("the driver VM's driver is not of virtio 1".into()));
        }
        self.vring(index)?.enabled = enable;
        self.go_up()
    }

    fn get_config(&mut self, _offset: u32, _size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        self.out_of_place("GET_CONFIG")
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.out_of_place("SET_CONFIG")
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        self.out_of_place("GPU_SET_SOCKET")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        self.out_of_place("GET_SHARED_OBJECT")
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        self.out_of_place("GET_INFLIGHT_FD")
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        self.out_of_place("SET_INFLIGHT_FD")
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        self.out_of_place("GET_MAX_MEM_SLOTS")
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        self.out_of_place("ADD_MEM_REG")
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.out_of_place("REM_MEM_REG")
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        self.out_of_place("SET_DEVICE_STATE_FD")
    }

    fn check_device_state(&mut self) -> Result<()> {
        self.out_of_place("CHECK_DEVICE_STATE")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        self.out_of_place("GET_SHMEM_CONFIG")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        self.out_of_place("SET_LOG_BASE")
    }
}
