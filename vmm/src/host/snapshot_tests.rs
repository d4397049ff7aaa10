//! A function that is a table in memory, seen ahead by a kernel that sets it up.

use super::*;
use crate::base::pci_config::{COMMAND_IO, COMMAND_MEMORY};
use crate::vm::pci::config::{BAR0, memory_bar};
use crate::vm::pci::device::{Bar, BarIndex, BarKind};
use crate::vm::vfio::config::Config;

const POWER: u16 = 0xC8;
const EXPRESS: u16 = 0xE0;
const ON: u16 = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER;

/// The function when it has come: notes what it is told.
struct Host {
    bytes: Vec<u8>,
    told: RefCell<Vec<(u16, u16)>>,
}

impl HostConfig for Host {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        data.copy_from_slice(&self.bytes[usize::from(offset)..][..data.len()]);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.told.borrow_mut().push((offset, u16::from_le_bytes(data.try_into().unwrap())));
    }
}

fn regions() -> [RegionInfo; BARS] {
    let mut regions: [RegionInfo; BARS] = Default::default();
    regions[0] = RegionInfo { size: 0x2_0000, mappable: true, sparse: None };
    regions
}

/// A NIC with power management and PCI Express capability.
fn nic() -> (Snapshot, Host) {
    let mut config = vec![0; 4096];
    config[..4].copy_from_slice(&0x10D3_8086u32.to_le_bytes());
    config[0x06] = 1 << 4;
    config[0x34..0x36].copy_from_slice(&[0xC8, 0]);
    config[usize::from(POWER)..][..4].copy_from_slice(&[0x01, 0xE0, 0x22, 0xC8]);
    config[usize::from(EXPRESS)..][..4].copy_from_slice(&[0x10, 0, 0x02, 0]);
    config[usize::from(EXPRESS + EXPRESS_CONTROL)..][..2].copy_from_slice(&0x2810u16.to_le_bytes());
    let host = Host { bytes: config.clone(), told: RefCell::default() };
    let bdf = "0000:01:00.0".parse().unwrap();
    (Snapshot { bdf, config, regions: regions(), line: true }, host)
}

#[test]
fn what_has_happened_to_a_function_does_not_make_it_another_one() {
    let with = |words: &[(u16, u16)]| {
        let (mut snapshot, _) = nic();
        // Advanced error reporting at the beginning, and something else behind it.
        snapshot.config[0x100..0x104].copy_from_slice(&0x1401_0001u32.to_le_bytes());
        snapshot.config[0x140..0x144].copy_from_slice(&0x0001_0003u32.to_le_bytes());
        for (offset, word) in words {
            snapshot.config[usize::from(*offset)..][..2].copy_from_slice(&word.to_le_bytes());
        }
        snapshot.forget_the_past();
        snapshot
    };
    let quiet = with(&[]);
    assert_eq!(quiet.config[0x06], 1 << 4, "it has capabilities still");
    let past = [
        (STATUS, 0xF918),
        (POWER + POWER_CONTROL, 0x8000),
        (EXPRESS + 0x0A, 0x0F),
        (EXPRESS + 0x12, 0xC800),
        (0x104, 0x4000),
        (0x106, 0x10),
        (0x110, 0x1001),
        (0x118, 0x12),
        (0x11C, 0x4000),
        (0x12A, 0xBEEF),
    ];
    assert_eq!(with(&past), quiet);
    // What it can do, and what is behind that, makes another function.
    for other in [(0x118, 0x20), (0x12C, 1), (0x144, 1), (EXPRESS + 0x12, 0x43), (0x2C, 7)] {
        assert_ne!(with(&[other]), quiet, "{other:x?}");
    }
    // A capability at the end of the space reaches beyond it.
    let (mut snapshot, _) = nic();
    snapshot.config[0x100..0x104].copy_from_slice(&0xFFC1_0001u32.to_le_bytes());
    snapshot.config[0xFFC..0x1000].copy_from_slice(&0x0001_0001u32.to_le_bytes());
    snapshot.forget_the_past();
    snapshot.config.truncate(3);
    snapshot.forget_the_past();
}

#[test]
fn a_function_of_virtio_or_usb_is_not_shown_before_it_is_there() {
    const NVME: [u8; 3] = [0x02, 0x08, 0x01];
    let shown = |vendor: u16, device: u16, class: [u8; 3]| {
        let mut head = [0; CLASS_END];
        head[..2].copy_from_slice(&vendor.to_le_bytes());
        head[2..4].copy_from_slice(&device.to_le_bytes());
        head[CLASS_END - 3..].copy_from_slice(&class);
        Snapshot::can_be_ahead(&head)
    };
    // A disk and a NIC of virtio; NVMe as QEMU has it, and an NVMe disk with a virtio device's number.
    assert!(!shown(0x1AF4, 0x1042, [0, 0, 1]) && !shown(0x1AF4, 0x1000, [0, 0, 2]));
    assert!(shown(0x1B36, 0x0010, NVME) && shown(0x144D, 0x1042, NVME));
    assert!(shown(0x1AF4, 0x1110, [0, 0, 5]), "shared memory between VMs");
    // xHCI as QEMU has it, and EHCI.
    assert!(!shown(0x1B36, 0x000D, [0x30, 0x03, 0x0C]) && !shown(0x8086, 0x1C2D, [0x20, 0x03, 0x0C]));
    assert!(shown(0x8086, 0x1C22, [0, 0x05, 0x0C]), "SMBus is a serial bus as well");
}

