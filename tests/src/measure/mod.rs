//! `make bench`: what the detour through a driver VM costs and how long an outage is, beside what one would have
//! otherwise. All figures of a NIC come from one boot of the test host, so that their ratios mean something; on an
//! emulated machine the figures themselves do not.

pub mod compare;
mod memory;
mod outage;
pub mod outages;
mod qemu_guest;
pub mod rebirth;
mod results;
pub mod slice;
pub mod soak;
pub mod sound;

use std::time::Duration;

use crate::assets::{Assets, Say};
use crate::bench::guest::Guest;
use crate::bench::{Bench, BenchSpec, Model};
use crate::demo::DemoError;
use crate::demo::machine::{Attach, Machine, MachineSpec, NIC_DRIVER};
use crate::demo::place::Place;
use crate::peer::{guest_address, peer_address};
use crate::probe::net::{Bulk, RoundTrips};
pub use results::{Memory, OutageFigures, PathFigures, Results};

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct MeasureSpec {
    /// The NIC model.
    pub nic: Model,
    /// Length of each transfer.
    pub seconds: u32,
    /// Crashes for the outage figures.
    pub crashes: u32,
    /// Look for the smallest memory of a driver VM.
    pub smallest: bool,
}

/// Round trips that are measured on each path.
const ROUND_TRIPS: u32 = 300;

/// How often the path through the driver VM is measured until nothing fails meanwhile.
const ATTEMPTS: u32 = 3;
/// Longest time for a standby to be ready.
const STANDBY: Duration = Duration::from_secs(120);

/// The guest's name on every path.
const GUEST: &str = "web";

/// Takes all measurements.
///
/// # Errors
/// One could not be made.
pub fn run(spec: &MeasureSpec, say: Say<'_>) -> Result<Results, DemoError> {
    let assets = Assets::prepare(say)?;
    let image = assets.driver_image(&spec.nic)?;
    let mut bench = BenchSpec::new("measure");
    bench.nics = vec![spec.nic.clone()];
    // Captures cost time on the machine that is measured.
    bench.capture = None;
    bench.files = vec![image.clone()];
    say(&format!("booting the test host with a {}", spec.nic));
    let mut bench = Bench::boot(bench, &assets)?;
    qemu_guest::carry(&bench.share().join("qemu"), &assets)?;
    let device = bench.expect("vfio $NIC0 && printf %s $NIC0", Duration::from_secs(30))?;
    let image = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let machine = MachineSpec {
        restart_limit: spec.crashes + 3,
        ..MachineSpec::one_guest(&device, &image, &format!("{}/24", guest_address(0, 0)))
    };
    let mut place = Place::Bench(Box::new(bench));
    let mut results = Results::new(&spec.nic);

    say("(a) the guest behind a driver VM");
    let mut running = Machine::start(&mut place, &machine)?;
    results.paths.push(through_driver_vm(&mut running, &mut place, spec, say)?);
    results.memory = memory::resident(&mut running, &mut place)?;
    say(&format!("    {} crashes", spec.crashes));
    results.outage = outage::measure(&mut running, &mut place, spec.crashes, say)?;
    running.stop(&mut place)?;

    say("(b) the NIC passed straight to the guest");
    let straight = MachineSpec { attach: Attach::Passthrough, ..machine.clone() };
    let running = Machine::start(&mut place, &straight)?;
    results.paths.push(path("passthrough", &mut place, spec, say)?);
    results.reinit = outage::reinit(&mut place)?;
    running.stop(&mut place)?;

    if spec.smallest {
        say("the smallest memory that the driver VM boots in");
        results.smallest_mib = memory::smallest(&mut place, &machine, say)?;
    }
    for (name, vhost) in [("QEMU, TAP and bridge", "off"), ("QEMU, vhost-net and bridge", "on")] {
        say(&format!("(c) {name}, on the host's own driver"));
        let guest = qemu_guest::start(&mut place, &device, vhost)?;
        results.paths.push(path(name, &mut place, spec, say)?);
        guest.stop(&mut place)?;
    }
    Ok(results)
}

/// The path through the driver VM, with nothing failing meanwhile: else it is measured again.
fn through_driver_vm(
    running: &mut Machine,
    place: &mut Place,
    spec: &MeasureSpec,
    say: Say<'_>,
) -> Result<PathFigures, DemoError> {
    for _ in 1..ATTEMPTS {
        running.await_standby(NIC_DRIVER, STANDBY)?;
        let before = running.seen.len();
        let figures = path("driver VM", place, spec, say)?;
        running.drain();
        let Some(failed) = running.seen[before..].iter().find(|event| event.event == "driver-failed") else {
            return Ok(figures);
        };
        say(&format!("    the driver VM failed meanwhile ({}); measured again", failed.text("reason")));
    }
    running.await_standby(NIC_DRIVER, STANDBY)?;
    path("driver VM", place, spec, say)
}

fn path(name: &str, place: &mut Place, spec: &MeasureSpec, say: Say<'_>) -> Result<PathFigures, DemoError> {
    let peer = peer_address(0);
    let limit = Duration::from_secs(u64::from(spec.seconds) + 60);
    place.in_guest(GUEST, &format!("umbra-probe first-answer {peer} 30"), limit)?;
    let send: Bulk = answer(place, &format!("umbra-probe send {peer} {}", spec.seconds), limit)?;
    let receive: Bulk = answer(place, &format!("umbra-probe receive {peer} {}", spec.seconds), limit)?;
    let round_trips: RoundTrips = answer(place, &format!("umbra-probe ping {peer} {ROUND_TRIPS}"), limit)?;
    let (send_mbit_s, receive_mbit_s) = (send.mbit_s(), receive.mbit_s());
    say(&format!(
        "    sends {send_mbit_s:.0} Mbit/s, receives {receive_mbit_s:.0} Mbit/s, round trip {} us (median)",
        round_trips.p50_us
    ));
    Ok(PathFigures { name: name.into(), send_mbit_s, receive_mbit_s, round_trips })
}

/// Runs a script in the guest and reads the JSON that it prints.
fn answer<T: for<'a> serde::Deserialize<'a>>(place: &mut Place, script: &str, limit: Duration) -> Result<T, DemoError> {
    answer_of(place, GUEST, script, limit)
}

/// The same in guest `guest`.
fn answer_of<T: for<'a> serde::Deserialize<'a>>(
    place: &mut Place,
    guest: &str,
    script: &str,
    limit: Duration,
) -> Result<T, DemoError> {
    let text = place.expect(&Guest::command(guest, script, limit), limit + Duration::from_secs(10))?;
    serde_json::from_str(&text)
        .map_err(|e| DemoError::Umbra { what: format!("`{script}` gave no figures: {e}"), said: text })
}
