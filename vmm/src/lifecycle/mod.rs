//! The lives of one driver VM as a state machine. Pure: an [`Input`] with its time goes in, [`Action`]s come out.
//!
//! ```text
//!            start            reset done            hello                 forwarding
//!   idle ----------> resetting ---------> booting ---------> configuring ------------> waiting-carrier
//!                     ^     | ^              :                    :                          | carrier, or patience over
//!           gone, or  |     | | back-off     :                    :                          v
//!           no life   |     v | over         : failure            : failure              replaying
//!                     |   back-off           v                    v                          | every end is live, or 5 s over
//!                  fencing <- - - - - - - - - - - - - - - - - - - - - - - - - - - - - - -    v
//!                     |        (of any state with a life)                        failure :  live
//!                     v restart limit reached
//!                quarantined --resume--> resetting        any state --stop--> stopping --gone--> stopped
//!                     asleep --wake----> resetting        any state --sleep--> ... resetting --> asleep
//! ```
//!
//! The names are those of [`State::name`]; `docs/recovery.md` has the same picture (held by `vmm/tests/docs.rs`).
//!
//! With a warm [`Standby`], the next life is adopted in the place of `resetting -> booting`, as far as it has come. With snapshots made
//! ahead it is restored from one there (`saving`).
//!
//! The guests at a driver VM's ends come and go beside that: a life goes live without those that are away, or that do not answer
//! in time, and serves them when they come.
//!
//! With a hot spare, a failure leads straight from any state with a life to the one that the spare has reached; fence and
//! reset of the failed life's device follow beside it (`spare`). A NIC without carrier is left for an armed spare (`carrier`).
//!
//! Where nothing waits, a life that needs no device for its start is started beside the fence of the one before ([`Action::SpawnAhead`]),
//! and adopted when that is over.
//!
//! Invariant: at most one generation has a device. [`Action::Spawn`], [`Action::Adopt`] and a spare's
//! [`Action::SpawnStandby`] come only after the process of the generation before has given it up, or is gone, and the
//! device's reset has returned.

mod absence;
mod asleep;
mod carrier;
mod ends;
mod fencing;
pub mod policy;
mod restart;
mod saving;
mod silence;
mod spare;
mod standby;
mod state;
mod suspects;
mod waiting;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use umbra_shadow::Generation;

use crate::base::time::Time;
use crate::config::Restart;
use crate::lifecycle::policy::RestartHistory;
pub use asleep::Hold;
use carrier::CarrierWatch;
use fencing::Killed;
use silence::Silence;
use standby::PATIENCE;

use standby::{Stage, Standbys};
pub use standby::{Standby, StandbyPolicy, StandbyStage};
pub use state::{Action, Carrier, Endpoint, Failure, Input, NoticedBy, Rank, State, StateName};
use suspects::Suspects;

/// Grace period after a lost link or control stream, in which the guests are masked already. The loss is usually a side effect of a
/// death whose own event (the process's exit, the VM's end) is still queued; wait this long for that better reason.
const SUSPICION: Duration = Duration::from_millis(100);

/// Time for a failed VM's process to give its device up before it is killed. Milliseconds are enough, unless its vCPUs keep the
/// machine busy.
const RELEASE: Duration = Duration::from_millis(250);

/// Time for the guests' splitters to replay and go live; then the driver VM counts as live without those that have not answered. A
/// replay takes milliseconds, or two seconds into a network that does not answer. A guest that hangs must not hold up the standby,
/// which waits until the driver VM is live.
const GOING_LIVE_PATIENCE: Duration = Duration::from_secs(5);

/// Time after which a reset that has not returned counts as hung: longer than the kernel's own longest wait, 60 s for a device to
/// become ready after a reset (`PCIE_RESET_READY_POLL_MS`).
pub const RESET_PATIENCE: Duration = Duration::from_secs(75);

