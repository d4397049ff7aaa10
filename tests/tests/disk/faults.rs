//! Disks that fail: errors of the medium and of the driver, a disk that answers nothing, deaths one after the other, a controller that its
//! driver resets by itself.

use std::time::Duration;

use umbra_tests::bench::patience::{Stall, scaled};
use umbra_tests::demo::events::Event;
use umbra_tests::demo::guest_log::GuestLog;
use umbra_tests::demo::machine::{DISK_DRIVER, Machine, MachineSpec};
use umbra_tests::demo::place::Place;
use umbra_tests::disks::{BETWEEN, BYTES, CHECKED, Checker, DISK, GUEST, Kind, Medium, Rig};
use umbra_tests::lossy_disk::{Access, Class, LossyDisk, Times};

use super::{OrTell, RECOVERY, STEP, assets, crash_on, say, scenario};

/// Bytes of a block that meets errors.
const BLOCK: u64 = 4096;
/// The first of them: the checker leaves the second half of the disk alone.
const FIRST: u64 = CHECKED / BLOCK;
/// Looks in a row that find something at the disk: requests that do not wait are served between two of them.
const LOOKS: u32 = 10;
const LOOK: Duration = Duration::from_millis(20);
/// Without a word of the failure for so long, the emulator stands still: a process that was killed is dead long before, and a disk that
/// answers nothing is given up after 90 s, as a flush is mostly among what waits for it.
const DEAD: Duration = Duration::from_secs(2);
const GIVEN_UP: Duration = Duration::from_secs(120);
/// Longer than any test: what is delayed so waits until it is not.
const FOR_EVER: Duration = Duration::from_secs(24 * 3600);

fn boot(name: &str, models: &[&str]) -> Rig {
    let media = models.iter().map(|model| Medium::new(model).or_tell()).collect();
    Rig::boot(name, media, &assets()).or_tell()
}

/// A machine on one of the controllers, and what a test asks of it.
struct Trial<'a> {
    rig: &'a mut Rig,
    machine: Machine,
    n: usize,
    before: GuestLog,
}

impl<'a> Trial<'a> {
    fn start(rig: &'a mut Rig, n: usize) -> Self {
        let spec = rig.machine(n, 8);
        Self::start_as(rig, n, &spec)
    }

    fn start_as(rig: &'a mut Rig, n: usize, spec: &MachineSpec) -> Self {
        let machine = Machine::start(&mut rig.place, spec).or_tell();
        let before = GuestLog::read(&mut rig.place, GUEST).or_tell();
        Self { rig, machine, n, before }
    }

    fn model(&self) -> String {
        self.rig.media[self.n].model.clone()
    }

    fn disk(&self) -> &LossyDisk {
        &self.rig.media[self.n].disk
    }

    fn place(&mut self) -> &mut Place {
        &mut self.rig.place
    }

    /// Whether a command in the guest succeeds.
    fn succeeds(&mut self, command: &str) -> bool {
        let said = self.place().in_guest(GUEST, &format!("{command} >/dev/null 2>&1; echo $?"), RECOVERY).or_tell();
        said.trim() == "0"
    }

    /// Writes a block past the guest's cache, full of this letter.
    fn writes(&mut self, block: u64, letter: char) -> bool {
        self.succeeds(&write(block, letter))
    }

    /// Whether a block can be read, past the guest's cache, and is full of this letter.
    fn reads(&mut self, block: u64, letter: char) -> bool {
        let seek = FIRST + block;
        self.succeeds(&format!(
            "{} && dd if={DISK} of=/tmp/read bs={BLOCK} count=1 skip={seek} iflag=direct && cmp /tmp/read /tmp/{letter}",
            make(letter)
        ))
    }

    fn flushes(&mut self) -> bool {
        self.succeeds(&format!("dd if=/dev/null of={DISK} count=0 conv=notrunc,fsync"))
    }

    /// Lives of the driver VM that have failed.
    fn failures(&mut self) -> usize {
        self.machine.drain();
        self.machine.seen.iter().filter(|event| event.event == "driver-failed").count()
    }

    fn await_event(&mut self, name: &str) -> Event {
        let is_it = |event: &Event| event.event == name && event.text("driver") == DISK_DRIVER;
        self.machine.await_event(RECOVERY, is_it).or_tell()
    }

    /// Requests of this class that touch this block fail.
    fn fail(&self, class: Class, block: u64, times: Times) {
        let start = (FIRST + block) * BLOCK;
        self.disk().fail(class, start..start + BLOCK, times);
    }

