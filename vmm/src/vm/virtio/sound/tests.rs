//! The device from its driver's side: messages as Linux sends them, and messages as nobody should.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use umbra_driver_vm::sound_protocol::{FromHost, FromService, Taken, decode, encode_service};
use umbra_shadow::sound::{Direction, Format, FromCard, Rate, StreamId, StreamInfo, ToCard};

use super::*;
use crate::vm::virtio::testing::{DriverQueue, Loop, memory};

const OK: u32 = 0x8000;
const BAD_MESSAGE: u32 = 0x8001;
const IO_ERROR: u32 = 0x8003;
const PERIOD: usize = 1920;

fn card() -> Card {
    let info = StreamInfo {
        direction: Direction::Playback,
        formats: Format::S16.bit(),
        rates: Rate::from_hz(48_000).unwrap().bit(),
        channels_min: 2,
        channels_max: 2,
    };
    Card { name: "made up".into(), streams: vec![info, StreamInfo { direction: Direction::Capture, ..info }] }
}

/// Readable parts, sizes of writable ones, and which descriptor holds the status.
type Case<'a> = (&'a [&'a [u8]], &'a [u32], u16);

struct Rig {
    device: Arc<Mutex<Sound>>,
    events: Loop,
    queues: Vec<DriverQueue>,
    told: Arc<Mutex<Vec<FromVm>>>,
}

impl Rig {
    fn new() -> Self {
        let told = Arc::<Mutex<Vec<FromVm>>>::default();
        let into = Arc::clone(&told);
        let outbox = Arc::new(move |message| into.lock().unwrap().push(message));
        let device = Arc::new(Mutex::new(Sound::new(0, card(), Policy::Skip, outbox).unwrap()));
        let events = Loop::new(&device);
        let memory = memory(4);
        let queues: Vec<_> = (0u64..4).zip(QUEUE_SIZES).map(|(n, size)| DriverQueue::new(&memory, n, size)).collect();
        for (n, queue) in (0u16..).zip(&queues) {
            device.lock().unwrap().start_queue(n, queue.resources(), None).unwrap();
        }
        let mut rig = Self { device, events, queues, told };
        rig.events.run();
        rig
    }

    /// Sends a control request; its status.
    fn control(&mut self, words: &[u32], tail: &[u8]) -> u32 {
        let mut request: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        request.extend_from_slice(tail);
        let head = self.queues[0].add(&[&request], &[4]);
        self.queues[0].kick();
        self.events.run();
        assert_eq!(self.queues[0].used(), [(head, 4)]);
        u32::from_le_bytes(self.queues[0].buffer(head + 1, 4).try_into().unwrap())
    }

    fn set_up(&mut self, stream: u32) {
        assert_eq!(self.control(&[0x101, stream, 4 * 1920, 1920, 0], &[2, 5, 7, 0]), OK);
        assert_eq!(self.control(&[0x102, stream], &[]), OK);
    }

    /// Queues a period to play.
    fn play(&mut self, stream: u32) -> u16 {
        let head = self.queues[2].add(&[&stream.to_le_bytes(), &[7; PERIOD]], &[8]);
        self.queues[2].kick();
        self.events.run();
        head
    }

    fn status(&self, queue: usize, descriptor: u16) -> u32 {
        u32::from_le_bytes(self.queues[queue].buffer(descriptor, 4).try_into().unwrap())
    }

    /// Runs the loop until `done` messages of a queue are back.
    fn wait_for(&mut self, queue: usize, done: usize) -> Vec<(u16, u32)> {
        let started = Instant::now();
        let mut all = Vec::new();
        while all.len() < done {
            assert!(started.elapsed() < Duration::from_secs(60), "{} of {done} are back", all.len());
            self.events.run();
            all.extend(self.queues[queue].used());
        }
        all
    }
}

