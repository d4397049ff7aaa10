//! Every device against a driver that writes anything into its rings: the device may ask for a reset, but must
//! neither panic nor spin, nor go on after a stop.

use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::Outbox;
use super::console::Console;
use super::device::VirtioDevice;
use super::disk::FileDisk;
use super::rng::Rng;
use super::testing::{DriverQueue, Loop, memory};
use crate::config::{Disk, OnFull};
use crate::wire::messages::{PortBackend, PortEnd};

const SIZE: u16 = 16;

/// A descriptor near the edges of what is allowed, or anything.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![0x8000u64..0x9000, Just(0xF_FFF0), any::<u64>()];
    let length = prop_oneof![0u32..64, Just(16), 500u32..600, Just(0x10_0000), any::<u32>()];
    let flags = prop_oneof![0u16..8, any::<u16>()];
    (address, length, flags, prop_oneof![0..SIZE, any::<u16>()])
}

#[derive(Clone, Debug)]
struct Ring {
    descriptors: Vec<(u64, u32, u16, u16)>,
    heads: Vec<u16>,
    /// What the available index runs ahead of the heads.
    jump: u16,
    data: Vec<u8>,
}

fn ring() -> impl Strategy<Value = Ring> {
    let descriptors = prop::collection::vec(descriptor(), usize::from(SIZE));
    let heads = prop::collection::vec(prop_oneof![9 => 0..SIZE, 1 => any::<u16>()], 0..usize::from(SIZE));
    let data = prop::collection::vec(prop_oneof![3 => 0u8..12, 1 => any::<u8>()], 256);
    let jump = prop_oneof![9 => Just(0u16), 1 => any::<u16>()];
    (descriptors, heads, jump, data).prop_map(|(descriptors, heads, jump, data)| Ring {
        descriptors,
        heads,
        jump,
        data,
    })
}

fn attack<D: VirtioDevice + 'static>(device: D, rings: &[Ring]) {
    let count = device.queue_sizes().len();
    let device = Arc::new(Mutex::new(device));
    let mut events = Loop::new(&device);
    let memory = memory(count as u64);
    let mut queues: Vec<_> = (0..count as u64).map(|index| DriverQueue::new(&memory, index, SIZE)).collect();
    for (index, queue) in (0u16..).zip(&mut queues) {
        let mut device = device.lock().unwrap();
        device.start_queue(index, queue.resources(), None).unwrap();
        drop(device);
        let ring = &rings[usize::from(index) % rings.len()];
        queue.overwrite(&ring.descriptors, &ring.heads, ring.jump, &ring.data);
        queue.kick();
    }
    events.run();
    let mut guard = device.lock().unwrap();
    for index in 0..u16::try_from(count).unwrap() {
        assert!(guard.stop_queue(index).is_some());
    }
    guard.reset();
    assert!(!guard.needs_reset());
    drop(guard);
    queues.iter().for_each(DriverQueue::kick);
    events.run();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn block_survives(ring in ring()) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 * 512).unwrap();
        let disk = Disk { path: file.path().into(), read_only: false, on_full: OnFull::Error };
        attack(FileDisk::new(&disk, 0, Arc::new(|_| ())).unwrap(), &[ring]);
        prop_assert_eq!(file.as_file().metadata().unwrap().len(), 64 * 512);
    }

    #[test]
    fn disk_of_a_driver_vm_survives(rings in prop::collection::vec(ring(), 2)) {
        attack(super::disk::split::tests::without_a_driver_vm(), &rings);
    }

    #[test]
    fn rng_survives(ring in ring()) {
        attack(Rng::new().unwrap(), &[ring]);
    }

    #[test]
    fn console_survives(rings in prop::collection::vec(ring(), 6)) {
        let (host, end) = UnixStream::pair().unwrap();
        let port = PortBackend { name: "port".into(), end: PortEnd::Fd(end.into_raw_fd()) };
        let outbox: Outbox = Arc::new(|_| {});
        let elsewhere = PortBackend { name: "elsewhere".into(), end: PortEnd::VhostUser };
        let line = super::console::tests::hvc::line().0;
        attack(Console::new(&[port, elsewhere], Some(line), &outbox).unwrap(), &rings);
        drop(host);
    }

    #[test]
    fn tap_network_survives(rings in prop::collection::vec(ring(), 3)) {
        let (net, _wire) = super::net::tap::tests::on_a_socket();
        attack(net, &rings);
    }
}
