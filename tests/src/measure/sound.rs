//! What sound through a driver VM is like: the silence of each crash beside the bare re-initialisation of the same
//! driver, and what undisturbed playback costs beside the card passed straight to the guest, with a busy guest.
//! All from one boot of the test host, judged by its recording.

use std::ops::Range;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::outages::Spread;
use super::processor_ticks;
use crate::assets::{Assets, Say};
use crate::bench::patience::whole_factor;
use crate::bench::{Bench, BenchSpec, Model};
use crate::demo::DemoError;
use crate::demo::machine::{Attach, Machine, SOUND_DRIVER};
use crate::demo::place::Place;
use crate::sound::player::{Player, patient, patient_kernel};
use crate::sound::recording::{self, Judged};
use crate::sound::{Length, Sound};
use crate::wav::analysis::Analysis;

const GUEST: &str = "web";
const STEP: Duration = Duration::from_secs(60);
/// Longest time for one recovery.
const RECOVERY: Duration = Duration::from_secs(120);
/// Between the moment that the next standby is ready and the next crash.
const BETWEEN: Duration = Duration::from_secs(2);
/// Playback straight is there for comparison: no longer than this.
const STRAIGHT_SECONDS: u32 = 60;
/// How often the guest is asked how far its player is.
const READINGS: u32 = 15;
/// How long the processors are watched.
const WATCH: Duration = Duration::from_secs(10);
/// Song for each crash on an emulated machine, and at its end, seconds.
const SONG_SECONDS: u32 = 24;
/// A command that keeps the guest's processor busy.
const BUSY: &str = "nice -n 5 sh -c 'while :; do :; done' </dev/null >/dev/null 2>&1 & echo";

/// What is to be measured.
#[derive(Clone, Debug)]
pub struct SoundMeasureSpec {
    /// The card.
    pub model: Model,
    /// `skip` or `hold`.
    pub policy: String,
    /// Crashes in one song; no such song if 0.
    pub crashes: u32,
    /// Undisturbed playback beside a busy guest, seconds; none if 0. Straight for at most [`STRAIGHT_SECONDS`].
    pub seconds: u32,
}

/// A song through crashes.
#[derive(Clone, Debug, Serialize)]
pub struct Crashed {
    /// mpg123's exit status.
    pub player_status: i32,
    /// What it said.
    pub player_said: String,
    /// The judgement of the recording.
    pub heard: Analysis,
    /// Each outage as Umbra counts it, ms, and its parts.
    pub outages: Vec<Value>,
    /// What the shadow counted.
    pub sums: Value,
}

/// A song undisturbed, beside a busy guest.
#[derive(Clone, Debug, Serialize)]
pub struct Undisturbed {
    /// Through a driver VM, or straight.
    pub path: &'static str,
    /// Share of the test host's processor time that was used while the guest's own was not busy, percent.
    pub busy_percent: f64,
    /// From the moment that the player's sample is in its buffer until it is in the recording; the buffer, which the player
    /// keeps full, is part of it. Exact to some 20 ms: that is how the recording is written.
    pub latency_ms: Option<Spread>,
    /// By how much that is longer than the delay that the guest's kernel tells its players.
    pub unknown_ms: Option<Spread>,
    /// The judgement of the recording.
    pub heard: Analysis,
    /// Underruns that the card reported.
    pub xruns: Option<u64>,
}

/// All figures of one card.
#[derive(Clone, Debug, Serialize)]
pub struct SoundResults {
    /// QEMU's model.
    pub model: String,
    /// `skip` or `hold`.
    pub policy: String,
    /// The song through crashes.
    pub crashed: Option<Crashed>,
    /// Silences of bare re-initialisations in the test host, ms.
    pub reinit_ms: Vec<f64>,
    /// Undisturbed playback.
    pub undisturbed: Vec<Undisturbed>,
}

