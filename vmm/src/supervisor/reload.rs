//! `umbra reload` and SIGHUP: the machine file is read again, and what can change as the machine runs is taken over.
//!
//! Reading and the checks of the host are done in a thread: files may be on a file system that hangs. Invariants: a file with a mistake,
//! and one that asks for something that this host does not have, changes nothing; what is taken over is taken over all at once.

use std::path::PathBuf;
use std::thread;

use super::aside::Aside;
use super::front::protocol::Response;
use super::prepare::Until;
use super::run::Supervisor;
use super::start::leftover;
use super::start::preflight::{Checked, Host};
use crate::base::error::chain;
use crate::base::time::Time;
use crate::config::changes::{Change, Plan, plan};
use crate::config::metrics_address::Address;
use crate::config::{Driver, Machine};
use crate::lifecycle::Input;
use crate::record::events::Event;
use crate::record::metrics::{Metrics, Server};

/// Where a machine is read from again.
#[derive(Clone, Debug)]
pub struct MachineFile {
    /// The file.
    pub path: PathBuf,
    /// Where metrics are served whatever the file says.
    pub metrics: Option<Address>,
}

/// A reload under way.
#[derive(Debug)]
pub(super) struct Reload {
    /// The file is being read and checked.
    pub(super) reading: Aside<Result<(Plan, Checked), String>>,
    /// Who waits for it.
    client: Option<u64>,
    /// Nothing is taken over.
    check: bool,
}

/// Reads the file of the machine that runs as `now`, and checks what it asks for.
fn read(file: &MachineFile, now: &Machine, host: &Host) -> Result<(Plan, Checked), String> {
    let mut machine = Machine::read(&file.path).map_err(|error| chain(&error))?;
    machine.metrics = file.metrics.clone().or(machine.metrics);
    let plan = plan(now, &machine).map_err(|problem| {
        format!("{}: beside what can only change when the machine is started again, {problem}", file.path.display())
    })?;
    let checked = Checked::new(&plan.machine, host).map_err(|error| chain(&error))?;
    Ok((plan, checked))
}

/// Whether lives that wait were begun in a way in which they would not be now.
fn outdates_what_waits(before: &Driver, now: &Driver) -> bool {
    let begun = |driver: &Driver| {
        let Driver { cpus, cpu_max, cmdline, standby, standbys, snapshots, restart, .. } = driver.clone();
        (cpus, cpu_max, cmdline, standby, standbys, snapshots, restart.interrupts_per_s)
    };
    begun(before) != begun(now)
}

impl Supervisor {
    /// Begins to read the machine file again, for `client` if one waits; with `check`, only to say what differs.
    pub(super) fn reload(&mut self, client: Option<u64>, check: bool) -> Result<(), String> {
        let Some(file) = self.file.clone() else {
            return Err("this machine was started from flags: it has no file that could be read again".into());
        };
        if self.until == Until::Prepared {
            return Err("this run only makes snapshots (`umbra run --prepare`), and ends by itself".into());
        }
        self.goes_on()?;
        if self.reloading.is_some() {
            return Err("the machine file is being read again already; try again".into());
        }
        let (now, host) = (self.present_machine(), self.host.clone());
        let begun = Aside::begin("reload", move || read(&file, &now, &host));
        let reading = begun.map_err(|error| format!("the machine file cannot be read again: {error}"))?;
        self.reloading = Some(Reload { reading, client, check });
        Ok(())
    }

    /// The machine, with the images that are in force after restarts.
    fn present_machine(&self) -> Machine {
        let mut machine = self.machine.clone();
        for driver in self.drivers.iter() {
            if let (Some(spec), Some(image)) = (machine.driver.get_mut(&driver.name), driver.image.vmlinux.parent()) {
                spec.image = image.into();
            }
        }
        machine
    }

