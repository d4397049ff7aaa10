//! Two charts over all failures: how outages are distributed, and when they happened.

use std::fmt::Write as _;

use super::parts::duration;
use super::{History, percentile};

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 980.0;
/// Bins of the distribution.
const BINS: usize = 24;
/// Colours for driver VMs; the sixth and all others share the last.
const COLOURS: usize = 6;

/// The distribution of outages; needs two at least.
pub(super) fn distribution(history: &History) -> Option<String> {
    let outages = history.outages();
    let (low, high) = (outages.first()?.max(0.01), outages.last()?.max(0.02));
    if outages.len() < 2 {
        return None;
    }
    // Where the longest is many times the shortest, equal steps would put all but one into the first bin.
    let logarithmic = high / low > 20.0;
    let map = |ms: f64| if logarithmic { ms.max(0.01).ln() } else { ms };
    let unmap = |value: f64| if logarithmic { value.exp() } else { value };
    let (from, to) = if logarithmic { (map(low), map(high)) } else { (0.0, high) };
    let x = |ms: f64| LEFT + (map(ms) - from) / (to - from).max(f64::MIN_POSITIVE) * (RIGHT - LEFT);
    let step = (RIGHT - LEFT) / real(BINS);
    let mut bins = [0_usize; BINS];
    for outage in &outages {
        let bin = ((x(*outage) - LEFT) / step).floor().clamp(0.0, real(BINS - 1));
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let bin = bin as usize;
        bins[bin] += 1;
    }
    let most = bins.iter().copied().max().unwrap_or(1).max(1);
    let mut out = format!(
        "<svg viewBox=\"0 0 {WIDTH} 214\" role=\"img\" aria-label=\"Distribution of {} outages\">",
        outages.len()
    );
    for (n, count) in bins.iter().enumerate().filter(|(_, count)| **count > 0) {
        let (height, left) = (real(*count) / real(most) * 150.0, LEFT + real(n) * step);
        let (a, b) = (edge(n, from, to, unmap), edge(n + 1, from, to, unmap));
        let _ = write!(
            out,
            "<rect class=\"bar\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" rx=\"2\"><title>{count} of {} to \
             {}</title></rect><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" class=\"soft\">{count}</text>",
            left + 1.5,
            190.0 - height,
            step - 3.0,
            duration(a),
            duration(b),
            left + step / 2.0,
            185.0 - height
        );
    }
    let _ = write!(out, "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"190\" y2=\"190\"/>");
    for n in (0..=BINS).step_by(BINS / 4) {
        let anchor = if n == BINS { "end" } else { "middle" };
        let _ = write!(
            out,
            "<text class=\"soft\" x=\"{:.1}\" y=\"208\" text-anchor=\"{anchor}\">{}</text>",
            LEFT + real(n) * step,
            if n == 0 && !logarithmic { "0".into() } else { duration(edge(n, from, to, unmap)) }
        );
    }
    if let Some(median) = percentile(&outages, 50) {
        let at = x(median);
        let (anchor, beside) = if at > WIDTH / 2.0 { ("end", at - 6.0) } else { ("start", at + 6.0) };
        let _ = write!(
            out,
            "<line class=\"median\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"8\" y2=\"190\"/>\
             <text x=\"{beside:.1}\" y=\"16\" text-anchor=\"{anchor}\">median {}</text>",
            duration(median)
        );
    }
    out.push_str("</svg>");
    Some(out)
}

/// The lower edge of bin `n`, ms.
fn edge(n: usize, from: f64, to: f64, unmap: impl Fn(f64) -> f64) -> f64 {
    unmap(from + (to - from) * real(n) / real(BINS))
}

