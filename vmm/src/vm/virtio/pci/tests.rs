//! The transport with a device that notes its calls, driven by register accesses as a driver makes them.

#![allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]

use event_manager::{EventOps, Events, MutEventSubscriber};
use proptest::prelude::*;

use std::time::{Duration, Instant};

use super::line::tests::FakePin;
use super::*;
use crate::vm::pci::msix::tests::FakeVector;
use crate::vm::virtio::device::Error as DeviceError;

const MEMORY: u64 = 1 << 20;
const FEATURE: u64 = 1 << 5;

#[derive(Default)]
struct Device {
    accepted: Option<u64>,
    running: [Option<QueueResources>; 2],
    states: Vec<Option<QueueState>>,
    resets: usize,
    refuse: bool,
    config_call: Option<EventFd>,
}

impl MutEventSubscriber for Device {
    fn process(&mut self, _: Events, _: &mut EventOps) {}

    fn init(&mut self, _: &mut EventOps) {}
}

impl VirtioDevice for Device {
    fn device_id(&self) -> u16 {
        1
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 128]
    }

    fn features(&self) -> u64 {
        FEATURE | F_EVENT_IDX
    }

    fn set_features(&mut self, accepted: u64) {
        self.accepted = Some(accepted);
    }

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        data.fill(0xA0 | u8::try_from(offset & 0xF).unwrap());
    }

    fn set_config_interrupt(&mut self, call: EventFd) {
        self.config_call = Some(call);
    }

    fn start_queue(
        &mut self,
        index: u16,
        resources: QueueResources,
        state: Option<QueueState>,
    ) -> Result<(), DeviceError> {
        if self.refuse {
            return Err(DeviceError::NoSuchQueue(index));
        }
        self.running[usize::from(index)] = Some(resources);
        self.states.push(state);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        self.running[usize::from(index)].take().map(|_| QueueState { next_avail: 7, next_used: 7 })
    }

    fn reset(&mut self) {
        self.resets += 1;
    }
}

type Bound = Arc<Mutex<Vec<Doorbell>>>;

struct FakeKicks(Bound);

impl Kicks for FakeKicks {
    fn bind(&self, _: &EventFd, doorbell: Doorbell) -> Result<(), interrupt::Error> {
        self.0.lock().unwrap().push(doorbell);
        Ok(())
    }

    fn unbind(&self, _: &EventFd, doorbell: Doorbell) -> Result<(), interrupt::Error> {
        self.0.lock().unwrap().retain(|&bound| bound != doorbell);
        Ok(())
    }
}

struct Driver {
    pci: VirtioPci,
    device: Arc<Mutex<Device>>,
    bound: Bound,
    pin: Arc<FakePin>,
}

impl Driver {
    /// One that has switched MSI-X on.
    fn new() -> Self {
        let mut driver = Self::without_msix();
        driver.set_msix(0x8000);
        driver
    }

    fn set_msix(&mut self, control: u16) {
        self.pci.config_write(self.pci.msix_capability + 2, &control.to_le_bytes());
    }

    fn without_msix() -> Self {
        let device = Arc::new(Mutex::new(Device::default()));
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let msix = Msix::from_vectors((0..3).map(|_| FakeVector::boxed().0).collect());
        let bound = Bound::default();
        let kicks = Box::new(FakeKicks(Arc::clone(&bound)));
        let pin = Arc::new(FakePin::default());
        let parts = (msix, Arc::clone(&pin) as Arc<dyn Pin>);
        let pci = VirtioPci::with_parts("test".into(), device.clone(), memory, parts, kicks).unwrap();
        Self { pci, device, bound, pin }
    }

    fn write(&mut self, offset: u32, value: u32, width: usize) {
        self.pci.bar_write(BarIndex(0), offset.into(), &value.to_le_bytes()[..width]);
    }

