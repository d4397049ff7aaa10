//! What a guest's player hears of an outage, with either policy.

use super::*;

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
fn what_the_next_card_plays_late_is_not_counted_as_skipped() {
    let (mut rig, mut source) = (Rig::new(Policy::Skip), Source::default());
    rig.boot();
    rig.start_playback(&mut source);
    play_for(&mut rig, &mut source, 200);
    rig.crash();
    play_for(&mut rig, &mut source, 1000);
    // Its first word comes 20 ms after it got the samples.
    (rig.every, rig.now) = (20, rig.now.next_multiple_of(20 * MS));
    rig.boot();
    play_for(&mut rig, &mut source, 400);
    let heard = rig.shadow.heard(OUT).unwrap();
    rig.crash();
    assert_eq!(rig.played.len() as u64 / 2 + rig.shadow.counts().frames_skipped, heard);
}

#[test]
fn silence_of_a_card_that_stands_still_is_counted() {
    let mut rig = Rig::new(Policy::Skip);
    rig.boot();
    for command in [Command::SetParams(params()), Command::Prepare, Command::Start] {
        rig.command(IN, command).unwrap();
    }
    rig.every = u16::MAX;
    for _ in 0..1000 {
        while rig.waiting.get(&IN.0).map_or(0, VecDeque::len) < 4 {
            rig.record(960);
        }
        rig.pass(1);
    }
    assert!(rig.recorded.len() > 960 && rig.recorded.iter().all(|byte| *byte == 0));
    assert_eq!(rig.shadow.counts().frames_silent, rig.recorded.len() as u64 / 2);
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

/// As a driver that knows no periods has: two messages under way, each as long as its buffer.
#[test]
fn messages_of_whole_buffers_come_back_when_they_are_heard() {
    let whole = Params { period_bytes: 19_200, buffer_bytes: 19_200, ..params() };
    for policy in [Policy::Skip, Policy::Hold] {
        let mut rig = Rig::new(policy);
        rig.boot();
        rig.command(OUT, Command::SetParams(whole)).unwrap();
        rig.command(OUT, Command::Prepare).unwrap();
        assert!(rig.play(vec![1; 19_200]) && rig.play(vec![2; 19_200]), "more than its buffer");
        rig.command(OUT, Command::Start).unwrap();
        for ms in 1..=10_000 {
            rig.pass(1);
            while rig.waiting[&OUT.0].len() < 2 {
                assert!(rig.play(vec![3; 19_200]));
            }
            assert_eq!(rig.shadow.given_back(OUT), Some(ms / 200 * 9_600), "{policy:?}, {ms} ms");
        }
        assert_eq!(rig.shadow.counts().kept_alive, 0);
    }
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
