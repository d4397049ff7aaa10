//! The guest's virtio-net device on the splitter: the transport's calls and the event loop's events in, the
//! supervisor's orders in, [`FromVm`] messages out.
//!
//! Queue 0 receives, 1 transmits, 2 is the control queue (virtio 1.2, section 5.1.2). Invariant: the device is reset
//! by the guest's driver alone; nothing that happens to a driver VM shows in it but the link status of a quarantine.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::sys::timerfd::{Expiration, TimerFd, TimerSetTimeFlags};
use nix::time::{ClockId, clock_gettime};
use umbra_driver_vm::protocol::{LinkMode, Mac, Offloads, RxMode};
use umbra_shadow::net::pacing;
use umbra_shadow::net::rx_mode::RxFilter;
use umbra_shadow::{DeviceId, Generation, LinkId};
use umbra_splitter::header::Offloads as FrameOffloads;
use umbra_splitter::link::Cause;
use umbra_splitter::net::{GuestQueue, Kicker, Log, NetSplitter, Notice, features, stall};
use umbra_splitter::pump::{Counts, Work};
use vmm_sys_util::eventfd::EventFd;

use crate::base::error::chain;
use crate::base::lock::lock;
use crate::base::timer;
use crate::config::MemorySize;
use crate::vm::virtio::Outbox;
use crate::vm::virtio::device::{Error, QueueResources, QueueState, VirtioDevice};
use crate::vm::virtio::pace::{Moved, OutageTrace};
use crate::vm::virtio::queue;
use crate::vm::virtio::shadowed::Shadowed;
use crate::wire::messages::{DeviceStatus, FromVm, LinkEnd, NetWork, OutageCounts, PathWork, Replay, ToVm};

/// Device ID of a network device.
const DEVICE_ID: u16 = 1;

/// Queue sizes. 256 as everywhere for a network device; control commands come one at a time.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;

/// `speed` and `duplex` in the configuration (virtio 1.2, section 5.1.4): half is 0, full 1.
const SPEED_UNKNOWN: u32 = u32::MAX;
const SPEED_MAX: u32 = i32::MAX.cast_unsigned();
const DUPLEX_UNKNOWN: u8 = 0xFF;

/// The eventfd of configuration changes, shared with the splitter's listener.
type ConfigCall = Arc<Mutex<Option<EventFd>>>;

/// A guest's network device whose frames go through a driver VM.
pub struct SplitNet {
    device: DeviceId,
    splitter: NetSplitter,
    config_call: ConfigCall,
    /// As what the NIC's link has come up.
    mode: Option<LinkMode>,
    /// Kicks that the event loop watches.
    watched: Vec<(RawFd, Kicker)>,
    /// Runs while frames wait for the driver VM.
    looks: TimerFd,
    looking: bool,
    /// Runs while a part of the log is kept back.
    steps: TimerFd,
    stepping: bool,
    pace: OutageTrace,
    outbox: Outbox,
}

impl SplitNet {
    /// Network device `index` of its guest.
    pub fn new(index: u16, mac: Mac, mtu: u16, outbox: Outbox) -> Result<Self, Error> {
        let config_call = ConfigCall::default();
        let device = DeviceId::net(index);
        let listener = listener(device, Arc::clone(&config_call), Arc::clone(&outbox));
        let started = Instant::now();
        let clock = Box::new(move || started.elapsed());
        let splitter = NetSplitter::new(mac.0, mtu, Box::new(listener), clock).map_err(|source| Error::Backend {
            operation: "cannot make the network splitter".into(),
            source: source.into(),
        })?;
        let failed = |source| Error::Backend {
            operation: "cannot make a timer for the network splitter".into(),
            source: Box::new(source),
        };
        let timer = || timer::monotonic().map_err(|errno| failed(errno.into()));
        let (looks, steps) = (timer()?, timer()?);
        let pace = OutageTrace::new().map_err(failed)?;
        let (looking, stepping) = (false, false);
        let (mode, watched) = (None, Vec::new());
        Ok(Self { device, splitter, config_call, mode, watched, looks, looking, steps, stepping, pace, outbox })
    }

