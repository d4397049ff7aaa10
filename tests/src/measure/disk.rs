//! `umbra-bench measure-disk`: what a disk behind a driver VM costs beside what one would have otherwise, and how long the guest's
//! requests wait through a crash, beside the bare re-initialisation of the driver. All figures of a controller come from one boot of
//! the test host.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::outages::Spread;
use super::{GUEST, STANDBY, answer, processor_ticks, qemu_guest};
use crate::assets::{Assets, Say};
use crate::bench::{Bench, BenchSpec, Model, Storage};
use crate::demo::DemoError;
use crate::demo::machine::{Attach, DISK_DRIVER, DiskController, Machine, MachineSpec};
use crate::demo::place::Place;
use crate::probe::io::{Load, Speed};

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// The controller's model.
    pub disk: Model,
    /// Length of each measurement.
    pub seconds: u32,
    /// How often each path is measured; the order is reversed each time. 0: outages alone.
    pub rounds: u32,
    /// Crashes for the outage figures.
    pub crashes: u32,
}

/// Size of the disk.
const BYTES: u64 = 256 << 20;
/// With it an NVMe disk's node belongs to its controller.
const ONE_NODE: &str = "nvme_core.multipath=N";
/// Longest time for one step or recovery.
const LIMIT: Duration = Duration::from_secs(120);
/// Bare re-initialisations that are measured.
const REINITS: u32 = 3;

const KIB: u32 = 1 << 10;
/// What each path is measured with.
pub(super) const JOBS: [(&str, Load); 8] = [
    ("4 KiB reads, one by one", load(false, 4 * KIB, 1)),
    ("4 KiB writes, one by one", load(true, 4 * KIB, 1)),
    ("4 KiB reads, 32 at once", load(false, 4 * KIB, 32)),
    ("4 KiB writes, 32 at once", load(true, 4 * KIB, 32)),
    ("128 KiB reads, 8 at once", load(false, 128 * KIB, 8)),
    ("128 KiB writes, 8 at once", load(true, 128 * KIB, 8)),
    ("1 MiB reads, 4 at once", load(false, 1024 * KIB, 4)),
    ("1 MiB writes, 4 at once", load(true, 1024 * KIB, 4)),
];

const fn load(writes: bool, bytes: u32, depth: u16) -> Load {
    Load { writes, bytes, depth }
}

/// A way from the guest to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Route {
    /// Through a driver VM.
    DriverVm,
    /// Umbra's disk on the block device of the host's own driver.
    HostDriver,
    /// The controller is the guest's own.
    Passthrough,
    /// QEMU's virtio-blk (`io_uring`, a thread of its own) on the block device of the host's own driver.
    Qemu,
}

impl Route {
    /// All, in the order of the first round.
    const ALL: [Self; 4] = [Self::DriverVm, Self::HostDriver, Self::Passthrough, Self::Qemu];

    fn name(self) -> &'static str {
        match self {
            Self::DriverVm => "driver VM",
            Self::HostDriver => "Umbra, host's driver",
            Self::Passthrough => "passthrough",
            Self::Qemu => "QEMU, host's driver",
        }
    }
}

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct JobFigures {
    /// What was done.
    pub job: &'static str,
    /// How it was done.
    pub speed: Speed,
    /// Time that the test host's processors were busy, ms a MiB.
    pub busy_ms_mib: f64,
}

/// One path in one round.
#[derive(Clone, Debug, Serialize)]
pub struct RouteFigures {
    /// The path.
    pub route: Route,
    /// From 0.
    pub round: u32,
    /// In the order of the measurements.
    pub jobs: Vec<JobFigures>,
}

/// All figures of one controller.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DiskFigures {
    /// QEMU's model.
    pub disk: String,
    /// Speeds.
    pub routes: Vec<RouteFigures>,
    /// Outages with a ready standby, as Umbra counts them, ms.
    pub outages_ms: Vec<f64>,
    /// Their parts, as Umbra told them.
    pub parts: Vec<Value>,
    /// Bare re-initialisations, unbind to the first block read, ms.
    pub reinits_ms: Vec<f64>,
}

