//! `umbra run --prepare`: a run that makes the snapshots of a machine's driver VMs, starts no guest, and ends when they are there. The
//! driver VMs get their devices, as in any run: a snapshot is of a VM that knows its freshly reset device ahead. Driver VMs for which none
//! is made are not started.

use super::RunError;
use super::driver::DriverVm;
use super::ids::DriverId;
use super::run::Supervisor;
use crate::config::{Driver, Machine, Standby};

/// Until when a machine runs, if it is not stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Until {
    /// Until all its guests have ended.
    #[default]
    GuestsEnd,
    /// For ever: guests can be started again.
    Stopped,
    /// Until the snapshots of its driver VMs are there. No guest is started.
    Prepared,
}

/// Whether snapshots are made for `driver` by this kind of run. What waits beside a hot spare is a life of the spare.
fn is_prepared_for(driver: &Driver) -> bool {
    driver.snapshots && driver.spare.is_none()
}

/// `machine` with a taker beside each driver VM for which snapshots are made.
///
/// # Errors
/// There is none.
pub(super) fn machine(machine: &Machine) -> Result<Machine, RunError> {
    let mut machine = machine.clone();
    let mut any = false;
    for driver in machine.driver.values_mut().filter(|driver| is_prepared_for(driver)) {
        driver.standby = Standby::Snapshot;
        any = true;
    }
    if any { Ok(machine) } else { Err(RunError::NothingToPrepare) }
}

impl Supervisor {
    /// Whether every snapshot that this run is to make is there.
    pub(super) fn is_prepared(&self) -> bool {
        self.drivers.iter().all(|driver| !driver.lacks_preparation())
    }

    /// Whether driver VM `n` is started in this run.
    pub(super) fn takes_part(&self, n: DriverId) -> bool {
        self.until != Until::Prepared || is_prepared_for(&self.drivers[n].spec)
    }

    /// Whether the end of driver VM `n`, or of its takers, is that of the run, which has no other purpose.
    pub(super) fn is_vital(&self, n: DriverId) -> bool {
        self.until == Until::Prepared && self.drivers[n].lacks_preparation()
    }
}

impl DriverVm {
    fn lacks_preparation(&self) -> bool {
        is_prepared_for(&self.spec) && self.saved.is_none()
    }
}
