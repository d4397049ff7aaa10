//! NICs that lose their carriers: single cases, and a bench that plays a whole machine with two NICs.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::super::policy::RestartHistory;
use super::super::spare_tests::{any_input, arm, armed, failure, generation, live};
use super::super::tests::{at, end};
use super::*;
use crate::config::Restart;
use crate::lifecycle::{Input, Rank, Standby, StandbyPolicy, StandbyStage, StateName};

const UP: Carrier = Carrier::Up;
const DOWN: Carrier = Carrier::Down;

/// Heartbeats of both up to `now`, and a tick.
fn tick(life: &mut Lifecycle, now: Time) -> Vec<Action> {
    life.handle(now, Input::Heartbeat);
    life.handle(now, Input::StandbyHeartbeat(Rank::First));
    life.handle(now, Input::Tick)
}

fn goes_over(actions: &[Action], to: u32) -> bool {
    let carrier = |failure: &Failure| failure.source == NoticedBy::Carrier;
    matches!(actions, [Action::Failed(f), Action::TakeOver(g), ..] if carrier(f) && *g == generation(to))
}

#[test]
fn a_lost_carrier_is_waited_for_and_then_the_spare_takes_over() {
    let mut life = armed();
    tick(&mut life, at(2000));
    assert_eq!(life.handle(at(2000), Input::Carrier(DOWN)), []);
    assert_eq!(life.deadline(), Some(at(4000)));
    assert_eq!(tick(&mut life, at(3999)), []);
    let actions = tick(&mut life, at(4000));
    assert!(goes_over(&actions, 2), "{actions:?}");
    let Action::Failed(why) = &actions[0] else { unreachable!() };
    assert_eq!(
        (why.what.as_str(), why.at),
        ("its NIC has had no carrier for 2000 ms, and the spare's has one", at(2000))
    );
    assert_eq!((life.carrier(), life.history().total()), (UP, 0), "no failure");
}

#[test]
fn a_carrier_that_comes_back_in_time_changes_nothing() {
    let mut life = armed();
    for n in 1..10 {
        life.handle(at(n * 2000), Input::Carrier(DOWN));
        assert_eq!(tick(&mut life, at(n * 2000 + 1900)), []);
        life.handle(at(n * 2000 + 1900), Input::Carrier(UP));
    }
    assert_eq!(life.generation(), Some(generation(1)));
}

#[test]
fn where_it_is_switched_off_a_lost_carrier_is_waited_for_for_ever() {
    let mut life = armed().with_spare_after(0);
    life.handle(at(2000), Input::Carrier(DOWN));
    assert!((2..100).all(|second| tick(&mut life, at(second * 1000)).is_empty()));
}

#[test]
fn a_spare_without_carrier_is_not_gone_over_to_until_it_has_one() {
    let mut life = armed();
    life.handle(at(2000), Input::SpareCarrier(DOWN));
    life.handle(at(2000), Input::Carrier(DOWN));
    assert!((2..20).all(|second| tick(&mut life, at(second * 1000)).is_empty()));
    let actions = life.handle(at(20_000), Input::SpareCarrier(UP));
    assert_eq!(actions[0], Action::Arm(true));
    assert!(goes_over(&actions[1..], 2), "{actions:?}");
}

#[test]
fn a_sign_of_failure_has_the_better_reason() {
    let mut life = armed();
    life.handle(at(2000), Input::Carrier(DOWN));
    life.handle(at(3950), Input::Sign(failure(NoticedBy::Link, 3950)));
    assert_eq!(tick(&mut life, at(4000)), []);
    let actions = tick(&mut life, at(4050));
    assert!(
        matches!(&actions[..], [Action::Failed(f), Action::TakeOver(_), ..] if f.source == NoticedBy::Link),
        "{actions:?}"
    );
}