/// What the guest's kernel said of its stream, and where the recording was.
struct Reading {
    /// Frames of the recording.
    at: usize,
    /// Frames that the player has written.
    written: usize,
    /// Frames that, as the guest knows, are written and not heard.
    delay: usize,
}

impl Reading {
    fn of(at: usize, status: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim_start_matches([' ', ':']).trim().parse().ok()
        };
        Some(Self { at, written: field("appl_ptr")?, delay: field("delay")? })
    }

    /// Latency, and by how much it is longer than the guest knows, ms.
    fn latency_ms(&self, judged: &Judged) -> Option<(f64, f64)> {
        let latency = judged.heard.seconds(self.written.checked_sub(judged.source_at(self.at)?)?) * 1000.0;
        Some((latency, latency - judged.heard.seconds(self.delay) * 1000.0))
    }
}

/// Undisturbed playback, not yet judged.
struct Played {
    one: Undisturbed,
    part: Range<usize>,
    readings: Vec<Reading>,
}

struct Stage<'a> {
    place: Place,
    sound: Sound,
    spec: &'a SoundMeasureSpec,
    say: Say<'a>,
}

/// Takes all measurements.
///
/// # Errors
/// One could not be made.
pub fn run(spec: &SoundMeasureSpec, say: Say<'_>) -> Result<SoundResults, DemoError> {
    let assets = Assets::prepare(say)?;
    let seconds = (SONG_SECONDS * whole_factor() * (spec.crashes + 1)).max(spec.seconds);
    let sound = Sound::new(std::slice::from_ref(&spec.model), Length::Seconds(seconds), &assets)?;
    let mut bench = BenchSpec::new("measure-sound").nics(&[]);
    sound.add_to(&mut bench);
    say(&format!("booting the test host with {}", spec.model));
    let mut place = Place::Bench(Box::new(Bench::boot(bench, &assets)?));
    sound.prepare(&mut place)?;
    let mut stage = Stage { place, sound, spec, say };
    let crashed = if spec.crashes > 0 { Some(stage.crashed()?) } else { None };
    let mut undisturbed = Vec::new();
    if spec.seconds > 0 {
        undisturbed.push(stage.undisturbed("driver VM")?);
        undisturbed.push(stage.undisturbed("passthrough")?);
    }
    let reinit = stage.reinit()?;
    let Stage { place, sound, .. } = stage;
    let wav = place.wav();
    if let Place::Bench(bench) = place {
        bench.shutdown()?;
    }
    let judge = |part: Range<usize>| recording::judge(&wav, part, &sound.song);
    let undisturbed = undisturbed.into_iter().map(|Played { one, part, readings }| {
        let judged = judge(part)?;
        let (latency, unknown) = readings.iter().filter_map(|reading| reading.latency_ms(&judged)).unzip();
        let latency_ms = Spread::of("latency", latency);
        let unknown_ms = Spread::of("of it unknown to the guest", unknown);
        Ok(Undisturbed { latency_ms, unknown_ms, heard: judged.analysis, ..one })
    });
    Ok(SoundResults {
        model: spec.model.to_string(),
        policy: spec.policy.clone(),
        crashed: crashed
            .map(|(crashed, part)| Ok::<_, DemoError>(Crashed { heard: judge(part)?.analysis, ..crashed }))
            .transpose()?,
        reinit_ms: judge(reinit)?.analysis.silences.iter().map(|silence| silence.ms).collect(),
        undisturbed: undisturbed.collect::<Result<_, DemoError>>()?,
    })
}

