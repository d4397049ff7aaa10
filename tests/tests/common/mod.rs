//! What the scenarios share.
#![allow(dead_code, reason = "each scenario uses a part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use umbra_tests::assets::Assets;
use umbra_tests::bench::{Bench, BenchSpec, brake, limit, patience, tell_at_once};
use umbra_tests::demo::attempts;
use umbra_tests::demo::machine::MachineSpec;
use umbra_tests::demo::place::Place;
use umbra_tests::peer::{guest_address, peer_address};
use umbra_tests::suite::Needed;

/// Longest time in which nothing may move during a single step, as on the reference machine (`umbra_tests::bench::patience`).
pub const STEP: Duration = Duration::from_secs(60);
/// The same during a recovery or the boot of a standby.
pub const RECOVERY: Duration = Duration::from_secs(90);
/// Longest life of a scenario's test host, more than twice that of the longest one.
const LONGEST: Duration = Duration::from_secs(8 * 60);

/// Set to 1 to leave out what needs QEMU.
const SKIP: &str = "UMBRA_SKIP_BENCH";
/// Set to 1 to leave out what needs to be root.
const SKIP_ROOT: &str = "UMBRA_SKIP_ROOT";

/// The user asked for no scenarios.
pub fn skipped() -> bool {
    is_set(SKIP)
}

/// The user asked for nothing that needs root; fails where that is needed and not there.
pub fn skipped_without_root() -> bool {
    let skip = is_set(SKIP_ROOT);
    assert!(skip || nix::unistd::geteuid().is_root(), "this test needs root; {SKIP_ROOT}=1 leaves it out");
    skip
}

fn is_set(variable: &str) -> bool {
    let set = std::env::var(variable).is_ok_and(|value| value == "1");
    if set {
        eprintln!("skipped: {variable}=1");
    }
    set
}

/// What the command printed; it has to end with status 0.
#[track_caller]
pub fn done(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{stdout}{stderr}");
    stdout.into_owned()
}

/// Makes the packages in `folder`, of the programs that are built: the programs', and the one with debug symbols.
pub fn packages(folder: &Path, mask: &str) -> [PathBuf; 2] {
    // Two tests make them, in processes of their own.
    let lock = "exec 9>target/packaging.lock; flock 9";
    let script = format!("{lock}; umask {mask}; make -s packages DEBS={}", folder.display());
    let repository = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    done(Command::new("sh").args(["-c", &script]).current_dir(repository).env_remove("DESTDIR"));
    let version = env!("CARGO_PKG_VERSION");
    ["umbra", "umbra-dbgsym"].map(|name| folder.join(format!("{name}_{version}_amd64.deb")))
}

/// Runs a scenario, unless the user leaves them out. Where the test host is emulated, a failure is shown at once and the
/// scenario run again, [`attempts::ATTEMPTS`] times in all; on real KVM the first failure counts. How many attempts were needed,
/// and why, is in the suite's closing lines.
pub fn scenario(run: impl Fn() + std::panic::RefUnwindSafe) {
    if skipped() {
        return;
    }
    let attempts = attempts::allowed();
    let start = Instant::now();
    let note = |failures, ok| {
        let seconds = start.elapsed().as_secs_f64();
        Needed { scenario: this_scenario(), failures, ok, seconds }.note();
    };
    let mut failures = Vec::new();
    limit::at_most(LONGEST);
    for attempt in 1..=attempts {
        let begin = Instant::now();
        let Err(panic) = std::panic::catch_unwind(&run) else { return note(failures, true) };
        // What goes on without end would do so again.
        let is_last = attempt == attempts || limit::was_exceeded();
        let again = if is_last { "given up" } else { "once more" };
        let why = format!("after {:.0} s ({})", begin.elapsed().as_secs_f64(), first_line(panic.as_ref()));
        tell_at_once(&format!("{}: attempt {attempt} of {attempts} failed {why}; {again}", this_scenario()));
        failures.push(why);
        if is_last {
            note(failures, false);
            std::panic::resume_unwind(panic);
        }
    }
}

/// The test hosts of this scenario may live for so much longer, as on the reference machine: it was asked for more than usual.
pub fn longer_by(more: Duration) {
    limit::at_most(LONGEST + more);
}

/// The first line of a panic's message.
fn first_line(panic: &(dyn std::any::Any + Send)) -> &str {
    let literal = || panic.downcast_ref::<&str>().copied();
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(literal);
    text.and_then(|text| text.lines().next()).unwrap_or("no message")
}

/// As [`scenario`], as on a machine so much slower: `speed` is a share of this one's.
pub fn braked(speed: f64, run: impl Fn() + std::panic::RefUnwindSafe) {
    brake::at_most(speed);
    scenario(run);
}

/// Target and test, as far as the runner names its threads.
fn this_scenario() -> String {
    let thread = std::thread::current();
    let test = thread.name().filter(|name| *name != "main");
    test.map_or_else(|| env!("CARGO_CRATE_NAME").into(), |test| format!("{}: {test}", env!("CARGO_CRATE_NAME")))
}

/// A limit of an outage, ms, as it is on this machine: the figures in scenarios are those of the reference machine.
pub fn most_ms(reference: f64) -> f64 {
    reference * patience::factor()
}

pub fn say(what: &str) {
    eprintln!("    {what}");
}

pub fn assets() -> Assets {
    Assets::prepare(&say).unwrap_or_else(|e| panic!("the bench cannot be set up: {}", chain(&e)))
}

/// An error with its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(&format!(": {inner}"));
        cause = inner.source();
    }
    text
}

/// Unwraps with the whole story.
pub trait OrTell<T> {
    fn or_tell(self) -> T;
}

impl<T, E: std::error::Error> OrTell<T> for Result<T, E> {
    #[track_caller]
    fn or_tell(self) -> T {
        match self {
            Ok(value) => value,
            Err(e) => panic!("{}", chain(&e)),
        }
    }
}

/// How often the link of the guest `web` has gone up or down.
pub fn carrier_changes(place: &mut Place) -> u32 {
    let said = place.in_guest("web", "cat /sys/class/net/e*/carrier_changes", STEP).or_tell();
    said.trim().parse().unwrap()
}

/// The guest `web` exchanges a datagram with the peer.
pub fn guest_reaches_peer(place: &mut Place) {
    let script = format!("umbra-probe first-answer {} 20", peer_address(0));
    place.in_guest("web", &script, STEP).or_tell();
}

/// A test host with one NIC bound to vfio-pci, and a machine file's content for it.
pub fn place_with(name: &str, nic: &str) -> (Place, MachineSpec) {
    place_in(BenchSpec::new(name).nics(&[nic]))
}

/// As [`place_with`], in a test host like this, with its first NIC.
pub fn place_in(mut spec: BenchSpec) -> (Place, MachineSpec) {
    let assets = assets();
    let image = assets.driver_image(&spec.nics[0]).or_tell();
    spec.files.push(image.clone());
    let mut bench = Bench::boot(spec, &assets).or_tell();
    let device = bench.expect("vfio $NIC0 && printf %s $NIC0", STEP).or_tell();
    let image = image.file_name().unwrap().to_str().unwrap();
    let machine = MachineSpec::one_guest(&device, image, &format!("{}/24", guest_address(0, 0)));
    (Place::Bench(Box::new(bench)), machine)
}
