//! A brake for the emulator: with `UMBRA_BENCH_SPEED=0.25` a test host runs as on a machine four times slower.
//!
//! A thread of the bench stops and continues the emulator's process (`SIGSTOP`, `SIGCONT`) every few milliseconds, so that each of
//! its threads runs for the wanted share of the time. A quota of a control group is another thing: it bounds the sum of all threads,
//! so a single busy virtual CPU runs at full speed until the quota is spent, and a group needs rights and outlives a killed bench.
//! The peer, real time and the clock of the recording go on meanwhile, as they do beside a slow machine.
//!
//! The share is one of the processors, not of the wall's clock: time in which the emulator could run and other load had the
//! processors does not count as run.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::process::{Companion, Process};

/// The share of full speed at which the emulator runs, above 0 and at most 1.
pub const SPEED_VARIABLE: &str = "UMBRA_BENCH_SPEED";

/// The slowest speed that is accepted: below it a test host does not come up within a quarter of an hour.
const SLOWEST: f64 = 0.02;
/// Length of one turn of running and standing still: short beside every time limit of a guest, long beside a wake-up.
const TURN: Duration = Duration::from_millis(20);
/// Longest single stop, where earlier ones came too short: shorter than a player's buffer of 200 ms.
const LONGEST_STOP: Duration = Duration::from_millis(100);

/// `UMBRA_BENCH_SPEED` is no speed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{SPEED_VARIABLE}={0} is no speed; it is the share of full speed at which the emulator runs, from {SLOWEST} to 1, as 0.25"
)]
pub struct SpeedError(String);

/// What the program itself asks for, whatever the variable says.
static ASKED: Mutex<Option<f64>> = Mutex::new(None);

/// Has every test host of this process run at `speed` at most.
pub fn at_most(speed: f64) {
    *ASKED.lock().unwrap_or_else(PoisonError::into_inner) = Some(speed.clamp(SLOWEST, 1.0));
}

/// This process has asked for a slow test host itself.
pub fn is_asked_for() -> bool {
    ASKED.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|speed| speed < 1.0)
}

/// The share of full speed at which test hosts run: what [`at_most`] asked for, or `UMBRA_BENCH_SPEED` where that is less, else 1.
///
/// # Errors
/// The variable holds something else than a number in its range.
pub fn speed() -> Result<f64, SpeedError> {
    let asked = ASKED.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or(1.0);
    Ok(named_speed()?.min(asked))
}

/// The speed that `UMBRA_BENCH_SPEED` names, or 1.
///
/// # Errors
/// As [`speed`].
pub fn named_speed() -> Result<f64, SpeedError> {
    let named = std::env::var_os(SPEED_VARIABLE).map(|text| parse(&text.to_string_lossy())).transpose()?;
    Ok(named.unwrap_or(1.0))
}

fn parse(text: &str) -> Result<f64, SpeedError> {
    let wrong = || SpeedError(text.into());
    let speed: f64 = if text.trim().is_empty() { 1.0 } else { text.trim().parse().map_err(|_| wrong())? };
    if (SLOWEST..=1.0).contains(&speed) { Ok(speed) } else { Err(wrong()) }
}

/// Brakes the process `pid`, a child that has not been waited for, until what is returned is dropped; not at all at full speed.
///
/// # Errors
/// The process is gone, or there is no thread.
pub(super) fn on(pid: u32, speed: f64) -> io::Result<Companion> {
    if speed >= 1.0 {
        return Ok(Companion::default());
    }
    let process = Process::open(pid)?;
    let mut wanted = Wanted::of(pid);
    Companion::start("brake", move |released| {
        let mut duty = Duty::new(speed);
        let mut running = Instant::now();
        loop {
            // A released brake leaves the process running.
            if released.recv_timeout(duty.run()) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            if process.signal(libc::SIGSTOP).is_err() {
                return;
            }
            let stopped = Instant::now();
            let ran = stopped - running;
            let end = released.recv_timeout(duty.stop(ran)) != Err(RecvTimeoutError::Timeout);
            running = Instant::now();
            duty.has_stopped(running - stopped, ran.mul_f64(1.0 - wanted.share_got()));
            if process.signal(libc::SIGCONT).is_err() || end {
                return;
            }
        }
    })
}

/// Keeps account of a process that runs and stands still by turns: what a turn had too much or too little of is made up for in the
/// next ones. Pure.
#[derive(Debug)]
struct Duty {
    speed: f64,
    /// What is to be stood still in addition, seconds; less than 0 after a stop that came too long.
    owed: f64,
}

impl Duty {
    fn new(speed: f64) -> Self {
        Self { speed, owed: 0.0 }
    }

    /// How long it runs in this turn.
    fn run(&self) -> Duration {
        // A stop that came too long is made up for by running on.
        let more = (-self.owed).max(0.0) * self.speed / (1.0 - self.speed);
        TURN.mul_f64(self.speed) + Duration::from_secs_f64(more.min(LONGEST_STOP.as_secs_f64()))
    }

    /// How long it stands still after it `ran`.
    fn stop(&mut self, ran: Duration) -> Duration {
        self.owed += ran.as_secs_f64() * (1.0 - self.speed) / self.speed;
        Duration::from_secs_f64(self.owed.clamp(0.0, LONGEST_STOP.as_secs_f64()))
    }

    /// It has `stopped` for so long; while it ran before that, it had no processor for as long as `waited`.
    fn has_stopped(&mut self, stopped: Duration, waited: Duration) {
        // The time in which it could run and did not is one of standing still as well.
        self.owed -= stopped.as_secs_f64() + waited.as_secs_f64() / self.speed;
        // What a machine under load could not give for long is forgotten: no run of stops that stands for a hang.
        self.owed = self.owed.clamp(-1.0, 1.0);
    }
}

