//! Builds of Umbra in one boot of the test host, each with a NIC or a disk controller, a driver VM and a guest of its own, measured in
//! turns.
//!
//! All machines run all the time, so that a round has no boot in it, and what a machine takes while nothing is asked of it burdens all
//! alike. Every other round is in reversed order. Figures are compared round by round: what the host does in a minute moves all of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::disk;
use super::outages::PARTS;
use super::slice::{Kind, Slice};
use crate::assets::{Assets, Say};
use crate::bench::{Bench, BenchSpec, Model, Storage};
use crate::demo::DemoError;
use crate::demo::machine::{Attach, DISK_DRIVER, DiskController, Machine, MachineSpec, NIC_DRIVER};
use crate::demo::place::Place;
use crate::peer::{guest_address, peer_address};

/// What is to be compared.
#[derive(Clone, Debug)]
pub struct CompareSpec {
    /// The builds; the first is what the others are compared with.
    pub builds: Vec<Build>,
    /// What each has.
    pub device: Device,
    /// Disks say that they have no volatile cache.
    pub hides_cache: bool,
    /// Rounds.
    pub rounds: u32,
    /// Length of each transfer.
    pub seconds: u32,
    /// Crashes of each driver VM after that, under writes where it is one of disks.
    pub crashes: u32,
}

/// A device of the test host, and how its machine has it.
#[derive(Clone, Debug)]
pub enum Device {
    /// A NIC behind a driver VM.
    Nic(Model),
    /// A disk controller behind a driver VM.
    Disk(Model),
    /// The block device of the test host's own driver, for a disk with `path`.
    HostDisk(Model),
}

/// Size of a disk, bytes.
const BYTES: u64 = 256 << 20;

impl Device {
    fn model(&self) -> &Model {
        let (Self::Nic(model) | Self::Disk(model) | Self::HostDisk(model)) = self;
        model
    }

    fn kinds(&self) -> &'static [Kind] {
        if matches!(self, Self::Nic(_)) { &Kind::ALL } else { &Kind::OF_DISK }
    }

    /// So many of them in a test host; disks that say that they have no volatile cache, if `hides_cache`.
    fn put_into(&self, bench: &mut BenchSpec, count: usize, hides_cache: bool) {
        let (nics, disks) = if matches!(self, Self::Nic(_)) { (count, 0) } else { (0, count) };
        bench.nics = vec![self.model().clone(); nics];
        bench.storage = vec![Storage { hides_cache, ..Storage::empty(self.model().name(), BYTES) }; disks];
    }
}

/// A build, and how it is used.
#[derive(Clone, Debug)]
pub struct Build {
    /// The folder with its programs.
    pub folder: PathBuf,
    /// A line for its driver VM in the machine file.
    pub driver_line: String,
    /// A line for its guest's disk.
    pub disk_line: String,
}

/// Names of the builds: of their machines, guests and files.
const LABELS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// All slices, by build.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// QEMU's model.
    device: String,
    /// What was measured.
    #[serde(skip)]
    kinds: &'static [Kind],
    /// By build, in the order of the rounds.
    builds: Vec<Vec<Slice>>,
    /// By build, in the order of the crashes: [`OUTAGE`] and its parts, ms.
    outages: Vec<Vec<BTreeMap<String, f64>>>,
}

