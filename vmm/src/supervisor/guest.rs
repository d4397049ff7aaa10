//! A guest as the supervisor has it: its process, and what its network devices have said.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use umbra_driver_vm::protocol::{Mac, Offloads, RxMode};
use umbra_shadow::sound::Card;
use umbra_shadow::{Class, DeviceId, Generation};

use crate::base::time::Time;
use crate::config::{Console, Guest};
use crate::lifecycle::End;
use crate::record::status;
use crate::wire::channel;
use crate::wire::messages::{
    DeviceStatus, MaskedCounts, NetBackend, PortBackend, PortEnd, SoundBackend, SoundCounts, ToVm, VmEnd, VmSpec,
};
use crate::wire::spawn::{SpawnError, Streams, VmProcess};

/// Messages that wait at most for a guest's process, which is stopped or hangs.
const MAX_UNSENT: usize = 1024;

/// A guest.
#[derive(Debug)]
pub(super) struct GuestVm {
    pub(super) name: String,
    pub(super) spec: Guest,
    pub(super) process: Option<VmProcess>,
    pub(super) state: GuestState,
    pub(super) started: Time,
    pub(super) nets: Vec<GuestNet>,
    pub(super) sounds: Vec<GuestSound>,
    /// What is to become of it when its process ends.
    pub(super) at_end: AtEnd,
    /// Its vCPUs have run, in this life or one before.
    pub(super) has_run: bool,
    /// How the VM ended, once its process has said so.
    pub(super) end: Option<VmEnd>,
    /// Why the process could not run the VM, once it has said so.
    pub(super) error: Option<String>,
    /// Whether the control channel is still of use.
    pub(super) listening: bool,
    /// What its process has not taken yet, in its order.
    pub(super) unsent: VecDeque<(ToVm, Option<OwnedFd>)>,
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
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Rebooting => "rebooting",
            Self::Off => "off",
            Self::Failed(_) => "failed",
        }
    }
}

/// A network device of a guest.
#[derive(Debug)]
pub(super) struct GuestNet {
    /// The driver VM that serves it, and as which of its ends.
    pub(super) driver: Option<(usize, End)>,
    pub(super) mac: Mac,
    /// The addresses of the other devices on the same NIC.
    neighbours: Vec<Mac>,
    /// What the guest's driver asked for last.
    pub(super) mode: RxMode,
    pub(super) offloads: Offloads,
    /// The last answer to `QueryStatus`.
    pub(super) status: Option<DeviceStatus>,
    /// Whether that answers the last question.
    pub(super) fresh: bool,
}

/// A sound device of a guest.
#[derive(Debug, Default)]
pub(super) struct GuestSound {
    /// The driver VM that serves it, and as which of its ends.
    pub(super) driver: Option<(usize, End)>,
    /// The card as its first driver VM reported it; the guest's for its life.
    pub(super) card: Option<Card>,
    /// The generation that it is live with, or was last.
    pub(super) live: Option<Generation>,
    /// The last answer to `QueryStatus`.
    pub(super) status: Option<DeviceStatus>,
    /// Whether that answers the last question.
    pub(super) fresh: bool,
}

impl GuestSound {
    fn status(&self, index: usize, driver_name: impl Fn(usize) -> String) -> status::SoundStatus {
        let (mode, kept_bytes, sums) = match &self.status {
            Some(DeviceStatus::Sound { mode, kept_bytes, sums }) => (mode.as_str().into(), *kept_bytes, *sums),
            _ => ("unknown".into(), 0, SoundCounts::default()),
        };
        status::SoundStatus {
            index,
            driver: self.driver.map(|(driver, _)| driver_name(driver)),
            card: self.card.as_ref().map(|card| card.name.clone()),
            mode,
            kept_bytes,
            sums,
        }
    }
}

