//! A guest that knows the position of a stream modulo its buffer, as Linux does, and is away for as long as it likes.

use proptest::prelude::*;

use super::*;

const PERIOD: u64 = 960;
const BUFFER: u64 = 4 * PERIOD;

/// How long the guest is away, how long it takes from taking its messages to its look, and how long the card is silent, ms.
type Step = (u64, u64, u64);

/// A guest, and a card that moves at its rate and reports in its own time.
struct Linux {
    shadow: SoundShadow,
    id: StreamId,
    now: u64,
    tokens: u32,
    /// Bytes of messages handed over; of those that are back; of those that the guest has taken from its queue.
    handed: u64,
    back: u64,
    taken: u64,
    /// Bytes that the device has, as the guest has it, and the position at its last look, modulo the buffer.
    ready: u64,
    position: u64,
    /// Frames that the card has moved, and has reported.
    card: u64,
    reported: u64,
}

impl Linux {
    fn new(id: StreamId) -> Self {
        let (shadow, now) = (SoundShadow::new(card(), Policy::Skip), 1_000 * MS);
        let mut guest = Self {
            shadow,
            id,
            now,
            tokens: 0,
            handed: 0,
            back: 0,
            taken: 0,
            ready: 0,
            position: 0,
            card: 0,
            reported: 0,
        };
        guest.with(|s, now, out| s.replay(generation(1), &card(), now, out).unwrap());
        for command in [Command::SetParams(params()), Command::Prepare] {
            guest.command(command);
        }
        guest.fill();
        guest.command(Command::Start);
        guest
    }

    fn with(&mut self, f: impl FnOnce(&mut SoundShadow, u64, &mut Out)) {
        let mut out = Out::default();
        f(&mut self.shadow, self.now, &mut out);
        self.back += PERIOD * out.done.len() as u64;
    }

    fn command(&mut self, command: Command) {
        let id = self.id;
        self.with(|s, now, out| s.command(id, command, now, out).unwrap());
    }

    /// A period at a time, while there is room as the guest has it.
    fn fill(&mut self) {
        while self.ready < BUFFER {
            (self.ready, self.handed, self.tokens) = (self.ready + PERIOD, self.handed + PERIOD, self.tokens + 1);
            let (id, token) = (self.id, Token(self.tokens));
            let bytes = usize::try_from(PERIOD).unwrap();
            self.with(|s, now, out| match id {
                OUT => s.play(id, token, vec![7; bytes], now, out),
                _ => s.record(id, token, bytes, now, out),
            });
        }
    }

    /// As `snd_pcm_indirect_playback_pointer`.
    fn look(&mut self) {
        let position = self.taken % BUFFER;
        self.ready -= (position + BUFFER - self.position) % BUFFER;
        self.position = position;
        assert_eq!(self.ready, self.handed - self.taken, "the guest waits for what it has");
        self.fill();
    }

    /// Lets a millisecond pass; the card reports or not.
    fn pass(&mut self, reports: bool) {
        self.now += MS;
        self.shadow.taken(self.taken == self.back, self.now);
        self.card += 48;
        let id = self.id;
        if id == OUT {
            self.card = self.card.min(self.handed / 2);
        }
        let frames = self.card - self.reported;
        if reports && frames > 0 {
            self.reported = self.card;
            let said = match id {
                OUT => FromCard::Position { stream: id, epoch: Epoch(1), heard: self.card },
                _ => FromCard::Captured {
                    stream: id,
                    epoch: Epoch(1),
                    samples: vec![1; usize::try_from(2 * frames).unwrap()],
                },
            };
            self.with(|s, now, out| s.from_card(generation(1), said, now, out).unwrap());
        }
        if self.shadow.deadline().is_some_and(|at| at <= self.now) {
            self.with(|s, now, out| s.tick(now, out).unwrap());
            assert!(self.shadow.deadline().is_none_or(|at| at > self.now), "a deadline that stays");
        }
    }

    fn live(&mut self, steps: &[Step]) {
        for (away, work, silence) in steps {
            for ms in 1..=*away {
                self.pass(ms.is_multiple_of(*silence));
            }
            self.taken = self.back;
            // What comes back from here on is taken at the next time.
            for ms in 1..=*work {
                self.pass(ms.is_multiple_of(*silence));
            }
            self.look();
        }
    }
}

proptest! {
    /// Messages come back in any bursts, to a guest that is away for any time: it never misses a whole buffer.
    #[test]
    fn a_guest_that_is_away_sees_all_that_moved(
        steps in prop::collection::vec((0u64..400, 0u64..20, 1u64..300), 1..40),
        records in any::<bool>(),
    ) {
        Linux::new(if records { IN } else { OUT }).live(&steps);
    }
}

/// A player hands over its last four periods, and the card has played them all at its next report: so many milliseconds later the last
/// message is back. The guest has taken the others at once, or never.
fn last_of_a_burst(takes: bool) -> u64 {
    let mut guest = Linux::new(OUT);
    (0..40).for_each(|_| guest.pass(false));
    guest.pass(true);
    assert_eq!(guest.back, 3 * PERIOD, "the last one stays");
    for ms in 1.. {
        if takes {
            guest.taken = guest.back;
        }
        guest.pass(true);
        if guest.back == BUFFER {
            return ms;
        }
    }
    unreachable!("there are as many milliseconds as one likes")
}

#[test]
fn the_last_message_of_a_burst_is_back_a_moment_after_the_others_were_taken() {
    assert_eq!(last_of_a_burst(true), 21);
}

#[test]
fn a_guest_that_does_not_show_what_it_takes_has_it_after_a_second() {
    assert_eq!(last_of_a_burst(false), 1000);
}

#[test]
fn a_stream_that_stops_keeps_nothing_back() {
    let mut guest = Linux::new(OUT);
    (0..40).for_each(|_| guest.pass(false));
    guest.pass(true);
    guest.command(Command::Stop);
    assert_eq!(guest.back, BUFFER);
}

#[test]
fn periods_that_come_back_one_by_one_are_not_held_up() {
    let mut guest = Linux::new(OUT);
    // The end of a song whose periods are far enough apart to be seen.
    for period in 1..=4 {
        for _ in 0..30 {
            guest.taken = guest.back;
            guest.pass(false);
        }
        let position = FromCard::Position { stream: OUT, epoch: Epoch(1), heard: period * PERIOD / 2 };
        guest.with(|s, now, out| s.from_card(generation(1), position, now, out).unwrap());
        assert_eq!(guest.back, period * PERIOD);
    }
}
