//! The process of one VM (`umbra vm`): takes the VM's spec, builds and runs it, answers the supervisor, and
//! says how the VM ended. The main thread is the event loop.
//!
//! Every exit path leaves the terminal as it was; `SIGKILL` leaves it to the supervisor.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::fstat;
use thiserror::Error;
use umbra_driver_vm::protocol::MemoryRange;

use super::assemble::{Assembled, assemble};
use super::confine;
use super::devices::{self, Devices};
use super::group::Entering;
use super::host::{Host, Supervisor};
use super::machine::terminal::TerminalInput;
use super::machine::vcpu::{self, Vcpus};
use super::machine::viewers::Viewers;
use super::machine::vm::{self, Vm};
use super::snapshot::format::most_bytes;
use super::snapshot::{self, Begun, Place};
use crate::base::error::chain;
use crate::base::high_duplicate::high_duplicate;
use crate::base::lock::lock;
use crate::base::rotating_file::MAX_FILE;
use crate::base::time::Time;
use crate::config::Console;
use crate::wire::channel::{self, Channel, Incoming};
use crate::wire::messages::{FromVm, SnapshotNews, ToVm, VmEnd, VmSpec};

/// Where the VM's spec comes from.
#[derive(Debug)]
pub enum SpecFrom {
    /// The control socket of a supervisor, which sends `ToVm::Start` first.
    Control(OwnedFd),
    /// A file with a `VmSpec` in JSON: for trying a VM by hand.
    File(PathBuf),
}

