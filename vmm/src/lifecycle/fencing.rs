//! What follows a failed life that can do no more harm; and a killed process that does not end: the kernel holds it, in a call to a
//! device or a file system that does not return. Pure, a part of the life cycle.
//!
//! Invariant: what was killed is waited for as long as a reset, and no longer; people hear of it before. Its device is neither
//! reset nor given to a next life before it has ended.

use std::time::Duration;

use super::policy::RestartVerdict;
use super::{Action, Lifecycle, NoticedBy, RESET_PATIENCE, State, Time};

/// Time after a kill at which people are warned that the process has not ended. A process with gigabytes of pinned memory takes a
/// second or two to end.
pub(super) const ALARM: Duration = Duration::from_secs(10);

/// A process that was killed and has not ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Killed {
    since: Time,
    /// People have been warned.
    warned: bool,
}

impl Killed {
    pub(super) fn at(now: Time) -> Self {
        Self { since: now, warned: false }
    }

    /// Nobody would have seen its end in the time `away`.
    pub(super) fn was_unwatched(&mut self, away: Duration) {
        self.since = self.since + away;
    }

    /// When to warn of it, or, after the warning, to stop waiting for it.
    pub(super) fn due(self) -> Time {
        self.since + if self.warned { RESET_PATIENCE } else { ALARM }
    }
}

impl Lifecycle {
    /// The device's reset waits at `now` for something that the host lacks: it does not hang.
    pub fn reset_waits(&mut self, now: Time) {
        if let State::Resetting { until, .. } = &mut self.state {
            *until = (*until).max(now + RESET_PATIENCE);
        }
    }

    /// The host had no process for the next life. Nobody has the device: it is tried again, without an end, because nothing says that the
    /// driver VM would not work.
    pub(super) fn on_not_started(&mut self, now: Time, why: &str) -> Vec<Action> {
        if !matches!(self.state, State::Booting { .. }) {
            return Vec::new();
        }
        let (first, delay) = self.history.not_started();
        self.state = State::BackOff { until: now + delay };
        let warning =
            || Action::Warn(format!("its next process cannot be started: {why}; it is tried again until it can"));
        first.then(warning).into_iter().collect()
    }

    /// Decides what follows, once the failed generation can do no more harm.
    pub(super) fn fenced(&mut self, now: Time, lived: Option<Duration>, source: NoticedBy) -> Vec<Action> {
        let until = now + RESET_PATIENCE;
        if !source.is_failure() {
            self.state = State::Resetting { until, next: Some(now) };
            return vec![Action::Reset];
        }
        match self.history.failed(now, lived) {
            RestartVerdict::Restart(delay) if source != NoticedBy::Identity => {
                // What the back-off spares the machine is a loop of boots: a life that has booted is taken at once.
                let delay = if self.reserve.is_ready() { Duration::ZERO } else { delay };
                self.state = State::Resetting { until, next: Some(now + delay) };
                let clean = self.suspects.tell().into_iter().map(Action::StartClean);
                [Action::Reset, Action::Report].into_iter().chain(clean).collect()
            }
            RestartVerdict::Restart(_) | RestartVerdict::Quarantine => {
                self.state = State::Resetting { until, next: None };
                let why = if source == NoticedBy::Identity {
                    "it brought another disk than its guests were given".into()
                } else {
                    self.history.passed(now)
                };
                let mut actions = vec![Action::Reset, Action::Report, Action::Quarantine(why)];
                actions.extend(self.drop_standby(now));
                actions
            }
        }
    }

    /// Whether the driver VM is quarantined because a killed process did not end in time, and has not ended since.
    pub fn process_hangs(&self) -> bool {
        self.process_hangs
    }

    /// Why there is no spare: a process that was to give the spare's device up has held it for longer than `ALARM`. `None`: it
    /// has not.
    pub fn spare_is_held(&self) -> Option<String> {
        self.reserve.held()
    }