/// Time for the guests' devices to come to rest before a requested restart: three times what a shadow takes at the most
/// (`umbra_shadow::block::Limits`), so that it is the shadow that decides, and a guest's process that hangs holds nothing up.
pub const REST_PATIENCE: Duration = Duration::from_secs(30);

/// The state machine of one driver VM.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    state: State,
    /// Generation of the present life, or of the last one.
    generation: Option<Generation>,
    history: RestartHistory,
    /// The ends whose guests are there.
    ends: BTreeSet<Endpoint>,
    /// Those of `ends` that have not gone live with a life that is live: their guests came later, or did not answer in time.
    late: BTreeSet<Endpoint>,
    suspects: Suspects,
    /// Until when a better reason is waited for, and the failure that is reported if none comes.
    suspicion: Option<(Time, Failure)>,
    /// Since the last sign of life from the agent, once it forwards.
    silence: Option<Silence>,
    carrier: CarrierWatch,
    /// The present life has begun to apply to its device what was recorded of the guests' settings.
    applying: bool,
    reserve: Standbys,
    /// The standby behind that.
    second: Standbys,
    /// A life may be started before it has its device.
    starts_ahead: bool,
    /// When a requested restart is given up, if its standby is not ready by then; `None`: no restart was requested.
    restarting: Option<Time>,
    /// The guests' devices come to rest before a deliberate reset.
    rests: bool,
    /// Until when they may take to come to rest for a requested restart, which goes on then in any case.
    resting: Option<Time>,
    /// That restart asked for a fresh standby, which is given up together with the restart.
    fresh: bool,
    /// No life begins: the host is to sleep.
    sleeps: bool,
    /// The device's reset did not return within [`RESET_PATIENCE`], and has not returned since.
    reset_hangs: bool,
    /// The kill of the failed process, which has not ended yet.
    killed: Option<Killed>,
    /// The killed process did not end within its time, and has not ended since.
    process_hangs: bool,
    /// Highest generation number given to a process so far.
    newest: Option<Generation>,
    /// Ends that have gone live by themselves, each with the generation that it went live with.
    ahead: BTreeMap<Endpoint, Generation>,
}

impl Lifecycle {
    /// A driver VM that serves `ends` guests from the start (others are added by [`Input::EndHere`]), restarts by the policy in
    /// `history`, and keeps the standby that `ahead` asks for.
    pub fn new(history: RestartHistory, ends: usize, ahead: StandbyPolicy) -> Self {
        Self {
            reserve: Standbys::new(ahead, history.policy()),
            second: Standbys::new(StandbyPolicy::Nothing, history.policy()),
            starts_ahead: false,
            newest: None,
            sleeps: false,
            reset_hangs: false,
            killed: None,
            process_hangs: false,
            ahead: BTreeMap::new(),
            restarting: None,
            rests: false,
            resting: None,
            fresh: false,
            state: State::Idle,
            generation: None,
            history,
            ends: (0..ends).map(Endpoint::at).collect(),
            late: BTreeSet::new(),
            suspects: Suspects::default(),
            suspicion: None,
            silence: None,
            carrier: CarrierWatch::new(),
            applying: false,
        }
    }

    /// Another policy from now on: that of restarts and its time limits, which hold for what begins after this.
    pub fn set_restart(&mut self, policy: Restart) {
        self.reserve.set_patience(&policy);
        self.second.set_patience(&policy);
        self.history.set_policy(policy);
    }

    /// With devices that come to rest before a deliberate reset.
    #[must_use]
    pub fn with_rest(self, rests: bool) -> Self {
        Self { rests, ..self }
    }

    /// The state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Generation of the present life, or of the last one; `None` before the first.
    pub fn generation(&self) -> Option<Generation> {
        self.generation
    }

    /// State of the standby.
    pub fn standby(&self) -> Standby {
        self.reserve.state()
    }

    /// The failures so far.
    pub fn history(&self) -> &RestartHistory {
        &self.history
    }

    /// Whether the next life gets nothing of what was recorded at `end`, because lives have died of it.
    pub fn starts_clean(&self, end: Endpoint) -> bool {
        self.suspects.is_clean(end)
    }

