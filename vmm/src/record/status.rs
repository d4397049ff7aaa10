//! What `umbra status` shows: the same data as JSON and as a table ([`super::status_text`]).

use std::fmt;

use serde::{Deserialize, Serialize};
use umbra_shadow::block::{CachePolicy, Counts, ModeName};

use super::threads::{self, ThreadUsage};
use super::words;
use crate::host::reset::ResetMethod;
use crate::lifecycle::{StandbyStage, StateName};
use crate::wire::messages::{MaskedCounts, NetWork, ShadowMode, SoundCounts, VcpuCounts};
use crate::wire::spawn::VmProcess;

/// A running machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The machine's name.
    pub name: String,
    /// Number of the supervisor's process.
    pub pid: u32,
    /// Guests, by name.
    pub guests: Vec<GuestStatus>,
    /// Driver VMs, by name.
    pub drivers: Vec<DriverStatus>,
}

/// A guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// Its name.
    pub name: String,
    /// Where its VM is.
    pub state: GuestStateName,
    /// The reason, where it failed, for people.
    pub reason: Option<String>,
    /// Number of its process, while there is one.
    pub pid: Option<u32>,
    /// Number of the user whom that is handed to; `None`: it is the supervisor's.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Its control group; `None`: it has none of its own.
    #[serde(default)]
    pub cgroup: Option<CgroupStatus>,
    /// Seconds since the VM was started.
    pub uptime_s: f64,
    /// Network devices, in order.
    pub nets: Vec<NetStatus>,
    /// Sound devices, in order.
    #[serde(default)]
    pub sounds: Vec<SoundStatus>,
    /// Disks that driver VMs serve, in order.
    #[serde(default)]
    pub disks: Vec<BlockStatus>,
    /// What its processors have done.
    #[serde(default)]
    pub usage: Usage,
}

/// The control group of a VM's process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupStatus {
    /// Its path from the top of the tree.
    pub path: String,
    /// Memory that it takes now, bytes; `None`: it is not counted.
    pub memory: Option<u64>,
    /// Memory that it may take, bytes; `None`: there is no bound.
    pub memory_max: Option<u64>,
}

impl CgroupStatus {
    /// That of `process`, if it has one of its own.
    pub fn of(process: &VmProcess) -> Option<Self> {
        let group = process.group()?;
        let path = group.path().display().to_string();
        Some(Self { path, memory: group.memory(), memory_max: group.memory_max() })
    }
}

/// What a VM has used of the host's processors: of its process, and so of its present life.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// What KVM has counted, once the process has said.
    pub vcpus: Option<VcpuCounts>,
    /// The threads of the process, by what they do; those that have ended do not count.
    #[serde(default)]
    pub threads: Vec<ThreadUsage>,
}

/// Where a guest's VM is, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestStateName {
    /// Its process starts, or waits for a sound card or a disk.
    Starting,
    /// Its vCPUs run.
    Running,
    /// It has reset and is started again.
    Rebooting,
    /// It has powered off, or was stopped.
    Off,
    /// It ended in another way, or could not be started.
    Failed,
    /// A word of another version, which runs the machine. Never written.
    #[serde(other)]
    Unknown,
}

/// What serves a guest's device: the shadow in its modes, or a TAP interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceMode {
    /// A TAP interface of the host, without a shadow.
    Tap,
    /// [`ShadowMode::Masking`].
    Masking,
    /// [`ShadowMode::WaitingCarrier`].
    WaitingCarrier,
    /// [`ShadowMode::Replaying`].
    Replaying,
    /// [`ShadowMode::Passive`].
    Passive,
    /// [`ShadowMode::Quarantined`].
    Quarantined,
    /// [`ModeName::Identifying`], of a disk.
    Identifying,
    /// [`ModeName::Quiescing`], of a disk.
    Quiescing,
    /// The guest's process has not said yet; or a word of another version, which runs the machine.
    #[serde(other)]
    Unknown,
}

impl From<ShadowMode> for DeviceMode {
    fn from(mode: ShadowMode) -> Self {
        match mode {
            ShadowMode::Masking => Self::Masking,
            ShadowMode::WaitingCarrier => Self::WaitingCarrier,
            ShadowMode::Replaying => Self::Replaying,
            ShadowMode::Passive => Self::Passive,
            ShadowMode::Quarantined => Self::Quarantined,
        }
    }
}

