//! Who of a machine is to have which IOMMU group: the kernel gives a group to one process alone, and each driver VM, each
//! spare and each guest is a process.
//!
//! Invariant: a machine in which two of them would need one group is refused before anything is started, with both places of
//! its file named.

use std::collections::BTreeMap;
use std::fmt;

use super::preflight::PreflightError;
use crate::base::pci_address::Bdf;
use crate::host::sysfs::HostDevice;

/// What a device is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Use {
    /// `device` of the table of this driver VM.
    Device(String),
    /// `spare` of the table of this driver VM.
    Spare(String),
    /// One of `passthrough` of the table of this guest.
    Passthrough(String),
}

/// A device and what it is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The device.
    pub device: Bdf,
    /// What it is for.
    pub user: Use,
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = self.device;
        match &self.user {
            Use::Device(name) => write!(f, "the device {device} of [driver.{name}]"),
            Use::Spare(name) => write!(f, "the spare {device} of [driver.{name}]"),
            Use::Passthrough(name) => write!(f, "{device}, passed through to [guest.{name}],"),
        }
    }
}

/// The groups that are taken.
#[derive(Debug, Default)]
pub(super) struct Groups(BTreeMap<u32, Claim>);

impl Groups {
    /// Takes the group of `device`.
    pub(super) fn claim(&mut self, device: &HostDevice, user: Use) -> Result<(), PreflightError> {
        let Some(group) = device.group() else { return Ok(()) };
        let second = Claim { device: device.bdf(), user };
        let Some(first) = self.0.get(&group) else {
            self.0.insert(group, second);
            return Ok(());
        };
        // A guest opens a group once for all that it has of it.
        if matches!(first.user, Use::Passthrough(_)) && first.user == second.user {
            return Ok(());
        }
        Err(PreflightError::SharedGroup(Box::new((first.clone(), second, group))))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::host::sysfs::tests::FakeBus;

    #[test]
    fn one_group_is_for_one_vm_and_both_tables_are_named() {
        let bus = FakeBus::new();
        let nic = bus.add("0000:05:00.0", Some(7), Some("vfio-pci"));
        let card = bus.add("0000:05:00.1", Some(7), Some("vfio-pci"));
        let other = bus.add("0000:06:00.0", Some(8), Some("vfio-pci"));
        let refused = |first: Use, second: Use| {
            let mut groups = Groups::default();
            groups.claim(&nic, first).unwrap();
            groups.claim(&other, Use::Device("nic1".into())).unwrap();
            groups.claim(&card, second).err().map(|error| error.to_string())
        };
        let (device, spare) = (|name: &str| Use::Device(name.into()), |name: &str| Use::Spare(name.into()));
        let guest = |name: &str| Use::Passthrough(name.into());
        let said = refused(device("nic0"), device("snd0")).unwrap();
        assert!(
            said.starts_with(
                "the device 0000:05:00.0 of [driver.nic0] and the device 0000:05:00.1 of [driver.snd0] are both in IOMMU group 7"
            ) && said.contains("another slot") && said.contains("`umbra doctor`"),
            "{said}"
        );
        let said = refused(device("nic0"), spare("nic0")).unwrap();
        assert!(said.contains("and the spare 0000:05:00.1 of [driver.nic0] are both"), "{said}");
        let said = refused(guest("web"), device("nic0")).unwrap();
        assert!(said.starts_with("0000:05:00.0, passed through to [guest.web], and the device"), "{said}");
        assert!(refused(guest("web"), guest("db")).is_some());
        assert_eq!(refused(guest("web"), guest("web")), None, "a guest may have a whole group");
    }
}
