//! A driver VM as the supervisor has it: its process and agent while it lives, its evidence when it has died.

pub(in crate::supervisor) mod begin;
pub(in crate::supervisor) mod console;
pub(in crate::supervisor) mod device;
pub(in crate::supervisor) mod dying;
pub(in crate::supervisor) mod ends;
pub(in crate::supervisor) mod life;
mod present;
pub(in crate::supervisor) mod spare;
pub(in crate::supervisor) mod standby;
mod starvation;
pub(in crate::supervisor) mod taker;
mod trust;
pub(in crate::supervisor) mod upgrade;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use umbra_driver_vm::protocol::CONTROL_PORT;
use umbra_guest_images::image::Image;
use umbra_shadow::Generation;
use umbra_splitter::untrusted;

pub(super) use ends::{EndLink, EndRef};
pub(super) use life::Life;

use super::class::{class_of, end_backends, traits};
use super::driver::begin::Begin;
use super::driver::console::Console;
use super::driver::device::{HeldDevice, Open, ResetJob};
use super::driver::dying::{Dying, Ending};
use super::driver::life::{LifeRole, Purpose};
use super::driver::spare::Spare;
use super::driver::starvation::Watch;
use super::driver::trust::Trust;
use super::driver::upgrade::Trial;
use super::end::all_hang;
use super::ids::Table;
use super::rest::AgentRest;
use super::start::rundir::RunDir;
use crate::base::time::Time;
use crate::config::{self, Driver};
use crate::host::DeviceFiles;
use crate::host::reset::ResetMethod;
use crate::host::sysfs::HostDevice;
use crate::lifecycle::policy::RestartHistory;
use crate::lifecycle::{Endpoint, Lifecycle, Rank, StandbyPolicy, State};
use crate::record::crash_report::{CrashReport, Mask};
use crate::record::status::{self, CgroupStatus};
use crate::record::timeline::Timeline;
use crate::wire::messages::{MaskedCounts, PortBackend, PortEnd, SnapshotOf, VmSpec};
use crate::wire::spawn::{Program, SpawnError, Streams, VmProcess};

/// The command line of every driver VM's kernel. It makes the kernel end at once whenever it is not sure of itself (the shadow
/// answers in the meantime), skip probing for hardware that is not there, and skip self-tests and registrations that nothing in a driver
/// VM uses (they are half of a stock kernel's way to its init). The agent is the only program there, so there is nobody
/// whom mitigations would keep apart. Details of the console come with the panic.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 oops=panic softlockup_panic=1 hung_task_panic=1 no_timer_check \
                       tsc=reliable random.trust_cpu=on cryptomgr.notests rcupdate.rcu_expedited=1 8250.nr_uarts=1 \
                       mitigations=off kfence.sample_interval=0 audit=0 apparmor=0 initcall_blacklist=jent_mod_init,\
                       crypto_kdf108_init,bpf_tcp_ca_kfunc_init,bpf_dummy_struct_ops_init";

/// Size of the console pipe, in bytes: what a VM prints between two turns of the loop fits in.
const CONSOLE_PIPE: i32 = 256 * 1024;

