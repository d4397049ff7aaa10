//! The campaign: a guest and its driver VM go on while another VM attacks, life after life, and nothing else of the host may change. The
//! attacker is the driver VM of a second NIC, with a guest of its own, or another guest on the same NIC ([`guest`]).

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use super::bystander::Bystander;
use super::guest;
use super::host::HostState;
use super::plan::{Attack, Plan};
use super::report::HostileResult;
use crate::assets::{Assets, Say};
use crate::bench::{Bench, BenchSpec, Model};
use crate::demo::DemoError;
use crate::demo::events::Event;
use crate::demo::machine::{Machine, MachineSpec, SECOND_DRIVER, SecondNic};
use crate::demo::place::Place;
use crate::peer::{guest_address, peer_address};

/// The guest that must not notice, and the one that shares its NIC with the attacker.
pub(super) const HONEST: &str = "web";
const VICTIM: &str = "victim";
/// The NIC of the first.
const HONEST_NIC: &str = "e1000e";

/// Longest silence of a step.
pub(super) const STEP: Duration = Duration::from_secs(60);
/// Longest silence of the machine between two things that happen to lives of the attacker.
const STILL: Duration = Duration::from_secs(120);
/// More than there are lives in a day.
const RESTARTS: u32 = 100_000;

/// Time that a driver VM may take for its boot beyond the usual, s: four VMs boot side by side.
const MORE_BOOT_S: u32 = 120;

/// Who attacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Attacker {
    /// A driver VM.
    DriverVm,
    /// A guest, which shares a NIC with the honest one.
    Guest,
}

/// What is to be tried.
#[derive(Clone, Debug)]
pub struct HostileSpec {
    /// Who attacks.
    pub by: Attacker,
    /// The attacked NIC.
    pub nic: Model,
    /// Time for which lives attack; the last one is honest.
    pub seconds: u32,
    /// Determines what each life does.
    pub seed: u64,
}

/// What became of an attack, by what has stopped it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Outcome {
    /// Lives that ended so.
    pub lives: u32,
    /// Why the first of them did.
    pub reason: String,
}

/// What is counted while it goes on.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// By attack and by what stopped it.
    pub(super) outcomes: BTreeMap<Attack, BTreeMap<String, Outcome>>,
    /// Honest lives that served the victim, and their longest outage, ms.
    pub(super) served: u32,
    pub(super) outage_ms: f64,
    /// What must not have happened.
    pub(super) breaches: Vec<String>,
}

/// What is said of an attack that nothing stopped: the life has reset itself.
pub const NOTHING: &str = "nothing";

/// Runs a campaign.
///
/// # Errors
/// It could not be run. What an attacker has achieved is in the result.
pub fn run(spec: &HostileSpec, say: Say<'_>) -> Result<HostileResult, DemoError> {
    let assets = Assets::prepare(say)?;
    let (mut place, machine) = match spec.by {
        Attacker::DriverVm => stage(spec, &assets, say)?,
        Attacker::Guest => guest::stage(spec, &assets, say)?,
    };
    let mut machine = Machine::start(&mut place, &machine)?;

    let before = HostState::take(&mut place, &mut machine)?;
    let bystander = Bystander::start(&mut place)?;
    say(&format!("the attacker's lives begin, for {} s", spec.seconds));
    let mut tally = Tally::default();
    match spec.by {
        Attacker::DriverVm => attack(spec, (&mut place, &mut machine), &mut tally, say)?,
        Attacker::Guest => guest::attack(spec, (&mut place, &mut machine), &mut tally, say)?,
    }

    let seen = bystander.finish(&mut place)?;
    let after = HostState::take(&mut place, &mut machine)?;
    tally.breaches.extend(before.differs_from(&after));
    tally.breaches.extend(seen.breaches());
    let iommu = iommu_faults(&mut place)?;
    machine.stop(&mut place)?;
    if let Place::Bench(bench) = place {
        bench.shutdown()?;
    }
    Ok(HostileResult::new(spec, tally, seen, (&before, &after), iommu))
}

/// A test host with both NICs, bound, and the machine.
fn stage(spec: &HostileSpec, assets: &Assets, say: Say<'_>) -> Result<(Place, MachineSpec), DemoError> {
    let honest = assets.driver_image(&HONEST_NIC.into())?;
    let hostile = assets.hostile_image(&assets.driver_image(&spec.nic)?, spec.seed)?;
    let mut bench = BenchSpec::new("hostile").nics(&[HONEST_NIC, spec.nic.name()]);
    bench.files = vec![honest.clone(), hostile.clone()];
    say(&format!("booting the test host with {HONEST_NIC} and {}; seed {}", spec.nic, spec.seed));
    let mut bench = Bench::boot(bench, assets)?;
    let bind = |nic: &str| format!("vfio {nic} && printf %s {nic}");
    let device = bench.expect(&bind("$NIC0"), STEP)?;
    let second = bench.expect(&bind("$NIC1"), STEP)?;
    Ok((Place::Bench(Box::new(bench)), machine_of((&device, &second), (&honest, &hostile))))
}

