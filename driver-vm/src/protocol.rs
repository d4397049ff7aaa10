//! The control protocol: JSON lines over the virtio-console port [`CONTROL_PORT`] of a driver VM.
//!
//! One port, one incarnation: the supervisor makes a new socket pair for each life of a driver VM, so a
//! message can only come from the generation it belongs to; [`FromAgent::Hello`] repeats the number as a check.
//!
//! ```text
//!   agent: Ready (kernel and port are there) .. Ready (all modules are loaded)      a snapshot may be taken here
//!   host:                                                                     Begin (which life it is)
//!   agent:                                                                          Hello, Loaded
//! ```
//! The host may say [`ToAgent::Begin`] as early as it likes. Until then the agent knows nothing that differs from life to life, and
//! says nothing but [`FromAgent::Ready`].
//! The host does not trust the agent: lines longer than [`MAX_LINE`] or that do not parse are a protocol
//! violation and count as a failure of that driver VM.

use serde::{Deserialize, Serialize};
use umbra_shadow::block::Disk;
use umbra_shadow::sound::Card;

/// Name of the virtio-console port that carries this protocol.
pub const CONTROL_PORT: &str = "org.umbra.control";

/// Longest line either side accepts, in bytes: a full rx mode (64 unicast and 64 multicast addresses and a
/// full VLAN table) fits in with room.
pub const MAX_LINE: usize = 32 * 1024;

/// How often the agent sends a heartbeat, in milliseconds.
pub const HEARTBEAT_MS: u64 = 250;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl std::str::FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || format!("{text:?} is no MAC address (six bytes in hexadecimal, as 52:54:00:12:34:56)");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

/// Bytes of [`Entropy`]: as many as the kernel's generator has for a seed, twice.
pub const ENTROPY_BYTES: usize = 64;

/// Random bytes from the host; 128 hexadecimal digits on the wire. Never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Entropy(pub [u8; ENTROPY_BYTES]);

impl std::fmt::Debug for Entropy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Entropy(..)")
    }
}

impl From<Entropy> for String {
    fn from(Entropy(bytes): Entropy) -> Self {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl TryFrom<String> for Entropy {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        const WRONG: &str = "entropy is 128 hexadecimal digits";
        let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).and_then(|n| u8::try_from(n).ok())).collect();
        let bytes: Vec<u8> =
            digits.ok_or(WRONG)?.chunks(2).map(|pair| pair.iter().fold(0, |n, d| n << 4 | d)).collect();
        if text.len() != 2 * ENTROPY_BYTES {
            return Err(WRONG);
        }
        bytes.try_into().map(Self).map_err(|_| WRONG)
    }
}

/// Host to agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ToAgent {
    /// First message: which life this is. It may have been restored from a snapshot, as others before it: nothing that is to differ
    /// between them may be drawn or sent before. Answered by [`FromAgent::Hello`].
    Begin {
        /// The generation.
        generation: u32,
        /// For the kernel's random number generator.
        entropy: Entropy,
        /// The time of day: nanoseconds since 1970, UTC.
        unix_ns: u64,
    },
    /// Sent once after [`FromAgent::Hello`]: bring the NIC up and forward between it and the virtio-net ends.
    ConfigureNet(NetPlan),
    /// Sent once after [`FromAgent::Hello`], in place of [`Self::ConfigureNet`], to the driver VM of a sound card: start
    /// the sound service.
    ConfigureSound {
        /// Number of guests that it serves, and so of ports.
        ends: u16,
        /// Where its card is.
        #[serde(default)]
        device: DevicePlace,
    },
    /// Sent once after [`FromAgent::Hello`], in place of [`Self::ConfigureNet`], to the driver VM of disks: serve them.
    ConfigureBlock(BlockPlan),
    /// Sent to the driver VM of disks before it is ended on purpose, when no guest orders anything any more: make stable what they have
    /// left, then answer with [`FromAgent::AtRest`].
    Rest,
    /// What one guest asked its network device to receive, whole each time.
    SetRxMode {
        /// Index of the end in [`NetPlan::ends`].
        end: u16,
        /// The mode.
        mode: RxMode,
    },
    /// What one guest can take: segmentation is done in the driver VM for those bits that are off.
    SetOffloads {
        /// Index of the end in [`NetPlan::ends`].
        end: u16,
        /// The offloads.
        offloads: Offloads,
    },
    /// The device has come: give it to its driver, or look for it on the PCI bus. Only to a driver VM that waited without it.
    Rescan,
    /// Fail for real, for tests and for `umbra crash`.
    Crash {
        /// In which way.
        kind: CrashKind,
    },
}

/// The network that a driver VM is to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetPlan {
    /// The virtio-net ends, one a guest device. One end: `tc` redirect; several: a bridge.
    pub ends: Vec<NetEnd>,
    /// MTU to set on the NIC and the ends, in bytes; `None` leaves the driver's own.
    pub mtu: Option<u16>,
    /// Where its NIC is.
    #[serde(default)]
    pub device: DevicePlace,
}

