//! The hot spare: devices that change places, each failure of either, and any order of inputs at all.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::any_order_tests::{Replays, next_input};
use super::tests::end;
use super::*;
use crate::config::Restart;
use crate::wire::messages::Replay;

fn at(ms: u64) -> Time {
    Time(ms * 1_000_000)
}

pub(super) fn generation(n: u32) -> Generation {
    Generation::new(n).unwrap()
}

pub(super) fn failure(source: NoticedBy, ms: u64) -> Failure {
    Failure { source, what: "it broke".into(), at: at(ms) }
}

/// With a spare and two ends, live since 10 ms.
pub(super) fn live() -> Lifecycle {
    let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 2, StandbyPolicy::Spare);
    life.handle(at(0), Input::Start);
    for input in [Input::ResetDone, Input::Hello, Input::Forwarding, Input::Carrier(Carrier::Up)] {
        life.handle(at(0), input);
    }
    life.handle(at(10), Input::EndLive(end(0)));
    assert_eq!(life.handle(at(10), Input::EndLive(end(1))), [Action::Live]);
    life
}

/// From the settling at `now` to the armed spare of generation `n`.
pub(super) fn arm(life: &mut Lifecycle, now: Time, n: u32) {
    assert_eq!(life.handle(now, Input::Tick), [Action::ResetSpare], "its device is reset first");
    assert_eq!(life.handle(now, Input::SpareResetDone), [Action::SpawnStandby(Rank::First, generation(n))]);
    assert_eq!(life.handle(now, Input::StandbyHello(Rank::First)), [Action::ConfigureStandby(Rank::First)]);
    assert_eq!(life.handle(now, Input::StandbyLoaded(Rank::First)), []);
    assert_eq!(life.handle(now, Input::SpareForwarding), []);
    assert_eq!(life.standby().stage(), StandbyStage::NoCarrier);
    assert_eq!(life.handle(now, Input::SpareCarrier(Carrier::Up)), [Action::Arm(true)]);
    assert!(life.is_armed());
    assert_eq!(life.standby().stage(), StandbyStage::Armed);
}

pub(super) fn armed() -> Lifecycle {
    let mut life = live();
    arm(&mut life, at(1010), 2);
    life
}

fn replay(end: Endpoint) -> Action {
    Action::GoLive(end, Replay::Everything)
}

#[test]
fn a_spare_that_gets_no_processor_is_excused_for_a_while() {
    let mut life = armed();
    life.handle(at(4010), Input::Heartbeat);
    let silence = |life: &Lifecycle| life.silence_of(Rank::First);
    assert_eq!(silence(&life), Some((at(2510), at(4010))));
    life.excuse(Rank::First);
    assert_eq!(silence(&life), Some((at(4010), at(5510))));
    assert_eq!(life.handle(at(5509), Input::Tick), []);
    let mut taken = life.clone();
    taken.handle(at(5000), Input::Failed(failure(NoticedBy::Link, 5000)));
    assert_eq!(taken.silence().map(|(_, over)| over), Some(at(5510)), "it is not held against it");
    (0..100).for_each(|_| life.excuse(Rank::First));
    assert_eq!(silence(&life).map(|(_, over)| over), Some(at(13_010)), "four times the time in all");
    life.handle(at(6000), Input::StandbyHeartbeat(Rank::First));
    assert_eq!(silence(&life), Some((at(7500), at(9000))));
    let actions = life.handle(at(9000), Input::Tick);
    assert!(actions.iter().any(|action| matches!(action, Action::DropStandby(Rank::First, Some(_)))), "{actions:?}");
}

#[test]
fn an_armed_spare_takes_over_at_once_and_the_devices_change_places() {
    let mut life = armed();
    let panic = failure(NoticedBy::Panic, 2000);
    let actions = life.handle(at(2000), Input::Failed(panic.clone()));
    assert_eq!(actions, [Action::Failed(panic), Action::TakeOver(generation(2)), replay(end(0)), replay(end(1))]);
    assert_eq!((life.generation(), life.carrier()), (Some(generation(2)), Carrier::Up));
    assert_eq!(life.standby().stage(), StandbyStage::Recovering);
    life.handle(at(2001), Input::EndLive(end(0)));
    assert_eq!(life.handle(at(2002), Input::EndLive(end(1))), [Action::Live]);
    assert_eq!(life.handle(at(2100), Input::SpareFenced), [Action::ReportFenced], "beside the service");
    assert_eq!(life.handle(at(2999), Input::Tick), []);
    // The failed one's device is the spare's now.
    arm(&mut life, at(3100), 3);
    let actions = life.handle(at(4000), Input::ProcessGone("signal 9".into()));
    assert!(matches!(&actions[..], [Action::Failed(_), Action::TakeOver(g), ..] if *g == generation(3)), "{actions:?}");
    assert_eq!(life.history().total(), 2);
}

