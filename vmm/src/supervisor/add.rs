//! Puts the guests and driver VMs of a machine into the supervisor's tables: all of them before it runs, and those that its file has
//! more when it is read again (`reload`).

use super::class;
use super::driver::{DriverVm, EndRef};
use super::guest::GuestVm;
use super::ids::DriverId;
use super::run::Supervisor;
use super::start::preflight::Checked;
use super::start::rundir;
use crate::config::Machine;

impl Supervisor {
    /// Adds what `machine` has and the tables have not. A driver VM that is added serves none but guests that are added.
    pub(super) fn add(&mut self, machine: &Machine, mut checked: Checked) {
        for (name, spec) in &machine.guest {
            if self.guests.position(|guest| guest.name == *name).is_none() {
                let console_socket = rundir::console_socket(self.run_dir.path(), name);
                let devices = class::devices(machine, name, spec);
                self.guests.push(GuestVm::new(name, spec.clone(), devices, console_socket));
            }
        }
        for (name, spec) in &machine.driver {
            if self.drivers.position(|driver| driver.name == *name).is_some() {
                continue;
            }
            let guest = |name: &str| self.guests.position(|guest| guest.name == name);
            let ends =
                class::ends(machine, name).filter_map(|(name, device)| Some(EndRef { guest: guest(name)?, device }));
            let mtu = machine.ends_of(name).next().and_then(|(_, _, spec)| spec.mtu);
            let ends = (ends.collect(), mtu);
            let Some((device, image)) = checked.drivers.remove(name) else { continue };
            let devices = (device, checked.spares.remove(name), self.host.open, image);
            let driver = DriverVm::new((name, spec.clone()), devices, ends, &self.run_dir);
            let n = self.drivers.push(driver);
            self.tell_ends(n);
        }
    }

    /// The guests' devices learn that driver VM `n` serves them.
    fn tell_ends(&mut self, n: DriverId) {
        for (end, &EndRef { guest, device }) in self.drivers[n].ends.numbered() {
            if let Some(device) = self.guests[guest].devices.get_mut(&device) {
                device.driver = Some((n, end));
            }
        }
    }
}
