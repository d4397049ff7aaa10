//! The standby of a driver VM: its next life, booted ahead, without the device. Pure, a part of the life cycle.
//!
//! ```text
//!           live            1 s later           hello, modules loaded         failure
//!   none ----------> due -------------> booting --------------------> ready ---------> the present life
//!    ^                ^                    | death                      | death   (so does one that still boots)
//!    |                +---- 1, 2 .. 60 s --+----------------------------+
//!    +--- quarantine, stop
//! ```
//!
//! A hot spare has a device of its own, which is reset before it boots (`Resetting`) and fenced after each of its lives
//! (`Fencing`). It is ready when it forwards (`Hot`), armed when its NIC has a carrier. When it takes over, the two devices
//! change places: that of the life that has failed is the spare's then.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use umbra_shadow::Generation;

use super::RESET_PATIENCE;
use super::asleep::Hold;
use super::fencing::ALARM;
use crate::base::time::Time;
use crate::config::Restart;

/// Pause between a recovery and the boot of the next standby, which leaves the machine in peace at first.
const SETTLE: Duration = Duration::from_secs(1);

/// Interval at which a standby that is due checks whether it is its turn. Standbys of several drivers boot one after the other, so
/// that a common failure does not cost the machine two boots at once, and none beside a recovery.
const TURN: Duration = Duration::from_millis(250);
/// Longest time that a due standby waits for its turn.
const TURN_MAX: Duration = Duration::from_secs(15);

/// Delay before a standby that died is replaced; doubled with each death in a row up to [`BACK_OFF_MAX`].
const BACK_OFF: Duration = Duration::from_secs(1);
const BACK_OFF_MAX: Duration = Duration::from_secs(60);

/// Factor between a standby's time limits and those of a life in service: it boots at low priority beside everything else, and
/// nothing depends on its being punctual.
pub(super) const PATIENCE: u32 = 4;

/// Where the standby is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standby {
    /// There is none.
    #[default]
    Absent,
    /// There is none; the next starts at this time.
    Due(Time),
    /// The spare's device is held by a process that is about to be gone.
    Fencing {
        /// When the next spare starts; `None`: not before one is wanted.
        next: Option<Time>,
        /// The process is that of a life which has served and failed: there is a report to be completed.
        served: bool,
    },
    /// The spare's device is being reset.
    Resetting {
        /// Whether a spare is to start then.
        wanted: bool,
    },
    /// Its kernel boots, its agent loads modules; that of a spare sets up forwarding as well.
    Booting {
        /// Its generation.
        generation: Generation,
        /// Whether the agent has said hello.
        hello: bool,
        /// When it is given up, if it is not ready.
        until: Time,
    },
    /// A process runs that is to leave a snapshot (`saving`).
    Saving {
        /// Its generation, if it becomes the present life.
        generation: Generation,
        /// There was no snapshot that can be used, so that it boots; before that, it is being looked for.
        boots: bool,
        /// When it is given up, if it has left none.
        until: Time,
    },
    /// There is a snapshot, and nothing that waits.
    Saved,
    /// It waits for the device.
    Ready {
        /// Its generation.
        generation: Generation,
        /// The agent's last sign of life.
        heard: Time,
    },
    /// A spare: it forwards, with its own device.
    Hot {
        /// Its generation.
        generation: Generation,
        /// The agent's last sign of life.
        heard: Time,
        /// Its NIC has a carrier: the guests' splitters take it as soon as they lose the serving one.
        armed: bool,
    },
}

impl Standby {
    /// Its generation, if it has a process that is of use.
    pub fn generation(&self) -> Option<Generation> {
        match self {
            Self::Booting { generation, .. }
            | Self::Saving { generation, .. }
            | Self::Ready { generation, .. }
            | Self::Hot { generation, .. } => Some(*generation),
            Self::Absent | Self::Due(_) | Self::Fencing { .. } | Self::Resetting { .. } | Self::Saved => None,
        }
    }

