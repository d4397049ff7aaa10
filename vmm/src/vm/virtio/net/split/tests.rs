//! The guest's device in an event loop, with driver VMs' devices at the other end of real links.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::vm::virtio::net::vhost_user::VhostUserNet;
use crate::vm::virtio::testing::{DriverQueue, Loop, SPAN, memory};
use crate::wire::messages::{MaskedCounts, ShadowMode};

const MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 7]);

struct Guest {
    device: Arc<Mutex<SplitNet>>,
    events: Loop,
    messages: Receiver<FromVm>,
    queues: [DriverQueue; 3],
    config_call: EventFd,
}

impl Guest {
    fn new() -> Self {
        let (sender, messages) = channel();
        let outbox = Arc::new(move |message| sender.send(message).unwrap_or(()));
        let device = Arc::new(Mutex::new(SplitNet::new(0, MAC, 1500, outbox).unwrap()));
        let events = Loop::new(&device);
        let memory = memory(3);
        let queues = [0, 1, 2].map(|index| DriverQueue::new(&memory, index, 64));
        let config_call = EventFd::new(EFD_NONBLOCK).unwrap();
        let guest = Self { device, events, messages, queues, config_call };
        let mut device = guest.device();
        // Without event index, which the test's driver does not keep.
        device.set_features(features::GUEST & !(1 << 29));
        device.set_config_interrupt(guest.config_call.try_clone().unwrap());
        for (index, queue) in (0..).zip(&guest.queues) {
            device.start_queue(index, queue.resources(), None).unwrap();
        }
        drop(device);
        guest
    }

