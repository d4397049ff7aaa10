//! What guests ask of their network devices, on its way to the agents.

use std::fs;

use umbra_driver_vm::protocol::CrashKind;

use crate::cases::Case;
use crate::machine::start;

/// All of them.
pub const ALL: &[Case] = &[(
    "the_first_setting_after_a_clean_start_brings_back_all_of_them",
    the_first_setting_after_a_clean_start_brings_back_all_of_them,
)];

fn the_first_setting_after_a_clean_start_brings_back_all_of_them() {
    let machine = start("asks-in=4", "die-of-settings=2 die-of-settings=3 clean=4", "backoff_ms = 10");
    machine.wait_live(1);
    machine.crash(CrashKind::Panic);
    machine.wait_live(4);
    let console = machine.run_dir().join("nic0.console.log");
    machine.wait_for("the settings", |_| {
        let said = fs::read_to_string(&console).unwrap_or_default();
        said.contains("SetRxMode") && said.contains("SetOffloads")
    });
    let said = fs::read_to_string(&console).unwrap();
    assert!(said.contains("all_multicast: true") && said.contains("checksum: true"), "{said}");
    machine.stop();
}
