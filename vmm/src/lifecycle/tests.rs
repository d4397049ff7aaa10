//! The lives of a driver VM: the usual way, and each way to fail.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::config::Restart;
use crate::wire::messages::Replay;

pub(super) fn at(ms: u64) -> Time {
    Time(ms * 1_000_000)
}

pub(super) const fn end(place: usize) -> Endpoint {
    Endpoint::at(place)
}

pub(super) fn generation(n: u32) -> Generation {
    Generation::new(n).unwrap()
}

pub(super) fn failure(source: NoticedBy, ms: u64) -> Failure {
    Failure { source, what: "it broke".into(), at: at(ms) }
}

fn new(ends: usize) -> Lifecycle {
    Lifecycle::new(RestartHistory::new(Restart::default()), ends, StandbyPolicy::Nothing)
}

/// A driver VM in its first life, live since 10 ms.
pub(super) fn live(ends: usize) -> Lifecycle {
    let mut life = new(ends);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    for place in 0..ends {
        life.handle(at(10), Input::EndLive(end(place)));
    }
    assert_eq!(*life.state(), State::Live { since: at(10) });
    life
}

/// From the reset to the replay; returns what that asked for last.
pub(super) fn bring_up(life: &mut Lifecycle, now: Time) -> Vec<Action> {
    life.handle(now, Input::ResetDone);
    life.handle(now, Input::Hello);
    life.handle(now, Input::Forwarding);
    life.handle(now, Input::Carrier(Carrier::Up))
}

/// The next life, started just now.
fn bring_up_again(life: &mut Lifecycle, now: Time) -> Vec<Action> {
    life.handle(now, Input::Hello);
    life.handle(now, Input::Forwarding);
    life.handle(now, Input::Carrier(Carrier::Up))
}

#[test]
fn the_first_life_goes_through_its_stages_to_live() {
    let mut life = new(2);
    assert_eq!(life.handle(at(0), Input::Start), [Action::Reset]);
    assert_eq!(life.handle(at(1), Input::ResetDone), [Action::Spawn(generation(1))]);
    assert_eq!(life.handle(at(2), Input::Hello), [Action::Configure]);
    assert_eq!(life.handle(at(3), Input::Forwarding), []);
    let replay = |end: Endpoint| Action::GoLive(end, Replay::Everything);
    assert_eq!(life.handle(at(4), Input::Carrier(Carrier::Up)), [replay(end(0)), replay(end(1))]);
    assert_eq!(life.handle(at(5), Input::EndLive(end(1))), []);
    assert_eq!(life.handle(at(6), Input::EndLive(end(0))), [Action::Live]);
    assert_eq!(life.state().name(), StateName::Live);
}

#[test]
fn a_carrier_is_waited_for_as_long_as_the_policy_says() {
    for (policy, seconds) in [(Restart::default(), 6), (Restart { carrier_timeout_s: 20, ..Restart::default() }, 20)] {
        let mut life = Lifecycle::new(RestartHistory::new(policy), 1, StandbyPolicy::Nothing);
        life.handle(at(0), Input::Start);
        life.handle(at(0), Input::ResetDone);
        life.handle(at(0), Input::Hello);
        life.handle(at(1000), Input::Forwarding);
        let over = at(1000 * (seconds + 1));
        // Before the heartbeat is missed.
        life.handle(Time(over.0 - 1_000_000), Input::Heartbeat);
        assert_eq!(life.handle(Time(over.0 - 1), Input::Tick), []);
        assert_eq!(life.handle(over, Input::Tick), [Action::GoLive(end(0), Replay::Everything)]);
    }
}

#[test]
fn a_panic_is_fenced_reported_reset_and_restarted() {
    let mut life = live(1);
    let panic = failure(NoticedBy::Panic, 2000);
    assert_eq!(life.handle(at(2000), Input::Failed(panic.clone())), [Action::Failed(panic), Action::Release]);
    let fenced = [Action::Reset, Action::BeginLastWords, Action::Report];
    assert_eq!(life.handle(at(2003), Input::Released), fenced, "the reset first, and nobody waits for the process");
    assert_eq!(life.handle(at(2004), Input::Released), [], "once");
    assert_eq!(life.handle(at(2100), Input::ResetDone), [Action::Spawn(generation(2))]);
}

