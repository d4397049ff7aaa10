//! Compares a recording with its source: which pieces of the source were heard, in which order, and what was between.
//!
//! Pieces are found by blocks of [`WINDOW`] frames that are equal sample by sample, so a changed pitch, level or
//! format is no piece at all but unknown sound. The source should not repeat itself within a window, and where it does, as a
//! song that is played in rounds, not sooner than after [`AHEAD`].

use std::collections::HashMap;

use serde::Serialize;

use super::{Frame, Wav};

/// Frames of a block of the source, which must be equal to begin a piece: 1.3 ms at 48 kHz. Tones of a few hundred hertz
/// do not repeat exactly within it once an encoder has been at them. What is shorter than two blocks may be missed.
const WINDOW: usize = 64;
/// Windows of the source that look alike and are remembered.
const ALIKE: usize = 64;
/// How far ahead of where it was a recording is looked for first, in frames: 15 s at 44.1 kHz, longer than most outages.
const AHEAD: usize = 15 * 44_100;
/// How far behind it is looked for then, where a card repeats its buffer: 5 s at 44.1 kHz. What is not there either is looked for
/// further ahead.
const BEHIND: usize = 5 * 44_100;
/// A shorter silence is part of the music, milliseconds.
const SILENCE_MS: usize = 10;
/// A jump between neighbouring samples that counts as a click: a quarter of full scale.
const CLICK: i32 = 16_384;

/// A piece of the source in the recording, in frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Piece {
    /// Where in the recording.
    pub heard: usize,
    /// Where in the source.
    pub source: usize,
    /// How long.
    pub frames: usize,
}

/// A silence in the recording.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Silence {
    /// When it begins, milliseconds from the start of the recording.
    pub at_ms: f64,
    /// How long it lasts, milliseconds.
    pub ms: f64,
}

/// The judgement.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Analysis {
    /// Pieces in the order of the recording.
    pub pieces: Vec<Piece>,
    /// Silences between the first and the last piece.
    pub silences: Vec<Silence>,
    /// Frames of the source between the first piece and the last that were never heard.
    pub lost: usize,
    /// Frames heard again.
    pub doubled: usize,
    /// Frames heard between the first and the last piece that are neither zero nor source.
    pub unknown: usize,
    /// Jumps between neighbouring frames, outside the pieces and at their edges.
    pub clicks: usize,
    /// Frames of the source before the first piece and behind the last.
    pub unheard_ends: (usize, usize),
}

impl Analysis {
    /// Judges `heard` against `source`, which have the same rate.
    pub fn of(heard: &Wav, source: &Wav) -> Self {
        let pieces = Index::new(&source.frames).pieces(&heard.frames);
        let (first, last) = match (pieces.first(), pieces.last()) {
            (Some(first), Some(last)) => (first.heard, last.heard + last.frames),
            _ => (0, heard.frames.len()),
        };
        let (lost, doubled) = coverage(&pieces);
        let (unknown, stuttered) = between(heard, source, &pieces);
        let begin = pieces.iter().map(|p| p.source).min().unwrap_or(0);
        let end = pieces.iter().map(|p| p.source + p.frames).max().unwrap_or(0);
        Self {
            silences: silences(heard, first, last),
            lost,
            doubled: doubled + stuttered,
            unknown,
            clicks: clicks(&heard.frames, &pieces),
            unheard_ends: (begin, source.frames.len() - end),
            pieces,
        }
    }

    /// The longest silence and the one in the middle of their row, milliseconds.
    pub fn silence_max_and_median(&self) -> Option<(f64, f64)> {
        let mut lengths: Vec<f64> = self.silences.iter().map(|silence| silence.ms).collect();
        lengths.sort_by(f64::total_cmp);
        Some((*lengths.last()?, lengths[lengths.len() / 2]))
    }
}

/// Blocks of the source by the hash of their frames. Found in a recording by a hash that rolls over it frame by
/// frame, so that time and memory grow with the length of both and no faster.
struct Index<'a> {
    source: &'a [Frame],
    places: HashMap<u64, Vec<usize>>,
}