/// A test host with the controller.
struct Rig {
    place: Place,
    /// Through a driver VM.
    machine: MachineSpec,
    device: String,
}

/// Takes the measurements.
///
/// # Errors
/// One could not be made.
pub fn run(spec: &DiskSpec, say: Say<'_>) -> Result<DiskFigures, DemoError> {
    let mut rig = Rig::boot(spec, say)?;
    let mut figures = DiskFigures { disk: spec.disk.to_string(), ..DiskFigures::default() };
    for round in 0..spec.rounds {
        let mut routes = Route::ALL;
        if round % 2 == 1 {
            routes.reverse();
        }
        for route in routes {
            say(&format!("round {}: {}", round + 1, route.name()));
            figures.routes.push(rig.measure(route, round, spec, say)?);
        }
    }
    say(&format!("{REINITS} bare re-initialisations, the controller passed straight to the guest"));
    rig.reinits(&mut figures)?;
    say(&format!("{} crashes", spec.crashes));
    rig.outages(spec.crashes, &mut figures)?;
    Ok(figures)
}

/// The node of the disk in the test host whose controller, an address or the variable with one, is given to the host's own driver.
pub(super) fn node(place: &mut Place, controller: &str) -> Result<String, DemoError> {
    let find = format!(
        "unvfio {controller}; has_node() {{ [ -b \"$(disk_node {controller})\" ]; }}; await 20 has_node; \
         printf %s $(disk_node {controller})"
    );
    place.expect(&find, LIMIT)
}

impl Rig {
    fn boot(spec: &DiskSpec, say: Say<'_>) -> Result<Self, DemoError> {
        let assets = Assets::prepare(say)?;
        let image = assets.driver_image(&spec.disk)?;
        let mut bench = BenchSpec::new("measure-disk").nics(&[]);
        bench.storage = vec![Storage::empty(spec.disk.name(), BYTES)];
        bench.files = vec![image.clone()];
        bench.cmdline = ONE_NODE.into();
        say(&format!("booting the test host with a {}", spec.disk));
        let mut bench = Bench::boot(bench, &assets)?;
        qemu_guest::carry(&bench.share().join("qemu"), &assets)?;
        let device = bench.expect("printf %s $DISK0", Duration::from_secs(30))?;
        let image = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let controller = DiskController { device: device.clone(), image, options: Vec::new() };
        let machine = MachineSpec {
            attach: Attach::Without,
            controller: Some(controller),
            restart_limit: spec.crashes + 3,
            guest_options: ONE_NODE.into(),
            ..MachineSpec::one_guest(&device, "", "")
        };
        Ok(Self { place: Place::Bench(Box::new(bench)), machine, device })
    }

    fn measure(&mut self, route: Route, round: u32, spec: &DiskSpec, say: Say<'_>) -> Result<RouteFigures, DemoError> {
        let through = self.machine.clone();
        let machine = match route {
            Route::DriverVm => Some(through),
            Route::Passthrough => Some(MachineSpec { attach: Attach::Passthrough, controller: None, ..through }),
            Route::HostDriver => Some(MachineSpec { disks: vec![self.node()?], controller: None, ..through }),
            Route::Qemu => None,
        };
        let Some(machine) = machine else {
            let node = self.node()?;
            let guest = qemu_guest::start_with_disk(&mut self.place, GUEST, &node)?;
            let jobs = self.jobs(spec, say)?;
            guest.stop(&mut self.place)?;
            return Ok(RouteFigures { route, round, jobs });
        };
        if machine.disks.is_empty() {
            self.bind_vfio()?;
        }
        let mut running = Machine::start(&mut self.place, &machine)?;
        if machine.controller.is_some() {
            // Its boot, or what makes its snapshot, would be measured too.
            running.await_standby(DISK_DRIVER, STANDBY)?;
        }
        let jobs = self.jobs(spec, say)?;
        running.stop(&mut self.place)?;
        Ok(RouteFigures { route, round, jobs })
    }

