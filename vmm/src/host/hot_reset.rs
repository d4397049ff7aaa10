//! Resetting a slot as a whole (`VFIO_DEVICE_PCI_HOT_RESET`), for a function with others beside it: the kernel does
//! no `bus` there.
//!
//! The invariant: all functions that it reaches are in the IOMMU group of this one. Its files are open here, so nobody else has any
//! of them; those that a VM has not are reset as well. Before the device is open sysfs shows them ([`HostDevice::siblings`]), then
//! VFIO ([`DeviceFiles::check_hot_reset`]), and the kernel looks again when it is done.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_TYPE};
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_ptr};

use super::files::{DeviceFiles, done};
use super::sysfs::HostDevice;
use crate::base::pci_address::Bdf;

/// `_IO(VFIO_TYPE, VFIO_BASE + n)`.
const VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: libc::c_ulong = nix::request_code_none!(VFIO_TYPE, VFIO_BASE + 12);
const VFIO_DEVICE_PCI_HOT_RESET: libc::c_ulong = nix::request_code_none!(VFIO_TYPE, VFIO_BASE + 13);

/// Words of `vfio_pci_hot_reset_info` and `vfio_pci_hot_reset` before their lists: argsz, flags, count.
const HEADER: usize = 3;
/// Words of a `vfio_pci_dependent_device`: group, address.
const ENTRY: usize = 2;
/// Functions of a bus. With more, behind bridges, there is no hot reset.
const MAX_FUNCTIONS: usize = 256;

/// What a reset of the whole slot would reach beside the function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Siblings {
    /// Nothing, or no bridge is there to do it.
    Nobody,
    /// Functions that are in hand with this one.
    InHand,
    /// A function that is not: which, and why.
    InTheWay(String),
}

impl HostDevice {
    /// What sysfs says of the functions behind the same bridge. The kernel wants all of them bound to `vfio-pci`.
    pub(crate) fn siblings(&self) -> Siblings {
        let mut functions = self.bridge().map(|bridge| functions_below(&bridge)).unwrap_or_default();
        functions.retain(|bdf| *bdf != self.bdf());
        functions.sort_unstable();
        match functions.iter().find_map(|bdf| self.not_in_hand(&self.other(*bdf))) {
            Some(why) => Siblings::InTheWay(why),
            None if functions.is_empty() => Siblings::Nobody,
            None => Siblings::InHand,
        }
    }

    /// The directory of the bridge above. A virtual function's bus has none, whatever its place in sysfs.
    fn bridge(&self) -> Option<PathBuf> {
        let path = fs::canonicalize(self.directory()).ok()?;
        let above = path.parent()?;
        let is_bridge = address(above).is_some() && !path.join("physfn").exists();
        is_bridge.then(|| above.to_owned())
    }

    fn not_in_hand(&self, other: &Self) -> Option<String> {
        let bdf = other.bdf();
        if self.group().is_none() || other.group() != self.group() {
            Some(format!("{bdf} is in another IOMMU group"))
        } else if other.is_bound_to_vfio() {
            None
        } else {
            Some(format!("{bdf} is not bound to vfio-pci"))
        }
    }
}

/// The address in a directory's name.
fn address(directory: &Path) -> Option<Bdf> {
    directory.file_name()?.to_str()?.parse().ok()
}

/// The functions behind a bridge, and behind the bridges among them.
fn functions_below(bridge: &Path) -> Vec<Bdf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(bridge).into_iter().flatten().flatten() {
        // Links lead elsewhere.
        if let Some(bdf) = address(&entry.path())
            && entry.file_type().is_ok_and(|kind| kind.is_dir())
        {
            found.push(bdf);
            found.extend(functions_below(&entry.path()));
        }
    }
    found
}

impl DeviceFiles {
    /// Whether the kernel can reset the slot, and reaches nothing outside of `group` with it.
    pub(crate) fn check_hot_reset(&self, group: u32) -> io::Result<()> {
        let mut answer = vec![0_u32; HEADER + ENTRY * MAX_FUNCTIONS];
        answer[0] = bytes(&answer);
        // SAFETY: the buffer is aligned as the structure is and as long as its first field says.
        done(unsafe { ioctl_with_mut_ptr(self.device(), VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, answer.as_mut_ptr()) })?;
        let affected = affected(&answer).ok_or_else(|| io::Error::other("VFIO does not say whom it reaches"))?;
        match affected.iter().find(|(_, its)| *its != group) {
            Some((bdf, its)) => Err(io::Error::other(format!("{bdf} is in IOMMU group {its}"))),
            None => Ok(()),
        }
    }

    /// Resets all functions of the slot.
    pub(crate) fn hot_reset(&self) -> io::Result<()> {
        let mut request = [0, 0, 1, self.group().as_raw_fd().cast_unsigned()];
        request[0] = bytes(&request);
        // SAFETY: the request is a `vfio_pci_hot_reset` with one descriptor, of as many bytes as its first field says;
        // the kernel only reads it.
        done(unsafe { ioctl_with_ptr(self.device(), VFIO_DEVICE_PCI_HOT_RESET, request.as_ptr()) })
    }
}

