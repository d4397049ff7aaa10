//! Sound in the nested bench: a guest plays a song on a card whose driver is in a driver VM, and the WAV file that the
//! emulated card wrote is compared with what should have been heard.
//!
//! The file stands still while no voice is open, so a second card plays silence throughout, driven by the test host:
//! with it the file is a record in real time.

pub mod player;
pub mod recording;

use std::path::PathBuf;
use std::time::Duration;

use crate::assets::{Assets, Song};
use crate::bench::{BenchSpec, Model};
use crate::demo::DemoError;
use crate::demo::machine::{Attach, MachineSpec, SoundCard};
use crate::demo::place::Place;

/// The rate of songs and recordings: one that every card here has exactly, so that nothing is resampled.
pub const RATE: u32 = 44_100;

/// The card that keeps the time.
const CLOCK: &str = "es1370";
/// Its driver in the test host.
const CLOCK_MODULE: &str = "snd_ens1370";

/// Longest time for a single step on an emulated machine.
const STEP: Duration = Duration::from_secs(60);

/// How long a song is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// So many seconds.
    Seconds(u32),
    /// As long as it is fed; a round of it has about so many seconds.
    Fed(u32),
}

/// What a test host needs for sound.
#[derive(Clone, Debug)]
pub struct Sound {
    /// The cards' models.
    pub models: Vec<Model>,
    /// Their driver VMs' images.
    pub images: Vec<PathBuf>,
    /// What the guest plays.
    pub song: Song,
    /// Programs for guest and test host.
    programs: PathBuf,
}

fn file_name(path: &std::path::Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl Sound {
    /// Cards of these models, and a song of this length at [`RATE`].
    ///
    /// # Errors
    /// An image or the song could not be made.
    pub fn new(models: &[Model], length: Length, assets: &Assets) -> Result<Self, DemoError> {
        let images = models.iter().map(|model| assets.driver_image(model)).collect::<Result<_, _>>()?;
        let song = match length {
            Length::Seconds(seconds) => assets.song(RATE, seconds)?,
            Length::Fed(seconds) => assets.song_in_pieces(RATE, seconds)?,
        };
        let programs = assets.sound_programs().to_owned();
        Ok(Self { models: models.to_vec(), images, song, programs })
    }

    /// Puts cards, clock and files into a test host to be; the cards become `SND0` and on, the clock the last.
    pub fn add_to(&self, bench: &mut BenchSpec) {
        bench.sound = self.models.iter().cloned().chain([CLOCK.into()]).collect();
        bench.wav_rate = RATE;
        bench.files.extend(self.images.iter().chain([&self.programs, &self.song.archive]).cloned());
    }

    /// Binds the cards for their driver VMs and starts the clock. To be called once in a test host.
    ///
    /// # Errors
    /// The test host could not do it.
    pub fn prepare(&self, place: &mut Place) -> Result<(), DemoError> {
        let cards: String = (0..self.models.len()).map(|n| format!(" $SND{n}")).collect();
        let (programs, share) = (file_name(&self.programs), place.share_inside());
        let script = format!(
            "for card in{cards}; do vfio $card || exit 1; done
            cd / && cpio -idu < {share}/{programs} 2>/dev/null; modprobe {CLOCK_MODULE}; await 10 test -e /dev/snd/pcmC0D0p
            aplay -q -D hw:0 -t raw -f S16_LE -r {RATE} -c 2 --buffer-size=16384 /dev/zero </dev/null >/tmp/clock.log 2>&1 &
            await 10 grep -q RUNNING /proc/asound/card0/pcm0p/sub0/status || {{ cat /tmp/clock.log; exit 1; }}"
        );
        place.expect(&script, STEP).map(drop)
    }

    /// Card `n` as a machine has it.
    ///
    /// # Errors
    /// The test host does not answer.
    pub fn card(&self, n: usize, place: &mut Place, policy: &str) -> Result<SoundCard, DemoError> {
        let device = place.expect(&format!("printf %s $SND{n}"), STEP)?;
        Ok(SoundCard { device, image: file_name(&self.images[n]), policy: policy.into() })
    }

    /// Archives that a guest needs to play the song.
    pub fn archives(&self) -> Vec<String> {
        vec![file_name(&self.programs), file_name(&self.song.archive)]
    }

    /// A machine with one guest and no NIC, on card `n`.
    ///
    /// # Errors
    /// The test host does not answer.
    pub fn machine(&self, n: usize, place: &mut Place, policy: &str) -> Result<MachineSpec, DemoError> {
        let mut spec = MachineSpec::one_guest("", "", "");
        spec.attach = Attach::Without;
        spec.sound = Some(self.card(n, place, policy)?);
        spec.archives = self.archives();
        Ok(spec)
    }
}
