//! A driver VM as the supervisor has it: its process and agent while it lives, its evidence when it has died.

pub(in crate::supervisor) mod begin;
pub(in crate::supervisor) mod console;
pub(in crate::supervisor) mod device;
pub(in crate::supervisor) mod dying;
pub(in crate::supervisor) mod ends;
pub(in crate::supervisor) mod spare;
pub(in crate::supervisor) mod standby;
mod starvation;
pub(in crate::supervisor) mod upgrade;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use umbra_driver_vm::protocol::{CONTROL_PORT, MAX_LINE, Mac};
use umbra_driver_vm::sound_protocol::SOUND_PORT;
use umbra_guest_images::image::Image;
use umbra_shadow::{Class, Generation};

pub(super) use ends::{EndLink, EndRef};

use super::class::carrier::Flaps;
use super::class::settings::Settings;
use super::driver::begin::Begin;
use super::driver::console::Console;
use super::driver::device::{Holder, Open, ResetJob};
use super::driver::dying::{Dying, Ending};
use super::driver::spare::Spare;
use super::driver::starvation::Watch;
use super::driver::upgrade::Trial;
use super::start::rundir::RunDir;
use crate::base::lines::Lines;
use crate::base::time::Time;
use crate::config::{self, Driver};
use crate::host::DeviceFiles;
use crate::host::reset::{self, ResetMethod};
use crate::host::sysfs::HostDevice;
use crate::lifecycle::policy::History;
use crate::lifecycle::{Ahead, Carrier, Lifecycle};
use crate::record::crash_report::{CrashReport, Mask};
use crate::record::status;
use crate::record::timeline::Timeline;
use crate::wire::messages::{MaskedCounts, NetBackend, PortBackend, PortEnd, VmSpec};
use crate::wire::spawn::{SpawnError, Streams, VmProcess};

/// What every driver VM's kernel is told: to end at once whenever it is not sure of itself (the shadow answers in the
/// meantime), to skip probing for hardware that is not there, and self-tests and registrations that nothing in a driver
/// VM uses (they are half of a stock kernel's way to its init). The agent is the only program there, so there is nobody
/// whom mitigations would keep apart. Details of the console come with the panic.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 oops=panic softlockup_panic=1 hung_task_panic=1 no_timer_check \
                       tsc=reliable random.trust_cpu=on cryptomgr.notests rcupdate.rcu_expedited=1 8250.nr_uarts=1 \
                       mitigations=off kfence.sample_interval=0 audit=0 apparmor=0 initcall_blacklist=jent_mod_init,\
                       crypto_kdf108_init,bpf_tcp_ca_kfunc_init,bpf_dummy_struct_ops_init";

/// Largest console pipe; what a VM prints between two turns of the loop fits in.
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

/// A driver VM.
#[derive(Debug)]
pub(in crate::supervisor) struct DriverVm {
    pub(in crate::supervisor) name: String,
    pub(in crate::supervisor) spec: Driver,
    /// The device of the present life.
    pub(in crate::supervisor) device: HostDevice,
    /// Its files.
    pub(in crate::supervisor) holder: Holder,
    /// The other device, where there is one.
    pub(in crate::supervisor) spare: Option<Spare>,
    /// The generation that is, or was last, the present life.
    pub(in crate::supervisor) present: Option<Generation>,
    pub(in crate::supervisor) image: Arc<Image>,
    pub(in crate::supervisor) ends: Vec<EndRef>,
    /// MTU of the network, bytes; `None` where the spec names none.
    pub(in crate::supervisor) mtu: Option<u16>,
    pub(in crate::supervisor) lifecycle: Lifecycle,
    pub(in crate::supervisor) life: Option<Life>,
    /// The look at the life's threads in the present silence.
    pub(in crate::supervisor) watch: Option<Watch>,
    /// The failed life, while it says its last words.
    pub(in crate::supervisor) dying: Option<Dying>,
    /// Killed processes whose end has not been seen yet.
    pub(in crate::supervisor) ending: Vec<Ending>,
    /// The next life, while it waits.
    pub(in crate::supervisor) standby: Option<StandbyVm>,
    pub(in crate::supervisor) resetting: Option<ResetJob>,
    pub(in crate::supervisor) console: Console,
    pub(in crate::supervisor) reset_method: Option<ResetMethod>,
    /// Steps since the last failure, or since the start.
    pub(in crate::supervisor) timeline: Timeline,
    /// The masks of the present outage.
    pub(in crate::supervisor) masks: Vec<Mask>,
    /// When the guests were first told to mask in the present outage.
    pub(in crate::supervisor) told_to_mask: Option<Time>,
    /// When the last of the guests that are live in the present outage went so.
    pub(in crate::supervisor) live_at: Option<Time>,
    /// When the last process was gone.
    pub(in crate::supervisor) gone: Time,
    /// The frames of the present outage.
    pub(in crate::supervisor) frames: MaskedCounts,
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
    /// Whether it ever served; before that, a wrong set-up is likelier than a crash.
    pub(in crate::supervisor) was_live: bool,
}

