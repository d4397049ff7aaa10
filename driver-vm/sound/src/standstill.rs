//! A card that several guests share and that stands still. Each guest's host sees its own streams alone, and is not believed against the
//! others: the service itself has to look, and ends.

use std::time::{Duration, Instant};

use anyhow::bail;

/// Most time that counts between two looks, which are some milliseconds apart: a driver VM that gets no processor does not look.
const LOOK: Duration = Duration::from_millis(20);
/// Longest time in which a stream that has moved may stand still although the card should move it; less than the 2 s after which its
/// host ends the session, and all would begin anew.
const LIMIT: Duration = Duration::from_millis(1500);
/// The same before its first movement, for which a host has 3 s of patience: codecs may need a while to power up.
const START_LIMIT: Duration = Duration::from_millis(2500);

/// How long a stream has stood still.
#[derive(Debug, Default)]
pub struct Standstill {
    moved: bool,
    looked: Option<Instant>,
    stood: Duration,
}

impl Standstill {
    /// There is nothing that could move.
    pub fn rest(&mut self) {
        (self.looked, self.stood) = (None, Duration::ZERO);
    }

    /// The stream begins anew, for the guest or for a host that has ended the session meanwhile: what it has stood still so far counts on.
    /// A machine that is slow would never come to the limit otherwise.
    pub fn begin(&mut self) {
        (self.moved, self.looked) = (false, None);
    }

    /// A look at a stream that should move: it has `moved` since the last one, or not.
    ///
    /// # Errors
    /// It has stood still for too long.
    pub fn look(&mut self, moved: bool, now: Instant) -> anyhow::Result<()> {
        let since = self.looked.replace(now).map_or(Duration::ZERO, |at| now.duration_since(at).min(LOOK));
        self.moved |= moved;
        self.stood = if moved { Duration::ZERO } else { self.stood + since };
        let limit = if self.moved { LIMIT } else { START_LIMIT };
        if self.stood >= limit {
            bail!("the card has stood still for {} ms", self.stood.as_millis());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Milliseconds until a stream that stands still from now on ends the service, looked at every 4 ms.
    fn ends_after(standstill: &mut Standstill, mut now: Instant) -> u64 {
        let begin = now;
        while standstill.look(false, now).is_ok() {
            now += Duration::from_millis(4);
        }
        u64::try_from((now - begin).as_millis()).unwrap()
    }

    #[test]
    fn a_card_that_stands_still_is_a_failure_sooner_than_for_a_host() {
        let (mut standstill, now) = (Standstill::default(), Instant::now());
        assert_eq!(ends_after(&mut standstill, now), 2500);
        standstill = Standstill::default();
        standstill.look(true, now).unwrap();
        assert_eq!(ends_after(&mut standstill, now), 1500);
    }

    #[test]
    fn a_host_that_begins_anew_again_and_again_does_not_save_a_card_on_a_starved_machine() {
        let (mut standstill, mut now) = (Standstill::default(), Instant::now());
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
        let (mut standstill, mut now) = (Standstill::default(), Instant::now());
        standstill.look(true, now).unwrap();
        for _ in 0..50 {
            // A driver VM without a processor, a minute each time.
            now += Duration::from_secs(60);
            standstill.look(false, now).unwrap();
        }
        standstill.rest();
        now += Duration::from_secs(60);
        assert_eq!(ends_after(&mut standstill, now), 1500);
    }
}
