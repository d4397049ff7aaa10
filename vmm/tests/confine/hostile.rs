//! A hostile thread of each kind under the real lock-down, which tries what a program that was taken over would.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime};

use umbra_splitter::threads::{self, Purpose};
use umbra_vmm::vm::confine::{self, Category, Mode, trap};
use umbra_vmm::wire::channel::{Channel, Incoming};
use umbra_vmm::wire::messages::FromVm;
use umbra_vmm::wire::spawn::CONFINED;

use crate::common;

/// How an attempt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ends {
    /// The process does.
    TheProcess,
    /// With this error.
    With(i32),
}

/// The process that has started the hostile one; its own view of that is 0.
fn parent() -> i64 {
    std::env::var(PARENT).map_or(0, |pid| pid.parse().unwrap())
}

/// Attempts by name, each a call with its arguments, and how they end.
fn attempts() -> Vec<(&'static str, [i64; 7], Ends)> {
    let parent = parent();
    let text = |text: &str| CString::new(text).unwrap().into_raw() as i64;
    let path = text("/etc/passwd");
    let room = Box::leak(Box::new([0_u64; 64])).as_mut_ptr() as i64;
    let open = Ends::With(libc::ENOSYS);
    let end = Ends::TheProcess;
    vec![
        ("execve", [libc::SYS_execve, text("/bin/true"), 0, 0, 0, 0, 0], end),
        ("fork", [libc::SYS_fork, 0, 0, 0, 0, 0, 0], end),
        ("clone of a process", [libc::SYS_clone, i64::from(libc::SIGCHLD), 0, 0, 0, 0, 0], end),
        ("clone of a namespace", [libc::SYS_clone, i64::from(libc::CLONE_NEWUSER), 0, 0, 0, 0, 0], end),
        ("clone3", [libc::SYS_clone3, room, 88, 0, 0, 0, 0], Ends::With(libc::ENOSYS)),
        ("socket", [libc::SYS_socket, 2, 1, 0, 0, 0, 0], Ends::With(libc::ENOSYS)),
        ("connect", [libc::SYS_connect, 0, room, 110, 0, 0, 0], end),
        ("open", [libc::SYS_openat, -100, path, 0, 0, 0, 0], open),
        ("open to write", [libc::SYS_openat, -100, text("/etc/umbra-hostile"), 0o101, 0o600, 0, 0], open),
        ("open of a process's memory", [libc::SYS_openat, -100, text("/proc/1/mem"), 2, 0, 0, 0], open),
        ("ptrace", [libc::SYS_ptrace, 16, parent, 0, 0, 0, 0], end),
        ("process_vm_readv", [libc::SYS_process_vm_readv, parent, room, 1, room, 1, 0], end),
        ("kill of init", [libc::SYS_kill, 1, 0, 0, 0, 0, 0], end),
        ("tgkill of another process", [libc::SYS_tgkill, parent, parent, 0, 0, 0, 0], end),
        ("mount", [libc::SYS_mount, path, path, 0, 4096, 0, 0], end),
        ("setns", [libc::SYS_setns, 0, 0, 0, 0, 0, 0], end),
        ("unshare", [libc::SYS_unshare, i64::from(libc::CLONE_NEWUSER), 0, 0, 0, 0, 0], end),
        ("bpf", [libc::SYS_bpf, 0, room, 64, 0, 0, 0], end),
        ("io_uring_setup", [libc::SYS_io_uring_setup, 1, room, 0, 0, 0, 0], end),
        ("userfaultfd", [libc::SYS_userfaultfd, 0, 0, 0, 0, 0, 0], end),
        ("keyctl", [libc::SYS_keyctl, 0, 0, 0, 0, 0, 0], end),
        ("mmap of code", [libc::SYS_mmap, 0, 4096, 7, 0x22, -1, 0], end),
        ("mprotect of code", [libc::SYS_mprotect, room & !4095, 4096, 7, 0, 0, 0], end),
        ("TIOCSTI", [libc::SYS_ioctl, 0, 0x5412, room, 0, 0, 0], end),
        ("KVM_CREATE_VM", [libc::SYS_ioctl, 0, 0xAE01, 0, 0, 0, 0], end),
        ("VFIO_GROUP_GET_DEVICE_FD", [libc::SYS_ioctl, 0, 0x3B6A, room, 0, 0, 0], end),
        ("pidfd_open", [libc::SYS_pidfd_open, parent, 0, 0, 0, 0, 0], end),
        ("pidfd_getfd", [libc::SYS_pidfd_getfd, 0, 0, 0, 0, 0, 0], end),
        ("memfd_create", [libc::SYS_memfd_create, path, 0, 0, 0, 0, 0], end),
        ("another limit of files", [libc::SYS_prlimit64, 0, i64::from(libc::RLIMIT_FSIZE), room, 0, 0, 0], end),
        ("another process's limits", [libc::SYS_prlimit64, parent, 8, 0, room, 0, 0], end),
        ("pivot_root", [libc::SYS_pivot_root, path, path, 0, 0, 0, 0], end),
        ("rt_sigaction", [libc::SYS_rt_sigaction, 31, 0, 0, 8, 0, 0], end),
        ("setuid", [libc::SYS_setuid, 0, 0, 0, 0, 0, 0], end),
        ("capset", [libc::SYS_capset, room, room, 0, 0, 0, 0], end),
        ("PR_SET_DUMPABLE", [libc::SYS_prctl, 4, 1, 0, 0, 0, 0], end),
        ("open_by_handle_at", [libc::SYS_open_by_handle_at, 0, room, 0, 0, 0, 0], end),
        ("sendto an address", [libc::SYS_sendto, 2, room, 1, 0, room, 16], end),
    ]
}

