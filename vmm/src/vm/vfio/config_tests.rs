//! Configuration space of a device that is a table in memory.

use std::cell::RefCell;

use proptest::prelude::*;

use super::super::msi;
use super::*;
use crate::host::capabilities::{CAPABILITY_POWER, EXTENDED_SRIOV, STATUS, STATUS_CAPABILITIES};
use crate::vm::interrupt::MsiMessage;
use crate::vm::pci::config::memory_bar;
use crate::vm::pci::device::{BarIndex, BarKind};
use crate::vm::pci::msix::tests::{FakeVector, Seen};

/// Where [`FakeHost::nic`] keeps its capabilities.
const POWER: u16 = 0xC8;
const MSI: u16 = 0xD0;
const MSIX: u16 = 0xA0;

/// A configuration space that takes every write, as a device that allows everything.
struct FakeHost {
    bytes: RefCell<Vec<u8>>,
    written: RefCell<Vec<u16>>,
}

impl HostConfig for FakeHost {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let bytes = self.bytes.borrow();
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = bytes.get(at).copied().unwrap_or(0xFF);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.written.borrow_mut().push(offset);
        let mut bytes = self.bytes.borrow_mut();
        for (byte, at) in data.iter().zip(usize::from(offset)..) {
            if let Some(place) = bytes.get_mut(at) {
                *place = *byte;
            }
        }
    }
}

impl FakeHost {
    fn empty(size: usize) -> Self {
        Self { bytes: RefCell::new(vec![0; size]), written: RefCell::default() }
    }

    fn set(&self, offset: u16, data: &[u8]) {
        self.write_config(offset, data);
        self.written.borrow_mut().clear();
    }

    /// An 82574 as the bench has it: power management, MSI, MSI-X (5 vectors in BAR 3), serial number, SR-IOV.
    fn nic() -> Self {
        let host = Self::empty(4096);
        host.set(0, &0x10D3_8086u32.to_le_bytes());
        host.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        host.set(HEADER_TYPE, &[HEADER_MULTIFUNCTION]);
        host.set(ROM_FIRST, &0xFEB0_0001u32.to_le_bytes());
        host.set(0x34, &[0xC8]);
        host.set(POWER, &[CAPABILITY_POWER, 0xD0, 0x22, 0xC8, 0]);
        host.set(MSI, &[msi::CAPABILITY_ID, 0xA0, 0x82, 0]);
        host.set(MSIX, &[msix::CAPABILITY_ID, 0, 4, 0, 3, 0, 0, 0, 3, 0x20]);
        host.set(0x100, &(0x1400_0000u32 | 1 << 16 | 3).to_le_bytes());
        host.set(0x140, &(0x1800_0000u32 | 1 << 16 | u32::from(EXTENDED_SRIOV)).to_le_bytes());
        host.set(0x180, &(1u32 << 16 | 0x18).to_le_bytes());
        host
    }
}

fn bars() -> Vec<Bar> {
    let io = Bar { index: BarIndex(2), kind: BarKind::Io, size: 0x20 };
    let wide = Bar { index: BarIndex(4), kind: BarKind::Memory64 { prefetchable: true }, size: 1 << 20 };
    vec![memory_bar(0, 0x2_0000), io, wide]
}

fn msi_of(host: &FakeHost) -> (Msi, Vec<Seen>) {
    let (vectors, seen) = (0..msi::announced(host, MSI)).map(|_| FakeVector::boxed()).unzip();
    (Msi::new(host, MSI, vectors), seen)
}

fn config(host: &FakeHost) -> (Config, Vec<Seen>) {
    let mut config = Config::new(&Capabilities::scan(host), &bars(), Some(19));
    let (msi, seen) = msi_of(host);
    config.msi = Some(msi);
    let layout = MsixLayout::read(host, MSIX).unwrap();
    let vectors = (0..layout.count).map(|_| FakeVector::boxed().0).collect();
    config.msix = Some((layout, Msix::from_vectors(vectors)));
    config.reset(host);
    host.written.borrow_mut().clear();
    (config, seen)
}

fn read32(config: &Config, host: &FakeHost, offset: u16) -> u32 {
    let mut data = [0; 4];
    config.read(host, offset, &mut data);
    u32::from_le_bytes(data)
}

fn bases(effects: &Effects) -> Vec<(u8, Option<u64>)> {
    effects.bars.iter().map(|change| (change.bar.index.0, change.base)).collect()
}

#[test]
fn capabilities_are_found() {
    let found = Capabilities::scan(&FakeHost::nic());
    let expected =
        Capabilities { msi: Some(MSI), msix: Some(MSIX), power: Some(POWER), express: None, hidden: vec![0x140] };
    assert_eq!(found, expected);
}

#[test]
fn a_looping_list_ends() {
    let host = FakeHost::nic();
    host.set(MSIX + 1, &[0xC8]);
    host.set(0x180, &(0x1000_0000u32 | 1 << 16 | 0x18).to_le_bytes());
    assert_eq!(Capabilities::scan(&host).msi, Some(MSI));
}