/// What a process has had of the processors, of what it wanted: the sums over its threads (`Documentation/scheduler/sched-stats.rst`,
/// `/proc/<pid>/schedstat`).
#[derive(Debug)]
struct Wanted {
    tasks: PathBuf,
    seen: Used,
}

/// Nanoseconds on a processor, and ready to run without one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Used {
    ran: u64,
    waited: u64,
}

impl Wanted {
    fn of(pid: u32) -> Self {
        let tasks = PathBuf::from(format!("/proc/{pid}/task"));
        let seen = Used::read(&tasks);
        Self { tasks, seen }
    }

    /// The share that it got of the time in which its threads could run, since the last call: from 0 to 1. All of it where none
    /// could.
    fn share_got(&mut self) -> f64 {
        let now = Used::read(&self.tasks);
        let before = std::mem::replace(&mut self.seen, now);
        // A thread that has ended takes its sums with it.
        let (ran, waited) = (now.ran.saturating_sub(before.ran), now.waited.saturating_sub(before.waited));
        share(ran, waited)
    }
}

impl Used {
    fn read(tasks: &Path) -> Self {
        let threads = fs::read_dir(tasks).into_iter().flatten().flatten();
        let texts = threads.filter_map(|thread| fs::read_to_string(thread.path().join("schedstat")).ok());
        texts
            .filter_map(|text| Self::parse(&text))
            .fold(Self::default(), |sum, one| Self { ran: sum.ran + one.ran, waited: sum.waited + one.waited })
    }

    fn parse(schedstat: &str) -> Option<Self> {
        let mut fields = schedstat.split_whitespace().map(str::parse);
        Some(Self { ran: fields.next()?.ok()?, waited: fields.next()?.ok()? })
    }
}

#[expect(clippy::cast_precision_loss, reason = "a share of some milliseconds")]
fn share(ran: u64, waited: u64) -> f64 {
    if ran + waited == 0 { 1.0 } else { ran as f64 / (ran + waited) as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};
    use std::thread;

    #[test]
    fn a_speed_is_a_number_from_a_little_to_one() {
        assert_eq!(parse("0.25"), Ok(0.25));
        assert_eq!(parse(" 1 "), Ok(1.0));
        assert_eq!(parse(""), Ok(1.0));
        for wrong in ["0", "2", "-1", "fast", "25%", "NaN", "0,25"] {
            let said = parse(wrong).unwrap_err().to_string();
            assert!(said.starts_with(&format!("UMBRA_BENCH_SPEED={wrong} is no speed")), "{said}");
        }
    }

    #[test]
    fn late_wake_ups_do_not_change_the_share() {
        let mut duty = Duty::new(0.25);
        let (mut ran, mut stopped) = (0.0, 0.0);
        for turn in 0..1000 {
            // Each third run and each fifth stop is 7 ms late.
            let late = |every: u32| Duration::from_millis(if turn % every == 0 { 7 } else { 0 });
            let run = duty.run() + late(3);
            let stop = duty.stop(run) + late(5);
            duty.has_stopped(stop, Duration::ZERO);
            ran += run.as_secs_f64();
            stopped += stop.as_secs_f64();
        }
        let share = ran / (ran + stopped);
        assert!((share - 0.25).abs() < 0.01, "{share}");
    }

    #[test]
    fn what_other_load_takes_is_not_counted_as_run() {
        let mut duty = Duty::new(0.25);
        let (mut had, mut by_the_clock) = (0.0, 0.0);
        for _ in 0..1000 {
            // Other load has the processors for half of each run.
            let run = duty.run();
            let stop = duty.stop(run);
            duty.has_stopped(stop, run / 2);
            had += run.as_secs_f64() / 2.0;
            by_the_clock += (run + stop).as_secs_f64();
        }
        let share = had / by_the_clock;
        assert!((share - 0.25).abs() < 0.01, "{share}");
    }

    #[test]
    fn what_a_process_wanted_and_got_is_read_from_its_threads() {
        assert_eq!(Used::parse("9699800 155570 2\n"), Some(Used { ran: 9_699_800, waited: 155_570 }));
        assert_eq!(Used::parse(""), None);
        assert!((share(0, 0) - 1.0).abs() < f64::EPSILON && (share(1, 3) - 0.25).abs() < f64::EPSILON);
        let mut own = Wanted::of(std::process::id());
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(50) {}
        let share = own.share_got();
        assert!(share > 0.0 && share <= 1.0, "{share}");
        assert!(own.seen.ran > 0, "this kernel tells nothing of its threads");
    }

    /// CPU time of a process, clock ticks (proc(5), fields 14 and 15).
    fn used(child: &Child) -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let after_name = stat.rsplit(')').next().unwrap();
        after_name.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
    }

    #[test]
    fn a_braked_process_gets_its_share_and_runs_on_when_let_go() {
        let mut child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let brake = on(child.id(), 0.25).unwrap();
        let (begin, start) = (used(&child), Instant::now());
        thread::sleep(Duration::from_secs(2));
        #[expect(clippy::cast_precision_loss, reason = "a figure of a few hundred")]
        let share = (used(&child) - begin) as f64 / 100.0 / start.elapsed().as_secs_f64();
        drop(brake);
        // Beside other load it gets less, never more.
        assert!(share < 0.35, "{share}");
        let before = used(&child);
        let patience = Instant::now();
        while used(&child) == before {
            assert!(patience.elapsed() < Duration::from_secs(60), "a process that was let go stands still");
            thread::sleep(Duration::from_millis(10));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
