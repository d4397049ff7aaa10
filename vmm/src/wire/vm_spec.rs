//! The VM that a process is to run, as the supervisor describes it.

use std::num::NonZeroU32;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use umbra_driver_vm::protocol::Mac;
use umbra_shadow::block::{self, CachePolicy};
use umbra_shadow::sound::{Card, Policy};

use crate::config::{Console, Disk, MemorySize};
use crate::host::Snapshot;
#[cfg(doc)]
use crate::wire::messages::{FromVm, ToVm};

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
    /// Where viewers of the console connect; `None`: it cannot be viewed.
    #[serde(default)]
    pub console_socket: Option<PathBuf>,
    /// Whoever prints there asks soon afterwards whether the transmitter is empty, as Linux does: bytes are handed over together.
    #[serde(default)]
    pub polls_console: bool,
    /// Its console is hvc0 of a virtio console: what is printed there goes where the serial line's output goes, and what is typed
    /// goes there.
    #[serde(default)]
    pub hvc: bool,
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
        /// The NIC has a spare, to which hosts behind a bridge in the guest move as well.
        #[serde(default)]
        has_spare: bool,
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
        /// Longest time without an answer to reads and writes before the driver VM counts as failed, ms.
        io_timeout_ms: u32,
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