/// Errors of starting a generation.
#[derive(Debug, Error)]
pub(in crate::supervisor) enum StartError {
    /// The process.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// Its device cannot be opened.
    #[error("{0}")]
    Device(String),
    /// Socket pairs for links and agent.
    #[error("make socket pairs for a driver VM")]
    Sockets(#[source] io::Error),
}

impl StartError {
    /// Whether the host lacks something that may come again.
    pub(in crate::supervisor) fn may_pass(&self) -> bool {
        match self {
            Self::Spawn(error) => error.may_pass(),
            Self::Sockets(_) => true,
            Self::Device(_) => false,
        }
    }
}

/// A driver VM.
#[derive(Debug)]
pub(in crate::supervisor) struct DriverVm {
    pub(in crate::supervisor) name: String,
    pub(in crate::supervisor) spec: Driver,
    /// The device of the present life, and of the next one where there is no spare.
    pub(in crate::supervisor) device: HostDevice,
    /// The files of `device`.
    pub(in crate::supervisor) held: HeldDevice,
    /// The device that does not serve, where there are two.
    pub(in crate::supervisor) spare: Option<Spare>,
    /// The generation that is, or was last, the present life.
    pub(in crate::supervisor) present: Option<Generation>,
    pub(in crate::supervisor) image: Arc<Image>,
    pub(in crate::supervisor) ends: Table<Endpoint, EndRef>,
    /// MTU of the network, bytes; `None` where the spec names none.
    pub(in crate::supervisor) mtu: Option<u16>,
    pub(in crate::supervisor) lifecycle: Lifecycle,
    pub(in crate::supervisor) life: Option<Life>,
    /// What the threads of its silent lives did up to half of their silence.
    pub(in crate::supervisor) watches: BTreeMap<LifeRole, Watch>,
    /// The failed life, while it says its last words.
    pub(in crate::supervisor) dying: Option<Dying>,
    /// Killed processes whose end has not been seen yet.
    pub(in crate::supervisor) ending: Vec<Ending>,
    /// The next life, while it waits.
    pub(in crate::supervisor) standby: Option<StandbyVm>,
    /// The life behind that one.
    pub(in crate::supervisor) second: Option<StandbyVm>,
    /// Whether the snapshot is of use.
    pub(in crate::supervisor) trust: Trust,
    /// The image of the snapshot that was there when it was looked for last, where snapshots are made ahead.
    pub(in crate::supervisor) saved: Option<Arc<Image>>,
    /// The time of a life's boot was over while it was saved, and none has been saved since.
    pub(in crate::supervisor) too_slow_to_save: bool,
    /// Why the last process that was to leave a snapshot has left none.
    pub(in crate::supervisor) not_saved: Option<String>,
    pub(in crate::supervisor) resetting: Option<ResetJob>,
    /// When the reset of the device is tried to be begun again, where it could not be.
    pub(in crate::supervisor) reset_due: Option<Time>,
    /// People have heard that the reset waits for what the host lacks.
    pub(in crate::supervisor) told_of_lack: bool,
    pub(in crate::supervisor) console: Console,
    pub(in crate::supervisor) reset_method: Option<ResetMethod>,
    /// Steps since the last failure, or since the start.
    pub(in crate::supervisor) timeline: Timeline,
    /// The masks of the present outage.
    pub(in crate::supervisor) masks: Vec<Mask>,
    /// When the guests were first asked to mask in the present outage.
    pub(in crate::supervisor) asked_to_mask: Option<Time>,
    /// When the last guest so far went live, and with which generation.
    pub(in crate::supervisor) live_at: Option<(Generation, Time)>,
    /// When the last present life had ended or given its device up.
    pub(in crate::supervisor) gone: Time,
    /// The frames of the present outage.
    pub(in crate::supervisor) frames: MaskedCounts,
    /// Those of the guest that has just gone live with a life that served others already.
    pub(in crate::supervisor) late_frames: MaskedCounts,
    /// The evidence of the last failure, for the report.
    pub(in crate::supervisor) report: Option<CrashReport>,
    pub(in crate::supervisor) report_path: Option<String>,
    /// Registers and exit of the last process, until they are in the report.
    pub(in crate::supervisor) registers: String,
    pub(in crate::supervisor) exit: String,
    pub(in crate::supervisor) reason: Option<String>,
    pub(in crate::supervisor) last_outage: Option<Duration>,
    pub(in crate::supervisor) kernel: Option<String>,
    pub(in crate::supervisor) kernel_driver: Option<String>,
    pub(in crate::supervisor) available_memory: Option<u64>,
    /// The restart under way, or on trial.
    pub(in crate::supervisor) trial: Option<Trial>,
    /// What its agent does before the end of the machine.
    pub(in crate::supervisor) rest: Option<AgentRest>,
    /// Whether it ever served; before that, a wrong set-up is likelier than a crash.
    pub(in crate::supervisor) was_live: bool,
}

/// A life that waits, with what it prints.
#[derive(Debug)]
pub(in crate::supervisor) struct StandbyVm {
    pub(in crate::supervisor) life: Life,
    pub(in crate::supervisor) console: Console,
    pub(in crate::supervisor) started: Time,
    /// What its agent's hello said.
    pub(in crate::supervisor) kernel: Option<String>,
    /// The kernel driver of a spare's device.
    pub(in crate::supervisor) kernel_driver: Option<String>,
    pub(in crate::supervisor) available_memory: Option<u64>,
    /// It was restored from a snapshot.
    pub(in crate::supervisor) restored: bool,
    /// It has booted, and its readiness was reported. A spare is ready when it was first armed.
    pub(in crate::supervisor) ready: bool,
    /// When it was killed. It is not the next life any more; only its process's end is still waited for.
    pub(in crate::supervisor) dropped: Option<Time>,
    /// A sign of failure, with the time until which a better reason may still come.
    pub(in crate::supervisor) suspicion: Option<(Time, String)>,
}

/// What stands ready for the failure of a driver VM.
fn ahead(spec: &Driver) -> StandbyPolicy {
    match (&spec.spare, spec.standby) {
        (Some(_), _) => StandbyPolicy::Spare,
        (None, config::Standby::Warm) => StandbyPolicy::Warm,
        (None, config::Standby::Snapshot) => StandbyPolicy::Snapshot,
        (None, config::Standby::Cold) => StandbyPolicy::Nothing,
    }
}

impl DriverVm {
    pub(in crate::supervisor) fn new(
        (name, spec): (&str, Driver),
        (device, spare, open, image): (HostDevice, Option<HostDevice>, Open, Image),
        (ends, mtu): (Table<Endpoint, EndRef>, Option<u16>),
        run_dir: &RunDir,
    ) -> Self {
        let ahead = ahead(&spec);
        let rests = traits(class_of(&ends)).rests;
        Self {
            name: name.into(),
            lifecycle: Lifecycle::new(RestartHistory::new(spec.restart.clone()), 0, ahead)
                .with_spare_after(spec.spare_after_ms)
                .with_rest(rests)
                .with_standbys(spec.standbys)
                .with_starts_ahead(spec.snapshots),
            spare: spare.map(|device| Spare::new(device, open)),
            held: HeldDevice::new(open),
            present: None,
            live_at: None,
            spec,
            reset_method: device.reset().best(),
            device,
            image: Arc::new(image),
            ends,
            mtu,
            life: None,
            watches: BTreeMap::new(),
            dying: None,
            ending: Vec::new(),
            standby: None,
            second: None,
            trust: Trust::default(),
            saved: None,
            too_slow_to_save: false,
            not_saved: None,
            resetting: None,
            reset_due: None,
            told_of_lack: false,
            console: Console::new(run_dir.console_log(name)),
            timeline: Timeline::default(),
            masks: Vec::new(),
            asked_to_mask: None,
            gone: Time(0),
            frames: MaskedCounts::default(),
            late_frames: MaskedCounts::default(),
            report: None,
            report_path: None,
            registers: String::new(),
            exit: String::new(),
            reason: None,
            last_outage: None,
            kernel: None,
            kernel_driver: None,
            available_memory: None,
            trial: None,
            rest: None,
            was_live: false,
        }
    }

