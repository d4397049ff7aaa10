//! A picture of a recording: its waveform with the silences marked, as SVG.

use std::fmt::Write as _;

use super::Wav;
use super::analysis::Analysis;

/// Columns of the picture.
const WIDTH: usize = 1600;
/// Its height.
const HEIGHT: usize = 220;
/// Where the waveform's middle is.
const MIDDLE: f64 = 100.0;

/// Draws `heard`.
pub fn svg(heard: &Wav, analysis: &Analysis, title: &str) -> String {
    let seconds = heard.seconds(heard.frames.len()).max(f64::MIN_POSITIVE);
    let x = |at_seconds: f64| at_seconds / seconds * WIDTH as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
    );
    for silence in &analysis.silences {
        let (from, width) = (x(silence.at_ms / 1000.0), x(silence.ms / 1000.0).max(1.0));
        let _ = writeln!(
            svg,
            "<rect x=\"{from:.1}\" y=\"10\" width=\"{width:.1}\" height=\"180\" fill=\"#f4b6b0\"/>\
             <text x=\"{from:.1}\" y=\"205\" fill=\"#a03020\">{:.0} ms</text>",
            silence.ms
        );
    }
    svg.push_str("<path stroke=\"#205080\" d=\"");
    let column = heard.frames.len().div_ceil(WIDTH).max(1);
    for (n, frames) in heard.frames.chunks(column).enumerate() {
        let left = || frames.iter().map(|frame| frame[0]);
        let (low, high) = (left().min().unwrap_or(0), left().max().unwrap_or(0));
        let y = |sample: i16| MIDDLE - f64::from(sample) / 32_768.0 * 90.0;
        let _ = write!(svg, "M{n} {:.1}V{:.1}", y(high), y(low));
    }
    let title = title.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "\"/>\n<text x=\"4\" y=\"218\">{title}, {seconds:.1} s</text>\n</svg>");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_marked() {
        let tone: Vec<_> = (0..24_000i16).map(|n| [(n % 97) * 100 + 1, 1]).collect();
        let source = Wav { rate: 48_000, frames: tone.clone() };
        let heard = Wav { rate: 48_000, frames: [&tone[..12_000], &vec![[0, 0]; 4800], &tone[12_000..]].concat() };
        let picture = svg(&heard, &Analysis::of(&heard, &source), "a < b");
        assert!(picture.starts_with("<svg") && picture.contains("100 ms") && picture.contains("a &lt; b"));
    }
}
