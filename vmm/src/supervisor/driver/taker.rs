//! The taker: a process that leaves the snapshot which the next life is restored from, where `standby = "snapshot"`. It has the shape of
//! the next life, serves nobody, and is gone when the snapshot is there.
//!
//! ```text
//!   start --there is one (a VM is restored from it on trial)--> There, ends
//!     +---there is none, or it is refused---> boots, loads its modules (Ready) --> is saved (Taken), killed
//! ```
//! Invariants: its failure is no failure of the driver VM, and no event tells of it; that there is no snapshot for longer than it takes
//! to try [`QUIET`] times is told once (where the run is for nothing but the snapshot, each try is told, and the last ends the run). If
//! the driver VM fails while it boots, it serves, and what it was about to leave is left out.

use umbra_shadow::Generation;

use super::DriverVm;
use super::life::{LifeRole, Purpose};
use crate::base::time::{Time, milliseconds};
use crate::lifecycle::{Input, Rank};
use crate::record::events::Event;
use crate::supervisor::ids::DriverId;
use crate::supervisor::run::Supervisor;
use crate::wire::messages::SnapshotNews;

/// Takers that may fail in a row before people are told that there is no snapshot: one may die of a busy machine, several die of
/// something that lasts, as a full disk.
const QUIET: u32 = 3;

impl Supervisor {
    pub(in crate::supervisor) fn spawn_taker(&mut self, n: DriverId, generation: Generation) {
        self.launch_standby((n, Rank::First), generation, Purpose::Save);
    }

    /// The taker of driver VM `n` has failed.
    pub(in crate::supervisor) fn drop_taker(&mut self, n: DriverId, why: &str) {
        self.drop_standby(n, Rank::First, None);
        let driver = &mut self.drivers[n];
        tracing::info!(driver = driver.name, why, "no snapshot is taken");
        driver.not_saved = Some(why.into());
        let (name, tries) = (driver.name.clone(), driver.lifecycle.standby_deaths());
        let Some(what) = driver.lacks_snapshot() else { return };
        match self.is_vital(n) {
            true if tries >= QUIET => self.give_up(format!("{name}: no snapshot is taken: {why}")),
            true => self.events.warn(format!("{name}: {what}")),
            false if tries == QUIET => self.events.warn(format!("{name}: {what}")),
            false => {}
        }
    }

    /// What the taker of driver VM `n` says of the snapshot; why it is given up, if it is.
    pub(super) fn on_taker_news(&mut self, n: DriverId, news: SnapshotNews) -> Option<String> {
        match news {
            SnapshotNews::There => self.saved(n, None),
            SnapshotNews::Taken(bytes) => self.saved(n, Some(bytes)),
            SnapshotNews::Missing => self.drive(n, Input::SnapshotMissing),
            SnapshotNews::Refused(why) => {
                let name = &self.drivers[n].name;
                self.events.warn(format!(
                    "{name}: the snapshot of its driver VM cannot be used, and another one is taken: {why}"
                ));
                self.drive(n, Input::SnapshotMissing);
            }
            SnapshotNews::NotTaken(why) => return Some(why),
            SnapshotNews::Restored => return Some("it was restored, and was to end".into()),
        }
        None
    }

    /// There is a snapshot for the next life; `bytes` of its file if it was taken just now.
    fn saved(&mut self, n: DriverId, bytes: Option<u64>) {
        let driver = &mut self.drivers[n];
        let Some(taker) = &driver.standby else { return };
        let ms = milliseconds(Time::now().since(taker.started));
        if bytes.is_some() {
            driver.trust.taken();
        }
        (driver.saved, driver.not_saved) = (Some(taker.life.image.clone()), None);
        self.events.tell(&Event::SnapshotReady { driver: driver.name.clone(), ms, bytes });
        self.drive(n, Input::SnapshotThere);
    }
}

impl DriverVm {
    /// Whether what is started beside the present life is a taker.
    pub(super) fn has_taker(&self) -> bool {
        self.life_of(LifeRole::Standby(Rank::First)).is_some_and(|life| life.purpose == Purpose::Save)
    }

    /// Why there is no snapshot although there should be one by now.
    pub(super) fn lacks_snapshot(&self) -> Option<String> {
        let why = self.not_saved.as_ref()?;
        Some(format!(
            "there is no snapshot for its next life, which would boot; another try follows. The last one: {why}"
        ))
    }
}
