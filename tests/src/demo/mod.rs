//! The demonstration: a guest downloads a file over a NIC and plays a song on a sound card whose driver VMs are crashed
//! again and again, by turns and at last together; a peer outside watches, and a recording is judged. A transcript for people,
//! `result.json` for machines.
//!
//! The download is paced by progress: it is never over before the last crash, and each crash hits it under way. The song lasts
//! until the plan of crashes is done.
//! Everything that decides over success is measured outside the guest, or read in it before and after.

pub mod attempts;
mod crash;
mod disk;
mod error;
pub mod events;
mod evidence;
mod forecast;
pub mod guest_log;
pub mod hardware;
pub mod machine;
pub mod outage;
pub mod place;
mod result;
mod sound;

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::assets::{Assets, Say, target_dir};
use crate::bench::{Bench, BenchSpec, Model, brake, pcap};
use crate::disks::Medium;
use crate::peer::{Content, DEFAULT_RATE, guest_address, peer_address};
use crate::probe::client::Run;
use crate::sound::player::{Ended, Player, patient, patient_kernel};
use crate::sound::{Length, Sound};
use crash::Crashes;
pub use crash::Kind;
use disk::Disk;
pub use disk::DiskResult;
pub use error::DemoError;
use error::During;
use forecast::{Forecast, Part};
use guest_log::GuestLog;
use machine::{Machine, MachineSpec};
use place::{Here, Place};
pub use result::{CrashResult, DemoResult, NicResult};
pub use sound::{SoundCrash, SoundResult};

/// What is to be shown.
#[derive(Clone, Debug)]
pub struct DemoSpec {
    /// NIC model in the bench; ignored with `pci`.
    pub nic: Model,
    /// How often the driver VM is crashed.
    pub crashes: u32,
    /// The time between a recovery and the next failure; `None`: until a standby is ready.
    pub pause: Option<Duration>,
    /// Size of the download, bytes.
    pub bytes: u64,
    /// The sound card model in the bench that plays a song meanwhile; none on real hardware.
    pub sound: Option<Model>,
    /// The disk controller in the bench on which a database commits meanwhile; its cache is lost at each crash.
    pub disk: Option<Model>,
    /// Real hardware: its PCI address, and how the guest and the peer are addressed.
    pub hardware: Option<hardware::Wire>,
}

impl DemoSpec {
    fn devices(&self) -> String {
        let devices = [Some(&self.nic), self.sound.as_ref(), self.disk.as_ref()];
        devices.into_iter().flatten().map(Model::to_string).collect::<Vec<_>>().join(" and ")
    }
}

/// The guest in the demonstration.
const GUEST: &str = "web";

/// The test host of demonstrations: in a suite a braked one runs beside another.
fn bench_name() -> &'static str {
    if brake::is_asked_for() { "braked-demo-host" } else { "demo" }
}

/// The page of all failures, in the share and beside the result.
const REPORT: &str = "report.html";

/// Length of a round of the song, seconds: longer than what an outage or a card's buffer could be taken for another round by.
const ROUND_SECONDS: u32 = 120;

/// Longest time in which nothing may move during a recovery or the boot of a standby, as on the reference machine
/// ([`crate::bench::patience`]); standbys of up to 100 s have been seen on machines that were only twice as slow.
const RECOVERY_LIMIT: Duration = Duration::from_secs(150);

/// The same for a single command.
const STEP: Duration = Duration::from_secs(60);

/// A demonstration under way.
struct Demo<'a> {
    spec: &'a DemoSpec,
    place: Place,
    machine: Machine,
    sound: Option<Sound>,
    sound_crashes: Vec<SoundCrash>,
    player: Option<Player>,
    disk: Option<Disk>,
    say: Say<'a>,
    guest: Ipv4Addr,
    peer: Ipv4Addr,
    start: Instant,
    forecast: Forecast,
}

