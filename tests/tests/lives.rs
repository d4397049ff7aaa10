//! Lives that end apart: two guests share a NIC and a sound card. One is rebooted, resets itself, is killed and started again, and
//! stands still for a while; the other goes on sending ticks and playing a song, and loses no tick and no sample of it. A NIC's
//! driver VM serves its guests although the card's takes long to boot.
//!
//! `UMBRA_LIVES_REBOOTS`, `UMBRA_LIVES_STOPPED_S` and `UMBRA_LIVES_BOOT_S` make it longer (docs/bench.md).
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{OrTell, RECOVERY, STEP, assets, longer_by, most_ms, say, scenario};
use serde_json::Value;
use umbra_tests::bench::patience::whole_factor;
use umbra_tests::bench::{Bench, BenchSpec};
use umbra_tests::demo::events::Event;
use umbra_tests::demo::guest_log::GuestLog;
use umbra_tests::demo::machine::{Machine, MachineSpec, NIC_DRIVER, SOUND_DRIVER};
use umbra_tests::demo::outage::{longest, longest_standstill};
use umbra_tests::demo::place::Place;
use umbra_tests::peer::{Tick, guest_address, now_us, peer_address};
use umbra_tests::sound::player::{Ended, Player, patient, patient_kernel};
use umbra_tests::sound::recording::{self, Fault, Judged, Silences};
use umbra_tests::sound::{Length, Sound};

/// The guest whose lives end, and the one that must not notice.
const GUEST: &str = "web";
const NEIGHBOUR: &str = "db";
const GUESTS: [&str; 2] = [GUEST, NEIGHBOUR];

/// The rate at which dmix mixes, Hz (docs/sound.md): a song of that rate is played sample by sample.
const MIXED_RATE: u32 = 48_000;
/// A round of the song, seconds.
const ROUND_S: u32 = 120;
/// Sound without a disturbance that is recorded before the first and behind the last.
const QUIET: Duration = Duration::from_secs(4);

/// How often the guest is rebooted, unless the variable says more.
const REBOOTS: (&str, u64) = ("UMBRA_LIVES_REBOOTS", 2);
/// How long its process is stopped, seconds: longer than the 5 s for which a recovery waits for a guest.
const STOPPED_S: (&str, u64) = ("UMBRA_LIVES_STOPPED_S", 10);

/// How long the card's driver VM waits in its boot, seconds as on the reference machine, unless the variable says more: longer than
/// each of Umbra's own limits for an answer of a guest, which is not there before its card.
const SLOW_BOOT_S: (&str, u64) = ("UMBRA_LIVES_BOOT_S", 25);

/// What must not happen to a driver VM and its standby while only a guest dies.
const DISTURBANCES: [&str; 7] = [
    "driver-failed",
    "driver-starting",
    "driver-live",
    "driver-adopted",
    "standby-failed",
    "standby-starting",
    "quarantined",
];

fn setting((name, usual): (&str, u64)) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(usual)
}

/// What the settings take, all together.
fn asked_for() -> Duration {
    /// More than a reboot takes until the guest is served again.
    const REBOOT_S: u64 = 30;
    Duration::from_secs(REBOOT_S * setting(REBOOTS) + setting(STOPPED_S) + setting(SLOW_BOOT_S))
}

fn slow_boot_s() -> u32 {
    u32::try_from(setting(SLOW_BOOT_S)).unwrap() * whole_factor()
}

#[test]
fn a_guest_that_dies_costs_its_neighbour_nothing() {
    scenario(lives);
}