/// Status of a child whose attempt has ended with `error`, 0 being none.
fn status_of(error: i32) -> i32 {
    if error == 0 { 1 } else { 10 + error }
}

const CATEGORY: &str = "UMBRA_TEST_CATEGORY";
const ATTEMPT: &str = "UMBRA_TEST_ATTEMPT";
const PARENT: &str = "UMBRA_TEST_PARENT";

/// The child of the test below: confines a thread of the kind that the environment names, which makes an attempt.
#[test]
fn as_a_hostile_thread() {
    let (Ok(category), Ok(attempt)) = (std::env::var(CATEGORY), std::env::var(ATTEMPT)) else { return };
    let category = *Category::ALL.iter().find(|known| format!("{known:?}") == category).unwrap();
    let call = attempts().into_iter().find(|(name, ..)| *name == attempt).map(|(_, call, _)| call);
    // To see what the PID namespace does where no filter would be.
    let mode = if attempt == SIGHT { Mode::Log } else { Mode::On };
    confine::begin(mode, common::of_root()).unwrap();
    trap::tell(&3);
    let act = move || match call {
        Some([number, a, b, c, d, e, f]) => {
            // SAFETY: whatever it does to this process, there is nothing behind it but its end.
            unsafe {
                *libc::__errno_location() = 0;
                let done = libc::syscall(number, a, b, c, d, e, f);
                let error = if done < 0 { *libc::__errno_location() } else { 0 };
                libc::_exit(status_of(error))
            }
        }
        None if attempt == FAULT => {
            // SAFETY: it does harm to this process alone, whose end is wanted.
            unsafe { std::ptr::without_provenance_mut::<u8>(8).write_volatile(0) };
        }
        None if attempt == ABORT => std::process::abort(),
        None if attempt == SIGHT => {
            see_nobody();
            std::process::exit(DONE);
        }
        None => {
            everyday();
            std::process::exit(DONE);
        }
    };
    let purpose = match category {
        Category::EventLoop => {
            confine::lock_down().unwrap();
            return act();
        }
        Category::Vcpu => Purpose::Vcpu,
        Category::Disk => Purpose::Disk,
        Category::Link => Purpose::Link,
        Category::Helper => Purpose::Helper,
    };
    let _ = threads::spawn(purpose, "hostile", act).unwrap().join();
}

/// What a thread of any kind does by what libraries do for it: memory in all sizes, waiting, other threads, time, files that it may not
/// have, a panic with all that goes with one.
fn everyday() {
    let large: Vec<_> = (0..24).map(|power| vec![1_u8; 1 << power]).collect();
    let grown: Vec<u64> = (0..1 << 20).filter(|n| n % 3 == 0).collect();
    assert!(large.len() == 24 && grown.len() == 349_526);
    drop((large, grown));
    let state = Arc::new((Mutex::new(0), Condvar::new()));
    let threads = [(); 8].map(|()| {
        let state = Arc::clone(&state);
        threads::spawn(Purpose::Brief, "brief", move || {
            drop(vec![1_u8; 1 << 20]);
            *state.0.lock().unwrap() += 1;
            state.1.notify_all();
            std::thread::park_timeout(Duration::from_millis(1));
        })
        .unwrap()
    });
    let patience = Duration::from_secs(30);
    drop(state.1.wait_timeout_while(state.0.lock().unwrap(), patience, |done| *done < 8).unwrap());
    assert!(threads.into_iter().all(|thread| thread.join().is_ok()));
    std::thread::sleep(Duration::from_millis(1));
    std::thread::yield_now();
    let _ = (SystemTime::now(), Instant::now(), std::thread::available_parallelism(), std::env::current_dir());
    let _ = (fs::read("/proc/self/maps").is_err(), HashMap::<u8, u8>::new());
    let panicked = std::panic::catch_unwind(|| panic!("as a thread may"));
    assert!(panicked.is_err());
    // SAFETY: the call takes no pointers. `SIGCHLD` does nothing unless somebody wants it to.
    unsafe { libc::raise(libc::SIGCHLD) };
}

