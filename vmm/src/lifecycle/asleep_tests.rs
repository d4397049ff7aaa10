//! The host sleeps: who gives the device up, what waits, and who begins again.
#![allow(clippy::unwrap_used)]

use super::spare_tests::armed;
use super::tests::{at, bring_up, end, failure, generation, live, with_standby};
use super::*;
use crate::config::Restart;

/// The life that is present gives its device up and is buried; the reset returns.
fn let_go(life: &mut Lifecycle, ms: u64) {
    let actions = life.handle(at(ms), Input::Released);
    assert_eq!(actions, [Action::Reset, Action::BeginLastWords]);
    assert!(life.hold(at(ms)) != Hold::Released, "the reset is under way");
    assert_eq!(life.handle(at(ms + 1), Input::ResetDone), []);
    assert_eq!(*life.state(), State::Asleep);
}

fn planned(actions: &[Action]) -> bool {
    matches!(actions, [Action::Failed(Failure { source: NoticedBy::Planned, .. }), Action::Release])
}

#[test]
fn a_driver_vm_gives_its_device_up_and_is_reborn_when_the_host_wakes() {
    let mut life = live(1);
    assert!(planned(&life.handle(at(2000), Input::Sleep)));
    assert_eq!(life.handle(at(2000), Input::Sleep), [], "once");
    let_go(&mut life, 2001);
    assert_eq!(life.hold(at(2003)), Hold::Released);
    assert_eq!(life.deadline(), None, "a night may be long");
    assert_eq!(life.handle(at(90_000_000), Input::Tick), []);
    assert_eq!(life.handle(at(90_000_000), Input::Wake), [Action::Reset]);
    assert_eq!(life.handle(at(90_000_001), Input::ResetDone), [Action::Spawn(generation(2))]);
    assert_eq!(life.history().total(), 0, "it has not failed");
    assert_eq!(life.handle(at(90_000_002), Input::Wake), [], "once");
}

#[test]
fn a_standby_waits_through_the_night_and_takes_over() {
    let mut life = with_standby();
    assert!(planned(&life.handle(at(2000), Input::Sleep)));
    let_go(&mut life, 2001);
    assert_eq!(life.hold(at(2003)), Hold::Released, "a standby has no device");
    life.handle(at(2500), Input::Wake);
    assert_eq!(life.handle(at(2501), Input::ResetDone), [Action::Adopt(generation(2))]);
}

#[test]
fn a_spare_goes_because_it_has_a_device() {
    let mut life = armed();
    let actions = life.handle(at(2000), Input::Sleep);
    assert_eq!(actions[0], Action::DropStandby(Rank::First, None));
    assert!(planned(&actions[1..]), "{actions:?}");
    let_go(&mut life, 2001);
    assert_eq!(life.hold(at(2003)), Hold::Held { until: Some(at(77_000)) }, "the spare's process has not ended");
    assert_eq!(life.handle(at(2003), Input::SpareFenced), []);
    assert_eq!(life.hold(at(2003)), Hold::Released);
    assert_eq!(life.handle(at(9000), Input::Tick), [], "none is started");
    life.handle(at(9001), Input::Wake);
    assert_eq!(life.handle(at(9002), Input::ResetDone), [Action::Spawn(generation(3))]);
}

#[test]
fn what_is_on_its_way_to_the_next_life_stays_without_one() {
    let mut life = live(1);
    life.handle(at(2000), Input::Failed(failure(NoticedBy::Panic, 2000)));
    assert_eq!(life.handle(at(2000), Input::Sleep), []);
    life.handle(at(2001), Input::Released);
    assert_eq!(life.handle(at(2002), Input::ResetDone), []);
    assert_eq!((life.state(), life.history().total()), (&State::Asleep, 1));

    let mut life = live(1);
    life.handle(at(2000), Input::Failed(failure(NoticedBy::Panic, 2000)));
    life.handle(at(2001), Input::Released);
    assert_eq!(life.handle(at(2001), Input::Sleep), []);
    assert_eq!(life.handle(at(2001), Input::Wake), [], "the reset has not returned: the next life is its own");
    let late = life.handle(at(20_000), Input::ResetDone);
    assert!(matches!(late[..], [Action::Spawn(_)]), "{late:?}");

    let mut life = live(1);
    for ms in [2000, 2010] {
        life.handle(at(ms), Input::Failed(failure(NoticedBy::Panic, ms)));
        life.handle(at(ms + 1), Input::Released);
        life.handle(at(ms + 2), Input::ResetDone);
    }
    assert_eq!(life.state().name(), StateName::BackOff);
    assert_eq!((life.handle(at(2013), Input::Sleep), life.hold(at(2013))), (vec![], Hold::Released));
    assert_eq!(life.handle(at(2014), Input::Wake), [Action::Reset]);
}

