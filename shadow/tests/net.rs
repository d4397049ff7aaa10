//! The network shadow through every mode, against a simple model of what was sent.
#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)]

use std::time::Duration;

use proptest::prelude::*;
use umbra_shadow::net::log::{MAX_BYTES, MAX_FRAMES, TransmitLog};
use umbra_shadow::net::pacing::{BATCH, LONGEST, Pacing, STEP};
use umbra_shadow::net::rx_mode::{MAX_ADDRESSES, RxFilter};
use umbra_shadow::net::{Event, FrameVerdict, MaskedCounts, ModeName, NetShadow};
use umbra_shadow::{Generation, LinkId};

fn generation(n: u32) -> Generation {
    Generation::new(n).unwrap()
}

fn link(n: u32) -> LinkId {
    LinkId::first(generation(n))
}

fn shadow() -> NetShadow {
    NetShadow::new([2, 0, 0, 0, 0, 1], 1500)
}

/// What a device, a driver VM and a supervisor can do, in any order.
#[derive(Clone, Debug)]
enum Step {
    Apply(Event),
    /// The guest sends a frame of this length.
    Send(usize),
    /// The driver VM takes up to this many frames of the log.
    Replay(usize),
    /// So many milliseconds pass.
    Wait(u64),
    Heard(Generation),
    Settle(u64),
    DropSuspects,
    Carrier(Generation, bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let number = (1u32..12).prop_map(generation);
    let links = (number.clone(), 1u32..4).prop_map(|(generation, attempt)| LinkId { generation, attempt });
    let step = prop_oneof![
        2 => links.clone().prop_map(|l| Step::Apply(Event::GoLive(l))),
        2 => links.prop_map(|l| Step::Apply(Event::Lost(l))),
        1 => Just(Step::Apply(Event::Quarantine)),
        3 => Just(Step::Apply(Event::Drained)),
        8 => prop_oneof![9 => 14usize..1600, 1 => Just(65_000usize)].prop_map(Step::Send),
        4 => (0usize..30).prop_map(Step::Replay),
        3 => (0u64..1000).prop_map(Step::Wait),
        2 => number.clone().prop_map(Step::Heard),
        2 => (0u64..10).prop_map(Step::Settle),
        1 => Just(Step::DropSuspects),
        2 => (number, any::<bool>()).prop_map(|(g, up)| Step::Carrier(g, up)),
    ];
    prop::collection::vec(step, 1..200)
}

/// Drives a shadow as the splitter does and checks what comes out.
struct Run {
    shadow: NetShadow,
    /// Number of the next frame of the guest.
    next: u64,
    /// The newest frame that was handed over, live or replayed.
    last_handed: Option<u64>,
    handed: u64,
    lost_in_flight: u64,
    now: Duration,
}

impl Run {
    fn hand(&mut self, frame: u64) {
        assert!(self.last_handed.is_none_or(|last| frame > last), "frame {frame} twice or out of order");
        self.last_handed = Some(frame);
        self.handed += 1;
    }

    fn send(&mut self, len: usize) {
        let mut frame = vec![0; len];
        frame[..8].copy_from_slice(&self.next.to_le_bytes());
        match self.shadow.verdict() {
            FrameVerdict::Pass => {
                self.hand(self.next);
                self.shadow.handed(1);
            }
            FrameVerdict::Log => assert!(self.shadow.log(frame)),
            // It stays with the guest, which sends it later.
            FrameVerdict::Hold => {
                assert!(!self.shadow.log(frame));
                return;
            }
            FrameVerdict::Discard => assert!(!self.shadow.log(frame)),
        }
        self.next += 1;
    }

    fn replay(&mut self, count: usize) {
        for _ in 0..count {
            let Some(frame) = self.shadow.next_replay(self.now) else { break };
            let number = u64::from_le_bytes(frame[..8].try_into().unwrap());
            assert!(self.shadow.link_up(), "a frame into a NIC without carrier");
            self.shadow.replayed();
            self.hand(number);
        }
    }

