//! The sound splitter against a service that the test plays itself.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

use umbra_driver_vm::sound_protocol::{decode, encode_service};
use umbra_shadow::sound::{Direction, Epoch, Format, FromCard, Outcome, Params, Rate, State, StreamInfo, ToCard};

use super::*;

const MS: u64 = 1_000_000;
const OUT: StreamId = StreamId(0);

fn card() -> Card {
    let info = StreamInfo {
        direction: Direction::Playback,
        formats: Format::S16.bit(),
        rates: Rate::from_hz(48_000).unwrap().bit(),
        channels_min: 2,
        channels_max: 2,
    };
    Card { name: "made up".into(), streams: vec![info] }
}

fn params() -> Params {
    let rate = Rate::from_hz(48_000).unwrap();
    Params { format: Format::S16, rate, channels: 2, period_bytes: 1920, buffer_bytes: 7680 }
}

/// The other end of a link: a service that says what the test wants.
struct Service {
    socket: UnixStream,
    generation: Generation,
    read: Vec<u8>,
}

impl Service {
    fn say(&mut self, message: &FromService) {
        let mut bytes = Vec::new();
        encode_service(message, self.generation, &mut bytes);
        self.socket.write_all(&bytes).unwrap();
    }

    fn heard(&mut self) -> Vec<ToCard> {
        let mut chunk = [0; 65536];
        while let Ok(length @ 1..) = self.socket.read(&mut chunk) {
            self.read.extend_from_slice(&chunk[..length]);
        }
        let mut messages = Vec::new();
        while let Some((message, length)) = decode(&self.read, self.generation).unwrap() {
            messages.push(message);
            self.read.drain(..length);
        }
        messages
    }
}

type Notices = Arc<Mutex<Vec<String>>>;

fn splitter(policy: Policy) -> (SoundSplitter, Notices) {
    let notices = Notices::default();
    let into = Arc::clone(&notices);
    let listener = move |notice| {
        into.lock().unwrap().push(match notice {
            Notice::Live(generation, _) => format!("live {generation}"),
            Notice::Lost(generation, error) => format!("lost {generation}: {error}"),
        });
    };
    (SoundSplitter::new(card(), policy, Box::new(listener)), notices)
}

fn attach(splitter: &mut SoundSplitter, generation: u32, now: u64) -> Service {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let generation = Generation::new(generation).unwrap();
    splitter.attach(generation, ours, now);
    let mut service = Service { socket: theirs, generation, read: Vec::new() };
    service.say(&FromService::Card(card()));
    splitter.service(now);
    service
}

fn start(splitter: &mut SoundSplitter, now: u64) {
    splitter.command(OUT, Command::SetParams(params()), now).unwrap();
    splitter.command(OUT, Command::Prepare, now).unwrap();
    for token in 0..4 {
        splitter.play(OUT, Token(token), vec![1; 1920], now);
    }
    splitter.command(OUT, Command::Start, now).unwrap();
}

#[test]
fn a_closed_link_masks_at_once_and_the_next_one_is_brought_up_to_date() {
    let (mut splitter, notices) = splitter(Policy::Skip);
    let mut first = attach(&mut splitter, 1, 0);
    start(&mut splitter, 0);
    assert_eq!(first.heard().len(), 1 + 1 + 4 + 1);
    first.say(&FromService::Stream(FromCard::Position { stream: OUT, epoch: Epoch(1), heard: 480 }));
    splitter.service(10 * MS);
    assert_eq!(splitter.take_done().len(), 1);
    drop(first);
    splitter.service(12 * MS);
    assert_eq!(splitter.shadow().mode(), Mode::Masking);
    assert_eq!(splitter.take_retired().len(), 1);
    assert_eq!(splitter.deadline(), Some(22 * MS), "the next period is due");
    splitter.tick(22 * MS);
    let done = splitter.take_done();
    assert_eq!((done.len(), done[0].token, done[0].outcome), (1, Token(1), Outcome::Ok));

    let mut second = attach(&mut splitter, 2, 24 * MS);
    let heard = second.heard();
    assert!(matches!(heard[..], [ToCard::SetParams { .. }, ToCard::Prepare { .. }, .., ToCard::Start { .. }]));
    let left =
        heard.iter().map(|m| if let ToCard::Play { samples, .. } = m { samples.len() } else { 0 }).sum::<usize>();
    assert_eq!(left, 7680 - 1920 - 12 * 192, "what was due is skipped");
    second.say(&FromService::Stream(FromCard::Position { stream: OUT, epoch: Epoch(2), heard: 1 }));
    splitter.service(30 * MS);
    assert_eq!(*notices.lock().unwrap(), ["live 1", "lost 1: closed", "live 2"]);
}

