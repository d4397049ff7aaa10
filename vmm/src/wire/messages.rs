//! What the supervisor and the VM processes say to each other: one JSON message a datagram on a
//! `SOCK_SEQPACKET` socket pair, with file descriptors attached where a message says so.
//!
//! Every message about a link carries its [`LinkId`], every one about a driver VM's life its [`Generation`]; a receiver drops
//! those of an older one. A guest's device is a [`DeviceId`]; what only one class knows is in that class's own messages.
//! Times are `CLOCK_MONOTONIC` in nanoseconds, which all processes of a host share.

use std::num::NonZeroU32;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use umbra_driver_vm::protocol::{Mac, MemoryRange, Offloads, RxMode};
use umbra_shadow::block::{self, CachePolicy};
pub use umbra_shadow::net::{MaskedCounts, ModeName as ShadowMode};
use umbra_shadow::sound::{Card, Policy};
use umbra_shadow::{DeviceId, Generation, LinkId};

pub use super::counts::{NetWork, PaceSteps, PathWork, SoundCounts, VcpuCounts};
use crate::config::{Console, Disk, MemorySize};
use crate::host::Snapshot;

/// A VM as its process gets it: everything resolved, nothing to look up.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmSpec {
    /// The name in messages and logs, as `web` or `nic0.3` (driver and generation).
    pub name: String,
    /// Kernel: bzImage or vmlinux.
    pub kernel: PathBuf,
    /// Initial RAM disks.
    pub initrd: Vec<PathBuf>,
    /// Kernel command line, complete.
    pub cmdline: String,
    /// vCPUs.
    pub cpus: u8,
    /// Memory.
    pub memory: MemorySize,
    /// Serial console. `Terminal` is stdin and stdout of the VM process: for a driver VM `/dev/null` and a pipe to the
    /// supervisor, so raw mode is for a stdin that is a terminal.
    pub console: Console,
    /// Whoever prints there asks soon afterwards whether the transmitter is empty, as Linux does: bytes are handed over together.
    #[serde(default)]
    pub polls_console: bool,
    /// Disks, in the order of their slots.
    pub disks: Vec<DiskBackend>,
    /// Network devices.
    pub nets: Vec<NetBackend>,
    /// Sound devices.
    #[serde(default)]
    pub sounds: Vec<SoundBackend>,
    /// virtio-console ports.
    pub ports: Vec<PortBackend>,
    /// PCI functions to pass through.
    pub passthrough: Vec<String>,
    /// A driver VM that gets its device later: [`ToVm::Plug`].
    #[serde(default)]
    pub awaits_device: bool,
    /// Nobody waits for it while it boots.
    #[serde(default)]
    pub has_time: bool,
    /// Restore it from its snapshot where there is one, and let one be taken by [`ToVm::Snapshot`]. Answered by [`FromVm::Snapshot`]
    /// at its start. `None`: it has no snapshots.
    #[serde(default)]
    pub snapshot_of: Option<SnapshotOf>,
    /// It is started for its snapshot alone: where there is one from which it could be restored, its process says so and ends.
    #[serde(default)]
    pub only_saves: bool,
    /// What is known of that device: it is on the bus from the start, to be set up by the VM's kernel before it comes.
    #[serde(default)]
    pub awaited: Option<Snapshot>,
    /// Most that one interrupt of a passed-through function may come a second; more often is a failure of the function. `None`: no
    /// limit.
    #[serde(default)]
    pub interrupt_limit: Option<NonZeroU32>,
}

/// The image that the snapshots of a driver VM are of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOf {
    /// Digest of kernel and initial RAM disks: a snapshot of another one is another snapshot.
    pub digest: String,
    /// Lives from the snapshot have ended before they said hello: it is not used, and another one takes its place.
    pub useless: bool,
    /// The kernel's release, for people.
    pub kernel: String,
    /// The drivers of its device, for people.
    pub drivers: Vec<String>,
}

/// What stands behind a virtio-net device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NetBackend {
    /// A TAP interface of the host.
    Tap {
        /// Its name.
        interface: String,
        /// The VM's address.
        mac: Mac,
        /// MTU, bytes.
        mtu: u16,
    },
    /// Guest side: the splitter; its links come by [`ToVm::Attach`].
    Split {
        /// The VM's address.
        mac: Mac,
        /// MTU, bytes.
        mtu: u16,
        /// Memory of its driver VM: a link with more is refused.
        driver_memory: MemorySize,
        /// The addresses of the other guests' devices on the same NIC; none: it has the NIC for itself.
        #[serde(default)]
        neighbours: Vec<Mac>,
        /// It may send with any source address, although there are neighbours.
        #[serde(default)]
        allow_any_source: bool,
    },
    /// Driver VM side: a vhost-user front-end. Its connections come, and come again, by [`ToVm::Connect`].
    VhostUser {
        /// The address of this end (not the guest's).
        mac: Mac,
        /// MTU, bytes.
        mtu: u16,
    },
}

