//! Functions that a driver VM cannot serve yet, by what they are: better said before anything starts than found out by a driver VM
//! that comes up and serves nothing. A guest can have them whole (`passthrough`), except where their DMA escapes the IOMMU.

use std::fs;

use super::sysfs::HostDevice;

/// Why no driver VM can serve a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unserved {
    /// Its driver has to join a network first.
    WiFi,
    /// What is wanted is behind it. Disks are served all the same.
    Usb,
    /// Made of software by the host of this one, and no IOMMU confines it.
    VirtioPastIommu,
}

impl Unserved {
    /// The reason, as a clause behind the function's name.
    pub fn why(self) -> &'static str {
        match self {
            Self::WiFi => {
                "is a Wi-Fi card: a driver VM does not join wireless networks yet; take a wired NIC, or give the card to a guest \
                 (`passthrough`)"
            }
            Self::Usb => {
                "is a USB controller: a driver VM serves the disks behind it, and no NIC or headset yet; take a PCI card, or give the \
                 controller to a guest (`passthrough`)"
            }
            Self::VirtioPastIommu => {
                "is a virtio device whose DMA goes past the IOMMU, so that it cannot be confined to a VM: start this VM with \
                 `iommu_platform=on` for it (QEMU), or take an emulated card"
            }
        }
    }

    /// Whether it has disks that a driver VM serves.
    pub fn may_have_disks(self) -> bool {
        self == Self::Usb
    }

    /// Whether a guest can have it whole.
    pub fn may_be_passed_through(self) -> bool {
        self != Self::VirtioPastIommu
    }
}

impl HostDevice {
    /// Why no driver VM can serve it; `disks`: as one of disks.
    pub fn unserved_as(&self, disks: bool) -> Option<Unserved> {
        self.unserved().filter(|why| !(disks && why.may_have_disks()))
    }

    /// Why no driver VM can serve it whatever it is for, if that is so.
    pub fn unserved(&self) -> Option<Unserved> {
        /// Subclass of Wi-Fi cards: "other network controller".
        const OTHER_NETWORK: u32 = 0x02_80;
        const USB: u32 = 0x0C_03;
        match self.class().unwrap_or_default() >> 8 {
            OTHER_NETWORK => Some(Unserved::WiFi),
            USB => Some(Unserved::Usb),
            _ if self.directory().join("ieee80211").exists() => Some(Unserved::WiFi),
            _ if self.escapes_iommu() => Some(Unserved::VirtioPastIommu),
            _ => None,
        }
    }

    /// Whether it is a virtio device that says that its addresses are not translated. Known only while the host's driver has it.
    fn escapes_iommu(&self) -> bool {
        /// `VIRTIO_F_ACCESS_PLATFORM` (virtio 1.2, section 6).
        const ACCESS_PLATFORM: usize = 33;
        let entries = fs::read_dir(self.directory()).into_iter().flatten().flatten();
        let mut features = entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))
            .filter_map(|entry| fs::read_to_string(entry.path().join("features")).ok());
        features.any(|bits| bits.as_bytes().get(ACCESS_PLATFORM) == Some(&b'0'))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::host::sysfs::tests::FakeBus;

    #[test]
    fn what_no_driver_vm_can_serve_is_known_by_its_class_or_its_features() {
        let bus = FakeBus::new();
        let of_class = |bdf: &str, class: &str| {
            let device = bus.add(bdf, Some(1), None);
            fs::write(device.directory().join("class"), class).unwrap();
            device
        };
        assert_eq!(of_class("0000:01:00.0", "0x020000").unserved(), None);
        assert_eq!(of_class("0000:02:00.0", "0x028000").unserved(), Some(Unserved::WiFi));
        let usb = of_class("0000:03:00.0", "0x0c0330");
        assert_eq!((usb.unserved(), usb.unserved_as(false)), (Some(Unserved::Usb), Some(Unserved::Usb)));
        assert_eq!(usb.unserved_as(true), None, "its disks are served");
        // Some call themselves Ethernet.
        let wireless = of_class("0000:04:00.0", "0x020000");
        fs::create_dir(wireless.directory().join("ieee80211")).unwrap();
        assert_eq!((wireless.unserved(), wireless.unserved_as(true)), (Some(Unserved::WiFi), Some(Unserved::WiFi)));
    }

    #[test]
    fn a_virtio_device_is_refused_where_its_dma_escapes() {
        let bus = FakeBus::new();
        let nic = bus.add("0000:01:00.0", Some(1), Some("virtio-pci"));
        assert_eq!(nic.unserved(), None);
        fs::create_dir(nic.directory().join("virtio0")).unwrap();
        let features = |platform: char| format!("{}{platform}{}\n", "1".repeat(33), "0".repeat(30));
        for (platform, unserved) in [('0', Some(Unserved::VirtioPastIommu)), ('1', None)] {
            fs::write(nic.directory().join("virtio0/features"), features(platform)).unwrap();
            assert_eq!(nic.unserved(), unserved);
        }
    }
}
