//! The first vCPU's registers at a kernel's entry. The others wait for INIT and SIPI, as KVM's local APIC
//! does by itself.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::Entry;
use crate::vm::machine::kvm;
use crate::vm::machine::layout;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of `rflags` is always set.
const RFLAGS_RESERVED: u64 = 2;

/// Page table entry: present, writable.
const PTE_TABLE: u64 = 0x3;
/// Page directory entry: present, writable, 2 MiB page.
const PDE_2M: u64 = 0x83;
const PAGE: u64 = 4096;
const ENTRIES: u64 = 512;

const MSR_MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations, which firmware turns on.
const FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back: as firmware leaves it.
const MTRR_WRITE_BACK: u64 = (1 << 11) | 6;

/// Selectors in the boot GDT (the boot protocol's `__BOOT_CS` and `__BOOT_DS`).
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Errors of register set-up.
#[derive(Debug, Error)]
pub enum Error {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Page tables or GDT do not fit in memory.
    #[error("write page tables and GDT to guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// Sets MSRs that firmware sets on every vCPU; with `entry` also the first vCPU's registers.
pub fn set_up(vcpu: &VcpuFd, memory: &GuestMemoryMmap, entry: Option<Entry>) -> Result<(), Error> {
    set_msrs(vcpu)?;
    let Some(entry) = entry else { return Ok(()) };
    let mut sregs = vcpu.get_sregs().map_err(failed("read the segment registers (KVM_GET_SREGS)"))?;
    let regs = match entry {
        Entry::Pvh(rip) => {
            protected_mode(&mut sregs);
            kvm_regs { rip: rip.0, rbx: layout::PVH_INFO.0, rflags: RFLAGS_RESERVED, ..Default::default() }
        }
        Entry::Linux64(rip) => {
            long_mode(&mut sregs);
            write_page_tables(memory).map_err(Error::Memory)?;
            let (rsp, rsi) = (layout::BOOT_STACK.0, layout::ZERO_PAGE.0);
            kvm_regs { rip: rip.0, rsp, rbp: rsp, rsi, rflags: RFLAGS_RESERVED, ..Default::default() }
        }
    };
    write_gdt(memory, &mut sregs).map_err(Error::Memory)?;
    vcpu.set_sregs(&sregs).map_err(failed("set the segment registers (KVM_SET_SREGS)"))?;
    vcpu.set_regs(&regs).map_err(failed("set the registers (KVM_SET_REGS)"))
}

fn failed(operation: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| kvm::Error::ioctl(operation)(source).into()
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    // One by one: a host without one of them (an AMD CPU without MISC_ENABLE) still takes the other.
    for (index, data) in [(MSR_MISC_ENABLE, FAST_STRINGS), (MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK)] {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let Ok(msrs) = Msrs::from_entries(&[entry]) else { continue };
        let set = vcpu.set_msrs(&msrs).map_err(failed("set model-specific registers (KVM_SET_MSRS)"))?;
        if set == 0 {
            tracing::debug!(msr = index, "KVM does not know this MSR");
        }
    }
    Ok(())
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

fn set_segments(sregs: &mut kvm_sregs, code: kvm_segment) {
    sregs.cs = code;
    let data = segment(DATA, 0x3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 32-bit TSS, as VM entry demands.
    sregs.tr = kvm_segment { limit: 0x67, selector: TASK, type_: 0xb, present: 1, ..Default::default() };
}

fn protected_mode(sregs: &mut kvm_sregs) {
    set_segments(sregs, segment(CODE, 0xb, false));
    sregs.cr0 = CR0_PE | CR0_ET;
    (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
}

fn long_mode(sregs: &mut kvm_sregs) {
    set_segments(sregs, segment(CODE, 0xb, true));
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = layout::PAGE_TABLES.0;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// Maps the first 4 GiB one to one.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), vm_memory::GuestMemoryError> {
    let (pml4, pdpt) = (layout::PAGE_TABLES.0, layout::PAGE_TABLES.0 + PAGE);
    let directories = pdpt + PAGE;
    memory.write_obj(pdpt | PTE_TABLE, GuestAddress(pml4))?;
    for directory in 0..4 {
        let at = directories + directory * PAGE;
        memory.write_obj(at | PTE_TABLE, GuestAddress(pdpt + directory * 8))?;
        for page in 0..ENTRIES {
            let address = (directory * ENTRIES + page) << 21;
            memory.write_obj(address | PDE_2M, GuestAddress(at + page * 8))?;
        }
    }
    Ok(())
}

fn write_gdt(memory: &GuestMemoryMmap, sregs: &mut kvm_sregs) -> Result<(), vm_memory::GuestMemoryError> {
    let table = [0, 0, descriptor(&sregs.cs), descriptor(&sregs.ds), descriptor(&sregs.tr)];
    for (index, entry) in (0u64..).zip(table) {
        memory.write_obj(entry, GuestAddress(layout::GDT.0 + index * 8))?;
    }
    sregs.gdt.base = layout::GDT.0;
    // 5 entries of 8 bytes, less one.
    sregs.gdt.limit = 39;
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    Ok(())
}

/// A segment as the GDT holds it (Intel SDM, volume 3, section 3.4.5), base 0.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_ | segment.s << 4 | segment.dpl << 5 | segment.present << 7);
    let flags = u64::from(segment.avl | segment.l << 1 | segment.db << 2 | segment.g << 3);
    (limit & 0xffff) | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_boot_protocol() {
        assert_eq!(descriptor(&segment(CODE, 0xb, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(CODE, 0xb, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(DATA, 0x3, false)), 0x00cf_9300_0000_ffff);
    }
}
