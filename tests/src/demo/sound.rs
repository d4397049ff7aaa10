//! The sound card's part of a demonstration: what the recording shows, and how the player ended.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::DemoError;
use super::events::Event;
use super::outage::median_and_max;
use super::result::{OutageFigures, span};
use crate::sound::player::Ended;
use crate::sound::recording::{self, Judged};
use crate::sound::{RATE, Sound};
use crate::wav::picture;

/// Frames of unknown sound that a crash may leave: one buffer of the card (200 ms), in which emulated cards now and then play
/// what is half written.
const UNKNOWN_AT_MOST: usize = RATE as usize / 5;

/// One crash of the sound card's driver VM.
#[derive(Clone, Debug, Serialize)]
pub struct SoundCrash {
    /// At the same moment as one of the NIC's.
    pub together: bool,
    /// From mask to live, as Umbra counts, ms.
    pub umbra_outage_ms: Option<f64>,
    /// Its parts, ms.
    pub parts: Value,
}

impl SoundCrash {
    pub(super) fn new(live: &Event, together: bool) -> Self {
        let parts = live.fields.get("parts").cloned().unwrap_or(Value::Null);
        Self { together, umbra_outage_ms: live.number("outage_ms"), parts }
    }

    pub(super) fn line(&self) -> String {
        let took = self.umbra_outage_ms.map(|ms| format!(" in {}", span(ms))).unwrap_or_default();
        format!("  the card plays again{took}; mpg123 went on meanwhile, and so did the download")
    }
}

/// The sound card's part of the result. Samples are counted once for both channels.
#[derive(Clone, Debug, Serialize)]
pub struct SoundResult {
    /// QEMU's model.
    pub model: String,
    /// Crashes that were survived.
    pub crashes: usize,
    /// mpg123's exit status.
    pub player_status: i32,
    /// What it said: nothing.
    pub player_said: String,
    /// Silences in the recording.
    pub silence_ms: Option<OutageFigures>,
    /// Silences in the recording: one for each crash.
    pub silences: usize,
    /// Samples of the song that were due while there was no card.
    pub samples_lost: usize,
    /// Samples that were heard again, as when a card repeats its buffer before its DMA is switched off.
    pub samples_doubled: usize,
    /// Samples heard that are neither silence nor the song.
    pub samples_unknown: usize,
    /// Jumps outside the song's own.
    pub clicks: usize,
    /// Each crash.
    pub per_crash: Vec<SoundCrash>,
}

impl SoundResult {
    /// Judges the recording of a test host that is off, in which a player was fed so many `pieces` of the song; writes it, what
    /// should have been heard, and its picture to `dir`.
    pub(super) fn judge(
        sound: &Sound,
        (ended, pieces): &(Ended, usize),
        per_crash: Vec<SoundCrash>,
        wav: &Path,
        dir: &Path,
    ) -> Result<Self, DemoError> {
        let Judged { heard, analysis, .. } = {
            let song = sound.song.played(*pieces, &dir.join("song.wav"))?;
            recording::judge(wav, 0..usize::MAX, &song)?
        };
        let model = sound.models.iter().map(ToString::to_string).collect::<String>();
        let title = format!("{model} through {} crashes of its driver", per_crash.len());
        let svg = dir.join("sound.svg");
        let write = std::fs::write(&svg, picture::svg(&heard, &analysis, &title));
        write.map_err(|e| DemoError::file("write", &svg, e))?;
        let kept = dir.join("sound.wav");
        heard.write(&kept).map_err(|e| DemoError::file("write", &kept, e))?;
        let silences: Vec<f64> = analysis.silences.iter().map(|silence| silence.ms).collect();
        Ok(Self {
            model,
            crashes: per_crash.len(),
            player_status: ended.status,
            player_said: ended.said.clone(),
            silence_ms: median_and_max(&silences).map(|(p50, max)| OutageFigures { p50, max }),
            silences: silences.len(),
            samples_lost: analysis.lost,
            samples_doubled: analysis.doubled,
            samples_unknown: analysis.unknown,
            clicks: analysis.clicks,
            per_crash,
        })
    }

    /// The player noticed nothing, every crash was heard as a silence with the song going on behind it, and nothing else was
    /// heard than the song (a changed pitch is unknown sound).
    pub fn is_ok(&self) -> bool {
        let noticed = self.player_status != 0 || !self.player_said.is_empty();
        let song_alone = self.samples_unknown <= UNKNOWN_AT_MOST * self.crashes;
        !noticed && self.silences >= self.crashes && song_alone
    }

    /// What is not as it should be where it is not.
    pub(super) fn failure(&self) -> String {
        format!(
            "the song was not played as it should be: mpg123 ended with status {} and {} bytes of messages, {} silences in {} crashes, \
             {} samples of unknown sound",
            self.player_status,
            self.player_said.len(),
            self.silences,
            self.crashes,
            self.samples_unknown
        )
    }

    pub(super) fn closing_lines(&self) -> Vec<String> {
        let said = if self.player_said.is_empty() { "no message" } else { self.player_said.trim() };
        let mut lines = vec![
            format!("{}: {} crashes of the driver VM in one song", self.model, self.crashes),
            format!("  mpg123 ended with status                 {}, {said}", self.player_status),
        ];
        if let Some(silence) = self.silence_ms {
            lines.push(format!(
                "  silence in the recording                 {} (median), {} (longest)",
                span(silence.p50),
                span(silence.max)
            ));
        }
        lines.push(format!(
            "  samples lost, doubled                    {}, {} (picture: sound.svg)",
            self.samples_lost, self.samples_doubled
        ));
        lines
    }
}
