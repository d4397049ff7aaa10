//! Snapshots made ahead: a taker that runs once, and what a failure makes of it.
#![allow(clippy::unwrap_used)]

use super::tests::{at, bring_up, end, failure, generation};
use super::*;
use crate::config::Restart;

/// Live since 10 ms; its first taker is generation 2, started at 1,010 ms.
fn with_taker() -> Lifecycle {
    let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 1, StandbyPolicy::Snapshot);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    assert_eq!(life.handle(at(10), Input::EndLive(end(0))), [Action::Live]);
    assert_eq!((life.standby(), life.deadline()), (Standby::Due(at(1010)), Some(at(1010))));
    assert_eq!(life.handle(at(1010), Input::Tick), [Action::TakeSnapshot(generation(2))]);
    assert!(life.standby_boots(), "others wait for their turn");
    life
}

fn fail(life: &mut Lifecycle, now: u64) -> Vec<Action> {
    life.handle(at(now), Input::ProcessGone("signal 9".into()));
    life.handle(at(now + 50), Input::ResetDone)
}

fn go_live(life: &mut Lifecycle, now: u64) {
    for input in [Input::Hello, Input::Forwarding, Input::Carrier(Carrier::Up), Input::EndLive(end(0))] {
        life.handle(at(now), input);
    }
    assert_eq!(*life.state(), State::Live { since: at(now) });
}

#[test]
fn a_taker_runs_once_and_leaves_nothing_but_the_snapshot() {
    let mut life = with_taker();
    assert_eq!(life.standby().stage(), StandbyStage::Saving);
    assert_eq!(life.handle(at(1100), Input::SnapshotMissing), []);
    assert_eq!(life.handle(at(9000), Input::SnapshotThere), [Action::DropStandby(Rank::First, None)]);
    assert_eq!((life.standby(), life.standby().generation()), (Standby::Saved, None));
    assert_eq!(life.standby().stage(), StandbyStage::Snapshot);
    life.handle(at(20_000), Input::Heartbeat);
    assert_eq!(life.handle(at(20_000), Input::Tick), [], "nothing is due any more");
    // The next life is a new one, and so is its number.
    assert_eq!(fail(&mut life, 21_000), [Action::Spawn(generation(3))]);
    go_live(&mut life, 21_500);
    assert_eq!(life.handle(at(22_500), Input::Tick), [Action::TakeSnapshot(generation(4))], "is it there still?");
}

#[test]
fn a_taker_that_boots_becomes_the_present_life_at_a_failure() {
    let mut life = with_taker();
    life.handle(at(1100), Input::SnapshotMissing);
    assert_eq!(fail(&mut life, 2000), [Action::Adopt(generation(2))]);
    // What it says of the snapshot is late.
    assert_eq!(life.handle(at(2100), Input::SnapshotThere), []);
    assert_eq!(life.handle(at(2100), Input::Hello), [Action::Configure]);
    assert_eq!(life.standby(), Standby::Absent);
}

#[test]
fn a_taker_that_looks_for_the_snapshot_is_ended_at_a_failure() {
    let mut life = with_taker();
    let actions = fail(&mut life, 1050);
    assert_eq!(
        actions,
        [Action::DropStandby(Rank::First, None), Action::Spawn(generation(3))],
        "it might end by itself"
    );
    assert_eq!(life.handle(at(1200), Input::SnapshotMissing), []);
    assert_eq!(life.standby(), Standby::Absent, "none runs beside a recovery");
}

#[test]
fn a_taker_that_dies_or_takes_too_long_is_tried_again_ever_more_slowly() {
    let mut life = with_taker();
    let (mut now, boot) = (at(1100), Duration::from_secs(Restart::default().boot_timeout_s.into()));
    for (n, seconds) in (1..).zip([1, 2, 4, 8, 16, 32, 60, 60]) {
        let why = String::from("it broke");
        assert_eq!(life.handle(now, Input::StandbyFailed(Rank::First, why.clone())), [Action::DropTaker(why)]);
        assert_eq!(life.standby_deaths(), n);
        now = now + Duration::from_secs(seconds);
        life.handle(now, Input::Heartbeat);
        assert_eq!(life.handle(now, Input::Tick), [Action::TakeSnapshot(generation(n + 2))]);
    }
    now = now + boot * PATIENCE;
    life.handle(now, Input::Heartbeat);
    assert_eq!(life.handle(now, Input::Tick), [Action::DropTaker("no snapshot after 240 s".into())]);
    now = now + Duration::from_secs(60);
    life.handle(now, Input::Heartbeat);
    life.handle(now, Input::Tick);
    life.handle(now, Input::SnapshotThere);
    assert_eq!((life.standby(), life.standby_deaths()), (Standby::Saved, 0));
}

#[test]
fn a_restart_has_a_standby_booted_and_leaves_none_behind() {
    let mut life = with_taker();
    life.handle(at(1100), Input::SnapshotMissing);
    assert_eq!(
        life.handle(at(2000), Input::Restart { fresh: false }),
        [Action::DropStandby(Rank::First, None)],
        "the taker"
    );
    assert_eq!(life.handle(at(2000), Input::Tick), [Action::SpawnStandby(Rank::First, generation(3))]);
    life.handle(at(2500), Input::StandbyHello(Rank::First));
    let actions = life.handle(at(2600), Input::StandbyLoaded(Rank::First));
    assert!(matches!(&actions[..], [Action::Failed(planned), Action::Release] if !planned.source.is_failure()));

    let mut life = with_taker();
    life.handle(at(1100), Input::SnapshotThere);
    assert_eq!(life.handle(at(2000), Input::Restart { fresh: false }), [], "nothing waits");
    assert_eq!(life.handle(at(2000), Input::Tick), [Action::SpawnStandby(Rank::First, generation(3))]);
    let until = life.restarting.unwrap();
    life.handle(until, Input::Heartbeat);
    let actions = life.handle(until, Input::Tick);
    // Not ready by its own time limit, which comes first.
    assert!(matches!(&actions[..], [Action::DropStandby(Rank::First, _), Action::RestartOff(_)]), "{actions:?}");
    let due = life.deadline().unwrap();
    life.handle(due, Input::Heartbeat);
    assert_eq!(life.handle(due, Input::Tick), [Action::TakeSnapshot(generation(4))]);
}

#[test]
fn another_image_asks_for_another_snapshot() {
    let mut life = with_taker();
    life.handle(at(1100), Input::SnapshotThere);
    assert_eq!(life.handle(at(5000), Input::StandbyUseless), []);
    assert_eq!(life.standby(), Standby::Due(at(6000)));
}

#[test]
fn quarantine_and_stop_end_a_taker() {
    let mut life = with_taker();
    assert_eq!(life.handle(at(1200), Input::Stop), [Action::DropStandby(Rank::First, None), Action::Kill]);
    let restart = Restart { limit: 0, ..Restart::default() };
    let mut life = Lifecycle::new(RestartHistory::new(restart), 1, StandbyPolicy::Snapshot);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    life.handle(at(10), Input::EndLive(end(0)));
    life.handle(at(1010), Input::Tick);
    life.handle(at(1020), Input::Failed(failure(NoticedBy::Panic, 1020)));
    let actions = life.handle(at(1030), Input::ProcessGone("signal 9".into()));
    assert_eq!(actions.last(), Some(&Action::DropStandby(Rank::First, None)), "{actions:?}");
}
