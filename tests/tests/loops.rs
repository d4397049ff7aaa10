//! What holds up a disk, a terminal or a pipe of the host holds up nothing else of a guest; and what a guest prints fills no
//! disk of the host.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::ops::Range;
use std::time::Duration;

use common::{OrTell, RECOVERY, STEP, assets, place_in, say, scenario};
use umbra_tests::bench::patience::whole_factor;
use umbra_tests::bench::{Bench, BenchSpec};
use umbra_tests::demo::machine::{Machine, NIC_DRIVER, SOUND_DRIVER};
use umbra_tests::demo::place::Place;
use umbra_tests::peer::peer_address;
use umbra_tests::probe::flush::Flushes;
use umbra_tests::probe::net::RoundTrips;
use umbra_tests::sound::player::{Ended, Player};
use umbra_tests::sound::recording::{self, Judged, Silences};
use umbra_tests::sound::{Length, Sound};

/// How long the slow disk takes for each request, ms, as on the reference machine. A player's buffer is shorter, so that each
/// request that holds the sound up is heard.
const FLUSH_MS: u32 = 500;
/// What a player has in its buffer, ms: mpg123's usual, which the guest's kernel grants with its usual 160 ms of the largest samples.
const BUFFER_MS: u32 = 200;
const KERNEL_BUFFER_MS: u32 = 160;
/// A round of the song, seconds.
const ROUND_S: u32 = 60;
/// Round trips of a measurement. Each flush that holds the network up would make one of them slow: with some tens of round trips
/// between two flushes these are more than one in a hundred.
const PINGS: u32 = 400;
/// Longest run of the guest's flushes, longer than that of the measurement beside it, with whose end it ends.
const FLUSHING: Duration = Duration::from_secs(3600);

/// A block device of 64 MiB in the test host's memory whose every request takes `$LATENCY_NS`.
const SLOW_DISK: &str =
    "modprobe -a configfs null_blk nr_devices=0 2>/dev/null || { modprobe configfs; modprobe null_blk nr_devices=0; }
mount -t configfs config /sys/kernel/config 2>/dev/null
N=/sys/kernel/config/nullb/slow; mkdir $N && echo 64 > $N/size && echo 1 > $N/memory_backed && echo 2 > $N/irqmode &&
echo $LATENCY_NS > $N/completion_nsec && echo 1 > $N/power && await 10 test -b /dev/slow";

/// The file of a machine with one guest `g` and this console; `$1` is its name, and more of the guest comes behind it.
const MACHINE: &str = r#"mkdir -p /tmp/w && cd /tmp/w && for f in vmlinux guest.cpio; do [ -e $f ] || fetch /share/$f $f; done
machine() { cat > $1.toml <<END
[guest.g]
kernel = "/tmp/w/vmlinux"
initrd = ["/tmp/w/guest.cpio"]
cmdline = "console=ttyS0 quiet ip4=10.88.0.3/24"
cpus = 2
memory = "192M"
console = $2
$3
[[guest.g.port]]
name = "umbra.bench"
socket = "/run/umbra-bench/g.sock"
END
}
g() { umbra-probe exec /run/umbra-bench/g.sock "$@"; }
"#;

#[test]
fn a_slow_disk_holds_up_neither_network_nor_sound() {
    scenario(beside_a_slow_disk);
}

#[test]
fn console_output_holds_up_nothing_and_fills_no_disk() {
    scenario(beside_a_console_that_is_not_read);
}

/// How long the slow disk takes on this machine, ms.
fn flush_ms() -> u32 {
    FLUSH_MS * whole_factor()
}