/// The disks that a driver VM is to serve.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockPlan {
    /// The ends, one a guest's disk; end `n` has the port `org.umbra.block.n` ([`crate::block_protocol`]).
    pub ends: Vec<BlockEnd>,
    /// Time for the disks to appear behind their controller, s; more where the machine is slow.
    pub appear_within_s: u32,
    /// Where its controller is.
    #[serde(default)]
    pub device: DevicePlace,
}

/// What one guest gets of the disks of a driver VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockEnd {
    /// The disk's serial number or WWID, as [`FromAgent::Disks`] reports it; `None`: the driver VM has one disk, and it is that.
    #[serde(default)]
    pub serial: Option<String>,
    /// The guest's part of it.
    #[serde(default)]
    pub part: DiskPart,
    /// The guest only reads: the disk is opened, and reported, as one that cannot be written to.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
    /// The disk has a volatile cache, whatever its driver reports: the driver is told, or it would send no flush.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub has_cache: bool,
    /// Longest time with orders at the disk and no answer before the driver VM counts as failed, ms; longer while a flush is under way.
    pub io_timeout_ms: u32,
}

/// A part of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskPart {
    /// All of it.
    #[default]
    Whole,
    /// A partition, by its number in the partition table, from 1.
    Partition(u32),
    /// A range, in sectors of 512 bytes; `sectors` 0: up to the end.
    Range {
        /// First sector.
        start: u64,
        /// Number of sectors.
        sectors: u64,
    },
}

/// Where the device of a driver VM is when its agent gets its plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DevicePlace {
    /// In the VM: what takes long to appear is missing.
    #[default]
    Present,
    /// It comes with [`ToAgent::Rescan`]; until then everything else is set up, and nothing is missing.
    ToCome,
}

/// One virtio-net end inside the driver VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetEnd {
    /// The MAC address of the virtio-net device in the driver VM by which the agent finds the interface
    /// (not the guest's).
    pub device_mac: Mac,
    /// What the guest's device receives now.
    pub mode: RxMode,
    /// What the guest can take.
    pub offloads: Offloads,
}

/// The receive mode of a guest's network device (virtio 1.2, section 5.1.6.5.1 to 5.1.6.5.3).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RxMode {
    /// Everything on the wire.
    pub promiscuous: bool,
    /// All multicast frames.
    pub all_multicast: bool,
    /// Unicast addresses, the device's own among them. At most 64; more make the mode promiscuous.
    pub unicast: Vec<Mac>,
    /// Multicast addresses. At most 64; more turn `all_multicast` on.
    pub multicast: Vec<Mac>,
    /// VLANs let through; `None`: the guest does not filter.
    pub vlans: Option<Vec<u16>>,
}

/// Which offloads the guest at the other end of a virtio-net end accepted for frames towards it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offloads {
    /// Partial checksums (`VIRTIO_NET_F_GUEST_CSUM`).
    pub checksum: bool,
    /// TCP over IPv4 segments (`VIRTIO_NET_F_GUEST_TSO4`).
    pub tso4: bool,
    /// TCP over IPv6 segments (`VIRTIO_NET_F_GUEST_TSO6`).
    pub tso6: bool,
}

impl Default for Offloads {
    fn default() -> Self {
        Self { checksum: true, tso4: true, tso6: true }
    }
}

/// Real ways for a driver VM to fail. With the feature `clap` they are words of a command line, and their docs its help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "clap", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum CrashKind {
    /// A kernel panic (`/proc/sysrq-trigger` `c`).
    Panic,
    /// The agent stops answering; the kernel lives on.
    AgentHang,
    /// An immediate reboot without a panic.
    Reboot,
    /// Real-time tasks that never end take every CPU: interrupts are answered, nothing else runs.
    Spin,
    /// Every vCPU spins with interrupts off. The process of the VM does this to it, not the agent.
    LockUp,
    /// All memory is taken.
    OutOfMemory,
    /// The driver lets go of its device; kernel and agent live on.
    Unbind,
    /// Frames or samples of the guests are taken no more; kernel and agent live on.
    Stall,
    /// The NIC's driver holds the network stack's lock (rtnl) for some seconds, as in a recovery of its own: an offline self-test,
    /// where it has one (e1000e: 4 s and more). No failure in itself.
    LockNetwork,
}

/// Most ranges of memory that an agent gives up: a line of them is far shorter than [`MAX_LINE`].
pub const MAX_UNUSED: usize = 256;
/// Addresses in a [`FromAgent::Hello`]: as many as a processor has breakpoints.
pub const MAX_PANIC_ENTRIES: usize = 4;

