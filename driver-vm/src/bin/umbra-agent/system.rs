//! What a first process does for its system: mounts, kernel settings, facts about the kernel, and its end.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use umbra_driver_vm::protocol::{ENTROPY_BYTES, Entropy};

use crate::kernel_log;

/// File system, place.
const MOUNTS: [(&str, &str); 3] = [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")];

/// Whatever goes wrong in the kernel ends this VM at once; the host starts the next one. And nothing of this system's
/// own may appear on the wire or towards the guest. A setting that the kernel does not have is passed over.
const SETTINGS: [(&str, &str); 13] = [
    ("kernel/panic", "-1"), // reboot at once
    ("kernel/panic_on_oops", "1"),
    ("kernel/softlockup_panic", "1"),
    // Of several CPUs one may be stuck while the others, and the agent on them, go on. The second needs counters that not every
    // host gives its VMs; the first needs nothing, and takes twice as long (21 s).
    ("kernel/panic_on_rcu_stall", "1"),
    ("kernel/hardlockup_panic", "1"),
    ("kernel/hung_task_panic", "1"),
    // Above what a slow firmware download in a probe takes, below the kernel's 120 s.
    ("kernel/hung_task_timeout_secs", "30"),
    ("kernel/panic_on_warn", "0"), // drivers warn and go on
    ("kernel/printk", kernel_log::CONSOLE_LEVEL),
    // The image has no modprobe: a driver that asks for a module while it probes need not wait for that to be found out.
    ("kernel/modprobe", "\n"),
    ("vm/panic_on_oom", "1"),
    ("net/ipv6/conf/all/disable_ipv6", "1"),
    ("net/ipv6/conf/default/disable_ipv6", "1"),
];

/// Mounts the kernel's file systems.
///
/// # Errors
/// When one cannot be mounted.
pub fn mount_all() -> anyhow::Result<()> {
    for (kind, place) in MOUNTS {
        let already = nix::errno::Errno::EBUSY; // devtmpfs with CONFIG_DEVTMPFS_MOUNT
        match mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>) {
            Ok(()) => {}
            Err(error) if error == already => {}
            Err(error) => return Err(error).with_context(|| format!("cannot mount {kind} at {place}")),
        }
    }
    Ok(())
}

/// Applies the kernel settings.
pub fn set_all() {
    for (name, value) in SETTINGS {
        let place = Path::new("/proc/sys").join(name);
        if place.exists()
            && let Err(error) = fs::write(&place, value)
        {
            kernel_log::error(&format!("cannot set {name} to {value}: {error}"));
        }
    }
}

/// Real-time priority of the main loop: its heartbeats show that the kernel lives, not how much there is to do, be it by the
/// network thread.
pub const BEAT_PRIORITY: i32 = 2;
/// Real-time priority of the network thread, and of the disk service until it serves: a recovery does not wait for ordinary threads.
pub const NETWORK_PRIORITY: i32 = 1;

/// Lets this thread, and none that it starts, go before ordinary ones, and before those of a lower real-time priority (1 to
/// 99). A kernel that refuses runs it as well, if later.
pub fn go_first(priority: i32) {
    if let Err(error) = schedule(libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, priority) {
        kernel_log::error(&format!("cannot go before other threads: {error}"));
    }
}

/// Lets this thread take its turn with ordinary ones: a thread that has work without end must not keep the kernel's from theirs.
pub fn go_with_others() {
    if let Err(error) = schedule(libc::SCHED_OTHER, 0) {
        kernel_log::error(&format!("cannot go with other threads: {error}"));
    }
}

/// Lets this thread go when nothing else has to. A kernel that refuses runs it as any other.
pub fn go_last() {
    let _ = schedule(libc::SCHED_IDLE, 0);
}

/// Gives this thread a scheduling policy and its priority (sched(7)).
fn schedule(policy: libc::c_int, priority: libc::c_int) -> std::io::Result<()> {
    let argument = libc::sched_param { sched_priority: priority };
    // SAFETY: the argument is a valid `sched_param` that outlives the call; 0 is the calling thread.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const argument) } == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error())
}

