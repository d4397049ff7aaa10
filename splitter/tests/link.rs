//! The splitter between a guest and driver VMs that die, over real vhost-user connections and sealed memory.
#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)]

mod common;

use std::io::Write;

use common::vm::{DRIVER_MEMORY, DriverVm, Guest, SIZE, attached, generation, link, pause};
use common::{Driver, RINGS_LEN, Rx, WRITE, frame, memfd, number, send_lingering};
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use std::os::fd::{AsRawFd, BorrowedFd};
use umbra_shadow::net::{MaskedCounts, ModeName};
use umbra_splitter::control::MAX_COMMANDS;
use umbra_splitter::link::Cause;
use umbra_splitter::net::{GuestQueue, Kicker, Log, Notice, features};
use umbra_splitter::pump::Fault;
use umbra_splitter::queue::RingFault;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fn live(guest: &mut Guest, vm: &mut DriverVm, n: u32) -> MaskedCounts {
    vm.rx.offer_all();
    guest.splitter.go_live(generation(n), Log::Replay);
    loop {
        match guest.notice() {
            Notice::Live(g, counts) if g == generation(n) => return counts,
            Notice::LinkLost(g, cause) => panic!("generation {g} lost: {cause}"),
            _ => {}
        }
    }
}

fn lost(guest: &mut Guest, n: u32) -> Cause {
    loop {
        match guest.notice() {
            Notice::LinkLost(g, cause) if g == link(n) => return cause,
            Notice::Live(..) => panic!("live"),
            _ => {}
        }
    }
}

#[test]
fn frames_flow_both_ways() {
    let mut guest = Guest::new();
    let mut vm = attached(&mut guest, 1);
    live(&mut guest, &mut vm, 1);
    guest.rx.offer_all();
    for n in 0..30 {
        guest.tx.send(&frame(n, 400));
        vm.tx.send(&frame(1000 + n, 1514));
    }
    guest.turn();
    assert_eq!(vm.rx.receive_all(), (0..30).map(|n| frame(n, 400)).collect::<Vec<_>>());
    assert_eq!(guest.rx.receive_all(), (1000..1030).map(|n| frame(n, 1514)).collect::<Vec<_>>());
    assert_eq!(guest.splitter.status().mode, ModeName::Passive);
}

#[test]
fn frames_sent_during_an_outage_arrive_in_order_once_and_before_live_ones() {
    let mut guest = Guest::new();
    let mut vm = attached(&mut guest, 1);
    live(&mut guest, &mut vm, 1);
    for n in 0..10 {
        guest.tx.send(&frame(n, 100));
    }
    guest.turn();
    // Six of ten are taken, and their buffers offered again.
    for n in 0..6 {
        assert_eq!(vm.rx.receive().unwrap().1, frame(n, 100));
    }
    vm.rx.offer(6);
    drop(vm);
    assert!(matches!(lost(&mut guest, 1), Cause::Closed));
    for n in 10..40 {
        guest.tx.send(&frame(n, 100));
    }
    guest.turn();
    assert_eq!(guest.tx.completed(), 40);
    assert_eq!(guest.splitter.status().logged_now, 30);

    let mut vm = attached(&mut guest, 2);
    guest.tx.send(&frame(40, 100));
    let counts = live(&mut guest, &mut vm, 2);
    assert_eq!(counts, MaskedCounts { logged: 30, replayed: 30, dropped: 0, unknown: 4 });
    guest.tx.send(&frame(41, 100));
    guest.turn();
    let got: Vec<u32> = vm.rx.receive_all().iter().map(|f| number(f)).collect();
    assert_eq!(got, (10..42).collect::<Vec<_>>());
}

