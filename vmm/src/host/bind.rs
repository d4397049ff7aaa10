//! Binding a PCI function to `vfio-pci` and giving it back, by `driver_override`: the one function changes
//! hands, no other of the same ID.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::error::Error;
use super::sysfs::HostDevice;

/// The driver that a passed-through function is bound to.
pub const VFIO_PCI: &str = "vfio-pci";

impl HostDevice {
    /// Binds the function to `vfio-pci`, taking it from its driver. Returns the driver it had. Does nothing to
    /// one that is bound already.
    pub fn bind_to_vfio(&self) -> Result<Option<String>, Error> {
        let before = self.driver();
        if self.is_bound_to_vfio() {
            return Ok(before);
        }
        self.required_group()?;
        self.load_vfio_pci()?;
        self.offer(VFIO_PCI)?;
        if !self.is_bound_to_vfio() {
            let actual = self.driver();
            // As it was before: the host's own driver takes it back.
            self.unbind_from_vfio()?;
            return Err(Error::NotTaken { bdf: self.bdf(), wanted: VFIO_PCI, actual });
        }
        Ok(before)
    }

    /// Gives the function back to the driver that the host would choose. Returns that driver, if there is one.
    pub fn unbind_from_vfio(&self) -> Result<Option<String>, Error> {
        // An empty line clears the override.
        self.offer("")?;
        Ok(self.driver())
    }

    fn offer(&self, driver: &str) -> Result<(), Error> {
        write(&self.directory().join("driver_override"), &format!("{driver}\n"))?;
        if self.driver().is_some() {
            write(&self.directory().join("driver/unbind"), &self.bdf().to_string())?;
        }
        write(&self.bus().join("drivers_probe"), &self.bdf().to_string())
    }

    fn load_vfio_pci(&self) -> Result<(), Error> {
        let driver = self.bus().join("drivers").join(VFIO_PCI);
        if driver.exists() {
            return Ok(());
        }
        let mut modprobe = Command::new("modprobe");
        modprobe.arg(VFIO_PCI).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        match modprobe.status() {
            Ok(status) if status.success() && driver.exists() => Ok(()),
            _ => Err(Error::NoVfioDriver),
        }
    }
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(|source| Error::Sysfs { operation: "write to", path: path.into(), source })
}
