//! Histories out of event logs.

use super::super::Outcome;
use super::*;

fn history(lines: &[&str]) -> History {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join(EVENT_LOG);
    let stamped = lines.iter().enumerate().map(|(n, line)| {
        format!(
            "{{\"seq\":{n},\"at_ns\":{},\"time\":\"2026-01-02T03:04:0{n}.000Z\",{line}}}\n",
            n as u64 * 1_000_000_000
        )
    });
    fs::write(log, stamped.collect::<String>()).unwrap();
    fs::write(dir.path().join("nic0-gen1.json"), "{\"kernel_driver\":\"e1000e\",\"console_tail\":\"panic\"}").unwrap();
    read(dir.path(), "m").unwrap()
}

const START: &str = r#""event":"driver-starting","driver":"nic0","generation":1"#;
const LIVE1: &str = r#""event":"driver-live","driver":"nic0","generation":1,"outage_ms":null,"parts":{"boot_ms":9.0}"#;
const ASKED: &str = r#""event":"crash-requested","driver":"nic0","generation":1,"kind":"panic""#;
const MASKED: &str =
    r#""event":"masked","guest":"web","device":"net0","driver":"nic0","generation":1,"cause":"closed""#;
const FAILED1: &str =
    r#""event":"driver-failed","driver":"nic0","generation":1,"source":"panic","reason":"p","detect_ms":0.5"#;
const FENCED: &str = r#""event":"driver-fenced","driver":"nic0","generation":1,"fence_ms":3.0,"report":null"#;
const RESET: &str = r#""event":"device-reset","driver":"nic0","method":"flr","reset_ms":100.0,"error":null"#;
const LIVE2: &str = concat!(
    r#""event":"driver-live","driver":"nic0","generation":2,"outage_ms":600.0,"#,
    r#""parts":{"detect_ms":0.5,"boot_ms":400.0},"frames":{"logged":4,"replayed":3,"dropped":0,"unknown":1}"#
);
const FAILED2: &str =
    r#""event":"driver-failed","driver":"nic0","generation":2,"source":"heartbeat","reason":"h","detect_ms":1.0"#;

#[test]
fn a_failure_is_joined_with_what_followed_and_its_report() {
    let history = history(&[START, LIVE1, ASKED, MASKED, FAILED1, FENCED, RESET, LIVE2]);
    let [failure] = &history.failures[..] else { panic!("{history:?}") };
    assert_eq!(failure.outcome, Outcome::Live(2, Some(600.0)));
    assert_eq!((failure.second, failure.requested.as_deref()), (4.0, Some("panic")));
    assert_eq!((failure.masked.join(" "), failure.frames.replayed), ("web.net0".into(), 3));
    assert_eq!(failure.evidence.as_ref().unwrap().console_tail, "panic");
    assert_eq!(history.drivers[0].kernel_driver.as_deref(), Some("e1000e"));
    assert_eq!(history.drivers[0].first_start.as_ref().unwrap().boot_ms, Some(9.0));
    assert_eq!((history.seconds, history.outages()), (7.0, vec![600.0]));
}

#[test]
fn the_pace_belongs_to_the_failure_that_this_life_ended() {
    let pace = concat!(
        r#""event":"pace","guest":"web","device":"net0","driver":"nic0","generation":2,"#,
        r#""steps":{"step_ms":25,"before_ms":2000,"out":[3],"into":[4]}"#
    );
    let history = history(&[START, LIVE1, FAILED1, LIVE2, FAILED2, pace]);
    let paces: Vec<_> = history.failures.iter().map(|failure| &failure.paces[..]).collect();
    let [[DevicePace { guest, device, steps }], []] = paces[..] else { panic!("{paces:?}") };
    assert_eq!(
        (format!("{guest}.{device}").as_str(), steps.before_ms, &steps.out[..], &steps.into[..]),
        ("web.net0", 2000, &[3][..], &[4][..])
    );
}

#[test]
fn a_failure_before_live_and_one_without_an_end_are_told_apart() {
    let again = history(&[START, LIVE1, FAILED1, FENCED, RESET, FAILED2]);
    let outcomes: Vec<_> = again.failures.iter().map(|failure| failure.outcome.clone()).collect();
    assert_eq!(outcomes, [Outcome::FailedAgain, Outcome::Open]);
    assert_eq!(again.failures[0].parts.fence_ms, Some(3.0), "what is known without a next life is kept");
    let quarantined = history(&[START, FAILED1, r#""event":"quarantined","driver":"nic0","reason":"too often""#]);
    assert_eq!(quarantined.failures[0].outcome, Outcome::Quarantined);
    assert_eq!(quarantined.drivers[0].quarantined.as_deref(), Some("too often"));
}

#[test]
fn what_is_not_known_and_what_is_no_failure_is_left_out() {
    let replaced = FAILED1.replace("\"panic\"", "\"replaced\"");
    let history = history(&["\"event\":\"from-the-future\"", "\"nonsense\":1", &replaced, LIVE2]);
    assert!(history.failures.is_empty());
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(read(dir.path(), "m"), Err(ReadError::NoEvents(_))));
}

#[test]
fn what_a_power_cut_has_left_of_a_line_costs_that_line() {
    let dir = tempfile::tempdir().unwrap();
    let line = |n: u64, event: &str| format!("{{\"seq\":{n},\"at_ns\":{n},\"time\":\"t\",{event}}}\n").into_bytes();
    let broken = b"{\"seq\":2,\xff\xfe\x00\n".to_vec();
    fs::write(dir.path().join(EVENT_LOG), [line(1, START), broken, line(3, FAILED1)].concat()).unwrap();
    assert_eq!(read(dir.path(), "m").unwrap().failures.len(), 1);
}
