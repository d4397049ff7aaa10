//! What a driver VM and its process print: the tail in memory for the crash report, everything in a file of bounded size.
//!
//! A full disk or a file that cannot be written costs the file's content and one warning, never more.

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::base::rotating_file::RotatingFile;

/// Bytes of the console that a crash report holds: a panic with the stacks of all CPUs fits in.
const TAIL: usize = 64 * 1024;

/// What a kernel says that cannot serve any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fatal {
    /// It panics.
    Panic,
    /// One of its CPUs is stuck: a soft or hard lock-up, or an RCU grace period that does not end.
    StuckCpu,
    /// It has switched an interrupt off for good, because it came 100,000 times and no driver knew of it
    /// (`kernel/irq/spurious.c`).
    DeadInterrupt,
}

impl Fatal {
    /// As a failure's reason.
    pub fn in_words(self) -> &'static str {
        match self {
            Self::Panic => "kernel panic",
            Self::StuckCpu => "a CPU of its kernel is stuck",
            Self::DeadInterrupt => "its kernel switched an interrupt off that nobody handled",
        }
    }

    /// Whether a panic is what comes of it.
    pub fn panics(self) -> bool {
        matches!(self, Self::Panic | Self::StuckCpu)
    }
}

/// How Linux begins to report such an end. Registers and stack follow a panic's first line, and pvpanic only behind that. A driver
/// VM's kernel is set to panic on every oops, lock-up and RCU stall: the beginning of one is as certain as the panic itself, and
/// thousands of characters earlier (the stacks of all CPUs). The words of lock-ups and stalls are those of `kernel/watchdog.c` and
/// `kernel/rcu/tree_stall.h`, without the prefixes that differ between kernels.
const SIGNS: [(&[u8], Fatal); 11] = [
    (b"Kernel panic - not syncing", Fatal::Panic),
    (b"BUG: unable to handle", Fatal::Panic),
    (b"BUG: kernel NULL pointer dereference", Fatal::Panic),
    (b"kernel BUG at ", Fatal::Panic),
    (b"Oops: ", Fatal::Panic),
    (b"BUG: soft lockup - CPU#", Fatal::StuckCpu),
    (b"Watchdog detected hard LOCKUP on cpu", Fatal::StuckCpu),
    (b" self-detected stall on CPU", Fatal::StuckCpu),
    (b" detected stalls on CPUs/tasks:", Fatal::StuckCpu),
    (b" detected expedited stalls on CPUs", Fatal::StuckCpu),
    (b": nobody cared (try booting with", Fatal::DeadInterrupt),
];

/// Length of the longest of these signs, in bytes.
const LONGEST_SIGN: usize = 36;

/// Most bytes read at a time; a VM that prints without end is read again at the next turn of the loop. A page, because a kernel that
/// panics is read some bytes at a time, and a larger buffer takes longer to clear than the bytes take to read.
const READ_AT_ONCE: usize = 4096;

/// The captured output of one driver VM, across its lives.
#[derive(Debug)]
pub struct Console {
    file: Option<(PathBuf, RotatingFile)>,
    /// Bytes captured so far.
    size: u64,
    tail: VecDeque<u8>,
    warned: Option<String>,
    fatal: Option<Fatal>,
}

impl Console {
    /// Captures into the file `path`.
    pub fn new(path: PathBuf) -> Self {
        Self { file: Some((path.clone(), RotatingFile::new(path))), ..Self::in_memory() }
    }

    /// Captures the tail alone.
    pub fn in_memory() -> Self {
        Self { file: None, size: 0, tail: VecDeque::new(), warned: None, fatal: None }
    }

    /// Begins a new life, of which `earlier` has captured what it printed so far.
    pub fn take_over(&mut self, title: &str, mut earlier: Self) {
        self.begin(title);
        self.take(earlier.tail.make_contiguous());
    }