    /// Goes by its spec, which is another one, from now on.
    pub(in crate::supervisor) fn adapt(&mut self) {
        let Driver { restart, spare_after_ms, standbys, snapshots, .. } = &self.spec;
        self.lifecycle.set_restart(restart.clone());
        self.lifecycle.set_spare_after(*spare_after_ms);
        self.lifecycle.keep(ahead(&self.spec), *standbys, *snapshots);
    }

    /// Whether none of its processes is waited for any more at `now`: it has ended for good, and what has not ended hangs in the kernel.
    pub(in crate::supervisor) fn has_ended(&self, now: Time) -> bool {
        let gone = self.life.is_none() || self.lifecycle.process_hangs();
        gone && all_hang(self.waiting_vms().map(|vm| vm.dropped), now) && *self.lifecycle.state() == State::Stopped
    }

    /// When a reset is tried to be begun again.
    pub(in crate::supervisor) fn reset_again_due(&self) -> Option<Time> {
        self.reset_due.into_iter().chain(self.spare.as_ref().and_then(|spare| spare.reset_due)).min()
    }

    /// When its standbys that have not ended were killed, if they were.
    pub(in crate::supervisor) fn killed(&self) -> impl Iterator<Item = Time> {
        self.waiting_vms().filter_map(|vm| vm.dropped)
    }

