//! The disk's part of a demonstration: a database that commits through crashes of the controller's driver VM, at each of which the
//! controller loses all that was not flushed.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::events::Event;
use super::guest_log::GuestLog;
use super::machine::{DISK_DRIVER, DiskController};
use super::outage::median_and_max;
use super::place::Place;
use super::result::{OutageFigures, span};
use super::{Demo, DemoError, GUEST, Kind, RECOVERY_LIMIT, STEP};
use crate::assets::Assets;
use crate::bench::BenchSpec;
use crate::disks::database::{Commits, Committed, Database};
use crate::disks::{Crash, Medium, crash};
use crate::lossy_disk::Class;

/// Name of the guest's disk: it has no other.
const DISK: &str = "/dev/vda";
/// Words of a guest's kernel log that tell of a failed request.
const IO_ERRORS: [&str; 2] = ["i/o error", "blk_update_request"];

/// What a test host needs for the disk.
pub(super) struct Parts {
    image: PathBuf,
    database: PathBuf,
}

impl Parts {
    /// Adds the disk to a test host, if there is one.
    pub(super) fn add(
        medium: Option<&Medium>,
        bench: &mut BenchSpec,
        assets: &Assets,
    ) -> Result<Option<Self>, DemoError> {
        let Some(medium) = medium else { return Ok(None) };
        let parts = Self { image: assets.driver_image(&medium.model.as_str().into())?, database: assets.database()? };
        bench.storage = vec![medium.storage()];
        bench.files.extend([parts.image.clone(), parts.database.clone()]);
        Ok(Some(parts))
    }

    /// The controller, and the name of the archive with the database.
    pub(super) fn controller(self, place: &mut Place) -> Result<(DiskController, String), DemoError> {
        let name = |path: PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let device = place.expect("vfio $DISK0 && printf %s $DISK0", STEP)?;
        Ok((DiskController { device, image: name(self.image), options: Vec::new() }, name(self.database)))
    }
}

/// The disk, and the database on it.
pub(super) struct Disk {
    medium: Medium,
    commits: Option<Commits>,
    crashes: Vec<DiskCrash>,
}

impl Disk {
    pub(super) fn new(medium: Medium) -> Self {
        Self { medium, commits: None, crashes: Vec::new() }
    }
}

/// One crash of the controller's driver VM.
#[derive(Clone, Debug, Serialize)]
pub struct DiskCrash {
    /// At the same moment as those of the NIC and the sound card.
    pub together: bool,
    /// Sectors that the controller lost.
    pub sectors_lost: u64,
    /// From mask to live, as Umbra counts, ms.
    pub umbra_outage_ms: Option<f64>,
}

/// The disk's part of the result.
#[derive(Clone, Debug, Serialize)]
pub struct DiskResult {
    /// QEMU's model of the controller.
    pub model: String,
    /// Crashes that were survived.
    pub crashes: usize,
    /// Rows that the database has committed.
    pub commits: u64,
    /// Of these, rows that are not there at the end.
    pub lost: u64,
    /// What `pragma integrity_check` says: `ok`.
    pub check: String,
    /// Lines of the guest's kernel log about failed requests.
    pub io_errors: usize,
    /// From mask to live, as Umbra counts.
    pub outage_ms: Option<OutageFigures>,
    /// Each crash.
    pub per_crash: Vec<DiskCrash>,
}

impl DiskResult {
    /// With the guest's new log.
    pub(super) fn with_log(self, log: &GuestLog) -> Self {
        let tells = |line: &&String| IO_ERRORS.iter().any(|words| line.to_lowercase().contains(words));
        Self { io_errors: log.lines.iter().filter(tells).count(), ..self }
    }

    /// Every row is there, and no request failed.
    pub fn is_ok(&self) -> bool {
        let sound = self.check == "ok" && self.lost == 0 && self.commits > 0;
        sound && self.io_errors == 0 && self.crashes > 0 && self.per_crash.iter().any(|crash| crash.sectors_lost > 0)
    }

    /// What is not as it should be where it is not.
    pub(super) fn failure(&self) -> String {
        let unflushed: u64 = self.per_crash.iter().map(|crash| crash.sectors_lost).sum();
        format!(
            "the database was not as it should be: {} of {} rows lost, integrity check {:?}, {} I/O errors in the guest, {} crashes that \
             cost the disk {unflushed} unflushed sectors",
            self.lost, self.commits, self.check, self.io_errors, self.crashes
        )
    }

    pub(super) fn closing_lines(&self) -> Vec<String> {
        let sectors: u64 = self.per_crash.iter().map(|crash| crash.sectors_lost).sum();
        let mut lines = vec![
            format!("{}: {} crashes of the driver VM under a database", self.model, self.crashes),
            format!("  rows committed, lost                     {}, {}", self.commits, self.lost),
            format!("  integrity check                          {}", self.check),
            format!("  unflushed sectors the disk lost          {sectors}"),
        ];
        if let Some(outage) = self.outage_ms {
            lines.push(format!(
                "  outage                                   {} (median), {} (longest)",
                span(outage.p50),
                span(outage.max)
            ));
        }
        lines
    }
}