    /// Whether a standby boots, or a process that is to leave a snapshot.
    pub fn standby_boots(&self) -> bool {
        let boots = |standbys: &Standbys| matches!(standbys.state(), Standby::Booting { .. } | Standby::Saving { .. });
        boots(&self.reserve) || boots(&self.second)
    }

    /// Whether a life is on its way into service: guests wait for it, and it wants the processors.
    pub fn is_on_its_way(&self) -> bool {
        matches!(
            self.state,
            State::Fencing { .. }
                | State::Resetting { .. }
                | State::Booting { .. }
                | State::Configuring { .. }
                | State::GoingLive { .. }
        )
    }

    /// Another driver's standby boots, or its next life is on its way: a standby that is due waits for its turn, unless a restart or
    /// guests without a link wait for it.
    pub fn wait_turn(&mut self, now: Time) {
        if self.restarting.is_none() && !self.awaits_spare() {
            self.reserve.wait_turn(now);
            self.second.wait_turn(now);
        }
    }

    /// When [`Input::Tick`] is due next; `None`: nothing is pending.
    pub fn deadline(&self) -> Option<Time> {
        let state = match self.state {
            State::Resetting { until, .. }
            | State::BackOff { until }
            | State::Booting { until }
            | State::Configuring { until }
            | State::WaitingCarrier { until } => Some(until),
            State::GoingLive { until, .. } => Some(until),
            State::Fencing { patience, .. } => patience.or(self.killed.map(Killed::due)),
            State::Stopping => self.killed.map(Killed::due),
            _ => None,
        };
        let suspicion = self.suspicion.as_ref().map(|(until, _)| *until);
        let silence = self.silence().map(|(_, over)| over);
        let (reserve, second) = (self.reserve.deadline(), self.second.deadline());
        let deadlines = [state, suspicion, silence, reserve, second, self.restarting, self.resting, self.leave_due()];
        deadlines.into_iter().flatten().min()
    }

    /// For a silent life: when to begin checking whether it gets a processor at all, and when its silence becomes a failure.
    pub fn silence(&self) -> Option<(Time, Time)> {
        let (silence, timeout) = (self.silence.filter(|_| self.has_life())?, self.heartbeat_timeout());
        Some((silence.half(timeout), silence.heard() + silence.limit(timeout)))
    }

    /// Longest time between two heartbeats. [`PATIENCE`] times as long before the life forwards, because the kernel may hold the
    /// agent up while the driver starts its NIC.
    fn heartbeat_timeout(&self) -> Duration {
        let timeout = Duration::from_millis(self.history.policy().heartbeat_timeout_ms.into());
        if matches!(self.state, State::Configuring { .. }) { timeout * PATIENCE } else { timeout }
    }

    /// Whether there is a process that has not failed.
    fn has_life(&self) -> bool {
        use State::{Booting, Configuring, GoingLive, Live, WaitingCarrier};
        matches!(
            self.state,
            Booting { .. } | Configuring { .. } | WaitingCarrier { .. } | GoingLive { .. } | Live { .. }
        )
    }

