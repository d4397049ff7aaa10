//! A guest as the supervisor has it: its process, and its devices.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use umbra_shadow::DeviceId;
use umbra_splitter::log_limit::LogLimit;
use umbra_splitter::untrusted::Elsewhere;

use super::class::{self, Backends, Devices, GuestDevice, Statuses};
use super::ids::DriverId;
use super::power_button::PowerButton;
use super::resize::Grown;
use super::run_error::WhyFailed;
use super::vcpu_answers::VcpuAnswers;
use crate::base::held::Held;
use crate::base::time::Time;
use crate::config::{Console, Guest};
use crate::lifecycle::Endpoint;
use crate::lifecycle::policy::RestartHistory;
use crate::record::status::{self, CgroupStatus};
use crate::wire::cgroup_bounds;
use crate::wire::channel;
use crate::wire::messages::{DeviceStatus, PortBackend, PortEnd, ToVm, VmEnd, VmSpec};
use crate::wire::spawn::{Program, SpawnError, Streams, VmProcess};

/// Messages kept for a guest's process that does not read, because it is stopped or hangs. An outage costs a handful for
/// each device.
const MAX_UNSENT: usize = 1024;

/// A guest.
#[derive(Debug)]
pub(super) struct GuestVm {
    pub(super) name: String,
    pub(super) spec: Guest,
    /// Where viewers of its console connect.
    console_socket: PathBuf,
    pub(super) process: Option<VmProcess>,
    /// The files that it has open by their names.
    pub(super) held: Held,
    pub(super) state: GuestState,
    pub(super) started: Time,
    pub(super) devices: Devices,
    /// What is to become of it when its process ends.
    pub(super) at_end: AtEnd,
    /// The power button was pressed, and is pressed again until it has ended.
    pub(super) button: Option<PowerButton>,
    /// When its process is tried to be started again, where the host had none to start.
    pub(super) start_due: Option<Time>,
    /// Its crashes after which it was started again.
    pub(super) crashes: RestartHistory,
    /// It is to be killed when its devices are at rest, or at this time.
    pub(super) killing: Option<Time>,
    /// One of its devices could not come to rest before that.
    pub(super) unrest: bool,
    /// When its process was killed, if it was.
    pub(super) killed: Option<Time>,
    /// Its vCPUs have run, in this life or one before.
    pub(super) has_run: bool,
    /// How the VM ended, once its process has said so.
    pub(super) end: Option<VmEnd>,
    /// Why the process could not run the VM, once it has said so.
    pub(super) error: Option<WhyFailed>,
    /// What its process said of its vCPUs.
    pub(super) vcpus: VcpuAnswers,
    /// Whether the control channel is still of use.
    pub(super) listening: bool,
    /// Bounds the warnings that its process brings about.
    pub(super) warnings: LogLimit,
    /// What its process has not taken yet, in its order. A driver VM's process may have sent something through a socket already.
    pub(super) unsent: VecDeque<(ToVm, Option<Elsewhere<OwnedFd>>)>,
    /// Clients that wait for another size of a disk, in the order in which they asked.
    pub(super) resizing: VecDeque<(Option<u64>, DeviceId)>,
    /// The disks on files of which its process has said that they have grown.
    pub(super) grown: BTreeMap<DeviceId, Grown>,
}

/// What is to become of a guest when its process ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum AtEnd {
    /// Whatever the guest does: off, or started again after its own reset.
    #[default]
    Whatever,
    /// It stays off (`umbra stop GUEST`).
    Stay,
    /// It is started again (`umbra reboot GUEST`).
    StartAgain,
}

/// Where a guest is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum GuestState {
    /// The process builds the VM.
    Starting,
    /// vCPUs run.
    Running,
    /// It was reset; the process is about to be replaced.
    Rebooting,
    /// Powered off.
    Off,
    /// Ended in another way.
    Failed(String),
}

impl GuestState {
    pub(super) fn name(&self) -> status::GuestStateName {
        match self {
            Self::Starting => status::GuestStateName::Starting,
            Self::Running => status::GuestStateName::Running,
            Self::Rebooting => status::GuestStateName::Rebooting,
            Self::Off => status::GuestStateName::Off,
            Self::Failed(_) => status::GuestStateName::Failed,
        }
    }
}

