//! Time in which nobody watched: this process was stopped (`systemctl freeze`, Ctrl-Z in its terminal) or got no processor. What it watches
//! may have been stopped as well, and a limit that ran out meanwhile shows nothing. Pure, a part of the life cycle.
//!
//! Invariant: each limit has its whole time under watch.

use std::time::Duration;

use super::{Lifecycle, State};

impl Lifecycle {
    /// Nobody has watched for the time `away`, which has just ended.
    pub fn was_unwatched(&mut self, away: Duration) {
        match &mut self.state {
            State::Resetting { until, .. }
            | State::Booting { until }
            | State::Configuring { until }
            | State::WaitingCarrier { until }
            | State::GoingLive { until, .. }
            | State::Fencing { patience: Some(until), .. } => *until = *until + away,
            _ => {}
        }
        if let Some((until, _)) = &mut self.suspicion {
            *until = *until + away;
        }
        for until in [&mut self.restarting, &mut self.resting].into_iter().flatten() {
            *until = *until + away;
        }
        if let Some(silence) = &mut self.silence {
            silence.was_unwatched(away);
        }
        if let Some(killed) = &mut self.killed {
            killed.was_unwatched(away);
        }
        self.reserve.was_unwatched(away);
        self.second.was_unwatched(away);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{at, failure, live, with_standby};
    use crate::lifecycle::{Action, Input, Lifecycle, NoticedBy, Time};

    const AWAY: u64 = 60_000;

    /// Whether anything is given up by `life` when its next limit is over, and whether it would have been at that time plus [`AWAY`].
    fn acts(mut life: Lifecycle, away: bool) -> bool {
        let due = life.deadline().map_or(0, |due| due.0 / 1_000_000);
        if away {
            life.was_unwatched(at(AWAY).since(Time::BOOT));
            assert_eq!(life.deadline(), Some(at(due + AWAY)));
            assert_eq!(life.handle(at(due + AWAY - 1), Input::Tick), []);
        }
        !life.handle(at(due + AWAY), Input::Tick).is_empty()
    }

    #[test]
    fn every_limit_has_its_whole_time_under_watch() {
        let booting = || {
            let mut life = live(1);
            life.handle(at(2000), Input::ProcessGone("signal 9".into()));
            life.handle(at(2001), Input::ResetDone);
            life
        };
        let mut resetting = live(1);
        resetting.handle(at(2000), Input::ProcessGone("signal 9".into()));
        let mut killed = live(1);
        killed.handle(at(2000), Input::Failed(failure(NoticedBy::VmEnd, 2000)));
        let mut fencing = live(1);
        fencing.handle(at(2000), Input::Failed(failure(NoticedBy::Agent, 2000)));
        let mut suspected = live(1);
        suspected.handle(at(2000), Input::Sign(failure(NoticedBy::Link, 2000)));
        for life in [live(1), with_standby(), booting(), resetting, killed, fencing, suspected] {
            assert!(acts(life.clone(), false), "{life:?}");
            assert!(acts(life, true));
        }
    }

    #[test]
    fn a_standby_and_a_silent_life_are_heard_before_they_are_given_up() {
        let mut life = with_standby();
        life.was_unwatched(at(AWAY).since(Time::BOOT));
        let failed = |actions: &[Action]| {
            actions.iter().any(|action| matches!(action, Action::Failed(_) | Action::DropStandby(..)))
        };
        assert!(!failed(&life.handle(at(AWAY + 2000), Input::Tick)));
        assert!(failed(&life.handle(at(AWAY + 100_000), Input::Tick)), "it has not been heard since");
    }
}
