//! The rule of the house (`docs/architecture.md`): which wing of `vmm/src` may name which. Files of tests may name all.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Each wing and those that it may name beside itself; who knows least comes first.
const MAY_NAME: &[(&str, &[&str])] = &[
    ("base", &[]),
    ("config", &["base"]),
    ("host", &["base", "config"]),
    ("wire", &["base", "config", "host"]),
    ("lifecycle", &["base", "config", "host", "wire"]),
    ("record", &["base", "config", "host", "wire", "lifecycle"]),
    ("vm", &["base", "config", "host", "wire"]),
    ("supervisor", &["base", "config", "host", "wire", "lifecycle", "record"]),
    ("cli", &["base", "config", "host", "wire", "lifecycle", "record", "vm", "supervisor"]),
];

fn visit(path: &Path, found: &mut Vec<String>, rule: (&str, &[&str])) {
    if path.is_dir() {
        let mut entries: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        entries.sort();
        entries.iter().for_each(|entry| visit(entry, found, rule));
    } else if path.to_str().is_some_and(|path| path.ends_with(".rs") && !path.ends_with("tests.rs")) {
        let (wing, allowed) = rule;
        for (line, text) in fs::read_to_string(path).unwrap().lines().enumerate() {
            for other in text.split("crate::").skip(1) {
                let other = other.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
                let known = MAY_NAME.iter().any(|(name, _)| *name == other);
                if known && other != wing && !allowed.contains(&other) {
                    found.push(format!("{}:{}: {wing} names {other}", path.display(), line + 1));
                }
            }
        }
    }
}

#[test]
fn no_wing_names_one_that_it_may_not_know() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for &(wing, allowed) in MAY_NAME {
        assert!(source.join(wing).is_dir(), "the wing {wing} is gone: mend this test's table");
        visit(&source.join(wing), &mut found, (wing, allowed));
    }
    assert!(found.is_empty(), "against the rule of the house:\n{}", found.join("\n"));
}

#[test]
fn every_folder_of_the_source_is_a_wing() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for entry in fs::read_dir(source).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let wing = !entry.path().is_dir() || name == "bin" || MAY_NAME.iter().any(|(wing, _)| *wing == name);
        assert!(wing, "{name} has no place in the table of this test");
    }
}

/// Crates of the programs, or with `edges` of the tests as well, with their features: `NAME VERSION|FEATURES`.
fn crates(edges: &str) -> BTreeSet<String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let tree = ["tree", "--locked", "--offline", "--workspace", "--prefix", "none", "--format", "{p}|{f}"];
    let output =
        Command::new(env!("CARGO")).args(tree).args(["--edges", edges]).current_dir(workspace).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.trim_end_matches(" (*)").to_owned()).collect()
}

/// What is shipped is what is tested; and a fresh clone builds it once.
#[test]
fn the_tests_ask_no_crate_of_the_programs_for_more() {
    let tested = crates("normal,build,dev");
    let changed: Vec<_> = crates("normal,build").into_iter().filter(|one| !tested.contains(one)).collect();
    assert!(changed.is_empty(), "with other features in tests, so that they go into Cargo.toml: {changed:?}");
}

/// `make test` runs the scenarios beside the other tests, both by their names.
#[test]
fn each_target_of_tests_has_a_name_of_its_own() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut names = BTreeSet::new();
    for member in ["driver-vm", "guest-images", "shadow", "splitter", "tests", "vmm"] {
        for entry in fs::read_dir(workspace.join(member).join("tests")).into_iter().flatten() {
            let name = entry.unwrap().path().file_stem().unwrap().to_owned();
            assert!(name == "common" || names.insert(name.clone()), "{} twice", name.display());
        }
    }
    assert!(names.len() > 30, "{names:?}");
}
