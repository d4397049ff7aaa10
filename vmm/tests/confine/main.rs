//! The confinement of VM processes: each filter against its table, for every system call, what a running VM's process has, and hostile
//! threads.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../common/mod.rs"]
mod common;
mod hostile;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use umbra_vmm::base::rotating_file::{MAX_FILE, RotatingFile};
use umbra_vmm::base::system_calls;
use umbra_vmm::config::Console;
use umbra_vmm::vm::confine::tables::{Row, When};
use umbra_vmm::vm::confine::{self, Category, Mode, filter};
use umbra_vmm::wire::messages::{DiskBackend, ToVm};

// Decisions of the kernel (linux/seccomp.h); the lowest is the strictest.
const TRAP: u32 = 0x0003_0000;
const ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS as u32;
const LOG: u32 = 0x7ffc_0000;
const ALLOW: u32 = 0x7fff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;

/// `AUDIT_ARCH_X86_64`, and that of 32-bit programs.
const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;

/// A call as a filter sees it (`struct seccomp_data`).
struct Call {
    number: u32,
    arch: u32,
    arguments: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        let mut bytes = Vec::new();
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(self.arch.to_le_bytes());
        bytes.extend([0; 8]);
        self.arguments.iter().for_each(|argument| bytes.extend(argument.to_le_bytes()));
        let at = offset as usize;
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }
}

/// Runs a program of the classic packet filter, as far as seccomp has one.
fn run(program: &seccompiler::BpfProgram, call: &Call) -> u32 {
    let (mut at, mut a) = (0_usize, 0_u32);
    loop {
        let step = &program[at];
        at += 1;
        let jump = |taken: bool| usize::from(if taken { step.jt } else { step.jf });
        match step.code {
            0x20 => a = call.word(step.k),
            0x54 => a &= step.k,
            0x05 => at += step.k as usize,
            0x15 => at += jump(a == step.k),
            0x25 => at += jump(a > step.k),
            0x35 => at += jump(a >= step.k),
            0x45 => at += jump(a & step.k != 0),
            0x06 => return step.k,
            other => panic!("instruction {other:#x}"),
        }
    }
}

/// What the kernel makes of several filters.
fn decide(programs: &[seccompiler::BpfProgram], call: &Call) -> u32 {
    let decisions = programs.iter().map(|program| run(program, call));
    // As the kernel compares them: signed, so that KILL_PROCESS comes first.
    decisions.min_by_key(|decision| (decision & 0xffff_0000).cast_signed()).unwrap()
}

fn holds(when: &When, arguments: [u64; 6]) -> bool {
    let low = |n: u8| arguments[usize::from(n)] & 0xffff_ffff;
    match *when {
        When::Is(n, value, _) => low(n) == u64::from(value),
        When::Request(request, _) => low(1) & 0xffff == u64::from(request),
        When::Lacks(n, bits, _) => arguments[usize::from(n)] & bits == 0,
        When::Has(n, bits, _) => arguments[usize::from(n)] & bits == bits,
        When::ThisProcess(n) => low(n) == u64::from(std::process::id()),
    }
}

fn fits(row: &Row, call: i64, arguments: [u64; 6]) -> bool {
    row.call.0 == call && row.when.iter().all(|when| holds(when, arguments))
}

/// What the tables say of a call.
fn wanted(category: Category, call: i64, arguments: [u64; 6]) -> u32 {
    if category.refused().any(|row| fits(row, call, arguments)) {
        ENOSYS
    } else if category.rows().any(|row| fits(row, call, arguments)) {
        ALLOW
    } else {
        TRAP
    }
}

