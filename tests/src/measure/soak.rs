//! Full load for a while with nothing failing: a false alarm is a failure that Umbra sees where there is none. The guest
//! sends and receives as fast as it can and plays songs, and idle loops take the test host's processors beside it.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use crate::assets::{Assets, Say};
use crate::bench::{Bench, BenchSpec, Model};
use crate::demo::DemoError;
use crate::demo::events::Event;
use crate::demo::machine::{Machine, MachineSpec, NIC_DRIVER, SOUND_DRIVER};
use crate::demo::place::Place;
use crate::peer::{guest_address, peer_address};
use crate::sound::player::{patient, patient_kernel};
use crate::sound::{Length, Sound};

const GUEST: &str = "web";
const STEP: Duration = Duration::from_secs(120);
/// Longest time for a standby to be ready.
const STANDBY: Duration = Duration::from_secs(180);
/// How often it is told how far it is.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// Length of the song that is played again and again, seconds.
const SONG_SECONDS: u32 = 60;
/// Length of a transfer, seconds.
const TRANSFER_SECONDS: u32 = 20;
/// Events that tell of a failure.
const ALARMS: [&str; 4] = ["driver-failed", "masked", "standby-failed", "quarantined"];

/// What is to be done.
#[derive(Clone, Debug)]
pub struct SoakSpec {
    /// The NIC.
    pub nic: Model,
    /// The sound card.
    pub sound: Model,
    /// How long.
    pub seconds: u32,
    /// Idle loops in the test host.
    pub loops: u32,
}

/// What was seen.
#[derive(Clone, Debug, Serialize)]
pub struct SoakResult {
    /// The NIC's model.
    pub nic: String,
    /// The sound card's.
    pub sound: String,
    /// How long the load lasted.
    pub seconds: f64,
    /// Processors of the test host, and idle loops on them.
    pub processors: u32,
    /// Idle loops on them, beside guest, driver VMs and standbys.
    pub loops: u32,
    /// Events that tell of a failure: none.
    pub alarms: Vec<Value>,
    /// Frames from the guest and to it.
    pub frames: (u64, u64),
    /// Times that mpg123 ended by itself: its guest starved, or the card failed.
    pub player_ended: usize,
    /// What the sound shadow counted.
    pub samples: Value,
}

/// Loads a machine.
///
/// # Errors
/// It could not be started, or does not answer. A false alarm is no error here.
pub fn run(spec: &SoakSpec, say: Say<'_>) -> Result<SoakResult, DemoError> {
    let assets = Assets::prepare(say)?;
    let image = assets.driver_image(&spec.nic)?;
    let sound = Sound::new(std::slice::from_ref(&spec.sound), Length::Seconds(SONG_SECONDS), &assets)?;
    let mut bench = BenchSpec { nics: vec![spec.nic.clone()], capture: None, ..BenchSpec::new("soak") };
    bench.files = vec![image.clone()];
    sound.add_to(&mut bench);
    let processors = bench.cpus;
    say(&format!("booting the test host with {} and {}", spec.nic, spec.sound));
    let mut bench = Bench::boot(bench, &assets)?;
    let device = bench.expect("vfio $NIC0 && printf %s $NIC0", STEP)?;
    let image = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut place = Place::Bench(Box::new(bench));
    sound.prepare(&mut place)?;
    let machine = MachineSpec {
        guest_options: patient_kernel(),
        sound: Some(sound.card(0, &mut place, "skip")?),
        archives: sound.archives(),
        ..MachineSpec::one_guest(&device, &image, &format!("{}/24", guest_address(0, 0)))
    };
    let mut machine = Machine::start(&mut place, &machine)?;
    for driver in [NIC_DRIVER, SOUND_DRIVER] {
        machine.await_standby(driver, STANDBY)?;
    }
    load(&mut place, spec.loops)?;
    say(&format!("full load for {} s, with {} idle loops on {processors} processors", spec.seconds, spec.loops));
    let (start, length) = (Instant::now(), Duration::from_secs(spec.seconds.into()));
    let mut alarms = Vec::new();
    while start.elapsed() < length {
        std::thread::sleep(TELL_EVERY.min(length.saturating_sub(start.elapsed())));
        let before = machine.seen.len();
        machine.drain();
        let news = machine.seen[before..].iter().filter(|event| ALARMS.contains(&event.event.as_str()));
        for alarm in news {
            say(&format!("    {:5.0} s: {}: {}", start.elapsed().as_secs_f64(), alarm.event, alarm.text("reason")));
            alarms.push(value(alarm));
        }
        say(&format!("    {:5.0} s, {} alarms", start.elapsed().as_secs_f64(), alarms.len()));
    }
    let seconds = start.elapsed().as_secs_f64();
    let status = machine.status(&mut place)?["guests"][0].take();
    let ended = place.in_guest(GUEST, "cat /tmp/mpg123.ended 2>/dev/null | wc -l", STEP)?;
    machine.stop(&mut place)?;
    if let Place::Bench(bench) = place {
        bench.shutdown()?;
    }
    let count = |name: &str| status["nets"][0][name].as_u64().unwrap_or(0);
    Ok(SoakResult {
        nic: spec.nic.to_string(),
        sound: spec.sound.to_string(),
        seconds,
        processors: processors.into(),
        loops: spec.loops,
        alarms,
        frames: (count("frames_out"), count("frames_in")),
        player_ended: ended.trim().parse().unwrap_or(usize::MAX),
        samples: status["sounds"][0]["sums"].clone(),
    })
}

/// Everything that makes work; it ends with the machines.
fn load(place: &mut Place, loops: u32) -> Result<(), DemoError> {
    let (peer, seconds) = (peer_address(0), TRANSFER_SECONDS);
    let transfers = format!(
        "while :; do umbra-probe receive {peer} {seconds}; umbra-probe send {peer} {seconds}; done </dev/null >/dev/null 2>&1 & echo"
    );
    let songs = format!(
        "while :; do mpg123 -q --loop -1 {} /song.mp3; echo $? >>/tmp/mpg123.ended; sleep 1; done </dev/null >/dev/null 2>&1 & echo",
        patient()
    );
    place.in_guest(GUEST, &songs, STEP)?;
    place.in_guest(GUEST, &transfers, STEP)?;
    place.expect(
        &format!("for n in $(seq {loops}); do (while :; do :; done) </dev/null >/dev/null 2>&1 & done; echo"),
        STEP,
    )?;
    Ok(())
}

fn value(event: &Event) -> Value {
    let mut fields = event.fields.clone();
    fields.insert("event".into(), event.event.clone().into());
    Value::Object(fields)
}

impl SoakResult {
    /// For people.
    pub fn line(&self) -> String {
        format!(
            "{} and {}: {} false alarms in {:.0} s of full load ({} idle loops on {} processors); {} frames sent, {} received, \
             mpg123 ended {} times",
            self.nic,
            self.sound,
            self.alarms.len(),
            self.seconds,
            self.loops,
            self.processors,
            self.frames.0,
            self.frames.1,
            self.player_ended,
        )
    }
}