/// Failed at 3 s with a spare that has no carrier: that one forwards for the guests, without a link.
fn with_a_last_resort(policy_off: bool) -> Lifecycle {
    let mut life = armed();
    if policy_off {
        life = life.with_spare_after(0);
    }
    life.handle(at(2000), Input::SpareCarrier(DOWN));
    let actions = life.handle(at(3000), Input::Failed(failure(NoticedBy::Panic, 3000)));
    assert!(matches!(&actions[..], [Action::Failed(_), Action::TakeOver(_)]), "{actions:?}");
    life
}

#[test]
fn a_last_resort_is_left_as_soon_as_the_other_nic_has_a_carrier() {
    for off in [false, true] {
        let mut life = with_a_last_resort(off);
        life.handle(at(3010), Input::SpareFenced);
        // At once, beside the wait for a carrier, which takes six seconds.
        life.wait_turn(at(3010));
        assert_eq!(life.handle(at(3010), Input::Tick), [Action::ResetSpare]);
        assert_eq!(life.handle(at(3100), Input::SpareResetDone), [Action::SpawnStandby(Rank::First, generation(3))]);
        life.handle(at(4000), Input::StandbyHello(Rank::First));
        life.handle(at(4500), Input::SpareForwarding);
        assert_eq!(life.state().name(), StateName::WaitingCarrier);
        let actions = life.handle(at(5000), Input::SpareCarrier(UP));
        assert!(goes_over(&actions[1..], 3), "{actions:?}");
        assert_eq!(life.history().total(), 1, "the panic");
    }
}

#[test]
fn it_is_left_after_it_has_gone_live_as_well() {
    let mut life = with_a_last_resort(false);
    life.handle(at(3010), Input::SpareFenced);
    for second in 3..10 {
        tick(&mut life, at(second * 1000));
    }
    life.handle(at(9500), Input::EndLive(end(0)));
    life.handle(at(9500), Input::EndLive(end(1)));
    assert_eq!((life.state().name(), life.carrier()), (StateName::Live, DOWN));
    for input in [Input::SpareResetDone, Input::StandbyHello(Rank::First), Input::SpareForwarding] {
        life.handle(at(9600), input);
    }
    let actions = life.handle(at(9700), Input::SpareCarrier(UP));
    assert!(goes_over(&actions[1..], 3), "{actions:?}");
}

#[test]
fn a_last_resort_that_finds_a_carrier_stays() {
    let mut life = with_a_last_resort(false);
    life.handle(at(3010), Input::SpareFenced);
    life.handle(at(3010), Input::Tick);
    life.handle(at(3100), Input::Carrier(UP));
    assert_eq!(life.handle(at(3101), Input::SpareResetDone), [], "not beside the recovery");
    life.handle(at(3110), Input::EndLive(end(0)));
    assert_eq!(life.handle(at(3110), Input::EndLive(end(1))), [Action::Live]);
    life.handle(at(4000), Input::Heartbeat);
    arm(&mut life, at(4110), 3);
    assert_eq!(tick(&mut life, at(5000)), []);
}

#[test]
fn a_first_life_without_carrier_gives_way_to_a_spare_that_has_one() {
    let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 0, StandbyPolicy::Spare);
    for input in [Input::Start, Input::ResetDone, Input::Hello, Input::Forwarding] {
        life.handle(at(0), input);
    }
    assert_eq!(life.handle(at(999), Input::Tick), []);
    assert_eq!(life.handle(at(1000), Input::Tick), [Action::ResetSpare]);
    for input in [Input::SpareResetDone, Input::StandbyHello(Rank::First), Input::SpareForwarding] {
        life.handle(at(1500), input);
    }
    let actions = life.handle(at(1600), Input::SpareCarrier(UP));
    assert!(goes_over(&actions[1..], 2), "{actions:?}");
}

