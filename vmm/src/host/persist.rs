//! A binding to `vfio-pci` that lasts over boots: a udev rule for each function, by address and model, so that another card that comes
//! to have the address is left alone.
//!
//! The rule chooses the driver before udev loads one. One that is loaded already has the function before udev hears of it: in the initial
//! RAM disk, or when a card comes back; and where the rule comes between the kernel's looks at two drivers, none has it. `umbra bind`
//! takes the function then, as the rule has it do, unless the host uses it.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use umbra_guest_images::files::write_atomically;

use super::bind::VFIO_PCI;
use super::error::Error;
use super::files::VFIO;
use super::sysfs::HostDevice;
use crate::base::pci_address::Bdf;

/// Where an administrator's rules are.
pub const RULES: &str = "/etc/udev/rules.d";

/// The rule of a function, in the folder `rules`. Before those that load drivers (80-drivers.rules).
fn path(rules: &Path, bdf: Bdf) -> PathBuf {
    rules.join(format!("10-umbra-{bdf}.rules"))
}

/// Writes the rule that gives `device` to `vfio-pci` at each boot, by `command`, a program and its words, where another driver has it
/// already, and to the user of the number `owner`; where it is.
///
/// # Errors
///
/// Its model is not known, or the rule cannot be written.
pub fn keep(rules: &Path, device: &HostDevice, owner: Option<u32>, command: (&Path, &str)) -> Result<PathBuf, Error> {
    let (bdf, vendor, model) = (device.bdf(), device.vendor()?, device.device()?);
    let path = path(rules, bdf);
    let of_it = |action: &str| {
        format!(
            "ACTION==\"{action}\", SUBSYSTEM==\"pci\", KERNEL==\"{bdf}\", \
             ATTR{{vendor}}==\"0x{vendor:04x}\", ATTR{{device}}==\"0x{model:04x}\", \\\n  "
        )
    };
    // In a rule `$$` is a `$`, and `%%` a `%`. udev may go by a rule for three seconds after it was removed.
    let program = command.0.display().to_string().replace('$', "$$").replace('%', "%%");
    let take = format!("TEST==\"{}\", RUN+=\"'{program}' {}\"", path.display(), command.1);
    let mut rule = format!(
        "# Written by `umbra bind --persist`; `umbra unbind {bdf}` removes it.\n\
         {}ATTR{{driver_override}}=\"{VFIO_PCI}\", RUN{{builtin}}+=\"kmod load {VFIO_PCI}\"\n\
         {}{take}\n\
         {}DRIVER!=\"{VFIO_PCI}\", {take}\n",
        of_it("add"),
        of_it("add"),
        of_it("bind")
    );
    if let Some(owner) = owner {
        let order =
            device.reset_order().map_or_else(String::new, |order| format!("ATTR{{reset_method}}=\"{order}\", "));
        // A group has its number anew at each boot.
        let give = format!("chown {owner} {VFIO}/$$(basename $$(readlink /sys$devpath/iommu_group))");
        let of_it = of_it("bind");
        rule.push_str(&format!("{of_it}DRIVER==\"{VFIO_PCI}\", {order}RUN+=\"/bin/sh -c '{give}'\"\n"));
    }
    let fail = |source| Error::Sysfs { operation: "write the rule", path: path.clone(), source };
    write_atomically(&path, rule.as_bytes()).map_err(|error| fail(error.source))?;
    Ok(path)
}

/// Removes the rule of a function; where it was, if there was one.
///
/// # Errors
///
/// It is there and cannot be removed.
pub fn forget(rules: &Path, bdf: Bdf) -> Result<Option<PathBuf>, Error> {
    let path = path(rules, bdf);
    match fs::remove_file(&path) {
        Ok(()) => Ok(Some(path)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Sysfs { operation: "remove the rule", path, source }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::host::sysfs::tests::FakeBus;

    #[test]
    fn a_rule_names_address_and_model_and_is_removed_again() {
        let bus = FakeBus::new();
        let nic = bus.add("0000:03:00.0", Some(1), Some("e1000e"));
        let (rules, command) = (bus.0.path().join("etc/rules.d"), (Path::new("/opt/50 %/umbra"), "bind 0000:03:00.0"));
        assert_eq!(forget(&rules, nic.bdf()).unwrap(), None);
        let written = keep(&rules, &nic, None, command).unwrap();
        assert_eq!(keep(&rules, &nic, None, command).unwrap(), written, "again");
        let take = format!("TEST==\"{}\", RUN+=\"'/opt/50 %%/umbra' bind 0000:03:00.0\"", written.display());
        let expected = format!("\
# Written by `umbra bind --persist`; `umbra unbind 0000:03:00.0` removes it.
ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"0000:03:00.0\", ATTR{{vendor}}==\"0x8086\", ATTR{{device}}==\"0x10d3\", \\
  ATTR{{driver_override}}=\"vfio-pci\", RUN{{builtin}}+=\"kmod load vfio-pci\"
ACTION==\"add\", SUBSYSTEM==\"pci\", KERNEL==\"0000:03:00.0\", ATTR{{vendor}}==\"0x8086\", ATTR{{device}}==\"0x10d3\", \\
  {take}
ACTION==\"bind\", SUBSYSTEM==\"pci\", KERNEL==\"0000:03:00.0\", ATTR{{vendor}}==\"0x8086\", ATTR{{device}}==\"0x10d3\", \\
  DRIVER!=\"vfio-pci\", {take}
");
        assert_eq!(fs::read_to_string(&written).unwrap(), expected);
        fs::write(nic.directory().join("reset_method"), "pm bus\n").unwrap();
        keep(&rules, &nic, Some(1000), command).unwrap();
        let of_a_user = format!(
            "{expected}\
ACTION==\"bind\", SUBSYSTEM==\"pci\", KERNEL==\"0000:03:00.0\", ATTR{{vendor}}==\"0x8086\", ATTR{{device}}==\"0x10d3\", \\
  DRIVER==\"vfio-pci\", ATTR{{reset_method}}=\"bus pm\", \
RUN+=\"/bin/sh -c 'chown 1000 /dev/vfio/$$(basename $$(readlink /sys$devpath/iommu_group))'\"
"
        );
        assert_eq!(fs::read_to_string(&written).unwrap(), of_a_user);
        assert_eq!(forget(&rules, nic.bdf()).unwrap(), Some(written));
        assert_eq!(fs::read_dir(&rules).unwrap().count(), 0);
    }
}
