//! Disks: a guest's writes outlive crashes of the driver VM of its disk's controller, although the controller loses its cache with each.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::path::Path;
use std::time::Duration;

use common::{OrTell, RECOVERY, STEP, assets, say, scenario};
use tempfile::NamedTempFile;
use umbra_tests::bench::patience::whole_factor;
use umbra_tests::bench::{Bench, BenchSpec, Storage};
use umbra_tests::demo::guest_log::GuestLog;
use umbra_tests::demo::machine::{Attach, DISK_DRIVER, DiskController, Machine, MachineSpec};
use umbra_tests::demo::place::Place;
use umbra_tests::lossy_disk::{LossyDisk, Settings};
use umbra_tests::probe::client::Run;
use umbra_tests::probe::disk::Found;

const GUEST: &str = "web";
/// Size of the disk: the checker's blocks, and as much again.
const BYTES: u64 = 128 << 20;
/// Between two crashes, s as on the reference machine: some hundred writes.
const BETWEEN: Duration = Duration::from_secs(3);
/// Ways to fail, and the share of what was not flushed that the controller loses.
const CRASHES: [(&str, f64); 6] =
    [("panic", 1.0), ("kill", 0.5), ("unbind", 1.0), ("stall", 0.5), ("panic", 0.0), ("restart", 1.0)];

/// A test host with a controller whose medium loses what was not flushed.
struct Rig {
    place: Place,
    disk: LossyDisk,
    machine: MachineSpec,
    _base: NamedTempFile,
}

fn rig(name: &str, model: &str) -> Rig {
    let assets = assets();
    let database = assets.database().or_tell();
    let base = NamedTempFile::new().unwrap();
    base.as_file().set_len(BYTES).unwrap();
    let disk = LossyDisk::start(base.path(), &Settings::default()).or_tell();
    let mut spec = BenchSpec::new(name).nics(&[]);
    spec.storage = vec![Storage { model: model.into(), bytes: BYTES, nbd: Some(disk.socket()) }];
    let image = assets.driver_image(&spec.storage[0].model).or_tell();
    spec.files.extend([image.clone(), database.clone()]);
    let mut bench = Bench::boot(spec, &assets).or_tell();
    let device = bench.expect("vfio $DISK0 && printf %s $DISK0", STEP).or_tell();
    let mut machine = MachineSpec::one_guest("", "", "");
    machine.attach = Attach::Without;
    let name_of = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    machine.archives = vec![name_of(&database)];
    let image = name_of(&image);
    machine.controller = Some(DiskController { device, image, options: String::new() });
    Rig { place: Place::Bench(Box::new(bench)), disk, machine, _base: base }
}

