//! The lives of one driver VM as a state machine. Pure: an [`Input`] with its time goes in, [`Action`]s come out.
//!
//! ```text
//!            start            reset done            hello                 forwarding
//!   Idle ----------> Resetting ---------> Booting ---------> Configuring ------------> WaitingCarrier
//!                     ^     | ^              :                    :                          | carrier, or patience over
//!           gone, or  |     | | back-off     :                    :                          v
//!           no life   |     v | over         : failure            : failure             GoingLive (replay)
//!                     |    BackOff           v                    v                          | every end is live
//!                   Fencing <- - - - - - - - - - - - - - - - - - - - - - - - - - - - - - -   v
//!                     |        (of any state with a life)                        failure : Live
//!                     v restart limit reached
//!                Quarantined                     any state --stop--> Stopping --gone--> Stopped
//! ```
//!
//! Invariant: at most one generation has a process. [`Action::Spawn`] comes only after the process of the
//! generation before is gone and the device's reset has returned.

mod state;

use std::collections::BTreeSet;
use std::time::Duration;

use umbra_shadow::Generation;

use crate::process::ipc::Replay;
use crate::supervisor::policy::{History, Verdict};
use crate::supervisor::time::Time;

pub use state::{Action, Carrier, End, Failure, Input, Source, State};

/// A lost link or control stream is mostly the echo of a death whose own sign (the process's exit, the VM's end) is
/// on its way: so long is that waited for. The guests are masked meanwhile.
const SUSPICION: Duration = Duration::from_millis(100);

/// The first line of a panic is followed by the stack, and only then by pvpanic or the reset. On hardware that takes
/// some ten milliseconds; where the console is slower, the evidence is cut off here.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// How long a failed VM's process may take to hand over its registers before it is killed.
const EVIDENCE: Duration = Duration::from_millis(50);

/// How long a NIC may take to find its link before the guest is told that there is none. Copper gigabit
/// autonegotiation takes up to three or four seconds.
const CARRIER_PATIENCE: Duration = Duration::from_secs(6);

/// A reset that has not returned after this long will not; the kernel's own longest wait is 60 s for a device to
/// become ready after a reset (`PCIE_RESET_READY_POLL_MS`).
const RESET_PATIENCE: Duration = Duration::from_secs(75);

/// The state machine of one driver VM.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    state: State,
    /// Of the present life, or of the last one.
    generation: Option<Generation>,
    history: History,
    /// The ends whose guests run.
    ends: BTreeSet<End>,
    /// The ends at which a life has died while it replayed: what they would replay again is suspect.
    suspects: BTreeSet<End>,
    /// A sign of failure, and until when a better reason is waited for.
    suspicion: Option<(Time, Failure)>,
    /// The last sign of life from the agent, once it forwards.
    heard: Option<Time>,
    carrier: Carrier,
}

impl Lifecycle {
    /// A driver VM that serves `ends` ends and is restarted as `history`'s policy says.
    pub fn new(history: History, ends: usize) -> Self {
        Self {
            state: State::Idle,
            generation: None,
            history,
            ends: (0..ends).collect(),
            suspects: BTreeSet::new(),
            suspicion: None,
            heard: None,
            carrier: Carrier::Down,
        }
    }

    /// The state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The generation of the present life, or of the last one.
    pub fn generation(&self) -> Option<Generation> {
        self.generation
    }

    /// The failures so far.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The NIC's carrier, as far as the present life has said.
    pub fn carrier(&self) -> Carrier {
        self.carrier
    }

    /// The ends whose guests run: those that the next life is to serve.
    pub fn ends(&self) -> impl Iterator<Item = End> {
        self.ends.iter().copied()
    }

    /// When [`Input::Tick`] is due.
    pub fn deadline(&self) -> Option<Time> {
        let state = match self.state {
            State::Resetting { until, .. }
            | State::BackOff { until }
            | State::Booting { until }
            | State::Configuring { until }
            | State::WaitingCarrier { until } => Some(until),
            State::Fencing { evidence, .. } => evidence,
            _ => None,
        };
        let suspicion = self.suspicion.as_ref().map(|(until, _)| *until);
        [state, suspicion, self.heartbeat_deadline()].into_iter().flatten().min()
    }