    fn waiting_vms(&self) -> impl Iterator<Item = &StandbyVm> {
        self.standby.iter().chain(&self.second)
    }

    /// It has ended for good, or is about to.
    pub(in crate::supervisor) fn is_being_stopped(&self) -> bool {
        matches!(self.lifecycle.state(), State::Stopped | State::Stopping)
    }

    /// What logs are about.
    pub(in crate::supervisor) fn span(&self) -> tracing::Span {
        super::run::span(&self.name, self.lifecycle.generation().map(Generation::get))
    }

    /// The present life, if it is of this generation.
    pub(in crate::supervisor) fn is_current(&self, generation: Generation) -> bool {
        self.life.as_ref().is_some_and(|life| life.generation == generation)
    }

    /// Whether `generation` is that of the spare that waits.
    pub(in crate::supervisor) fn is_spare(&self, generation: Generation) -> bool {
        self.spare.is_some() && self.lifecycle.standby().generation() == Some(generation)
    }

    /// Starts the process of `generation`, which is to serve. The device comes behind it where the VM may be restored from a snapshot,
    /// which has met none; else it has the device from its start.
    pub(in crate::supervisor) fn start(&mut self, program: &Program, generation: Generation) -> Result<(), StartError> {
        let purpose = if self.spec.snapshots { Purpose::ServeSoon } else { Purpose::Serve };
        self.life = Some(self.launch(program, generation, (purpose, &self.image))?);
        self.rest = None;
        Ok(())
    }

    /// Starts a process of `generation` from `image`.
    pub(in crate::supervisor) fn launch(
        &self,
        program: &Program,
        generation: Generation,
        (purpose, image): (Purpose, &Arc<Image>),
    ) -> Result<Life, StartError> {
        let name = format!("{}.{generation}", self.name);
        let mut inherited: Vec<OwnedFd> = Vec::new();
        let (nets, ends) = end_backends(&self.ends, self.mtu());
        let device = match purpose {
            Purpose::Serve => Some((&self.device, &self.held)),
            Purpose::WaitWithSpare => self.spare.as_ref().map(|spare| (&spare.device, &spare.held)),
            Purpose::Wait | Purpose::ServeSoon | Purpose::Save => None,
        };
        let files = device.map(|(_, held)| held.files()).transpose().map_err(StartError::Device)?;
        let files: Vec<BorrowedFd<'_>> = files.map(DeviceFiles::to_send).into_iter().flatten().collect();
        let (agent, theirs) = UnixStream::pair().map_err(StartError::Sockets)?;
        let agent = untrusted::Stream::new(agent).map_err(StartError::Sockets)?;
        let port = PortBackend { name: CONTROL_PORT.into(), end: PortEnd::Fd(theirs.as_raw_fd()) };
        inherited.push(theirs.into());
        // Its agent keeps the drivers off until the device has come.
        let awaits = if purpose.awaits_device() { " umbra.awaits" } else { "" };
        let snapshot_of = (purpose.awaits_device() && self.spec.snapshots).then(|| SnapshotOf {
            useless: self.trust.is_lost(|generation| self.has_life(generation)),
            ..begin::snapshot_of(image)
        });
        let begin = if snapshot_of.is_some() { Begin::Unmet } else { Begin::Boots };
        let spec = VmSpec {
            name,
            kernel: image.vmlinux.clone(),
            initrd: vec![image.initramfs.clone()],
            cmdline: format!("{CMDLINE}{}{awaits} {}", traits(self.class()).cmdline, self.spec.cmdline),
            cpus: self.spec.cpus,
            memory: self.spec.memory_or_default(),
            console: config::Console::Terminal,
            console_socket: None,
            polls_console: true,
            hvc: false,
            disks: Vec::new(),
            nets,
            sounds: Vec::new(),
            ports: std::iter::once(port).chain(ends).collect(),
            passthrough: device.into_iter().map(|(device, _)| device.bdf().to_string()).collect(),
            awaits_device: purpose.awaits_device(),
            has_time: matches!(purpose, Purpose::Wait | Purpose::Save),
            snapshot_of,
            only_saves: purpose == Purpose::Save,
            awaited: self.held.snapshot().filter(|_| purpose.awaits_device()).cloned(),
            interrupt_limit: std::num::NonZeroU32::new(self.spec.restart.interrupts_per_s),
        };
        let process = VmProcess::spawn(program, spec, (&inherited, &files), (Streams::Captured, self.spec.cpu_max))?;
        if let Some(pipe) = process.console() {
            // A smaller pipe works as well.
            let _ = nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_SETPIPE_SZ(CONSOLE_PIPE));
        }
        let mut life = Life::new((generation, Arc::clone(image), purpose, begin), process, agent, self.ends.len());
        // With a cold standby nothing is made ahead. On a disk that is too slow for one life the next one serves all the same.
        let saves = self.spec.standby != config::Standby::Cold && !self.too_slow_to_save;
        life.leaves_snapshot = purpose == Purpose::ServeSoon && saves;
        Ok(life)
    }