impl From<ModeName> for DeviceMode {
    fn from(mode: ModeName) -> Self {
        match mode {
            ModeName::Masking => Self::Masking,
            ModeName::Identifying => Self::Identifying,
            ModeName::Replaying => Self::Replaying,
            ModeName::Passive => Self::Passive,
            ModeName::Quiescing => Self::Quiescing,
            ModeName::Quarantined => Self::Quarantined,
        }
    }
}

/// Whether a spare is on the network of the device that serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SpareNetwork {
    /// It has received a frame that a guest sent through the serving device.
    Same,
    /// It has received none of many such frames.
    Silent,
    /// Nothing is known yet; or a word of another version, which runs the machine.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for GuestStateName {
    /// The word of `umbra status`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl fmt::Display for DeviceMode {
    /// The word of `umbra status`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A guest's sound device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SoundStatus {
    /// Index in the guest.
    pub index: usize,
    /// Name of the driver VM.
    pub driver: Option<String>,
    /// The card, once its driver VM has reported it.
    pub card: Option<String>,
    /// The shadow's mode; never [`DeviceMode::Tap`].
    pub mode: DeviceMode,
    /// Bytes of samples kept for the card now.
    pub kept_bytes: u64,
    /// Sums since the start.
    pub sums: SoundCounts,
}

/// A guest's disk that a driver VM serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockStatus {
    /// Index among all disks of the guest: 0 is its `vda`.
    pub index: usize,
    /// Name of the driver VM.
    pub driver: Option<String>,
    /// Serial number or WWID of the disk, once its driver VM has reported it.
    pub serial: Option<String>,
    /// Bytes of the guest's part of it, once its driver VM has reported it.
    pub bytes: Option<u64>,
    /// Whether it has a volatile write cache, as its driver VM reported it.
    pub volatile_cache: Option<bool>,
    /// How that is treated: the key `cache`.
    pub cache: CachePolicy,
    /// The shadow's mode; never [`DeviceMode::Tap`].
    pub mode: DeviceMode,
    /// Bytes of private copies: of writes in flight, and of what is not known to be stable.
    pub kept_bytes: u64,
    /// Bytes of these that are to be written again.
    pub owed_bytes: u64,
    /// Requests of the guest that are not answered.
    pub pending: u64,
    /// Sums since the start.
    pub sums: Counts,
}

/// A guest's network device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NetStatus {
    /// Index in the guest.
    pub index: usize,
    /// The guest's address.
    pub mac: String,
    /// The host interface, where it is a TAP.
    pub tap: Option<String>,
    /// Name of the driver VM, where there is one.
    pub driver: Option<String>,
    /// What serves it, and how.
    pub mode: DeviceMode,
    /// Frames guest to NIC.
    pub frames_out: u64,
    /// Frames NIC to guest.
    pub frames_in: u64,
    /// Frames of the guest dropped, because their source address is another's on the NIC that it shares.
    #[serde(default)]
    pub foreign_source: u64,
    /// Frames in the log now.
    pub logged_now: u32,
    /// Sums over all outages.
    pub masked: MaskedCounts,
    /// What moving frames took, where a driver VM does.
    #[serde(default)]
    pub work: NetWork,
}

/// A driver VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DriverStatus {
    /// Its name.
    pub name: String,
    /// PCI address of the device.
    pub device: String,
    /// Kernel driver, once the agent has said.
    pub driver: Option<String>,
    /// The kernel of the driver VM, once the agent has said.
    pub kernel: Option<String>,
    /// Generation of the present life, or of the last one.
    pub generation: Option<u32>,
    /// The life cycle's state (`docs/recovery.md`).
    pub state: StateName,
    /// Number of its process, while there is one.
    pub pid: Option<u32>,
    /// Number of the user whom that is handed to; `None`: it is the supervisor's.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Its control group; `None`: it has none of its own.
    #[serde(default)]
    pub cgroup: Option<CgroupStatus>,
    /// The NIC's carrier.
    pub carrier: bool,
    /// How the device is reset between two lives; written as `none` where it cannot be.
    #[serde(with = "words::reset_method")]
    pub reset_method: Option<ResetMethod>,
    /// What that means for a restart, in a sentence.
    pub reset_meaning: String,
    /// Failures since the start.
    pub failures: u64,
    /// Why it failed last, or why it is quarantined.
    pub reason: Option<String>,
    /// The last outage as the guests' devices saw it, from the mask to live, in ms.
    pub last_outage_ms: Option<f64>,
    /// Path of the last crash report.
    pub report: Option<String>,
    /// Memory available in the driver VM, as the last heartbeat said, bytes.
    pub available_memory: Option<u64>,
    /// The next life; `None` with `standby = "cold"`.
    #[serde(default)]
    pub standby: Option<StandbyStatus>,
    /// What the present life's processors have done.
    #[serde(default)]
    pub usage: Usage,
}