#[test]
fn a_spare_s_process_that_hangs_is_told_of_and_shown() {
    let mut life = armed();
    life.handle(at(2000), Input::Failed(failure(NoticedBy::Panic, 2000)));
    life.handle(at(2001), Input::EndLive(end(0)));
    life.handle(at(2001), Input::EndLive(end(1)));
    assert_eq!(tick(&mut life, at(4900)), []);
    tick(&mut life, at(7800));
    tick(&mut life, at(10_700));
    assert_eq!(life.deadline(), Some(at(12_000)));
    assert_eq!((life.handle(at(11_999), Input::Tick), life.spare_is_held()), (Vec::new(), None));
    let actions = life.handle(at(12_000), Input::Tick);
    assert!(
        matches!(&actions[..], [Action::Warn(what)] if what.contains("spare") && what.contains("10 s")),
        "{actions:?}"
    );
    assert_eq!(tick(&mut life, at(13_000)), [], "once");
    assert!(life.standby().stage() == StandbyStage::Recovering && life.spare_is_held().is_some());
    assert_eq!(life.handle(at(20_000), Input::SpareFenced), [Action::ReportFenced]);
    assert_eq!(life.spare_is_held(), None);
    life.handle(at(20_000), Input::Heartbeat);
    arm(&mut life, at(20_000), 3);
}

#[test]
fn so_is_one_that_was_killed_while_it_waited() {
    let mut life = armed();
    life.handle(at(2000), Input::StandbyFailed(Rank::First, "it broke".into()));
    for second in 3..12 {
        assert_eq!(tick(&mut life, at(second * 1000)), []);
    }
    assert!(matches!(tick(&mut life, at(12_000))[..], [Action::Warn(_)]));
    assert!(live().spare_is_held().is_none());
}

/// A machine in which everything does what it should: each process boots, each reset returns, each guest answers. Whether a NIC
/// has a carrier is up to the test.
struct Bench {
    life: Lifecycle,
    now: u64,
    /// The carriers of the serving NIC and of the spare's.
    cables: [bool; 2],
    /// Times at which it has gone over because of a carrier.
    switches: Vec<u64>,
}

impl Bench {
    /// In ms.
    const STEP: u64 = 200;

    fn input(&mut self, input: Input) {
        for action in self.life.handle(at(self.now), input) {
            match action {
                Action::Failed(failure) if failure.source == NoticedBy::Carrier => {
                    assert!(self.cables[1] || self.life.carrier() == UP, "to a NIC without carrier");
                    self.switches.push(self.now);
                }
                Action::TakeOver(_) => self.cables.swap(0, 1),
                _ => {}
            }
        }
    }

    /// What is under way in the serving life comes about.
    fn serve(&mut self) {
        let carrier = if self.cables[0] { UP } else { DOWN };
        match self.life.state().clone() {
            State::Idle => self.input(Input::Start),
            State::Resetting { .. } => self.input(Input::ResetDone),
            State::Booting { .. } => self.input(Input::Hello),
            State::Configuring { .. } => self.input(Input::Forwarding),
            State::Fencing { .. } => self.input(Input::ProcessGone("gone".into())),
            // What hung in the kernel does not any more, and somebody resumes it.
            State::Quarantined if self.life.process_hangs() => self.input(Input::ProcessGone("gone".into())),
            State::Quarantined => {
                self.input(Input::ResetDone);
                self.input(Input::Resume);
            }
            State::GoingLive { waiting, .. } => waiting.into_iter().for_each(|end| self.input(Input::EndLive(end))),
            _ if self.life.carrier() != carrier => self.input(Input::Carrier(carrier)),
            _ => {}
        }
    }

    /// And in the spare.
    fn wait(&mut self) {
        match self.life.standby() {
            Standby::Fencing { .. } => self.input(Input::SpareFenced),
            Standby::Resetting { .. } => self.input(Input::SpareResetDone),
            Standby::Booting { hello: false, .. } => self.input(Input::StandbyHello(Rank::First)),
            Standby::Booting { .. } => self.input(Input::SpareForwarding),
            Standby::Hot { armed, .. } if armed != self.cables[1] => {
                self.input(Input::SpareCarrier(if self.cables[1] { UP } else { DOWN }));
            }
            _ => {}
        }
    }

