//! The ACPI tables (ACPI 6.5): RSDP, XSDT, FADT, FACS, MADT, MCFG, and the DSDT of `dsdt.rs`, laid one
//! behind the other. A PC of the full hardware model: PM1a registers, GPE block 0, SCI, reset register. The only
//! GPE and the only AML method are those of the VM generation ID; no hot-plug.

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zerocopy::byteorder::{LE, U16, U32};
use zerocopy::{Immutable, IntoBytes};

use super::{dsdt, layout};

pub(super) const OEM_ID: [u8; 6] = *b"UMBRA ";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"UMBRAVM ";
pub(super) const OEM_REVISION: u32 = 1;

/// What the OS writes to the reset register: system reset, full reset (bits 1 and 2 of port 0xCF9).
pub const RESET_VALUE: u8 = 0x06;
/// FADT boot flags: no VGA, no ASPM, no CMOS clock (kvmclock has the time); and no 8042 by absence.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 4 | 1 << 5;
/// MADT: the PC's two 8259 interrupt controllers are there as well.
const PCAT_COMPAT: u32 = 1;
/// MADT interrupt flags: active high, level-triggered.
const ACTIVE_HIGH_LEVEL: u16 = 0x000d;

/// Errors of the tables.
#[derive(Debug, Error)]
pub enum Error {
    /// The tables are larger than their room.
    #[error("the ACPI tables need {0} bytes, more than the {room} there are", room = layout::ACPI_TABLES_SIZE)]
    TooLarge(usize),
    /// Guest memory ends below.
    #[error(
        "write the ACPI tables to guest memory: the VM's memory is too small; raise `memory` to 1 MiB at the least"
    )]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// What differs between VMs.
#[derive(Clone, Copy, Debug)]
pub struct Platform {
    /// vCPUs; their APIC ids are 0 to `cpus` - 1.
    pub cpus: u8,
    /// End (exclusive) of the 64-bit PCI window; `None`: there is none.
    pub mmio64_end: Option<u64>,
    /// The VM has a generation ID, at [`layout::GENERATION_ID`].
    pub generation_id: bool,
}

/// Writes the tables and returns the address of the RSDP.
pub fn write(memory: &GuestMemoryMmap, platform: &Platform) -> Result<GuestAddress, Error> {
    let bytes = build(platform);
    if bytes.len() as u64 > layout::ACPI_TABLES_SIZE {
        return Err(Error::TooLarge(bytes.len()));
    }
    memory.write_slice(&bytes, layout::ACPI_TABLES).map_err(Error::Write)?;
    Ok(layout::ACPI_TABLES)
}

/// All tables as they stand at [`layout::ACPI_TABLES`], the RSDP first.
fn build(platform: &Platform) -> Vec<u8> {
    // The FACS must be aligned to 64 bytes; the rest follows at any address.
    let mut tables = Tables { bytes: vec![0; 64] };
    let facs = tables.append(&FACS::new());
    let dsdt = tables.append(&Raw(dsdt::build(platform)));
    let fadt = tables.append(&fadt(facs, dsdt));
    let madt = tables.append(&madt(platform.cpus));
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM_START, 0, 0, 0);
    let mcfg = tables.append(&mcfg);
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    [fadt, madt, mcfg].into_iter().for_each(|table| xsdt.add_entry(table.into()));
    let xsdt = tables.append(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt.into()).to_aml_bytes(&mut rsdp);
    tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    tables.bytes
}

struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Puts `table` behind the others, aligned to 16 bytes; returns its guest address.
    fn append(&mut self, table: &dyn Aml) -> u32 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let offset = self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        // The room for tables ends below 1 MiB; what is larger is refused by `write`.
        u32::try_from(layout::ACPI_TABLES.0 + offset).unwrap_or(u32::MAX)
    }
}

struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn io_register(port: u16, bytes: u8) -> GAS {
    let access = if bytes == 1 { AccessSize::ByteAccess } else { AccessSize::WordAccess };
    GAS::new(AddressSpace::SystemIo, bytes * 8, 0, access, port.into())
}