impl GuestVm {
    /// A guest that does not run yet; `serves` and `plays` say which driver VM, as which end, is behind network device
    /// and sound device `n`.
    pub(super) fn new(
        name: &str,
        spec: Guest,
        serves: impl Fn(usize) -> Option<(usize, End)>,
        plays: impl Fn(usize) -> Option<(usize, End)>,
    ) -> Self {
        let sounds = (0..spec.sound.len()).map(|n| GuestSound { driver: plays(n), ..GuestSound::default() }).collect();
        let nets = spec.net.iter().enumerate();
        let nets = nets.map(|(n, net)| GuestNet::new(net.mac_or_default(name, n), serves(n))).collect();
        Self {
            name: name.into(),
            spec,
            process: None,
            state: GuestState::Starting,
            started: Time::now(),
            nets,
            sounds,
            at_end: AtEnd::default(),
            has_run: false,
            end: None,
            error: None,
            listening: false,
            unsent: VecDeque::new(),
        }
    }

    /// Says which other devices share the NIC of network device `n`, by their addresses.
    pub(super) fn set_neighbours(&mut self, of: impl Fn(usize) -> Vec<Mac>) {
        for (n, net) in self.nets.iter_mut().enumerate() {
            net.neighbours = of(n);
        }
    }

    /// Starts the guest's process.
    pub(super) fn start(&mut self, program: &Path) -> Result<(), SpawnError> {
        let streams = if self.has_terminal() { Streams::Terminal } else { Streams::Quiet };
        self.forget();
        self.at_end = AtEnd::default();
        self.end = None;
        self.error = None;
        self.state = GuestState::Starting;
        self.started = Time::now();
        self.process = Some(VmProcess::spawn(program, self.vm_spec(), (&[], &[]), streams)?);
        self.listening = true;
        Ok(())
    }

    /// Its process is gone: what that had asked for and had not read is of no use any more.
    pub(super) fn forget(&mut self) {
        for net in &mut self.nets {
            *net = GuestNet { neighbours: std::mem::take(&mut net.neighbours), ..GuestNet::new(net.mac, net.driver) };
        }
        for sound in &mut self.sounds {
            (sound.live, sound.status) = (None, None);
        }
        self.unsent.clear();
    }

    /// Its network device `device`.
    pub(super) fn net(&self, device: DeviceId) -> Option<&GuestNet> {
        self.nets.get(usize::from(device.index)).filter(|_| device.class == Class::Net)
    }

    /// Its network device `device`.
    pub(super) fn net_mut(&mut self, device: DeviceId) -> Option<&mut GuestNet> {
        self.nets.get_mut(usize::from(device.index)).filter(|_| device.class == Class::Net)
    }

    /// Its sound device `device`.
    pub(super) fn sound_mut(&mut self, device: DeviceId) -> Option<&mut GuestSound> {
        self.sounds.get_mut(usize::from(device.index)).filter(|_| device.class == Class::Sound)
    }

    /// The driver VM behind `device`, and as which of its ends.
    pub(super) fn driver_of(&self, device: DeviceId) -> Option<(usize, End)> {
        let index = usize::from(device.index);
        match device.class {
            Class::Net => self.nets.get(index)?.driver,
            Class::Sound => self.sounds.get(index)?.driver,
        }
    }

    /// `device` is not live with a driver VM any more.
    pub(super) fn forget_live(&mut self, device: DeviceId) {
        if let Some(sound) = self.sound_mut(device) {
            sound.live = None;
        }
    }

    /// An answer to `QueryStatus`.
    pub(super) fn keep_status(&mut self, device: DeviceId, status: DeviceStatus) {
        let (kept, fresh) = match device.class {
            Class::Net => match self.net_mut(device) {
                Some(net) => (&mut net.status, &mut net.fresh),
                None => return,
            },
            Class::Sound => match self.sound_mut(device) {
                Some(sound) => (&mut sound.status, &mut sound.fresh),
                None => return,
            },
        };
        (*kept, *fresh) = (Some(status), true);
    }

    pub(super) fn has_terminal(&self) -> bool {
        self.spec.console == Console::Terminal
    }

