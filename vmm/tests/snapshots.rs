//! Snapshots against KVM: whole VM processes that are restored from a file.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Code, Files, Process, kvm};
use umbra_driver_vm::protocol::MemoryRange;
use umbra_vmm::wire::messages::{FromVm, SnapshotNews, SnapshotOf, ToVm, VmSpec};

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
    SnapshotOf { digest: digest.into(), useless: false, kernel: "6.12".into(), drivers: vec!["e1000e".into()] }
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
    vm.send(&ToVm::Snapshot { unused: Vec::new() });
    let SnapshotNews::Taken(bytes) = news(&vm) else { panic!("not taken") };
    assert!(bytes < 1 << 20, "only what the guest has touched: {bytes}");
    // It goes on afterwards, where it stood.
    wait_for_bytes(&vm, 16);
    let all = counts(&console(&vm)[2..]);
    assert!(all.windows(2).all(|pair| pair[1] == pair[0] + 4096), "{all:?}");
    vm.kill();
    (dir, kernel, count)
}

/// What the VM's process has of the VM's memory, in KiB.
fn resident_kib(vm: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", vm.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Backs all of the VM's memory, as a boot may: writes to each of its pages through the process's own file.
fn fill(vm: &Process, size: u64) {
    use std::os::unix::fs::FileExt;
    let files = fs::read_dir(format!("/proc/{}/fd", vm.child.id())).unwrap().flatten();
    let is_memory = |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("memfd:umbra-"));
    let path = files.map(|entry| entry.path()).find(is_memory).unwrap();
    let memory = fs::File::options().write(true).open(path).unwrap();
    for page in (12 << 20..size).step_by(4096) {
        memory.write_all_at(b"old", page).unwrap();
    }
}

#[test]
fn memory_that_was_given_up_is_nobody_s_any_more() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    fs::write(&kernel, common::elf(&counter())).unwrap();
    let cache = dir.path().join("cache");
    let (size, given) = (64 << 20, MemoryRange { start: 12 << 20, length: 48 << 20 });
    let mut vm = start(&cache, &kernel, |spec| spec.memory.0 = size);
    assert_eq!(news(&vm), SnapshotNews::Missing);
    vm.wait_for("up");
    fill(&vm, size);
    // A lie costs nothing but what it would have spared.
    vm.send(&ToVm::Snapshot { unused: vec![MemoryRange { length: 1 << 40, ..given }] });
    let SnapshotNews::Taken(all) = news(&vm) else { panic!("not taken") };
    assert!(all > 48 << 20, "{all}");
    vm.kill();

    fs::remove_file(only_file(&cache)).unwrap();
    let mut vm = start(&cache, &kernel, |spec| spec.memory.0 = size);
    assert_eq!(news(&vm), SnapshotNews::Missing);
    vm.wait_for("up");
    fill(&vm, size);
    wait_for_bytes(&vm, 16);
    let count = *counts(&console(&vm)[2..]).last().unwrap();
    vm.send(&ToVm::Snapshot { unused: vec![given] });
    let SnapshotNews::Taken(bytes) = news(&vm) else { panic!("not taken") };
    // What lies behind it is there still.
    assert!(((4 << 20)..(6 << 20)).contains(&bytes), "{bytes}");
    let resident = resident_kib(&vm);
    assert!(resident <= 16 << 10, "{resident} KiB in the life that was saved");
    vm.kill();

    let mut vm = start(&cache, &kernel, |spec| spec.memory.0 = size);
    assert_eq!(news(&vm), SnapshotNews::Restored);
    wait_for_bytes(&vm, 16);
    assert!(counts(&console(&vm))[0] >= count, "it goes on where it stood");
    let resident = resident_kib(&vm);
    assert!(resident <= 16 << 10, "{resident} KiB");
    vm.kill();
}

/// The snapshot in `cache`, which has no other file.
fn only_file(cache: &Path) -> PathBuf {
    fs::read_dir(cache).unwrap().next().unwrap().unwrap().path()
}

/// Changes a bit of the byte at `offset`.
fn damage(file: &Path, offset: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[offset] ^= 1;
    fs::write(file, bytes).unwrap();
}