/// Arguments at and beside those that any table names for `call`.
fn tries(call: i64) -> Vec<[u64; 6]> {
    let mut tries = vec![[0; 6], [u64::MAX; 6], [1 << 32; 6]];
    let rows = Category::ALL.into_iter().flat_map(|category| category.rows().chain(category.refused()));
    for when in rows.filter(|row| row.call.0 == call).flat_map(|row| row.when) {
        let (n, values) = match *when {
            When::Is(n, value, _) => (n, [value.into(), u64::from(value) | 1 << 40]),
            When::Request(request, _) => (1, [request.into(), u64::from(request) | 0x4008_0000]),
            When::Lacks(n, bits, _) | When::Has(n, bits, _) => (n, [bits, !bits]),
            When::ThisProcess(n) => (n, [std::process::id().into(), 1]),
        };
        for value in values {
            for beside in [value, value.wrapping_add(1), value ^ 4] {
                let mut arguments = [0; 6];
                arguments[usize::from(n)] = beside;
                tries.push(arguments);
            }
        }
    }
    tries
}

#[test]
fn filters_decide_as_their_tables_say_for_every_call() {
    for category in Category::ALL {
        let on = filter::programs(category, Mode::On).unwrap();
        let log = filter::programs(category, Mode::Log).unwrap();
        assert!(filter::programs(category, Mode::Off).unwrap().is_empty());
        let mut allowed = 0;
        for number in 0..=system_calls::last() + 40 {
            for arguments in tries(number) {
                let call = |arch| Call { number: u32::try_from(number).unwrap(), arch, arguments };
                let (native, wanted) = (call(X86_64), wanted(category, number, arguments));
                let what = || format!("{category:?}: {} {arguments:x?}", system_calls::describe(number));
                assert_eq!(decide(&on, &native), wanted, "{}", what());
                let logged = if wanted == TRAP { LOG } else { ALLOW };
                assert_eq!(decide(&log, &native), logged, "{}", what());
                assert_eq!(decide(&on, &call(I386)), KILL_PROCESS, "{}", what());
                allowed += usize::from(wanted == ALLOW);
            }
            let x32 = Call { number: u32::try_from(number).unwrap() | 0x4000_0000, arch: X86_64, arguments: [0; 6] };
            assert_eq!(decide(&on, &x32), TRAP, "{category:?}: x32 {number}");
        }
        assert!(allowed > 50, "{category:?}: {allowed}");
    }
}

#[test]
fn no_table_has_what_leads_out_of_a_process() {
    let never = [
        "execve",
        "execveat",
        "fork",
        "vfork",
        "connect",
        "bind",
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "mount",
        "umount2",
        "pivot_root",
        "chroot",
        "setns",
        "unshare",
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "userfaultfd",
        "bpf",
        "perf_event_open",
        "keyctl",
        "add_key",
        "init_module",
        "finit_module",
        "kexec_load",
        "reboot",
        "kill",
        "tkill",
        "pidfd_open",
        "pidfd_getfd",
        "pidfd_send_signal",
        "open_by_handle_at",
        "setuid",
        "setresuid",
        "capset",
        "memfd_create",
        "memfd_secret",
        "rt_sigqueueinfo",
        "process_madvise",
        "chmod",
        "chown",
        "link",
        "symlink",
        "personality",
        "modify_ldt",
        "iopl",
        "ioperm",
        "shmat",
        "shmget",
        "msgget",
        "semget",
        "mq_open",
        "clone3",
        "socket",
        "open",
        "openat",
        "rename",
        "unlink",
        "mkdir",
    ];
    for category in Category::ALL {
        for row in category.rows() {
            let name = row.call.1.strip_prefix("SYS_").unwrap();
            assert!(!never.contains(&name), "{category:?} may {name}");
            assert!(!row.why.is_empty() && system_calls::name(row.call.0) == Some(name), "{category:?}: {name}");
        }
    }
}

/// Filters are inherited, and the kernel obeys all of them.
#[test]
fn what_starts_later_may_do_all_of_its_table() {
    for (starter, started) in [
        (Category::EventLoop, Category::Link),
        (Category::EventLoop, Category::Helper),
        (Category::Vcpu, Category::Helper),
    ] {
        for row in started.rows() {
            let same = |other: &Row| other.call == row.call && (other.when.is_empty() || other.when == row.when);
            assert!(starter.rows().any(same), "{started:?} may {row:?}, and {starter:?}, which starts it, may not");
        }
    }
}

