//! Machines that cannot be, refused before anything is started.

use std::fs;
use std::os::unix::fs::symlink;

use crate::cases::{Case, cases};
use crate::machine::{DEVICE, SPARE, TestMachine, make};

/// All of them.
pub const ALL: &[Case] = cases![
    two_driver_vms_in_one_group_are_refused_with_both_tables,
    a_device_that_no_driver_vm_can_serve_is_refused,
    a_guest_and_a_driver_vm_in_one_group_are_refused,
];

/// The second function comes into the group of the first.
fn share_group(machine: &TestMachine) {
    let link = machine.dir.path().join("pci/devices").join(SPARE).join("iommu_group");
    fs::remove_file(&link).unwrap();
    symlink(machine.dir.path().join("groups/7"), &link).unwrap();
}

fn edit(machine: &TestMachine, old: &str, new: &str) {
    let path = machine.dir.path().join("m.toml");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(old));
    fs::write(&path, text.replace(old, new)).unwrap();
}

/// Expects the start to be refused with these words, and nothing to have happened.
fn expect_refused(mut machine: TestMachine, words: &str) {
    machine.start_again();
    let error = machine.wait().unwrap_err().to_string();
    assert!(error.contains(words), "{error}");
    assert_eq!((machine.resets(), machine.events_text()), (String::new(), String::new()));
}

fn two_driver_vms_in_one_group_are_refused_with_both_tables() {
    let second = format!("[driver.nic1]\ndevice = \"{SPARE}\"\nimage = \"image\"\n");
    let machine = make("", "", &second);
    edit(&machine, "net = [{ driver = \"nic0\" }]", "net = [{ driver = \"nic0\" }, { driver = \"nic1\" }]");
    share_group(&machine);
    let words = format!(
        "the device {DEVICE} of [driver.nic0] and the device {SPARE} of [driver.nic1] are both in IOMMU group 7"
    );
    expect_refused(machine, &words);
}

fn a_device_that_no_driver_vm_can_serve_is_refused() {
    let mut machine = make("", "", "");
    fs::write(machine.dir.path().join("pci/devices").join(DEVICE).join("class"), "0x028000").unwrap();
    machine.start_again();
    let error = machine.wait().unwrap_err();
    assert!(error.is_configuration());
    let why = std::error::Error::source(&error).unwrap().to_string();
    assert!(why.starts_with(&format!("{DEVICE} is a Wi-Fi card: ")), "{why}");
}

fn a_guest_and_a_driver_vm_in_one_group_are_refused() {
    let machine = make("", "", "");
    edit(&machine, "net = [{ driver", &format!("passthrough = [\"{SPARE}\"]\nnet = [{{ driver"));
    share_group(&machine);
    let words = format!("{SPARE}, passed through to [guest.web], and the device {DEVICE} of [driver.nic0] are both");
    expect_refused(machine, &words);
}
