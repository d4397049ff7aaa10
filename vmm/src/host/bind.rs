//! Binding PCI functions to `vfio-pci` and giving them back, by `driver_override`: the named functions change
//! hands, no other of the same ID.
//!
//! Invariant: all functions that are named are bound, or each is as it was before: everything that can be checked is checked
//! before the first change, and what fails later undoes what was done.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::Error;
use super::files::VFIO;
use super::sysfs::HostDevice;

/// The driver that a passed-through function is bound to.
pub const VFIO_PCI: &str = "vfio-pci";

/// A write to a file of sysfs.
type Write<'a> = &'a dyn Fn(&Path, &str) -> Result<(), Error>;

/// Binds `devices` to `vfio-pci`, taking them from their drivers. Returns the drivers they had. Does nothing to those that
/// are bound already.
///
/// # Errors
///
/// One of them cannot be bound, or could not be passed through then: nothing has changed.
pub fn bind_together(devices: &[HostDevice]) -> Result<Vec<Option<String>>, Error> {
    bind_by(devices, &write)
}

fn bind_by(devices: &[HostDevice], write: Write<'_>) -> Result<Vec<Option<String>>, Error> {
    devices.iter().try_for_each(|device| check_bindable(device, devices))?;
    let drivers = devices.iter().map(HostDevice::driver).collect();
    let unbound: Vec<_> = devices.iter().filter(|device| !device.is_bound_to_vfio()).collect();
    if let Some(first) = unbound.first() {
        first.load_vfio_pci()?;
    }
    let mut changed = Vec::new();
    let bound = unbound.iter().try_for_each(|device| {
        changed.push((*device, Before::of(device)));
        device.take(write)
    });
    if let Err(error) = bound.and_then(|()| devices.iter().try_for_each(HostDevice::check_ready)) {
        for (device, before) in changed.into_iter().rev() {
            if let Err(error) = before.restore(device, write) {
                tracing::warn!("{} is not as it was before: {error}", device.bdf());
            }
        }
        return Err(error);
    }
    Ok(drivers)
}

/// Whether `device` could be passed through once all of `devices` are bound.
fn check_bindable(device: &HostDevice, devices: &[HostDevice]) -> Result<(), Error> {
    let group = device.required_group()?;
    let mut others = device.group_obstacles()?;
    others.retain(|(bdf, _)| devices.iter().all(|device| device.bdf() != *bdf));
    if others.is_empty() { Ok(()) } else { Err(Error::GroupNotViable { bdf: device.bdf(), group, others }) }
}

/// What a function was before it changed hands.
struct Before {
    driver: Option<String>,
    /// The text of its `driver_override`: `(null)` where there is none.
    chosen: String,
}

impl Before {
    fn of(device: &HostDevice) -> Self {
        let chosen = fs::read_to_string(device.directory().join("driver_override")).unwrap_or_default();
        let chosen = if chosen.trim() == "(null)" { "" } else { chosen.trim() };
        Self { driver: device.driver(), chosen: chosen.into() }
    }

    fn restore(&self, device: &HostDevice, write: Write<'_>) -> Result<(), Error> {
        let bdf = device.bdf().to_string();
        device.choose(&self.chosen, write)?;
        if device.driver() == self.driver {
            return Ok(());
        }
        device.release(write)?;
        let Some(driver) = &self.driver else { return Ok(()) };
        write(&device.bus().join("drivers_probe"), &bdf)?;
        if device.driver().as_ref() != Some(driver) {
            // It was bound by hand, to a driver that the kernel would not choose.
            device.release(write)?;
            write(&device.bus().join("drivers").join(driver).join("bind"), &bdf)?;
        }
        Ok(())
    }
}

impl HostDevice {
    /// Gives a bound function, with its group, to the user of the number `owner`, who may not order its resets: they are ordered now. The
    /// file of the group that is the user's. It goes with the group, as soon as `vfio-pci` has none of its functions any more.
    ///
    /// # Errors
    ///
    /// Only root may do so; or the function has no group.
    pub fn give_to(&self, owner: u32) -> Result<PathBuf, Error> {
        self.order_resets()?;
        let path = Path::new(VFIO).join(self.required_group()?.to_string());
        let failed = |source| Error::Sysfs { operation: "change the owner of", path: path.clone(), source };
        std::os::unix::fs::chown(&path, Some(owner), None).map_err(failed)?;
        Ok(path)
    }

    /// Gives the function back to the driver that the host would choose. Returns that driver, if there is one. One that the host has is
    /// not taken from it: a live network, or the disks that the host runs from.
    ///
    /// # Errors
    ///
    /// It cannot be given back, or a VFIO driver takes it again.
    pub fn unbind_from_vfio(&self) -> Result<Option<String>, Error> {
        self.give_back(&write)
    }

    fn give_back(&self, write: Write<'_>) -> Result<Option<String>, Error> {
        let before = Before::of(self);
        if before.driver.is_none() || self.is_bound_to_vfio() {
            self.offer("", write)?;
        } else if before.chosen == VFIO_PCI {
            // A binding that was not finished, or whose turn came behind that of the host's driver.
            self.choose("", write)?;
        }
        match self.driver() {
            Some(driver) if self.is_bound_to_vfio() => Err(Error::TakenAgain { bdf: self.bdf(), driver }),
            driver => Ok(driver),
        }
    }

    fn take(&self, write: Write<'_>) -> Result<(), Error> {
        self.offer(VFIO_PCI, write)?;
        if self.is_bound_to_vfio() {
            return Ok(());
        }
        Err(Error::NotTaken { bdf: self.bdf(), wanted: VFIO_PCI, actual: self.driver() })
    }

    /// Has no other driver than `driver` probe the function; with an empty name, any that knows it.
    fn choose(&self, driver: &str, write: Write<'_>) -> Result<(), Error> {
        write(&self.directory().join("driver_override"), &format!("{driver}\n"))
    }

    fn offer(&self, driver: &str, write: Write<'_>) -> Result<(), Error> {
        self.choose(driver, write)?;
        self.release(write)?;
        write(&self.bus().join("drivers_probe"), &self.bdf().to_string())
    }

    /// Takes the function from its driver, if it has one.
    fn release(&self, write: Write<'_>) -> Result<(), Error> {
        if self.driver().is_none() {
            return Ok(());
        }
        write(&self.directory().join("driver/unbind"), &self.bdf().to_string())
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
#[path = "bind_tests.rs"]
mod tests;
