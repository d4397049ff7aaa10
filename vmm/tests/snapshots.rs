//! Snapshots against KVM: the state of vCPUs and chips, and whole VM processes that are restored from a file.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Code, Files, Process, kvm};
use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use umbra_vmm::vm::machine::state::{ChipsState, MachineState, VcpuState, msr_indices};
use umbra_vmm::vm::machine::{cpuid, kvm as machine_kvm};
use umbra_vmm::wire::messages::{FromVm, SnapshotNews, SnapshotOf, ToVm, VmSpec};

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

/// Prints `up`, then counts in `ebx` and in memory, and prints the count each 4096 turns, in 4 bytes.
fn counter() -> Vec<u8> {
    // xor ebx, ebx; mov esi, 0x200000
    let code = Code::new().print("up").raw(&[0x31, 0xdb, 0xbe, 0, 0, 0x20, 0]);
    // loop: inc ebx; inc dword [rsi]; test ebx, 0xfff; jnz loop
    let code = code.raw(&[0xff, 0xc3, 0xff, 0x06, 0xf7, 0xc3, 0xff, 0x0f, 0, 0, 0x75, 0xf4]);
    // mov eax, [rsi]; print; jmp loop
    let start = code.0.len() - 12;
    let code = code.raw(&[0x8b, 0x06]).print_eax();
    let back = i32::try_from(start).unwrap() - i32::try_from(code.0.len() + 5).unwrap();
    code.raw(&[0xe9]).raw(&back.to_le_bytes()).0
}

