//! How many cases of the model run, and how long it takes until each broken rule is noticed.
//!
//! A case is named by its seed: `UMBRA_MODEL_SEED=n` runs that one alone and prints what happened. `UMBRA_MODEL_CASES=1000000` runs as
//! many cases.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::broken::{Breaking, Rule};
use super::model::{Reached, Rig};

/// Cases of an ordinary run: some seconds.
const CASES: u64 = if cfg!(debug_assertions) { 3_000 } else { 60_000 };

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}: {text} is no number")))
}

/// Faulty cases that are reported at once.
const FAULTS: usize = 10;

/// What became of a case.
struct Case {
    /// What is wrong, if anything.
    fault: Option<String>,
    reached: BTreeSet<Reached>,
    /// What happened, if that was to be noted.
    trace: String,
}

fn run(seed: u64, is_traced: bool) -> Case {
    let mut rig = Rig::new(seed, is_traced);
    let fault = match catch_unwind(AssertUnwindSafe(|| rig.run())) {
        Ok(Ok(())) => None,
        Ok(Err(fault)) => Some(format!("case {seed}: {fault}")),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Some(format!("case {seed}: panic: {}", text.unwrap_or("without a text")))
        }
    };
    Case { fault, reached: rig.reached(), trace: rig.trace() }
}

/// Runs the case of `UMBRA_MODEL_SEED`, with the rule of `UMBRA_MODEL_RULE` broken, and prints it.
fn run_one(seed: u64) {
    let rule = std::env::var("UMBRA_MODEL_RULE").ok();
    let rule = rule.map(|name| Rule::ALL.into_iter().find(|rule| format!("{rule:?}") == name).expect("a rule's name"));
    let _breaking = rule.map(Breaking::rule);
    let Case { fault, trace, .. } = run(seed, true);
    println!("{trace}");
    assert!(fault.is_none(), "{}", fault.unwrap_or_default());
}

#[test]
fn every_invariant_holds_in_any_order_of_events() {
    if let Some(seed) = number("UMBRA_MODEL_SEED") {
        return run_one(seed);
    }
    let cases = number("UMBRA_MODEL_CASES").unwrap_or(CASES);
    let (mut faults, mut reached) = (Vec::new(), BTreeMap::new());
    for seed in 0..cases {
        let case = run(seed, false);
        faults.extend(case.fault);
        case.reached.into_iter().for_each(|what| *reached.entry(what).or_insert(0) += 1);
        assert!(faults.len() < FAULTS, "{}", faults.join("\n"));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    println!("{cases} cases; of them came to {reached:?}");
    assert!(cases < CASES || reached.len() > Reached::AnotherDisk as usize, "not everything is tried: {reached:?}");
}

/// Cases within which each broken rule has to be noticed.
const WITHIN: u64 = 20_000;

#[test]
fn every_broken_rule_is_noticed() {
    let mut missed = Vec::new();
    for rule in Rule::ALL {
        let breaking = Breaking::rule(rule);
        let noticed = (0..WITHIN).find_map(|seed| Some((seed, run(seed, false).fault?)));
        drop(breaking);
        match noticed {
            Some((seed, fault)) => {
                assert_eq!(run(seed, false).fault, None, "wrong without {rule:?}, too");
                println!("{rule:?}: {fault:.120}");
            }
            None => missed.push(rule),
        }
    }
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