/// A window's hash is a polynomial of its frames in this number, modulo 2^64.
const BASE: u64 = 0x9e37_79b9_7f4a_7c15;

fn value(frame: Frame) -> u64 {
    u64::from(frame[0].cast_unsigned()) << 16 | u64::from(frame[1].cast_unsigned())
}

fn hash(window: &[Frame]) -> u64 {
    window.iter().fold(0u64, |hash, frame| hash.wrapping_mul(BASE).wrapping_add(value(*frame)))
}

impl<'a> Index<'a> {
    fn new(source: &'a [Frame]) -> Self {
        let mut places: HashMap<u64, Vec<usize>> = HashMap::new();
        for (n, block) in source.chunks_exact(WINDOW).enumerate() {
            let places = places.entry(hash(block)).or_default();
            if places.len() < ALIKE {
                places.push(n * WINDOW);
            }
        }
        Self { source, places }
    }

    /// Walks through the recording; where a piece could continue in several places, it is the next one.
    fn pieces(&self, heard: &[Frame]) -> Vec<Piece> {
        // The factor of the frame that leaves a window.
        let first = (0..WINDOW).fold(1u64, |power, _| power.wrapping_mul(BASE));
        let mut pieces: Vec<Piece> = Vec::new();
        let (mut at, mut begin, mut expected, mut rolling) = (0, 0, 0, None);
        while at + WINDOW <= heard.len() {
            let window = &heard[at..at + WINDOW];
            let now = rolling.take().unwrap_or_else(|| hash(window));
            let found = if now == 0 { None } else { self.places.get(&now) };
            if let Some(source) = found.and_then(|places| self.nearest(places, expected, window)) {
                let piece = self.extended(heard, begin, at, source);
                (at, expected) = (piece.heard + piece.frames, piece.source + piece.frames);
                begin = at;
                pieces.push(piece);
                continue;
            }
            let next = heard.get(at + WINDOW).map(|frame| value(*frame));
            rolling = next.map(|next| {
                now.wrapping_mul(BASE).wrapping_add(next).wrapping_sub(value(heard[at]).wrapping_mul(first))
            });
            at += 1;
        }
        pieces
    }

    /// The first place from `expected` on where `window` is, if it is not further than [`AHEAD`]; else the last one before it, if it is not
    /// further than [`BEHIND`]; else any.
    fn nearest(&self, places: &[usize], expected: usize, window: &[Frame]) -> Option<usize> {
        // A block that begins before `expected` may hold it.
        let next = places.partition_point(|place| *place + WINDOW <= expected);
        let same = |place: &&usize| self.source.get(**place..**place + WINDOW) == Some(window);
        let ahead = places[next..].iter().find(same);
        let behind = places[..next].iter().rev().find(same);
        let near_ahead = ahead.filter(|place| **place <= expected + AHEAD);
        let near_behind = behind.filter(|place| **place + BEHIND >= expected);
        near_ahead.or(near_behind).or(ahead).or(behind).copied()
    }

    /// The piece around the window at `at`, which is `source` in the source; it begins no earlier than `begin`.
    fn extended(&self, heard: &[Frame], begin: usize, at: usize, source: usize) -> Piece {
        let behind = heard[at..].iter().zip(&self.source[source..]).take_while(|(a, b)| a == b).count();
        let before = heard[begin..at].iter().rev().zip(self.source[..source].iter().rev());
        let before = before.take_while(|(a, b)| a == b).count();
        Piece { heard: at - before, source: source - before, frames: before + behind }
    }
}

/// Frames of the source, from the first to the last heard, that are in no piece, and those in more than one.
fn coverage(pieces: &[Piece]) -> (usize, usize) {
    let mut sorted: Vec<_> = pieces.iter().map(|p| (p.source, p.source + p.frames)).collect();
    sorted.sort_unstable();
    let Some(&(_, mut reached)) = sorted.first() else { return (0, 0) };
    let (mut lost, mut doubled) = (0, 0);
    for &(start, end) in &sorted[1..] {
        lost += start.saturating_sub(reached);
        doubled += reached.min(end).saturating_sub(start);
        reached = reached.max(end);
    }
    (lost, doubled)
}