    fn read(&mut self, offset: u32, width: usize) -> u32 {
        let mut data = [0; 4];
        self.pci.bar_read(BarIndex(0), offset.into(), &mut data[..width]);
        u32::from_le_bytes(data)
    }

    fn negotiate(&mut self, features: u64) -> bool {
        self.write(0x14, 1, 1);
        self.write(0x14, 3, 1);
        for half in 0..2 {
            self.write(8, half, 4);
            self.write(12, (features >> (32 * half) & 0xFFFF_FFFF) as u32, 4);
        }
        self.write(0x14, 11, 1);
        self.read(0x14, 1) == 11
    }

    fn set_up_queue(&mut self, index: u32, base: u32) {
        self.write(0x16, index, 2);
        self.write(0x18, 64, 2);
        self.write(0x1A, index + 1, 2);
        self.write(0x20, base, 4);
        self.write(0x28, base + 0x1000, 4);
        self.write(0x30, base + 0x2000, 4);
        self.write(0x1C, 1, 2);
    }

    fn ready(&mut self) {
        assert!(self.negotiate(FEATURE | F_VERSION_1));
        self.set_up_queue(0, 0x10000);
        self.set_up_queue(1, 0x20000);
        self.write(0x14, 15, 1);
    }
}

#[test]
fn driver_negotiates_sets_up_queues_and_they_start() {
    let mut driver = Driver::new();
    driver.write(0, 1, 4);
    assert_eq!(driver.read(4, 4), 1, "VERSION_1 is offered");
    assert_eq!((driver.read(0x12, 2), driver.read(0x18, 2)), (2, 256));
    driver.ready();
    assert_eq!(driver.read(0x14, 1), 15);
    let device = driver.device.lock().unwrap();
    assert_eq!(device.accepted, Some(FEATURE | F_VERSION_1));
    let queue = &device.running[1].as_ref().unwrap().queue;
    assert_eq!((queue.size(), queue.desc_table(), queue.used_ring()), (64, 0x20000, 0x22000));
    assert!(!queue.event_idx_enabled());
    assert_eq!(device.states, [None, None]);
}

#[test]
fn interrupts_go_to_the_chosen_vector_and_kicks_to_the_queue() {
    let mut driver = Driver::new();
    driver.ready();
    let device = driver.device.lock().unwrap();
    let queue = device.running[1].as_ref().unwrap();
    queue.call.write(1).unwrap();
    assert!(driver.pci.msix.event(2).unwrap().read().is_ok());
    driver.pci.region_write(NOTIFY + NOTIFY_MULTIPLIER, &[1, 0]);
    assert_eq!(queue.kick.read().unwrap(), 1);
}

#[test]
fn a_driver_without_msix_is_interrupted_by_the_line() {
    let mut driver = Driver::without_msix();
    driver.ready();
    let call = |driver: &Driver, queue: usize| {
        driver.device.lock().unwrap().running[queue].as_ref().unwrap().call.try_clone().unwrap()
    };
    call(&driver, 0).write(1).unwrap();
    driver.pin.await_raised();
    assert_eq!((driver.read(ISR, 1), driver.read(ISR, 1)), (1, 0), "reading clears it");
    assert!(driver.pci.save().is_err(), "it has no snapshot");
    // Its next life, as after kexec, uses MSI-X.
    driver.write(0x14, 0, 1);
    driver.set_msix(0x8000);
    driver.ready();
    call(&driver, 1).write(1).unwrap();
    assert!(driver.pci.msix.event(2).unwrap().read().is_ok());
    assert_eq!(driver.read(ISR, 1), 0);
}

