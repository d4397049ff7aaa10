//! The shadow between a guest and cards that are made up: every transition, in any order, at any time.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;

use super::*;

const MS: u64 = 1_000_000;
const OUT: StreamId = StreamId(0);
const IN: StreamId = StreamId(1);

fn card() -> Card {
    let info = |direction| StreamInfo {
        direction,
        formats: Format::S16.bit(),
        rates: Rate::from_hz(48_000).unwrap().bit(),
        channels_min: 1,
        channels_max: 2,
    };
    Card { name: "made up".into(), streams: vec![info(Direction::Playback), info(Direction::Capture)] }
}

/// Mono, 10 ms periods, four of them.
fn params() -> Params {
    Params {
        format: Format::S16,
        rate: Rate::from_hz(48_000).unwrap(),
        channels: 1,
        period_bytes: 960,
        buffer_bytes: 3840,
    }
}

/// As many bytes, in half as many frames.
fn stereo() -> Params {
    Params { channels: 2, ..params() }
}

fn generation(n: u32) -> Generation {
    Generation::new(n).unwrap()
}

/// A card that does what it is told and refuses what no card is told.
#[derive(Debug, Default)]
struct Model {
    params: BTreeMap<u16, Params>,
    epoch: BTreeMap<u16, Epoch>,
    running: BTreeMap<u16, bool>,
    queue: VecDeque<u8>,
    heard: u64,
    heard_samples: Vec<u8>,
}

impl Model {
    fn take(&mut self, message: ToCard) {
        match message {
            ToCard::SetParams { stream, params } => {
                assert!(!self.running.get(&stream.0).unwrap_or(&false), "parameters for a running stream");
                self.params.insert(stream.0, params);
            }
            ToCard::Prepare { stream, epoch } => {
                assert!(self.params.contains_key(&stream.0), "prepare without parameters");
                assert!(!self.running.get(&stream.0).unwrap_or(&false), "prepare of a running stream");
                assert!(self.epoch.get(&stream.0).is_none_or(|old| *old < epoch), "an epoch twice");
                self.epoch.insert(stream.0, epoch);
                if stream == OUT {
                    (self.queue, self.heard) = (VecDeque::new(), 0);
                }
            }
            ToCard::Play { stream, epoch, samples } => {
                assert_eq!(self.epoch.get(&stream.0), Some(&epoch), "samples of another epoch");
                self.queue.extend(samples);
            }
            ToCard::Start { stream } => {
                assert!(self.epoch.contains_key(&stream.0), "start without prepare");
                assert!(!self.running.insert(stream.0, true).unwrap_or(false), "started twice");
            }
            ToCard::Stop { stream } => {
                assert_eq!(self.running.insert(stream.0, false), Some(true), "stop of a halted stream");
            }
            ToCard::Release { stream } => {
                self.running.insert(stream.0, false);
                if stream == OUT {
                    self.queue.clear();
                }
            }
        }
    }

    /// Plays and records for `frames` frames.
    fn run(&mut self, frames: usize) -> Vec<FromCard> {
        let mut said = Vec::new();
        let frame = |stream: StreamId| self.params.get(&stream.0).map_or(2, |p| p.frame_bytes() as usize);
        if *self.running.get(&OUT.0).unwrap_or(&false) {
            let bytes = (frames * frame(OUT)).min(self.queue.len());
            self.heard += (bytes / frame(OUT)) as u64;
            self.heard_samples.extend(self.queue.drain(..bytes));
            said.push(FromCard::Position { stream: OUT, epoch: self.epoch[&OUT.0], heard: self.heard });
        }
        if *self.running.get(&IN.0).unwrap_or(&false) && frames > 0 {
            let samples = vec![1; frames * frame(IN)];
            said.push(FromCard::Captured { stream: IN, epoch: self.epoch[&IN.0], samples });
        }
        said
    }
}

/// A guest and a row of cards around one shadow.
struct Rig {
    shadow: SoundShadow,
    now: u64,
    generation: u32,
    model: Option<Model>,
    /// What past cards played.
    played: Vec<u8>,
    next_token: u32,
    /// Messages that the guest waits for, in order, per stream.
    waiting: BTreeMap<u16, VecDeque<Token>>,
    /// Bytes of each message.
    sizes: BTreeMap<u32, usize>,
    recorded: Vec<u8>,
    given_back: u64,
    /// Milliseconds from report to report.
    every: u16,
}