    fn apply(&mut self, event: Event) {
        let (mode, in_flight) = (self.shadow.mode(), self.shadow.in_flight());
        let before = self.shadow.clone();
        let applied = self.shadow.apply(event);
        let after = self.shadow.mode();
        let lost = applied && matches!(event, Event::Lost(_) | Event::Quarantine);
        if lost {
            self.lost_in_flight += in_flight;
        }
        match (event, applied) {
            (Event::GoLive(g), true) => {
                assert!(matches!(mode, ModeName::Masking | ModeName::Quarantined));
                let expected = if self.shadow.link_up() { ModeName::Replaying } else { ModeName::WaitingCarrier };
                assert_eq!((after, self.shadow.link()), (expected, Some(g)));
            }
            (Event::CarrierUp(g) | Event::CarrierDown(g), true) => {
                assert_eq!(self.shadow.link().map(|link| link.generation), Some(g));
            }
            (Event::Drained, true) => assert_eq!((mode, after), (ModeName::Replaying, ModeName::Passive)),
            (Event::Lost(_), true) => {
                let expected = if mode == ModeName::Quarantined { mode } else { ModeName::Masking };
                assert_eq!(after, expected);
            }
            (Event::Quarantine, true) => assert_eq!((after, self.shadow.link_up()), (ModeName::Quarantined, false)),
            (_, false) => assert_eq!(format!("{before:?}"), format!("{:?}", self.shadow)),
        }
    }

    fn step(&mut self, step: Step) {
        let link = self.shadow.link_up();
        match step {
            Step::Apply(event) => self.apply(event),
            Step::Send(len) => self.send(len),
            Step::Replay(count) => self.replay(count),
            Step::Wait(ms) => self.now += Duration::from_millis(ms),
            Step::Heard(g) => self.shadow.heard(g),
            Step::Settle(count) => self.shadow.settle(count),
            Step::DropSuspects => {
                self.shadow.drop_suspects();
            }
            Step::Carrier(g, up) => {
                let live = self.shadow.link().map(|link| link.generation) == Some(g);
                let changed = self.shadow.carrier(g, up);
                assert_eq!(changed, live && link != up);
                assert_eq!(self.shadow.link_up(), if live { up } else { link });
            }
        }
        if self.shadow.mode() == ModeName::Masking {
            assert_eq!(self.shadow.link_up(), link, "masking changes nothing that the guest sees");
        }
    }