/// As a driver in user space, or a hypervisor in the guest, masks it without knowing the device.
#[test]
fn a_line_that_is_disabled_is_not_raised_and_shows_in_the_status_register() {
    const DISABLED: [u8; 2] = [0x07, 0x04];
    let mut driver = Driver::without_msix();
    let shows = |driver: &mut Driver| {
        let mut both = [0; 4];
        driver.pci.config_read(4, &mut both);
        both[2] & 1 << 3 != 0
    };
    driver.pci.config_write(4, &DISABLED);
    driver.ready();
    let call = driver.device.lock().unwrap().running[0].as_ref().unwrap().call.try_clone().unwrap();
    for _ in 0..2 {
        assert!(!shows(&mut driver));
        call.write(1).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while !shows(&mut driver) {
            assert!(Instant::now() < until, "never pending");
        }
        assert!(!driver.pin.is_raised());
        driver.pci.config_write(4, &[0x07, 0x00]);
        driver.pin.await_raised();
        driver.pci.config_write(4, &DISABLED);
        driver.pin.end_of_interrupt();
        assert_eq!(driver.read(ISR, 1), 1);
    }
}

#[test]
fn a_driver_that_goes_over_to_msix_keeps_its_queues() {
    let mut driver = Driver::without_msix();
    driver.write(0x10, 0, 2);
    driver.ready();
    driver.set_msix(0x8000);
    let device = driver.device.lock().unwrap();
    let state = Some(QueueState { next_avail: 7, next_used: 7 });
    assert_eq!(device.states, [None, None, state, state]);
    device.running[1].as_ref().unwrap().call.write(1).unwrap();
    device.config_call.as_ref().unwrap().write(1).unwrap();
    for vector in [0, 2] {
        assert!(driver.pci.msix.event(vector).unwrap().read().is_ok(), "vector {vector}");
    }
}

#[test]
fn unknown_features_are_refused() {
    for features in [FEATURE, F_VERSION_1 | 1 << 40] {
        let mut driver = Driver::new();
        assert!(!driver.negotiate(features));
        driver.write(0x14, 15, 1);
        assert_eq!(driver.read(0x14, 1), 3, "no DRIVER_OK either");
        assert_eq!(driver.device.lock().unwrap().accepted, None);
    }
}

#[test]
fn rings_outside_of_memory_ask_for_a_reset() {
    let mut driver = Driver::new();
    assert!(driver.negotiate(F_VERSION_1));
    driver.write(0x10, 0, 2);
    driver.set_up_queue(0, (MEMORY - 0x1000) as u32);
    driver.write(0x14, 15, 1);
    assert_eq!(driver.read(0x14, 1), 15 | 64);
    assert!(driver.pci.msix.event(0).unwrap().read().is_ok(), "the driver is told");
    assert!(driver.device.lock().unwrap().running[0].is_none());
    driver.write(0x14, 0, 1);
    assert_eq!(driver.read(0x14, 1), 0);
}

#[test]
fn refusal_of_the_device_asks_for_a_reset() {
    let mut driver = Driver::new();
    driver.device.lock().unwrap().refuse = true;
    driver.ready();
    assert_eq!(driver.read(0x14, 1), 15 | 64);
}

#[test]
fn reset_stops_queues_and_forgets_them() {
    let mut driver = Driver::new();
    driver.ready();
    driver.write(0x14, 0, 1);
    {
        let device = driver.device.lock().unwrap();
        assert!(device.running.iter().all(Option::is_none));
        assert_eq!(device.resets, 1);
    }
    assert_eq!((driver.read(0x18, 2), driver.read(0x1C, 2)), (256, 0));
    driver.ready();
    assert!(driver.device.lock().unwrap().running[0].is_some());
}

#[test]
fn a_device_that_may_be_no_bus_master_touches_memory_no_more() {
    let mut driver = Driver::new();
    let command = |driver: &mut Driver, value: u16| driver.pci.config_write(4, &value.to_le_bytes());
    command(&mut driver, 0b111);
    driver.ready();
    command(&mut driver, 0b11);
    assert!(driver.device.lock().unwrap().running.iter().all(Option::is_none));
    // What comes behind a kexec makes it one before it resets the device.
    command(&mut driver, 0b111);
    let device = driver.device.lock().unwrap();
    assert_eq!((device.running.iter().all(Option::is_none), device.resets), (true, 1));
}

