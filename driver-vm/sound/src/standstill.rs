//! A card that several guests share and that stands still. Each guest's host sees its own streams alone, and is not believed against the
//! others: the service itself has to look, and ends. A stream that never moves while the card moves others is no failure of the card.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;
use umbra_shadow::sound::Direction;

/// Most time that counts between two looks, which are some milliseconds apart: a driver VM that gets no processor does not look.
const LOOK: Duration = Duration::from_millis(20);
/// Longest time in which a stream that has moved may stand still although the card should move it; less than the 2 s after which its
/// host ends the session, and all would begin anew.
const LIMIT: Duration = Duration::from_millis(1500);
/// The same before its first movement, for which a host has 3 s of patience: codecs may need a while to power up.
const START_LIMIT: Duration = Duration::from_millis(2500);

/// How often each device of the card was seen to move, by the streams of all guests: the one that plays, and the one that records.
#[derive(Debug, Default)]
pub struct Movement([AtomicU64; 2]);

impl Movement {
    fn now(&self) -> [u64; 2] {
        [0, 1].map(|device: usize| self.0[device].load(Ordering::Relaxed))
    }
}

/// How long a stream has stood still.
#[derive(Debug)]
pub struct Standstill {
    /// Index of its device in [`Movement`].
    device: usize,
    movement: Arc<Movement>,
    /// Several guests share the card. Else the host looks, which knows all that the card does.
    shared: bool,
    moved: bool,
    looked: Option<Instant>,
    stood: Duration,
    /// The card's movement when the stream was last seen to move, or had no reason to.
    since: [u64; 2],
}

impl Standstill {
    /// Of a stream of that `direction`.
    pub fn new(direction: Direction, movement: &Arc<Movement>, shared: bool) -> Self {
        let device = usize::from(direction == Direction::Capture);
        let (movement, since) = (Arc::clone(movement), movement.now());
        Self { device, movement, shared, moved: false, looked: None, stood: Duration::ZERO, since }
    }

    /// There is nothing that could move.
    pub fn rest(&mut self) {
        (self.looked, self.stood, self.since) = (None, Duration::ZERO, self.movement.now());
    }

    /// The stream begins anew, for the guest or for a host that has ended the session meanwhile: what it has stood still so far counts on.
    /// A machine that is slow would never come to the limit otherwise.
    pub fn begin(&mut self) {
        (self.moved, self.looked) = (false, None);
        if self.stood.is_zero() {
            // What the card moved before is no sign of what it does now.
            self.since = self.movement.now();
        }
    }

