//! The hot spare: a standby with a device of its own. The two devices change places whenever it takes over; what the
//! failed life held is given up, reset and started again beside the service.
//!
//! Whether the spare is on the guests' network is asked while it waits: a broadcast that goes out through the serving
//! device has to come in through the spare's. Invariant: each device has one process at most.

use std::collections::BTreeSet;
use std::time::Duration;

use umbra_shadow::Generation;

use super::device::{HeldDevice, Open, ResetJob};
use super::{DriverVm, EndRef, StandbyVm};
use crate::base::time::{Time, milliseconds};
use crate::host::reset::{self, ResetMethod};
use crate::host::sysfs::HostDevice;
use crate::lifecycle::{Carrier, Endpoint, Input, NoticedBy, Rank, StandbyStage, State};
use crate::record::events::Event;
use crate::record::status::SpareNetwork;
use crate::record::timeline::Milestone;
use crate::supervisor::actions::RESET_AGAIN;
use crate::supervisor::ids::DriverId;
use crate::supervisor::run::Supervisor;
use crate::wire::messages::ToVm;

/// Broadcasts sent to find out whether the spare is on the guests' network, and the time between them. Together they last longer
/// than a switch with spanning tree takes to forward behind a new link (30 s).
const QUESTIONS: u32 = 40;
const QUESTION_PERIOD: Duration = Duration::from_secs(1);

/// Whether the spare hears the guests' network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Network {
    /// Not known yet: broadcasts left to send, and when the next one is due.
    Asked(u32, Time),
    /// It does.
    Same,
    /// It has heard none of the questions.
    Silent,
}

/// The device that does not serve, and what is known of it.
#[derive(Debug)]
pub(in crate::supervisor) struct Spare {
    pub(in crate::supervisor) device: HostDevice,
    /// Its files.
    pub(in crate::supervisor) held: HeldDevice,
    reset_method: Option<ResetMethod>,
    pub(in crate::supervisor) resetting: Option<ResetJob>,
    /// When its reset is tried to be begun again, where it could not be.
    pub(in crate::supervisor) reset_due: Option<Time>,
    reset_start: Time,
    network: Option<Network>,
    /// The failed life that had it last and whose report is not complete.
    retired: Option<Generation>,
    /// The ends whose guests have not been live since the devices changed places.
    moved: BTreeSet<Endpoint>,
}

impl Spare {
    pub(in crate::supervisor) fn new(device: HostDevice, open: Open) -> Self {
        Self {
            reset_method: device.reset().best(),
            device,
            held: HeldDevice::new(open),
            resetting: None,
            reset_due: None,
            reset_start: Time(0),
            network: None,
            retired: None,
            moved: BTreeSet::new(),
        }
    }

    /// One word for `umbra status`: whether it is on the network of the serving device.
    pub(in crate::supervisor) fn network(&self) -> SpareNetwork {
        match self.network {
            Some(Network::Same) => SpareNetwork::Same,
            Some(Network::Silent) => SpareNetwork::Silent,
            Some(Network::Asked(..)) | None => SpareNetwork::Unknown,
        }
    }
}

impl Supervisor {
    pub(in crate::supervisor) fn reset_spare(&mut self, n: DriverId) {
        let driver = &mut self.drivers[n];
        let about = driver.span();
        let Some(spare) = &mut driver.spare else { return };
        match spare.held.begin_reset(spare.device.clone(), true, about) {
            Ok(job) => (spare.resetting, spare.reset_due, spare.reset_start) = (Some(job), None, Time::now()),
            Err(error) => {
                let first = spare.reset_due.replace(Time::now() + RESET_AGAIN).is_none();
                self.warn_of_reset(n, first, "the spare device", &error);
            }
        }
    }

    pub(in crate::supervisor) fn on_spare_reset_done(&mut self, n: DriverId) {
        let driver = &mut self.drivers[n];
        let Some(spare) = driver.spare.as_mut() else { return };
        let Some(job) = spare.resetting.take() else { return };
        let Some(outcome) = spare.held.end_reset(&job) else { return self.drive(n, Input::SpareResetDone) };
        let (method, error) = match outcome {
            Ok(done) => (done.method, None),
            Err(error) => (spare.reset_method, Some(error)),
        };
        spare.reset_method = method;
        let reset_ms = milliseconds(Time::now().since(spare.reset_start));
        let (device, method) = (spare.device.bdf().to_string(), reset::word(method).into());
        self.events.tell(&Event::DeviceReset { driver: driver.name.clone(), device, method, reset_ms, error });
        self.drive(n, Input::SpareResetDone);
    }

