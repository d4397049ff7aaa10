//! The words of the life cycle: what happens ([`Input`]), what is to be done ([`Action`]), and the states between.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use umbra_shadow::Generation;

use crate::base::time::Time;
use crate::wire::messages::Replay;

/// A guest's device at a driver VM: its place among those that the driver VM serves, in the order of the machine file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Endpoint(usize);

impl Endpoint {
    /// The end at `place`, from 0.
    pub const fn at(place: usize) -> Self {
        Self(place)
    }

    /// Its place, from 0.
    pub const fn place(self) -> usize {
        self.0
    }
}

/// An end as messages name it.
impl From<u16> for Endpoint {
    fn from(place: u16) -> Self {
        Self(place.into())
    }
}

/// How a failure was noticed. Events and crash reports have the variant's name in kebab case, and are read back by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoticedBy {
    /// pvpanic: the kernel reported its panic.
    Panic,
    /// The VM ended: power-off, reset, triple fault.
    VmEnd,
    /// The process ended without reporting why.
    ProcessExit,
    /// The process made a system call that it may not make, and was ended by that.
    Confinement,
    /// The VM could not be started.
    Start,
    /// VFIO reported an error of the device, or it was found switched off.
    Device,
    /// The agent reported it.
    Agent,
    /// The agent's stream was closed or carried what is no message.
    ControlStream,
    /// No heartbeat within its time-out.
    Heartbeat,
    /// The life did not forward within `boot_timeout_s`.
    BootTimeout,
    /// The link was closed, or broke a rule.
    Link,
    /// It brought another disk than the guests were given: it is quarantined at once.
    Identity,
    /// No failure: `umbra restart`. Event logs of older versions say `replaced`.
    #[serde(alias = "replaced")]
    Planned,
    /// No failure: the NIC has no carrier, and that of the spare has one.
    Carrier,
    /// A word of another version, read from its files. Never written.
    #[serde(other)]
    Unknown,
}

impl NoticedBy {
    /// Whether its process is over by then.
    pub fn is_the_end(self) -> bool {
        matches!(self, Self::ProcessExit | Self::Confinement | Self::Start | Self::VmEnd)
    }

    /// Whether it counts as a failure, in metrics, reports and the bound on restarts.
    pub fn is_failure(self) -> bool {
        !matches!(self, Self::Planned | Self::Carrier)
    }
}

impl fmt::Display for NoticedBy {
    /// The word of events and reports.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A failure of a driver VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// How it was noticed.
    pub source: NoticedBy,
    /// What happened, for people: `kernel panic`.
    pub what: String,
    /// When the first sign of it was seen; for a missing heartbeat, the last sign of life.
    pub at: Time,
}

