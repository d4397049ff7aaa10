//! What users configure: file format, command line and documentation at once. `machine.toml` is a [`Machine`].
//!
//! Everything that the text alone can show to be wrong is checked here: [`Machine::parse`] for files, with the line of each
//! mistake, and [`Machine::check`] for machines made from flags. Whether files and devices exist is checked before anything starts
//! (`supervisor::preflight`). `docs/configuration.md` describes each key.

mod cgroup;
pub mod changes;
mod check;
mod guest_disk;
mod memory;
pub mod metrics_address;
mod parse;

pub use cgroup::{Cgroup, CgroupError, CpuMax, CpuMaxError};
pub use check::{MAX_CPUS, PathStep, Problem};
pub use guest_disk::{Disk, DiskSize, DiskSizeError, GuestDisk, OnFull};
pub use memory::{MemorySize, MemorySizeError};
pub use parse::SpecError;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use umbra_driver_vm::protocol::Mac;
use umbra_shadow::sound::Policy;

use crate::config::metrics_address::Address;

/// A machine file: guests and the drivers that serve them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Where metrics are served: a socket's path, or a loopback address with a port; nowhere if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Address>,
    /// What the processes of VMs may still do once their VMs run.
    #[serde(default, skip_serializing_if = "Confine::is_default")]
    pub confine: Confine,
    /// In which control group those of the VMs are made, which bound what their processes take.
    #[serde(default, skip_serializing_if = "Cgroup::is_default")]
    pub cgroup: Cgroup,
    /// What is kept of past runs.
    #[serde(default, skip_serializing_if = "Keep::is_default")]
    pub history: Keep,
    /// Guests by name: `[guest.NAME]`.
    #[serde(default)]
    pub guest: BTreeMap<String, Guest>,
    /// Driver VMs by name: `[driver.NAME]`.
    #[serde(default)]
    pub driver: BTreeMap<String, Driver>,
}

/// `[history]`: what is kept of past runs, events and crash reports, in the state directory. A run that begins removes what is more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Keep {
    /// Runs, the present one among them; 0: nothing is kept.
    pub runs: u32,
    /// Longest time since a run's last event, in days.
    pub days: u32,
    /// Most that all past runs take together, besides the present one.
    pub size: MemorySize,
}

impl Default for Keep {
    /// A run takes 4 MiB of events and some 6 MiB of reports for each driver VM at most, and much less mostly.
    fn default() -> Self {
        Self { runs: 20, days: 90, size: MemorySize(256 << 20) }
    }
}

impl Keep {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Whether the processes of VMs are kept to what they have open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Confine {
    /// They are; what they must not do ends them.
    #[default]
    On,
    /// System calls that they must not make are logged by the kernel, and done.
    Log,
    /// They are not.
    Off,
}

impl Confine {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Log => "log",
            Self::Off => "off",
        }
    }
}

/// `[guest.NAME]`: a user's VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guest {
    /// Kernel: a bzImage or an unpacked vmlinux (ELF).
    pub kernel: PathBuf,
    /// Initial RAM disks, handed over one behind the other.
    #[serde(default)]
    pub initrd: Vec<PathBuf>,
    /// Kernel command line.
    #[serde(default = "default_cmdline")]
    pub cmdline: String,
    /// Number of vCPUs.
    #[serde(default = "default_cpus")]
    pub cpus: u8,
    /// Memory, as `512M` or `2G`.
    #[serde(default)]
    pub memory: MemorySize,
    /// Most processor time of its process, as `150%`, where that has a control group; as much as there is when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_max: Option<CpuMax>,
    /// Where the serial console goes.
    #[serde(default)]
    pub console: Console,
    /// Disks, in order `vda`, `vdb`, ...: `[[guest.NAME.disk]]`.
    #[serde(default)]
    pub disk: Vec<GuestDisk>,
    /// Network devices, in order: `[[guest.NAME.net]]`.
    #[serde(default)]
    pub net: Vec<Net>,
    /// Sound devices, in order: `[[guest.NAME.sound]]`.
    #[serde(default)]
    pub sound: Vec<Sound>,
    /// Named virtio-console ports: `[[guest.NAME.port]]`.
    #[serde(default)]
    pub port: Vec<Port>,
    /// Host PCI functions given straight to the guest (no shadow: their driver's crash is the guest's).
    #[serde(default)]
    pub passthrough: Vec<String>,
    /// What follows when the guest resets its machine.
    #[serde(default)]
    pub on_reset: OnReset,
    /// What follows when the guest's kernel reports a panic (pvpanic).
    #[serde(default)]
    pub on_crash: OnCrash,
    /// How often it is started again after crashes.
    #[serde(default)]
    pub restart: GuestRestart,
}

/// What follows when a guest resets its machine; a triple fault is a reset, as on any PC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReset {
    /// It boots again.
    #[default]
    Reboot,
    /// It is off.
    Stop,
}