fn lives() {
    longer_by(asked_for());
    let assets = assets();
    let mut sound = Sound::new(&["hda".into()], Length::Fed(ROUND_S), &assets).or_tell();
    sound.song = assets.song_in_pieces(MIXED_RATE, ROUND_S).or_tell();
    let nic = assets.driver_image(&"e1000e".into()).or_tell();
    let slow = assets.slow_image(&sound.images[0], slow_boot_s()).or_tell();
    let mut bench = BenchSpec::new("lives");
    sound.add_to(&mut bench);
    bench.wav_rate = MIXED_RATE;
    bench.alone = true;
    bench.files.extend([nic.clone(), slow.clone()]);
    let mut place = Place::Bench(Box::new(Bench::boot(bench, &assets).or_tell()));
    sound.prepare(&mut place).or_tell();
    let spec = machine(&mut place, &sound, &nic);

    a_slow_card_holds_up_no_nic(&mut place, &spec, &slow);
    let told = die_beside_a_neighbour(&mut place, &spec);

    let Place::Bench(bench) = place else { unreachable!("it is one") };
    let (wav, dir) = (bench.wav(), bench.dir().to_owned());
    bench.shutdown().or_tell();
    assert_eq!(told.player, Ended { status: 0, said: String::new() }, "the neighbour's player noticed");
    let song = sound.song.played(told.pieces, &dir.join("song.wav")).or_tell();
    judge(&recording::judge(&wav, told.part, &song).or_tell(), &told.disturbed);
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// Two guests on one NIC and one card.
fn machine(place: &mut Place, sound: &Sound, nic: &Path) -> MachineSpec {
    let device = place.expect("vfio $NIC0 && printf %s $NIC0", STEP).or_tell();
    let mut spec = MachineSpec::one_guest(&device, &file_name(nic), "");
    spec.guests = (0..).zip(GUESTS).map(|(n, name)| (name.into(), format!("{}/24", guest_address(0, n)))).collect();
    spec.sound = Some(sound.card(0, place, "skip").or_tell());
    spec.archives = sound.archives();
    spec.guest_options = patient_kernel();
    spec
}

fn reaches_peer(place: &mut Place, guest: &str) {
    place.in_guest(guest, &format!("umbra-probe first-answer {} 20", peer_address(0)), STEP).or_tell();
}

/// The NIC's driver VM is live, and a guest without a card is served, while the card's driver VM boots; then its guest comes too.
fn a_slow_card_holds_up_no_nic(place: &mut Place, spec: &MachineSpec, slow: &Path) {
    say("a card that takes long to boot");
    let mut spec =
        MachineSpec { without_card: vec![NEIGHBOUR.into()], standby: "cold".into(), snapshots: false, ..spec.clone() };
    spec.slow_boot_s = slow_boot_s();
    if let Some(card) = &mut spec.sound {
        card.image = file_name(slow);
    }
    let start = Instant::now();
    let mut machine = Machine::launch(place, &spec).or_tell();
    machine.await_live(NIC_DRIVER, RECOVERY).or_tell();
    say(&format!("{NIC_DRIVER} is live after {:.1} s", start.elapsed().as_secs_f64()));
    let is_of_card = |event: &Event| event.text("driver") == SOUND_DRIVER && event.text("stage") == "hello";
    machine.drain();
    assert!(!machine.seen.iter().any(is_of_card), "{NIC_DRIVER} waited for {SOUND_DRIVER}: {:?}", machine.seen);
    reaches_peer(place, NEIGHBOUR);
    machine.drain();
    let before = if machine.seen.iter().any(is_of_card) { "" } else { ", before the card's driver VM runs" };
    say(&format!("{NEIGHBOUR} reaches the peer after {:.1} s{before}", start.elapsed().as_secs_f64()));
    machine.await_live(SOUND_DRIVER, RECOVERY + Duration::from_secs(setting(SLOW_BOOT_S))).or_tell();
    say(&format!("{SOUND_DRIVER} is live after {:.1} s", start.elapsed().as_secs_f64()));
    assert!(start.elapsed() > Duration::from_secs(spec.slow_boot_s.into()), "its boot is not slow");
    served(place);
    machine.stop(place).or_tell();
}

/// The guest is served by both driver VMs: the peer answers, and what it plays is heard in real time. It plays silence, which
/// leaves its neighbour's samples as they are.
fn served(place: &mut Place) {
    reaches_peer(place, GUEST);
    let play = "killall -q aplay; n=0; while ! said=$(aplay -q -f dat -d 1 /dev/zero 2>&1) || [ -n \"$said\" ]; do
        n=$((n+1)); [ $n -lt 5 ] || { echo \"$said\"; exit 1; }; done";
    place.in_guest(GUEST, play, STEP).or_tell();
}

/// What identifies the lives of the driver VMs and their standbys.
fn driver_lives(machine: &mut Machine, place: &mut Place) -> Value {
    let mut drivers = machine.status(place).or_tell()["drivers"].take();
    for driver in drivers.as_array_mut().into_iter().flatten() {
        let kept = ["name", "device", "generation", "state", "pid", "failures", "standby"];
        driver.as_object_mut().unwrap().retain(|key, _| kept.contains(&key.as_str()));
        // It grows.
        driver["standby"].as_object_mut().map(|standby| standby.remove("age_s"));
    }
    drivers
}

/// What the run has left to be judged.
struct Told {
    player: Ended,
    pieces: usize,
    /// The run's part of the recording, and where in it the guest was disturbed, frames.
    part: Range<usize>,
    disturbed: Range<usize>,
}

fn die_beside_a_neighbour(place: &mut Place, spec: &MachineSpec) -> Told {
    let mut machine = Machine::start(place, spec).or_tell();
    for driver in [NIC_DRIVER, SOUND_DRIVER] {
        machine.await_standby(driver, RECOVERY).or_tell();
    }
    GUESTS.iter().for_each(|guest| reaches_peer(place, guest));
    let frames = |place: &Place| recording::frames_so_far(&place.wav()).unwrap();
    let begin = frames(place);
    let mut neighbour = Neighbour::start(place);
    let before = driver_lives(&mut machine, place);
    machine.drain();
    let told_before = machine.seen.len();
    recording::await_sound(&place.wav(), QUIET, RECOVERY).or_tell();
    let first = (frames(place), now_us());

    for n in 0..setting(REBOOTS) {
        neighbour.beside(place, &mut machine, &format!("reboot {}", n + 1), |place, machine| reboot(place, machine, n));
    }
    neighbour.beside(place, &mut machine, "kill -9", kill);
    neighbour.beside(place, &mut machine, "SIGSTOP", stop_and_continue);

    let last = (frames(place), now_us());
    recording::await_sound(&place.wav(), QUIET, RECOVERY).or_tell();
    let (player, pieces) = neighbour.end(place, first.1..last.1);
    assert_eq!(driver_lives(&mut machine, place), before, "a driver VM or a standby is another one");
    machine.drain();
    check_events(&machine.seen[told_before..]);
    let part = begin..frames(place);
    machine.stop(place).or_tell();
    Told { player, pieces, part, disturbed: first.0..last.0 }
}

/// Nothing has happened to a driver VM or a standby, and to the neighbour's devices.
fn check_events(told: &[Event]) {
    let disturbs = |event: &&Event| {
        DISTURBANCES.contains(&event.event.as_str())
            || (["masked", "end-live", "sound-live"].contains(&event.event.as_str()) && event.text("guest") != GUEST)
    };
    let bad: Vec<_> = told.iter().filter(disturbs).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    for event in told.iter().filter(|event| ["masked", "warning"].contains(&event.event.as_str())) {
        say(&format!("told: {} {:?}", event.event, event.fields));
    }
}

/// Restarts the guest, by the command or by its own reset in turn.
fn reboot(place: &mut Place, machine: &mut Machine, n: u64) {
    if n.is_multiple_of(2) {
        place.expect(&format!("umbra reboot {GUEST} --force"), RECOVERY).or_tell();
    } else {
        // Its answer does not come any more.
        place.in_guest(GUEST, "(sleep 0.2; reboot -f) </dev/null >/dev/null 2>&1 &", STEP).or_tell();
        of_guest(machine, "guest-rebooted");
    }
    of_guest(machine, "guest-running");
}

fn of_guest(machine: &mut Machine, kind: &str) {
    machine.await_event(RECOVERY, |event| event.event == kind && event.text("guest") == GUEST).or_tell();
}

/// Kills the guest's process: it has failed, alone, and can be started again.
fn kill(place: &mut Place, machine: &mut Machine) {
    let pid = machine.guest_pid(place, GUEST).or_tell();
    place.expect(&format!("kill -9 {pid}"), STEP).or_tell();
    of_guest(machine, "guest-ended");
    let status = machine.status(place).or_tell();
    let guest = status["guests"].as_array().unwrap().iter().find(|guest| guest["name"] == GUEST).unwrap();
    assert_eq!(guest["state"], "failed", "{status}");
    place.expect(&format!("umbra start {GUEST}"), RECOVERY).or_tell();
    of_guest(machine, "guest-running");
}

/// Stops the guest's process for a while: nothing of it runs, and none of its ends is served.
fn stop_and_continue(place: &mut Place, machine: &mut Machine) {
    let (pid, seconds) = (machine.guest_pid(place, GUEST).or_tell(), setting(STOPPED_S));
    place.expect(&format!("kill -STOP {pid}"), STEP).or_tell();
    std::thread::sleep(Duration::from_secs(seconds));
    let status = machine.status(place).or_tell();
    place.expect(&format!("kill -CONT {pid}"), STEP).or_tell();
    assert_eq!(status["drivers"][0]["state"], "live", "{status}");
    assert_eq!(machine.guest_pid(place, GUEST).or_tell(), pid);
}

/// What the guest that must not notice does.
struct Neighbour {
    player: Player,
    ticks: Vec<Tick>,
    log: GuestLog,
}

/// Longest time in which the neighbour itself may send no tick, ms, as on the reference machine: for longer than that it had no
/// processor, whatever happened to the other guest. Its player's buffer holds a second.
const STILL_MS: f64 = 800.0;

/// Sends ticks and plays silence while a guest's life ends.
const BUSY: &str = "(umbra-probe tick $PEER 20 & aplay -q -f dat /dev/zero) </dev/null >/dev/null 2>&1 &";

impl Neighbour {
    fn start(place: &mut Place) -> Self {
        let log = GuestLog::read(place, NEIGHBOUR).or_tell();
        let tick = format!("(umbra-probe tick {} 10 & echo $! >/tmp/tick) </dev/null >/dev/null 2>&1", peer_address(0));
        place.in_guest(NEIGHBOUR, &tick, STEP).or_tell();
        let player = Player::start_fed(place, NEIGHBOUR, &patient()).or_tell();
        Self { player, ticks: Vec::new(), log }
    }

    /// One disturbance of the guest, which is busy when it comes and is served again afterwards.
    fn beside(
        &mut self,
        place: &mut Place,
        machine: &mut Machine,
        what: &str,
        disturb: impl FnOnce(&mut Place, &mut Machine),
    ) {
        place.in_guest(GUEST, &BUSY.replace("$PEER", &peer_address(0).to_string()), STEP).or_tell();
        recording::await_sound(&place.wav(), Duration::from_millis(500), RECOVERY).or_tell();
        let begin = now_us();
        disturb(place, machine);
        served(place);
        let end = now_us();
        self.ticks.extend(place.peer().take_ticks().or_tell());
        // Ticks that are sent all at once afterwards find no room in the sender itself, and its player's buffer runs out.
        let still = longest_standstill(&self.ticks, neighbour()).map_or(0.0, |still| still.ms);
        assert!(
            still < most_ms(STILL_MS),
            "{NEIGHBOUR} itself stood still for {still:.0} ms: this machine cannot tell"
        );
        let seen = longest(&self.ticks, neighbour(), begin, end).unwrap();
        say(&format!(
            "{what}: {GUEST} is served again after {:.1} s; {NEIGHBOUR}: {} ticks lost, {} late, longest gap {:.0} ms",
            Duration::from_micros(end - begin).as_secs_f64(),
            seen.lost_ticks,
            seen.late_ticks,
            seen.gap_ms
        ));
        self.player.plays(place).or_tell();
    }

    /// Ends ticks and song: how the player ended, and how many pieces it was fed. No tick is missing.
    fn end(mut self, place: &mut Place, disturbed: Range<u64>) -> (Ended, usize) {
        place.in_guest(NEIGHBOUR, "kill $(cat /tmp/tick)", STEP).or_tell();
        let ended = self.player.finish(place).or_tell();
        self.ticks.extend(place.peer().take_ticks().or_tell());
        let mut numbers: Vec<_> = self.ticks.iter().filter(|t| t.from == neighbour()).map(|t| t.seq).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let missing: Vec<_> = numbers.windows(2).filter(|pair| pair[1] - pair[0] > 1).collect();
        let gap = |range: Range<u64>| longest(&self.ticks, neighbour(), range.start, range.end).map(|seen| seen.gap_ms);
        say(&format!(
            "{NEIGHBOUR}: {} ticks, missing {missing:?}; longest gap at the peer {:.0?} ms, {:.0?} ms without a disturbance; \
             it sent nothing itself for at most {:.0?} ms",
            numbers.len(),
            gap(disturbed.clone()),
            gap(0..disturbed.start),
            longest_standstill(&self.ticks, neighbour()).map(|still| still.ms)
        ));
        assert!(missing.is_empty(), "ticks of {NEIGHBOUR} are missing: {missing:?}");
        assert_eq!(numbers.first(), Some(&0), "the first tick");
        let noticed = GuestLog::read(place, NEIGHBOUR).or_tell().since(&self.log);
        assert!(noticed.is_clean(), "{noticed:#?}");
        ended
    }
}

fn neighbour() -> std::net::Ipv4Addr {
    guest_address(0, 1)
}

/// Longest silence that a machine without a processor to spare may leave in a recording, ms, as on the reference machine: less than
/// the shortest restart of the card's driver VM, the fault that is looked for.
const LATE_MS: f64 = 200.0;

/// A machine that is as slow as this, by its [`whole_factor`], may be too slow to play a song in real time with nothing else to do. It is,
/// if more of the undisturbed recording is silent than this. In any case it is late where a guest boots.
const TOO_SLOW: (u32, f64) = (4, 0.02);

/// Frames that QEMU's HDA codec drops at most when its stream stops because the card has run dry: a quarter of its buffer.
const CODEC_BUFFER: i64 = 512;

/// The neighbour's song is whole: every sample of it is heard, in order, and nothing else. An emulated machine is late where guests
/// boot: the recording then has short silences in which the card waited, its buffer may be heard again, and what the codec had of it may
/// be lost; that is told. One that cannot play at all says nothing about a disturbance. On a slow one dmix, which mixes the guests in the
/// driver VM, is as late as all the rest: what it mixes in behind the card's pointer is silent, or is heard when the buffer comes round
/// again. There no silence is as long as a restart of the driver VM, which is all that can be judged.
fn judge(judged: &Judged, disturbed: &Range<usize>) {
    let analysis = &judged.analysis;
    let (beside, quiet): (Vec<Fault>, Vec<Fault>) =
        judged.faults().into_iter().partition(|fault| disturbed.contains(&fault.at));
    let (silences, usual) = (Silences::of(&beside), Silences::of(&quiet));
    say(&format!(
        "the song: frames lost {}, unknown {}, heard again {}; in {:.0} s with a disturbance {} silences of {:.0} ms in all, the \
         longest {:.0} ms; in {:.0} s without one {} of {:.0} ms",
        analysis.lost,
        analysis.unknown,
        analysis.doubled,
        seconds(disturbed.len()),
        silences.count,
        silences.sum_ms,
        silences.longest_ms,
        seconds(judged.heard.frames.len().saturating_sub(disturbed.len())),
        usual.count,
        usual.sum_ms
    ));
    assert!(!analysis.pieces.is_empty(), "the song is not heard");
    let (slow, silent) = TOO_SLOW;
    let undisturbed = seconds(judged.heard.frames.len().saturating_sub(disturbed.len()));
    if whole_factor() >= slow && usual.sum_ms > 1000.0 * silent * undisturbed {
        say("this machine does not play in real time even without a disturbance: the samples are not judged");
        return;
    }
    assert!(silences.longest_ms < most_ms(LATE_MS), "{beside:?}");
    if whole_factor() >= slow {
        say("this machine is late where guests boot: its samples are not judged one by one");
        return;
    }
    let dropped =
        judged.faults().into_iter().filter(|fault| fault.ms > 0.0 && (1..=CODEC_BUFFER).contains(&fault.skipped));
    let dropped: i64 = dropped.map(|fault| fault.skipped).sum();
    say(&format!("of the frames lost, {dropped} were in the codec when the card ran dry"));
    assert_eq!((analysis.lost as i64 - dropped, analysis.unknown), (0, 0), "{beside:?}");
}

fn seconds(frames: usize) -> f64 {
    frames as f64 / f64::from(MIXED_RATE)
}