    fn device(&self) -> std::sync::MutexGuard<'_, SplitNet> {
        self.device.lock().unwrap()
    }

    fn send(&mut self, frame: &[u8]) {
        self.queues[1].add(&[&[0; 12], frame], &[]);
        self.queues[1].kick();
        self.events.run();
    }

    /// Runs the loop until a message fits.
    fn wait<T>(&mut self, pick: impl FnMut(FromVm) -> Option<T>) -> T {
        self.wait_times(200, pick)
    }

    /// The same for what takes seconds by itself.
    fn wait_long<T>(&mut self, pick: impl FnMut(FromVm) -> Option<T>) -> T {
        self.wait_times(6000, pick)
    }

    fn wait_times<T>(&mut self, times: u32, mut pick: impl FnMut(FromVm) -> Option<T>) -> T {
        for _ in 0..times {
            self.events.run();
            if let Some(found) = self.messages.try_iter().find_map(&mut pick) {
                return found;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("no such message");
    }

    /// Runs the loop for `time`.
    fn run_for(&mut self, time: Duration) {
        let until = std::time::Instant::now() + time;
        while std::time::Instant::now() < until {
            self.events.run();
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn status(&self) -> [u8; 2] {
        let mut status = [0; 2];
        self.device().config_read(6, &mut status);
        status
    }
}

/// A driver VM's device with its queues started, receive buffers offered.
struct DriverVm {
    /// `None` once it has died.
    device: Option<Arc<Mutex<VhostUserNet>>>,
    queues: [DriverQueue; 2],
}

impl DriverVm {
    fn attach(guest: &mut Guest, generation: Generation) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let link = LinkId::first(generation);
        guest.device().attach(link, theirs);
        let mut device = VhostUserNet::new(0, Mac([2, 0, 0, 0, 0, 1]), 1500, Arc::new(|_| {})).unwrap();
        device.set_features(device.features() & !(1 << 29));
        device.connect(link, ours);
        let file = std::fs::File::from(memfd_create("test", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        file.set_len(2 * SPAN).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
        let range = (GuestAddress(0), usize::try_from(2 * SPAN).unwrap(), Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let mut queues = [0, 1].map(|index| DriverQueue::new(&memory, index, 64));
        for _ in 0..32 {
            queues[0].add(&[], &[2048]);
        }
        for (index, queue) in (0..).zip(&queues) {
            device.start_queue(index, queue.resources(), None).unwrap();
        }
        guest.wait(|message| match message {
            FromVm::LinkUp { link: up, .. } => (up == link).then_some(()),
            _ => None,
        });
        Self { device: Some(Arc::new(Mutex::new(device))), queues }
    }

    fn received(&mut self) -> Vec<Vec<u8>> {
        let used = self.queues[0].used();
        used.into_iter().map(|(head, len)| self.queues[0].buffer(head, len).split_off(12)).collect()
    }
}

fn go_live(guest: &mut Guest, generation: Generation) -> MaskedCounts {
    guest.device().go_live(generation, Replay::Everything, false);
    let masked = guest.wait(|message| match message {
        FromVm::Live { generation: g, outage: OutageCounts::Net(masked), .. } => (g == generation).then_some(masked),
        _ => None,
    });
    if generation == Generation::FIRST {
        assert_eq!(guest.config_call.read().ok(), Some(1), "the guest saw no link come up");
    }
    masked
}

#[test]
fn a_guest_keeps_sending_through_the_death_of_a_driver_vm() {
    let mut guest = Guest::new();
    let mut first = DriverVm::attach(&mut guest, Generation::FIRST);
    go_live(&mut guest, Generation::FIRST);
    guest.send(&[1; 100]);
    assert_eq!(first.received(), [vec![1; 100]]);

    first.device = None;
    let cause = guest.wait(|message| match message {
        FromVm::Lost { cause, .. } => Some(cause),
        _ => None,
    });
    assert_eq!(cause, LinkEnd::Closed);
    guest.send(&[2; 100]);
    guest.send(&[3; 100]);
    assert_eq!(guest.queues[1].used().len(), 3, "completed at once");

    let next = Generation::FIRST.next();
    let mut second = DriverVm::attach(&mut guest, next);
    let counts = go_live(&mut guest, next);
    assert_eq!(counts, MaskedCounts { logged: 2, replayed: 2, dropped: 0, unknown: 1 });
    guest.send(&[4; 100]);
    assert_eq!(second.received(), [vec![2; 100], vec![3; 100], vec![4; 100]]);
    assert_eq!(guest.status(), [1, 0]);
    assert_eq!(guest.config_call.read().ok(), None, "the guest saw a configuration change");
}

#[test]
fn frames_reach_the_guest_with_an_interrupt() {
    let mut guest = Guest::new();
    let mut vm = DriverVm::attach(&mut guest, Generation::FIRST);
    guest.queues[0].add(&[], &[2048]);
    vm.queues[1].add(&[&[0; 12], &[9; 60]], &[]);
    go_live(&mut guest, Generation::FIRST);
    assert_eq!(guest.queues[0].used(), [(0, 72)]);
    assert_eq!(guest.queues[0].buffer(0, 72)[12..], [9; 60]);
    assert_eq!(guest.queues[0].call.read().ok(), Some(1));
    // The next by its kick.
    guest.queues[0].add(&[], &[2048]);
    vm.queues[1].add(&[&[0; 12], &[8; 60]], &[]);
    vm.queues[1].kick();
    guest.events.run();
    assert_eq!(guest.queues[0].used(), [(1, 72)]);
}

#[test]
fn speed_and_duplex_are_there_before_the_link_is_up_and_stay_where_the_next_nic_does_not_know() {
    let mut guest = Guest::new();
    let read = |guest: &Guest| {
        let mut bytes = [0; 5];
        guest.device().config_read(12, &mut bytes);
        bytes
    };
    assert_eq!(read(&guest), [0xFF; 5], "unknown");
    let _vm = DriverVm::attach(&mut guest, Generation::FIRST);
    let gigabit = LinkMode { speed: 1000, full_duplex: true };
    guest.device().carrier(Generation::FIRST, true, Some(gigabit));
    assert_eq!(read(&guest), [0xE8, 3, 0, 0, 1]);
    guest.device().carrier(Generation::FIRST, false, None);
    assert_eq!(read(&guest), [0xE8, 3, 0, 0, 1]);
    guest.device().carrier(Generation::FIRST, true, Some(LinkMode { speed: u32::MAX, full_duplex: false }));
    assert_eq!(read(&guest), [0xFF, 0xFF, 0xFF, 0x7F, 0], "as large as may be");
}

#[test]
fn quarantine_takes_the_link_down_with_a_configuration_change() {
    let mut guest = Guest::new();
    let vm = DriverVm::attach(&mut guest, Generation::FIRST);
    go_live(&mut guest, Generation::FIRST);
    guest.device().quarantine();
    guest.events.run();
    assert_eq!((guest.status(), guest.config_call.read().ok()), ([0, 0], Some(1)));
    let FromVm::Status { status: DeviceStatus::Net { mode, .. }, .. } = guest.device().status() else {
        panic!("no status")
    };
    assert_eq!(mode, ShadowMode::Quarantined);
    drop(vm);
}

#[test]
fn the_drivers_commands_and_features_are_told() {
    let mut guest = Guest::new();
    let offloads = guest.wait(|message| match message {
        FromVm::Offloads { offloads, .. } => Some(offloads),
        _ => None,
    });
    assert_eq!(offloads, Offloads { checksum: true, tso4: true, tso6: true });
    guest.queues[2].add(&[&[0, 0], &[0]], &[1]);
    guest.queues[2].kick();
    let mode = guest.wait(|message| match message {
        FromVm::RxMode { mode, .. } => (!mode.promiscuous).then_some(mode),
        _ => None,
    });
    assert_eq!((mode.unicast, mode.vlans), (vec![MAC], Some(vec![])));
}

#[test]
fn a_queue_stops_where_it_is_and_goes_on_from_there() {
    let mut guest = Guest::new();
    guest.send(&[1; 60]);
    let state = guest.device().stop_queue(1).unwrap();
    assert_eq!(state, QueueState { next_avail: 1, next_used: 1 });
    assert_eq!(guest.device().stop_queue(1), None);
    guest.send(&[2; 60]);
    assert_eq!(guest.queues[1].used().len(), 1);
    let resources = guest.queues[1].resources();
    guest.device().start_queue(1, resources, Some(state)).unwrap();
    guest.events.run();
    assert_eq!(guest.queues[1].used().len(), 1);
    assert!(guest.device().start_queue(3, guest.queues[1].resources(), None).is_err());
}

#[test]
fn a_broken_ring_of_the_guest_asks_for_a_reset() {
    let mut guest = Guest::new();
    guest.queues[1].break_ring();
    guest.queues[1].kick();
    guest.events.run();
    assert!(guest.device().needs_reset());
    assert_eq!(guest.config_call.read().ok(), Some(1));
    for index in 0..3 {
        guest.device().stop_queue(index);
    }
    guest.device().reset();
    assert!(!guest.device().needs_reset());
}

#[test]
fn the_timer_for_stalls_runs_from_the_first_frame_that_waits_to_a_look_without_one() {
    let mut guest = Guest::new();
    // Each takes 30 buffers, of which there are 32.
    (0..2).for_each(|n| guest.send(&[n; 60_000]));
    let mut vm = DriverVm::attach(&mut guest, Generation::FIRST);
    assert!(!guest.device().looking);
    guest.device().go_live(Generation::FIRST, Replay::Everything, false);
    assert!(guest.device().looking, "a log that waits is watched from the call on");
    for _ in 0..32 {
        vm.queues[0].add(&[], &[2048]);
    }
    vm.queues[0].kick();
    guest.events.run();
    assert!(!guest.device().splitter.waits_for_driver_vm());
    assert!(guest.device().looking, "what flows costs no call to stop it");
    guest.run_for(stall::LOOK_EVERY + Duration::from_millis(200));
    assert!(!guest.device().looking);
    // And again.
    guest.send(&[2; 60_000]);
    assert!(guest.device().looking);
    guest.device().mask(Generation::FIRST);
    guest.run_for(stall::LOOK_EVERY + Duration::from_millis(200));
    assert!(!guest.device().looking);
}

/// An announcement of the guest's address, as a driver VM gets it.
fn is_announcement(frame: &[u8]) -> bool {
    frame.len() == 60 && frame[6..12] == MAC.0 && frame[12..14] == [0x80, 0x35]
}

#[test]
fn spares_take_over_in_turns_and_are_heard_by_their_kicks_alone() {
    let mut guest = Guest::new();
    let mut serving = DriverVm::attach(&mut guest, Generation::FIRST);
    go_live(&mut guest, Generation::FIRST);
    let (mut generation, mut received) = (Generation::FIRST, 0);
    for round in 0..4_u8 {
        let next = generation.next();
        let mut spare = DriverVm::attach(&mut guest, next);
        guest.device().arm(next, true);
        guest.events.run();
        assert_eq!(serving.received().iter().filter(|frame| is_announcement(frame)).count(), 1, "the question");
        // What the spare hears is not for the guest; what the serving one hears is.
        for vm in [&mut spare, &mut serving] {
            guest.queues[0].add(&[], &[2048]);
            vm.queues[1].add(&[&[0; 12], &[round; 60]], &[]);
            vm.queues[1].kick();
            guest.events.run();
        }
        assert_eq!(spare.queues[1].used().len(), 1);
        received += 1;
        assert_eq!(guest.queues[0].used().len(), 1, "round {round}");
        guest.device().mask(generation);
        let live = guest.wait(|message| match message {
            FromVm::Live { generation, .. } => Some(generation),
            _ => None,
        });
        assert_eq!(live, next);
        guest.send(&[round; 100]);
        let frames = spare.received();
        assert!(is_announcement(&frames[0]) && frames[1..] == [vec![round; 100]], "{}", frames.len());
        spare.queues[1].add(&[&[0; 12], &[round; 80]], &[]);
        spare.queues[1].kick();
        guest.events.run();
        received += 1;
        assert_eq!(guest.queues[0].used().len(), 1, "round {round}, {received} in all");
        (serving, generation) = (spare, next);
    }
}

#[test]
fn a_spare_that_was_connected_first_is_heard_by_its_kicks_when_it_waits() {
    let (mut guest, next) = (Guest::new(), Generation::FIRST.next());
    let mut spare = DriverVm::attach(&mut guest, next);
    guest.device().arm(next, true);
    let _serving = DriverVm::attach(&mut guest, Generation::FIRST);
    go_live(&mut guest, Generation::FIRST);
    guest.events.run();
    for n in 0..3 {
        spare.queues[1].add(&[&[0; 12], &[n; 60]], &[]);
        spare.queues[1].kick();
        guest.events.run();
        assert_eq!(spare.queues[1].used().len(), 1, "frame {n} is taken from its ring");
    }
}

#[test]
fn the_log_waits_for_the_carrier_and_the_guest_is_told_that_there_is_none() {
    let mut guest = Guest::new();
    (0..20).for_each(|n| guest.send(&[n; 100]));
    let mut vm = DriverVm::attach(&mut guest, Generation::FIRST);
    guest.device().carrier(Generation::FIRST, false, None);
    guest.device().go_live(Generation::FIRST, Replay::Everything, false);
    guest.send(&[20; 100]);
    assert_eq!((guest.status(), guest.config_call.read().ok()), ([0, 0], None), "down, as it was");
    let FromVm::Status { status: DeviceStatus::Net { mode, logged_now, masked, .. }, .. } = guest.device().status()
    else {
        panic!("no status")
    };
    assert_eq!((mode, logged_now, masked.replayed), (ShadowMode::WaitingCarrier, 21, 0));
    assert!(vm.received().is_empty() && !guest.device().stepping);

    guest.device().carrier(Generation::FIRST, true, None);
    assert_eq!((guest.status(), guest.config_call.read().ok()), ([1, 0], Some(1)));
    assert_eq!(vm.received().len(), 4);
    // Nothing comes in: the timer goes on with the rest, and is stopped.
    assert!(guest.device().stepping);
    let masked = guest.wait_long(|message| match message {
        FromVm::Live { outage: OutageCounts::Net(masked), .. } => Some(masked),
        _ => None,
    });
    assert_eq!(masked, MaskedCounts { logged: 21, replayed: 21, dropped: 0, unknown: 0 });
    assert_eq!(vm.received().len(), 17);
    guest.events.run();
    assert!(!guest.device().stepping);
}

#[test]
fn a_guest_that_uses_its_neighbours_address_is_told_of_and_counted() {
    let neighbour = Mac([0x52, 0x54, 0, 0, 0, 8]);
    let mut guest = Guest::new();
    guest.device().share(&[neighbour], false);
    let mut vm = DriverVm::attach(&mut guest, Generation::FIRST);
    go_live(&mut guest, Generation::FIRST);
    let from = |mac: Mac| [&[0xff; 6][..], &mac.0, &[0; 48]].concat();
    guest.send(&from(neighbour));
    guest.send(&from(MAC));
    assert_eq!(vm.received(), [from(MAC)]);
    let told = guest.wait(|message| match message {
        FromVm::ForeignAddress { mac, .. } => Some(mac),
        _ => None,
    });
    let FromVm::Status { status: DeviceStatus::Net { foreign_source, frames_out, .. }, .. } = guest.device().status()
    else {
        panic!("no status")
    };
    assert_eq!((told, foreign_source, frames_out), (neighbour, 1, 1));
}
