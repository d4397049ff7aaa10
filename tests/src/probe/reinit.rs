//! A driver's bare re-initialisation: unbind, bind, first answer. The floor for any recovery that starts the driver anew; run in a
//! guest to which the NIC or the disk's controller is passed straight through.

use std::fs::{self, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::net::first_answer;
use super::patience::scaled;

/// How long it took, ms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reinit {
    /// `unbind` to the interface's appearance.
    pub bind_ms: f64,
    /// From there to the carrier.
    pub link_ms: f64,
    /// All, to the first answer of the peer.
    pub total_ms: f64,
}

/// Longest wait for an interface, its carrier or a disk.
const PATIENCE: Duration = Duration::from_secs(20);

/// Takes the driver of the machine's first physical NIC off and on again.
///
/// # Errors
/// There is no such NIC, or it does not come back.
pub fn reinit(address: &str, peer: Ipv4Addr) -> io::Result<Reinit> {
    let device = physical_nic()?;
    let start = Instant::now();
    bind_again(&device)?;
    let interface = wait(|| interface_of(&device))?;
    let bind_ms = ms(start);
    let bound = Instant::now();
    ip(&["link", "set", &interface, "up"])?;
    ip(&["addr", "add", address, "dev", &interface])?;
    let carrier = format!("/sys/class/net/{interface}/carrier");
    wait(|| fs::read_to_string(&carrier).ok().filter(|text| text.trim() == "1"))?;
    let link_ms = ms(bound);
    first_answer(peer, scaled(PATIENCE))?;
    Ok(Reinit { bind_ms, link_ms, total_ms: ms(start) })
}

/// Takes the driver of the controller of the machine's first physical disk off and on again: how long until a block can be read, ms.
///
/// # Errors
/// There is no such disk, or none comes back.
pub fn reinit_disk() -> io::Result<f64> {
    let (function, _) = physical_disk().ok_or_else(|| io::Error::other("no PCI function here has a disk"))?;
    let start = Instant::now();
    bind_again(&function)?;
    wait(|| {
        let (_, node) = physical_disk()?;
        let disk = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(node).ok()?;
        let mut block = Block([0; 4096]);
        disk.read_exact_at(&mut block.0, 0).ok()
    })?;
    Ok(ms(start))
}

/// Where a direct read may go.
#[repr(align(4096))]
struct Block([u8; 4096]);

/// The first disk that a PCI function has: the function, and the disk's node.
fn physical_disk() -> Option<(PathBuf, PathBuf)> {
    fs::read_dir("/sys/block").ok()?.flatten().find_map(|entry| {
        let path = fs::canonicalize(entry.path()).ok()?;
        let function = path.ancestors().find(|dir| dir.join("vendor").is_file() && dir.join("config").is_file())?;
        Some((function.to_owned(), Path::new("/dev").join(entry.file_name())))
    })
}

fn bind_again(device: &Path) -> io::Result<()> {
    let name = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let driver = fs::canonicalize(device.join("driver"))?;
    fs::write(driver.join("unbind"), &name)?;
    fs::write(driver.join("bind"), &name)
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn interface_of(device: &Path) -> Option<String> {
    let entry = fs::read_dir(device.join("net")).ok()?.flatten().next()?;
    Some(entry.file_name().to_string_lossy().into_owned())
}

fn physical_nic() -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/bus/pci/devices")?.flatten() {
        let path = fs::canonicalize(entry.path())?;
        if path.join("net").is_dir() {
            return Ok(path);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "no PCI function here has a network interface"))
}

fn wait<T>(mut get: impl FnMut() -> Option<T>) -> io::Result<T> {
    let (start, patience) = (Instant::now(), scaled(PATIENCE));
    while start.elapsed() < patience {
        if let Some(value) = get() {
            return Ok(value);
        }
        thread::sleep(Duration::from_millis(2));
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "the interface, its carrier or the disk did not come back"))
}

fn ip(arguments: &[&str]) -> io::Result<()> {
    let status = Command::new("ip").args(arguments).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("ip {} failed", arguments.join(" ")))) }
}