/// A life of a driver VM.
#[derive(Debug)]
pub(in crate::supervisor) struct Life {
    pub(in crate::supervisor) generation: Generation,
    /// What it was started from.
    pub(in crate::supervisor) image: Arc<Image>,
    pub(in crate::supervisor) process: VmProcess,
    /// Until it is closed or broken.
    pub(in crate::supervisor) agent: Option<Lines<UnixStream>>,
    /// Whether there may be more on the console.
    pub(in crate::supervisor) talking: bool,
    /// Whether the control channel is still of use.
    pub(in crate::supervisor) listening: bool,
    /// Its connection with each guest's device, by end.
    pub(in crate::supervisor) links: Vec<EndLink>,
    /// pvpanic: its kernel has said what it had to say.
    pub(in crate::supervisor) panicked: bool,
    pub(in crate::supervisor) registers: String,
    /// What it was started for.
    pub(in crate::supervisor) role: Role,
    /// Whether its agent knows which life it is.
    pub(in crate::supervisor) begin: Begin,
    /// What its agent has not been told yet of what guests ask.
    pub(in crate::supervisor) settings: Settings,
    /// How often its carrier has changed of late.
    pub(in crate::supervisor) flaps: Flaps,
}

/// What a process is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::supervisor) enum Role {
    /// It gets the device at once.
    Serves,
    /// It waits for it.
    Waits,
    /// It waits with the spare's device.
    Spare,
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
    /// It has been ready.
    pub(in crate::supervisor) told: bool,
    /// It was killed; its end is waited for.
    pub(in crate::supervisor) dropped: bool,
    /// A sign of failure, and until when a better reason is waited for.
    pub(in crate::supervisor) suspicion: Option<(Time, String)>,
}

