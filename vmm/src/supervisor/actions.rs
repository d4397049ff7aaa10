//! Doing what the life cycle asks for.

use std::time::Duration;

use umbra_shadow::Generation;

use super::class::traits;
use super::driver::device::ResetJob;
use super::driver::dying::LAST;
use super::driver::life::{LifeRole, Purpose};
use super::driver::standby::renice_vcpus;
use super::driver::{EndRef, Life};
use super::guest::GuestState;
use super::ids::DriverId;
use super::run::Supervisor;
use crate::base::error::chain;
use crate::base::time::{Time, milliseconds};
use crate::host::reset;
use crate::lifecycle::{Action, Endpoint, Failure, Input, NoticedBy, Rank, State};
use crate::record::crash_report::{CrashReport, Verdict};
use crate::record::events::Event;
use crate::record::timeline::{Milestone, Timeline};
use crate::wire::messages::{MaskedCounts, ToVm};

/// Time after which a reset is tried to be begun again for which there was no descriptor or no thread.
pub(super) const RESET_AGAIN: Duration = Duration::from_millis(100);

impl Supervisor {
    pub(super) fn act(&mut self, n: DriverId, action: Action, now: Time) {
        match action {
            Action::Reset => self.reset(n),
            Action::Spawn(generation) => self.spawn(n, generation),
            Action::Adopt(generation) => self.adopt(n, generation),
            Action::SpawnStandby(rank, generation) => self.spawn_standby((n, rank), generation),
            Action::SpawnAhead(generation) => self.launch_standby((n, Rank::First), generation, Purpose::ServeSoon),
            Action::MoveUp => self.move_up(n),
            Action::TakeSnapshot(generation) => self.spawn_taker(n, generation),
            Action::DropTaker(why) => self.drop_taker(n, &why),
            Action::TakeOver(generation) => self.take_over(n, generation),
            Action::ConfigureStandby(rank) => self.configure(n, LifeRole::Standby(rank)),
            Action::Arm(up) => self.arm(n, up),
            Action::ResetSpare => self.reset_spare(n),
            Action::ReportFenced => self.report_retired(n),
            Action::Quiesce => self.quiesce(n),
            Action::GoOn => self.go_on(n),
            Action::RestartOff(why) => self.restart_off(n, &why),
            Action::DropStandby(rank, why) => self.drop_standby(n, rank, why),
            Action::Configure => self.configure(n, LifeRole::Present),
            Action::GoLive(end, replay) => {
                self.drivers[n].timeline.mark(Milestone::GoLive, now);
                self.go_live_at(n, end, replay);
            }
            Action::StartClean(end) => self.start_clean(n, end),
            Action::EndLive(end) => self.on_late_end_live(n, end),
            Action::LeaveBehind(end) => self.leave_behind(n, end),
            Action::Live => self.on_live(n, now),
            Action::Mask => self.mask(n, now),
            Action::Failed(failure) => self.on_failed(n, &failure, now),
            Action::Release => {
                // What it prints (a panic, for one) must not hold up the thread that gives the device up.
                if let Some(life) = &self.drivers[n].life {
                    renice_vcpus(life.process.pid(), LAST);
                }
                let asked = self.drivers[n].life.as_ref().is_some_and(|life| life.process.ask_to_release());
                if !asked {
                    self.drive(n, Input::Evidence);
                }
                self.drivers[n].held.fence();
            }
            Action::BeginLastWords => self.begin_last_words(n),
            Action::Kill => match &mut self.drivers[n].life {
                Some(life) => {
                    life.process.kill();
                    self.drivers[n].held.fence();
                }
                None => self.process_gone(n, "it was not started".into()),
            },
            Action::Warn(what) => self.events.warn(format!("{}: {what}", self.drivers[n].name)),
            Action::Report => self.report(n),
            Action::Quarantine(why) => self.quarantine(n, &why),
        }
    }