/// What is ready for the next life of a driver VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StandbyStatus {
    /// The stage that it has reached.
    pub state: StandbyStage,
    /// The device of a spare; `None` for a standby without one.
    #[serde(default)]
    pub device: Option<String>,
    /// Whether a spare is on the guests' network.
    #[serde(default)]
    pub network: Option<SpareNetwork>,
    /// Its generation, while there is one.
    pub generation: Option<u32>,
    /// Number of its process, while there is one.
    pub pid: Option<u32>,
    /// Number of the user whom that is handed to; `None`: it is the supervisor's.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Its control group; `None`: it has none of its own.
    #[serde(default)]
    pub cgroup: Option<CgroupStatus>,
    /// The life that waits behind it; `None` without `standbys = 2`.
    #[serde(default)]
    pub second: Option<SecondStatus>,
    /// Seconds since that was started.
    #[serde(default)]
    pub age_s: Option<f64>,
    /// Why there is no spare, or no snapshot, although there should be one by now.
    #[serde(default)]
    pub reason: Option<String>,
}

/// The second standby of a driver VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SecondStatus {
    /// The stage that it has reached.
    pub state: StandbyStage,
    /// Its generation, while there is one.
    pub generation: Option<u32>,
    /// Number of its process, while there is one.
    pub pid: Option<u32>,
    /// Number of the user whom that is handed to; `None`: it is the supervisor's.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Its control group; `None`: it has none of its own.
    #[serde(default)]
    pub cgroup: Option<CgroupStatus>,
}

impl Status {
    /// Adds what the host's kernel says of the threads of all processes.
    pub fn add_threads(&mut self) {
        let guests = self.guests.iter_mut().map(|guest| (guest.pid, &mut guest.usage));
        for (pid, usage) in guests.chain(self.drivers.iter_mut().map(|driver| (driver.pid, &mut driver.usage))) {
            usage.threads = pid.map(threads::of).unwrap_or_default();
        }
    }