/// Takes all measurements.
///
/// # Errors
/// One could not be made.
pub fn run(spec: &CompareSpec, say: Say<'_>) -> Result<Comparison, DemoError> {
    let assets = Assets::prepare(say)?;
    let mut bench = BenchSpec::new("compare");
    spec.device.put_into(&mut bench, spec.builds.len(), spec.hides_cache);
    // Captures cost time on the machine that is measured.
    bench.capture = None;
    let mut images = Vec::new();
    for (build, label) in spec.builds.iter().zip(LABELS) {
        let (programs, image) = assets.other_build(&build.folder, label, spec.device.model())?;
        images.push(image.file_name().unwrap_or_default().to_string_lossy().into_owned());
        bench.files.extend([programs, image]);
    }
    say(&format!("booting the test host with {} {}", spec.builds.len(), spec.device.model()));
    let mut place = Place::Bench(Box::new(Bench::boot(bench, &assets)?));
    let mut machines = Vec::new();
    for (n, (build, image)) in spec.builds.iter().zip(&images).enumerate() {
        say(&format!("starting the machine of build {}", LABELS[n]));
        machines.push(start(&mut place, spec, (n, image), build)?);
    }
    let mut builds = vec![Vec::new(); machines.len()];
    for round in 0..spec.rounds {
        say(&format!("round {} of {}", round + 1, spec.rounds));
        for &kind in spec.device.kinds() {
            for turn in 0..machines.len() {
                let n = if round % 2 == 0 { turn } else { machines.len() - 1 - turn };
                let slice = Slice::take((Some(&mut machines[n]), &mut place), (LABELS[n], n), kind, spec.seconds)?;
                builds[n].push(slice);
            }
        }
    }
    for (machine, label) in machines.iter_mut().zip(LABELS) {
        machine.drain();
        if let Some(failed) = machine.seen.iter().find(|event| event.event == "driver-failed") {
            let what = format!("the driver VM of build {label} failed meanwhile: {}", failed.text("reason"));
            return Err(DemoError::Umbra { what, said: machine.said() });
        }
    }
    let outages = outages(&mut place, &mut machines, spec, say)?;
    machines.into_iter().try_for_each(|machine| machine.stop(&mut place))?;
    Ok(Comparison { outages, device: spec.device.model().to_string(), kinds: spec.device.kinds(), builds })
}

/// Name of a whole outage beside those of its parts.
const OUTAGE: &str = "outage_ms";
/// Longest time for a standby or a recovery.
const LIMIT: Duration = Duration::from_secs(120);

/// Has the driver VMs crash in turns, each with a standby ready.
fn outages(
    place: &mut Place,
    machines: &mut [Machine],
    spec: &CompareSpec,
    say: Say<'_>,
) -> Result<Vec<Vec<BTreeMap<String, f64>>>, DemoError> {
    let mut all = vec![Vec::new(); machines.len()];
    let is_nic = matches!(spec.device, Device::Nic(_));
    if spec.crashes > 0 && !is_nic {
        for label in &LABELS[..machines.len()] {
            let load = "umbra-probe io /dev/vda write 4096 4 100000 </dev/null >/dev/null 2>&1 & echo";
            place.in_guest(label, load, LIMIT)?;
        }
    }
    let (driver, work) = (if is_nic { NIC_DRIVER } else { DISK_DRIVER }, place.work());
    for round in 0..spec.crashes {
        say(&format!("crash {} of {}", round + 1, spec.crashes));
        for turn in 0..machines.len() {
            let n = if round % 2 == 0 { turn } else { machines.len() - 1 - turn };
            // All of them: a boot beside it would be measured too.
            machines.iter_mut().try_for_each(|machine| machine.await_standby(driver, LIMIT))?;
            let label = LABELS[n];
            place.expect(&format!("{work}/umbra-{label} crash {driver} --name {label}"), LIMIT)?;
            let live = machines[n].await_live(driver, LIMIT)?;
            let parts = live.fields.get("parts").and_then(Value::as_object).into_iter().flatten();
            let part = |(name, value): (&String, &Value)| Some((name.clone(), value.as_f64()?));
            let whole = live.number(OUTAGE).map(|ms| (OUTAGE.to_owned(), ms));
            all[n].push(parts.filter_map(part).chain(whole).collect());
        }
    }
    Ok(all)
}