/// The VM, which boots, leaves a snapshot in place of the one that it has refused, and others are restored from that.
fn replaces(mut vm: Process, cache: &Path, kernel: &Path) {
    vm.wait_for("up");
    vm.send(&ToVm::Snapshot { unused: Vec::new() });
    assert!(matches!(news(&vm), SnapshotNews::Taken(_)));
    vm.kill();
    let mut vm = start(cache, kernel, |_| {});
    assert_eq!(news(&vm), SnapshotNews::Restored);
    vm.kill();
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

#[test]
fn a_snapshot_whose_lives_do_not_live_is_not_used_and_is_replaced() {
    if !kvm() {
        return;
    }
    let (dir, kernel, _) = taken();
    let useless = |spec: &mut VmSpec| spec.snapshot_of = Some(SnapshotOf { useless: true, ..image("digest") });
    let vm = start(&dir.path().join("cache"), &kernel, useless);
    let SnapshotNews::Refused(why) = news(&vm) else { panic!("not refused") };
    assert!(why.contains("before they said hello"), "{why}");
    replaces(vm, &dir.path().join("cache"), &kernel);
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
    damage(&file, 20);
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
    let file = only_file(&cache);
    damage(&file, 4096);
    let vm = start(&cache, &kernel, only_saves);
    assert!(matches!(news(&vm), SnapshotNews::Refused(why) if why.contains("memory is damaged")));
    replaces(vm, &cache, &kernel);
}

#[test]
fn a_snapshot_that_cannot_be_used_costs_a_boot_and_says_why() {
    if !kvm() {
        return;
    }
    let (dir, kernel, _) = taken();
    let cache = dir.path().join("cache");
    // It gets its name from who looks next.
    umbra_snapshots(&cache, &[]);
    let file = only_file(&cache);
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
        vm.send(&ToVm::Snapshot { unused: Vec::new() });
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
    vm.send(&ToVm::Snapshot { unused: Vec::new() });
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
    let mut vm = start(&dir.path().join("cache"), &kernel, |_| {});
    assert_eq!(news(&vm), SnapshotNews::Missing);
    vm.wait_for("up");
    // While the process stands still, both arrive.
    let pid = nix::unistd::Pid::from_raw(vm.child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
    vm.send(&ToVm::Snapshot { unused: Vec::new() });
    vm.send(&ToVm::QueryStatus);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
    let SnapshotNews::NotTaken(said) = news(&vm) else { panic!("taken") };
    assert!(said.contains("more urgent"), "{said}");
    let cache = dir.path().join("cache");
    assert_eq!(fs::metadata(only_file(&cache)).unwrap().len(), 0, "nothing is left of it");
    wait_for_bytes(&vm, 16);
    vm.kill();
    let list = umbra_snapshots(&cache, &["--prune"]);
    assert_eq!((&list["removed"][0]["state"], fs::read_dir(&cache).unwrap().count()), (&"leftover".into(), 0));
}

/// The file is open before the VM runs, and no path leads to it by then; what meets somebody before it is saved is not saved any more.
#[test]
fn a_snapshot_needs_no_path_once_the_vm_runs_and_is_taken_of_none_that_has_met_somebody() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (kernel, cache) = (dir.path().join("kernel"), dir.path().join("cache"));
    fs::write(&kernel, common::elf(&counter())).unwrap();
    let mut vm = start(&cache, &kernel, |_| {});
    assert_eq!(news(&vm), SnapshotNews::Missing);
    vm.wait_for("up");
    let elsewhere = dir.path().join("elsewhere");
    fs::rename(&cache, &elsewhere).unwrap();
    vm.send(&ToVm::Snapshot { unused: Vec::new() });
    assert!(matches!(news(&vm), SnapshotNews::Taken(_)));
    let open = |vm: &Process| {
        let open = fs::read_dir(format!("/proc/{}/fd", vm.child.id())).unwrap().flatten();
        open.filter_map(|entry| fs::read_link(entry.path()).ok()).filter(|to| to.starts_with(dir.path())).count()
    };
    // Its console's files are in a folder of their own.
    assert_eq!(open(&vm), 0, "it could change what the next lives are restored from");
    vm.kill();
    let mut vm = start(&elsewhere, &kernel, |_| {});
    assert_eq!(news(&vm), SnapshotNews::Restored);
    vm.kill();

    let mut vm = start(&cache, &kernel, |_| {});
    assert_eq!(news(&vm), SnapshotNews::Missing);
    vm.wait_for("up");
    fs::remove_file(only_file(&cache)).unwrap();
    vm.send(&ToVm::Snapshot { unused: Vec::new() });
    assert!(matches!(news(&vm), SnapshotNews::NotTaken(why) if why.contains("removed")));
    vm.kill();

    let mut vm = start(&cache, &kernel, |_| {});
    assert_eq!(news(&vm), SnapshotNews::Missing);
    vm.wait_for("up");
    assert_eq!(open(&vm), 1);
    vm.send(&ToVm::Plug { device: "0000:00:00.0".into() });
    assert!(matches!(vm.next(), Some(FromVm::Failed { .. })), "there is no such function");
    vm.send(&ToVm::Snapshot { unused: Vec::new() });
    assert!(matches!(news(&vm), SnapshotNews::NotTaken(_)));
    assert_eq!(open(&vm), 0);
    vm.kill();
}

/// Where a guest finds its VM generation ID, and the registers of its event: status, enable.
const GENERATION_ID: u32 = 0xf_f000;
const EVENT_STATUS: u16 = 0x606;
const EVENT_ENABLE: u16 = 0x607;
/// The vector by which the guest takes the SCI.
const SCI_VECTOR: u8 = 0x50;

/// What the guest of [`generation_reader`] prints each turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Turn {
    /// Interrupts that said that there is another generation ID.
    events: u32,
    id: [u8; 16],
    tsc: u64,
}

