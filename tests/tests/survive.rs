//! The main job on a NIC with MSI-X and a reset. One with INTx and none, the rtl8139, has it in the target `braked`, the e1000e in
//! `make demo`.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{OrTell, most_ms, say, scenario};
use umbra_tests::demo::{self, DemoSpec};

fn a_download_survives_crashes(nic: &str, crashes: u32) {
    scenario(|| {
        let spec = DemoSpec {
            nic: nic.into(),
            crashes,
            pause: None,
            bytes: 16 << 20,
            sound: None,
            disk: None,
            hardware: None,
        };
        let dir = umbra_tests::assets::target_dir().join("bench").join(format!("survive-{nic}"));
        let result = demo::run(&spec, &dir, 1, &say).or_tell();
        assert!(result.ok, "{}\n{}", result.failures().join("; "), serde_json::to_string_pretty(&result).unwrap());
        let outage = result.nic.outage_ms.unwrap();
        assert!(outage.max < most_ms(60_000.0), "an outage of {} ms", outage.max);
    });
}

#[test]
fn a_download_survives_a_crash_of_igb() {
    a_download_survives_crashes("igb", 1);
}