    /// The file has been read and checked.
    pub(super) fn on_reloaded(&mut self) {
        let Some(Reload { reading, client, check }) = self.reloading.take() else { return };
        let read = match reading.end() {
            Ok(read) => read.unwrap_or_else(|| Err("the machine file could not be looked at".into())),
            Err(reading) => {
                self.reloading = Some(Reload { reading, client, check });
                return;
            }
        };
        let done = read.and_then(|(Plan { machine, changes }, checked)| {
            if !check {
                // It may have been told to end while the file was read.
                self.goes_on()?;
                self.go_on_as(machine, checked)?;
                let keys = |taken| {
                    changes
                        .iter()
                        .filter(|change| change.is_taken() == taken)
                        .map(|change| change.key.clone())
                        .collect()
                };
                self.events.tell(&Event::Reloaded { taken: keys(true), left: keys(false) });
            }
            Ok(changes)
        });
        self.answer_reload(client, check, done);
    }

    /// A reload that failed is an event, unless it was but to say what differs.
    pub(super) fn answer_reload(&mut self, client: Option<u64>, check: bool, done: Result<Vec<Change>, String>) {
        if let (Err(reason), false) = (&done, check) {
            self.events.tell(&Event::ReloadFailed { reason: reason.clone() });
        }
        if let Some(client) = client {
            let response = done.map_or_else(|what| Response::Error { what }, |changes| Response::Reloaded { changes });
            self.clients.answer(client, &response);
        }
    }

    /// Goes on as `machine`, of which this host has all that it needs.
    fn go_on_as(&mut self, machine: Machine, checked: Checked) -> Result<(), String> {
        // The one thing that can fail comes first.
        self.serve_metrics(machine.metrics.as_ref())?;
        self.program.confine = machine.confine;
        for guest in self.guests.iter_mut() {
            if let Some(spec) = machine.guest.get(&guest.name) {
                guest.spec = spec.clone();
                guest.crashes.set_policy(spec.restart.policy());
            }
        }
        for n in self.drivers.ids() {
            let driver = &mut self.drivers[n];
            let Some(spec) = machine.driver.get(&driver.name) else { continue };
            let before = std::mem::replace(&mut driver.spec, spec.clone());
            driver.adapt();
            if outdates_what_waits(&before, spec) {
                self.drive(n, Input::StandbyUseless);
            }
        }
        let (guests, drivers) = (self.guests.len(), self.drivers.len());
        let devices = checked.drivers.values().map(|(device, _)| device).chain(checked.spares.values());
        if let Err(error) = self.run_dir.note_resets(&leftover::reset_orders(devices)) {
            self.events.warn(format!("the run directory cannot be written: {error}"));
        }
        self.add(&machine, checked);
        self.machine = machine;
        for n in self.guests.ids().skip(guests) {
            if self.guests[n].knows_its_devices() {
                self.start_guest_process(n);
            }
        }
        for n in self.drivers.ids().skip(drivers) {
            if self.sleep.is_some() {
                self.drive(n, Input::Sleep);
            }
            self.drive(n, Input::Start);
        }
        Ok(())
    }

    /// Serves metrics at `address` from now on, or no more.
    fn serve_metrics(&mut self, address: Option<&Address>) -> Result<(), String> {
        if address == self.machine.metrics.as_ref() {
            return Ok(());
        }
        let metrics =
            address.map(|_| self.events.metrics().cloned().unwrap_or_else(|| Metrics::new(self.run_dir.name())));
        let served = address.zip(metrics.clone()).map(|(address, metrics)| Server::start(address, metrics)).transpose();
        let before = std::mem::replace(&mut self.served, served.map_err(|error| chain(&error))?);
        // Its thread may be at a slow client for a second.
        if let Some(before) = before {
            let _ = thread::Builder::new().name("metrics-end".into()).spawn(move || drop(before));
        }
        self.events.set_metrics(metrics);
        self.metrics_due = Time::now();
        Ok(())
    }
}
