//! Binding a PCI function to `vfio-pci` and giving it back, by `driver_override`: the one function changes
//! hands, no other of the same ID.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::error::Error;
use super::sysfs::HostDevice;
use crate::pci::address::Bdf;

/// The driver that a passed-through function is bound to.
pub const VFIO_PCI: &str = "vfio-pci";

/// The shell commands that bind `bdf` to `vfio-pci`, for messages.
pub(super) fn commands(bdf: Bdf, driver: Option<&str>) -> String {
    let mut text = format!("  modprobe vfio-pci\n  echo vfio-pci > /sys/bus/pci/devices/{bdf}/driver_override\n");
    if let Some(driver) = driver {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  echo {bdf} > /sys/bus/pci/drivers/{driver}/unbind");
    }
    let _ = write!(text, "  echo {bdf} > /sys/bus/pci/drivers_probe");
    text
}

impl HostDevice {
    /// Binds the function to `vfio-pci`, taking it from its driver. Returns the driver it had. Does nothing to
    /// one that is bound already.
    pub fn bind_to_vfio(&self) -> Result<Option<String>, Error> {
        let before = self.driver();
        if self.is_bound_to_vfio() {
            return Ok(before);
        }
        if self.group().is_none() {
            return Err(Error::NoIommu(self.bdf()));
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_are_complete() {
        let bdf = "0000:01:00.0".parse().unwrap();
        let lines = commands(bdf, Some("igb"));
        assert_eq!(lines.lines().count(), 4);
        assert!(lines.contains("echo 0000:01:00.0 > /sys/bus/pci/drivers/igb/unbind"));
        assert!(!commands(bdf, None).contains("unbind"));
    }
}
