//! `umbra-bench rebirth`: how long driver VMs take to be there, booted, saved and restored, how long guests are away where the next life is
//! ready, where it is not, where two wait and where none does, and what memory the processes hold. All of it from one boot of the test
//! host.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::outages::{Spread, place};
use super::results::{Memory, mib};
use super::{GUEST, STANDBY, memory};
use crate::assets::{Assets, Say};
use crate::bench::{Bench, BenchSpec, Model};
use crate::demo::DemoError;
use crate::demo::events::Event;
use crate::demo::machine::{Machine, MachineSpec, NIC_DRIVER, SOUND_DRIVER};
use crate::demo::place::Place;
use crate::peer::peer_address;
use crate::sound::player::{Player, patient, patient_kernel};
use crate::sound::{Length, Sound};

/// Longest time for one recovery, or until the guest reaches its peer.
const LIMIT: Duration = Duration::from_secs(120);
/// How long after a recovery the next failure comes.
const SOON: Duration = Duration::from_millis(100);
/// Longer than all that Umbra has to do after a recovery, the snapshot's part apart.
const CALM: Duration = Duration::from_millis(700);
/// Where the test host has the snapshots of this measurement: there are none at its beginning.
const FOLDER: &str = "/tmp/rebirth";
/// Makes the control group in which those of VMs are, as docs/security.md says.
const GROUP: &str = "cd /sys/fs/cgroup && mount -t cgroup2 none . && cd /sys/fs/cgroup && echo +memory +pids +cpu > cgroup.subtree_control \
                     && mkdir umbra";
/// Most starts of a machine of each kind.
const STARTS: u32 = 3;
/// A round of the song that is played on a card, seconds.
const ROUND_SECONDS: u32 = 24;