/// Crashes the driver VM, and takes the controller's cache away before the next life has it. False if that came too late to show anything.
fn crash(rig: &mut Rig, machine: &mut Machine, (kind, loses): (&str, f64)) -> bool {
    let command = match kind {
        "kill" => format!("kill -9 {}", machine.driver_pid(&mut rig.place, DISK_DRIVER).or_tell()),
        // It returns when the next life serves.
        "restart" => format!("umbra restart {DISK_DRIVER} </dev/null >/dev/null 2>&1 & echo"),
        kind => format!("umbra crash {DISK_DRIVER} --kind {kind}"),
    };
    rig.place.expect(&command, STEP).or_tell();
    // A life that is replaced on purpose has no report, and is not said to be fenced.
    let fenced = if kind == "restart" { "device-reset" } else { "driver-fenced" };
    machine.await_event(RECOVERY, |event| event.event == fenced).or_tell();
    let loss = rig.disk.lose(loses);
    if kind == "restart" {
        assert_eq!(loss.lost, 0, "the disk has come to rest before, and everything is stable");
    }
    machine.drain();
    let is_void = machine.seen.iter().rev().take_while(|event| event.event != fenced).any(is_in_service);
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

fn start_checker(place: &mut Place, length: Duration) -> Run {
    place.start_in_guest(GUEST, &format!("umbra-probe disk /dev/vda {} 1", length.as_secs())).or_tell()
}

fn await_checker(place: &mut Place, checker: &mut Run) -> Found {
    place.await_end(checker, RECOVERY, |_| Ok(())).or_tell();
    let said = &checker.output().stdout;
    serde_json::from_str(said.trim()).unwrap_or_else(|e| panic!("{e}: {said}"))
}

fn outlive_crashes(name: &str, model: &str) {
    let mut rig = rig(name, model);
    let spec = rig.machine.clone();
    let mut machine = Machine::start(&mut rig.place, &spec).or_tell();
    let before = GuestLog::read(&mut rig.place, GUEST).or_tell();
    let between = BETWEEN * whole_factor();
    // It ends by itself well behind the last crash: how long a recovery takes is the machine's business.
    let mut checker =
        start_checker(&mut rig.place, between * u32::try_from(CRASHES.len() + 2).unwrap() + Duration::from_secs(10));
    let mut shown = 0;
    for with in CRASHES {
        std::thread::sleep(between);
        shown += usize::from(crash(&mut rig, &mut machine, with));
    }
    let found = await_checker(&mut rig.place, &mut checker);
    say(&format!("{model}: {}", serde_json::to_string(&found).unwrap()));
    assert!(found.is_sound(), "{found:#?}");
    assert!(found.writes > 0 && found.flushes > 0, "{found:?}");
    assert!(shown > 0, "each loss came too late");
    let log = GuestLog::read(&mut rig.place, GUEST).or_tell().since(&before);
    assert!(log.is_clean(), "{:#?}", log.lines);
    assert_eq!(rig.disk.state().host_errors, 0);
    machine.stop(&mut rig.place).or_tell();
}

/// What a disk loses that hides its cache, nobody can keep: the check that the other scenarios pass notices it. Cards have no flush in
/// their emulated controller, and the driver VM's kernel takes them to have no cache.
fn lose_what_was_not_kept() {
    let mut rig = rig("disk-card", "sdhci-pci");
    let spec = rig.machine.clone();
    let mut machine = Machine::start(&mut rig.place, &spec).or_tell();
    let between = BETWEEN * whole_factor();
    let mut checker = start_checker(&mut rig.place, between * 4);
    std::thread::sleep(between);
    crash(&mut rig, &mut machine, ("panic", 1.0));
    let found = await_checker(&mut rig.place, &mut checker);
    assert!(found.wrong > 0, "the loss is not noticed: {found:?}");
    say(&format!("a disk that hides its cache: {} blocks are not what was acknowledged last", found.wrong));
    machine.stop(&mut rig.place).or_tell();
}

#[test]
fn a_loss_that_is_not_masked_is_noticed() {
    scenario(lose_what_was_not_kept);
}

/// A database in the guest, which commits for `$SECONDS` and then reads everything from the disk again. It prints the number of each
/// row that was committed, and at last how many rows there are.
const DATABASE: &str = r#"
modprobe crc32c_generic; /sbin/mke2fs -q -t ext4 /dev/vda && mkdir -p /mnt && mount -t ext4 /dev/vda /mnt && cd /mnt || exit 1
sqlite3 db "pragma journal_mode=$JOURNAL; create table t(id integer primary key, content text);" >&2 || exit 1
# Long rows, so that few of them wait in the pipe when the time is over.
row=$(head -c 400 /dev/zero | tr '\0' x); end=$(($(date +%s) + $SECONDS)); id=0
while [ $(date +%s) -lt $end ]; do id=$((id + 1)); echo "insert into t values($id, '$row'); select $id;"; done |
  (echo 'pragma synchronous=full;'; cat) | sqlite3 -batch -bail db || exit 1
cd / && umount /mnt && mount -t ext4 /dev/vda /mnt && cd /mnt || exit 1
sqlite3 db "pragma integrity_check; select count(*) from t;"
"#;

fn commit_through_crashes(journal: &str, model: &str) {
    let mut rig = rig(&format!("disk-{journal}"), model);
    let spec = rig.machine.clone();
    let mut machine = Machine::start(&mut rig.place, &spec).or_tell();
    let before = GuestLog::read(&mut rig.place, GUEST).or_tell();
    let between = BETWEEN * whole_factor();
    let seconds = (between * 5).as_secs() + 10;
    let script = format!("JOURNAL={journal}; SECONDS={seconds}; {DATABASE}");
    let mut commits = rig.place.start_in_guest(GUEST, &script).or_tell();
    for with in [("panic", 1.0), ("kill", 1.0), ("panic", 0.5)] {
        std::thread::sleep(between);
        crash(&mut rig, &mut machine, with);
    }
    rig.place.await_end(&mut commits, RECOVERY, |_| Ok(())).or_tell();
    let output = commits.output();
    assert_eq!(output.status, 0, "{}", output.stderr);
    let lines: Vec<&str> = output.stdout.lines().collect();
    let (rows, ids) = lines.split_last().unwrap();
    let (check, ids) = ids.split_last().unwrap();
    let expected: Vec<String> = (1..=ids.len()).map(|id| id.to_string()).collect();
    assert_eq!((*check, ids), ("ok", &expected.iter().map(String::as_str).collect::<Vec<_>>()[..]));
    assert_eq!(*rows, ids.len().to_string(), "rows that were committed are missing");
    say(&format!("{model}, journal {journal}: {rows} commits, none lost"));
    let log = GuestLog::read(&mut rig.place, GUEST).or_tell().since(&before);
    assert!(log.is_clean(), "{:#?}", log.lines);
    machine.stop(&mut rig.place).or_tell();
}

#[test]
fn commits_outlive_crashes() {
    scenario(|| commit_through_crashes("wal", "ich9-ahci"));
}

#[test]
fn writes_outlive_crashes_of_nvme() {
    scenario(|| outlive_crashes("disk-nvme", "nvme"));
}