/// Runs the demonstration, in a test host as often as [`attempts::allowed`] if need be; of attempts that failed evidence is kept in
/// `dir`.
///
/// # Errors
/// It could not be run to its end. A result with `ok: false` is no error here.
pub fn run_attempts(spec: &DemoSpec, dir: &Path, say: Say<'_>) -> Result<DemoResult, DemoError> {
    evidence::clear(dir);
    let from = if spec.hardware.is_some() { dir.join("here") } else { target_dir().join("bench").join(bench_name()) };
    let attempt = |attempt| {
        let result = run(spec, dir, attempt, say);
        let failure = match &result {
            Ok(result) if result.ok => return Ok(result.clone()),
            Ok(result) => result.failures().join("; "),
            Err(error) => error.in_full(),
        };
        let kept = evidence::keep(dir, attempt, &failure, &from);
        if let Err(error) = &result {
            say("");
            say(&format!("The demo failed {}.", error.headline()));
        }
        for line in kept {
            say(&line);
        }
        result
    };
    if spec.hardware.is_some() { attempt(1) } else { attempts::in_test_host(say, |result| result.ok, attempt) }
}

/// Runs the demonstration once, as attempt number `attempt`; writes `result.json`, the recording with its picture, and the report of
/// all failures to `dir`.
///
/// # Errors
/// It could not be run to its end. A result with `ok: false` is no error here.
pub fn run(spec: &DemoSpec, dir: &Path, attempt: u32, say: Say<'_>) -> Result<DemoResult, DemoError> {
    std::fs::create_dir_all(dir).map_err(|e| DemoError::file("make", dir, e))?;
    let speed = brake::speed().map_err(crate::bench::BenchError::from)?;
    let assets = Assets::prepare(say)?;
    let mut forecast = Forecast::of(spec);
    for line in forecast.lines(&spec.devices()) {
        say(&line);
    }
    if speed < 1.0 {
        say(&format!("the emulator is braked to {speed} of its speed ({})", brake::SPEED_VARIABLE));
    }
    let start = Instant::now();
    let stage =
        set_up(spec, &assets, dir, say).during(|| format!("while a test host with {} was set up", spec.devices()));
    let Stage { mut place, machine, guest, peer, bound, sound, medium } = stage?;
    forecast.done(Part::Host);
    let drivers = machine.drivers().join("` and `");
    say(&format!("starting the guest `{GUEST}` and driver VMs `{drivers}` (stock Debian kernels, cold boot)"));
    let started = Machine::start(&mut place, &machine).during(|| "while the guest and its driver VMs started".into());
    let result = started.and_then(|machine| {
        let guest = match guest {
            Some(guest) => guest,
            None => hardware::address_of_guest(&mut place, GUEST)?,
        };
        forecast.done(Part::Start);
        let (sound_crashes, disk) = (Vec::new(), medium.map(Disk::new));
        Demo { spec, place, machine, sound, sound_crashes, player: None, disk, say, guest, peer, start, forecast }
            .show(dir, attempt)
    });
    drop(bound);
    let result = result?;
    result.write(&dir.join("result.json"))?;
    Ok(result)
}

struct Stage {
    place: Place,
    machine: MachineSpec,
    guest: Option<Ipv4Addr>,
    peer: Ipv4Addr,
    bound: Option<hardware::Bound>,
    sound: Option<Sound>,
    medium: Option<Medium>,
}

