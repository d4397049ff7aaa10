//! The demonstration: a guest downloads a file over a NIC and plays a song on a sound card whose driver VMs are crashed
//! again and again, by turns and at last together; a peer outside watches, and a recording is judged. A transcript for people, `result.json` for machines.
//!
//! The download is paced by progress: it is never over before the last crash, and each crash hits it under way.
//! Everything that decides over success is measured outside the guest, or read in it before and after.

pub mod attempts;
mod crash;
pub mod events;
pub mod guest_log;
pub mod hardware;
pub mod machine;
pub mod outage;
pub mod place;
mod result;
mod sound;

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::assets::{AssetError, Assets, Say};
use crate::bench::{Bench, BenchError, BenchSpec, Model, pcap};
use crate::peer::{Content, DEFAULT_RATE, PeerError, guest_address, peer_address};
use crate::probe::client::ClientError;
use crate::sound::Sound;
use crate::sound::player::{Ended, PATIENT, PATIENT_KERNEL, Player};
use crate::wav::WavError;
use crash::Crashes;
use guest_log::GuestLog;
use machine::{Machine, MachineSpec};
use place::{Here, Place};
pub use result::{CrashResult, DemoResult, NicResult};
pub use sound::{SoundCrash, SoundResult};

/// Why there was no demonstration. (One that failed has a [`DemoResult`] whose `ok` is false.)
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// Something is not installed or built.
    #[error(transparent)]
    Assets(#[from] AssetError),
    /// The test host.
    #[error(transparent)]
    Bench(#[from] BenchError),
    /// The peer.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// A recording.
    #[error(transparent)]
    Wav(#[from] WavError),
    /// A script.
    #[error("a script could not be run")]
    Exec(#[source] ClientError),
    /// Umbra did not do what was asked.
    #[error("{what}; it said:\n{said}")]
    Umbra {
        /// What was seen.
        what: String,
        /// Its output.
        said: String,
    },
    /// The player did not play on.
    #[error("{name} in the guest plays no more:\n{said}")]
    Player {
        /// Which.
        name: &'static str,
        /// How it ended, if it has, and what the guest knows of it.
        said: String,
    },
    /// The real device cannot be used.
    #[error("{0}")]
    Device(String),
    /// A file operation.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl DemoError {
    /// The test host or the guest in it did not answer, or not as it should: on an emulated machine perhaps for no fault of
    /// Umbra's.
    pub fn may_be_emulation(&self) -> bool {
        matches!(self, Self::Umbra { .. } | Self::Player { .. } | Self::Exec(_) | Self::Bench(_))
    }

    pub(crate) fn file(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File { operation, path: path.into(), source }
    }
}

/// What is to be shown.
#[derive(Clone, Debug)]
pub struct DemoSpec {
    /// NIC model in the bench; ignored with `pci`.
    pub nic: Model,
    /// How often the driver VM is crashed.
    pub crashes: u32,
    /// Size of the download, bytes.
    pub bytes: u64,
    /// The sound card model in the bench that plays a song meanwhile; none on real hardware.
    pub sound: Option<Model>,
    /// Real hardware: its PCI address, and how the guest and the peer are addressed.
    pub hardware: Option<hardware::Wire>,
}

impl DemoSpec {
    fn song_seconds(&self) -> u32 {
        SONG_SECONDS * (self.crashes + 1)
    }
}

/// The guest in the demonstration.
const GUEST: &str = "web";

/// The page of all failures, in the share and beside the result.
const REPORT: &str = "report.html";

/// So much song for each crash, and once more: two recoveries, one after the other, on an emulated machine.
const SONG_SECONDS: u32 = 30;

/// Longest time for one recovery, emulated machines included.
const RECOVERY_LIMIT: Duration = Duration::from_secs(120);

/// A demonstration under way.
struct Demo<'a> {
    spec: &'a DemoSpec,
    place: Place,
    machine: Machine,
    sound: Option<Sound>,
    sound_crashes: Vec<SoundCrash>,
    player: Option<Player>,
    say: Say<'a>,
    guest: Ipv4Addr,
    peer: Ipv4Addr,
    start: Instant,
}

/// Runs the demonstration; writes `result.json`, the recording with its picture, and the report of all failures to `dir`.
///
/// # Errors
/// It could not be run to its end. A result with `ok: false` is no error here.
pub fn run(spec: &DemoSpec, dir: &Path, say: Say<'_>) -> Result<DemoResult, DemoError> {
    std::fs::create_dir_all(dir).map_err(|e| DemoError::file("make", dir, e))?;
    let assets = Assets::prepare(say)?;
    let start = Instant::now();
    let Stage { mut place, machine, guest, peer, bound, sound } = set_up(spec, &assets, dir, say)?;
    let drivers = machine.drivers().join("` and `");
    say(&format!("starting the guest `{GUEST}` and driver VMs `{drivers}` (stock Debian kernels, cold boot)"));
    let result = Machine::start(&mut place, &machine).and_then(|machine| {
        let guest = match guest {
            Some(guest) => guest,
            None => hardware::address_of_guest(&mut place, GUEST)?,
        };
        Demo { spec, place, machine, sound, sound_crashes: Vec::new(), player: None, say, guest, peer, start }.show(dir)
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
        return Ok(Stage { place: here, machine, guest, peer, bound: Some(bound), sound: None });
    }
    say(&format!("building the driver VM image for {}", spec.nic));
    let image = assets.driver_image(&spec.nic)?;
    let mut bench = BenchSpec::new("demo");
    bench.nics = vec![spec.nic.clone()];
    bench.files = vec![image.clone()];
    let seconds = spec.song_seconds();
    let sound =
        spec.sound.as_ref().map(|model| Sound::new(std::slice::from_ref(model), seconds, assets)).transpose()?;
    if let Some(sound) = &sound {
        sound.add_to(&mut bench);
    }
    let accel = if crate::bench::has_nested_kvm() { "KVM" } else { "emulation: this machine's CPU has no VMX or SVM" };
    let devices: Vec<_> = [Some(&spec.nic), spec.sound.as_ref()].into_iter().flatten().map(Model::to_string).collect();
    say(&format!("booting the test host in QEMU with {} ({accel})", devices.join(" and ")));
    let mut bench = Bench::boot(bench, assets)?;
    let device = bench.expect("vfio $NIC0 && printf %s $NIC0", Duration::from_secs(30))?;
    let image = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut place = Place::Bench(Box::new(bench));
    let mut card = None;
    if let Some(sound) = &sound {
        sound.prepare(&mut place)?;
        card = Some(sound.card(0, &mut place, "skip")?);
    }
    let machine = MachineSpec {
        restart_limit,
        sound: card,
        archives: sound.as_ref().map(Sound::archives).unwrap_or_default(),
        guest_options: PATIENT_KERNEL,
        ..MachineSpec::one_guest(&device, &image, &format!("{}/24", guest_address(0, 0)))
    };
    Ok(Stage { place, machine, guest: Some(guest_address(0, 0)), peer: peer_address(0), bound: None, sound })
}

impl Demo<'_> {
    fn tell(&self, what: &str) {
        (self.say)(&format!("[{:6.1} s] {what}", self.start.elapsed().as_secs_f64()));
    }

    fn show(mut self, dir: &Path) -> Result<DemoResult, DemoError> {
        let content = Content { bytes: self.spec.bytes };
        let before = GuestLog::read(&mut self.place, GUEST)?;
        let kernel = self.place.in_guest(GUEST, "uname -r", Duration::from_secs(20))?;
        self.tell(&format!("the guest is up: Linux {}, {} on virtio-net", kernel.trim(), self.guest));
        let ticks = format!("umbra-probe tick {} </dev/null >/dev/null 2>&1 & echo", self.peer);
        self.place.in_guest(GUEST, &ticks, Duration::from_secs(20))?;
        self.start_player()?;
        let (crashes, fetched) = self.download(content)?;
        let progress = self.place.peer().progress()?;
        let ended = self.await_player()?;
        let after = GuestLog::read(&mut self.place, GUEST)?;
        let log = after.since(&before);
        self.keep_report(dir)?;
        let Self { spec, place, machine, sound, sound_crashes, say, start, .. } = self;
        let wav = place.wav();
        let (wire_resets, place_kept) = end(place, machine)?;
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
        let result = DemoResult::new(nic, sound, spec.crashes, start.elapsed());
        for line in result.closing_lines() {
            say(&line);
        }
        drop(place_kept);
        Ok(result)
    }

    /// `umbra report` of everything that has failed.
    fn keep_report(&mut self, dir: &Path) -> Result<(), DemoError> {
        let (from, to) = (self.place.share().join(REPORT), dir.join(REPORT));
        let script = format!("umbra report -o {}/{REPORT}", self.place.share_inside());
        self.place.expect(&script, Duration::from_secs(60))?;
        std::fs::copy(&from, &to).map(drop).map_err(|e| DemoError::file("copy", &from, e))
    }

    fn start_player(&mut self) -> Result<(), DemoError> {
        if self.sound.is_some() {
            self.player = Some(Player::start(&mut self.place, GUEST, PATIENT)?);
            self.tell("the guest plays an MP3 with mpg123 on virtio-snd");
        }
        Ok(())
    }

    fn await_player(&mut self) -> Result<Option<Ended>, DemoError> {
        let Some(player) = self.player.take() else { return Ok(None) };
        self.tell("the song plays on to its end");
        let limit = Duration::from_secs(u64::from(self.spec.song_seconds()) + 60);
        player.wait(&mut self.place, limit).map(Some)
    }

    /// Downloads while crashing; what `sha256sum` printed in the guest.
    fn download(&mut self, content: Content) -> Result<(Vec<CrashResult>, String), DemoError> {
        let plan = Crashes::plan(self.spec.crashes);
        let mib = content.bytes >> 20;
        self.tell(&format!("the guest downloads {mib} MiB from {} by TCP and sends a UDP tick every 10 ms", self.peer));
        self.place.peer().offer(content.bytes, DEFAULT_RATE, 0)?;
        let url = format!("http://{}:{}/file", self.peer, crate::peer::ports::HTTP);
        let limit = Duration::from_secs(120) + RECOVERY_LIMIT * self.spec.crashes;
        let mut get =
            self.place.start_in_guest(GUEST, &format!("set -o pipefail; wget -q -O - {url} | sha256sum"), limit)?;
        let results = crash::run(self, &plan, content, &mut get)?;
        self.place.peer().allow(u64::MAX)?;
        if !get.poll(Duration::from_secs(120)).map_err(DemoError::Exec)? {
            self.tell("the download did not come to its end within two minutes after the last crash");
        }
        Ok((results, get.output().stdout.clone()))
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
