//! The DSDT: the PCI root bridge with its windows and interrupt routing, the ranges that are no one else's,
//! COM1, pvpanic, the VM generation ID with its event, and the value that powers the machine off.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package,
    PackageBuilder, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::acpi::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform};
use super::{layout, legacy};
use crate::base::pci_address::Slot;
use crate::vm::interrupt::Interrupts;

/// Length of a table's header.
const HEADER: u32 = 36;
/// `_STA`: present, enabled, shown, working.
const PRESENT: u8 = 0x0f;
/// What a notification of the VM generation ID says: it has changed.
const CHANGED: u8 = 0x80;

/// The table's bytes.
pub(super) fn build(platform: &Platform) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", HEADER, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&system_bus(platform));
    table.append_slice(&sleep_state());
    if platform.generation_id {
        table.append_slice(&generation_event());
    }
    table.as_slice().to_vec()
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// `_S5`: what goes into `SLP_TYP` to power off.
fn sleep_state() -> Vec<u8> {
    let package = Package::new(vec![&legacy::SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]);
    bytes(&Name::new("_S5_".into(), &package))
}

fn system_bus(platform: &Platform) -> Vec<u8> {
    let mut devices = [pci_root(platform), reserved(), com1(), pvpanic()].concat();
    if platform.generation_id {
        devices.extend(generation_id());
    }
    Scope::raw(Path::new("\\_SB_"), devices)
}

fn pci_root(platform: &Platform) -> Vec<u8> {
    let uncached = AddressSpaceCacheable::NotCacheable;
    let last32 = u32::try_from(layout::PCI_MMIO32_END - 1).unwrap_or(u32::MAX);
    let first32 = u32::try_from(layout::PCI_MMIO32_START).unwrap_or(u32::MAX);
    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let config = IO::new(layout::PCI_CONFIG_ADDRESS, layout::PCI_CONFIG_ADDRESS, 1, 8);
    let ports = AddressSpace::new_io(layout::PCI_IO_START, layout::PCI_IO_LAST, None);
    let memory32 = AddressSpace::new_memory(uncached, true, first32, last32, None);
    let memory64 = platform.mmio64_end.map(|end| {
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, layout::PCI_MMIO64_START, end - 1, None)
    });
    let mut windows: Vec<&dyn Aml> = vec![&buses, &config, &ports, &memory32];
    windows.extend(memory64.as_ref().map(|window| window as &dyn Aml));
    bytes(&Device::new(
        "PCI0".into(),
        vec![
            // A PCI Express root bridge, compatible with a PCI one.
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(windows)),
            &Name::new("_PRT".into(), &interrupt_routing()),
        ],
    ))
}

/// `_PRT`: `INTA#` of each slot, wired to an I/O APIC pin.
fn interrupt_routing() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for slot in Slot::all().map(Slot::get) {
        let address = u32::from(slot) << 16 | 0xffff;
        let gsi = Interrupts::intx_gsi(slot);
        table.add_element(&Package::new(vec![&address, &ZERO, &ZERO, &gsi]));
    }
    table
}

/// `PNP0C02`: the ECAM, as the PCI firmware specification asks, and the ports of the power management.
fn reserved() -> Vec<u8> {
    let start = u32::try_from(layout::ECAM_START).unwrap_or(u32::MAX);
    let size = u32::try_from(layout::ECAM_SIZE).unwrap_or(u32::MAX);
    let ecam = Memory32Fixed::new(true, start, size);
    let pm = IO::new(layout::PM1A_EVENT, layout::PM1A_EVENT, 1, 8);
    bytes(&Device::new(
        "RES0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam, &pm])),
        ],
    ))
}

fn com1() -> Vec<u8> {
    let ports = IO::new(layout::COM1, layout::COM1, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, layout::COM1_IRQ);
    bytes(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_STA".into(), &PRESENT),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt])),
        ],
    ))
}

fn pvpanic() -> Vec<u8> {
    let port = IO::new(layout::PVPANIC, layout::PVPANIC, 1, 1);
    bytes(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_STA".into(), &PRESENT),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ],
    ))
}

/// The device that says where the VM generation ID is (Microsoft, "Virtual Machine Generation ID", 2012). Its `_HID` is this VMM's own;
/// drivers know the `_CID`.
fn generation_id() -> Vec<u8> {
    // Below 1 MiB: the upper half is zero.
    let address = u32::try_from(layout::GENERATION_ID.0).unwrap_or(u32::MAX);
    bytes(&Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"UMBR0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("_STA".into(), &PRESENT),
            &Name::new("ADDR".into(), &Package::new(vec![&address, &ZERO])),
        ],
    ))
}

/// The method of GPE 0, by edge, so that the OS clears its status before it runs this.
fn generation_event() -> Vec<u8> {
    let device = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&device, &CHANGED);
    bytes(&Scope::new("\\_GPE".into(), vec![&Method::new("_E00".into(), 0, false, vec![&notify])]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(generation_id: bool) -> Vec<u8> {
        build(&Platform { cpus: 1, mmio64_end: None, generation_id })
    }

    fn holds(table: &[u8], part: &[u8]) -> bool {
        table.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn the_generation_id_s_device_says_where_it_is_and_what_it_is() {
        let table = table(true);
        assert!(holds(&table, b"\x08_CID\x0dVM_Gen_Counter\0"));
        assert!(holds(&table, b"\x08_DDN\x0dVM_Gen_Counter\0"));
        // Name, package of nine bytes and two elements: a double word, zero.
        assert!(holds(&table, b"\x08ADDR\x12\x08\x02\x0c\x00\xf0\x0f\x00\x00"));
        assert_eq!((layout::GENERATION_ID.0, layout::GENERATION_ID.0 % 8), (0xf_f000, 0));
    }

    #[test]
    fn the_event_notifies_the_device() {
        // Scope, method without arguments, Notify (\_SB.VGEN, 0x80).
        let method = b"\x14\x13_E00\x00\x86\\\x2e_SB_VGEN\x0a\x80";
        assert!(holds(&table(true), &[b"\x10\x1a\\_GPE", method.as_slice()].concat()));
    }

    #[test]
    fn a_vm_without_snapshots_has_no_generation_id() {
        assert!(!holds(&table(false), b"VGEN") && !holds(&table(false), b"_GPE"));
    }
}