#[test]
fn a_driver_that_never_makes_its_device_a_bus_master_is_served() {
    let mut driver = Driver::new();
    driver.ready();
    for command in [0b11u16, 0b1, 0b11] {
        driver.pci.config_write(4, &command.to_le_bytes());
    }
    assert!(driver.device.lock().unwrap().running.iter().all(Option::is_some));
}

#[test]
fn another_vector_restarts_the_queue_where_it_stood() {
    let mut driver = Driver::new();
    driver.ready();
    driver.write(0x16, 0, 2);
    driver.write(0x1A, 2, 2);
    assert_eq!(driver.read(0x1A, 2), 2);
    driver.write(0x1A, 77, 2);
    assert_eq!(driver.read(0x1A, 2), 0xFFFF, "no such vector");
    let device = driver.device.lock().unwrap();
    let state = Some(QueueState { next_avail: 7, next_used: 7 });
    assert_eq!(device.states, [None, None, state, state]);
    assert!(device.running[0].is_some());
}

#[test]
fn enabled_queue_keeps_its_addresses() {
    let mut driver = Driver::new();
    driver.ready();
    driver.write(0x16, 0, 2);
    driver.write(0x20, 0xDEAD_0000, 4);
    assert_eq!(driver.read(0x20, 4), 0x10000);
}

#[test]
fn notification_addresses_follow_the_bar() {
    let mut driver = Driver::new();
    driver.pci.bar_moved(BarIndex(0), Some(0xC000_0000));
    driver.pci.bar_moved(BarIndex(0), Some(0xD000_0000));
    driver.pci.bar_moved(BarIndex(1), Some(0x1000));
    driver.pci.bar_moved(BarIndex(1), Some(0x2000));
    let memory = [0xD000_3000, 0xD000_3004].map(Doorbell::Memory);
    assert_eq!(*driver.bound.lock().unwrap(), [&memory[..], &[0x2000, 0x2004].map(Doorbell::Port)].concat());
    driver.pci.bar_moved(BarIndex(1), None);
    assert_eq!(*driver.bound.lock().unwrap(), memory, "each BAR has its own");
    let Driver { pci, bound, .. } = driver;
    drop(pci);
    assert!(bound.lock().unwrap().is_empty());
}

#[test]
fn pci_configuration_access_reaches_the_bar() {
    let mut driver = Driver::new();
    let at = driver.pci.pci_capability;
    driver.pci.config_write(at + 4, &[0]);
    driver.pci.config_write(at + 8, &DEVICE.to_le_bytes());
    driver.pci.config_write(at + 12, &2u32.to_le_bytes());
    let mut data = [0; 2];
    driver.pci.config_read(at + 16, &mut data);
    assert_eq!(data, [0xA0, 0xA0]);
    driver.pci.config_write(at + 8, &0xFFFF_FFFEu32.to_le_bytes());
    driver.pci.config_read(at + 16, &mut data);
    assert_eq!(data, [0, 0], "outside of the BAR");
}

#[test]
fn the_first_way_to_kick_is_a_port_and_each_way_kicks_its_queue() {
    let mut driver = Driver::new();
    let mut byte = |at: u8| {
        let mut data = [0];
        driver.pci.config_read(at.into(), &mut data);
        data[0]
    };
    let (mut at, mut bars) = (byte(0x34), Vec::new());
    while at != 0 {
        if byte(at) == CAPABILITY_VENDOR && byte(at + 3) == TYPE_NOTIFY {
            bars.push(byte(at + 4));
        }
        at = byte(at + 1);
    }
    assert_eq!(bars, [PORTS, BAR]);
    let ports = driver.pci.bars()[1];
    assert_eq!((ports.index, ports.kind, ports.size), (BarIndex(PORTS), BarKind::Io, 8), "two queues");
    driver.pci.bar_write(BarIndex(PORTS), 4, &1u16.to_le_bytes());
    assert_eq!(driver.pci.queues[1].event.read().unwrap(), 1);
    // The same by the configuration space.
    let access = driver.pci.pci_capability;
    driver.pci.config_write(access + 4, &[PORTS]);
    driver.pci.config_write(access + 8, &0u32.to_le_bytes());
    driver.pci.config_write(access + 12, &2u32.to_le_bytes());
    driver.pci.config_write(access + 16, &[0, 0]);
    assert_eq!(driver.pci.queues[0].event.read().unwrap(), 1);
    assert!(driver.pci.queues[1].event.read().is_err());
}

