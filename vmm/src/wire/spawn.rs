//! Starting the process of a VM: this program again, as `umbra vm`, with a control channel and the descriptors that
//! its spec names, and nothing else of the supervisor's.
//!
//! Every descriptor but the standard streams is made close-on-exec in the child, those that the supervisor itself was
//! started with included; then the inherited ones are opened up. The process is killed by the kernel when the
//! supervisor ends, however it ends.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use thiserror::Error;

use super::cgroup_bounds;
use super::channel::{self, Channel};
use super::messages::{ToVm, VmSpec};
use crate::base::cgroup::{Cgroups, Group, OutOfMemory};
use crate::base::pid_namespace::{self, PidNamespaces};
use crate::base::proc_stat::ProcStat;
use crate::base::time::Time;
use crate::base::vm_users::{Taken, VmUsers};
use crate::config::{Confine, CpuMax, MemorySize};

/// Errors of starting a VM's process.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// No control channel.
    #[error(transparent)]
    Channel(#[from] channel::Error),
    /// No pipe for the console.
    #[error("make a pipe for the console of {vm}")]
    Pipe {
        /// The VM.
        vm: String,
        /// Why.
        source: io::Error,
    },
    /// `fork` or `exec` failed.
    #[error("start the process of {vm}")]
    Spawn {
        /// The VM.
        vm: String,
        /// Why.
        source: io::Error,
    },
}

/// Where the standard streams of a VM's process go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Streams {
    /// They are the supervisor's: the console is on its terminal.
    Terminal,
    /// Output goes into a pipe: [`VmProcess::console`].
    Captured,
    /// No input and no output but stderr, which is the supervisor's.
    Quiet,
}

/// Environment variable of VM processes: the number of the supervisor that started them.
pub const SUPERVISOR: &str = "UMBRA_SUPERVISOR";

/// What VM processes are started as.
#[derive(Debug, Default)]
pub struct Program {
    /// The file.
    pub path: PathBuf,
    /// How the processes are confined.
    pub confine: Confine,
    /// Whom they are handed to once their VM is built, if they are confined.
    pub users: Option<VmUsers>,
    /// They have namespaces of their own.
    pub namespaces: bool,
    /// Each is the first process of a PID namespace of its own, if they are confined.
    pub pid_namespaces: Option<PidNamespaces>,
    /// Where each gets a control group of its own.
    pub cgroups: Option<Cgroups>,
}

/// A running VM process; killed when dropped.
#[derive(Debug)]
pub struct VmProcess {
    child: Child,
    pidfd: OwnedFd,
    channel: Channel,
    console: Option<OwnedFd>,
    /// Its numbers are its own for as long as it is there.
    user: Option<Taken>,
    /// Goes when it has gone.
    group: Option<Group>,
    /// Whether it is in its group was looked at.
    looked: bool,
    started: Time,
}

/// How a process ended.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// What it ended with.
    pub status: ExitStatus,
    /// The kernel ended it for want of memory.
    pub out_of_memory: Option<OutOfMemory>,
}

impl SpawnError {
    /// Whether the host had none to start, for want of something that may come again: memory, descriptors, processes, the program's file.
    pub fn may_pass(&self) -> bool {
        !matches!(self, Self::Channel(channel::Error::Encode(_) | channel::Error::TooLong(_) | channel::Error::Closed))
    }
}