/// The kernel knows no other process by a number, whatever is asked, with the rights that a VM's process has while it is built.
fn see_nobody() {
    let (parent, room) = (parent(), Box::leak(Box::new([0_u64; 64])));
    // Where something would be read from and to (`struct iovec`).
    (room[0], room[1]) = (room.as_ptr() as u64, 8);
    let room = room.as_mut_ptr() as i64;
    let asked = [
        ("kill", [libc::SYS_kill, parent, 0, 0, 0, 0]),
        ("kill of all", [libc::SYS_kill, -1, 0, 0, 0, 0]),
        ("tgkill", [libc::SYS_tgkill, parent, parent, 0, 0, 0]),
        ("pidfd_open", [libc::SYS_pidfd_open, parent, 0, 0, 0, 0]),
        ("ptrace", [libc::SYS_ptrace, 0x4206, parent, 0, 0, 0]),
        ("process_vm_readv", [libc::SYS_process_vm_readv, parent, room, 1, room, 1]),
        ("prlimit64", [libc::SYS_prlimit64, parent, 7, 0, room, 0]),
        ("getpgid", [libc::SYS_getpgid, parent, 0, 0, 0, 0]),
        ("sched_getaffinity", [libc::SYS_sched_getaffinity, parent, 8, room, 0, 0]),
    ];
    for (name, [number, a, b, c, d, e]) in asked {
        // SAFETY: the calls ask, and write to `room` at most; the 6th argument is one of process_vm_readv alone.
        let done = unsafe { libc::syscall(number, a, b, c, d, e, 0_i64) };
        let error = std::io::Error::last_os_error();
        assert!(done == -1 && error.raw_os_error() == Some(libc::ESRCH), "{name} of {parent}: {done} {error}");
    }
    // SAFETY: the calls take no pointers.
    assert_eq!(unsafe { (libc::getpid(), libc::getppid()) }, (1, 0));
}

/// A write to no memory, an end by itself, a look at other processes, and a thread's usual work.
const FAULT: &str = "a fault";
const ABORT: &str = "an abort";
const SIGHT: &str = "a look";
const EVERYDAY: &str = "everyday";

/// Status of a child that has got to the end of its usual work.
const DONE: i32 = 42;

#[test]
fn a_thread_of_each_kind_may_do_what_libraries_do_by_themselves_and_dies_of_its_own_faults() {
    for category in Category::ALL {
        let (output, _channel) = attempt(category, EVERYDAY);
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(DONE), "{category:?}: {:?} {printed}", output.status);
        assert!(printed.contains("as a thread may") && printed.contains("stack backtrace"), "{category:?}: {printed}");
        let (output, _channel) = attempt(category, FAULT);
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{category:?}: {:?} {printed}", output.status);
        let (output, _channel) = attempt(category, ABORT);
        let printed = String::from_utf8_lossy(&output.stderr);
        // The first process of a PID namespace is not ended by the signal, but by what comes behind it.
        let ends = if common::user().is_some() { libc::SIGSEGV } else { libc::SIGABRT };
        assert_eq!(output.status.signal(), Some(ends), "{category:?}: {:?} {printed}", output.status);
    }
}

#[test]
fn a_thread_of_each_kind_sees_no_other_process() {
    if common::user().is_none() {
        return;
    }
    for category in Category::ALL {
        let (output, _channel) = attempt(category, SIGHT);
        let printed = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(DONE), "{category:?}: {:?} {printed}", output.status);
    }
}

fn attempt(category: Category, name: &str) -> (Output, Channel) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "hostile::as_a_hostile_thread", "--nocapture", "--test-threads=1"]);
    command.env(CATEGORY, format!("{category:?}")).env(ATTEMPT, name).env("RUST_BACKTRACE", "full");
    command.env(PARENT, std::process::id().to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let ours = common::channel_of(&mut command);
    (common::spawn(&mut command).wait_with_output().unwrap(), ours)
}

#[test]
fn a_hostile_thread_of_each_kind_finds_no_way_out() {
    for category in Category::ALL {
        for (name, call, ends) in attempts() {
            let (output, channel) = attempt(category, name);
            let printed = String::from_utf8_lossy(&output.stderr);
            let status = match ends {
                Ends::TheProcess => CONFINED,
                Ends::With(error) => status_of(error),
            };
            assert_eq!(output.status.code(), Some(status), "{category:?}: {name}: {:?} {printed}", output.status);
            if ends != Ends::TheProcess {
                continue;
            }
            let words = format!("made the system call {} (", call[0]);
            assert!(printed.contains(&words), "{category:?}: {name}: {printed}");
            let Ok(Incoming::Message(FromVm::Confined { call: told, thread }, _)) = channel.try_receive::<FromVm>()
            else {
                panic!("{category:?}: {name}: the supervisor was not told");
            };
            assert_eq!(told, call[0], "{category:?}: {name}");
            assert!(category == Category::EventLoop || thread == "hostile", "{category:?}: {name}: {thread}");
        }
    }
}