/// A sound device on the sound splitter; its links come by [`ToVm::Attach`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SoundBackend {
    /// The card that the guest sees.
    pub card: Card,
    /// What becomes of playback during an outage.
    pub policy: Policy,
}

/// What stands behind a virtio-blk device.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBackend {
    /// A file or a block device of the host.
    File(Disk),
    /// Guest side: the block splitter; its links come by [`ToVm::Attach`]. It goes live by itself once the driver VM has greeted it.
    Split {
        /// The disk that the guest sees.
        disk: block::Disk,
        /// How its write cache is treated.
        cache: CachePolicy,
        /// Memory of its driver VM: a link with more is refused.
        driver_memory: MemorySize,
    },
}

/// What stands behind a virtio-console port.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PortBackend {
    /// Port name.
    pub name: String,
    /// The host's end.
    pub end: PortEnd,
}

/// The host's end of a console port.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortEnd {
    /// Listen at this path.
    Listen(PathBuf),
    /// A connected stream socket, inherited under this number.
    Fd(i32),
    /// None yet: its peers come, one after the other, by [`ToVm::Connect`].
    Attached,
    /// None yet; a guest's process serves the port's queues itself, by vhost-user. Its connections come, and come again, by
    /// [`ToVm::Connect`].
    VhostUser,
}

/// Supervisor to VM process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToVm {
    /// First message: the VM to be. Descriptors attached for a driver VM with a device: its container, group and device
    /// (VFIO), open; without them a VM opens what is passed through to it.
    Start(Box<VmSpec>),
    /// Press the power button (ACPI).
    PowerButton,
    /// End now.
    Kill,
    /// Driver VM: give the passed-through device up at once and run on; answered by [`FromVm::Released`].
    Release,
    /// Have every vCPU spin where it is with interrupts off, for good: a failure to be noticed by who serves the VM.
    LockUp,
    /// Standby: put this host PCI function on the VM's bus, or in the place of what is there of it ahead; answered by
    /// [`FromVm::Plugged`] or [`FromVm::Failed`].
    /// Descriptors attached: its container, group and device, open.
    Plug {
        /// Its PCI address on the host.
        device: String,
    },
    /// Driver VM that waits: take a snapshot of it now; answered by [`FromVm::Snapshot`]. It is given up for any message that comes
    /// meanwhile.
    Snapshot {
        /// What its agent says of memory that it never uses: it goes back to the host, in this life and those that are restored.
        unused: Vec<MemoryRange>,
    },
    /// Driver VM: the connection of its end `end` (by position among its ends) with a guest's device; one that is there is
    /// ended. Descriptor attached: the connected socket (vhost-user for a network device or a disk, a stream for a sound device).
    Connect {
        /// Which end.
        end: u16,
        /// The connection's number.
        link: LinkId,
    },
    /// Guest: a new link of a device. Descriptor attached: the other end of the socket of [`Self::Connect`]. A sound device
    /// goes live by itself once the driver VM has reported its card.
    Attach {
        /// The device.
        device: DeviceId,
        /// The link's number.
        link: LinkId,
    },
    /// Guest: the driver VM forwards; replay, then go live. Network alone.
    GoLive {
        /// The device.
        device: DeviceId,
        /// Which generation.
        generation: Generation,
        /// What it gets of what was recorded.
        #[serde(default)]
        replay: Replay,
        /// The driver VM has another device than the one before: the network is told where the guest is now.
        #[serde(default)]
        announce: bool,
    },
    /// Guest: the waiting driver VM is a spare that forwards (`armed`), or does not any more. Armed, it goes live by itself
    /// when the serving one is lost. Said again, it is the question whether both are on one network, answered by
    /// [`FromVm::SameNetwork`] if they are. Network alone.
    Arm {
        /// The device.
        device: DeviceId,
        /// Which generation waits.
        generation: Generation,
        /// Whether it forwards, with a carrier.
        armed: bool,
    },
    /// Guest: the driver VM has failed (the splitter may know already); mask.
    Mask {
        /// The device.
        device: DeviceId,
        /// Which generation failed.
        generation: Generation,
    },
    /// Guest: the carrier that the NIC reports. Ignored while masking. Network alone.
    Carrier {
        /// The device.
        device: DeviceId,
        /// Which generation reports.
        generation: Generation,
        /// Link up.
        up: bool,
    },
    /// Guest: there will be no further driver VM for now; show link down, or be a dead card.
    Quarantine {
        /// The device.
        device: DeviceId,
    },
    /// Guest: a deliberate reset of the device's driver VM is to come: nothing is begun any more, and what was acknowledged is made
    /// stable. Answered by [`FromVm::AtRest`]. Disks alone.
    Quiesce {
        /// The device.
        device: DeviceId,
    },
    /// Guest: the reset of [`Self::Quiesce`] does not come; go on. Disks alone.
    GoOn {
        /// The device.
        device: DeviceId,
    },
    /// Answered by [`FromVm::Vcpus`], then by [`FromVm::Status`] for each device of a driver VM.
    QueryStatus,
}

