//! What the host's kernel says about a PCI function (`/sys/bus/pci/devices/BDF`), and whether it can be
//! passed through. Nothing here changes anything; [`super::bind`] and [`super::reset`] do.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::error::Error;
use super::reset::Reset;
use crate::base::pci_address::Bdf;

/// Where sysfs keeps PCI functions and drivers.
const PCI_BUS: &str = "/sys/bus/pci";
/// Drivers that do no DMA of their own, so that a group with them stays viable (`driver_managed_dma`).
const HARMLESS_DRIVERS: [&str; 2] = ["pcieport", "pci-stub"];

/// A PCI function of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDevice {
    bdf: Bdf,
    bus: PathBuf,
}

impl HostDevice {
    /// Finds the function.
    pub fn find(bdf: Bdf) -> Result<Self, Error> {
        Self::find_below(Path::new(PCI_BUS), bdf)
    }

    /// As [`Self::find`], with another directory in the place of `/sys/bus/pci`.
    pub fn find_below(bus: &Path, bdf: Bdf) -> Result<Self, Error> {
        let this = Self { bdf, bus: bus.into() };
        if this.directory().exists() { Ok(this) } else { Err(Error::NoSuchDevice(bdf)) }
    }

    /// The address.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// `/sys/bus/pci/devices/BDF`.
    pub fn directory(&self) -> PathBuf {
        self.bus.join("devices").join(self.bdf.to_string())
    }

    /// `/sys/bus/pci`.
    pub(crate) fn bus(&self) -> &Path {
        &self.bus
    }

    /// Another function of the same host, whether it is there or not.
    pub(crate) fn other(&self, bdf: Bdf) -> Self {
        Self { bdf, bus: self.bus.clone() }
    }

    /// The driver that holds it.
    pub fn driver(&self) -> Option<String> {
        link_name(&self.directory().join("driver"))
    }

    /// True if a VFIO driver holds it (`vfio-pci` or a variant for one vendor, as `mlx5_vfio_pci`).
    pub fn is_bound_to_vfio(&self) -> bool {
        self.driver().is_some_and(|d| is_vfio(&d))
    }

    /// PCI vendor ID.
    pub fn vendor(&self) -> Result<u16, Error> {
        self.hex("vendor").map(low_half)
    }

    /// PCI device ID.
    pub fn device(&self) -> Result<u16, Error> {
        self.hex("device").map(low_half)
    }

    /// Class, subclass and programming interface (24 bits).
    pub fn class(&self) -> Result<u32, Error> {
        self.hex("class")
    }

    /// The alias that names the function's driver, as `pci:v00008086d000010D3sv...`.
    pub fn modalias(&self) -> Result<String, Error> {
        self.text("modalias")
    }

    /// IOMMU group, if there is an IOMMU.
    pub fn group(&self) -> Option<u32> {
        link_name(&self.directory().join("iommu_group"))?.parse().ok()
    }

    /// IOMMU group; the error tells a host without an IOMMU from a function that is gone.
    pub fn required_group(&self) -> Result<u32, Error> {
        let missing =
            || if self.directory().exists() { Error::NoIommu(self.bdf) } else { Error::NoSuchDevice(self.bdf) };
        self.group().ok_or_else(missing)
    }

    /// All functions of the IOMMU group, this one included, in order.
    pub fn group_members(&self) -> Result<Vec<Bdf>, Error> {
        let path = self.directory().join("iommu_group/devices");
        let entries =
            fs::read_dir(&path).map_err(|source| Error::Sysfs { operation: "list", path: path.clone(), source })?;
        let mut members: Vec<Bdf> = entries.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        members.sort_unstable();
        Ok(members)
    }

    /// How it can be reset.
    pub fn reset(&self) -> Reset {
        let methods = fs::read_to_string(self.directory().join("reset_method")).ok();
        Reset::new(methods.as_deref(), self.directory().join("reset").exists(), self.siblings())
    }

    /// Whether it can be passed through now; the error says what to do.
    pub fn check_ready(&self) -> Result<(), Error> {
        let group = self.required_group()?;
        match self.driver() {
            None => return Err(Error::NoDriver { bdf: self.bdf }),
            Some(driver) if !is_vfio(&driver) => return Err(Error::WrongDriver { bdf: self.bdf, driver }),
            Some(_) => {}
        }
        let others = self.group_obstacles()?;
        if others.is_empty() { Ok(()) } else { Err(Error::GroupNotViable { bdf: self.bdf, group, others }) }
    }

    /// Other functions of the group that host drivers use.
    pub fn group_obstacles(&self) -> Result<Vec<(Bdf, String)>, Error> {
        let others = self.group_members()?.into_iter().filter(|&bdf| bdf != self.bdf);
        Ok(others
            .filter_map(|bdf| Some((bdf, self.other(bdf).driver()?)))
            .filter(|(_, driver)| !is_vfio(driver) && !HARMLESS_DRIVERS.contains(&driver.as_str()))
            .collect())
    }