/// The device of the driver VM that is measured.
#[derive(Clone, Debug)]
pub enum Device {
    /// A NIC.
    Nic(Model),
    /// A sound card, on which the guest plays all the time.
    Card(Model),
}

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct RebirthSpec {
    /// Of which device's driver VM.
    pub device: Device,
    /// Failures of each kind.
    pub crashes: u32,
    /// VMs' processes have control groups.
    pub cgroups: bool,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Rebirth {
    /// QEMU's model.
    pub device: String,
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
const COLD_START: &str = "first start, nothing is saved";
const FIRST_START: &str = "first start, saved as well";
const SECOND_START: &str = "second start";
const BOOTED: &str = "first life to hello, booted";
const RESTORED: &str = "life to hello, restored";
const BOOTED_AND_SAVED: &str = "standby ready, saved as well";
const READY_RESTORED: &str = "standby ready, restored";
const AT_ONCE: &str = "outage, after a first start";
const READY: &str = "outage, standby ready";
const AGAIN: &str = "outage, 0.1 s after another";
const FIRST_OF_TWO: &str = "outage, standbys = 2";
const SECOND_OF_TWO: &str = "the same, 0.1 s after another";
const NONE_WAITS: &str = "outage, standby = snapshot";

/// Ratios: what it is of, the figure, the one it is divided by.
const RATIOS: [(&str, &str, &str); 3] = [
    ("restored : booted", RESTORED, BOOTED),
    ("after a first start : ready", AT_ONCE, READY),
    ("standby = snapshot : ready", NONE_WAITS, READY),
];

/// Ratios of figures that were taken in turn: the median of those of each two, which had the same load beside them.
const PAIRS: [(&str, &str, &str); 4] = [
    ("saved : nothing is saved", FIRST_START, COLD_START),
    ("second start : first", SECOND_START, FIRST_START),
    ("0.1 s after another : ready", AGAIN, READY),
    ("the same, standbys = 2", SECOND_OF_TWO, FIRST_OF_TWO),
];

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

/// A test host with the device.
struct Stage {
    place: Place,
    driver: &'static str,
    /// The guest plays, on a card.
    plays: bool,
}

/// Takes the measurements.
///
/// # Errors
/// One could not be made.
pub fn run(spec: &RebirthSpec, say: Say<'_>) -> Result<Rebirth, DemoError> {
    let assets = Assets::prepare(say)?;
    say(&format!("booting the test host with {}", spec.device.model()));
    let (mut stage, machine) = Stage::new(&spec.device, &assets)?;
    let mut taken = Taken::default();
    let mut warm = MachineSpec { restart_limit: 3 * spec.crashes + 3, snapshot_folder: Some(FOLDER.into()), ..machine };
    if spec.cgroups {
        stage.place.expect(GROUP, LIMIT)?;
        warm.options = "cgroup = \"/umbra\"\n".into();
    }
    for n in 0..spec.crashes.min(STARTS) {
        stage.starts(&warm, &mut taken)?;
        say(&format!(
            "  {}: first starts, nothing saved and saved: {}",
            n + 1,
            last_two(&taken, [COLD_START, FIRST_START])
        ));
    }

    say("a machine where one standby waits");
    let (mut running, _) = stage.start(&warm)?;
    for n in 0..spec.crashes {
        let ready = running.await_event(STANDBY, |event| event.event == "standby-ready")?;
        taken.add_ready(&ready);
        std::thread::sleep(CALM);
        taken.add(READY, stage.crash(&mut running)?.number("outage_ms"));
        std::thread::sleep(SOON);
        taken.add(AGAIN, stage.crash(&mut running)?.number("outage_ms"));
        say(&format!("  {}: {}", n + 1, last_two(&taken, [READY, AGAIN])));
    }
    running.stop(&mut stage.place)?;

    say("a machine where two standbys wait");
    let (mut running, _) = stage.start(&MachineSpec { standbys: 2, ..warm.clone() })?;
    let (mut memory, mut available) = (Vec::new(), None);
    for n in 0..spec.crashes {
        for _ in 0..2 {
            taken.add_ready(&running.await_event(STANDBY, |event| event.event == "standby-ready")?);
        }
        std::thread::sleep(CALM);
        if n == 1 {
            memory = memory::resident(&mut running, &mut stage.place)?;
            available = running.status(&mut stage.place)?["drivers"][0]["available_memory"].as_u64();
        }
        taken.add(FIRST_OF_TWO, stage.crash(&mut running)?.number("outage_ms"));
        std::thread::sleep(SOON);
        taken.add(SECOND_OF_TWO, stage.crash(&mut running)?.number("outage_ms"));
        say(&format!("  {}: {}", n + 1, last_two(&taken, [FIRST_OF_TWO, SECOND_OF_TWO])));
    }
    running.stop(&mut stage.place)?;

    say("a machine where no standby waits");
    let (mut running, _) = stage.start(&MachineSpec { standby: "snapshot".into(), ..warm })?;
    for _ in 0..spec.crashes {
        running.await_event(STANDBY, |event| event.event == "snapshot-ready")?;
        std::thread::sleep(CALM);
        let live = stage.crash(&mut running)?;
        taken.add(NONE_WAITS, live.number("outage_ms"));
        taken.add_life(RESTORED, &live);
    }
    running.stop(&mut stage.place)?;
    Ok(Rebirth { available, ..Rebirth::new(spec.device.model(), taken, memory) })
}

impl Device {
    fn model(&self) -> &Model {
        match self {
            Self::Nic(model) | Self::Card(model) => model,
        }
    }
}

impl Stage {
    /// Boots it; it, and a machine in it.
    fn new(device: &Device, assets: &Assets) -> Result<(Self, MachineSpec), DemoError> {
        match device {
            Device::Nic(model) => {
                let (place, machine) = place(assets, ("rebirth", None), model, None)?;
                Ok((Self { place, driver: NIC_DRIVER, plays: false }, machine))
            }
            Device::Card(model) => {
                let sound = Sound::new(std::slice::from_ref(model), Length::Fed(ROUND_SECONDS), assets)?;
                let mut bench = BenchSpec::new("rebirth").nics(&[]);
                sound.add_to(&mut bench);
                let mut place = Place::Bench(Box::new(Bench::boot(bench, assets)?));
                sound.prepare(&mut place)?;
                let machine = sound.machine(0, &mut place, "hold")?;
                let machine = MachineSpec { guest_options: patient_kernel(), ..machine };
                Ok((Self { place, driver: SOUND_DRIVER, plays: true }, machine))
            }
        }
    }

    /// A first start of a machine that boots and saves nothing, one of `warm`, which boots and is saved, with a failure at once, and
    /// another start of `warm`, which is restored.
    fn starts(&mut self, warm: &MachineSpec, taken: &mut Taken) -> Result<(), DemoError> {
        self.place.expect(&format!("rm -rf {FOLDER}"), LIMIT)?;
        let (running, ms) = self.start(&MachineSpec { standby: "cold".into(), ..warm.clone() })?;
        taken.add(COLD_START, Some(ms));
        running.stop(&mut self.place)?;
        let (mut running, ms) = self.start(warm)?;
        taken.add(FIRST_START, Some(ms));
        taken.add_life(BOOTED, first_life(&running)?);
        taken.add(AT_ONCE, self.crash(&mut running)?.number("outage_ms"));
        running.stop(&mut self.place)?;
        let (running, ms) = self.start(warm)?;
        taken.add(SECOND_START, Some(ms));
        taken.add_life(RESTORED, first_life(&running)?);
        running.stop(&mut self.place)
    }

    /// Starts the machine: it, and how long it was until its guest reached the peer, or played, ms.
    fn start(&mut self, spec: &MachineSpec) -> Result<(Machine, f64), DemoError> {
        let begin = Instant::now();
        let machine = Machine::start(&mut self.place, spec)?;
        if self.plays {
            // It plays until its guest is switched off.
            Player::start_fed(&mut self.place, GUEST, &patient())?;
        } else {
            let script = format!("umbra-probe first-answer {} 30", peer_address(0));
            self.place.in_guest(GUEST, &script, LIMIT)?;
        }
        Ok((machine, begin.elapsed().as_secs_f64() * 1e3))
    }

    /// A panic: the event of the life that serves then, with the outage as Umbra counts it.
    fn crash(&mut self, running: &mut Machine) -> Result<Event, DemoError> {
        self.place.expect(&format!("umbra crash {}", self.driver), Duration::from_secs(20))?;
        running.await_live(self.driver, LIMIT)
    }
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
    fn new(device: &Model, taken: Taken, memory: Vec<Memory>) -> Self {
        let pairs = PAIRS.iter().filter_map(|(what, of, by)| Some(((*what).into(), taken.ratio(of, by)?)));
        let pairs: Vec<_> = pairs.collect();
        let figures: Vec<_> = taken.0.into_iter().filter_map(|(name, figures)| Spread::of(name, figures)).collect();
        let p50 = |name: &str| figures.iter().find(|spread| spread.name == name).map(|spread| spread.p50);
        let ratios = RATIOS
            .iter()
            .filter_map(|(what, of, by)| Some(((*what).into(), p50(of)? / p50(by)?)))
            .chain(pairs)
            .collect();
        Self { device: device.to_string(), figures, ratios, memory, available: None }
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = Spread::heading(&self.device);
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