    /// The device shares its NIC with those that have these addresses; it may use no such address, unless it may use any.
    pub fn share(&mut self, neighbours: &[Mac], any_source: bool) {
        self.splitter.share(neighbours.iter().map(|mac| mac.0).collect(), any_source);
    }

    /// Its NIC has a spare: what the guest sends with is announced when that takes over.
    pub fn keep_behind(&mut self) {
        self.splitter.keep_behind();
    }

    /// Its driver VM has this much memory; a link with more is refused.
    pub fn limit_memory(&mut self, memory: MemorySize) {
        self.splitter.limit_memory(memory.0);
    }

    /// [`ToVm::GoLive`].
    fn go_live(&mut self, generation: Generation, replay: Replay, announce: bool) {
        if announce {
            self.splitter.announce(generation);
        }
        let log = match replay {
            Replay::Everything => Log::Replay,
            Replay::ConfigurationOnly => Log::Drop,
        };
        self.splitter.go_live(generation, log);
        self.note_pace();
        self.look_if_needed();
    }

    /// [`ToVm::Arm`].
    fn arm(&mut self, generation: Generation, armed: bool) {
        self.splitter.arm(generation, armed);
        self.look_if_needed();
    }

    /// [`ToVm::Carrier`].
    fn carrier(&mut self, generation: Generation, up: bool, mode: Option<LinkMode>) {
        // First: Linux reads it when it sees a link come up. What it was stays where the next NIC does not know.
        self.mode = mode.or(self.mode);
        self.splitter.carrier(generation, up);
        self.note_pace();
        self.look_if_needed();
    }

    fn config(&self) -> [u8; 17] {
        let shadow = self.splitter.shadow();
        let mut config = [0; 17];
        config[..6].copy_from_slice(&shadow.filter().mac());
        let status = if shadow.link_up() { LINK_UP } else { 0 };
        config[6..8].copy_from_slice(&status.to_le_bytes());
        // max_virtqueue_pairs, meaningful only with VIRTIO_NET_F_MQ.
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&shadow.mtu().to_le_bytes());
        let unknown = (SPEED_UNKNOWN, DUPLEX_UNKNOWN);
        let (speed, duplex) = self.mode.map_or(unknown, |mode| (mode.speed.min(SPEED_MAX), u8::from(mode.full_duplex)));
        config[12..16].copy_from_slice(&speed.to_le_bytes());
        config[16] = duplex;
        config
    }

    fn note_pace(&mut self) {
        let (outward, inward) = self.splitter.counts();
        let moved = Moved { out: outward.frames, into: inward.frames };
        self.pace.note(now(), moved, self.splitter.serving());
    }

    /// Reports what moved around an outage.
    fn tell_pace(&mut self) {
        if let (Some(steps), Some(generation)) = (self.pace.take(now()), self.splitter.serving()) {
            (self.outbox)(FromVm::Pace { device: self.device, generation, steps });
        }
    }

    /// Starts the timer that looks for a driver VM that takes nothing. Only [`Self::look`] stops it: a queue that is
    /// full and empty in turns costs no system call each time.
    fn look_if_needed(&mut self) {
        self.step_if_needed();
        if self.looking || !self.splitter.waits_for_driver_vm() {
            return;
        }
        let every = Expiration::Interval(stall::LOOK_EVERY.into());
        match self.looks.set(every, TimerSetTimeFlags::empty()) {
            Ok(()) => self.looking = true,
            Err(error) => tracing::warn!(%error, "cannot watch for frames that make no progress"),
        }
    }

    /// Starts the timer that goes on with a log of which a part is kept back.
    fn step_if_needed(&mut self) {
        if self.stepping || !self.splitter.is_paced() {
            return;
        }
        match self.steps.set(Expiration::Interval(pacing::STEP.into()), TimerSetTimeFlags::empty()) {
            Ok(()) => self.stepping = true,
            Err(error) => tracing::warn!(%error, "cannot set a timer for the log of frames"),
        }
    }

    /// That timer has fired.
    fn step(&mut self) {
        // Nothing to read if it was switched off a moment ago.
        let _ = self.steps.wait();
        self.splitter.go_on_replaying();
        if !self.splitter.is_paced() {
            match self.steps.unset() {
                Ok(()) => self.stepping = false,
                Err(error) => tracing::warn!(%error, "cannot stop the timer for the log of frames"),
            }
        }
    }

    /// The timer for frames that make no progress has fired.
    fn look(&mut self) {
        // Nothing to read if it was switched off a moment ago.
        let _ = self.looks.wait();
        self.splitter.check_progress();
        if !self.splitter.waits_for_driver_vm() {
            match self.looks.unset() {
                Ok(()) => self.looking = false,
                Err(error) => tracing::warn!(%error, "cannot stop watching for frames that make no progress"),
            }
        }
    }

    /// Brings the event loop's set of kicks up to date.
    fn watch(&mut self, ops: &mut EventOps<'_>) {
        for kick in self.splitter.take_retired() {
            let fd = kick.as_raw_fd();
            if let Some(place) = self.watched.iter().position(|(watched, _)| *watched == fd) {
                self.watched.swap_remove(place);
                if let Err(error) = ops.remove(Events::empty(&kick)) {
                    tracing::warn!(?error, "cannot forget a queue's kick");
                }
            }
        }
        for (source, kick) in self.splitter.kicks() {
            let fd = kick.as_raw_fd();
            if let Some((_, known)) = self.watched.iter_mut().find(|(watched, _)| *watched == fd) {
                // A link that waited may serve by now, and the other way round.
                *known = source;
                continue;
            }
            match ops.add(Events::new(kick, EventSet::IN | EventSet::EDGE_TRIGGERED)) {
                Ok(()) => self.watched.push((fd, source)),
                Err(error) => tracing::warn!(?error, ?source, "cannot watch a queue's kick"),
            }
        }
    }
}