impl GuestVm {
    /// Whether disk `disk` of all its disks is on a file of the host.
    ///
    /// # Errors
    /// It has no such disk; for people.
    pub(super) fn has_disk_on_file(&self, disk: u16) -> Result<bool, String> {
        let (name, count) = (&self.name, self.spec.disk.len());
        let spec = self.spec.disk.get(usize::from(disk));
        spec.map(|spec| spec.path.is_some()).ok_or_else(|| match count {
            0 => format!("{name} has no disks"),
            1 => format!("{name} has one disk, vda"),
            _ => format!("{name} has {count} disks, vda and so on"),
        })
    }

    /// Whether its process takes a connection now. One that does not read its waiting messages would not read this one either.
    pub(super) fn takes_connections(&self) -> bool {
        self.process.is_some() && self.listening && self.unsent.is_empty()
    }

    /// Whether its process has answered the last question about `device`.
    pub(super) fn has_answered(&self, device: DeviceId) -> bool {
        self.devices.get(&device).is_some_and(|device| device.fresh)
    }

    /// A guest that does not run yet.
    pub(super) fn new(name: &str, spec: Guest, devices: Devices, console_socket: PathBuf) -> Self {
        Self {
            name: name.into(),
            crashes: RestartHistory::new(spec.restart.policy()),
            button: None,
            start_due: None,
            spec,
            console_socket,
            process: None,
            held: Held::default(),
            state: GuestState::Starting,
            started: Time::now(),
            devices,
            at_end: AtEnd::default(),
            killing: None,
            unrest: false,
            killed: None,
            has_run: false,
            end: None,
            error: None,
            vcpus: VcpuAnswers::default(),
            listening: false,
            warnings: LogLimit::default(),
            unsent: VecDeque::new(),
            resizing: VecDeque::new(),
            grown: BTreeMap::new(),
        }
    }

    /// Starts the guest's process.
    pub(super) fn start(&mut self, program: &Program) -> Result<(), SpawnError> {
        let streams = if self.has_terminal() { Streams::Terminal } else { Streams::Quiet };
        self.forget();
        (self.at_end, self.killing, self.unrest, self.killed) = (AtEnd::default(), None, false, None);
        self.button = None;
        self.end = None;
        self.error = None;
        self.state = GuestState::Starting;
        self.started = Time::now();
        self.process = Some(VmProcess::spawn(program, self.vm_spec(), (&[], &[]), (streams, self.spec.cpu_max))?);
        let disks = self.spec.disk.iter().filter_map(|disk| disk.path.as_deref());
        if let Some(group) = self.process.as_ref().and_then(VmProcess::group) {
            cgroup_bounds::lift_for_disks_in_memory(group, disks.clone().map(Into::into).collect());
        }
        let console = if let Console::File(path) = &self.spec.console { path.parent() } else { None };
        self.held = Held::new(disks.chain(console));
        (self.listening, self.start_due) = (true, None);
        Ok(())
    }

    /// Forgets what its process, which is gone, had asked for and had not read.
    pub(super) fn forget(&mut self) {
        self.devices.values_mut().for_each(GuestDevice::forget);
        self.unsent.clear();
        self.vcpus = VcpuAnswers::default();
    }

    /// The driver VM behind `device`, and as which of its ends.
    pub(super) fn driver_of(&self, device: DeviceId) -> Option<(DriverId, Endpoint)> {
        self.devices.get(&device)?.driver
    }

    /// `device` is not live with a driver VM any more.
    pub(super) fn forget_live(&mut self, device: DeviceId) {
        if let Some(device) = self.devices.get_mut(&device) {
            device.forget_live();
        }
    }

    /// An answer to `QueryStatus`.
    pub(super) fn keep_status(&mut self, device: DeviceId, status: DeviceStatus) {
        if let Some(device) = self.devices.get_mut(&device) {
            (device.status, device.fresh) = (Some(status), true);
        }
    }

    /// The answers of its devices to an earlier `QueryStatus` do not count any more. Whether there is anything to ask: vCPUs, or a
    /// device that a driver VM serves.
    pub(super) fn expect_answers(&mut self) -> bool {
        self.devices.values_mut().for_each(|device| device.fresh = false);
        self.vcpus.expect() || self.devices.values().any(|device| device.driver.is_some())
    }

    pub(super) fn has_terminal(&self) -> bool {
        self.spec.console == Console::Terminal
    }

    /// Whether it was killed because its kernel panicked.
    pub(super) fn dies_of_panic(&self) -> bool {
        self.state == GuestState::Rebooting || self.error.is_some()
    }

