//! What CPUID says to each vCPU: what KVM supports on this host, with the topology of this VM (one package,
//! a core per vCPU, one thread a core) in place of the host's.
//!
//! Invariant: no VM is offered virtualisation of its own or performance counters. KVM's emulation of both is large, reads what the
//! VM writes, and has let VMs out before; counters also tell of what else runs on the processor. KVM refuses the instructions
//! and MSRs of what CPUID does not name ([`super::kvm::create_vm`] switches those counters off which CPUID cannot hide).

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::kvm::Error;

/// Leaf 1, ECX: timer by TSC deadline.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: runs under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one logical processor.
const HTT: u32 = 1 << 28;
/// Leaf 1, EBX: cache line flush size, in units of 8 bytes.
const CLFLUSH_64: u32 = 8 << 8;
/// `cpuid.1:ecx` bit for x2APIC, which KVM always emulates.
const X2APIC: u32 = 1 << 21;
/// Leaf 1, ECX: VMX, and what goes with counters: debug store of 64 bits (DTES64), its filter (DS-CPL), their capabilities (PDCM).
const VMX_AND_COUNTERS_1_ECX: u32 = 1 << 5 | 1 << 2 | 1 << 4 | 1 << 15;
/// Leaf 1, EDX: debug store, into which counters write.
const DEBUG_STORE: u32 = 1 << 21;
/// Leaf 7, EDX: last branch records.
const LAST_BRANCHES: u32 = 1 << 19;
/// Leaf 7 subleaf 1, EAX: more about counters, in leaf 0x23.
const COUNTERS_EXTENDED: u32 = 1 << 8;
/// Leaf 0x8000_0001, ECX: SVM, and counters: sampling (IBS), of the core, of the northbridge, of the last level cache.
const SVM_AND_COUNTERS: u32 = 1 << 2 | 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28;
/// Physical address bits when a CPU does not say.
const DEFAULT_PHYS_BITS: u32 = 36;

/// The CPUID table that KVM supports on this host.
pub fn supported(kvm: &Kvm) -> Result<CpuId, Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::ioctl("read the supported CPUID (KVM_GET_SUPPORTED_CPUID)"))
}

/// Physical address bits of the guest (leaf 0x8000_0008).
pub fn physical_bits(table: &CpuId) -> u32 {
    let leaf = table.as_slice().iter().find(|e| e.function == 0x8000_0008);
    leaf.map_or(DEFAULT_PHYS_BITS, |e| e.eax & 0xff)
}

/// The table for vCPU `id` of `cpus`.
pub fn for_vcpu(kvm: &Kvm, supported: &CpuId, id: u8, cpus: u8) -> CpuId {
    let mut table = supported.clone();
    let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in table.as_mut_slice() {
        edit(entry, id, cpus, deadline_timer);
    }
    table
}

/// Bits of the APIC id that number the cores of the package.
fn core_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

fn edit(entry: &mut kvm_cpuid_entry2, id: u8, cpus: u8, deadline_timer: bool) {
    let (id, cpus_u32) = (u32::from(id), u32::from(cpus));
    match entry.function {
        1 => {
            entry.ebx = (entry.ebx & 0xff) | CLFLUSH_64 | (cpus_u32 << 16) | (id << 24);
            entry.ecx |= HYPERVISOR | X2APIC;
            set_bit(&mut entry.ecx, TSC_DEADLINE, deadline_timer);
            set_bit(&mut entry.edx, HTT, cpus > 1);
        }
        // Intel, deterministic caches: no sharing between cores but of the last level; cores in the package.
        4 if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { cpus_u32 - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (((1 << core_bits(cpus)) - 1) << 26);
        }
        0xb | 0x1f => topology(entry, id, cpus),
        // AMD: number of cores and the bits that number them.
        0x8000_0008 => entry.ecx = (core_bits(cpus) << 12) | (cpus_u32 - 1),
        // AMD, cache properties: as above.
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = (entry.eax >> 5) & 7;
            let sharing = if level >= 3 { cpus_u32 - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (sharing << 14);
        }
        // AMD: APIC id, core id with one thread a core, one node.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
    withhold(entry);
}

/// Clears what no VM is offered: VMX, SVM and performance counters.
fn withhold(entry: &mut kvm_cpuid_entry2) {
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ecx &= !VMX_AND_COUNTERS_1_ECX;
            entry.edx &= !DEBUG_STORE;
        }
        (7, 0) => entry.edx &= !LAST_BRANCHES,
        (7, 1) => entry.eax &= !COUNTERS_EXTENDED,
        (0x8000_0001, _) => entry.ecx &= !SVM_AND_COUNTERS,
        // Intel: counters, last branch records, more about counters. AMD: SVM, sampling, counters of the second version.
        (0xa | 0x1c | 0x23 | 0x8000_000a | 0x8000_001b | 0x8000_0022, _) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        _ => {}
    }
}

