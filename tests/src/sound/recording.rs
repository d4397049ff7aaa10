//! The recording of a test host, cut to the song and judged.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use super::RATE;
use crate::assets::Song;
use crate::bench::patience::Stall;
use crate::wav::analysis::Analysis;
use crate::wav::{Wav, WavError};

/// Bytes before the first sample.
const HEADER_BYTES: u64 = 44;
/// Time between two looks at a recording.
const LOOK: Duration = Duration::from_millis(50);
/// What is left of the time before and after the song, seconds.
const MARGIN: usize = 1;

/// Frames in a recording that is still being written.
///
/// # Errors
/// It is not there.
pub fn frames_so_far(wav: &Path) -> std::io::Result<usize> {
    let bytes = std::fs::metadata(wav)?.len().saturating_sub(HEADER_BYTES);
    Ok(usize::try_from(bytes).unwrap_or(usize::MAX) / 4)
}

/// Waits until `length` of sound has been recorded from now on, and gives it up when for `limit`, scaled to this machine, none has.
///
/// # Errors
/// The recording cannot be read, or there is no sound in it.
pub fn await_sound(wav: &Path, length: Duration, limit: Duration) -> std::io::Result<()> {
    let (mut at, mut heard) = (frames_so_far(wav)?, 0);
    let (mut stall, mut file) = (Stall::new(limit), File::open(wav)?);
    while Duration::from_millis(1000 * heard / u64::from(RATE)) < length {
        let end = frames_so_far(wav)?;
        let mut new = vec![0; 4 * (end - at)];
        file.seek(SeekFrom::Start(HEADER_BYTES + 4 * at as u64))?;
        file.read_exact(&mut new)?;
        at = end;
        heard += new.chunks_exact(4).filter(|frame| *frame != [0; 4]).count() as u64;
        if stall.is_over(heard) {
            return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "no sound is recorded"));
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// The part of a recording that has the song in it.
#[derive(Clone, Debug)]
pub struct Judged {
    /// The part.
    pub heard: Wav,
    /// Where it begins in the recording, frames.
    pub begin: usize,
    /// The judgement of it.
    pub analysis: Analysis,
}

/// A place in a recording where the song does not simply go on.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Frame of the recording.
    pub at: usize,
    /// Time between two pieces that is not the song, ms.
    pub ms: f64,
    /// Frames of the song that were left out; negative: heard again.
    pub skipped: i64,
}

/// Faults as silences: how many, their sum and the longest, ms.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silences {
    /// How many.
    pub count: usize,
    /// All together, ms.
    pub sum_ms: f64,
    /// The longest, ms.
    pub longest_ms: f64,
}

impl Silences {
    /// Those of `faults`.
    pub fn of(faults: &[Fault]) -> Self {
        let add = |all: Self, fault: &Fault| Self {
            count: all.count + 1,
            sum_ms: all.sum_ms + fault.ms,
            longest_ms: all.longest_ms.max(fault.ms),
        };
        faults.iter().fold(Self::default(), add)
    }
}

impl Judged {
    /// Where the song does not simply go on, in order.
    pub fn faults(&self) -> Vec<Fault> {
        let pairs = self.analysis.pieces.windows(2).map(|pair| {
            let (end, next) = (pair[0].heard + pair[0].frames, pair[1]);
            let skipped = next.source as i64 - (pair[0].source + pair[0].frames) as i64;
            let ms = (next.heard - end) as f64 * 1000.0 / f64::from(self.heard.rate);
            Fault { at: self.begin + end, ms, skipped }
        });
        pairs.filter(|fault| fault.ms > 0.0 || fault.skipped != 0).collect()
    }

    /// The frame of the song that is heard at frame `at` of the recording.
    pub fn source_at(&self, at: usize) -> Option<usize> {
        let at = at.checked_sub(self.begin)?;
        let piece =
            self.analysis.pieces.iter().find(|piece| (piece.heard..piece.heard + piece.frames).contains(&at))?;
        Some(piece.source + at - piece.heard)
    }
}

/// Reads the recording `wav` of a `song`, of it the frames `part`, and judges the piece with the song in it.
///
/// # Errors
/// A file cannot be read.
pub fn judge(wav: &Path, part: Range<usize>, song: &Song) -> Result<Judged, WavError> {
    let (mut heard, source) = (Wav::read(wav)?, Wav::read(&song.reference)?);
    heard.frames.truncate(part.end);
    heard.frames.drain(..part.start.min(heard.frames.len()));
    let loud = |frame: &[i16; 2]| *frame != [0, 0];
    let first = heard.frames.iter().position(loud).unwrap_or(0);
    let last = heard.frames.iter().rposition(loud).unwrap_or(0);
    let margin = heard.rate as usize * MARGIN;
    heard.frames.truncate(last + margin);
    let before = first.saturating_sub(margin);
    heard.frames.drain(..before);
    let analysis = Analysis::of(&heard, &source);
    Ok(Judged { heard, begin: part.start + before, analysis })
}
