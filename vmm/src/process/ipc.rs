//! What the supervisor and the VM processes say to each other: one JSON message a datagram on a
//! `SOCK_SEQPACKET` socket pair, with file descriptors attached where a message says so.
//!
//! Every message about a link carries the [`Generation`] of the driver VM; a receiver drops those of an older one.
//! Times are `CLOCK_MONOTONIC` in nanoseconds, which all processes of a host share.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use umbra_driver_vm::protocol::{Mac, Offloads, RxMode};
use umbra_shadow::Generation;
use umbra_shadow::sound::{Card, Policy};

use crate::spec::{Console, Disk, MemorySize};
use crate::vfio::Snapshot;

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
    /// Disks.
    pub disks: Vec<Disk>,
    /// Network devices.
    pub nets: Vec<NetBackend>,
    /// Sound devices.
    #[serde(default)]
    pub sounds: Vec<SoundBackend>,
    /// virtio-console ports.
    pub ports: Vec<PortBackend>,
    /// PCI functions to pass through.
    pub passthrough: Vec<String>,
    /// A driver VM that waits for its device: [`ToVm::Plug`].
    #[serde(default)]
    pub standby: bool,
    /// What is known of that device: it is on the bus from the start, to be set up by the VM's kernel before it comes.
    #[serde(default)]
    pub awaited: Option<Snapshot>,
    /// A passed-through function, one interrupt of which comes more often a second, has failed; 0: it never has for that.
    #[serde(default)]
    pub interrupt_limit: u32,
}

/// What stands behind a virtio-net device.
#[derive(Clone, Debug, Serialize, Deserialize)]
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
    /// Guest side: the splitter; its links come by [`ToVm::AttachLink`].
    Split {
        /// The VM's address.
        mac: Mac,
        /// MTU, bytes.
        mtu: u16,
        /// The addresses of the other guests' devices on the same NIC; none: it has the NIC for itself.
        #[serde(default)]
        neighbours: Vec<Mac>,
        /// It may send with any source address, although there are neighbours.
        #[serde(default)]
        allow_any_source: bool,
    },
    /// Driver VM side: a vhost-user front-end on an inherited socket.
    VhostUser {
        /// The address of this end (not the guest's).
        mac: Mac,
        /// MTU, bytes.
        mtu: u16,
        /// The descriptor number of the connected socket in this process.
        fd: i32,
    },
}

