//! What the supervisor and the VM processes say to each other: one JSON message a datagram on a
//! `SOCK_SEQPACKET` socket pair, with file descriptors attached where a message says so.
//!
//! Every message about a link carries its [`LinkId`], every one about a driver VM's life its [`Generation`]; a receiver drops
//! those of an older one. A guest's device is a [`DeviceId`]; what only one class knows is in that class's own messages.
//! Times are `CLOCK_MONOTONIC` in nanoseconds, which all processes of a host share.

use serde::{Deserialize, Serialize};
use umbra_driver_vm::protocol::{LinkMode, Mac, MemoryRange, Offloads, RxMode};
use umbra_shadow::block;
pub use umbra_shadow::net::{MaskedCounts, ModeName as ShadowMode};
use umbra_shadow::{DeviceId, Generation, LinkId};

pub use super::counts::{NetWork, PaceSteps, PathWork, SoundCounts, VcpuCounts};
pub use super::link_end::LinkEnd;
pub use super::vm_spec::{DiskBackend, NetBackend, PortBackend, PortEnd, SnapshotOf, SoundBackend, VmSpec};

/// Supervisor to VM process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ToVm {
    /// First message: the VM to be. Descriptors attached for a driver VM with a device: its container, group and device
    /// (VFIO), open; without them a VM opens what is passed through to it.
    Start(Box<VmSpec>),
    /// Press the power button (ACPI).
    PowerButton,
    /// Inject a non-maskable interrupt into every vCPU.
    Nmi,
    /// End now.
    Kill,
    /// Driver VM: give the passed-through device up at once and run on; answered by [`FromVm::Released`].
    Release,
    /// Driver VM: here its kernel begins to die; a vCPU that comes by is told of, once ([`FromVm::Panicking`]).
    WatchForPanic {
        /// Addresses of instructions.
        entries: Vec<u64>,
    },
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
        /// As what the NIC's link has come up, where it is known.
        mode: Option<LinkMode>,
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
    /// Guest: its VM is to end, and its process as soon as what was acknowledged is stable.
    Finish,
    /// A disk on a file is to be so large, or as large as its file or block device is now. Answered by [`FromVm::Resized`].
    Resize {
        /// The device.
        device: DeviceId,
        /// Its new size.
        bytes: Option<u64>,
    },
    /// Answered by [`FromVm::Vcpus`], then by [`FromVm::Status`] for each device of a driver VM.
    QueryStatus,
    /// Guest: the answer to [`FromVm::WantTap`], where there is an interface of that name again. Descriptor attached: the interface, open;
    /// else it cannot be used.
    Tap {
        /// Its name.
        interface: String,
        /// Why it cannot be used.
        refused: Option<String>,
    },
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
    /// A vCPU is about to run one of the instructions of [`ToVm::WatchForPanic`]; the kernel's last words follow.
    Panicking {
        /// When, ns.
        at: u64,
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
        /// What the VM is made of is wrong: another start would come to the same.
        configuration: bool,
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
    /// Guest: the answer to [`ToVm::Resize`].
    Resized {
        /// The device.
        device: DeviceId,
        /// The size that the guest sees now, bytes; or why it is as it was, for people.
        result: Result<u64, String>,
    },
    /// Guest: the file or block device of a disk is larger than the guest sees. Said again and again until [`ToVm::Resize`].
    Grown {
        /// The device.
        device: DeviceId,
    },
    /// Guest: what the host does to a disk on a file, or what became of a driver VM's disk at the guest's end.
    Disk {
        /// The device.
        device: DeviceId,
        /// The news, as a sentence without its end.
        news: String,
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
    /// Guest: the TAP interface that a network device has lost is to be opened again, if there is one of that name.
    WantTap {
        /// Its name.
        interface: String,
    },
    /// A thread of the process has made a system call that it may not make; the process ends with this word (`vm::confine`).
    Confined {
        /// The thread's name.
        thread: String,
        /// Number of the call.
        call: i64,
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