#[test]
fn every_thread_of_a_running_vm_is_confined() {
    if !common::kvm() {
        return;
    }
    // `jmp $`
    let process = common::Process::start(&common::Code::new().out8(0x3F8, b'x').raw(&[0xEB, 0xFE]).0);
    process.wait_for("x");
    let pid = process.child.id();
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let task = task.unwrap().path();
        let status = fs::read_to_string(task.join("status")).unwrap();
        let of = |field: &str| {
            let line = status.lines().find(|line| line.split(':').next() == Some(field));
            line.map(|line| line.split(':').nth(1).unwrap().trim().to_owned()).unwrap_or_default()
        };
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(of(set), "0000000000000000", "{set}: {status}");
        }
        if let Some(user) = common::user() {
            assert_eq!(of("CapBnd"), "0000000000000000", "{status}");
            let four = |id: u32| [id; 4].map(|id| id.to_string()).join("\t");
            assert_eq!(
                (of("Uid"), of("Gid"), of("Groups")),
                (four(user.uid), four(user.gid), String::new()),
                "{status}"
            );
        }
        assert_eq!((of("NoNewPrivs").as_str(), of("Seccomp").as_str()), ("1", "2"), "{status}");
        names.push(of("Name"));
        if common::user().is_some() {
            // Outside, and inside, where it is the first.
            assert!(task.file_name().unwrap() != pid.to_string().as_str() || of("NSpid").ends_with("\t1"), "{status}");
            let link = |name: &str| fs::read_link(format!("{}/{name}", task.display())).unwrap();
            for namespace in ["ns/mnt", "ns/net", "ns/ipc", "ns/uts", "ns/pid"] {
                let ours = fs::read_link(format!("/proc/thread-self/{namespace}")).unwrap();
                assert_ne!(link(namespace), ours, "{}: {namespace}", of("Name"));
            }
            let root = fs::read_dir(task.join("root")).unwrap().map(|entry| entry.unwrap().file_name());
            assert_eq!(root.collect::<Vec<_>>(), ["proc"], "{}", of("Name"));
            let interfaces = fs::read_to_string(task.join("net/dev")).unwrap();
            assert!(interfaces.lines().skip(2).all(|line| line.trim().starts_with("lo:")), "{interfaces}");
            assert_eq!(link("cwd").to_str(), Some("/"), "{}", of("Name"));
        }
    }
    names.sort();
    assert!(["console", "log", "vcpu0"].iter().all(|name| names.iter().any(|known| known == name)), "{names:?}");
    assert_eq!(limits(pid, "Max core file size"), ["0", "0"]);
}

/// A limit of the process `pid`, and how far it may be raised.
fn limits(pid: u32, name: &str) -> [String; 2] {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    let mut words = line.split_whitespace().map(ToOwned::to_owned);
    [words.next().unwrap(), words.next().unwrap()]
}

#[test]
fn no_file_of_a_running_vm_can_be_larger_than_it_has_to_be() {
    if !common::kvm() {
        return;
    }
    let all = limits(std::process::id(), "Max file size")[1].clone();
    let (console, disk) = (MAX_FILE.to_string(), (8 << 20).to_string());
    let cases = [
        (Console::Off, None, ["0".to_owned(), "0".to_owned()]),
        (Console::Terminal, None, ["0".to_owned(), "0".to_owned()]),
        (Console::Off, Some(true), ["0".to_owned(), "0".to_owned()]),
        (Console::File("console".into()), None, [console.clone(), console]),
        (Console::File("console".into()), Some(false), [if common::raises_limits() { disk } else { all.clone() }, all]),
    ];
    for (console, read_only, wanted) in cases {
        let files = common::Files::new(&common::elf(&common::Code::new().spin().0));
        let mut spec = files.spec();
        if !matches!(console, Console::File(_)) {
            spec.console = console.clone();
        }
        spec.disks.extend(read_only.map(|read_only| DiskBackend::File(files.disk(8 << 20, read_only))));
        let process = common::Process::with(files, spec);
        process.wait_running();
        assert_eq!(limits(process.child.id(), "Max file size"), wanted, "{console:?}, disk only read: {read_only:?}");
    }
}