#[test]
fn one_that_is_added_meanwhile_touches_no_device_before_the_host_wakes() {
    let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 1, StandbyPolicy::Nothing);
    life.handle(at(0), Input::Sleep);
    assert_eq!((life.handle(at(1), Input::Start), life.state()), (vec![], &State::Asleep));
    assert_eq!(life.hold(at(1)), Hold::Released);
    assert_eq!(life.handle(at(2), Input::Wake), [Action::Reset]);
}

#[test]
fn a_quarantine_outlasts_the_night() {
    let mut life = live(1);
    life.handle(at(2000), Input::Failed(failure(NoticedBy::Identity, 2000)));
    life.handle(at(2001), Input::Released);
    life.handle(at(2002), Input::ResetDone);
    assert_eq!((life.handle(at(2003), Input::Sleep), life.hold(at(2003))), (vec![], Hold::Released));
    assert_eq!(life.handle(at(2004), Input::Resume), [], "a resume would open the device");
    assert_eq!((life.handle(at(2005), Input::Wake), life.state()), (vec![], &State::Quarantined));
    assert_eq!(life.handle(at(2006), Input::Resume), [Action::Reset]);
    let mut stopped = live(1);
    stopped.handle(at(2000), Input::Sleep);
    let_go(&mut stopped, 2001);
    assert_eq!((stopped.handle(at(2003), Input::Stop), stopped.state()), (vec![], &State::Stopped));
}

/// Live since 10 ms, of devices that come to rest.
fn of_disks() -> Lifecycle {
    let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 1, StandbyPolicy::Nothing).with_rest(true);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    life.handle(at(10), Input::EndLive(end(0)));
    life
}

#[test]
fn disks_come_to_rest_before_the_host_sleeps() {
    let mut life = of_disks();
    assert_eq!(life.handle(at(1000), Input::Sleep), [Action::Quiesce]);
    assert_eq!(life.handle(at(1001), Input::Restart { fresh: false }), [Action::RestartOff(asleep::WHY.into())]);
    assert!(planned(&life.handle(at(1500), Input::AtRest)));
    let_go(&mut life, 1501);

    let mut life = of_disks();
    life.handle(at(1000), Input::Sleep);
    assert_eq!(life.handle(at(1001), Input::Wake), [Action::GoOn], "it has not begun");
    assert_eq!((life.handle(at(1002), Input::AtRest), life.state().name()), (vec![], StateName::Live));
    // A death while they do is a failure as any other, without a next life.
    life.handle(at(1003), Input::Sleep);
    life.handle(at(1004), Input::Failed(failure(NoticedBy::Panic, 1004)));
    life.handle(at(1005), Input::Released);
    assert_eq!((life.handle(at(1006), Input::ResetDone), life.state()), (vec![], &State::Asleep));
    assert_eq!(life.history().total(), 1);
}

#[test]
fn a_restart_that_was_asked_for_is_called_off() {
    let mut life = live(1);
    life.handle(at(2000), Input::Restart { fresh: true });
    let actions = life.handle(at(2100), Input::Sleep);
    assert_eq!(actions[0], Action::RestartOff(asleep::WHY.into()));
    let_go(&mut life, 2101);
    life.handle(at(3000), Input::Wake);
    assert!(
        matches!(life.handle(at(3001), Input::ResetDone)[..], [Action::Spawn(_)]),
        "not what was made for the restart"
    );
}

