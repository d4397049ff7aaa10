//! The PCI functions of this VM: the search for one that came later, and the message that says why there is no NIC;
//! and the unbinding of all, for trying what follows.

use std::fs;
use std::path::Path;

use anyhow::Context;

use crate::kernel_log;

/// Vendor of virtio devices.
const VIRTIO: &str = "0x1af4";
/// Class of bridges, in the upper byte.
const BRIDGE: &str = "0x06";

/// Has the kernel look for new functions, in a thread: drivers probe in it, and that takes as long as it takes.
///
/// # Errors
/// When no thread can be made.
pub fn rescan() -> anyhow::Result<()> {
    let scan = || {
        if let Err(error) = fs::write("/sys/bus/pci/rescan", "1") {
            kernel_log::error(&format!("cannot look for new PCI devices: {error}"));
        }
    };
    std::thread::Builder::new().name("rescan".into()).spawn(scan).map(drop).context("cannot start a thread")
}

/// Takes the driver away from each function that is neither virtio nor a bridge, as `unbind` in sysfs does.
pub fn unbind_all() {
    for function in fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten() {
        if describe_one(&function.path()).is_some() {
            let _ = fs::write(function.path().join("driver/unbind"), function.file_name().as_encoded_bytes());
        }
    }
}

/// The functions that are neither virtio nor a bridge, each with its ids and driver, in a sentence's form.
pub fn describe() -> String {
    let Ok(functions) = fs::read_dir("/sys/bus/pci/devices") else { return "there is no PCI bus".into() };
    let mut found: Vec<_> = functions.flatten().filter_map(|function| describe_one(&function.path())).collect();
    found.sort();
    if found.is_empty() { "there is no PCI device but virtio".into() } else { found.join(", ") }
}

fn describe_one(function: &Path) -> Option<String> {
    let read = |name: &str| fs::read_to_string(function.join(name)).unwrap_or_default().trim().to_owned();
    let (vendor, device, class) = (read("vendor"), read("device"), read("class"));
    if vendor == VIRTIO || class.starts_with(BRIDGE) {
        return None;
    }
    let driver = fs::read_link(function.join("driver")).ok();
    let driver = driver.as_ref().and_then(|path| path.file_name()?.to_str()).map(|name| format!("driver {name}"));
    let (vendor, device) = (vendor.trim_start_matches("0x"), device.trim_start_matches("0x"));
    let name = function.file_name()?.to_str()?;
    Some(format!("{name} ({vendor}:{device}) has {}", driver.unwrap_or_else(|| "no driver".into())))
}
