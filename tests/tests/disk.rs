//! Disks: a guest's writes outlive crashes of the driver VM of its disk's controller, although the controller loses its cache with each.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::time::Duration;

use common::{OrTell, RECOVERY, STEP, assets, say, scenario};
use tempfile::NamedTempFile;
use umbra_tests::bench::patience::whole_factor;
use umbra_tests::bench::{Bench, BenchSpec, Storage};
use umbra_tests::demo::guest_log::GuestLog;
use umbra_tests::demo::machine::{Attach, DISK_DRIVER, DiskController, Machine, MachineSpec};
use umbra_tests::demo::place::Place;
use umbra_tests::lossy_disk::{LossyDisk, Settings};
use umbra_tests::probe::disk::Found;

const GUEST: &str = "web";
/// Size of the disk: the checker's blocks, and as much again.
const BYTES: u64 = 128 << 20;
/// Between two crashes, s as on the reference machine: some hundred writes.
const BETWEEN: Duration = Duration::from_secs(3);
/// Ways to fail, and the share of what was not flushed that the controller loses.
const CRASHES: [(&str, f64); 5] = [("panic", 1.0), ("kill", 0.5), ("unbind", 1.0), ("stall", 0.5), ("panic", 0.0)];

/// A test host with a controller whose medium loses what was not flushed.
struct Rig {
    place: Place,
    disk: LossyDisk,
    machine: MachineSpec,
    _base: NamedTempFile,
}

fn rig(name: &str, model: &str) -> Rig {
    let assets = assets();
    let base = NamedTempFile::new().unwrap();
    base.as_file().set_len(BYTES).unwrap();
    let disk = LossyDisk::start(base.path(), &Settings::default()).or_tell();
    let mut spec = BenchSpec::new(name).nics(&[]);
    spec.storage = vec![Storage { model: model.into(), bytes: BYTES, nbd: Some(disk.socket()) }];
    let image = assets.driver_image(&spec.storage[0].model).or_tell();
    spec.files.push(image.clone());
    let mut bench = Bench::boot(spec, &assets).or_tell();
    let device = bench.expect("vfio $DISK0 && printf %s $DISK0", STEP).or_tell();
    let mut machine = MachineSpec::one_guest("", "", "");
    machine.attach = Attach::Without;
    let image = image.file_name().unwrap().to_str().unwrap().into();
    machine.controller = Some(DiskController { device, image, options: String::new() });
    Rig { place: Place::Bench(Box::new(bench)), disk, machine, _base: base }
}

/// Crashes the driver VM, and takes the controller's cache away before the next life has it. False if that came too late to show anything.
fn crash(rig: &mut Rig, machine: &mut Machine, (kind, loses): (&str, f64)) -> bool {
    let command = match kind {
        "kill" => format!("kill -9 {}", machine.driver_pid(&mut rig.place, DISK_DRIVER).or_tell()),
        kind => format!("umbra crash {DISK_DRIVER} --kind {kind}"),
    };
    rig.place.expect(&command, STEP).or_tell();
    machine.await_event(RECOVERY, |event| event.event == "driver-fenced").or_tell();
    let loss = rig.disk.lose(loses);
    machine.drain();
    let is_void = machine.seen.iter().rev().take_while(|event| event.event != "driver-fenced").any(is_in_service);
    let live = machine.await_event(RECOVERY, |event| event.event == "driver-live").or_tell();
    say(&format!(
        "{kind}: {} sectors lost, live after {:.0} ms",
        loss.lost,
        live.number("outage_ms").unwrap_or_default()
    ));
    !is_void
}

/// The new life may have been given orders by now.
fn is_in_service(event: &umbra_tests::demo::events::Event) -> bool {
    event.event == "driver-live" || event.event == "driver-stage" && event.text("stage") == "disks"
}

fn outlive_crashes(name: &str, model: &str) {
    let mut rig = rig(name, model);
    let spec = rig.machine.clone();
    let mut machine = Machine::start(&mut rig.place, &spec).or_tell();
    let before = GuestLog::read(&mut rig.place, GUEST).or_tell();
    let between = BETWEEN * whole_factor();
    // It ends by itself well behind the last crash: how long a recovery takes is the machine's business.
    let seconds = (between * (CRASHES.len() as u32 + 2) + Duration::from_secs(10)).as_secs();
    let mut checker = rig.place.start_in_guest(GUEST, &format!("umbra-probe disk /dev/vda {seconds} 1")).or_tell();
    let mut shown = 0;
    for with in CRASHES {
        std::thread::sleep(between);
        shown += usize::from(crash(&mut rig, &mut machine, with));
    }
    rig.place.await_end(&mut checker, RECOVERY, |_| Ok(())).or_tell();
    let said = checker.output().stdout.clone();
    let found: Found = serde_json::from_str(said.trim()).unwrap_or_else(|e| panic!("{e}: {said}"));
    say(&format!("{model}: {}", said.trim()));
    assert!(found.is_sound(), "{found:#?}");
    assert!(found.writes > 0 && found.flushes > 0, "{found:?}");
    assert!(shown > 0, "each loss came too late");
    let log = GuestLog::read(&mut rig.place, GUEST).or_tell().since(&before);
    assert!(log.is_clean(), "{:#?}", log.lines);
    assert_eq!(rig.disk.state().host_errors, 0);
    machine.stop(&mut rig.place).or_tell();
}

#[test]
fn writes_outlive_crashes_of_nvme() {
    scenario(|| outlive_crashes("disk-nvme", "nvme"));
}

#[test]
fn writes_outlive_crashes_of_ahci() {
    scenario(|| outlive_crashes("disk-ahci", "ich9-ahci"));
}
