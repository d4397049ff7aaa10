//! What VM processes and agents say, and what the supervisor makes of it.

use umbra_driver_vm::protocol::{FromAgent, ToAgent};
use umbra_shadow::Generation;

use super::console::Fatal;
use super::driver::Role;
use super::events::Event;
use super::guest::GuestState;
use super::lifecycle::{Carrier, End, Failure, Input, Source, State};
use super::lines::LineError;
use super::report::Mask;
use super::run::Supervisor;
use super::settings::{Setting, Which};
use super::time::{Time, milliseconds};
use super::timeline::Step;
use crate::process::channel::Incoming;
use crate::process::ipc::{DeviceIndex, FromVm, MaskedCounts, PaceSteps, ToVm, VmEnd};
use crate::process::spawn::describe_exit;

/// Messages handled at a turn of the loop for one process: one that floods must not starve the rest.
const AT_ONCE: usize = 64;

/// What a splitter says of a link whose other end is gone.
const CLOSED: &str = "closed";

impl Supervisor {
    /// Sends `message` to guest `n`.
    pub(super) fn tell_guest(&mut self, n: usize, message: &ToVm) {
        if let Err(error) = self.guests[n].tell(message, None) {
            self.events.warn(format!("{}: {error}", self.guests[n].name));
        }
    }

    pub(super) fn read_guest(&mut self, n: usize) {
        if let Err(error) = self.guests[n].send_on() {
            self.events.warn(format!("{}: {error}", self.guests[n].name));
        }
        for _ in 0..AT_ONCE {
            let Some(process) = &self.guests[n].process else { return };
            match process.channel().try_receive::<FromVm>() {
                Ok(Incoming::Message(message, _)) => self.on_guest_message(n, message),
                Ok(Incoming::Empty) => return,
                Ok(Incoming::Closed) => {
                    self.guests[n].listening = false;
                    return;
                }
                Err(error) => self.events.warn(format!("{}: {error}", self.guests[n].name)),
            }
        }
    }

    fn on_guest_message(&mut self, n: usize, message: FromVm) {
        match message {
            FromVm::Running { .. } => {
                self.guests[n].state = GuestState::Running;
                self.events.tell(&Event::GuestRunning { guest: self.guests[n].name.clone() });
            }
            FromVm::Ended { how, .. } => self.on_guest_end(n, how),
            FromVm::Failed { what } => self.guests[n].error = Some(what),
            FromVm::Panicked { .. } => self.events.warn(format!("{}: its kernel panicked", self.guests[n].name)),
            FromVm::DeviceFailed { device, what, .. } => {
                self.events.warn(format!("{}: passed-through device {device}: {what}", self.guests[n].name));
            }
            FromVm::LinkUp { .. } | FromVm::Plugged { .. } | FromVm::Released { .. } => {}
            FromVm::LinkLost { net, generation, at, cause } => {
                let served = self.served_by(n, net);
                self.on_link_lost((n, format!("net{net}")), served, generation, Time(at), &cause);
            }
            FromVm::SoundLost { sound, generation, at, cause } => {
                let served = self.played_by(n, sound);
                self.on_link_lost((n, format!("sound{sound}")), served, generation, Time(at), &cause);
            }
            FromVm::SoundLive { sound, generation, at, masked } => {
                self.on_sound_live(n, sound, generation, Time(at), masked);
            }
            FromVm::SoundStatus { sound, .. } => {
                if let Some(device) = self.guests[n].sounds.get_mut(usize::from(sound)) {
                    device.status = Some(message);
                    device.fresh = true;
                }
            }
            FromVm::Live { net, generation, at, masked } => self.on_end_live(n, net, generation, Time(at), masked),
            FromVm::SameNetwork { net, generation } => {
                if let Some((driver, _)) = self.served_by(n, net) {
                    self.on_same_network(driver, generation);
                }
            }
            FromVm::Pace { device, generation, steps } => self.on_pace(n, device, generation, steps),
            FromVm::RxMode { net, mode } => {
                if let Some(device) = self.guests[n].nets.get_mut(usize::from(net)) {
                    device.mode = mode;
                    self.pass_on(n, net, Setting::Mode);
                }
            }
            FromVm::Offloads { net, offloads } => {
                if let Some(device) = self.guests[n].nets.get_mut(usize::from(net)) {
                    device.offloads = offloads;
                    self.pass_on(n, net, Setting::Offloads);
                }
            }
            FromVm::NetStatus { net, .. } => {
                if let Some(device) = self.guests[n].nets.get_mut(usize::from(net)) {
                    device.status = Some(message);
                    device.fresh = true;
                }
            }
        }
    }