#[test]
fn ends_that_went_over_by_themselves_are_not_waited_for() {
    let mut life = armed();
    assert_eq!(life.handle(at(2000), Input::Sign(failure(NoticedBy::Link, 2000))), [Action::Mask]);
    assert_eq!(life.handle(at(2001), Input::SpareLive(end(1))), []);
    assert_eq!(life.handle(at(2001), Input::SpareLive(end(0))), []);
    assert_eq!(life.state().name(), StateName::Live, "the better reason is waited for");
    let actions = life.handle(at(2050), Input::ProcessGone("signal 9".into()));
    let [Action::Failed(why), rest @ ..] = &actions[..] else { panic!("{actions:?}") };
    assert_eq!((why.source, why.at), (NoticedBy::ProcessExit, at(2000)));
    assert_eq!(*rest, [Action::TakeOver(generation(2)), replay(end(0)), replay(end(1)), Action::Live]);
}

#[test]
fn an_end_that_is_ahead_of_the_supervisor_is_not_waited_for() {
    let mut life = armed();
    // The splitter had not heard of that when it lost its link.
    assert_eq!(life.handle(at(1990), Input::SpareCarrier(Carrier::Down)), [Action::Arm(false)]);
    life.handle(at(2000), Input::Failed(failure(NoticedBy::Panic, 2000)));
    assert_eq!(life.state().name(), StateName::WaitingCarrier);
    life.handle(at(2001), Input::EndLive(end(0)));
    life.handle(at(2500), Input::Carrier(Carrier::Up));
    assert_eq!(life.handle(at(2501), Input::EndLive(end(1))), [Action::Live]);
}

#[test]
fn an_end_that_came_late_to_the_life_before_is_no_suspect_of_the_next() {
    let mut life = armed();
    // Its guest reboots, and has not gone live again when the life dies: that log is suspect, until it is live with the spare.
    assert_eq!(life.handle(at(1500), Input::EndGone(end(0))), []);
    assert_eq!(life.handle(at(1600), Input::EndHere(end(0))), [replay(end(0))]);
    let actions = life.handle(at(2000), Input::Failed(failure(NoticedBy::Panic, 2000)));
    assert!(actions.contains(&Action::GoLive(end(0), Replay::ConfigurationOnly)), "{actions:?}");
    life.handle(at(2001), Input::EndLive(end(0)));
    assert_eq!(life.handle(at(2002), Input::EndLive(end(1))), [Action::Live]);
    life.handle(at(2100), Input::SpareFenced);
    arm(&mut life, at(3100), 3);
    let actions = life.handle(at(9000), Input::Failed(failure(NoticedBy::Panic, 9000)));
    assert!(actions.ends_with(&[replay(end(0)), replay(end(1))]), "{actions:?}");
}

#[test]
fn a_spare_that_still_boots_is_sooner_than_the_failed_device() {
    let mut life = live();
    life.handle(at(1010), Input::Tick);
    life.handle(at(1100), Input::SpareResetDone);
    life.handle(at(1200), Input::StandbyHello(Rank::First));
    let actions = life.handle(at(1300), Input::Failed(failure(NoticedBy::Panic, 1300)));
    assert!(matches!(&actions[..], [Action::Failed(_), Action::TakeOver(_)]), "configured already: {actions:?}");
    assert_eq!(life.state().name(), StateName::Configuring);
    life.handle(at(1400), Input::Forwarding);
    assert_eq!(life.handle(at(1500), Input::Carrier(Carrier::Up)), [replay(end(0)), replay(end(1))]);
}

