//! The guest's physical address map and its I/O ports, in one place: what is written here is what the ACPI
//! tables, the e820 map and the address decoding say. All addresses are below 2^40, all ports 16 bits.

use vm_memory::GuestAddress;

/// Top of the RAM below 4 GiB; what does not fit continues at [`HIGH_RAM_START`].
pub const LOW_RAM_LIMIT: u64 = 0xc000_0000;
/// Start of the RAM above 4 GiB.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// 32-bit window for PCI memory BARs.
pub const PCI_MMIO32_START: u64 = LOW_RAM_LIMIT;
/// End (exclusive) of the 32-bit PCI window.
pub const PCI_MMIO32_END: u64 = 0xe000_0000;
/// PCI configuration space (ECAM) of bus 0.
pub const ECAM_START: u64 = 0xe000_0000;
/// Size of the ECAM of one bus: 256 functions of 4 KiB.
pub const ECAM_SIZE: u64 = 1 << 20;
/// 64-bit window for PCI memory BARs, if the CPU's physical addresses reach it.
pub const PCI_MMIO64_START: u64 = 0x40_0000_0000;
/// Size of the 64-bit PCI window.
pub const PCI_MMIO64_SIZE: u64 = 32 << 30;

/// I/O APIC registers (KVM's).
pub const IOAPIC_BASE: u32 = 0xfec0_0000;
/// Local APIC registers (KVM's).
pub const LAPIC_BASE: u32 = 0xfee0_0000;
/// One page for KVM's identity map (needed by VMX without unrestricted guest); just below the TSS.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's task state segment (VMX); outside of RAM and of the PCI windows.
pub const TSS_ADDRESS: usize = 0xfffb_d000;

/// First port of the window for PCI I/O BARs.
pub const PCI_IO_START: u16 = 0x1000;
/// Last port of the window for PCI I/O BARs.
pub const PCI_IO_LAST: u16 = 0xffff;

/// COM1.
pub const COM1: u16 = 0x3f8;
/// Last port of COM1.
pub const COM1_LAST: u16 = 0x3ff;
/// IRQ of COM1.
pub const COM1_IRQ: u32 = 4;
/// CMOS and real-time clock: index.
pub const CMOS_INDEX: u16 = 0x70;
/// CMOS and real-time clock: data.
pub const CMOS_DATA: u16 = 0x71;
/// Keyboard controller: data port.
pub const I8042_DATA: u16 = 0x60;
/// Keyboard controller: status and command port.
pub const I8042_COMMAND: u16 = 0x64;
/// PCI configuration address.
pub const PCI_CONFIG_ADDRESS: u16 = 0xcf8;
/// PCI configuration data, four ports.
pub const PCI_CONFIG_DATA: u16 = 0xcfc;
/// Reset control register (also the ACPI reset register); lies inside the address port's dword.
pub const RESET_CONTROL: u16 = 0xcf9;
/// pvpanic (ACPI id QEMU0001).
pub const PVPANIC: u16 = 0x505;
/// ACPI PM1a event block: status, then enable, two bytes each.
pub const PM1A_EVENT: u16 = 0x600;
/// ACPI PM1a control block, two bytes.
pub const PM1A_CONTROL: u16 = 0x604;
/// ACPI general-purpose event block 0: status, then enable, a byte each.
pub const GPE0: u16 = 0x606;
/// Last port of the ACPI blocks, which follow each other from [`PM1A_EVENT`] on.
pub const ACPI_LAST: u16 = 0x607;
/// The system control interrupt.
pub const SCI_IRQ: u32 = 9;

/// A global descriptor table for the boot protocols.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// PVH start info, module list and memory map.
pub const PVH_INFO: GuestAddress = GuestAddress(0x6000);
/// The zero page (`boot_params`) of the Linux boot protocol.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Top of the boot stack; grows down into unused memory.
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// Page tables of the 64-bit entry: PML4, PDPT and four page directories that map 4 GiB.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// Kernel command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// Longest command line with its final NUL: `COMMAND_LINE_SIZE` of Linux on x86.
pub const CMDLINE_MAX: usize = 2048;
/// Start of the extended BIOS data area: the end of low RAM in the e820 map.
pub const EBDA_START: u64 = 0x9_fc00;
/// The ACPI tables; the RSDP comes first. In the area that ACPI says to search for it.
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
/// Room for the ACPI tables.
pub const ACPI_TABLES_SIZE: u64 = 0x1_f000;
/// The VM generation ID, in a page of its own behind the tables: reserved memory that is cached and that no OS uses, as its
/// specification asks.
pub const GENERATION_ID: GuestAddress = GuestAddress(0xf_f000);
/// Start of extended memory, where kernels are loaded.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);
