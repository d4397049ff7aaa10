//! The VM process against KVM, with guests of a few instructions: what they print, how they end, and what the
//! supervisor hears of it.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{Code, Files, Process, kvm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use umbra_shadow::DeviceId;
use umbra_vmm::base::pid_namespace::PidNamespaces;
use umbra_vmm::base::proc_stat::ProcStat;
use umbra_vmm::base::vm_users::VmUsers;
use umbra_vmm::config::{Confine, Console};
use umbra_vmm::wire::channel::Incoming;
use umbra_vmm::wire::messages::{DiskBackend, FromVm, ToVm, VmEnd, VmSpec};
use umbra_vmm::wire::spawn::{Program, Streams, VmProcess, let_files_grow};

const RESET_CONTROL: u16 = 0xcf9;
const PM1_ENABLE: u16 = 0x602;
const PM1_CONTROL: u16 = 0x604;
/// The interrupt flag in `rflags`, and the instruction that sets it.
const INTERRUPTS: u32 = 1 << 9;
const STI: u8 = 0xfb;
/// Reads the serial line's status: mov edx, 0x3fd; in al, dx
const POLL: &[u8] = &[0xba, 0xfd, 3, 0, 0, 0xec];
const SOFT_OFF: u16 = 5 << 10 | 1 << 13;

#[test]
fn a_guest_prints_and_resets() {
    if !kvm() {
        return;
    }
    let mut vm = Process::start(&Code::new().print("hello").out8(RESET_CONTROL, 6).spin().0);
    assert_eq!(vm.end().0, VmEnd::Reset);
    assert_eq!(vm.files.printed(), "hello");
}

#[test]
fn the_keyboard_controller_resets() {
    if !kvm() {
        return;
    }
    let mut vm = Process::start(&Code::new().out8(0x64, 0xfe).spin().0);
    assert_eq!(vm.end().0, VmEnd::Reset);
}

#[test]
fn a_guest_powers_off() {
    if !kvm() {
        return;
    }
    let mut vm = Process::start(&Code::new().out16(PM1_CONTROL, SOFT_OFF).spin().0);
    assert_eq!(vm.end().0, VmEnd::PowerOff);
}

#[test]
fn the_power_button_is_seen() {
    if !kvm() {
        return;
    }
    // Enables the button, waits for its status bit, powers off.
    let wait = [0xba, 0x00, 0x06, 0, 0, 0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf9];
    let code = Code::new().out16(PM1_ENABLE, 0x100).print("ready").raw(&wait).out16(PM1_CONTROL, SOFT_OFF).spin();
    let mut vm = Process::start(&code.0);
    vm.wait_for("ready");
    vm.send(&ToVm::PowerButton);
    assert_eq!(vm.end().0, VmEnd::PowerOff);
}

#[test]
fn a_triple_fault_is_reported_with_registers() {
    if !kvm() {
        return;
    }
    // mov ebx, 0x1234567; ud2: there is no interrupt table to handle it.
    let mut vm = Process::start(&Code::new().raw(&[0xbb, 0x67, 0x45, 0x23, 0x01, 0x0f, 0x0b]).0);
    let (how, registers) = vm.end();
    assert_eq!(how, VmEnd::TripleFault);
    assert!(registers.contains("rip 0000000000100005"), "{registers}");
    assert!(registers.contains("rbx 0000000001234567"), "{registers}");
    assert!(registers.contains("code 0f 0b"), "{registers}");
}

#[test]
fn a_panic_is_heard_while_the_guest_runs_on() {
    if !kvm() {
        return;
    }
    let mut vm = Process::start(&Code::new().out8(0x505, 1).print("still here").spin().0);
    assert!(matches!(vm.next(), Some(FromVm::Panicked { .. })));
    vm.wait_for("still here");
    vm.kill();
}