#[test]
fn a_process_that_does_not_give_the_device_up_is_killed() {
    let mut life = live(1);
    life.handle(at(2000), Input::Failed(failure(NoticedBy::Agent, 2000)));
    assert_eq!(life.deadline(), Some(at(2250)));
    assert_eq!(life.handle(at(2249), Input::Tick), []);
    assert_eq!(life.handle(at(2250), Input::Tick), [Action::Kill]);
    assert_eq!(life.handle(at(2251), Input::Evidence), [], "killed once");
    assert_eq!(life.handle(at(2251), Input::Released), [], "too late");
    assert_eq!(life.handle(at(2253), Input::ProcessGone("killed".into())), [Action::Reset, Action::Report]);
}

#[test]
fn kill_9_needs_no_fence() {
    let mut life = live(1);
    let gone = Failure { source: NoticedBy::ProcessExit, what: "signal 9".into(), at: at(50) };
    let actions = life.handle(at(50), Input::ProcessGone("signal 9".into()));
    assert_eq!(actions, [Action::Failed(gone), Action::Reset, Action::Report]);
}

#[test]
fn a_closed_link_waits_for_the_better_reason_and_keeps_its_time() {
    let mut life = live(1);
    assert_eq!(life.handle(at(2000), Input::Sign(failure(NoticedBy::Link, 1999))), [Action::Mask]);
    assert_eq!(life.handle(at(2001), Input::Sign(failure(NoticedBy::ControlStream, 2001))), [], "the first counts");
    let actions = life.handle(at(2003), Input::Failed(failure(NoticedBy::Panic, 2003)));
    assert_eq!(actions.first(), Some(&Action::Failed(failure(NoticedBy::Panic, 1999))));
}

#[test]
fn a_closed_link_without_a_better_reason_is_the_failure() {
    let mut life = live(1);
    life.handle(at(2000), Input::Sign(failure(NoticedBy::Link, 1999)));
    assert_eq!(life.handle(at(2099), Input::Tick), []);
    let actions = life.handle(at(2100), Input::Tick);
    assert_eq!(actions, [Action::Failed(failure(NoticedBy::Link, 1999)), Action::Release]);
}

#[test]
fn a_silent_agent_fails_after_the_heartbeat_timeout() {
    let mut life = live(1);
    life.handle(at(1000), Input::Heartbeat);
    assert_eq!(life.deadline(), Some(at(4000)));
    assert_eq!(life.handle(at(3999), Input::Tick), []);
    let actions = life.handle(at(4000), Input::Tick);
    assert!(matches!(&actions[..], [Action::Failed(f), Action::Release] if f.source == NoticedBy::Heartbeat));
}

#[test]
fn silence_for_want_of_a_processor_is_excused_for_a_while() {
    let mut life = live(1);
    life.handle(at(1000), Input::Heartbeat);
    assert_eq!(life.silence(), Some((at(2500), at(4000))));
    life.handle(at(4000), Input::Starved);
    assert_eq!(life.silence(), Some((at(4000), at(5500))));
    assert_eq!(life.handle(at(5499), Input::Tick), []);
    life.handle(at(5000), Input::Heartbeat);
    assert_eq!(life.silence(), Some((at(6500), at(8000))), "heard again");
    (0..100).for_each(|_| drop(life.handle(at(8000), Input::Starved)));
    assert_eq!(life.deadline(), Some(at(17_000)));
    let actions = life.handle(at(17_000), Input::Tick);
    let [Action::Failed(failure), Action::Release] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!((failure.at, failure.what.as_str()), (at(5000), "no heartbeat for 12000 ms"));
}

#[test]
fn a_boot_that_takes_too_long_fails() {
    let mut life = new(1);
    life.handle(at(0), Input::Start);
    life.handle(at(0), Input::ResetDone);
    life.handle(at(100), Input::Hello);
    let actions = life.handle(at(60_000), Input::Tick);
    assert!(matches!(&actions[..], [Action::Failed(f), _] if f.source == NoticedBy::BootTimeout));
}