fn fadt(facs: u32, dsdt: u32) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_32(dsdt)
        .firmware_ctrl_32(facs)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    let sci = u16::try_from(layout::SCI_IRQ).unwrap_or(u16::MAX);
    fadt.sci_int = sci.into();
    fadt.pm1a_evt_blk = u32::from(layout::PM1A_EVENT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(layout::PM1A_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_evt_blk = GAS { register_bit_width: 32, ..io_register(layout::PM1A_EVENT, 2) };
    fadt.x_pm1a_cnt_blk = io_register(layout::PM1A_CONTROL, 2);
    fadt.gpe0_blk = u32::from(layout::GPE0).into();
    fadt.gpe0_blk_len = 2;
    fadt.x_gpe0_blk = GAS { register_bit_width: 16, ..io_register(layout::GPE0, 1) };
    // No C2 and C3: latencies above the limits of 100 and 1000 microseconds.
    fadt.p_lvl2_lat = 0xffff.into();
    fadt.p_lvl3_lat = 0xffff.into();
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = io_register(layout::RESET_CONTROL, 1);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// MADT entry: a PC interrupt that is not as the ISA bus has it (ACPI 6.5, section 5.2.12.5).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct SourceOverride {
    kind: u8,
    length: u8,
    bus: u8,
    source: u8,
    gsi: U32<LE>,
    flags: U16<LE>,
}

/// MADT entry: NMI on a local APIC's pin (ACPI 6.5, section 5.2.12.7).
#[repr(C, packed)]
#[derive(Clone, Copy, IntoBytes, Immutable)]
struct LocalNmi {
    kind: u8,
    length: u8,
    processor: u8,
    flags: U16<LE>,
    pin: u8,
}

/// A MADT by hand on top of the crate's entries, since the crate leaves out the header's flags.
fn madt(cpus: u8) -> Raw {
    let crate_madt = || {
        let mut madt =
            MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(layout::LAPIC_BASE));
        for id in 0..cpus {
            madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
        }
        madt.add_structure(IoApic::new(0, layout::IOAPIC_BASE, 0));
        madt
    };
    let mut bytes = Vec::new();
    crate_madt().to_aml_bytes(&mut bytes);
    let sci = u8::try_from(layout::SCI_IRQ).unwrap_or(u8::MAX);
    let sci = SourceOverride {
        kind: 2,
        length: 10,
        bus: 0,
        source: sci,
        gsi: layout::SCI_IRQ.into(),
        flags: ACTIVE_HIGH_LEVEL.into(),
    };
    let nmi = LocalNmi { kind: 4, length: 6, processor: 0xff, flags: 0.into(), pin: 1 };
    let mut table = Sdt::new(*b"APIC", 36, 3, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&layout::LAPIC_BASE.to_le_bytes());
    table.append_slice(&PCAT_COMPAT.to_le_bytes());
    table.append_slice(&bytes[44..]);
    table.append_slice(sci.as_bytes());
    table.append_slice(nmi.as_bytes());
    Raw(table.as_slice().to_vec())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn at(bytes: &[u8], address: u64) -> &[u8] {
        let offset = usize::try_from(address - layout::ACPI_TABLES.0).unwrap();
        let table = &bytes[offset..];
        let length = u32::from_le_bytes(table[4..8].try_into().unwrap()) as usize;
        &table[..length]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    fn u32_at(bytes: &[u8], offset: usize) -> u32 {
        u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reached_and_sums_to_zero() {
        let bytes = build(&Platform { cpus: 3, mmio64_end: Some(1 << 39), generation_id: true });
        assert!(bytes.len() as u64 <= layout::ACPI_TABLES_SIZE);
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let xsdt = at(&bytes, u64_at(&bytes, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (b"XSDT".as_slice(), 0));
        let tables: Vec<_> = xsdt[36..].chunks(8).map(|p| at(&bytes, u64_at(p, 0))).collect();
        let names: Vec<_> = tables.iter().map(|t| &t[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        assert!(tables.iter().all(|t| sum(t) == 0));
        let fadt = tables[0];
        let dsdt = at(&bytes, u32_at(fadt, 40).into());
        assert_eq!((&dsdt[..4], sum(dsdt)), (b"DSDT".as_slice(), 0));
        let facs = u32_at(fadt, 36);
        assert_eq!(facs % 64, 0);
        assert_eq!(&at(&bytes, facs.into())[..4], b"FACS");
    }

    #[test]
    fn the_event_block_is_said_twice_in_the_same_way() {
        let mut fadt_bytes = Vec::new();
        fadt(0, 0).to_aml_bytes(&mut fadt_bytes);
        // GPE0_BLK, GPE0_BLK_LEN and X_GPE0_BLK (ACPI 6.5, table 5.9): I/O space, 16 bits, byte by byte.
        assert_eq!((u32_at(&fadt_bytes, 80), fadt_bytes[92]), (layout::GPE0.into(), 2));
        assert_eq!(fadt_bytes[220..224], [1, 16, 0, 1]);
        assert_eq!(u64_at(&fadt_bytes, 224), u64::from(layout::GPE0));
    }

    #[test]
    fn the_madt_has_an_entry_for_each_vcpu_and_the_sci() {
        let Raw(madt) = madt(3);
        let mut entries = &madt[44..];
        let mut kinds = Vec::new();
        while !entries.is_empty() {
            kinds.push(entries[0]);
            entries = &entries[usize::from(entries[1])..];
        }
        assert_eq!(kinds, [0, 0, 0, 1, 2, 4]);
        assert_eq!(u32_at(&madt, 40), PCAT_COMPAT);
    }
}