/// Starts machine `n`, with the image of its driver VM.
fn start(
    place: &mut Place,
    spec: &CompareSpec,
    (n, image): (usize, &str),
    build: &Build,
) -> Result<Machine, DemoError> {
    let (on, label) = (&spec.device, LABELS[n]);
    let (work, share, copy) = (place.work(), place.share_inside(), place.copy());
    let fetch = format!("mkdir -p {work} && {copy} {share}/{label}/umbra {work}/umbra-{label}");
    place.expect(&fetch, Duration::from_secs(60))?;
    let mut take = |script: &str| place.expect(script, Duration::from_secs(30));
    let machine = |device: &str, address: &str| MachineSpec {
        name: label.into(),
        program: format!("{work}/umbra-{label}"),
        guests: vec![(label.into(), address.into())],
        // Its boot would be measured too.
        standby: if spec.crashes > 0 { "warm" } else { "cold" }.into(),
        snapshots: false,
        restart_limit: spec.crashes + 1,
        attach: Attach::Without,
        driver_options: build.driver_line.clone(),
        ..MachineSpec::one_guest(device, image, address)
    };
    let machine = match on {
        Device::Nic(_) => {
            let device = take(&format!("vfio $NIC{n} && printf %s $NIC{n}"))?;
            let spec = machine(&device, &format!("{}/24", guest_address(n, 0)));
            MachineSpec { attach: Attach::DriverVm, ..spec }
        }
        Device::Disk(_) => {
            let device = take(&format!("vfio $DISK{n} && printf %s $DISK{n}"))?;
            let (image, options) = (image.into(), vec![format!("{}\n", build.disk_line)]);
            MachineSpec { controller: Some(DiskController { device, image, options }), ..machine("", "") }
        }
        Device::HostDisk(_) => {
            let disks = vec![disk::node(place, &format!("$DISK{n}"))?];
            MachineSpec { disks, ..machine("", "") }
        }
    };
    let running = Machine::start(place, &machine)?;
    if matches!(on, Device::Nic(_)) {
        let reach = format!("umbra-probe first-answer {} 30", peer_address(n));
        place.in_guest(label, &reach, Duration::from_secs(60))?;
    }
    Ok(running)
}

/// A row of the table: what for people, and the counters whose sum it is.
const ROWS: [(&str, &[&str]); 21] = [
    ("driver VM: exits", &["driver.exits"]),
    ("driver VM: halts", &["driver.halt_exits"]),
    ("driver VM: interrupts injected", &["driver.irq_injections"]),
    ("driver VM: instructions emulated", &["driver.insn_emulation"]),
    ("driver VM: sleeps of its vCPU", &["driver.vcpu0.sleeps"]),
    ("driver VM: CPU, us", &["driver.vcpu0.cpu_ns"]),
    ("guest: exits", &["guest.exits"]),
    ("guest: halts", &["guest.halt_exits"]),
    ("guest: interrupts injected", &["guest.irq_injections"]),
    ("guest: instructions emulated", &["guest.insn_emulation"]),
    ("guest: CPU, us", &["guest.vcpu0.cpu_ns"]),
    ("splitter: sleeps of its loop", &["guest.loop.sleeps"]),
    ("splitter: preemptions", &["guest.loop.preempted"]),
    ("splitter: CPU, us", &["guest.loop.cpu_ns"]),
    ("splitter: without a CPU, us", &["guest.loop.waited_ns"]),
    ("splitter: kicks", &["out.kicks", "into.kicks"]),
    ("splitter: looks", &["out.pumps", "into.pumps"]),
    ("splitter: no room", &["out.full", "into.full"]),
    ("splitter: signals", &["out.signals", "into.signals"]),
    ("splitter: signals left out", &["out.suppressed", "into.suppressed"]),
    ("frames", &["net.frames_out", "net.frames_in"]),
];

