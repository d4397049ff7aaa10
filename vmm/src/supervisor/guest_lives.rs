//! The lives of guests: they start, reboot, end, are stopped and started again, each by itself while the machine runs.
//!
//! Invariant: whatever happens to a guest costs its own ends of the driver VMs that serve it, and nothing else.

use std::time::Duration;

use super::class::traits;
use super::front::protocol::StopHow;
use super::guest::{AtEnd, GuestState};
use super::ids::GuestId;
use super::prepare::Until;
use super::run::Supervisor;
use super::run_error::WhyFailed;
use crate::base::held::Held;
use crate::base::time::Time;
use crate::base::unix_socket;
use crate::config::{OnCrash, OnReset};
use crate::lifecycle::policy::RestartVerdict;
use crate::lifecycle::{Input, State};
use crate::record::events::Event;
use crate::wire::messages::{ToVm, VmEnd};
use crate::wire::spawn::{VmProcess, describe_exit};

/// Crashes of a guest, in words.
const TRIPLE_FAULT: &str = "triple fault (a reset of last resort, or its kernel crashed without a word)";
const PANIC: &str = "its kernel panicked";

/// Time after which a guest is tried to be started again for which the host had no process.
const START_AGAIN: Duration = Duration::from_secs(1);

impl Supervisor {
    /// Guest `n` says how its VM ended; its process ends after this.
    pub(super) fn on_guest_end(&mut self, n: GuestId, how: VmEnd) {
        let guest = &mut self.guests[n];
        guest.end = Some(how);
        let resets = matches!(how, VmEnd::Reset | VmEnd::TripleFault) && guest.spec.on_reset == OnReset::Reboot;
        // One that has panicked and is about to be killed may reset itself first.
        if !resets || self.stopping.is_some() || guest.at_end == AtEnd::Stay || guest.dies_of_panic() {
            return;
        }
        // A PC resets at a triple fault; a kernel may use it for that, or crash in this way again and again.
        if how == VmEnd::TripleFault {
            if !self.may_start_again(n, TRIPLE_FAULT) {
                return;
            }
            self.warn_of_guest(n, &format!("{TRIPLE_FAULT}: it boots again"));
        }
        self.reboots(n);
    }

    /// The kernel of guest `n` says that it has panicked; the VM still runs.
    pub(super) fn on_guest_panic(&mut self, n: GuestId) {
        let on_crash = self.guests[n].spec.on_crash;
        // It may panic once more while it is being killed.
        if on_crash != OnCrash::Keep && self.guests[n].dies_of_panic() {
            return;
        }
        let then = match on_crash {
            OnCrash::Keep => return self.warn_of_guest(n, PANIC),
            OnCrash::Stop => {
                self.guests[n].error = Some(PANIC.into());
                "it is stopped (on_crash)"
            }
            OnCrash::Reboot if self.stopping.is_some() || self.guests[n].at_end == AtEnd::Stay => "it was to stop",
            OnCrash::Reboot if self.may_start_again(n, PANIC) => {
                self.reboots(n);
                "it boots again (on_crash)"
            }
            OnCrash::Reboot => "it is stopped",
        };
        self.warn_of_guest(n, &format!("{PANIC}: {then}"));
        self.kill_guest(n);
    }

    fn reboots(&mut self, n: GuestId) {
        let guest = &mut self.guests[n];
        guest.state = GuestState::Rebooting;
        self.events.tell(&Event::GuestRebooted { guest: guest.name.clone() });
    }

    /// Counts a crash of guest `n`, `what` in words. False if there were too many: that is the guest's failure then.
    fn may_start_again(&mut self, n: GuestId, what: &str) -> bool {
        let (guest, now) = (&mut self.guests[n], Time::now());
        let lived = guest.has_run.then(|| now.since(guest.started));
        // Before this crash is counted: it is the one too many.
        let passed = guest.crashes.passed(now);
        let verdict = guest.crashes.failed(now, lived);
        if verdict == RestartVerdict::Quarantine {
            guest.error = Some(format!("{what}; {passed}").into());
        }
        verdict != RestartVerdict::Quarantine
    }

