//! What the documents repeat of the code is held against the code: diagrams of states, events, crash reports, status, sources of
//! failures, paths. The code's text is read, so that nothing has to be listed a third time here. Lines are short.

#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::{Path, PathBuf};

/// Longest line of a file, in characters.
const LONGEST_LINE: usize = 140;
/// What programs make, or fetch.
const MADE: [&str; 8] =
    [".git", "target", "Cargo.lock", "corpus", "artifacts", "coverage", "seeds", "proptest-regressions"];
/// Longest `README.md`, in lines.
const LONGEST_README: usize = 90;

/// A file whose header has a diagram, and the document that has the same one.
const DIAGRAMS: [(&str, &str); 7] = [
    ("vmm/src/lifecycle/mod.rs", "docs/recovery.md"),
    ("vmm/src/lifecycle/standby.rs", "docs/standby.md"),
    ("vmm/src/lifecycle/saving.rs", "docs/standby.md"),
    ("vmm/src/lifecycle/waiting.rs", "docs/standby.md"),
    ("vmm/src/lifecycle/spare.rs", "docs/standby.md"),
    ("vmm/src/supervisor/driver/ends.rs", "docs/recovery.md"),
    ("shadow/src/net/mod.rs", "docs/splitter.md"),
];

/// A file, the structures in it, and the document that names each of their fields.
const FIELDS: [(&str, &[&str], &str); 12] = [
    ("vmm/src/config/changes.rs", &["Change"], "docs/programs.md"),
    ("vmm/src/cli/list.rs", &["Listing", "Answer"], "docs/programs.md"),
    ("vmm/src/cli/report.rs", &["Listing", "Row"], "docs/observe.md"),
    ("vmm/src/record/crash_report.rs", &["CrashReport", "Mask"], "docs/events.md"),
    ("vmm/src/record/timeline.rs", &["Mark"], "docs/events.md"),
    ("vmm/src/record/parts.rs", &["RecoveryParts"], "docs/events.md"),
    ("vmm/src/wire/counts.rs", &["PaceSteps", "SoundCounts"], "docs/events.md"),
    ("vmm/src/wire/counts.rs", &["VcpuCounts", "NetWork", "PathWork"], "docs/observe.md"),
    ("vmm/src/record/threads.rs", &["ThreadUsage"], "docs/observe.md"),
    ("shadow/src/block/mod.rs", &["Counts"], "docs/events.md"),
    ("vmm/src/cli/snapshots.rs", &["Listing", "Row"], "docs/standby.md"),
    (
        "vmm/src/record/status.rs",
        &[
            "Status",
            "GuestStatus",
            "NetStatus",
            "SoundStatus",
            "BlockStatus",
            "DriverStatus",
            "StandbyStatus",
            "SecondStatus",
            "Usage",
            "CgroupStatus",
        ],
        "docs/observe.md",
    ),
];

