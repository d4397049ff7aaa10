//! What the scenarios share.
#![allow(dead_code, reason = "each scenario uses a part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::time::{Duration, Instant};

use umbra_tests::assets::Assets;
use umbra_tests::bench::{Bench, BenchSpec, brake, patience};
use umbra_tests::demo::attempts;
use umbra_tests::demo::machine::MachineSpec;
use umbra_tests::demo::place::Place;
use umbra_tests::peer::{guest_address, peer_address};
use umbra_tests::suite::Needed;

/// Longest time in which nothing may move during a single step, as on the reference machine (`umbra_tests::bench::patience`).
pub const STEP: Duration = Duration::from_secs(60);
/// The same during a recovery or the boot of a standby.
pub const RECOVERY: Duration = Duration::from_secs(150);

/// Set to 1 to leave out what needs QEMU.
const SKIP: &str = "UMBRA_SKIP_BENCH";

/// The user asked for no scenarios.
pub fn skipped() -> bool {
    let skip = std::env::var(SKIP).is_ok_and(|value| value == "1");
    if skip {
        eprintln!("skipped: {SKIP}=1");
    }
    skip
}

/// Runs a scenario, unless the user leaves them out. Where the test host is emulated, a failure is shown and the
/// scenario run again, [`attempts::ATTEMPTS`] times in all; on real KVM the first failure counts. How many attempts were needed
/// is in the suite's closing lines.
pub fn scenario(run: impl Fn() + std::panic::RefUnwindSafe) {
    if skipped() {
        return;
    }
    let attempts = attempts::allowed();
    let start = Instant::now();
    let note = |attempts, ok| {
        let seconds = start.elapsed().as_secs_f64();
        Needed { scenario: this_scenario(), attempts, ok, seconds }.note();
    };
    for attempt in 1..=attempts {
        match std::panic::catch_unwind(&run) {
            Ok(()) => return note(attempt, true),
            Err(panic) if attempt == attempts => {
                note(attempt, false);
                std::panic::resume_unwind(panic);
            }
            Err(_) => say(&format!("attempt {attempt} of {attempts} failed on an emulated machine (above); once more")),
        }
    }
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
