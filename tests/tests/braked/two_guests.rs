//! Two guests share one NIC: both reach the peer and each other, and both outlive a crash of the driver VM; neither can take the
//! other's address.

use crate::common::{OrTell, RECOVERY, STEP, braked, place_with, say};
use umbra_tests::demo::machine::Machine;
use umbra_tests::demo::place::Place;
use umbra_tests::peer::{guest_address, peer_address};

fn all_reach_all(place: &mut Place) {
    for (name, other) in [("web", 1), ("db", 0)] {
        let peer = peer_address(0);
        place.in_guest(name, &format!("umbra-probe first-answer {peer} 20"), STEP).or_tell();
        place
            .in_guest(name, &format!("ping -c 2 -W $((5 * UMBRA_PATIENCE)) {}", guest_address(0, other)), STEP)
            .or_tell();
    }
}

/// The guest `db` takes the address of `web` for its device.
fn take_the_address(place: &mut Place) {
    let address = "cat /sys/class/net/eth0/address";
    let web = place.in_guest("web", address, STEP).or_tell().trim().to_owned();
    let own = place.in_guest("db", address, STEP).or_tell().trim().to_owned();
    let take =
        |address: &str| format!("ip link set eth0 down; ip link set eth0 address {address}; ip link set eth0 up");
    place.in_guest("db", &take(&web), STEP).or_tell();
    let peer = peer_address(0);
    place.in_guest("db", &format!("! ping -c 2 -W 2 {peer}"), STEP).or_tell();
    place.in_guest("web", &format!("ping -c 5 -W 5 {peer} | grep ' 0% packet loss'"), STEP).or_tell();
    place.expect("umbra events | grep \"db: net0 uses .* another's address\"", STEP).or_tell();
    place.expect("umbra status --json | grep -q '\"foreign_source\": *[1-9]'", STEP).or_tell();
    place.in_guest("db", &take(&own), STEP).or_tell();
}

#[test]
fn two_guests_share_a_nic_through_a_crash() {
    braked(crate::HALF, share_a_nic_through_a_crash);
}

fn share_a_nic_through_a_crash() {
    let (mut place, mut spec) = place_with("two-guests", "e1000e");
    spec.guests.push(("db".into(), format!("{}/24", guest_address(0, 1))));
    let mut machine = Machine::start(&mut place, &spec).or_tell();
    say("before the crash");
    all_reach_all(&mut place);
    place.expect("umbra crash nic0", STEP).or_tell();
    machine.await_event(RECOVERY, |event| event.event == "driver-live").or_tell();
    say("after the crash");
    all_reach_all(&mut place);
    say("one takes the other's address");
    take_the_address(&mut place);
    all_reach_all(&mut place);
    machine.stop(&mut place).or_tell();
}
