//! `umbra-bench disks`: many crashes of all kinds under the checker, with loss of cache, on one model of controller after the other, in
//! one test host.

use std::time::Duration;

use serde::Serialize;

use super::{Checker, Crash, Crashed, GUEST, Medium, Rig, crash};
use crate::assets::{Assets, Say};
use crate::bench::patience::whole_factor;
use crate::demo::guest_log::GuestLog;
use crate::demo::machine::Machine;
use crate::demo::{DemoError, Kind};
use crate::probe::disk::Found;

/// The models that are tried with `--models all`. An SD card's controller hides its cache, and has a scenario of its own.
pub const MODELS: [&str; 9] = [
    "nvme",
    "ich9-ahci",
    "virtio-blk-pci",
    "virtio-scsi-pci",
    "megasas-gen2",
    "pvscsi",
    "mptsas1068",
    "lsi53c895a",
    "qemu-xhci",
];

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

/// The pause between a recovery and the next crash, as on the reference machine: some hundred writes.
const BETWEEN: Duration = Duration::from_secs(3);

/// What is to be tried.
#[derive(Clone, Debug)]
pub struct TrialSpec {
    /// QEMU's models of controllers.
    pub models: Vec<String>,
    /// Crashes of each.
    pub crashes: u32,
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
}

/// Tries all models.
///
/// # Errors
/// The test host does not boot. What goes wrong with one model is in its result.
pub fn run(spec: &TrialSpec, say: Say<'_>) -> Result<Vec<ModelResult>, DemoError> {
    let assets = Assets::prepare(say)?;
    let media = spec.models.iter().map(|model| Medium::new(model)).collect::<Result<_, _>>()?;
    let mut rig = Rig::boot("disks", media, &assets)?;
    let mut results = Vec::new();
    for n in 0..rig.media.len() {
        let mut result = ModelResult {
            model: rig.media[n].model.clone(),
            crashes: Vec::new(),
            found: None,
            guest_log: Vec::new(),
            error: None,
        };
        if let Err(error) = try_one(&mut rig, n, spec.crashes, &mut result, say) {
            result.error = Some(error.headline());
            say(&format!("{}: {}", result.model, error.in_full()));
            // Whatever is left of it.
            let _ = rig.place.run("umbra stop --force; umbra stop --force", super::STEP);
        }
        results.push(result);
    }
    Ok(results)
}

fn try_one(rig: &mut Rig, n: usize, crashes: u32, result: &mut ModelResult, say: Say<'_>) -> Result<(), DemoError> {
    let spec = rig.machine(n, crashes);
    let mut machine = Machine::start(&mut rig.place, &spec)?;
    let before = GuestLog::read(&mut rig.place, GUEST)?;
    let mut checker = Checker::start(&mut rig.place, GUEST)?;
    let turns = KINDS.into_iter().cycle().zip(LOSES.into_iter().cycle()).take(crashes as usize);
    for (kind, loses) in turns {
        std::thread::sleep(BETWEEN * whole_factor());
        if !checker.runs()? {
            break;
        }
        let crashed = crash(&mut rig.place, &mut machine, &rig.media[n].disk, Crash { kind, loses })?;
        let outage = crashed.outage_ms.map(|ms| format!(", live after {ms:.0} ms")).unwrap_or_default();
        let number = result.crashes.len() + 1;
        say(&format!("{} {number}: {}, {} sectors lost{outage}", result.model, kind.describe(), crashed.lost));
        result.crashes.push(crashed);
    }
    result.found = Some(checker.finish(&mut rig.place, GUEST)?);
    let log = GuestLog::read(&mut rig.place, GUEST)?.since(&before);
    if !log.is_clean() {
        result.guest_log = log.lines;
    }
    machine.stop(&mut rig.place)
}