/// A file, an enum in it that is written in kebab case, and the document that names each variant.
const WORDS: [(&str, &str, &str); 9] = [
    ("vmm/src/config/changes.rs", "Effect", "docs/programs.md"),
    ("vmm/src/supervisor/front/protocol.rs", "Request", "docs/programs.md"),
    ("vmm/src/record/health.rs", "Level", "docs/programs.md"),
    ("vmm/src/record/timeline.rs", "Milestone", "docs/events.md"),
    ("vmm/src/record/timeline.rs", "LifeStage", "docs/events.md"),
    ("vmm/src/record/crash_report.rs", "Verdict", "docs/events.md"),
    ("shadow/src/block/mod.rs", "ModeName", "docs/observe.md"),
    ("vmm/src/lifecycle/state.rs", "NoticedBy", "docs/recovery.md"),
    ("vmm/src/lifecycle/standby.rs", "StandbyStage", "docs/standby.md"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The lines of `pub enum NAME {` or `pub struct NAME {` in the text of `path`.
fn body(path: &str, kind: &str, name: &str) -> Vec<String> {
    let text = read(path);
    let head = format!("pub {kind} {name} {{");
    let mut lines = text.lines().skip_while(|line| *line != head);
    assert!(lines.next().is_some(), "{path} has no `{head}`: put this test right");
    lines.take_while(|line| *line != "}").map(str::to_owned).collect()
}

/// The names that lines begin with at this depth of indentation, without their visibility.
fn names(body: &[String], indent: usize) -> Vec<String> {
    let lines = body.iter().filter_map(|line| line.strip_prefix(&" ".repeat(indent)));
    let lines = lines.map(|line| line.strip_prefix("pub ").unwrap_or(line));
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    lines
        .filter(|line| line.starts_with(is_name))
        .map(|line| line.split(|c| !is_name(c)).next().unwrap().into())
        .collect()
}

fn kebab(name: &str) -> String {
    let mut kebab = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !kebab.is_empty() {
            kebab.push('-');
        }
        kebab.extend(c.to_lowercase());
    }
    kebab
}

/// The variants of the enum `Event`, in kebab case, each with its fields.
fn events() -> Vec<(String, Vec<String>)> {
    let body = body("vmm/src/record/events/event.rs", "enum", "Event");
    let variants = body.split(|line| line == "    },");
    let events = variants.filter_map(|lines| Some((kebab(names(lines, 4).first()?), names(lines, 8))));
    events.filter(|(event, _)| event != "unknown").collect()
}

#[test]
fn diagrams_are_the_same_in_code_and_documents() {
    for (source, document) in DIAGRAMS {
        let text = read(source);
        let lines = text.lines().skip_while(|line| *line != "//! ```text").skip(1);
        let diagram: Vec<_> = lines.take_while(|line| *line != "//! ```").collect();
        let diagram: Vec<_> = diagram.iter().map(|line| line.strip_prefix("//! ").unwrap_or_default()).collect();
        assert!(!diagram.is_empty(), "{source} has no diagram in its header");
        let diagram = format!("```text\n{}\n```\n", diagram.join("\n"));
        assert!(read(document).contains(&diagram), "{document} does not have this diagram of {source}:\n{diagram}");
    }
}

#[test]
fn diagrams_name_every_state() {
    for (path, name, document) in
        [("state.rs", "StateName", "docs/recovery.md"), ("standby.rs", "StandbyStage", "docs/standby.md")]
    {
        let variants = names(&body(&format!("vmm/src/lifecycle/{path}"), "enum", name), 4);
        let known = variants.iter().filter(|variant| *variant != "Unknown");
        let words: Vec<_> = known.map(|variant| kebab(variant)).collect();
        assert!(words.len() > 5, "{path}: {words:?}");
        let document = read(document);
        let diagrams: String = document.split("```text").skip(1).filter_map(|part| part.split("```").next()).collect();
        for word in words {
            assert!(diagrams.contains(&word), "no diagram has the state {word}");
        }
    }
}

#[test]
fn the_event_table_names_every_event_and_field() {
    let document = read("docs/events.md");
    let rows: Vec<_> = document.lines().filter(|line| line.starts_with("| `")).collect();
    let events = events();
    assert!(events.len() > 20, "{events:?}");
    for (event, fields) in &events {
        let row = rows.iter().find(|row| row.starts_with(&format!("| `{event}` |")));
        let row = row.unwrap_or_else(|| panic!("docs/events.md has no row for the event {event}"));
        for field in fields {
            assert!(row.contains(&format!("`{field}`")), "docs/events.md, {event}: no word of `{field}`");
        }
    }
    // And none that there is no more.
    let (_, table) = document.split_once("| `event` | fields |").unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    for row in table.lines().filter_map(|row| row.strip_prefix("| `")) {
        let event = row.split('`').next().unwrap();
        assert!(
            events.iter().any(|(known, _)| known == event),
            "docs/events.md has the event {event}, the code has not"
        );
    }
}

#[test]
fn every_field_of_reports_and_status_is_named() {
    for (path, structures, document) in FIELDS {
        let text = read(document);
        for structure in structures {
            let fields = names(&body(path, "struct", structure), 4);
            assert!(!fields.is_empty(), "{path}: {structure}");
            for field in fields {
                assert!(
                    text.contains(&format!("`{field}`")),
                    "{document}: no word of `{field}` of {structure} ({path})"
                );
            }
        }
    }
}

#[test]
fn every_word_of_the_enums_is_named() {
    for (path, name, document) in WORDS {
        let text = read(document);
        // `Unknown` is what another version has written.
        for variant in names(&body(path, "enum", name), 4).into_iter().filter(|variant| variant != "Unknown") {
            let word = kebab(&variant);
            assert!(text.contains(&format!("`{word}`")), "{document}: no word of `{word}` of {name} ({path})");
        }
    }
}

/// The repository's own text files, at this path and below.
fn texts(path: &Path) -> Vec<(PathBuf, String)> {
    if path.is_file() {
        return fs::read_to_string(path).ok().map(|text| (path.to_owned(), text)).into_iter().collect();
    }
    let made = |path: &Path| MADE.iter().any(|made| path.ends_with(made));
    let paths = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| !made(path) && !path.is_symlink()).flat_map(|path| texts(&path)).collect()
}