    /// Leaves only the guest or driver VM of this name. Returns whether there is one.
    pub fn retain(&mut self, name: &str) -> bool {
        self.guests.retain(|guest| guest.name == name);
        self.drivers.retain(|driver| driver.name == name);
        !self.guests.is_empty() || !self.drivers.is_empty()
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A machine of the guest `web` and the driver VM `nic0`, with all as it should be.
    pub(crate) fn status() -> Status {
        let net = NetStatus {
            index: 0,
            mac: "02:00:00:00:00:01".into(),
            tap: None,
            driver: Some("nic0".into()),
            mode: DeviceMode::Passive,
            frames_out: 1,
            frames_in: 2,
            foreign_source: 0,
            logged_now: 0,
            masked: MaskedCounts::default(),
            work: NetWork::default(),
        };
        let guest = GuestStatus {
            name: "web".into(),
            state: GuestStateName::Running,
            reason: None,
            pid: Some(7),
            uid: None,
            cgroup: None,
            uptime_s: 61.4,
            nets: vec![net],
            sounds: Vec::new(),
            disks: Vec::new(),
            usage: Usage::default(),
        };
        let driver = DriverStatus {
            name: "nic0".into(),
            device: "0000:00:08.0".into(),
            driver: Some("8139cp".into()),
            kernel: Some("6.12".into()),
            generation: Some(3),
            state: StateName::Live,
            pid: Some(9),
            uid: None,
            cgroup: None,
            carrier: true,
            reset_method: None,
            reset_meaning: "it keeps its registers".into(),
            failures: 2,
            reason: Some("kernel panic".into()),
            last_outage_ms: Some(812.4),
            report: None,
            available_memory: None,
            standby: Some(StandbyStatus {
                state: StandbyStage::Ready,
                device: None,
                network: None,
                generation: Some(4),
                pid: Some(10),
                uid: None,
                cgroup: None,
                second: None,
                age_s: Some(3.5),
                reason: None,
            }),
            usage: Usage::default(),
        };
        Status { name: "m".into(), pid: 1, guests: vec![guest], drivers: vec![driver] }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::testing::status;
    use super::*;

    #[test]
    fn the_table_lines_up_and_says_what_no_reset_means() {
        let expected = "\
GUEST  STATE    UPTIME  DEVICES
web    running  61 s    net0: nic0 passive

DRIVER VM  DEVICE        DRIVER  GENERATION  STATE  STANDBY  RESET  FAILURES  LAST OUTAGE  REASON
nic0       0000:00:08.0  8139cp  3           live   ready    none   2         812 ms       kernel panic

nic0: it keeps its registers";
        assert_eq!(status().to_string(), expected);
    }

    #[test]
    fn a_nic_that_guests_share_is_shown_as_such() {
        let mut status = status();
        assert!(!status.to_string().contains("shared"));
        status.guests.push(GuestStatus { name: "db".into(), ..status.guests[0].clone() });
        assert!(status.to_string().ends_with("\n\nnic0: its NIC is shared by web, db"), "{status}");
    }

    #[test]
    fn a_spare_is_shown_with_its_device_and_what_is_known_of_its_network() {
        let mut spare = status().drivers.remove(0).standby.unwrap();
        spare.device = Some("0000:04:00.0".into());
        (spare.state, spare.network) = (StandbyStage::Armed, Some(SpareNetwork::Same));
        assert_eq!(spare.cell(), "spare 0000:04:00.0 armed");
        spare.network = Some(SpareNetwork::Silent);
        assert_eq!(spare.cell(), "spare 0000:04:00.0 armed, other network?");
    }

    #[test]
    fn a_spare_that_does_not_recover_says_why() {
        let mut status = status();
        let standby = status.drivers[0].standby.as_mut().unwrap();
        (standby.state, standby.reason) = (StandbyStage::Recovering, Some("its process hangs".into()));
        assert!(status.to_string().ends_with("\n\nnic0: its process hangs"), "{status}");
    }

    #[test]
    fn a_disk_is_shown_with_what_is_owed_to_it() {
        let mut disk = BlockStatus {
            index: 1,
            driver: Some("disk0".into()),
            serial: Some("S1".into()),
            bytes: Some(1 << 30),
            volatile_cache: Some(true),
            cache: CachePolicy::Auto,
            mode: ModeName::Passive.into(),
            kept_bytes: 4096,
            owed_bytes: 0,
            pending: 0,
            sums: Counts::default(),
        };
        assert_eq!(disk.to_string(), "block1: disk0 passive");
        (disk.mode, disk.owed_bytes) = (ModeName::Replaying.into(), 4097);
        assert_eq!(disk.to_string(), "block1: disk0 replaying (5 KiB owed)");
        let mut status = status();
        status.guests[0].disks.push(disk);
        let text = status.to_string();
        assert!(text.contains("net0: nic0 passive, block1: disk0 replaying (5 KiB owed)\n"), "{text}");
    }

    #[test]
    fn what_a_vm_said_is_shown_and_not_obeyed() {
        let mut status = status();
        status.drivers[0].reason = Some("kernel panic: \u{1b}[31mRED\u{1b}]0;OWNED\u{7}".into());
        status.drivers[0].driver = Some("8139\ncp".into());
        status.guests[0].reason = Some("\u{9b}2J".into());
        let text = status.to_string();
        assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text}");
        assert!(text.contains("kernel panic: \\x1b[31mRED\\x1b]0;OWNED\\x07") && text.contains("8139\\ncp"), "{text}");
    }

    #[test]
    fn words_of_a_newer_machine_are_read_as_unknown() {
        let mut json = serde_json::to_value(status()).unwrap();
        assert_eq!(
            (&json["drivers"][0]["reset_method"], &json["drivers"][0]["state"]),
            (&"none".into(), &"live".into())
        );
        json["drivers"][0]["state"] = "dreaming".into();
        json["drivers"][0]["standby"]["network"] = "another".into();
        json["guests"][0]["state"] = "paused".into();
        json["guests"][0]["nets"][0]["mode"] = "pondering".into();
        let read: Status = serde_json::from_value(json).unwrap();
        assert_eq!((read.drivers[0].state, read.guests[0].state), (StateName::Unknown, GuestStateName::Unknown));
        assert_eq!(read.guests[0].nets[0].mode, DeviceMode::Unknown);
        assert_eq!(read.drivers[0].standby.as_ref().unwrap().network, Some(SpareNetwork::Unknown));
    }

    #[test]
    fn one_name_can_be_picked() {
        let mut picked = status();
        assert!(picked.retain("nic0"));
        assert!(picked.guests.is_empty() && picked.drivers.len() == 1);
        assert!(!status().retain("other"));
    }
}