fn path_work(counts: &Counts, kicks: u64) -> PathWork {
    let Work { pumps, full, signals, suppressed } = counts.work;
    PathWork { bytes: counts.bytes, kicks, pumps, full, signals, suppressed }
}

fn listener(device: DeviceId, config_call: ConfigCall, outbox: Outbox) -> impl FnMut(Notice) + Send {
    move |notice| {
        let at = now();
        outbox(match notice {
            Notice::LinkUp(link) => FromVm::LinkUp { device, link, at },
            Notice::LinkLost(link, cause) => FromVm::Lost { device, link, at, cause: link_end(&cause) },
            Notice::Live(generation, masked) => {
                FromVm::Live { device, generation, at, outage: OutageCounts::Net(masked) }
            }
            Notice::ForeignAddress(mac) => FromVm::ForeignAddress { device, mac: Mac(mac) },
            Notice::SameNetwork(generation) => FromVm::SameNetwork { device, generation },
            Notice::RxMode(filter) => FromVm::RxMode { device, mode: rx_mode(&filter) },
            Notice::Offloads(offloads) => FromVm::Offloads { device, offloads: offloads_message(offloads) },
            Notice::Config => {
                if let Some(call) = &*lock(&config_call) {
                    // Full only if an interrupt is due anyway.
                    let _ = call.write(1);
                }
                return;
            }
        });
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).map(std::time::Duration::from).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn link_end(cause: &Cause) -> LinkEnd {
    match cause {
        // A driver VM that stops its device is on its way to a reboot: its process says more.
        Cause::Closed | Cause::Stopped => LinkEnd::Closed,
        Cause::Stalled(_) => LinkEnd::Stalled(chain(cause)),
        other => LinkEnd::Broken(chain(other)),
    }
}

fn rx_mode(filter: &RxFilter) -> RxMode {
    RxMode {
        promiscuous: filter.promiscuous(),
        all_multicast: filter.all_multicast(),
        unicast: filter.unicast().into_iter().map(Mac).collect(),
        multicast: filter.multicast().iter().copied().map(Mac).collect(),
        vlans: filter.vlans(),
    }
}

fn offloads_message(offloads: FrameOffloads) -> Offloads {
    Offloads {
        checksum: offloads.contains(FrameOffloads::CHECKSUM),
        tso4: offloads.contains(FrameOffloads::TSO4),
        tso6: offloads.contains(FrameOffloads::TSO6),
    }
}

impl Shadowed for SplitNet {
    fn attach(&mut self, link: LinkId, connection: UnixStream) {
        self.splitter.attach(link, connection);
    }

    fn mask(&mut self, generation: Generation) {
        self.splitter.mask(generation);
        self.note_pace();
        self.look_if_needed();
    }

    fn quarantine(&mut self) {
        self.splitter.quarantine();
    }

    fn order(&mut self, message: &ToVm) {
        match *message {
            ToVm::GoLive { generation, replay, announce, .. } => self.go_live(generation, replay, announce),
            ToVm::Arm { generation, armed, .. } => self.arm(generation, armed),
            ToVm::Carrier { generation, up, mode, .. } => self.carrier(generation, up, mode),
            _ => tracing::error!(?message, "an order that a network device does not know"),
        }
    }

    fn status(&self) -> FromVm {
        let status = self.splitter.status();
        let status = DeviceStatus::Net {
            mode: status.mode,
            frames_out: status.out.frames,
            frames_in: status.into.frames,
            foreign_source: status.out.foreign_source,
            logged_now: u32::try_from(status.logged_now).unwrap_or(u32::MAX),
            masked: status.masked,
            work: NetWork {
                out: path_work(&status.out, status.kicks.out),
                into: path_work(&status.into, status.kicks.into),
            },
        };
        FromVm::Status { device: self.device, status }
    }
}

impl VirtioDevice for SplitNet {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        features::GUEST
    }

    fn set_features(&mut self, accepted: u64) {
        self.splitter.set_features(accepted);
    }

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        crate::vm::virtio::read_config(&self.config(), offset, data);
    }

    fn set_config_interrupt(&mut self, call: EventFd) {
        *lock(&self.config_call) = Some(call);
    }

    fn start_queue(&mut self, index: u16, resources: QueueResources, state: Option<QueueState>) -> Result<(), Error> {
        let name = GuestQueue::ALL.get(usize::from(index)).copied().ok_or(Error::NoSuchQueue(index))?;
        self.splitter.start_queue(name, queue::open(index, resources, state)?);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let name = GuestQueue::ALL.get(usize::from(index)).copied()?;
        let (next_avail, next_used) = self.splitter.stop_queue(name)?;
        Some(QueueState { next_avail, next_used })
    }

    fn reset(&mut self) {
        self.splitter.reset();
    }

    fn needs_reset(&self) -> bool {
        self.splitter.is_broken()
    }
}

impl MutEventSubscriber for SplitNet {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(self.splitter.wake(), EventSet::IN)) {
            tracing::error!(?error, "cannot watch the network splitter");
        }
        for (timer, what) in [
            (self.looks.as_fd(), "frames that make no progress"),
            (self.steps.as_fd(), "the log of frames"),
            (self.pace.timer(), "the pace of frames"),
        ] {
            if let Err(error) = ops.add(Events::new_raw(timer.as_raw_fd(), EventSet::IN)) {
                tracing::error!(?error, "cannot watch for {what}");
            }
        }
        self.watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.splitter.wake().as_raw_fd() {
            self.splitter.service();
            // A kick that is watched from here on fires at once if it came before: it is never read.
            self.watch(ops);
        } else if let Some((_, source)) = self.watched.iter().find(|(watched, _)| *watched == fd) {
            self.splitter.kicked(*source);
        } else if fd == self.looks.as_fd().as_raw_fd() {
            self.look();
        } else if fd == self.steps.as_fd().as_raw_fd() {
            self.step();
        } else if fd == self.pace.timer().as_raw_fd() {
            self.tell_pace();
        }
        self.note_pace();
        self.look_if_needed();
    }
}

#[cfg(test)]
mod tests;