impl Stage<'_> {
    fn frames(&self) -> Result<usize, DemoError> {
        let wav = self.place.wav();
        recording::frames_so_far(&wav).map_err(|e| DemoError::file("read", &wav, e))
    }

    fn crashed(&mut self) -> Result<(Crashed, Range<usize>), DemoError> {
        (self.say)(&format!("a song through {} crashes ({})", self.spec.crashes, self.spec.policy));
        let begin = self.frames()?;
        let mut spec = self.sound.machine(0, &mut self.place, &self.spec.policy)?;
        spec.guest_options = patient_kernel();
        spec.restart_limit = self.spec.crashes + 5;
        let mut machine = Machine::start(&mut self.place, &spec)?;
        let player = Player::start(&mut self.place, GUEST, &patient())?;
        let mut outages = Vec::new();
        for _ in 0..self.spec.crashes {
            machine.await_standby(SOUND_DRIVER, RECOVERY)?;
            std::thread::sleep(BETWEEN);
            self.place.expect(&format!("umbra crash {SOUND_DRIVER}"), STEP)?;
            let live = machine.await_live(SOUND_DRIVER, RECOVERY)?;
            (self.say)(&format!("    served again after {:.0} ms", live.number("outage_ms").unwrap_or_default()));
            outages.push(Value::Object(live.fields));
        }
        let ended = player.wait(&mut self.place)?;
        let sums = machine.status(&mut self.place)?["guests"][0]["sounds"][0]["sums"].take();
        machine.stop(&mut self.place)?;
        let (player_status, player_said) = (ended.status, ended.said);
        let crashed = Crashed { player_status, player_said, heard: Analysis::default(), outages, sums };
        Ok((crashed, begin..self.frames()?))
    }

    /// Plays for a while with nothing else to do, then beside a busy guest.
    fn undisturbed(&mut self, path: &'static str) -> Result<Played, DemoError> {
        let straight = path == "passthrough";
        let seconds = if straight { self.spec.seconds.min(STRAIGHT_SECONDS) } else { self.spec.seconds };
        (self.say)(&format!("{seconds} s undisturbed, {path}"));
        let begin = self.frames()?;
        let mut spec = self.sound.machine(0, &mut self.place, &self.spec.policy)?;
        spec.guest_options = patient_kernel();
        let modules = spec.sound.as_ref().map(|card| card.image.clone()).unwrap_or_default();
        if straight {
            spec.attach = Attach::Passthrough;
            spec.device = spec.sound.take().map(|card| card.device).unwrap_or_default();
        }
        let mut machine = Machine::start(&mut self.place, &spec)?;
        if spec.sound.is_none() {
            // The codec's driver has to be there before the controller's; cards power up muted.
            let script = format!(
                "rmmod {modules} 2>/dev/null; modprobe snd_hda_codec_generic; modprobe {modules}; \
                await 20 ls /dev/snd/pcmC0D0p; for c in Master PCM Front; do amixer -q sset $c 100% unmute 2>/dev/null; done; true"
            );
            self.place.in_guest(GUEST, &script, STEP)?;
        }
        let start = Instant::now();
        let _player = Player::start(&mut self.place, GUEST, &patient())?;
        let before = processor_ticks(&mut self.place)?;
        std::thread::sleep(WATCH);
        let after = processor_ticks(&mut self.place)?;
        let mut readings = Vec::new();
        for _ in 0..READINGS {
            readings.extend(self.reading()?);
        }
        self.place.in_guest(GUEST, BUSY, STEP)?;
        std::thread::sleep(Duration::from_secs(seconds.into()).saturating_sub(start.elapsed()));
        let xruns = if spec.sound.is_some() {
            machine.status(&mut self.place)?["guests"][0]["sounds"][0]["sums"]["xruns"].as_u64()
        } else {
            None
        };
        let end = self.frames()?;
        machine.stop(&mut self.place)?;
        let busy_percent = 100.0 * (after.0 - before.0) / (after.1 - before.1).max(1.0);
        let one =
            Undisturbed { path, busy_percent, latency_ms: None, unknown_ms: None, heard: Analysis::default(), xruns };
        Ok(Played { one, part: begin..end, readings })
    }

    /// The middle of the time that the question took is taken for the moment of the answer.
    fn reading(&mut self) -> Result<Option<Reading>, DemoError> {
        let before = self.frames()?;
        let status = self.place.in_guest(GUEST, "cat /proc/asound/card0/pcm0p/sub0/status", STEP)?;
        let after = self.frames()?;
        Ok(Reading::of(before.midpoint(after), &status))
    }

    /// The card's driver in the test host: taken off and on while it plays, the player started again at once.
    fn reinit(&mut self) -> Result<Range<usize>, DemoError> {
        (self.say)("bare re-initialisations, in the test host");
        let begin = self.frames()?;
        let script = "modprobe snd_hda_codec_generic; unvfio $SND0; d=/sys/bus/pci/devices/$SND0
            card() { basename $(ls -d $d/sound/card*) | tr -d a-z; }; ready() { ls $d/sound/card*/pcm*p >/dev/null; }
            play() { await 20 ready; n=$(card); for c in Master PCM Front; do amixer -q -c $n sset $c 100% unmute 2>/dev/null; done
              mpg123 -q -k $1 -a hw:$n /tmp/song.mp3 </dev/null >/dev/null 2>&1 & p=$!; }
            cd /tmp && cpio -idu < /share/song.cpio 2>/dev/null; drv=$(readlink -f $d/driver); play 0
            for i in 1 2 3; do sleep 3; kill $p; echo $SND0 > $drv/unbind; echo $SND0 > $drv/bind; play $((i * 150)); done
            sleep 3; kill $p; true";
        self.place.expect(script, STEP)?;
        Ok(begin..self.frames()?)
    }
}

