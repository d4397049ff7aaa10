//! The device with a driver's side and a socket pair in place of a TAP: both keep frames apart.

#![allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};

use super::*;
use crate::host::tap::tests::{in_namespace, remove};
use crate::vm::virtio::testing::{DriverQueue, Loop, memory};

const MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);
const MERGEABLE: u64 = 1 << 15;
const CHECKSUM_AND_TSO4: u64 = 1 << 0 | 1 << 11;

struct Guest {
    device: Arc<Mutex<TapNet>>,
    events: Loop,
    queues: Vec<DriverQueue>,
    wire: UnixDatagram,
}

/// A device and the other end of what stands for its TAP.
pub(in crate::vm::virtio) fn on_a_socket() -> (TapNet, UnixDatagram) {
    let (wire, end) = UnixDatagram::pair().unwrap();
    wire.set_nonblocking(true).unwrap();
    end.set_nonblocking(true).unwrap();
    let tap = Tap::from_file("a-test", File::from(OwnedFd::from(end)));
    (TapNet::on(tap, MAC, 1500, Arc::new(|_| ())).unwrap(), wire)
}

impl Guest {
    fn new(features: u64) -> Self {
        let (mut net, wire) = on_a_socket();
        net.set_features(features | 1 << 17 | 1 << 23);
        let memory = memory(3);
        let queues: Vec<_> = (0..3).map(|index| DriverQueue::new(&memory, index, 64)).collect();
        for (index, queue) in (0..3).zip(&queues) {
            net.start_queue(index, queue.resources(), None).unwrap();
        }
        let device = Arc::new(Mutex::new(net));
        let mut events = Loop::new(&device);
        events.run();
        Self { device, events, queues, wire }
    }

    fn room(&mut self, sizes: &[u32]) {
        for &size in sizes {
            self.queues[0].add(&[], &[size]);
        }
        self.queues[0].kick();
        self.events.run();
    }

    fn deliver(&mut self, frame: &[u8]) {
        self.wire.send(frame).unwrap();
        self.events.run();
    }

    /// Buffers that came back, with what is in them.
    fn received(&mut self) -> Vec<Vec<u8>> {
        let queue = &mut self.queues[0];
        queue.used().into_iter().map(|(head, length)| queue.buffer(head, length)).collect()
    }

    fn command(&mut self, bytes: &[u8]) -> u8 {
        let head = self.queues[2].add(&[bytes], &[1]);
        self.queues[2].kick();
        self.events.run();
        assert_eq!(self.queues[2].used(), [(head, 1)]);
        self.queues[2].buffer(head + 1, 1)[0]
    }
}

/// A header and a frame of `length` bytes, none of them alike nearby.
fn frame(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; 12];
    bytes.extend((0..length).map(|i| (i % 253) as u8));
    bytes
}

#[test]
fn frames_are_sent_whole() {
    let mut guest = Guest::new(0);
    let sent = frame(100);
    guest.queues[1].add(&[&sent[..12], &sent[12..50], &sent[50..]], &[]);
    guest.queues[1].add(&[&sent[..4]], &[]);
    guest.queues[1].kick();
    guest.events.run();
    let mut bytes = [0; 2000];
    let length = guest.wire.recv(&mut bytes).unwrap();
    assert_eq!(bytes[..length], sent);
    assert!(guest.wire.recv(&mut bytes).is_err(), "less than a header is no frame");
    assert_eq!(guest.queues[1].used().len(), 2);
    assert!(guest.queues[1].call.read().is_ok());
}

#[test]
fn a_frame_of_too_many_segments_does_not_reach_the_host() {
    let mut guest = Guest::new(CHECKSUM_AND_TSO4);
    let mut bytes = vec![0; 70_000];
    for (gso_size, arrives) in [(1, false), (46, false), (48, true), (1448, true)] {
        let mut sent = frame(48_000);
        sent[..10].copy_from_slice(&[1, 1, 54, 0, 0, 0, 34, 0, 16, 0]);
        sent[4..6].copy_from_slice(&u16::to_le_bytes(gso_size));
        guest.queues[1].add(&[&sent], &[]);
        guest.queues[1].kick();
        guest.events.run();
        let got = guest.wire.recv(&mut bytes).ok().map(|length| bytes[..length].to_vec());
        assert_eq!(got, arrives.then_some(sent), "segments of {gso_size} bytes");
    }
    assert_eq!(guest.device.lock().unwrap().sender.malformed, 2);
}

