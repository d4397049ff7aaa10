//! What VM processes and agents say, and what the supervisor makes of it.

use umbra_driver_vm::protocol::{FromAgent, ToAgent};
use umbra_shadow::{DeviceId, Generation};

use super::bounds::{self, text};
use super::class::settings::{Setting, Which};
use super::driver::console::Fatal;
use super::guest::GuestState;
use super::run::Supervisor;
use crate::base::lines::LineError;
use crate::base::time::{Time, milliseconds};
use crate::lifecycle::{Carrier, End, Failure, Input, Source};
use crate::record::events::Event;
use crate::record::timeline::Step;
use crate::wire::channel::{self, Incoming};
use crate::wire::messages::{FromVm, MaskedCounts, OutageCounts, PaceSteps, ToVm, VmEnd};
use crate::wire::spawn::describe_exit;

/// Messages handled at a turn of the loop for one process: one that floods must not starve the rest.
const AT_ONCE: usize = 64;

impl Supervisor {
    /// Sends `message` to guest `n`.
    pub(super) fn tell_guest(&mut self, n: usize, message: &ToVm) {
        if let Err(error) = self.guests[n].tell(message, None) {
            self.events.warn(format!("{}: {error}", self.guests[n].name));
        }
    }

    pub(super) fn read_guest(&mut self, n: usize) {
        let waited = !self.guests[n].unsent.is_empty();
        if let Err(error) = self.guests[n].send_on() {
            self.events.warn(format!("{}: {error}", self.guests[n].name));
        }
        if waited && self.guests[n].unsent.is_empty() {
            // It reads again: what it could not be connected with meanwhile.
            self.connect_guest(n);
        }
        for _ in 0..AT_ONCE {
            let Some(process) = &self.guests[n].process else { return };
            match bounds::hear(process.channel()) {
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
    fn on_guest_fault(&mut self, n: usize, error: &channel::Error) {
        let guest = &mut self.guests[n];
        self.events.warn(format!("{}: {error}", guest.name));
        if error.is_fault()
            && let Some(process) = &mut guest.process
        {
            guest.listening = false;
            guest.error = Some(format!("its process broke a rule of its control channel: {error}"));
            process.kill();
        }
    }

    fn on_guest_message(&mut self, n: usize, message: FromVm) {
        match message {
            FromVm::Running { .. } => {
                let guest = &mut self.guests[n];
                guest.state = GuestState::Running;
                guest.has_run = true;
                // One that needs no driver VM is served as it runs.
                self.in_service |= guest.drivers().is_empty();
                self.events.tell(&Event::GuestRunning { guest: self.guests[n].name.clone() });
            }
            FromVm::Ended { how, .. } => self.on_guest_end(n, how),
            FromVm::Failed { what } => self.guests[n].error = Some(what),
            FromVm::Panicked { .. } => self.events.warn(format!("{}: its kernel panicked", self.guests[n].name)),
            FromVm::DeviceFailed { device, what, .. } => {
                self.events.warn(format!("{}: passed-through device {device}: {what}", self.guests[n].name));
            }
            FromVm::LinkUp { .. }
            | FromVm::Plugged { .. }
            | FromVm::Released { .. }
            | FromVm::Disconnected { .. }
            | FromVm::Snapshot { .. } => {}
            FromVm::Lost { device, link, at, cause } => self.on_lost((n, device), link, Time(at), &cause),
            FromVm::Live { device, generation, at, outage: OutageCounts::Net(masked) } => {
                self.on_end_live((n, device), generation, Time(at), masked);
            }
            FromVm::Live { device, generation, outage: OutageCounts::Sound(masked), .. } => {
                self.on_sound_live((n, device), generation, masked);
            }
            FromVm::SameNetwork { device, generation } => {
                if let Some((driver, _)) = self.served(n, device) {
                    self.on_same_network(driver, generation);
                }
            }
            FromVm::Pace { device, generation, steps } => self.on_pace(n, device, generation, steps),
            FromVm::RxMode { device, mode } => {
                if let Some(net) = self.guests[n].net_mut(device) {
                    net.mode = mode;
                    self.pass_on(n, device, Setting::Mode);
                }
            }
            FromVm::ForeignAddress { device, mac } => {
                self.events.warn(format!(
                    "{}: {device} uses {mac}, which is another's address on the NIC that it shares; frames with it are dropped \
                     (`allow_any_source` lets them pass)",
                    self.guests[n].name
                ));
            }
            FromVm::Offloads { device, offloads } => {
                if let Some(net) = self.guests[n].net_mut(device) {
                    net.offloads = offloads;
                    self.pass_on(n, device, Setting::Offloads);
                }
            }
            FromVm::Status { device, status } => self.guests[n].keep_status(device, status),
        }
    }

    fn on_pace(&mut self, guest: usize, device: DeviceId, generation: Generation, steps: PaceSteps) {
        let Some((driver, _)) = self.served(guest, device) else { return };
        self.events.tell(&Event::Pace {
            guest: self.guests[guest].name.clone(),
            device: device.to_string(),
            driver: self.drivers[driver].name.clone(),
            generation: generation.get(),
            steps,
        });
    }

    /// The driver VM behind a guest's device, and as which of its ends.
    pub(super) fn served(&self, guest: usize, device: DeviceId) -> Option<(usize, End)> {
        self.guests[guest].driver_of(device)
    }

    fn on_end_live(
        &mut self,
        (guest, device): (usize, DeviceId),
        generation: Generation,
        at: Time,
        masked: MaskedCounts,
    ) {
        let Some((d, end)) = self.served(guest, device) else { return };
        let driver = &mut self.drivers[d];
        let by_itself = driver.is_spare(generation);
        if !by_itself && !driver.is_current(generation) {
            return;
        }
        driver.live_at = driver.live_at.max(Some(at));
        driver.frames.logged += masked.logged;
        driver.frames.replayed += masked.replayed;
        driver.frames.dropped += masked.dropped;
        driver.frames.unknown += masked.unknown;
        tracing::debug!(end, at = at.0, by_itself, "end live");
        if by_itself {
            return self.drive(d, Input::SpareLive(end));
        }
        self.drive(d, Input::EndLive(end));
    }

    pub(super) fn read_driver(&mut self, n: usize) {
        for _ in 0..AT_ONCE {
            let Some(life) = &mut self.drivers[n].life else { return };
            match bounds::hear(life.process.channel()) {
                Ok(Incoming::Message(message, _)) => self.on_driver_message(n, message),
                Ok(Incoming::Empty) => return,
                Ok(Incoming::Closed) => {
                    // The process ends. That may take a while: it gives back memory and device first.
                    life.listening = false;
                    return self.fail_driver(n, Source::ProcessExit, "its process ended".into(), Time::now());
                }
                Err(error) => self.fail_driver(n, Source::ControlStream, format!("its process: {error}"), Time::now()),
            }
        }
    }

    fn on_driver_message(&mut self, n: usize, message: FromVm) {
        match message {
            FromVm::Running { at } => self.stage(n, Step::Running, "running", Time(at), String::new()),
            FromVm::Plugged { at } => self.on_plugged(n, Time(at)),
            FromVm::Disconnected { end, link, why } => self.on_disconnected(n, Which::Present, end, link, &why),
            FromVm::Released { .. } => self.drive(n, Input::Released),
            FromVm::Snapshot { news } => self.on_snapshot(n, Which::Present, &news),
            FromVm::Panicked { at } => {
                if let Some(life) = &mut self.drivers[n].life {
                    life.panicked = true;
                }
                self.fail_driver(n, Source::Panic, "kernel panic".into(), Time(at));
            }
            FromVm::Ended { at, how, registers } => {
                let panicked = self.drivers[n].console.fatal().is_some_and(Fatal::panics);
                let Some(life) = &mut self.drivers[n].life else { return };
                life.registers = registers;
                let what = match how {
                    VmEnd::Reset if panicked => "kernel panic",
                    VmEnd::PowerOff => "it powered off",
                    VmEnd::Reset => "it was reset",
                    VmEnd::TripleFault => "triple fault",
                    VmEnd::Error => "KVM could not go on",
                    VmEnd::Killed => "its process was told to end",
                };
                self.fail_driver(n, Source::VmEnd, what.into(), Time(at));
                self.drive(n, Input::Evidence);
            }
            FromVm::DeviceFailed { at, device, what } => {
                self.fail_driver(n, Source::Device, format!("device {device}: {what}"), Time(at));
            }
            FromVm::Failed { what } => {
                self.fail_driver(n, Source::Start, what, Time::now());
            }
            other => tracing::debug!(?other, "a message that is for guests' processes"),
        }
    }

    /// A certain failure of driver VM `n`.
    pub(super) fn fail_driver(&mut self, n: usize, source: Source, what: String, at: Time) {
        let driver = &self.drivers[n];
        // What a first start says of itself is a wrong set-up, which no restart mends. Once a guest is served that is that
        // driver VM's own affair.
        let first = !driver.was_live && matches!(source, Source::Start | Source::Agent);
        let fatal = first && !self.in_service && self.stopping.is_none();
        let why = format!("{}: {what}", driver.name);
        self.drive(n, Input::Failed(Failure { source, what, at }));
        if fatal {
            self.give_up(why);
        }
    }

    pub(super) fn read_console(&mut self, n: usize) {
        let driver = &mut self.drivers[n];
        let Some(life) = &mut driver.life else { return };
        if let Some(pipe) = life.process.console() {
            let before = driver.console.fatal();
            life.talking = driver.console.read(pipe);
            let Some(fatal) = driver.console.fatal().filter(|_| before.is_none()) else { return };
            let source = match fatal {
                Fatal::Panic | Fatal::StuckCpu => Source::Panic,
                Fatal::DeadInterrupt => Source::Device,
            };
            self.fail_driver(n, source, fatal.in_words().into(), Time::now());
        }
    }

    pub(super) fn on_driver_exit(&mut self, n: usize) {
        self.read_driver(n);
        let driver = &mut self.drivers[n];
        let Some(life) = &mut driver.life else { return };
        let Some(status) = life.process.ended() else { return };
        if let Some(pipe) = life.process.console() {
            driver.console.drain(pipe);
        }
        self.process_gone(n, describe_exit(status));
    }

    pub(super) fn read_agent(&mut self, n: usize) {
        let Some(agent) = self.drivers[n].life.as_mut().and_then(|life| life.agent.as_mut()) else { return };
        let flushed = agent.flush();
        let (lines, error) = agent.receive();
        let present = self.drivers[n].present;
        for line in lines {
            if self.drivers[n].present != present {
                // A spare has taken its place: what it has to say does not count any more.
                return;
            }
            match bounds::heard(&line) {
                Ok(message) => self.on_agent_message(n, message),
                Err(what) => return self.fail_driver(n, Source::ControlStream, what, Time::now()),
            }
        }
        if self.drivers[n].present != present {
            return;
        }
        match error.or(flushed.err()) {
            Some(error) => self.lose_agent(n, &error),
            None => self.send_settings(n, Which::Present),
        }
    }

    /// Sends `message` to the agent of driver VM `n`.
    pub(super) fn tell_agent(&mut self, n: usize, message: &ToAgent) {
        if let Err(error) = self.drivers[n].send(Which::Present, message) {
            self.lose_agent(n, &error);
        }
    }

    pub(super) fn lose_agent(&mut self, n: usize, error: &LineError) {
        if let Some(life) = &mut self.drivers[n].life {
            life.agent = None;
        }
        let what = format!("its agent's control stream: {error}");
        let failure = Failure { source: Source::ControlStream, what, at: Time::now() };
        let closed = matches!(error, LineError::Closed);
        self.drive(n, if closed { Input::Sign(failure) } else { Input::Failed(failure) });
    }

    pub(super) fn on_agent_message(&mut self, n: usize, message: FromAgent) {
        let now = Time::now();
        match message {
            FromAgent::Ready { loaded } => self.on_agent_ready(n, Which::Present, loaded),
            FromAgent::Hello { generation, kernel, .. } => {
                let driver = &mut self.drivers[n];
                if !Generation::new(generation).is_some_and(|generation| driver.is_current(generation)) {
                    let what = format!("its agent says that it is generation {generation}");
                    return self.fail_driver(n, Source::ControlStream, what, now);
                }
                driver.kernel = Some(text(&kernel));
                self.stage(n, Step::Hello, "hello", now, text(&kernel));
                self.drive(n, Input::Hello);
                self.rescan(n);
            }
            // Of interest before there is a device to wait for: in a standby.
            FromAgent::Loaded { .. } => {}
            FromAgent::NicFound { .. } => self.drive(n, Input::Applying),
            FromAgent::Nic { driver, interface, .. } => {
                self.drivers[n].kernel_driver = Some(text(&driver));
                let detail = format!("{} {}", text(&driver), text(&interface));
                self.stage(n, Step::Nic, "nic", now, detail);
            }
            FromAgent::Sound { driver, card, .. } => self.on_sound_card(n, text(&driver), &card),
            FromAgent::Forwarding { .. } => {
                self.stage(n, Step::Forwarding, "forwarding", now, String::new());
                self.drive(n, Input::Forwarding);
            }
            FromAgent::Carrier { up, .. } => self.on_carrier(n, if up { Carrier::Up } else { Carrier::Down }),
            FromAgent::Heartbeat { available_memory, .. } => {
                self.drivers[n].available_memory = Some(available_memory);
                self.drive(n, Input::Heartbeat);
            }
            FromAgent::Failed { what } => self.fail_driver(n, Source::Agent, text(&what), now),
        }
    }

    /// A life of driver VM `n` got on.
    pub(super) fn stage(&mut self, n: usize, step: Step, stage: &'static str, at: Time, detail: String) {
        let driver = &mut self.drivers[n];
        if driver.life.is_none() || driver.timeline.at(step).is_some() {
            return;
        }
        driver.timeline.mark(step, at);
        self.told_stage(n, step, stage, detail);
    }

    /// Tells of a step that is on the time line.
    pub(super) fn told_stage(&mut self, n: usize, step: Step, stage: &'static str, detail: String) {
        let driver = &self.drivers[n];
        let Some(generation) = driver.life.as_ref().map(|life| life.generation.get()) else { return };
        let ms = driver.timeline.between(Step::Spawn, step).map_or(0.0, milliseconds);
        self.events.tell(&Event::DriverStage { driver: driver.name.clone(), generation, stage, ms, detail });
    }
}
