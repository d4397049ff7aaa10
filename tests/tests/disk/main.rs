//! Disks: a guest's writes outlive crashes of the driver VM of its disk's controller, although the controller loses its cache with each.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;
mod ends;
mod faults;

use common::{OrTell, RECOVERY, STEP, assets, say, scenario};
use umbra_tests::bench::{Bench, BenchSpec};
use umbra_tests::demo::events::Event;
use umbra_tests::demo::guest_log::GuestLog;
use umbra_tests::demo::machine::{Attach, DISK_DRIVER, Machine, MachineSpec};
use umbra_tests::demo::place::Place;
use umbra_tests::disks::database::{self, Commits, Database};
use umbra_tests::disks::{BETWEEN, BYTES, Checker, Crash, Crashed, DISK, GUEST, Kind, Medium, Rig, crash};
use umbra_tests::lossy_disk::Access;

/// Rows between two crashes.
const ROWS: u64 = 20;
/// Ways to fail, and the share of what was not flushed that the controller loses.
const CRASHES: [(Kind, f64); 6] = [
    (Kind::Panic, 1.0),
    (Kind::Kill, 0.5),
    (Kind::Unbind, 1.0),
    (Kind::Stall, 0.5),
    (Kind::Panic, 0.0),
    (Kind::Restart, 1.0),
];

fn rig(name: &str, model: &str) -> Rig {
    Rig::boot(name, vec![Medium::new(model).or_tell()], &assets()).or_tell()
}

/// A part of a disk, in MiB, as in a machine's file.
fn part(start: u64, length: u64) -> String {
    format!("start = \"{start}M\"\nlength = \"{length}M\"\n")
}

fn crash_one(rig: &mut Rig, machine: &mut Machine, with: (Kind, f64)) -> Crashed {
    crash_on(rig, machine, 0, with)
}

/// Crashes the driver VM of controller `n`.
fn crash_on(rig: &mut Rig, machine: &mut Machine, n: usize, (kind, loses): (Kind, f64)) -> Crashed {
    let crashed = crash(&mut rig.place, machine, &rig.media[n].disk, Crash { kind, loses }).or_tell();
    say(&format!("{}: {} sectors lost, {:?} ms", kind.describe(), crashed.lost, crashed.outage_ms));
    crashed
}

fn outlive_crashes(name: &str, model: &str) {
    let mut rig = rig(name, model);
    let spec = rig.machine(0, 6);
    let mut machine = Machine::start(&mut rig.place, &spec).or_tell();
    let before = GuestLog::read(&mut rig.place, GUEST).or_tell();
    let mut checker = Checker::start(&mut rig.place, GUEST).or_tell();
    let mut shown = 0;
    for with in CRASHES {
        checker.await_more(&mut rig.place, BETWEEN).or_tell();
        let crashed = crash_one(&mut rig, &mut machine, with);
        assert!(with.0 != Kind::Restart || crashed.lost == 0, "it came to rest before, and everything is stable");
        shown += usize::from(crashed.shows);
    }
    let found = checker.finish(&mut rig.place, GUEST).or_tell();
    say(&format!("{model}: {}", serde_json::to_string(&found).unwrap()));
    assert!(found.is_sound(), "{found:#?}");
    assert!(found.writes > 0 && found.flushes > 0, "{found:?}");
    assert!(shown > 0, "each loss came too late");
    let log = GuestLog::read(&mut rig.place, GUEST).or_tell().since(&before);
    assert!(log.is_clean(), "{:#?}", log.lines);
    assert_eq!(rig.media[0].disk.state().host_errors, 0);
    machine.stop(&mut rig.place).or_tell();
}

/// What a disk loses that hides its cache, nobody can keep: the check that the other scenarios pass notices it. Cards have no flush in
/// their emulated controller, and the driver VM's kernel takes them to have no cache.
fn lose_what_was_not_kept() {
    let mut rig = rig("disk-card", "sdhci-pci");
    let spec = rig.machine(0, 1);
    let mut machine = Machine::start(&mut rig.place, &spec).or_tell();
    let mut checker = Checker::start(&mut rig.place, GUEST).or_tell();
    checker.await_more(&mut rig.place, BETWEEN).or_tell();
    crash_one(&mut rig, &mut machine, (Kind::Panic, 1.0));
    let found = checker.finish(&mut rig.place, GUEST).or_tell();
    assert!(found.wrong > 0, "the loss is not noticed: {found:?}");
    say(&format!("a disk that hides its cache: {} blocks are not what was acknowledged last", found.wrong));
    machine.stop(&mut rig.place).or_tell();
}