#[test]
fn a_panic_is_heard_before_the_kernel_has_said_a_word_of_it() {
    if !kvm() {
        return;
    }
    // As above, waits for the power button.
    let wait = [0xba, 0x00, 0x06, 0, 0, 0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf9];
    let before = Code::new().out16(PM1_ENABLE, 0x100).print("ready").raw(&wait);
    let dies_at = common::ENTRY + before.0.len() as u64;
    let mut vm = Process::start(&before.print("last words").out8(0x505, 1).spin().0);
    vm.wait_for("ready");
    // The second is not come by.
    vm.send(&ToVm::WatchForPanic { entries: vec![dies_at, common::ENTRY] });
    vm.send(&ToVm::PowerButton);
    assert!(matches!(vm.next(), Some(FromVm::Panicking { .. })));
    // It stands still until then, or for a moment, which a slow machine lets pass.
    vm.send(&ToVm::Release);
    let heard = [vm.next(), vm.next()];
    assert!(heard.iter().any(|message| matches!(message, Some(FromVm::Released { .. }))), "{heard:?}");
    assert!(heard.iter().any(|message| matches!(message, Some(FromVm::Panicked { .. }))), "it goes on: {heard:?}");
    vm.wait_for("readylast words");
    vm.kill();
}

#[test]
fn the_host_bridge_is_found_both_ways() {
    if !kvm() {
        return;
    }
    // mov eax, [0xe0000000] by way of rbx; and through ports 0xCF8 and 0xCFC.
    let ecam = [0xbb, 0, 0, 0, 0xe0, 0x8b, 0x03];
    let code = Code::new().raw(&ecam).print_eax();
    let code = code.out32(0xcf8, 0x8000_0000).raw(&[0xba, 0xfc, 0x0c, 0, 0, 0xed]).print_eax();
    let mut vm = Process::start(&code.out8(RESET_CONTROL, 6).spin().0);
    assert_eq!(vm.end().0, VmEnd::Reset);
    assert_eq!(std::fs::read(vm.files.console()).unwrap(), b"\x36\x1b\x08\x00\x36\x1b\x08\x00");
}

#[test]
fn a_guest_finds_no_virtualisation_and_no_performance_counters() {
    if !kvm() {
        return;
    }
    // mov eax, leaf; xor ecx, ecx; cpuid; mov eax, ecx
    let ecx_of = |code: Code, leaf: u32| {
        code.raw(&[0xb8]).raw(&leaf.to_le_bytes()).raw(&[0x31, 0xc9, 0x0f, 0xa2, 0x89, 0xc8]).print_eax()
    };
    let code = ecx_of(ecx_of(Code::new(), 1), 0x8000_0001);
    let mut vm = Process::start(&code.out8(RESET_CONTROL, 6).spin().0);
    assert_eq!(vm.end().0, VmEnd::Reset);
    let printed = std::fs::read(vm.files.console()).unwrap();
    let [features, extended] = *printed.as_chunks::<4>().0 else { panic!("{printed:x?}") };
    let bits = |register: [u8; 4], bits: &[u32]| -> Vec<u32> {
        bits.iter().map(|bit| u32::from_le_bytes(register) >> bit & 1).collect()
    };
    assert_eq!(bits(features, &[31, 5, 15]), [1, 0, 0], "hypervisor, VMX, PDCM");
    assert_eq!(bits(extended, &[2, 10, 23, 24, 28]), [0; 5], "SVM, sampling, counters");
}

#[test]
fn a_string_of_port_writes_arrives_whole() {
    if !kvm() {
        return;
    }
    // mov esi, text; mov ecx, 3; mov edx, 0x3f8; cld; rep outsb
    let text = u32::try_from(common::ENTRY).unwrap() + 0x40;
    let mut code = Code::new().raw(&[0xbe]).raw(&text.to_le_bytes());
    code = code.raw(&[0xb9, 3, 0, 0, 0, 0xba, 0xf8, 0x03, 0, 0, 0xfc, 0xf3, 0x6e]).out8(RESET_CONTROL, 6).spin();
    code.0.resize(0x40, 0x90);
    let mut vm = Process::start(&code.raw(b"abc").0);
    assert_eq!(vm.end().0, VmEnd::Reset);
    assert_eq!(vm.files.printed(), "abc");
}