    /// How far it is, for people and `umbra status --json`.
    pub fn stage(&self) -> StandbyStage {
        match self {
            Self::Absent => StandbyStage::None,
            Self::Due(_) => StandbyStage::Due,
            Self::Fencing { .. } | Self::Resetting { .. } => StandbyStage::Recovering,
            Self::Booting { .. } => StandbyStage::Booting,
            Self::Saving { .. } => StandbyStage::Saving,
            Self::Saved => StandbyStage::Snapshot,
            Self::Ready { .. } => StandbyStage::Ready,
            Self::Hot { armed: true, .. } => StandbyStage::Armed,
            Self::Hot { armed: false, .. } => StandbyStage::NoCarrier,
        }
    }
}

/// How far a standby is, in one word. Status and events have the variant's name in kebab case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StandbyStage {
    /// There is none.
    None,
    /// There is none; the next one starts soon.
    Due,
    /// The spare's device is given up by the life that failed, and reset.
    Recovering,
    /// The kernel boots, the agent loads modules.
    Booting,
    /// A snapshot is looked for, or a driver VM boots that leaves one.
    Saving,
    /// Nothing waits, and there is a snapshot that the next life is restored from.
    Snapshot,
    /// A standby waits for the device.
    Ready,
    /// A spare forwards, but its NIC has no carrier.
    NoCarrier,
    /// A spare forwards, with a carrier.
    Armed,
    /// A word of another version, read from its files. Never written.
    #[serde(other)]
    Unknown,
}

impl StandbyStage {
    /// Whether a failure now would find what is to wait for it.
    pub fn is_ready(self) -> bool {
        matches!(self, Self::Ready | Self::Snapshot | Self::Armed)
    }
}

impl fmt::Display for StandbyStage {
    /// The word of status and events.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// What stands ready for a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandbyPolicy {
    /// Nothing: the next life boots cold.
    Nothing,
    /// The next life, booted, without the device.
    Warm,
    /// A snapshot that the next life is restored from.
    Snapshot,
    /// A hot spare: the next life in service already, with a device of its own.
    Spare,
}

/// How far a standby is that becomes the present life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Booting,
    Hello,
    /// It forwards; the agent's last sign of life, and whether there is a carrier.
    Forwarding(Time, bool),
}

/// The standby and what is remembered about those before it.
#[derive(Clone, Debug)]
pub(super) struct Standbys {
    ahead: StandbyPolicy,
    state: Standby,
    /// Standbys that died in a row, since one was last adopted.
    deaths: u32,
    /// When the standby that is due began to wait for its turn.
    waits_since: Option<Time>,
    boot_patience: Duration,
    heartbeat_patience: Duration,
    /// Time of its silence in which its VM got no processor.
    excused: Duration,
    /// When the process that still holds the spare's device was killed or asked to give it up, or its reset began.
    held_since: Option<Time>,
    /// People have been warned that the device is still held, or reset.
    warned: bool,
}

impl Standbys {
    pub(super) fn new(ahead: StandbyPolicy, policy: &Restart) -> Self {
        let (state, deaths, waits_since) = (Standby::Absent, 0, None);
        let (held_since, warned) = (None, false);
        let (boot_patience, heartbeat_patience, excused) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
        let mut new =
            Self { ahead, state, deaths, waits_since, boot_patience, heartbeat_patience, excused, held_since, warned };
        new.set_patience(policy);
        new
    }

    /// Waits as long as `policy` has it, from now on.
    pub(super) fn set_patience(&mut self, policy: &Restart) {
        // A spare may have to serve at any moment.
        let patience = if self.ahead == StandbyPolicy::Spare { 1 } else { PATIENCE };
        self.heartbeat_patience = Duration::from_millis(policy.heartbeat_timeout_ms.into()) * patience;
        self.boot_patience = Duration::from_secs(policy.boot_timeout_s.into()) * PATIENCE;
    }

    /// From now on `ahead` is kept ready.
    pub(super) fn keep(&mut self, ahead: StandbyPolicy) {
        self.ahead = ahead;
    }

    pub(super) fn state(&self) -> Standby {
        self.state
    }

    pub(super) fn is_spare(&self) -> bool {
        self.ahead == StandbyPolicy::Spare
    }

    /// Whether snapshots are made ahead, and nothing waits.
    pub(super) fn is_snapshot(&self) -> bool {
        self.ahead == StandbyPolicy::Snapshot
    }

    /// Standbys, or processes that were to leave a snapshot, that have died in a row.
    pub(super) fn deaths(&self) -> u32 {
        self.deaths
    }

