//! Any order of events keeps the invariants.

use proptest::prelude::*;

use super::*;

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

/// What comes for a stream that stands still is kept.
fn keeps(rig: &Rig) -> bool {
    rig.shadow.streams[usize::from(OUT.0)].stands_still
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
                    let takes = rig.shadow.state(OUT).unwrap().takes_messages() && rig.shadow.mode() != Mode::Dead;
                    let kept = keeps(&rig);
                    prop_assert_eq!(rig.play(vec![7; 960]), takes || kept);
                }
                Event::Message(true) => rig.record(960),
                Event::Oversized => {
                    let kept = keeps(&rig);
                    prop_assert_eq!(rig.play(vec![7; params::MAX_BUFFER_BYTES as usize + 2]), kept);
                }
                Event::Pass(ms) => rig.pass(ms),
                Event::Boot => rig.boot(),
                Event::Crash => rig.crash(),
                Event::Die => rig.die(),
                Event::Reset => rig.reset(),
                Event::Reports(every) => rig.every = every,
            }
            let waits = rig.shadow.streams.iter().any(Stream::waits_for_card);
            prop_assert!(waits || !matches!(rig.shadow.mode(), Mode::Replaying(_)), "a replay without end");
            prop_assert!(rig.shadow.pending_bytes() <= 2 * params::MAX_BUFFER_BYTES as usize);
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
        said in prop::collection::vec((0u16..3, 0u32..4, prop_oneof![0u64..4000, any::<u64>()], 0usize..9, 0u8..4), 0..60),
    ) {
        let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
        rig.boot();
        rig.start_playback(&mut source);
        for (stream, epoch, heard, len, kind) in said {
            let (stream, epoch) = (StreamId(stream), Epoch(epoch));
            let message = match kind {
                0 => FromCard::Position { stream, epoch, heard },
                1 => FromCard::Captured { stream, epoch, samples: vec![0; len] },
                2 => FromCard::Stuck { stream, epoch },
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