/// How long a flush of the disk takes: most of the time of a commit, so that a crash finds something unflushed, as a rule.
const FLUSH: Duration = Duration::from_millis(100);

impl Demo<'_> {
    /// Has the guest commit, if it has a disk.
    pub(super) fn start_database(&mut self) -> Result<(), DemoError> {
        let Some(disk) = &mut self.disk else { return Ok(()) };
        disk.medium.disk.delay(Class::Flush, FLUSH);
        let commits = Commits::start(&mut self.place, GUEST, DISK, Database::Wal)?;
        commits.await_more(&mut self.place, 0)?;
        disk.commits = Some(commits);
        self.tell("the guest commits rows with SQLite on virtio-blk");
        Ok(())
    }

    /// Crashes the driver VM of the disk, while the others are not disturbed.
    pub(super) fn disk_alone(&mut self) -> Result<(), DemoError> {
        let Some(disk) = &mut self.disk else { return Ok(()) };
        let before = match &disk.commits {
            Some(commits) => commits.so_far(&mut self.place)?,
            None => 0,
        };
        let with = Crash { kind: Kind::Panic, loses: 1.0 };
        let crashed = crash(&mut self.place, &mut self.machine, &disk.medium.disk, with)?;
        let crash = DiskCrash { together: false, sectors_lost: crashed.lost, umbra_outage_ms: crashed.outage_ms };
        disk.crashes.push(crash);
        let now = match &disk.commits {
            Some(commits) => commits.await_more(&mut self.place, before)?,
            None => before,
        };
        let took = crashed.outage_ms.map(|ms| format!(" in {}", span(ms))).unwrap_or_default();
        self.tell(&format!(
            "the disk's controller: {}, and it lost {} unflushed sectors; restored{took}; {now} rows committed",
            with.kind.describe(),
            crashed.lost
        ));
        Ok(())
    }

    /// All driver VMs have been crashed at once: takes the controller's cache away as soon as its driver VM is fenced.
    pub(super) fn lose_with_others(&mut self) -> Result<(), DemoError> {
        let Some(disk) = &mut self.disk else { return Ok(()) };
        let sectors_lost = self.machine.at_event(
            RECOVERY_LIMIT,
            |event| event.event == "driver-fenced" && event.text("driver") == DISK_DRIVER,
            || disk.medium.disk.lose(1.0).lost,
        )?;
        disk.crashes.push(DiskCrash { together: true, sectors_lost, umbra_outage_ms: None });
        Ok(())
    }

    /// A driver VM is live again; notes it if it is the disk's.
    pub(super) fn note_disk(&mut self, live: &Event, together: bool) {
        let crash = self.disk.as_mut().and_then(|disk| disk.crashes.last_mut());
        if let Some(crash) = crash.filter(|crash| crash.together == together && live.text("driver") == DISK_DRIVER) {
            crash.umbra_outage_ms = live.number("outage_ms");
        }
    }

    /// Ends the database, if there is one; the result but for the guest's log.
    pub(super) fn finish_database(&mut self) -> Result<Option<DiskResult>, DemoError> {
        let Some(Disk { medium, commits: Some(commits), crashes }) = self.disk.take() else { return Ok(None) };
        self.tell("the database comes to its end");
        let Committed { commits, lost, check } = commits.finish(&mut self.place)?;
        let outages: Vec<f64> = crashes.iter().filter_map(|crash| crash.umbra_outage_ms).collect();
        let result = DiskResult {
            model: medium.model.clone(),
            crashes: crashes.len(),
            commits,
            lost,
            check,
            io_errors: 0,
            outage_ms: median_and_max(&outages).map(|(p50, max)| OutageFigures { p50, max }),
            per_crash: crashes,
        };
        // The guest has its disk until it ends.
        self.disk = Some(Disk::new(medium));
        Ok(Some(result))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_or_a_failed_request_spoils_the_result() {
        let crash = DiskCrash { together: true, sectors_lost: 9, umbra_outage_ms: Some(700.0) };
        let result = DiskResult {
            model: "nvme".into(),
            crashes: 1,
            commits: 40,
            lost: 0,
            check: "ok".into(),
            io_errors: 0,
            outage_ms: None,
            per_crash: vec![crash],
        };
        let log = |line: &str| GuestLog { lines: vec![line.to_owned()], carrier_changes: 0 };
        assert!(result.clone().with_log(&log("[ 1.0] EXT4-fs (vda): mounted filesystem")).is_ok());
        assert!(!result.clone().with_log(&log("[ 1.0] I/O error, dev vda, sector 8")).is_ok());
        assert!(!DiskResult { lost: 1, ..result.clone() }.is_ok());
        assert!(!DiskResult { check: "row 3 missing".into(), ..result }.is_ok());
    }
}
