//! Time in which this process did not watch: it was stopped (`systemctl freeze`, Ctrl-Z in its terminal) or got no processor. The limits of
//! driver VMs, and of what comes to rest, do not run on meanwhile.
//!
//! Invariant: time in which the loop turns counts for every limit, whatever is due.

use std::time::Duration;

use super::run::Supervisor;
use crate::base::time::Time;

/// Longest wait of the loop where something is due: by how much it comes too late is known so exactly. A standby alone wakes it four times
/// a second.
const LOOK: Duration = Duration::from_secs(1);

/// Time by which the loop may come too late; more is time in which nobody has watched.
const LATE: Duration = Duration::from_millis(500);

/// When the loop has looked, and when it is to look again.
#[derive(Debug)]
pub(super) struct Presence {
    /// The end of the last wait.
    looked: Time,
    /// When the present wait is to end at the latest.
    due: Option<Time>,
}

impl Default for Presence {
    fn default() -> Self {
        Self { looked: Time::now(), due: None }
    }
}

impl Presence {
    /// The loop waits from `now` on until `due`, when something is to be done, or for [`LOOK`]: until when.
    pub(super) fn wait_until(&mut self, due: Option<Time>, now: Time) -> Option<Time> {
        let due = due.map(|due| due.max(self.looked).min(now + LOOK));
        self.due = due;
        due
    }

    /// The wait is over at `now`: for how long nobody has watched.
    fn absence(&mut self, now: Time) -> Duration {
        self.looked = now;
        let late = self.due.take().map_or(Duration::ZERO, |due| now.since(due));
        if late > LATE { late } else { Duration::ZERO }
    }
}

impl Supervisor {
    /// The loop goes on after a wait.
    pub(super) fn excuse_absence(&mut self) {
        let away = self.presence.absence(Time::now());
        if away > Duration::ZERO {
            tracing::warn!(?away, "the supervisor was stopped, or got no processor");
            self.drivers.iter_mut().for_each(|driver| driver.lifecycle.was_unwatched(away));
            self.rests_were_unwatched(away);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time(ms * 1_000_000)
    }

    #[test]
    fn only_what_comes_too_late_is_an_absence() {
        let mut presence = Presence { looked: at(1000), due: None };
        let mut away = |due: Option<u64>, from, until| {
            presence.wait_until(due.map(at), at(from));
            presence.absence(at(until)).as_millis()
        };
        assert_eq!(away(Some(1800), 1001, 1400), 0, "something came");
        assert_eq!(away(Some(1800), 1401, 2300), 0, "a busy machine");
        assert_eq!(away(Some(2400), 2300, 9400), 7000);
        assert_eq!(away(Some(60_000), 9400, 20_400), 10_000, "known to a second");
        assert_eq!(away(None, 20_400, 90_000), 0, "nothing was due");
        assert_eq!(away(Some(5), 90_001, 90_002), 0, "overdue for long, and the loop has turned");
        assert_eq!(away(Some(5), 97_002, 97_002), 7000, "stopped in its work");
    }
}