/// Extended topology: level 0 is the thread, level 1 the core.
fn topology(entry: &mut kvm_cpuid_entry2, id: u32, cpus: u8) {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    (entry.eax, entry.ebx, entry.ecx) = match entry.index {
        0 => (0, 1, THREAD),
        1 => (core_bits(cpus), u32::from(cpus), CORE | 1),
        n => (0, 0, n),
    };
    entry.edx = id;
}

fn set_bit(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edited(function: u32, index: u32, id: u8, cpus: u8) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 { function, index, ..Default::default() };
        edit(&mut entry, id, cpus, true);
        entry
    }

    #[test]
    fn every_vcpu_finds_its_own_apic_id() {
        let one = edited(1, 0, 5, 6);
        assert_eq!(one.ebx >> 24, 5);
        assert_eq!((one.ebx >> 16) & 0xff, 6);
        assert_ne!(one.ecx & HYPERVISOR, 0);
        assert_ne!(one.ecx & TSC_DEADLINE, 0);
        assert_eq!(edited(0xb, 0, 5, 6).edx, 5);
        assert_eq!(edited(0x8000_001e, 0, 5, 6).eax, 5);
    }

    #[test]
    fn no_vm_is_offered_virtualisation_or_performance_counters() {
        let shown = |function, index| {
            let all = u32::MAX;
            let mut entry =
                kvm_cpuid_entry2 { function, index, eax: all, ebx: all, ecx: all, edx: all, ..Default::default() };
            edit(&mut entry, 0, 1, true);
            [entry.eax, entry.ebx, entry.ecx, entry.edx]
        };
        let [.., ecx, edx] = shown(1, 0);
        assert_eq!((!ecx, edx & 1 << 21), (1 << 2 | 1 << 4 | 1 << 5 | 1 << 15, 0));
        assert_eq!(shown(7, 0).map(|register| !register), [0, 0, 0, 1 << 19]);
        assert_eq!(shown(7, 1).map(|register| !register), [1 << 8, 0, 0, 0]);
        assert_eq!(!shown(0x8000_0001, 0)[2], 1 << 2 | 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28);
        for leaf in [0xa, 0x1c, 0x23, 0x8000_000a, 0x8000_001b, 0x8000_0022] {
            assert_eq!(shown(leaf, 0), [0; 4], "{leaf:#x}");
        }
        assert_eq!(shown(0xd, 0), [u32::MAX; 4]);
    }

    #[test]
    fn topology_counts_cores_of_one_package() {
        assert_eq!(edited(0xb, 1, 0, 6).eax, 3);
        assert_eq!(edited(0xb, 1, 0, 6).ebx, 6);
        assert_eq!(edited(0xb, 1, 0, 1).eax, 0);
        assert_eq!(edited(0xb, 2, 0, 6).ebx, 0);
        assert_eq!(edited(0x8000_0008, 0, 0, 6).ecx, (3 << 12) | 5);
    }
}