#[test]
fn lies_end_the_link() {
    let lies = [
        FromService::Card(card()),
        FromService::Failed("the codec is on fire".into()),
        FromService::Stream(FromCard::Position { stream: OUT, epoch: Epoch(1), heard: 1 << 60 }),
        FromService::Stream(FromCard::Captured { stream: OUT, epoch: Epoch(1), samples: vec![0; 4] }),
    ];
    for lie in lies {
        let (mut splitter, notices) = splitter(Policy::Hold);
        let mut service = attach(&mut splitter, 1, 0);
        start(&mut splitter, 0);
        service.say(&lie);
        splitter.service(MS);
        assert_eq!(splitter.shadow().mode(), Mode::Masking, "{lie:?}");
        assert!(splitter.link().is_none());
        assert!(notices.lock().unwrap()[1].starts_with("lost 1"));
        assert_eq!(splitter.shadow().state(OUT), Some(State::Running), "the guest does not notice");
    }
}

#[test]
fn streams_before_the_card_and_garbage_end_the_link() {
    for garbage in [true, false] {
        let (mut splitter, _) = splitter(Policy::Skip);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        splitter.attach(Generation::FIRST, ours, 0);
        if garbage {
            theirs.write_all(&[0x55; 64]).unwrap();
        } else {
            let mut bytes = Vec::new();
            let early = FromService::Stream(FromCard::Xrun { stream: OUT, epoch: Epoch(1) });
            encode_service(&early, Generation::FIRST, &mut bytes);
            theirs.write_all(&bytes).unwrap();
        }
        splitter.service(0);
        assert!(splitter.link().is_none());
    }
}

#[test]
fn a_stuck_card_ends_the_link() {
    let (mut splitter, notices) = splitter(Policy::Skip);
    let _service = attach(&mut splitter, 1, 0);
    start(&mut splitter, 0);
    let mut now = 0;
    while splitter.link().is_some() {
        now = splitter.deadline().unwrap();
        splitter.tick(now);
        assert!(now < 10_000 * MS);
    }
    assert_eq!(now, 3_000 * MS);
    assert!(notices.lock().unwrap()[1].contains("cannot be believed"));
}

#[test]
fn a_guest_that_prepares_without_end_does_not_overflow_a_link_that_is_slow() {
    let (mut splitter, _) = splitter(Policy::Skip);
    let mut service = attach(&mut splitter, 1, 0);
    let big = Params { period_bytes: 1 << 20, buffer_bytes: 4 << 20, ..params() };
    for token in 0..500 {
        splitter.command(OUT, Command::SetParams(big), 0).unwrap();
        splitter.command(OUT, Command::Prepare, 0).unwrap();
        splitter.play(OUT, Token(token), vec![1; 1 << 20], 0);
        splitter.command(OUT, Command::Start, 0).unwrap();
        splitter.command(OUT, Command::Stop, 0).unwrap();
        splitter.command(OUT, Command::Release, 0).unwrap();
    }
    start(&mut splitter, 0);
    assert!(splitter.link().is_some(), "the driver VM has done nothing wrong");
    let mut heard = Vec::new();
    while splitter.link().is_some_and(link::Link::wants_to_write) {
        heard.extend(service.heard());
        splitter.service(0);
    }
    heard.extend(service.heard());
    let set_up = heard.iter().rposition(|m| matches!(m, ToCard::SetParams { .. })).unwrap();
    let played = heard[set_up..].iter().filter(|m| matches!(m, ToCard::Play { samples, .. } if samples.len() == 1920));
    assert_eq!(played.count(), 4, "what counts arrives");
    assert!(matches!(heard[set_up + 1], ToCard::Prepare { .. }));
    assert!(matches!(heard.last(), Some(ToCard::Start { .. })));
    assert!(heard.len() < 200, "what does not count is not sent: {}", heard.len());
}

#[test]
fn a_driver_vm_that_talks_without_end_is_lost() {
    let (mut splitter, notices) = splitter(Policy::Skip);
    let mut service = attach(&mut splitter, 1, 0);
    let xrun = FromService::Stream(FromCard::Xrun { stream: OUT, epoch: Epoch(0) });
    for n in 0u64..40_000 {
        // A minute of a healthy one's reports, then all at once.
        let now = if n < 15_000 { n * 4 * MS } else { 60_000 * MS };
        service.say(&xrun);
        splitter.service(now);
        assert!(n > 30_000 || splitter.link().is_some(), "{n}");
        if splitter.link().is_none() {
            break;
        }
    }
    assert!(notices.lock().unwrap()[1].contains("messages a second"));
}

#[test]
fn quarantine_gives_everything_back_with_an_error() {
    let (mut splitter, _) = splitter(Policy::Skip);
    let _service = attach(&mut splitter, 1, 0);
    start(&mut splitter, 0);
    splitter.quarantine(MS);
    let done = splitter.take_done();
    assert!(done.len() == 4 && done.iter().all(|d| d.outcome == Outcome::IoError));
    assert_eq!(splitter.command(OUT, Command::Prepare, 2 * MS), Err(Refusal::Dead));
}
