//! `make bench`: what the detour through a driver VM costs and how long an outage is, beside what one would have
//! otherwise. All figures of a NIC come from one boot of the test host, and speeds are taken in turns, so that their ratios mean
//! something; on an emulated machine the figures themselves do not.

pub mod compare;
pub mod disk;
mod memory;
mod outage;
pub mod outages;
mod paths;
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
use crate::demo::place::Place;
use paths::Way;
pub use results::{Memory, OutageFigures, PathFigures, Results};

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct MeasureSpec {
    /// The NIC model.
    pub nic: Model,
    /// Rounds of all paths; every other one in reversed order.
    pub rounds: u32,
    /// Length of each transfer.
    pub seconds: u32,
    /// Crashes for the outage figures.
    pub crashes: u32,
    /// Look for the smallest memory of a driver VM.
    pub smallest: bool,
}

/// Longest time for a standby to be ready.
const STANDBY: Duration = Duration::from_secs(120);

/// The guest's name, where there is one only.
const GUEST: &str = "web";

/// Takes all measurements.
///
/// # Errors
/// One could not be made.
pub fn run(spec: &MeasureSpec, say: Say<'_>) -> Result<Results, DemoError> {
    let assets = Assets::prepare(say)?;
    let image = assets.driver_image(&spec.nic)?;
    let mut bench = BenchSpec::new("measure");
    bench.nics = vec![spec.nic.clone(); Way::ALL.len()];
    // Captures cost time on the machine that is measured.
    bench.capture = None;
    bench.files = vec![image.clone()];
    say(&format!("booting the test host with {} {}", bench.nics.len(), spec.nic));
    let bench = Bench::boot(bench, &assets)?;
    qemu_guest::carry(&bench.share().join("qemu"), &assets)?;
    let image = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut place = Place::Bench(Box::new(bench));
    let mut results = Results::new(&spec.nic);

    let machine = paths::machine(&mut place, &image, spec.crashes + 3)?;
    let [mut running, straight] = paths::measure((&mut place, &machine), spec, &mut results, say)?;
    results.reinit = outage::reinit(&mut place, (Way::Passthrough.guest(), Way::Passthrough.nic()))?;
    straight.stop(&mut place)?;
    results.memory = memory::resident(&mut running, &mut place)?;
    say(&format!("{} crashes", spec.crashes));
    results.outage = outage::measure(&mut running, &mut place, spec.crashes, say)?;
    running.stop(&mut place)?;
    if spec.smallest {
        say("the smallest memory that the driver VM boots in");
        results.smallest_mib = memory::smallest(&mut place, &machine, say)?;
    }
    Ok(results)
}

/// Ticks of the place's processors, 10 ms each: those used, and all.
fn processor_ticks(place: &mut Place) -> Result<(f64, f64), DemoError> {
    let text = place.expect("head -n 1 /proc/stat", Duration::from_secs(60))?;
    // The first eight; the time of guests, behind them, is part of these.
    let ticks: Vec<f64> = text.split_whitespace().skip(1).take(8).filter_map(|word| word.parse().ok()).collect();
    let (all, idle) = (ticks.iter().sum::<f64>(), ticks.iter().skip(3).take(2).sum::<f64>());
    Ok((all - idle, all))
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