impl Comparison {
    /// For people: medians, and the ratios of the rounds.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let Some((first, others)) = self.builds.split_first() else { return text };
        for (n, (other, label)) in (1..).zip(others.iter().zip(&LABELS[1..])) {
            let ratio = format!("{label} : {}", LABELS[0]);
            text.push_str(&format!("\n{:<44}{:>10}{label:>10}{ratio:>8}   range\n", self.device, LABELS[0]));
            self.pair(first, other, &mut text);
            self.crashes(n, &mut text);
        }
        text
    }

    /// Outages of the first build and of build `n`.
    fn crashes(&self, n: usize, text: &mut String) {
        for part in [OUTAGE].into_iter().chain(PARTS) {
            let of = |build: usize| -> Vec<f64> {
                self.outages.get(build).into_iter().flatten().filter_map(|outage| outage.get(part).copied()).collect()
            };
            let (ours, its) = (of(0), of(n));
            if !ours.is_empty() && ours.len() == its.len() {
                text.push_str(&row(&format!("a crash: {}, ms", part.trim_end_matches("_ms")), &ours, &its));
            }
        }
    }

    fn pair(&self, first: &[Slice], other: &[Slice], text: &mut String) {
        for &kind in self.kinds {
            let of = |slices: &[Slice], figure: &dyn Fn(&Slice) -> f64| -> Vec<f64> {
                slices.iter().filter(|slice| slice.kind == kind).map(figure).collect()
            };
            let mut line = |name: &str, figure: &dyn Fn(&Slice) -> f64| {
                text.push_str(&row(name, &of(first, figure), &of(other, figure)));
            };
            line(&format!("{}; per {}:", kind.title(), kind.unit()), &|slice| slice.figure);
            let has =
                |slice: &Slice, counters: &[&str]| counters.iter().any(|counter| slice.each.contains_key(*counter));
            let is_counted = |counters: &[&str]| first.iter().chain(other).any(|slice| has(slice, counters));
            for (name, counters) in ROWS.into_iter().filter(|(_, counters)| is_counted(counters)) {
                let scale = if name.ends_with("us") { 1e-3 } else { 1.0 };
                let sum =
                    |slice: &Slice| counters.iter().filter_map(|counter| slice.each.get(*counter)).sum::<f64>() * scale;
                line(&format!("  {name}"), &sum);
            }
        }
    }
}

/// Medians of both, and [`ratio`].
fn row(name: &str, a: &[f64], b: &[f64]) -> String {
    format!("{name:<44}{:>10.2}{:>10.2}{}\n", median(a), median(b), ratio(a, b))
}

/// The median of the ratios b : a in pairs, and its range; a range that spans 1 is no difference.
pub(super) fn ratio(a: &[f64], b: &[f64]) -> String {
    let ratios: Vec<_> = a.iter().zip(b).filter(|(a, _)| **a > 0.0).map(|(a, b)| b / a).collect();
    let least = ratios.iter().copied().reduce(f64::min);
    let (Some(least), Some(most)) = (least, ratios.iter().copied().reduce(f64::max)) else { return String::new() };
    let verdict = if least <= 1.0 && most >= 1.0 { "  no difference" } else { "" };
    format!("{:>8.2}   {least:.2} to {most:.2}{verdict}", median(&ratios))
}

/// The median; between the two in the middle where their number is even. 0 of none.
pub(super) fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = |at: usize| sorted.get(at).copied().unwrap_or(0.0);
    middle(sorted.len().saturating_sub(1) / 2).midpoint(middle(sorted.len() / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_those_of_pairs() {
        // The medians are alike, and in each round B is a fifth slower.
        let line = row("speed", &[100.0, 200.0, 300.0], &[80.0, 160.0, 240.0]);
        assert!(line.ends_with("200.00    160.00    0.80   0.80 to 0.80\n"), "{line}");
        let line = row("speed", &[100.0, 100.0], &[90.0, 120.0]);
        assert!(line.ends_with("100.00    105.00    1.05   0.90 to 1.20  no difference\n"), "{line}");
        assert!(row("none", &[0.0], &[0.0]).ends_with("0.00      0.00\n"));
    }

    #[test]
    fn crashes_are_compared_by_their_parts() {
        let outage = |whole: f64| BTreeMap::from([(OUTAGE.to_owned(), whole), ("link_ms".to_owned(), 2.0)]);
        let outages = vec![vec![outage(100.0), outage(200.0)], vec![outage(50.0), outage(100.0)]];
        let builds = vec![Vec::new(), Vec::new()];
        let table = Comparison { device: "nvme".into(), kinds: &[], builds, outages }.table();
        assert!(table.contains("a crash: outage, ms"), "{table}");
        assert!(table.lines().any(|line| line.ends_with("0.50   0.50 to 0.50")), "{table}");
        assert!(table.lines().any(|line| line.starts_with("a crash: link, ms") && line.ends_with("no difference")));
        assert!(!table.contains("replay"), "{table}");
    }
}