    /// A look at a stream that should move: it has `moved` since the last one, or not. True if it has stood still for too long, and that
    /// is its own affair: it has never moved, on a device that has never moved (an output without a monitor) or that moves other
    /// streams, while the card moves something else.
    ///
    /// # Errors
    /// It has stood still for too long, and the card with it, which guests share.
    pub fn look(&mut self, moved: bool, now: Instant) -> anyhow::Result<bool> {
        let since = self.looked.replace(now).map_or(Duration::ZERO, |at| now.duration_since(at).min(LOOK));
        if moved {
            self.moved = true;
            self.movement.0[self.device].fetch_add(1, Ordering::Relaxed);
            (self.stood, self.since) = (Duration::ZERO, self.movement.now());
            return Ok(false);
        }
        self.stood += since;
        if self.stood < if self.moved { LIMIT } else { START_LIMIT } {
            return Ok(false);
        }
        let card = self.movement.now();
        let moves = |device: usize| card[device] != self.since[device];
        if moves(self.device) || card[self.device] == 0 && moves(1 - self.device) {
            // A stream that has moved before is its host's to judge, which connects it again.
            self.rest();
            return Ok(!self.moved);
        }
        if self.shared {
            bail!("the card has stood still for {} ms", self.stood.as_millis());
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What plays, and what records, on a card that guests share.
    fn shared() -> [Standstill; 2] {
        let movement = Arc::default();
        [Direction::Playback, Direction::Capture].map(|direction| Standstill::new(direction, &movement, true))
    }

    fn playback() -> Standstill {
        let [playback, _] = shared();
        playback
    }

    /// Milliseconds until something comes of a stream that stands still from now on, looked at every 4 ms beside `others`; true if it is
    /// its own affair.
    fn ends_after(standstill: &mut Standstill, mut now: Instant, mut others: impl FnMut(Instant)) -> (u64, bool) {
        let begin = now;
        loop {
            let own = match standstill.look(false, now) {
                Ok(false) => None,
                Ok(true) => Some(true),
                Err(_) => Some(false),
            };
            let ms = u64::try_from((now - begin).as_millis()).unwrap();
            if let Some(own) = own {
                return (ms, own);
            }
            assert!(ms < 100_000, "nothing comes of it");
            now += Duration::from_millis(4);
            others(now);
        }
    }

    #[test]
    fn a_card_that_stands_still_is_a_failure_sooner_than_for_a_host() {
        let (mut standstill, now) = (playback(), Instant::now());
        assert_eq!(ends_after(&mut standstill, now, |_| ()), (2500, false));
        standstill = playback();
        standstill.look(true, now).unwrap();
        assert_eq!(ends_after(&mut standstill, now, |_| ()), (1500, false));
    }

    #[test]
    fn a_device_that_never_moved_is_its_streams_own_affair_while_the_card_moves_others() {
        let ([mut playback, mut capture], now) = (shared(), Instant::now());
        let mut records = |now| assert!(!capture.look(true, now).unwrap());
        for _ in 0..3 {
            playback.begin();
            assert_eq!(ends_after(&mut playback, now, &mut records), (2500, true), "also when its guest tries again");
        }
        // The other has hung before this one begins.
        playback.begin();
        assert_eq!(ends_after(&mut playback, now, |_| ()), (2500, false));
    }

    #[test]
    fn what_the_card_moved_before_a_stream_begins_is_no_excuse_for_it() {
        let movement = Arc::default();
        let [mut one, mut other] = [(); 2].map(|()| Standstill::new(Direction::Playback, &movement, true));
        let now = Instant::now();
        one.look(true, now).unwrap();
        // The other plays when this one has stopped, and stops.
        other.look(true, now).unwrap();
        one.begin();
        assert_eq!(ends_after(&mut one, now, |_| ()), (2500, false), "the card has hung meanwhile");
    }

    #[test]
    fn a_device_that_has_moved_is_to_go_on_moving_whatever_the_card_does_else() {
        let ([mut playback, mut capture], now) = (shared(), Instant::now());
        playback.look(true, now).unwrap();
        playback.begin();
        let ends = ends_after(&mut playback, now, |now| assert!(!capture.look(true, now).unwrap()));
        assert_eq!(ends, (2500, false));
    }

    #[test]
    fn one_guest_s_stream_that_stands_still_costs_nobody_that_plays_on_the_same_device() {
        let movement = Arc::default();
        let [mut one, mut other] = [(); 2].map(|()| Standstill::new(Direction::Playback, &movement, true));
        let mut now = Instant::now();
        assert_eq!(ends_after(&mut one, now, |now| assert!(!other.look(true, now).unwrap())), (2500, true));
        one.look(true, now).unwrap();
        for _ in 0..5000 {
            now += Duration::from_millis(4);
            other.look(true, now).unwrap();
            assert!(!one.look(false, now).unwrap(), "its host judges");
        }
        let (ms, own) = ends_after(&mut one, now, |_| ());
        assert!((1500..=3000).contains(&ms) && !own, "then both stand still: {ms} {own}");
    }

    #[test]
    fn of_a_card_of_one_guest_the_host_judges_all_but_a_dead_device() {
        let movement = Arc::default();
        let [mut playback, mut capture] =
            [Direction::Playback, Direction::Capture].map(|direction| Standstill::new(direction, &movement, false));
        let mut now = Instant::now();
        for _ in 0..5000 {
            now += Duration::from_millis(4);
            assert!(!playback.look(false, now).unwrap());
        }
        playback.rest();
        assert_eq!(ends_after(&mut playback, now, |now| assert!(!capture.look(true, now).unwrap())), (2500, true));
    }

    #[test]
    fn a_host_that_begins_anew_again_and_again_does_not_save_a_card_on_a_starved_machine() {
        let (mut standstill, mut now) = (playback(), Instant::now());
        let mut sessions = 0;
        let ended = (0..8).any(|_| {
            sessions += 1;
            standstill.begin();
            // The host's patience, with a look each 100 ms.
            (0..30).any(|_| {
                now += Duration::from_millis(100);
                standstill.look(false, now).is_err()
            })
        });
        assert!(ended && sessions > 1, "{sessions}");
    }

    #[test]
    fn time_in_which_nobody_looks_or_nothing_is_to_be_played_does_not_count() {
        let (mut standstill, mut now) = (playback(), Instant::now());
        standstill.look(true, now).unwrap();
        for _ in 0..50 {
            // A driver VM without a processor, a minute each time.
            now += Duration::from_secs(60);
            standstill.look(false, now).unwrap();
        }
        standstill.rest();
        now += Duration::from_secs(60);
        assert_eq!(ends_after(&mut standstill, now, |_| ()), (1500, false));
    }
}