    fn bind_vfio(&mut self) -> Result<(), DemoError> {
        self.place.expect(&format!("vfio {}", self.device), LIMIT).map(drop)
    }

    fn node(&mut self) -> Result<String, DemoError> {
        node(&mut self.place, &self.device)
    }

    fn jobs(&mut self, spec: &DiskSpec, say: Say<'_>) -> Result<Vec<JobFigures>, DemoError> {
        let limit = Duration::from_secs(u64::from(spec.seconds)) + LIMIT;
        let node = self.place.in_guest(
            GUEST,
            "disk() { ls /dev/vda /dev/nvme0n1 /dev/sda 2>/dev/null | head -n 1; }; has_disk() { [ -n \"$(disk)\" ]; }
             await 20 has_disk; printf %s $(disk)",
            LIMIT,
        )?;
        let mut figures = Vec::new();
        for (job, Load { writes, bytes, depth }) in JOBS {
            let access = if writes { "write" } else { "read" };
            let script = format!("umbra-probe io {node} {access} {bytes} {depth} {}", spec.seconds);
            let (before, _) = processor_ticks(&mut self.place)?;
            let speed: Speed = answer(&mut self.place, &script, limit)?;
            let (after, _) = processor_ticks(&mut self.place)?;
            let busy_ms_mib = (after - before) * 10.0 / speed.mib().max(f64::MIN_POSITIVE);
            say(&format!(
                "    {job}: {:.0} a second, {:.1} MiB/s, {:.0} us (median)",
                speed.per_second(),
                speed.mib_s(),
                speed.p50_us
            ));
            figures.push(JobFigures { job, speed, busy_ms_mib });
        }
        Ok(figures)
    }

    fn reinits(&mut self, figures: &mut DiskFigures) -> Result<(), DemoError> {
        self.bind_vfio()?;
        let machine = MachineSpec { attach: Attach::Passthrough, controller: None, ..self.machine.clone() };
        let running = Machine::start(&mut self.place, &machine)?;
        for _ in 0..REINITS {
            figures.reinits_ms.push(answer(&mut self.place, "umbra-probe reinit-disk", LIMIT)?);
        }
        running.stop(&mut self.place)
    }

    /// Outages of a guest that writes without end.
    fn outages(&mut self, crashes: u32, figures: &mut DiskFigures) -> Result<(), DemoError> {
        self.bind_vfio()?;
        let mut running = Machine::start(&mut self.place, &self.machine)?;
        let load = format!("umbra-probe io /dev/vda write {} 4 100000 </dev/null >/dev/null 2>&1 & echo", 4 * KIB);
        self.place.in_guest(GUEST, &load, LIMIT)?;
        for _ in 0..crashes {
            running.await_standby(DISK_DRIVER, STANDBY)?;
            std::thread::sleep(Duration::from_secs(1));
            self.place.expect(&format!("umbra crash {DISK_DRIVER}"), LIMIT)?;
            let live = running.await_live(DISK_DRIVER, LIMIT)?;
            figures.outages_ms.extend(live.number("outage_ms"));
            figures.parts.extend(live.fields.get("parts").cloned());
        }
        running.stop(&mut self.place)
    }
}

impl DiskFigures {
    /// Speeds of one job on a path, one a round, requests a second.
    fn speeds(&self, route: Route, job: &str) -> Vec<f64> {
        let of_route = self.routes.iter().filter(|figures| figures.route == route);
        of_route.flat_map(|figures| &figures.jobs).filter(|j| j.job == job).map(|j| j.speed.per_second()).collect()
    }

