//! A test host under QEMU that scripts can be run in.
//!
//! [`Bench::boot`] sets up the peer's network, starts QEMU and waits for the exec server; [`Bench::run`] runs scripts,
//! [`Bench::guest`] reaches into guests of `umbra` that run there. Dropping a [`Bench`] ends its QEMU and nothing else:
//! processes are known by their handle. One bench at a time: a second one waits, but in a suite as many run as the machine has
//! processors for.

pub mod brake;
mod error;
mod evidence;
mod files;
pub mod guest;
pub mod limit;
mod lock;
mod monitor;
pub mod patience;
pub mod pcap;
mod process;
mod qemu;
pub mod spec;
mod stuck;

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::assets::Assets;
use crate::peer::Peer;
pub use crate::probe::client::Output;
use crate::probe::client::{Client, ClientError, Run};
pub use error::BenchError;
pub use guest::Guest;
use lock::Lock;
pub use lock::places;
use monitor::Monitor;
use patience::Stall;
use process::Companion;
pub use qemu::real_kvm as has_nested_kvm;
pub use spec::{Accel, BenchSpec, Model, Storage};

/// Longest time in which a test host that is powering off or rebooting may print nothing and live on.
const POWER_OFF: Duration = Duration::from_secs(60);

/// What differs from boot to boot.
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";
/// Longest time for an answer of a test host that runs scripts: one that goes down meanwhile gives none.
const BOOT_ID_LIMIT: Duration = Duration::from_secs(5);

/// How often a test host is booted that stands still in its boot.
const BOOTS: u32 = 3;

/// Console lines shown with a failure.
const TAIL_LINES: usize = 25;

/// Tells at once what the runner would keep until the test has ended, as it does with what macros print.
pub fn tell_at_once(what: &str) {
    let _ = writeln!(io::stderr(), "    {what}");
}

/// A running test host.
pub struct Bench {
    spec: BenchSpec,
    dir: PathBuf,
    /// Declared before the process that they are about, so that it is let go first.
    brake: Companion,
    limit: Companion,
    stuck: Companion,
    qemu: Child,
    exec: Client,
    monitor: Monitor,
    peer: Peer,
    _lock: Lock,
}

impl Bench {
    /// Boots the test host and waits until it runs scripts. An emulated one that stands still in its boot (seen now and then:
    /// its processors wait for an interrupt that does not come) is booted again, up to [`BOOTS`] times in all; that is said.
    ///
    /// # Errors
    /// What is missing on this machine, or the last lines of the test host's console.
    pub fn boot(spec: BenchSpec, assets: &Assets) -> Result<Self, BenchError> {
        for boot in 1..BOOTS {
            match Self::boot_once(spec.clone(), assets) {
                Err(error @ BenchError::Silent { .. }) if !qemu::real_kvm() => {
                    let (name, what) = (&spec.name, error.headline());
                    tell_at_once(&format!("boot {boot} of {BOOTS} of the test host `{name}`: {what}; once more"));
                }
                other => return other,
            }
        }
        Self::boot_once(spec, assets)
    }

    fn boot_once(spec: BenchSpec, assets: &Assets) -> Result<Self, BenchError> {
        let speed = brake::speed()?;
        let lock = Lock::take(assets.out(), spec.alone)?;
        assets.check_models(&spec.nics)?;
        let mut spec = spec;
        if assets.unsteady_smp() && !qemu::real_kvm() {
            spec.cpus = 1;
        }
        let dir = files::fresh(assets.out(), &spec)?;
        let mut peer = Peer::start(&assets.probe(), spec.nics.len(), spec.one_wire)?;
        let taps = peer.take_taps();
        files::fill_share(&dir.join("share"), assets, &spec)?;
        let (ours, theirs) = UnixStream::pair().map_err(|e| BenchError::file("make a socket pair in", &dir, e))?;
        let (monitor, of_qemu) = UnixStream::pair().map_err(|e| BenchError::file("make a socket pair in", &dir, e))?;
        let qemu = start_qemu(&spec, assets, &dir, &taps, &[theirs, of_qemu].map(OwnedFd::from))?;
        let monitor = Monitor::new(monitor);
        let exec = Client::new(ours).map_err(|e| BenchError::file("talk to QEMU in", &dir, e))?;
        let [brake, limit, stuck] = std::array::from_fn(|_| Companion::default());
        let mut bench = Self { spec, dir, brake, limit, stuck, qemu, exec, monitor, peer, _lock: lock };
        let brake = brake::on(bench.qemu.id(), speed);
        bench.brake = brake.map_err(|e| BenchError::file("brake QEMU in", &bench.dir, e))?;
        let limit = limit::on(bench.qemu.id(), &bench.spec.name);
        bench.limit = limit.map_err(|e| BenchError::file("watch QEMU in", &bench.dir, e))?;
        let stuck = stuck::on(bench.qemu.id(), &bench.spec.name, &bench.console());
        bench.stuck = stuck.map_err(|e| BenchError::file("watch the console in", &bench.dir, e))?;
        let start = Instant::now();
        bench.await_boot()?;
        patience::note_boot(start.elapsed());
        Ok(bench)
    }