/// What follows when a guest's kernel reports a panic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnCrash {
    /// A warning; the guest does what its kernel is told to (`panic=`).
    #[default]
    Keep,
    /// It is killed and booted again.
    Reboot,
    /// It is killed, and has failed.
    Stop,
}

/// `[guest.NAME.restart]`: how often a guest is started again after triple faults and panics. Resets that it asks for are not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestRestart {
    /// Restarts allowed within `interval_s`; with the next crash it has failed.
    pub limit: u32,
    /// The window, in seconds.
    pub interval_s: u32,
}

impl Default for GuestRestart {
    fn default() -> Self {
        let Restart { limit, interval_s, .. } = Restart::default();
        Self { limit, interval_s }
    }
}

impl GuestRestart {
    /// As a policy of restarts.
    pub fn policy(self) -> Restart {
        Restart { limit: self.limit, interval_s: self.interval_s, ..Restart::default() }
    }
}

impl Guest {
    /// A guest with this kernel and everything else as the file format's defaults have it.
    pub fn new(kernel: PathBuf) -> Self {
        Self {
            kernel,
            initrd: Vec::new(),
            cmdline: default_cmdline(),
            cpus: default_cpus(),
            memory: MemorySize::default(),
            cpu_max: None,
            console: Console::Off,
            disk: Vec::new(),
            net: Vec::new(),
            sound: Vec::new(),
            port: Vec::new(),
            passthrough: Vec::new(),
            on_reset: OnReset::default(),
            on_crash: OnCrash::default(),
            restart: GuestRestart::default(),
        }
    }

    /// Whether its console is hvc0 of a virtio console: the last `console=` of its kernel's command line is what `/dev/console` is.
    pub fn has_hvc_console(&self) -> bool {
        let console = self.cmdline.split_whitespace().rev().find_map(|word| word.strip_prefix("console="));
        let device = console.and_then(|console| console.split(',').next());
        matches!(device, Some("hvc0" | "hvc"))
    }
}

/// `[[guest.NAME.net]]`: exactly one of `tap` and `driver`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// A TAP interface of the host; made if it does not exist and permission allows.
    pub tap: Option<String>,
    /// A driver VM: the name of a `[driver.NAME]` table.
    pub driver: Option<String>,
    /// The guest's address; made from the guest's name and the device's index when not given.
    pub mac: Option<Mac>,
    /// MTU in bytes, 68 to 65535; 1500 when not given.
    pub mtu: Option<u16>,
    /// On a NIC that guests share: it may send with any source address, as one that bridges has to.
    #[serde(default)]
    pub allow_any_source: bool,
}

/// `[[guest.NAME.sound]]`: a sound card, in a driver VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sound {
    /// The driver VM: the name of a `[driver.NAME]` table.
    pub driver: String,
    /// What becomes of playback while the driver VM is away: `"skip"` stays in real time, `"hold"` plays everything
    /// later.
    #[serde(default)]
    pub policy: Policy,
}

/// MTU of a network device that names none, in bytes.
pub const DEFAULT_MTU: u16 = 1500;

impl Net {
    /// The device's address: the one given, or one made from the guest's name and the device's index, so that
    /// it is the same at each start. Made ones are locally administered unicast addresses.
    pub fn mac_or_default(&self, guest: &str, index: usize) -> Mac {
        self.mac.unwrap_or_else(|| {
            let [.., a, b, c, d, e] = fnv1a(guest.bytes().chain([b'/']).chain(index.to_string().bytes())).to_be_bytes();
            Mac([0x02, a, b, c, d, e])
        })
    }

    /// The MTU in force, in bytes.
    pub fn mtu_or_default(&self) -> u16 {
        self.mtu.unwrap_or(DEFAULT_MTU)
    }
}

/// The FNV-1a hash: stable across builds and hosts, which the standard library's hashers do not promise.
fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// `[[guest.NAME.port]]`: a virtio-console port, joined to a Unix socket of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// The port's name; in a Linux guest `/dev/virtio-ports/NAME`.
    pub name: String,
    /// The Unix socket that the host listens at; one client at a time.
    pub socket: PathBuf,
}