    /// A guest that came after the others, or came back, is live.
    fn on_late_end_live(&mut self, n: DriverId, end: Endpoint) {
        let EndRef { guest, device } = self.drivers[n].ends[end];
        let frames = std::mem::take(&mut self.drivers[n].late_frames);
        self.drivers[n].has_settled();
        self.events.tell(&Event::EndLive {
            guest: self.guests[guest].name.clone(),
            device,
            driver: self.drivers[n].name.clone(),
            generation: self.drivers[n].lifecycle.generation().map_or(0, Generation::get),
            frames,
        });
        self.send_settings(n, LifeRole::Present);
    }

    fn leave_behind(&mut self, n: DriverId, end: Endpoint) {
        self.await_greeting(n, end);
        let EndRef { guest, device } = self.drivers[n].ends[end];
        let (driver, guest) = (&self.drivers[n].name, &self.guests[guest]);
        // A guest that starts, or is off, is served when it is there.
        if guest.state != GuestState::Running {
            return;
        }
        let guest = &guest.name;
        self.events
            .warn(format!("{driver}: {guest}.{device} does not answer; the driver VM serves without it until it does"));
    }

    fn reset(&mut self, n: DriverId) {
        self.drivers[n].mark_fence();
        let in_service = self.in_service;
        let driver = &mut self.drivers[n];
        driver.timeline.mark(Milestone::ResetStart, Time::now());
        // Before anybody is served, what the host lacks ends the run.
        let patient = driver.was_live || in_service;
        match driver.held.begin_reset(driver.device.clone(), patient, driver.span()) {
            Ok(job) => (driver.resetting, driver.reset_due) = (Some(job), None),
            Err(error) if !patient => {
                self.events.warn(format!("{}: the device is not reset: {error}", self.drivers[n].name));
                self.drive(n, Input::ResetDone);
            }
            Err(error) => {
                let first = driver.reset_due.replace(Time::now() + RESET_AGAIN).is_none();
                self.warn_of_reset(n, first, "the device", &error);
            }
        }
    }

    /// A reset could not be begun: no life gets the device before it was done.
    pub(super) fn warn_of_reset(&mut self, n: DriverId, first: bool, device: &str, error: &std::io::Error) {
        if first {
            let name = &self.drivers[n].name;
            self.events.warn(format!(
                "{name}: the reset of {device} cannot be begun: {error}; it is tried again until it can"
            ));
        }
    }

    /// Begins resets of driver VM `n` that could not be begun before, and are still wanted. For what they wait that the host lacks, no
    /// limit of theirs runs.
    pub(super) fn reset_again(&mut self, n: DriverId, now: Time) {
        let driver = &mut self.drivers[n];
        let lack = driver.resetting.as_ref().and_then(ResetJob::take_lack);
        if lack.is_some() || driver.reset_due.is_some() {
            driver.lifecycle.reset_waits(now);
        }
        if let Some(why) = lack.filter(|_| !std::mem::replace(&mut driver.told_of_lack, true)) {
            let name = driver.name.clone();
            self.events.warn(format!("{name}: the reset of the device waits until it can be done: {why}"));
        }
        let driver = &mut self.drivers[n];
        if driver.is_being_stopped() {
            driver.reset_due = None;
            driver.spare.iter_mut().for_each(|spare| spare.reset_due = None);
            return;
        }
        if driver.reset_due.is_some_and(|due| due <= now) {
            self.reset(n);
        }
        if self.drivers[n].spare.as_ref().and_then(|spare| spare.reset_due).is_some_and(|due| due <= now) {
            self.reset_spare(n);
        }
    }

    pub(super) fn on_reset_done(&mut self, n: DriverId) {
        let driver = &mut self.drivers[n];
        let Some(job) = driver.resetting.take() else { return };
        driver.told_of_lack = false;
        let outcome = driver.held.end_reset(&job);
        driver.timeline.mark(Milestone::Reset, Time::now());
        let Some(outcome) = outcome else { return self.drive(n, Input::ResetDone) };
        let (method, error) = match outcome {
            Ok(done) => (done.method, None),
            Err(error) => (driver.reset_method, Some(error)),
        };
        driver.reset_method = method;
        let reset_ms = driver.timeline.between(Milestone::ResetStart, Milestone::Reset).map_or(0.0, milliseconds);
        let (name, device) = (driver.name.clone(), driver.device.bdf().to_string());
        let method = reset::word(method).into();
        self.events.tell(&Event::DeviceReset { driver: name, device, method, reset_ms, error });
        self.drive(n, Input::ResetDone);
    }

