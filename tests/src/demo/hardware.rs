//! The demonstration on real hardware: the NIC is bound to `vfio-pci` for its length and given back after it.
//!
//! The peer is this machine, so the guest must be able to reach one of its addresses through the NIC's wire. A NIC
//! that carries this machine's own addresses is refused.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::DemoError;
use super::place::Place;
use crate::assets::{Assets, Say};

/// The device and its network.
#[derive(Clone, Debug)]
pub struct Wire {
    /// PCI address, as `0000:03:00.0`.
    pub pci: String,
    /// The guest's address with prefix length, or `dhcp`.
    pub guest: String,
    /// Where the guest reaches this machine.
    pub peer: Ipv4Addr,
}

impl Wire {
    pub(super) fn guest_address(&self) -> Option<Ipv4Addr> {
        self.guest.split('/').next()?.parse().ok()
    }
}

fn device(pci: &str) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(pci)
}

fn driver(pci: &str) -> Option<String> {
    let link = fs::read_link(device(pci).join("driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

/// A device bound to `vfio-pci`; dropped, it goes back to the driver it had.
#[derive(Debug)]
pub struct Bound {
    pci: String,
    before: Option<String>,
}

impl Bound {
    /// Binds the device, unless it is bound already.
    ///
    /// # Errors
    /// A sentence that says what to do.
    pub(super) fn bind(pci: &str, say: Say<'_>) -> Result<Self, DemoError> {
        let dir = device(pci);
        if !dir.is_dir() {
            return Err(DemoError::Device(format!("there is no PCI device {pci}; `lspci -D` lists them")));
        }
        if !nix::unistd::geteuid().is_root() {
            return Err(DemoError::Device("binding a device to vfio-pci needs root: sudo make demo PCI=...".into()));
        }
        if !dir.join("iommu_group").exists() {
            return Err(DemoError::Device(format!(
                "{pci} is behind no IOMMU; switch it on in the firmware and on the kernel's command line (intel_iommu=on)"
            )));
        }
        refuse_used(&dir, pci)?;
        let before = driver(pci);
        if before.as_deref() == Some("vfio-pci") {
            return Ok(Self { pci: pci.into(), before: None });
        }
        say(&format!("binding {pci} to vfio-pci (was: {})", before.as_deref().unwrap_or("no driver")));
        let _ = std::process::Command::new("modprobe").arg("vfio-pci").status();
        let bound = Self { pci: pci.into(), before };
        rebind(pci, "vfio-pci").map_err(|(what, source)| DemoError::File { operation: "write", path: what, source })?;
        if driver(pci).as_deref() != Some("vfio-pci") {
            return Err(DemoError::Device(format!(
                "{pci} could not be bound to vfio-pci; is the module there? (modprobe vfio-pci)"
            )));
        }
        Ok(bound)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = rebind(&self.pci, "");
            let _ = fs::write(format!("/sys/bus/pci/drivers/{before}/bind"), &self.pci);
        }
    }
}

fn rebind(pci: &str, to: &str) -> Result<(), (PathBuf, std::io::Error)> {
    let dir = device(pci);
    let write = |path: PathBuf, text: &str| fs::write(&path, text).map_err(|e| (path, e));
    write(dir.join("driver_override"), &format!("{to}\n"))?;
    if dir.join("driver").exists() {
        write(dir.join("driver/unbind"), pci)?;
    }
    write("/sys/bus/pci/drivers_probe".into(), pci)
}

/// A NIC with an address or a default route is somebody's network.
fn refuse_used(dir: &Path, pci: &str) -> Result<(), DemoError> {
    let Ok(interfaces) = fs::read_dir(dir.join("net")) else { return Ok(()) };
    for interface in interfaces.flatten() {
        let name = interface.file_name().to_string_lossy().into_owned();
        let addresses = nix::ifaddrs::getifaddrs().map_err(|e| DemoError::Device(e.to_string()))?;
        let used = addresses
            .into_iter()
            .any(|a| a.interface_name == name && a.address.is_some_and(|address| address.as_sockaddr_in().is_some()));
        if used {
            return Err(DemoError::Device(format!(
                "{pci} ({name}) carries an address of this machine; take it down first, or choose another NIC"
            )));
        }
    }
    Ok(())
}

/// Builds the image for the device in `share`; its folder's name.
pub(super) fn image(pci: &str, assets: &Assets, share: &Path, say: Say<'_>) -> Result<String, DemoError> {
    say(&format!("building the driver VM image for {pci}"));
    let name = "image";
    let umbra = assets.probe().with_file_name("umbra");
    let output = std::process::Command::new(&umbra)
        .args(["image", "--pci", pci, "--kernel-deb"])
        .arg(assets.package())
        .arg("--agent")
        .arg(umbra.with_file_name("umbra-agent"))
        .arg("--output")
        .arg(share.join(name))
        .output()
        .map_err(|e| DemoError::file("run", &umbra, e))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(DemoError::Umbra { what: "`umbra image` failed".into(), said });
    }
    Ok(name.into())
}

/// The address that the guest got by DHCP.
pub(super) fn address_of_guest(place: &mut Place, guest: &str) -> Result<Ipv4Addr, DemoError> {
    let script = "ip -4 -o addr show scope global | awk '{print $4}' | cut -d/ -f1 | head -n 1";
    let text = place.in_guest(guest, script, Duration::from_secs(60))?;
    text.trim()
        .parse()
        .map_err(|_| DemoError::Device("the guest got no address by DHCP; give it one: IP=192.168.1.77/24".into()))
}
