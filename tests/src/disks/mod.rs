//! Disks through crashes: a test host with controllers whose media lose what was not flushed, a guest on one of them, and what crashes
//! of its driver VM cost. Scenarios, `umbra-bench disks` and the demonstration use it.
//!
//! A loss comes between the fence of one life and the first order of the next: the harness follows the events, and a loss that came too
//! late to show anything counts as a crash without one.

pub mod database;
pub mod fio;
mod report;
pub mod trial;

use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use tempfile::NamedTempFile;

use crate::assets::Assets;
use crate::bench::patience::Stall;
use crate::bench::{Bench, BenchSpec, Storage};
use crate::demo::DemoError;
pub use crate::demo::Kind;
use crate::demo::events::Event;
use crate::demo::machine::{Attach, DISK_DRIVER, DiskController, Machine, MachineSpec};
use crate::demo::place::Place;
use crate::lossy_disk::{Access, LossyDisk, Settings, blockdev};
use crate::probe::client::Run;
pub use crate::probe::disk::BYTES as CHECKED;
use crate::probe::disk::{Found, OVER};

/// The guest.
pub const GUEST: &str = "web";
/// Its disk.
pub const DISK: &str = "/dev/vda";
/// Size of a disk, bytes: twice what the checker writes ([`crate::probe::disk`]).
pub const BYTES: u64 = 128 << 20;
/// Memory of a guest without its programs, MiB.
const GUEST_MIB: u64 = 256;
/// Longest time in which nothing may move during a single step, as on the reference machine ([`crate::bench::patience`]).
const STEP: Duration = Duration::from_secs(60);
/// The same during a recovery.
const RECOVERY: Duration = Duration::from_secs(120);
/// Interval of looks at the checker.
const LOOK: Duration = Duration::from_millis(100);
/// Requests between a recovery and the next crash: of both kinds, with some flushes and many writes that none has made stable.
pub const BETWEEN: u64 = 200;

/// What a controller has behind it. It outlives test hosts.
#[derive(Debug)]
pub struct Medium {
    /// QEMU's model of the controller.
    pub model: String,
    /// The disk.
    pub disk: LossyDisk,
    base: NamedTempFile,
    hides_cache: bool,
}

impl Medium {
    /// An empty disk behind this model.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn new(model: &str) -> Result<Self, DemoError> {
        Self::with(model, false)
    }

    /// One that, if `hides_cache`, says that it has no volatile cache, and loses it all the same.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with(model: &str, hides_cache: bool) -> Result<Self, DemoError> {
        Self::of_size(model, BYTES, hides_cache)
    }

    /// As [`Self::with`], with so many bytes.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_size(model: &str, bytes: u64, hides_cache: bool) -> Result<Self, DemoError> {
        let base = NamedTempFile::new().map_err(|e| DemoError::file("make a file in", &std::env::temp_dir(), e))?;
        base.as_file().set_len(bytes).map_err(|e| DemoError::file("extend", base.path(), e))?;
        let disk = LossyDisk::start(base.path(), &Settings { ignores_fua: hides_cache, ..Settings::default() })?;
        Ok(Self { model: model.into(), disk, base, hides_cache })
    }

    /// For QEMU.
    pub fn storage(&self) -> Storage {
        let (nbd, hides_cache) = (Some(self.disk.socket()), self.hides_cache);
        Storage { nbd, hides_cache, ..Storage::empty(&self.model, BYTES) }
    }

    /// The file that a flush writes to.
    pub fn base(&self) -> &Path {
        self.base.path()
    }
}

/// A test host with controllers, each bound to `vfio-pci`.
pub struct Rig {
    /// The test host.
    pub place: Place,
    /// What is behind the controllers.
    pub media: Vec<Medium>,
    controllers: Vec<DiskController>,
    archive: String,
    guest_memory: String,
    /// Disks that were put in since the boot.
    exchanges: usize,
    /// QEMU's name for the disk of each controller.
    disks: Vec<String>,
}

impl Rig {
    /// Boots a test host called `name` with a controller for each of `media`.
    ///
    /// # Errors
    /// Something is not there, or the test host does not boot.
    pub fn boot(name: &str, media: Vec<Medium>, assets: &Assets) -> Result<Self, DemoError> {
        Self::boot_with(name, media, &assets.database()?, assets)
    }

