//! The report as one HTML page without scripts and without anything from elsewhere (its own policy forbids both).
//!
//! Everything that came from a machine goes through [`escaped`].

use std::fmt::Write as _;

use super::parts::{PARTS, duration, time_of, timed};
use super::{Evidence, History, Outcome, PastFailure, chart, pace, percentile, timeline};
use crate::base::untrusted_text::block;
use crate::lifecycle::NoticedBy;
use crate::wire::messages::MaskedCounts;

/// The page's style.
const STYLE: &str = include_str!("page.css");

/// Most bytes of a console that are shown: its end says why.
const CONSOLE_BYTES: usize = 16 << 10;

/// Most failures shown one by one, the newest; the charts have all.
const SHOWN: usize = 200;

const INTRODUCTION: &str = "<p>On this machine each physical device and its driver live in a small virtual machine of \
    their own, a <em>driver VM</em>. When a driver crashes or hangs, Umbra answers the guests in its place, ends the failed driver \
    VM, resets the device, starts the next one and sends what the guests had sent in the meantime. The guests run on and \
    notice nothing but a pause, the <em>outage</em>. This page shows every failure since the machine was started, and where \
    the time of each outage went.</p>";

/// The page. `now` is the time of its making, wall clock.
pub fn page(history: &History, now: &str) -> String {
    let name = escaped(&history.machine);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{name}: failures and recoveries</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
         <h1>{name}: failures and recoveries</h1>\n<p class=\"soft\">{} to {} (UTC), {}</p>\n{INTRODUCTION}\n",
        clock(&history.from),
        clock(&history.until),
        duration(history.seconds * 1000.0),
    );
    tiles(&mut out, history);
    charts(&mut out, history);
    drivers(&mut out, history);
    failures(&mut out, history);
    remarks(&mut out, history);
    let _ = write!(
        out,
        "<footer>Made by Umbra {} at {} (UTC) from the machine's own event log and crash reports.</footer>\n</main>\n</body>\n</html>\n",
        env!("CARGO_PKG_VERSION"),
        clock(now)
    );
    out
}

/// `2026-01-02T03:04:05.678Z` without what a reader does not need.
fn clock(time: &str) -> String {
    escaped(time.get(..19).unwrap_or(time)).replacen('T', " ", 1)
}

/// Text for HTML, and for attributes in quotes, fit for people: with its line ends and tabs.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in block(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

fn tiles(out: &mut String, history: &History) {
    let outages = history.outages();
    let count =
        |wanted: fn(&Outcome) -> bool| history.failures.iter().filter(|failure| wanted(&failure.outcome)).count();
    let frames = history.failures.iter().fold(MaskedCounts::default(), |sum, failure| sum.plus(failure.frames));
    let time = |ms: Option<f64>| ms.map_or_else(|| "\u{2013}".into(), duration);
    let tiles = [
        (history.failures.len().to_string(), "failures of driver VMs"),
        (count(|outcome| matches!(outcome, Outcome::Live(..))).to_string(), "recoveries"),
        (count(|outcome| *outcome == Outcome::Quarantined).to_string(), "given up (quarantined)"),
        (time(percentile(&outages, 50)), "outage, median"),
        (time(percentile(&outages, 95)), "outage, 95th percentile"),
        (time(outages.last().copied()), "outage, longest"),
        (frames.replayed.to_string(), "frames kept and sent after an outage"),
        (frames.dropped.to_string(), "frames dropped because the log was full"),
        (frames.unknown.to_string(), "frames of unknown fate (never sent twice)"),
    ];
    out.push_str("<div class=\"tiles\">\n");
    for (value, what) in tiles {
        let _ = writeln!(out, "<div class=\"tile\"><b>{value}</b><span>{what}</span></div>");
    }
    out.push_str("</div>\n");
}

fn charts(out: &mut String, history: &History) {
    if let Some(chart) = chart::distribution(history) {
        let _ = write!(out, "<h2>How long outages were</h2>\n<div class=\"card\">{chart}</div>\n");
    }
    if let Some(chart) = chart::over_time(history) {
        let _ = write!(out, "<h2>When they happened</h2>\n<div class=\"card\">{chart}</div>\n");
    }
    if !history.failures.is_empty() {
        out.push_str("<h2>The parts of a recovery</h2>\n<div class=\"card legend\">\n");
        let took_time = |name| history.failures.iter().any(|failure| time_of(&failure.parts, name).is_some());
        for part in PARTS.iter().filter(|part| took_time(part.name)) {
            let _ = writeln!(out, "<div><i class=\"p-{}\"></i><b>{}</b>: {}</div>", part.name, part.name, part.meaning);
        }
        out.push_str("</div>\n");
    }
}