/// When failures happened, and how long each outage was: a dot each, and a cross for one that has not ended.
pub(super) fn over_time(history: &History) -> Option<String> {
    let longest = history.outages().last().copied()?;
    if history.failures.len() < 2 || longest <= 0.0 {
        return None;
    }
    let x = |second: f64| LEFT + second / history.seconds.max(0.001) * (RIGHT - LEFT);
    let y = |ms: f64| 190.0 - ms / longest * 165.0;
    let height = if history.drivers.len() < 2 { 216 } else { 236 };
    let mut out = format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"Outages over time\">");
    for part in [0.0, 0.5, 1.0] {
        let at = y(longest * part);
        let _ = write!(
            out,
            "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"soft\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.0,
            if part > 0.0 { duration(longest * part) } else { "0".into() }
        );
    }
    for (n, failure) in history.failures.iter().enumerate() {
        let colour =
            history.drivers.iter().position(|driver| driver.name == failure.driver).unwrap_or(0).min(COLOURS - 1);
        let at = x(failure.second);
        let _ = match failure.outage() {
            Some(ms) => write!(
                out,
                "<a href=\"#failure-{}\"><circle class=\"dot c{colour}\" cx=\"{at:.1}\" cy=\"{:.1}\" r=\"6\">\
                <title>failure {}: {}</title></circle></a>",
                n + 1,
                y(ms),
                n + 1,
                duration(ms)
            ),
            None => write!(out, "<text x=\"{at:.1}\" y=\"186\" text-anchor=\"middle\">\u{d7}</text>"),
        };
    }
    for (n, part) in [0.0, 0.5, 1.0].into_iter().enumerate() {
        let anchor = ["start", "middle", "end"][n];
        let label = if part > 0.0 { duration(history.seconds * part * 1000.0) } else { "start of the machine".into() };
        let _ = write!(
            out,
            "<text class=\"soft\" x=\"{:.1}\" y=\"210\" text-anchor=\"{anchor}\">{label}</text>",
            x(history.seconds * part)
        );
    }
    legend(&mut out, history);
    out.push_str("</svg>");
    Some(out)
}

/// Whose dots have which colour, where there are several driver VMs.
fn legend(out: &mut String, history: &History) {
    if history.drivers.len() < 2 {
        return;
    }
    for (n, driver) in history.drivers.iter().take(COLOURS).enumerate() {
        let x = LEFT + real(n) * 150.0;
        let more = if n + 1 == COLOURS && history.drivers.len() > COLOURS { " and others" } else { "" };
        let _ = write!(
            out,
            "<circle class=\"dot c{n}\" cx=\"{:.0}\" cy=\"226\" r=\"5\"/><text x=\"{:.0}\" y=\"230\">{}{more}</text>",
            x + 5.0,
            x + 16.0,
            super::page::escaped(&driver.name)
        );
    }
}

/// A count as a coordinate.
#[allow(clippy::cast_precision_loss)]
fn real(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{Outcome, PastFailure};
    use super::*;
    use crate::lifecycle::NoticedBy;

    fn with(outages: &[f64]) -> History {
        let failure = |(n, ms): (usize, &f64)| PastFailure {
            second: real(n),
            outcome: Outcome::Live(2, Some(*ms)),
            ..PastFailure::new("nic0".into(), 1, NoticedBy::Panic, String::new(), 0.0)
        };
        History { failures: outages.iter().enumerate().map(failure).collect(), seconds: 10.0, ..History::default() }
    }

    #[test]
    fn every_outage_is_in_a_bin_and_the_median_is_marked() {
        let chart = distribution(&with(&[100.0, 200.0, 200.0, 900.0])).unwrap();
        let counts: usize = chart
            .split("<title>")
            .skip(1)
            .map(|title| title.split(' ').next().unwrap().parse::<usize>().unwrap())
            .sum();
        assert_eq!(counts, 4, "{chart}");
        assert!(chart.contains("median 200 ms"));
        let wide = distribution(&with(&[1.0, 2.0, 60_000.0])).unwrap();
        assert_eq!(wide.matches("class=\"bar\"").count(), 3, "logarithmic: three bins, not two: {wide}");
    }

    #[test]
    fn too_little_to_draw_is_no_chart() {
        assert!(distribution(&with(&[])).is_none() && over_time(&with(&[])).is_none());
        assert!(distribution(&with(&[5.0])).is_none());
        let same = distribution(&with(&[5.0, 5.0])).unwrap();
        assert!(!same.contains("NaN") && !same.contains("inf"), "{same}");
        assert!(!over_time(&with(&[5.0, 0.0])).unwrap().contains("NaN"));
    }
}
