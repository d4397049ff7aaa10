//! How long the devices of a plan may take to appear. Pure.
//!
//! A driver finds its device when its module is loaded, so the time begins behind the last module: loading takes as long as the
//! machine is slow. So does a probe, hence a machine that has booted slowly gets more time for it.

use std::time::{Duration, Instant};

/// Shortest time for the devices to appear: the slowest probes seen take about 5 s.
const LEAST: Duration = Duration::from_secs(10);
/// More than that, this many times what the boot took: a boot, some seconds, is as long as the slowest probe on the same machine.
const BOOTS: u32 = 2;
/// Part of that time after which no further disk of a controller is expected: a second at least. A controller's disks appear together,
/// within some tenths of a second.
const SETTLING_PART: u32 = 10;

/// The time in which devices have to appear.
#[derive(Clone, Debug)]
pub struct Due {
    within: Duration,
    settling: Duration,
    /// When they could be there for the first time: with the plan, or when the device came.
    expected: Option<Instant>,
    /// When the last module was loaded.
    loaded: Option<Instant>,
}

impl Due {
    /// On a machine whose boot, to the start of this program, took `boot`.
    pub fn after_boot(boot: Duration) -> Self {
        let within = LEAST.max(boot * BOOTS);
        Self { within, settling: within / SETTLING_PART, expected: None, loaded: None }
    }

    /// The devices may take so long, whatever the machine: the firmware of an HBA starts, and hard disks spin up.
    pub fn allow(&mut self, within: Duration) {
        self.within = self.within.max(within);
    }

    /// The devices could be there from `now` on.
    pub fn expect(&mut self, now: Instant) {
        self.expected = Some(now);
    }

    /// Whether devices are expected.
    pub fn is_expected(&self) -> bool {
        self.expected.is_some()
    }

    /// All modules are loaded.
    pub fn loaded(&mut self, now: Instant) {
        self.loaded.get_or_insert(now);
    }

    /// Whether all modules are loaded.
    pub fn is_loaded(&self) -> bool {
        self.loaded.is_some()
    }

    /// Time without a new disk after which those that are there count as all.
    pub fn settling(&self) -> Duration {
        self.settling
    }

    /// They should have appeared by `now`.
    pub fn is_over(&self, now: Instant) -> bool {
        self.expected.zip(self.loaded).is_some_and(|(expected, loaded)| now > expected.max(loaded) + self.within)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_that_load_for_long_make_no_device_late() {
        let (start, s) = (Instant::now(), Duration::from_secs);
        let mut due = Due::after_boot(s(2));
        due.expect(start);
        assert!(!due.is_over(start + s(300)), "a driver is still being loaded");
        due.loaded(start + s(300));
        assert!(!due.is_over(start + s(310)) && due.is_over(start + s(311)));
    }

    #[test]
    fn a_device_that_comes_later_has_its_time_from_then_on() {
        let (start, s) = (Instant::now(), Duration::from_secs);
        let mut due = Due::after_boot(s(2));
        due.loaded(start);
        assert!(!due.is_over(start + s(10_000)), "nothing is expected yet");
        due.expect(start + s(10_000));
        assert!(!due.is_over(start + s(10_009)) && due.is_over(start + s(10_011)));
    }

    #[test]
    fn disks_have_as_long_as_the_host_allows_and_settle_as_soon() {
        let (start, s) = (Instant::now(), Duration::from_secs);
        let mut due = Due::after_boot(s(2));
        let settling = due.settling();
        due.allow(s(45));
        due.loaded(start);
        due.expect(start);
        assert!(!due.is_over(start + s(44)) && due.is_over(start + s(46)));
        assert_eq!(due.settling(), settling);
    }

    #[test]
    fn a_machine_that_boots_slowly_probes_slowly() {
        let (start, s) = (Instant::now(), Duration::from_secs);
        let mut due = Due::after_boot(s(30));
        due.loaded(start);
        due.expect(start);
        assert!(!due.is_over(start + s(59)) && due.is_over(start + s(61)));
    }
}
