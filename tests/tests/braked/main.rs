//! As on machines two and four times slower (`bench::brake`): a demo, two guests on one NIC through a crash, and the test host
//! itself. Nothing of it may depend on how fast the machine is.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;
mod test_host;
mod two_guests;

use common::{OrTell, braked, say};
use umbra_tests::demo::{self, DemoSpec};

/// Of the demo, and of the test host.
const SPEED: f64 = 0.25;
/// Of the two guests, which take long enough so.
const HALF: f64 = 0.5;

#[test]
fn a_download_and_a_song_survive_a_crash_on_a_slow_machine() {
    braked(SPEED, demonstrate);
}

fn demonstrate() {
    let spec = DemoSpec {
        nic: "rtl8139".into(),
        crashes: 1,
        pause: None,
        bytes: 16 << 20,
        sound: Some("hda".into()),
        disk: None,
        hardware: None,
    };
    let dir = umbra_tests::assets::target_dir().join("bench/braked-demo");
    let result = demo::run(&spec, &dir, 1, &say).or_tell();
    assert!(result.ok, "{}\n{}", result.failures().join("; "), serde_json::to_string_pretty(&result).unwrap());
    assert!(result.speed <= SPEED, "the emulator is braked");
}
