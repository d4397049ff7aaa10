//! The state of vCPUs and chips, taken of one VM and put into another, against KVM.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::kvm;
use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use umbra_vmm::vm::machine::state::{ChipsState, MachineState, VcpuState, msr_indices};
use umbra_vmm::vm::machine::{cpuid, kvm as machine_kvm};

/// Local APIC registers: spurious vector, timer, its divider, its initial and its current count.
const SPURIOUS: usize = 0xf0;
const TIMER: usize = 0x320;
const DIVIDER: usize = 0x3e0;
const INITIAL: usize = 0x380;
const CURRENT: usize = 0x390;
/// The timer's interrupt is masked; its vector.
const MASKED: u32 = 1 << 16 | 0x40;
/// The divider's register for no division; a tick is a nanosecond then (KVM).
const UNDIVIDED: u32 = 0b1011;

struct Machine {
    kvm: Kvm,
    vm: std::sync::Arc<VmFd>,
    vcpus: Vec<VcpuFd>,
}

impl Machine {
    fn new() -> Self {
        let kvm = machine_kvm::open().unwrap();
        let vm = machine_kvm::create_vm(&kvm, 2).unwrap();
        let supported = cpuid::supported(&kvm).unwrap();
        let create = |id: u8| {
            let vcpu = vm.create_vcpu(id.into()).unwrap();
            vcpu.set_cpuid2(&cpuid::for_vcpu(&kvm, &supported, id, 2)).unwrap();
            vcpu
        };
        let vcpus = (0..2).map(create).collect();
        Self { kvm, vm, vcpus }
    }

    fn take(&self) -> MachineState {
        let msrs = msr_indices(&self.kvm).unwrap();
        let vcpus = self.vcpus.iter().map(|vcpu| VcpuState::take(vcpu, &msrs).unwrap()).collect();
        MachineState { vcpus, chips: ChipsState::take(&self.vm).unwrap() }
    }

    fn tsc(&self, vcpu: usize) -> u64 {
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index: 0x10, ..Default::default() }]).unwrap();
        assert_eq!(self.vcpus[vcpu].get_msrs(&mut msrs).unwrap(), 1);
        msrs.as_slice()[0].data
    }

    /// A KVM in software may have nothing but the host's TSC.
    fn has_its_own_tsc(&self) -> bool {
        const FAR: u64 = 1 << 60;
        let entry = kvm_msr_entry { index: 0x10, data: FAR, ..Default::default() };
        self.vcpus[0].set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap();
        self.tsc(0) >= FAR
    }

    fn count(&self) -> u32 {
        register(&self.vcpus[0].get_lapic().unwrap(), CURRENT)
    }
}

fn register(lapic: &kvm_lapic_state, at: usize) -> u32 {
    u32::from_le_bytes([at, at + 1, at + 2, at + 3].map(|at| lapic.regs[at].cast_unsigned()))
}

fn set_register(lapic: &mut kvm_lapic_state, at: usize, value: u32) {
    for (place, byte) in lapic.regs[at..at + 4].iter_mut().zip(value.to_le_bytes()) {
        *place = byte.cast_signed();
    }
}