    /// The process of guest `n` may have ended.
    pub(super) fn on_guest_exit(&mut self, n: GuestId) {
        let stopping = self.stopping.is_some();
        let Some(exit) = self.guests[n].process.as_mut().and_then(VmProcess::ended) else { return };
        self.read_guest_to_its_end(n);
        let guest = &mut self.guests[n];
        (guest.process, guest.held) = (None, Held::default());
        // By now it could not do that itself.
        guest.spec.port.iter().for_each(|port| unix_socket::remove_stale(&port.socket));
        self.warn_of_loss(n);
        self.guests[n].forget();
        self.rests_no_more(n);
        self.resizes_no_more(n);
        self.leave_ends(n);
        let guest = &mut self.guests[n];
        if guest.state == GuestState::Rebooting && !stopping && guest.at_end != AtEnd::Stay {
            return self.start_guest_process(n);
        }
        let at_end = std::mem::take(&mut guest.at_end);
        let failure = match (guest.error.take(), guest.end) {
            (Some(error), _) => Some(error),
            (None, Some(VmEnd::PowerOff | VmEnd::Reset | VmEnd::Killed)) => None,
            (None, Some(VmEnd::TripleFault)) => Some(TRIPLE_FAULT.into()),
            (None, Some(VmEnd::Error)) => Some("KVM could not go on".into()),
            // Killed because that was asked for.
            (None, None) if stopping || at_end != AtEnd::Whatever => None,
            (None, None) => Some(describe_exit(exit).into()),
        };
        let killed = guest.end.is_none_or(|end| end == VmEnd::Killed);
        if let Some(why) = failure {
            return self.guest_failed(n, why);
        }
        let how = if killed { "killed" } else { "powered off" };
        self.events.tell(&Event::GuestEnded { guest: guest.name.clone(), how: how.into() });
        guest.state = GuestState::Off;
        if at_end == AtEnd::StartAgain && !stopping {
            self.start_guest_process(n);
        }
    }

    /// The process of guest `n` is gone, and with it what its disks' shadows kept. Warns of those whose driver VM was away at that moment.
    fn warn_of_loss(&mut self, n: GuestId) {
        let guest = &self.guests[n];
        let left = guest.devices.iter().filter(|(id, device)| traits(id.class).rests && device.is_left());
        let names: Vec<_> = left.map(|(id, _)| format!("{}.{id}", guest.name)).collect();
        for name in names {
            self.events.warn(format!(
                "{name}: the guest ended while the driver VM of this disk was away: what it had not flushed may be lost, as in a power cut"
            ));
        }
    }

    /// The process of guest `n` is gone: disconnects its ends of the driver VMs.
    fn leave_ends(&mut self, n: GuestId) {
        for (driver, end) in self.guests[n].drivers() {
            self.drivers[driver].forget_guest(end);
            self.drivers[driver].lifecycle.end_starts_over(end);
            self.drive(driver, Input::EndGone(end));
        }
        self.pass_on_defaults(n);
    }

    /// Starts a process for guest `n`; where that fails, the guest has failed, alone. One that has run before is started later, if the host
    /// has only no process for it now.
    pub(super) fn start_guest_process(&mut self, n: GuestId) {
        if let Err(error) = self.guests[n].start(&self.program) {
            let why = crate::base::error::chain(&error);
            let guest = &mut self.guests[n];
            if !guest.has_run || !error.may_pass() {
                return self.guest_failed(n, why);
            }
            if guest.start_due.replace(Time::now() + START_AGAIN).is_none() {
                let name = guest.name.clone();
                self.events.warn(format!(
                    "{name}: its next process cannot be started: {why}; it is tried again until it can, or until `umbra stop {name}`"
                ));
            }
            return;
        }
        self.tell_quarantines(n);
        self.connect_guest(n);
    }

    /// Tries again to start guests for which the host had no process.
    pub(super) fn start_guests_again(&mut self, now: Time) {
        for n in self.guests.ids() {
            let guest = &mut self.guests[n];
            if guest.state != GuestState::Starting {
                guest.start_due = None;
            }
            if guest.start_due.is_some_and(|due| due <= now) {
                self.start_guest_process(n);
            }
        }
    }

    /// When the next of them is due.
    pub(super) fn start_due(&self) -> Option<Time> {
        self.guests.iter().filter_map(|guest| guest.start_due).min()
    }