#[test]
fn a_cable_that_is_out_does_not_keep_the_guest_waiting() {
    let mut life = new(1);
    life.handle(at(0), Input::Start);
    life.handle(at(0), Input::ResetDone);
    life.handle(at(0), Input::Hello);
    life.handle(at(0), Input::Forwarding);
    life.handle(at(5000), Input::Heartbeat);
    assert_eq!(life.handle(at(6000), Input::Tick), [Action::GoLive(end(0), Replay::Everything)]);
    assert_eq!(life.carrier(), Carrier::Down);
}

#[test]
fn a_life_that_dies_replaying_makes_its_log_suspect() {
    let mut life = new(2);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    life.handle(at(1), Input::EndLive(end(0)));
    life.handle(at(2), Input::ProcessGone("signal 9".into()));
    let again = bring_up(&mut life, at(3));
    assert_eq!(again, [Action::GoLive(end(0), Replay::Everything), Action::GoLive(end(1), Replay::ConfigurationOnly)]);
    life.handle(at(4), Input::EndLive(end(0)));
    life.handle(at(4), Input::EndLive(end(1)));
    life.handle(at(5), Input::ProcessGone("signal 9".into()));
    // The second failure in a row waits for its back-off.
    assert_eq!(life.handle(at(6), Input::ResetDone), []);
    assert_eq!(life.state().name(), StateName::BackOff);
    let until = life.deadline().unwrap();
    assert_eq!(life.handle(until, Input::Tick), [Action::Spawn(generation(3))]);
    life.handle(until, Input::Hello);
    life.handle(until, Input::Forwarding);
    let third = life.handle(until, Input::Carrier(Carrier::Up));
    assert_eq!(third, [Action::GoLive(end(0), Replay::Everything), Action::GoLive(end(1), Replay::Everything)]);
}

#[test]
fn after_two_deaths_in_replay_an_end_starts_clean() {
    let mut life = new(2);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    life.handle(at(1), Input::EndLive(end(0)));
    let first = life.handle(at(2), Input::ProcessGone("signal 9".into()));
    assert!(!first.iter().any(|action| matches!(action, Action::StartClean(_))), "{first:?}");
    bring_up(&mut life, at(3));
    life.handle(at(4), Input::EndLive(end(0)));
    let second = life.handle(at(5), Input::ProcessGone("signal 9".into()));
    assert!(
        second.contains(&Action::StartClean(end(1))) && !second.contains(&Action::StartClean(end(0))),
        "{second:?}"
    );
    assert!(life.starts_clean(end(1)) && !life.starts_clean(end(0)));
    life.handle(at(6), Input::ResetDone);
    let until = life.deadline().unwrap();
    life.handle(until, Input::Tick);
    life.handle(until, Input::Hello);
    life.handle(until, Input::Forwarding);
    life.handle(until, Input::Carrier(Carrier::Up));
    life.handle(until, Input::EndLive(end(0)));
    life.handle(until, Input::EndLive(end(1)));
    assert!(!life.starts_clean(end(1)), "it is live");
}

#[test]
fn a_death_with_the_configuration_alone_leaves_the_log_but_counts() {
    let mut life = new(1);
    life.handle(at(0), Input::Start);
    let to_carrier = |life: &mut Lifecycle, now| {
        life.handle(now, Input::ResetDone);
        if let Some(until) = life.deadline().filter(|_| life.state().name() == StateName::BackOff) {
            life.handle(until, Input::Tick);
        }
        life.handle(now, Input::Hello);
        life.handle(now, Input::Forwarding);
        assert_eq!(life.state().name(), StateName::WaitingCarrier);
    };
    to_carrier(&mut life, at(0));
    life.handle(at(1), Input::ProcessGone("signal 9".into()));
    to_carrier(&mut life, at(2));
    assert_eq!(life.handle(at(3), Input::Carrier(Carrier::Up)), [Action::GoLive(end(0), Replay::Everything)]);
    let again = life.handle(at(4), Input::ProcessGone("signal 9".into()));
    assert!(again.contains(&Action::StartClean(end(0))), "{again:?}");
}

