//! `kill -9` of the supervisor, with a real device in a driver VM: nothing of it lives on, and the next `umbra run` of the
//! machine cleans up, says so, keeps the reports and serves.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, RECOVERY, STEP, guest_reaches_peer, place_with, say, scenario};
use umbra_tests::demo::machine::{Machine, NIC_DRIVER};

#[test]
fn the_next_run_cleans_up_after_a_killed_supervisor() {
    scenario(kill_the_supervisor);
}

fn kill_the_supervisor() {
    let (mut place, spec) = place_with("leftover", "e1000e");
    let mut machine = Machine::start(&mut place, &spec).or_tell();
    guest_reaches_peer(&mut place);
    say("a crash, and kill -9 of the supervisor in the middle of the recovery");
    place.expect("umbra crash nic0", STEP).or_tell();
    machine.await_event(RECOVERY, |event| event.event == "driver-failed").or_tell();
    let status = "for p in $(pidof umbra); do tr '\\0' ' ' </proc/$p/cmdline | grep -q ' run ' && kill -9 $p && exit 0; done; exit 1";
    place.expect(status, STEP).or_tell();
    place.expect("await 20 sh -c '! pidof umbra'", STEP).or_tell();
    drop(machine);

    let mut machine = Machine::start(&mut place, &spec).or_tell();
    let cleaned = machine.seen.iter().any(|event| event.event == "cleaned-up");
    assert!(cleaned, "nothing is said of the run before: {}", machine.said());
    guest_reaches_peer(&mut place);
    place.expect("ls /run/umbra/*/reports.old/events.jsonl", STEP).or_tell();
    say("and its driver VM can crash as ever");
    place.expect("umbra crash nic0", STEP).or_tell();
    machine.await_live(NIC_DRIVER, RECOVERY).or_tell();
    guest_reaches_peer(&mut place);
    machine.stop(&mut place).or_tell();
}