/// Status of a child that has got to the end of its work.
const DONE: i32 = 42;

const GROWS: &str = "UMBRA_TEST_GROWS";

/// The child of the test below: what it may write to, the folder has.
#[test]
fn as_a_process_whose_files_are_limited() {
    let Ok(dir) = std::env::var(GROWS) else { return };
    let dir = std::path::Path::new(&dir);
    confine::begin(Mode::On, common::of_root()).unwrap();
    let mut console = RotatingFile::open(&dir.join("console")).unwrap();
    let disk = fs::File::create(dir.join("disk")).unwrap();
    let memory = fs::File::from(nix::sys::memfd::memfd_create("memory", nix::sys::memfd::MFdFlags::empty()).unwrap());
    disk.set_len(MAX_FILE).unwrap();
    memory.set_len(2 * MAX_FILE).unwrap();
    // SAFETY: ignoring a signal installs no handler.
    unsafe { nix::sys::signal::signal(nix::sys::signal::SIGXFSZ, nix::sys::signal::SigHandler::SigIgn) }.unwrap();
    confine::limit_files(MAX_FILE, true).unwrap();
    confine::lock_down().unwrap();
    // The console's file is full three times.
    for _ in 0..56 {
        console.write_all(&[b'x'; 256 << 10]).unwrap();
    }
    disk.write_all_at(b"the end", MAX_FILE - 7).unwrap();
    let too_large = |result: std::io::Result<()>| assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EFBIG));
    too_large(disk.write_all_at(b"beyond", MAX_FILE));
    too_large(disk.set_len(MAX_FILE + 1));
    let punch = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let discard = |file: &fs::File, at| nix::fcntl::fallocate(file, punch, at, 4096).map_err(std::io::Error::from);
    discard(&disk, 0).unwrap();
    // Memory that was there before is given back wherever it lies.
    discard(&memory, i64::try_from(MAX_FILE + 4096).unwrap()).unwrap();
    too_large(memory.set_len(3 * MAX_FILE));
    std::process::exit(DONE);
}

#[test]
fn a_limit_of_files_stops_what_would_make_one_larger_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "as_a_process_whose_files_are_limited", "--nocapture", "--test-threads=1"]);
    let output = command.env(GROWS, dir.path()).output().unwrap();
    let printed = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(DONE), "{:?} {printed}", output.status);
    assert_eq!(fs::metadata(dir.path().join("disk")).unwrap().len(), MAX_FILE);
}

#[test]
fn a_vm_that_is_another_user_s_still_ends_with_who_started_it() {
    if !common::kvm() {
        return;
    }
    // Root's is handed over; another user's is not, and ends all the same.
    let user = common::user().map(|user| format!("--user {user}")).unwrap_or_default();
    let files = common::Files::new(&common::elf(&common::Code::new().out8(0x3F8, b'x').raw(&[0xEB, 0xFE]).0));
    let mut command = Command::new("sh");
    command.args(["-c", &format!("\"$0\" vm --control 3 {user} & echo $!; wait"), env!("CARGO_BIN_EXE_umbra")]);
    command.stdout(Stdio::piped());
    // Not closed below: the process is not to learn of the end by that.
    let channel = common::channel_of(&mut command);
    let mut shell = command.spawn().unwrap();
    let mut pid = String::new();
    BufReader::new(shell.stdout.take().unwrap()).read_line(&mut pid).unwrap();
    let state = format!("/proc/{}/stat", pid.trim());
    channel.send(&ToVm::Start(Box::new(files.spec())), &[]).unwrap();
    let deadline = Instant::now() + common::PATIENCE;
    let until = |what, done: &dyn Fn() -> bool| {
        while !done() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    until("the VM does not run", &|| files.printed().contains('x'));
    shell.kill().unwrap();
    shell.wait().unwrap();
    // Who has ended and was not waited for is a zombie.
    until("it lives on", &|| fs::read_to_string(&state).map_or(true, |text| text.contains(") Z ")));
    drop(channel);
}
