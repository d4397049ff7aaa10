//! The last words of a failed life: its process has given the device up and lost its links, and runs on for a moment,
//! beside the recovery, so that the stack of a panic and the registers come into the crash report.
//!
//! Invariant: nothing waits for it, and it is killed when its time is over.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::DriverVm;
use super::console::Console;
use super::life::{Heard, Life, Part};
use super::standby::renice;
use crate::base::time::Time;
use crate::lifecycle::{Input, NoticedBy};
use crate::record::crash_report::CrashReport;
use crate::supervisor::ids::DriverId;
use crate::supervisor::run::Supervisor;
use crate::wire::messages::{FromVm, ToVm};
use crate::wire::spawn::{VmProcess, describe_exit};

/// Time for the last words after the first line of a panic, which is followed by the stack, and only then by pvpanic or the reset.
/// On hardware that takes some ten milliseconds; where the console is slower, the evidence is cut off here.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Time for the first line of a panic that was seen before it.
const FIRST_WORD: Duration = Duration::from_millis(300);

/// Nice value of a failed life's process: the recovery goes before it.
pub(in crate::supervisor) const LAST: i32 = 19;

/// Time for the process, which comes last on a busy machine, to hand over its registers before it is killed.
const EVIDENCE: Duration = Duration::from_millis(500);

/// Time for a failed life to give its device up where a spare has taken its place. Longer than the limit of a fence that a recovery
/// waits for, because nobody waits here.
const RELEASE: Duration = Duration::from_secs(1);

/// A failed life without its device.
#[derive(Debug)]
pub(in crate::supervisor) struct Dying {
    pub(super) life: Life,
    pub(super) console: Console,
    stage: Stage,
    /// It still has its device, and may keep it until this time. Set where a spare has taken its place, so that no recovery waits.
    pub(in crate::supervisor) holds: Option<Time>,
    /// The report of its failure as last written. It is kept here because the driver VM's own becomes that of the next failure, if
    /// one comes before this life is over.
    pub(in crate::supervisor) report: Option<CrashReport>,
}

/// A process that was killed, until its end is seen.
#[derive(Debug)]
pub(in crate::supervisor) struct Ending {
    process: VmProcess,
    /// It still has the device that the spare is to get: its end is reported as [`Input::SpareFenced`].
    holds: bool,
}

impl Ending {
    pub(in crate::supervisor) fn pidfd(&self) -> BorrowedFd<'_> {
        self.process.pidfd()
    }
}

impl DriverVm {
    /// Its processes that have not been seen to end.
    pub(in crate::supervisor) fn processes(&self) -> impl Iterator<Item = &VmProcess> {
        let lives = self.lives().map(|(_, life)| &life.process);
        lives.chain(self.ending.iter().map(|ending| &ending.process))
    }
}

impl Dying {
    /// Whether it has just given up the device that it still held.
    fn on(&mut self, heard: Heard) -> bool {
        match heard {
            Heard::Process(FromVm::Panicked { .. }) => self.stage.ends_by(Time::now()),
            Heard::Fatal(_) => self.stage.ends_by(Time::now() + LAST_WORDS),
            Heard::Process(FromVm::Ended { registers, .. }) => self.life.registers = registers,
            Heard::Process(FromVm::Released { .. }) => return self.holds.take().is_some(),
            _ => {}
        }
        false
    }

    /// Hears what it has said so far; whether it has given its device up by that.
    fn hear_last(&mut self) -> bool {
        let mut released = false;
        for heard in self.life.hear(Part::Control, &mut self.console) {
            released |= self.on(heard);
        }
        self.life.drain(&mut self.console);
        released
    }
}

/// How far the end of a failed life has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// It may print and report until this time.
    Speaking(Time),
    /// It was asked to end, and has until this time to hand over its registers.
    Asked(Time),
    /// It was killed.
    Killed,
}

impl Stage {
    /// What it may still say it has said by `time`.
    fn ends_by(&mut self, time: Time) {
        if let Self::Speaking(until) = self {
            *until = time.min(*until);
        }
    }
}

impl Supervisor {
    /// The present life of driver VM `n` has given its device up: it may say its last words, beside the recovery.
    pub(in crate::supervisor) fn begin_last_words(&mut self, n: DriverId) {
        let now = Time::now();
        self.set_aside(n, now);
        self.drivers[n].press_on(now);
    }