impl Rig {
    fn new(policy: Policy) -> Self {
        Self {
            shadow: SoundShadow::new(card(), policy),
            now: 1_000 * MS,
            generation: 0,
            model: None,
            played: Vec::new(),
            next_token: 0,
            waiting: BTreeMap::new(),
            sizes: BTreeMap::new(),
            recorded: Vec::new(),
            given_back: 0,
            every: 1,
        }
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut SoundShadow, u64, &mut Out) -> T) -> T {
        let mut out = Out::default();
        let result = f(&mut self.shadow, self.now, &mut out);
        for message in out.to_card {
            self.model.as_mut().expect("a message for no card").take(message);
        }
        for done in out.done {
            let (_, queue) = self.waiting.iter_mut().find(|(_, q)| q.contains(&done.token)).expect("done twice");
            assert_eq!(queue.pop_front(), Some(done.token), "out of order");
            if done.outcome == Outcome::Ok && !done.samples.is_empty() {
                assert_eq!(done.samples.len(), self.sizes[&done.token.0]);
                self.recorded.extend(done.samples);
            }
        }
        result
    }

    fn command(&mut self, id: StreamId, command: Command) -> Result<(), Refusal> {
        let result = self.with(|s, now, out| s.command(id, command, now, out));
        if result.is_ok() && matches!(command, Command::SetParams(_) | Command::Prepare | Command::Release) {
            assert!(self.waiting.get(&id.0).is_none_or(VecDeque::is_empty), "messages kept");
            self.given_back = 0;
        }
        result
    }

    fn token(&mut self, id: StreamId, bytes: usize) -> Token {
        self.next_token += 1;
        let token = Token(self.next_token);
        self.waiting.entry(id.0).or_default().push_back(token);
        self.sizes.insert(token.0, bytes);
        token
    }

    /// True if the message was taken.
    fn play(&mut self, samples: Vec<u8>) -> bool {
        let token = self.token(OUT, samples.len());
        // A refused message comes back at once, before older ones.
        let waiting = std::mem::take(self.waiting.entry(OUT.0).or_default());
        let mut out = Out::default();
        self.shadow.play(OUT, token, samples, self.now, &mut out);
        let refused = out.done.iter().any(|d| d.token == token && d.outcome != Outcome::Ok);
        self.waiting.insert(OUT.0, waiting);
        if refused {
            self.waiting.entry(OUT.0).or_default().pop_back();
            out.done.retain(|d| d.token != token);
        }
        self.with(|_, _, into| into_out(into, out));
        !refused
    }

    fn record(&mut self, bytes: usize) {
        let token = self.token(IN, bytes);
        let mut out = Out::default();
        self.shadow.record(IN, token, bytes, self.now, &mut out);
        if out.done.iter().any(|d| d.token == token && d.outcome != Outcome::Ok) {
            self.waiting.entry(IN.0).or_default().pop_back();
            out.done.retain(|d| d.token != token);
        }
        self.with(|_, _, into| into_out(into, out));
    }

    fn boot(&mut self) {
        self.crash();
        self.generation += 1;
        self.model = Some(Model::default());
        let generation = generation(self.generation);
        self.with(|s, now, out| s.replay(generation, &card(), now, out)).unwrap();
    }

    fn crash(&mut self) {
        if let Some(model) = self.model.take() {
            self.played.extend(model.heard_samples);
        }
        self.with(|s, now, out| s.mask(now, out));
    }

    fn die(&mut self) {
        self.crash();
        self.with(|s, _, out| s.die(out));
        self.given_back = 0;
    }

    /// The guest's driver resets its device, and forgets what it waits for.
    fn reset(&mut self) {
        self.with(|s, _, out| s.reset(out));
        self.waiting.clear();
        self.given_back = 0;
    }

    /// Lets `ms` milliseconds pass; the card reports each one, or every so many.
    fn pass(&mut self, ms: u64) {
        for _ in 0..ms {
            self.now += MS;
            let generation = Generation::new(self.generation);
            let due = (self.now / MS).is_multiple_of(self.every.into());
            let model = self.model.as_mut().filter(|_| due);
            for message in model.map(|m| m.run(48 * usize::from(self.every))).unwrap_or_default() {
                self.with(|s, now, out| s.from_card(generation.unwrap(), message, now, out)).unwrap();
            }
            if self.shadow.deadline().is_some_and(|at| at <= self.now) {
                self.with(|s, now, out| s.tick(now, out)).unwrap();
                assert!(self.shadow.deadline().is_none_or(|at| at > self.now), "a deadline that stays");
            }
            let given_back = self.shadow.given_back(OUT).unwrap();
            assert!(given_back >= self.given_back, "the position went back");
            self.given_back = given_back;
        }
    }

    /// Prepares and starts playback with a full buffer.
    fn start_playback(&mut self, source: &mut Source) {
        self.command(OUT, Command::SetParams(params())).unwrap();
        self.command(OUT, Command::Prepare).unwrap();
        source.fill(self);
        self.command(OUT, Command::Start).unwrap();
    }
}

