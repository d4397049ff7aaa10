//! The present life: what its process, its agent and its console say, and which failure or progress that is.

use umbra_driver_vm::protocol::{FromAgent, ToAgent};
use umbra_shadow::Generation;

use super::console::Fatal;
use super::life::{Heard, LifeRole};
use crate::base::error::chain;
use crate::base::lines::LineError;
use crate::base::time::{Time, milliseconds};
use crate::lifecycle::{Carrier, Failure, Input, NoticedBy};
use crate::record::events::Event;
use crate::record::timeline::{LifeStage, Milestone};
use crate::supervisor::bounds::{confined, text};
use crate::supervisor::ids::DriverId;
use crate::supervisor::run::Supervisor;
use crate::supervisor::run_error::WhyFailed;
use crate::wire::messages::{FromVm, VmEnd};
use crate::wire::spawn::{VmProcess, describe_exit};

impl Supervisor {
    /// The present life of driver VM `n` has said or done something.
    pub(super) fn on_present(&mut self, n: DriverId, heard: Heard) {
        let now = Time::now();
        match heard {
            Heard::Process(message) => self.on_driver_message(n, message),
            Heard::ControlClosed => {
                let process = self.drivers[n].life.as_ref().map(|life| &life.process);
                let what = process.map(VmProcess::describe_closed).unwrap_or_default();
                self.fail_driver(n, NoticedBy::ProcessExit, what, now);
            }
            Heard::Agent(message) => self.on_agent_message(n, message),
            Heard::ControlBroken(what) => {
                self.fail_driver(n, NoticedBy::ControlStream, what, now);
                // It is not the program that was started any more: it is killed, and asked for nothing.
                self.drive(n, Input::Evidence);
            }
            Heard::Nonsense(what) => self.fail_driver(n, NoticedBy::ControlStream, what, now),
            Heard::AgentLost(error) => self.lose_agent(n, &error),
            Heard::Fatal(fatal) => {
                let source = match fatal {
                    Fatal::Panic | Fatal::StuckCpu => NoticedBy::Panic,
                    Fatal::DeadInterrupt => NoticedBy::Device,
                };
                self.fail_driver(n, source, fatal.in_words(), now);
            }
            Heard::Exited(exit) => self.process_gone(n, describe_exit(exit)),
        }
    }

    fn on_driver_message(&mut self, n: DriverId, message: FromVm) {
        match message {
            FromVm::Running { at } => self.stage(n, LifeStage::Running, Time(at), String::new()),
            FromVm::Plugged { at } => self.on_plugged(n, Time(at)),
            FromVm::Disconnected { end, link, why } => self.on_disconnected(n, LifeRole::Present, end, link, &why),
            FromVm::Released { .. } => self.drive(n, Input::Released),
            FromVm::Snapshot { news } => self.on_snapshot(n, LifeRole::Present, &news),
            FromVm::Panicking { at } => self.fail_driver(n, NoticedBy::Panic, "kernel panic", Time(at)),
            FromVm::Panicked { at } => {
                if let Some(life) = &mut self.drivers[n].life {
                    life.panicked = true;
                }
                self.fail_driver(n, NoticedBy::Panic, "kernel panic", Time(at));
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
                self.fail_driver(n, NoticedBy::VmEnd, what, Time(at));
                self.drive(n, Input::Evidence);
            }
            FromVm::DeviceFailed { at, device, what } => {
                self.fail_driver(n, NoticedBy::Device, format!("device {device}: {what}"), Time(at));
            }
            FromVm::Confined { thread, call } => {
                self.fail_driver(n, NoticedBy::Confinement, confined(&thread, call), Time::now());
            }
            FromVm::Failed { what, configuration } => {
                self.fail_driver(n, NoticedBy::Start, WhyFailed { what, configuration }, Time::now());
            }
            other => tracing::debug!(?other, "a message that is for guests' processes"),
        }
    }

    /// A certain failure of driver VM `n`.
    pub(in crate::supervisor) fn fail_driver(
        &mut self,
        n: DriverId,
        source: NoticedBy,
        why: impl Into<WhyFailed>,
        at: Time,
    ) {
        let WhyFailed { what, configuration } = why.into();
        let driver = &self.drivers[n];
        // A failure that a first start reports itself is a wrong set-up, which a restart would not cure. It ends the machine,
        // unless a guest is served already.
        let first = !driver.was_live && matches!(source, NoticedBy::Start | NoticedBy::Agent);
        let fatal = first && !self.in_service && self.stopping.is_none();
        let why = WhyFailed { what: format!("{}: {what}", driver.name), configuration };
        self.drive(n, Input::Failed(Failure { source, what, at }));
        if fatal {
            self.give_up(why);
        }
    }