    /// Whether the process of `generation` is there and wanted.
    pub(super) fn has_life(&self, generation: Generation) -> bool {
        let roles = [LifeRole::Present, LifeRole::Standby(Rank::First), LifeRole::Standby(Rank::Second)];
        roles.into_iter().filter_map(|role| self.life_of(role)).any(|life| life.generation == generation)
    }

    /// The present life was started without the device.
    pub(in crate::supervisor) fn awaits_device(&self) -> bool {
        self.life.as_ref().is_some_and(|life| life.purpose.awaits_device())
    }

    fn mtu(&self) -> u16 {
        self.mtu.unwrap_or(config::DEFAULT_MTU)
    }

    /// Stops a device that would go on with what it has when nobody feeds it any more.
    pub(in crate::supervisor) fn silence(&self) {
        if let Err(error) = self.device.stop_dma() {
            tracing::warn!(%error, "cannot switch the device's bus mastering off");
        }
    }

    /// Closes the files of its devices: there is no life that could need them.
    pub(in crate::supervisor) fn close_files(&mut self) {
        self.held.close();
        if let Some(spare) = &mut self.spare {
            spare.held.close();
        }
    }

    pub(in crate::supervisor) fn status(&self) -> status::DriverStatus {
        status::DriverStatus {
            name: self.name.clone(),
            device: self.device.bdf().to_string(),
            driver: self.kernel_driver.clone(),
            kernel: self.kernel.clone(),
            generation: self.lifecycle.generation().map(Generation::get),
            state: self.lifecycle.state().name(),
            pid: self.life.as_ref().map(|life| life.process.pid()),
            uid: self.life.as_ref().and_then(|life| life.process.uid()),
            cgroup: self.life.as_ref().and_then(|life| CgroupStatus::of(&life.process)),
            carrier: self.lifecycle.has_carrier(),
            reset_method: self.reset_method,
            reset_meaning: self.device.reset().describe_use(self.reset_method),
            failures: self.lifecycle.history().total(),
            reason: self.reason.clone(),
            last_outage_ms: self.last_outage.map(crate::base::time::milliseconds),
            report: self.report_path.clone(),
            available_memory: self.available_memory,
            standby: self.standby_status(),
            usage: status::Usage { vcpus: self.life.as_ref().and_then(|life| life.vcpus.last()), threads: Vec::new() },
        }
    }
}