    fn await_boot(&mut self) -> Result<(), BenchError> {
        let mut stall = Stall::new(self.spec.boot_silence);
        while !stall.is_over(self.printed()) {
            if self.exec.hello(Duration::from_secs(1)).is_ok() {
                return Ok(());
            }
            self.check_alive()?;
        }
        Err(BenchError::Silent { limit: stall.limit(), tail: self.tail(), log: self.console() })
    }

    /// Runs `script`, which has the test host reset itself, and waits until it runs scripts again: in another boot, on the disk of
    /// [`BenchSpec::root`] as it was left. It is given up when the console has printed nothing for a minute, scaled to this machine.
    ///
    /// # Errors
    /// The spec has no [`BenchSpec::reboots`], or the test host does not go down or not come up.
    pub fn reboot(&mut self, script: &str) -> Result<(), BenchError> {
        let before = self.expect(BOOT_ID, POWER_OFF)?;
        // Kept until the end: dropping a run kills it.
        let _down = self.start(script)?;
        let mut stall = Stall::new(POWER_OFF);
        while !stall.is_over(self.printed()) {
            if self.boot_id().is_some_and(|id| id != before) {
                return Ok(());
            }
            self.check_alive()?;
        }
        Err(self.boot_error("it does not come up again".into()))
    }

    /// That of the boot which runs scripts now, if one does.
    fn boot_id(&self) -> Option<String> {
        self.exec.hello(Duration::from_secs(1)).ok()?;
        let output = self.exec.start(BOOT_ID).ok()?.wait(BOOT_ID_LIMIT).ok()?;
        output.ok().then_some(output.stdout)
    }

    /// Bytes that the test host and its guests have printed: as long as they grow, something goes on.
    fn printed(&self) -> u64 {
        let length = |path: &Path| fs::metadata(path).map_or(0, |meta| meta.len());
        let logs = fs::read_dir(self.share()).into_iter().flatten().flatten().map(|entry| entry.path());
        let logs = logs.filter(|path| path.extension().is_some_and(|e| e == "log" || e == "jsonl"));
        length(&self.console()) + logs.map(|path| length(&path)).sum::<u64>()
    }

    fn boot_error(&self, what: String) -> BenchError {
        BenchError::Boot { what, tail: self.tail(), log: self.console() }
    }