    /// Guest `n` has failed. That ends the machine if the guest has never run and no guest has been served yet.
    pub(super) fn guest_failed(&mut self, n: GuestId, why: impl Into<WhyFailed>) {
        let WhyFailed { what: why, configuration } = why.into();
        let guest = &mut self.guests[n];
        let first = !guest.has_run && !self.in_service;
        self.events.tell(&Event::GuestEnded { guest: guest.name.clone(), how: why.clone() });
        let named = WhyFailed { what: format!("{}: {why}", guest.name), configuration };
        guest.state = GuestState::Failed(why);
        if first && self.stopping.is_none() {
            self.give_up(named);
        } else {
            let _ = self.failure.get_or_insert(named);
        }
    }

    /// `umbra start GUEST`.
    pub(super) fn start_guest(&mut self, name: &str) -> Result<(), String> {
        let n = self.guest_named(name)?;
        if self.until == Until::Prepared {
            return Err("this run only makes snapshots (`umbra run --prepare`), and ends by itself".into());
        }
        self.goes_on()?;
        let guest = &mut self.guests[n];
        if !guest.is_over() {
            return Err(format!("{name} is not off: it is {}", guest.state.name()));
        }
        // What made the run a failure is put right, if this was it.
        if self.failure.as_ref().is_some_and(|why| why.what.starts_with(&format!("{name}: "))) {
            self.failure = None;
        }
        guest.at_end = AtEnd::Whatever;
        guest.crashes.forgive();
        guest.state = GuestState::Starting;
        if guest.knows_its_devices() {
            self.start_guest_process(n);
        }
        Ok(())
    }

    /// `umbra stop GUEST`.
    pub(super) fn stop_guest(&mut self, name: &str, how: StopHow) -> Result<(), String> {
        let n = self.guest_named(name)?;
        self.end_guest(n, how, AtEnd::Stay)
    }

    /// `umbra reboot GUEST`.
    pub(super) fn reboot_guest(&mut self, name: &str, how: StopHow) -> Result<(), String> {
        let n = self.guest_named(name)?;
        self.end_guest(n, how, AtEnd::StartAgain)
    }

    /// `umbra nmi GUEST`.
    pub(super) fn inject_nmi(&mut self, name: &str) -> Result<(), String> {
        let n = self.guest_named(name)?;
        let guest = &self.guests[n];
        if guest.state != GuestState::Running {
            return Err(format!("{name} has no vCPU that runs: it is {}", guest.state.name()));
        }
        self.tell_guest(n, &ToVm::Nmi);
        self.warn_of_guest(n, "a non-maskable interrupt was injected (`umbra nmi`)");
        Ok(())
    }

    fn end_guest(&mut self, n: GuestId, how: StopHow, at_end: AtEnd) -> Result<(), String> {
        let guest = &mut self.guests[n];
        if guest.is_over() {
            return Err(format!("{} is not running: it is {}", guest.name, guest.state.name()));
        }
        guest.at_end = at_end;
        if guest.process.is_none() {
            // It waits for its sound card, or for a disk.
            if at_end == AtEnd::Stay {
                guest.state = GuestState::Off;
            }
            return Ok(());
        }
        match how {
            StopHow::PowerButton => self.press_power_button(n),
            StopHow::Kill => self.kill_guest(n),
        }
        Ok(())
    }

    pub(super) fn guest_named(&self, name: &str) -> Result<GuestId, String> {
        self.guests.position(|guest| guest.name == name).ok_or_else(|| {
            let names: Vec<_> = self.guests.iter().map(|guest| guest.name.as_str()).collect();
            format!("there is no guest named {name}; there is {}", names.join(", "))
        })
    }

    /// Tells a new process of guest `n` which of its devices have a quarantined driver VM.
    fn tell_quarantines(&mut self, n: GuestId) {
        for (driver, end) in self.guests[n].drivers() {
            let driver = &self.drivers[driver];
            if matches!(driver.lifecycle.state(), State::Quarantined | State::Resetting { next: None, .. }) {
                let device = driver.ends[end].device;
                self.tell_guest(n, &ToVm::Quarantine { device });
            }
        }
    }
}