#[test]
fn lines_are_short_and_so_is_the_readme() {
    for (path, text) in texts(&root()) {
        let long = text.lines().enumerate().filter(|(_, line)| line.chars().count() > LONGEST_LINE);
        let long: Vec<_> = long.map(|(n, line)| format!("{}:{}: {line}", path.display(), n + 1)).collect();
        assert!(long.is_empty(), "longer than {LONGEST_LINE} characters:\n{}", long.join("\n"));
    }
    assert!(read("README.md").lines().count() <= LONGEST_README);
}

#[test]
fn links_between_documents_lead_somewhere() {
    let folder = |path: &Path| fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let paths = folder(&root()).into_iter().chain(folder(&root().join("docs")));
    for path in paths.filter(|path| path.extension().is_some_and(|extension| extension == "md")) {
        let text = fs::read_to_string(&path).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(target.exists(), "{}: {link} leads nowhere", path.display());
            if !anchor.is_empty() {
                let there = fs::read_to_string(&target).unwrap();
                let found = there.lines().filter(|line| line.starts_with('#')).any(|line| anchor_of(line) == anchor);
                assert!(found, "{}: {link}: no such heading", path.display());
            }
        }
    }
}

#[test]
fn rules_and_dashboard_use_metrics_that_there_are() {
    let table = read("docs/observe.md");
    let dashboard: serde_json::Value = serde_json::from_str(&read("packaging/umbra-dashboard.json")).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() > 5);
    for path in ["packaging/umbra.rules.yml", "packaging/umbra-dashboard.json"] {
        let text = read(path);
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        let metrics: Vec<_> = words.filter(|word| word.starts_with("umbra_")).collect();
        assert!(metrics.len() > 3, "{path}: {metrics:?}");
        for metric in metrics {
            let name = metric.trim_end_matches("_bucket");
            assert!(table.contains(&format!("`{name}`")), "{path}: docs/observe.md has no metric {name}");
        }
    }
}

#[test]
fn paths_in_contributing_exist() {
    let text = read("CONTRIBUTING.md");
    let paths: Vec<_> = text.split('`').skip(1).step_by(2).filter(|word| word.contains('/')).collect();
    let crates = ["vmm/", "splitter/", "shadow/", "driver-vm/", "guest-images/", "tests/", "fuzz/", "docs/"];
    let paths: Vec<_> = paths.into_iter().filter(|word| crates.iter().any(|name| word.starts_with(name))).collect();
    assert!(paths.len() > 40, "{paths:?}");
    for path in paths {
        assert!(root().join(path).exists(), "CONTRIBUTING.md names {path}, which is not there");
    }
}

/// The anchor of a heading, as hosts of repositories make it.
fn anchor_of(heading: &str) -> String {
    let heading = heading.trim_start_matches('#').trim().to_lowercase();
    let heading = heading.chars().filter(|c| c.is_alphanumeric() || "- _".contains(*c));
    heading.map(|c| if c == ' ' { '-' } else { c }).collect()
}
