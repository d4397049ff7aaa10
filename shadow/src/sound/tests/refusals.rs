//! Cards that cannot be believed, that are dead, or that are others than before.

use super::*;
use crate::sound::playback::HELD_MAX_MESSAGES;

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
fn held_messages_are_bounded_however_small() {
    let mut rig = Rig::new(Policy::Hold);
    let tiny = Params { period_bytes: 2, buffer_bytes: 512, ..params() };
    rig.command(OUT, Command::SetParams(tiny)).unwrap();
    rig.command(OUT, Command::Prepare).unwrap();
    rig.command(OUT, Command::Start).unwrap();
    for _ in 0..HELD_MAX_MESSAGES / 250 + 100 {
        // As many as its queue holds.
        while rig.waiting.get(&OUT.0).map_or(0, VecDeque::len) < 256 {
            rig.play(vec![7; 2]);
        }
        rig.pass(80);
    }
    let held = rig.shadow.kept_bytes() / 2;
    assert!((HELD_MAX_MESSAGES..HELD_MAX_MESSAGES + 512).contains(&held), "{held}");
    let mut out = Out::default();
    rig.shadow.replay(generation(1), &card(), rig.now, &mut out).unwrap();
    assert!(
        out.to_card.len() < 10,
        "a service that gets {} messages at once takes that for a flood",
        out.to_card.len()
    );
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
    // A message of a stream that runs stays, or its player would go on as fast as it can.
    assert!(rig.play(vec![0; 960]) && rig.play(vec![0; 960]));
    rig.pass(5_000);
    assert_eq!(rig.waiting[&OUT.0].len(), 2);
    assert_eq!(rig.command(IN, Command::Stop), Err(Refusal::Dead));
    assert_eq!(rig.waiting[&OUT.0].len(), 2, "another stream's");
    assert_eq!(rig.command(OUT, Command::Stop), Err(Refusal::Dead));
    assert!(rig.waiting[&OUT.0].is_empty());
    assert_eq!(rig.shadow.deadline(), None);
    assert!(!rig.play(vec![0; 960]), "it runs no more");
}

/// Linux does not look at what became of a message: whoever got each one back at once would play a song in a moment, or fill a disk with
/// a recording of nothing.
#[test]
fn a_stream_stands_still_when_its_dead_card_is_back_until_its_guest_asks_for_something() {
    let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    for command in [Command::SetParams(params()), Command::Prepare, Command::Start] {
        rig.command(IN, command).unwrap();
    }
    rig.die();
    assert!(rig.play(vec![0; 960]));
    rig.record(960);
    rig.boot();
    assert!(rig.play(vec![0; 960]));
    rig.record(960);
    rig.pass(5_000);
    assert_eq!((rig.waiting[&OUT.0].len(), rig.waiting[&IN.0].len()), (2, 2));
    assert!(matches!(rig.shadow.mode(), Mode::Passive(_)), "nobody waits for these");
    assert_eq!(rig.command(OUT, Command::Stop), Err(Refusal::WrongState(State::Unset)));
    assert_eq!((rig.waiting[&OUT.0].len(), rig.waiting[&IN.0].len()), (0, 2), "each stream for itself");
    rig.start_playback(&mut source);
    rig.command(IN, Command::SetParams(params())).unwrap();
    rig.die();
    rig.record(960);
    assert!(rig.waiting[&IN.0].is_empty(), "it does not run");
    rig.reset();
    assert!(!rig.play(vec![0; 960]), "of a driver that starts over");
}

#[test]
fn a_stream_that_is_stuck_is_dead_alone_until_its_guest_asks_for_something() {
    let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    for command in [Command::SetParams(params()), Command::Prepare, Command::Start] {
        rig.command(IN, command).unwrap();
    }
    // In the middle of a replay, which ends with it.
    rig.boot();
    let stuck = |epoch| FromCard::Stuck { stream: OUT, epoch: Epoch(epoch) };
    for (message, waiting) in [(stuck(1), 4), (stuck(2), 0)] {
        rig.with(|s, now, out| s.from_card(generation(2), message, now, out)).unwrap();
        assert_eq!(rig.waiting[&OUT.0].len(), waiting);
    }
    rig.given_back = 0;
    assert!(rig.play(vec![0; 960]), "its player sees a card that stands still");
    rig.record(960);
    // Far longer than a card may stand still.
    for _ in 0..10 {
        rig.pass(1_000);
        rig.record(960);
    }
    assert_eq!(rig.waiting[&OUT.0].len(), 1);
    assert!(rig.recorded.len() > 10 * 960, "the other goes on");
    assert_eq!(rig.shadow.mode(), Mode::Passive(generation(2)));
    assert_eq!(rig.command(OUT, Command::Stop), Err(Refusal::WrongState(State::Unset)));
    rig.start_playback(&mut source);
    play_for(&mut rig, &mut source, 100);
    assert!(rig.shadow.heard(OUT).unwrap() > 0, "plugged in, say");
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