impl Turn {
    const MARK: [u8; 4] = *b"GEN:";
    const LENGTH: usize = 32;

    /// The whole turns in what a guest has printed, which may begin and end in the middle of one.
    fn all(printed: &[u8]) -> Vec<Self> {
        let starts = printed.windows(4).enumerate().filter(|(_, mark)| *mark == Self::MARK);
        let whole = starts.filter_map(|(start, _)| printed.get(start..start + Self::LENGTH));
        let read = |turn: &[u8]| Self {
            events: u32::from_le_bytes(turn[4..8].try_into().unwrap()),
            id: turn[8..24].try_into().unwrap(),
            tsc: u64::from_le_bytes(turn[24..].try_into().unwrap()),
        };
        whole.map(read).collect()
    }
}

/// Listens for the event of another generation ID, and prints a [`Turn`] over and over. Interrupts are taken between two turns alone.
fn generation_reader() -> Vec<u8> {
    const HANDLER: u32 = 0x10_0200;
    const IDT: u32 = 0x10_1000;
    const TURN: u32 = 0x20_0000;
    // mov esp, 0x110000; mov edi, gate; mov dword [rdi], selector << 16 | offset[15:0]
    let mut code = Code::new().raw(&[0xbc, 0, 0, 0x11, 0, 0xbf]).raw(&(IDT + u32::from(SCI_VECTOR) * 16).to_le_bytes());
    code = code.raw(&[0xc7, 0x07]).raw(&(0x10 << 16 | (HANDLER & 0xffff)).to_le_bytes());
    // mov dword [rdi+4], offset[31:16] << 16 | present interrupt gate; lidt [pointer]
    code = code.raw(&[0xc7, 0x47, 4]).raw(&(HANDLER & 0xffff_0000 | 0x8e00).to_le_bytes());
    code = code.raw(&[0x0f, 0x01, 0x1c, 0x25]).raw(&(HANDLER + 0x80).to_le_bytes());
    // The PC's 8259 controllers, which have the SCI as well, are masked. Local APIC on: mov ebx, 0xfee000f0; mov dword [rbx], 0x1ff
    code = code.out8(0x21, 0xff).out8(0xa1, 0xff).raw(&[0xbb, 0xf0, 0, 0xe0, 0xfe, 0xc7, 0x03, 0xff, 0x01, 0, 0]);
    // I/O APIC pin 9, by level, to the first vCPU: mov ebx, 0xfec00000; then index and value of both halves
    code = code.raw(&[0xbb, 0, 0, 0xc0, 0xfe]);
    for (index, value) in [(0x22, 1 << 15 | u32::from(SCI_VECTOR)), (0x23, 0)] {
        code = code.raw(&[0xc7, 0x03, index, 0, 0, 0, 0xc7, 0x43, 0x10]).raw(&value.to_le_bytes());
    }
    // mov edi, turn; mov dword [rdi], mark; cld
    code = code
        .out8(EVENT_ENABLE, 1)
        .raw(&[0xbf])
        .raw(&TURN.to_le_bytes())
        .raw(&[0xc7, 0x07])
        .raw(&Turn::MARK)
        .raw(&[0xfc]);
    // loop: mov edx, enable; sti; in al, dx, which is an exit, behind which the interrupt is taken; nop; cli
    let start = code.0.len();
    code = code.raw(&[0xba]).raw(&u32::from(EVENT_ENABLE).to_le_bytes()).raw(&[0xfb, 0xec, 0x90, 0xfa]);
    // mov esi, generation id; mov edi, turn + 8; movsq; movsq; rdtsc; mov [rdi], eax; mov [rdi+4], edx
    code = code.raw(&[0xbe]).raw(&GENERATION_ID.to_le_bytes()).raw(&[0xbf]).raw(&(TURN + 8).to_le_bytes());
    code = code.raw(&[0x48, 0xa5, 0x48, 0xa5, 0x0f, 0x31, 0x89, 0x07, 0x89, 0x57, 4]);
    // mov esi, turn; mov ecx, length; mov edx, 0x3f8; rep outsb; jmp loop
    code = code.raw(&[0xbe]).raw(&TURN.to_le_bytes()).raw(&[0xb9, 32, 0, 0, 0, 0xba, 0xf8, 3, 0, 0, 0xf3, 0x6e]);
    let back = i32::try_from(start).unwrap() - i32::try_from(code.0.len() + 5).unwrap();
    code = code.raw(&[0xe9]).raw(&back.to_le_bytes());
    code.0.resize(0x200, 0x90);
    // handler: mov edx, status; in al, dx; movzx eax, al; mov ebx, turn + 4; add [rbx], eax; acknowledge
    code = code.raw(&[0xba]).raw(&u32::from(EVENT_STATUS).to_le_bytes()).raw(&[0xec, 0x0f, 0xb6, 0xc0, 0xbb]);
    code = code.raw(&(TURN + 4).to_le_bytes()).raw(&[0x01, 0x03]).out8(EVENT_STATUS, 1);
    // EOI: mov ebx, 0xfee000b0; mov dword [rbx], 0; iretq
    code = code.raw(&[0xbb, 0xb0, 0, 0xe0, 0xfe, 0xc7, 0x03, 0, 0, 0, 0, 0x48, 0xcf]);
    code.0.resize(0x280, 0x90);
    // The table's limit and address.
    code.raw(&0xfffu16.to_le_bytes()).raw(&u64::from(IDT).to_le_bytes()).0
}