#[test]
fn past_the_limit_it_is_quarantined_with_a_quiet_device() {
    let mut life =
        Lifecycle::new(RestartHistory::new(Restart { limit: 0, ..Restart::default() }), 1, StandbyPolicy::Nothing);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    let actions = life.handle(at(9), Input::ProcessGone("signal 9".into()));
    assert!(matches!(&actions[..], [_, Action::Reset, Action::Report, Action::Quarantine(_)]), "{actions:?}");
    assert_eq!(life.handle(at(10), Input::ResetDone), []);
    assert_eq!(*life.state(), State::Quarantined);
}

#[test]
fn a_quarantine_that_is_ended_begins_anew() {
    let mut life =
        Lifecycle::new(RestartHistory::new(Restart { limit: 1, ..Restart::default() }), 1, StandbyPolicy::Nothing);
    life.handle(at(0), Input::Start);
    assert_eq!(life.handle(at(1), Input::Resume), [], "it is not quarantined");
    bring_up(&mut life, at(1));
    for _ in 0..2 {
        life.handle(at(5), Input::ProcessGone("signal 9".into()));
        life.handle(at(5), Input::ResetDone);
        life.handle(at(5), Input::Hello);
        life.handle(at(5), Input::Forwarding);
        life.handle(at(5), Input::Carrier(Carrier::Up));
        life.handle(at(5), Input::EndLive(end(0)));
    }
    assert_eq!(*life.state(), State::Quarantined);
    assert_eq!(life.handle(at(60), Input::Resume), [Action::Reset]);
    assert_eq!(life.handle(at(61), Input::ResetDone), [Action::Spawn(generation(3))]);
    life.handle(at(62), Input::ProcessGone("signal 9".into()));
    let again = matches!(life.state(), State::Resetting { next: Some(_), .. });
    assert!(again, "what was before the quarantine does not count: {:?}", life.state());
}

#[test]
fn a_reset_that_hangs_ends_in_quarantine() {
    let mut life = new(1);
    life.handle(at(0), Input::Start);
    let actions = life.handle(at(0) + RESET_PATIENCE, Input::Tick);
    assert!(matches!(&actions[..], [Action::Quarantine(_)]));
    assert_eq!(life.handle(at(80_000), Input::Resume), [], "a second reset would run beside it");
    assert_eq!(life.handle(at(90_000), Input::ResetDone), [], "too late");
    assert_eq!(life.handle(at(95_000), Input::Resume), [Action::Reset]);
}

#[test]
fn a_guest_that_reboots_costs_its_own_end_and_is_served_again_when_it_is_back() {
    let mut life = with_standby();
    assert_eq!(life.handle(at(2000), Input::EndGone(end(0))), []);
    assert!(matches!(life.state(), State::Live { .. }) && life.standby().generation().is_some(), "both live on");
    assert_eq!(life.handle(at(2100), Input::EndHere(end(0))), [Action::GoLive(end(0), Replay::Everything)]);
    assert_eq!(life.handle(at(2101), Input::EndLive(end(0))), [Action::EndLive(end(0))]);
    assert_eq!(life.handle(at(2102), Input::EndLive(end(0))), [], "told once");
    assert_eq!(life.history().total(), 0);
}

#[test]
fn a_life_without_guests_goes_live_and_serves_those_that_come() {
    let mut life = new(0);
    life.handle(at(0), Input::Start);
    assert_eq!(bring_up(&mut life, at(0)).last(), Some(&Action::Live));
    assert_eq!(life.handle(at(100), Input::EndHere(end(3))), [Action::GoLive(end(3), Replay::Everything)]);
    assert_eq!(life.handle(at(101), Input::EndLive(end(3))), [Action::EndLive(end(3))]);
    // The next life waits for it.
    life.handle(at(200), Input::Failed(failure(NoticedBy::Panic, 200)));
    life.handle(at(201), Input::ProcessGone("gone".into()));
    life.handle(at(202), Input::ResetDone);
    let actions = bring_up_again(&mut life, at(300));
    assert_eq!(actions, [Action::GoLive(end(3), Replay::Everything)]);
    assert_eq!(life.handle(at(301), Input::EndLive(end(3))), [Action::Live]);
}