    /// The spare forwards and has its carrier (`up`), or has lost it.
    pub(in crate::supervisor) fn arm(&mut self, n: DriverId, up: bool) {
        let driver = &mut self.drivers[n];
        let Some(generation) = driver.standby.as_ref().map(|standby| standby.life.generation) else { return };
        if let Some(spare) = &mut driver.spare {
            spare.network = up.then(|| Network::Asked(QUESTIONS, Time::now() + QUESTION_PERIOD));
        }
        self.tell_armed(n, generation, up);
        if up && self.drivers[n].standby.as_ref().is_some_and(|standby| !standby.ready) {
            return self.standby_ready(n, Rank::First);
        }
        let driver = self.drivers[n].name.clone();
        self.events.tell(&Event::SpareCarrier { driver, generation: generation.get(), up });
    }

    fn tell_armed(&mut self, n: DriverId, generation: Generation, armed: bool) {
        for EndRef { guest, device } in self.drivers[n].ends.rows() {
            self.tell_guest(guest, &ToVm::Arm { device, generation, armed });
        }
    }

    /// The guest of `end` is connected with the spare, which is armed.
    pub(in crate::supervisor) fn tell_armed_at(&mut self, n: DriverId, end: Endpoint, generation: Generation) {
        let EndRef { guest, device } = self.drivers[n].ends[end];
        self.tell_guest(guest, &ToVm::Arm { device, generation, armed: true });
    }

    /// A guest's own frame has come in through the spare.
    pub(in crate::supervisor) fn on_same_network(&mut self, n: DriverId, generation: Generation) {
        let driver = &mut self.drivers[n];
        let waits = driver.lifecycle.standby().generation() == Some(generation);
        if let Some(spare) = driver.spare.as_mut().filter(|_| waits) {
            spare.network = Some(Network::Same);
        }
    }

    /// Asks (again) whether the spare hears the guests' network, when that is due.
    pub(in crate::supervisor) fn ask_about_network(&mut self, n: DriverId, now: Time) {
        let driver = &mut self.drivers[n];
        let armed = driver.lifecycle.standby().generation().filter(|_| driver.lifecycle.is_armed());
        let Some(spare) = &mut driver.spare else { return };
        let Some(Network::Asked(left, due)) = spare.network else { return };
        if due > now {
            return;
        }
        let Some(generation) = armed else {
            spare.network = None;
            return;
        };
        // What cannot go out says nothing about who would hear it.
        if driver.lifecycle.carrier() == Carrier::Down {
            spare.network = Some(Network::Asked(left, now + QUESTION_PERIOD));
            return;
        }
        let Some(left) = left.checked_sub(1) else {
            spare.network = Some(Network::Silent);
            let (serving, other) = (driver.device.bdf(), spare.device.bdf());
            let what = format!(
                "{}: the spare {other} does not seem to be on the network of {serving}: of {QUESTIONS} broadcast frames \
                 sent through {serving} within {} s it has received none; connect both to the same network",
                driver.name,
                (QUESTION_PERIOD * QUESTIONS).as_secs()
            );
            return self.events.warn(what);
        };
        spare.network = Some(Network::Asked(left, now + QUESTION_PERIOD));
        self.tell_armed(n, generation, true);
    }

