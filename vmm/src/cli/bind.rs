//! `umbra bind` and `umbra unbind`: take a PCI function from its driver for a VM, and give it back.

use anyhow::bail;

use crate::base::pci_address::Bdf;
use crate::host::HostDevice;
use crate::host::doctor::list::interface_up;

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
    if let Some(interface) = interface_up(&device)
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
