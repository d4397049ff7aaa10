//! Two lives that wait.
#![allow(clippy::unwrap_used)]

use super::tests::{at, bring_up, end, failure, generation};
use super::*;
use crate::config::Restart;

/// Live since 10 ms, two standbys ready at 4 s.
fn with_two() -> Lifecycle {
    let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 1, StandbyPolicy::Warm).with_standbys(2);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    life.handle(at(10), Input::EndLive(end(0)));
    assert_eq!(tick(&mut life, 1010), [Action::SpawnStandby(Rank::First, generation(2))]);
    assert_eq!(tick(&mut life, 1900), [], "not beside one that boots");
    ready(&mut life, Rank::First, 2000);
    assert_eq!(tick(&mut life, 2999), []);
    assert_eq!(tick(&mut life, 3000), [Action::SpawnStandby(Rank::Second, generation(3))]);
    ready(&mut life, Rank::Second, 4000);
    life
}

/// All that lives is heard of just before the tick.
fn tick(life: &mut Lifecycle, ms: u64) -> Vec<Action> {
    life.handle(at(ms), Input::Heartbeat);
    life.handle(at(ms), Input::StandbyHeartbeat(Rank::First));
    life.handle(at(ms), Input::StandbyHeartbeat(Rank::Second));
    life.handle(at(ms), Input::Tick)
}

fn ready(life: &mut Lifecycle, rank: Rank, ms: u64) {
    assert_eq!(life.handle(at(ms), Input::StandbyHello(rank)), [Action::ConfigureStandby(rank)]);
    assert_eq!(life.handle(at(ms), Input::StandbyLoaded(rank)), []);
}

/// The present life fails, and the next one serves 2 ms later; what was done when it began.
fn fail(life: &mut Lifecycle, ms: u64) -> Vec<Action> {
    life.handle(at(ms), Input::Failed(failure(NoticedBy::Panic, ms)));
    life.handle(at(ms), Input::ProcessGone("gone".into()));
    life.handle(at(ms + 1), Input::ResetDone)
}

fn go_live(life: &mut Lifecycle, ms: u64) {
    life.handle(at(ms), Input::Forwarding);
    life.handle(at(ms), Input::Carrier(Carrier::Up));
    assert_eq!(life.handle(at(ms), Input::EndLive(end(0))), [Action::Live]);
}

fn states(life: &Lifecycle) -> (StandbyStage, StandbyStage) {
    (life.standby().stage(), life.second_standby().stage())
}

#[test]
fn the_second_failure_in_a_row_finds_a_life_that_is_ready() {
    let mut life = with_two();
    assert_eq!(fail(&mut life, 5000), [Action::Adopt(generation(2)), Action::MoveUp]);
    assert_eq!(states(&life), (StandbyStage::Ready, StandbyStage::None));
    go_live(&mut life, 5002);
    assert_eq!(states(&life), (StandbyStage::Ready, StandbyStage::Due));
    assert_eq!(fail(&mut life, 5100), [Action::Adopt(generation(3))], "no back-off: nothing has to boot");
    assert_eq!(states(&life), (StandbyStage::None, StandbyStage::Due));
    go_live(&mut life, 5102);
    // A third one has to wait.
    assert_eq!(fail(&mut life, 5200), []);
    assert_eq!(life.state().name(), StateName::BackOff);
    assert_eq!(tick(&mut life, 5400), [Action::Spawn(generation(4))]);
    life.handle(at(5400), Input::Hello);
    go_live(&mut life, 5402);
    // First the first, then the second.
    assert_eq!(tick(&mut life, 6402), [Action::SpawnStandby(Rank::First, generation(5))]);
    assert_eq!(tick(&mut life, 6403), []);
    assert_eq!(states(&life), (StandbyStage::Booting, StandbyStage::None));
    ready(&mut life, Rank::First, 7000);
    assert_eq!(tick(&mut life, 8000), [Action::SpawnStandby(Rank::Second, generation(6))]);
}

#[test]
fn the_second_takes_the_place_of_a_first_that_dies_and_the_pause_is_kept() {
    let mut life = with_two();
    let died = life.handle(at(5000), Input::StandbyFailed(Rank::First, "killed".into()));
    assert_eq!(died, [Action::DropStandby(Rank::First, Some("killed".into())), Action::MoveUp]);
    assert_eq!(states(&life), (StandbyStage::Ready, StandbyStage::Due));
    assert_eq!(life.standby().generation(), Some(generation(3)));
    assert_eq!(tick(&mut life, 5999), []);
    assert_eq!(tick(&mut life, 6000), [Action::SpawnStandby(Rank::Second, generation(4))]);
    // Deaths in a row: the pause doubles.
    let died = life.handle(at(6100), Input::StandbyFailed(Rank::First, "killed".into()));
    assert_eq!(died, [Action::DropStandby(Rank::First, Some("killed".into())), Action::MoveUp]);
    assert_eq!(states(&life), (StandbyStage::Booting, StandbyStage::Due));
    ready(&mut life, Rank::First, 6200);
    assert_eq!(tick(&mut life, 8099), []);
    assert_eq!(tick(&mut life, 8100), [Action::SpawnStandby(Rank::Second, generation(5))]);
}