fn commit_through_crashes(name: &str, database: Database, model: &str) {
    let assets = assets();
    let archive = database.archive(&assets, &say).or_tell();
    let mut rig = Rig::boot_with(name, vec![Medium::new(model).or_tell()], &archive, &assets).or_tell();
    let spec = rig.machine(0, 3);
    let mut machine = Machine::start(&mut rig.place, &spec).or_tell();
    let before = GuestLog::read(&mut rig.place, GUEST).or_tell();
    let commits = Commits::start(&mut rig.place, GUEST, DISK, database).or_tell();
    let mut rows = 0;
    for with in [(Kind::Panic, 1.0), (Kind::Kill, 1.0), (Kind::Panic, 0.5)] {
        rows = commits.await_more(&mut rig.place, rows + ROWS).or_tell();
        crash_one(&mut rig, &mut machine, with);
    }
    commits.await_more(&mut rig.place, rows).or_tell();
    let committed = commits.finish(&mut rig.place).or_tell();
    say(&format!("{model}, {database:?}: {committed:?}"));
    assert!(committed.is_sound(), "{committed:?}");
    let log = GuestLog::read(&mut rig.place, GUEST).or_tell().since(&before);
    assert!(log.is_clean(), "{:#?}", log.lines);
    machine.stop(&mut rig.place).or_tell();
}

/// Power fails under a database whose driver VM has just crashed, and is about to be written what the log owes.
fn outlive_a_power_cut() {
    let mut rig = rig("disk-power", "nvme");
    let spec = rig.machine(0, 1);
    let mut machine = Machine::start(&mut rig.place, &spec).or_tell();
    let commits = Commits::start(&mut rig.place, GUEST, DISK, Database::Wal).or_tell();
    let rows = commits.await_more(&mut rig.place, 0).or_tell();
    crash_one(&mut rig, &mut machine, (Kind::Panic, 1.0));
    let rows = commits.await_more(&mut rig.place, rows).or_tell();
    rig.place.expect(&format!("umbra crash {DISK_DRIVER}"), STEP).or_tell();
    machine.await_event(RECOVERY, |event| event.event == "driver-stage" && event.text("stage") == "disks").or_tell();
    let rows = commits.so_far(&mut rig.place).or_tell().max(rows);
    let media = rig.cut_power();
    let mut rig = Rig::boot("disk-power", media, &assets()).or_tell();
    let spec = rig.machine(0, 1);
    let machine = Machine::start(&mut rig.place, &spec).or_tell();
    let found = database::look(&mut rig.place, GUEST, DISK, Database::Wal, rows).or_tell();
    say(&format!("a power cut: {found:?}"));
    assert!(found.is_sound(), "{found:?}");
    machine.stop(&mut rig.place).or_tell();
}

/// Another disk, with the same name and size, is behind the controller when the next life of the driver VM comes.
fn write_nothing_to_another_disk() {
    let mut rig = rig("disk-swapped", "nvme");
    let spec = rig.machine(0, 1);
    let mut machine = Machine::start(&mut rig.place, &spec).or_tell();
    let commits = Commits::start(&mut rig.place, GUEST, DISK, Database::Wal).or_tell();
    commits.await_more(&mut rig.place, 20).or_tell();
    let other = tempfile::NamedTempFile::new().unwrap();
    other.as_file().set_len(BYTES).unwrap();
    rig.place.expect(&format!("umbra crash {DISK_DRIVER}"), STEP).or_tell();
    machine.await_event(RECOVERY, |event| event.event == "driver-fenced").or_tell();
    rig.media[0].disk.swap(other.path(), Access::ReadWrite).or_tell();
    let before = rig.media[0].disk.base_sha256().unwrap();
    let given_up = machine.await_event(RECOVERY, |event| event.event == "quarantined").or_tell();
    assert!(given_up.text("reason").contains("another disk"), "{given_up:?}");
    assert_eq!(rig.media[0].disk.base_sha256().unwrap(), before, "it was written to");
    assert_eq!(rig.media[0].disk.state().unflushed, 0, "it was written to");
    machine.stop(&mut rig.place).or_tell();
}

