//! `umbra-bench disks`: many crashes of all kinds under the checker, fio or a database, with loss of cache, on one model of controller
//! after the other, in one test host. The counter-check: the same with disks that hide their cache, of which nothing can be kept, has to
//! find a loss.

use std::path::PathBuf;

use serde::Serialize;

use super::database::{Commits, Committed, Database};
use super::fio::Fio;
use super::{BETWEEN, Checker, Crash, Crashed, DISK, GUEST, Medium, Rig, crash};
use crate::assets::{AssetError, Assets, Say};
use crate::demo::guest_log::GuestLog;
use crate::demo::machine::Machine;
use crate::demo::place::Place;
use crate::demo::{DemoError, Kind};
use crate::probe::disk::Found;

/// The models that are tried with `--models all`. An SD card's controller hides its cache, and has a scenario of its own. Three of QEMU's
/// cannot be had: `pvscsi` reads its requests and writes its completions at physical addresses of the host, past the IOMMU; `lsi53c895a`
/// reads its program from its own BAR by DMA, which is not mapped for it; behind `mptsas1068` no disk appears.
pub const MODELS: [&str; 7] =
    ["nvme", "ich9-ahci", "virtio-blk-pci", "virtio-scsi-pci", "megasas-gen2", "am53c974", "qemu-xhci"];

/// Kinds of crashes, in turns.
pub const KINDS: [Kind; 10] = [
    Kind::Panic,
    Kind::Kill,
    Kind::Unbind,
    Kind::Stall,
    Kind::Reboot,
    Kind::AgentHang,
    Kind::Spin,
    Kind::LockUp,
    Kind::OutOfMemory,
    Kind::Restart,
];

/// Shares of what was not flushed that are lost, in turns: no multiple of the kinds, so that each kind meets each share.
const LOSES: [f64; 3] = [1.0, 0.5, 0.0];

/// Models whose driver answers flushes by itself, so that nothing is ever flushed: what they lose is lost. Linux's of MegaRAID does for
/// virtual disks, whose cache real controllers keep (`megasas_queue_command`, `drivers/scsi/megaraid/megaraid_sas_base.c`). They are tried
/// with disks that lose nothing.
const FLUSH_NOTHING: [&str; 2] = ["megasas", "megasas-gen2"];

/// Rows of a database between a recovery and the next crash.
const ROWS: u64 = 20;

/// What is to be tried.
#[derive(Clone, Debug)]
pub struct TrialSpec {
    /// QEMU's models of controllers.
    pub models: Vec<String>,
    /// Crashes of each.
    pub crashes: u32,
    /// What writes meanwhile.
    pub writer: WriterKind,
    /// The disks say that they have no volatile cache, and lose it all the same.
    pub hides_cache: bool,
}

/// What can write to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriterKind {
    /// The checker ([`crate::probe::disk`]).
    Checker,
    /// fio, which verifies what it has written.
    Fio,
    /// A database that commits.
    Database(Database),
}

impl WriterKind {
    /// The archive for the guest.
    fn archive(self, assets: &Assets, say: Say<'_>) -> Result<PathBuf, AssetError> {
        match self {
            // Of which it needs nothing.
            Self::Checker => assets.database(),
            Self::Fio => assets.fio(say),
            Self::Database(database) => database.archive(assets, say),
        }
    }
}

/// What writes to the disk.
enum Writer {
    Checker(Checker),
    Fio(Fio),
    Database(Commits, u64),
}

impl Writer {
    fn start(place: &mut Place, kind: WriterKind) -> Result<Self, DemoError> {
        match kind {
            WriterKind::Checker => Checker::start(place, GUEST).map(Self::Checker),
            WriterKind::Fio => Fio::start(place, GUEST, DISK).map(Self::Fio),
            WriterKind::Database(database) => {
                Commits::start(place, GUEST, DISK, database).map(|commits| Self::Database(commits, 0))
            }
        }
    }

    /// Waits for some work; whether it goes on.
    fn await_more(&mut self, place: &mut Place) -> Result<bool, DemoError> {
        match self {
            Self::Checker(checker) => checker.await_more(place, BETWEEN),
            Self::Fio(fio) => fio.await_more(place, BETWEEN),
            Self::Database(commits, rows) => {
                *rows = commits.await_more(place, *rows + ROWS)?;
                Ok(true)
            }
        }
    }

    fn finish(self, place: &mut Place) -> Result<Found, DemoError> {
        match self {
            Self::Checker(checker) => checker.finish(place, GUEST),
            Self::Fio(fio) => fio.finish(place),
            Self::Database(commits, _) => commits.finish(place).map(Found::from),
        }
    }
}

