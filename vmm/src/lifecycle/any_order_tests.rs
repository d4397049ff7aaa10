//! The lives of a driver VM in any order of inputs at all.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::tests::{at, end, failure};
use super::*;
use crate::config::Restart;
use crate::wire::messages::Replay;

/// Which ends have not gone live with the present life, and of which a life has died by that, as the inputs have it.
#[derive(Default)]
pub(super) struct Replays {
    pending: BTreeSet<Endpoint>,
    suspects: BTreeSet<Endpoint>,
}

impl Replays {
    /// Follows `input`, which led to `actions` and to `life`: the log of an end is dropped only if a life has died while it was replayed
    /// there, and none has gone live there since.
    pub(super) fn follow(&mut self, input: &Input, actions: &[Action], life: &Lifecycle) -> Result<(), TestCaseError> {
        match input {
            Input::EndLive(end) if self.pending.remove(end) => drop(self.suspects.remove(end)),
            Input::EndGone(end) => drop(self.pending.remove(end)),
            _ => {}
        }
        for action in actions {
            match action {
                Action::Failed(failure) => {
                    let died = std::mem::take(&mut self.pending);
                    self.suspects.extend(died.into_iter().filter(|_| failure.source.is_failure()));
                }
                Action::GoLive(end, replay) => {
                    let all = *replay == Replay::Everything;
                    prop_assert!(all || self.suspects.contains(end), "{:?} loses its log at {:?}", end, input);
                    self.pending.insert(*end);
                }
                // Those that went over by themselves are live already.
                Action::Live if actions.iter().any(|action| matches!(action, Action::GoLive(..))) => {
                    self.pending.clear()
                }
                _ => {}
            }
        }
        if let State::GoingLive { waiting, .. } = life.state() {
            self.pending.retain(|end| waiting.contains(end));
        }
        Ok(())
    }
}

/// What comes next where nothing goes wrong: by chance alone hardly any life serves, fails and is followed by one that serves.
pub(super) fn next_input(life: &Lifecycle) -> Input {
    match life.state() {
        State::Idle => Input::Start,
        State::Resetting { .. } => Input::ResetDone,
        State::Booting { .. } => Input::Hello,
        State::Configuring { .. } => Input::Forwarding,
        State::WaitingCarrier { .. } => Input::Carrier(Carrier::Up),
        State::GoingLive { waiting, .. } => waiting.first().map_or(Input::Tick, |end| Input::EndLive(*end)),
        State::Live { .. } => next_of_standby(life.standby()),
        State::Fencing { patience: Some(_), .. } => Input::Released,
        State::Fencing { patience: None, .. } | State::Stopping => Input::ProcessGone("gone".into()),
        State::Quarantined => Input::Resume,
        State::Asleep => Input::Wake,
        State::BackOff { .. } | State::Stopped => Input::Tick,
    }
}

/// The same of what waits beside a life that serves.
fn next_of_standby(standby: Standby) -> Input {
    match standby {
        Standby::Fencing { .. } => Input::SpareFenced,
        Standby::Resetting { .. } => Input::SpareResetDone,
        Standby::Booting { hello: false, .. } => Input::StandbyHello(Rank::First),
        Standby::Booting { hello: true, .. } => Input::StandbyLoaded(Rank::First),
        Standby::Saving { .. } => Input::SnapshotThere,
        Standby::Hot { armed: false, .. } => Input::SpareCarrier(Carrier::Up),
        Standby::Absent | Standby::Due(_) | Standby::Saved => Input::Tick,
        Standby::Ready { .. } | Standby::Hot { armed: true, .. } => Input::Heartbeat,
    }
}

fn any_rank() -> impl Strategy<Value = Rank> {
    prop::sample::select(vec![Rank::First, Rank::Second])
}

