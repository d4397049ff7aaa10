//! `umbra bind` and `umbra unbind`: take PCI functions from their drivers for a VM, and give one back. `umbra run --bind` takes those of
//! a machine.

use std::fs::File;
use std::io;
use std::path::Path;

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::base::pci_address::Bdf;
use crate::base::users::{USERS, User};
use crate::config::Machine;
use crate::host::bind::bind_together;
use crate::host::doctor::list::interface_up;
use crate::host::doctor::{Root, storage};
use crate::host::persist;
use crate::host::{Error, HostDevice};
use crate::supervisor::{Host, PreflightError, RunError};

/// Locked by who binds functions.
const BUS: &str = "/sys/bus/pci";

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
    /// Give them to this user, by name or number, who then runs machines with them without root.
    #[arg(long = "for", value_name = "USER")]
    owner: Option<String>,
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
    bind_all(args).map_err(say_who_may)
}

fn bind_all(args: &BindArgs) -> anyhow::Result<()> {
    let devices = args.devices.iter().map(|device| HostDevice::find(*device)).collect::<Result<Vec<_>, _>>()?;
    for device in &devices {
        // Of a USB controller it is not known what it is for.
        if let Some(why) = device.unserved_as(true).filter(|why| !(args.passthrough && why.may_be_passed_through())) {
            let hint = if why.may_be_passed_through() { "; `umbra bind --passthrough` binds it for that" } else { "" };
            bail!("{}{hint}", Error::Unserved { bdf: device.bdf(), why });
        }
    }
    let owner = args.owner.as_deref().map(|name| user_number(Path::new(USERS), name)).transpose()?;
    take(&devices, args.force)?;
    if let Some(owner) = owner {
        for device in &devices {
            let file = device.give_to(owner).with_context(|| format!("{} is bound, and still root's", device.bdf()))?;
            let name = args.owner.as_deref().unwrap_or_default();
            super::print(&format!(
                "{}: {} is {name}'s, until the function is given back",
                device.bdf(),
                file.display()
            ))?;
        }
    }
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    for device in devices.iter().filter(|_| args.persist) {
        let bdf = device.bdf();
        // The functions of a group are taken together or not at all.
        let group = device.group();
        let is_with_it = |other: &&HostDevice| other.bdf() == bdf || (group.is_some() && other.group() == group);
        let all = devices.iter().filter(is_with_it).map(|other| other.bdf().to_string());
        let for_guest = args.passthrough.then(|| "--passthrough".to_owned());
        let words = ["bind".to_owned()].into_iter().chain(for_guest).chain(all).collect::<Vec<_>>().join(" ");
        let rule = persist::keep(Path::new(persist::RULES), device, owner, (&program, &words))
            .with_context(|| format!("{bdf} is bound now, and will not be after the next boot"))?;
        super::print(&format!("{bdf}: bound at each boot, by {}", rule.display()))?;
    }
    Ok(())
}

/// With a word on who may, where this user may not.
fn say_who_may(error: anyhow::Error) -> anyhow::Error {
    let mut io_errors = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    let denied = io_errors.any(|error| error.kind() == io::ErrorKind::PermissionDenied);
    if denied { error.context("only root binds functions and gives them back: use `sudo`") } else { error }
}

/// The number of a user, by its name in the file `users` or by itself.
fn user_number(users: &Path, name: &str) -> anyhow::Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let user = User::find(users, name).with_context(|| format!("read {}", users.display()))?;
    let hint = "one of a directory service is named by its number (`id -u NAME`)";
    user.map(|user| user.uid).with_context(|| format!("no user {name:?} in {}; {hint}", users.display()))
}

/// Binds all devices that `machine` names and that are not bound.
///
/// # Errors
///
/// As of [`bind`].
pub(super) fn bind_machine(machine: &Machine) -> anyhow::Result<()> {
    let devices = unbound(machine, &Host::default().pci)?;
    if devices.is_empty() { Ok(()) } else { take(&devices, false) }
}

/// The functions below `pci` that `machine` names and that are not bound; one that no driver VM can serve stays the host's.
fn unbound(machine: &Machine, pci: &Path) -> anyhow::Result<Vec<HostDevice>> {
    let find = |address: &String| anyhow::Ok(HostDevice::find_below(pci, address.parse()?)?);
    let mut devices = Vec::new();
    for (name, driver) in &machine.driver {
        for device in [&driver.device].into_iter().chain(&driver.spare) {
            let device = find(device)?;
            if let Some(why) = device.unserved_as(machine.serves_disks(name)) {
                let source = Error::Unserved { bdf: device.bdf(), why };
                bail!(RunError::from(PreflightError::Device { user: name.clone(), source }));
            }
            devices.push(device);
        }
    }
    for device in machine.guest.values().flat_map(|guest| &guest.passthrough) {
        devices.push(find(device)?);
    }
    devices.retain(|device| !device.is_bound_to_vfio());
    Ok(devices)
}