/// VM process to supervisor.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromVm {
    /// vCPUs run.
    Running {
        /// When, ns.
        at: u64,
    },
    /// Driver VM with [`VmSpec::snapshot_of`]: what became of its snapshot.
    Snapshot {
        /// What.
        news: SnapshotNews,
    },
    /// The device of [`ToVm::Plug`] is on the VM's bus; its kernel has to look for it, or to give it to its driver.
    Plugged {
        /// When, ns.
        at: u64,
    },
    /// The device is out of the VM: no mapping, descriptor or interrupt of it is left in this process.
    Released {
        /// When, ns.
        at: u64,
    },
    /// The VM has ended; the process exits after this.
    Ended {
        /// When, ns.
        at: u64,
        /// How.
        how: VmEnd,
        /// Registers of each vCPU at the end, as text for the crash report (driver VMs).
        registers: String,
    },
    /// pvpanic: the kernel says it has panicked; it may still be running.
    Panicked {
        /// When, ns.
        at: u64,
    },
    /// A passed-through device has failed, or the host wants it back. The VM still runs.
    DeviceFailed {
        /// When, ns.
        at: u64,
        /// Its PCI address on the host.
        device: String,
        /// What happened, as a clause: `the device reported an uncorrectable error`.
        what: String,
    },
    /// The VM could not be started; the sentence is for the user.
    Failed {
        /// The error, its causes included.
        what: String,
    },
    /// Driver VM: the connection of an end is over, or could not be set up, on this side.
    Disconnected {
        /// Which end, by position.
        end: u16,
        /// Which connection.
        link: LinkId,
        /// Why.
        why: Disconnect,
    },
    /// Guest: the link is set up.
    LinkUp {
        /// The device.
        device: DeviceId,
        /// Which link.
        link: LinkId,
        /// When, ns.
        at: u64,
    },
    /// Guest: the link is lost or broke a rule; the splitter masks already, or an armed spare serves. The link may be that
    /// of an armed spare itself, which the guest does not notice.
    Lost {
        /// The device.
        device: DeviceId,
        /// Which link.
        link: LinkId,
        /// When, ns.
        at: u64,
        /// Why.
        cause: LinkEnd,
    },
    /// Guest: replay is done, frames flow; or streams are with the driver VM again, and move.
    Live {
        /// The device.
        device: DeviceId,
        /// Which generation.
        generation: Generation,
        /// When, ns.
        at: u64,
        /// Counters since the shadow started masking.
        outage: OutageCounts,
    },
    /// Guest: the armed spare has brought in a frame that the guest sent through the serving driver VM.
    SameNetwork {
        /// The device.
        device: DeviceId,
        /// The spare.
        generation: Generation,
    },
    /// Guest: the answer to [`ToVm::Quiesce`].
    AtRest {
        /// The device.
        device: DeviceId,
        /// Everything that was acknowledged is stable, and nothing is in flight. Else there is no driver VM, or it did not come to rest
        /// in time: what is owed is written again in the next life.
        stable: bool,
    },
    /// Guest: a TAP interface of a network device was removed, and the guest sees its link down; or it is there again.
    Tap {
        /// Its name.
        interface: String,
        /// Whether the device has it.
        there: bool,
        /// The news, as a clause behind the name: `is gone`.
        news: String,
    },
    /// Guest: two seconds after an outage of a device of a driver VM, how much it moved around it.
    Pace {
        /// The device.
        device: DeviceId,
        /// Which generation serves now.
        generation: Generation,
        /// How much.
        steps: PaceSteps,
    },
    /// Guest: its driver set the receive mode of a network device.
    RxMode {
        /// The device.
        device: DeviceId,
        /// The mode.
        mode: RxMode,
    },
    /// Guest: a network device uses, or asks for the frames of, an address that is another's on the NIC that it shares; it gets
    /// neither. Told at the first, then every five minutes at most.
    ForeignAddress {
        /// The device.
        device: DeviceId,
        /// The address.
        mac: Mac,
    },
    /// Guest: its driver accepted these offloads of a network device.
    Offloads {
        /// The device.
        device: DeviceId,
        /// The offloads.
        offloads: Offloads,
    },
    /// What KVM has counted; said when the vCPUs run, and as answer to [`ToVm::QueryStatus`].
    Vcpus(VcpuCounts),
    /// Answer to [`ToVm::QueryStatus`], for each device of a driver VM.
    Status {
        /// The device.
        device: DeviceId,
        /// How it is.
        status: DeviceStatus,
    },
}