    /// The driver VM fails while the disk keeps what is at it; the disk is asked for that then, and loses what it has not flushed.
    ///
    /// The reset of an emulated controller waits for what is at its disk, and the whole emulator with it, so that nothing can be heard: the
    /// disk answers at the word of the failure, which comes before the reset, or when there has been none for `limit`.
    fn fails_over_its_disk(&mut self, limit: Duration, answer: impl Fn(&LossyDisk)) -> Event {
        let is_it = |event: &Event| event.event == "driver-failed" && event.text("driver") == DISK_DRIVER;
        let told = self.machine.await_event(limit, is_it);
        answer(self.disk());
        let failed = told.or_else(|_| self.machine.await_event(RECOVERY, is_it)).or_tell();
        self.await_event("driver-fenced");
        self.disk().lose(1.0);
        failed
    }

    /// Kills the driver VM while a write is at the disk, which it reaches nevertheless; what the next life writes waits again.
    fn die_over_a_write(&mut self) {
        self.await_write();
        let pid = self.machine.driver_pid(&mut self.rig.place, DISK_DRIVER).or_tell();
        let mut kill = self.place().start(&Kind::Kill.command(DISK_DRIVER, pid)).or_tell();
        self.fails_over_its_disk(DEAD, LossyDisk::release);
        self.rig.place.await_end(&mut kill, RECOVERY, |_| Ok(())).or_tell();
    }

    /// Waits until a write waits at the disk: what has been there for some time.
    fn await_write(&mut self) {
        let (mut stall, mut looks) = (Stall::new(RECOVERY), 0);
        while looks < LOOKS {
            looks = if self.disk().state().waiting == 0 { 0 } else { looks + 1 };
            self.machine.drain();
            assert!(!stall.is_over((self.machine.seen.len(), looks)), "no write comes to the disk");
            std::thread::sleep(LOOK);
        }
    }

    /// Lines of the guest's log since the start that tell of a failed request: one for each.
    fn told_errors(&mut self) -> usize {
        let log = GuestLog::read(&mut self.rig.place, GUEST).or_tell().since(&self.before);
        log.lines.iter().filter(|line| line.contains(" error, dev vda, sector ")).count()
    }

    /// The checker has found nothing wrong, and the guest's log tells of nothing.
    fn expect_sound(&mut self, checker: Checker) {
        let found = checker.finish(self.place(), GUEST).or_tell();
        assert!(found.is_sound() && found.writes > 0, "{}: {found:#?}", self.model());
        let log = GuestLog::read(&mut self.rig.place, GUEST).or_tell().since(&self.before);
        assert!(log.is_clean(), "{}: {:#?}", self.model(), log.lines);
    }

    fn stop(self) {
        assert_eq!(self.disk().state().host_errors, 0);
        self.machine.stop(&mut self.rig.place).or_tell();
    }
}

/// Makes a block full of this letter in the guest.
fn make(letter: char) -> String {
    format!("head -c {BLOCK} /dev/zero | tr '\\0' {letter} >/tmp/{letter}")
}

fn write(block: u64, letter: char) -> String {
    let seek = FIRST + block;
    format!("{} && dd if=/tmp/{letter} of={DISK} bs={BLOCK} seek={seek} oflag=direct conv=notrunc", make(letter))
}

/// What NVMe says of a range that can be neither read nor written is the guest's, at once, and costs no life.
fn pass_on_errors_of_the_medium(rig: &mut Rig) {
    let mut trial = Trial::start(rig, 0);
    // Nothing of it is kept: what fails is not to be written again.
    assert!(trial.writes(0, 'a') && trial.writes(1, 'a') && trial.flushes());
    for class in [Class::Read, Class::Write] {
        trial.fail(class, 0, Times::Always);
    }
    assert!(!trial.reads(0, 'a') && trial.reads(1, 'a'));
    assert!(!trial.writes(0, 'b') && trial.writes(1, 'b'));
    trial.disk().heal();
    assert!(trial.reads(0, 'a') && trial.writes(0, 'b') && trial.reads(0, 'b'));
    assert_eq!((trial.failures(), trial.told_errors()), (0, 2), "one for each request that failed");
    // The controller's flushes fail, and what it had in its cache is written by none that comes later.
    trial.disk().fail(Class::Flush, 0..BYTES, Times::Always);
    assert!(trial.writes(2, 'c') && !trial.flushes());
    trial.disk().heal();
    assert!(trial.flushes());
    assert_eq!(trial.disk().lose(1.0).lost, 0, "everything has been written again");
    assert!(trial.reads(2, 'c'));
    trial.stop();
}