impl VmProcess {
    /// Starts `program` as the process of `spec`, which gets `inherited` under the same numbers, and `files`, those of its
    /// device, with its spec. It may have `cpu_max` of the processors, where it gets a control group.
    ///
    /// # Errors
    ///
    /// The process cannot be started. One that cannot start its VM says so on its channel.
    pub fn spawn(
        program: &Program,
        spec: VmSpec,
        (inherited, files): (&[OwnedFd], &[BorrowedFd<'_>]),
        (streams, cpu_max): (Streams, Option<CpuMax>),
    ) -> Result<Self, SpawnError> {
        let vm = spec.name.clone();
        let (channel, theirs) = Channel::pair()?;
        let mut command = Command::new(&program.path);
        // Only the supervisor reports to a service manager.
        command.env_remove("NOTIFY_SOCKET").env(SUPERVISOR, std::process::id().to_string());
        command.arg0("umbra").args(["vm", "--name", &vm, "--control", &theirs.as_raw_fd().to_string()]);
        command.args(["--confine", program.confine.name()]);
        let user = program.users.as_ref().filter(|_| program.confine == Confine::On).map(VmUsers::take);
        command.args(user.iter().flat_map(|taken| ["--user".into(), taken.user.to_string()]));
        command.args(program.namespaces.then_some("--namespaces"));
        let console =
            set_streams(&mut command, streams).map_err(|source| SpawnError::Pipe { vm: vm.clone(), source })?;
        let group = program.cgroups.as_ref().and_then(|groups| groups.make(&vm, &cgroup_bounds::of(&spec, cpu_max)));
        let (group, entrance) = group.unzip();
        let entry = entrance.as_ref().map(AsRawFd::as_raw_fd);
        command.args(entry.iter().flat_map(|entry| ["--cgroup".into(), entry.to_string()]));
        let lock = user.as_ref().and_then(|taken| taken.lock.as_ref()).map(AsRawFd::as_raw_fd);
        let kept = inherited.iter().chain([&theirs]).map(AsRawFd::as_raw_fd);
        let keep: Vec<RawFd> = kept.chain(lock).chain(entry).collect();
        let parent = pid_namespace::this_process().map_err(|source| SpawnError::Spawn { vm: vm.clone(), source })?;
        let parent_fd = parent.as_raw_fd();
        // SAFETY: the closure runs between fork and exec in a process of one thread; it allocates nothing and calls
        // only system calls that are async-signal-safe.
        unsafe { command.pre_exec(move || prepare_child(&keep, parent_fd)) };
        let started = Time::now();
        let pid_namespaces = program.pid_namespaces.as_ref().filter(|_| program.confine == Confine::On);
        let spawned = match pid_namespaces {
            Some(namespaces) => namespaces.spawn(&mut command),
            None => command.spawn(),
        };
        let spawned = spawned.and_then(watch);
        let (pidfd, child) = spawned.map_err(|source| SpawnError::Spawn { vm, source })?;
        // The command holds the write end of the console's pipe; without it, the pipe ends with the process.
        drop(command);
        let process = Self { child, pidfd, channel, console, user, group, looked: false, started };
        process.channel.send(&ToVm::Start(Box::new(spec)), files)?;
        Ok(process)
    }

    /// Asks the process to give its device up. `false`: it will not, because it is gone, has long not read what it was sent, or is
    /// stopped, so that nobody need wait for its answer.
    pub fn ask_to_release(&self) -> bool {
        let stopped = ProcStat::read(format!("/proc/{}", self.pid())).is_some_and(ProcStat::is_stopped);
        !stopped && self.channel.send_now(&ToVm::Release, &[]).is_ok()
    }

    /// The process's number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The number of the user whom it is handed to; `None`: it stays the supervisor's.
    pub fn uid(&self) -> Option<u32> {
        self.user.as_ref().map(|taken| taken.user.uid)
    }

    /// It has said that its VM runs. By then it has gone into its control group; where it could not, it has none.
    pub fn runs(&mut self) {
        if !std::mem::replace(&mut self.looked, true) {
            let pid = self.pid();
            self.group = self.group.take().filter(|group| group.has(pid));
        }
    }

    /// Its control group, if it has one of its own.
    pub fn group(&self) -> Option<&Group> {
        self.group.as_ref()
    }

    /// What became of a process that has closed its channel, as far as that is known before its end is seen.
    pub fn describe_closed(&self) -> String {
        let out_of_memory = self.group.as_ref().and_then(Group::out_of_memory);
        out_of_memory.map_or_else(|| "its process ended".into(), out_of_memory_in_words)
    }

    /// A moment before it was started.
    pub fn started(&self) -> Time {
        self.started
    }

    /// Readable once the process has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The control channel.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    /// The captured console's end to read, non-blocking.
    pub fn console(&self) -> Option<&OwnedFd> {
        self.console.as_ref()
    }

    /// Kills the process; that it is gone is seen at [`Self::pidfd`].
    pub fn kill(&mut self) {
        if let Err(error) = self.child.kill() {
            tracing::warn!("kill process {}: {error}", self.pid());
        }
    }

    /// How the process ended, if it has.
    pub fn ended(&mut self) -> Option<Exit> {
        let status = self.child.try_wait().ok().flatten()?;
        let killed = self.group.as_ref().filter(|_| status.signal() == Some(libc::SIGKILL));
        Some(Exit { status, out_of_memory: killed.and_then(Group::out_of_memory) })
    }
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        if self.ended().is_none() {
            self.kill();
            // A killed process ends soon; one that the kernel holds (a device that hangs) must not hold us too.
            let mut fds = [nix::poll::PollFd::new(self.pidfd.as_fd(), nix::poll::PollFlags::POLLIN)];
            let _ = nix::poll::poll(&mut fds, 2_000_u16);
            let _ = self.ended();
        }
    }
}

/// Lets the process `pid`, which this one has started and not waited for, make its files as large as `bytes`: its confinement may keep it
/// from that.
///
/// # Errors
/// This process may not allow it.
pub fn let_files_grow(pid: u32, bytes: u64) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one limit.
    if unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, std::ptr::null(), &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if limit.rlim_cur >= bytes {
        return Ok(());
    }
    limit = libc::rlimit { rlim_cur: bytes, rlim_max: limit.rlim_max.max(bytes) };
    // SAFETY: the kernel reads one limit.
    match unsafe { libc::prlimit(pid, libc::RLIMIT_FSIZE, &raw const limit, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Exit status of a VM's process that has made a system call which it may not make: as a shell has that of `SIGSYS`.
pub const CONFINED: i32 = 128 + libc::SIGSYS;

/// How a process ended, in words.
pub fn describe_exit(Exit { status, out_of_memory }: Exit) -> String {
    if let Some(how) = out_of_memory {
        return out_of_memory_in_words(how);
    }
    match (status.code(), status.signal()) {
        (Some(CONFINED), _) | (None, Some(libc::SIGSYS)) => {
            "its process was ended by its confinement: it made a system call that it may not make".into()
        }
        (Some(code), _) => format!("its process exited with status {code}"),
        (None, Some(signal)) => {
            let name = Signal::try_from(signal).map_or("?", Signal::as_str);
            format!("its process was killed by signal {signal} ({name})")
        }
        (None, None) => "its process ended".into(),
    }
}

fn out_of_memory_in_words(how: OutOfMemory) -> String {
    match how {
        OutOfMemory::OfItsOwn(most) => {
            let most = MemorySize(most);
            format!("its process was ended by the kernel: it took more memory than its control group may have ({most})")
        }
        OutOfMemory::OfTheHost => {
            "its process was ended by the kernel: the host, or a control group around its own, had no memory left"
                .into()
        }
    }
}

fn set_streams(command: &mut Command, streams: Streams) -> io::Result<Option<OwnedFd>> {
    match streams {
        Streams::Terminal => Ok(None),
        Streams::Quiet => {
            command.stdin(Stdio::null()).stdout(Stdio::null());
            Ok(None)
        }
        Streams::Captured => {
            let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
            fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            command.stdin(Stdio::null()).stdout(write.try_clone()?).stderr(write);
            Ok(Some(read))
        }
    }
}

/// Runs in the child before `exec`.
fn prepare_child(keep: &[RawFd], parent: RawFd) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // The supervisor may have ended before the line above. Where that is not seen yet, the control channel is closed already.
    // SAFETY: the supervisor keeps this descriptor open until after the spawn.
    if pid_namespace::has_ended(unsafe { BorrowedFd::borrow_raw(parent) })? {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // The supervisor blocks what it reads from a signalfd; a blocked mask would be inherited.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    // A terminal's Ctrl-C goes to every process on it; what it means is for the supervisor to say.
    for signal in [Signal::SIGINT, Signal::SIGQUIT] {
        // SAFETY: ignoring a signal installs no handler.
        unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigIgn) }?;
    }
    // SAFETY: the call takes no pointers, and marks descriptors of this process, which executes another program next.
    let marked = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if marked != 0 {
        return Err(io::Error::last_os_error());
    }
    for &fd in keep {
        // SAFETY: the supervisor keeps these descriptors open until after the spawn.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    }
    Ok(())
}

/// The child, with the descriptor that tells of its end. Without one nobody would hear of that: it is ended at once.
fn watch(mut child: Child) -> io::Result<(OwnedFd, Child)> {
    match pid_namespace::of_process(child.id()) {
        Ok(pidfd) => Ok((pidfd, child)),
        Err(error) => {
            let _ = child.kill().and_then(|()| child.wait());
            Err(error)
        }
    }
}