    /// Whether it is a spare that forwards.
    pub(super) fn is_hot(&self) -> bool {
        matches!(self.state, Standby::Hot { .. })
    }

    /// Longest time until a standby that is wanted now is ready.
    pub(super) fn longest(&self) -> Duration {
        TURN_MAX + self.boot_patience
    }

    /// Whether a standby waits that has booted.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.state, Standby::Ready { .. })
    }

    /// `second` is the first from now on, if there is one. What this one is about to do (a pause until the next is started) is `second`'s
    /// then.
    pub(super) fn move_up(&mut self, second: &mut Self) -> bool {
        let moves = self.state.generation().is_none() && second.state.generation().is_some();
        if moves {
            std::mem::swap(&mut self.state, &mut second.state);
            std::mem::swap(&mut self.excused, &mut second.excused);
            second.deaths = 0;
        }
        moves
    }

    /// The driver VM is live: schedules the next standby, if there is none.
    pub(super) fn want(&mut self, now: Time) {
        match &mut self.state {
            Standby::Absent if self.ahead != StandbyPolicy::Nothing => self.state = Standby::Due(now + SETTLE),
            Standby::Fencing { next: next @ None, .. } => *next = Some(now + SETTLE),
            Standby::Resetting { wanted } => *wanted = true,
            _ => {}
        }
    }

    /// The life that forwards has no carrier: schedules a spare already, because its NIC may have one.
    pub(super) fn want_beside(&mut self, now: Time) {
        if self.is_spare() {
            self.want(now);
        }
    }

    /// A reset of the spare's device begins; a spare is to start after it.
    pub(super) fn resetting(&mut self, now: Time) {
        self.state = Standby::Resetting { wanted: true };
        (self.held_since, self.warned) = (Some(now), false);
    }

    /// Another standby of the machine boots, or a life is on its way into service: a standby that is due waits for its turn, for
    /// [`TURN_MAX`] at most.
    pub(super) fn wait_turn(&mut self, now: Time) {
        if let Standby::Due(at) = &mut self.state
            && *at <= now
            && now.since(*self.waits_since.get_or_insert(now)) < TURN_MAX
        {
            *at = now + TURN;
        }
    }

    pub(super) fn started(&mut self, now: Time, generation: Generation) {
        self.waits_since = None;
        self.state = Standby::Booting { generation, hello: false, until: now + self.boot_patience };
    }

    /// The process of `generation` is to leave a snapshot.
    pub(super) fn saving(&mut self, now: Time, generation: Generation) {
        self.waits_since = None;
        self.state = Standby::Saving { generation, boots: false, until: now + self.boot_patience };
    }

    /// The process that is to leave a snapshot has found none that can be used.
    pub(super) fn boots_to_save(&mut self) {
        if let Standby::Saving { boots, .. } = &mut self.state {
            *boots = true;
        }
    }

    /// There is a snapshot. Whether a process has looked for it or left it.
    pub(super) fn saved(&mut self) -> bool {
        let saves = matches!(self.state, Standby::Saving { .. });
        if saves {
            (self.state, self.deaths) = (Standby::Saved, 0);
        }
        saves
    }

    /// The agent said hello. Returns whether it has to be sent its plan, which is once.
    pub(super) fn hello(&mut self) -> bool {
        match &mut self.state {
            Standby::Booting { hello, .. } => !std::mem::replace(hello, true),
            _ => false,
        }
    }

    pub(super) fn ready(&mut self, now: Time) {
        if let Standby::Booting { generation, hello: true, .. } = self.state
            && !self.is_spare()
        {
            (self.state, self.excused) = (Standby::Ready { generation, heard: now }, Duration::ZERO);
        }
    }

    pub(super) fn forwarding(&mut self, now: Time) {
        if let Standby::Booting { generation, hello: true, .. } = self.state
            && self.is_spare()
        {
            (self.state, self.excused) = (Standby::Hot { generation, heard: now, armed: false }, Duration::ZERO);
        }
    }

    /// The spare's carrier. Returns whether that changes anything.
    pub(super) fn carrier(&mut self, up: bool) -> bool {
        match &mut self.state {
            Standby::Hot { armed, .. } => std::mem::replace(armed, up) != up,
            _ => false,
        }
    }

    pub(super) fn heartbeat(&mut self, now: Time) {
        if let Standby::Ready { heard, .. } | Standby::Hot { heard, .. } = &mut self.state {
            (*heard, self.excused) = (now, Duration::ZERO);
        }
    }

    /// Longest silence of one that waits booted which is no death.
    fn longest_silence(&self) -> Duration {
        self.heartbeat_patience + self.excused
    }

    /// Of one that waits booted: when to begin checking whether it gets a processor at all, and when its silence is its death.
    pub(super) fn silence(&self) -> Option<(Time, Time)> {
        let (Standby::Ready { heard, .. } | Standby::Hot { heard, .. }) = self.state else { return None };
        let over = self.longest_silence();
        Some((heard + (over - self.heartbeat_patience / 2), heard + over))
    }

    /// Its VM got no processor in the last half of that time: extends it by that half, to [`PATIENCE`] times as long at most.
    pub(super) fn excuse(&mut self) {
        let patience = self.heartbeat_patience;
        self.excused = (self.excused + patience / 2).min(patience * (PATIENCE - 1));
    }

    /// Schedules a standby at once, even where the configuration asks for none.
    pub(super) fn want_now(&mut self, now: Time) {
        match &mut self.state {
            Standby::Absent | Standby::Due(_) => self.state = Standby::Due(now),
            Standby::Fencing { next, .. } => *next = Some(now),
            Standby::Resetting { wanted } => *wanted = true,
            Standby::Booting { .. }
            | Standby::Saving { .. }
            | Standby::Saved
            | Standby::Ready { .. }
            | Standby::Hot { .. } => {}
        }
    }

    /// Takes the standby for the next life: its number, and how far it is. Where it is a spare, the device of the life
    /// before is the spare's from now on.
    pub(super) fn adopt(&mut self, now: Time) -> Option<(Generation, Stage)> {
        let taken = match self.state {
            Standby::Booting { generation, hello, .. } => {
                (generation, if hello { Stage::Hello } else { Stage::Booting })
            }
            // What it leaves it leaves all the same, or not at all.
            Standby::Saving { generation, boots: true, .. } => (generation, Stage::Booting),
            Standby::Ready { generation, .. } => (generation, Stage::Hello),
            Standby::Hot { generation, heard, armed } => {
                // What was excused is no silence of the life that it becomes.
                (generation, Stage::Forwarding(heard + self.excused, armed))
            }
            _ => return None,
        };
        self.deaths = 0;
        match self.ahead {
            // A spare taken without a carrier is a last resort: the next one starts without a pause.
            StandbyPolicy::Spare if matches!(taken.1, Stage::Forwarding(_, false)) => self.fence(now, Some(now), true),
            StandbyPolicy::Spare => self.fence(now, Some(now + SETTLE), true),
            StandbyPolicy::Nothing | StandbyPolicy::Warm | StandbyPolicy::Snapshot => self.state = Standby::Absent,
        }
        Some(taken)
    }

    /// Drops the standby and schedules no other. Whether there was one.
    pub(super) fn give_up(&mut self, now: Time) -> bool {
        let (was, is_spare) = (self.state.generation().is_some(), self.is_spare());
        self.waits_since = None;
        match &mut self.state {
            Standby::Fencing { next, .. } => *next = None,
            Standby::Resetting { wanted } => *wanted = false,
            _ if was && is_spare => self.fence(now, None, false),
            _ => self.state = Standby::Absent,
        }
        was
    }

    /// The standby has died while it waited: schedules the next one. Whether there was one.
    pub(super) fn died(&mut self, now: Time) -> bool {
        if self.state.generation().is_none() {
            return false;
        }
        let delay = BACK_OFF.saturating_mul(1_u32.checked_shl(self.deaths).unwrap_or(u32::MAX)).min(BACK_OFF_MAX);
        self.deaths = self.deaths.saturating_add(1);
        match self.ahead {
            StandbyPolicy::Nothing => self.state = Standby::Absent,
            StandbyPolicy::Warm | StandbyPolicy::Snapshot => self.state = Standby::Due(now + delay),
            StandbyPolicy::Spare => self.fence(now, Some(now + delay), false),
        }
        true
    }

    /// From now on a process holds the spare's device that was killed, or asked to give it up.
    fn fence(&mut self, now: Time, next: Option<Time>, served: bool) {
        self.state = Standby::Fencing { next, served };
        (self.held_since, self.warned) = (Some(now), false);
    }

    /// The process that held the spare's device is gone, or has given it up. Whether it was a life that had served.
    pub(super) fn fenced(&mut self) -> bool {
        let Standby::Fencing { next, served } = self.state else { return false };
        self.state = next.map_or(Standby::Absent, Standby::Due);
        self.held_since = None;
        served
    }

    /// How the spare's device is held at `now`, if the lives that are of no use any more give it up.
    pub(super) fn hold(&self, now: Time) -> Hold {
        match (self.state, self.held_since) {
            (Standby::Fencing { .. } | Standby::Resetting { .. }, Some(since)) if since + RESET_PATIENCE <= now => {
                Hold::Hangs
            }
            (Standby::Fencing { .. } | Standby::Resetting { .. }, since) => {
                Hold::Held { until: since.map(|since| since + RESET_PATIENCE) }
            }
            _ => Hold::Released,
        }
    }

    fn alarm_due(&self) -> Option<Time> {
        // A reset may take the kernel a minute.
        let patience = if matches!(self.state, Standby::Resetting { .. }) { RESET_PATIENCE } else { ALARM };
        self.held_since.filter(|_| !self.warned).map(|since| since + patience)
    }

    /// The warning, once, that the spare's device is still held or reset.
    pub(super) fn alarm(&mut self, now: Time) -> Option<String> {
        self.alarm_due().filter(|due| *due <= now)?;
        self.warned = true;
        self.held()
    }

    /// What holds the spare's device, where that takes longer than it should.
    pub(super) fn held(&self) -> Option<String> {
        self.held_since.filter(|_| self.warned)?;
        if matches!(self.state, Standby::Resetting { .. }) {
            return Some(format!(
                "the reset of the spare's device has not returned for {} s: the kernel holds it (`dmesg`); there is no spare until it \
                 has returned",
                RESET_PATIENCE.as_secs()
            ));
        }
        let seconds = ALARM.as_secs();
        Some(format!(
            "the process that had the spare's device was to give it up and has not ended for {seconds} s and more: the kernel \
             holds it, mostly in a call to a device that hangs (`dmesg`); there is no spare until it has ended"
        ))
    }

    /// The reset of the spare's device has returned. Whether a spare is to start.
    pub(super) fn reset_done(&mut self) -> bool {
        let Standby::Resetting { wanted } = self.state else { return false };
        (self.state, self.held_since) = (Standby::Absent, None);
        wanted
    }

    /// Nobody would have heard of it in the time `away`.
    pub(super) fn was_unwatched(&mut self, away: Duration) {
        match &mut self.state {
            Standby::Booting { until: at, .. }
            | Standby::Saving { until: at, .. }
            | Standby::Ready { heard: at, .. }
            | Standby::Hot { heard: at, .. } => *at = *at + away,
            _ => {}
        }
        self.held_since = self.held_since.map(|since| since + away);
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        match self.state {
            // Nothing waits for a killed process to end, or for the reset to return, but people are warned.
            Standby::Fencing { .. } | Standby::Resetting { .. } => self.alarm_due(),
            Standby::Absent | Standby::Saved => None,
            Standby::Due(at) => Some(at),
            Standby::Booting { until, .. } | Standby::Saving { until, .. } => Some(until),
            Standby::Ready { heard, .. } | Standby::Hot { heard, .. } => Some(heard + self.longest_silence()),
        }
    }

    /// Why the standby has to be given up at `now`, if it has.
    pub(super) fn overdue(&self, now: Time) -> Option<String> {
        self.deadline().filter(|deadline| *deadline <= now)?;
        match self.state {
            Standby::Booting { .. } => Some(format!("not ready after {} s", self.boot_patience.as_secs())),
            Standby::Saving { .. } => Some(format!("no snapshot after {} s", self.boot_patience.as_secs())),
            Standby::Ready { .. } | Standby::Hot { .. } => {
                Some(format!("no heartbeat for {} ms", self.longest_silence().as_millis()))
            }
            _ => None,
        }
    }
}