    /// The failed life, which was live for `lived`, was killed and has not ended: warns, later quarantines.
    pub(super) fn tick_killed(&mut self, now: Time, lived: Option<Duration>, source: NoticedBy) -> Vec<Action> {
        if !self.hangs_for_good(now) {
            return self.alarm(now, "its guests wait, and it is quarantined");
        }
        self.state = State::Quarantined;
        if source.is_failure() {
            // It is given up, whatever the policy says of the number of failures.
            let _ = self.history.failed(now, lived);
        }
        let why = format!("its killed process has not ended for {} s: the kernel holds it", RESET_PATIENCE.as_secs());
        let mut actions = vec![Action::Quarantine(why)];
        actions.extend(self.drop_standby(now));
        actions
    }

    /// The life that was killed at the end of the run has not ended: warns, later stops without it.
    pub(super) fn tick_stopping(&mut self, now: Time) -> Vec<Action> {
        if !self.hangs_for_good(now) {
            return self.alarm(now, "the machine ends without it");
        }
        self.state = State::Stopped;
        Vec::new()
    }

    /// Whether the wait for the killed process is over.
    fn hangs_for_good(&mut self, now: Time) -> bool {
        let over = self.killed.take_if(|killed| killed.since + RESET_PATIENCE <= now).is_some();
        self.process_hangs |= over;
        over
    }

    /// The warning, once, with what comes `next`.
    fn alarm(&mut self, now: Time, next: &str) -> Vec<Action> {
        let Some(killed) = self.killed.as_mut().filter(|killed| killed.due() <= now) else { return Vec::new() };
        killed.warned = true;
        vec![Action::Warn(format!(
            "its process was killed {} s ago and has not ended: the kernel holds it, mostly in a call to a device that hangs \
             (`dmesg`); {next} {} s after the kill",
            ALARM.as_secs(),
            RESET_PATIENCE.as_secs()
        ))]
    }

