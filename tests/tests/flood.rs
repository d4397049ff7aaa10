//! A guest that takes nothing while the wire brings it more and more: what waits for it takes no memory that the driver VM needs, and
//! its neighbour on the same NIC goes on.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::time::Duration;

use common::{OrTell, STEP, place_with, say, scenario};
use umbra_tests::demo::machine::{Machine, MachineSpec, NIC_DRIVER};
use umbra_tests::demo::place::Place;
use umbra_tests::peer::{guest_address, peer_address};

/// How long the wire brings frames: long enough for what the driver VM's queues of that guest have room for, twice.
const FLOOD: Duration = Duration::from_secs(4);
/// What has to stay available in the driver VM, bytes.
const LEFT: u64 = 16 << 20;

#[test]
fn frames_that_a_guest_does_not_take_leave_a_driver_vm_its_memory() {
    scenario(flood_a_guest);
}

fn flood_a_guest() {
    let (mut place, spec) = place_with("flood", "e1000e");
    say("alone on its NIC");
    flood_one(&mut place, &spec, None);
    say("beside a neighbour");
    let address = format!("{}/24", guest_address(0, 1));
    let shared = MachineSpec { guests: [spec.guests.clone(), vec![("db".into(), address)]].concat(), ..spec };
    flood_one(&mut place, &shared, Some("db"));
}

/// The first guest's process stands still while it is sent more than it could take; the neighbour exchanges datagrams meanwhile.
fn flood_one(place: &mut Place, spec: &MachineSpec, neighbour: Option<&str>) {
    let mut machine = Machine::start(place, spec).or_tell();
    let mac = place.in_guest("web", "cat /sys/class/net/eth0/address", STEP).or_tell();
    let mac: Vec<u8> = mac.trim().split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    let pid = machine.guest_pid(place, "web").or_tell();
    let life = machine.driver_pid(place, NIC_DRIVER).or_tell();
    place.expect(&format!("kill -STOP {pid}"), STEP).or_tell();
    let sent = place.peer().flood(guest_address(0, 0), mac.try_into().unwrap(), FLOOD).or_tell();
    if let Some(neighbour) = neighbour {
        place.in_guest(neighbour, &format!("umbra-probe first-answer {} 20", peer_address(0)), STEP).or_tell();
    }
    // As of its next heartbeat.
    std::thread::sleep(Duration::from_secs(2));
    let status = machine.status(place).or_tell();
    let available = status["drivers"][0]["available_memory"].as_u64().unwrap();
    say(&format!("{sent} datagrams of 1,400 bytes; {} MiB are available in the driver VM", available >> 20));
    place.expect(&format!("kill -CONT {pid}"), STEP).or_tell();
    place.in_guest("web", &format!("umbra-probe first-answer {} 20", peer_address(0)), STEP).or_tell();
    assert_eq!(machine.driver_pid(place, NIC_DRIVER).or_tell(), life, "the driver VM was replaced: {status}");
    assert!(available > LEFT, "{available} bytes are available in the driver VM");
    machine.stop(place).or_tell();
}
