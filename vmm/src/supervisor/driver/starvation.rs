//! Whether a driver VM is silent because it gets no processor. On an overloaded host a healthy driver VM misses heartbeats; a hung
//! one either runs without beating, or does not ask for a processor.
//!
//! The kernel counts for each thread how long it ran, and how long it was ready and waited for a processor
//! (`/proc/PID/task/TID/schedstat`, `Documentation/scheduler/sched-stats.rst`). A kernel without these counts says nothing, and
//! nothing is excused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::DriverVm;
use super::life::LifeRole;
use crate::base::proc_stat::ProcStat;
use crate::base::time::Time;
use crate::lifecycle::{Input, Rank};
use crate::supervisor::ids::DriverId;
use crate::supervisor::run::Supervisor;

/// The roles of lives whose silence counts.
const ROLES: [LifeRole; 3] = [LifeRole::Present, LifeRole::Standby(Rank::First), LifeRole::Standby(Rank::Second)];

/// What the kernel has counted of a thread, ns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    ran: u64,
    waited: u64,
}

/// The counts of a silent life's threads, taken when half of the heartbeat timeout was over.
#[derive(Debug)]
pub(in crate::supervisor) struct Watch {
    /// When half of the silence was over, which names the silence.
    half: Time,
    at: Time,
    threads: PathBuf,
    before: BTreeMap<u32, Counts>,
}

impl Watch {
    /// Looks now, which should be at `half`.
    fn begin(half: Time, at: Time, threads: PathBuf) -> Self {
        let before = all(&threads);
        Self { half, at, threads, before }
    }

    /// Whether a thread has waited for a processor for half of the time since the first look, or all the time.
    fn starved(&self, now: Time) -> bool {
        let since = now.since(self.at).as_nanos() / 2;
        all(&self.threads).iter().any(|(id, after)| {
            let Some(before) = self.before.get(id) else { return false };
            let (ran, waited) = (after.ran.saturating_sub(before.ran), after.waited.saturating_sub(before.waited));
            // What it waits now is added when it gets a processor.
            u128::from(waited) >= since || (ran == 0 && is_ready(&self.threads.join(id.to_string())))
        })
    }
}

/// The counts of each thread; empty where the process is gone.
fn all(threads: &Path) -> BTreeMap<u32, Counts> {
    let entries = fs::read_dir(threads).into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter_map(|id: u32| Some((id, counts(&threads.join(id.to_string()))?))).collect()
}

fn counts(thread: &Path) -> Option<Counts> {
    let text = fs::read_to_string(thread.join("schedstat")).ok()?;
    let mut numbers = text.split_whitespace().map(str::parse);
    let (ran, waited) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    // One that never ran is one whose times are not counted.
    (ran > 0).then_some(Counts { ran, waited })
}

/// Runs or is ready to.
fn is_ready(thread: &Path) -> bool {
    ProcStat::read(thread).is_some_and(|stat| stat.state == 'R')
}

impl Supervisor {
    /// Before the silence of a life of driver VM `n` becomes its failure: was there a processor for it?
    pub(in crate::supervisor) fn look_at_silence(&mut self, n: DriverId, now: Time) {
        for role in ROLES {
            if self.drivers[n].is_starved(role, now) {
                match role {
                    LifeRole::Standby(rank) => self.drivers[n].lifecycle.excuse(rank),
                    LifeRole::Present | LifeRole::Dying => self.drive(n, Input::Starved),
                }
            }
        }
    }

    /// When [`Self::look_at_silence`] has something to look at.
    pub(in crate::supervisor) fn silence_due(&self) -> Option<Time> {
        let of = |driver: &DriverVm, role| {
            let (half, _) = driver.silence_of(role)?;
            driver.watches.get(&role).is_none_or(|watch| watch.half != half).then_some(half)
        };
        self.drivers.iter().flat_map(|driver| ROLES.into_iter().filter_map(move |role| of(driver, role))).min()
    }
}

impl DriverVm {
    fn silence_of(&self, role: LifeRole) -> Option<(Time, Time)> {
        match role {
            LifeRole::Present => self.lifecycle.silence(),
            LifeRole::Standby(rank) => self.lifecycle.silence_of(rank),
            LifeRole::Dying => None,
        }
    }

    /// Whether the life in this role is silent for want of a processor, as far as is known at `now`. Begins to watch it at half of its
    /// silence.
    fn is_starved(&mut self, role: LifeRole, now: Time) -> bool {
        let silence = self.silence_of(role).zip(self.life_of(role).map(|life| life.process.pid()));
        let Some(((half, over), pid)) = silence else {
            self.watches.remove(&role);
            return false;
        };
        match self.watches.get(&role).filter(|watch| watch.half == half) {
            Some(watch) if over <= now && watch.starved(now) => {
                tracing::warn!(?role, "silent, but its VM waits for a processor: the host is overloaded");
                true
            }
            Some(_) => false,
            None if over <= now => {
                tracing::warn!(?role, "silent, but the supervisor itself got no processor: the host is overloaded");
                true
            }
            None if half <= now => {
                self.watches.insert(role, Watch::begin(half, now, format!("/proc/{pid}/task").into()));
                false
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    struct Threads(tempfile::TempDir);

    impl Threads {
        fn set(&self, id: u32, (ran, waited): (u64, u64), state: char) {
            let thread = self.0.path().join(id.to_string());
            fs::create_dir_all(&thread).unwrap();
            fs::write(thread.join("schedstat"), format!("{ran} {waited} 17\n")).unwrap();
            fs::write(thread.join("stat"), format!("{id} (vcpu (0)) {state} 1 1\n")).unwrap();
        }

        /// Whether it has starved when one of its two threads has these counts and state a second later.
        fn starved_with(counts: (u64, u64), state: char) -> bool {
            let threads = Self(tempfile::tempdir().unwrap());
            threads.set(1, (SECOND, 0), 'S');
            threads.set(2, (SECOND, SECOND), 'R');
            let watch = Watch::begin(Time(0), Time(0), threads.0.path().into());
            threads.set(2, (SECOND + counts.0, SECOND + counts.1), state);
            watch.starved(Time(SECOND))
        }
    }

    #[test]
    fn a_thread_that_mostly_waits_for_a_processor_starves() {
        assert!(Threads::starved_with((SECOND / 10, SECOND * 6 / 10), 'R'));
        assert!(Threads::starved_with((0, 0), 'R'), "it waits still");
    }

    #[test]
    fn one_that_spins_sleeps_or_is_stopped_does_not() {
        assert!(!Threads::starved_with((SECOND * 9 / 10, SECOND / 10), 'R'));
        assert!(!Threads::starved_with((SECOND / 100, SECOND / 100), 'S'));
        assert!(!Threads::starved_with((0, 0), 'T'));
    }

    #[test]
    fn a_process_that_is_gone_or_not_counted_does_not() {
        let watch = Watch::begin(Time(0), Time(0), "/no/such/process".into());
        assert!(!watch.starved(Time(SECOND)));
        let threads = Threads(tempfile::tempdir().unwrap());
        threads.set(1, (0, 0), 'R');
        assert!(!Watch::begin(Time(0), Time(0), threads.0.path().into()).starved(Time(SECOND)));
    }

    #[test]
    fn the_kernel_counts_this_process() {
        let threads = PathBuf::from("/proc/self/task");
        assert!(all(&threads).values().any(|counts| counts.ran > 0));
    }
}
