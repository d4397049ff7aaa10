//! The shadow between a guest and cards that are made up: every transition, in any order, at any time.

use std::collections::{BTreeMap, VecDeque};

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
            self.shadow.taken(true, self.now);
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

mod outages;
mod properties;
mod refusals;
mod unseen;
