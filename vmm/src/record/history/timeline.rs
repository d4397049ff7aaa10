//! The time line of one recovery as an inline SVG: its parts one behind the other, from the first sign to live.

use std::fmt::Write as _;

use super::parts::{duration, timed};
use crate::record::parts::RecoveryParts;

/// Width of the drawing, in its own units.
const WIDTH: f64 = 1000.0;
/// Height of the bar.
const BAR: f64 = 30.0;
/// A part narrower than this has no name in it, and one below 1.5 units would not be seen.
const ROOM: f64 = 7.2;
const THINNEST: f64 = 1.5;

/// Draws `parts` and what came at their `end`; `whole` is the outage in ms, where it is known: what no part explains is drawn as the rest.
///
/// `scale` is the time that the full width stands for, so that drawings below each other can be compared.
pub(super) fn svg(parts: &RecoveryParts, end: &str, whole: Option<f64>, scale: f64) -> String {
    let timed = timed(parts);
    let sum: f64 = timed.iter().map(|(_, ms)| ms).sum();
    let rest = whole.map_or(0.0, |whole| whole - sum);
    let total = sum + rest.max(0.0);
    let per_ms = WIDTH / scale.max(total).max(f64::MIN_POSITIVE);
    let mut out = String::new();
    let label: Vec<_> = timed.iter().map(|(part, ms)| format!("{} {}", part.name, duration(*ms))).collect();
    // Writing to a string cannot fail.
    let _ = write!(out, "<svg viewBox=\"0 0 {WIDTH} 52\" role=\"img\" aria-label=\"{}\">", label.join(", "));
    let mut x = 0.0;
    for (part, ms) in &timed {
        let width = (ms * per_ms).max(THINNEST);
        segment(&mut out, (x, width), part.name, *ms, part.meaning);
        x += width;
    }
    // Less than a hundredth is the time between the parts' own clocks.
    if rest > total / 100.0 {
        segment(
            &mut out,
            (x, rest * per_ms),
            "rest",
            rest,
            "in none of the parts: an attempt before this one, or the time between parts",
        );
        x += rest * per_ms;
    }
    let _ = write!(out, "<line class=\"axis\" x1=\"0\" x2=\"{WIDTH}\" y1=\"35\" y2=\"35\"/>");
    let (anchor, at) = if x > WIDTH * 0.85 { ("end", x.min(WIDTH)) } else { ("start", x + 6.0) };
    let y = if anchor == "end" { 48.0 } else { BAR / 2.0 + 4.0 };
    let _ = write!(out, "<text x=\"0\" y=\"48\" class=\"soft\">first sign</text>");
    let _ = write!(out, "<text x=\"{at:.1}\" y=\"{y}\" text-anchor=\"{anchor}\">{end} {}</text>", duration(total));
    out.push_str("</svg>");
    out
}

fn segment(out: &mut String, (x, width): (f64, f64), name: &str, ms: f64, meaning: &str) {
    let _ = write!(
        out,
        "<rect class=\"p-{name}\" x=\"{x:.2}\" y=\"0\" width=\"{width:.2}\" height=\"{BAR}\"><title>{name} {}: {meaning}</title></rect>",
        duration(ms)
    );
    let text = duration(ms);
    #[allow(clippy::cast_precision_loss)]
    let (long, short) = ((name.len() + text.len() + 1) as f64 * ROOM, name.len() as f64 * ROOM);
    let words = match width {
        width if width > long => format!("{name} {text}"),
        width if width > short => name.to_owned(),
        _ => return,
    };
    let class = if name == "rest" { "soft" } else { "inside" };
    let _ = write!(
        out,
        "<text class=\"{class}\" x=\"{:.2}\" y=\"19\" text-anchor=\"middle\">{words}</text>",
        x + width / 2.0
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_as_the_times_and_the_unexplained_rest_is_drawn() {
        let parts = RecoveryParts { boot_ms: Some(500.0), probe_ms: Some(250.0), ..RecoveryParts::default() };
        let drawing = svg(&parts, "live after", Some(1000.0), 1000.0);
        assert!(drawing.contains("class=\"p-boot\" x=\"0.00\" y=\"0\" width=\"500.00\""), "{drawing}");
        assert!(drawing.contains("class=\"p-rest\" x=\"750.00\" y=\"0\" width=\"250.00\""), "{drawing}");
        assert!(drawing.contains("live after 1.00 s"), "{drawing}");
        let smaller = svg(&parts, "live after", Some(750.0), 1500.0);
        assert!(smaller.contains("width=\"333.33\"") && !smaller.contains("p-rest"), "{smaller}");
        assert!(svg(&RecoveryParts::default(), "", None, 0.0).ends_with("</svg>"), "nothing known is no panic");
    }
}
