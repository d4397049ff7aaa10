//! The host suspends to RAM, for real, under a guest that receives: driver VMs give their devices up before it and are reborn after it
//! (`packaging/umbra-sleep.service`).
//!
//! The shared folders are away meanwhile, so that everything is in the test host's memory.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs;

use common::{OrTell, RECOVERY, STEP, carrier_changes, guest_reaches_peer, place_with, say, scenario};
use serde_json::Value;
use umbra_tests::bench::guest::{Guest, SOCKETS};
use umbra_tests::peer::peer_address;

/// What systemd does, with the unit: it suspends and is woken by its clock.
const SUSPEND: &str = "suspend() {
  umbra sleep --all; asleep=$?
  umbra status
  echo +$((10 * UMBRA_PATIENCE)) > /sys/class/rtc/rtc0/wakealarm
  echo mem > /sys/power/state; suspended=$?
  umbra wake --all; awake=$?
}
without_folders suspend || exit 1
echo \"$asleep $suspended $awake\"
[ $asleep$suspended$awake = 000 ]";

/// Waits until the guest has received more than it takes to greet.
const RECEIVES: &str = "received=/sys/class/net/e*/statistics/rx_bytes
until [ $(cat $received) -gt 300000 ]; do sleep 0.1; done";

#[test]
fn a_guest_outlives_the_sleep_of_its_host() {
    scenario(|| {
        let (mut place, spec) = place_with("asleep", "e1000e");
        let (work, image) = (place.work(), spec.image.clone());
        fs::write(place.share().join("asleep.toml"), spec.to_toml(&work, &work)).unwrap();
        let start = format!(
            "mkdir -p {work} {SOCKETS} && cd {work} && for f in vmlinux guest.cpio {image} asleep.toml; do fetch /share/$f {work}/$f \
             || exit 1; done; export UMBRA_SNAPSHOT_DIR={work}/snapshots; \
             setsid umbra run asleep.toml --events events.jsonl </dev/null >run.log 2>&1 & \
             umbra wait standby --timeout $((90 * UMBRA_PATIENCE)) || {{ cat {work}/run.log; exit 1; }}"
        );
        place.expect(&start, RECOVERY).or_tell();
        place.in_guest("web", "true", RECOVERY).or_tell();
        guest_reaches_peer(&mut place);
        let before = carrier_changes(&mut place);

        let receive = Guest::long_command("web", &format!("umbra-probe receive {} 30", peer_address(0)), 4 * RECOVERY);
        let mut receiver = place.start(&format!("cd / && {receive}")).or_tell();
        // A connection that is not there yet is given up by the peer while the host sleeps.
        place.in_guest("web", RECEIVES, RECOVERY).or_tell();
        let said = place.expect(SUSPEND, RECOVERY).or_tell();
        say(&format!("the host slept: {}", said.lines().last().unwrap()));
        assert!(said.contains("asleep") && !said.contains("live "), "{said}");
        place.expect("umbra wait live --timeout $((90 * UMBRA_PATIENCE))", RECOVERY).or_tell();
        guest_reaches_peer(&mut place);
        let moved = |place: &mut _| Ok(carrier_changes(place));
        place.await_end(&mut receiver, RECOVERY, moved).or_tell();
        let output = receiver.output();
        assert!(output.ok() && output.stdout.contains("bytes"), "{}{}", output.stdout, output.stderr);

        let status: Value = serde_json::from_str(&place.expect("umbra status --json", STEP).or_tell()).unwrap();
        let driver = &status["drivers"][0];
        assert_eq!((driver["generation"].as_u64(), driver["failures"].as_u64()), (Some(2), Some(0)), "{driver}");
        assert_eq!(carrier_changes(&mut place), before, "the guest's link never went down");
        let slept = place.expect(&format!("grep -h '\"awake\"' {work}/events.jsonl"), STEP).or_tell();
        say(&slept);
        place.expect("umbra stop --force", STEP).or_tell();
    });
}
