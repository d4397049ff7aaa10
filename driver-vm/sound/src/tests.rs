//! Sessions that come and go at two guests' ports, against alsa-lib with a card that is a file for each sample rate:
//! its plug-in `file` writes what is played, in place of `dmix`, which needs a kernel's card.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::{Duration, Instant};

use umbra_driver_vm::sound_protocol::{FromHost, FromService, HEADER_BYTES, Taken, decode_service, encode};
use umbra_shadow::sound::{Card, Direction, Epoch, Format, FromCard, Params, Rate, StreamId, StreamInfo, ToCard};
use umbra_shadow::{Generation, LinkId};

use crate::config::PLAYBACK;
use crate::port::{Came, Heard, MESSAGES_PER_SECOND, Port};
use crate::session::{Session, allow_sound};

const OUT: StreamId = StreamId(0);
/// A stream whose device the configuration does not have: opening it is a failure of the card.
const BROKEN: StreamId = StreamId(1);
/// Longest wait for something that comes in milliseconds on a machine that does nothing else.
const PATIENCE: Duration = Duration::from_secs(60);

/// The folder of this test program's cards, beside it.
fn folder() -> &'static PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::current_exe().unwrap().with_file_name("sessions");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let (file, configuration) = (folder.join("%r"), folder.join("asound.conf"));
        let text = format!(
            "pcm.nothing {{ type null }}\n\
             pcm.{PLAYBACK} {{ type file slave.pcm nothing format raw file \"{}\" }}\n",
            file.display()
        );
        fs::write(&configuration, text).unwrap();
        // SAFETY: only this call writes the environment, and only Rust's library and alsa-lib read it, the latter once
        // this is done.
        unsafe { std::env::set_var("ALSA_CONFIG_PATH", &configuration) };
        allow_sound();
        folder
    })
}

/// What was played at a rate.
fn played(hz: u32) -> Vec<u8> {
    fs::read(folder().join(hz.to_string())).unwrap_or_default()
}

fn rate(hz: u32) -> Rate {
    Rate::from_hz(hz).unwrap()
}

fn params(hz: u32) -> Params {
    Params { format: Format::S16, rate: rate(hz), channels: 2, period_bytes: 1920, buffer_bytes: 7680 }
}

fn card() -> Card {
    let stream = StreamInfo {
        direction: Direction::Playback,
        formats: Format::S16.bit(),
        rates: Rate::all().map(Rate::bit).sum(),
        channels_min: 2,
        channels_max: 2,
    };
    Card { name: "made up".into(), streams: vec![stream, StreamInfo { direction: Direction::Capture, ..stream }] }
}

/// A guest's end of the service, in a thread of its own. Each time that the port is opened it is joined to the next of
/// the sockets that were made, or else has no host.
struct End {
    ended: mpsc::Receiver<anyhow::Error>,
}

impl End {
    /// Joined to as many hosts as there are attempts.
    fn start<const N: usize>(attempts: [u32; N]) -> (Self, [Host; N]) {
        Self::start_as(false, attempts)
    }

    /// The same; its streams are `mixed` with those of others, or not.
    fn start_as<const N: usize>(mixed: bool, attempts: [u32; N]) -> (Self, [Host; N]) {
        folder();
        let opened = Arc::<Mutex<Vec<UnixStream>>>::default();
        let hosts = attempts.map(|attempt| {
            let (host, end) = UnixStream::pair().unwrap();
            end.set_nonblocking(true).unwrap();
            opened.lock().unwrap().push(end);
            let link = LinkId { generation: Generation::FIRST, attempt };
            Host { socket: host, link, read: Vec::new() }
        });
        let (sender, ended) = mpsc::channel();
        let port = Port::new(opener(&opened), Generation::FIRST).unwrap();
        let session = Session::new(port, &card(), Vec::new(), mixed, &Arc::default());
        std::thread::spawn(move || sender.send(session.run()));
        (Self { ended }, hosts)
    }

    fn runs(&self) -> bool {
        self.ended.try_recv().is_err()
    }
}