    /// Whether it has ended and is not started again.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, GuestState::Off | GuestState::Failed(_))
    }

    /// Its devices that lose something by a reset of the host's device, and are served.
    pub(super) fn resting_devices(&self) -> impl Iterator<Item = DeviceId> {
        let rests = |(id, device): &(&DeviceId, &GuestDevice)| class::traits(id.class).rests && device.is_live();
        self.devices.iter().filter(rests).map(|(id, _)| *id)
    }

    /// Whether one of its devices keeps for a driver VM that is away what would be lost with its process.
    pub(super) fn keeps_for_one_away(&self) -> bool {
        self.devices.iter().any(|(id, device)| class::traits(id.class).rests && device.is_left())
    }

    /// Kills its process.
    pub(super) fn kill(&mut self) {
        if let Some(process) = &mut self.process {
            process.kill();
            self.killed.get_or_insert(Time::now());
        }
    }

    /// Sends `message` to the process, with `fd` if there is one; what it does not take now waits. A process that is gone is
    /// noticed elsewhere.
    pub(super) fn tell(&mut self, message: &ToVm, fd: Option<Elsewhere<OwnedFd>>) -> Result<(), channel::Error> {
        if self.process.is_none() {
            return Ok(());
        }
        // A question that is not answered in time has no answer.
        if matches!(message, ToVm::QueryStatus) && !self.unsent.is_empty() {
            return Ok(());
        }
        if self.unsent.len() >= MAX_UNSENT {
            return Err(channel::Error::Full);
        }
        self.unsent.push_back((message.clone(), fd));
        self.send_on()
    }

    /// Sends what waits, as far as the process takes it.
    pub(super) fn send_on(&mut self) -> Result<(), channel::Error> {
        let Some(process) = &self.process else { return Ok(()) };
        while let Some((message, fd)) = self.unsent.front() {
            let fd = fd.as_ref().map(|fd| fd.as_fd());
            match process.channel().send_now(message, fd.as_slice()) {
                Err(channel::Error::Full) => return Ok(()),
                Ok(()) | Err(channel::Error::Closed) => drop(self.unsent.pop_front()),
                Err(error) => {
                    self.unsent.pop_front();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Whether all is known that it sees from its first moment on.
    pub(super) fn knows_its_devices(&self) -> bool {
        self.devices.values().all(GuestDevice::is_known)
    }

    /// The driver VMs that serve it, and as which of their ends.
    pub(super) fn drivers(&self) -> Vec<(DriverId, Endpoint)> {
        self.devices.values().filter_map(|device| device.driver).collect()
    }

    fn vm_spec(&self) -> VmSpec {
        let Backends { nets, sounds, disks } = class::backends(&self.spec, &self.devices);
        let port = |port: &crate::config::Port| PortBackend {
            name: port.name.clone(),
            end: PortEnd::Listen(port.socket.clone()),
        };
        VmSpec {
            name: self.name.clone(),
            kernel: self.spec.kernel.clone(),
            initrd: self.spec.initrd.clone(),
            cmdline: self.spec.cmdline.clone(),
            cpus: self.spec.cpus,
            memory: self.spec.memory,
            console: self.spec.console.clone(),
            console_socket: Some(self.console_socket.clone()),
            polls_console: false,
            hvc: self.spec.has_hvc_console(),
            disks,
            nets,
            sounds,
            ports: self.spec.port.iter().map(port).collect(),
            passthrough: self.spec.passthrough.clone(),
            awaits_device: false,
            has_time: false,
            // Nobody would restart a guest for it.
            snapshot_of: None,
            only_saves: false,
            awaited: None,
            interrupt_limit: None,
        }
    }

    /// Whether its process, and all devices that a driver VM serves, have answered the last `QueryStatus`.
    pub(super) fn is_fresh(&self) -> bool {
        self.process.is_none()
            || self.vcpus.is_fresh() && self.devices.values().all(|device| device.fresh || device.driver.is_none())
    }

    pub(super) fn status(&self, driver_name: impl Fn(DriverId) -> String) -> status::GuestStatus {
        let Statuses { nets, sounds, disks } = class::status(&self.spec, &self.devices, driver_name);
        status::GuestStatus {
            name: self.name.clone(),
            state: self.state.name(),
            reason: if let GuestState::Failed(why) = &self.state { Some(why.clone()) } else { None },
            pid: self.process.as_ref().map(VmProcess::pid),
            uid: self.process.as_ref().and_then(VmProcess::uid),
            cgroup: self.process.as_ref().and_then(CgroupStatus::of),
            uptime_s: self.process.as_ref().map_or(0.0, |_| Time::now().since(self.started).as_secs_f64()),
            nets,
            sounds,
            disks,
            usage: status::Usage { vcpus: self.vcpus.last(), threads: Vec::new() },
        }
    }
}