impl DriverVm {
    pub(in crate::supervisor) fn new(
        (name, spec): (&str, Driver),
        (device, spare, open, image): (HostDevice, Option<HostDevice>, Open, Image),
        (ends, mtu): (Vec<EndRef>, Option<u16>),
        run_dir: &RunDir,
    ) -> Self {
        let ahead = match (&spare, spec.standby) {
            (Some(_), _) => Ahead::Spare,
            (None, config::Standby::Warm) => Ahead::Warm,
            (None, config::Standby::Cold) => Ahead::Nothing,
        };
        Self {
            name: name.into(),
            lifecycle: Lifecycle::new(History::new(spec.restart.clone()), 0, ahead)
                .with_spare_after(spec.spare_after_ms),
            spare: spare.map(|device| Spare::new(device, open)),
            holder: Holder::new(open),
            present: None,
            live_at: None,
            spec,
            reset_method: device.reset().best(),
            device,
            image: Arc::new(image),
            ends,
            mtu,
            life: None,
            watch: None,
            dying: None,
            ending: Vec::new(),
            standby: None,
            resetting: None,
            console: Console::new(run_dir.console_log(name)),
            timeline: Timeline::default(),
            masks: Vec::new(),
            told_to_mask: None,
            gone: Time(0),
            frames: MaskedCounts::default(),
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
            was_live: false,
        }
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

    /// Starts the process of `generation`, with the device.
    pub(in crate::supervisor) fn start(&mut self, program: &Path, generation: Generation) -> Result<(), StartError> {
        self.console.begin(&format!("{}.{generation}", self.name));
        self.life = Some(self.launch(program, generation, Role::Serves)?);
        Ok(())
    }

    /// Starts a process of `generation`.
    pub(in crate::supervisor) fn launch(
        &self,
        program: &Path,
        generation: Generation,
        role: Role,
    ) -> Result<Life, StartError> {
        let name = format!("{}.{generation}", self.name);
        let mut inherited: Vec<OwnedFd> = Vec::new();
        let (mut nets, mut sounds) = (Vec::new(), Vec::new());
        for (n, end) in self.ends.iter().enumerate() {
            match end.device.class {
                Class::Net => nets.push(NetBackend::VhostUser { mac: device_mac(n), mtu: self.mtu() }),
                Class::Sound => {
                    sounds.push(PortBackend { name: format!("{SOUND_PORT}.{n}"), end: PortEnd::Attached });
                }
            }
        }
        let device = match role {
            Role::Serves => Some((&self.device, &self.holder)),
            Role::Spare => self.spare.as_ref().map(|spare| (&spare.device, &spare.holder)),
            Role::Waits => None,
        };
        let files = device.map(|(_, holder)| holder.files()).transpose().map_err(StartError::Device)?;
        let files: Vec<BorrowedFd<'_>> = files.map(DeviceFiles::to_send).into_iter().flatten().collect();
        let (agent, theirs) = UnixStream::pair().map_err(StartError::Sockets)?;
        agent.set_nonblocking(true).map_err(StartError::Sockets)?;
        let port = PortBackend { name: CONTROL_PORT.into(), end: PortEnd::Fd(theirs.as_raw_fd()) };
        inherited.push(theirs.into());
        // Its agent keeps the drivers off until the device has come.
        let awaits = if role == Role::Waits { " umbra.awaits" } else { "" };
        let snapshot_of = (role == Role::Waits && self.spec.snapshots).then(|| self.image_digest());
        let begin = if snapshot_of.is_some() { Begin::Unmet } else { Begin::Boots };
        let image = if role == Role::Serves { &self.image } else { self.next_image() };
        let spec = VmSpec {
            name,
            kernel: image.vmlinux.clone(),
            initrd: vec![image.initramfs.clone()],
            cmdline: format!("{CMDLINE}{awaits} {}", self.spec.cmdline),
            cpus: self.spec.cpus,
            memory: self.spec.memory,
            console: config::Console::Terminal,
            disks: Vec::new(),
            nets,
            sounds: Vec::new(),
            ports: std::iter::once(port).chain(sounds).collect(),
            passthrough: device.into_iter().map(|(device, _)| device.bdf().to_string()).collect(),
            standby: role == Role::Waits,
            snapshot_of,
            awaited: self.holder.snapshot().filter(|_| role == Role::Waits).cloned(),
            interrupt_limit: self.spec.restart.interrupts_per_s,
        };
        let process = VmProcess::spawn(program, spec, (&inherited, &files), Streams::Captured)?;
        if let Some(pipe) = process.console() {
            // A smaller pipe works as well.
            let _ = nix::fcntl::fcntl(pipe, nix::fcntl::FcntlArg::F_SETPIPE_SZ(CONSOLE_PIPE));
        }
        Ok(Life {
            generation,
            image: Arc::clone(image),
            process,
            agent: Some(Lines::new(agent, MAX_LINE)),
            talking: true,
            listening: true,
            links: self.ends.iter().map(|_| EndLink::default()).collect(),
            panicked: false,
            registers: String::new(),
            role,
            begin,
            settings: Settings::default(),
            flaps: Flaps::default(),
        })
    }

    fn mtu(&self) -> u16 {
        self.mtu.unwrap_or(config::DEFAULT_MTU)
    }

    /// True if it serves sound devices.
    pub(in crate::supervisor) fn is_sound(&self) -> bool {
        self.ends.iter().any(|end| end.device.class == Class::Sound)
    }

    /// Keeps a sound card from playing the same buffer over and over when nobody fills it any more.
    pub(in crate::supervisor) fn silence(&self) {
        if let Err(error) = self.device.stop_dma() {
            tracing::warn!(%error, "cannot switch the card's bus mastering off");
        }
    }

    /// Closes the files of its devices: there is no life that could need them.
    pub(in crate::supervisor) fn close_files(&mut self) {
        self.holder.close();
        if let Some(spare) = &mut self.spare {
            spare.holder.close();
        }
    }

    pub(in crate::supervisor) fn status(&self) -> status::DriverStatus {
        status::DriverStatus {
            name: self.name.clone(),
            device: self.device.bdf().to_string(),
            driver: self.kernel_driver.clone(),
            kernel: self.kernel.clone(),
            generation: self.lifecycle.generation().map(Generation::get),
            state: self.lifecycle.state().name().into(),
            pid: self.life.as_ref().map(|life| life.process.pid()),
            carrier: self.lifecycle.carrier() == Carrier::Up,
            reset_method: reset::word(self.reset_method).into(),
            reset_meaning: self.device.reset().describe_use(self.reset_method),
            failures: self.lifecycle.history().total(),
            reason: self.reason.clone(),
            last_outage_ms: self.last_outage.map(crate::base::time::milliseconds),
            report: self.report_path.clone(),
            available_memory: self.available_memory,
            standby: self.standby_status(),
        }
    }
}

/// The address of network device `n` of a driver VM, by which its agent finds the interface. Never on a wire.
pub(in crate::supervisor) fn device_mac(n: usize) -> Mac {
    let [.., high, low] = n.to_be_bytes();
    Mac([0x02, 0x75, 0x6d, 0x62, high, low])
}