    fn text(&self, name: &str) -> Result<String, Error> {
        let path = self.directory().join(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.trim().into()),
            Err(e) if e.kind() == ErrorKind::NotFound && !self.directory().exists() => {
                Err(Error::NoSuchDevice(self.bdf))
            }
            Err(source) => Err(Error::Sysfs { operation: "read", path, source }),
        }
    }

    fn hex(&self, name: &str) -> Result<u32, Error> {
        let text = self.text(name)?;
        let digits = text.strip_prefix("0x").unwrap_or(&text);
        u32::from_str_radix(digits, 16).map_err(|_| Error::SysfsContent {
            path: self.directory().join(name),
            text: text.clone(),
            expected: "a hexadecimal number",
        })
    }
}

fn is_vfio(driver: &str) -> bool {
    driver.contains("vfio")
}

fn link_name(link: &Path) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_str()?.to_owned())
}

fn low_half(value: u32) -> u16 {
    u16::try_from(value & 0xFFFF).unwrap_or(u16::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A made-up `/sys/bus/pci`.
    pub(crate) struct FakeBus(pub(crate) tempfile::TempDir);

    impl FakeBus {
        pub(crate) fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("devices")).unwrap();
            Self(dir)
        }

        pub(crate) fn add(&self, bdf: &str, group: Option<u32>, driver: Option<&str>) -> HostDevice {
            let device = self.0.path().join("devices").join(bdf);
            fs::create_dir_all(&device).unwrap();
            fs::write(device.join("vendor"), "0x8086\n").unwrap();
            fs::write(device.join("device"), "0x10d3\n").unwrap();
            fs::write(device.join("class"), "0x020000\n").unwrap();
            if let Some(group) = group {
                let members = self.0.path().join("groups").join(group.to_string()).join("devices");
                fs::create_dir_all(members.join(bdf)).unwrap();
                symlink(members.parent().unwrap(), device.join("iommu_group")).unwrap();
            }
            if let Some(driver) = driver {
                let path = self.0.path().join("drivers").join(driver);
                fs::create_dir_all(&path).unwrap();
                symlink(path, device.join("driver")).unwrap();
            }
            HostDevice::find_below(self.0.path(), bdf.parse().unwrap()).unwrap()
        }

        /// As [`Self::add`], with the function's directory in that of a bridge (or root bus), as in sysfs.
        pub(crate) fn add_behind(
            &self,
            bridge: &str,
            bdf: &str,
            group: Option<u32>,
            driver: Option<&str>,
        ) -> HostDevice {
            let directory = self.0.path().join("tree").join(bridge).join(bdf);
            fs::create_dir_all(&directory).unwrap();
            symlink(directory, self.0.path().join("devices").join(bdf)).unwrap();
            self.add(bdf, group, driver)
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let bus = FakeBus::new();
        let error = HostDevice::find_below(bus.0.path(), "0000:09:00.0".parse().unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "no PCI device 0000:09:00.0 in this host; `lspci -D` lists them");
    }

    #[test]
    fn ids_come_from_sysfs() {
        let bus = FakeBus::new();
        let nic = bus.add("0000:01:00.0", Some(3), Some("e1000e"));
        assert_eq!((nic.vendor().unwrap(), nic.device().unwrap(), nic.class().unwrap()), (0x8086, 0x10D3, 0x02_0000));
    }

    #[test]
    fn readiness_names_the_obstacle() {
        let bus = FakeBus::new();
        let message = |d: &HostDevice| d.check_ready().unwrap_err().to_string();
        assert!(message(&bus.add("0000:01:00.0", None, Some("vfio-pci"))).contains("intel_iommu=on"));
        let wrong = message(&bus.add("0000:02:00.0", Some(1), Some("e1000e")));
        assert!(wrong.contains("bound to e1000e, not vfio-pci"), "{wrong}");
        assert!(wrong.contains("`umbra bind 0000:02:00.0`"), "{wrong}");
        assert!(message(&bus.add("0000:03:00.0", Some(2), None)).contains("bound to no driver"));
        let ready = bus.add("0000:04:00.0", Some(4), Some("vfio-pci"));
        ready.check_ready().unwrap();
        // Pulled out, or taken off the bus by the host.
        fs::remove_dir_all(ready.directory()).unwrap();
        assert!(message(&ready).contains("no PCI device 0000:04:00.0"));
    }

    #[test]
    fn a_shared_group_names_the_functions_in_the_way() {
        let bus = FakeBus::new();
        let nic = bus.add("0000:05:00.0", Some(7), Some("vfio-pci"));
        bus.add("0000:00:1c.0", Some(7), Some("pcieport"));
        bus.add("0000:05:00.2", Some(7), None);
        nic.check_ready().unwrap();
        bus.add("0000:05:00.1", Some(7), Some("snd_hda_intel"));
        let error = nic.check_ready().unwrap_err().to_string();
        assert!(error.contains("shares IOMMU group 7 with 0000:05:00.1 (snd_hda_intel):"), "{error}");
    }
}