    fn spawn(&mut self, n: DriverId, generation: Generation) {
        let (driver, now) = (&mut self.drivers[n], Time::now());
        let started = driver.start(&self.program, generation);
        if let Some(error) = started.as_ref().err().filter(|error| error.may_pass())
            && (driver.was_live || self.in_service)
        {
            let why = chain(error);
            self.drivers[n].reason = Some(format!("its process cannot be started: {why}"));
            self.fall_back(n, &format!("its process cannot be started: {why}"));
            return self.drive(n, Input::NotStarted(why));
        }
        driver.console.begin(&format!("{}.{generation}", driver.name));
        driver.timeline.mark(Milestone::Spawn, now);
        driver.present = Some(generation);
        self.events.tell(&Event::DriverStarting { driver: driver.name.clone(), generation: generation.get() });
        match started {
            Ok(()) if self.drivers[n].awaits_device() => self.give_device(n),
            Ok(()) => self.connect_ends(n),
            Err(error) => self.fail_driver(n, NoticedBy::Start, error.to_string(), Time::now()),
        }
    }

    fn on_live(&mut self, n: DriverId, now: Time) {
        let driver = &mut self.drivers[n];
        // A splitter that went over to a spare did so some time ago.
        let live_at = driver.live_at.take().filter(|(generation, _)| driver.is_current(*generation));
        driver.timeline.mark(Milestone::Live, live_at.map_or(now, |(_, at)| at));
        driver.was_live = true;
        self.in_service |= driver.life.as_ref().is_some_and(|life| life.connected() > 0);
        let outage = driver.timeline.outage();
        driver.last_outage = outage.or(driver.last_outage);
        let parts = driver.timeline.parts(reset::word(driver.reset_method));
        let frames = std::mem::take(&mut driver.frames);
        // Kept after this: last words of the failed life, and a guest's word of it, may still come.
        if let Some(report) = driver.report.as_mut().filter(|report| report.outage_ms.is_none()) {
            report.outage_ms = outage.map(milliseconds);
            report.parts = parts.clone();
            report.masks.clone_from(&driver.masks);
            report.frames = frames;
        }
        self.events.tell(&Event::DriverLive {
            driver: driver.name.clone(),
            generation: driver.lifecycle.generation().map_or(0, Generation::get),
            outage_ms: outage.map(milliseconds),
            parts,
            frames,
        });
        self.complete_report(n);
        self.send_settings(n, LifeRole::Present);
        let driver = &mut self.drivers[n];
        driver.masks.clear();
        driver.asked_to_mask = None;
        driver.has_settled();
        self.restarted(n, now);
    }

    fn on_failed(&mut self, n: DriverId, failure: &Failure, now: Time) {
        // First of all: with a spare that is all that the guests wait for.
        self.mask(n, now);
        for EndRef { guest, device } in self.drivers[n].ends.rows() {
            self.guests[guest].forget_live(device);
            self.end_rest((guest, device), false);
        }
        let driver = &mut self.drivers[n];
        driver.collect_masks(now);
        driver.too_slow_to_save |=
            failure.source == NoticedBy::BootTimeout && driver.life.as_ref().is_some_and(Life::is_to_be_saved);
        let generation = driver.present;
        let masked = driver.outage_start(now);
        // Nobody has been served since the failure before: what follows is the rest of its recovery.
        let served = driver.timeline.at(Milestone::Live).is_some();
        if failure.source != NoticedBy::Carrier || served || driver.report.is_none() {
            driver.timeline = Timeline::default();
            driver.report = failure.source.is_failure().then(|| driver.begin_report(failure));
        }
        if let Some(masked) = masked {
            driver.timeline.mark(Milestone::Mask, masked);
        }
        driver.timeline.mark(Milestone::Sign, failure.at);
        driver.timeline.mark(Milestone::Detect, now);
        driver.reason = Some(failure.what.clone());
        if failure.source == NoticedBy::Device {
            driver.held.doubt();
        }
        self.events.tell(&Event::DriverFailed {
            driver: driver.name.clone(),
            generation: generation.map_or(0, Generation::get),
            source: failure.source,
            reason: failure.what.clone(),
            detect_ms: milliseconds(now.since(failure.at)),
        });
        // A new image whose driver has lost its carrier does not pass: the spare that takes over is of the image before.
        if failure.source.is_failure() || (failure.source == NoticedBy::Carrier && driver.tries_an_image()) {
            self.judge_trial(n);
        }
    }

