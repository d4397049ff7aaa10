//! The bus with a device that remembers what it was told.

use proptest::prelude::*;

use super::*;
use crate::base::pci_config::{COMMAND_IO, COMMAND_MEMORY};
use crate::vm::pci::config::memory_bar;

const MEMORY32: Range<u64> = 0xC000_0000..0xE000_0000;
const MEMORY64: Range<u64> = 0x40_0000_0000..0x48_0000_0000;

struct Probe {
    config: ConfigSpace,
    bars: Vec<Bar>,
    moves: Vec<(u8, Option<u64>)>,
    written: Vec<(u8, u64, Vec<u8>)>,
}

impl Probe {
    fn new(bars: &[Bar]) -> Arc<Mutex<Self>> {
        let identity =
            Identity { id: (0x1234, 0x5678), subsystem: (0, 0), class: (0xFF, 0, 0), revision: 0, interrupt_pin: 0 };
        let config = ConfigSpace::new(identity, bars);
        Arc::new(Mutex::new(Self { config, bars: bars.to_vec(), moves: Vec::new(), written: Vec::new() }))
    }
}

impl PciDevice for Probe {
    fn name(&self) -> &str {
        "probe"
    }

    fn bars(&self) -> Vec<Bar> {
        self.bars.clone()
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        self.config.write(offset, data)
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(bar.0 << 4 | u8::try_from(offset & 0xF).unwrap());
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        self.written.push((bar.0, offset, data.to_vec()));
    }

    fn bar_moved(&mut self, bar: BarIndex, base: Option<u64>) {
        self.moves.push((bar.0, base));
    }

    fn reset(&mut self) {
        for register in 0..6 {
            self.config.write(0x10 + register * 4, &[0; 4]);
        }
        self.config.write(4, &[0; 2]);
    }
}

fn bus() -> PciBus {
    PciBus::new(Windows { memory32: MEMORY32, memory64: MEMORY64, io: 0x1000..0x10000 })
}

fn slot(number: u8) -> Slot {
    Slot::new(number).unwrap()
}

fn ecam(slot: u8, register: u64) -> u64 {
    u64::from(slot) << 15 | register
}

fn read32(bus: &PciBus, slot: u8, register: u64) -> u32 {
    let mut data = [0; 4];
    bus.ecam_read(ecam(slot, register), &mut data);
    u32::from_le_bytes(data)
}

fn three_bars() -> [Bar; 3] {
    [
        memory_bar(0, 0x4000),
        Bar { index: BarIndex(1), kind: BarKind::Io, size: 0x20 },
        Bar { index: BarIndex(2), kind: BarKind::Memory64 { prefetchable: true }, size: 1 << 30 },
    ]
}

#[test]
fn host_bridge_is_in_slot_0_and_the_rest_reads_all_ones() {
    let bus = bus();
    assert_eq!(read32(&bus, 0, 8) >> 16, 0x0600);
    assert_eq!(read32(&bus, 1, 0), 0xFFFF_FFFF);
    assert_eq!(read32(&bus, 0, 0x1000), 0xFFFF_FFFF, "function 1");
    assert_eq!(bus.free_slot(), Some(slot(1)));
    let mut data = [0; 8];
    bus.ecam_read(ecam(0, 0), &mut data);
    assert_eq!(u64::from_le_bytes(data) >> 32, u64::from(read32(&bus, 0, 4)));
}

#[test]
fn ports_and_ecam_show_the_same_registers() {
    let bus = bus();
    bus.add(slot(3), Probe::new(&[])).unwrap();
    assert!(bus.pio_write(0xCF8, &0x8000_1800u32.to_le_bytes()));
    let mut data = [0; 2];
    assert!(bus.pio_read(0xCFE, &mut data));
    assert_eq!(u16::from_le_bytes(data), 0x5678);
    assert!(bus.pio_write(0xCF8, &0x8001_1800u32.to_le_bytes()), "bus 1");
    assert!(bus.pio_read(0xCFC, &mut data));
    assert_eq!(data, [0xFF; 2]);
    assert!(!bus.pio_write(0xCF9, &[6]), "the reset register is not the bus's");
}