#[test]
fn a_crash_during_replay_keeps_the_rest_of_the_log_in_order() {
    let mut guest = Guest::new();
    for n in 0..50 {
        guest.tx.send(&frame(n, 200));
    }
    guest.turn();
    let mut first = attached(&mut guest, 1);
    first.rx.offer(20);
    first.tx.send(&frame(1000, 60));
    guest.splitter.go_live(generation(1), Log::Replay);
    assert_eq!(guest.splitter.status().mode, ModeName::Replaying);
    // While the log waits for buffers, so do new frames, in the guest's queue.
    guest.tx.send(&frame(50, 200));
    guest.turn();
    assert_eq!(guest.tx.completed(), 50);
    let got: Vec<u32> = first.rx.receive_all().iter().map(|f| number(f)).collect();
    assert_eq!(got, (0..20).collect::<Vec<_>>());
    first.rx.offer(5);
    drop(first);
    assert!(matches!(lost(&mut guest, 1), Cause::Closed));

    let mut second = attached(&mut guest, 2);
    second.tx.send(&frame(1001, 60));
    let counts = live(&mut guest, &mut second, 2);
    // The five buffers offered again were filled before the loss was seen, or not: each frame counts once.
    let got: Vec<u32> = second.rx.receive_all().iter().map(|f| number(f)).collect();
    let first_again = got[0];
    assert!(first_again == 20 || first_again == 25, "{got:?}");
    assert_eq!(got, (first_again..51).collect::<Vec<_>>());
    assert_eq!(counts.replayed, 51);
    assert_eq!(counts.logged, counts.replayed + counts.dropped);
    assert!((15..=20).contains(&counts.unknown), "{counts:?}");
}

#[test]
fn suspects_are_dropped_and_counted() {
    let mut guest = Guest::new();
    for n in 0..5 {
        guest.tx.send(&frame(n, 200));
    }
    guest.turn();
    let mut vm = attached(&mut guest, 1);
    vm.rx.offer_all();
    guest.splitter.go_live(generation(1), Log::Drop);
    guest.tx.send(&frame(5, 200));
    guest.turn();
    assert_eq!(vm.rx.receive_all(), [frame(5, 200)]);
    assert_eq!(guest.splitter.status().masked, MaskedCounts { logged: 5, dropped: 5, ..Default::default() });
}

#[test]
fn go_live_may_come_before_the_link_and_old_generations_are_ignored() {
    let mut guest = Guest::new();
    let (mut vm, socket) = DriverVm::new();
    guest.splitter.attach(link(3), socket);
    guest.splitter.go_live(generation(3), Log::Replay);
    guest.splitter.go_live(generation(2), Log::Replay);
    vm.connect();
    let counts = live(&mut guest, &mut vm, 3);
    assert_eq!(counts, MaskedCounts::default());
    guest.splitter.mask(generation(2));
    assert_eq!(guest.splitter.status().mode, ModeName::Passive);
    // The link of an older generation is closed at once.
    let (old, socket) = DriverVm::new();
    guest.splitter.attach(link(2), socket);
    assert!(old.frontend.get_features().is_err());
    guest.splitter.mask(generation(3));
    assert_eq!(guest.splitter.status().mode, ModeName::Masking);
    let (old, socket) = DriverVm::new();
    guest.splitter.attach(link(3), socket);
    assert!(old.frontend.get_features().is_err());
}