/// Errors of a VM process.
#[derive(Debug, Error)]
pub enum Error {
    /// The control socket.
    #[error("take the VM's spec from the supervisor")]
    Control(#[source] channel::Error),
    /// The supervisor closed the socket, or sent something else first.
    #[error("the supervisor did not send a VM's spec")]
    NoSpec,
    /// The spec file.
    #[error("read the VM's spec from {path}")]
    SpecFile {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The VM.
    #[error(transparent)]
    Vm(#[from] vm::Error),
    /// Threads of its vCPUs.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// Its devices.
    #[error(transparent)]
    Devices(#[from] devices::Error),
    /// Its snapshot.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    /// What it may do.
    #[error(transparent)]
    Confine(#[from] confine::Error),
    /// The event loop.
    #[error("run the event loop")]
    Events(#[source] event_manager::Error),
    /// Signals.
    #[error("{operation}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// The cause.
        #[source]
        source: Errno,
    },
    /// The VM did not end in an orderly way.
    #[error("the VM ended: {what}\n{registers}")]
    Broken {
        /// How.
        what: &'static str,
        /// Registers of the vCPUs.
        registers: String,
    },
}

impl Error {
    /// Whether what the VM is made of is wrong, so that another start would come to the same end. What the host lacks may come.
    fn is_configuration(&self) -> bool {
        match self {
            Self::Vm(why) => why.is_configuration(),
            Self::Devices(why) => why.is_configuration(),
            _ => false,
        }
    }

    fn system(operation: &'static str) -> impl FnOnce(Errno) -> Self {
        move |source| Self::System { operation, source }
    }
}

/// Longest time that a VM which has ended goes on for what its disks keep: as long as the supervisor waits for one to come to rest.
const LAST_WRITES: Duration = Duration::from_secs(30);
/// No limit for a turn of the event loop.
const FOREVER: i32 = -1;

/// A subscriber of the event loop.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// Runs one VM to its end. An error that a supervisor was told of is not returned. `entering`: it is on its way into its control group.
pub fn main(source: SpecFrom, entering: Option<Entering>) -> Result<(), Error> {
    raise_file_limit();
    let signals = block_signals(&source)?;
    let (spec, files, host) = match source {
        SpecFrom::Control(fd) => {
            // The supervisor notices by it that this process is gone.
            let channel = Channel::from_fd(high_duplicate(&fd).unwrap_or(fd));
            confine::trap::tell(&channel);
            let (spec, files) = receive_spec(&channel)?;
            (spec, files, Arc::new(Host::Supervisor(Supervisor::new(channel))))
        }
        SpecFrom::File(path) => (Box::new(read_spec(path)?), Vec::new(), Arc::new(Host::Log)),
    };
    let result = run((&spec, files), &host, (signals, entering));
    match (&*host, result) {
        (Host::Supervisor(_), Err(error)) => {
            host.tell(&FromVm::Failed { what: chain(&error), configuration: error.is_configuration() });
            host.finish();
            Ok(())
        }
        (Host::Supervisor(_), Ok(_)) => Ok(()),
        (Host::Log, Err(error)) => Err(error),
        (Host::Log, Ok((how, registers))) => match how {
            VmEnd::PowerOff | VmEnd::Reset | VmEnd::Killed => Ok(()),
            VmEnd::TripleFault => Err(Error::Broken { what: "triple fault", registers }),
            VmEnd::Error => Err(Error::Broken { what: "KVM could not go on", registers }),
        },
    }
}

/// A NIC has an eventfd for each interrupt, up to 2,048 by MSI-X. The usual soft limit of 1,024 files is made for `select`.
fn raise_file_limit() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::debug!(%error, "raise the limit of open files");
    }
}

/// Signals that end the VM come to the event loop. With a supervisor the terminal's signals are its business.
fn block_signals(source: &SpecFrom) -> Result<SignalFd, Error> {
    // A write beyond the limit of files fails (`EFBIG`), and ends nothing.
    // SAFETY: ignoring a signal installs no handler.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.map_err(Error::system("ignore a signal (SIGXFSZ)"))?;
    let (terminal, mut ours) = (SigSet::from_iter([Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT]), SigSet::empty());
    ours.add(Signal::SIGTERM);
    let all: SigSet = terminal.iter().chain(ours.iter()).collect();
    all.thread_block().map_err(Error::system("block signals"))?;
    let watched = if matches!(source, SpecFrom::File(_)) { all } else { ours };
    SignalFd::with_flags(&watched, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(Error::system("watch signals (signalfd)"))
}

/// The spec, and the files of its device.
fn receive_spec(channel: &Channel) -> Result<(Box<VmSpec>, Vec<OwnedFd>), Error> {
    match channel.receive().map_err(Error::Control)? {
        Incoming::Message(ToVm::Start(spec), files) => Ok((spec, files)),
        _ => Err(Error::NoSpec),
    }
}

fn read_spec(path: PathBuf) -> Result<VmSpec, Error> {
    let read = std::fs::File::open(&path).and_then(|file| Ok(serde_json::from_reader(io::BufReader::new(file))?));
    read.map_err(|source| Error::SpecFile { path, source })
}

/// Builds and runs the VM; returns how it ended and its vCPUs' registers.
fn run(
    (spec, files): (&VmSpec, Vec<OwnedFd>),
    host: &Arc<Host>,
    (signals, entering): (SignalFd, Option<Entering>),
) -> Result<(VmEnd, String), Error> {
    die_with_supervisor(spec, host)?;
    if !spec.passthrough.is_empty() || spec.awaits_device {
        confine::expect_function();
    }
    let Some(assembled) = assemble(spec, files, host)? else {
        host.finish();
        return Ok((VmEnd::Killed, String::new()));
    };
    let Assembled { vm, devices, mut events, vcpus, snapshot } = assembled;
    let vm = Arc::new(vm);
    let orders = Orders::default();
    let control = Control { vm: Arc::clone(&vm), host: Arc::clone(host), devices, signals, orders, killed: false };
    let control = Arc::new(Mutex::new(control));
    events.add_subscriber(control.clone());
    events.add_subscriber(vm.serial.clone());
    if let Some(viewers) = viewers(spec, &vm) {
        events.add_subscriber(Arc::new(Mutex::new(viewers)));
    }

    // Nothing that a guest has made is read before.
    let (mut snapshot, lacks_place) = match snapshot.map(Place::begin).transpose() {
        Ok(begun) => (begun, None),
        Err(why) => (None, Some(chain(&why))),
    };
    let disks = lock(&control).devices.largest_file();
    let vcpus = vm.start(vcpus, || {
        if let Some(entering) = entering {
            entering.finish();
        }
        if let Some(bytes) = largest_file(spec, disks, snapshot.is_some()) {
            // A disk may be made larger later.
            confine::limit_files(bytes, disks.is_none())?;
        }
        Ok::<_, Error>(confine::lock_down()?)
    })?;
    host.tell(&FromVm::Running { at: Time::now().0 });
    host.tell(&FromVm::Vcpus(vm.vcpu_counts()));
    let terminal = if spec.console == Console::Terminal {
        let input = TerminalInput::new(Arc::clone(&vm.serial), Arc::clone(&vm.end));
        let input = input.map_err(Error::system("put the terminal into raw mode"))?;
        Some(events.add_subscriber(Arc::new(Mutex::new(input))))
    } else {
        None
    };
    let how = loop {
        if let Some(how) = vm.end.get() {
            break how;
        }
        let orders = std::mem::take(&mut lock(&control).orders);
        if orders.lock_up {
            vcpus.lock_up();
        }
        if orders.nmi {
            vcpus.inject_nmi();
        }
        if let Some(entries) = orders.panic_entries {
            vcpus.watch_for_panic(&entries);
        }
        if let Some(unused) = orders.snapshot {
            give_up(&vm, unused);
            take_snapshot((&vm, &vcpus), (snapshot.take(), lacks_place.as_deref()), host);
        }
        if orders.meets {
            // What it meets could take the process over, and is to find no snapshot open.
            snapshot = None;
        }
        for subscriber in lock(&control).devices.take_subscribers() {
            events.add_subscriber(subscriber);
        }
        turn(&mut events, FOREVER)?;
    };
    tracing::debug!(?how, "stopping");
    let registers = vcpus.stop();
    lock(&control).devices.finish();
    let keeps = || {
        let control = lock(&control);
        !control.killed && control.devices.keepers().next().is_some()
    };
    if !write_what_is_kept(&mut events, keeps, LAST_WRITES)? {
        let news = format!(
            "the VM has ended, and not all that it was told is written is on its disk: no driver VM has made it stable within {} s",
            LAST_WRITES.as_secs()
        );
        for device in lock(&control).devices.keepers() {
            host.tell(&FromVm::Disk { device, news: news.clone() });
        }
    }
    // Last words come before the word that it has ended.
    lock(&vm.serial).finish_output();
    if let Some(id) = terminal {
        // Gives the terminal back before anybody prints.
        drop(events.remove_subscriber(id));
    }
    host.tell(&FromVm::Ended { at: Time::now().0, how, registers: registers.clone() });
    host.finish();
    Ok((how, registers))
}

/// The bytes that no file may exceed which the process of `spec` writes to: the largest of its `disks` on files, its console's file, and
/// the snapshot that it may take. `None`: the log, or the console, goes to a file that is not its own, which may have any length.
///
/// What else it writes to is no file that grows: pipes, sockets, devices, memory (whose size is sealed).
fn largest_file(spec: &VmSpec, disks: Option<u64>, takes_snapshot: bool) -> Option<u64> {
    let is_file = |stream: BorrowedFd<'_>| fstat(stream).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == libc::S_IFREG);
    if is_file(io::stdout().as_fd()) || is_file(io::stderr().as_fd()) {
        return None;
    }
    let console = if matches!(spec.console, Console::File(_)) { MAX_FILE } else { 0 };
    let snapshot = if takes_snapshot { most_bytes(spec.memory.0) } else { 0 };
    Some(disks.unwrap_or(0).max(console).max(snapshot))
}

/// A turn of the event loop, of so many ms at most.
fn turn(events: &mut EventManager<Subscriber>, ms: i32) -> Result<(), Error> {
    match events.run_with_timeout(ms) {
        Ok(_) => Ok(()),
        Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => Ok(()),
        Err(error) => Err(Error::Events(error)),
    }
}

/// What a guest was told is written, and what no flush has made stable, would end with this process and the driver VM, which may hang, or
/// be away already. Goes on while that is so: this driver VM flushes, or the next one writes it. Nobody is waited for longer than for
/// `patience`. Whether nothing is kept any more.
fn write_what_is_kept(
    events: &mut EventManager<Subscriber>,
    keeps: impl Fn() -> bool,
    patience: Duration,
) -> Result<bool, Error> {
    let due = Time::now() + patience;
    while keeps() {
        let left = due.since(Time::now());
        if left.is_zero() {
            return Ok(false);
        }
        turn(events, i32::try_from(left.as_millis()).unwrap_or(i32::MAX).saturating_add(1))?;
    }
    Ok(true)
}

/// The viewers of the VM's console, if it may be viewed. A guest whose console cannot be viewed runs all the same.
fn viewers(spec: &VmSpec, vm: &Vm) -> Option<Viewers> {
    let (path, backlog) = (spec.console_socket.as_ref()?, vm.backlog.as_ref()?);
    let viewers = Viewers::listen(path, Arc::clone(backlog), Arc::clone(&vm.serial));
    viewers.inspect_err(|error| tracing::warn!("`umbra console` cannot be used: {}", chain(error))).ok()
}

/// Gives memory back that the agent of the VM says is unused. A VM whose agent lies keeps all of its memory.
fn give_up(vm: &Vm, unused: Vec<MemoryRange>) {
    let start = Time::now();
    match vm.unused.give_up(&vm.memory, unused) {
        Ok(()) => {
            let bytes: u64 = vm.unused.ranges().iter().map(|range| range.length).sum();
            tracing::debug!("{} MiB went back to the host in {:?}", bytes >> 20, Time::now().since(start));
        }
        Err(why) => tracing::warn!("its agent: {}", chain(&why)),
    }
}

/// Takes the snapshot of a VM, once, or says why there is no place for it.
fn take_snapshot((vm, vcpus): (&Vm, &Vcpus), (begun, lacks_place): (Option<Begun>, Option<&str>), host: &Host) {
    let start = Time::now();
    let mut go_on = || !host.has_orders() && !vm.end.is_set();
    let taken = begun.map(|begun| begun.take(vm, vcpus, &mut go_on));
    let news = match taken {
        None => SnapshotNews::NotTaken(lacks_place.unwrap_or("there is one, or this VM has none").into()),
        Some(Ok(bytes)) => SnapshotNews::Taken(bytes),
        Some(Err(why)) => SnapshotNews::NotTaken(chain(&why)),
    };
    tracing::debug!(?news, "the VM stood still for {:?}", Time::now().since(start));
    host.tell(&FromVm::Snapshot { news });
}

/// A VM must not outlive its supervisor. One that holds the terminal gets a signal that lets it clean up.
fn die_with_supervisor(spec: &VmSpec, host: &Host) -> Result<(), Error> {
    if matches!(host, Host::Log) {
        return Ok(());
    }
    let holds_terminal = spec.console == Console::Terminal && io::stdin().is_terminal();
    let signal = if holds_terminal { Signal::SIGTERM } else { Signal::SIGKILL };
    prctl::set_pdeathsig(signal).map_err(Error::system("ask to be ended with the supervisor (PR_SET_PDEATHSIG)"))
}

/// The event loop's part that concerns the whole VM.
struct Control {
    vm: Arc<Vm>,
    host: Arc<Host>,
    devices: Devices,
    signals: SignalFd,
    orders: Orders,
    /// It is to end at once, whatever it owes.
    killed: bool,
}

/// What the loop is to do, because it has the vCPUs.
#[derive(Debug, Default)]
struct Orders {
    /// The vCPUs are to be locked up.
    lock_up: bool,
    /// They get a non-maskable interrupt.
    nmi: bool,
    /// They are to stop where the kernel begins to die.
    panic_entries: Option<Vec<u64>>,
    /// A snapshot is to be taken, of a VM that gives this memory up first.
    snapshot: Option<Vec<MemoryRange>>,
    /// The VM meets its device, or a guest.
    meets: bool,
}

/// What the descriptors are registered as.
const END: u32 = 0;
const PANICKED: u32 = 1;
const SIGNAL: u32 = 2;
const SUPERVISOR: u32 = 3;
const PANICKING: u32 = 4;

impl Control {
    fn kill(&mut self) {
        self.killed = true;
        self.vm.end.set(VmEnd::Killed);
    }

    fn receive(&mut self) {
        let host = Arc::clone(&self.host);
        let Host::Supervisor(supervisor) = &*host else { return };
        match supervisor.channel().try_receive::<ToVm>() {
            Ok(Incoming::Message(message, fds)) => self.handle(message, fds),
            Ok(Incoming::Empty) => {}
            Ok(Incoming::Closed) => self.kill(),
            Err(error) => {
                tracing::error!(%error, "a message from the supervisor");
                self.vm.end.set(VmEnd::Error);
            }
        }
    }

    fn handle(&mut self, message: ToVm, fds: Vec<OwnedFd>) {
        self.orders.meets |= matches!(message, ToVm::Plug { .. } | ToVm::Connect { .. });
        match message {
            ToVm::Start(_) => tracing::warn!("a second VM for this process"),
            ToVm::PowerButton => self.vm.bus.legacy.press_power_button(),
            ToVm::Kill => self.kill(),
            ToVm::Finish => self.vm.end.set(VmEnd::Killed),
            ToVm::LockUp => self.orders.lock_up = true,
            ToVm::Nmi => self.orders.nmi = true,
            ToVm::WatchForPanic { entries } => self.orders.panic_entries = Some(entries),
            ToVm::Snapshot { unused } => self.orders.snapshot = Some(unused),
            ToVm::Release => {
                self.devices.release();
                self.vm.panic_watch.let_go();
                self.host.tell(&FromVm::Released { at: Time::now().0 });
            }
            ToVm::Plug { device } => self.host.tell(&match self.devices.plug(&self.vm, (&device, fds), &self.host) {
                Ok(()) => FromVm::Plugged { at: Time::now().0 },
                Err(error) => FromVm::Failed { what: chain(&error), configuration: error.is_configuration() },
            }),
            other => {
                if matches!(other, ToVm::QueryStatus) {
                    self.host.tell(&FromVm::Vcpus(self.vm.vcpu_counts()));
                }
                self.devices.handle(&other, fds, &self.host);
            }
        }
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps) {
        let mut watched = vec![
            Events::with_data(self.vm.end.event(), END, EventSet::IN),
            Events::with_data(&self.vm.panicked, PANICKED, EventSet::IN),
            Events::with_data(&self.vm.panicking, PANICKING, EventSet::IN),
            Events::with_data(&self.signals, SIGNAL, EventSet::IN),
        ];
        if let Host::Supervisor(supervisor) = &*self.host {
            watched.push(Events::with_data(supervisor.channel(), SUPERVISOR, EventSet::IN));
        }
        for events in watched {
            if let Err(error) = ops.add(events) {
                tracing::error!(%error, "watch the VM's events");
                self.vm.end.set(VmEnd::Error);
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        match events.data() {
            PANICKED => {
                let _ = self.vm.panicked.read();
                self.host.tell(&FromVm::Panicked { at: Time::now().0 });
            }
            PANICKING => {
                let _ = self.vm.panicking.read();
                tracing::debug!("its kernel begins to die: a vCPU stands still at a breakpoint");
                self.host.tell(&FromVm::Panicking { at: Time::now().0 });
            }
            SIGNAL => {
                let _ = self.signals.read_signal();
                self.kill();
            }
            SUPERVISOR => self.receive(),
            // The loop itself sees the end, and may go on behind it.
            _ => drop(self.vm.end.event().read()),
        }
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    /// A driver VM that has `left` things to do, one at each turn.
    struct DriverVm {
        call: EventFd,
        left: Arc<Mutex<u32>>,
    }

    impl MutEventSubscriber for DriverVm {
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.call, EventSet::IN)).unwrap();
        }

        fn process(&mut self, _: Events, _: &mut EventOps) {
            let mut left = self.left.lock().unwrap();
            *left = left.saturating_sub(1);
        }
    }

    #[test]
    fn a_vm_that_has_ended_goes_on_until_nothing_is_kept_and_not_for_ever() {
        let call = EventFd::new(0).unwrap();
        let mut events = EventManager::<Subscriber>::new().unwrap();
        assert!(write_what_is_kept(&mut events, || false, LAST_WRITES).unwrap());
        assert!(!write_what_is_kept(&mut events, || true, Duration::from_millis(1)).unwrap(), "people hear of it");
        call.write(1).unwrap();
        let left = Arc::new(Mutex::new(3));
        events.add_subscriber(Arc::new(Mutex::new(DriverVm { call, left: Arc::clone(&left) })));
        assert!(write_what_is_kept(&mut events, || *left.lock().unwrap() > 0, Duration::MAX / 4).unwrap());
        assert_eq!(*left.lock().unwrap(), 0);
    }

    #[test]
    fn as_many_files_may_be_open_as_the_system_allows() {
        raise_file_limit();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(soft, hard);
    }
}