#[test]
fn what_the_kernel_does_not_let_go_of_hangs_in_the_end() {
    // A spare whose process has been killed and does not end.
    let mut life = armed();
    life.handle(at(2000), Input::Sleep);
    let_go(&mut life, 2001);
    assert_eq!(life.hold(at(76_999)), Hold::Held { until: Some(at(77_000)) });
    assert_eq!(life.hold(at(77_000)), Hold::Hangs);
    life.handle(at(90_000), Input::SpareFenced);
    assert_eq!(life.hold(at(90_000)), Hold::Released);
    // A spare whose reset does not return: people hear of it as well.
    let mut life = super::spare_tests::live();
    assert_eq!(life.handle(at(1010), Input::Tick), [Action::ResetSpare]);
    life.handle(at(2000), Input::Sleep);
    let_go(&mut life, 2001);
    assert_eq!(life.hold(at(76_009)), Hold::Held { until: Some(at(76_010)) });
    assert_eq!(life.deadline(), Some(at(76_010)));
    let told = life.handle(at(76_010), Input::Tick);
    assert!(matches!(&told[..], [Action::Warn(what)] if what.contains("reset of the spare's device")), "{told:?}");
    assert_eq!((life.hold(at(76_010)), life.deadline()), (Hold::Hangs, None));
    assert!(life.spare_is_held().unwrap().contains("has not returned for 75 s"));
    life.handle(at(90_000), Input::SpareResetDone);
    assert_eq!((life.hold(at(90_000)), life.spare_is_held()), (Hold::Released, None));
    // The serving life's process, and its reset.
    let mut life = live(1);
    life.handle(at(2000), Input::Sleep);
    life.handle(at(2250), Input::Tick);
    life.handle(at(70_000), Input::Tick);
    assert_eq!(life.hold(at(70_000)), Hold::Held { until: None });
    life.handle(at(77_250), Input::Tick);
    assert_eq!((life.state(), life.hold(at(77_250))), (&State::Quarantined, Hold::Hangs));
    life.handle(at(78_000), Input::ProcessGone("killed".into()));
    assert_eq!(life.hold(at(78_000)), Hold::Held { until: None }, "it is reset");
    life.handle(at(153_000), Input::Tick);
    assert_eq!(life.hold(at(153_000)), Hold::Hangs);
    life.handle(at(154_000), Input::ResetDone);
    assert_eq!(life.hold(at(154_000)), Hold::Released);
}

#[test]
fn a_standby_that_went_with_a_restart_is_replaced_where_the_host_wakes_before_anything_has_begun() {
    let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 1, StandbyPolicy::Warm).with_rest(true);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    life.handle(at(10), Input::EndLive(end(0)));
    life.handle(at(1000), Input::Restart { fresh: true });
    life.handle(at(1001), Input::Tick);
    let slept = life.handle(at(2000), Input::Sleep);
    assert!(slept.contains(&Action::DropStandby(Rank::First, None)) && slept.contains(&Action::Quiesce), "{slept:?}");
    assert_eq!(life.handle(at(2001), Input::Wake), [Action::GoOn]);
    life.handle(at(3000), Input::Heartbeat);
    assert_eq!(life.handle(at(3001), Input::Tick), [Action::SpawnStandby(Rank::First, generation(3))]);
}

#[test]
fn no_standby_is_started_while_disks_come_to_rest_before_a_sleep() {
    let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 1, StandbyPolicy::Warm).with_rest(true);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    life.handle(at(10), Input::EndLive(end(0)));
    assert_eq!(life.handle(at(500), Input::Sleep), [Action::Quiesce]);
    life.handle(at(1009), Input::Heartbeat);
    assert_eq!((life.handle(at(1010), Input::Tick), life.standby()), (vec![], Standby::Absent));
    assert_eq!(life.handle(at(1500), Input::Wake), [Action::GoOn]);
    assert_eq!(life.handle(at(2500), Input::Tick), [Action::SpawnStandby(Rank::First, generation(2))]);
}