fn any_input() -> impl Strategy<Value = Input> {
    prop_oneof![
        1 => Just(Input::Start),
        4 => Just(Input::ResetDone),
        4 => Just(Input::Hello),
        2 => Just(Input::Applying),
        4 => Just(Input::Forwarding),
        4 => Just(Input::Carrier(Carrier::Up)),
        1 => Just(Input::Carrier(Carrier::Down)),
        1 => Just(Input::Heartbeat),
        4 => (0_usize..3).prop_map(|place| Input::EndLive(end(place))),
        1 => (0_usize..3).prop_map(|place| Input::EndGone(end(place))),
        1 => Just(Input::Failed(failure(NoticedBy::Panic, 0))),
        1 => Just(Input::Sign(failure(NoticedBy::Link, 0))),
        1 => Just(Input::Evidence),
        2 => Just(Input::Released),
        3 => Just(Input::ProcessGone("gone".into())),
        1 => (0_usize..3).prop_map(|place| Input::EndHere(end(place))),
        3 => Just(Input::Tick),
        1 => any::<bool>().prop_map(|fresh| Input::Restart { fresh }),
        1 => Just(Input::AtRest),
        1 => Just(Input::StandbyUseless),
        1 => Just(Input::Resume),
        1 => Just(Input::Sleep),
        1 => Just(Input::Wake),
        2 => any_rank().prop_map(Input::StandbyHello),
        2 => any_rank().prop_map(Input::StandbyLoaded),
        1 => any_rank().prop_map(Input::StandbyHeartbeat),
        1 => any_rank().prop_map(|rank| Input::StandbyFailed(rank, "gone".into())),
        1 => Just(Input::SnapshotMissing),
        1 => Just(Input::SnapshotThere),
    ]
}