    fn on_pace(&mut self, guest: usize, device: DeviceIndex, generation: Generation, steps: PaceSteps) {
        let (served, device) = match device {
            DeviceIndex::Net(net) => (self.served_by(guest, net), format!("net{net}")),
            DeviceIndex::Sound(sound) => (self.played_by(guest, sound), format!("sound{sound}")),
        };
        let Some((driver, _)) = served else { return };
        self.events.tell(&Event::Pace {
            guest: self.guests[guest].name.clone(),
            device,
            driver: self.drivers[driver].name.clone(),
            generation: generation.get(),
            steps,
        });
    }

    /// The driver VM behind a guest's network device, and as which of its ends.
    pub(super) fn served_by(&self, guest: usize, net: u16) -> Option<(usize, usize)> {
        self.guests[guest].nets.get(usize::from(net))?.driver
    }

    fn on_guest_end(&mut self, n: usize, how: VmEnd) {
        self.guests[n].end = Some(how);
        if how == VmEnd::Reset && self.stopping.is_none() {
            // Known before its process ends, so that driver VMs which miss its links are not taken for failed.
            self.guests[n].state = GuestState::Rebooting;
            self.events.tell(&Event::GuestRebooted { guest: self.guests[n].name.clone() });
            for (driver, _) in self.guests[n].drivers() {
                self.drive(driver, Input::Replace(format!("{} was rebooted", self.guests[n].name)));
            }
        }
    }

    pub(super) fn on_guest_exit(&mut self, n: usize) {
        self.read_guest(n);
        let guest = &mut self.guests[n];
        let Some(status) = guest.process.as_mut().and_then(|process| process.ended()) else { return };
        guest.process = None;
        let never_ran = guest.state == GuestState::Starting;
        if guest.state == GuestState::Rebooting && self.stopping.is_none() {
            return self.restart_guest(n);
        }
        let failure = match (guest.error.take(), guest.end) {
            (Some(error), _) => Some(error),
            (None, Some(VmEnd::PowerOff | VmEnd::Reset | VmEnd::Killed)) => None,
            (None, Some(VmEnd::TripleFault)) => Some("triple fault (its kernel crashed without a word)".into()),
            (None, Some(VmEnd::Error)) => Some("KVM could not go on".into()),
            (None, None) if self.stopping.is_some() => None,
            (None, None) => Some(describe_exit(status)),
        };
        let killed = guest.end.is_none_or(|end| end == VmEnd::Killed);
        let told = failure.clone().unwrap_or_else(|| if killed { "killed" } else { "powered off" }.into());
        self.events.tell(&Event::GuestEnded { guest: guest.name.clone(), how: told });
        guest.state = failure.clone().map_or(GuestState::Off, GuestState::Failed);
        if let Some(why) = failure {
            let why = format!("{}: {why}", self.guests[n].name);
            // A machine that does not come up whole does not come up.
            if never_ran {
                self.give_up(why)
            } else {
                let _ = self.failure.get_or_insert(why);
            }
        }
        for (driver, end) in self.guests[n].drivers() {
            self.drive(driver, Input::EndGone(end));
            if self.drivers[driver].lifecycle.ends().next().is_none() {
                self.drive(driver, Input::Stop);
            }
        }
    }

    pub(super) fn restart_guest(&mut self, n: usize) {
        if let Err(error) = self.guests[n].start(&self.program) {
            let why = format!("{}: {error}", self.guests[n].name);
            self.guests[n].state = GuestState::Failed(why.clone());
            return self.give_up(why);
        }
        self.tell_quarantines(n);
        for driver in 0..self.drivers.len() {
            self.attach_links(driver, Role::Serves);
        }
    }