fn into_out(into: &mut Out, from: Out) {
    into.to_card.extend(from.to_card);
    into.done.extend(from.done);
}

/// A player: samples that say where they come from.
#[derive(Default)]
struct Source {
    next: u16,
    all: Vec<u8>,
}

impl Source {
    /// Fills the guest's buffer, as a player does that is always in time.
    fn fill(&mut self, rig: &mut Rig) {
        while rig.waiting.get(&OUT.0).map_or(0, VecDeque::len) < 4 {
            let samples: Vec<u8> = (0..480).flat_map(|i| self.next.wrapping_add(i).to_le_bytes()).collect();
            self.next = self.next.wrapping_add(480);
            self.all.extend(&samples);
            assert!(rig.play(samples), "a message within the buffer was refused");
        }
    }
}

fn play_for(rig: &mut Rig, source: &mut Source, ms: u64) {
    for _ in 0..ms {
        rig.pass(1);
        source.fill(rig);
    }
}

#[test]
fn a_healthy_card_plays_everything_in_order() {
    let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    play_for(&mut rig, &mut source, 500);
    let heard = &rig.model.as_ref().unwrap().heard_samples;
    assert_eq!(heard.len(), 500 * 48 * 2);
    assert_eq!(heard[..], source.all[..heard.len()]);
    assert_eq!(rig.shadow.mode(), Mode::Passive(generation(1)));
}

#[test]
fn skip_stays_in_real_time() {
    let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    play_for(&mut rig, &mut source, 200);
    rig.crash();
    play_for(&mut rig, &mut source, 3000);
    assert_eq!(rig.shadow.heard(OUT), Some(3200 * 48));
    assert_eq!(rig.shadow.counts().frames_skipped, 3000 * 48);
    rig.boot();
    play_for(&mut rig, &mut source, 100);
    assert_eq!(rig.shadow.mode(), Mode::Passive(generation(2)));
    let after = &rig.model.as_ref().unwrap().heard_samples;
    assert_eq!(after[..], source.all[3200 * 96..3200 * 96 + after.len()]);
}

#[test]
fn the_clock_moves_smoothly_one_period_at_a_time() {
    let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    play_for(&mut rig, &mut source, 103);
    rig.crash();
    let mut before = rig.shadow.given_back(OUT).unwrap();
    for _ in 0..100 {
        rig.pass(10);
        source.fill(&mut rig);
        let now = rig.shadow.given_back(OUT).unwrap();
        assert_eq!(now - before, 480);
        before = now;
    }
}

