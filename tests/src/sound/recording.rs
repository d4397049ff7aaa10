//! The recording of a test host, cut to the song and judged.

use std::ops::Range;
use std::path::Path;

use crate::assets::Song;
use crate::wav::analysis::Analysis;
use crate::wav::{Wav, WavError};

/// Bytes before the first sample.
const HEADER_BYTES: u64 = 44;
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

impl Judged {
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