fn told(awaited: &Awaited, host: &Host) -> Vec<(u16, u16)> {
    awaited.hand_over(host);
    host.told.take()
}

#[test]
fn only_harmless_registers_can_be_written_ahead() {
    let awaited = Awaited::new(nic().0);
    (0..4096).step_by(4).for_each(|offset| awaited.write_config(offset, &[0xFF; 4]));
    assert_eq!(awaited.config32(0), 0x10D3_8086);
    assert_eq!(awaited.config16(COMMAND), COMMAND_WRITABLE);
    assert_eq!(awaited.config16(POWER + POWER_CONTROL), POWER_WRITABLE, "no PME waits");
    assert_eq!(awaited.config16(EXPRESS + EXPRESS_CONTROL), EXPRESS_WRITABLE, "no reset");
    let changed: Vec<_> = (0..4096).filter(|&at| awaited.config8(at) != nic().1.config8(at)).collect();
    assert_eq!(changed, [4, 5, 0x0C, 0x0D, 0xCC, 0xCD, 0xE8, 0xE9, 0x108, 0x109]);
    awaited.reset();
    assert_eq!(awaited.config16(COMMAND), 0);
}

#[test]
fn the_function_is_told_what_was_changed_and_last_its_command_without_bus_mastering() {
    let (snapshot, host) = nic();
    let awaited = Awaited::new(snapshot);
    assert_eq!(told(&awaited, &host), [(COMMAND, 0)]);
    awaited.write_config(EXPRESS + EXPRESS_CONTROL, &0x2910u16.to_le_bytes());
    awaited.write_config(COMMAND, &ON.to_le_bytes());
    awaited.write_config(CACHE_LINE, &[0x10]);
    assert_eq!(awaited.config16(COMMAND), ON, "the kernel sees what it wrote");
    let expected = [(CACHE_LINE, 0x10), (EXPRESS + EXPRESS_CONTROL, 0x2910), (COMMAND, COMMAND_IO | COMMAND_MEMORY)];
    assert_eq!(told(&awaited, &host), expected);
}

#[test]
fn bars_that_were_placed_ahead_are_where_they_were_placed_when_the_function_has_come() {
    let (snapshot, host) = nic();
    let awaited = Awaited::new(snapshot);
    let wide = Bar { index: BarIndex(2), kind: BarKind::Memory64 { prefetchable: true }, size: 1 << 20 };
    let mut config = Config::new(&Capabilities::scan(&awaited), &[memory_bar(0, 0x2_0000), wide], Some(19));
    config.reset(&awaited);
    config.write(&awaited, BAR0, &u32::MAX.to_le_bytes());
    let mut size = [0; 4];
    config.read(&awaited, BAR0, &mut size);
    assert_eq!(u32::from_le_bytes(size), 0xFFFE_0000, "the sizing protocol");
    config.write(&awaited, BAR0, &0xC002_0000u32.to_le_bytes());
    awaited.hand_over(&host);
    let effects = config.write(&host, COMMAND, &COMMAND_MEMORY.to_le_bytes());
    let bases: Vec<_> = effects.bars.iter().map(|change| (change.bar.index.0, change.base)).collect();
    assert_eq!(bases, [(0, Some(0xC002_0000)), (2, Some(0))]);
}

#[test]
fn another_function_is_refused() {
    let (snapshot, host) = nic();
    assert_eq!(snapshot.difference(&host, &regions(), true), None);
    assert_eq!(snapshot.difference(&host, &regions(), false), Some("BARs or interrupts"));
    assert_eq!(snapshot.difference(&host, &Default::default(), true), Some("BARs or interrupts"));
    for (offset, what) in IDENTITY {
        let mut other = nic().1;
        other.bytes[usize::from(offset)] ^= 0x40;
        assert_eq!(snapshot.difference(&other, &regions(), true), Some(what));
    }
    assert!(snapshot.check(&host, &Default::default(), true).unwrap_err().to_string().contains("0000:01:00.0"));
}

#[test]
fn a_conventional_function_has_nothing_behind_256_bytes() {
    let (mut snapshot, _) = nic();
    snapshot.config.truncate(256);
    let awaited = Awaited::new(snapshot);
    assert_eq!(awaited.config32(0x100), u32::MAX);
    awaited.write_config(0x100, &[0; 4]);
    assert_eq!(awaited.config32(0x100), u32::MAX);
}