    /// Begins a new life: the tail is emptied and the file gets a line that says `title`.
    pub fn begin(&mut self, title: &str) {
        self.tail.clear();
        self.fatal = None;
        self.write_file(format!("--- {title}\n").as_bytes());
    }

    /// A console in memory that goes on with the tail of this life, while this one captures the next.
    pub fn split_off(&mut self) -> Self {
        Self { tail: std::mem::take(&mut self.tail), fatal: self.fatal, ..Self::in_memory() }
    }

    /// What `other` has captured since it was split off goes into the file, behind a line that says `title`.
    pub fn append(&mut self, title: &str, other: &mut Self) {
        let new = usize::try_from(other.size).unwrap_or(usize::MAX).min(other.tail.len());
        let tail = other.tail.make_contiguous();
        self.write_file(format!("--- {title}\n").as_bytes());
        self.write_file(&tail[tail.len() - new..]);
    }

    /// Reads what is in `pipe`. Returns whether there may be more, now or later.
    pub fn read(&mut self, pipe: &OwnedFd) -> bool {
        let mut chunk = [0; READ_AT_ONCE];
        match nix::unistd::read(pipe, &mut chunk) {
            Ok(0) => false,
            Ok(n) => {
                self.take(&chunk[..n]);
                true
            }
            Err(Errno::EAGAIN | Errno::EINTR) => true,
            Err(_) => false,
        }
    }

    /// Reads all that is in `pipe`, whose writer is gone, up to twice the tail (a child of the writer may live on).
    pub fn drain(&mut self, pipe: &OwnedFd) {
        for _ in 0..2 * TAIL / READ_AT_ONCE + 16 {
            let before = self.size;
            if !self.read(pipe) || self.size == before {
                return;
            }
        }
    }

    /// The last [`TAIL`] bytes of this life, as text.
    pub fn tail(&self) -> String {
        let (a, b) = self.tail.as_slices();
        String::from_utf8_lossy(&[a, b].concat()).replace('\r', "")
    }

    /// The end that the kernel has begun to report on the console in this life, if any.
    pub fn fatal(&self) -> Option<Fatal> {
        self.fatal
    }

    /// A problem with the file that was not reported yet.
    pub fn take_warning(&mut self) -> Option<String> {
        self.warned.take()
    }

    fn take(&mut self, bytes: &[u8]) {
        self.tail.extend(bytes);
        let excess = self.tail.len().saturating_sub(TAIL);
        self.tail.drain(..excess);
        if self.fatal.is_none() {
            let new = (bytes.len() + LONGEST_SIGN).min(self.tail.len());
            let end = self.tail.make_contiguous();
            let end = &end[end.len() - new..];
            let said = |(sign, _): &&(&[u8], Fatal)| end.windows(sign.len()).any(|window| window == *sign);
            self.fatal = SIGNS.iter().find(said).map(|(_, fatal)| *fatal);
        }
        self.write_file(bytes);
    }