/// Memory of a driver VM: whole huge pages of 2 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryRange {
    /// Guest physical address, a multiple of 2 MiB.
    pub start: u64,
    /// Bytes, a multiple of 2 MiB and not 0.
    pub length: u64,
}

/// Speed and duplex of a link (virtio 1.2, section 5.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkMode {
    /// Mb/s, below 2^31.
    pub speed: u32,
    /// Both ways at once.
    pub full_duplex: bool,
}

/// Agent to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum FromAgent {
    /// First message, and said again when all modules are loaded, unless [`ToAgent::Begin`] has come: the kernel is up, the agent runs,
    /// and does not know yet which life this is.
    Ready {
        /// All modules of the image are loaded.
        loaded: bool,
        /// Memory that this VM will never use, by address; at most [`MAX_UNUSED`] ranges. Only with all modules loaded.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        unused: Vec<MemoryRange>,
    },
    /// Answer to [`ToAgent::Begin`].
    Hello {
        /// The generation that it was told.
        generation: u32,
        /// Kernel release (`uname -r`).
        kernel: String,
        /// Milliseconds since the kernel started.
        uptime_ms: u64,
        /// Addresses of the functions that the kernel calls first when it dies; at most [`MAX_PANIC_ENTRIES`]. None: not known.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        panic_entries: Vec<u64>,
    },
    /// All modules of the image are loaded: once there is a device, its driver finds it.
    Loaded {
        /// Milliseconds since the kernel started.
        uptime_ms: u64,
    },
    /// The physical NIC is there: from now on it gets what the guests have asked for.
    NicFound {
        /// Milliseconds since the kernel started.
        uptime_ms: u64,
    },
    /// The NIC is set up, and is up.
    Nic {
        /// Kernel driver, as `e1000e`.
        driver: String,
        /// Interface name inside the driver VM.
        interface: String,
        /// The NIC's permanent address.
        mac: Mac,
        /// MTU in force, bytes.
        mtu: u16,
        /// Milliseconds since the kernel started.
        uptime_ms: u64,
    },
    /// The sound card has a driver, is unmuted and ready to play; sent once.
    Sound {
        /// Kernel driver, as `snd_hda_intel`.
        driver: String,
        /// What the card can do. Not checked yet.
        card: Card,
        /// Milliseconds since the kernel started.
        uptime_ms: u64,
    },
    /// The disks have a driver and can be read and written; sent once, after their probe.
    Disks {
        /// Kernel driver of the controller, as `nvme`.
        driver: String,
        /// What each end serves, in the order of [`BlockPlan::ends`]. Not checked yet.
        disks: Vec<Disk>,
        /// Milliseconds since the kernel started.
        uptime_ms: u64,
    },
    /// The disk has answered an order of this end with an error that may be its driver's, or has failed a flush; said once of each
    /// connection. It bears out the guest's word of that.
    DiskError {
        /// Index of the end in [`BlockPlan::ends`].
        end: u16,
        /// Number of the connection with the guest in this life, from 1.
        attempt: u32,
        /// Linux's number of the error.
        errno: i32,
    },
    /// The answer to [`ToAgent::Rest`].
    AtRest {
        /// Each disk has been flushed, or needs no flush.
        stable: bool,
    },
    /// Filters are set and frames are forwarded; sent once, whatever the carrier.
    Forwarding {
        /// Milliseconds since the kernel started.
        uptime_ms: u64,
    },
    /// The NIC's carrier; sent after `Forwarding` and at each change.
    Carrier {
        /// Link up.
        up: bool,
        /// What the link has come up as, where the NIC's driver knows.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mode: Option<LinkMode>,
        /// Milliseconds since the kernel started.
        uptime_ms: u64,
    },
    /// Every [`HEARTBEAT_MS`].
    Heartbeat {
        /// Counts from 1.
        sequence: u64,
        /// Memory available in the driver VM, bytes.
        available_memory: u64,
    },
    /// The agent cannot do its work; `what` says why in a sentence for the user. The driver VM counts as failed.
    Failed {
        /// The reason.
        what: String,
    },
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn entropy_is_whole_on_the_wire_and_never_shown() {
        let mut bytes = [0xa5; ENTROPY_BYTES];
        bytes[0] = 0x01;
        let message = ToAgent::Begin { generation: 2, entropy: Entropy(bytes), unix_ns: 3 };
        let text = serde_json::to_string(&message).unwrap();
        assert!(text.contains("01a5a5"), "{text}");
        assert_eq!(serde_json::from_str::<ToAgent>(&text).unwrap(), message);
        assert!(!format!("{message:?}").contains("a5"));
        for wrong in [text.replace("01a5", "01"), text.replace("01a5", "0xa5"), text.replace("01a5", "01a5\u{e4}")] {
            assert!(serde_json::from_str::<ToAgent>(&wrong).is_err(), "{wrong}");
        }
    }
}