    /// Asks the guests to mask. Splitters that noticed the failure first do so already.
    fn mask(&mut self, n: DriverId, now: Time) {
        let driver = &mut self.drivers[n];
        if traits(driver.class()).runs_on {
            driver.silence();
        }
        driver.asked_to_mask.get_or_insert(now);
        let Some(generation) = driver.present else { return };
        for EndRef { guest, device } in driver.ends.rows() {
            self.tell_guest(guest, &ToVm::Mask { device, generation });
        }
    }

    /// The process of driver VM `n` is gone, and with it its memory, its links and its hold of the device.
    pub(super) fn process_gone(&mut self, n: DriverId, how: String) {
        let driver = &mut self.drivers[n];
        driver.collect_masks(Time::now());
        driver.registers = driver.life.take().map(|life| life.registers).unwrap_or_default();
        driver.exit.clone_from(&how);
        driver.available_memory = None;
        driver.gone = Time::now();
        self.drive(n, Input::ProcessGone(how));
    }

    /// The failed life is fenced: complete its report.
    fn report(&mut self, n: DriverId) {
        let driver = &mut self.drivers[n];
        driver.mark_fence();
        let quarantine = matches!(driver.lifecycle.state(), State::Resetting { next: None, .. });
        let Some(report) = &mut driver.report else { return };
        report.verdict = if quarantine { Verdict::Quarantine } else { Verdict::Restart };
        report.failures = driver.lifecycle.history().total();
        if driver.dying.is_none() {
            let (exit, registers) = (driver.exit.clone(), driver.registers.clone());
            let tail = driver.console.tail();
            driver.take_evidence(exit, registers, tail);
        }
        self.complete_report(n);
        let driver = &self.drivers[n];
        self.events.tell(&Event::DriverFenced {
            driver: driver.name.clone(),
            generation: driver.lifecycle.generation().map_or(0, Generation::get),
            fence_ms: driver.timeline.between(Milestone::Detect, Milestone::Fence).map_or(0.0, milliseconds),
            report: driver.report_path.clone(),
        });
    }

    /// Completes the report of a failed life whose killed process does not end.
    fn report_hung(&mut self, n: DriverId) {
        let driver = &mut self.drivers[n];
        let pid = driver.life.as_ref().map_or(0, |life| life.process.pid());
        let registers = driver.life.as_ref().map(|life| life.registers.clone()).unwrap_or_default();
        let tail = driver.console.tail();
        driver.take_evidence(format!("its process ({pid}) was killed and has not ended"), registers, tail);
        let total = driver.lifecycle.history().total();
        if let Some(report) = &mut driver.report {
            (report.verdict, report.failures) = (Verdict::Quarantine, total);
        }
        self.complete_report(n);
    }

    /// Writes the report with the time line as far as it has come.
    pub(super) fn complete_report(&mut self, n: DriverId) {
        let driver = &mut self.drivers[n];
        let Some(report) = &mut driver.report else { return };
        report.timeline = driver.timeline.marks();
        // What comes after the outage (the fence of a life whose place a spare has taken) is no part of it.
        if report.outage_ms.is_none() {
            report.masks.clone_from(&driver.masks);
            report.parts = driver.timeline.parts(reset::word(driver.reset_method));
        }
        self.write_report(n);
    }

    pub(super) fn write_report(&mut self, n: DriverId) {
        let Some(report) = self.drivers[n].report.clone() else { return };
        self.drivers[n].report_path = self.write(&report);
        if let Some(dying) = &mut self.drivers[n].dying {
            dying.report = Some(report);
        }
    }