    /// Whether it has ended for good.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, GuestState::Off | GuestState::Failed(_))
    }

    /// Sends `message` to the process, with `fd` if there is one; what it does not take now waits. A process that is gone is
    /// noticed elsewhere.
    pub(super) fn tell(&mut self, message: &ToVm, fd: Option<OwnedFd>) -> Result<(), channel::Error> {
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
            let fd = fd.as_ref().map(AsFd::as_fd);
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

    /// Whether the cards of all its sound devices are known: the guest sees them from the first moment on.
    pub(super) fn has_cards(&self) -> bool {
        self.sounds.iter().all(|sound| sound.card.is_some())
    }

    /// The driver VMs that serve it, and as which of their ends.
    pub(super) fn drivers(&self) -> Vec<(usize, End)> {
        let nets = self.nets.iter().filter_map(|net| net.driver);
        nets.chain(self.sounds.iter().filter_map(|sound| sound.driver)).collect()
    }

    fn sounds(&self) -> Vec<SoundBackend> {
        let sounds = self.spec.sound.iter().zip(&self.sounds);
        sounds
            .filter_map(|(spec, sound)| Some(SoundBackend { card: sound.card.clone()?, policy: spec.policy }))
            .collect()
    }

    fn vm_spec(&self) -> VmSpec {
        let nets = self.spec.net.iter().zip(&self.nets).map(|(spec, net)| {
            let (mac, mtu) = (net.mac, spec.mtu_or_default());
            match &spec.tap {
                Some(interface) => NetBackend::Tap { interface: interface.clone(), mac, mtu },
                None => NetBackend::Split {
                    mac,
                    mtu,
                    neighbours: net.neighbours.clone(),
                    allow_any_source: spec.allow_any_source,
                },
            }
        });
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
            disks: self.spec.disk.clone(),
            nets: nets.collect(),
            sounds: self.sounds(),
            ports: self.spec.port.iter().map(port).collect(),
            passthrough: self.spec.passthrough.clone(),
            standby: false,
            // Nobody would restart a guest for it.
            snapshot_of: None,
            awaited: None,
            interrupt_limit: 0,
        }
    }

    /// Whether all split devices have answered the last `QueryStatus`.
    pub(super) fn is_fresh(&self) -> bool {
        self.process.is_none()
            || (self.nets.iter().all(|net| net.fresh || net.driver.is_none())
                && self.sounds.iter().all(|sound| sound.fresh))
    }

    pub(super) fn status(&self, driver_name: impl Fn(usize) -> String) -> status::GuestStatus {
        let nets = self.spec.net.iter().zip(&self.nets).enumerate();
        status::GuestStatus {
            name: self.name.clone(),
            state: self.state.name().into(),
            reason: if let GuestState::Failed(why) = &self.state { Some(why.clone()) } else { None },
            pid: self.process.as_ref().map(VmProcess::pid),
            uptime_s: Time::now().since(self.started).as_secs_f64(),
            nets: nets.map(|(n, (spec, net))| net.status(n, spec.tap.clone(), &driver_name)).collect(),
            sounds: self.sounds.iter().enumerate().map(|(n, sound)| sound.status(n, &driver_name)).collect(),
        }
    }
}

impl GuestNet {
    fn new(mac: Mac, driver: Option<(usize, End)>) -> Self {
        // Until the guest's driver says otherwise: what a NIC receives after it was opened, and all multicast,
        // because a guest without the control queue never says.
        let mode = RxMode { all_multicast: true, unicast: vec![mac], ..RxMode::default() };
        let (neighbours, offloads) = (Vec::new(), Offloads::default());
        Self { driver, mac, neighbours, mode, offloads, status: None, fresh: false }
    }

    fn status(&self, index: usize, tap: Option<String>, driver_name: impl Fn(usize) -> String) -> status::NetStatus {
        let mut status = status::NetStatus {
            index,
            mac: self.mac.to_string(),
            driver: self.driver.map(|(driver, _)| driver_name(driver)),
            mode: if tap.is_some() { "tap".into() } else { "unknown".into() },
            tap,
            frames_out: 0,
            frames_in: 0,
            foreign_source: 0,
            logged_now: 0,
            masked: MaskedCounts::default(),
        };
        if let Some(DeviceStatus::Net { mode, frames_out, frames_in, foreign_source, logged_now, masked }) =
            &self.status
        {
            status.foreign_source = *foreign_source;
            status.mode = mode.as_str().into();
            (status.frames_out, status.frames_in) = (*frames_out, *frames_in);
            (status.logged_now, status.masked) = (*logged_now, *masked);
        }
        status
    }
}
