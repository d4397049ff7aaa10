//! What each kind of thread of a VM's process may ask of the kernel while its guest runs, and why: the tables that the filters are made
//! from, and that `umbra confine --show` prints. To allow a call, add a row.
//!
//! A call that stands in no table of a thread ends the process; one of [`refused`] fails there with `ENOSYS`, because libraries make
//! it by themselves and do without it.

use libc::{SYS_brk, c_long};

use super::Category;

/// A system call, or a use of it.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its number, and the name of its constant (`SYS_read`).
    pub call: (c_long, &'static str),
    /// What its arguments must be, all of it.
    pub when: &'static [When],
    /// What needs it.
    pub why: &'static str,
}

/// A condition on an argument, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// It is this number of 32 bits.
    Is(u8, u32, &'static str),
    /// An ioctl with this type and number, the request's low 16 bits: its size and direction tell nothing apart here.
    Request(u16, &'static str),
    /// None of these bits is set.
    Lacks(u8, u64, &'static str),
    /// All of these bits are set.
    Has(u8, u64, &'static str),
    /// It is the number of this process.
    ThisProcess(u8),
}

use When::{Has, Is, Lacks, Request, ThisProcess};

/// Rows: `call [conditions]: "reason"`, conditions being optional.
macro_rules! rows {
    ($($call:ident $([$($when:expr),*])? : $why:literal)*) => {
        &[$(Row { call: (libc::$call, stringify!($call)), when: &[$($($when),*)?], why: $why }),*]
    };
}

/// `PROT_EXEC`, as an argument.
const EXEC: u64 = 4;
/// `AT_EMPTY_PATH`: it is about the descriptor, not about a path.
const EMPTY_PATH: u64 = 0x1000;
/// What glibc starts a thread with: `CLONE_VM | FS | FILES | SIGHAND | THREAD | SYSVSEM | SETTLS | PARENT_SETTID | CHILD_CLEARTID`.
const THREAD: u32 = 0x003d_0f00;

/// `RLIMIT_MEMLOCK`. That of files' sizes is not to be changed from inside.
const LOCKED_MEMORY: u32 = 8;

/// All threads.
const COMMON: &[Row] = rows![
    SYS_read: "eventfds, timers, sockets"
    SYS_write: "eventfds, log and console"
    SYS_readv: "sockets"
    SYS_writev: "sockets, log and console"
    SYS_close: "descriptors"
    SYS_futex: "locks and threads"
    SYS_clock_gettime: "time, where the host's clock source has no vDSO"
    SYS_gettimeofday: "time, where the host's clock source has no vDSO"
    SYS_clock_nanosleep: "rests"
    SYS_nanosleep: "rests"
    SYS_restart_syscall: "made by the kernel after SIGSTOP and SIGCONT"
    SYS_sched_yield: "locks"
    SYS_mmap [Lacks(2, EXEC, "PROT_EXEC")]: "memory of threads and of the allocator"
    SYS_mprotect [Lacks(2, EXEC, "PROT_EXEC")]: "guard pages and the allocator"
    SYS_munmap: "memory"
    SYS_mremap: "memory"
    SYS_brk: "memory"
    SYS_madvise: "the allocator gives memory back, also when a thread ends"
    SYS_rt_sigprocmask: "threads and their ends"
    SYS_rt_sigreturn: "the end of a signal's handler"
    SYS_rt_sigaction [Is(0, 11, "SIGSEGV")]: "Rust's runtime, when a fault is to end the process"
    SYS_rt_sigaction [Is(0, 7, "SIGBUS")]: "as SIGSEGV"
    SYS_rt_sigaction [Is(0, 6, "SIGABRT")]: "abort(3), where the first process of a PID namespace is not ended by the signal"
    SYS_sigaltstack: "Rust's runtime, at each thread's start and end"
    SYS_getrandom: "hash tables, the allocator"
    SYS_getpid: "signals to this process's threads"
    SYS_gettid: "signals to this process's threads"
    SYS_tgkill [ThisProcess(0)]: "kicks to vCPUs; the end after a panic"
    SYS_rseq: "glibc, at each thread's start"
    SYS_set_robust_list: "glibc, at each thread's start"
    SYS_prlimit64 [Is(0, 0, "this process"), Lacks(2, u64::MAX, "a new limit")]: "the C library, for the main thread's stack"
    SYS_sched_getaffinity: "the runtime, at a thread's start; how many processors there are"
    SYS_prctl [Is(0, 15, "PR_SET_NAME")]: "a thread's name"
    SYS_prctl [Is(0, 16, "PR_GET_NAME")]: "the name in the message about a refused call"
    SYS_clone [Is(0, THREAD, "a thread")]: "threads, which inherit these filters"
    SYS_seccomp [Is(0, 1, "SECCOMP_SET_MODE_FILTER")]: "a thread that starts narrows itself down"
    SYS_eventfd2: "events between threads"
    SYS_fcntl [Is(1, 0, "F_DUPFD")]: "descriptors"
    SYS_fcntl [Is(1, 1, "F_GETFD")]: "descriptors; builds with debug assertions check those that they close"
    SYS_fcntl [Is(1, 2, "F_SETFD")]: "descriptors"
    SYS_fcntl [Is(1, 3, "F_GETFL")]: "descriptors"
    SYS_fcntl [Is(1, 4, "F_SETFL")]: "descriptors"
    SYS_fcntl [Is(1, 1030, "F_DUPFD_CLOEXEC")]: "descriptors"
    SYS_dup: "descriptors"
    SYS_dup3: "descriptors"
    SYS_ioctl [Request(0x5421, "FIONBIO")]: "sockets that do not block"
    SYS_fstat: "what a descriptor is"
    SYS_newfstatat [Has(3, EMPTY_PATH, "AT_EMPTY_PATH")]: "what a descriptor is"
    SYS_statx [Has(2, EMPTY_PATH, "AT_EMPTY_PATH")]: "what a descriptor is"
    SYS_poll: "descriptors"
    SYS_ppoll: "descriptors"
    SYS_sendto [Lacks(4, u64::MAX, "an address")]: "the last word to the supervisor"
    SYS_sendmsg: "messages to the supervisor and to driver VMs' processes"
    SYS_shutdown: "sockets, before a thread closes them"
    SYS_exit: "a thread's end"
    SYS_exit_group: "the process's end"
];

/// Devices, whoever turns them: a vCPU by its access, or the event loop.
const DEVICES: &[Row] = rows![
    SYS_ioctl [Request(0xAE76, "KVM_IRQFD")]: "interrupts of queues that start and stop"
    SYS_ioctl [Request(0xAE79, "KVM_IOEVENTFD")]: "kicks of queues that start and stop"
    SYS_ioctl [Request(0xAE6A, "KVM_SET_GSI_ROUTING")]: "MSI-X tables"
    SYS_ioctl [Request(0xAE46, "KVM_SET_USER_MEMORY_REGION")]: "BARs that move"
    SYS_ioctl [Request(0xAE61, "KVM_IRQ_LINE")]: "lines"
    SYS_ioctl [Request(0xAEA5, "KVM_SIGNAL_MSI")]: "messages"
    SYS_ioctl [Request(0xAEE0, "KVM_CREATE_DEVICE")]: "KVM's VFIO device, when a function comes"
    SYS_ioctl [Request(0xAEE1, "KVM_SET_DEVICE_ATTR")]: "KVM learns of IOMMU groups"
    SYS_ioctl [Request(0xAE03, "KVM_CHECK_EXTENSION")]: "what KVM can do"
    SYS_ioctl [Request(0x3B64, "VFIO_GET_API_VERSION")]: "a function that comes"
    SYS_ioctl [Request(0x3B65, "VFIO_CHECK_EXTENSION")]: "a function that comes"
    SYS_ioctl [Request(0x3B67, "VFIO_GROUP_GET_STATUS")]: "a function that comes"
    SYS_ioctl [Request(0x3B6B, "VFIO_DEVICE_GET_INFO")]: "a function that comes"
    SYS_ioctl [Request(0x3B6C, "VFIO_DEVICE_GET_REGION_INFO")]: "a function that comes"
    SYS_ioctl [Request(0x3B6D, "VFIO_DEVICE_GET_IRQ_INFO")]: "a function that comes"
    SYS_ioctl [Request(0x3B6E, "VFIO_DEVICE_SET_IRQS")]: "interrupts of a function"
    SYS_ioctl [Request(0x3B6F, "VFIO_DEVICE_RESET")]: "the guest resets a function"
    SYS_ioctl [Request(0x3B71, "VFIO_IOMMU_MAP_DMA")]: "the guest's memory for a function"
    SYS_ioctl [Request(0x3B72, "VFIO_IOMMU_UNMAP_DMA")]: "the guest's memory for a function"
    SYS_ioctl [Request(0x54D0, "TUNSETOFFLOAD")]: "the guest's driver sets offloads"
    SYS_prlimit64 [Is(0, 0, "this process"), Is(1, LOCKED_MEMORY, "RLIMIT_MEMLOCK")]: "memory that is locked for a function"
    SYS_pread64: "registers of a function, sectors"
    SYS_pwrite64: "registers of a function, sectors"
    SYS_preadv: "sectors"
    SYS_pwritev: "sectors"
    SYS_timerfd_create: "timers"
    SYS_timerfd_settime: "timers"
    SYS_timerfd_gettime: "timers"
    SYS_epoll_ctl: "what the event loop waits for"
    SYS_fcntl [Is(1, 1034, "F_GET_SEALS")]: "links (threads that start here)"
    SYS_recvmsg: "links (threads that start here)"
    SYS_recvfrom: "sockets"
    SYS_fstatfs: "links (threads that start here)"
    SYS_readlink: "links (threads that start here): is a descriptor an eventfd?"
    SYS_ftruncate: "the console's file"
    SYS_fallocate: "disks; memory that the guest gives up"
    SYS_fsync: "disks"
    SYS_fdatasync: "disks"
    SYS_lseek: "files"
];

const VCPU: &[Row] = rows![
    SYS_ioctl [Request(0xAE80, "KVM_RUN")]: "runs the guest"
    SYS_ioctl [Request(0xAE81, "KVM_GET_REGS")]: "reports and snapshots"
    SYS_ioctl [Request(0xAE82, "KVM_SET_REGS")]: "umbra crash: a vCPU that is locked up"
    SYS_ioctl [Request(0xAE83, "KVM_GET_SREGS")]: "reports and snapshots"
    SYS_ioctl [Request(0xAE85, "KVM_TRANSLATE")]: "the code in a report"
    SYS_ioctl [Request(0xAE88, "KVM_GET_MSRS")]: "snapshots"
    SYS_ioctl [Request(0xAE8C, "KVM_GET_FPU")]: "snapshots"
    SYS_ioctl [Request(0xAE8E, "KVM_GET_LAPIC")]: "snapshots"
    SYS_ioctl [Request(0xAE91, "KVM_GET_CPUID2")]: "snapshots"
    SYS_ioctl [Request(0xAE98, "KVM_GET_MP_STATE")]: "snapshots, lock-ups"
    SYS_ioctl [Request(0xAE99, "KVM_SET_MP_STATE")]: "lock-ups"
    SYS_ioctl [Request(0xAE9F, "KVM_GET_VCPU_EVENTS")]: "snapshots, lock-ups"
    SYS_ioctl [Request(0xAEA0, "KVM_SET_VCPU_EVENTS")]: "lock-ups"
    SYS_ioctl [Request(0xAE9A, "KVM_NMI")]: "umbra nmi"
    SYS_ioctl [Request(0xAE9B, "KVM_SET_GUEST_DEBUG")]: "breakpoints where a driver VM's kernel begins to die"
    SYS_ioctl [Request(0xAEA1, "KVM_GET_DEBUGREGS")]: "snapshots"
    SYS_ioctl [Request(0xAEA3, "KVM_GET_TSC_KHZ")]: "snapshots"
    SYS_ioctl [Request(0xAEA4, "KVM_GET_XSAVE")]: "snapshots"
    SYS_ioctl [Request(0xAECF, "KVM_GET_XSAVE2")]: "snapshots"
    SYS_ioctl [Request(0xAEA6, "KVM_GET_XCRS")]: "snapshots"
    SYS_ioctl [Request(0xAEAD, "KVM_KVMCLOCK_CTRL")]: "the guest's watchdogs learn of a pause"
];

const EVENT_LOOP: &[Row] = rows![
    SYS_epoll_wait: "waits for events"
    SYS_epoll_pwait: "waits for events"
    SYS_accept4: "ports of the guest's console device"
    SYS_ioctl [Request(0xAE62, "KVM_GET_IRQCHIP")]: "snapshots"
    SYS_ioctl [Request(0xAE9F, "KVM_GET_PIT2")]: "snapshots"
    SYS_ioctl [Request(0xAE7C, "KVM_GET_CLOCK")]: "snapshots"
    SYS_ioctl [Request(0x5401, "TCGETS")]: "a console on the terminal"
    SYS_ioctl [Request(0x5402, "TCSETS")]: "a console on the terminal"
    SYS_ioctl [Request(0x5403, "TCSETSW")]: "a console on the terminal"
    SYS_ioctl [Request(0x5404, "TCSETSF")]: "a console on the terminal"
    SYS_ioctl [Request(0x542A, "TCGETS2")]: "a console on the terminal"
    SYS_ioctl [Request(0x542B, "TCSETS2")]: "a console on the terminal"
    SYS_ioctl [Request(0x542C, "TCSETSW2")]: "a console on the terminal"
    SYS_ioctl [Request(0x542D, "TCSETSF2")]: "a console on the terminal"
];

const DISK: &[Row] = rows![
    SYS_pread64: "reads"
    SYS_pwrite64: "writes"
    SYS_preadv: "reads"
    SYS_pwritev: "writes"
    SYS_fdatasync: "flushes"
    SYS_fsync: "flushes"
    SYS_fallocate: "discards and zeroes in a file"
    SYS_ftruncate: "umbra resize"
    SYS_lseek: "files, and how large they are"
    SYS_ioctl [Request(0x1277, "BLKDISCARD")]: "discards of a block device"
    SYS_ioctl [Request(0x127F, "BLKZEROOUT")]: "zeroes of a block device"
];

const LINK: &[Row] = rows![
    SYS_recvmsg: "requests of the driver VM's process, with descriptors"
    SYS_recvfrom: "requests of the driver VM's process"
    SYS_fcntl [Is(1, 1034, "F_GET_SEALS")]: "is its memory sealed?"
    SYS_fstatfs: "is its memory in RAM?"
    SYS_readlink: "is a descriptor an eventfd?"
    SYS_lseek: "how much memory there is"
];

const HELPER: &[Row] = rows![
    SYS_pread64: "the console's file, when it is full"
    SYS_pwrite64: "the console's file, when it is full"
    SYS_ftruncate: "the console's file, when it is full"
    SYS_lseek: "the console's file"
    SYS_ioctl [Request(0xAE76, "KVM_IRQFD")]: "the line of a virtio device, at its end"
];

/// Calls that fail with `ENOSYS`, and do no harm by that.
const REFUSED: &[Row] = rows![
    SYS_clone3: "its flags cannot be seen; glibc then takes clone"
    SYS_open: "the allocator looks at the host's settings, the runtime at the number of processors"
    SYS_openat: "as open"
    SYS_openat2: "as open"
    SYS_stat: "as open"
    SYS_lstat: "as open"
    SYS_newfstatat [Lacks(3, EMPTY_PATH, "AT_EMPTY_PATH")]: "as open"
    SYS_statx [Lacks(2, EMPTY_PATH, "AT_EMPTY_PATH")]: "as open"
    SYS_access: "as open"
    SYS_faccessat: "as open"
    SYS_faccessat2: "as open"
    SYS_readlink: "as open"
    SYS_readlinkat: "as open"
    SYS_getcwd: "a backtrace of a panic"
    SYS_socket: "the C library's look-ups"
    SYS_prctl [Is(0, 0x5356_4d41, "PR_SET_VMA")]: "the C library, which can name its memory"
    SYS_uname: "the C library"
    SYS_sysinfo: "the allocator"
    SYS_getuid: "the C library"
    SYS_geteuid: "the C library"
    SYS_membarrier: "locks, which do without it"
    SYS_futex_waitv: "locks, which do without it"
];

impl Category {
    /// What its threads may do.
    pub fn rows(self) -> impl Iterator<Item = &'static Row> {
        let own: &'static [&'static [Row]] = match self {
            // What is asked for most comes first.
            Self::Vcpu => &[VCPU, DEVICES],
            Self::EventLoop => &[EVENT_LOOP, DEVICES],
            Self::Disk => &[DISK],
            Self::Link => &[LINK],
            Self::Helper => &[HELPER],
        };
        own.iter().copied().chain([COMMON]).flatten()
    }

    /// What fails there in place of ending the process.
    pub fn refused(self) -> impl Iterator<Item = &'static Row> {
        let allowed = move |refused: &Row| {
            let free = |row: &Row| row.when.is_empty() || refused.when.is_empty();
            self.rows().any(|row| row.call.0 == refused.call.0 && free(row))
        };
        REFUSED.iter().filter(move |refused| !allowed(refused))
    }
}

const _: () = assert!(SYS_brk == 12, "the tables hold requests and flags of x86_64");