#[test]
fn bars_get_addresses_and_decode_once_enabled() {
    let bus = bus();
    let probe = Probe::new(&three_bars());
    bus.add(slot(1), probe.clone()).unwrap();
    assert_eq!(read32(&bus, 1, 0x10), 0xC000_0000);
    assert_eq!(read32(&bus, 1, 0x14), 0x1001);
    assert_eq!((read32(&bus, 1, 0x18), read32(&bus, 1, 0x1C)), (0xC, 0x40));
    let mut data = [0; 1];
    assert!(!bus.mmio_read(0xC000_0001, &mut data));
    bus.ecam_write(ecam(1, 4), &(COMMAND_MEMORY | COMMAND_IO).to_le_bytes());
    assert!(bus.mmio_read(0xC000_0001, &mut data));
    assert_eq!(data, [0x01]);
    assert!(bus.mmio_read(0x40_0000_0005, &mut data));
    assert_eq!(data, [0x25]);
    assert!(bus.pio_write(0x1002, &[7]));
    assert_eq!(probe.lock().unwrap().written, [(1, 2, vec![7])]);
    assert!(!bus.mmio_read(0xC000_3FFE, &mut [0; 4]), "an access across the end");
    assert!(!bus.mmio_read(0xC000_4000, &mut data));
}

#[test]
fn guest_moves_a_bar() {
    let bus = bus();
    let probe = Probe::new(&[memory_bar(0, 0x1000)]);
    bus.add(slot(1), probe.clone()).unwrap();
    bus.ecam_write(ecam(1, 4), &COMMAND_MEMORY.to_le_bytes());
    bus.ecam_write(ecam(1, 0x10), &0xD000_0000u32.to_le_bytes());
    assert!(bus.mmio_read(0xD000_0000, &mut [0; 4]));
    assert!(!bus.mmio_read(0xC000_0000, &mut [0; 4]));
    assert_eq!(probe.lock().unwrap().moves.last(), Some(&(0, Some(0xD000_0000))));
    bus.reset();
    assert!(!bus.mmio_read(0xD000_0000, &mut [0; 4]));
    assert_eq!(read32(&bus, 1, 0x10), 0xC000_0000);
}

#[test]
fn bar_over_memory_or_over_another_bar_is_not_decoded() {
    let bus = bus();
    let (first, second) = (Probe::new(&[memory_bar(0, 0x1000)]), Probe::new(&[memory_bar(0, 0x2000)]));
    bus.add(slot(1), first).unwrap();
    bus.add(slot(2), second.clone()).unwrap();
    bus.ecam_write(ecam(1, 4), &COMMAND_MEMORY.to_le_bytes());
    bus.ecam_write(ecam(2, 4), &COMMAND_MEMORY.to_le_bytes());
    for target in [0u32, 0xC000_0000, 0xFFFF_E000] {
        bus.ecam_write(ecam(2, 0x10), &target.to_le_bytes());
        assert_eq!(second.lock().unwrap().moves.last(), Some(&(0, None)), "{target:#x}");
    }
    assert!(bus.mmio_read(0xC000_0000, &mut [0; 4]), "the first device still decodes");
}

#[test]
fn what_does_not_fit_is_an_error_and_leaves_nothing_behind() {
    let bus = PciBus::new(Windows { memory32: 0xC000_0000..0xC000_4000, memory64: 0..0, io: 0x1000..0x2000 });
    let error = bus.add(slot(1), Probe::new(&three_bars())).unwrap_err();
    assert_eq!(error.to_string(), "probe: no room for BAR 2 of 0x40000000 bytes in the VM's 64-bit memory window");
    bus.add(slot(1), Probe::new(&[memory_bar(0, 0x4000)])).unwrap();
    assert!(matches!(bus.add(slot(1), Probe::new(&[])), Err(Error::SlotTaken(1))));
}

proptest! {
    #[test]
    fn decoded_ranges_stay_disjoint_and_inside(
        writes in prop::collection::vec((1u8..4, 0u64..8, any::<u32>()), 0..100),
    ) {
        let bus = bus();
        for number in 1..4 {
            bus.add(slot(number), Probe::new(&three_bars())).unwrap();
            bus.ecam_write(ecam(number, 4), &3u16.to_le_bytes());
        }
        for (number, register, value) in writes {
            // Few distinct values, so that collisions happen.
            let value = 0xC000_0000 | value & 0x3001_C000;
            bus.ecam_write(ecam(number, 0x10 + register * 4), &value.to_le_bytes());
        }
        let decoder = bus.decoder.read().unwrap();
        for pair in decoder.memory.windows(2) {
            prop_assert!(pair[0].range.end <= pair[1].range.start);
        }
        for decoded in &decoder.memory {
            let inside = |w: &Range<u64>| w.start <= decoded.range.start && decoded.range.end <= w.end;
            prop_assert!(inside(&MEMORY32) || inside(&MEMORY64));
        }
    }
}