#[test]
fn a_second_that_dies_or_falls_silent_is_replaced_and_costs_the_first_nothing() {
    let mut life = with_two();
    let died = life.handle(at(5000), Input::StandbyFailed(Rank::Second, "killed".into()));
    assert_eq!(died, [Action::DropStandby(Rank::Second, Some("killed".into()))]);
    life.handle(at(5999), Input::StandbyHeartbeat(Rank::First));
    assert_eq!(tick(&mut life, 6000), [Action::SpawnStandby(Rank::Second, generation(4))]);
    ready(&mut life, Rank::Second, 7000);
    // Four times the heartbeat's time-out of a life in service.
    life.handle(at(18_999), Input::StandbyHeartbeat(Rank::First));
    life.handle(at(18_999), Input::Heartbeat);
    assert_eq!(life.handle(at(18_999), Input::Tick), []);
    let silent = life.handle(at(19_000), Input::Tick);
    assert!(
        matches!(&silent[..], [Action::DropStandby(Rank::Second, Some(why))] if why.contains("12000 ms")),
        "{silent:?}"
    );
    assert_eq!(states(&life), (StandbyStage::Ready, StandbyStage::Due));
}

#[test]
fn whatever_ends_the_first_for_good_ends_the_second() {
    let ends: [(Input, &[Action]); 3] =
        [(Input::StandbyUseless, &[]), (Input::Restart { fresh: true }, &[]), (Input::Stop, &[Action::Kill])];
    for (input, more) in ends {
        let mut actions = with_two().handle(at(5000), input.clone());
        let rest = actions.split_off(2);
        let dropped = [Action::DropStandby(Rank::First, None), Action::DropStandby(Rank::Second, None)];
        assert_eq!((&actions[..], &rest[..]), (&dropped[..], more), "{input:?}");
    }
}

#[test]
fn a_restart_takes_the_first_and_the_second_moves_up() {
    let mut life = with_two();
    let actions = life.handle(at(5000), Input::Restart { fresh: false });
    assert!(matches!(&actions[..], [Action::Failed(_), Action::Release]), "{actions:?}");
    life.handle(at(5001), Input::Released);
    assert_eq!(life.handle(at(5002), Input::ResetDone), [Action::Adopt(generation(2)), Action::MoveUp]);
}

#[test]
fn without_a_second_nothing_waits_behind_the_first() {
    for ahead in [StandbyPolicy::Warm, StandbyPolicy::Nothing] {
        let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 1, ahead).with_standbys(1);
        life.handle(at(0), Input::Start);
        bring_up(&mut life, at(0));
        life.handle(at(10), Input::EndLive(end(0)));
        tick(&mut life, 1010);
        life.handle(at(2000), Input::StandbyHello(Rank::First));
        life.handle(at(2000), Input::StandbyLoaded(Rank::First));
        assert_eq!(tick(&mut life, 4000), []);
        assert_eq!(life.second_standby(), Standby::Absent);
    }
}

/// Live since 10 ms, with lives that need no device for their start.
fn ahead(policy: StandbyPolicy) -> Lifecycle {
    let restart = Restart { limit: 3, ..Restart::default() };
    let mut life = Lifecycle::new(RestartHistory::new(restart), 1, policy).with_starts_ahead(true);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    life.handle(at(10), Input::EndLive(end(0)));
    life
}

#[test]
fn where_nothing_waits_the_next_life_is_started_beside_the_fence() {
    for policy in [StandbyPolicy::Nothing, StandbyPolicy::Warm, StandbyPolicy::Snapshot] {
        let mut life = ahead(policy);
        let actions = life.handle(at(500), Input::Failed(failure(NoticedBy::Panic, 500)));
        assert!(matches!(&actions[..2], [Action::Failed(_), Action::Release]), "{actions:?}");
        assert_eq!(actions[2..], [Action::SpawnAhead(generation(2))]);
        life.handle(at(510), Input::Released);
        assert_eq!(life.handle(at(520), Input::ResetDone), [Action::Adopt(generation(2))]);
        assert_eq!(life.state().name(), StateName::Booting);
        life.handle(at(530), Input::Hello);
        go_live(&mut life, 540);
        assert_eq!(life.standby().generation(), None);
    }
}

#[test]
fn a_life_that_was_started_ahead_and_dies_is_replaced_when_its_turn_comes() {
    let mut life = ahead(StandbyPolicy::Nothing);
    life.handle(at(500), Input::Failed(failure(NoticedBy::Panic, 500)));
    let died = life.handle(at(505), Input::StandbyFailed(Rank::First, "killed".into()));
    assert_eq!(died, [Action::DropStandby(Rank::First, Some("killed".into()))]);
    life.handle(at(510), Input::Released);
    assert_eq!(life.handle(at(520), Input::ResetDone), [Action::Spawn(generation(3))]);
}

#[test]
fn nothing_is_started_ahead_of_a_quarantine_beside_what_waits_or_behind_a_life_that_never_served() {
    let mut life = ahead(StandbyPolicy::Nothing);
    for ms in [20_000, 40_000, 60_000] {
        life.handle(at(ms), Input::Failed(failure(NoticedBy::Panic, ms)));
        life.handle(at(ms), Input::Released);
        life.handle(at(ms), Input::ResetDone);
        life.handle(at(ms), Input::Hello);
        go_live(&mut life, ms);
    }
    let mut two = with_two().with_starts_ahead(true);
    // It boots.
    let mut young =
        Lifecycle::new(RestartHistory::new(Restart::default()), 1, StandbyPolicy::Warm).with_starts_ahead(true);
    young.handle(at(0), Input::Start);
    young.handle(at(1), Input::ResetDone);
    for (life, ms) in [(&mut life, 61_500), (&mut two, 5000), (&mut young, 5)] {
        let actions = life.handle(at(ms), Input::Failed(failure(NoticedBy::Panic, ms)));
        assert!(matches!(&actions[..], [Action::Failed(_), Action::Release]), "{actions:?}");
    }
}