fn opener(sockets: &Arc<Mutex<Vec<UnixStream>>>) -> Box<dyn FnMut() -> std::io::Result<File> + Send> {
    let sockets = Arc::clone(sockets);
    Box::new(move || {
        let mut sockets = sockets.lock().unwrap();
        let next = if sockets.is_empty() { UnixStream::pair()?.1 } else { sockets.remove(0) };
        Ok(File::from(OwnedFd::from(next)))
    })
}

/// A host's session.
struct Host {
    socket: UnixStream,
    link: LinkId,
    read: Vec<u8>,
}

impl Host {
    fn bytes(&self, message: impl Into<FromHost>) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(&message.into(), self.link, &mut bytes);
        bytes
    }

    fn say(&mut self, message: impl Into<FromHost>) {
        let bytes = self.bytes(message);
        self.socket.write_all(&bytes).unwrap();
    }

    /// The next message of the service; `None` when it has hung up.
    fn hear(&mut self) -> Option<FromService> {
        self.socket.set_read_timeout(Some(PATIENCE)).unwrap();
        loop {
            if let Some((taken, length)) = decode_service(&self.read, self.link).unwrap() {
                self.read.drain(..length);
                let Taken::Message(message) = taken else { panic!("of an earlier session") };
                return Some(message);
            }
            let mut chunk = [0; 4096];
            match self.socket.read(&mut chunk) {
                Ok(0) => return None,
                Ok(length) => self.read.extend_from_slice(&chunk[..length]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("the service says nothing: {error}"),
            }
        }
    }

    fn begin(&mut self) {
        self.say(FromHost::Begin);
        assert_eq!(self.hear(), Some(FromService::Card(card())));
    }

    fn set_up(&mut self, hz: u32) {
        self.say(ToCard::SetParams { stream: OUT, params: params(hz) });
        self.say(ToCard::Prepare { stream: OUT, epoch: Epoch(1) });
    }

    fn play(&mut self, samples: &[u8]) {
        self.say(ToCard::Play { stream: OUT, epoch: Epoch(1), samples: samples.into() });
    }

    /// Waits until so many frames have been heard.
    fn await_heard(&mut self, frames: u64) {
        loop {
            match self.hear() {
                Some(FromService::Stream(FromCard::Position { heard, .. })) if heard >= frames => return,
                Some(FromService::Stream(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits until this, all of it and nothing else, was played at a rate.
fn await_played(hz: u32, samples: &[u8]) {
    wait_for(&format!("what was played at {hz} Hz is something else"), || played(hz) == samples);
}

/// Frames of a sample pattern, four bytes each.
fn samples(seed: u8, frames: usize) -> Vec<u8> {
    (0..4 * frames).map(|n| seed.wrapping_add(u8::try_from(n % 251).unwrap())).collect()
}

#[test]
fn the_next_session_at_a_port_plays_and_the_other_guest_hears_nothing_of_it() {
    let (end, [mut first, mut second]) = End::start([1, 2]);
    let (other_end, [mut other]) = End::start([1]);
    other.begin();
    other.set_up(96_000);
    other.say(ToCard::Start { stream: OUT });
    other.play(&samples(9, 480));
    other.await_heard(480);

    first.begin();
    first.set_up(44_100);
    first.play(&samples(1, 480));
    first.say(ToCard::Start { stream: OUT });
    first.await_heard(480);
    // The socket closes in mid-stream, and in the middle of a message.
    let cut = first.bytes(ToCard::Play { stream: OUT, epoch: Epoch(1), samples: samples(2, 480) });
    first.socket.write_all(&cut[..HEADER_BYTES + 700]).unwrap();
    second.say(FromHost::Begin);
    drop(first);
    assert_eq!(second.hear(), Some(FromService::Card(card())), "a greeting, and nothing of the first before it");
    second.set_up(48_000);
    second.play(&samples(3, 960));
    second.say(ToCard::Start { stream: OUT });
    second.await_heard(960);

    other.play(&samples(8, 480));
    other.await_heard(960);
    // The plug-in writes the file to its end when it is closed.
    other.say(ToCard::Release { stream: OUT });
    drop(second);
    await_played(44_100, &samples(1, 480));
    await_played(48_000, &samples(3, 960));
    await_played(96_000, &[samples(9, 480), samples(8, 480)].concat());
    assert!(end.runs() && other_end.runs());
}

#[test]
fn samples_that_are_mixed_come_behind_silence_that_nobody_counts() {
    let (end, [mut host]) = End::start_as(true, [1]);
    host.begin();
    host.set_up(32_000);
    host.play(&samples(5, 480));
    host.say(ToCard::Start { stream: OUT });
    host.await_heard(480);
    host.play(&samples(6, 480));
    host.await_heard(960);
    host.say(ToCard::Release { stream: OUT });
    // Two periods of 10 ms, once.
    await_played(32_000, &[vec![0; 2 * 320 * 4], samples(5, 480), samples(6, 480)].concat());
    assert!(end.runs());
}

#[test]
fn a_session_that_begins_in_the_middle_of_another_takes_its_place() {
    let (end, [mut first]) = End::start([1]);
    first.begin();
    first.set_up(8_000);
    first.play(&samples(1, 480));
    let mut left_over = first.bytes(ToCard::Start { stream: OUT });
    left_over.extend(first.bytes(FromHost::Begin));
    first.link.attempt = 4;
    first.begin();
    first.socket.write_all(&left_over).unwrap();
    first.set_up(11_025);
    first.play(&samples(2, 480));
    first.say(ToCard::Start { stream: OUT });
    first.await_heard(480);
    first.say(ToCard::Release { stream: OUT });
    await_played(11_025, &samples(2, 480));
    assert!(played(8_000).is_empty(), "what waited is dropped, and an old start starts nothing");
    assert!(end.runs());
}

#[test]
fn a_host_at_fault_loses_its_own_session_and_the_next_one_plays() {
    let stream = StreamId(7);
    let unfit = Params { channels: 1, period_bytes: 960, buffer_bytes: 3840, ..params(16_000) };
    let twice = LinkId::first(Generation::FIRST);
    let message = |message: ToCard| {
        let mut bytes = Vec::new();
        encode(&message.into(), twice, &mut bytes);
        bytes
    };
    let mut again = Vec::new();
    encode(&FromHost::Begin, twice, &mut again);
    let faults: [(&str, Vec<u8>); 6] = [
        ("nonsense", vec![0x55; 64]),
        ("session 1.1", again),
        ("no stream 7", message(ToCard::Start { stream })),
        ("not offered", message(ToCard::SetParams { stream: OUT, params: unfit })),
        ("before parameters", message(ToCard::Prepare { stream: OUT, epoch: Epoch(1) })),
        ("more than it may", too_much(message)),
    ];
    for (why, fault) in faults {
        let (end, [mut first, mut second]) = End::start([1, 2]);
        first.begin();
        // It hangs up in the middle of a flood.
        let _ = first.socket.write_all(&fault);
        let said = first.hear();
        assert!(matches!(&said, Some(FromService::Failed(text)) if text.contains(why)), "{why}: {said:?}");
        assert_eq!(first.hear(), None);
        second.begin();
        assert!(end.runs(), "{why}");
    }
}

#[test]
fn messages_are_too_many_within_a_second_alone() {
    let start = Instant::now();
    let mut heard = Heard::new(start);
    let mut count = |at: Duration, messages: u32| (0..messages).filter(|_| heard.count(start + at)).count();
    assert_eq!(count(Duration::ZERO, MESSAGES_PER_SECOND), MESSAGES_PER_SECOND as usize);
    assert_eq!(count(Duration::from_millis(999), 1), 0);
    assert_eq!(count(Duration::from_secs(1), 1), 1);
}

/// Parameters, and more samples than a host may have under way.
fn too_much(message: impl Fn(ToCard) -> Vec<u8>) -> Vec<u8> {
    let mut bytes = message(ToCard::SetParams { stream: OUT, params: params(22_050) });
    bytes.extend(message(ToCard::Prepare { stream: OUT, epoch: Epoch(1) }));
    bytes.extend(message(ToCard::Play { stream: OUT, epoch: Epoch(1), samples: vec![0; 13 << 20] }));
    bytes
}

#[test]
fn a_host_that_does_not_read_loses_its_own_session() {
    let (end, [mut first, mut second]) = End::start([1, u32::MAX]);
    first.begin();
    // Each time that it begins anew is answered with the card.
    let started = Instant::now();
    loop {
        first.link.attempt += 1;
        let begin = first.bytes(FromHost::Begin);
        if first.socket.write_all(&begin).is_err() {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "the service keeps everything");
    }
    second.begin();
    assert!(end.runs());
}

/// A session that the test turns itself, with devices that play and give at once what they are asked for, and its host.
fn turned() -> (Session, Host) {
    folder();
    let devices = [alsa::Direction::Playback, alsa::Direction::Capture];
    let open = devices.map(|direction| alsa::pcm::PCM::new("nothing", direction, true).unwrap());
    let (host, end) = UnixStream::pair().unwrap();
    end.set_nonblocking(true).unwrap();
    let opened = Arc::new(Mutex::new(vec![end]));
    let port = Port::new(opener(&opened), Generation::FIRST).unwrap();
    let session = Session::new(port, &card(), open.into(), false, &Arc::default());
    (session, Host { socket: host, link: LinkId::first(Generation::FIRST), read: Vec::new() })
}

/// What is recorded in the meantime stays with the card, and is lost there if that lasts.
#[test]
fn a_host_that_stands_still_for_a_while_keeps_its_session_though_it_records() {
    let (mut session, mut host) = turned();
    // Its device is open already.
    let stream = BROKEN;
    host.say(FromHost::Begin);
    host.say(ToCard::SetParams { stream, params: params(48_000) });
    host.say(ToCard::Prepare { stream, epoch: Epoch(1) });
    host.say(ToCard::Start { stream });
    let mut next = Instant::now();
    for turn in 0..200 {
        assert!(session.turn(&mut next).is_ok(), "its session is ended at turn {turn}");
    }
    let heard = Arc::<AtomicBool>::default();
    let until = Arc::clone(&heard);
    let still_there = std::thread::spawn(move || {
        while !until.load(Ordering::Relaxed) {
            assert!(session.turn(&mut next).is_ok());
        }
    });
    assert_eq!(host.hear(), Some(FromService::Card(card())));
    for _ in 0..100 {
        let said = host.hear();
        assert!(matches!(said, Some(FromService::Stream(FromCard::Captured { .. }))), "{said:?}");
    }
    heard.store(true, Ordering::Relaxed);
    still_there.join().unwrap();
}

#[test]
fn a_host_of_small_messages_is_not_flooded_with_positions() {
    let (mut session, mut host) = turned();
    host.say(FromHost::Begin);
    host.set_up(48_000);
    host.say(ToCard::Start { stream: OUT });
    let (begin, mut next) = (Instant::now(), Instant::now());
    let mut heard = 0;
    for _ in 0..1000 {
        host.play(&samples(1, 1));
        assert!(session.turn(&mut next).is_ok());
    }
    let most = begin.elapsed().as_millis() + 1;
    drop(session);
    assert_eq!(host.hear(), Some(FromService::Card(card())));
    while let Some(message) = host.hear() {
        assert!(matches!(message, FromService::Stream(FromCard::Position { .. })), "{message:?}");
        heard += 1;
    }
    assert!((1..=most).contains(&heard), "{heard} positions in {most} ms");
}

#[test]
fn a_port_without_a_host_is_waited_for_without_running() {
    let opened = Arc::<Mutex<Vec<UnixStream>>>::default();
    let mut port = Port::new(opener(&opened), Generation::FIRST).unwrap();
    for _ in 0..3 {
        // That it is open is a change; the end of the stream, which is there all the time, is none.
        let turns = (0..100).take_while(|_| {
            assert_eq!(port.receive().ok(), Some(Came::End));
            port.wait(Duration::from_millis(20)).unwrap()
        });
        assert!(turns.count() <= 1, "poll(2) would not wait");
        assert!(!port.is_touched());
        port.reopen().unwrap();
    }
}

#[test]
fn a_card_that_fails_ends_the_service_and_the_host_is_told() {
    let (end, [mut first]) = End::start([1]);
    first.begin();
    first.say(ToCard::SetParams { stream: BROKEN, params: params(64_000) });
    first.say(ToCard::Prepare { stream: BROKEN, epoch: Epoch(1) });
    let said = first.hear();
    assert!(matches!(&said, Some(FromService::Failed(text)) if text.contains("cannot open")), "{said:?}");
    let error = end.ended.recv_timeout(PATIENCE).unwrap();
    assert!(format!("{error:#}").contains("cannot open"), "{error:#}");
}