/// What became of the snapshot of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotNews {
    /// At the start: the VM is restored from it, and goes on as it was saved.
    Restored,
    /// At the start of a VM with [`VmSpec::only_saves`]: there is one, from which a VM was restored on trial; the process ends.
    There,
    /// At the start: there is none; the VM boots.
    Missing,
    /// At the start: it cannot be used, and why; the VM boots.
    Refused(String),
    /// One was taken: bytes of its file.
    Taken(u64),
    /// None was taken, and why.
    NotTaken(String),
}

/// Why a guest's splitter lost a link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkEnd {
    /// The other end closed it: its process is gone, or it gave the connection up.
    Closed,
    /// The other end has taken nothing for too long though something waits, in words.
    Stalled(String),
    /// The other end broke a rule, in words.
    Broken(String),
    /// It is not the disk that the guest was given, or it has lost what was flushed to it: in what it differs, in words.
    OtherDisk(String),
}

impl std::fmt::Display for LinkEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closed => f.write_str("closed"),
            Self::Stalled(what) | Self::Broken(what) | Self::OtherDisk(what) => f.write_str(what),
        }
    }
}

/// Why a driver VM's process has no connection at an end any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Disconnect {
    /// The guest's process closed it, or the program in the driver VM closed the port that the guest's process served.
    Closed,
    /// The guest's process did not answer in time, or not as the protocol has it, in words.
    NoAnswer(String),
    /// The driver VM's kernel stopped the device: it reboots, or its driver starts anew.
    Stopped,
}

/// Counters of an outage, by class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutageCounts {
    /// Of a network device.
    Net(MaskedCounts),
    /// Of a sound device.
    Sound(SoundCounts),
    /// Of a disk.
    Block(block::Counts),
}

/// How a device of a driver VM is, by class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceStatus {
    /// A network device.
    Net {
        /// What its shadow does.
        mode: ShadowMode,
        /// Frames guest to NIC since start.
        frames_out: u64,
        /// Frames NIC to guest since start.
        frames_in: u64,
        /// Frames of the guest dropped since start, because their source address is another's.
        #[serde(default)]
        foreign_source: u64,
        /// Frames in the log now.
        logged_now: u32,
        /// Sums over all outages.
        masked: MaskedCounts,
        /// What moving frames took.
        #[serde(default)]
        work: NetWork,
    },
    /// A sound device.
    Sound {
        /// What its shadow does.
        mode: ShadowMode,
        /// Bytes of samples kept for the card now.
        kept_bytes: u64,
        /// Sums since the start.
        sums: SoundCounts,
    },
    /// A disk.
    Block {
        /// What its shadow does.
        mode: block::ModeName,
        /// Bytes of private copies: of what is in flight, and of what is not known to be stable.
        kept_bytes: u64,
        /// Bytes of these that are to be written again.
        owed_bytes: u64,
        /// Requests of the guest that are not answered.
        pending: u64,
        /// Sums since the start.
        sums: block::Counts,
    },
}

/// What a new driver VM gets of what the shadow recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Replay {
    /// Configuration and the logged frames.
    #[default]
    Everything,
    /// Configuration alone: the log is suspect, because a driver VM died while it was replayed. Its frames are
    /// dropped and counted.
    ConfigurationOnly,
}

/// How a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmEnd {
    /// ACPI power-off.
    PowerOff,
    /// Reset through the keyboard controller, port 0xCF9 or the ACPI reset register.
    Reset,
    /// Triple fault (`KVM_EXIT_SHUTDOWN`).
    TripleFault,
    /// KVM could not go on.
    Error,
    /// [`ToVm::Kill`], a signal, or the supervisor went away.
    Killed,
}
