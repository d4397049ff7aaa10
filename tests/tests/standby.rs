//! The warm standby: it takes over, dies and is replaced, and is taken as it is when it still boots.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, RECOVERY, STEP, carrier_changes, most_ms, place_with, say, scenario};
use serde_json::Value;
use umbra_tests::demo::machine::Machine;
use umbra_tests::demo::place::Place;
use umbra_tests::peer::peer_address;

fn guest_reaches_peer(place: &mut Place) {
    let script = format!("umbra-probe first-answer {} 20", peer_address(0));
    place.in_guest("web", &script, STEP).or_tell();
}

fn ready(machine: &mut Machine) -> u32 {
    machine.await_event(RECOVERY, |event| event.event == "standby-ready").or_tell().generation
}

fn standby(machine: &mut Machine, place: &mut Place) -> Value {
    machine.status(place).or_tell()["drivers"][0]["standby"].clone()
}

#[test]
fn a_standby_takes_over_and_is_replaced_when_it_dies() {
    scenario(take_over_and_be_replaced);
}

fn take_over_and_be_replaced() {
    let (mut place, spec) = place_with("standby", "rtl8139");
    let mut machine = Machine::start(&mut place, &spec).or_tell();
    guest_reaches_peer(&mut place);
    let before = carrier_changes(&mut place);

    say("a standby that is killed is replaced");
    assert_eq!(ready(&mut machine), 2);
    let waits = standby(&mut machine, &mut place);
    assert_eq!((waits["state"].as_str(), waits["generation"].as_u64()), (Some("ready"), Some(2)));
    place.expect(&format!("kill -9 {}", waits["pid"]), STEP).or_tell();
    let failed = machine.await_event(STEP, |event| event.event == "standby-failed").or_tell();
    assert!(failed.text("reason").contains("ended"), "{failed:?}");
    assert_eq!(ready(&mut machine), 3);

    say("the standby takes over");
    place.expect("umbra crash nic0", STEP).or_tell();
    let adopted = machine.await_event(RECOVERY, |event| event.event == "driver-adopted").or_tell();
    assert_eq!((adopted.generation, adopted.text("standby")), (3, "ready"));
    let live = machine.await_event(RECOVERY, |event| event.event == "driver-live").or_tell();
    assert_eq!(live.generation, 3);
    assert_eq!(live.fields["parts"]["boot_ms"].as_f64(), Some(0.0), "nothing boots in the outage");
    assert!(live.number("outage_ms").unwrap() < most_ms(5000.0), "{live:?}");
    guest_reaches_peer(&mut place);

    say("a failure while the next one boots");
    machine.await_event(RECOVERY, |event| event.event == "standby-starting").or_tell();
    place.expect("umbra crash nic0", STEP).or_tell();
    let adopted = machine.await_event(RECOVERY, |event| event.event == "driver-adopted").or_tell();
    assert_eq!(adopted.generation, 4);
    machine.await_event(RECOVERY, |event| event.event == "driver-live").or_tell();
    guest_reaches_peer(&mut place);
    assert_eq!(carrier_changes(&mut place), before, "the guest's link never went down");
    machine.stop(&mut place).or_tell();
    let left = place.run("pidof umbra", STEP).or_tell();
    assert!(!left.ok(), "processes are left: {}", left.stdout);
}