fn set_up(spec: &DemoSpec, assets: &Assets, dir: &Path, say: Say<'_>) -> Result<Stage, DemoError> {
    // The policy must not end the demonstration; it has scenarios of its own.
    let restart_limit = spec.crashes * 2 + 5;
    if let Some(wire) = &spec.hardware {
        let bound = hardware::Bound::bind(&wire.pci, say)?;
        let here = Place::Here(Here::new(assets, &dir.join("here"))?);
        let image = hardware::image(&wire.pci, assets, &here.share(), say)?;
        let machine = MachineSpec { restart_limit, ..MachineSpec::one_guest(&wire.pci, &image, &wire.guest) };
        let (guest, peer) = (wire.guest_address(), wire.peer);
        return Ok(Stage { place: here, machine, guest, peer, bound: Some(bound), sound: None, medium: None });
    }
    say(&format!("building the driver VM image for {}", spec.nic));
    let image = assets.driver_image(&spec.nic)?;
    let mut bench = BenchSpec::new(bench_name());
    bench.nics = vec![spec.nic.clone()];
    bench.files = vec![image.clone()];
    let song = Length::Fed(ROUND_SECONDS);
    let sound = spec.sound.as_ref().map(|model| Sound::new(std::slice::from_ref(model), song, assets)).transpose()?;
    if let Some(sound) = &sound {
        sound.add_to(&mut bench);
    }
    let medium = spec.disk.as_ref().map(|model| Medium::new(&model.0)).transpose()?;
    let disk = disk::Parts::add(medium.as_ref(), &mut bench, assets)?;
    let accel = if crate::bench::has_nested_kvm() { "KVM" } else { "emulation: this machine's CPU has no VMX or SVM" };
    say(&format!("booting the test host in QEMU with {} ({accel})", spec.devices()));
    let mut bench = Bench::boot(bench, assets)?;
    let device = bench.expect("vfio $NIC0 && printf %s $NIC0", STEP)?;
    let image = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut place = Place::Bench(Box::new(bench));
    let mut card = None;
    if let Some(sound) = &sound {
        sound.prepare(&mut place)?;
        card = Some(sound.card(0, &mut place, "skip")?);
    }
    let disk = disk.map(|parts| parts.controller(&mut place)).transpose()?;
    let mut archives = sound.as_ref().map(Sound::archives).unwrap_or_default();
    let controller = disk.map(|(controller, archive)| {
        archives.push(archive);
        controller
    });
    let machine = MachineSpec {
        restart_limit,
        sound: card,
        controller,
        archives,
        guest_options: patient_kernel(),
        ..MachineSpec::one_guest(&device, &image, &format!("{}/24", guest_address(0, 0)))
    };
    Ok(Stage { place, machine, guest: Some(guest_address(0, 0)), peer: peer_address(0), bound: None, sound, medium })
}