/// Adds random bytes of the host's to the kernel's generator, and has it draw from them at once: the next random number is another
/// one than that of a VM that was restored from the same snapshot. A kernel that refuses goes on with what it has.
pub fn add_entropy(entropy: &Entropy) {
    let added = File::options().write(true).open("/dev/urandom").and_then(|device| {
        let pool = RandPoolInfo::new(entropy);
        // SAFETY: the structure is the ioctl's, its length is in it, and it outlives the call.
        check(unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const pool) })?;
        // SAFETY: this one takes no argument.
        check(unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) })
    });
    if let Err(error) = added {
        kernel_log::error(&format!("cannot add entropy to the kernel's: {error}"));
    }
}

/// `_IOW('R', 0x03, int [2])` and `_IO('R', 0x07)` of `linux/random.h`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// `struct rand_pool_info` with its buffer.
#[repr(C)]
struct RandPoolInfo {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    buffer: [u8; ENTROPY_BYTES],
}

impl RandPoolInfo {
    fn new(Entropy(buffer): &Entropy) -> Self {
        let bytes = libc::c_int::try_from(ENTROPY_BYTES).unwrap_or(0);
        Self { entropy_bits: 8 * bytes, bytes, buffer: *buffer }
    }
}

fn check(result: libc::c_int) -> std::io::Result<()> {
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets the time of day to `unix_ns` nanoseconds since 1970.
pub fn set_clock(unix_ns: u64) {
    let set = clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(Duration::from_nanos(unix_ns)));
    if let Err(error) = set {
        kernel_log::error(&format!("cannot set the clock: {error}"));
    }
}

/// This VM's device comes later (`umbra.awaits` on the kernel command line).
pub fn awaits_device() -> bool {
    fs::read_to_string("/proc/cmdline").unwrap_or_default().split_whitespace().any(|word| word == "umbra.awaits")
}

/// The kernel's release.
pub fn release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

/// Milliseconds since the kernel started.
pub fn uptime_ms() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(|t| u64::try_from(t.tv_sec()).unwrap_or(0) * 1000 + u64::try_from(t.tv_nsec()).unwrap_or(0) / 1_000_000)
        .unwrap_or(0)
}

/// Memory that is available, in bytes.
pub fn available_memory() -> u64 {
    memory("MemAvailable:")
}

/// The value of a line of `/proc/meminfo`, in bytes.
pub fn memory(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Panics the kernel.
pub fn panic() -> ! {
    let _ = fs::write("/proc/sysrq-trigger", "c");
    // Without sysrq in the kernel: the end of the first process is a kernel panic as well.
    std::process::abort()
}

/// Stops answering, for good.
pub fn hang() -> ! {
    loop {
        nix::unistd::pause();
    }
}

/// Takes every CPU with a real-time task of the highest priority that never ends.
pub fn spin() -> ! {
    // By default the kernel keeps a twentieth of the time for the others.
    let _ = fs::write("/proc/sys/kernel/sched_rt_runtime_us", "-1");
    // From here on this thread is last to lose its CPU: it starts one for each of the others first.
    for _ in 1..std::thread::available_parallelism().map_or(1, usize::from) {
        std::thread::spawn(|| spin_here());
    }
    spin_here()
}

fn spin_here() -> ! {
    let _ = schedule(libc::SCHED_FIFO, 99);
    loop {
        std::hint::spin_loop();
    }
}

/// Takes memory until there is none left, which is a kernel panic here ([`SETTINGS`]).
pub fn take_all_memory() -> ! {
    const PIECE: usize = 1 << 20;
    loop {
        // Not zeroes: those would be pages that take no memory.
        std::mem::forget(vec![1u8; PIECE]);
    }
}

/// Resets the VM.
pub fn restart() -> ! {
    let Err(_) = reboot(RebootMode::RB_AUTOBOOT);
    std::process::abort()
}