impl From<Committed> for Found {
    /// Rows in place of blocks; a database that is not whole has met an error.
    fn from(Committed { commits, lost, check }: Committed) -> Self {
        let is_whole = check == "ok";
        let what = if is_whole { Vec::new() } else { vec![check] };
        Self { writes: commits, wrong: lost, io_errors: (!is_whole).into(), what, ..Self::default() }
    }
}

/// What became of one model.
#[derive(Clone, Debug, Serialize)]
pub struct ModelResult {
    /// QEMU's model.
    pub model: String,
    /// The crashes that were survived.
    pub crashes: Vec<Crashed>,
    /// What the checker found.
    pub found: Option<Found>,
    /// New lines of the guest's kernel log that tell of a disk or an error.
    pub guest_log: Vec<String>,
    /// Why it was not tried to the end.
    pub error: Option<String>,
}

impl ModelResult {
    /// Nothing was lost, and the guest noticed nothing.
    pub fn is_sound(&self) -> bool {
        let found = self.found.as_ref().is_some_and(|found| found.is_sound() && found.writes > 0);
        found && self.error.is_none() && self.guest_log.is_empty()
    }

    /// Something that was acknowledged is not there.
    pub fn has_a_loss(&self) -> bool {
        self.found.as_ref().is_some_and(|found| !found.is_sound())
    }
}

/// Tries all models.
///
/// # Errors
/// The test host does not boot. What goes wrong with one model is in its result.
pub fn run(spec: &TrialSpec, say: Say<'_>) -> Result<Vec<ModelResult>, DemoError> {
    let assets = Assets::prepare(say)?;
    let media = spec.models.iter().map(|model| Medium::with(model, spec.hides_cache)).collect::<Result<_, _>>()?;
    let mut rig = Rig::boot_with("disks", media, &spec.writer.archive(&assets, say)?, &assets)?;
    let mut results = Vec::new();
    for n in 0..rig.media.len() {
        let mut result = ModelResult {
            model: rig.media[n].model.clone(),
            crashes: Vec::new(),
            found: None,
            guest_log: Vec::new(),
            error: None,
        };
        if let Err(error) = try_one(&mut rig, n, spec, &mut result, say) {
            result.error = Some(error.headline());
            say(&format!("{}: {}", result.model, error.in_full()));
            // Whatever is left of it.
            let _ = rig.place.run("umbra stop --force; umbra stop --force", super::STEP);
        }
        say(&result.line());
        results.push(result);
    }
    Ok(results)
}

fn try_one(rig: &mut Rig, n: usize, spec: &TrialSpec, result: &mut ModelResult, say: Say<'_>) -> Result<(), DemoError> {
    let machine = rig.machine(n, spec.crashes);
    let mut machine = Machine::start(&mut rig.place, &machine)?;
    let before = GuestLog::read(&mut rig.place, GUEST)?;
    let mut writer = Writer::start(&mut rig.place, spec.writer)?;
    let keeps = FLUSH_NOTHING.contains(&result.model.as_str());
    let turns = KINDS.into_iter().cycle().zip(LOSES.into_iter().cycle()).take(spec.crashes as usize);
    for (kind, loses) in turns {
        let loses = if keeps { 0.0 } else { loses };
        if !writer.await_more(&mut rig.place)? {
            break;
        }
        let crashed = crash(&mut rig.place, &mut machine, &rig.media[n].disk, Crash { kind, loses })?;
        let outage = crashed.outage_ms.map(|ms| format!(", live after {ms:.0} ms")).unwrap_or_default();
        let number = result.crashes.len() + 1;
        say(&format!("{} {number}: {}, {} sectors lost{outage}", result.model, kind.describe(), crashed.lost));
        result.crashes.push(crashed);
    }
    result.found = Some(writer.finish(&mut rig.place)?);
    let log = GuestLog::read(&mut rig.place, GUEST)?.since(&before);
    if !log.is_clean() {
        result.guest_log = log.lines;
    }
    machine.stop(&mut rig.place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_is_lost_and_a_database_that_is_not_whole_are_losses() {
        let result = |lost, check: &str| ModelResult {
            model: "nvme".into(),
            crashes: Vec::new(),
            found: Some(Committed { commits: 9, lost, check: check.into() }.into()),
            guest_log: Vec::new(),
            error: None,
        };
        assert!(result(0, "ok").is_sound() && !result(0, "ok").has_a_loss());
        assert!(result(1, "ok").has_a_loss() && result(0, "row 3 missing").has_a_loss());
        assert_eq!(result(0, "row 3 missing").found.unwrap().what, ["row 3 missing"]);
        assert!(!ModelResult { found: None, ..result(0, "ok") }.has_a_loss(), "nothing was looked at");
    }
}