fn drivers(out: &mut String, history: &History) {
    if history.drivers.is_empty() {
        return;
    }
    out.push_str(
        "<h2>Driver VMs</h2>\n<div class=\"card\"><table>\n<tr><th>name</th><th>device</th><th>driver</th><th>reset</th>\
         <th class=\"num\">failures</th><th class=\"num\">median outage</th><th>median of each part</th></tr>\n",
    );
    for driver in &history.drivers {
        let mine: Vec<&PastFailure> = history.failures.iter().filter(|failure| failure.driver == driver.name).collect();
        let mut outages: Vec<_> = mine.iter().filter_map(|failure| failure.outage()).collect();
        outages.sort_by(f64::total_cmp);
        let medians = PARTS.iter().filter_map(|part| {
            let mut times: Vec<_> =
                mine.iter().filter(|f| f.outage().is_some()).filter_map(|f| time_of(&f.parts, part.name)).collect();
            times.sort_by(f64::total_cmp);
            percentile(&times, 50).filter(|ms| *ms >= 0.05).map(|ms| format!("{} {}", part.name, duration(ms)))
        });
        let medians: Vec<_> = medians.collect();
        let state = driver
            .quarantined
            .as_ref()
            .map(|why| format!(" <span class=\"badge bad\" title=\"{}\">quarantined</span>", escaped(why)));
        let text = |value: &Option<String>| value.as_deref().map_or_else(|| "\u{2013}".into(), escaped);
        let _ = writeln!(
            out,
            "<tr><td>{}{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"num\">{}</td><td class=\"num\">{}</td>\
            <td class=\"soft\">{}</td></tr>",
            escaped(&driver.name),
            state.unwrap_or_default(),
            text(&driver.device),
            text(&driver.kernel_driver),
            text(&driver.reset),
            mine.len(),
            percentile(&outages, 50).map_or_else(|| "\u{2013}".into(), duration),
            medians.join(", ")
        );
    }
    out.push_str("</table></div>\n");
}

fn failures(out: &mut String, history: &History) {
    out.push_str("<h2>Failures, newest first</h2>\n");
    if history.failures.is_empty() {
        out.push_str("<p>No driver VM has failed.</p>\n");
        return;
    }
    // Drawings below each other can be compared: one scale, unless one of them would dwarf the rest.
    let totals = history
        .failures
        .iter()
        .map(|failure| failure.outage().unwrap_or_default().max(timed(&failure.parts).iter().map(|(_, ms)| ms).sum()));
    let mut totals: Vec<f64> = totals.collect();
    totals.sort_by(f64::total_cmp);
    let scale = percentile(&totals, 90).unwrap_or_default();
    for (n, failure) in history.failures.iter().enumerate().rev().take(SHOWN) {
        card(out, n + 1, failure, scale);
    }
    if let Some(more) = history.failures.len().checked_sub(SHOWN).filter(|more| *more > 0) {
        let _ = writeln!(out, "<p class=\"soft\">{more} older failures are in the figures above only.</p>");
    }
}

fn card(out: &mut String, n: usize, failure: &PastFailure, scale: f64) {
    let badge = match &failure.outcome {
        Outcome::Live(generation, _) => format!("<span class=\"badge good\">generation {generation} live</span>"),
        Outcome::FailedAgain => "<span class=\"badge warn\">the next one failed too</span>".into(),
        Outcome::Quarantined => "<span class=\"badge bad\">quarantined</span>".into(),
        Outcome::Open => "<span class=\"badge warn\">not over</span>".into(),
    };
    let _ = write!(
        out,
        "<div class=\"card\" id=\"failure-{n}\">\n<div class=\"head\"><h3>{n}. {}: {}</h3>{badge}<span class=\"soft\">{} UTC, \
         generation {}</span></div>\n",
        escaped(&failure.driver),
        escaped(&failure.reason),
        clock(&failure.time),
        failure.generation
    );
    let asked = failure
        .requested
        .as_ref()
        .map(|kind| format!(" It was asked for: <code>umbra crash --kind {}</code>.", escaped(kind)));
    let said = failure.evidence.as_ref().and_then(|evidence| evidence.kernel_says.as_deref());
    let said = said.map(|line| format!(" Its kernel said: <code>{}</code>.", escaped(line)));
    let _ = writeln!(
        out,
        "<p>{}{}{}</p>",
        noticed(failure.source, failure.detect_ms),
        said.unwrap_or_default(),
        asked.unwrap_or_default()
    );
    let end = match &failure.outcome {
        Outcome::Live(..) => "live after",
        Outcome::FailedAgain => "failed again after",
        Outcome::Quarantined => "given up after",
        Outcome::Open => "so far",
    };
    out.push_str(&timeline::svg(&failure.parts, end, failure.outage(), scale));
    figures(out, failure);
    for pace in &failure.paces {
        out.push_str(&pace::svg(pace, failure.outage()));
    }
    if let Some(evidence) = &failure.evidence {
        details(out, evidence);
    }
    out.push_str("</div>\n");
}