#[test]
fn a_spare_that_fails_is_fenced_reset_and_replaced_and_missed_by_nobody() {
    let mut life = armed();
    let mut now = at(2000);
    for (n, seconds) in [1_u64, 2, 4].into_iter().enumerate() {
        let why = String::from("it broke");
        assert_eq!(
            life.handle(now, Input::StandbyFailed(Rank::First, why.clone())),
            [Action::DropStandby(Rank::First, Some(why))]
        );
        assert_eq!(life.handle(now, Input::StandbyFailed(Rank::First, "late".into())), []);
        assert_eq!(life.handle(now, Input::SpareFenced), [], "it has not served: no report");
        now = now + Duration::from_secs(seconds);
        life.handle(now, Input::Heartbeat);
        arm(&mut life, now, u32::try_from(n).unwrap() + 3);
        assert_eq!((life.state().name(), life.generation()), (StateName::Live, Some(generation(1))));
    }
    assert_eq!(life.history().total(), 0);
}

#[test]
fn a_silent_spare_is_noticed_as_soon_as_a_silent_life_in_service() {
    let mut life = armed();
    life.handle(at(4009), Input::Heartbeat);
    assert_eq!(life.handle(at(4009), Input::Tick), []);
    let actions = life.handle(at(4010), Input::Tick);
    assert!(
        matches!(&actions[..], [Action::DropStandby(Rank::First, Some(why))] if why.contains("heartbeat")),
        "{actions:?}"
    );
}

#[test]
fn a_spare_without_carrier_waits_for_it_disarmed() {
    let mut life = armed();
    assert_eq!(life.handle(at(2000), Input::SpareCarrier(Carrier::Down)), [Action::Arm(false)]);
    assert_eq!(life.handle(at(2000), Input::SpareCarrier(Carrier::Down)), []);
    assert_eq!(life.handle(at(2100), Input::SpareCarrier(Carrier::Up)), [Action::Arm(true)]);
}

#[test]
fn with_both_down_the_serving_device_recovers_first() {
    let mut life = armed();
    life.handle(at(2000), Input::StandbyFailed(Rank::First, "it broke".into()));
    let actions = life.handle(at(2001), Input::Failed(failure(NoticedBy::Panic, 2001)));
    assert!(matches!(&actions[..], [Action::Failed(_), Action::Release]), "{actions:?}");
    assert_eq!(life.handle(at(2010), Input::Released), [Action::Reset, Action::BeginLastWords, Action::Report]);
    assert_eq!(life.handle(at(2020), Input::SpareFenced), []);
    assert_eq!(life.handle(at(2100), Input::ResetDone), [Action::Spawn(generation(3))]);
    // Not beside the recovery.
    assert_eq!(life.handle(at(3500), Input::Tick), []);
    for input in
        [Input::Hello, Input::Forwarding, Input::Carrier(Carrier::Up), Input::EndLive(end(0)), Input::EndLive(end(1))]
    {
        life.handle(at(4000), input);
    }
    arm(&mut life, at(5000), 4);
}

#[test]
fn past_the_limit_not_even_a_spare_goes_on() {
    let policy = Restart { limit: 0, ..Restart::default() };
    let mut life = Lifecycle { history: RestartHistory::new(policy), ..armed() };
    let actions = life.handle(at(2000), Input::ProcessGone("signal 9".into()));
    let expected = [Action::Report, Action::Reset, Action::DropStandby(Rank::First, None)];
    assert!(expected.iter().all(|action| actions.contains(action)), "{actions:?}");
    assert!(actions.iter().any(|action| matches!(action, Action::Quarantine(_))));
}

#[test]
fn a_planned_restart_goes_over_to_a_fresh_spare() {
    let mut life = armed();
    assert_eq!(life.handle(at(2000), Input::Restart { fresh: true }), [Action::DropStandby(Rank::First, None)]);
    life.handle(at(2050), Input::SpareFenced);
    assert_eq!(life.handle(at(2050), Input::Tick), [Action::ResetSpare]);
    assert_eq!(life.handle(at(2100), Input::SpareResetDone), [Action::SpawnStandby(Rank::First, generation(3))]);
    life.handle(at(2200), Input::StandbyHello(Rank::First));
    life.handle(at(2200), Input::SpareForwarding);
    let actions = life.handle(at(2300), Input::SpareCarrier(Carrier::Up));
    assert!(
        matches!(&actions[..], [Action::Arm(true), Action::Failed(f), Action::TakeOver(_), ..] if f.source == NoticedBy::Planned),
        "{actions:?}"
    );
    assert_eq!(life.history().total(), 0);
}

