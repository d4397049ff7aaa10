//! The PCI functions of this VM: the one that comes later, which the kernel knows ahead or has to look for, and the message
//! that says why there is no NIC; and the unbinding of all, for trying what follows.

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::Context;

use crate::kernel_log;

/// Vendor of virtio devices.
const VIRTIO: &str = "0x1af4";
/// Of these, disks and their controllers (virtio 1.2, section 4.1.2.1): a driver VM's own devices are none.
const VIRTIO_DISKS: [&str; 4] = ["0x1001", "0x1042", "0x1004", "0x1048"];
/// Class of bridges, in the upper byte.
const BRIDGE: &str = "0x06";

/// Name of no driver: a function that may only be given to it is given to nobody.
const NOBODY: &str = "umbra-awaited";

/// Keeps drivers off the functions that are neither this VM's own nor a bridge: there is nothing behind them yet.
pub fn hold_all() {
    for function in functions().filter(|function| describe_one(function).is_some()) {
        if let Err(error) = fs::write(function.join("driver_override"), NOBODY) {
            kernel_log::error(&format!("cannot keep drivers off {}: {error}", function.display()));
        }
    }
}

/// The device has come: its driver gets what was held, else the kernel has to look for it. This is done in a thread, because
/// drivers probe in it, which may take any time.
///
/// # Errors
/// When no thread can be made.
pub fn device_has_come() -> anyhow::Result<()> {
    let probe = || {
        let held: Vec<_> = functions().filter(|function| is_held(function)).collect();
        let done = if held.is_empty() {
            fs::write("/sys/bus/pci/rescan", "1")
        } else {
            held.iter().try_for_each(|function| let_go(function))
        };
        if let Err(error) = done {
            kernel_log::error(&format!("cannot give the PCI device to its driver: {error}"));
        }
    };
    std::thread::Builder::new().name("probe".into()).spawn(probe).map(drop).context("cannot start a thread")
}

fn is_held(function: &Path) -> bool {
    fs::read_to_string(function.join("driver_override")).is_ok_and(|name| name.trim() == NOBODY)
}

/// Gives the function to the driver that claims it; one that is loaded later takes it then.
fn let_go(function: &Path) -> io::Result<()> {
    // An empty line is no name (`driver_set_override`); a write of nothing would not reach the kernel.
    fs::write(function.join("driver_override"), "\n")?;
    let name = function.file_name().unwrap_or_default();
    fs::write("/sys/bus/pci/drivers_probe", name.as_encoded_bytes())
}

fn functions() -> impl Iterator<Item = PathBuf> {
    fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten().map(|function| function.path())
}

/// Takes the driver away from each function that is neither this VM's own nor a bridge, as `unbind` in sysfs does. In a thread: the
/// driver takes the network stack's lock for it, or waits for those who have its card open.
///
/// # Errors
/// When no thread can be made.
pub fn unbind_all() -> anyhow::Result<()> {
    let unbind = || {
        for function in functions().filter(|function| describe_one(function).is_some()) {
            let name = function.file_name().unwrap_or_default();
            let _ = fs::write(function.join("driver/unbind"), name.as_encoded_bytes());
        }
    };
    std::thread::Builder::new().name("unbind".into()).spawn(unbind).map(drop).context("cannot start a thread")
}

/// The functions that are neither this VM's own (virtio) nor a bridge, each with its ids and driver, in a sentence's form.
pub fn describe() -> String {
    let Ok(functions) = fs::read_dir("/sys/bus/pci/devices") else { return "there is no PCI bus".into() };
    let mut found: Vec<_> = functions.flatten().filter_map(|function| describe_one(&function.path())).collect();
    found.sort();
    if found.is_empty() { "there is no PCI device but virtio".into() } else { found.join(", ") }
}

fn describe_one(function: &Path) -> Option<String> {
    let read = |name: &str| fs::read_to_string(function.join(name)).unwrap_or_default().trim().to_owned();
    let (vendor, device, class) = (read("vendor"), read("device"), read("class"));
    let is_own = vendor == VIRTIO && !VIRTIO_DISKS.contains(&&device[..]);
    if is_own || class.starts_with(BRIDGE) {
        return None;
    }
    let driver = fs::read_link(function.join("driver")).ok();
    let driver = driver.as_ref().and_then(|path| path.file_name()?.to_str()).map(|name| format!("driver {name}"));
    let (vendor, device) = (vendor.trim_start_matches("0x"), device.trim_start_matches("0x"));
    let name = function.file_name()?.to_str()?;
    Some(format!("{name} ({vendor}:{device}) has {}", driver.unwrap_or_else(|| "no driver".into())))
}