/// Frames between the pieces that are not zero: those that are unknown, and those that are heard again in a stutter too short to be a
/// piece.
fn between(heard: &Wav, source: &Wav, pieces: &[Piece]) -> (usize, usize) {
    let (mut unknown, mut stuttered) = (0, 0);
    for pair in pieces.windows(2) {
        let end = pair[0].source + pair[0].frames;
        let gap = &heard.frames[pair[0].heard + pair[0].frames..pair[1].heard];
        let sound = gap.iter().filter(|frame| **frame != [0, 0]).count();
        let behind = &source.frames[end.saturating_sub(BEHIND)..end.min(source.frames.len())];
        if is_short_stutter(gap, behind) {
            stuttered += sound;
        } else {
            unknown += sound;
        }
    }
    (unknown, stuttered)
}

/// What is between two pieces is, silence apart, a part of what was `behind`, too short for [`Index`].
fn is_short_stutter(gap: &[Frame], behind: &[Frame]) -> bool {
    let loud = |frame: &Frame| *frame != [0, 0];
    let Some((first, last)) = gap.iter().position(loud).zip(gap.iter().rposition(loud)) else { return false };
    let sound = &gap[first..=last];
    sound.len() < 2 * WINDOW && behind.windows(sound.len()).any(|part| part == sound)
}

/// Silences from frame `first` to frame `last`.
fn silences(heard: &Wav, first: usize, last: usize) -> Vec<Silence> {
    let least = heard.rate as usize * SILENCE_MS / 1000;
    let (mut all, mut at) = (Vec::new(), first);
    while at < last {
        let run = heard.frames[at..last].iter().take_while(|frame| **frame == [0, 0]).count();
        if run >= least.max(1) {
            all.push(Silence { at_ms: heard.seconds(at) * 1000.0, ms: heard.seconds(run) * 1000.0 });
        }
        at += run.max(1);
    }
    all
}

