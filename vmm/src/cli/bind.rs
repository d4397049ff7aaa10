//! `umbra bind` and `umbra unbind`: take a PCI function from its driver for a VM, and give it back.

use std::fs;
use std::path::Path;

use anyhow::bail;

use crate::pci::address::Bdf;
use crate::vfio::HostDevice;

/// Arguments of `umbra bind`.
#[derive(Debug, clap::Args)]
pub struct BindArgs {
    /// The PCI function, as 0000:03:00.0 (`lspci -D` lists them).
    device: Bdf,
    /// Take it even if it has a network interface that is up.
    #[arg(long)]
    force: bool,
}

/// Arguments of `umbra unbind`.
#[derive(Debug, clap::Args)]
pub struct UnbindArgs {
    /// The PCI function, as 0000:03:00.0.
    device: Bdf,
}

/// Binds a function to `vfio-pci`.
///
/// # Errors
///
/// It is not there, is in use, or the host cannot do it.
pub fn bind(args: &BindArgs) -> anyhow::Result<()> {
    let device = HostDevice::find(args.device)?;
    if let Some(interface) = interface_that_is_up(&device.directory())
        && !args.force
    {
        bail!(
            "{}: the host uses its network interface {interface}; take that down first (`ip link set {interface} down`), or \
             use --force",
            args.device
        );
    }
    let before = device.bind_to_vfio()?;
    device.check_ready()?;
    let from = before.map(|driver| format!(" (was {driver})")).unwrap_or_default();
    super::print(&format!("{}: bound to vfio-pci{from}; {}", args.device, device.reset().describe()))
}

/// Gives a function back to the host's driver.
///
/// # Errors
///
/// It is not there, or the host cannot do it.
pub fn unbind(args: &UnbindArgs) -> anyhow::Result<()> {
    let driver = HostDevice::find(args.device)?.unbind_from_vfio()?;
    super::print(&match driver {
        Some(driver) => format!("{}: bound to {driver}", args.device),
        None => format!("{}: given back; the host has no driver loaded for it", args.device),
    })
}

/// A network interface of the function that is up, if any.
fn interface_that_is_up(device: &Path) -> Option<String> {
    /// `IFF_UP` of `netdevice(7)`.
    const UP: u32 = 1;
    let interfaces = fs::read_dir(device.join("net")).ok()?.flatten();
    interfaces.map(|entry| (entry.path(), entry.file_name())).find_map(|(path, name)| {
        let flags = fs::read_to_string(path.join("flags")).ok()?;
        let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).ok()?;
        (flags & UP != 0).then(|| name.to_string_lossy().into_owned())
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_up_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(interface_that_is_up(dir.path()), None);
        for (name, flags) in [("eth0", "0x1002\n"), ("eth1", "0x1003\n")] {
            let net = dir.path().join("net").join(name);
            fs::create_dir_all(&net).unwrap();
            fs::write(net.join("flags"), flags).unwrap();
        }
        assert_eq!(interface_that_is_up(dir.path()).as_deref(), Some("eth1"));
    }
}