#[test]
fn a_link_that_waits_takes_over_when_the_serving_one_is_lost() {
    let mut guest = Guest::new();
    let mut first = attached(&mut guest, 1);
    live(&mut guest, &mut first, 1);
    let mut second = attached(&mut guest, 2);
    second.rx.offer_all();
    guest.tx.send(&frame(1, 100));
    guest.turn();
    assert_eq!(first.rx.receive_all(), [frame(1, 100)], "the first still serves");
    // A waiting driver VM that dies is replaced, and the guest does not notice.
    drop(second);
    let mut third = attached(&mut guest, 3);
    third.rx.offer_all();
    guest.splitter.go_live(generation(3), Log::Replay);
    assert_eq!(guest.splitter.status().mode, ModeName::Passive);
    guest.tx.send(&frame(2, 100));
    guest.turn();
    assert_eq!(first.rx.receive_all(), [frame(2, 100)]);

    drop(first);
    assert!(matches!(lost(&mut guest, 1), Cause::Closed));
    guest.tx.send(&frame(3, 100));
    guest.turn();
    assert_eq!(guest.splitter.status().mode, ModeName::Masking);
    assert!(third.rx.receive_all().is_empty(), "nothing before it is told to go live");
    let counts = live(&mut guest, &mut third, 3);
    assert_eq!((counts.logged, counts.replayed), (1, 1));
    guest.rx.offer_all();
    guest.tx.send(&frame(4, 100));
    third.tx.send(&frame(5, 100));
    guest.turn();
    assert_eq!(third.rx.receive_all(), [frame(3, 100), frame(4, 100)]);
    assert_eq!(guest.rx.receive_all(), [frame(5, 100)]);
}

#[test]
fn quarantine_shows_link_down_and_a_new_driver_vm_ends_it() {
    let mut guest = Guest::new();
    let mut vm = attached(&mut guest, 1);
    live(&mut guest, &mut vm, 1);
    guest.splitter.quarantine();
    assert!(!guest.splitter.shadow().link_up());
    assert!(matches!(guest.notice(), Notice::Config));
    guest.tx.send(&frame(0, 100));
    guest.turn();
    assert_eq!((guest.tx.completed(), guest.splitter.status().logged_now), (1, 0));
    let mut vm = attached(&mut guest, 2);
    live(&mut guest, &mut vm, 2);
    assert!(guest.splitter.shadow().link_up());
}

#[test]
fn a_recovery_without_carrier_tells_the_guest_nothing() {
    let mut guest = Guest::new();
    let mut vm = attached(&mut guest, 1);
    live(&mut guest, &mut vm, 1);
    guest.splitter.carrier(generation(1), false);
    assert!(matches!(guest.notice(), Notice::Config));
    guest.splitter.mask(generation(1));
    let mut vm = attached(&mut guest, 2);
    vm.rx.offer_all();
    guest.splitter.carrier(generation(2), false);
    guest.splitter.go_live(generation(2), Log::Replay);
    assert!(guest.notices.try_iter().next().is_none());
    assert!(!guest.splitter.shadow().link_up());
    guest.splitter.carrier(generation(2), true);
    let told: Vec<Notice> = guest.notices.try_iter().collect();
    assert!(matches!(told[..], [Notice::Config, Notice::Live(..)]), "{told:?}");
}

#[test]
fn a_violation_ends_the_link_and_leaves_the_guest_alone() {
    let mut guest = Guest::new();
    let mut vm = attached(&mut guest, 1);
    live(&mut guest, &mut vm, 1);
    vm.tx.driver.set_avail_idx(SIZE + 1);
    guest.turn();
    let cause = lost(&mut guest, 1);
    assert!(matches!(cause, Cause::Data(_)), "{cause:?}");
    assert_eq!(guest.splitter.status().mode, ModeName::Masking);
    assert!(!guest.splitter.is_broken());
    // The connection is closed, so that the driver VM's process knows.
    assert!(vm.frontend.get_features().is_err());
    let mut vm = attached(&mut guest, 2);
    live(&mut guest, &mut vm, 2);
    guest.tx.send(&frame(0, 100));
    guest.turn();
    assert_eq!(vm.rx.receive_all(), [frame(0, 100)]);
}

#[test]
fn the_guest_that_breaks_its_ring_needs_a_reset() {
    let mut guest = Guest::new();
    guest.tx.driver.set_avail_idx(SIZE + 1);
    guest.turn();
    assert!(guest.splitter.is_broken());
    guest.splitter.reset();
    assert!(!guest.splitter.is_broken());
}

