//! What is counted in VM processes, as it crosses the wire.

use serde::{Deserialize, Serialize};

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

/// What KVM counts of the vCPUs of a VM since its start, summed over them. The names are KVM's (`KVM_GET_STATS_FD`); what the host's
/// kernel does not count is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VcpuCounts {
    /// Times that a vCPU left its guest, whatever the reason.
    pub exits: u64,
    /// Of these, because it had nothing to do (HLT).
    pub halt_exits: u64,
    /// Because an interrupt came for the host.
    pub irq_exits: u64,
    /// Port accesses that went to the VM's process.
    pub io_exits: u64,
    /// Memory accesses that went to the VM's process.
    pub mmio_exits: u64,
    /// Instructions that KVM has emulated; a kick by memory is one.
    pub insn_emulation: u64,
    /// Interrupts given to the guest.
    pub irq_injections: u64,
    /// Times that a vCPU which slept was woken.
    pub halt_wakeup: u64,
    /// Times that KVM waited for work before it put a vCPU to sleep.
    pub halt_attempted_poll: u64,
    /// Of these, with success.
    pub halt_successful_poll: u64,
    /// Time spent in those with success, ns.
    pub halt_poll_success_ns: u64,
    /// Time spent in those without, ns.
    pub halt_poll_fail_ns: u64,
}

/// What it takes to move frames, by direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetWork {
    /// Guest to NIC.
    pub out: PathWork,
    /// NIC to guest.
    pub into: PathWork,
}

/// What it takes to move frames one way, since start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathWork {
    /// Bytes moved, without virtio's headers.
    pub bytes: u64,
    /// Kicks: by who has frames, or has made room for them.
    pub kicks: u64,
    /// Looks at the queues, also those that found nothing.
    pub pumps: u64,
    /// Looks that ended because there was no room.
    pub full: u64,
    /// Signals to either end, each an interrupt of its VM.
    pub signals: u64,
    /// Signals left out, because that end did not want to hear.
    pub suppressed: u64,
}