    fn check(&self) {
        let MaskedCounts { logged, replayed, dropped, unknown } = self.shadow.total();
        assert_eq!(logged, replayed + dropped + self.shadow.logged_now() as u64);
        assert_eq!(unknown, self.lost_in_flight);
        assert!(unknown + self.shadow.in_flight() <= self.handed);
        assert!(self.shadow.logged_now() <= MAX_FRAMES && self.shadow.logged_bytes() <= MAX_BYTES);
        let outage = self.shadow.outage();
        assert!(outage.logged <= logged && outage.unknown <= unknown);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn frames_go_out_once_in_order_within_bounds_and_the_counters_add_up(steps in steps()) {
        let mut run = Run {
            shadow: shadow(),
            next: 0,
            last_handed: None,
            handed: 0,
            lost_in_flight: 0,
            now: Duration::ZERO,
        };
        for step in steps {
            run.step(step);
            run.check();
        }
    }

    /// Whatever is asked when: what a NIC that brings nothing in can lose is bounded, and so is the time.
    #[test]
    fn a_silent_nic_gets_few_frames_and_not_for_long(waits in prop::collection::vec(0u64..300, 1..200)) {
        let (mut pacing, mut now, mut handed) = (Pacing::default(), Duration::from_secs(7), 0);
        for wait in waits {
            while handed < 100 && pacing.allows(now) {
                pacing.note_handed();
                handed += 1;
            }
            let silence = now - Duration::from_secs(7);
            prop_assert!(handed >= BATCH);
            prop_assert_eq!(pacing.is_bounded(), silence < LONGEST);
            prop_assert!(handed <= 6 * BATCH || silence >= LONGEST);
            prop_assert!(handed == BATCH || silence >= STEP);
            now += Duration::from_millis(wait);
        }
        pacing.note_heard();
        prop_assert!(pacing.allows(now) && !pacing.is_bounded());
    }

    #[test]
    fn the_log_keeps_the_newest_within_its_bounds(lens in prop::collection::vec(1usize..70_000, 1..300)) {
        let mut log = TransmitLog::default();
        let mut dropped = 0;
        for (number, len) in lens.iter().enumerate() {
            let mut frame = vec![0; *len + 8];
            frame[..8].copy_from_slice(&(number as u64).to_le_bytes());
            dropped += log.push(frame);
            prop_assert!(log.bytes() <= MAX_BYTES && log.len() <= MAX_FRAMES);
        }
        prop_assert_eq!(dropped + log.len() as u64, lens.len() as u64);
        let mut expected = lens.len() as u64 - log.len() as u64;
        while let Some(frame) = log.front() {
            prop_assert_eq!(u64::from_le_bytes(frame[..8].try_into().unwrap()), expected);
            expected += 1;
            log.pop();
        }
        prop_assert_eq!(log.bytes(), 0);
    }

    #[test]
    fn filters_are_bounded_and_never_narrower_than_asked_for(
        unicast in prop::collection::vec(any::<[u8; 6]>(), 0..100),
        multicast in prop::collection::vec(any::<[u8; 6]>(), 0..100),
    ) {
        let mut filter = RxFilter::new([2; 6]);
        filter.set_promiscuous(false);
        filter.set_tables(unicast.iter().copied(), multicast.iter().copied());
        let kept = filter.unicast();
        prop_assert!(kept.len() <= MAX_ADDRESSES && filter.multicast().len() <= MAX_ADDRESSES);
        prop_assert!(filter.promiscuous() || unicast.iter().all(|m| kept.contains(m)));
        prop_assert!(filter.all_multicast() || multicast.iter().all(|m| filter.multicast().contains(m)));
        prop_assert_eq!(kept[0], [2; 6]);
    }
}

#[test]
fn the_frame_limit_holds_for_tiny_frames() {
    let mut shadow = shadow();
    for _ in 0..MAX_FRAMES + 10 {
        shadow.log(vec![0; 60]);
    }
    let expected = MaskedCounts { logged: MAX_FRAMES as u64 + 10, dropped: 10, ..Default::default() };
    assert_eq!((shadow.total(), shadow.logged_now()), (expected, MAX_FRAMES));
}

#[test]
fn an_outage_has_its_own_counters_and_a_crash_in_replay_goes_on_with_them() {
    let mut shadow = shadow();
    shadow.log(vec![1; 60]);
    assert!(shadow.apply(Event::GoLive(link(1))));
    shadow.replayed();
    assert!(shadow.apply(Event::Drained));
    shadow.handed(3);
    shadow.settle(2);
    assert!(shadow.apply(Event::Lost(link(1))));
    assert_eq!(shadow.outage(), MaskedCounts { unknown: 2, ..Default::default() });
    shadow.log(vec![2; 60]);
    shadow.log(vec![3; 60]);
    assert!(shadow.apply(Event::GoLive(link(2))));
    shadow.replayed();
    assert!(shadow.apply(Event::Lost(link(2))));
    assert_eq!(shadow.outage(), MaskedCounts { logged: 2, replayed: 1, unknown: 3, dropped: 0 });
    assert_eq!(shadow.total(), MaskedCounts { logged: 3, replayed: 2, unknown: 3, dropped: 0 });
    // The one that was not handed over is the next.
    assert!(shadow.apply(Event::GoLive(link(3))));
    assert_eq!(shadow.next_replay(Duration::ZERO), Some(&[3; 60][..]));
}

#[test]
fn a_link_lost_before_it_served_bars_nothing_but_the_earlier_ones_of_its_life() {
    let mut shadow = shadow();
    let second = LinkId { attempt: 2, ..link(2) };
    assert!(shadow.apply(Event::Lost(second)));
    assert!(!shadow.would_serve(link(2)) && !shadow.apply(Event::GoLive(second)));
    assert!(shadow.would_serve(second.next()) && shadow.would_serve(link(1)));
    assert!(shadow.apply(Event::GoLive(link(1))));
    assert!(shadow.apply(Event::Lost(link(1))));
    assert!(!shadow.would_serve(link(1)) && shadow.would_serve(link(1).next()));
    // A life that is given up as a whole bars all before it.
    assert!(shadow.apply(Event::Lost(LinkId::last(generation(2)))));
    assert!(!shadow.would_serve(link(1).next()) && !shadow.would_serve(second.next()) && shadow.would_serve(link(3)));
}

#[test]
fn a_carrier_reported_before_going_live_is_shown_when_live() {
    let mut shadow = shadow();
    assert!(!shadow.link_up(), "as of a NIC that is being set up");
    assert!(!shadow.carrier(generation(1), false));
    shadow.apply(Event::GoLive(link(1)));
    assert!(!shadow.link_up());
    assert!(shadow.carrier(generation(1), true));
    assert!(shadow.apply(Event::Drained));
    assert!(!shadow.carrier(generation(2), false), "generation 2 is not live");
    shadow.apply(Event::Lost(link(1)));
    assert!(!shadow.carrier(generation(1), false), "generation 1 is over");
    assert!(shadow.link_up());
}

#[test]
fn a_recovery_without_carrier_does_not_flap_the_guests_link() {
    let mut shadow = shadow();
    shadow.apply(Event::GoLive(link(1)));
    shadow.apply(Event::Drained);
    assert!(shadow.carrier(generation(1), false));
    // Told while masking, before it goes live.
    shadow.apply(Event::Lost(link(1)));
    shadow.carrier(generation(2), false);
    shadow.apply(Event::GoLive(link(2)));
    assert!(!shadow.link_up());
    assert!(!shadow.apply(Event::Drained), "it is not live without a carrier");
    // Told while another serves, as of one that waits; the last word counts.
    shadow.carrier(generation(3), true);
    shadow.carrier(generation(3), false);
    shadow.apply(Event::Lost(link(2)));
    shadow.apply(Event::GoLive(link(3)));
    assert!(!shadow.link_up());
    // What was told of another generation does not count, and is not lost.
    shadow.apply(Event::Lost(link(3)));
    shadow.carrier(generation(5), false);
    shadow.apply(Event::GoLive(link(4)));
    assert!(shadow.link_up());
    shadow.apply(Event::Lost(link(4)));
    shadow.apply(Event::GoLive(link(5)));
    assert!(!shadow.link_up());
}

#[test]
fn the_log_waits_for_the_carrier_and_goes_on_growing_within_its_bounds() {
    let mut shadow = shadow();
    shadow.log(vec![1; 60]);
    shadow.carrier(generation(1), false);
    assert!(shadow.apply(Event::GoLive(link(1))));
    assert_eq!((shadow.mode(), shadow.verdict()), (ModeName::WaitingCarrier, FrameVerdict::Log));
    assert!(!shadow.apply(Event::Drained));
    assert_eq!(shadow.next_replay(LONGEST), None);
    for _ in 0..MAX_FRAMES + 4 {
        assert!(shadow.log(vec![2; 60]));
    }
    let logged = MAX_FRAMES as u64 + 5;
    assert_eq!(shadow.outage(), MaskedCounts { logged, dropped: 5, ..Default::default() });
    assert!(shadow.carrier(generation(1), true));
    assert_eq!((shadow.mode(), shadow.verdict()), (ModeName::Replaying, FrameVerdict::Hold));
    shadow.heard(generation(1));
    while shadow.next_replay(Duration::ZERO).is_some() {
        shadow.replayed();
    }
    assert!(shadow.apply(Event::Drained));
    assert_eq!(shadow.outage(), MaskedCounts { logged, dropped: 5, replayed: MAX_FRAMES as u64, unknown: 0 });
    // Live, a carrier that is lost is the guest's to see and nothing else.
    assert!(shadow.carrier(generation(1), false));
    assert_eq!((shadow.mode(), shadow.verdict()), (ModeName::Passive, FrameVerdict::Pass));
}

#[test]
fn a_carrier_lost_in_the_midst_of_the_replay_keeps_the_rest() {
    let mut shadow = shadow();
    (0..100).for_each(|_| assert!(shadow.log(vec![1; 60])));
    shadow.apply(Event::GoLive(link(1)));
    shadow.heard(generation(1));
    (0..10).for_each(|_| shadow.replayed());
    assert!(shadow.carrier(generation(1), false));
    assert_eq!(shadow.next_replay(LONGEST), None);
    assert_eq!((shadow.logged_now(), shadow.in_flight()), (90, 10));
    assert!(shadow.carrier(generation(1), true));
    // What came in before says nothing about the new link.
    assert!(shadow.is_paced());
    shadow.carrier(generation(1), false);
    assert!(shadow.apply(Event::Lost(link(1))));
    assert_eq!(shadow.outage(), MaskedCounts { logged: 100, replayed: 10, unknown: 10, dropped: 0 });
}

#[test]
fn a_nic_that_has_brought_something_in_gets_the_log_at_once_and_another_bit_by_bit() {
    let replay = |shadow: &mut NetShadow, now| {
        let mut count = 0;
        while shadow.next_replay(now).is_some() {
            shadow.replayed();
            count += 1;
        }
        count
    };
    for heard in [1, 2] {
        let mut shadow = shadow();
        (0..100).for_each(|_| assert!(shadow.log(vec![1; 60])));
        shadow.heard(generation(heard));
        shadow.apply(Event::GoLive(link(2)));
        let at_once = replay(&mut shadow, Duration::ZERO);
        assert_eq!((at_once, shadow.is_paced()), if heard == 2 { (100, false) } else { (4, true) });
        assert_eq!(shadow.outage().replayed, at_once, "no more than was sent");
        if heard == 1 {
            assert_eq!(replay(&mut shadow, STEP), 4);
            assert_eq!(replay(&mut shadow, STEP), 0);
            shadow.heard(generation(2));
            assert_eq!(replay(&mut shadow, STEP), 92);
        }
    }
}