/// The order in which lives that wait become the present life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// The standby, or the spare.
    First,
    /// The second standby, which waits behind the first and takes its place.
    Second,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Begin the first life.
    Start,
    /// The device's reset has returned, well or not.
    ResetDone,
    /// The host could start no process for the life that [`Action::Spawn`] asks for; why, for people.
    NotStarted(String),
    /// The agent said hello.
    Hello,
    /// The device is there and is about to get what was recorded of the guests' settings.
    Applying,
    /// The driver VM forwards frames.
    Forwarding,
    /// The NIC's carrier changed.
    Carrier(Carrier),
    /// The agent lives.
    Heartbeat,
    /// In the last half of the heartbeat time-out, the life's VM wanted a processor and got none.
    Starved,
    /// The splitter of this end went live.
    EndLive(Endpoint),
    /// The guest of this end is there, and connected with the present life.
    EndHere(Endpoint),
    /// The guest of this end is off, or has lost its connection with the present life.
    EndGone(Endpoint),
    /// A certain failure.
    Failed(Failure),
    /// A failure that may be a side effect of another one, whose own event is still to come.
    Sign(Failure),
    /// The process has given the device up.
    Released,
    /// The process has reported all that it had to report.
    Evidence,
    /// The process has ended and released everything that it held; how it ended, for people.
    ProcessGone(String),
    /// A deadline may have passed.
    Tick,
    /// No further life; end this one.
    Stop,
    /// The guests' devices are at rest, as [`Action::Quiesce`] asks, or cannot be.
    AtRest,
    /// Replace the driver VM by its standby when that has booted; `fresh`: by a standby that is started from now on.
    Restart {
        /// The present standby is of no use.
        fresh: bool,
    },
    /// The standby is of no use: another one is to be started.
    StandbyUseless,
    /// A quarantine is to end: the driver VM is started again, as if it had never failed.
    Resume,
    /// The host is to sleep: give the device up, and begin no life.
    Sleep,
    /// The host is awake.
    Wake,
    /// A standby's agent said hello.
    StandbyHello(Rank),
    /// A standby has loaded its modules.
    StandbyLoaded(Rank),
    /// A standby's agent lives.
    StandbyHeartbeat(Rank),
    /// A standby has failed while it waited; the reason, for people.
    StandbyFailed(Rank, String),
    /// The process that is to leave a snapshot has found none that can be used, and boots.
    SnapshotMissing,
    /// The process that is to leave a snapshot has left it, or has found that it is there and can be used.
    SnapshotThere,
    /// The spare forwards.
    SpareForwarding,
    /// The carrier of the spare's NIC.
    SpareCarrier(Carrier),
    /// The splitter of this end has gone over to the spare by itself.
    SpareLive(Endpoint),
    /// The process that held the spare's device has given it up, or is gone.
    SpareFenced,
    /// The reset of the spare's device has returned, well or not.
    SpareResetDone,
}

/// The physical link's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Carrier {
    /// There is a link.
    Up,
    /// There is none.
    Down,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Reset the device; answered by [`Input::ResetDone`].
    Reset,
    /// Start the process of this generation, with a new link to each end.
    Spawn(Generation),
    /// Make the standby, which is of this generation, the present life: give it the device.
    Adopt(Generation),
    /// Start the process of this generation as a standby: without the device, or, as a spare, with that of the spare.
    SpawnStandby(Rank, Generation),
    /// Start the process of this generation, which is the next life, while the one before is fenced; it gets its device by
    /// [`Action::Adopt`].
    SpawnAhead(Generation),
    /// The second standby is the first from now on.
    MoveUp,
    /// Start the process of this generation to leave the snapshot that the next life is restored from, if that is not there yet.
    TakeSnapshot(Generation),
    /// Kill the process that was to leave a snapshot: it has failed for the given reason.
    DropTaker(String),
    /// Make the spare, which is of this generation, the present life at the stage that it has reached, and its device the serving
    /// one; have the life before give its own device up, which is answered by [`Input::SpareFenced`].
    TakeOver(Generation),
    /// Send a standby's agent its plan, ahead of its turn.
    ConfigureStandby(Rank),
    /// Tell the guests whether the spare can take over at any moment.
    Arm(bool),
    /// Reset the spare's device; answered by [`Input::SpareResetDone`].
    ResetSpare,
    /// Kill a standby, which has failed for the given reason or (`None`) is of no use any more. The end of a spare is answered by
    /// [`Input::SpareFenced`].
    DropStandby(Rank, Option<String>),
    /// Have the guests' devices come to rest, because the driver VM is about to be replaced on purpose; answered by [`Input::AtRest`].
    Quiesce,
    /// Let the guests' devices go on: the driver VM is not replaced.
    GoOn,
    /// Report that a requested restart does not take place, for the given reason; nothing has changed.
    RestartOff(String),
    /// Tell the agent what network to serve.
    Configure,
    /// Let the splitter of this end replay and go live.
    GoLive(Endpoint, Replay),
    /// Lives in a row have died while they replayed at this end: the next one gets nothing of what was recorded, and its guest
    /// learns of that loss, as in a quarantine.
    StartClean(Endpoint),
    /// An end that came late, or came back, is live.
    EndLive(Endpoint),
    /// This end has not gone live in time: the driver VM is live without it.
    LeaveBehind(Endpoint),
    /// The driver VM is live, at all ends but those that were left behind.
    Live,
    /// The generation is about to fail: let the guests' shadows answer already.
    Mask,
    /// The generation has failed: tell the guests, whose splitters may have noticed first, and report it.
    Failed(Failure),
    /// Have the process give the device up; answered by [`Input::Released`].
    Release,
    /// The process has given its device up and is no longer the present life: let it say its last words, then kill it.
    BeginLastWords,
    /// Kill the process; answered by [`Input::ProcessGone`].
    Kill,
    /// Warn people, with the driver VM's name before the text: something takes longer than it should.
    Warn(String),
    /// The failed generation is fenced: complete its crash report.
    Report,
    /// The failed life whose place the spare has taken is fenced: complete its crash report.
    ReportFenced,
    /// No further generation starts until someone resumes the driver VM, for the given reason: tell the guests.
    Quarantine(String),
}