#[test]
fn hold_loses_nothing_and_doubles_nothing_when_reports_are_exact() {
    let (mut rig, mut source) = (Rig::new(Policy::Hold), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    for _ in 0..5 {
        play_for(&mut rig, &mut source, 333);
        rig.crash();
        play_for(&mut rig, &mut source, 2000);
        rig.boot();
    }
    play_for(&mut rig, &mut source, 5000);
    rig.crash();
    assert_eq!(rig.played.len(), (5 * 333 + 5000) * 96);
    assert!(rig.played[..] == source.all[..rig.played.len()]);
    assert_eq!(rig.shadow.counts().frames_skipped, 0);
}

#[test]
fn hold_never_lets_the_guest_wait_longer_than_linux_does() {
    let (mut rig, mut source) = (Rig::new(Policy::Hold), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    play_for(&mut rig, &mut source, 100);
    rig.crash();
    let (mut before, mut still) = (rig.shadow.given_back(OUT), 0);
    for _ in 0..10_000 {
        play_for(&mut rig, &mut source, 1);
        let now = rig.shadow.given_back(OUT);
        still = if now == before { still + 1 } else { 0 };
        before = now;
        assert!(still < 100, "100 ms without progress");
    }
}

#[test]
fn a_held_stream_that_drains_gets_its_messages_back() {
    let (mut rig, mut source) = (Rig::new(Policy::Hold), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    play_for(&mut rig, &mut source, 100);
    rig.crash();
    rig.pass(110);
    assert!(rig.waiting[&OUT.0].is_empty());
    assert!(rig.shadow.kept_bytes() > 0, "but the samples are kept");
}

#[test]
fn what_a_held_player_left_behind_is_heard_after_the_outage() {
    let (mut rig, mut source) = (Rig::new(Policy::Hold), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    play_for(&mut rig, &mut source, 100);
    rig.crash();
    play_for(&mut rig, &mut source, 1000);
    rig.pass(110);
    rig.command(OUT, Command::Stop).unwrap();
    rig.command(OUT, Command::Release).unwrap();
    rig.boot();
    rig.pass(2000);
    assert_eq!(rig.shadow.kept_bytes(), 0);
    assert!(!rig.model.as_ref().unwrap().running[&OUT.0], "the card was stopped at the end");
    rig.crash();
    assert!(rig.played == source.all);
}

#[test]
fn a_held_player_that_is_late_and_recovers_from_its_underrun_loses_nothing() {
    // The card is away, or back, when the player recovers.
    for back in [false, true] {
        let (mut rig, mut source) = (Rig::new(Policy::Hold), Source::default());
        rig.boot();
        rig.start_playback(&mut source);
        play_for(&mut rig, &mut source, 1000);
        rig.crash();
        play_for(&mut rig, &mut source, 500);
        rig.pass(120);
        assert!(rig.waiting[&OUT.0].is_empty(), "late: it has everything back");
        rig.command(OUT, Command::Stop).unwrap();
        if back {
            rig.boot();
            rig.pass(5);
        }
        rig.command(OUT, Command::Prepare).unwrap();
        source.fill(&mut rig);
        rig.command(OUT, Command::Start).unwrap();
        play_for(&mut rig, &mut source, 300);
        if !back {
            rig.boot();
        }
        play_for(&mut rig, &mut source, 1000);
        rig.crash();
        assert!(rig.played.len() >= (1000 + 1000) * 96);
        assert!(rig.played[..] == source.all[..rig.played.len()]);
        assert_eq!(rig.shadow.counts().frames_skipped, 0);
    }
}

#[test]
fn a_period_after_a_pause_in_feeding_waits_until_it_is_heard() {
    let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    rig.pass(400);
    source.fill(&mut rig);
    rig.every = 15;
    rig.pass(1);
    assert_eq!(rig.waiting[&OUT.0].len(), 4, "given back unheard");
}

#[test]
fn a_replay_is_over_when_nothing_is_left_to_wait_for() {
    let (mut rig, mut source) = (Rig::new(Policy::Hold), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    rig.boot();
    assert_eq!(rig.shadow.mode(), Mode::Replaying(generation(2)));
    rig.command(OUT, Command::Stop).unwrap();
    assert_eq!(rig.shadow.mode(), Mode::Passive(generation(2)));
}

#[test]
fn a_card_faster_than_its_rate_is_a_violation() {
    let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    let mut heard = 0;
    let violation = loop {
        rig.now += MS;
        heard += 96;
        source.fill(&mut rig);
        let report = FromCard::Position { stream: OUT, epoch: Epoch(1), heard };
        if let Err(violation) = rig.with(|s, now, out| s.from_card(generation(1), report, now, out)) {
            break violation;
        }
        assert!(heard < 48 * 10_000, "never noticed");
    };
    assert!(matches!(violation, Violation::TooFast { stream: 0, ms: 500..1000, .. }), "{violation:?}");
}

#[test]
fn who_plays_anew_does_not_wait_for_what_was_left_behind() {
    let (mut rig, mut source) = (Rig::new(Policy::Hold), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    rig.crash();
    play_for(&mut rig, &mut source, 1000);
    rig.pass(110);
    rig.command(OUT, Command::Stop).unwrap();
    rig.command(OUT, Command::Release).unwrap();
    rig.boot();
    rig.pass(10);
    let mut anew = Source { next: 30_000, ..Source::default() };
    rig.start_playback(&mut anew);
    play_for(&mut rig, &mut anew, 100);
    rig.crash();
    assert!(rig.played[..960] == source.all[..960]);
    assert!(rig.played[960..] == anew.all[..rig.played.len() - 960]);
}

#[test]
fn held_samples_are_bounded() {
    let (mut rig, mut source) = (Rig::new(Policy::Hold), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    rig.crash();
    for _ in 0..(HELD_MAX_BYTES / 960 + 100) {
        rig.pass(75);
        source.fill(&mut rig);
    }
    let bound = HELD_MAX_BYTES + 2 * params().buffer_bytes as usize;
    assert!((HELD_MAX_BYTES..bound).contains(&rig.shadow.kept_bytes()), "{}", rig.shadow.kept_bytes());
}

#[test]
fn capture_runs_on_with_silence_and_goes_back_to_the_card() {
    let mut rig = Rig::new(Policy::Skip);
    rig.boot();
    rig.command(IN, Command::SetParams(params())).unwrap();
    rig.command(IN, Command::Prepare).unwrap();
    rig.command(IN, Command::Start).unwrap();
    let run = |rig: &mut Rig, ms| {
        for _ in 0..ms {
            while rig.waiting.get(&IN.0).map_or(0, VecDeque::len) < 4 {
                rig.record(960);
            }
            rig.pass(1);
        }
    };
    run(&mut rig, 200);
    rig.crash();
    run(&mut rig, 1000);
    rig.boot();
    run(&mut rig, 200);
    assert_eq!(rig.recorded.len(), 1400 * 96);
    assert!(rig.recorded[..200 * 96].iter().all(|b| *b == 1));
    // At the seam, silence that was due until the card's first report.
    assert!(rig.recorded[200 * 96..1201 * 96].iter().all(|b| *b == 0));
    assert!(rig.recorded[1201 * 96..].iter().all(|b| *b == 1));
}

#[test]
fn a_stuck_card_is_a_violation_but_the_guest_does_not_notice() {
    let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    play_for(&mut rig, &mut source, 100);
    let (mut waited, mut still, mut before) = (0, 0, rig.shadow.given_back(OUT));
    let violation = loop {
        rig.now += MS;
        waited += 1;
        let now = rig.shadow.given_back(OUT);
        still = if now == before { still + 1 } else { 0 };
        before = now;
        assert!(still <= 20, "the guest waits {still} ms, half its buffer, where nothing moves");
        if let Err(violation) = rig.with(|s, now, out| s.tick(now, out)) {
            break violation;
        }
        source.fill(&mut rig);
        assert!(waited < 4000, "never noticed");
    };
    assert_eq!(violation, Violation::Stalled { stream: 0, ms: 2000 });
    assert!(rig.shadow.counts().kept_alive >= 5);
}

#[test]
fn nonsense_of_the_card_is_a_violation() {
    let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    play_for(&mut rig, &mut source, 100);
    let epoch = Epoch(1);
    let mut say = |message| rig.with(|s, now, out| s.from_card(generation(1), message, now, out));
    let ahead = say(FromCard::Position { stream: OUT, epoch, heard: u64::MAX });
    assert!(matches!(ahead, Err(Violation::PositionAhead { .. })), "{ahead:?}");
    let back = say(FromCard::Position { stream: OUT, epoch, heard: 1 });
    assert!(matches!(back, Err(Violation::PositionBack { .. })), "{back:?}");
    let stream = say(FromCard::Position { stream: StreamId(9), epoch, heard: 1 });
    assert_eq!(stream, Err(Violation::NoSuchStream(9)));
    let direction = say(FromCard::Captured { stream: OUT, epoch, samples: vec![0; 4] });
    assert_eq!(direction, Err(Violation::NoSuchStream(0)));
    assert_eq!(say(FromCard::Position { stream: OUT, epoch: Epoch(7), heard: u64::MAX }), Ok(()));
}

#[test]
fn what_the_card_said_before_it_heard_of_a_reset_is_no_violation() {
    let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    play_for(&mut rig, &mut source, 100);
    rig.reset();
    let epoch = Epoch(1);
    let mut say = |message| rig.with(|s, now, out| s.from_card(generation(1), message, now, out));
    assert_eq!(say(FromCard::Position { stream: OUT, epoch, heard: 4410 }), Ok(()));
    assert_eq!(say(FromCard::Captured { stream: IN, epoch, samples: vec![0; 4] }), Ok(()));
    assert_eq!(say(FromCard::Xrun { stream: OUT, epoch }), Ok(()));
    let direction = say(FromCard::Captured { stream: OUT, epoch, samples: vec![0; 4] });
    assert_eq!(direction, Err(Violation::NoSuchStream(0)));
}

#[test]
fn old_generations_are_not_heard() {
    let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    rig.boot();
    let old = FromCard::Position { stream: OUT, epoch: Epoch(2), heard: u64::MAX };
    assert_eq!(rig.with(|s, now, out| s.from_card(generation(1), old, now, out)), Ok(()));
}

#[test]
fn a_dead_card_gives_everything_back_and_refuses() {
    let (mut rig, mut source) = (Rig::new(Policy::Hold), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    rig.crash();
    rig.with(|s, _, out| s.die(out));
    assert!(rig.waiting[&OUT.0].is_empty());
    assert_eq!(rig.command(OUT, Command::Prepare), Err(Refusal::Dead));
    assert!(!rig.play(vec![0; 960]));
    assert_eq!(rig.shadow.deadline(), None);
}

#[test]
fn a_dead_card_that_comes_back_starts_over() {
    let (mut rig, mut source) = (Rig::new(Policy::Hold), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    rig.crash();
    rig.with(|s, _, out| s.die(out));
    rig.boot();
    assert!(matches!(rig.shadow.mode(), Mode::Passive(_)), "nothing is left to be replayed");
    assert_eq!(
        rig.command(OUT, Command::Start),
        Err(Refusal::WrongState(State::Unset)),
        "the guest has to set it up again"
    );
    rig.start_playback(&mut source);
}

#[test]
fn another_card_is_refused_unless_it_does_as_much() {
    let mut shadow = SoundShadow::new(card(), Policy::Skip);
    let mut other = card();
    other.streams[0].channels_max = 1;
    let refused = shadow.replay(generation(1), &other, 0, &mut Out::default());
    assert_eq!(refused, Err(Violation::OtherCard("made up".into())));
    other.streams[0].channels_max = 8;
    shadow.replay(generation(1), &other, 0, &mut Out::default()).unwrap();
    assert_eq!(shadow.card(), &card());
}

/// What can happen.
#[derive(Clone, Debug)]
enum Event {
    Command(bool, u8),
    Message(bool),
    Oversized,
    Pass(u64),
    Boot,
    Crash,
    Die,
    Reset,
    /// From now on the card reports every so many milliseconds.
    Reports(u16),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        4 => (any::<bool>(), 0u8..6).prop_map(|(stream, step)| Event::Command(stream, step)),
        8 => any::<bool>().prop_map(Event::Message),
        1 => Just(Event::Oversized),
        5 => (1u64..60).prop_map(Event::Pass),
        1 => Just(Event::Boot),
        1 => Just(Event::Crash),
        1 => prop_oneof![
            Just(Event::Die),
            Just(Event::Reset),
            (1u16..40).prop_map(Event::Reports),
        ],
    ];
    // Most begin as players do, so that the interesting states are reached.
    let opening = prop_oneof![
        Just(vec![]),
        any::<bool>().prop_map(|stream| vec![
            Event::Boot,
            Event::Command(stream, 0),
            Event::Command(stream, 1),
            Event::Message(stream),
            Event::Command(stream, 2),
        ]),
    ];
    (opening, prop::collection::vec(event, 1..120)).prop_map(|(mut first, rest)| {
        first.extend(rest);
        first
    })
}

fn id(capture: bool) -> StreamId {
    if capture { IN } else { OUT }
}

proptest! {
    /// Every command in every state and mode, at any time: the answer is the life cycle's, messages come back once
    /// and in order, the position never goes back, what is kept is bounded, and no card is told what cards are not
    /// told (the rig and the model assert all but the answers).
    #[test]
    fn every_transition_in_every_mode(events in events(), hold in any::<bool>()) {
        let mut rig = Rig::new(if hold { Policy::Hold } else { Policy::Skip });
        for event in events {
            match event {
                Event::Command(stream, step) => {
                    let id = id(stream);
                    let command = [
                        Command::SetParams(params()), Command::Prepare, Command::Start, Command::Stop, Command::Release,
                        Command::SetParams(stereo()),
                    ][usize::from(step)];
                    let before = rig.shadow.state(id).unwrap();
                    let after = before.after(command.step()).filter(|_| rig.shadow.mode() != Mode::Dead);
                    let answer = rig.command(id, command);
                    prop_assert_eq!(answer.is_ok(), after.is_some());
                    prop_assert_eq!(rig.shadow.state(id).unwrap(), after.unwrap_or(before));
                }
                Event::Message(false) => {
                    let room = rig.waiting.get(&OUT.0).map_or(0, VecDeque::len) < 4;
                    let takes = rig.shadow.state(OUT).unwrap().takes_messages() && rig.shadow.mode() != Mode::Dead;
                    prop_assert_eq!(rig.play(vec![7; 960]), room && takes);
                }
                Event::Message(true) => rig.record(960),
                Event::Oversized => prop_assert!(!rig.play(vec![7; 3842])),
                Event::Pass(ms) => rig.pass(ms),
                Event::Boot => rig.boot(),
                Event::Crash => rig.crash(),
                Event::Die => rig.die(),
                Event::Reset => rig.reset(),
                Event::Reports(every) => rig.every = every,
            }
            let waits = rig.shadow.streams.iter().any(Stream::waits_for_card);
            prop_assert!(waits || !matches!(rig.shadow.mode(), Mode::Replaying(_)), "a replay without end");
            prop_assert!(rig.shadow.pending_bytes() <= 2 * params().buffer_bytes as usize);
        }
    }

    /// With `hold`, crashes at any times leave no gap and no doubled sample while the card reports exactly.
    #[test]
    fn hold_is_exact(lives in prop::collection::vec((1u64..400, 1u64..1500), 1..6)) {
        let (mut rig, mut source) = (Rig::new(Policy::Hold), Source::default());
        rig.boot();
        rig.start_playback(&mut source);
        for (alive, dead) in lives {
            play_for(&mut rig, &mut source, alive);
            rig.crash();
            play_for(&mut rig, &mut source, dead);
            rig.boot();
        }
        play_for(&mut rig, &mut source, 200);
        rig.crash();
        prop_assert!(rig.played[..] == source.all[..rig.played.len()]);
    }

    /// A card that says anything: violations or nothing, never a panic, never a position past what was handed over.
    #[test]
    fn any_message_of_a_card_is_survived(
        said in prop::collection::vec((0u16..3, 0u32..4, prop_oneof![0u64..4000, any::<u64>()], 0usize..9, 0u8..3), 0..60),
    ) {
        let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
        rig.boot();
        rig.start_playback(&mut source);
        for (stream, epoch, heard, len, kind) in said {
            let (stream, epoch) = (StreamId(stream), Epoch(epoch));
            let message = match kind {
                0 => FromCard::Position { stream, epoch, heard },
                1 => FromCard::Captured { stream, epoch, samples: vec![0; len] },
                _ => FromCard::Xrun { stream, epoch },
            };
            rig.now += MS;
            let _ = rig.with(|s, now, out| s.from_card(generation(1), message, now, out));
            prop_assert!(rig.shadow.heard(OUT).unwrap() <= source.all.len() as u64 / 2);
        }
    }

    /// Waking exactly at each deadline gives the guest its periods at the true rate, whatever the parameters.
    #[test]
    fn the_clock_keeps_the_rate(rate in 0u8..14, periods in 2u32..9, period in 1u32..4000, channels in 1u8..3) {
        let rate = Rate::from_number(rate).unwrap();
        let mut card = card();
        card.streams[0].rates = rate.bit();
        let period_bytes = period * 2 * u32::from(channels);
        let buffer_bytes = period_bytes * periods;
        let params = Params { format: Format::S16, rate, channels, period_bytes, buffer_bytes };
        let mut shadow = SoundShadow::new(card, Policy::Skip);
        let (mut now, mut out) = (5 * MS, Out::default());
        for command in [Command::SetParams(params), Command::Prepare] {
            shadow.command(OUT, command, now, &mut out).unwrap();
        }
        for token in 0..periods {
            shadow.play(OUT, Token(token), vec![0; period_bytes as usize], now, &mut out);
        }
        shadow.command(OUT, Command::Start, now, &mut out).unwrap();
        let start = now;
        for n in 1..200u32 {
            now = shadow.deadline().unwrap();
            out.done.clear();
            shadow.tick(now, &mut out).unwrap();
            prop_assert_eq!(out.done.len(), 1);
            shadow.play(OUT, Token(n), vec![0; period_bytes as usize], now, &mut out);
            let ideal = u128::from(n) * u128::from(period) * 1_000_000_000 / u128::from(rate.hz());
            prop_assert!(u128::from(now - start).abs_diff(ideal) <= 2, "{} against {}", now - start, ideal);
        }
    }
}