#[test]
fn a_device_without_a_list_has_none() {
    let host = FakeHost::nic();
    host.set(STATUS, &[0, 0]);
    assert_eq!(Capabilities { hidden: Vec::new(), ..Capabilities::scan(&host) }, Capabilities::default());
    assert_eq!(Capabilities::scan(&FakeHost::empty(256)), Capabilities::default());
}

#[test]
fn msix_layout_names_table_and_pending_bits() {
    let layout = MsixLayout::read(&FakeHost::nic(), MSIX).unwrap();
    assert_eq!((layout.count, layout.table.bar, layout.table.bytes), (5, BarIndex(3), 0..80));
    assert_eq!((layout.pending.bar, layout.pending.bytes), (BarIndex(3), 0x2000..0x2008));
}

#[test]
fn the_vm_sees_its_own_header() {
    let host = FakeHost::nic();
    let (config, _) = config(&host);
    assert_eq!(read32(&config, &host, 0), 0x10D3_8086);
    assert_eq!(read32(&config, &host, 0x0C) >> 16, 0, "one function");
    assert_eq!(read32(&config, &host, 0x30), 0, "no ROM");
    assert_eq!(read32(&config, &host, 0x3C), 0x0113, "INTA# on GSI 19");
    assert_eq!(read32(&config, &host, 0x18), 1, "an I/O BAR without an address");
    assert_eq!(read32(&config, &host, 0x140), 0x1800_0000, "SR-IOV is a null capability, the list goes on");
    assert_eq!(read32(&config, &host, 0x100), 0x1401_0003);
}

#[test]
fn bars_answer_sizing_without_touching_the_device() {
    let host = FakeHost::nic();
    let (mut config, _) = config(&host);
    for offset in (0x10..0x28).step_by(4) {
        assert!(config.write(&host, offset, &[0xFF; 4]).bars.is_empty());
    }
    assert_eq!(read32(&config, &host, 0x10), 0xFFFE_0000);
    assert_eq!(read32(&config, &host, 0x18), 0xFFFF_FFE1);
    assert_eq!((read32(&config, &host, 0x20), read32(&config, &host, 0x24)), (0xFFF0_000C, 0xFFFF_FFFF));
    assert!(host.written.borrow().is_empty());
}

#[test]
fn decoding_follows_command_and_power_state() {
    let host = FakeHost::nic();
    let (mut config, _) = config(&host);
    config.write(&host, 0x10, &0xC000_0000u32.to_le_bytes());
    config.write(&host, 0x18, &0x1000u32.to_le_bytes());
    let on = config.write(&host, COMMAND, &[0x07, 0x01]);
    assert_eq!(bases(&on), [(0, Some(0xC000_0000)), (2, Some(0x1000)), (4, Some(0))]);
    assert_eq!(host.config16(COMMAND), 0x0107, "the device's command register is written too");
    assert!(config.may_stop_decoding(POWER + POWER_CONTROL, &[3, 0]));
    let asleep = config.write(&host, POWER + POWER_CONTROL, &[3, 0]);
    assert!(asleep.bars.len() == 3 && asleep.bars.iter().all(|c| c.base.is_none()));
    assert_eq!(read32(&config, &host, 4) & 0x7, 0x7, "the register is as written");
    let awake = config.write(&host, POWER + POWER_CONTROL, &[0, 0]);
    assert_eq!(bases(&awake)[0], (0, Some(0xC000_0000)));
    assert!(config.may_stop_decoding(COMMAND, &[0x05, 0x01]));
    assert!(!config.may_stop_decoding(COMMAND, &[0x06, 0x01]));
    assert!(!config.may_stop_decoding(COMMAND + 1, &[0x04]));
    let off = config.write(&host, COMMAND, &[0x05, 0x01]);
    assert_eq!(bases(&off), [(0, None), (4, None)]);
}

#[test]
fn reset_switches_the_device_off() {
    let host = FakeHost::nic();
    let (mut config, seen) = config(&host);
    config.write(&host, 0x10, &0xC000_0000u32.to_le_bytes());
    config.write(&host, COMMAND, &[0x07, 0x01]);
    config.write(&host, MSI + 4, &0xFEE0_0000u32.to_le_bytes());
    config.write(&host, MSI + 2, &[1, 0]);
    config.write(&host, 0x3C, &[7]);
    config.reset(&host);
    assert_eq!(host.config16(COMMAND), 0);
    assert_eq!((read32(&config, &host, 0x10), read32(&config, &host, 0x3C)), (0, 0x0113));
    assert_eq!(*seen[0].lock().unwrap(), None);
    assert_eq!(read32(&config, &host, MSI + 4), 0);
}