/// `[driver.NAME]`: a driver VM and its device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Driver {
    /// The PCI function, as `0000:03:00.0`, bound to `vfio-pci`.
    pub device: String,
    /// A second NIC on the same network, bound to `vfio-pci` as well: live in a driver VM of its own, it takes over when
    /// the first fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spare: Option<String>,
    /// How long the serving NIC may be without a carrier that it has lost before the spare takes over, if it has one, in
    /// milliseconds; 0: for ever.
    #[serde(default = "default_spare_after_ms")]
    pub spare_after_ms: u32,
    /// The driver VM image that `umbra image` made.
    pub image: PathBuf,
    /// Memory of the driver VM; what its class needs when not given, which [`Machine::parse`] fills in.
    pub memory: Option<MemorySize>,
    /// Number of vCPUs of the driver VM.
    #[serde(default = "default_cpus")]
    pub cpus: u8,
    /// Most processor time of the process of each life, as `150%`, where that has a control group; as much as there is when not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_max: Option<CpuMax>,
    /// Added to the driver VM's kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// What stands ready for its failure.
    #[serde(default)]
    pub standby: Standby,
    /// How many lives wait booted where `standby` has them wait: 1 or 2. The second is for a failure right behind another one.
    #[serde(default = "default_standbys")]
    pub standbys: u8,
    /// Whether driver VMs are restored from a snapshot, which the first standby leaves.
    #[serde(default = "default_snapshots")]
    pub snapshots: bool,
    /// How often it may be restarted, and what then.
    #[serde(default)]
    pub restart: Restart,
}

/// What stands ready for the failure of a driver VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standby {
    /// The next driver VM waits booted, without the device: `standby = "warm"`. It takes as much memory as the first.
    #[default]
    Warm,
    /// A snapshot, and nothing that waits: the next driver VM is restored from it after the failure: `standby = "snapshot"`.
    Snapshot,
    /// Nothing is made ahead: the next driver VM boots after the failure, or is restored from a snapshot that happens to be there:
    /// `standby = "cold"`.
    Cold,
}

impl Driver {
    /// Its memory.
    pub fn memory_or_default(&self) -> MemorySize {
        self.memory.unwrap_or(DEFAULT_DRIVER_MEMORY)
    }

    /// A driver VM for `device` from `image` and everything else as the file format's defaults have it.
    pub fn new(device: String, image: PathBuf) -> Self {
        Self {
            device,
            spare: None,
            spare_after_ms: DEFAULT_SPARE_AFTER_MS,
            image,
            memory: Some(DEFAULT_DRIVER_MEMORY),
            cpus: default_cpus(),
            cpu_max: None,
            cmdline: String::new(),
            standby: Standby::default(),
            standbys: default_standbys(),
            snapshots: default_snapshots(),
            restart: Restart::default(),
        }
    }
}

/// `[driver.NAME.restart]`: the restart policy, as systemd's `StartLimit*`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Restart {
    /// Restarts allowed within `interval_s`; the failure that would need one more quarantines the driver.
    pub limit: u32,
    /// The window, in seconds.
    pub interval_s: u32,
    /// First delay before a restart, in milliseconds, used from the second failure in a row on; doubled each time.
    pub backoff_ms: u32,
    /// Longest delay, in milliseconds.
    pub backoff_max_ms: u32,
    /// A driver VM that is not forwarding after this many seconds has failed.
    pub boot_timeout_s: u32,
    /// Missing heartbeats for this many milliseconds are a failure.
    pub heartbeat_timeout_ms: u32,
    /// A NIC that has found no link after this many seconds is served without: its guests see none, and their log waits.
    pub carrier_timeout_s: u32,
    /// Most times a second that one interrupt of the device may come; more often for two seconds is a failure. 0: interrupts never
    /// are.
    pub interrupts_per_s: u32,
}

impl Default for Restart {
    fn default() -> Self {
        Self {
            limit: 5,
            interval_s: 60,
            backoff_ms: 100,
            backoff_max_ms: 10_000,
            boot_timeout_s: 60,
            heartbeat_timeout_ms: 3_000,
            // Copper gigabit autonegotiation takes up to three or four seconds.
            carrier_timeout_s: 6,
            interrupts_per_s: 200_000,
        }
    }
}

/// Where a guest's serial console goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Console {
    /// Nowhere.
    #[default]
    Off,
    /// The terminal of `umbra run`: `console = "terminal"`. One guest at most.
    Terminal,
    /// Appended to a file: `console = { file = "web.log" }`.
    File(PathBuf),
}

/// [`Driver::spare_after_ms`] where the file names none: long enough for a cable that is moved, or a driver that resets its
/// adapter, in most cases; short enough for the guests' connections.
pub const DEFAULT_SPARE_AFTER_MS: u32 = 2_000;

/// Memory of a driver VM whose table names none.
pub const DEFAULT_DRIVER_MEMORY: MemorySize = MemorySize(128 << 20);

/// The same of a driver VM of disks, which has a pool of 16 MiB for their data and its own copies of nothing else.
pub const DEFAULT_DISK_DRIVER_MEMORY: MemorySize = MemorySize(192 << 20);

fn default_spare_after_ms() -> u32 {
    DEFAULT_SPARE_AFTER_MS
}

fn default_cpus() -> u8 {
    1
}

fn default_standbys() -> u8 {
    1
}

fn default_snapshots() -> bool {
    true
}

fn default_cmdline() -> String {
    "console=ttyS0".into()
}