#[test]
fn a_guest_that_does_not_answer_holds_up_neither_the_others_nor_the_standby() {
    let mut life = new(2);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    life.handle(at(10), Input::EndLive(end(1)));
    let limit = at(0) + GOING_LIVE_PATIENCE;
    life.handle(limit, Input::Heartbeat);
    assert_eq!(life.deadline(), Some(limit));
    assert_eq!(life.handle(limit, Input::Tick), [Action::Live, Action::LeaveBehind(end(0))]);
    assert!(matches!(life.state(), State::Live { .. }));
    assert_eq!(life.history().total(), 0, "it is no failure of the driver VM");
    assert_eq!(life.handle(at(60_000), Input::EndLive(end(0))), [Action::EndLive(end(0))]);
}

#[test]
fn a_replay_at_an_end_that_came_late_is_suspected_when_the_life_dies_of_it() {
    let mut life = live(1);
    life.handle(at(2000), Input::EndGone(end(0)));
    life.handle(at(2001), Input::EndHere(end(0)));
    life.handle(at(2002), Input::Failed(failure(NoticedBy::Panic, 2002)));
    life.handle(at(2003), Input::ProcessGone("gone".into()));
    life.handle(at(2004), Input::ResetDone);
    assert_eq!(bring_up_again(&mut life, at(2100)), [Action::GoLive(end(0), Replay::ConfigurationOnly)]);
}

#[test]
fn an_adopted_standby_that_falls_silent_is_noticed_before_it_forwards() {
    let mut life = with_standby();
    life.handle(at(2000), Input::StandbyHello(Rank::First));
    life.handle(at(2000), Input::StandbyLoaded(Rank::First));
    life.handle(at(3000), Input::ProcessGone("signal 9".into()));
    life.handle(at(3100), Input::ResetDone);
    let silence = 4 * u64::from(Restart::default().heartbeat_timeout_ms);
    assert_eq!(life.deadline(), Some(at(3100 + silence)));
    let actions = life.handle(at(3100 + silence), Input::Tick);
    assert!(matches!(&actions[..], [Action::Failed(f), _] if f.source == NoticedBy::Heartbeat), "{actions:?}");
}

#[test]
fn a_restart_of_a_cold_driver_vm_is_no_business_of_a_guest_that_goes() {
    let mut life = live(2);
    life.handle(at(2000), Input::Restart { fresh: false });
    assert_eq!(life.handle(at(2000), Input::Tick), [Action::SpawnStandby(Rank::First, generation(2))]);
    assert_eq!(life.handle(at(2100), Input::EndGone(end(0))), []);
    assert_eq!(life.handle(at(2100), Input::Tick), []);
}

#[test]
fn a_restart_does_not_wait_for_ever() {
    let mut life = live(1);
    life.handle(at(2000), Input::Restart { fresh: true });
    life.handle(at(2000), Input::Tick);
    let until = life.reserve.deadline().unwrap();
    life.handle(until, Input::Heartbeat);
    let actions = life.handle(until, Input::Tick);
    assert!(actions.iter().any(|action| matches!(action, Action::RestartOff(_))), "{actions:?}");
}

#[test]
fn a_fresh_standby_goes_with_the_restart_that_is_given_up() {
    let mut life = with_standby();
    life.handle(at(2000), Input::StandbyHello(Rank::First));
    life.handle(at(2000), Input::StandbyLoaded(Rank::First));
    assert_eq!(life.handle(at(2500), Input::Restart { fresh: true }), [Action::DropStandby(Rank::First, None)]);
    // It waits for its turn, and boots when the patience with the restart is almost over.
    let until = life.restarting.unwrap();
    life.handle(Time(until.0 - 1_000_000), Input::Heartbeat);
    assert_eq!(life.handle(Time(until.0 - 1_000_000), Input::Tick), [Action::SpawnStandby(Rank::First, generation(3))]);
    let actions = life.handle(until, Input::Tick);
    assert_eq!(
        actions,
        [Action::RestartOff("it was not ready in time".into()), Action::DropStandby(Rank::First, None)]
    );
    assert!(matches!(life.standby(), Standby::Due(_)), "the next one is as those before");
}