    /// As [`Self::boot`], with this archive for guests in place of the one with SQLite.
    ///
    /// # Errors
    /// As [`Self::boot`].
    pub fn boot_with(name: &str, media: Vec<Medium>, archive: &Path, assets: &Assets) -> Result<Self, DemoError> {
        let mut spec = BenchSpec::new(name).nics(&[]);
        let images = media.iter().map(|medium| assets.driver_image(&medium.model.as_str().into()));
        let images = images.collect::<Result<Vec<_>, _>>()?;
        spec.storage = media.iter().map(Medium::storage).collect();
        spec.files.extend(images.iter().cloned().chain([archive.to_owned()]));
        let mut bench = Bench::boot(spec, assets)?;
        let mut controllers = Vec::new();
        for (n, image) in images.iter().enumerate() {
            let device = bench.expect(&format!("vfio $DISK{n} && printf %s $DISK{n}"), STEP)?;
            controllers.push(DiskController { device, image: name_of(image), options: Vec::new() });
        }
        // A guest unpacks it to its memory, and gives back that of the archive afterwards.
        let bytes = archive.metadata().map_err(|e| DemoError::file("read", archive, e))?.len();
        let guest_memory = format!("{}M", GUEST_MIB + 2 * (bytes >> 20));
        let (place, archive) = (Place::Bench(Box::new(bench)), name_of(archive));
        let disks = (0..media.len()).map(|n| format!("medium{n}")).collect();
        Ok(Self { place, media, controllers, archive, guest_memory, exchanges: 0, disks })
    }

    /// A machine with one guest on controller `n`, whose driver VM may fail so often.
    pub fn machine(&self, n: usize, failures: u32) -> MachineSpec {
        let mut machine = MachineSpec::one_guest("", "", "");
        machine.attach = Attach::Without;
        machine.archives = vec![self.archive.clone()];
        machine.guest_memory.clone_from(&self.guest_memory);
        machine.controller = Some(self.controllers[n].clone());
        machine.restart_limit = failures.saturating_mul(2) + 5;
        machine
    }

    /// Takes out the disk of controller `n` and puts `other` in, which has the same serial number; none: the one that was there at first.
    /// For SCSI disks, whose controllers stay as they are.
    ///
    /// # Errors
    /// QEMU refuses it.
    pub fn exchange(&mut self, n: usize, other: Option<(&LossyDisk, Access)>) -> Result<(), DemoError> {
        let Place::Bench(bench) = &mut self.place else { return Ok(()) };
        self.exchanges += 1;
        let id = format!("medium{n}-{}", self.exchanges);
        let drive = match other {
            None => format!("disk{n}"),
            Some((disk, access)) => {
                let node = format!("node-{id}");
                let mut wanted = blockdev(&disk.socket(), &node);
                wanted["read-only"] = (access == Access::ReadOnly).into();
                bench.monitor("blockdev-add", &wanted)?;
                node
            }
        };
        bench.monitor("device_del", &json!({ "id": self.disks[n] }))?;
        let (serial, bus) = (format!("disk{n}"), format!("ctl{n}.0"));
        let device = json!({ "driver": "scsi-hd", "id": id, "drive": drive, "serial": serial, "bus": bus });
        bench.monitor("device_add", &device)?;
        self.disks[n] = id;
        Ok(())
    }

    /// `kill -9` of the test host with all that runs in it, and each controller loses every sector that was not flushed.
    pub fn cut_power(self) -> Vec<Medium> {
        drop(self.place);
        self.media.iter().for_each(|medium| _ = medium.disk.lose(1.0));
        self.media
    }
}

/// Requests that all disks of the guest have served: reads, writes and flushes, as its kernel counts.
///
/// # Errors
/// The guest does not answer.
fn requests(place: &mut Place, guest: &str) -> Result<u64, DemoError> {
    let said = place.in_guest(guest, "cat /sys/block/vd*/stat", STEP)?;
    Ok(said.lines().map(served).sum())
}

