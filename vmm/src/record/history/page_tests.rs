//! The report's page, as text; a browser looks at it in `vmm/tests`.

use umbra_shadow::DeviceId;

use super::super::{DevicePace, Driver};
use super::*;
use crate::record::parts::RecoveryParts;
use crate::record::timeline::{Mark, Milestone};
use crate::wire::messages::PaceSteps;

fn failure(outcome: Outcome) -> PastFailure {
    let steps = PaceSteps { step_ms: 25, before_ms: 0, out: vec![0, 2], into: vec![1, 1] };
    PastFailure {
        time: "2026-01-02T03:04:05.678Z".into(),
        requested: Some("panic".into()),
        outcome,
        parts: RecoveryParts { detect_ms: Some(0.4), boot_ms: Some(900.0), ..RecoveryParts::default() },
        frames: MaskedCounts { logged: 14, replayed: 12, dropped: 0, unknown: 2 },
        masked: vec!["web.net0".into()],
        paces: vec![DevicePace { guest: "web".into(), device: DeviceId::net(0), steps }],
        evidence: Some(Evidence {
            kernel_says: Some("Kernel panic - not syncing: <oops>".into()),
            console_tail: "</pre><script>alert(1)</script>\u{1b}[31m".into(),
            timeline: vec![Mark { step: Milestone::Mask, at_ns: 0, ms: 0.0, time: "2026-01-02T03:04:05.678Z".into() }],
            ..Evidence::default()
        }),
        ..PastFailure::new("nic0".into(), 1, NoticedBy::Panic, "kernel panic".into(), 0.4)
    }
}

fn history() -> History {
    History {
        machine: "m&m".into(),
        failures: vec![failure(Outcome::Live(2, Some(1000.0))), failure(Outcome::Quarantined)],
        drivers: vec![Driver { name: "nic0".into(), quarantined: Some("too often".into()), ..Driver::default() }],
        seconds: 60.0,
        ..History::default()
    }
}

#[test]
fn what_a_driver_vm_says_cannot_become_markup() {
    let page = page(&history(), "2026-01-02T03:05:00.000Z");
    assert!(!page.contains("<script") && page.contains("&lt;script&gt;alert(1)"), "{page}");
    assert!(page.contains("m&amp;m: failures") && page.contains("&lt;oops&gt;"));
    assert!(!page.contains('\u{1b}') && page.contains("\\x1b[31m"), "shown, not obeyed");
}

#[test]
fn nothing_comes_from_elsewhere() {
    let page = page(&history(), "now");
    for word in ["http://", "https://", "src=", "url(", "@import", "<link"] {
        assert!(!page.contains(word), "{word}");
    }
    assert!(page.contains("default-src 'none'"));
}

#[test]
fn each_failure_says_what_where_and_how_it_ended() {
    let page = page(&history(), "now");
    for words in [
        "1. nic0: kernel panic",
        "generation 2 live",
        "outage <b>1.00 s</b>",
        "<b>12</b> sent",
        "web.net0: frames sent (above) and received (below)",
        "umbra crash --kind panic",
        "2026-01-02 03:04:05",
        "class=\"badge bad\">quarantined",
    ] {
        assert!(page.contains(words), "{words}");
    }
    assert!(page.find("id=\"failure-2\"") < page.find("id=\"failure-1\""), "newest first");
    assert!(super::page(&History::default(), "now").contains("No driver VM has failed."));
}

#[test]
fn of_a_long_console_whole_lines_of_the_end_are_shown() {
    assert_eq!(tail("short", 100), "short");
    assert_eq!(tail("one\ntwo\nthree", 8), "three");
    assert_eq!(tail("\u{fc}\u{fc}\u{fc}", 3), "\u{fc}");
}
