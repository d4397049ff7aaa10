//! `umbra-bench outages`: many crashes of one driver VM, each outage as the guest's peer saw it and its parts, beside the
//! bare re-initialisation of the same driver in the same run of the test host.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::{GUEST, answer};
use crate::assets::{Assets, Say};
use crate::bench::{Bench, BenchSpec, Model};
use crate::demo::machine::{Attach, Machine, MachineSpec, NIC_DRIVER};
use crate::demo::outage::longest;
use crate::demo::place::Place;
use crate::demo::{DemoError, attempts};
use crate::peer::{guest_address, now_us, peer_address};
use crate::probe::reinit::Reinit;

/// Longest time for one recovery, or for a standby to be ready.
const LIMIT: Duration = Duration::from_secs(120);
/// Ticks are watched for so long around an outage.
const AROUND: Duration = Duration::from_millis(400);

/// Ticks for outages of a few milliseconds: as often as the timers of an emulated test host go.
const FINE_TICK_MS: &str = "4";

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct OutagesSpec {
    /// The NIC model.
    pub nic: Model,
    /// Crashes.
    pub crashes: u32,
    /// Bare re-initialisations.
    pub reinits: u32,
    /// `warm`, `snapshot` or `cold`.
    pub standby: String,
    /// The model of the hot spare, if there is one.
    pub spare: Option<Model>,
    /// `kill -9`, not panics.
    pub kill: bool,
}

impl OutagesSpec {
    fn ahead(&self) -> String {
        let how = if self.kill { ", kill -9" } else { "" };
        match &self.spare {
            Some(spare) => format!("hot spare {spare}{how}"),
            None => format!("{} standby{how}", self.standby),
        }
    }
}

/// The parts of a recovery in Umbra's events, in order.
pub(super) const PARTS: [&str; 10] = [
    "detect_ms",
    "fence_ms",
    "reset_ms",
    "back_off_ms",
    "boot_ms",
    "plug_ms",
    "probe_ms",
    "setup_ms",
    "link_ms",
    "replay_ms",
];