proptest! {
    /// Whatever happens in whatever order: one process at a time beside one standby or two, generations count up by one, the reset has
    /// returned before a start, nothing goes live that does not run, and nothing starts after quarantine or stop.
    #[test]
    fn any_order_of_inputs_keeps_the_invariants(
        inputs in prop::collection::vec((prop::option::of(any_input()), 0_u64..4_000), 0..200),
        stop_at in 0_usize..250,
        rests: bool,
        policy in prop::sample::select(vec![StandbyPolicy::Warm, StandbyPolicy::Nothing, StandbyPolicy::Snapshot]),
        two: bool,
        starts_ahead: bool,
    ) {
        let mut life = Lifecycle::new(RestartHistory::new(Restart::default()), 3, policy).with_rest(rests);
        let two = two && policy == StandbyPolicy::Warm;
        life = life.with_standbys(1 + u8::from(two)).with_starts_ahead(starts_ahead);
        let (mut second, mut replays) = (None, Replays::default());
        let (mut resting, mut sleeps) = (false, false);
        let (mut standby, mut asked, mut taker, mut missing) = (None, false, None, false);
        let (mut now, mut alive, mut resetting, mut last, mut over) = (0, false, false, 0, false);
        for (n, (input, gap)) in inputs.into_iter().enumerate() {
            now += gap;
            let input = input.unwrap_or_else(|| next_input(&life));
            let input = if n == stop_at { Input::Stop } else { input };
            asked |= matches!(input, Input::Restart { .. });
            sleeps = matches!(input, Input::Sleep) || (sleeps && !matches!(input, Input::Wake));
            missing |= matches!(input, Input::SnapshotMissing);
            // A process can only be gone, and a reset only return, if there is one.
            match input {
                Input::ProcessGone(_) if !alive => continue,
                Input::ProcessGone(_) => alive = false,
                Input::ResetDone if !resetting => continue,
                Input::ResetDone => resetting = false,
                _ => {}
            }
            over &= !(matches!(input, Input::Resume) && *life.state() == State::Quarantined);
            let served = matches!(life.state(), State::Live { .. });
            let actions = life.handle(at(now), input.clone());
            replays.follow(&input, &actions, &life)?;
            let given_up = actions.contains(&Action::BeginLastWords);
            let begins = |action: &Action| matches!(action, Action::Spawn(_) | Action::Adopt(_) | Action::SpawnAhead(_));
            prop_assert!(!sleeps || !actions.iter().any(begins), "a life in its sleep at {input:?}");
            for action in actions {
                match action {
                    Action::Spawn(generation) => {
                        prop_assert!(!alive && !resetting && !over, "started at {input:?}");
                        prop_assert_eq!(generation.get(), last + 1);
                        last += 1;
                        alive = true;
                    }
                    Action::SpawnStandby(Rank::Second, generation) => {
                        prop_assert!(two && served && alive && standby.is_some() && second.is_none(), "second at {input:?}");
                        prop_assert_eq!(generation.get(), last + 1);
                        last += 1;
                        second = Some(generation);
                    }
                    Action::SpawnAhead(generation) => {
                        prop_assert!(starts_ahead && standby.is_none() && !over, "ahead at {input:?}");
                        let failed = matches!(life.state(), State::Fencing { .. } | State::Resetting { .. });
                        prop_assert!(failed, "ahead of nothing at {input:?}");
                        prop_assert_eq!(generation.get(), last + 1);
                        last += 1;
                        standby = Some(generation);
                    }
                    Action::MoveUp => {
                        prop_assert!(standby.is_none() && second.is_some(), "nobody moves up at {input:?}");
                        standby = second.take();
                    }
                    Action::SpawnStandby(Rank::First, generation) => {
                        let wanted = policy == StandbyPolicy::Warm || asked;
                        prop_assert!(served, "beside a recovery at {input:?}");
                        prop_assert!(wanted && alive && standby.is_none() && !over, "standby at {input:?}");
                        prop_assert_eq!(generation.get(), last + 1);
                        last += 1;
                        standby = Some(generation);
                    }
                    Action::TakeSnapshot(generation) => {
                        let wanted = policy == StandbyPolicy::Snapshot && life.restarting.is_none();
                        prop_assert!(wanted && alive && standby.is_none() && !over, "taker at {input:?}");
                        prop_assert_eq!(generation.get(), last + 1);
                        last += 1;
                        (standby, taker, missing) = (Some(generation), Some(generation), false);
                    }
                    Action::DropTaker(_) => prop_assert!(standby.is_some() && standby.take() == taker, "at {input:?}"),
                    Action::Adopt(generation) => {
                        prop_assert!(taker != Some(generation) || missing, "a taker that may end by itself");
                        prop_assert!(!alive && !resetting && !over, "adopted at {input:?}");
                        prop_assert_eq!(standby.take(), Some(generation));
                        alive = true;
                    }
                    Action::DropStandby(Rank::Second, _) => prop_assert!(second.take().is_some(), "drop nothing at {input:?}"),
                    Action::DropStandby(Rank::First, _) => prop_assert!(standby.take().is_some(), "drop nothing at {input:?}"),
                    Action::Reset => {
                        prop_assert!((!alive || given_up) && !resetting, "reset under a life at {input:?}");
                        resetting = true;
                    }
                    Action::Configure | Action::GoLive(..) | Action::Mask | Action::EndLive(_) | Action::LeaveBehind(_) => {
                        prop_assert!(alive);
                    }
                    Action::ConfigureStandby(Rank::Second) => prop_assert!(second.is_some()),
                    Action::ConfigureStandby(Rank::First) => prop_assert!(standby.is_some() && standby != taker),
                    Action::Kill | Action::Release => prop_assert!(alive, "kill nothing at {input:?}"),
                    Action::BeginLastWords => {
                        prop_assert!(alive, "bury nothing at {input:?}");
                        alive = false;
                    }
                    Action::Quarantine(_) => over = true,
                    Action::StartClean(_) => prop_assert!(resetting && !over, "no life to come at {input:?}"),
                    Action::Quiesce => {
                        prop_assert!(rests && served && !resting, "asked to rest at {input:?}");
                        resting = true;
                    }
                    Action::GoOn => prop_assert!(std::mem::take(&mut resting), "goes on at {input:?}"),
                    Action::Failed(failure) => {
                        let planned = failure.source == NoticedBy::Planned;
                        prop_assert!(!planned || std::mem::take(&mut resting) == rests || sleeps, "replaced at {input:?}");
                        resting = false;
                    }
                    Action::Live | Action::Report | Action::RestartOff(_) | Action::Warn(_) => {}
                    other => prop_assert!(false, "{other:?} without a spare"),
                }
            }
            over |= matches!(input, Input::Stop);
            prop_assert!(life.hold(at(now)) != Hold::Released || !alive, "has not let go at {input:?}");
            if let Some(deadline) = life.deadline() {
                prop_assert!(!matches!(input, Input::Tick) || deadline > at(now), "a tick leaves no deadline behind");
            }
        }
    }
}