/// Binds `devices`, unless the host uses one.
fn take(devices: &[HostDevice], force: bool) -> anyhow::Result<()> {
    // One at a time: udev may run two at once, for functions of one group. Where there is no such folder, nothing can be bound.
    let bus = File::open(BUS).with_context(|| format!("cannot look at {BUS}"))?;
    let _one_at_a_time = Flock::lock(bus, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
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
    give_back(args).map_err(say_who_may)
}

fn give_back(args: &UnbindArgs) -> anyhow::Result<()> {
    // A function that is not there any more may have a rule.
    if let Some(rule) = persist::forget(Path::new(persist::RULES), args.device)? {
        super::print(&format!("{}: not bound at boot any more ({} is removed)", args.device, rule.display()))?;
    }
    let device = HostDevice::find(args.device)?;
    let before = device.driver();
    let driver = device.unbind_from_vfio()?;
    super::print(&match driver {
        Some(driver) if before.as_ref() == Some(&driver) => {
            format!("{}: bound to {driver}, as before: no VM was to have it", args.device)
        }
        Some(driver) => format!("{}: bound to {driver}", args.device),
        None => format!("{}: given back; the host has no driver loaded for it", args.device),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;
    use crate::host::sysfs::tests::FakeBus;

    #[test]
    fn a_user_is_named_or_numbered() {
        let users = tempfile::NamedTempFile::new().unwrap();
        fs::write(&users, "root:x:0:0:root:/root:/bin/sh\nann:x:1001:1002::/home/ann:/bin/sh\nodd:x\n").unwrap();
        let number = |name| user_number(users.path(), name);
        assert_eq!(number("ann").unwrap(), 1001);
        assert_eq!(number("4711").unwrap(), 4711);
        for name in ["an", "odd", "", "-1"] {
            let error = number(name).unwrap_err().to_string();
            assert!(error.contains(&format!("no user {name:?}")) && error.contains("id -u"), "{error}");
        }
        assert!(user_number(Path::new("/no/such/file"), "ann").unwrap_err().to_string().contains("/no/such/file"));
    }

    #[test]
    fn a_machine_s_devices_are_bound_but_for_those_that_no_driver_vm_can_serve() {
        let bus = FakeBus::new();
        bus.add("0000:03:00.0", Some(1), Some("e1000e"));
        bus.add("0000:04:00.0", Some(2), Some("vfio-pci"));
        let usb = bus.add("0000:00:14.0", Some(3), Some("xhci_hcd"));
        fs::write(usb.directory().join("class"), "0x0c0330\n").unwrap();
        let named_as = |class: &str, passthrough: &str, device: &str| {
            let text = format!(
                "[guest.web]\nkernel = \"k\"\n{class} = [{{ driver = \"nic0\" }}]\npassthrough = [\"{passthrough}\"]\n\
                 [driver.nic0]\nimage = \"i\"\ndevice = \"{device}\"\n"
            );
            let found = unbound(&Machine::parse(&text, "m.toml".as_ref()).unwrap(), bus.0.path());
            found.map(|devices| devices.iter().map(|device| device.bdf().to_string()).collect::<Vec<_>>())
        };
        let named = |passthrough: &str, device: &str| named_as("net", passthrough, device);
        assert_eq!(named("0000:04:00.0", "0000:03:00.0").unwrap(), ["0000:03:00.0"], "the other is bound already");
        assert_eq!(named("0000:00:14.0", "0000:04:00.0").unwrap(), ["0000:00:14.0"], "a guest may have it");
        assert_eq!(named_as("disk", "0000:04:00.0", "0000:00:14.0").unwrap(), ["0000:00:14.0"], "for its disks");
        let refused = named("0000:04:00.0", "0000:00:14.0").unwrap_err();
        assert!(refused.downcast_ref().is_some_and(RunError::is_configuration), "{refused}");
        assert!(format!("{refused:#}").contains("nic0: 0000:00:14.0 is a USB controller"), "{refused:#}");
    }

    #[test]
    fn who_may_not_is_told_who_may() {
        let denied = say_who_may(io::Error::from(io::ErrorKind::PermissionDenied).into());
        assert!(denied.to_string().contains("`sudo`"), "{denied}");
        assert_eq!(say_who_may(anyhow::anyhow!("no such device")).to_string(), "no such device");
    }
}
