//! The begin of a life: its agent is told which life it is. Before that a driver VM is nobody, and may be saved as a snapshot or
//! restored from one.
//!
//! ```text
//!            asks (Ready)                     begin
//!   Boots -----------------------------------------> Begun
//!   Unmet --asks, modules loaded--> snapshot --done--^
//!     +-----restored, or adopted (asks)------------+
//! ```
//! A life that is started to serve and has to boot leaves its snapshot too: the life behind it may be wanted before a standby has booted.
//! One that was to wait, and is adopted while it boots, leaves none.
//!
//! Invariant: until a life has begun it gets no word from here, and one that is `Unmet` no connection with a guest: what it has met would
//! be in the snapshot, and in each life that is restored from it. One that leaves its snapshot gets no device before.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use umbra_driver_vm::protocol::{ENTROPY_BYTES, Entropy, MemoryRange, ToAgent};
use umbra_guest_images::image::{Image, Manifest};

use crate::base::random::random;
use crate::base::time::Time;
use crate::lifecycle::{Input, NoticedBy, Rank, State};
use crate::supervisor::driver::life::LifeRole;
use crate::supervisor::ids::DriverId;
use crate::supervisor::run::Supervisor;
use crate::wire::messages::{SnapshotNews, SnapshotOf, ToVm};

/// How far the begin of a life is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::supervisor) enum Begin {
    /// It boots, and begins as soon as its agent asks.
    Boots,
    /// It is restored from a snapshot, or a snapshot may be taken of it before it begins.
    Unmet,
    /// As before, and its agent has asked: it hears what it is told.
    Asked,
    /// Its agent has been told.
    Begun,
}

/// What the snapshots of driver VMs from `image` are of.
pub(super) fn snapshot_of(image: &Image) -> SnapshotOf {
    let Manifest { kernel, drivers, .. } = &image.manifest;
    SnapshotOf { digest: digest(image), useless: false, kernel: kernel.clone(), drivers: drivers.clone() }
}

/// What these snapshots are found by: what the image's files should be, and that they are still those files.
fn digest(image: &Image) -> String {
    let part = |path: &Path, sha256: &str| match std::fs::metadata(path) {
        Ok(file) => format!("{sha256} {} {}.{:09}", file.size(), file.mtime(), file.mtime_nsec()),
        Err(error) => format!("{sha256} {error}"),
    };
    let Image { vmlinux, initramfs, manifest } = image;
    format!("{}, {}", part(vmlinux, &manifest.vmlinux.sha256), part(initramfs, &manifest.initramfs.sha256))
}

impl Supervisor {
    /// The agent asks which life this is; whether all of its modules are `loaded`, and what memory is `unused` then.
    pub(in crate::supervisor) fn on_agent_ready(
        &mut self,
        (n, role): (DriverId, LifeRole),
        loaded: bool,
        unused: Vec<MemoryRange>,
    ) {
        let Some(life) = self.drivers[n].life_of_mut(role) else { return };
        match life.begin {
            Begin::Boots => self.begin(n, role),
            // There is no time for a snapshot.
            Begin::Unmet | Begin::Asked if role == LifeRole::Present && !life.leaves_snapshot => self.begin(n, role),
            Begin::Unmet | Begin::Asked => {
                life.begin = Begin::Asked;
                if !loaded {
                    return;
                }
                if let Err(error) = life.process.channel().send_now(&ToVm::Snapshot { unused }, &[]) {
                    if self.drivers[n].has_taker() && role == LifeRole::Standby(Rank::First) {
                        return self
                            .drive(n, Input::StandbyFailed(Rank::First, format!("ask for a snapshot: {error}")));
                    }
                    self.events.warn(format!("{}: ask for a snapshot: {error}", self.drivers[n].name));
                    self.begin(n, role);
                }
            }
            Begin::Begun => {}
        }
    }