#[test]
fn a_restart_on_a_spare_without_carrier_is_refused_or_given_up() {
    let mut life = armed();
    life.handle(at(1500), Input::SpareCarrier(Carrier::Down));
    let why = String::from("its spare has no carrier");
    assert_eq!(life.handle(at(2000), Input::Restart { fresh: false }), [Action::RestartOff(why.clone())]);
    assert_eq!(life.handle(at(2000), Input::Restart { fresh: true }), [Action::DropStandby(Rank::First, None)]);
    life.handle(at(2050), Input::SpareFenced);
    life.handle(at(2050), Input::Tick);
    life.handle(at(2100), Input::SpareResetDone);
    life.handle(at(2200), Input::StandbyHello(Rank::First));
    life.handle(at(2200), Input::SpareForwarding);
    life.handle(at(8199), Input::Heartbeat);
    life.handle(at(8199), Input::StandbyHeartbeat(Rank::First));
    let off = [Action::RestartOff(why), Action::DropStandby(Rank::First, None)];
    assert_eq!(life.handle(at(8200), Input::Tick), off, "as long as a NIC may take");
    // What was started for the restart is never armed.
    assert_eq!(life.handle(at(8201), Input::SpareCarrier(Carrier::Up)), []);
    life.handle(at(8300), Input::Heartbeat);
    life.handle(at(8300), Input::SpareFenced);
    arm(&mut life, at(9200), 4);
}

#[test]
fn a_guest_that_reboots_leaves_the_spare_armed() {
    let mut life = armed();
    assert_eq!(life.handle(at(2001), Input::EndGone(end(0))), []);
    assert!(life.is_armed());
}

#[test]
fn a_stop_ends_both() {
    let mut life = armed();
    assert_eq!(life.handle(at(2000), Input::Stop), [Action::DropStandby(Rank::First, None), Action::Kill]);
    assert_eq!(life.handle(at(2001), Input::SpareFenced), []);
    assert_eq!(life.handle(at(9000), Input::Tick), []);
}

pub(super) fn any_input() -> impl Strategy<Value = Input> {
    prop_oneof![
        1 => Just(Input::Start),
        4 => Just(Input::ResetDone),
        4 => Just(Input::Hello),
        4 => Just(Input::Forwarding),
        4 => Just(Input::Carrier(Carrier::Up)),
        2 => Just(Input::Carrier(Carrier::Down)),
        1 => Just(Input::Heartbeat),
        4 => (0_usize..2).prop_map(|place| Input::EndLive(end(place))),
        1 => (0_usize..2).prop_map(|place| Input::EndGone(end(place))),
        2 => Just(Input::Failed(failure(NoticedBy::Panic, 0))),
        1 => Just(Input::Sign(failure(NoticedBy::Link, 0))),
        1 => Just(Input::Evidence),
        2 => Just(Input::Released),
        2 => Just(Input::ProcessGone("gone".into())),
        1 => (0_usize..2).prop_map(|place| Input::EndHere(end(place))),
        4 => Just(Input::Tick),
        1 => any::<bool>().prop_map(|fresh| Input::Restart { fresh }),
        1 => Just(Input::StandbyUseless),
        1 => Just(Input::Sleep),
        1 => Just(Input::Wake),
        4 => Just(Input::StandbyHello(Rank::First)),
        1 => Just(Input::StandbyHeartbeat(Rank::First)),
        1 => Just(Input::StandbyFailed(Rank::First, "gone".into())),
        4 => Just(Input::SpareForwarding),
        4 => Just(Input::SpareCarrier(Carrier::Up)),
        1 => Just(Input::SpareCarrier(Carrier::Down)),
        1 => (0_usize..2).prop_map(|place| Input::SpareLive(end(place))),
        4 => Just(Input::SpareFenced),
        4 => Just(Input::SpareResetDone),
    ]
}

/// What holds one of the two devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Nobody,
    Process(Generation),
    Reset,
    /// Nobody, since a reset.
    Clean,
}

/// What a supervisor would have done so far: who has which device. The first is the serving one.
struct World {
    devices: [Holder; 2],
    last: u32,
    over: bool,
    /// The serving process has given its device up in this step, and is buried behind the reset.
    given_up: bool,
}

impl World {
    /// Whether `input` can come about.
    fn allows(&mut self, input: &Input) -> bool {
        let [serving, spare] = &mut self.devices;
        match input {
            Input::ProcessGone(_) if !matches!(serving, Holder::Process(_)) => return false,
            Input::ProcessGone(_) => *serving = Holder::Nobody,
            Input::ResetDone if *serving != Holder::Reset => return false,
            Input::ResetDone => *serving = Holder::Clean,
            Input::SpareResetDone if *spare != Holder::Reset => return false,
            Input::SpareResetDone => *spare = Holder::Clean,
            _ => {}
        }
        true
    }

