//! Restarts of driver VMs whose guests' devices come to rest first, and what is given up at once.
#![allow(clippy::unwrap_used)]

use super::tests::{at, bring_up, end, failure, generation};
use super::*;
use crate::config::Restart;

/// A driver VM of one disk, live since 10 ms, whose standby is ready since 3000 ms.
fn with_standby_ready() -> Lifecycle {
    let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 1, StandbyPolicy::Warm).with_rest(true);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    life.handle(at(10), Input::EndLive(end(0)));
    let due = life.deadline().unwrap();
    assert_eq!(life.handle(due, Input::Tick), [Action::SpawnStandby(Rank::First, generation(2))]);
    life.handle(due, Input::StandbyHello(Rank::First));
    life.handle(due, Input::StandbyLoaded(Rank::First));
    for ms in (0..20_000).step_by(500) {
        life.handle(at(ms), Input::Heartbeat);
        life.handle(at(ms), Input::StandbyHeartbeat(Rank::First));
    }
    life
}

/// Both agents live until `until` ms; what ticks at `until` bring.
fn wait(life: &mut Lifecycle, from: u64, until: u64) -> Vec<Action> {
    let mut actions = Vec::new();
    for ms in (from..=until).step_by(500) {
        life.handle(at(ms), Input::Heartbeat);
        life.handle(at(ms), Input::StandbyHeartbeat(Rank::First));
        actions.extend(life.handle(at(ms), Input::Tick));
    }
    actions
}

fn planned(actions: &[Action]) -> bool {
    matches!(actions, [Action::Failed(Failure { source: NoticedBy::Planned, .. }), Action::Release])
}

#[test]
fn a_restart_waits_until_the_guests_devices_are_at_rest() {
    let mut life = with_standby_ready();
    assert_eq!(life.handle(at(20_000), Input::AtRest), [], "nobody was asked");
    assert_eq!(life.handle(at(20_000), Input::Restart { fresh: false }), [Action::Quiesce]);
    assert_eq!(wait(&mut life, 20_000, 49_500), [], "for as long as that takes");
    assert!(planned(&life.handle(at(49_600), Input::AtRest)));
    assert_eq!(life.handle(at(49_601), Input::AtRest), []);
}

#[test]
fn a_guest_that_never_answers_holds_up_no_restart() {
    let mut life = with_standby_ready();
    life.handle(at(20_000), Input::Restart { fresh: false });
    assert_eq!(wait(&mut life, 20_000, 49_500), []);
    assert!(planned(&life.handle(at(50_000), Input::Tick)));
}

#[test]
fn guests_go_on_when_the_next_driver_vm_dies_while_they_come_to_rest() {
    let mut life = with_standby_ready();
    life.handle(at(20_000), Input::Restart { fresh: false });
    let why = "it died".to_owned();
    let actions = life.handle(at(20_100), Input::StandbyFailed(Rank::First, why.clone()));
    assert_eq!(actions, [Action::DropStandby(Rank::First, Some(why.clone())), Action::GoOn, Action::RestartOff(why)]);
    assert_eq!(life.handle(at(20_101), Input::AtRest), []);
    assert!(matches!(life.state(), State::Live { .. }));
}

#[test]
fn guests_go_on_when_the_next_driver_vm_is_of_no_use_any_more() {
    let mut life = with_standby_ready();
    life.handle(at(20_000), Input::Restart { fresh: false });
    assert_eq!(life.handle(at(20_001), Input::StandbyUseless), [Action::DropStandby(Rank::First, None)]);
    assert_eq!(life.handle(at(20_002), Input::AtRest), [Action::GoOn]);
    assert!(matches!(life.state(), State::Live { .. }));
}

#[test]
fn a_death_while_they_come_to_rest_is_a_failure_as_any_other() {
    let mut life = with_standby_ready();
    life.handle(at(20_000), Input::Restart { fresh: false });
    let panic = failure(NoticedBy::Panic, 20_050);
    assert_eq!(life.handle(at(20_050), Input::Failed(panic.clone())), [Action::Failed(panic), Action::Release]);
    assert_eq!(life.handle(at(20_051), Input::AtRest), []);
    assert_eq!(life.history().total(), 0, "counted when it is fenced");
    life.handle(at(20_060), Input::Released);
    assert_eq!(life.history().total(), 1);
}

#[test]
fn another_disk_is_not_tried_a_second_time() {
    let mut life = with_standby_ready();
    life.handle(at(20_000), Input::Failed(failure(NoticedBy::Identity, 20_000)));
    let actions = life.handle(at(20_010), Input::Released);
    let quarantined =
        actions.iter().any(|action| matches!(action, Action::Quarantine(why) if why.contains("another disk")));
    assert!(quarantined && actions.contains(&Action::DropStandby(Rank::First, None)), "{actions:?}");
    assert_eq!(life.handle(at(20_020), Input::ResetDone), []);
    assert_eq!(*life.state(), State::Quarantined);
    assert_eq!(life.handle(at(30_000), Input::Resume), [Action::Reset], "somebody has put it right");
}