#[test]
fn msi_sends_where_the_guest_says() {
    let host = FakeHost::nic();
    let (mut config, seen) = config(&host);
    assert_eq!(seen.len(), 2);
    assert_eq!(read32(&config, &host, MSI), 0x0082_A005);
    config.write(&host, MSI + 4, &0xFEE0_1003u32.to_le_bytes());
    config.write(&host, MSI + 8, &1u32.to_le_bytes());
    config.write(&host, MSI + 12, &[0x41, 0]);
    assert_eq!(*seen[0].lock().unwrap(), None, "off");
    assert!(config.write(&host, MSI + 2, &[1, 0]).interrupts);
    assert_eq!(*seen[0].lock().unwrap(), Some(MsiMessage { address: 0x1_FEE0_1000, data: 0x41 }));
    assert_eq!(*seen[1].lock().unwrap(), None, "one vector enabled");
    config.write(&host, MSI + 2, &[0x11, 0]);
    assert_eq!(*seen[0].lock().unwrap(), Some(MsiMessage { address: 0x1_FEE0_1000, data: 0x40 }));
    assert_eq!(*seen[1].lock().unwrap(), Some(MsiMessage { address: 0x1_FEE0_1000, data: 0x41 }));
    assert_eq!(config.msi.as_ref().unwrap().events().len(), 2);
    config.write(&host, MSI + 2, &[0, 0]);
    assert_eq!(*seen[1].lock().unwrap(), None);
    assert!(host.written.borrow().is_empty(), "the device's own message is the host's");
}

#[test]
fn msi_mask_bits_hold_single_vectors() {
    let host = FakeHost::nic();
    // 32-bit addresses, two vectors, mask bits.
    host.set(MSI + 2, &0x0102u16.to_le_bytes());
    let (mut msi, seen) = msi_of(&host);
    msi.write(MSI + 4, &0xFEE0_0000u32.to_le_bytes());
    msi.write(MSI + 8, &[0x20, 0]);
    msi.write(MSI + 12, &0xFFFF_FFFEu32.to_le_bytes());
    msi.write(MSI + 2, &[0x11, 0]);
    assert!(seen[0].lock().unwrap().is_some());
    assert_eq!(*seen[1].lock().unwrap(), None);
    assert_eq!(msi.read(MSI + 13), 0, "bits of vectors that there are not stay 0");
    assert!(msi.contains(MSI + 19) && !msi.contains(MSI + 20));
    msi.write(MSI + 12, &[0; 4]);
    assert_eq!(*seen[1].lock().unwrap(), Some(MsiMessage { address: 0xFEE0_0000, data: 0x21 }));
}

#[test]
fn msix_control_is_emulated() {
    let host = FakeHost::nic();
    let (mut config, _) = config(&host);
    assert!(config.write(&host, MSIX + 2, &[0xFF, 0xFF]).interrupts);
    assert_eq!(read32(&config, &host, MSIX) >> 16, 0xC004, "the count does not change");
    config.write(&host, MSIX, &[0, 0, 0, 0x80]);
    assert_eq!(read32(&config, &host, MSIX), 0x8004_0011);
    assert_eq!(read32(&config, &host, MSIX + 4), 3, "table offset and BAR are the device's");
    assert!(host.written.borrow().is_empty());
}

proptest! {
    #[test]
    fn no_write_reaches_the_devices_addresses_or_messages(
        writes in prop::collection::vec((0u16..64, any::<u32>(), prop::sample::select(vec![1usize, 2, 4])), 0..200),
    ) {
        let host = FakeHost::nic();
        let (mut config, _) = config(&host);
        for (dword, value, length) in writes {
            config.write(&host, dword * 4, &value.to_le_bytes()[..length]);
        }
        for &offset in host.written.borrow().iter() {
            let emulated = (0x10..0x28).contains(&offset) || (0x30..0x34).contains(&offset) || (0x3C..0x40).contains(&offset)
                || (MSI..MSI + 14).contains(&offset) || (MSIX..MSIX + 12).contains(&offset);
            prop_assert!(!emulated, "{offset:#x}");
        }
    }

    #[test]
    fn any_configuration_space_can_be_scanned(bytes in prop::collection::vec(any::<u8>(), 256..1024)) {
        let host = FakeHost::empty(0);
        *host.bytes.borrow_mut() = bytes;
        host.set(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        let found = Capabilities::scan(&host);
        if let Some(offset) = found.msi {
            let (mut msi, _) = {
                let (vectors, seen): (Vec<_>, Vec<_>) = (0..msi::announced(&host, offset)).map(|_| FakeVector::boxed()).unzip();
                (Msi::new(&host, offset, vectors), seen)
            };
            for at in offset..offset + 24 {
                if msi.contains(at) {
                    msi.write(at, &[0xFF; 4]);
                    msi.read(at);
                }
            }
        }
        if let Some(offset) = found.msix {
            let _ = MsixLayout::read(&host, offset);
        }
    }
}
