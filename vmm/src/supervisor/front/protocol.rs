//! What the command line and a running machine say to each other: one JSON line each on the control socket.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use umbra_driver_vm::protocol::CrashKind;

use crate::config::changes::Change;
use crate::record::status::Status;

/// Longest request, in bytes.
pub const MAX_REQUEST: usize = 4096;

/// From the command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Show everything. Answered by [`Response::Status`].
    Status,
    /// Send the events as they are in the event log, a line each, and then [`Response::EventsEnd`] unless `follow` is set.
    Events {
        /// Only those with a higher number.
        after: u64,
        /// Go on with those that are still to come, until the connection is closed.
        follow: bool,
    },
    /// Make a driver VM fail for real. Answered by [`Response::Crashing`].
    Crash {
        /// Name of the driver VM.
        name: String,
        /// The way to fail.
        kind: CrashKind,
    },
    /// Restart a driver VM, masked, from another image if one is named. Answered by [`Response::Restarted`] when it
    /// serves again, or by [`Response::Error`] when the old one goes on or is back.
    Restart {
        /// Name of the driver VM.
        name: String,
        /// The folder of the image, absolute.
        image: Option<PathBuf>,
    },
    /// End the quarantine of a driver VM. Answered as [`Request::Restart`].
    Resume {
        /// Name of the driver VM.
        name: String,
    },
    /// The host is to sleep: have all driver VMs give their devices up, until [`Request::Wake`]. Answered by [`Response::Asleep`] when
    /// no process has a device.
    Sleep,
    /// The host is awake: begin the next lives. Answered by [`Response::Awake`].
    Wake,
    /// Start a guest that is off or has failed. Answered by [`Response::Done`].
    StartGuest {
        /// Name of the guest.
        name: String,
    },
    /// Have a guest power off, or kill it; the machine goes on while it has another one. Answered by [`Response::Done`] when the
    /// power button was pressed, or the kill was sent.
    StopGuest {
        /// Name of the guest.
        name: String,
        /// By the power button or by a kill.
        how: StopHow,
    },
    /// Have a guest power off, or kill it, and start it again. Answered as [`Request::StopGuest`].
    RebootGuest {
        /// Name of the guest.
        name: String,
        /// By the power button or by a kill.
        how: StopHow,
    },
    /// Make a disk of a guest larger, or take the size that its file or block device has now. Answered by [`Response::Resized`].
    Resize {
        /// Name of the guest.
        name: String,
        /// Which of its disks, from 0, in the order of the machine file.
        disk: u16,
        /// The new size.
        bytes: Option<u64>,
    },
    /// Inject a non-maskable interrupt into all vCPUs of a guest. Answered by [`Response::Done`].
    Nmi {
        /// Name of the guest.
        name: String,
    },
    /// Read the machine file again and take over what can change as the machine runs. Answered by [`Response::Reloaded`].
    Reload {
        /// Only say what differs.
        check: bool,
    },
    /// End the machine. Answered by [`Response::Stopping`]; the connection is closed when it has ended.
    Stop {
        /// By the power button or by a kill.
        how: StopHow,
    },
}

/// How a machine is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopHow {
    /// The guests' power buttons are pressed.
    PowerButton,
    /// The VMs are killed.
    Kill,
}

/// From the machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "kebab-case")]
pub enum Response {
    /// It is done, or under way: `umbra status` shows how it goes on.
    Done {
        /// Name of the guest.
        name: String,
    },
    /// The status.
    Status(Box<Status>),
    /// All past events have been sent.
    EventsEnd,
    /// The driver VM's agent was ordered to crash.
    Crashing {
        /// Name of the driver VM.
        name: String,
        /// The generation that is to die.
        generation: u32,
        /// The way to fail.
        kind: CrashKind,
    },
    /// The driver VM serves again.
    Restarted {
        /// Name of the driver VM.
        name: String,
        /// Its new generation.
        generation: u32,
        /// From the mask to live, ms.
        outage_ms: Option<f64>,
        /// Why there is no snapshot of it, where `standby = "snapshot"` asks for one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        no_snapshot: Option<String>,
    },
    /// The guest sees the disk with its new size.
    Resized {
        /// Name of the guest.
        name: String,
        /// Which of its disks.
        disk: u16,
        /// Its size.
        bytes: u64,
    },
    /// No process has a device of the host.
    Asleep {
        /// How long that took, ms.
        ms: f64,
    },
    /// The driver VMs begin their next lives.
    Awake {
        /// They slept.
        slept: bool,
    },
    /// The machine file was read again.
    Reloaded {
        /// What differs from the machine that ran, and what becomes of it.
        changes: Vec<Change>,
    },
    /// The machine is ending.
    Stopping {
        /// By the power button or by a kill.
        how: StopHow,
    },
    /// The request cannot be met.
    Error {
        /// Why, for people.
        what: String,
    },
}

impl From<Status> for Response {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}