fn clicks(heard: &[Frame], pieces: &[Piece]) -> usize {
    let inside = |at: usize| {
        let next = pieces.partition_point(|piece| piece.heard <= at);
        next > 0 && at + 1 < pieces[next - 1].heard + pieces[next - 1].frames
    };
    let jump = |pair: &[Frame]| (0..2).any(|c| (i32::from(pair[0][c]) - i32::from(pair[1][c])).abs() >= CLICK);
    heard.windows(2).enumerate().filter(|(at, pair)| jump(pair) && !inside(*at)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> Wav {
        let mut state = 1u32;
        let mut noise = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 18) as i16 - 8192
        };
        Wav { rate: 48_000, frames: (0..48_000).map(|_| [noise(), noise()]).collect() }
    }

    fn heard(parts: &[&[Frame]]) -> Wav {
        Wav { rate: 48_000, frames: parts.concat() }
    }

    #[test]
    fn the_source_itself_is_one_piece() {
        let source = source();
        let analysis = Analysis::of(&heard(&[&[[0, 0]; 999], &source.frames, &[[0, 0]; 5]]), &source);
        assert_eq!(analysis.pieces, [Piece { heard: 999, source: 0, frames: 48_000 }]);
        assert_eq!((analysis.lost, analysis.doubled, analysis.unknown, analysis.clicks), (0, 0, 0, 0));
        assert!(analysis.silences.is_empty());
        assert_eq!(analysis.unheard_ends, (0, 0));
    }

    #[test]
    fn a_gap_in_real_time_is_a_silence_and_lost() {
        let source = source();
        let gap = vec![[0, 0]; 4800];
        let analysis = Analysis::of(&heard(&[&source.frames[..20_000], &gap, &source.frames[24_800..]]), &source);
        assert_eq!((analysis.lost, analysis.doubled, analysis.unknown), (4800, 0, 0));
        assert_eq!(analysis.silences.len(), 1);
        assert!((analysis.silences[0].ms - 100.0).abs() < 0.1);
        assert_eq!(analysis.silence_max_and_median().map(|(max, _)| max.round()), Some(100.0));
    }

    #[test]
    fn a_held_gap_loses_nothing_and_a_seam_may_double() {
        let source = source();
        let gap = vec![[0, 0]; 9600];
        let analysis = Analysis::of(&heard(&[&source.frames[..20_100], &gap, &source.frames[20_000..]]), &source);
        assert_eq!((analysis.lost, analysis.doubled), (0, 100));
    }

    #[test]
    fn a_stutter_in_a_song_of_rounds_is_no_leap_to_the_next_round() {
        let round: Vec<Frame> = source().frames.iter().cycle().take(AHEAD + 48_000).copied().collect();
        let mut round = round;
        // No two parts of a round are alike.
        for (n, frame) in round.iter_mut().enumerate() {
            frame[1] ^= i16::try_from(n / 48_000).unwrap();
        }
        let source = Wav { rate: 48_000, frames: round.repeat(3) };
        let again = &round[18_000..20_000];
        let parts = [&source.frames[..20_000], again, &source.frames[24_000..]];
        let analysis = Analysis::of(&heard(&parts), &source);
        assert_eq!((analysis.lost, analysis.doubled, analysis.unknown), (4000, 2000, 0));
        assert_eq!(analysis.unheard_ends, (0, 0));
    }

    #[test]
    fn a_stutter_is_heard_again() {
        let source = source();
        let again = &source.frames[18_000..20_000];
        let parts = [&source.frames[..20_000], again, again, &source.frames[24_000..]];
        let analysis = Analysis::of(&heard(&parts), &source);
        assert_eq!((analysis.lost, analysis.doubled, analysis.pieces.len()), (4000, 4000, 4));
    }

    #[test]
    fn a_card_that_ran_dry_for_a_moment_is_no_unknown_sound() {
        let source = source();
        let parts =
            [&source.frames[..20_000], &source.frames[11_000..11_124], &[[0, 0]; 317], &source.frames[20_000..]];
        let analysis = Analysis::of(&heard(&parts), &source);
        assert_eq!((analysis.lost, analysis.doubled, analysis.unknown), (0, 124, 0));
        assert!(analysis.silences.is_empty());
    }

    #[test]
    fn a_stutter_shorter_than_a_window_is_heard_again_and_as_short_a_noise_is_unknown() {
        let source = source();
        let (before, after) = (&source.frames[..20_000], &source.frames[20_000..]);
        let analysis = Analysis::of(&heard(&[before, &source.frames[15_000..15_050], after]), &source);
        assert_eq!((analysis.lost, analysis.doubled, analysis.unknown), (0, 50, 0));
        let noise: Vec<Frame> = source.frames[15_000..15_050].iter().map(|f| [f[0] / 3, f[1] / 3]).collect();
        let analysis = Analysis::of(&heard(&[before, &noise, after]), &source);
        assert_eq!((analysis.lost, analysis.doubled), (0, 0));
        assert!(analysis.unknown > 40, "{}", analysis.unknown);
    }

    #[test]
    fn another_level_is_unknown() {
        let source = source();
        let quiet: Vec<Frame> = source.frames[10_000..30_000].iter().map(|f| [f[0] / 2, f[1] / 2]).collect();
        let parts = [&source.frames[..10_000], &quiet, &source.frames[30_000..]];
        let analysis = Analysis::of(&heard(&parts), &source);
        assert_eq!((analysis.lost, analysis.unknown), (20_000, 20_000));
    }

    #[test]
    fn a_jump_outside_the_pieces_is_a_click() {
        let source = source();
        let spike = [[0, 0], [30_000, 0], [0, 0]];
        let gap = vec![[0, 0]; 1000];
        let parts = [&source.frames[..10_000], &gap, &spike, &gap, &source.frames[10_000..]];
        let analysis = Analysis::of(&heard(&parts), &source);
        assert_eq!((analysis.clicks, analysis.unknown), (2, 1));
    }
}