#[test]
fn control_commands_are_recorded() {
    let mut guest = Guest::new();
    while guest.notices.try_recv().is_ok() {}
    assert_eq!(guest.command(&[0, 0, 0]), 0);
    assert_eq!(guest.command(&[0, 1, 1]), 0);
    let table = [&[1, 0][..], &1u32.to_le_bytes(), &[2, 0, 0, 0, 0, 9], &2u32.to_le_bytes(), &[1; 6], &[3; 6]].concat();
    assert_eq!(guest.command(&table), 0);
    assert_eq!(guest.command(&[2, 0, 5, 0]), 0);
    assert_eq!(guest.command(&[2, 0, 0, 0x10]), 1, "VLAN 4096 is none");
    assert_eq!(guest.command(&[9, 9, 9]), 1);
    assert_eq!(guest.command(&[1, 1, 2, 1, 1, 1, 1, 1]), 0);
    let Some(Notice::RxMode(filter)) = guest.notices.try_iter().last() else { panic!("no rx mode") };
    assert!(!filter.promiscuous() && filter.all_multicast());
    assert_eq!(filter.unicast(), [[2, 1, 1, 1, 1, 1], [2, 0, 0, 0, 0, 9]]);
    assert_eq!(filter.multicast(), [[1; 6], [3; 6]]);
    assert_eq!(filter.vlans(), Some(vec![5]));
}

/// As of a host of thousands of containers, each with an address of its own.
#[test]
fn tables_of_any_length_widen_the_filter() {
    let mut guest = Guest::new();
    assert_eq!(guest.command(&[0, 0, 0]), 0);
    let table = |count: u32, entries: usize| [&count.to_le_bytes()[..], &[6; 6].repeat(entries)].concat();
    let few = || table(2, 2);
    for (unicast, multicast, wide) in [
        (table(100_000, 100_000), few(), (true, false)),
        (few(), table(100_000, 100_000), (false, true)),
        (few(), few(), (false, false)),
    ] {
        assert_eq!(guest.command(&[&[1, 0][..], &unicast, &multicast].concat()), 0);
        let filter = guest.splitter.shadow().filter();
        assert_eq!((filter.promiscuous(), filter.all_multicast()), wide);
        assert_eq!(filter.multicast().len(), if wide.1 { 0 } else { 2 });
    }
    for short in [vec![0], table(100_000, 99_999), [few(), table(100_000, 99_999)].concat(), table(u32::MAX, 10)] {
        assert_eq!(guest.command(&[&[1, 0][..], &short].concat()), 1, "cut off");
    }
    assert!(!guest.splitter.shadow().filter().promiscuous());
}

#[test]
fn commands_past_what_one_call_answers_are_not_forgotten() {
    let mut guest = Guest::new();
    guest.control = Driver::new(&guest.tx.driver.memory, 0x1000 + 2 * RINGS_LEN, 256, true);
    guest.splitter.start_queue(GuestQueue::Control, guest.control.device());
    guest.turn();
    let commands = MAX_COMMANDS + 20;
    for _ in 0..commands {
        guest.control.offer(&[(0x10, 3, 0), (0x20, 1, WRITE)]);
    }
    guest.splitter.kicked(Kicker::Guest(GuestQueue::Control));
    assert!(guest.splitter.wake().read().is_ok(), "no further kick comes");
    guest.turn();
    assert_eq!(std::iter::from_fn(|| guest.control.take_used()).count(), commands);
    assert!(guest.splitter.wake().read().is_err());
}

#[test]
fn memory_that_can_shrink_or_ends_too_early_is_refused() {
    let cases: [(std::fs::File, &str); 3] = [
        (memfd(DRIVER_MEMORY, SealFlag::F_SEAL_GROW), "not sealed"),
        (memfd(DRIVER_MEMORY - 1, SealFlag::F_SEAL_SHRINK), "bytes at 0 in a file of"),
        (tempfile::tempfile().unwrap(), "no memory file"),
    ];
    for (file, what) in cases {
        let mut guest = Guest::new();
        let (mut vm, socket) = DriverVm::new();
        guest.splitter.attach(link(1), socket);
        vm.negotiate();
        let mut region = vm.region();
        region.mmap_handle = file.as_raw_fd();
        assert!(vm.frontend.set_mem_table(&[region]).is_err(), "{what}");
        let cause = lost(&mut guest, 1).to_string();
        assert!(cause.contains(what), "{what}: {cause}");
    }
}

