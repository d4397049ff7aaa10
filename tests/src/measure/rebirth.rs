//! `umbra-bench rebirth`: how long driver VMs take to be there, booted and restored, how long guests are away where the next life is
//! ready, where it is not, where two wait and where none does, and what memory the processes hold. All of it from one boot of the test
//! host.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::outages::{Spread, place};
use super::results::{Memory, mib};
use super::{GUEST, STANDBY, memory};
use crate::assets::{Assets, Say};
use crate::bench::Model;
use crate::demo::DemoError;
use crate::demo::events::Event;
use crate::demo::machine::{Machine, MachineSpec, NIC_DRIVER};
use crate::demo::place::Place;
use crate::peer::peer_address;

/// Longest time for one recovery, or until the guest reaches its peer.
const LIMIT: Duration = Duration::from_secs(120);
/// How long after a recovery the next failure comes.
const SOON: Duration = Duration::from_millis(100);
/// Longer than all that Umbra has to do after a recovery, the snapshot's part apart.
const CALM: Duration = Duration::from_millis(700);
/// Where the test host has the snapshots of this measurement: there are none at its beginning.
const FOLDER: &str = "/tmp/rebirth";

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct RebirthSpec {
    /// The NIC model.
    pub nic: Model,
    /// Failures of each kind.
    pub crashes: u32,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Rebirth {
    /// QEMU's model.
    pub nic: String,
    /// Times, ms.
    pub figures: Vec<Spread>,
    /// Ratios of two figures, by name.
    pub ratios: Vec<(String, f64)>,
    /// The processes while two standbys wait that were restored.
    pub memory: Vec<Memory>,
    /// What of its memory the driver VM in service has available, bytes, as its agent says.
    pub available: Option<u64>,
}

/// Names of figures that ratios are made of.
const FIRST_START: &str = "first start to network";
const SECOND_START: &str = "second start to network";
const BOOTED: &str = "first life to hello, booted";
const RESTORED: &str = "life to hello, restored";
const BOOTED_AND_SAVED: &str = "standby ready, saved as well";
const READY_RESTORED: &str = "standby ready, restored";
const READY: &str = "outage, standby ready";
const AGAIN: &str = "outage, 0.1 s after another";
const FIRST_OF_TWO: &str = "outage, standbys = 2";
const SECOND_OF_TWO: &str = "the same, 0.1 s after another";
const NONE_WAITS: &str = "outage, standby = snapshot";

/// Ratios: what it is of, the figure, the one it is divided by.
const RATIOS: [(&str, &str, &str); 3] = [
    ("restored : booted", RESTORED, BOOTED),
    ("second start : first", SECOND_START, FIRST_START),
    ("standby = snapshot : ready", NONE_WAITS, READY),
];

/// Ratios of figures that were taken in turn: the median of those of each two, which had the same load beside them.
const PAIRS: [(&str, &str, &str); 2] =
    [("0.1 s after another : ready", AGAIN, READY), ("the same, standbys = 2", SECOND_OF_TWO, FIRST_OF_TWO)];

/// Figures by name, ms.
#[derive(Default)]
struct Taken(Vec<(&'static str, Vec<f64>)>);

impl Taken {
    fn add(&mut self, name: &'static str, ms: Option<f64>) {
        let Some(ms) = ms else { return };
        match self.0.iter_mut().find(|(known, _)| *known == name) {
            Some((_, figures)) => figures.push(ms),
            None => self.0.push((name, vec![ms])),
        }
    }

    fn of(&self, name: &str) -> &[f64] {
        self.0.iter().find(|(known, _)| *known == name).map_or(&[], |(_, figures)| figures)
    }

    /// The median ratio of the figures `of` to those `by` that were taken beside them.
    fn ratio(&self, of: &str, by: &str) -> Option<f64> {
        let pairs = self.of(of).iter().zip(self.of(by)).map(|(of, by)| of / by).collect();
        Spread::of("", pairs).map(|spread| spread.p50)
    }

    /// A standby is ready.
    fn add_ready(&mut self, ready: &Event) {
        let restored = ready.fields.get("restored").and_then(serde_json::Value::as_bool) == Some(true);
        self.add(if restored { READY_RESTORED } else { BOOTED_AND_SAVED }, ready.number("boot_ms"));
    }

    /// A life serves that was started for it.
    fn add_life(&mut self, name: &'static str, live: &Event) {
        self.add(name, live.fields["parts"]["boot_ms"].as_f64());
    }
}

/// Takes the measurements.
///
/// # Errors
/// One could not be made.
pub fn run(spec: &RebirthSpec, say: Say<'_>) -> Result<Rebirth, DemoError> {
    let assets = Assets::prepare(say)?;
    say(&format!("booting the test host with a {}", spec.nic));
    let (mut place, machine) = place(&assets, ("rebirth", None), &spec.nic, None)?;
    let (place, mut taken) = (&mut place, Taken::default());
    let warm = MachineSpec { restart_limit: 3 * spec.crashes + 3, snapshot_folder: Some(FOLDER.into()), ..machine };
    say("a first start; the standby boots and is saved");
    let (mut running, ms) = start(place, &warm)?;
    taken.add(FIRST_START, Some(ms));
    taken.add_life(BOOTED, first_life(&running)?);
    for n in 0..spec.crashes {
        let ready = running.await_event(STANDBY, |event| event.event == "standby-ready")?;
        taken.add_ready(&ready);
        std::thread::sleep(CALM);
        taken.add(READY, crash(&mut running, place)?.number("outage_ms"));
        std::thread::sleep(SOON);
        taken.add(AGAIN, crash(&mut running, place)?.number("outage_ms"));
        say(&format!("  {}: {}", n + 1, last_two(&taken, [READY, AGAIN])));
    }
    running.stop(place)?;

    say("a second start; its first life is restored");
    let (running, ms) = start(place, &warm)?;
    taken.add(SECOND_START, Some(ms));
    taken.add_life(RESTORED, first_life(&running)?);
    running.stop(place)?;

    say("a machine where two standbys wait");
    let (mut running, _) = start(place, &MachineSpec { standbys: 2, ..warm.clone() })?;
    let (mut memory, mut available) = (Vec::new(), None);
    for n in 0..spec.crashes {
        for _ in 0..2 {
            taken.add_ready(&running.await_event(STANDBY, |event| event.event == "standby-ready")?);
        }
        std::thread::sleep(CALM);
        if n == 1 {
            memory = memory::resident(&mut running, place)?;
            available = running.status(place)?["drivers"][0]["available_memory"].as_u64();
        }
        taken.add(FIRST_OF_TWO, crash(&mut running, place)?.number("outage_ms"));
        std::thread::sleep(SOON);
        taken.add(SECOND_OF_TWO, crash(&mut running, place)?.number("outage_ms"));
        say(&format!("  {}: {}", n + 1, last_two(&taken, [FIRST_OF_TWO, SECOND_OF_TWO])));
    }
    running.stop(place)?;

    say("a machine where no standby waits");
    let (mut running, _) = start(place, &MachineSpec { standby: "snapshot".into(), ..warm })?;
    for _ in 0..spec.crashes {
        running.await_event(STANDBY, |event| event.event == "snapshot-ready")?;
        std::thread::sleep(CALM);
        let live = crash(&mut running, place)?;
        taken.add(NONE_WAITS, live.number("outage_ms"));
        taken.add_life(RESTORED, &live);
    }
    running.stop(place)?;
    Ok(Rebirth { available, ..Rebirth::new(&spec.nic, taken, memory) })
}

/// Starts the machine: it, and how long it was until its guest reached the peer, ms.
fn start(place: &mut Place, spec: &MachineSpec) -> Result<(Machine, f64), DemoError> {
    let begin = Instant::now();
    let machine = Machine::start(place, spec)?;
    place.in_guest(GUEST, &format!("umbra-probe first-answer {} 30", peer_address(0)), LIMIT)?;
    Ok((machine, begin.elapsed().as_secs_f64() * 1e3))
}

/// A panic: the event of the life that serves then, with the outage as Umbra counts it.
fn crash(running: &mut Machine, place: &mut Place) -> Result<Event, DemoError> {
    place.expect(&format!("umbra crash {NIC_DRIVER}"), Duration::from_secs(20))?;
    running.await_live(NIC_DRIVER, LIMIT)
}

/// The event of the first life that served.
fn first_life(running: &Machine) -> Result<&Event, DemoError> {
    let life = running.seen.iter().find(|event| event.event == "driver-live");
    life.ok_or_else(|| DemoError::Umbra { what: "no driver VM has ever served".into(), said: running.said() })
}

fn last_two(taken: &Taken, of: [&str; 2]) -> String {
    let last = |name: &str| {
        let (_, figures) = taken.0.iter().find(|(known, _)| *known == name)?;
        figures.last().map(|ms| format!("{ms:.0} ms"))
    };
    of.map(|name| last(name).unwrap_or_else(|| "-".into())).join(", then ")
}

impl Rebirth {
    fn new(nic: &Model, taken: Taken, memory: Vec<Memory>) -> Self {
        let pairs = PAIRS.iter().filter_map(|(what, of, by)| Some(((*what).into(), taken.ratio(of, by)?)));
        let pairs: Vec<_> = pairs.collect();
        let figures: Vec<_> = taken.0.into_iter().filter_map(|(name, figures)| Spread::of(name, figures)).collect();
        let p50 = |name: &str| figures.iter().find(|spread| spread.name == name).map(|spread| spread.p50);
        let ratios = RATIOS
            .iter()
            .filter_map(|(what, of, by)| Some(((*what).into(), p50(of)? / p50(by)?)))
            .chain(pairs)
            .collect();
        Self { nic: nic.to_string(), figures, ratios, memory, available: None }
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = Spread::heading(&self.nic);
        text.extend(self.figures.iter().map(Spread::line));
        text.extend(self.ratios.iter().map(|(what, ratio)| format!("{what:<30}{ratio:>16.3}\n")));
        text.extend(self.memory.iter().map(Memory::line));
        let available =
            self.available.map(|bytes| format!("available in the driver VM{:>13.1} MiB\n", mib(bytes / 1024)));
        text.extend(available);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_medians_or_of_what_was_taken_in_turn_and_only_of_what_was_measured() {
        let mut taken = Taken::default();
        for ms in [10.0, 30.0, 20.0] {
            taken.add(READY, Some(ms));
        }
        taken.add(NONE_WAITS, Some(50.0));
        taken.add(AGAIN, None);
        // The last of them beside another load.
        for (first, second) in [(10.0, 11.0), (20.0, 22.0), (300.0, 360.0)] {
            taken.add(FIRST_OF_TWO, Some(first));
            taken.add(SECOND_OF_TWO, Some(second));
        }
        let rebirth = Rebirth::new(&Model::from("e1000e"), taken, Vec::new());
        let expected = [("standby = snapshot : ready", 2.5), ("the same, standbys = 2", 1.1)];
        assert_eq!(rebirth.ratios, expected.map(|(what, ratio)| (what.to_owned(), ratio)));
        assert_eq!(rebirth.figures.len(), 4);
    }
}