    fn on_link_lost(
        &mut self,
        (guest, device): (usize, String),
        served: Option<(usize, End)>,
        generation: Generation,
        at: Time,
        cause: &str,
    ) {
        let Some((d, _)) = served else { return };
        let guest = self.guests[guest].name.clone();
        let driver = &mut self.drivers[d];
        // It waits, and no guest has lost anything.
        if driver.lifecycle.standby().generation() == Some(generation) {
            let why = format!("its link to {guest}.{device}: {cause}");
            // Mostly the echo of a death whose own sign is on its way; but a spare is not to be taken any more.
            if cause == CLOSED && driver.spare.is_none() {
                return driver.suspect_standby(why);
            }
            return self.drive(d, Input::StandbyFailed(why));
        }
        let retired = driver.has_retired(generation);
        if driver.lifecycle.generation() != Some(generation) && !retired {
            return;
        }
        self.events.tell(&Event::Masked {
            guest: guest.clone(),
            device: device.clone(),
            driver: driver.name.clone(),
            generation: generation.get(),
            cause: cause.into(),
        });
        driver.masks.push(Mask { guest: guest.clone(), device: device.clone(), at_ns: at.0, cause: cause.into() });
        if driver.life.is_none() || retired || *driver.lifecycle.state() == State::Stopping {
            driver.timeline.mark(Step::Mask, at);
            return;
        }
        let input = if cause == CLOSED {
            Input::Sign(Failure { source: Source::Link, what: format!("it closed its link to {guest}.{device}"), at })
        } else {
            Input::Failed(Failure { source: Source::Link, what: format!("it broke a rule of its link: {cause}"), at })
        };
        self.drive(d, input);
        if matches!(self.drivers[d].lifecycle.state(), State::Fencing { .. }) {
            self.drivers[d].timeline.mark(Step::Mask, at);
        }
    }

    fn on_end_live(&mut self, guest: usize, net: u16, generation: Generation, at: Time, masked: MaskedCounts) {
        let Some((d, end)) = self.served_by(guest, net) else { return };
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
            match life.process.channel().try_receive::<FromVm>() {
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
            FromVm::Released { .. } => self.drive(n, Input::Released),
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
        // What a first start says of itself is a wrong set-up, which no restart mends.
        let fatal = !driver.was_live && matches!(source, Source::Start | Source::Agent) && self.stopping.is_none();
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
            match serde_json::from_str::<FromAgent>(&line) {
                Ok(message) => self.on_agent_message(n, message),
                Err(error) => {
                    let what = format!("its agent sent what is no message ({error})");
                    return self.fail_driver(n, Source::ControlStream, what, Time::now());
                }
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

    fn on_agent_message(&mut self, n: usize, message: FromAgent) {
        let now = Time::now();
        match message {
            FromAgent::Hello { generation, kernel, .. } => {
                let driver = &mut self.drivers[n];
                if !Generation::new(generation).is_some_and(|generation| driver.is_current(generation)) {
                    let what = format!("its agent says that it is generation {generation}");
                    return self.fail_driver(n, Source::ControlStream, what, now);
                }
                driver.kernel = Some(limited(&kernel));
                self.stage(n, Step::Hello, "hello", now, limited(&kernel));
                self.drive(n, Input::Hello);
                self.rescan(n);
            }
            // Of interest before there is a device to wait for: in a standby.
            FromAgent::Loaded { .. } => {}
            FromAgent::NicFound { .. } => self.drive(n, Input::Applying),
            FromAgent::Nic { driver, interface, .. } => {
                self.drivers[n].kernel_driver = Some(limited(&driver));
                let detail = format!("{} {}", limited(&driver), limited(&interface));
                self.stage(n, Step::Nic, "nic", now, detail);
            }
            FromAgent::Sound { driver, card, .. } => self.on_sound_card(n, limited(&driver), &card),
            FromAgent::Forwarding { .. } => {
                self.stage(n, Step::Forwarding, "forwarding", now, String::new());
                self.drive(n, Input::Forwarding);
            }
            FromAgent::Carrier { up, .. } => self.on_carrier(n, if up { Carrier::Up } else { Carrier::Down }),
            FromAgent::Heartbeat { available_memory, .. } => {
                self.drivers[n].available_memory = Some(available_memory);
                self.drive(n, Input::Heartbeat);
            }
            FromAgent::Failed { what } => self.fail_driver(n, Source::Agent, limited(&what), now),
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

/// What a driver VM says of itself, fit to be shown: no control characters, not too long.
pub(super) fn limited(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect()
}