/// The requests in a line of `/sys/block/*/stat`: reads, writes and flushes (`Documentation/block/stat.rst`).
fn served(line: &str) -> u64 {
    let fields: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    [0, 4, 15].iter().filter_map(|&n| fields.get(n)).sum()
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A crash to come.
#[derive(Clone, Copy, Debug)]
pub struct Crash {
    /// How the driver VM fails.
    pub kind: Kind,
    /// The share of what was not flushed that the controller loses.
    pub loses: f64,
}

/// A crash that was survived.
#[derive(Clone, Debug, Serialize)]
pub struct Crashed {
    /// How the driver VM failed.
    pub kind: Kind,
    /// Sectors that the controller lost.
    pub lost: u64,
    /// The loss came before the next life could have been given an order.
    pub shows: bool,
    /// From mask to live, as Umbra counts, ms; none for a planned restart.
    pub outage_ms: Option<f64>,
    /// How the device was reset.
    pub reset: String,
}

/// Crashes the driver VM of the disk, and takes the controller's cache away before the next life has it.
///
/// # Errors
/// The driver VM does not come back.
pub fn crash(place: &mut Place, machine: &mut Machine, disk: &LossyDisk, with: Crash) -> Result<Crashed, DemoError> {
    let Crash { kind, loses } = with;
    let pid = machine.driver_pid(place, DISK_DRIVER)?;
    place.expect(&kind.command(DISK_DRIVER, pid), STEP)?;
    // A life that is replaced on purpose has no report, and is not said to be fenced.
    let fenced = if kind == Kind::Restart { "device-reset" } else { "driver-fenced" };
    let is_ours = |event: &Event| event.text("driver") == DISK_DRIVER;
    machine.await_event(RECOVERY, |event| event.event == fenced && is_ours(event))?;
    let loss = disk.lose(loses);
    machine.drain();
    let since = machine.seen.iter().rev().take_while(|event| !(event.event == fenced && is_ours(event)));
    let is_in_service =
        |event: &Event| event.event == "driver-live" || event.event == "driver-stage" && event.text("stage") == "disks";
    let shows = !since.filter(|event| is_ours(event)).any(is_in_service);
    let is_live = |event: &Event| event.event == "driver-live" && is_ours(event);
    let since = machine.seen.iter().rev().take_while(|event| !(event.event == fenced && is_ours(event)));
    let live = match since.into_iter().find(|event| is_live(event)).cloned() {
        Some(live) => live,
        None => machine.await_event(RECOVERY, is_live)?,
    };
    let parts = live.fields.get("parts");
    let reset = parts.and_then(|parts| parts.get("reset_method")).and_then(|method| method.as_str());
    Ok(Crashed {
        kind,
        lost: loss.lost,
        shows,
        outage_ms: live.number("outage_ms").filter(|_| kind != Kind::Restart),
        reset: reset.unwrap_or("none").into(),
    })
}

/// The checker ([`crate::probe::disk`]) in a guest.
pub struct Checker(Run);

impl Checker {
    /// Starts it on the guest's first disk.
    ///
    /// # Errors
    /// The place is gone.
    pub fn start(place: &mut Place, guest: &str) -> Result<Self, DemoError> {
        // It is ended long before.
        place.start_in_guest(guest, &format!("rm -f {OVER}; umbra-probe disk {DISK} 86400 1")).map(Self)
    }

    /// Waits until it has done so many requests more; whether it still runs.
    ///
    /// # Errors
    /// It gets nowhere, or the place is gone.
    pub fn await_more(&mut self, place: &mut Place, requests: u64) -> Result<bool, DemoError> {
        let wanted = self.requests() + requests;
        let mut stall = Stall::new(RECOVERY);
        while self.requests() < wanted {
            if self.0.poll(LOOK).map_err(DemoError::Exec)? {
                return Ok(false);
            }
            if stall.is_over(self.requests()) {
                let what = "the checker gets nowhere".into();
                return Err(DemoError::Still { what, limit: stall.limit(), said: place.tail() });
            }
        }
        Ok(true)
    }

    /// How many it has done, as it says each second.
    fn requests(&self) -> u64 {
        let last = self.0.output().stderr.lines().rev().find_map(|line| line.split_once(" requests after "));
        last.and_then(|(count, _)| count.parse().ok()).unwrap_or(0)
    }

    /// Has it read everything once more; what it found.
    ///
    /// # Errors
    /// It does not end, or said nothing.
    pub fn finish(mut self, place: &mut Place, guest: &str) -> Result<Found, DemoError> {
        place.in_guest(guest, &format!("touch {OVER}"), STEP)?;
        place.await_end(&mut self.0, RECOVERY, |_| Ok(()))?;
        let output = self.0.output();
        serde_json::from_str(output.stdout.trim()).map_err(|error| DemoError::Umbra {
            what: format!("the checker did not say what it found ({error})"),
            said: format!("{}{}", output.stdout, output.stderr),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_writes_and_flushes_are_counted() {
        assert_eq!(served("  100 1 2 3 20 1 2 3 0 5 6 7 8 9 10 3 4"), 123);
        assert_eq!(served(""), 0);
    }
}