    /// The process that was killed has ended after all: its device is reset, and it can be resumed.
    pub(super) fn hung_process_gone(&mut self, now: Time) -> Vec<Action> {
        self.process_hangs = false;
        self.state = State::Resetting { until: now + RESET_PATIENCE, next: None };
        vec![Action::Reset, Action::Report]
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{at, failure, live, with_standby};
    use super::*;
    use crate::lifecycle::{Input, Rank};

    /// Killed at 2250 ms, because it did not give its device up.
    fn killed(mut life: Lifecycle) -> Lifecycle {
        life.handle(at(2000), Input::Failed(failure(NoticedBy::Agent, 2000)));
        assert_eq!(life.handle(at(2250), Input::Tick), [Action::Kill]);
        life
    }

    #[test]
    fn a_killed_process_that_hangs_is_told_of_and_then_quarantined() {
        let mut life = killed(with_standby());
        assert_eq!(life.deadline(), Some(at(12_250)));
        assert_eq!(life.handle(at(12_249), Input::Tick), []);
        let actions = life.handle(at(12_250), Input::Tick);
        assert!(matches!(&actions[..], [Action::Warn(what)] if what.contains("killed 10 s ago")), "{actions:?}");
        assert_eq!(life.deadline(), Some(at(77_250)));
        assert_eq!(life.handle(at(77_249), Input::Tick), [], "told once");
        let actions = life.handle(at(77_250), Input::Tick);
        assert!(
            matches!(&actions[..], [Action::Quarantine(why), Action::DropStandby(Rank::First, None)] if why.contains("for 75 s")),
            "{actions:?}"
        );
        assert_eq!((life.state(), life.process_hangs(), life.history().total()), (&State::Quarantined, true, 1));
        assert_eq!(life.deadline(), None);
    }

    #[test]
    fn it_is_resumed_when_the_process_has_ended_and_not_before() {
        let mut life = killed(live(1));
        life.handle(at(80_000), Input::Tick);
        assert!(life.process_hangs(), "though nobody looked at 10 s");
        assert_eq!(life.handle(at(90_000), Input::Resume), [], "the device is not free");
        assert_eq!(life.handle(at(100_000), Input::ProcessGone("killed".into())), [Action::Reset, Action::Report]);
        assert_eq!(life.handle(at(100_100), Input::ResetDone), []);
        assert_eq!((life.state(), life.process_hangs()), (&State::Quarantined, false));
        assert_eq!(life.handle(at(101_000), Input::Resume), [Action::Reset]);
        assert!(matches!(life.handle(at(101_100), Input::ResetDone)[..], [Action::Spawn(_)]));
    }

    #[test]
    fn a_kill_that_needed_no_patience_has_its_end_as_well() {
        for source in [NoticedBy::VmEnd, NoticedBy::ProcessExit] {
            let mut life = live(1);
            assert_eq!(life.handle(at(2000), Input::Failed(failure(source, 2000))).last(), Some(&Action::Kill));
            assert!(matches!(life.handle(at(12_000), Input::Tick)[..], [Action::Warn(_)]));
            assert!(matches!(life.handle(at(77_000), Input::Tick)[..], [Action::Quarantine(_)]));
            assert_eq!(life.history().total(), u64::from(source.is_failure()));
        }
    }

    #[test]
    fn a_reset_that_waits_for_what_the_host_lacks_does_not_hang() {
        let mut life = live(1);
        life.handle(at(2000), Input::ProcessGone("signal 9".into()));
        let patience = u64::try_from(RESET_PATIENCE.as_millis()).unwrap();
        life.reset_waits(at(2000 + patience));
        assert_eq!(life.handle(at(2000 + patience), Input::Tick), []);
        assert!(matches!(life.handle(at(3000 + patience), Input::ResetDone)[..], [Action::Spawn(_)]));
        life.reset_waits(at(4000 + patience));
        assert!(!matches!(life.state(), State::Resetting { .. }));
    }

    #[test]
    fn a_life_without_a_process_is_tried_again_and_slept_over_and_stopped() {
        let mut life = live(1);
        life.handle(at(2000), Input::ProcessGone("signal 9".into()));
        assert!(matches!(life.handle(at(2001), Input::ResetDone)[..], [Action::Spawn(_)]));
        let actions = life.handle(at(2002), Input::NotStarted("no memory".into()));
        assert!(matches!(&actions[..], [Action::Warn(what)] if what.contains("no memory")), "{actions:?}");
        assert_eq!((life.deadline(), life.history().total()), (Some(at(2102)), 1));
        assert!(matches!(life.handle(at(2102), Input::Tick)[..], [Action::Spawn(_)]));
        assert_eq!(life.handle(at(2103), Input::NotStarted("no memory".into())), [], "told once");
        let mut asleep = life.clone();
        assert_eq!((asleep.handle(at(2104), Input::Sleep), asleep.state()), (vec![], &State::Asleep));
        assert_eq!((life.handle(at(2104), Input::Stop), life.state()), (vec![], &State::Stopped));
        assert_eq!(life.handle(at(2105), Input::NotStarted("late".into())), []);
    }

    #[test]
    fn a_killed_process_that_ends_in_time_is_no_alarm() {
        let mut life = killed(live(1));
        assert_eq!(life.handle(at(12_000), Input::ProcessGone("killed".into())), [Action::Reset, Action::Report]);
        life.handle(at(12_100), Input::ResetDone);
        assert!(!life.handle(at(12_250), Input::Tick).iter().any(|action| matches!(action, Action::Warn(_))));
    }

    #[test]
    fn a_stop_does_not_wait_for_what_hangs() {
        let mut life = killed(live(1));
        life.handle(at(80_000), Input::Tick);
        assert_eq!(life.handle(at(81_000), Input::Stop), []);
        assert_eq!(life.state(), &State::Stopped);
        let mut life = killed(live(1));
        assert_eq!(life.handle(at(5000), Input::Stop), [Action::Kill]);
        assert!(matches!(life.handle(at(12_250), Input::Tick)[..], [Action::Warn(_)]), "since the first kill");
        assert_eq!(life.handle(at(77_250), Input::Tick), []);
        assert_eq!((life.state(), life.process_hangs()), (&State::Stopped, true));
        let mut life = live(1);
        life.handle(at(2000), Input::ProcessGone("signal 9".into()));
        life.handle(at(2001), Input::ResetDone);
        life.handle(at(90_000), Input::Stop);
        assert_eq!(life.deadline(), Some(at(100_000)), "that of the life that is stopped, not of one before");
    }
}
