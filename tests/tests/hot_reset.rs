//! A card with two functions in one IOMMU group, for which the kernel has no `bus`: between two lives of the driver VM of
//! the first the whole slot is reset.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, RECOVERY, STEP, guest_reaches_peer, place_in, say, scenario};
use umbra_tests::bench::BenchSpec;
use umbra_tests::demo::machine::{Machine, NIC_DRIVER};
use umbra_tests::demo::place::Place;

#[test]
fn a_slot_whose_functions_are_all_in_hand_is_reset_as_a_whole() {
    scenario(reset_the_slot);
}

fn doctor(place: &mut Place) -> String {
    // It fails where it misses anything; as text it breaks its lines.
    place.run("umbra doctor $NIC0 --json", STEP).or_tell().stdout
}

fn reset_the_slot() {
    let (mut place, spec) = place_in(BenchSpec { second_function: true, ..BenchSpec::new("hot-reset") });
    let methods = place.expect("cat /sys/bus/pci/devices/$NIC0/reset_method", STEP).or_tell();
    // It has looked before the second function came.
    assert_eq!(methods.trim(), "pm bus", "what the kernel offers");

    say("the second function is not in hand, then it is");
    let said = doctor(&mut place);
    assert!(said.contains("cannot be reset as a whole") && said.contains("not bound to vfio-pci"), "{said}");
    place.expect("vfio ${NIC0%.0}.1", STEP).or_tell();
    let said = doctor(&mut place);
    assert!(said.contains("hot, then pm"), "{said}");

    let mut machine = Machine::start(&mut place, &spec).or_tell();
    let status = machine.status(&mut place).or_tell();
    assert_eq!(status["drivers"][0]["reset_method"], "hot", "{status}");
    guest_reaches_peer(&mut place);

    say("a panic");
    place.expect("umbra crash nic0", STEP).or_tell();
    let reset = machine.await_event(RECOVERY, |event| event.event == "device-reset").or_tell();
    assert!(reset.text("method") == "hot" && reset.fields["error"].is_null(), "{reset:?}");
    let live = machine.await_live(NIC_DRIVER, RECOVERY).or_tell();
    let (took, outage) = (reset.number("reset_ms"), live.number("outage_ms"));
    say(&format!("reset in {:.0} ms, away for {:.0} ms", took.unwrap_or(f64::NAN), outage.unwrap_or(f64::NAN)));
    guest_reaches_peer(&mut place);
    let order = place.expect("cat /sys/bus/pci/devices/$NIC0/reset_method", STEP).or_tell();
    assert_eq!(order, methods, "the kernel's order stands");
    machine.stop(&mut place).or_tell();
}