    /// The present life of driver VM `n`, which was started without the device, is to serve: it gets the device, and is connected with its
    /// guests. One that may still leave its snapshot gets it when it begins.
    pub(in crate::supervisor) fn give_device(&mut self, n: DriverId) {
        let Some(life) = &self.drivers[n].life else { return };
        match life.begin {
            Begin::Unmet | Begin::Asked if life.leaves_snapshot => return,
            // There is no time for a snapshot.
            Begin::Asked => self.begin(n, LifeRole::Present),
            Begin::Boots | Begin::Unmet | Begin::Begun => {}
        }
        self.plug(n);
        self.connect_ends(n);
    }

    /// What became of the snapshot of a life.
    pub(in crate::supervisor) fn on_snapshot(&mut self, n: DriverId, role: LifeRole, news: &SnapshotNews) {
        let name = self.drivers[n].name.clone();
        match news {
            // Only a process that was started to look for it says that it is there.
            SnapshotNews::There => return,
            SnapshotNews::Missing => {
                if role == LifeRole::Present && self.drivers[n].saved.take().is_some() {
                    self.events
                        .warn(format!("{name}: the snapshot of its driver VM has been removed, which boots instead"));
                }
                return;
            }
            SnapshotNews::Restored => {
                let Some(generation) = self.drivers[n].life_of(role).map(|life| life.generation) else { return };
                let mut trust = std::mem::take(&mut self.drivers[n].trust);
                trust.restored(generation, |generation| self.drivers[n].has_life(generation));
                self.drivers[n].trust = trust;
                if let LifeRole::Standby(rank) = role
                    && let Some(standby) = self.drivers[n].waiting_mut(rank)
                {
                    standby.restored = true;
                }
            }
            SnapshotNews::Refused(why) => {
                self.events
                    .warn(format!("{name}: the snapshot of its driver VM cannot be used, which boots instead: {why}"));
                return;
            }
            SnapshotNews::Taken(bytes) => {
                tracing::info!(driver = name, bytes, "a snapshot is taken");
                self.drivers[n].trust.taken();
                self.drivers[n].too_slow_to_save = false;
            }
            SnapshotNews::NotTaken(why) => {
                self.drivers[n].restart_lacks_snapshot(why);
                self.events.warn(format!("{name}: no snapshot of its driver VM is taken, the next one boots: {why}"));
            }
        }
        self.begin(n, role);
    }

    /// Tells the agent which life it is, and connects the life with its guests; once.
    pub(in crate::supervisor) fn begin(&mut self, n: DriverId, role: LifeRole) {
        let Some(life) = self.drivers[n].life_of_mut(role).filter(|life| life.begin != Begin::Begun) else { return };
        life.begin = Begin::Begun;
        let left_snapshot = role == LifeRole::Present && life.leaves_snapshot;
        let generation = life.generation.get();
        let entropy = match entropy() {
            Ok(entropy) => entropy,
            Err(error) => {
                let what = format!("draw random numbers for a driver VM: {error}");
                return match role {
                    LifeRole::Present => self.fail_driver(n, NoticedBy::Start, what, Time::now()),
                    LifeRole::Standby(rank) => self.drive(n, Input::StandbyFailed(rank, what)),
                    LifeRole::Dying => {}
                };
            }
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_ns = u64::try_from(now.as_nanos()).unwrap_or(0);
        let sent = self.drivers[n].send(role, &ToAgent::Begin { generation, entropy, unix_ns });
        self.after_sending(n, role, sent);
        // One that has failed meanwhile has been told to give its device up, and gets none any more.
        if left_snapshot && matches!(self.drivers[n].lifecycle.state(), State::Booting { .. }) {
            return self.give_device(n);
        }
        self.connect_ends(n);
    }
}

/// Random bytes of the host's kernel.
fn entropy() -> io::Result<Entropy> {
    random::<ENTROPY_BYTES>().map(Entropy)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn no_two_lives_get_the_same_entropy() {
        let (one, other) = (entropy().unwrap(), entropy().unwrap());
        assert!(one != other && one != Entropy([0; ENTROPY_BYTES]));
    }
}
