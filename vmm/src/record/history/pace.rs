//! How much a guest's device moved around an outage, as an inline SVG: what it sent above the line, what it got below.

use std::fmt::Write as _;

use umbra_shadow::Class;

use super::page::escaped;
use super::parts::duration;
use crate::record::history::DevicePace;

/// Width of the drawing, in its own units.
const WIDTH: f64 = 1000.0;
/// Height of each half.
const HALF: f64 = 40.0;
/// Where the line between them is.
const MIDDLE: f64 = 20.0 + HALF;
/// Most steps drawn: as many as an event has.
const DRAWN: usize = 240;

/// Draws `pace`, with `outage` (ms) shaded. Empty where nothing moved at all.
pub(super) fn svg(pace: &DevicePace, outage: Option<f64>) -> String {
    let DevicePace { guest, device, steps } = pace;
    let name = escaped(&format!("{guest}.{device}"));
    let (sent, received) = (&steps.out[..steps.out.len().min(DRAWN)], &steps.into[..steps.into.len().min(DRAWN)]);
    let count = sent.len().max(received.len());
    let most = sent.iter().chain(received).copied().max().unwrap_or(0);
    if most == 0 || steps.step_ms == 0 {
        return String::new();
    }
    let (step_ms, width) = (real(steps.step_ms), WIDTH / real(count));
    let x = |ms: f64| (ms / step_ms * width).clamp(0.0, WIDTH);
    let (verbs, unit) = match device.class {
        Class::Net => (["sent", "received"], "frames"),
        Class::Sound => (["played", "recorded"], "samples"),
        Class::Block => (["written", "read"], "requests"),
    };
    let rate = |steps_of: &[u64]| {
        let most = steps_of.iter().copied().max().unwrap_or(0);
        format!("{:.0}", real(most) * 1000.0 / step_ms)
    };
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        out,
        "<svg viewBox=\"0 0 {WIDTH} {:.0}\" role=\"img\" aria-label=\"{unit} of {name} around the outage\">",
        MIDDLE + HALF + 18.0
    );
    let begin = real(steps.before_ms);
    let end = begin + outage.unwrap_or(0.0).max(0.0);
    let _ = write!(
        out,
        "<rect class=\"away\" x=\"{:.1}\" y=\"20\" width=\"{:.1}\" height=\"{:.1}\"/>",
        x(begin),
        (x(end) - x(begin)).max(1.0),
        2.0 * HALF
    );
    for (moved, up) in [(sent, true), (received, false)] {
        for (n, frames) in moved.iter().enumerate().filter(|(_, frames)| **frames > 0) {
            let height = (real(*frames) / real(most) * HALF).max(0.8);
            let (class, y) = if up { ("bar", MIDDLE - height) } else { ("into", MIDDLE) };
            let _ = write!(
                out,
                "<rect class=\"{class}\" x=\"{:.2}\" y=\"{y:.2}\" width=\"{:.2}\" height=\"{height:.2}\"/>",
                real(n) * width,
                (width - 0.4).max(0.4)
            );
        }
    }
    let _ = write!(
        out,
        "<line class=\"axis\" x1=\"0\" x2=\"{WIDTH}\" y1=\"{MIDDLE}\" y2=\"{MIDDLE}\"/>\
         <text x=\"0\" y=\"13\">{name}: {unit} {} (above) and {} (below) in steps of {}</text>\
         <text x=\"{WIDTH}\" y=\"13\" text-anchor=\"end\" class=\"soft\">at most {} and {} a second</text>\
         <text x=\"0\" y=\"{:.0}\" class=\"soft\">{} before the loss</text>\
         <text x=\"{WIDTH}\" y=\"{:.0}\" text-anchor=\"end\" class=\"soft\">2 s after</text></svg>",
        verbs[0],
        verbs[1],
        duration(step_ms),
        rate(sent),
        rate(received),
        MIDDLE + HALF + 14.0,
        duration(begin),
        MIDDLE + HALF + 14.0
    );
    out
}

/// A count as a coordinate.
#[allow(clippy::cast_precision_loss)]
fn real(count: impl TryInto<u64>) -> f64 {
    count.try_into().unwrap_or(u64::MAX) as f64
}

#[cfg(test)]
mod tests {
    use umbra_shadow::DeviceId;

    use super::*;
    use crate::wire::messages::PaceSteps;

    fn of(guest: &str, device: DeviceId, steps: PaceSteps) -> DevicePace {
        DevicePace { guest: guest.into(), device, steps }
    }

    fn net(steps: PaceSteps) -> DevicePace {
        of("web", DeviceId::net(0), steps)
    }

    fn steps(out: Vec<u64>, into: Vec<u64>) -> PaceSteps {
        PaceSteps { step_ms: 25, before_ms: 50, out, into }
    }

    #[test]
    fn the_outage_is_shaded_and_every_step_that_moved_is_drawn() {
        let drawing = svg(&net(steps(vec![4, 2, 0, 0, 2], vec![8, 8, 0, 1, 0])), Some(50.0));
        assert!(drawing.contains("class=\"away\" x=\"400.0\" y=\"20\" width=\"400.0\""), "{drawing}");
        assert_eq!((drawing.matches("class=\"bar\"").count(), drawing.matches("class=\"into\"").count()), (3, 3));
        assert!(drawing.contains("at most 160 and 320 a second"), "{drawing}");
    }

    #[test]
    fn nothing_and_nonsense_are_drawn_as_nothing() {
        assert_eq!(svg(&net(PaceSteps::default()), None), "");
        assert_eq!(svg(&net(steps(vec![0, 0], vec![0])), Some(5.0)), "");
        assert_eq!(svg(&net(PaceSteps { step_ms: 0, ..steps(vec![1], vec![1]) }), Some(5.0)), "");
        let odd = svg(&of("<b>.net", DeviceId::sound(0), steps(vec![u64::MAX; 10_000], Vec::new())), Some(f64::NAN));
        assert!(!odd.contains("NaN") && !odd.contains("inf") && !odd.contains("<b>"), "{odd}");
        assert!(odd.contains("samples played"), "the class decides, not the guest's name: {odd}");
        assert_eq!(odd.matches("class=\"bar\"").count(), DRAWN);
    }
}