fn beside_a_slow_disk() {
    let sound = Sound::new(&["hda".into()], Length::Fed(ROUND_S), &assets()).or_tell();
    let mut bench = BenchSpec::new("slow-disk").nics(&["e1000e"]);
    sound.add_to(&mut bench);
    let (mut place, mut spec) = place_in(bench);
    sound.prepare(&mut place).or_tell();
    place.expect(&format!("LATENCY_NS={}\n{SLOW_DISK}", u64::from(flush_ms()) * 1_000_000), STEP).or_tell();
    spec.disks = vec!["/dev/slow".into()];
    spec.sound = Some(sound.card(0, &mut place, "skip").or_tell());
    spec.archives = sound.archives();
    spec.guest_options = format!("virtio_snd.pcm_buffer_ms={}", KERNEL_BUFFER_MS * whole_factor());
    let mut machine = Machine::start(&mut place, &spec).or_tell();
    // Their boot takes processors away.
    for driver in [NIC_DRIVER, SOUND_DRIVER] {
        machine.await_standby(driver, RECOVERY).or_tell();
    }
    let frames = |place: &Place| recording::frames_so_far(&place.wav()).unwrap();
    let begin = frames(&place);
    let options = format!("--devbuffer {:.1}", f64::from(BUFFER_MS * whole_factor()) / 1000.0);
    let player = Player::start_fed(&mut place, "web", &options).or_tell();
    let beside = flushes_do_not_slow_the_network(&mut place, frames);
    let (ended, pieces) = player.finish(&mut place).or_tell();
    assert_eq!(ended, Ended { status: 0, said: String::new() }, "the player noticed");
    let part = begin..frames(&place);
    machine.stop(&mut place).or_tell();

    let Place::Bench(bench) = place else { unreachable!("it is one") };
    let (wav, dir) = (bench.wav(), bench.dir().to_owned());
    bench.shutdown().or_tell();
    let song = sound.song.played(pieces, &dir.join("song.wav")).or_tell();
    flushes_are_not_heard(&recording::judge(&wav, part, &song).or_tell(), &beside);
}

/// The song is whole, and no flush silences it: an emulated machine is late now and then, but not for as long as a flush takes.
fn flushes_are_not_heard(judged: &Judged, beside: &Range<usize>) {
    let (during, before) = judged.faults().into_iter().partition::<Vec<_>, _>(|fault| beside.contains(&fault.at));
    let (flushing, quiet) = (Silences::of(&during), Silences::of(&before));
    let seconds = |frames: usize| frames as f64 / f64::from(judged.heard.rate);
    let analysis = &judged.analysis;
    say(&format!(
        "the song: frames lost {}, unknown {}, heard again {}; in {:.0} s beside flushes {flushing:.0?}; in {:.0} s without {quiet:.0?}",
        analysis.lost,
        analysis.unknown,
        analysis.doubled,
        seconds(beside.len()),
        seconds(judged.heard.frames.len().saturating_sub(beside.len())),
    ));
    assert_eq!((analysis.lost, analysis.unknown), (0, 0), "{during:?}");
    let held_up = f64::from(flush_ms() - BUFFER_MS * whole_factor());
    assert!(flushing.longest_ms < held_up / 2.0, "as long as a flush beyond the player's buffer: {during:?}");
}

fn beside_a_console_that_is_not_read() {
    let mut place = Place::Bench(Box::new(Bench::boot(BenchSpec::new("console"), &assets()).or_tell()));
    a_pipe_that_nobody_reads_costs_output_alone(&mut place);
    a_guest_that_prints_without_end_fills_no_disk(&mut place);
}

fn round_trips(place: &mut Place) -> RoundTrips {
    let script = format!("umbra-probe ping {} {PINGS}", peer_address(0));
    serde_json::from_str(&place.in_guest("web", &script, 3 * STEP).or_tell()).unwrap()
}