/// Where the driver VM is in its lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Not started yet.
    Idle,
    /// No process; the device's reset is under way.
    Resetting {
        /// When the reset counts as hung.
        until: Time,
        /// Earliest start of the next life; `None`: there is none.
        next: Option<Time>,
    },
    /// No process; waiting for the delay to pass.
    BackOff {
        /// The end of the delay.
        until: Time,
    },
    /// The kernel boots.
    Booting {
        /// Deadline for forwarding.
        until: Time,
    },
    /// The agent loads the driver and sets up forwarding.
    Configuring {
        /// Deadline for forwarding.
        until: Time,
    },
    /// Forwarding; the NIC looks for its link.
    WaitingCarrier {
        /// When the wait for the link ends.
        until: Time,
    },
    /// The ends replay.
    GoingLive {
        /// Those that are not live yet.
        waiting: BTreeSet<Endpoint>,
        /// When the wait for them ends.
        until: Time,
    },
    /// In service.
    Live {
        /// Since when.
        since: Time,
    },
    /// Failed; the device is about to be free.
    Fencing {
        /// When the process is killed, if it has not given the device up by itself; `None`: it has been killed.
        patience: Option<Time>,
        /// How long the life was live; `None`: it never was.
        lived: Option<Duration>,
        /// How the failure was noticed, which decides whether it counts as one.
        source: NoticedBy,
    },
    /// Given up.
    Quarantined,
    /// No process, until the host is awake.
    Asleep,
    /// The end of `umbra run`: the process is about to be gone.
    Stopping,
    /// Ended for good.
    Stopped,
}

impl State {
    /// Its name, for people and `umbra status --json`.
    pub fn name(&self) -> StateName {
        match self {
            Self::Idle => StateName::Idle,
            Self::Resetting { .. } => StateName::Resetting,
            Self::BackOff { .. } => StateName::BackOff,
            Self::Booting { .. } => StateName::Booting,
            Self::Configuring { .. } => StateName::Configuring,
            Self::WaitingCarrier { .. } => StateName::WaitingCarrier,
            Self::GoingLive { .. } => StateName::Replaying,
            Self::Live { .. } => StateName::Live,
            Self::Fencing { .. } => StateName::Fencing,
            Self::Quarantined => StateName::Quarantined,
            Self::Asleep => StateName::Asleep,
            Self::Stopping => StateName::Stopping,
            Self::Stopped => StateName::Stopped,
        }
    }
}

/// The name of a [`State`], as users see it: the variant's name in kebab case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StateName {
    /// [`State::Idle`].
    Idle,
    /// [`State::Resetting`].
    Resetting,
    /// [`State::BackOff`].
    BackOff,
    /// [`State::Booting`].
    Booting,
    /// [`State::Configuring`].
    Configuring,
    /// [`State::WaitingCarrier`].
    WaitingCarrier,
    /// [`State::GoingLive`].
    Replaying,
    /// [`State::Live`].
    Live,
    /// [`State::Fencing`].
    Fencing,
    /// [`State::Quarantined`].
    Quarantined,
    /// [`State::Asleep`].
    Asleep,
    /// [`State::Stopping`].
    Stopping,
    /// [`State::Stopped`].
    Stopped,
    /// A word of another version, which runs the machine. Never written.
    #[serde(other)]
    Unknown,
}

impl fmt::Display for StateName {
    /// The word of `umbra status`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}