/// Two guests on two parts of one disk.
fn two_guests_outlive_crashes() {
    let mut rig = rig("disk-shared", "virtio-blk-pci");
    let mut spec = rig.machine(0, 3);
    spec.guests.push(("db".into(), String::new()));
    let half = BYTES >> 21;
    spec.controller.as_mut().unwrap().options = vec![part(0, half), part(half, half)];
    let mut machine = Machine::start(&mut rig.place, &spec).or_tell();
    let guests = [GUEST, "db"];
    let logs = guests.map(|guest| GuestLog::read(&mut rig.place, guest).or_tell());
    let mut checkers = guests.map(|guest| Checker::start(&mut rig.place, guest).or_tell());
    for with in [(Kind::Panic, 1.0), (Kind::Unbind, 1.0), (Kind::Kill, 0.5)] {
        for checker in &mut checkers {
            checker.await_more(&mut rig.place, BETWEEN).or_tell();
        }
        crash_one(&mut rig, &mut machine, with);
    }
    for ((guest, checker), before) in guests.into_iter().zip(checkers).zip(logs) {
        let found = checker.finish(&mut rig.place, guest).or_tell();
        say(&format!("{guest}: {}", serde_json::to_string(&found).unwrap()));
        assert!(found.is_sound() && found.writes > 0, "{found:#?}");
        let log = GuestLog::read(&mut rig.place, guest).or_tell().since(&before);
        assert!(log.is_clean(), "{:#?}", log.lines);
    }
    machine.stop(&mut rig.place).or_tell();
}

#[test]
fn a_loss_that_is_not_masked_is_noticed() {
    scenario(lose_what_was_not_kept);
}

#[test]
fn commits_outlive_crashes() {
    scenario(|| commit_through_crashes("disk-wal", Database::Wal, "ich9-ahci"));
}

#[test]
fn what_was_flushed_outlives_a_power_cut() {
    scenario(outlive_a_power_cut);
}

#[test]
fn another_disk_is_not_written_to() {
    scenario(write_nothing_to_another_disk);
}

#[test]
fn two_guests_on_one_disk_outlive_crashes() {
    scenario(two_guests_outlive_crashes);
}

#[test]
fn writes_outlive_crashes_of_nvme() {
    scenario(|| outlive_crashes("disk-nvme", "nvme"));
}

/// A disk on a file is made larger under its guest, and another has no room on its host.
fn grow_and_have_no_room() {
    let mut bench = Bench::boot(BenchSpec::new("disk-files").nics(&[]), &assets()).or_tell();
    let script =
        "mkdir -p /tmp/full && mount -t tmpfs -o size=16m full /tmp/full && truncate -s 64M /tmp/d.img /tmp/full/d.img";
    bench.expect(script, STEP).or_tell();
    let mut place = Place::Bench(Box::new(bench));
    let mut spec = MachineSpec::one_guest("", "", "");
    spec.attach = Attach::Without;
    spec.disks = vec!["/tmp/d.img".into(), "/tmp/full/d.img".into()];
    let mut machine = Machine::start(&mut place, &spec).or_tell();
    let said = place.expect("umbra resize web vda 128M", STEP).or_tell();
    assert_eq!(said.trim(), "web has 134217728 bytes");
    place.expect("truncate -s 256M /tmp/d.img && umbra resize web vda", STEP).or_tell();
    let size = place.in_guest(GUEST, "blockdev --getsize64 /dev/vda", STEP).or_tell();
    assert_eq!(size.trim(), "268435456", "the guest sees it");
    place.expect("truncate -s 300M /tmp/d.img", STEP).or_tell();
    let grown = |event: &Event| event.event == "disk-resized" && event.number("bytes") == Some(314_572_800.0);
    machine.await_event(STEP, grown).or_tell();
    let size = place.in_guest(GUEST, "blockdev --getsize64 /dev/vda", STEP).or_tell();
    assert_eq!(size.trim(), "314572800", "nobody had to ask");
    let refused = place.run("umbra resize web vda 64M", STEP).or_tell();
    assert!(!refused.ok() && refused.stderr.contains("cannot be made smaller"), "{refused:?}");
    let write = "dd if=/dev/zero of=/dev/vdb bs=1M count=40 conv=fsync 2>/dev/null; echo $?";
    let status = place.in_guest(GUEST, write, RECOVERY).or_tell();
    assert_eq!(status.trim(), "1", "the guest gets the error");
    let told =
        machine.await_event(STEP, |event| event.event == "warning" && event.text("what").contains("web: block1"));
    let told = told.or_tell();
    assert!(told.text("what").contains("/tmp/full/d.img") && told.text("what").contains("No space left"), "{told:?}");
    machine.stop(&mut place).or_tell();
}

#[test]
fn disks_on_files_grow_and_say_when_there_is_no_room() {
    scenario(grow_and_have_no_room);
}
