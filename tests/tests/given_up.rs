//! A sound card that is gone for good: a player in the guest gets what ALSA gives for a dead card and ends, `umbra status`
//! says why, and `umbra resume` brings sound back when the card is there again.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, RECOVERY, STEP, assets, say, scenario};
use umbra_tests::bench::{Bench, BenchSpec};
use umbra_tests::demo::machine::{Machine, SOUND_DRIVER};
use umbra_tests::demo::place::Place;
use umbra_tests::sound::player::{Player, patient};
use umbra_tests::sound::{Length, Sound};

const GUEST: &str = "web";
/// Of a round of the song, which is fed for as long as it takes to give the card up.
const SECONDS: u32 = 12;

#[test]
fn a_card_that_is_gone_is_a_dead_card_until_it_is_back() {
    scenario(lose_the_card);
}

fn lose_the_card() {
    let assets = assets();
    let sound = Sound::new(&["hda".into()], Length::Fed(SECONDS), &assets).or_tell();
    let mut bench = BenchSpec::new("given-up").nics(&[]);
    sound.add_to(&mut bench);
    let mut place = Place::Bench(Box::new(Bench::boot(bench, &assets).or_tell()));
    sound.prepare(&mut place).or_tell();
    let spec = sound.machine(0, &mut place, "skip").or_tell();
    let mut machine = Machine::start(&mut place, &spec).or_tell();
    let player = Player::start_fed(&mut place, GUEST, &patient()).or_tell();

    say("the host's kernel takes the card off the bus");
    place.expect("echo 1 > /sys/bus/pci/devices/$SND0/remove", STEP).or_tell();
    let given_up = machine.await_event(RECOVERY, |event| event.event == "quarantined").or_tell();
    say(given_up.text("reason"));
    assert!(given_up.text("reason").contains("no PCI device"), "{given_up:?}");
    let ended = player.wait(&mut place).or_tell();
    say(&format!("mpg123: status {}, said {:?}", ended.status, ended.said.trim()));
    assert!(ended.status != 0 || !ended.said.is_empty(), "the player was told nothing of a card that is gone");
    let status = place.expect("umbra status", STEP).or_tell();
    assert!(status.contains("quarantined") && status.contains(given_up.text("reason")), "{status}");
    let refused = place.in_guest(GUEST, "aplay -q -d 1 -f cd /dev/zero 2>&1; echo status $?", STEP).or_tell();
    assert!(!refused.contains("status 0"), "a dead card plays: {refused}");

    say("the card is back");
    place
        .expect("echo 1 > /sys/bus/pci/rescan; await 10 test -e /sys/bus/pci/devices/$SND0 && vfio $SND0", STEP)
        .or_tell();
    let serves = place.expect(&format!("umbra resume {SOUND_DRIVER}"), RECOVERY).or_tell();
    assert!(serves.contains("serves"), "{serves}");
    let again = place.in_guest(GUEST, "aplay -d 1 -f cd /dev/zero 2>&1; echo status $?", STEP).or_tell();
    assert!(again.contains("status 0"), "{again}");
    machine.stop(&mut place).or_tell();
}
