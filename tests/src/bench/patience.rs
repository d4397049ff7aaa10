//! How long the bench waits for something that does not come.
//!
//! A wait follows progress: its time begins again with each sign of it (a line on a console, a byte of a download, an event), and
//! only a wait in which nothing moves is given up. How long nothing may move grows with the slowness of this machine, which is
//! measured once, and with the brake's.

use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::brake;

/// Rounds of the measured loop.
const ROUNDS: u32 = 10_000_000;
/// How often it is measured.
const RUNS: usize = 5;
/// What these take on the machine for which the limits in this crate are written: two cores, nothing else to do.
const REFERENCE: Duration = Duration::from_millis(if cfg!(debug_assertions) { 100 } else { 20 });
/// What a test host needs there from the start of QEMU to the first script.
const REFERENCE_BOOT: Duration = Duration::from_secs(10);
/// Slower than this no machine is taken to be: a measurement that was disturbed must not make a hang last for hours.
const SLOWEST: f64 = 32.0;

/// The slowness that boots have shown.
static BOOTS: Mutex<f64> = Mutex::new(1.0);

/// How many times slower than the reference this machine is, the brake apart: at least 1.
fn slowness() -> f64 {
    static MEASURED: OnceLock<f64> = OnceLock::new();
    *MEASURED.get_or_init(|| {
        let mut times: Vec<_> = (0..RUNS).map(|_| loop_time()).collect();
        times.sort_unstable();
        // The one in the middle: other load counts, a moment without a processor does not.
        times[RUNS / 2].as_secs_f64() / REFERENCE.as_secs_f64()
    })
}

/// How long loads, stores and steps that depend on each other take, as they are in an emulator.
fn loop_time() -> Duration {
    let start = Instant::now();
    let mut table = [0u64; 1024];
    let mut x = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..ROUNDS {
        x = x.rotate_left(13).wrapping_mul(0xbf58_476d_1ce4_e5b9) ^ table[usize::from(x.to_le_bytes()[3])];
        table[usize::from(x.to_le_bytes()[5])] = x;
    }
    std::hint::black_box(&table);
    start.elapsed()
}

/// Notes how long a test host took to boot: that tells of this machine what a loop does not, its other load and its emulator.
pub(super) fn note_boot(took: Duration) {
    let mut boots = BOOTS.lock().unwrap_or_else(PoisonError::into_inner);
    *boots = boots.max(took.as_secs_f64() / REFERENCE_BOOT.as_secs_f64());
}

/// By how much longer than on the reference machine everything in a test host may take here: from 1 to 32.
pub fn factor() -> f64 {
    let braked = slowness() / brake::speed().unwrap_or(1.0);
    let boots = *BOOTS.lock().unwrap_or_else(PoisonError::into_inner);
    braked.max(boots).clamp(1.0, SLOWEST)
}

/// [`factor`] as a whole number, for shell scripts in test hosts and guests (`UMBRA_PATIENCE`).
pub fn whole_factor() -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 1 to 32")]
    let whole = factor().ceil() as u32;
    whole
}

/// A limit as it is on this machine: the same as `umbra-probe` makes of it.
pub fn scaled(limit: Duration) -> Duration {
    limit * whole_factor()
}

/// A wait that is over when what is watched has not changed for a time limit.
#[derive(Debug)]
pub struct Stall<T> {
    seen: Option<T>,
    since: Instant,
    limit: Duration,
}

impl<T: PartialEq> Stall<T> {
    /// Nothing may move for `limit` of the reference machine.
    pub fn new(limit: Duration) -> Self {
        Self::exact(scaled(limit))
    }

    /// Nothing may move for exactly `limit`.
    pub fn exact(limit: Duration) -> Self {
        Self { seen: None, since: Instant::now(), limit }
    }

    /// How long nothing may move.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Nothing has moved for too long, with what is watched at `now`.
    pub fn is_over(&mut self, now: T) -> bool {
        if self.seen.as_ref() != Some(&now) {
            self.seen = Some(now);
            self.since = Instant::now();
        }
        self.since.elapsed() >= self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_lasts_as_long_as_something_moves() {
        let limit = Duration::from_millis(200);
        let (mut stall, start) = (Stall::exact(limit), Instant::now());
        let mut step = 0;
        while start.elapsed() < 3 * limit {
            step += 1;
            assert!(!stall.is_over(step), "given up while it moved");
            std::thread::sleep(Duration::from_millis(5));
        }
        let still = Instant::now();
        while !stall.is_over(step) {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(still.elapsed() >= limit - Duration::from_millis(50));
    }

    #[test]
    fn limits_grow_with_slowness_and_never_shrink() {
        assert!(factor() >= 1.0);
        let before = factor();
        note_boot(Duration::from_secs(1));
        assert!((factor() - before).abs() < f64::EPSILON, "a quick boot shortens nothing");
        note_boot(REFERENCE_BOOT * 6);
        assert!(factor() >= 6.0 && whole_factor() >= 6);
        assert!(scaled(Duration::from_secs(10)) >= Duration::from_secs(60));
        note_boot(REFERENCE_BOOT * 1000);
        assert!(factor() <= SLOWEST);
    }
}
