//! The sound splitter against a service that the test plays itself.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};

use umbra_driver_vm::sound_protocol::{FromHost, HEADER_BYTES, MAX_EARLIER_BYTES, Taken, decode, encode_service};
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
    link: LinkId,
    /// The link's first word has come.
    begun: bool,
    read: Vec<u8>,
}

impl Service {
    fn say(&mut self, message: &FromService) {
        let mut bytes = Vec::new();
        encode_service(message, self.link, &mut bytes);
        self.socket.write_all(&bytes).unwrap();
    }

    fn heard(&mut self) -> Vec<ToCard> {
        let mut chunk = [0; 65536];
        while let Ok(length @ 1..) = self.socket.read(&mut chunk) {
            self.read.extend_from_slice(&chunk[..length]);
        }
        let mut messages = Vec::new();
        let current = |begun: bool| begun.then_some(self.link.attempt);
        while let Some((taken, of, length)) = decode(&self.read, self.link.generation, current(self.begun)).unwrap() {
            assert_eq!(of, self.link);
            match taken {
                Taken::Message(FromHost::Begin) => self.begun = true,
                Taken::Message(FromHost::Stream(message)) => messages.push(message),
                Taken::Earlier => panic!("a message before the first word"),
            }
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
            Notice::Lost(link, error) => format!("lost {link}: {error}"),
        });
    };
    (SoundSplitter::new(card(), policy, Box::new(listener)), notices)
}

fn link(generation: u32, attempt: u32) -> LinkId {
    LinkId { generation: Generation::new(generation).unwrap(), attempt }
}

/// Connects a service that has not greeted yet.
fn connect(splitter: &mut SoundSplitter, link: LinkId, now: u64) -> Service {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    splitter.attach(link, ours, now);
    Service { socket: theirs, link, begun: false, read: Vec::new() }
}

/// Connects the service of a generation's first link, which greets.
fn attach(splitter: &mut SoundSplitter, generation: u32, now: u64) -> Service {
    attach_again(splitter, link(generation, 1), now)
}

fn attach_again(splitter: &mut SoundSplitter, link: LinkId, now: u64) -> Service {
    let mut service = connect(splitter, link, now);
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
    assert_eq!(*notices.lock().unwrap(), ["live 1", "lost 1.1: closed", "live 2"]);
}

#[test]
fn a_link_lost_and_made_again_in_one_life_is_brought_up_to_date_as_after_a_rebirth() {
    let (mut splitter, notices) = splitter(Policy::Skip);
    let mut first = attach(&mut splitter, 1, 0);
    start(&mut splitter, 0);
    first.say(&FromService::Stream(FromCard::Position { stream: OUT, epoch: Epoch(1), heard: 480 }));
    splitter.service(10 * MS);
    assert_eq!(splitter.take_done().len(), 1);
    drop(first);
    splitter.service(12 * MS);
    assert_eq!(splitter.shadow().mode(), Mode::Masking);
    splitter.tick(22 * MS);
    assert_eq!(splitter.take_done().len(), 1, "the shadow goes on");

    let mut second = attach_again(&mut splitter, link(1, 2), 24 * MS);
    let heard = second.heard();
    assert!(second.begun);
    assert!(matches!(heard[..], [ToCard::SetParams { .. }, ToCard::Prepare { .. }, .., ToCard::Start { .. }]));
    second.say(&FromService::Stream(FromCard::Position { stream: OUT, epoch: Epoch(2), heard: 1 }));
    splitter.service(30 * MS);
    assert_eq!(splitter.shadow().mode(), Mode::Passive(link(1, 1).generation));
    assert_eq!(*notices.lock().unwrap(), ["live 1", "lost 1.1: closed", "live 1"]);
}