/// How a failure was noticed, as a sentence.
fn noticed(source: NoticedBy, detect_ms: f64) -> String {
    let how = match source {
        NoticedBy::Panic => "The kernel of the driver VM panicked and said so",
        NoticedBy::VmEnd => "The driver VM powered off, was reset or died",
        NoticedBy::ProcessExit => "The process of the driver VM was gone",
        NoticedBy::Confinement => "The process of the driver VM did what it must not do, and was ended",
        NoticedBy::Start => "The driver VM could not be started",
        NoticedBy::Device => "The device reported an error",
        NoticedBy::Agent => "The agent in the driver VM reported that it could not work",
        NoticedBy::ControlStream => "The agent in the driver VM fell silent or talked nonsense",
        NoticedBy::Heartbeat => "The driver VM stopped giving signs of life",
        NoticedBy::BootTimeout => "The driver VM did not come up in time",
        NoticedBy::Link => "The link between the guest and the driver VM was lost, or its rules were broken",
        NoticedBy::Planned => "It was replaced, as was asked for",
        NoticedBy::Carrier => "Its network card had no link, and that of the spare had one",
        NoticedBy::Identity => "Its disk was not the one that the guest had been given",
        NoticedBy::Unknown => "It was noticed in a way that this version of Umbra does not know",
    };
    format!("{how}; certain {} after the first sign.", duration(detect_ms))
}

fn figures(out: &mut String, failure: &PastFailure) {
    let MaskedCounts { logged, replayed, dropped, unknown } = failure.frames;
    let mut figures = Vec::new();
    match failure.outcome {
        Outcome::Live(_, Some(outage)) => figures.push(format!("outage <b>{}</b>", duration(outage))),
        Outcome::Live(_, None) => figures.push("no outage: it had not served yet".into()),
        _ => {}
    }
    if !failure.masked.is_empty() {
        figures.push(format!("answered by the shadow: <b>{}</b>", escaped(&failure.masked.join(", "))));
    }
    if logged + replayed + dropped + unknown > 0 {
        figures.push(format!(
            "frames: <b>{logged}</b> logged, <b>{replayed}</b> sent, <b>{dropped}</b> dropped, <b>{unknown}</b> of unknown fate"
        ));
    }
    if !failure.parts.reset_method.is_empty() {
        figures.push(format!("reset: <b>{}</b>", escaped(&failure.parts.reset_method)));
    }
    let spans: Vec<_> = figures.iter().map(|figure| format!("<span>{figure}</span>")).collect();
    let _ = writeln!(out, "<div class=\"figures\">{}</div>", spans.join(""));
}

fn details(out: &mut String, evidence: &Evidence) {
    if !evidence.timeline.is_empty() {
        out.push_str("<details><summary>Step by step</summary><table><tr><th class=\"num\">ms</th><th>step</th><th>time (UTC)</th></tr>\n");
        for mark in &evidence.timeline {
            let time = mark.time.get(11..23).unwrap_or(&mark.time);
            let _ = writeln!(
                out,
                "<tr><td class=\"num\">{:.3}</td><td>{}</td><td>{}</td></tr>",
                mark.ms,
                mark.step,
                escaped(time)
            );
        }
        out.push_str("</table></details>\n");
    }
    for (title, text) in
        [("Registers", &evidence.registers), ("Console of the driver VM (the end)", &evidence.console_tail)]
    {
        let text = tail(text.trim(), CONSOLE_BYTES);
        if !text.is_empty() {
            let _ = writeln!(out, "<details><summary>{title}</summary><pre>{}</pre></details>", escaped(text));
        }
    }
    let facts = [("kernel", &evidence.kernel), ("the process", &evidence.exit)];
    let facts: Vec<_> =
        facts.iter().filter_map(|(what, value)| Some(format!("{what}: {}", escaped(value.as_deref()?)))).collect();
    if !facts.is_empty() {
        let _ = writeln!(out, "<div class=\"figures soft\"><span>{}</span></div>", facts.join("</span><span>"));
    }
}

/// The last `limit` bytes of `text`, from the start of a line.
fn tail(text: &str, limit: usize) -> &str {
    let Some(start) = text.len().checked_sub(limit).filter(|start| *start > 0) else { return text };
    let start = (start..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    let rest = &text[start..];
    rest.split_once('\n').map_or(rest, |(_, lines)| lines)
}

fn remarks(out: &mut String, history: &History) {
    if history.remarks.is_empty() {
        return;
    }
    out.push_str("<h2>What else happened</h2>\n<div class=\"card\"><table>\n");
    for (time, text) in &history.remarks {
        let _ = writeln!(out, "<tr><td class=\"soft\">{}</td><td>{}</td></tr>", clock(time), escaped(text));
    }
    out.push_str("</table></div>\n");
}

#[cfg(test)]
#[path = "page_tests.rs"]
mod tests;