/// A guest whose bytes to the serial line KVM collects.
fn that_polls(code: &[u8]) -> Process {
    let files = Files::new(&common::elf(code));
    let spec = VmSpec { polls_console: true, ..files.spec() };
    Process::with(files, spec)
}

#[test]
fn bytes_that_are_collected_keep_their_place_among_other_accesses() {
    if !kvm() {
        return;
    }
    // The second byte for port 0x3f8 is half of the divisor. Then many times what the ring holds: mov esi, text; mov ecx, 1000;
    // mov edx, 0x3f8; cld; rep outsb
    let text = u32::try_from(common::ENTRY).unwrap() + 0x80;
    let code = Code::new().print("a").out8(0x3fb, 0x80).out8(0x3f8, 1).out8(0x3fb, 3).print("b");
    let code = code.raw(&[0xbe]).raw(&text.to_le_bytes());
    let mut code =
        code.raw(&[0xb9, 0xe8, 3, 0, 0, 0xba, 0xf8, 3, 0, 0, 0xfc, 0xf3, 0x6e]).out8(RESET_CONTROL, 6).spin();
    code.0.resize(0x80, 0x90);
    let text: String = (b'!'..=b'~').map(char::from).cycle().take(1000).collect();
    let mut vm = that_polls(&code.raw(text.as_bytes()).0);
    assert_eq!(vm.end().0, VmEnd::Reset);
    assert_eq!(vm.files.printed(), format!("ab{text}"));
}

#[test]
fn bytes_that_are_collected_make_no_exit_and_are_there_when_the_guest_is_stopped() {
    if !kvm() {
        return;
    }
    let mut vm = that_polls(&Code::new().print("it runs").raw(POLL).print("the last words").spin().0);
    vm.wait_for("it runs");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(vm.files.printed(), "it runs", "nothing has made it exit since");
    vm.send(&ToVm::LockUp);
    vm.wait_for("it runsthe last words");
    vm.kill();
}

#[test]
fn a_guest_that_spins_is_stopped_with_its_supervisor() {
    if !kvm() {
        return;
    }
    let mut vm = Process::start(&Code::new().print("up").spin().0);
    vm.wait_for("up");
    vm.channel = None;
    assert!(vm.wait().success());
}

#[test]
fn a_guest_that_is_locked_up_spins_with_interrupts_off_and_can_be_killed() {
    if !kvm() {
        return;
    }
    // One prints without end, one is halted (a guest's second vCPU never starts).
    for (code, again) in [
        (Code::new().raw(&[STI]).print("up").print(".").raw(&[0xeb, 0xf6]), true),
        (Code::new().raw(&[STI]).print("up").raw(&[0xf4]), false),
    ] {
        let mut vm = Process::start(&code.0);
        vm.wait_for(if again { "up....." } else { "up" });
        vm.send(&ToVm::LockUp);
        let quiet = || {
            let before = vm.files.printed().len();
            std::thread::sleep(Duration::from_millis(100));
            vm.files.printed().len() == before
        };
        assert!((0..50).any(|_| quiet()), "it prints on");
        let registers = vm.kill();
        assert!(registers.contains("code eb fe"), "{registers}");
        let flags = registers.split("rflags ").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap();
        assert_eq!(u32::from_str_radix(flags, 16).unwrap() & INTERRUPTS, 0, "{registers}");
    }
}

#[test]
fn a_non_maskable_interrupt_comes_through_where_interrupts_are_off() {
    if !kvm() {
        return;
    }
    // There is no interrupt table: what gets through is the end.
    for code in [Code::new().print("up").spin(), Code::new().print("up").raw(&[0xf4])] {
        let mut vm = Process::start(&code.0);
        vm.wait_for("up");
        vm.send(&ToVm::Nmi);
        assert_eq!(vm.end().0, VmEnd::TripleFault);
    }
}