/// What an attempt found that took less than `limit`; it gives its time and that. One that the machine has held up says nothing.
fn undisturbed<T>(limit: Duration, attempt: impl Fn() -> (Duration, T)) -> T {
    let mut attempts = std::iter::repeat_with(attempt).take(1000);
    attempts.find(|(took, _)| *took < limit).expect("this machine stands still all the time").1
}

#[test]
fn it_shows_the_card() {
    let mut rig = Rig::new();
    let mut config = [0; 16];
    rig.device.lock().unwrap().config_read(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let request: Vec<u8> = [0x100u32, 0, 2, 32].iter().flat_map(|w| w.to_le_bytes()).collect();
    let head = rig.queues[0].add(&[&request], &[4, 64]);
    rig.queues[0].kick();
    rig.events.run();
    assert_eq!(rig.queues[0].used(), [(head, 68)]);
    assert_eq!(rig.queues[0].buffer(head + 2, 64)[8..16], Format::S16.bit().to_le_bytes());
}

#[test]
fn it_plays_in_real_time_without_a_driver_vm() {
    let mut rig = Rig::new();
    rig.set_up(0);
    let heads: Vec<u16> = (0..4).map(|_| rig.play(0)).collect();
    assert!(rig.queues[2].used().is_empty(), "not started");
    let started = Instant::now();
    assert_eq!(rig.control(&[0x104, 0], &[]), OK);
    let done = rig.wait_for(2, 4);
    assert!(started.elapsed() >= Duration::from_millis(40), "four periods of 10 ms took {:?}", started.elapsed());
    assert_eq!(done, heads.iter().map(|head| (*head, 8)).collect::<Vec<_>>());
    assert_eq!(rig.status(2, heads[0] + 2), OK);
}

/// Without event index nothing shows what the guest takes: it is taken to have looked a moment later.
#[test]
fn a_burst_of_a_whole_buffer_comes_back_in_two_parts() {
    const LATE: Duration = Duration::from_millis(60);
    let period = Duration::from_millis(10);
    let back = |done: Vec<(u16, u32)>| done.into_iter().map(|(head, _)| head).collect::<Vec<_>>();
    let (mut rig, heads, burst) = undisturbed(LATE + period, || {
        let mut rig = Rig::new();
        rig.set_up(0);
        let heads: Vec<u16> = (0..4).map(|_| rig.play(0)).collect();
        let started = Instant::now();
        assert_eq!(rig.control(&[0x104, 0], &[]), OK);
        // The loop was late: all four are over.
        std::thread::sleep(LATE);
        rig.events.turn();
        let burst = back(rig.queues[2].used());
        (started.elapsed(), (rig, heads, burst))
    });
    assert_eq!(burst, heads[..3]);
    assert_eq!(back(rig.wait_for(2, 1)), heads[3..]);
}

#[test]
fn it_records_silence_without_a_driver_vm() {
    let mut rig = Rig::new();
    rig.set_up(1);
    let head = rig.queues[3].add(&[&1u32.to_le_bytes()], &[1920, 8]);
    rig.queues[3].kick();
    assert_eq!(rig.control(&[0x104, 1], &[]), OK);
    assert_eq!(rig.wait_for(3, 1), [(head, 1928)]);
    assert_eq!(rig.status(3, head + 2), OK);
}

#[test]
fn a_release_gives_everything_back_before_it_is_answered() {
    let mut rig = Rig::new();
    rig.set_up(0);
    let head = rig.play(0);
    assert_eq!(rig.control(&[0x103, 0], &[]), OK);
    assert_eq!(rig.queues[2].used(), [(head, 8)]);
    let late = rig.play(0);
    assert_eq!(rig.queues[2].used(), [(late, 8)]);
    assert_eq!(rig.status(2, late + 2), BAD_MESSAGE);
}

#[test]
fn malformed_messages_are_answered_and_harm_nothing() {
    let mut rig = Rig::new();
    rig.set_up(0);
    for (words, tail) in [(&[0x999u32, 0][..], &[][..]), (&[0x102], &[]), (&[0x102, 0, 0], &[]), (&[0x102, 77], &[])] {
        assert_eq!(rig.control(words, tail), BAD_MESSAGE, "{words:x?}");
    }
    let stream = 0u32.to_le_bytes();
    let cases: [Case<'_>; 4] = [
        (&[&stream, &[7; 3]], &[8], 2),
        (&[&stream], &[8], 1),
        (&[&[9, 0, 0, 0], &[7; PERIOD]], &[8], 2),
        (&[&[1, 0]], &[8], 1),
    ];
    for (readable, writable, status) in cases {
        let head = rig.queues[2].add(readable, writable);
        rig.queues[2].kick();
        rig.events.run();
        assert_eq!(rig.queues[2].used(), [(head, 8)]);
        assert_eq!(rig.status(2, head + status), BAD_MESSAGE);
    }
    let head = rig.queues[2].add(&[&stream, &[7; PERIOD]], &[3]);
    rig.queues[2].kick();
    rig.events.run();
    assert_eq!(rig.queues[2].used(), [(head, 0)], "no room for a status");
    rig.play(0);
    assert!(rig.queues[2].used().is_empty(), "a good one is taken");
    assert!(!rig.device.lock().unwrap().needs_reset());
}

#[test]
fn a_broken_ring_asks_for_a_reset() {
    let mut rig = Rig::new();
    rig.queues[2].break_ring();
    rig.queues[2].kick();
    rig.events.run();
    assert!(rig.device.lock().unwrap().needs_reset());
}

#[test]
fn a_broken_ring_leaves_the_loop_idle_and_the_driver_vm_alive() {
    let mut rig = Rig::new();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut say = |message: &FromService| {
        let mut bytes = Vec::new();
        encode_service(message, LinkId::first(Generation::FIRST), &mut bytes);
        theirs.write_all(&bytes).unwrap();
    };
    rig.device.lock().unwrap().attach(LinkId::first(Generation::FIRST), ours);
    say(&FromService::Card(card()));
    rig.events.run();
    rig.set_up(1);
    rig.control(&[0x104, 1], &[]);
    rig.queues[2].break_ring();
    rig.queues[2].kick();
    rig.events.run();
    assert!(rig.device.lock().unwrap().needs_reset());
    // A message of the service, a call of the loop, a timer: each is heard once, and then the loop
    // rests (`run` fails if it does not).
    say(&FromService::Stream(FromCard::Xrun { stream: StreamId(1), epoch: umbra_shadow::sound::Epoch(1) }));
    rig.device.lock().unwrap().call_loop();
    rig.events.run();
    std::thread::sleep(Duration::from_millis(50));
    rig.events.run();
    let device = rig.device.lock().unwrap();
    assert!(device.splitter.link().is_some(), "no fault of the driver VM");
    assert_eq!(device.splitter.deadline(), None);
}

#[test]
fn a_queue_full_of_nonsense_is_answered_in_several_turns_of_the_loop() {
    let mut rig = Rig::new();
    let head = rig.queues[2].add(&[&[1, 0]], &[8]);
    (1..200).for_each(|_| rig.queues[2].offer(head));
    rig.device.lock().unwrap().serve(TX).unwrap();
    assert_eq!(rig.queues[2].used().len(), BATCH);
    rig.events.run();
    assert_eq!(rig.queues[2].used().len(), 200 - BATCH, "the rest follows without a kick");
}

#[test]
fn a_message_that_is_offered_again_and_again_is_a_broken_rule() {
    let mut rig = Rig::new();
    rig.set_up(0);
    let head = rig.queues[2].add(&[&0u32.to_le_bytes(), &[7; 4]], &[8]);
    // As many as there are descriptors could be honest.
    for offered in 1..=usize::from(QUEUE_SIZES[2]) {
        assert!(!rig.device.lock().unwrap().needs_reset(), "{offered} messages");
        rig.queues[2].kick();
        rig.events.run();
        rig.queues[2].offer(head);
    }
    rig.queues[2].kick();
    rig.events.run();
    assert!(rig.device.lock().unwrap().needs_reset());
    assert_eq!(rig.device.lock().unwrap().splitter.shadow().pending_bytes(), 0, "nothing of them is kept");
}

#[test]
fn a_quarantined_card_is_a_dead_card() {
    let mut rig = Rig::new();
    rig.set_up(0);
    let head = rig.play(0);
    rig.device.lock().unwrap().quarantine();
    rig.events.run();
    assert_eq!(rig.queues[2].used(), [(head, 8)]);
    assert_eq!(rig.status(2, head + 2), IO_ERROR);
    assert_eq!(rig.control(&[0x102, 0], &[]), IO_ERROR);
}

#[test]
fn a_driver_vm_plays_and_is_lost_and_the_next_link_goes_on() {
    let first = LinkId::first(Generation::FIRST);
    let say = |socket: &mut UnixStream, link, message: &FromService| {
        let mut bytes = Vec::new();
        encode_service(message, link, &mut bytes);
        socket.write_all(&bytes).unwrap();
    };
    // A service that says nothing for as long as half the buffer lasts would be helped.
    let (mut rig, theirs, heads, heard) = undisturbed(Duration::from_millis(20), || {
        let mut rig = Rig::new();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        rig.device.lock().unwrap().attach(first, ours);
        say(&mut theirs, first, &FromService::Card(card()));
        rig.events.run();
        rig.set_up(0);
        let heads: Vec<u16> = (0..4).map(|_| rig.play(0)).collect();
        let started = Instant::now();
        rig.control(&[0x104, 0], &[]);
        let position = FromCard::Position { stream: StreamId(0), epoch: umbra_shadow::sound::Epoch(1), heard: 480 };
        say(&mut theirs, first, &FromService::Stream(position));
        rig.events.run();
        let heard = rig.queues[2].used();
        (started.elapsed(), (rig, theirs, heads, heard))
    });
    assert_eq!(heard, [(heads[0], 8)]);
    drop(theirs);
    assert_eq!(rig.wait_for(2, 3).len(), 3, "the shadow goes on");

    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let second = first.next();
    rig.device.lock().unwrap().attach(second, ours);
    say(&mut theirs, second, &FromService::Card(card()));
    rig.events.run();
    let mut heard = vec![0; 4096];
    let length = theirs.read(&mut heard).unwrap();
    let (begin, link, begun) = decode(&heard[..length], second.generation, None).unwrap().unwrap();
    assert_eq!((begin, link), (Taken::Message(FromHost::Begin), second));
    let (message, ..) = decode(&heard[begun..length], second.generation, Some(2)).unwrap().unwrap();
    assert!(matches!(message, Taken::Message(FromHost::Stream(ToCard::SetParams { .. }))), "{message:?}");
    let told = rig.told.lock().unwrap();
    assert!(matches!(told[0], FromVm::Live { generation, .. } if generation == first.generation));
    assert!(matches!(told[1], FromVm::Lost { link, .. } if link == first));
}

#[test]
fn a_driver_that_breaks_its_queues_without_end_does_not_fill_the_log() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.try_clone().unwrap()).finish();
    tracing::subscriber::with_default(subscriber, || {
        let mut rig = Rig::new();
        for _ in 0..100 {
            rig.queues[0].break_ring();
            rig.queues[0].kick();
            rig.events.run();
            let mut device = rig.device.lock().unwrap();
            assert!(device.needs_reset());
            device.stop_queue(0);
            device.reset();
            rig.queues[0] = rig.queues[0].another(0, QUEUE_SIZES[0]);
            device.start_queue(0, rig.queues[0].resources(), None).unwrap();
        }
    });
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    // A few at once, then a few a minute, however long this takes.
    assert!((5..50).contains(&text.matches("broke a rule").count()), "{text}");
}
