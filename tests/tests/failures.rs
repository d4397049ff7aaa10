//! Ways for a driver VM to go: killed, killed while the log is replayed or while it is set up, too often.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, RECOVERY, STEP, carrier_changes, guest_reaches_peer, place_with, say, scenario};
use umbra_tests::demo::machine::{Machine, NIC_DRIVER};
use umbra_tests::demo::place::Place;
use umbra_tests::peer::peer_address;

fn live(machine: &mut Machine) -> u32 {
    machine.await_event(RECOVERY, |event| event.event == "driver-live").or_tell().generation
}

#[test]
fn the_guest_outlives_kills_and_sees_link_down_only_in_quarantine() {
    scenario(outlive_kills_until_quarantine);
}

fn outlive_kills_until_quarantine() {
    let (mut place, mut spec) = place_with("failures", "e1000e");
    // The eighth failure is one too many.
    spec.restart_limit = 7;
    let mut machine = Machine::start(&mut place, &spec).or_tell();
    guest_reaches_peer(&mut place);
    start_over(&mut machine, &mut place);
    let before = carrier_changes(&mut place);

    say("kill -9 of the driver VM's process");
    let pid = machine.driver_pid(&mut place, NIC_DRIVER).or_tell();
    place.expect(&format!("kill -9 {pid}"), STEP).or_tell();
    live(&mut machine);
    guest_reaches_peer(&mut place);

    say("kill -9 while the log is replayed");
    let events = format!("{}/events.jsonl", place.share_inside());
    let mut watcher = place.start(&format!("umbra-probe kill-at carrier {events}")).or_tell();
    place
        .in_guest("web", &format!("umbra-probe tick {} </dev/null >/dev/null 2>&1 & echo", peer_address(0)), STEP)
        .or_tell();
    place.expect("umbra crash nic0", STEP).or_tell();
    place.await_end(&mut watcher, RECOVERY, |_| Ok(())).or_tell();
    let killed: u32 = watcher.output().stdout.trim().parse().unwrap_or_else(|_| panic!("{:?}", watcher.output()));
    while live(&mut machine) <= killed {}
    guest_reaches_peer(&mut place);
    assert_eq!(carrier_changes(&mut place), before, "the guest's link never went down");

    say("two failures more: quarantine");
    place.expect("umbra crash nic0", STEP).or_tell();
    live(&mut machine);
    place.expect("umbra crash nic0", STEP).or_tell();
    machine.await_event(RECOVERY, |event| event.event == "quarantined").or_tell();
    let status = place.expect("umbra status", STEP).or_tell();
    assert!(status.contains("quarantined"), "{status}");
    let down = "await 10 sh -c '! grep -q 1 /sys/class/net/e*/carrier' && dmesg | tail -n 3";
    place.in_guest("web", down, STEP).or_tell();

    say("the quarantine is ended");
    let serves = place.expect("umbra resume nic0", RECOVERY).or_tell();
    assert!(serves.contains("serves"), "{serves}");
    let again = place.run("umbra resume nic0", STEP).or_tell();
    assert!(!again.ok() && again.stderr.contains("not quarantined"), "{again:?}");
    guest_reaches_peer(&mut place);
    machine.stop(&mut place).or_tell();
    let left = place.run("pidof umbra", STEP).or_tell();
    assert!(!left.ok(), "processes are left: {}", left.stdout);
}

/// After two deaths on its way up the guest's device starts over.
fn start_over(machine: &mut Machine, place: &mut Place) {
    say("killed twice while it is set up");
    let before = carrier_changes(place);
    // The blow falls while the NIC, which is there, is set up as the guest has asked: on a slow machine as well, that takes as much longer.
    let strike = format!("umbra-probe kill-at nic {}/events.jsonl", place.share_inside());
    let mut watcher = place.start(&strike).or_tell();
    place.expect("umbra crash nic0", STEP).or_tell();
    for blow in ["first", "second"] {
        say(blow);
        place.await_end(&mut watcher, RECOVERY, |_| Ok(())).or_tell();
        assert!(watcher.output().ok(), "{:?}", watcher.output());
        if blow == "first" {
            watcher = place.start(&strike).or_tell();
        }
    }
    let told = machine.await_event(RECOVERY, |event| event.event == "clean-start").or_tell();
    assert_eq!((told.text("guest"), told.text("device")), ("web", "net0"));
    live(machine);
    guest_reaches_peer(place);
    assert_eq!(carrier_changes(place), before + 2, "the link went down and came up again");
}