/// Some figures in ms.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// What was measured.
    pub name: String,
    /// How often.
    pub runs: usize,
    /// The middle one.
    pub p50: f64,
    /// 95 of 100 are at most this.
    pub p95: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    pub(super) fn of(name: &str, mut figures: Vec<f64>) -> Option<Self> {
        figures.sort_by(f64::total_cmp);
        let at = |percent: usize| figures.get((figures.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        Some(Self { name: name.into(), runs: figures.len(), p50: at(50)?, p95: at(95)?, max: at(100)? })
    }

    /// Of each part of recoveries.
    pub(super) fn of_parts(each: &[Value]) -> Vec<Self> {
        let part = |part: &&str| {
            let of_each = each.iter().filter_map(|parts| parts.get(part).and_then(Value::as_f64)).collect();
            Self::of(&format!("  {}", part.trim_end_matches("_ms")), of_each)
        };
        PARTS.iter().filter_map(part).collect()
    }

    /// The heading of a table of them.
    pub(super) fn heading(what: &str) -> String {
        format!("\n{what:<30}{:>6}{:>10}{:>10}{:>10}\n", "runs", "p50 ms", "p95 ms", "max ms")
    }

    /// A line of it.
    pub(super) fn line(&self) -> String {
        let Self { name, runs, p50, p95, max } = self;
        format!("{name:<30}{runs:>6}{p50:>10.1}{p95:>10.1}{max:>10.1}\n")
    }
}

/// All of one NIC.
#[derive(Clone, Debug, Serialize)]
pub struct Outages {
    /// QEMU's model.
    pub nic: String,
    /// What stood ready: `warm standby`, `hot spare igb`.
    pub ahead: String,
    /// The outage as the peer saw it, as Umbra counts it, its parts; the longest silence of the same ticks in as long a time
    /// without a crash; the bare re-initialisation.
    pub figures: Vec<Spread>,
    /// The first by the last: medians.
    pub ratio: Option<f64>,
    /// Each recovery's parts, as Umbra told them.
    pub each: Vec<Value>,
}

/// What one or several boots of the test host have shown.
#[derive(Default)]
struct Taken {
    /// Gaps at the peer, ms.
    seen: Vec<f64>,
    /// The longest in as long a time without a crash, ms.
    quiet: Vec<f64>,
    /// Outages as Umbra counts them, ms.
    told: Vec<f64>,
    /// Their parts.
    each: Vec<Value>,
    bare: Vec<Reinit>,
}

/// Takes the measurements. An emulated test host that fails midway is booted again, and what it has shown is kept.
///
/// # Errors
/// One could not be made.
pub fn run(spec: &OutagesSpec, say: Say<'_>) -> Result<Outages, DemoError> {
    let assets = Assets::prepare(say)?;
    let mut taken = Taken::default();
    let mut barren = 0;
    loop {
        let before = taken.each.len();
        let Err(error) = boot(spec, &assets, &mut taken, say) else { return Ok(Outages::new(spec, taken)) };
        let crashes = taken.each.len();
        barren = if crashes > before { 0 } else { barren + 1 };
        if !error.may_be_emulation() || barren >= attempts::allowed() || attempts::allowed() == 1 {
            return Err(error);
        }
        say(&format!("{:#}", anyhow::Error::new(error)));
        say(&format!("the emulated test host failed after {crashes} crashes; another goes on"));
    }
}

/// One boot of the test host: bare re-initialisations, then the crashes that are left.
fn boot(spec: &OutagesSpec, assets: &Assets, taken: &mut Taken, say: Say<'_>) -> Result<(), DemoError> {
    say(&format!("booting the test host with a {}", spec.nic));
    let (mut place, machine) = place(assets, ("outages", None), &spec.nic, spec.spare.as_ref())?;
    let machine = MachineSpec { restart_limit: spec.crashes + 3, standby: spec.standby.clone(), ..machine };
    if spec.spare.is_none() && spec.reinits > 0 {
        say(&format!("{} bare re-initialisations, the NIC passed straight to the guest", spec.reinits));
        reinits(&mut place, &machine, spec.reinits, &mut taken.bare)?;
    }

    say(&format!("{} crashes, {}", spec.crashes, spec.ahead()));
    let mut running = Machine::start(&mut place, &machine)?;
    let script = format!("umbra-probe first-answer {} 30", peer_address(0));
    place.in_guest(GUEST, &script, Duration::from_secs(60))?;
    let every = if spec.spare.is_some() { FINE_TICK_MS } else { "10" };
    let ticks = format!("umbra-probe tick {} {every} </dev/null >/dev/null 2>&1 & echo", peer_address(0));
    place.in_guest(GUEST, &ticks, Duration::from_secs(20))?;
    // What says that all is ready for a failure.
    let ready = match spec.standby.as_str() {
        "snapshot" => Some("snapshot-ready"),
        standby => (spec.spare.is_some() || standby == "warm").then_some("standby-ready"),
    };
    for n in taken.each.len()..spec.crashes as usize {
        let (without, peer_ms, live) = crash(&mut running, &mut place, (ready, spec.kill), n)?;
        say(&match peer_ms {
            Some(ms) => format!("  {}: {ms:.0} ms at the peer", n + 1),
            None => format!("  {}: the guest's ticks do not reach the peer any more", n + 1),
        });
        taken.quiet.extend(without);
        taken.seen.extend(peer_ms);
        taken.told.extend(live.get("outage_ms").and_then(Value::as_f64));
        taken.each.push(live.get("parts").cloned().unwrap_or_default());
    }
    running.stop(&mut place)
}

/// A test host with a NIC, and perhaps a spare on the same network, and a machine that uses them; with captures of so many
/// bytes of each frame, which cost time.
///
/// # Errors
/// The test host does not come up.
pub fn place(
    assets: &Assets,
    (name, capture): (&str, Option<u32>),
    nic: &Model,
    spare: Option<&Model>,
) -> Result<(Place, MachineSpec), DemoError> {
    let mut bench = BenchSpec::new(name);
    bench.nics = std::iter::once(nic).chain(spare).cloned().collect();
    bench.one_wire = spare.is_some();
    bench.capture = capture;
    let image = assets.image_for(&bench.nics)?;
    bench.files = vec![image.clone()];
    let mut bench = Bench::boot(bench, assets)?;
    let mut bind = |nic: &str| bench.expect(&format!("vfio ${nic} && printf %s ${nic}"), Duration::from_secs(30));
    let device = bind("NIC0")?;
    let spare = spare.map(|_| bind("NIC1")).transpose()?;
    let image = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let machine = MachineSpec::one_guest(&device, &image, &format!("{}/24", guest_address(0, 0)));
    Ok((Place::Bench(Box::new(bench)), MachineSpec { spare, ..machine }))
}

/// One crash: the longest gap at the peer just before it and around it, and the event of the next life.
fn crash(
    running: &mut Machine,
    place: &mut Place,
    (ready, kill): (Option<&str>, bool),
    n: usize,
) -> Result<(Option<f64>, Option<f64>, Value), DemoError> {
    if let Some(ready) = ready {
        running.await_event(LIMIT, |event| event.event == ready)?;
    }
    let how =
        if kill { format!("kill -9 {}", running.driver_pid(place, NIC_DRIVER)?) } else { "umbra crash nic0".into() };
    // Not always at the same distance from heartbeats and timers.
    std::thread::sleep(AROUND + Duration::from_millis((n % 7) as u64 * 37));
    place.peer().take_ticks()?;
    std::thread::sleep(2 * AROUND);
    let before = place.peer().take_ticks()?;
    let quiet = longest(&before, guest_address(0, 0), 0, u64::MAX).map(|outage| outage.gap_ms);
    std::thread::sleep(AROUND);
    let begin = now_us() - 300_000;
    place.expect(&how, Duration::from_secs(20))?;
    let live = running.await_event(LIMIT, |event| event.event == "driver-live")?;
    let (mut arrived, start) = (Vec::new(), Instant::now());
    while start.elapsed() < AROUND {
        std::thread::sleep(Duration::from_millis(50));
        arrived.extend(place.peer().take_ticks()?);
    }
    let gap = longest(&arrived, guest_address(0, 0), begin, u64::MAX).map(|outage| outage.gap_ms);
    Ok((quiet, gap, Value::Object(live.fields)))
}

fn reinits(place: &mut Place, machine: &MachineSpec, runs: u32, taken: &mut Vec<Reinit>) -> Result<(), DemoError> {
    let straight = MachineSpec { attach: Attach::Passthrough, ..machine.clone() };
    let running = Machine::start(place, &straight)?;
    let script = format!("umbra-probe reinit {}/24 {}", guest_address(0, 0), peer_address(0));
    for _ in 0..runs {
        taken.push(answer(place, &script, Duration::from_secs(60))?);
    }
    running.stop(place)
}

impl Outages {
    fn new(spec: &OutagesSpec, taken: Taken) -> Self {
        let Taken { seen, quiet, told, each, bare } = taken;
        let mut figures: Vec<_> = Spread::of("outage seen by the peer", seen).into_iter().collect();
        figures.extend(Spread::of("longest silence without crash", quiet));
        figures.extend(Spread::of("outage as Umbra counts it", told));
        figures.extend(Spread::of_parts(&each));
        figures.extend(Spread::of("bare re-initialisation", bare.iter().map(|run| run.total_ms).collect()));
        figures.extend(Spread::of("  unbind and bind", bare.iter().map(|run| run.bind_ms).collect()));
        let p50 = |name: &str| figures.iter().find(|spread| spread.name == name).map(|spread| spread.p50);
        let ratio = p50("outage seen by the peer").zip(p50("bare re-initialisation"));
        let ratio = ratio.map(|(outage, bare)| outage / bare);
        Self { nic: spec.nic.to_string(), ahead: spec.ahead(), figures, ratio, each }
    }

    /// For people.
    pub fn table(&self) -> String {
        let head = format!("{}, {}", self.nic, self.ahead);
        let mut text = Spread::heading(&head);
        text.extend(self.figures.iter().map(Spread::line));
        if let Some(ratio) = self.ratio {
            text.push_str(&format!("{:<30}{ratio:>16.2}\n", "outage : re-initialisation"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_figures_that_were_measured() {
        let spread = Spread::of("x", (1..=30).rev().map(f64::from).collect()).unwrap();
        assert_eq!((spread.p50, spread.p95, spread.max, spread.runs), (15.0, 29.0, 30.0, 30));
        assert_eq!(Spread::of("x", vec![7.0]).unwrap().p95, 7.0);
        assert!(Spread::of("x", Vec::new()).is_none());
    }
}