    /// The transition function.
    pub fn handle(&mut self, now: Time, input: Input) -> Vec<Action> {
        match input {
            Input::Start => self.on_start(now),
            Input::ResetDone => self.on_reset_done(now),
            Input::NotStarted(why) => self.on_not_started(now, &why),
            Input::Hello => self.on_hello(),
            Input::Applying => self.on_applying(),
            Input::Forwarding => self.on_forwarding(now),
            Input::Carrier(carrier) => self.on_carrier(now, carrier),
            Input::Heartbeat => self.on_heartbeat(now),
            Input::Starved => self.on_starved(),
            Input::EndLive(end) => self.on_end_live(now, end),
            Input::EndHere(end) => self.on_end_here(end),
            Input::EndGone(end) => self.on_end_gone(now, end),
            Input::Failed(failure) => self.fail(now, failure),
            Input::Sign(failure) => self.on_sign(now, failure),
            Input::Released => self.on_released(now),
            Input::Evidence => self.on_evidence(now),
            Input::ProcessGone(how) => self.on_process_gone(now, how),
            Input::Tick => self.on_tick(now),
            Input::Stop => self.on_stop(now),
            Input::Restart { fresh } => self.on_restart(now, fresh),
            Input::AtRest => self.on_at_rest(now),
            Input::StandbyUseless => self.on_standby_useless(now),
            Input::Resume => self.on_resume(now),
            Input::Sleep => self.on_sleep(now),
            Input::Wake => self.on_wake(now),
            Input::StandbyHello(_)
            | Input::StandbyLoaded(_)
            | Input::StandbyHeartbeat(_)
            | Input::StandbyFailed(..) => self.on_standby(now, input),
            Input::SnapshotMissing | Input::SnapshotThere => self.on_snapshot(&input),
            Input::SpareForwarding
            | Input::SpareCarrier(_)
            | Input::SpareLive(_)
            | Input::SpareFenced
            | Input::SpareResetDone => self.on_spare(now, &input),
        }
    }

    fn next_generation(&mut self) -> Generation {
        let next = self.newest.map_or(Generation::FIRST, Generation::next);
        self.newest = Some(next);
        next
    }

    fn on_start(&mut self, now: Time) -> Vec<Action> {
        if self.state != State::Idle {
            return Vec::new();
        }
        if self.sleeps {
            self.state = State::Asleep;
            return Vec::new();
        }
        self.state = State::Resetting { until: now + RESET_PATIENCE, next: Some(now) };
        vec![Action::Reset]
    }

    fn on_resume(&mut self, now: Time) -> Vec<Action> {
        // A second reset would not help while the first one, or the killed process, still hangs.
        if self.state != State::Quarantined || self.reset_hangs || self.process_hangs || self.sleeps {
            return Vec::new();
        }
        self.history.forgive();
        self.suspects.clear_all();
        self.state = State::Resetting { until: now + RESET_PATIENCE, next: Some(now) };
        vec![Action::Reset]
    }

