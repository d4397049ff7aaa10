//! The last words of a failed life: its process has given the device up and lost its links, and runs on for a moment,
//! beside the recovery, so that the stack of a panic and the registers come into the crash report.
//!
//! Invariant: nothing waits for it, and it is killed when its time is over.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::console::Console;
use super::driver::{DriverVm, Life};
use super::lifecycle::Source;
use super::run::Supervisor;
use super::standby::renice;
use super::time::Time;
use crate::process::channel::Incoming;
use crate::process::ipc::{FromVm, ToVm};
use crate::process::spawn::describe_exit;

/// The first line of a panic is followed by the stack, and only then by pvpanic or the reset. On hardware that takes
/// some ten milliseconds; where the console is slower, the evidence is cut off here.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Its nice value.
const LAST: i32 = 19;

/// How long the process may take to hand over its registers before it is killed.
const EVIDENCE: Duration = Duration::from_millis(50);

/// A failed life without its device.
#[derive(Debug)]
pub(super) struct Dying {
    life: Life,
    console: Console,
    stage: Stage,
}

/// How far its end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It may speak until then.
    Speaking(Time),
    /// It hands over its registers until then.
    Asked(Time),
    /// It was killed.
    Killed,
}

/// What of it is ready to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum DyingPart {
    Control,
    Console,
    Exit,
}

impl Supervisor {
    /// The present life of driver VM `n` has no device any more.
    pub(super) fn bury(&mut self, n: usize) {
        let now = Time::now();
        let driver = &mut self.drivers[n];
        let Some(mut life) = driver.life.take() else { return };
        // The end of its agent is no news any more.
        life.agent = None;
        driver.gone = now;
        driver.available_memory = None;
        // It must not hold up the recovery.
        renice(life.process.pid(), LAST);
        let speaks = driver.report.as_ref().is_some_and(|report| report.source == Source::Panic) && !life.panicked;
        let console = driver.console.split_off();
        let until = if speaks { now + LAST_WORDS } else { now };
        // A life that failed just before and is not gone yet is killed by its drop.
        driver.dying = Some(Dying { life, console, stage: Stage::Speaking(until) });
        driver.hasten_death(now);
    }

    pub(super) fn on_dying(&mut self, n: usize, part: DyingPart) {
        match part {
            DyingPart::Control => self.drivers[n].hear_dying(),
            DyingPart::Console => self.drivers[n].read_dying_console(),
            DyingPart::Exit => self.on_death(n),
        }
    }

    fn on_death(&mut self, n: usize) {
        let driver = &mut self.drivers[n];
        driver.hear_dying();
        let Some(status) = driver.dying.as_mut().and_then(|dying| dying.life.process.ended()) else { return };
        let Some(mut dying) = driver.dying.take() else { return };
        if let Some(pipe) = dying.life.process.console() {
            dying.console.drain(pipe);
        }
        let generation = dying.life.generation.get();
        driver.console.append(&format!("{}.{generation} (its last words)", driver.name), &mut dying.console);
        if driver.report.as_ref().is_none_or(|report| report.generation != generation) {
            return;
        }
        driver.take_evidence(describe_exit(status), dying.life.registers, dying.console.tail());
        self.write_report(n);
        let driver = &mut self.drivers[n];
        if driver.report.as_ref().is_some_and(|report| report.outage_ms.is_some()) {
            driver.report = None;
        }
    }
}

impl DriverVm {
    pub(super) fn watched_dying(&self) -> impl Iterator<Item = (DyingPart, BorrowedFd<'_>)> {
        let mut watched = Vec::new();
        if let Some(Dying { life, .. }) = &self.dying {
            watched.push((DyingPart::Exit, life.process.pidfd()));
            if life.listening {
                watched.push((DyingPart::Control, life.process.channel().as_fd()));
            }
            if let Some(pipe) = life.process.console().filter(|_| life.talking) {
                watched.push((DyingPart::Console, pipe.as_fd()));
            }
        }
        watched.into_iter()
    }

    /// When [`Self::hasten_death`] has something to do.
    pub(super) fn death_due(&self) -> Option<Time> {
        match self.dying.as_ref()?.stage {
            Stage::Speaking(until) | Stage::Asked(until) => Some(until),
            Stage::Killed => None,
        }
    }

    pub(super) fn hasten_death(&mut self, now: Time) {
        let Some(dying) = self.dying.as_mut() else { return };
        match dying.stage {
            Stage::Speaking(until) if until <= now => {
                let asked = dying.life.process.channel().send_now(&ToVm::Kill, &[]);
                dying.stage = Stage::Asked(if asked.is_ok() { now + EVIDENCE } else { now });
            }
            Stage::Asked(until) if until <= now => {
                dying.life.process.kill();
                dying.stage = Stage::Killed;
            }
            _ => {}
        }
    }

    fn hear_dying(&mut self) {
        let Some(dying) = self.dying.as_mut() else { return };
        match dying.life.process.channel().try_receive::<FromVm>() {
            Ok(Incoming::Message(FromVm::Panicked { .. }, _)) if matches!(dying.stage, Stage::Speaking(_)) => {
                dying.stage = Stage::Speaking(Time::now());
            }
            Ok(Incoming::Message(FromVm::Ended { registers, .. }, _)) => dying.life.registers = registers,
            Ok(Incoming::Closed) | Err(_) => dying.life.listening = false,
            Ok(_) => {}
        }
    }

    fn read_dying_console(&mut self) {
        let Some(dying) = self.dying.as_mut() else { return };
        if let Some(pipe) = dying.life.process.console() {
            dying.life.talking = dying.console.read(pipe);
        }
    }
}
