//! The standby of a driver VM: its next life, booted ahead, without the device. Pure, a part of the life cycle.
//!
//! ```text
//!           live            settled           hello, loaded           failure
//!   Absent ------> Due ----------------> Booting ---------> Ready ------------> adopted
//!     ^             ^                       |  death           | death            (so is one that still boots)
//!     |             +-------- back-off -----+------------------+
//!     +--- quarantine, stop, a guest that came or went
//! ```

use std::time::Duration;

use umbra_shadow::Generation;

use crate::supervisor::time::Time;

/// After a recovery the machine is left in peace for so long before the next standby boots.
const SETTLE: Duration = Duration::from_secs(1);

/// Delay before a standby that died is replaced; doubled with each death in a row up to [`BACK_OFF_MAX`].
const BACK_OFF: Duration = Duration::from_secs(1);
const BACK_OFF_MAX: Duration = Duration::from_secs(60);

/// A standby boots beside everything else at low priority, and waits where nothing hangs on its being punctual: it has
/// so many times the patience of a life in service.
const PATIENCE: u32 = 4;

/// Where the standby is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standby {
    /// There is none.
    #[default]
    Absent,
    /// There is none; the next starts at this time.
    Due(Time),
    /// Its kernel boots, its agent loads modules.
    Booting {
        /// Its number.
        generation: Generation,
        /// Whether the agent has said hello.
        hello: bool,
        /// When it should be ready.
        until: Time,
    },
    /// It waits for the device.
    Ready {
        /// Its number.
        generation: Generation,
        /// The agent's last sign of life.
        heard: Time,
    },
}

impl Standby {
    /// Its number, if it has a process.
    pub fn generation(&self) -> Option<Generation> {
        match self {
            Self::Booting { generation, .. } | Self::Ready { generation, .. } => Some(*generation),
            Self::Absent | Self::Due(_) => None,
        }
    }

    /// One word for people and `umbra status --json`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Absent => "none",
            Self::Due(_) => "due",
            Self::Booting { .. } => "booting",
            Self::Ready { .. } => "ready",
        }
    }
}

/// The standby and what is remembered about those before it.
#[derive(Clone, Debug)]
pub(super) struct Reserve {
    warm: bool,
    state: Standby,
    /// Deaths since one was last adopted.
    deaths: u32,
    boot_patience: Duration,
    heartbeat_patience: Duration,
}

impl Reserve {
    pub(super) fn new(warm: bool, boot_timeout: Duration, heartbeat_timeout: Duration) -> Self {
        let (boot_patience, heartbeat_patience) = (boot_timeout * PATIENCE, heartbeat_timeout * PATIENCE);
        Self { warm, state: Standby::Absent, deaths: 0, boot_patience, heartbeat_patience }
    }

    pub(super) fn state(&self) -> Standby {
        self.state
    }

    /// The driver VM is live: one is wanted, if there is none.
    pub(super) fn want(&mut self, now: Time) {
        if self.warm && self.state == Standby::Absent {
            self.state = Standby::Due(now + SETTLE);
        }
    }

    pub(super) fn started(&mut self, now: Time, generation: Generation) {
        self.state = Standby::Booting { generation, hello: false, until: now + self.boot_patience };
    }

    pub(super) fn hello(&mut self) {
        if let Standby::Booting { hello, .. } = &mut self.state {
            *hello = true;
        }
    }

    pub(super) fn ready(&mut self, now: Time) {
        if let Standby::Booting { generation, hello: true, .. } = self.state {
            self.state = Standby::Ready { generation, heard: now };
        }
    }

    pub(super) fn heartbeat(&mut self, now: Time) {
        if let Standby::Ready { heard, .. } = &mut self.state {
            *heard = now;
        }
    }

    /// One is wanted at once, whatever the configuration says.
    pub(super) fn want_now(&mut self, now: Time) {
        if self.state.generation().is_none() {
            self.state = Standby::Due(now);
        }
    }

    /// Takes the standby for the next life: its number, and whether its agent has said hello.
    pub(super) fn adopt(&mut self) -> Option<(Generation, bool)> {
        let (generation, hello) = match self.state {
            Standby::Booting { generation, hello, .. } => (generation, hello),
            Standby::Ready { generation, .. } => (generation, true),
            Standby::Absent | Standby::Due(_) => return None,
        };
        (self.state, self.deaths) = (Standby::Absent, 0);
        Some((generation, hello))
    }

    /// No standby any more, and none due. Whether there was one.
    pub(super) fn give_up(&mut self) -> bool {
        std::mem::take(&mut self.state).generation().is_some()
    }

    /// The standby has died while it waited. Whether there was one.
    pub(super) fn died(&mut self, now: Time) -> bool {
        if self.state.generation().is_none() {
            return false;
        }
        let delay = BACK_OFF.saturating_mul(1_u32.checked_shl(self.deaths).unwrap_or(u32::MAX)).min(BACK_OFF_MAX);
        self.deaths = self.deaths.saturating_add(1);
        self.state = if self.warm { Standby::Due(now + delay) } else { Standby::Absent };
        true
    }

    pub(super) fn deadline(&self) -> Option<Time> {
        match self.state {
            Standby::Absent => None,
            Standby::Due(at) => Some(at),
            Standby::Booting { until, .. } => Some(until),
            Standby::Ready { heard, .. } => Some(heard + self.heartbeat_patience),
        }
    }

    /// Why the standby has to be given up at `now`, if it has.
    pub(super) fn overdue(&self, now: Time) -> Option<String> {
        self.deadline().filter(|deadline| *deadline <= now)?;
        match self.state {
            Standby::Absent | Standby::Due(_) => None,
            Standby::Booting { .. } => Some(format!("not ready after {} s", self.boot_patience.as_secs())),
            Standby::Ready { .. } => Some(format!("no heartbeat for {} ms", self.heartbeat_patience.as_millis())),
        }
    }
}