#[test]
fn what_was_before_an_outage_is_none_of_its_counts() {
    let told = Arc::<Mutex<Vec<Counts>>>::default();
    let into = Arc::clone(&told);
    let listener = move |notice| {
        if let Notice::Live(_, counts) = notice {
            into.lock().unwrap().push(counts);
        }
    };
    let mut splitter = SoundSplitter::new(card(), Policy::Skip, Box::new(listener));
    let mut first = attach(&mut splitter, 1, 0);
    start(&mut splitter, 0);
    first.say(&FromService::Stream(FromCard::Xrun { stream: OUT, epoch: Epoch(1) }));
    splitter.service(MS);
    drop(first);
    splitter.service(2 * MS);
    splitter.tick(12 * MS);
    // A recovery that fails belongs to the outage.
    drop(attach(&mut splitter, 2, 13 * MS));
    splitter.service(14 * MS);
    splitter.tick(22 * MS);
    let mut third = attach(&mut splitter, 3, 24 * MS);
    third.say(&FromService::Stream(FromCard::Position { stream: OUT, epoch: Epoch(3), heard: 1 }));
    splitter.service(24 * MS);
    let skipped = Counts { frames_skipped: 22 * 48, ..Counts::default() };
    assert_eq!(*told.lock().unwrap(), [Counts::default(), skipped]);
}

#[test]
fn a_later_link_replaces_an_earlier_one_and_never_the_other_way_round() {
    let (mut splitter, _) = splitter(Policy::Skip);
    let mut second = attach_again(&mut splitter, link(1, 2), 0);
    for older in [link(1, 1), link(1, 2)] {
        let mut dropped = connect(&mut splitter, older, MS);
        assert_eq!(dropped.socket.read(&mut [0; 1]).unwrap(), 0, "{older}");
    }
    assert_eq!(splitter.shadow().mode(), Mode::Passive(link(1, 1).generation));
    assert!(second.heard().is_empty() && second.begun);
    let mut third = connect(&mut splitter, link(1, 3), 2 * MS);
    assert_eq!(splitter.shadow().mode(), Mode::Masking);
    assert_eq!(splitter.take_retired().len(), 1);
    assert_eq!(second.socket.read(&mut [0; 1]).unwrap(), 0, "the older one ends");
    assert!(third.heard().is_empty() && third.begun, "told nothing before it has greeted");
    let _next_life = attach(&mut splitter, 2, 3 * MS);
    assert_eq!(splitter.link().map(Link::id), Some(link(2, 1)));
}

#[test]
fn what_an_earlier_link_left_on_the_port_is_skipped_within_a_bound() {
    let (mut splitter, notices) = splitter(Policy::Skip);
    let mut service = connect(&mut splitter, link(1, 5), 0);
    let left = FromService::Stream(FromCard::Captured { stream: OUT, epoch: Epoch(1), samples: vec![9; 32_000] });
    let mut say_as = |service: &mut Service, attempt, message: &FromService| {
        service.link.attempt = attempt;
        service.say(message);
        splitter.service(0);
        splitter.link().is_some()
    };
    assert!(say_as(&mut service, 4, &left));
    assert!(say_as(&mut service, 1, &FromService::Failed("long ago".into())));
    assert!(say_as(&mut service, 5, &FromService::Card(card())));
    assert_eq!(notices.lock().unwrap().concat(), "live 1");
    let fit = MAX_EARLIER_BYTES / (HEADER_BYTES + 32_000);
    let survived = (0..=fit).take_while(|_| say_as(&mut service, 4, &left)).count();
    assert_eq!(survived, fit - 1, "one of them had come before");
    assert!(notices.lock().unwrap()[1].contains("an earlier session"));
}

#[test]
fn a_message_of_a_link_to_come_ends_the_link() {
    let (mut splitter, notices) = splitter(Policy::Skip);
    let mut service = attach(&mut splitter, 1, 0);
    service.link.attempt = 2;
    service.say(&FromService::Card(card()));
    splitter.service(0);
    assert_eq!(notices.lock().unwrap()[1], "lost 1.1: the driver VM broke the sound protocol");
}

#[test]
fn a_guest_that_sets_up_at_once_does_not_make_the_first_word_moot() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let mut link = Link::new(crate::untrusted::Stream::new(ours).unwrap(), link(1, 1));
    link.send(ToCard::SetParams { stream: OUT, params: params() }).unwrap();
    link.send(ToCard::Release { stream: OUT }).unwrap();
    link.flush().unwrap();
    let mut service = Service { socket: theirs, link: link.id(), begun: false, read: Vec::new() };
    assert_eq!(service.heard().len(), 2);
    assert!(service.begun);
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
        splitter.attach(link(1, 1), ours, 0);
        if garbage {
            theirs.write_all(&[0x55; 64]).unwrap();
        } else {
            let mut bytes = Vec::new();
            let early = FromService::Stream(FromCard::Xrun { stream: OUT, epoch: Epoch(1) });
            encode_service(&early, link(1, 1), &mut bytes);
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