/// Round trips of a guest that calls `fsync` in a loop are those of a guest that does not; where in the recording that was, by
/// `frames`.
fn flushes_do_not_slow_the_network(place: &mut Place, frames: impl Fn(&Place) -> usize) -> Range<usize> {
    let quiet = round_trips(place);
    let flush =
        format!("umbra-probe flush /dev/vda {} > /tmp/flushes & echo $! > /tmp/flusher; wait", FLUSHING.as_secs());
    let _flushing = place.start_in_guest("web", &flush).or_tell();
    place.in_guest("web", "while ! grep -q [1-9] /sys/block/vda/inflight; do usleep 20000; done", STEP).or_tell();
    let (before, begin) = (done_flushes(place), frames(place));
    let beside = round_trips(place);
    let flushes = done_flushes(place) - before;
    let heard = begin..frames(place);
    place.in_guest("web", "kill $(cat /tmp/flusher)", STEP).or_tell();
    let one: Flushes =
        serde_json::from_str(&place.in_guest("web", "umbra-probe flush /dev/vda 0", STEP).or_tell()).unwrap();
    #[expect(clippy::cast_precision_loss, reason = "a ratio for humans")]
    let ratio = beside.p99_us as f64 / quiet.p99_us as f64;
    say(&format!("round trips, quiet: {quiet:?}"));
    say(&format!("beside {flushes} flushes of {:.0} ms: {beside:?}; p99 {ratio:.2} times the quiet one", one.min_ms));
    assert!(one.min_ms >= flush_ms().into(), "the disk is not slow: {one:?}");
    assert!(flushes > 2, "{flushes} flushes in {PINGS} round trips");
    assert!(beside.p99_us < u64::from(flush_ms()) * 1000 / 2, "a gap as long as a flush, again and again: {beside:?}");
    heard
}

/// Flushes that the guest's disk has done since its boot (`Documentation/block/stat.rst`).
fn done_flushes(place: &mut Place) -> u64 {
    place.in_guest("web", "awk '{print $16}' /sys/block/vda/stat", STEP).or_tell().trim().parse().unwrap()
}

fn a_pipe_that_nobody_reads_costs_output_alone(place: &mut Place) {
    let script = format!(
        "{MACHINE}
tunctl -t tap3 >/dev/null && ip addr add 10.88.0.1/24 dev tap3 && ip link set tap3 up
machine pipe '\"terminal\"' '[[guest.g.net]]
tap = \"tap3\"'
(umbra run pipe.toml -q </dev/null 2>pipe.err | sleep 600) >/dev/null 2>&1 &
await 120 g true 10 || exit 2
ping -c 5 -i 0.2 -w 20 10.88.0.3 >/dev/null || exit 3
g '(yes 0123456789 >/dev/ttyS0 </dev/null 2>/dev/null &)' 10
# A writer that waits for room: the pipe is full.
await 120 grep -q pipe_write /proc/[0-9]*/task/*/wchan || {{ echo 'the pipe is not full'; cat pipe.err; exit 4; }}
echo 'the pipe is full'
ping -c 40 -i 0.2 -w $((12 * ${{UMBRA_PATIENCE:-1}})) 10.88.0.3 | tail -2
g 'echo the exec port answers' 20 || exit 5
ping -c 1 -w 10 10.88.0.3 >/dev/null || exit 6
umbra stop --force; s=$?; cat pipe.err; exit $s"
    );
    let said = place.expect(&script, 6 * STEP).or_tell();
    let answered = said.lines().find_map(|line| line.split_once(" packets received").map(|(before, _)| before));
    let answered: u32 = answered.and_then(|line| line.rsplit(' ').next()).unwrap().parse().unwrap();
    say(&format!("with the pipe full: {answered} of 40 pings answered"));
    assert!(answered >= 20, "{said}");
}

fn a_guest_that_prints_without_end_fills_no_disk(place: &mut Place) {
    let script = format!(
        "{MACHINE}
dd if=/dev/zero bs=1M count=8 2>/dev/null | tr '\\0' x > g.log
machine file '{{ file = \"/tmp/w/g.log\" }}' ''
umbra run file.toml >/dev/null 2>file.err &
await 120 g true 10 || {{ cat file.err; exit 2; }}
g 'yes 012345678901234567890123456789 >/dev/ttyS0 2>/dev/null & sleep 10; kill $!' 60
ls -l g.log* >&2; cat g.log | tail -c 100 >&2
umbra stop --force >/dev/null; cat g.log* | wc -c"
    );
    let kept: u64 = place.expect(&script, 6 * STEP).or_tell().trim().parse().unwrap();
    say(&format!("{kept} bytes kept of 8 MiB and what the guest printed"));
    assert!(kept <= 8 << 20, "{kept} bytes kept");
}