    /// Sends `message` to the agent of driver VM `n`.
    pub(in crate::supervisor) fn tell_agent(&mut self, n: DriverId, message: &ToAgent) {
        if let Err(error) = self.drivers[n].send(LifeRole::Present, message) {
            self.lose_agent(n, &error);
        }
    }

    pub(in crate::supervisor) fn lose_agent(&mut self, n: DriverId, error: &LineError) {
        if let Some(life) = &mut self.drivers[n].life {
            life.drop_agent();
        }
        let what = format!("its agent's control stream: {}", chain(error));
        let failure = Failure { source: NoticedBy::ControlStream, what, at: Time::now() };
        let closed = matches!(error, LineError::Closed);
        self.drive(n, if closed { Input::Sign(failure) } else { Input::Failed(failure) });
    }

    pub(in crate::supervisor) fn on_agent_message(&mut self, n: DriverId, message: FromAgent) {
        let now = Time::now();
        match message {
            FromAgent::Ready { loaded, unused } => self.on_agent_ready((n, LifeRole::Present), loaded, unused),
            FromAgent::Hello { generation, kernel, panic_entries, .. } => {
                let driver = &mut self.drivers[n];
                let current = Generation::new(generation).filter(|generation| driver.is_current(*generation));
                let Some(life_generation) = current else {
                    let what = format!("its agent says that it is generation {generation}");
                    return self.fail_driver(n, NoticedBy::ControlStream, what, now);
                };
                driver.kernel = Some(text(&kernel));
                driver.trust.said_hello(life_generation);
                if let Some(life) = &driver.life {
                    life.watch_for_panic(panic_entries);
                }
                self.stage(n, LifeStage::Hello, now, text(&kernel));
                self.drive(n, Input::Hello);
                self.rescan(n);
            }
            // Of interest only in a standby, before there is a device to wait for.
            FromAgent::Loaded { .. } => {}
            FromAgent::NicFound { .. } => self.drive(n, Input::Applying),
            FromAgent::Nic { driver, interface, .. } => {
                self.drivers[n].kernel_driver = Some(text(&driver));
                let detail = format!("{} {}", text(&driver), text(&interface));
                self.stage(n, LifeStage::Nic, now, detail);
            }
            FromAgent::Sound { driver, card, .. } => self.on_sound_card(n, text(&driver), &card),
            FromAgent::Disks { driver, disks, .. } => self.on_disks(n, text(&driver), &disks),
            FromAgent::DiskError { end, attempt, errno } => {
                tracing::debug!(end, attempt, errno, "an error of a disk");
                self.on_disk_error(n, end, attempt);
            }
            FromAgent::AtRest { stable } => self.on_agent_at_rest(n, stable),
            FromAgent::Forwarding { .. } => {
                self.stage(n, LifeStage::Forwarding, now, String::new());
                self.drive(n, Input::Forwarding);
            }
            FromAgent::Carrier { up, mode, .. } => {
                self.on_carrier(n, if up { Carrier::Up } else { Carrier::Down }, mode)
            }
            FromAgent::Heartbeat { available_memory, .. } => {
                self.drivers[n].available_memory = Some(available_memory);
                self.drive(n, Input::Heartbeat);
            }
            FromAgent::Failed { what } => self.fail_driver(n, NoticedBy::Agent, text(&what), now),
        }
    }

    /// The present life of driver VM `n` has reached `stage` at `at`; reported once in a life.
    pub(in crate::supervisor) fn stage(&mut self, n: DriverId, stage: LifeStage, at: Time, detail: String) {
        let driver = &mut self.drivers[n];
        if driver.life.is_none() || driver.timeline.at(stage.milestone()).is_some() {
            return;
        }
        driver.timeline.mark(stage.milestone(), at);
        self.told_stage(n, stage, detail);
    }

    /// Reports a step that is on the time line already.
    pub(in crate::supervisor) fn told_stage(&mut self, n: DriverId, stage: LifeStage, detail: String) {
        let driver = &self.drivers[n];
        let Some(generation) = driver.life.as_ref().map(|life| life.generation.get()) else { return };
        let ms = driver.timeline.between(Milestone::Spawn, stage.milestone()).map_or(0.0, milliseconds);
        self.events.tell(&Event::DriverStage { driver: driver.name.clone(), generation, stage, ms, detail });
    }
}
