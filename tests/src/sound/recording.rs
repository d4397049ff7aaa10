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

/// Reads the recording `wav` of a `song`, of it the frames `part`; the piece with the song in it, and the judgement of that part.
///
/// # Errors
/// A file cannot be read.
pub fn judge(wav: &Path, part: Range<usize>, song: &Song) -> Result<(Wav, Analysis), WavError> {
    let (mut heard, source) = (Wav::read(wav)?, Wav::read(&song.reference)?);
    heard.frames.truncate(part.end);
    heard.frames.drain(..part.start.min(heard.frames.len()));
    let loud = |frame: &[i16; 2]| *frame != [0, 0];
    let first = heard.frames.iter().position(loud).unwrap_or(0);
    let last = heard.frames.iter().rposition(loud).unwrap_or(0);
    let margin = heard.rate as usize * MARGIN;
    heard.frames.truncate(last + margin);
    heard.frames.drain(..first.saturating_sub(margin));
    let analysis = Analysis::of(&heard, &source);
    Ok((heard, analysis))
}