    /// The spare becomes the present life at the stage that it has reached; the life before has failed, and has to give its device
    /// up.
    pub(in crate::supervisor) fn take_over(&mut self, n: DriverId, generation: Generation) {
        let now = Time::now();
        let failed = self.drivers[n].present;
        let alive = self.drivers[n].life.is_some();
        if alive {
            self.retire(n, now);
        } else {
            self.drivers[n].take_last_evidence();
        }
        let driver = &mut self.drivers[n];
        let Some(standby) = driver.standby.take_if(|standby| standby.life.generation == generation) else {
            return self.fail_driver(n, NoticedBy::Start, "the spare is gone", now);
        };
        driver.change_places(failed);
        let StandbyVm { life, console, kernel, kernel_driver, available_memory, ready, .. } = standby;
        driver.console.take_over(&format!("{}.{generation}", driver.name), console);
        driver.timeline.mark(Milestone::Spawn, now);
        if kernel.is_some() {
            driver.timeline.mark(Milestone::Hello, now);
            driver.kernel = kernel;
        }
        (driver.kernel_driver, driver.available_memory) = (kernel_driver, available_memory);
        if !ready {
            super::standby::renice(&life.process, 0);
        }
        (driver.life, driver.present) = (Some(life), Some(generation));
        let standby = match (driver.lifecycle.carrier(), driver.lifecycle.state()) {
            (Carrier::Up, _) => StandbyStage::Armed,
            (Carrier::Down, State::WaitingCarrier { .. }) => StandbyStage::NoCarrier,
            (Carrier::Down, _) => StandbyStage::Booting,
        };
        let (name, device) = (driver.name.clone(), driver.device.bdf().to_string());
        self.events.tell(&Event::DriverAdopted { driver: name, generation: generation.get(), device, standby });
        self.connect_ends(n);
        if !alive {
            self.drive(n, Input::SpareFenced);
        }
    }

    /// The failed life has no device any more: completes its report.
    pub(in crate::supervisor) fn report_retired(&mut self, n: DriverId) {
        let driver = &mut self.drivers[n];
        if let Some(spare) = &mut driver.spare {
            // Not fenced earlier: that would take the CPU from the guests that go over to the other device, and it can wait,
            // because this device reaches nothing but the memory of the life that is gone.
            spare.held.fence();
        }
        let retired = driver.spare.as_mut().and_then(|spare| spare.retired.take()).map(Generation::get);
        let Some(report) = driver.report.as_mut().filter(|report| Some(report.generation) == retired) else { return };
        let generation = report.generation;
        report.failures = driver.lifecycle.history().total();
        driver.timeline.mark(Milestone::Fence, Time::now());
        self.complete_report(n);
        let driver = &self.drivers[n];
        self.events.tell(&Event::DriverFenced {
            driver: driver.name.clone(),
            generation,
            fence_ms: driver.timeline.between(Milestone::Detect, Milestone::Fence).map_or(0.0, milliseconds),
            report: driver.report_path.clone(),
        });
    }
}

impl DriverVm {
    /// The spare's device serves from now on; the other one is that of the generation that has `failed`.
    fn change_places(&mut self, failed: Option<Generation>) {
        let Some(spare) = &mut self.spare else { return };
        std::mem::swap(&mut self.device, &mut spare.device);
        std::mem::swap(&mut self.held, &mut spare.held);
        std::mem::swap(&mut self.reset_method, &mut spare.reset_method);
        (spare.network, spare.retired) = (None, failed);
        // Also where they have changed back: some guests may have announced themselves meanwhile.
        spare.moved = self.ends.ids().collect();
    }

    /// Whether the guest at `end` is about to go live with another device than the one that served it last.
    pub(in crate::supervisor) fn has_moved(&self, end: Endpoint) -> bool {
        self.spare.as_ref().is_some_and(|spare| spare.moved.contains(&end))
    }

    /// More guests are live.
    pub(in crate::supervisor) fn has_settled(&mut self) {
        if let Some(spare) = &mut self.spare {
            spare.moved.retain(|end| !self.lifecycle.is_live_at(*end));
        }
    }

    /// When [`Supervisor::ask_about_network`] has something to do.
    pub(in crate::supervisor) fn question_due(&self) -> Option<Time> {
        match self.spare.as_ref()?.network {
            Some(Network::Asked(_, due)) => Some(due),
            _ => None,
        }
    }

    /// The process ended by itself: what it has left goes into its report.
    fn take_last_evidence(&mut self) {
        let (exit, registers) = (std::mem::take(&mut self.exit), std::mem::take(&mut self.registers));
        let tail = self.console.tail();
        self.take_evidence(exit, registers, tail);
    }
}
