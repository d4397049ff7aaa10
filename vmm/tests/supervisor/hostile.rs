//! Processes of VMs that say more than they should: what they say is bounded, and costs them their life at most.

use crate::cases::Case;
use crate::machine::start;

/// All of them.
pub const ALL: &[Case] = &[
    ("a_driver_vm_that_sends_descriptors_is_replaced", a_driver_vm_that_sends_descriptors_is_replaced),
    ("a_guest_that_sends_descriptors_is_killed", a_guest_that_sends_descriptors_is_killed),
];

fn a_driver_vm_that_sends_descriptors_is_replaced() {
    let machine = start("", "descriptors=1", "");
    machine.wait_live(2);
    let report = machine.report(1);
    assert_eq!(report["source"], "control-stream", "{report}");
    assert!(report["reason"].as_str().unwrap().contains("20 file descriptors, of 0"), "{report}");
    machine.stop();
}

fn a_guest_that_sends_descriptors_is_killed() {
    let mut machine = start("descriptors", "", "");
    let error = machine.wait().unwrap_err().to_string();
    assert!(error.starts_with("web: its process broke a rule") && error.contains("20 file descriptors"), "{error}");
}
