//! `umbra bind` and `umbra unbind`: take PCI functions from their drivers for a VM, and give one back. `umbra run --bind` takes those of
//! a machine.

use std::path::Path;

use anyhow::{Context, bail};

use crate::base::pci_address::Bdf;
use crate::config::Machine;
use crate::host::bind::bind_together;
use crate::host::doctor::list::interface_up;
use crate::host::doctor::{Root, storage};
use crate::host::persist;
use crate::host::{Error, HostDevice};

/// Arguments of `umbra bind`.
#[derive(Debug, clap::Args)]
pub struct BindArgs {
    /// The PCI functions, as 0000:03:00.0 (`lspci -D` lists them): all are bound, or none is.
    #[arg(value_name = "DEVICE", required = true)]
    devices: Vec<Bdf>,
    /// Take them even if the host uses their network interfaces. Never taken is a controller whose disks it uses.
    #[arg(long)]
    force: bool,
    /// They are for a guest (`passthrough`), so that those are taken too which no driver VM can serve yet: Wi-Fi, USB.
    #[arg(long)]
    passthrough: bool,
    /// Bind them at each boot too, by a udev rule for each; `umbra unbind` removes it.
    #[arg(long)]
    persist: bool,
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
        if let Some(why) = device.unserved().filter(|why| !(args.passthrough && why.may_be_passed_through())) {
            let hint = if why.may_be_passed_through() { "; `umbra bind --passthrough` binds it for that" } else { "" };
            bail!("{}{hint}", Error::Unserved { bdf: device.bdf(), why });
        }
    }
    take(&devices, args.force)?;
    for device in devices.iter().filter(|_| args.persist) {
        let bdf = device.bdf();
        let rule = persist::keep(Path::new(persist::RULES), device)
            .with_context(|| format!("{bdf} is bound now, and will not be after the next boot"))?;
        super::print(&format!("{bdf}: bound at each boot, by {}", rule.display()))?;
    }
    Ok(())
}

/// Binds all devices that `machine` names and that are not bound.
///
/// # Errors
///
/// As of [`bind`].
pub(super) fn bind_machine(machine: &Machine) -> anyhow::Result<()> {
    let drivers = machine.driver.values().flat_map(|driver| [&driver.device].into_iter().chain(&driver.spare));
    let all = drivers.chain(machine.guest.values().flat_map(|guest| &guest.passthrough));
    let mut devices = Vec::new();
    for address in all {
        let device = HostDevice::find(address.parse()?)?;
        if !device.is_bound_to_vfio() {
            devices.push(device);
        }
    }
    if devices.is_empty() { Ok(()) } else { take(&devices, false) }
}

/// Binds `devices`, unless the host uses one.
fn take(devices: &[HostDevice], force: bool) -> anyhow::Result<()> {
    for device in devices {
        let disks = storage::in_use(&Root::default(), device);
        if !disks.is_empty() {
            bail!(
                "{}: the host uses disks of it, which it would lose: {}; unmount them first",
                device.bdf(),
                disks.join(", ")
            );
        }
        if let Some(interface) = interface_up(device)
            && !force
        {
            bail!(
                "{}: the host uses its network interface {interface}; take that down first (`ip link set {interface} down`), \
                 or use `umbra bind --force`",
                device.bdf()
            );
        }
    }
    let before = bind_together(devices)?;
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
    // A function that is not there any more may have a rule.
    if let Some(rule) = persist::forget(Path::new(persist::RULES), args.device)? {
        super::print(&format!("{}: not bound at boot any more ({} is removed)", args.device, rule.display()))?;
    }
    let driver = HostDevice::find(args.device)?.unbind_from_vfio()?;
    super::print(&match driver {
        Some(driver) => format!("{}: bound to {driver}", args.device),
        None => format!("{}: given back; the host has no driver loaded for it", args.device),
    })
}
