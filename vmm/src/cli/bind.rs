//! `umbra bind` and `umbra unbind`: take PCI functions from their drivers for a VM, and give one back.

use anyhow::bail;

use crate::base::pci_address::Bdf;
use crate::host::HostDevice;
use crate::host::bind::bind_together;
use crate::host::doctor::list::interface_up;
use crate::host::doctor::{Root, storage};

/// Arguments of `umbra bind`.
#[derive(Debug, clap::Args)]
pub struct BindArgs {
    /// The PCI functions, as 0000:03:00.0 (`lspci -D` lists them): all are bound, or none is.
    #[arg(value_name = "DEVICE", required = true)]
    devices: Vec<Bdf>,
    /// Take them even if the host uses their network interfaces. Never taken is a controller whose disks it uses.
    #[arg(long)]
    force: bool,
}

/// Arguments of `umbra unbind`.
#[derive(Debug, clap::Args)]
pub struct UnbindArgs {
    /// The PCI function, as 0000:03:00.0.
    device: Bdf,
}

/// Binds functions to `vfio-pci`, all or none.
///
/// # Errors
///
/// One is not there, is in use, or the host cannot do it: nothing has changed.
pub fn bind(args: &BindArgs) -> anyhow::Result<()> {
    let devices = args.devices.iter().map(|device| HostDevice::find(*device)).collect::<Result<Vec<_>, _>>()?;
    for device in &devices {
        let disks = storage::in_use(&Root::default(), device);
        if !disks.is_empty() {
            bail!(
                "{}: the host uses disks of it, which it would lose: {}; unmount them first",
                device.bdf(),
                disks.join(", ")
            );
        }
        if let Some(interface) = interface_up(device)
            && !args.force
        {
            bail!(
                "{}: the host uses its network interface {interface}; take that down first (`ip link set {interface} down`), \
                 or use --force",
                device.bdf()
            );
        }
    }
    let before = bind_together(&devices)?;
    for (device, before) in devices.iter().zip(before) {
        let from = before.map(|driver| format!(" (was {driver})")).unwrap_or_default();
        super::print(&format!("{}: bound to vfio-pci{from}; {}", device.bdf(), device.reset().describe()))?;
    }
    Ok(())
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