/// Warm, live since 10 ms, its standby ready at 2 s.
pub(super) fn with_standby() -> Lifecycle {
    let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 1, StandbyPolicy::Warm);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    assert_eq!(life.handle(at(10), Input::EndLive(end(0))), [Action::Live]);
    assert_eq!(life.handle(at(1009), Input::Tick), [], "the machine is left in peace first");
    assert_eq!(life.handle(at(1010), Input::Tick), [Action::SpawnStandby(Rank::First, generation(2))]);
    life
}

#[test]
fn standbys_boot_one_after_the_other_but_wait_no_longer_than_that() {
    let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 1, StandbyPolicy::Warm);
    life.handle(at(0), Input::Start);
    bring_up(&mut life, at(0));
    life.handle(at(10), Input::EndLive(end(0)));
    life.wait_turn(at(500));
    assert_eq!(life.standby(), Standby::Due(at(1010)), "it is not due yet");
    let mut now = 1010;
    life.wait_turn(at(now));
    while life.handle(at(now), Input::Tick).is_empty() {
        now += 250;
        assert!(now < 30_000, "it waits for ever");
        life.handle(at(now), Input::Heartbeat);
        life.wait_turn(at(now));
    }
    assert!((15_000..16_500).contains(&now), "{now}");
    assert!(life.standby_boots());
}

#[test]
fn a_life_is_on_its_way_until_it_serves_and_others_wait_for_it() {
    let mut life = with_standby();
    assert!(!life.is_on_its_way(), "it serves, and its standby boots");
    life.handle(at(1500), Input::Failed(failure(NoticedBy::Panic, 1500)));
    assert!(life.is_on_its_way(), "{:?}", life.state());
    for input in
        [Input::ProcessGone("signal 9".into()), Input::ResetDone, Input::StandbyHello(Rank::First), Input::Hello]
    {
        life.handle(at(1600), input);
        assert!(life.is_on_its_way(), "{:?}", life.state());
    }
    life.handle(at(1600), Input::Forwarding);
    assert!(!life.is_on_its_way(), "a carrier may never come");
    life.handle(at(1600), Input::Carrier(Carrier::Up));
    assert!(life.is_on_its_way(), "{:?}", life.state());
    life.handle(at(1700), Input::EndLive(end(0)));
    assert_eq!((life.state().name(), life.is_on_its_way()), (StateName::Live, false));
}

#[test]
fn a_ready_standby_takes_over_and_the_next_one_follows() {
    let mut life = with_standby();
    assert_eq!(
        life.handle(at(2000), Input::StandbyHello(Rank::First)),
        [Action::ConfigureStandby(Rank::First)],
        "all that can be done ahead"
    );
    life.handle(at(2000), Input::StandbyLoaded(Rank::First));
    assert_eq!(life.standby().stage(), StandbyStage::Ready);
    life.handle(at(3000), Input::ProcessGone("signal 9".into()));
    let actions = life.handle(at(3100), Input::ResetDone);
    assert_eq!(actions, [Action::Adopt(generation(2))], "it has its plan");
    assert_eq!((life.state().name(), life.generation()), (StateName::Configuring, Some(generation(2))));
    life.handle(at(3200), Input::Forwarding);
    life.handle(at(3200), Input::Carrier(Carrier::Up));
    assert_eq!(life.standby(), Standby::Absent, "none boots beside a recovery");
    life.handle(at(3300), Input::EndLive(end(0)));
    assert_eq!(life.handle(at(4300), Input::Tick), [Action::SpawnStandby(Rank::First, generation(3))]);
}

#[test]
fn a_standby_that_still_boots_is_better_than_a_new_one() {
    let mut life = with_standby();
    life.handle(at(1500), Input::ProcessGone("signal 9".into()));
    assert_eq!(life.handle(at(1600), Input::ResetDone), [Action::Adopt(generation(2))]);
    assert_eq!(life.handle(at(1700), Input::Hello), [Action::Configure]);
}