impl Crashed {
    fn figures(&self) -> Vec<Spread> {
        let silences: Vec<f64> = self.heard.silences.iter().map(|silence| silence.ms).collect();
        let told = self.outages.iter().filter_map(|live| live.get("outage_ms").and_then(Value::as_f64)).collect();
        let parts: Vec<Value> = self.outages.iter().filter_map(|live| live.get("parts").cloned()).collect();
        let mut figures: Vec<_> = Spread::of("silence in the recording", silences).into_iter().collect();
        figures.extend(Spread::of("outage as Umbra counts it", told));
        figures.extend(Spread::of_parts(&parts));
        figures
    }

    fn line(&self) -> String {
        let Self { player_status, player_said, heard, outages, .. } = self;
        format!(
            "{} crashes in one song; mpg123: status {player_status}, said {player_said:?}\n  \
             samples lost {}, doubled {}, unknown {}, clicks {}, ends not heard {:?}\n",
            outages.len(),
            heard.lost,
            heard.doubled,
            heard.unknown,
            heard.clicks,
            heard.unheard_ends,
        )
    }
}

impl SoundResults {
    /// For people.
    pub fn table(&self) -> String {
        let spread =
            |ms: Option<&Spread>| ms.map_or("-".into(), |ms| format!("{:.0} ms, at most {:.0}", ms.p50, ms.max));
        let mut figures: Vec<_> = self.crashed.as_ref().map(Crashed::figures).unwrap_or_default();
        figures.extend(Spread::of("bare re-initialisation", self.reinit_ms.clone()));
        let mut text = Spread::heading(&format!("{}, policy {}", self.model, self.policy));
        text.extend(figures.iter().map(Spread::line));
        text.extend(self.crashed.as_ref().map(Crashed::line));
        for one in &self.undisturbed {
            text.push_str(&format!(
                "  undisturbed, {:<12} latency {} (unknown to the guest: {}), pieces {}, silences {}, underruns {}, \
                processors busy {:.1} %\n",
                one.path,
                spread(one.latency_ms.as_ref()),
                spread(one.unknown_ms.as_ref()),
                one.heard.pieces.len(),
                one.heard.silences.len(),
                one.xruns.map_or("-".into(), |xruns| xruns.to_string()),
                one.busy_percent,
            ));
        }
        text
    }
}