    /// The present life of driver VM `n` becomes the dying one.
    fn set_aside(&mut self, n: DriverId, now: Time) {
        let driver = &mut self.drivers[n];
        // Its agent's stream stays open, and nobody reads it: what an agent has to say does not count any more.
        let Some(life) = driver.life.take() else { return };
        driver.gone = now;
        driver.available_memory = None;
        // The recovery needs the processors more.
        renice(&life.process, LAST);
        let speaks = driver.report.as_ref().is_some_and(|report| report.source == NoticedBy::Panic) && !life.panicked;
        let console = driver.console.split_off();
        let silent_yet = console.fatal().is_none();
        let until = match speaks {
            true if silent_yet => now + FIRST_WORD + LAST_WORDS,
            true => now + LAST_WORDS,
            false => now,
        };
        self.finish_last_words(n, "its process was killed".into());
        let driver = &mut self.drivers[n];
        driver.dying = Some(Dying { life, console, stage: Stage::Speaking(until), holds: None, report: None });
    }

    /// The present life of driver VM `n` is to give its device up; nothing waits for it.
    pub(in crate::supervisor) fn retire(&mut self, n: DriverId, now: Time) {
        self.set_aside(n, now);
        let driver = &mut self.drivers[n];
        let Some(dying) = &mut driver.dying else { return };
        dying.holds = Some(if dying.life.process.ask_to_release() { now + RELEASE } else { now });
        driver.press_on(now);
    }

    /// The dying life of driver VM `n` has said or done something.
    pub(super) fn on_dying(&mut self, n: DriverId, heard: Heard) {
        if let Heard::Exited(exit) = heard {
            return self.finish_last_words(n, describe_exit(exit));
        }
        if self.drivers[n].dying.as_mut().is_some_and(|dying| dying.on(heard)) {
            self.drive(n, Input::SpareFenced);
        }
    }

    /// A process that was killed has ended.
    pub(in crate::supervisor) fn on_ending(&mut self, n: DriverId) {
        let mut fenced = false;
        self.drivers[n].ending.retain_mut(|ending| {
            let ended = ending.process.ended().is_some();
            fenced |= ended && ending.holds;
            !ended
        });
        if fenced {
            self.drive(n, Input::SpareFenced);
        }
    }

    /// Completes the report of the dying life with what it has said and with `exit`, and kills its process if it still runs.
    fn finish_last_words(&mut self, n: DriverId, exit: String) {
        let driver = &mut self.drivers[n];
        let Some(mut dying) = driver.dying.take() else { return };
        let released = dying.hear_last();
        let generation = dying.life.generation.get();
        driver.console.append(&format!("{}.{generation} (its last words)", driver.name), &mut dying.console);
        let registers = std::mem::take(&mut dying.life.registers);
        let gone = dying.life.process.ended().is_some();
        let held = released || dying.holds.is_some();
        // Whoever still holds a device is waited for.
        driver.reap(dying.life.process, held && !released);
        let held = held && (released || gone);
        if driver.report.as_ref().is_some_and(|report| report.generation == generation) {
            driver.take_evidence(exit, registers, dying.console.tail());
            self.write_report(n);
            if held {
                self.drive(n, Input::SpareFenced);
            }
        } else if let Some(mut report) = dying.report {
            report.take_evidence(exit, registers, dying.console.tail());
            self.write(&report);
            if held {
                self.drive(n, Input::SpareFenced);
            }
        } else if held {
            self.drive(n, Input::SpareFenced);
        }
    }
}

impl DriverVm {
    /// Kills `process`, if it has not ended, and leaves it to the loop to see its end. `holds`: it still has the device that the
    /// spare is to get.
    pub(super) fn reap(&mut self, mut process: VmProcess, holds: bool) {
        if process.ended().is_none() {
            process.kill();
            self.ending.push(Ending { process, holds });
        }
    }

    /// When [`Self::press_on`] has something to do.
    pub(in crate::supervisor) fn press_on_due(&self) -> Option<Time> {
        let dying = self.dying.as_ref()?;
        match dying.stage {
            Stage::Speaking(until) | Stage::Asked(until) => Some(dying.holds.map_or(until, |holds| holds.min(until))),
            Stage::Killed => None,
        }
    }

    /// Takes the next step towards the end of the dying life, if the time for the present one is over.
    pub(in crate::supervisor) fn press_on(&mut self, now: Time) {
        let Some(dying) = self.dying.as_mut() else { return };
        if dying.holds.is_some_and(|until| until <= now) && dying.stage != Stage::Killed {
            dying.life.process.kill();
            dying.stage = Stage::Killed;
        }
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
}
