//! A brake for the emulator: with `UMBRA_BENCH_SPEED=0.25` a test host runs as on a machine four times slower.
//!
//! A thread of the bench stops and continues the emulator's process (`SIGSTOP`, `SIGCONT`) every few milliseconds, so that each of
//! its threads runs for the wanted share of the time. A quota of a control group is another thing: it bounds the sum of all threads,
//! so a single busy virtual CPU runs at full speed until the quota is spent, and a group needs rights and outlives a killed bench.
//! The peer, real time and the clock of the recording go on meanwhile, as they do beside a slow machine.
//!
//! Invariant: signals go through a pidfd, so that none ever reaches another process that got the emulator's number.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

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
pub(super) fn is_asked_for() -> bool {
    ASKED.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|speed| speed < 1.0)
}

/// The share of full speed at which test hosts run: what [`at_most`] asked for, or `UMBRA_BENCH_SPEED` where that is less, else 1.
///
/// # Errors
/// The variable holds something else than a number in its range.
pub fn speed() -> Result<f64, SpeedError> {
    let asked = ASKED.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or(1.0);
    let named = std::env::var_os(SPEED_VARIABLE).map(|text| parse(&text.to_string_lossy())).transpose()?;
    Ok(named.unwrap_or(1.0).min(asked))
}

fn parse(text: &str) -> Result<f64, SpeedError> {
    let wrong = || SpeedError(text.into());
    let speed: f64 = if text.trim().is_empty() { 1.0 } else { text.trim().parse().map_err(|_| wrong())? };
    if (SLOWEST..=1.0).contains(&speed) { Ok(speed) } else { Err(wrong()) }
}

/// A process that is braked; let go when dropped.
#[derive(Debug)]
pub(super) struct Brake {
    release: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Brake {
    /// Brakes the process `pid`, a child that has not been waited for; not at all at full speed.
    ///
    /// # Errors
    /// The process is gone, or there is no thread.
    pub(super) fn on(pid: u32, speed: f64) -> io::Result<Self> {
        if speed >= 1.0 {
            return Ok(Self { release: None, thread: None });
        }
        let process = Process::open(pid)?;
        let (release, released) = channel();
        let thread = thread::Builder::new().name("brake".into()).spawn(move || {
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
                let end = released.recv_timeout(duty.stop(stopped - running)) != Err(RecvTimeoutError::Timeout);
                running = Instant::now();
                duty.has_stopped(running - stopped);
                if process.signal(libc::SIGCONT).is_err() || end {
                    return;
                }
            }
        })?;
        Ok(Self { release: Some(release), thread: Some(thread) })
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        drop(self.release.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Keeps account of a process that runs and stands still by turns: a late wake-up is made up for in the next turns. Pure.
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

    fn has_stopped(&mut self, stopped: Duration) {
        self.owed -= stopped.as_secs_f64();
        // What a machine under load could not give for long is forgotten: no run of stops that stands for a hang.
        self.owed = self.owed.clamp(-1.0, 1.0);
    }
}

/// A process by its descriptor.
#[derive(Debug)]
struct Process(OwnedFd);

impl Process {
    fn open(pid: u32) -> io::Result<Self> {
        let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
        // SAFETY: pidfd_open takes two integers and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(fd).map_err(io::Error::other)?;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn signal(&self, signal: libc::c_int) -> io::Result<()> {
        let none = std::ptr::null_mut::<libc::siginfo_t>();
        // SAFETY: a null siginfo is allowed; the descriptor outlives the call.
        let done = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal, none, 0) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

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
            duty.has_stopped(stop);
            ran += run.as_secs_f64();
            stopped += stop.as_secs_f64();
        }
        let share = ran / (ran + stopped);
        assert!((share - 0.25).abs() < 0.01, "{share}");
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
        let brake = Brake::on(child.id(), 0.25).unwrap();
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