#[test]
fn an_offload_that_was_not_negotiated_does_not_reach_the_host() {
    let mut guest = Guest::new(0);
    let mut sent = frame(3000);
    sent[..10].copy_from_slice(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
    guest.queues[1].add(&[&sent], &[]);
    guest.queues[1].kick();
    guest.events.run();
    assert!(guest.wire.recv(&mut [0; 4000]).is_err());
    assert_eq!(guest.queues[1].used().len(), 1);
}

#[test]
fn more_frames_than_a_turn_allows_are_all_sent() {
    let mut guest = Guest::new(0);
    let (sent, mut bytes) = (frame(60), [0; 100]);
    let mut count = 0;
    for _ in 0..60 {
        guest.queues[1].add(&[&sent], &[]);
    }
    guest.queues[1].kick();
    guest.events.run();
    while guest.wire.recv(&mut bytes).is_ok() {
        count += 1;
    }
    // A datagram socket holds fewer than a TAP; what does not fit is lost as there.
    assert!(count > 0);
    assert_eq!(guest.queues[1].used().len(), 60);
}

#[test]
fn a_frame_fills_one_buffer_and_names_it() {
    let mut guest = Guest::new(0);
    guest.room(&[1600, 1600]);
    let mut expected = frame(1000);
    guest.deliver(&expected);
    expected[10..12].copy_from_slice(&1u16.to_le_bytes());
    assert_eq!(guest.received(), [expected]);
    assert!(guest.queues[0].call.read().is_ok());
}

#[test]
fn mergeable_buffers_share_a_large_frame() {
    let mut guest = Guest::new(MERGEABLE);
    guest.room(&[1500; 50]);
    let mut expected = frame(4000);
    guest.deliver(&expected);
    expected[10..12].copy_from_slice(&3u16.to_le_bytes());
    let parts = guest.received();
    assert_eq!(parts.iter().map(Vec::len).collect::<Vec<_>>(), [1500, 1500, 1012]);
    assert_eq!(parts.concat(), expected);
    guest.deliver(&frame(10));
    assert_eq!(guest.received().len(), 1);
}

#[test]
fn frames_wait_for_buffers() {
    let mut guest = Guest::new(MERGEABLE);
    guest.deliver(&frame(60));
    guest.deliver(&frame(61));
    assert_eq!(guest.received(), Vec::<Vec<u8>>::new());
    guest.room(&[1500, 1500, 1500]);
    assert_eq!(guest.received().iter().map(Vec::len).collect::<Vec<_>>(), [72, 73]);
}

#[test]
fn a_frame_too_large_is_dropped_and_the_next_one_comes() {
    let mut guest = Guest::new(0);
    guest.room(&[100]);
    guest.deliver(&frame(200));
    guest.deliver(&frame(50));
    assert_eq!(guest.received().iter().map(Vec::len).collect::<Vec<_>>(), [62]);
    assert_eq!(guest.device.lock().unwrap().receiver.dropped, 1);
}

/// A driver would take the zeros behind the configuration for half duplex.
#[test]
fn an_interface_of_the_host_claims_no_speed() {
    const SPEED_DUPLEX: u64 = 1 << 63;
    let (net, _wire) = on_a_socket();
    let mut shown = [9; 5];
    net.config_read(12, &mut shown);
    assert_eq!((net.features() & SPEED_DUPLEX, shown), (0, [0; 5]));
}

#[test]
fn commands_are_acknowledged_and_the_address_changes() {
    let mut guest = Guest::new(0);
    assert_eq!(guest.command(&[0, 0, 1]), 0, "promiscuous");
    assert_eq!(guest.command(&[1, 1, 2, 9, 9, 9, 9, 9]), 0);
    assert_eq!(guest.command(&[77, 0]), 1, "no such class");
    let mut mac = [0; 6];
    guest.device.lock().unwrap().config_read(0, &mut mac);
    assert_eq!(mac, [2, 9, 9, 9, 9, 9]);
    guest.device.lock().unwrap().reset();
    guest.device.lock().unwrap().config_read(0, &mut mac);
    assert_eq!(mac, MAC.0);
}

#[test]
fn work_left_over_by_a_ring_that_breaks_then_does_not_spin() {
    let mut guest = Guest::new(0);
    guest.queues[1].break_ring();
    guest.queues[1].kick();
    guest.events.run();
    assert!(guest.device.lock().unwrap().needs_reset());
    guest.device.lock().unwrap().again.write(1).unwrap();
    // Fails if it never comes to rest.
    guest.events.run();
}

#[test]
fn more_commands_than_a_call_answers_are_all_answered() {
    let mut guest = Guest::new(0);
    let queue = DriverQueue::new(&memory(1), 0, 256);
    let mut device = guest.device.lock().unwrap();
    device.stop_queue(CONTROL);
    device.start_queue(CONTROL, queue.resources(), None).unwrap();
    drop(device);
    guest.events.run();
    guest.queues[2] = queue;
    for _ in 0..control::MAX_COMMANDS + 20 {
        guest.queues[2].add(&[&[0, 0, 1]], &[1]);
    }
    guest.queues[2].kick();
    guest.events.run();
    assert_eq!(guest.queues[2].used().len(), control::MAX_COMMANDS + 20);
}

#[test]
fn bad_buffers_are_given_back_and_a_bad_ring_asks_for_a_reset() {
    let mut guest = Guest::new(MERGEABLE);
    guest.queues[0].descriptor(u64::MAX - 5, 100, 2);
    guest.queues[0].offer(0);
    guest.room(&[1500]);
    guest.deliver(&frame(60));
    assert_eq!(guest.queues[0].used(), [(0, 0), (1, 72)]);
    guest.queues[1].break_ring();
    guest.queues[1].kick();
    guest.events.run();
    assert!(guest.device.lock().unwrap().needs_reset());
    let mut device = guest.device.lock().unwrap();
    for index in 0..3 {
        assert!(device.stop_queue(index).is_some());
    }
    device.reset();
    assert!(!device.needs_reset());
}

/// The host sends a frame by this interface.
fn send_from_host(interface: &str) {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    use std::os::fd::AsRawFd;

    let name = std::ffi::CString::new(interface).unwrap();
    let raw = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).unwrap();
    // SAFETY: all-zero is a valid sockaddr_ll, a C struct of integers and an array; the name ends with a zero and lives through the call.
    let (mut to, index): (libc::sockaddr_ll, _) = unsafe { (std::mem::zeroed(), libc::if_nametoindex(name.as_ptr())) };
    (to.sll_family, to.sll_ifindex) = (u16::try_from(libc::AF_PACKET).unwrap(), i32::try_from(index).unwrap());
    let (frame, size) = ([0xff_u8; 60], u32::try_from(size_of_val(&to)).unwrap());
    // SAFETY: frame and address live through the call, with the lengths that it is given.
    let sent = unsafe { libc::sendto(raw.as_raw_fd(), frame.as_ptr().cast(), 60, 0, (&raw const to).cast(), size) };
    assert_eq!(sent, 60, "{}", std::io::Error::last_os_error());
}

