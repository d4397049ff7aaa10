//! How loud one tone is in a recording.

use std::f64::consts::TAU;

use super::Frame;

/// Amplitude of the tone of `hz` in `frames` at `rate`, both channels together, in sample steps: the magnitude of that one
/// term of the discrete Fourier transform. Meaningful over many periods of the tone.
pub fn amplitude(frames: &[Frame], rate: u32, hz: f64) -> f64 {
    let step = TAU * hz / f64::from(rate);
    let of = |channel: usize| {
        let mut sums = (0.0, 0.0);
        for (n, frame) in frames.iter().enumerate() {
            let (sample, phase) = (f64::from(frame[channel]), step * n as f64);
            sums = (sums.0 + sample * phase.cos(), sums.1 + sample * phase.sin());
        }
        2.0 * sums.0.hypot(sums.1) / frames.len().max(1) as f64
    };
    of(0) + of(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tone_is_heard_beside_another_and_a_third_is_not() {
        let at = |n: usize, hz: f64| (TAU * hz * n as f64 / 48_000.0).sin();
        #[expect(clippy::cast_possible_truncation, reason = "within the range")]
        let frames: Vec<Frame> =
            (0..48_000).map(|n| [(1000.0 * at(n, 440.0)) as i16, (500.0 * at(n, 1000.0)) as i16]).collect();
        assert!((amplitude(&frames, 48_000, 440.0) - 1000.0).abs() < 10.0);
        assert!((amplitude(&frames, 48_000, 1000.0) - 500.0).abs() < 10.0);
        assert!(amplitude(&frames, 48_000, 700.0) < 10.0);
        assert!(amplitude(&[], 48_000, 700.0).abs() < f64::EPSILON);
    }
}