#[test]
fn msix_is_switched_by_its_capability() {
    let mut driver = Driver::new();
    let control = driver.pci.msix_capability + 2;
    driver.pci.config_write(control, &0x8000u16.to_le_bytes());
    assert!(driver.pci.msix.enabled());
    driver.pci.config_write(control + 1, &[0]);
    assert!(!driver.pci.msix.enabled());
    let mut id = [0; 4];
    driver.pci.config_read(0, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x1041_1AF4);
}

#[test]
fn kvm_takes_kicks_and_vectors_and_their_moves() {
    if std::env::var("UMBRA_SKIP_KVM").is_ok_and(|value| value == "1") {
        eprintln!("skipped: UMBRA_SKIP_KVM=1");
        return;
    }
    let vm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
    let vm = Arc::new(vm.expect("this test needs KVM; UMBRA_SKIP_KVM=1 leaves it out"));
    vm.create_irq_chip().unwrap();
    let interrupts = Interrupts::new(vm).unwrap();
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
    let device = Arc::new(Mutex::new(Device::default()));
    let mut pci = VirtioPci::new("test".into(), device, memory, (&interrupts, Slot::new(3).unwrap())).unwrap();
    pci.bar_moved(BarIndex(0), Some(0xC000_0000));
    pci.bar_moved(BarIndex(0), Some(0xC000_8000));
    pci.bar_moved(BarIndex(1), Some(0x1000));
    pci.bar_moved(BarIndex(1), Some(0x1008));
    let all = pci.queues.iter().flat_map(|queue| queue.bound);
    assert!(all.into_iter().all(|bound| bound.is_some()), "KVM watches each queue's address and port");
    for vector in 0..3u32 {
        let entry = u64::from(MSIX_TABLE + vector * 16);
        pci.bar_write(BarIndex(0), entry, &0xFEE0_0000u64.to_le_bytes());
        pci.bar_write(BarIndex(0), entry + 8, &u64::from(0x40 + vector).to_le_bytes());
    }
    let control = pci.msix_capability + 2;
    pci.config_write(control, &0x8000u16.to_le_bytes());
    pci.msix.event(1).unwrap().write(1).unwrap();
    assert!(pci.msix.event(1).unwrap().read().is_err(), "KVM has taken the interrupt");
    pci.config_write(control, &0xC000u16.to_le_bytes());
    pci.msix.event(2).unwrap().write(1).unwrap();
    let mut pending = [0; 8];
    pci.bar_read(BarIndex(0), MSIX_PBA.into(), &mut pending);
    assert_eq!(u64::from_le_bytes(pending), 1 << 2);
    pci.config_write(control, &0x8000u16.to_le_bytes());
    assert!(pci.msix.event(2).unwrap().read().is_err(), "what waited is injected");
}

proptest! {
    #[test]
    fn any_register_writes_do_no_harm(
        writes in prop::collection::vec((0u32..0x40, any::<u32>(), prop::sample::select(vec![1usize, 2, 4])), 0..200),
    ) {
        let mut driver = Driver::new();
        driver.ready();
        for (offset, value, width) in writes {
            driver.write(offset, value, width);
            driver.read(offset, width);
        }
        driver.write(0x14, 0, 1);
        prop_assert!(driver.device.lock().unwrap().running.iter().all(Option::is_none));
    }
}
