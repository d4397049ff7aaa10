//! What a supervisor that was killed (`kill -9`, out of memory) left behind: found by the next start of the machine, ended or put
//! back, and reported.
//!
//! The kernel kills VM processes with their supervisor (`PR_SET_PDEATHSIG`), but one that holds much memory or a device
//! takes its time to end; until then the device is busy. A reset that was under way leaves the device with Umbra's order
//! of reset methods in place of the kernel's. Sockets are replaced where they are bound.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use thiserror::Error;

use crate::base::proc_stat::ProcStat;
use crate::host::sysfs::HostDevice;
use crate::wire::spawn::SUPERVISOR;

/// Longest wait for the VMs to end: unpinning and freeing hundreds of gigabytes takes seconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// A VM process of the run before does not end.
#[derive(Debug, Error)]
#[error(
    "the process {pid} ({name}) of the run before is killed and does not end: the kernel holds it, perhaps over its device \
     (`cat /proc/{pid}/stack`, `dmesg`). Wait for it, or reboot the host"
)]
pub struct LeftoverError {
    /// Number of the process.
    pub pid: i32,
    /// The VM.
    pub name: String,
}

/// Ends what the supervisor with the number `dead` left and puts `resets`, the kernel's orders of reset methods, back.
/// Returns what was done, in words.
///
/// # Errors
///
/// A VM's process does not end.
pub(in crate::supervisor) fn clean_up(
    dead: u32,
    resets: &BTreeMap<String, String>,
    pci: &Path,
) -> Result<String, LeftoverError> {
    let mut done = Vec::new();
    let found = vms_of(dead);
    for (pid, _) in &found {
        // One that has ended by now needs no signal.
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    let until = Instant::now() + PATIENCE;
    for (pid, name) in &found {
        while is_alive(*pid, dead) {
            if Instant::now() > until {
                return Err(LeftoverError { pid: *pid, name: name.clone() });
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
    match found.len() {
        0 => done.push("its VMs have ended with it".into()),
        n => done.push(format!("{n} of its VMs had not ended yet and are gone now")),
    }
    for (device, order) in resets {
        if let Some(order) = put_back(pci, device, order) {
            done.push(format!("the reset methods of {device} stand as before ({order})"));
        }
    }
    Ok(done.join("; "))
}

/// The kernel's orders of reset methods, as they are before anything is reset.
pub(in crate::supervisor) fn reset_orders<'a>(
    devices: impl Iterator<Item = &'a HostDevice>,
) -> BTreeMap<String, String> {
    let order = |device: &HostDevice| fs::read_to_string(device.directory().join("reset_method")).ok();
    devices.filter_map(|device| Some((device.bdf().to_string(), order(device)?.trim().to_owned()))).collect()
}

/// Puts a device's order of reset methods back, as far as the kernel takes it; what was written, if it was another.
fn put_back(pci: &Path, device: &str, order: &str) -> Option<String> {
    let device = HostDevice::find_below(pci, device.parse().ok()?).ok()?;
    let path = device.directory().join("reset_method");
    let (now, accepted) = (fs::read_to_string(&path).unwrap_or_default(), device.reset().acceptable_order(order));
    let stands = [order, &accepted].contains(&now.trim());
    (!stands && !accepted.is_empty() && fs::write(&path, &accepted).is_ok()).then_some(accepted)
}

/// VM processes that were started by the supervisor `dead` and have lost it: number and name.
fn vms_of(dead: u32) -> Vec<(i32, String)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| is_alive(*pid, dead)).filter_map(|pid| Some((pid, name_of(pid, dead)?))).collect()
}

/// The VM's name, if `pid` is a VM process that `dead` started.
fn name_of(pid: i32, dead: u32) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mark = format!("{SUPERVISOR}={dead}");
    if !environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes()) {
        return None;
    }
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let words: Vec<_> = command.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let name = words.iter().position(|word| word == "--name").and_then(|n| words.get(n + 1));
    (words.get(1).is_some_and(|word| word == "vm")).then(|| name.map_or_else(String::new, ToString::to_string))
}

/// Whether `pid` is a process that still does or holds something and whose parent is not `dead`: that number may be
/// another living supervisor's by now, with VMs of its own.
fn is_alive(pid: i32, dead: u32) -> bool {
    ProcStat::read(format!("/proc/{pid}")).is_some_and(|stat| !stat.has_ended() && stat.parent != dead)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sysfs::tests::FakeBus;

    #[test]
    fn reset_methods_are_put_back_and_only_where_they_differ() {
        let bus = FakeBus::new();
        let device = bus.add("0000:01:00.0", Some(1), Some("vfio-pci"));
        let path = device.directory().join("reset_method");
        fs::write(&path, "flr pm bus\n").unwrap();
        let orders = reset_orders([&device].into_iter());
        assert_eq!(orders["0000:01:00.0"], "flr pm bus");
        // Nobody has such a number.
        let dead = u32::MAX;
        assert_eq!(clean_up(dead, &orders, bus.0.path()).unwrap(), "its VMs have ended with it");
        fs::write(&path, "bus\n").unwrap();
        let done = clean_up(dead, &orders, bus.0.path()).unwrap();
        assert!(done.contains("the reset methods of 0000:01:00.0 stand as before (flr pm bus)"), "{done}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "flr pm bus");
    }

    #[test]
    fn an_order_that_was_never_touched_stands_also_where_the_kernel_would_not_take_it_again() {
        let bus = FakeBus::new();
        let device = bus.add_behind("0000:00:1c.0", "0000:01:00.0", Some(1), Some("vfio-pci"));
        bus.add_behind("0000:00:1c.0", "0000:01:00.1", Some(1), Some("vfio-pci"));
        let path = device.directory().join("reset_method");
        fs::write(&path, "pm bus\n").unwrap();
        assert_eq!(put_back(bus.0.path(), "0000:01:00.0", "pm bus"), None);
        assert_eq!(fs::read_to_string(&path).unwrap(), "pm bus\n");
        fs::write(&path, "\n").unwrap();
        assert_eq!(put_back(bus.0.path(), "0000:01:00.0", "pm bus").unwrap(), "pm");
    }

    #[test]
    fn this_process_is_alive_and_no_vm_of_anybody() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(is_alive(pid, u32::MAX));
        assert_eq!(name_of(pid, u32::MAX), None);
    }
}