#[test]
fn a_guest_s_console_is_seen_and_typed_at_through_its_socket() {
    if !kvm() {
        return;
    }
    let files = Files::new(&common::elf(&common::echo_plus_one().0));
    let socket = files.dir.path().join("console.sock");
    let spec = VmSpec { console_socket: Some(socket.clone()), console: Console::Off, ..files.spec() };
    let mut vm = Process::with(files, spec);
    let deadline = Instant::now() + common::PATIENCE;
    let mut console = loop {
        match UnixStream::connect(&socket) {
            Ok(console) => break console,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    console.set_read_timeout(Some(common::PATIENCE)).unwrap();
    console.write_all(&[b'a'; 300]).unwrap();
    let mut seen = [0; 301];
    console.read_exact(&mut seen).unwrap();
    assert_eq!((seen[0], &seen[1..]), (b'>', &[b'b'; 300][..]));
    vm.kill();
}

#[test]
fn all_vcpus_of_a_guest_stop() {
    if !kvm() {
        return;
    }
    let files = Files::new(&common::elf(&Code::new().print("up").spin().0));
    let mut spec = files.spec();
    spec.cpus = 4;
    let mut vm = Process::with(files, spec);
    vm.wait_for("up");
    let registers = vm.kill();
    assert!((0..4).all(|id| registers.contains(&format!("vcpu{id}: stopped"))), "{registers}");
}

#[test]
fn what_is_no_kernel_is_told_to_the_supervisor() {
    if !kvm() {
        return;
    }
    let failed = |files: Files, change: fn(&Files, &mut VmSpec)| {
        let mut spec = files.spec();
        change(&files, &mut spec);
        let mut vm = Process::with(files, spec);
        let Some(FromVm::Failed { what, configuration }) = vm.next() else { panic!("expected a failure") };
        vm.wait();
        (what, configuration)
    };
    let (what, configuration) = failed(Files::new(b"not a kernel"), |_, _| ());
    assert!(what.ends_with("is no Linux kernel (neither bzImage nor ELF vmlinux)") && configuration, "{what}");
    let kernel = || Files::new(&common::elf(&Code::new().spin().0));
    let (what, configuration) = failed(kernel(), |_, spec| spec.initrd = vec!["/nowhere/initrd".into()]);
    assert!(what.contains("/nowhere/initrd") && !configuration, "it may come: {what}");
    let (what, configuration) = failed(kernel(), |files, spec| {
        spec.disks = vec![DiskBackend::File(files.disk(0, true))];
    });
    assert!(what.contains("it is empty") && configuration, "{what}");
}

#[test]
fn the_file_of_a_disk_grows_as_far_as_the_supervisor_lets_it() {
    if !kvm() {
        return;
    }
    const MIB: u64 = 1 << 20;
    let files = Files::new(&common::elf(&Code::new().print("x").spin().0));
    let spec = VmSpec { disks: vec![DiskBackend::File(files.disk(8 * MIB, false))], ..files.spec() };
    let disk = files.dir.path().join("disk");
    // Its user is who may raise its limits, whatever else that one may not.
    let mut vm = Process::of(None, files, spec, None);
    vm.wait_for("x");
    let resize = || {
        vm.send(&ToVm::Resize { device: DeviceId::block(0), bytes: Some(16 * MIB) });
        match vm.next() {
            Some(FromVm::Resized { result, .. }) => result,
            other => panic!("{other:?}"),
        }
    };
    let size = || std::fs::metadata(&disk).unwrap().len();
    let refused = resize().unwrap_err();
    assert!(refused.contains("make its file larger: File too large"), "{refused}");
    assert_eq!(size(), 8 * MIB);
    let_files_grow(vm.child.id(), 16 * MIB).unwrap();
    assert_eq!((resize(), size()), (Ok(16 * MIB), 16 * MIB));
    vm.kill();
}

/// What the threads of process `pid` have in a line of their status, each thread's four numbers.
fn numbers(pid: u32, line: &str) -> Vec<Vec<u32>> {
    let of = |task: std::io::Result<std::fs::DirEntry>| {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let numbers = status.lines().find_map(|text| text.strip_prefix(line)).unwrap();
        numbers.split_whitespace().map(|number| number.parse().unwrap()).collect()
    };
    std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(of).collect()
}

/// A VM of `program` whose guest runs for good, and the files that it needs.
fn running(program: &Program) -> (VmProcess, Files) {
    let files = Files::new(&common::elf(&Code::new().spin().0));
    let process = VmProcess::spawn(program, files.spec(), (&[], &[]), (Streams::Quiet, None)).unwrap();
    await_that("the VM runs", || {
        matches!(process.channel().try_receive().unwrap(), Incoming::Message(FromVm::Running { .. }, _))
    });
    (process, files)
}

fn await_that(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + common::PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_process_that_is_stopped_is_not_asked_for_its_device() {
    if !kvm() {
        return;
    }
    let path = env!("CARGO_BIN_EXE_umbra").into();
    let program =
        Program { path, confine: Confine::Off, users: None, namespaces: false, pid_namespaces: None, cgroups: None };
    let (process, _files) = running(&program);
    let pid = Pid::from_raw(process.pid().cast_signed());
    let stat = || ProcStat::read(format!("/proc/{pid}")).unwrap();
    kill(pid, Signal::SIGSTOP).unwrap();
    await_that("it is stopped", || stat().is_stopped());
    assert!(!process.ask_to_release());
    kill(pid, Signal::SIGCONT).unwrap();
    await_that("it goes on", || !stat().is_stopped());
    assert!(process.ask_to_release());
    await_that("it answers", || {
        matches!(process.channel().try_receive().unwrap(), Incoming::Message(FromVm::Released { .. }, _))
    });
}

#[test]
fn each_vm_that_root_starts_is_another_user_s_until_its_end() {
    if !kvm() || common::user().is_none() {
        return;
    }
    let host = tempfile::tempdir().unwrap();
    std::fs::create_dir(host.path().join("etc")).unwrap();
    let range = "umbra-vm:64900:2\n";
    for (file, text) in [("passwd", "umbra-vm:x:64987:64986::/:/bin/false\n"), ("subuid", range), ("subgid", range)] {
        std::fs::write(host.path().join("etc").join(file), text).unwrap();
    }
    let users = VmUsers::find(host.path());
    let path = env!("CARGO_BIN_EXE_umbra").into();
    let pid_namespaces = PidNamespaces::find().ok();
    let program = Program { path, confine: Confine::On, users, namespaces: true, pid_namespaces, cgroups: None };
    let start = || running(&program);
    let mut vms = [start(), start(), start()];
    for ((process, _), (uid, gid)) in vms.iter().zip([(64_900, 64_900), (64_901, 64_901), (64_987, 64_986)]) {
        let (uids, gids) = (numbers(process.pid(), "Uid:"), numbers(process.pid(), "Gid:"));
        assert!(process.uid() == Some(uid) && uids.len() > 2, "{:?} {uids:?}", process.uid());
        assert!(uids.iter().all(|uids| *uids == [uid; 4]) && gids.iter().all(|gids| *gids == [gid; 4]), "{gids:?}");
        let open = std::fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap();
        let mut open = open.map(|entry| std::fs::read_link(entry.unwrap().path()).unwrap());
        let lock = host.path().join(format!("run/umbra-users/{uid}"));
        assert_eq!(open.any(|path| path == lock), uid == gid, "it keeps a number that is its own");
    }
    vms[0].0.kill();
    await_that("it ends", || vms[0].0.ended().is_some());
    assert_eq!(start().0.uid(), Some(64_987), "nobody has closed what keeps the number");
    drop(vms);
    assert_eq!(start().0.uid(), Some(64_900));
}