    fn step(&mut self) {
        self.now += Self::STEP;
        self.input(Input::Heartbeat);
        self.input(Input::StandbyHeartbeat(Rank::First));
        self.serve();
        self.wait();
        self.input(Input::Tick);
    }

    fn is_well(&self) -> bool {
        matches!(self.life.state(), State::Live { .. }) && self.life.carrier() == UP && self.cables[0]
    }
}

/// Which of the two NICs have a carrier: one at least.
fn cables() -> impl Strategy<Value = [bool; 2]> {
    prop_oneof![Just([true, false]), Just([false, true]), Just([true, true])]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever has happened before: when one NIC has a carrier and nothing fails any more, the driver VM ends up live on a NIC
    /// with a carrier, and stays there.
    #[test]
    fn in_the_end_it_is_live_on_a_nic_with_a_carrier(
        inputs in prop::collection::vec((any_input(), 0_u64..2_000), 0..120),
        cables in cables(),
        spare_after in prop_oneof![Just(1), Just(2_000), Just(20_000)],
    ) {
        let policy = Restart { limit: 1000, backoff_max_ms: 1000, ..Restart::default() };
        let life = Lifecycle::new(RestartHistory::new(policy), 2, StandbyPolicy::Spare).with_spare_after(spare_after);
        let mut bench = Bench { life, now: 0, cables, switches: Vec::new() };
        for (input, gap) in inputs {
            bench.now += gap;
            bench.life.handle(at(bench.now), input);
        }
        bench.life.handle(at(bench.now), Input::Wake);
        bench.switches.clear();
        // The longest back-off, hold, settling and wait for a carrier together are less than that, and what was under way (a sign
        // of failure, a restart that was asked for) is over.
        let limit = bench.now + 180_000;
        while bench.now < limit {
            bench.step();
        }
        let switches = bench.switches.len();
        prop_assert!(switches <= 2, "{switches} times");
        prop_assert!(bench.is_well(), "{:?} {:?} {:?}", bench.life.state(), bench.life.standby(), bench.cables);
        for _ in 0..500 {
            bench.step();
            prop_assert!(bench.is_well());
        }
    }

    /// Two NICs that lose their carriers by turns, each as soon as it serves or a while later: it goes over ever more seldom.
    #[test]
    fn carriers_that_come_and_go_by_turns_are_followed_ever_more_slowly(
        pauses in prop::collection::vec(0_u64..20_000, 1..10),
        spare_after in prop_oneof![Just(1), Just(2_000)],
    ) {
        let life = Lifecycle::new(RestartHistory::new(Restart::default()), 2, StandbyPolicy::Spare).with_spare_after(spare_after);
        let mut bench = Bench { life, now: 0, cables: [true, true], switches: Vec::new() };
        let mut pauses = pauses.into_iter().cycle();
        let (mut known, mut lose_at) = (usize::MAX, 0);
        while !bench.is_well() {
            bench.step();
        }
        while bench.now < 1_800_000 {
            if bench.switches.len() != known {
                (known, lose_at) = (bench.switches.len(), bench.now + pauses.next().unwrap());
                bench.cables = [true, true];
            }
            if bench.now >= lose_at {
                bench.cables = [false, true];
            }
            bench.step();
        }
        // 5, 10, 20, 40, 60, 60, ...
        for (n, pair) in bench.switches.windows(2).enumerate() {
            let hold = (5_000 << n.min(4)).min(60_000);
            prop_assert!(pair[1] - pair[0] >= hold, "{n}: {pair:?}");
        }
        prop_assert!((20..=34).contains(&bench.switches.len()), "{}", bench.switches.len());
    }
}