fn counts(printed: &[u8]) -> Vec<u32> {
    printed.chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn console(vm: &Process) -> Vec<u8> {
    fs::read(vm.files.console()).unwrap_or_default()
}

/// Waits until the VM has printed as much more.
fn wait_for_bytes(vm: &Process, more: usize) {
    let (before, deadline) = (console(vm).len(), Instant::now() + Duration::from_secs(30));
    while console(vm).len() < before + more {
        assert!(Instant::now() < deadline, "the guest prints nothing more");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn news(vm: &Process) -> SnapshotNews {
    match vm.next() {
        Some(FromVm::Snapshot { news }) => news,
        other => panic!("expected news of a snapshot, not {other:?}"),
    }
}

fn image(digest: &str) -> SnapshotOf {
    SnapshotOf { digest: digest.into(), kernel: "6.12".into(), drivers: vec!["e1000e".into()] }
}

/// A counting guest with 2 vCPUs, with its snapshot in `folder` and its kernel at `kernel`.
fn start(folder: &Path, kernel: &Path, edit: impl FnOnce(&mut VmSpec)) -> Process {
    let files = Files::new(b"");
    let mut spec = files.spec();
    (spec.cpus, spec.kernel, spec.snapshot_of) = (2, kernel.into(), Some(image("digest")));
    edit(&mut spec);
    Process::with_snapshots(files, spec, Some(folder))
}

/// A folder with a snapshot of a counting guest, and the count when it was taken, at the least.
fn taken() -> (tempfile::TempDir, PathBuf, u32) {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    fs::write(&kernel, common::elf(&counter())).unwrap();
    let mut vm = start(&dir.path().join("cache"), &kernel, |_| {});
    assert_eq!(news(&vm), SnapshotNews::Missing);
    vm.wait_for("up");
    wait_for_bytes(&vm, 16);
    let count = *counts(&console(&vm)[2..]).last().unwrap();
    vm.send(&ToVm::Snapshot);
    let SnapshotNews::Taken(bytes) = news(&vm) else { panic!("not taken") };
    assert!(bytes < 1 << 20, "only what the guest has touched: {bytes}");
    // It goes on afterwards, where it stood.
    wait_for_bytes(&vm, 16);
    let all = counts(&console(&vm)[2..]);
    assert!(all.windows(2).all(|pair| pair[1] == pair[0] + 4096), "{all:?}");
    vm.kill();
    (dir, kernel, count)
}

#[test]
fn a_guest_goes_on_in_another_process_and_so_does_its_twin() {
    if !kvm() {
        return;
    }
    let (dir, kernel, count) = taken();
    // The kernel is not read any more.
    fs::write(&kernel, "nothing").unwrap();
    for _ in 0..2 {
        let mut vm = start(&dir.path().join("cache"), &kernel, |_| {});
        assert_eq!(news(&vm), SnapshotNews::Restored);
        wait_for_bytes(&vm, 64);
        let printed = console(&vm);
        // The first may have been cut off by the snapshot, within its four bytes.
        let goes_on = (0..4).any(|cut| {
            let all = counts(&printed[cut..]);
            all[0] > count && all[0].is_multiple_of(4096) && all.windows(2).all(|pair| pair[1] == pair[0] + 4096)
        });
        assert!(goes_on, "{count}: {printed:x?}");
        vm.kill();
    }
}

/// `umbra snapshots` with `words`, as JSON.
fn umbra_snapshots(cache: &Path, words: &[&str]) -> serde_json::Value {
    let mut umbra = Command::new(env!("CARGO_BIN_EXE_umbra"));
    umbra.args(["snapshots", "--json"]).args(words).env("UMBRA_SNAPSHOT_DIR", cache);
    let output = umbra.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_snapshot_is_listed_with_what_it_is_of_and_removed_when_it_is_of_no_use() {
    if !kvm() {
        return;
    }
    let (dir, kernel, _) = taken();
    let cache = dir.path().join("cache");
    let list = umbra_snapshots(&cache, &[]);
    let one = &list["snapshots"][0];
    assert_eq!((&one["state"], &one["cpus"], &one["drivers"][0]), (&"usable".into(), &2.into(), &"e1000e".into()));
    assert_eq!(one["image"], kernel.parent().unwrap().to_str().unwrap());
    let bytes = one["bytes"].as_u64().unwrap();
    assert!((4096..1 << 20).contains(&bytes) && list["bytes"] == bytes, "{list}");
    assert!(umbra_snapshots(&cache, &["--prune"])["removed"].as_array().unwrap().is_empty());
    let file = cache.join(one["file"].as_str().unwrap());
    let mut damaged = fs::read(&file).unwrap();
    damaged[20] ^= 1;
    fs::write(&file, damaged).unwrap();
    let list = umbra_snapshots(&cache, &["--prune"]);
    assert_eq!(
        (&list["removed"][0]["reason"], list["snapshots"].as_array().unwrap().len()),
        (&"its header is damaged".into(), 0)
    );
    let mut vm = start(&cache, &kernel, |_| {});
    assert_eq!(news(&vm), SnapshotNews::Missing);
    vm.kill();
}

/// A process that is started for its snapshot alone ends if there is one that is good for a VM of another name, and else leaves one.
#[test]
fn who_is_only_to_save_ends_where_that_is_done() {
    if !kvm() {
        return;
    }
    let (dir, kernel, _) = taken();
    let cache = dir.path().join("cache");
    let only_saves = |spec: &mut VmSpec| (spec.only_saves, spec.has_time, spec.name) = (true, true, "nic0.7".into());
    let mut vm = start(&cache, &kernel, only_saves);
    assert_eq!(news(&vm), SnapshotNews::There);
    assert!(vm.child.wait().unwrap().success());
    assert_eq!(console(&vm), b"", "it has not run");
    let file = fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
    let mut damaged = fs::read(&file).unwrap();
    damaged[4096] ^= 1;
    fs::write(&file, damaged).unwrap();
    let mut vm = start(&cache, &kernel, only_saves);
    assert!(matches!(news(&vm), SnapshotNews::Refused(why) if why.contains("memory is damaged")));
    vm.wait_for("up");
    vm.send(&ToVm::Snapshot);
    assert!(matches!(news(&vm), SnapshotNews::Taken(_)));
    vm.kill();
    let mut vm = start(&cache, &kernel, |_| {});
    assert_eq!(news(&vm), SnapshotNews::Restored);
    vm.kill();
}

#[test]
fn a_snapshot_that_cannot_be_used_costs_a_boot_and_says_why() {
    if !kvm() {
        return;
    }
    let (dir, kernel, _) = taken();
    let cache = dir.path().join("cache");
    let file = fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
    let whole = fs::read(&file).unwrap();
    let half = whole.len() / 2;
    let mut damaged = whole.clone();
    damaged[half] ^= 1;
    let mut version = whole.clone();
    version[8] = 99;
    let cases: [(&[u8], &str); 4] = [
        (&whole[..half], "bytes and should have"),
        (&damaged, "is damaged"),
        (&version, "format 99"),
        (b"", "no snapshot"),
    ];
    for (content, why) in cases {
        fs::write(&file, content).unwrap();
        let mut vm = start(&cache, &kernel, |_| {});
        let SnapshotNews::Refused(said) = news(&vm) else { panic!("not refused: {why}") };
        assert!(said.contains(why), "{said}");
        vm.wait_for("up");
        wait_for_bytes(&vm, 16);
        assert_eq!(counts(&console(&vm)[2..])[0], 4096, "as after power-on");
        // It is replaced by a better one.
        vm.send(&ToVm::Snapshot);
        assert!(matches!(news(&vm), SnapshotNews::Taken(_)));
        vm.kill();
        let mut vm = start(&cache, &kernel, |_| {});
        assert_eq!(news(&vm), SnapshotNews::Restored);
        vm.kill();
    }
}

#[test]
fn another_vm_has_another_snapshot() {
    if !kvm() {
        return;
    }
    let (dir, kernel, _) = taken();
    let edits: [fn(&mut VmSpec); 4] = [
        |spec| spec.cpus = 1,
        |spec| spec.memory.0 += 4096,
        |spec| spec.cmdline = "other".into(),
        |spec| spec.snapshot_of = Some(image("other digest")),
    ];
    for edit in edits {
        let mut vm = start(&dir.path().join("cache"), &kernel, edit);
        assert_eq!(news(&vm), SnapshotNews::Missing);
        vm.kill();
    }
}

#[test]
fn a_folder_that_others_may_write_to_is_not_used() {
    if !kvm() {
        return;
    }
    use std::os::unix::fs::PermissionsExt;
    let (dir, kernel, _) = taken();
    let cache = dir.path().join("cache");
    fs::set_permissions(&cache, fs::Permissions::from_mode(0o777)).unwrap();
    let mut vm = start(&cache, &kernel, |_| {});
    let SnapshotNews::Refused(said) = news(&vm) else { panic!("not refused") };
    assert!(said.contains("others may write to it"), "{said}");
    vm.wait_for("up");
    vm.send(&ToVm::Snapshot);
    let SnapshotNews::NotTaken(said) = news(&vm) else { panic!("taken") };
    assert!(said.contains("others may write to it"), "{said}");
    vm.kill();
    // One that would boot for nothing does not.
    let mut vm = start(&cache, &kernel, |spec| spec.only_saves = true);
    let SnapshotNews::NotTaken(said) = news(&vm) else { panic!("it boots") };
    assert!(said.contains("others may write to it"), "{said}");
    assert!(vm.child.wait().unwrap().success());
}

#[test]
fn what_is_more_urgent_ends_a_snapshot() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    fs::write(&kernel, common::elf(&counter())).unwrap();
    let mut vm = start(dir.path(), &kernel, |_| {});
    assert_eq!(news(&vm), SnapshotNews::Missing);
    vm.wait_for("up");
    // While the process stands still, both arrive.
    let pid = nix::unistd::Pid::from_raw(vm.child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    vm.send(&ToVm::Snapshot);
    vm.send(&ToVm::QueryStatus);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    let SnapshotNews::NotTaken(said) = news(&vm) else { panic!("taken") };
    assert!(said.contains("more urgent"), "{said}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left of it");
    wait_for_bytes(&vm, 16);
    vm.kill();
}