    fn act(&mut self, action: &Action) -> Result<(), TestCaseError> {
        let [serving, spare] = &mut self.devices;
        match action {
            Action::Spawn(g) | Action::SpawnStandby(Rank::First, g) => {
                let device = if matches!(action, Action::Spawn(_)) { serving } else { spare };
                prop_assert_eq!(*device, Holder::Clean, "a device is reset between two lives");
                prop_assert!(g.get() == self.last + 1 && !self.over);
                self.last += 1;
                *device = Holder::Process(*g);
            }
            Action::TakeOver(g) => {
                prop_assert_eq!(*spare, Holder::Process(*g));
                self.devices.swap(0, 1);
            }
            Action::Reset => {
                prop_assert!(matches!(serving, Holder::Nobody | Holder::Clean) || self.given_up, "{:?}", serving);
                *serving = Holder::Reset;
            }
            Action::ResetSpare => {
                prop_assert!(matches!(spare, Holder::Nobody | Holder::Clean), "{:?}", spare);
                *spare = Holder::Reset;
            }
            Action::BeginLastWords => prop_assert_eq!(*serving, Holder::Reset),
            Action::GoLive(..) | Action::Configure | Action::Mask => {
                prop_assert!(matches!(serving, Holder::Process(_)));
            }
            Action::Arm(_) | Action::ConfigureStandby(Rank::First) | Action::DropStandby(Rank::First, _) => {
                prop_assert!(matches!(spare, Holder::Process(_)));
            }
            Action::Adopt(_) => prop_assert!(false, "a spare has its device already"),
            Action::Quarantine(_) => self.over = true,
            _ => {}
        }
        Ok(())
    }
}

proptest! {
    /// Whatever happens in whatever order: each device has one process at most and is reset between two; generations count
    /// up by one; nothing starts after quarantine or stop; only an armed spare is gone over to because of a carrier, and only
    /// from a NIC without one; a tick leaves nothing due.
    #[test]
    fn any_order_of_inputs_keeps_each_device_to_one_life(
        inputs in prop::collection::vec((prop::option::of(any_input()), 0_u64..2_000), 0..250),
        stop_at in 0_usize..400,
    ) {
        let mut life = Lifecycle::new(RestartHistory::new(Restart { limit: 20, ..Restart::default() }), 2, StandbyPolicy::Spare);
        let mut world = World { devices: [Holder::Nobody, Holder::Nobody], last: 0, over: false, given_up: false };
        let (mut now, mut replays) = (0, Replays::default());
        for (n, (input, gap)) in inputs.into_iter().enumerate() {
            now += gap;
            let input = input.unwrap_or_else(|| match life.standby() {
                Standby::Booting { hello: true, .. } if matches!(life.state(), State::Live { .. }) => Input::SpareForwarding,
                _ => next_input(&life),
            });
            let input = if n == stop_at { Input::Stop } else { input };
            // A process that was told to go is gone: the supervisor says so once, and only then.
            if input == Input::SpareFenced {
                if !matches!(life.standby(), Standby::Fencing { .. }) {
                    continue;
                }
                world.devices[1] = Holder::Nobody;
            } else if !world.allows(&input) {
                continue;
            }
            let may_leave = life.carrier() == Carrier::Down && (life.is_armed() || input == Input::SpareCarrier(Carrier::Up));
            let actions = life.handle(at(now), input.clone());
            replays.follow(&input, &actions, &life)?;
            let left = actions.iter().any(|action| matches!(action, Action::Failed(f) if f.source == NoticedBy::Carrier));
            prop_assert!(!left || may_leave, "left at {:?}", input);
            world.given_up = actions.contains(&Action::BeginLastWords);
            for action in actions {
                world.act(&action)?;
            }
            world.over |= matches!(input, Input::Stop);
            let held = world.devices.iter().any(|device| matches!(device, Holder::Process(_)));
            prop_assert!(life.hold(at(now)) != Hold::Released || !held, "{:?} are held at {:?}", world.devices, input);
            if let Some(deadline) = life.deadline() {
                prop_assert!(!matches!(input, Input::Tick) || deadline > at(now), "a tick leaves no deadline behind");
            }
        }
    }
}