#[test]
fn memory_beyond_what_the_driver_vm_has_is_refused() {
    // Holes, which cost their owner nothing.
    const HUGE: u64 = 1 << 40;
    let file = memfd(usize::try_from(HUGE).unwrap(), SealFlag::F_SEAL_SHRINK);
    let half = DRIVER_MEMORY as u64 / 2;
    for (sizes, refused) in [(vec![HUGE], true), (vec![half, half, 4096], true), (vec![half, half], false)] {
        let mut guest = Guest::new();
        guest.splitter.limit_memory(DRIVER_MEMORY as u64);
        let (mut vm, socket) = DriverVm::new();
        guest.splitter.attach(link(1), socket);
        vm.negotiate();
        let place = |(n, size): (u64, &u64)| VhostUserMemoryRegionInfo {
            guest_phys_addr: n * HUGE,
            memory_size: *size,
            userspace_addr: n * HUGE,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        let regions: Vec<_> = (0..).zip(&sizes).map(place).collect();
        assert_eq!(vm.frontend.set_mem_table(&regions).is_err(), refused, "{sizes:?}");
        if refused {
            let cause = lost(&mut guest, 1).to_string();
            assert!(cause.contains("larger than the 16777216 bytes of the driver VM's memory"), "{cause}");
        }
    }
}

#[test]
fn rings_outside_memory_and_descriptors_that_are_no_eventfds_are_refused() {
    let mut guest = Guest::new();
    let (mut vm, socket) = DriverVm::new();
    guest.splitter.attach(link(1), socket);
    vm.negotiate();
    vm.frontend.set_mem_table(&[vm.region()]).unwrap();
    vm.rx.driver.base = DRIVER_MEMORY as u64 - 0x5010;
    vm.set_up_queue(0, SIZE).unwrap();
    vm.set_up_queue(1, SIZE).unwrap();
    vm.frontend.set_vring_enable(0, true).unwrap();
    assert!(vm.frontend.set_vring_enable(1, true).is_err());
    assert!(matches!(lost(&mut guest, 1), Cause::Queue { index: 0, .. }));

    let (mut vm, socket) = DriverVm::new();
    guest.splitter.attach(link(2), socket);
    vm.negotiate();
    // SAFETY: the descriptor is valid and given up by the file.
    let pipe = unsafe {
        use std::os::fd::{FromRawFd, IntoRawFd};
        vmm_sys_util::eventfd::EventFd::from_raw_fd(tempfile::tempfile().unwrap().into_raw_fd())
    };
    assert!(vm.frontend.set_vring_kick(0, &pipe).is_err());
    assert!(lost(&mut guest, 2).to_string().contains("no eventfd"));
}

#[test]
fn a_peer_that_stops_in_the_middle_of_a_message_holds_up_nothing() {
    let mut guest = Guest::new();
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    guest.splitter.attach(link(1), theirs);
    ours.write_all(&[1, 0, 0]).unwrap();
    for n in 0..10 {
        guest.tx.send(&frame(n, 100));
    }
    guest.turn();
    assert_eq!(guest.tx.completed(), 10);
    let mut vm = attached(&mut guest, 2);
    live(&mut guest, &mut vm, 2);
    assert_eq!(vm.rx.receive_all().len(), 10);
}

#[test]
fn a_driver_vm_that_resets_its_device_ends_its_link() {
    let mut guest = Guest::new();
    let mut vm = attached(&mut guest, 1);
    live(&mut guest, &mut vm, 1);
    assert!(vm.frontend.get_vring_base(0).is_err());
    assert!(matches!(lost(&mut guest, 1), Cause::Stopped));
}

#[test]
fn a_driver_vm_that_holds_the_writers_of_its_interrupts_up_loses_its_link() {
    let mut guest = Guest::new();
    let mut vm = attached(&mut guest, 1);
    live(&mut guest, &mut vm, 1);
    vm.rx.driver.interrupts();
    // A flag of the open file, which the splitter's descriptor shares.
    fcntl(call(&vm.rx), FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    vm.rx.driver.call.write(u64::MAX - 1).unwrap();
    let held = vm.rx.driver.call.try_clone().unwrap();
    let (sender, done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        guest.tx.send(&frame(0, 100));
        guest.turn();
        sender.send(guest).unwrap();
    });
    let guest = done.recv_timeout(std::time::Duration::from_secs(60));
    // Lets the other thread end where it waits.
    held.read().unwrap();
    let mut guest = guest.expect("the guest's event loop stands still");
    let cause = lost(&mut guest, 1);
    let Cause::Data(error) = cause else { panic!("{cause}") };
    assert!(matches!(error.fault, Fault::Ring(RingFault::Call(_))), "{error:?}");
    guest.tx.send(&frame(1, 100));
    guest.turn();
    assert_eq!(guest.splitter.status().logged_now, 1);
}

fn call(rx: &Rx) -> BorrowedFd<'_> {
    // SAFETY: the queue's driver has it open.
    unsafe { BorrowedFd::borrow_raw(rx.driver.call.as_raw_fd()) }
}