#[test]
fn an_interface_that_is_removed_is_a_cable_pulled_until_it_is_there_again() {
    const NAME: &str = "umbra-t5";
    const MANY: usize = 300;
    let link_is_up = |device: &Arc<Mutex<TapNet>>| {
        let mut status = [0; 2];
        device.lock().unwrap().config_read(6, &mut status);
        status[0] & 1 == 1
    };
    in_namespace(move || {
        let (sender, news) = std::sync::mpsc::channel();
        let outbox = Arc::new(move |message| sender.send(message).unwrap());
        let mut net = TapNet::new(NAME, MAC, 1500, outbox).unwrap();
        net.set_features(1 << 16);
        let changed = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        net.set_config_interrupt(changed.try_clone().unwrap());
        let memory = memory(2);
        let mut queues: Vec<_> = (0..2).map(|index| DriverQueue::new(&memory, index, 512)).collect();
        for (index, queue) in (0..2).zip(&queues) {
            net.start_queue(index, queue.resources(), None).unwrap();
        }
        let device = Arc::new(Mutex::new(net));
        let mut events = Loop::new(&device);
        // The supervisor's part.
        let look = || match Tap::find(NAME, 1500) {
            Ok(found) => found.map(|tap| Ok(tap.into_file())),
            Err(error) => Some(Err(error.to_string())),
        };
        let told = |news: &std::sync::mpsc::Receiver<FromVm>| {
            news.iter().find(|message| !matches!(message, FromVm::WantTap { .. })).unwrap()
        };
        let asked = |news: &std::sync::mpsc::Receiver<FromVm>| {
            let asked = news.try_iter().last().unwrap();
            assert!(matches!(&asked, FromVm::WantTap { interface } if interface == NAME), "{asked:?}");
        };
        for there_is_traffic in [false, true] {
            if !there_is_traffic {
                // Room for more frames than the kernel sends by itself (IPv6): the interface is watched.
                for _ in 0..64 {
                    queues[0].add(&[], &[2048]);
                }
                queues[0].kick();
            }
            events.run();
            assert!(link_is_up(&device));
            remove(NAME);
            if there_is_traffic {
                // More than one turn takes.
                let packet = frame(60);
                for _ in 0..MANY {
                    queues[1].add(&[&packet], &[]);
                }
                queues[1].kick();
            }
            events.run();
            assert!(!link_is_up(&device) && changed.read().is_ok());
            assert_eq!(queues[1].used().len(), if there_is_traffic { MANY } else { 0 }, "nothing is left in the queue");
            assert!(matches!(told(&news), FromVm::Tap { there: false, .. }));
            std::thread::sleep(LOOK * 2);
            events.run();
            asked(&news);
            assert!(look().is_none(), "it is not made");
            // As others make it: to stay.
            let again = Tap::open(NAME, 1500).unwrap();
            device.lock().unwrap().answered(look().unwrap());
            events.run();
            let refused = told(&news);
            assert!(
                matches!(&refused, FromVm::Tap { there: false, news, .. } if news.contains("in use")),
                "{refused:?}"
            );
            // SAFETY: TUNSETPERSIST takes its argument by value; the file is open.
            assert_eq!(unsafe { libc::ioctl(again.file().as_raw_fd(), libc::TUNSETPERSIST, 1) }, 0);
            drop(again);
            device.lock().unwrap().answered(look().unwrap());
            events.run();
            assert!(link_is_up(&device) && changed.read().is_ok());
            assert!(matches!(told(&news), FromVm::Tap { there: true, .. }));
            // The guest has had its buffers ready all the time.
            queues[0].used();
            send_from_host(NAME);
            events.run();
            assert!(!queues[0].used().is_empty(), "what the host sends by the new interface does not reach the guest");
        }
    });
}
