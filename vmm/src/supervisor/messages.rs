//! What guests' processes say, and what the supervisor makes of it.

use std::os::fd::OwnedFd;
use std::time::Instant;

use umbra_shadow::{DeviceId, Generation};
use umbra_splitter::untrusted::Elsewhere;

use super::bounds;
use super::driver::life::{AT_ITS_END, AT_ONCE};
use super::guest::GuestState;
use super::ids::{DriverId, GuestId};
use super::run::Supervisor;
use super::run_error::WhyFailed;
use crate::base::error::chain;
use crate::base::time::Time;
use crate::host::tap::Tap;
use crate::lifecycle::Endpoint;
use crate::record::events::Event;
use crate::wire::channel::{self, Incoming};
use crate::wire::messages::{FromVm, PaceSteps, ToVm};

impl Supervisor {
    /// Sends `message` to guest `n`.
    pub(super) fn tell_guest(&mut self, n: GuestId, message: &ToVm) {
        if let Err(error) = self.guests[n].tell(message, None) {
            self.events.warn(format!("{}: {error}", self.guests[n].name));
        }
    }

    pub(super) fn read_guest(&mut self, n: GuestId) {
        self.read_guest_for(n, AT_ONCE);
    }

    /// The process of guest `n` has ended: reads all that it had said.
    pub(super) fn read_guest_to_its_end(&mut self, n: GuestId) {
        self.read_guest_for(n, AT_ITS_END);
    }

    fn read_guest_for(&mut self, n: GuestId, most: usize) {
        let waited = !self.guests[n].unsent.is_empty();
        if let Err(error) = self.guests[n].send_on() {
            self.events.warn(format!("{}: {error}", self.guests[n].name));
        }
        if waited && self.guests[n].unsent.is_empty() {
            // It reads again: what it could not be connected with meanwhile.
            self.connect_guest(n);
        }
        for _ in 0..most {
            let Some(process) = self.guests[n].process.as_ref().filter(|_| self.guests[n].listening) else { return };
            match bounds::hear(process) {
                Ok(Incoming::Message(message, _)) => self.on_guest_message(n, message),
                Ok(Incoming::Empty) => return,
                Ok(Incoming::Closed) => {
                    self.guests[n].listening = false;
                    return;
                }
                Err(error) => return self.on_guest_fault(n, &error),
            }
        }
    }

    /// A guest's process that breaks a rule of its channel is not the program that was started any more: it is killed.
    fn on_guest_fault(&mut self, n: GuestId, error: &channel::Error) {
        self.warn_of_guest(n, &error.to_string());
        let guest = &mut self.guests[n];
        if error.is_fault() && guest.process.is_some() {
            guest.listening = false;
            guest.error = Some(format!("its process broke a rule of its control channel: {error}").into());
            guest.kill();
        }
    }

    /// Warns of something that guest `n`'s process has said or done, unless there were too many such warnings.
    pub(super) fn warn_of_guest(&mut self, n: GuestId, what: &str) {
        let guest = &mut self.guests[n];
        match guest.warnings.take(Instant::now()) {
            Some(0) => self.events.warn(format!("{}: {what}", guest.name)),
            Some(left_out) => {
                self.events.warn(format!("{}: {what} (and {left_out} warnings of it before, left out)", guest.name));
            }
            None => {}
        }
    }