/// Errors that may be the driver's, as AHCI's are. It tries again by itself, so that an error that comes once is seen by nobody; of one
/// that stays no guest sees the first, for which a life fails, and the second one is the guest's.
fn mask_errors_of_the_driver(rig: &mut Rig, n: usize) {
    let mut trial = Trial::start(rig, n);
    let model = trial.model();
    let mut checker = Checker::start(trial.place(), GUEST).or_tell();
    checker.await_more(trial.place(), BETWEEN).or_tell();
    trial.fail(Class::Write, 0, Times::Once);
    assert!(trial.writes(0, 'a') && trial.reads(0, 'a'), "{model}");
    trial.fail(Class::Read, 0, Times::Once);
    assert!(trial.reads(0, 'a'), "{model}");
    // It gives up nothing of what it was to cover, for the driver's next one succeeds, and nobody knows.
    trial.disk().fail(Class::Flush, 0..0, Times::Once);
    checker.await_more(trial.place(), BETWEEN).or_tell();
    assert!(trial.flushes(), "{model}");
    assert_eq!(trial.disk().state().failed, 3, "{model}: each error was met");
    assert_eq!(trial.failures(), 0, "{model}");
    crash_on(trial.rig, &mut trial.machine, n, (Kind::Panic, 1.0));
    checker.await_more(trial.place(), BETWEEN).or_tell();
    trial.expect_sound(checker);
    let failures = trial.failures();
    trial.fail(Class::Write, 1, Times::Always);
    assert!(!trial.writes(1, 'b') && trial.writes(2, 'b'), "{model}");
    assert_eq!((trial.failures(), trial.told_errors()), (failures + 1, 1), "{model}: one life, then one error");
    assert!(!trial.writes(1, 'b'), "{model}");
    assert_eq!((trial.failures(), trial.told_errors()), (failures + 1, 2), "{model}: the range is known");
    trial.disk().heal();
    assert!(trial.writes(1, 'c') && trial.reads(1, 'c') && trial.reads(0, 'a'), "{model}");
    trial.stop();
}

fn tell_errors_apart() {
    let mut rig = boot("disk-errors", &["nvme", "ich9-ahci"]);
    pass_on_errors_of_the_medium(&mut rig);
    mask_errors_of_the_driver(&mut rig, 1);
}

/// The disk answers nothing, so that the driver VM is given up; its next life dies while it is written again what the log owes, and so does
/// the one after that.
fn outlive_a_stall_and_deaths_in_replay(rig: &mut Rig, n: usize) {
    let mut spec = rig.machine(n, 8);
    // Its driver would reset the controller before that, and the emulator stand still.
    spec.driver_options.push_str("cmdline = \"nvme_core.io_timeout=600\"\n");
    let mut trial = Trial::start_as(rig, n, &spec);
    let model = trial.model();
    let mut checker = Checker::start(trial.place(), GUEST).or_tell();
    checker.await_more(trial.place(), BETWEEN).or_tell();
    trial.disk().stall();
    let failed = trial.fails_over_its_disk(GIVEN_UP, LossyDisk::resume);
    say(&format!("{model} stands still: {}", failed.text("reason")));
    assert!(failed.text("reason").contains("no answer"), "{failed:?}");
    trial.await_event("driver-live");
    checker.await_more(trial.place(), BETWEEN).or_tell();
    trial.disk().delay(Class::Write, FOR_EVER);
    for _ in 0..2 {
        trial.die_over_a_write();
    }
    trial.disk().delay(Class::Write, Duration::ZERO);
    trial.await_event("driver-live");
    checker.await_more(trial.place(), BETWEEN).or_tell();
    trial.expect_sound(checker);
    trial.stop();
}