    /// Of a figure of one job on a path, the median of the rounds.
    fn median(&self, route: Route, job: &str, figure: impl Fn(&JobFigures) -> f64) -> f64 {
        let of_route = self.routes.iter().filter(|figures| figures.route == route);
        let all = of_route.flat_map(|figures| &figures.jobs).filter(|j| j.job == job).map(figure).collect();
        Spread::of("", all).map_or(f64::NAN, |spread| spread.p50)
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        if !self.routes.is_empty() {
            text.push_str(&format!("\n{:<26}", self.disk));
            text.extend(Route::ALL.map(|route| format!("{:>22}", route.name())));
        }
        for (job, load) in JOBS.iter().filter(|_| !self.routes.is_empty()) {
            text.push_str(&format!("\n{job:<26}"));
            text.extend(Route::ALL.map(|route| {
                if load.bytes < 128 * KIB {
                    let per_second = self.median(route, job, |j| j.speed.per_second());
                    format!("{per_second:>12.0}/s{:>5.0} us", self.median(route, job, |j| j.speed.p50_us))
                } else {
                    format!("{:>16.0} MiB/s", self.median(route, job, |j| j.speed.mib_s()))
                }
            }));
            text.push_str("\n  busy, ms a MiB          ");
            text.extend(Route::ALL.map(|route| format!("{:>22.2}", self.median(route, job, |j| j.busy_ms_mib))));
            text.push_str("\n  driver VM : it          ");
            text.extend(Route::ALL.map(|route| format!("{:>22}", self.ratio(route, job))));
        }
        text.push('\n');
        text.push_str(&Spread::heading(&format!("{}, crashes under writes", self.disk)));
        let outage = Spread::of("outage, standby ready", self.outages_ms.clone());
        let bare = Spread::of("bare re-initialisation", self.reinits_ms.clone());
        let ratio = outage.as_ref().zip(bare.as_ref()).map(|(outage, bare)| outage.p50 / bare.p50);
        let lines = outage.into_iter().chain(Spread::of_parts(&self.parts)).chain(bare);
        text.extend(lines.map(|spread| spread.line()));
        text.extend(ratio.map(|ratio| format!("{:<30}{ratio:>16.2}\n", "outage : re-initialisation")));
        text
    }

    /// Speeds of the driver VM in that of `other`, round by round: the smallest and the largest ratio.
    fn ratio(&self, other: Route, job: &str) -> String {
        if other == Route::DriverVm {
            return String::new();
        }
        let ratios: Vec<f64> = self
            .speeds(Route::DriverVm, job)
            .iter()
            .zip(self.speeds(other, job))
            .map(|(ours, its)| ours / its)
            .collect();
        let (least, most) = ratios.iter().fold((f64::MAX, f64::MIN), |(l, m), r| (l.min(*r), m.max(*r)));
        if ratios.len() > 1 { format!("{least:.2} to {most:.2}") } else { format!("{least:.2}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(route: Route, round: u32, requests: u64) -> RouteFigures {
        let speed = Speed { requests, bytes: requests << 12, seconds: 1.0, p50_us: 10.0, p99_us: 20.0 };
        RouteFigures { route, round, jobs: vec![JobFigures { job: JOBS[0].0, speed, busy_ms_mib: 1.0 }] }
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let routes = vec![
            figures(Route::DriverVm, 0, 50),
            figures(Route::Qemu, 0, 100),
            figures(Route::Qemu, 1, 200),
            figures(Route::DriverVm, 1, 160),
        ];
        let parts = vec![serde_json::json!({"reset_ms": 110.0, "reset_method": "flr"})];
        let (outages_ms, reinits_ms) = (vec![700.0], vec![500.0]);
        let all = DiskFigures { disk: "nvme".into(), routes, outages_ms, parts, reinits_ms };
        assert_eq!(all.ratio(Route::Qemu, JOBS[0].0), "0.50 to 0.80");
        let table = all.table();
        assert!(table.contains("0.50 to 0.80"), "{table}");
        let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(lines.contains(&vec!["reset", "1", "110.0", "110.0", "110.0"]), "{table}");
        assert!(lines.contains(&vec!["outage", ":", "re-initialisation", "1.40"]), "{table}");
    }
}