/// A sound device on the sound splitter; its links come by [`ToVm::AttachSound`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SoundBackend {
    /// The card that the guest sees.
    pub card: Card,
    /// What becomes of playback during an outage.
    pub policy: Policy,
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
    /// Standby: put this host PCI function on the VM's bus, or in the place of what is there of it ahead; answered by [`FromVm::Plugged`] or [`FromVm::Failed`].
    /// Descriptors attached: its container, group and device, open.
    Plug {
        /// Its PCI address on the host.
        device: String,
    },
    /// Guest: a new driver VM's link for network device `net`. Descriptor attached: the connected vhost-user socket.
    AttachLink {
        /// Index of the network device.
        net: u16,
        /// Whose link.
        generation: Generation,
    },
    /// Guest: the driver VM forwards; replay, then go live.
    GoLive {
        /// Index of the network device.
        net: u16,
        /// Which generation.
        generation: Generation,
        /// What it gets of what was recorded.
        #[serde(default)]
        replay: Replay,
        /// Its device is another one than before: the network is told where the guest is now.
        #[serde(default)]
        announce: bool,
    },
    /// Guest: the waiting driver VM is a spare that forwards (`armed`), or does not any more. Armed, it goes live by itself
    /// when the serving one is lost. Said again, it is the question whether both are on one network, answered by
    /// [`FromVm::SameNetwork`] if they are.
    Arm {
        /// Index of the network device.
        net: u16,
        /// Which generation waits.
        generation: Generation,
        /// Whether it forwards, with a carrier.
        armed: bool,
    },
    /// Guest: the driver VM has failed (the splitter may know already); mask.
    Mask {
        /// Index of the network device.
        net: u16,
        /// Which generation failed.
        generation: Generation,
    },
    /// Guest: the carrier that the NIC reports. Ignored while masking.
    Carrier {
        /// Index of the network device.
        net: u16,
        /// Which generation reports.
        generation: Generation,
        /// Link up.
        up: bool,
    },
    /// Guest: there will be no further driver VM for now; show link down.
    Quarantine {
        /// Index of the network device.
        net: u16,
    },
    /// Guest: a new driver VM's link for sound device `sound`. Descriptor attached: the host's end of its console port.
    /// The device goes live by itself once the driver VM has reported its card.
    AttachSound {
        /// Index of the sound device.
        sound: u16,
        /// Whose link.
        generation: Generation,
    },
    /// Guest: the driver VM of a sound device has failed (the splitter may know already); mask.
    MaskSound {
        /// Index of the sound device.
        sound: u16,
        /// Which generation failed.
        generation: Generation,
    },
    /// Guest: there will be no further driver VM for this sound device; be a dead card.
    QuarantineSound {
        /// Index of the sound device.
        sound: u16,
    },
    /// Answered by [`FromVm::NetStatus`] and [`FromVm::SoundStatus`] for each device of a driver VM.
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
    /// Guest: the vhost-user link is set up and queues are enabled.
    LinkUp {
        /// Index of the network device.
        net: u16,
        /// Whose link.
        generation: Generation,
        /// When, ns.
        at: u64,
    },
    /// Guest: the link is lost or broke a rule; the splitter masks already, or an armed spare serves. The link may be that
    /// of an armed spare itself, which the guest does not notice.
    LinkLost {
        /// Index of the network device.
        net: u16,
        /// Whose link.
        generation: Generation,
        /// When, ns.
        at: u64,
        /// Why: `closed`, or the violation.
        cause: String,
    },
    /// Guest: replay is done, frames flow.
    Live {
        /// Index of the network device.
        net: u16,
        /// Which generation.
        generation: Generation,
        /// When, ns.
        at: u64,
        /// Counters since the shadow started masking.
        masked: MaskedCounts,
    },
    /// Guest: the armed spare has brought in a frame that the guest sent through the serving driver VM.
    SameNetwork {
        /// Index of the network device.
        net: u16,
        /// The spare.
        generation: Generation,
    },
    /// Guest: two seconds after an outage of a device of a driver VM, how much it moved around it.
    Pace {
        /// The device.
        device: DeviceIndex,
        /// Which generation serves now.
        generation: Generation,
        /// How much.
        steps: PaceSteps,
    },
    /// Guest: its driver set the receive mode.
    RxMode {
        /// Index of the network device.
        net: u16,
        /// The mode.
        mode: RxMode,
    },
    /// Guest: it uses, or asks for the frames of, an address that is another's on the NIC that it shares; it gets neither. Told at the
    /// first, then every five minutes at most.
    ForeignAddress {
        /// Index of the network device.
        net: u16,
        /// The address.
        mac: Mac,
    },
    /// Guest: its driver accepted these offloads.
    Offloads {
        /// Index of the network device.
        net: u16,
        /// The offloads.
        offloads: Offloads,
    },
    /// Answer to [`ToVm::QueryStatus`].
    NetStatus {
        /// Index of the network device.
        net: u16,
        /// `passive`, `masking`, `waiting-carrier`, `replaying` or `quarantined`.
        mode: String,
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
    },
    /// Guest: a sound device's streams are with the driver VM again, and move.
    SoundLive {
        /// Index of the sound device.
        sound: u16,
        /// Which generation.
        generation: Generation,
        /// When, ns.
        at: u64,
        /// Counters since it was live before.
        masked: SoundCounts,
    },
    /// Guest: a sound device's link is lost or broke a rule; the splitter masks already.
    SoundLost {
        /// Index of the sound device.
        sound: u16,
        /// Whose link.
        generation: Generation,
        /// When, ns.
        at: u64,
        /// Why: `closed`, or the violation.
        cause: String,
    },
    /// Answer to [`ToVm::QueryStatus`].
    SoundStatus {
        /// Index of the sound device.
        sound: u16,
        /// `passive`, `masking`, `replaying` or `quarantined`.
        mode: String,
        /// Bytes of samples kept for the card now.
        kept_bytes: u64,
        /// Sums since the start.
        sums: SoundCounts,
    },
}

/// A device of a guest that a driver VM serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceIndex {
    /// Network device of this index.
    Net(u16),
    /// Sound device of this index.
    Sound(u16),
}

/// How much a device moved around an outage.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PaceSteps {
    /// Length of each step, ms.
    pub step_ms: u64,
    /// From the begin of the first step to the loss of the driver VM, ms.
    pub before_ms: u64,
    /// Frames from the guest to the driver VM in each step; of a sound device, frames that the card played.
    pub out: Vec<u64>,
    /// Frames to the guest in each step.
    pub into: Vec<u64>,
}

/// What happened to samples, in frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SoundCounts {
    /// Playback that was due while there was no card and was skipped.
    pub frames_skipped: u64,
    /// Silence given to capture.
    pub frames_silent: u64,
    /// Capture lost because the guest gave no room.
    pub frames_overrun: u64,
    /// Periods given back early, to keep the guest's player alive.
    pub kept_alive: u64,
    /// Underruns and overruns that the card reported.
    pub xruns: u64,
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

/// What happened to frames during an outage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaskedCounts {
    /// Accepted from the guest into the log.
    pub logged: u64,
    /// Sent: handed from the log to a new driver VM whose NIC had a carrier.
    pub replayed: u64,
    /// Lost because the log was full (oldest first).
    pub dropped: u64,
    /// Handed to the dead driver VM with no sign of what became of them; never sent again.
    pub unknown: u64,
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