#[test]
fn interrupts_that_are_changed_without_end_fill_nothing_and_the_last_counts() {
    let mut guest = Guest::new();
    let mut vm = attached(&mut guest, 1);
    live(&mut guest, &mut vm, 1);
    guest.turn();
    assert!(guest.splitter.wake().read().is_err());
    let last = EventFd::new(EFD_NONBLOCK).unwrap();
    for n in 0..1000 {
        let other = EventFd::new(EFD_NONBLOCK).unwrap();
        vm.frontend.set_vring_call(n % 2, &other).unwrap();
        vm.frontend.set_vring_call(0, &last).unwrap();
    }
    assert_eq!(guest.splitter.wake().read().unwrap(), 1, "messages that wait");
    guest.turn();
    guest.tx.send(&frame(0, 100));
    guest.turn();
    assert_eq!(last.read().unwrap(), 1);
}

#[test]
fn what_a_driver_vm_left_unread_in_its_link_holds_nobody_up() {
    let mut guest = Guest::new();
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    // No message of the protocol: the link's thread ends and does not read what follows.
    ours.write_all(&[0xff; 12]).unwrap();
    let _deaf = send_lingering(&ours);
    drop(ours);
    guest.splitter.attach(link(1), theirs);
    let start = std::time::Instant::now();
    pause();
    lost(&mut guest, 1);
    drop(guest);
    assert!(start.elapsed().as_secs() < 40, "it was closed by the event loop");
}

#[test]
fn offloads_that_the_guest_did_not_accept_do_not_reach_it() {
    let without_tso = features::GUEST & !(1 << 7 | 1 << 8);
    let mut guest = Guest::with_features(without_tso);
    let Notice::Offloads(offloads) = guest.notice() else { panic!("no offloads") };
    assert_eq!(offloads.bits(), 1);
    let mut vm = attached(&mut guest, 1);
    live(&mut guest, &mut vm, 1);
    guest.rx.offer_all();
    let tso = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    vm.tx.send_with(tso, &frame(0, 9000));
    vm.tx.send(&frame(1, 100));
    guest.turn();
    assert_eq!(guest.rx.receive_all(), [frame(1, 100)]);
    assert_eq!(guest.splitter.counts().1.not_accepted, 1);
}
