//! The warm standby: it takes over, dies and is replaced, is adopted while it still boots, and is restored from a snapshot.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, RECOVERY, STEP, carrier_changes, most_ms, place_with, say, scenario};
use serde_json::Value;
use umbra_tests::demo::events::Event;
use umbra_tests::demo::machine::{Machine, MachineSpec};
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
    let (mut place, mut spec) = place_with("standby", "rtl8139");
    spec.snapshots = false;
    boot_and_take_over(&mut place, &spec);
    (spec.snapshots, spec.snapshot_folder) = (true, Some("/tmp/snapshots".into()));
    be_restored_and_take_over(&mut place, &spec);
    let left = place.run("pidof umbra", STEP).or_tell();
    assert!(!left.ok(), "processes are left: {}", left.stdout);
}

/// The first life is saved before it serves: what follows a failure right behind the start is restored, as are the standbys after it.
fn be_restored_and_take_over(place: &mut Place, spec: &MachineSpec) {
    say("the first life is saved, the next ones are restored");
    let mut machine = Machine::start(place, spec).or_tell();
    let first = machine.seen.iter().find(|event| event.event == "driver-live").unwrap();
    let booted = first.fields["parts"]["boot_ms"].as_f64().unwrap();
    guest_reaches_peer(place);
    let before = carrier_changes(place);
    place.expect("umbra crash nic0", STEP).or_tell();
    machine.await_event(RECOVERY, |event| event.event == "driver-live").or_tell();
    guest_reaches_peer(place);
    let mut ready_after = Vec::new();
    for _ in 0..2 {
        let ready = machine.await_event(RECOVERY, |event| event.event == "standby-ready").or_tell();
        assert_eq!(ready.fields["restored"].as_bool(), Some(true), "{ready:?}");
        ready_after.push(ready.number("boot_ms").unwrap());
        place.expect("umbra crash nic0", STEP).or_tell();
        let live = machine.await_event(RECOVERY, |event| event.event == "driver-live").or_tell();
        assert_eq!(live.generation, ready.generation);
        guest_reaches_peer(place);
    }
    say(&format!("{booted:.0} ms (booted and saved), {:.0} and {:.0} ms (restored)", ready_after[0], ready_after[1]));
    assert!(ready_after[0] < booted / 2.0, "a restored standby is no sooner there: {booted} and {ready_after:?}");
    let warned = |event: &Event| event.event == "warning" && event.text("what").contains("snapshot");
    assert!(!machine.seen.iter().any(warned), "{}", machine.said());
    assert_eq!(carrier_changes(place), before, "the guest's link never went down");
    machine.stop(place).or_tell();
}

fn boot_and_take_over(place: &mut Place, spec: &MachineSpec) {
    let mut machine = Machine::start(place, spec).or_tell();
    guest_reaches_peer(place);
    let before = carrier_changes(place);
    // Whichever was up first, guest or driver VM.
    let mode = place.in_guest("web", "cat /sys/class/net/eth0/speed /sys/class/net/eth0/duplex", STEP).or_tell();
    assert_eq!(mode, "100\nfull\n", "the rtl8139's, in the guest");

    say("a standby that is killed is replaced");
    assert_eq!(ready(&mut machine), 2);
    let waits = standby(&mut machine, place);
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
    guest_reaches_peer(place);

    say("a failure while the next one boots");
    machine.await_event(RECOVERY, |event| event.event == "standby-starting").or_tell();
    place.expect("umbra crash nic0", STEP).or_tell();
    let adopted = machine.await_event(RECOVERY, |event| event.event == "driver-adopted").or_tell();
    assert_eq!(adopted.generation, 4);
    machine.await_event(RECOVERY, |event| event.event == "driver-live").or_tell();
    guest_reaches_peer(place);
    assert_eq!(carrier_changes(place), before, "the guest's link never went down");
    machine.stop(place).or_tell();
}