/// The turns of a VM, when it has printed at least 32 more.
fn turns(vm: &Process) -> Vec<Turn> {
    wait_for_bytes(vm, 33 * Turn::LENGTH);
    Turn::all(&console(vm))
}

#[test]
fn twins_have_different_generation_ids_and_one_event_each_and_their_time_goes_on() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (kernel, cache) = (dir.path().join("kernel"), dir.path().join("cache"));
    fs::write(&kernel, common::elf(&generation_reader())).unwrap();
    let mut first = start(&cache, &kernel, |_| {});
    assert_eq!(news(&first), SnapshotNews::Missing);
    let before = *turns(&first).last().unwrap();
    first.send(&ToVm::Snapshot { unused: Vec::new() });
    assert!(matches!(news(&first), SnapshotNews::Taken(_)));
    let own = turns(&first);
    assert!(own.iter().all(|turn| (turn.events, turn.id) == (0, before.id)), "{own:x?}");
    assert_ne!(before.id, [0; 16]);
    first.kill();

    // Both at once.
    let twins = [(); 2].map(|()| start(&cache, &kernel, |_| {}));
    let lives = twins.map(|mut vm| {
        assert_eq!(news(&vm), SnapshotNews::Restored);
        let turns = turns(&vm);
        vm.kill();
        turns
    });
    for turns in &lives {
        // The first may be the rest of one that was cut off by the snapshot.
        assert!(turns[1..].iter().all(|turn| (turn.events, turn.id) == (1, turns[1].id)), "{turns:x?}");
        assert!(turns[0].tsc > before.tsc && turns.windows(2).all(|pair| pair[0].tsc < pair[1].tsc), "{turns:x?}");
    }
    let ids = [before.id, lives[0][1].id, lives[1][1].id];
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[2] != ids[0], "{ids:x?}");
}