    /// Writes `report`; where to, if that succeeds.
    pub(super) fn write(&mut self, report: &CrashReport) -> Option<String> {
        let dir = self.run_dir.reports();
        match self.shelf.write(&dir, report) {
            Ok(path) => Some(path.display().to_string()),
            Err(error) => {
                if let Some(error) = error {
                    let (name, dir) = (&report.driver, dir.display());
                    let what = format!(
                        "{name}: no crash report in {dir}: {error}; reports wait in memory until there is room"
                    );
                    self.events.warn(what);
                }
                None
            }
        }
    }

    fn start_clean(&mut self, n: DriverId, end: Endpoint) {
        let EndRef { guest, device } = self.drivers[n].ends[end];
        // One that waits for its card has nothing that could be lost, and a disk's shadow finds by itself what kills.
        if !self.guests[guest].knows_its_devices() || !traits(device.class).starts_over {
            return;
        }
        self.events.tell(&Event::CleanStart {
            driver: self.drivers[n].name.clone(),
            guest: self.guests[guest].name.clone(),
            device,
        });
        self.tell_guest(guest, &ToVm::Quarantine { device });
    }

    fn quarantine(&mut self, n: DriverId, why: &str) {
        if self.drivers[n].lifecycle.process_hangs() {
            self.report_hung(n);
        }
        let driver = &mut self.drivers[n];
        let last = driver.reason.take().map_or_else(String::new, |last| format!(" (the last: {last})"));
        let reason = format!("{why}{last}");
        driver.reason = Some(reason.clone());
        self.events.tell(&Event::Quarantined { driver: driver.name.clone(), reason: reason.clone() });
        if self.is_vital(n) {
            return self.give_up(format!("{}: no snapshot is taken: {reason}", self.drivers[n].name));
        }
        self.fall_back(n, &format!("it is quarantined: {reason}"));
        for EndRef { guest, device } in self.drivers[n].ends.rows() {
            self.tell_guest(guest, &ToVm::Quarantine { device });
            if !self.guests[guest].knows_its_devices() && !self.guests[guest].is_over() {
                let noun = traits(device.class).noun;
                let why = format!("{} never got its {noun} to work", self.drivers[n].name);
                self.guest_failed(guest, why);
            }
        }
    }
}

impl super::driver::DriverVm {
    /// Marks the fence on the time line: when the failed process was gone. A first start has none.
    fn mark_fence(&mut self) {
        if self.timeline.at(Milestone::Detect).is_some() {
            // One that has given the device up just now is still there.
            let gone = if self.life.is_some() { Time::now() } else { self.gone };
            self.timeline.mark(Milestone::Fence, gone);
        }
    }

    /// What a failed life left goes into its report.
    pub(super) fn take_evidence(&mut self, exit: String, registers: String, console_tail: String) {
        let Some(report) = &mut self.report else { return };
        report.take_evidence(exit, registers, console_tail);
        if let Some(line) = &report.kernel_says {
            self.reason = Some(format!("{}: {line}", report.reason));
        }
    }

    /// When the outage that a failure at `now` belongs to began; `None` where nothing was ever served.
    fn outage_start(&self, now: Time) -> Option<Time> {
        if !self.was_live {
            return None;
        }
        // Not live since the last failure: it is still the same outage.
        if self.timeline.at(Milestone::Live).is_none() {
            return self.timeline.at(Milestone::Mask);
        }
        // A splitter that notices nothing itself, because the driver VM hangs, masks when it is asked to.
        let asked = self.asked_to_mask.unwrap_or(now);
        self.masks.iter().map(|mask| Time(mask.at_ns)).chain([asked]).min()
    }

    fn begin_report(&self, failure: &Failure) -> CrashReport {
        CrashReport {
            driver: self.name.clone(),
            generation: self.present.map_or(0, Generation::get),
            device: self.device.bdf().to_string(),
            kernel_driver: self.kernel_driver.clone(),
            kernel: self.kernel.clone(),
            source: failure.source,
            reason: failure.what.clone(),
            kernel_says: None,
            exit: String::new(),
            verdict: Verdict::Restart,
            failures: 0,
            masks: Vec::new(),
            outage_ms: None,
            parts: crate::record::parts::RecoveryParts::default(),
            frames: MaskedCounts::default(),
            timeline: Vec::new(),
            registers: String::new(),
            console_tail: String::new(),
        }
    }
}