    fn on_guest_message(&mut self, n: GuestId, message: FromVm) {
        match message {
            // Once: it is news the first time.
            FromVm::Running { .. } if self.guests[n].state != GuestState::Starting => {}
            FromVm::Running { .. } => {
                let guest = &mut self.guests[n];
                guest.state = GuestState::Running;
                guest.has_run = true;
                if let Some(process) = &mut guest.process {
                    process.runs();
                }
                // One that needs no driver VM is served as it runs.
                self.in_service |= guest.drivers().is_empty();
                self.events.tell(&Event::GuestRunning { guest: self.guests[n].name.clone() });
            }
            FromVm::Ended { how, .. } => self.on_guest_end(n, how),
            FromVm::Failed { what, configuration } => {
                self.guests[n].error = Some(WhyFailed { what, configuration });
            }
            FromVm::Panicked { .. } => self.on_guest_panic(n),
            FromVm::DeviceFailed { device, what, .. } => {
                self.warn_of_guest(n, &format!("passed-through device {device}: {what}"));
            }
            FromVm::Tap { interface, there, news } => {
                let link = if there { "up" } else { "down until there is an interface of that name" };
                self.warn_of_guest(n, &format!("TAP {interface} {news}; the guest's link is {link}"));
            }
            FromVm::Disk { device, news } => self.warn_of_guest(n, &format!("{device}: {news}")),
            FromVm::Resized { device, result } => self.on_resized(n, device, result),
            FromVm::Grown { device } => self.on_grown(n, device),
            FromVm::WantTap { interface } => self.look_for_tap(n, &interface),
            FromVm::Confined { thread, call } => self.guests[n].error = Some(bounds::confined(&thread, call).into()),
            FromVm::LinkUp { .. }
            | FromVm::Plugged { .. }
            | FromVm::Panicking { .. }
            | FromVm::Released { .. }
            | FromVm::Disconnected { .. }
            | FromVm::Snapshot { .. } => {}
            FromVm::AtRest { device, stable } => self.on_at_rest((n, device), stable),
            FromVm::Lost { device, link, at, cause } => self.on_lost((n, device), link, Time(at), &cause),
            FromVm::Live { device, generation, at, outage } => {
                self.on_device_live((n, device), generation, Time(at), outage);
            }
            FromVm::SameNetwork { device, generation } => {
                if let Some((driver, _)) = self.served(n, device) {
                    self.on_same_network(driver, generation);
                }
            }
            FromVm::Pace { device, generation, steps } => self.on_pace(n, device, generation, steps),
            FromVm::RxMode { device, mode } => self.on_rx_mode(n, device, mode),
            FromVm::ForeignAddress { device, mac } => {
                let what = format!(
                    "{device} uses {mac}, which is another's address on the NIC that it shares; frames with it are dropped \
                     (`allow_any_source` lets them pass)"
                );
                self.warn_of_guest(n, &what);
            }
            FromVm::Offloads { device, offloads } => self.on_offloads(n, device, offloads),
            FromVm::Vcpus(counts) => self.guests[n].vcpus.keep(counts),
            FromVm::Status { device, status } => self.guests[n].keep_status(device, status),
        }
    }

    /// Opens a TAP interface of guest `n` again, if there is one of that name: its process can open nothing by name.
    fn look_for_tap(&mut self, n: GuestId, interface: &str) {
        let Some(net) = self.guests[n].spec.net.iter().find(|net| net.tap.as_deref() == Some(interface)) else {
            return self.warn_of_guest(n, "its process asks for a TAP that it does not have");
        };
        let (tap, refused) = match Tap::find(interface, net.mtu_or_default()) {
            Ok(None) => return,
            Ok(Some(tap)) => (Some(Elsewhere::new(OwnedFd::from(tap.into_file()))), None),
            Err(error) => (None, Some(chain(&error))),
        };
        let answer = ToVm::Tap { interface: interface.into(), refused };
        if let Err(error) = self.guests[n].tell(&answer, tap) {
            self.warn_of_guest(n, &error.to_string());
        }
    }

    fn on_pace(&mut self, guest: GuestId, device: DeviceId, generation: Generation, steps: PaceSteps) {
        let Some((driver, _)) = self.served(guest, device) else { return };
        // Of a life that there was, and once: a guest's process could repeat it without end.
        let known = self.drivers[driver].present.is_some_and(|present| generation <= present);
        let news = self.guests[guest].devices.get_mut(&device).is_some_and(|device| device.has_pace_of(generation));
        if !known || !news {
            return;
        }
        self.events.tell(&Event::Pace {
            guest: self.guests[guest].name.clone(),
            device,
            driver: self.drivers[driver].name.clone(),
            generation: generation.get(),
            steps,
        });
    }

    /// The driver VM behind a guest's device, and as which of its ends.
    pub(super) fn served(&self, guest: GuestId, device: DeviceId) -> Option<(DriverId, Endpoint)> {
        self.guests[guest].driver_of(device)
    }
}
