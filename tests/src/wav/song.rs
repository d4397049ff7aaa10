//! A song to play: notes that differ from each other, never silent, so that every moment of it is recognised.

use std::f64::consts::TAU;

use super::{Frame, Wav};

/// Notes a second.
const NOTES: u32 = 4;
/// Level of a note at its quietest, at its edges; it is never silent.
const QUIET: f64 = 2000.0;
/// What is added in its middle. Their sum is far from full scale, so that an encoder does not clip.
const LOUD: f64 = 6000.0;

/// The same song for the same rate; its first seconds.
pub fn song(rate: u32, seconds: u32) -> Wav {
    let mut random = Random(1);
    let note = (rate / NOTES) as usize;
    let edge = f64::from(rate / 100);
    let total = rate as usize * seconds as usize;
    let mut frames = Vec::with_capacity(total + note);
    while frames.len() < total {
        let left = TAU * 220.0 * semitones(random.below(36)) / f64::from(rate);
        let right = TAU * 110.0 * semitones(random.below(24)) / f64::from(rate);
        frames.extend((0..note).map(|n| tone(n, note, edge, left, right)));
    }
    frames.truncate(total);
    Wav { rate, frames }
}

fn semitones(count: u32) -> f64 {
    2f64.powf(f64::from(count) / 12.0)
}

fn tone(n: usize, length: usize, edge: f64, left: f64, right: f64) -> Frame {
    let (from_start, to_end) = (n as f64, (length - n) as f64);
    let level = QUIET + LOUD * (from_start / edge).min(to_end / edge).min(1.0);
    #[expect(clippy::cast_possible_truncation, reason = "within a quarter of full scale")]
    let sample = |step: f64| (level * (step * from_start).sin()) as i16;
    [sample(left), sample(right)]
}

/// Knuth's multiplier; any sequence will do as long as it is the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from((self.0 >> 33) % u64::from(limit)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_song_is_the_same_each_time_and_never_silent() {
        let one = song(8000, 3);
        assert_eq!(one.frames.len(), 24_000);
        assert_eq!(one, song(8000, 3));
        assert_eq!(one.frames, song(8000, 5).frames[..24_000]);
        assert!(one.frames.windows(40).all(|part| part.iter().any(|frame| frame[0].abs() > 100)));
    }
}