fn bytes(words: &[u32]) -> u32 {
    u32::try_from(size_of_val(words)).unwrap_or(u32::MAX)
}

/// The functions, each with its group, out of a `vfio_pci_hot_reset_info`, which has 16 bits for a domain. With flags it lists something
/// else.
fn affected(answer: &[u32]) -> Option<Vec<(Bdf, u32)>> {
    let (header, entries) = answer.split_at_checked(HEADER)?;
    let count = usize::try_from(header[2]).ok().filter(|count| *count > 0 && header[1] == 0)?;
    let entries = entries.get(..count.checked_mul(ENTRY)?)?;
    let function = |entry: &[u32]| {
        let [low, high, bus, devfn] = entry[1].to_ne_bytes();
        let bdf = Bdf::new(u16::from_ne_bytes([low, high]).into(), bus, devfn >> 3, devfn & 7)?;
        Some((bdf, entry[0]))
    };
    entries.chunks_exact(ENTRY).map(function).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::super::sysfs::tests::FakeBus;
    use super::*;

    #[test]
    fn a_function_of_a_slot_that_is_all_in_hand_has_siblings() {
        let bus = FakeBus::new();
        let nic = bus.add_behind("0000:00:1c.0", "0000:01:00.0", Some(7), None);
        assert_eq!(nic.siblings(), Siblings::Nobody);
        bus.add_behind("0000:00:1c.0", "0000:01:00.1", Some(7), Some("vfio-pci"));
        assert_eq!(nic.siblings(), Siblings::InHand, "its own driver is another question");
        fs::create_dir(nic.directory().join("physfn")).unwrap();
        assert_eq!(nic.siblings(), Siblings::Nobody, "a virtual function");
    }

    #[test]
    fn the_function_in_the_way_is_named() {
        let bus = FakeBus::new();
        let nic = bus.add_behind("0000:00:1c.0", "0000:01:00.0", Some(7), Some("vfio-pci"));
        bus.add_behind("0000:00:1c.0", "0000:01:00.2", Some(8), Some("vfio-pci"));
        let in_the_way = |text: &str| Siblings::InTheWay(text.into());
        assert_eq!(nic.siblings(), in_the_way("0000:01:00.2 is in another IOMMU group"));
        bus.add_behind("0000:00:1c.0", "0000:01:00.1", Some(7), None);
        assert_eq!(nic.siblings(), in_the_way("0000:01:00.1 is not bound to vfio-pci"));
    }

    #[test]
    fn what_is_behind_a_bridge_of_the_slot_counts() {
        let bus = FakeBus::new();
        let nic = bus.add_behind("0000:00:1c.0", "0000:01:00.0", Some(7), Some("vfio-pci"));
        bus.add_behind("0000:00:1c.0", "0000:01:00.1", Some(7), Some("vfio-pci"));
        bus.add_behind("0000:00:1c.0/0000:01:00.1", "0000:02:00.0", Some(9), Some("vfio-pci"));
        assert_eq!(nic.siblings(), Siblings::InTheWay("0000:02:00.0 is in another IOMMU group".into()));
    }

    #[test]
    fn functions_of_the_root_bus_have_no_bridge() {
        let bus = FakeBus::new();
        let nic = bus.add_behind("pci0000:00", "0000:00:08.0", Some(7), Some("vfio-pci"));
        bus.add_behind("pci0000:00", "0000:00:08.1", Some(7), Some("vfio-pci"));
        assert_eq!(nic.siblings(), Siblings::Nobody);
    }

    #[test]
    fn vfio_lists_functions_with_their_groups() {
        let place = |bus, devfn| u32::from_ne_bytes([0, 0, bus, devfn]);
        let list = affected(&[0, 0, 2, 7, place(1, 0), 8, place(1, 0x0A), 9, 9]).unwrap();
        assert_eq!(list, [("0000:01:00.0".parse().unwrap(), 7), ("0000:01:01.2".parse().unwrap(), 8)]);
        assert_eq!(affected(&[0, 1, 1, 7, 0]), None, "device numbers in the place of groups");
        assert_eq!(affected(&[0, 0, 0]), None, "not even itself");
        assert_eq!(affected(&[0, 0, 2, 7, 0]), None, "cut off");
        assert_eq!(affected(&[0]), None);
    }

    #[test]
    fn files_that_know_no_such_request_have_no_hot_reset() {
        let null = || File::open("/dev/null").unwrap().into();
        let files = DeviceFiles::received("0000:01:00.0".parse().unwrap(), vec![null(), null(), null()]).unwrap();
        assert_eq!(files.check_hot_reset(7).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert_eq!(files.hot_reset().unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
