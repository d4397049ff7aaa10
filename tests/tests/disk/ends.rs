//! Ends of a guest, and of a machine, under a database: what was committed is there, although the disk loses everything that has not been
//! flushed by then.

use umbra_tests::demo::events::Event;
use umbra_tests::demo::machine::{DISK_DRIVER, Machine};
use umbra_tests::disks::database::{self, Commits, Database};
use umbra_tests::disks::{BYTES, DISK, GUEST, Medium, Rig};

use super::{OrTell, RECOVERY, ROWS, STEP, assets, part, say, scenario};

/// Resets the guest at once. Its answer does not come any more.
const RESET: &str = "(sleep 0.2; reboot -n -f) </dev/null >/dev/null 2>&1 &";

/// Commits anew, until there are some rows; how many.
fn load(rig: &mut Rig) -> (Commits, u64) {
    let commits = Commits::start(&mut rig.place, GUEST, DISK, Database::Wal).or_tell();
    commits.await_more(&mut rig.place, ROWS).or_tell();
    let rows = commits.so_far(&mut rig.place).or_tell();
    (commits, rows)
}

fn of_guest(machine: &mut Machine, kind: &str) -> Event {
    machine.await_event(RECOVERY, |event| event.event == kind && event.text("guest") == GUEST).or_tell()
}

/// The next process of the guest has its disk: a read past the guest's cache has been answered.
fn is_served(rig: &mut Rig, machine: &mut Machine) {
    of_guest(machine, "guest-running");
    rig.place.in_guest(GUEST, &format!("dd if={DISK} of=/dev/null bs=4k count=1 iflag=direct"), RECOVERY).or_tell();
}

/// The next process of the guest has its disk: what the disk loses now, and which of the rows are there.
fn find(rig: &mut Rig, what: &str, rows: u64) -> u64 {
    let lost = rig.media[0].disk.lose(1.0).lost;
    rig.place.in_guest(GUEST, "true", RECOVERY).or_tell();
    let found = database::look(&mut rig.place, GUEST, DISK, Database::Wal, rows).or_tell();
    say(&format!("{what}: {found:?}, {lost} sectors lost"));
    assert!(found.is_sound(), "{what}: {found:?}");
    lost
}

fn outlive_ends(model: &str) {
    let mut rig = Rig::boot("disk-ends", vec![Medium::new(model).or_tell()], &assets()).or_tell();
    let mut spec = rig.machine(0, 4);
    // A second guest, so that the machine goes on without the first.
    spec.guests.push(("db".into(), String::new()));
    let half = BYTES >> 21;
    spec.controller.as_mut().unwrap().options = vec![part(0, half), part(half, half)];
    let mut machine = Machine::start(&mut rig.place, &spec).or_tell();

    let (_, rows) = load(&mut rig);
    rig.place.in_guest(GUEST, RESET, STEP).or_tell();
    of_guest(&mut machine, "guest-rebooted");
    is_served(&mut rig, &mut machine);
    assert_eq!(find(&mut rig, "the guest resets itself", rows), 0);

    let (_, rows) = load(&mut rig);
    let pid = machine.guest_pid(&mut rig.place, GUEST).or_tell();
    rig.place.expect(&format!("kill -9 {pid}"), STEP).or_tell();
    of_guest(&mut machine, "guest-ended");
    rig.place.expect(&format!("umbra start {GUEST}"), RECOVERY).or_tell();
    is_served(&mut rig, &mut machine);
    find(&mut rig, "kill -9 of the guest's process", rows);

    // The guest resets itself while its disk is away: its process has to stay until the next life has what it keeps.
    let (_, rows) = load(&mut rig);
    rig.place.in_guest(GUEST, RESET, STEP).or_tell();
    rig.place.expect(&format!("umbra crash {DISK_DRIVER}"), STEP).or_tell();
    machine.await_event(RECOVERY, |event| event.event == "driver-fenced").or_tell();
    let lost = rig.media[0].disk.lose(1.0).lost;
    of_guest(&mut machine, "guest-rebooted");
    is_served(&mut rig, &mut machine);
    say(&format!("{lost} sectors lost with the driver VM"));
    assert_eq!(find(&mut rig, "the guest resets itself while the driver VM is away", rows), 0);

    let (_, rows) = load(&mut rig);
    machine.stop(&mut rig.place).or_tell();
    assert_eq!(rig.media[0].disk.lose(1.0).lost, 0, "the machine has ended");
    let machine = Machine::start(&mut rig.place, &spec).or_tell();
    find(&mut rig, "the machine is stopped", rows);
    machine.stop(&mut rig.place).or_tell();
}

#[test]
#[ignore = "takes two and a half minutes: `make test-disks`"]
fn commits_outlive_the_ends_of_guests_and_machines() {
    scenario(|| outlive_ends("nvme"));
}