    fn write_file(&mut self, bytes: &[u8]) {
        self.size = self.size.saturating_add(bytes.len() as u64);
        let Some((path, file)) = &mut self.file else { return };
        if let Err(error) = file.write_all(bytes) {
            self.warned.get_or_insert(format!("the console log {} is incomplete: {error}", path.display()));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_end_of_this_life_and_the_file_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nic0.console.log");
        let mut console = Console::new(path.clone());
        console.begin("nic0 generation 1");
        let line = [b'x'; 1000];
        for _ in 0..9000 {
            console.take(&line);
        }
        console.take(b"Kernel panic\r\n");
        assert_eq!(console.tail().len(), TAIL - 1);
        assert!(console.tail().ends_with("xKernel panic\n"));
        let sizes = [&path, &path.with_extension("log.1")].map(|p| std::fs::metadata(p).unwrap().len());
        assert!(sizes.iter().all(|size| *size <= crate::base::rotating_file::MAX_FILE), "{sizes:?}");
        console.begin("nic0 generation 2");
        assert_eq!(console.tail(), "");
        assert!(console.take_warning().is_none());
    }

    #[test]
    fn a_fatal_line_is_seen_however_it_is_cut() {
        let mut console = Console::new("/dev/null".into());
        for (sign, fatal) in SIGNS {
            assert!(sign.len() <= LONGEST_SIGN);
            for cut in 0..sign.len() {
                console.begin("a life");
                console.take(b"[ 1.0] ");
                console.take(&sign[..cut]);
                assert_eq!(console.fatal(), None, "{cut}");
                console.take(&sign[cut..]);
                assert_eq!(console.fatal(), Some(fatal), "{cut}");
            }
        }
        console.begin("a life that goes on");
        console.take(b"[ 1.0] BUG: sleeping function called from invalid context at mm/page_alloc.c\n");
        assert_eq!(console.fatal(), None, "a warning");
        console.begin("the next life");
        console.take(b": sysrq");
        assert_eq!(console.fatal(), None);
    }

    #[test]
    fn a_stuck_cpu_is_seen_in_the_words_of_each_kernel() {
        for line in [
            "[   52.1] watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [kworker/1:2:71]",
            "[   52.1] NMI watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [swapper/0:1]",
            "[   31.7] watchdog: Watchdog detected hard LOCKUP on cpu 1",
            "[   31.7] NMI watchdog: Watchdog detected hard LOCKUP on cpu 3",
            "[   63.0] rcu: INFO: rcu_preempt self-detected stall on CPU",
            "[   63.0] INFO: rcu_sched self-detected stall on CPU { 1}  (t=5250 jiffies g=271 c=270 q=0)",
            "[   63.0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "[   63.0] rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
            "[   63.0] rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-.... } 5253 jiffies s: 497 root: 0x2/.",
        ] {
            let mut console = Console::in_memory();
            console.take(format!("{line}\n").as_bytes());
            assert_eq!(console.fatal(), Some(Fatal::StuckCpu), "{line}");
        }
    }

    #[test]
    fn what_a_kernel_says_of_its_watch_is_no_stuck_cpu() {
        for line in [
            "[    0.2] rcu: \tRCU calculated value of scheduler-enlistment delay is 25 jiffies.",
            "[    0.2] NMI watchdog: Perf NMI watchdog permanently disabled",
            "[    0.4] NMI watchdog: Enabled. Permanently consumes one hw-PMU counter.",
            "[   40.0] rcu: INFO: rcu_preempt kthread starved for 5252 jiffies! g697 f0x0 RCU_GP_WAIT_FQS(5) ->state=0x0 ->cpu=1",
            "[   40.0] BUG: workqueue lockup - pool cpus=1 node=0 flags=0x0 nice=0 stuck for 34s!",
            "[   40.0] workqueue: e1000_watchdog_task [e1000e] hogged CPU for >10000us 4 times, consider switching to WQ_UNBOUND",
            "[   40.0] INFO: task kworker/0:1:9 blocked for more than 30 seconds.",
            "[   40.0] clocksource: Long readout interval, skipping watchdog check: cs_nsec: 1024",
        ] {
            let mut console = Console::in_memory();
            console.take(format!("{line}\n").as_bytes());
            assert_eq!(console.fatal(), None, "{line}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_costs_a_warning() {
        let mut console = Console::new("/proc/no/such/file".into());
        console.take(b"Kernel panic");
        assert!(console.take_warning().unwrap().contains("/proc/no/such/file"));
        assert_eq!(console.tail(), "Kernel panic");
    }

    #[test]
    fn a_pipe_is_drained_after_its_writer() {
        let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
        let mut console = Console::new("/dev/null".into());
        assert!(console.read(&read), "nothing yet");
        nix::unistd::write(&write, b"last words").unwrap();
        drop(write);
        console.drain(&read);
        assert_eq!(console.tail(), "last words");
        assert!(!console.read(&read), "the end");
    }
}