impl Demo<'_> {
    fn tell(&self, what: &str) {
        (self.say)(&format!("[{:6.1} s] {what}", self.start.elapsed().as_secs_f64()));
    }

    fn show(mut self, dir: &Path, attempt: u32) -> Result<DemoResult, DemoError> {
        let content = Content { bytes: self.spec.bytes };
        let before = self.begin().during(|| "while the guest began its work".into())?;
        let (crashes, mut get) = self.download(content)?;
        self.forecast.done(Part::Crashes);
        let fetched = self.finish_download(&mut get).during(|| "after the last crash".into())?;
        let progress = self.place.peer().progress()?;
        let ended = self.await_player().during(|| "at the end of the song".into())?;
        let disk = self.finish_database().during(|| "at the end of the database".into())?;
        let after = GuestLog::read(&mut self.place, GUEST)?;
        let log = after.since(&before);
        self.keep_report(dir).during(|| "while the report was made".into())?;
        let disk = disk.map(|disk| disk.with_log(&log));
        let Self { spec, place, machine, sound, sound_crashes, say, start, mut forecast, .. } = self;
        let wav = place.wav();
        let (wire_resets, place_kept) = end(place, machine).during(|| "while the machine was ended".into())?;
        let sound = match (sound, ended) {
            (Some(sound), Some(ended)) => Some(SoundResult::judge(&sound, &ended, sound_crashes, &wav, dir)?),
            _ => None,
        };
        let sha256 = fetched.split_whitespace().next().unwrap_or_default().to_owned();
        let nic = NicResult {
            model: spec.hardware.as_ref().map_or_else(|| spec.nic.to_string(), |wire| wire.pci.clone()),
            crashes: u32::try_from(crashes.len()).unwrap_or(u32::MAX),
            bytes: content.bytes,
            sha256_ok: sha256 == content.sha256(),
            connection_resets: progress.resets.max(wire_resets),
            connections: progress.connections,
            guest_log_clean: log.is_clean(),
            guest_log_new: log.lines.clone(),
            carrier_changes: log.carrier_changes,
            longest_tcp_stall_ms: crashes.iter().map(|crash| crash.tcp_stall_ms).max().unwrap_or(0),
            outage_ms: result::outages(&crashes),
            per_crash: crashes,
        };
        let result = DemoResult::new(nic, (sound, disk), (spec.crashes, attempt), start.elapsed());
        forecast.done(Part::End);
        forecast.keep();
        for line in result.closing_lines() {
            say(&line);
        }
        drop(place_kept);
        Ok(result)
    }

    /// Has the guest send ticks and play; its log before.
    fn begin(&mut self) -> Result<GuestLog, DemoError> {
        let before = GuestLog::read(&mut self.place, GUEST)?;
        let kernel = self.place.in_guest(GUEST, "uname -r", STEP)?;
        self.tell(&format!("the guest is up: Linux {}, {} on virtio-net", kernel.trim(), self.guest));
        let ticks = format!("umbra-probe tick {} </dev/null >/dev/null 2>&1 & echo", self.peer);
        self.place.in_guest(GUEST, &ticks, STEP)?;
        if self.sound.is_some() {
            self.player = Some(Player::start_fed(&mut self.place, GUEST, &patient())?);
            self.tell("the guest plays an MP3 with mpg123 on virtio-snd");
        }
        self.start_database()?;
        Ok(before)
    }

    /// `umbra report` of everything that has failed.
    fn keep_report(&mut self, dir: &Path) -> Result<(), DemoError> {
        let (from, to) = (self.place.share().join(REPORT), dir.join(REPORT));
        let script = format!("umbra report -o {}/{REPORT}", self.place.share_inside());
        self.place.expect(&script, STEP)?;
        std::fs::copy(&from, &to).map(drop).map_err(|e| DemoError::file("copy", &from, e))
    }

    fn await_player(&mut self) -> Result<Option<(Ended, usize)>, DemoError> {
        let Some(player) = self.player.take() else { return Ok(None) };
        self.tell("the song comes to its end");
        player.finish(&mut self.place).map(Some)
    }

    /// Crashes while the guest downloads; the download is not yet over then.
    fn download(&mut self, content: Content) -> Result<(Vec<CrashResult>, Run), DemoError> {
        let plan = Crashes::plan(self.spec.crashes);
        let mib = content.bytes >> 20;
        self.tell(&format!("the guest downloads {mib} MiB from {} by TCP and sends a UDP tick every 10 ms", self.peer));
        self.place.peer().offer(content.bytes, DEFAULT_RATE, 0)?;
        let url = format!("http://{}:{}/file", self.peer, crate::peer::ports::HTTP);
        let mut get = self.place.start_in_guest(GUEST, &format!("set -o pipefail; wget -q -O - {url} | sha256sum"))?;
        Ok((crash::run(self, &plan, content, &mut get)?, get))
    }

    /// Lets the download come to its end; what `sha256sum` printed in the guest.
    fn finish_download(&mut self, get: &mut Run) -> Result<String, DemoError> {
        self.place.peer().allow(u64::MAX)?;
        let acknowledged = |place: &mut Place| Ok(place.peer().progress()?.acknowledged);
        match self.place.await_end(get, RECOVERY_LIMIT, acknowledged) {
            Ok(()) => Ok(get.output().stdout.clone()),
            Err(DemoError::Still { .. }) => Err(self.download_failed("the download does not come to its end", get)),
            Err(error) => Err(error),
        }
    }

    /// A download that failed, with what everybody says of it.
    fn download_failed(&mut self, what: &str, get: &Run) -> DemoError {
        let progress = self.place.peer().progress();
        let (megabytes, of) = (progress.as_ref().map_or(0, |p| p.acknowledged) >> 20, self.spec.bytes >> 20);
        let (output, said) = (get.output(), self.machine.said());
        DemoError::Umbra {
            what: format!("{what} ({megabytes} of {of} MiB)"),
            said: format!("{}{}{progress:?}\n{said}\n{}", output.stdout, output.stderr, self.place.tail()),
        }
    }
}

/// Ends machine and place; counts the resets that the capture shows.
fn end(mut place: Place, machine: Machine) -> Result<(u32, Option<Place>), DemoError> {
    machine.stop(&mut place)?;
    match place {
        Place::Bench(bench) => {
            let dir = bench.shutdown()?;
            let capture = dir.join("nic0.pcap");
            let resets = pcap::resets(&capture).map_err(|e| DemoError::file("read", &capture, e))?;
            Ok((u32::try_from(resets.len()).unwrap_or(u32::MAX), None))
        }
        here @ Place::Here(_) => Ok((0, Some(here))),
    }
}