#[test]
fn a_standby_that_dies_is_replaced_ever_more_slowly_and_missed_by_nobody() {
    let mut life = with_standby();
    let mut now = at(1100);
    for (n, seconds) in [1, 2, 4, 8, 16, 32, 60, 60].into_iter().enumerate() {
        let actions = life.handle(now, Input::StandbyFailed(Rank::First, "it broke".into()));
        assert_eq!(actions, [Action::DropStandby(Rank::First, Some("it broke".into()))]);
        now = now + Duration::from_secs(seconds);
        life.handle(now, Input::Heartbeat);
        let next = u32::try_from(n).unwrap() + 3;
        assert_eq!(life.handle(now, Input::Tick), [Action::SpawnStandby(Rank::First, generation(next))]);
    }
    life.handle(now, Input::StandbyFailed(Rank::First, "it broke".into()));
    life.handle(now, Input::ProcessGone("signal 9".into()));
    assert_eq!(life.handle(now, Input::ResetDone), [Action::Spawn(generation(11))], "a cold boot");
}

#[test]
fn a_silent_standby_is_given_up() {
    let mut life = with_standby();
    life.handle(at(2000), Input::StandbyHello(Rank::First));
    life.handle(at(2000), Input::StandbyLoaded(Rank::First));
    let silence = 4 * u64::from(Restart::default().heartbeat_timeout_ms);
    life.handle(at(2000 + silence), Input::Heartbeat);
    let actions = life.handle(at(2000 + silence), Input::Tick);
    assert!(
        matches!(&actions[..], [Action::DropStandby(Rank::First, Some(why))] if why.contains("heartbeat")),
        "{actions:?}"
    );
}

#[test]
fn a_restart_waits_for_a_standby_and_counts_as_no_failure() {
    let mut life = live(1);
    assert_eq!(life.handle(at(2000), Input::Restart { fresh: true }), []);
    assert_eq!(
        life.handle(at(2000), Input::Tick),
        [Action::SpawnStandby(Rank::First, generation(2))],
        "though it is cold"
    );
    life.handle(at(2500), Input::StandbyHello(Rank::First));
    let actions = life.handle(at(2600), Input::StandbyLoaded(Rank::First));
    assert!(
        matches!(&actions[..], [Action::Failed(f), Action::Release] if f.source == NoticedBy::Planned),
        "{actions:?}"
    );
    assert_eq!(life.handle(at(2610), Input::Released), [Action::Reset, Action::BeginLastWords]);
    assert_eq!(life.handle(at(2700), Input::ResetDone)[0], Action::Adopt(generation(2)));
    assert_eq!(life.history().total(), 0);
}

#[test]
fn a_restart_whose_driver_vm_does_not_come_up_changes_nothing() {
    let mut life = with_standby();
    life.handle(at(2000), Input::StandbyHello(Rank::First));
    life.handle(at(2000), Input::StandbyLoaded(Rank::First));
    assert_eq!(life.handle(at(2500), Input::Restart { fresh: true }), [Action::DropStandby(Rank::First, None)]);
    assert_eq!(life.handle(at(2500), Input::Tick), [Action::SpawnStandby(Rank::First, generation(3))]);
    let why = String::from("no init");
    let off = [Action::DropStandby(Rank::First, Some(why.clone())), Action::RestartOff(why.clone())];
    assert_eq!(life.handle(at(3000), Input::StandbyFailed(Rank::First, why)), off);
    assert_eq!((life.state().name(), life.generation()), (StateName::Live, Some(generation(1))));
}

#[test]
fn a_stop_takes_the_standby_along() {
    let mut life = with_standby();
    assert_eq!(life.handle(at(1200), Input::Stop), [Action::DropStandby(Rank::First, None), Action::Kill]);
}

#[test]
fn messages_of_the_dead_change_nothing() {
    let mut life = live(1);
    life.handle(at(50), Input::ProcessGone("signal 9".into()));
    let before = life.state().clone();
    for late in [
        Input::Hello,
        Input::Forwarding,
        Input::Heartbeat,
        Input::EndLive(end(0)),
        Input::Evidence,
        Input::Released,
        Input::Start,
    ] {
        assert_eq!(life.handle(at(60), late.clone()), [], "{late:?}");
    }
    assert_eq!(*life.state(), before);
}