    fn on_reset_done(&mut self, now: Time) -> Vec<Action> {
        self.reset_hangs = false;
        match self.state {
            State::Resetting { next: Some(_), .. } if self.sleeps => {
                self.state = State::Asleep;
                Vec::new()
            }
            State::Resetting { next: Some(next), .. } if next <= now => self.begin_life(now),
            State::Resetting { next: Some(until), .. } => {
                self.state = State::BackOff { until };
                Vec::new()
            }
            State::Resetting { next: None, .. } => {
                self.state = State::Quarantined;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    /// Begins a life: adopts the standby, even one that still boots, because a new VM would take longer; without a standby, starts
    /// a process.
    fn begin_life(&mut self, now: Time) -> Vec<Action> {
        self.forget_life();
        let until = now + Duration::from_secs(self.history.policy().boot_timeout_s.into());
        // A spare has another device: it has been taken at the failure, or there was none.
        let adopted = if self.reserve.is_spare() { None } else { self.reserve.adopt(now) };
        let generation = adopted.map_or_else(|| self.next_generation(), |(generation, _)| generation);
        let next = adopted.and_then(|_| self.move_up(now));
        self.generation = Some(generation);
        match adopted {
            Some((_, Stage::Booting)) => {
                self.state = State::Booting { until };
                std::iter::once(Action::Adopt(generation)).chain(next).collect()
            }
            // It got its plan when it said hello.
            Some(_) => {
                self.silence = Some(Silence::since(now));
                self.state = State::Configuring { until };
                std::iter::once(Action::Adopt(generation)).chain(next).collect()
            }
            None => {
                self.state = State::Booting { until };
                self.end_saving(now).into_iter().chain([Action::Spawn(generation)]).collect()
            }
        }
    }

    /// Another life is the present one from here on: what was noted of the one before says nothing about it.
    fn forget_life(&mut self) {
        (self.suspicion, self.silence, self.applying) = (None, None, false);
        self.carrier.begin();
        self.late.clear();
    }

    fn on_hello(&mut self) -> Vec<Action> {
        let State::Booting { until } = self.state else { return Vec::new() };
        self.state = State::Configuring { until };
        vec![Action::Configure]
    }

    fn on_applying(&mut self) -> Vec<Action> {
        self.applying |= matches!(self.state, State::Configuring { .. });
        Vec::new()
    }

    fn on_forwarding(&mut self, now: Time) -> Vec<Action> {
        let State::Configuring { .. } = self.state else { return Vec::new() };
        self.applying = true;
        self.silence = Some(Silence::since(now));
        self.state = State::WaitingCarrier { until: now + self.carrier_patience() };
        if self.carrier() == Carrier::Up {
            return self.go_live(now);
        }
        // The spare's NIC may have a carrier, so the spare is wanted before this NIC has one.
        self.reserve.want_beside(now);
        Vec::new()
    }

    fn on_heartbeat(&mut self, now: Time) -> Vec<Action> {
        if let Some(silence) = &mut self.silence {
            *silence = Silence::since(now);
        }
        Vec::new()
    }

    fn on_starved(&mut self) -> Vec<Action> {
        let timeout = self.heartbeat_timeout();
        if let Some(silence) = &mut self.silence {
            silence.excuse(timeout);
        }
        Vec::new()
    }

    fn on_sign(&mut self, now: Time, failure: Failure) -> Vec<Action> {
        if !self.has_life() || self.suspicion.is_some() {
            return Vec::new();
        }
        self.suspicion = Some((now + SUSPICION, failure));
        vec![Action::Mask]
    }

    fn fail(&mut self, now: Time, mut failure: Failure) -> Vec<Action> {
        if !self.has_life() {
            return Vec::new();
        }
        (self.restarting, self.resting) = (None, None);
        // The time of the first sign is when the failure was noticed, whatever its reason turned out to be.
        if let Some((_, sign)) = self.suspicion.take() {
            failure.at = failure.at.min(sign.at);
        }
        // Without a carrier no frame of the log has gone out, so none can be what killed it.
        let replays = self.carrier() == Carrier::Up;
        let lived = match &self.state {
            State::Live { since } => {
                // Frames replayed at an end that came late may be what killed it.
                if failure.source.is_failure() && replays {
                    self.suspects.died(&self.late, true);
                }
                Some(now.since(*since))
            }
            State::GoingLive { waiting, .. } if failure.source.is_failure() && replays => {
                self.suspects.died(waiting, true);
                None
            }
            State::Configuring { .. } | State::WaitingCarrier { .. }
                if failure.source.is_failure() && self.applying =>
            {
                self.suspects.died(&self.ends, false);
                None
            }
            _ => None,
        };
        let source = failure.source;
        if let Some(actions) = self.take_over(now, &failure, lived) {
            return actions;
        }
        let over = source.is_the_end();
        let patience = (!over).then_some(now + RELEASE);
        self.state = State::Fencing { patience, lived, source };
        self.killed = over.then(|| Killed::at(now));
        let next = if over { Action::Kill } else { Action::Release };
        let ahead = self.start_ahead(now, lived, source);
        [Action::Failed(failure), next].into_iter().chain(ahead).collect()
    }

    fn on_evidence(&mut self, now: Time) -> Vec<Action> {
        match &mut self.state {
            State::Fencing { patience: patience @ Some(_), .. } => {
                (*patience, self.killed) = (None, Some(Killed::at(now)));
                vec![Action::Kill]
            }
            _ => Vec::new(),
        }
    }

    fn on_released(&mut self, now: Time) -> Vec<Action> {
        let State::Fencing { patience: Some(_), lived, source } = self.state else { return Vec::new() };
        let mut actions = self.fenced(now, lived, source);
        // The guests wait for the reset alone, so it goes first; then the life's last words, then the report.
        let behind_reset = actions.iter().position(|action| *action == Action::Reset).map_or(0, |n| n + 1);
        actions.insert(behind_reset, Action::BeginLastWords);
        actions
    }

    fn on_process_gone(&mut self, now: Time, how: String) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.has_life() {
            let failure = Failure { source: NoticedBy::ProcessExit, what: how, at: now };
            actions.extend(self.fail(now, failure).into_iter().filter(|action| *action != Action::Kill));
        }
        match self.state {
            State::Fencing { lived, source, .. } => actions.extend(self.fenced(now, lived, source)),
            State::Quarantined if self.process_hangs => actions.extend(self.hung_process_gone(now)),
            State::Stopping => self.state = State::Stopped,
            _ => {}
        }
        self.killed = None;
        actions
    }

    fn on_tick(&mut self, now: Time) -> Vec<Action> {
        let mut actions = self.tick_standby(now);
        actions.extend(self.tick_second(now));
        actions.extend(self.reserve.alarm(now).map(Action::Warn));
        if self.resting.is_some_and(|until| until <= now) {
            actions.extend(self.on_at_rest(now));
        }
        if self.restarting.is_some_and(|until| until <= now) {
            actions.extend(self.give_restart_up(now));
        }
        actions.extend(self.tick_life(now));
        actions.extend(self.leave_for_spare(now));
        actions
    }

    fn tick_life(&mut self, now: Time) -> Vec<Action> {
        if let Some((_, sign)) = self.suspicion.take_if(|(until, _)| *until <= now) {
            return self.fail(now, sign);
        }
        if let (Some((_, over)), Some(silence)) = (self.silence(), self.silence)
            && over <= now
        {
            let what = format!("no heartbeat for {} ms", silence.limit(self.heartbeat_timeout()).as_millis());
            return self.fail(now, Failure { source: NoticedBy::Heartbeat, what, at: silence.heard() });
        }
        match self.state {
            State::Booting { until } | State::Configuring { until } if until <= now => {
                let stage = if matches!(self.state, State::Booting { .. }) { "booted" } else { "forwarding" };
                let what = format!("not {stage} after {} s", self.history.policy().boot_timeout_s);
                self.fail(now, Failure { source: NoticedBy::BootTimeout, what, at: now })
            }
            State::WaitingCarrier { until } if until <= now => self.go_live(now),
            State::GoingLive { until, .. } if until <= now => self.leave_behind(now),
            State::BackOff { until } if until <= now => self.begin_life(now),
            State::Fencing { patience: Some(until), .. } if until <= now => self.on_evidence(now),
            State::Fencing { patience: None, lived, source } => self.tick_killed(now, lived, source),
            State::Stopping => self.tick_stopping(now),
            State::Resetting { until, next } if until <= now => {
                self.state = State::Quarantined;
                self.reset_hangs = true;
                let why = format!("the device's reset has not returned for {} s", RESET_PATIENCE.as_secs());
                let mut actions = self.drop_standby(now);
                actions.extend(next.map(|_| Action::Quarantine(why)));
                actions
            }
            _ => Vec::new(),
        }
    }

    fn on_stop(&mut self, now: Time) -> Vec<Action> {
        (self.suspicion, self.restarting, self.resting) = (None, None, None);
        let process = self.has_life() || matches!(self.state, State::Fencing { .. } | State::Stopping);
        self.state = if process { State::Stopping } else { State::Stopped };
        if process {
            self.killed.get_or_insert(Killed::at(now));
        }
        let mut actions = self.drop_standby(now);
        actions.extend(process.then_some(Action::Kill));
        actions
    }
}

#[cfg(test)]
mod any_order_tests;
#[cfg(test)]
mod asleep_tests;
#[cfg(test)]
mod rest_tests;
#[cfg(test)]
mod saving_tests;
#[cfg(test)]
mod spare_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod waiting_tests;