/// A disk that has become another while its driver VM was away: nothing is written to it, and when the right one is back, it gets what was
/// kept.
fn write_nothing_to_a_disk_that_has_changed(rig: &mut Rig, n: usize) {
    let others =
        [("its size differs", BYTES / 2, Access::ReadWrite), ("has become read-only", BYTES, Access::ReadOnly)];
    let mut spec = rig.machine(n, 8);
    // The next life looks for its disk when the exchange is done.
    spec.standby = "cold".into();
    let mut trial = Trial::start_as(rig, n, &spec);
    let model = trial.model();
    for (letter, (reason, bytes, access)) in ('a'..).zip(others) {
        let other = Medium::of_size(&model, bytes, false).or_tell();
        let before = other.disk.base_sha256().unwrap();
        assert!(trial.writes(0, letter), "{model}");
        trial.place().expect(&Kind::Panic.command(DISK_DRIVER, 0), STEP).or_tell();
        trial.await_event("driver-fenced");
        assert!(trial.disk().lose(1.0).lost > 0, "it was acknowledged, and not flushed");
        trial.rig.exchange(n, Some((&other.disk, access))).or_tell();
        let given_up = trial.await_event("quarantined");
        say(&format!("{model}: {}", given_up.text("reason")));
        assert!(given_up.text("reason").contains(reason), "{given_up:?}");
        assert_eq!((other.disk.base_sha256().unwrap(), other.disk.state().unflushed), (before, 0), "it was written to");
        trial.rig.exchange(n, None).or_tell();
        trial.place().expect(&format!("umbra resume {DISK_DRIVER}"), STEP).or_tell();
        trial.await_event("driver-live");
        assert!(trial.reads(0, letter), "{model}");
    }
    trial.stop();
}

/// Three lives die while one request of the guest is under way.
fn fail_a_request_that_kills(rig: &mut Rig, n: usize) {
    let mut trial = Trial::start(rig, n);
    let model = trial.model();
    assert!(trial.writes(0, 'a') && trial.flushes());
    trial.disk().delay(Class::Write, FOR_EVER);
    let poison = format!("{}; echo status $?", write(1, 'p'));
    let mut poison = trial.place().start_in_guest(GUEST, &poison).or_tell();
    for _ in 0..3 {
        trial.die_over_a_write();
    }
    trial.rig.place.await_end(&mut poison, RECOVERY, |_| Ok(())).or_tell();
    trial.disk().delay(Class::Write, Duration::ZERO);
    assert!(!poison.output().stdout.contains("status 0"), "{model}: {:?}", poison.output());
    assert_eq!(trial.told_errors(), 1, "{model}");
    assert!(trial.reads(0, 'a') && trial.writes(2, 'b') && trial.flushes(), "{model}: others are served");
    let failures = trial.failures();
    assert!(trial.writes(1, 'c') && trial.reads(1, 'c'), "{model}: it can be written again");
    assert_eq!(trial.failures(), failures, "{model}");
    trial.stop();
}

/// Seconds after which the NVMe driver takes a request to be lost: it asks the controller to abort it, and after as many again resets that.
const NVME_TIMEOUT_S: u32 = 2;
/// More than both, and what the kernel adds to each; the emulator itself stands still from the reset on until the disk answers.
const RESET_BEGUN: Duration = Duration::from_secs(10);

/// The driver resets its controller by itself, within a life, and the controller loses its cache.
fn outlive_a_reset_by_the_driver(rig: &mut Rig, n: usize) {
    let mut spec = rig.machine(n, 0);
    spec.driver_options.push_str(&format!("cmdline = \"nvme_core.io_timeout={NVME_TIMEOUT_S}\"\n"));
    spec.controller.as_mut().unwrap().options = vec!["io_timeout_s = 60\n".into()];
    let mut trial = Trial::start_as(rig, n, &spec);
    let mut checker = Checker::start(trial.place(), GUEST).or_tell();
    checker.await_more(trial.place(), BETWEEN).or_tell();
    trial.disk().stall();
    std::thread::sleep(scaled(RESET_BEGUN));
    let lost = trial.disk().lose(1.0).lost;
    trial.disk().resume();
    checker.await_more(trial.place(), BETWEEN).or_tell();
    assert!(lost > 0, "there was nothing to lose");
    say(&format!("{lost} sectors lost at a reset by the driver itself"));
    assert_eq!(trial.failures(), 0, "it was not the driver's reset");
    trial.expect_sound(checker);
    trial.stop();
}

fn outlive_stalls_and_deaths() {
    let mut rig = boot("disk-deaths", &["nvme", "ich9-ahci", "virtio-scsi-pci"]);
    outlive_a_stall_and_deaths_in_replay(&mut rig, 0);
    fail_a_request_that_kills(&mut rig, 1);
    outlive_a_reset_by_the_driver(&mut rig, 0);
    write_nothing_to_a_disk_that_has_changed(&mut rig, 2);
}

#[test]
#[ignore = "takes two minutes: `make test-disks`"]
fn errors_of_the_medium_are_the_guest_s_and_those_of_a_driver_are_masked_once() {
    scenario(tell_errors_apart);
}

#[test]
#[ignore = "takes four minutes: `make test-disks`"]
fn stalls_deaths_in_replay_and_changed_disks_cost_no_write() {
    scenario(outlive_stalls_and_deaths);
}