fn machine_of((device, second): (&str, &str), (honest, hostile): (&Path, &Path)) -> MachineSpec {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut machine = MachineSpec::one_guest(device, &name(honest), "");
    machine.guests =
        (0..).zip([HONEST, VICTIM]).map(|(nic, name)| (name.into(), format!("{}/24", guest_address(nic, 0)))).collect();
    machine.second = Some(SecondNic { device: second.into(), image: name(hostile), guest: VICTIM.into() });
    machine.restart_limit = RESTARTS;
    machine.slow_boot_s = MORE_BOOT_S;
    // Registers that a driver holds can be mapped.
    machine.driver_options = "cmdline = \"iomem=relaxed\"\n".into();
    machine
}

/// Follows the attacker's lives until the time is over and an honest one serves.
fn attack(
    spec: &HostileSpec,
    (place, machine): (&mut Place, &mut Machine),
    tally: &mut Tally,
    say: Say<'_>,
) -> Result<(), DemoError> {
    let mut faults = iommu_faults(place)?;
    let (begin, length) = (Instant::now(), Duration::from_secs(spec.seconds.into()));
    // The first life, which is honest, serves already.
    end_honest_life(place)?;
    loop {
        let event = machine.await_event(STILL, matters)?;
        let attack = Plan::of(spec.seed, event.generation).attack;
        if event.text("driver") != SECOND_DRIVER {
            tally.breaches.push(words(&event));
            continue;
        }
        match event.event.as_str() {
            "driver-live" if attack == Attack::Honest => {
                serves(place)?;
                tally.served += 1;
                tally.outage_ms = tally.outage_ms.max(event.number("outage_ms").unwrap_or(0.0));
                if begin.elapsed() >= length {
                    return Ok(());
                }
                end_honest_life(place)?;
            }
            "driver-failed" | "standby-failed" => {
                let refused = iommu_faults(place)?;
                let by_iommu = attack == Attack::Dma && refused > faults;
                faults = refused;
                let line = tally.count(attack, by_iommu, &event);
                say(&format!("[{:5.0} s] life {}: {line}", begin.elapsed().as_secs_f64(), event.generation));
            }
            "quarantined" => {
                return Err(DemoError::Umbra { what: words(&event), said: machine.said() });
            }
            _ => {}
        }
    }
}

/// Accesses that the IOMMU refused, as far as the host's kernel told.
fn iommu_faults(place: &mut Place) -> Result<u64, DemoError> {
    let count = place.expect("dmesg | grep -c 'DMAR:.*fault addr' || true", STEP)?;
    Ok(count.trim().parse().unwrap_or(0))
}

/// What has to do with the attacker's lives, or must not happen.
fn matters(event: &Event) -> bool {
    let of_lives = ["driver-failed", "standby-failed", "quarantined"].contains(&event.event.as_str());
    let of_attacker = event.event == "driver-live" && event.text("driver") == SECOND_DRIVER;
    of_lives || of_attacker || event.event == "guest-ended" || event.event == "guest-rebooted"
}

pub(super) fn words(event: &Event) -> String {
    let (driver, guest) = (event.text("driver"), event.text("guest"));
    format!("{}: {driver}{guest}: {}{}", event.event, event.text("reason"), event.text("how"))
}

/// The victim is served.
fn serves(place: &mut Place) -> Result<(), DemoError> {
    place.in_guest(VICTIM, &format!("umbra-probe first-answer {} 30", peer_address(1)), STEP).map(drop)
}

fn end_honest_life(place: &mut Place) -> Result<(), DemoError> {
    // It may have been replaced just now: then there is another one to wait for.
    place.run(&format!("umbra crash {SECOND_DRIVER} --kind panic"), STEP).map(drop)
}

impl Tally {
    /// Counts a life whose attack ended so.
    pub(super) fn add(&mut self, attack: Attack, by: &str, reason: &str) {
        let outcome = self.outcomes.entry(attack).or_default().entry(by.into()).or_default();
        if outcome.lives == 0 {
            reason.clone_into(&mut outcome.reason);
        }
        outcome.lives += 1;
    }

    /// Counts the end of a driver VM's life; in a line.
    fn count(&mut self, attack: Attack, by_iommu: bool, event: &Event) -> String {
        let reason = event.text("reason");
        let by = match (event.event.as_str(), event.text("source")) {
            _ if by_iommu => "IOMMU",
            ("standby-failed", _) => "as a standby",
            ("driver-failed", "vm-end") => NOTHING,
            (_, source) => source,
        };
        if attack == Attack::Honest {
            if !event.text("source").is_empty() && event.text("source") != "panic" {
                self.breaches.push(format!("an honest life has failed: {by}: {reason}"));
            }
            return format!("honest, ended by {by}: {reason}");
        }
        self.add(attack, by, reason);
        format!("{attack:?}, stopped by {by}: {reason}")
    }
}