    fn heartbeat_deadline(&self) -> Option<Time> {
        let timeout = Duration::from_millis(self.history.policy().heartbeat_timeout_ms.into());
        self.heard.filter(|_| self.has_life()).map(|heard| heard + timeout)
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
            Input::Hello => self.on_hello(),
            Input::Forwarding => self.on_forwarding(now),
            Input::Carrier(carrier) => self.on_carrier(now, carrier),
            Input::Heartbeat => self.on_heartbeat(now),
            Input::EndLive(end) => self.on_end_live(now, end),
            Input::EndGone(end) => self.on_end_gone(now, end),
            Input::Failed(failure) => self.fail(now, failure),
            Input::Sign(failure) => self.on_sign(now, failure),
            Input::Evidence => self.on_evidence(),
            Input::ProcessGone(how) => self.on_process_gone(now, how),
            Input::Replace(why) => self.fail(now, Failure { source: Source::Replaced, what: why, at: now }),
            Input::Tick => self.on_tick(now),
            Input::Stop => self.on_stop(),
        }
    }

    /// The guest of `end` is on again (it was rebooted); the next life serves it.
    pub fn end_is_back(&mut self, end: End) {
        self.ends.insert(end);
        self.suspects.remove(&end);
    }

    fn on_start(&mut self, now: Time) -> Vec<Action> {
        if self.state != State::Idle {
            return Vec::new();
        }
        self.state = State::Resetting { until: now + RESET_PATIENCE, next: Some(now) };
        vec![Action::Reset]
    }

    fn on_reset_done(&mut self, now: Time) -> Vec<Action> {
        match self.state {
            State::Resetting { next: Some(next), .. } if next <= now => self.spawn(now),
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

    fn spawn(&mut self, now: Time) -> Vec<Action> {
        let generation = self.generation.map_or(Generation::FIRST, Generation::next);
        self.generation = Some(generation);
        self.suspicion = None;
        self.heard = None;
        self.carrier = Carrier::Down;
        let timeout = Duration::from_secs(self.history.policy().boot_timeout_s.into());
        self.state = State::Booting { until: now + timeout };
        vec![Action::Spawn(generation)]
    }

    fn on_hello(&mut self) -> Vec<Action> {
        let State::Booting { until } = self.state else { return Vec::new() };
        self.state = State::Configuring { until };
        vec![Action::Configure]
    }

    fn on_forwarding(&mut self, now: Time) -> Vec<Action> {
        let State::Configuring { .. } = self.state else { return Vec::new() };
        self.heard = Some(now);
        self.state = State::WaitingCarrier { until: now + CARRIER_PATIENCE };
        if self.carrier == Carrier::Up { self.go_live(now) } else { Vec::new() }
    }

    fn on_carrier(&mut self, now: Time, carrier: Carrier) -> Vec<Action> {
        self.carrier = carrier;
        match self.state {
            State::WaitingCarrier { .. } if carrier == Carrier::Up => self.go_live(now),
            _ => Vec::new(),
        }
    }

    fn go_live(&mut self, now: Time) -> Vec<Action> {
        self.state = State::GoingLive { waiting: self.ends.clone() };
        let scope = |end| if self.suspects.contains(end) { Replay::ConfigurationOnly } else { Replay::Everything };
        let mut actions: Vec<_> = self.ends.iter().map(|end| Action::GoLive(*end, scope(end))).collect();
        actions.extend(self.check_all_live(now));
        actions
    }

    fn on_heartbeat(&mut self, now: Time) -> Vec<Action> {
        if let Some(heard) = &mut self.heard {
            *heard = now;
        }
        Vec::new()
    }

    fn on_end_live(&mut self, now: Time, end: End) -> Vec<Action> {
        if let State::GoingLive { waiting } = &mut self.state
            && waiting.remove(&end)
        {
            self.suspects.remove(&end);
        }
        self.check_all_live(now)
    }

    fn on_end_gone(&mut self, now: Time, end: End) -> Vec<Action> {
        self.ends.remove(&end);
        self.suspects.remove(&end);
        if let State::GoingLive { waiting } = &mut self.state {
            waiting.remove(&end);
        }
        self.check_all_live(now)
    }

    fn check_all_live(&mut self, now: Time) -> Vec<Action> {
        match &self.state {
            State::GoingLive { waiting } if waiting.is_empty() => {
                self.state = State::Live { since: now };
                vec![Action::Live]
            }
            _ => Vec::new(),
        }
    }

    fn on_sign(&mut self, now: Time, failure: Failure) -> Vec<Action> {
        if !self.has_life() || self.suspicion.is_some() {
            return Vec::new();
        }
        let patience = if failure.source == Source::Panic { LAST_WORDS } else { SUSPICION };
        self.suspicion = Some((now + patience, failure));
        vec![Action::Mask]
    }

    fn fail(&mut self, now: Time, mut failure: Failure) -> Vec<Action> {
        if !self.has_life() {
            return Vec::new();
        }
        // The time of the first sign is when the failure was noticed, whatever its reason turned out to be.
        if let Some((_, sign)) = self.suspicion.take() {
            failure.at = failure.at.min(sign.at);
        }
        let lived = match &self.state {
            State::Live { since } => Some(now.since(*since)),
            State::GoingLive { waiting } if failure.source != Source::Replaced => {
                self.suspects.extend(waiting);
                None
            }
            _ => None,
        };
        let source = failure.source;
        let has_no_more_to_tell = matches!(source, Source::ProcessExit | Source::Start | Source::VmEnd | Source::Replaced);
        let evidence = (!has_no_more_to_tell).then_some(now + EVIDENCE);
        self.state = State::Fencing { evidence, lived, source };
        let next = if has_no_more_to_tell { Action::Kill } else { Action::AskEvidence };
        vec![Action::Failed(failure), next]
    }

    fn on_evidence(&mut self) -> Vec<Action> {
        match &mut self.state {
            State::Fencing { evidence: evidence @ Some(_), .. } => {
                *evidence = None;
                vec![Action::Kill]
            }
            _ => Vec::new(),
        }
    }

    fn on_process_gone(&mut self, now: Time, how: String) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.has_life() {
            let failure = Failure { source: Source::ProcessExit, what: how, at: now };
            actions.extend(self.fail(now, failure).into_iter().filter(|action| *action != Action::Kill));
        }
        match self.state {
            State::Fencing { lived, source, .. } => actions.extend(self.fenced(now, lived, source)),
            State::Stopping => self.state = State::Stopped,
            _ => {}
        }
        actions
    }

    /// The failed generation can do no more harm: what comes next?
    fn fenced(&mut self, now: Time, lived: Option<Duration>, source: Source) -> Vec<Action> {
        let until = now + RESET_PATIENCE;
        if source == Source::Replaced {
            self.state = State::Resetting { until, next: Some(now) };
            return vec![Action::Reset];
        }
        match self.history.failed(now, lived) {
            Verdict::Restart(delay) => {
                self.state = State::Resetting { until, next: Some(now + delay) };
                vec![Action::Report, Action::Reset]
            }
            Verdict::Quarantine => {
                self.state = State::Resetting { until, next: None };
                let policy = self.history.policy();
                let why = format!("more than {} failures in {} s", policy.limit, policy.interval_s);
                vec![Action::Report, Action::Quarantine(why), Action::Reset]
            }
        }
    }

    fn on_tick(&mut self, now: Time) -> Vec<Action> {
        if let Some((_, sign)) = self.suspicion.take_if(|(until, _)| *until <= now) {
            return self.fail(now, sign);
        }
        if let (Some(deadline), Some(at)) = (self.heartbeat_deadline(), self.heard)
            && deadline <= now
        {
            let what = format!("no heartbeat for {} ms", self.history.policy().heartbeat_timeout_ms);
            return self.fail(now, Failure { source: Source::Heartbeat, what, at });
        }
        match self.state {
            State::Booting { until } | State::Configuring { until } if until <= now => {
                let stage = if matches!(self.state, State::Booting { .. }) { "booted" } else { "forwarding" };
                let what = format!("not {stage} after {} s", self.history.policy().boot_timeout_s);
                self.fail(now, Failure { source: Source::BootTimeout, what, at: now })
            }
            State::WaitingCarrier { until } if until <= now => self.go_live(now),
            State::BackOff { until } if until <= now => self.spawn(now),
            State::Fencing { evidence: Some(until), .. } if until <= now => self.on_evidence(),
            State::Resetting { until, next } if until <= now => {
                self.state = State::Quarantined;
                let why = format!("the device's reset has not returned for {} s", RESET_PATIENCE.as_secs());
                next.map(|_| Action::Quarantine(why)).into_iter().collect()
            }
            _ => Vec::new(),
        }
    }

    fn on_stop(&mut self) -> Vec<Action> {
        self.suspicion = None;
        let process = self.has_life() || matches!(self.state, State::Fencing { .. } | State::Stopping);
        self.state = if process { State::Stopping } else { State::Stopped };
        if process { vec![Action::Kill] } else { Vec::new() }
    }
}

#[cfg(test)]
mod tests;