#[test]
fn registers_come_back_and_no_time_passes_in_between() {
    if !kvm() {
        return;
    }
    let before = Machine::new();
    let mut regs = before.vcpus[0].get_regs().unwrap();
    (regs.rax, regs.rip) = (0x1234_5678_9abc, 0x4242);
    before.vcpus[0].set_regs(&regs).unwrap();
    let mut lapic = before.vcpus[0].get_lapic().unwrap();
    for (at, value) in
        [(SPURIOUS, 0x1ff), (TIMER, MASKED), (DIVIDER, UNDIVIDED), (INITIAL, u32::MAX), (CURRENT, u32::MAX)]
    {
        set_register(&mut lapic, at, value);
    }
    before.vcpus[0].set_lapic(&lapic).unwrap();
    let mut pit = before.vm.get_pit2().unwrap();
    pit.channels[2].count = 0x1234;
    before.vm.set_pit2(&pit).unwrap();
    let state = serde_json::to_vec(&before.take()).unwrap();
    let (count, clock, tsc) = (before.count(), before.vm.get_clock().unwrap().clock, before.tsc(0));
    let khz = before.vcpus[0].get_tsc_khz().map_or(u64::MAX, u64::from);
    assert!(count > 0, "the timer runs");
    drop(before);
    // Long enough to be told from what the rest takes.
    std::thread::sleep(Duration::from_millis(500));

    let after = Machine::new();
    let state: MachineState = serde_json::from_slice(&state).unwrap();
    let begin = Instant::now();
    state.restore(&after.vm, &after.vcpus).unwrap();
    let (count_after, clock_after) = (after.count(), after.vm.get_clock().unwrap().clock);
    // In the order in which they were taken before.
    let tscs_after = [0, 1].map(|vcpu| after.tsc(vcpu));
    let passed = u64::try_from(begin.elapsed().as_nanos()).unwrap();
    let regs = after.vcpus[0].get_regs().unwrap();
    assert_eq!((regs.rax, regs.rip), (0x1234_5678_9abc, 0x4242));
    assert_eq!(after.vm.get_pit2().unwrap().channels[2].count, 0x1234);
    // A moment passed between the state and the figures to compare with.
    let moment = 100_000_000;
    let cycles = |ns: u64| (khz / 1000).saturating_mul(ns / 1000 + 1);
    for tsc_after in tscs_after.into_iter().filter(|_| Machine::new().has_its_own_tsc()) {
        let (early, late) = (tsc.saturating_sub(cycles(moment)), tsc.saturating_add(cycles(passed + moment)));
        assert!((early..=late).contains(&tsc_after), "{tsc} {tscs_after:?} {khz} {passed}");
    }
    let (count, count_after) = (u64::from(count), u64::from(count_after));
    assert!(count_after <= count + moment && count <= count_after + passed, "{count} {count_after} {passed}");
    assert!(clock_after + moment >= clock && clock_after <= clock + passed, "{clock} {clock_after} {passed}");
}

/// MSRs of memory types, which KVM does not list, and values of them: the first range and its mask, a fixed range, on with write-back.
const MEMORY_TYPES: [(u32, u64); 4] =
    [(0x200, 6), (0x201, 0xf_8000_0800), (0x250, 0x0606_0606_0606_0606), (0x2ff, 1 << 11 | 6)];

#[test]
fn memory_types_come_back() {
    if !kvm() {
        return;
    }
    let (before, after) = (Machine::new(), Machine::new());
    let read = |vcpu: &VcpuFd, index| {
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).unwrap();
        (vcpu.get_msrs(&mut msrs).unwrap() == 1).then(|| msrs.as_slice()[0].data)
    };
    let set = |vcpu: &VcpuFd, (index, data)| {
        vcpu.set_msrs(&Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]).unwrap()).unwrap()
    };
    // A KVM in software may have none.
    let kept: Vec<_> = MEMORY_TYPES.into_iter().filter(|msr| set(&before.vcpus[1], *msr) == 1).collect();
    println!("{} of {} MSRs are there", kept.len(), MEMORY_TYPES.len());
    before.take().restore(&after.vm, &after.vcpus).unwrap();
    for (index, value) in kept {
        assert_eq!(read(&after.vcpus[1], index), Some(value), "{index:#x}");
    }
}

#[test]
fn a_state_of_other_vcpus_is_refused() {
    if !kvm() {
        return;
    }
    let (before, after) = (Machine::new(), Machine::new());
    let mut state = before.take();
    state.vcpus.pop();
    let error = state.restore(&after.vm, &after.vcpus).unwrap_err();
    assert_eq!(error.to_string(), "the state has 1 vCPUs, the VM 2");
}