    fn check_alive(&mut self) -> Result<(), BenchError> {
        match self.qemu.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(self.boot_error(format!("QEMU ended ({status})"))),
            Err(e) => Err(self.boot_error(format!("QEMU cannot be waited for: {e}"))),
        }
    }

    /// Runs a script in the test host and returns what it printed and its status. It is given up when for `limit`, scaled to this
    /// machine ([`patience`]), neither it nor a console has printed anything.
    ///
    /// The functions of `/etc/umbra/bench.sh` (`vfio BDF`, ...) and the variables `NIC0`, `SND0`, ... are there.
    ///
    /// # Errors
    /// The script was given up, or the test host died; not a status other than 0.
    pub fn run_for(&mut self, script: &str, limit: Duration) -> Result<Output, BenchError> {
        let mut run = self.start(script)?;
        let mut stall = Stall::new(limit);
        loop {
            match run.poll(Duration::from_millis(500).min(stall.limit())) {
                Ok(true) => return Ok(run.output().clone()),
                Ok(false) => {
                    let printed = (run.output().stdout.len(), run.output().stderr.len(), self.printed());
                    if stall.is_over(printed) {
                        let so_far = format!("{}{}", run.output().stdout, run.output().stderr);
                        let source = ClientError::Deadline { limit: stall.limit(), so_far };
                        return Err(self.script_error(script, source));
                    }
                    self.check_alive()?;
                }
                Err(source) => return Err(self.script_error(script, source)),
            }
        }
    }

    /// As [`Self::run_for`], with a minute.
    ///
    /// # Errors
    /// As [`Self::run_for`].
    pub fn run(&mut self, script: &str) -> Result<Output, BenchError> {
        self.run_for(script, Duration::from_secs(60))
    }

    /// Runs a script that has to end with status 0; returns its standard output.
    ///
    /// # Errors
    /// As [`Self::run_for`], or [`BenchError::Status`] with all that the script printed.
    pub fn expect(&mut self, script: &str, limit: Duration) -> Result<String, BenchError> {
        let output = self.run_for(script, limit)?;
        if output.ok() {
            return Ok(output.stdout);
        }
        Err(BenchError::Status { script: error::first_line(script), output })
    }

    /// Starts a script and does not wait for it.
    ///
    /// # Errors
    /// The test host is gone.
    pub fn start(&mut self, script: &str) -> Result<Run, BenchError> {
        self.check_alive()?;
        let patience = patience::whole_factor();
        let script = format!("export UMBRA_PATIENCE={patience}\n. /etc/umbra/bench.sh\ncd /share\n{script}");
        self.exec.start(&script).map_err(|source| self.script_error(&script, source))
    }

    fn script_error(&self, script: &str, source: ClientError) -> BenchError {
        BenchError::Script { script: error::first_line(script), source, tail: self.tail() }
    }

    /// A guest in the test host that has a port `umbra.bench` at `/run/umbra-bench/NAME.sock`.
    pub fn guest(&mut self, name: &str) -> Guest<'_> {
        Guest::new(self, name)
    }

    /// Has QEMU do a command of its monitor (QMP); what it returns.
    ///
    /// # Errors
    /// QEMU refuses it, does not answer, or is gone.
    pub fn monitor(&mut self, command: &str, arguments: &serde_json::Value) -> Result<serde_json::Value, BenchError> {
        self.monitor.execute(command, arguments).map_err(|e| BenchError::file("give an order to QEMU in", &self.dir, e))
    }

    /// The machine at the other end of the wire.
    pub fn peer(&mut self) -> &mut Peer {
        &mut self.peer
    }

    /// The folder of this bench: `console.log`, `qemu.log`, captures, `share/`.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The folder that the test host sees as `/share`.
    pub fn share(&self) -> PathBuf {
        self.dir.join("share")
    }

    /// The test host's console log.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// The capture of NIC `nic`'s wire.
    pub fn pcap(&self, nic: usize) -> PathBuf {
        self.dir.join(format!("nic{nic}.pcap"))
    }

    /// What the sound cards played.
    pub fn wav(&self) -> PathBuf {
        self.dir.join("sound.wav")
    }

    /// The last lines of the test host's console.
    pub fn tail(&self) -> String {
        files::tail(&self.console(), TAIL_LINES) + &files::tail(&self.dir.join("qemu.log"), TAIL_LINES)
    }

    /// Waits until QEMU ends by itself, as after the end of an interactive shell.
    ///
    /// # Errors
    /// QEMU cannot be waited for.
    pub fn wait(mut self) -> Result<(), BenchError> {
        self.qemu.wait().map(drop).map_err(|e| BenchError::file("wait for QEMU in", &self.dir, e))
    }

    /// Shuts the test host down and returns when it is off, so that captures are complete.
    ///
    /// # Errors
    /// It does not power off; it is killed then.
    pub fn shutdown(mut self) -> Result<PathBuf, BenchError> {
        // Kept until the end: dropping a run kills it.
        let _off = self.start("sync; sleep 0.1; poweroff -f")?;
        let mut stall = Stall::new(POWER_OFF);
        while !stall.is_over(self.printed()) {
            if matches!(self.qemu.try_wait(), Ok(Some(_))) {
                return Ok(self.dir.clone());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(self.boot_error("it does not power off".into()))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if std::thread::panicking() && self.check_alive().is_ok() {
            let evidence = evidence::of(self);
            let _ = fs::write(self.dir.join(evidence::FILE), evidence);
        }
        self.brake = Companion::default();
        self.limit = Companion::default();
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn start_qemu(
    spec: &BenchSpec,
    assets: &Assets,
    dir: &Path,
    taps: &[OwnedFd],
    [exec, monitor]: &[OwnedFd; 2],
) -> Result<Child, BenchError> {
    let inherit = |fd: &OwnedFd| -> io::Result<i32> {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        Ok(fd.as_raw_fd())
    };
    let failed = |e| BenchError::file("start QEMU in", dir, e);
    let taps = taps.iter().map(inherit).collect::<io::Result<Vec<_>>>().map_err(failed)?;
    let exec = inherit(exec).map_err(failed)?;
    let monitor = inherit(monitor).map_err(failed)?;
    let snapshots = assets.out().join("snapshots");
    fs::create_dir_all(&snapshots).map_err(|e| BenchError::file("make", &snapshots, e))?;
    let (kernel, initrd) = (assets.kernel(), assets.host_initramfs());
    let parts = qemu::Parts { kernel, initrd, dir, taps: &taps, exec, monitor, snapshots: &snapshots };
    let arguments = qemu::arguments(spec, &parts);
    let log = fs::File::create(dir.join("qemu.log")).map_err(failed)?;
    let mut command = Command::new(assets.qemu());
    command.args(&arguments).stderr(log.try_clone().map_err(failed)?);
    if !spec.shell {
        command.stdin(Stdio::null()).stdout(log);
    }
    // SAFETY: prctl is async-signal-safe and touches no memory of this process.
    unsafe {
        command.pre_exec(|| nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(Into::into));
    }
    command.spawn().map_err(failed)
}
