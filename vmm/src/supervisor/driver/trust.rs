//! Whether lives that are restored from a driver VM's snapshot live. A file may be whole, and KVM may take it, and yet be of a kernel that
//! was about to fail: each life from it would.
//!
//! Invariant: after [`MOST_DEATHS`] restored lives in a row that ended before they said hello the snapshot is not used, until another one
//! is taken in its place. A single one may have been killed.

use umbra_shadow::Generation;

/// Restored lives in a row that may end before they say hello.
const MOST_DEATHS: u32 = 2;

/// What restored lives have come to.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct Trust {
    /// The one that was restored last, while it has not said hello.
    silent: Option<Generation>,
    /// Those before it, in a row, that never did.
    deaths: u32,
}

impl Trust {
    /// The life `generation` was restored. `lives` says which are there.
    pub(super) fn restored(&mut self, generation: Generation, lives: impl Fn(Generation) -> bool) {
        self.deaths += u32::from(self.has_died(lives));
        self.silent = Some(generation);
    }

    /// The life `generation` says hello.
    pub(super) fn said_hello(&mut self, generation: Generation) {
        if self.silent == Some(generation) {
            *self = Self::default();
        }
    }

    /// The life `generation` is not wanted any more: its end says nothing.
    pub(super) fn unwanted(&mut self, generation: Generation) {
        self.silent = self.silent.filter(|silent| *silent != generation);
    }

    /// Another snapshot is taken.
    pub(super) fn taken(&mut self) {
        *self = Self::default();
    }

    /// Whether the snapshot is not to be used.
    pub(super) fn is_lost(&self, lives: impl Fn(Generation) -> bool) -> bool {
        self.deaths + u32::from(self.has_died(lives)) >= MOST_DEATHS
    }

    fn has_died(&self, lives: impl Fn(Generation) -> bool) -> bool {
        self.silent.is_some_and(|silent| !lives(silent))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn generation(n: u32) -> Generation {
        Generation::new(n).unwrap()
    }

    const NONE: fn(Generation) -> bool = |_| false;

    #[test]
    fn lives_that_never_say_hello_cost_the_snapshot_its_trust_until_another_is_taken() {
        let mut trust = Trust::default();
        assert!(!trust.is_lost(NONE));
        trust.restored(generation(2), NONE);
        assert!(!trust.is_lost(NONE), "it may have been killed");
        trust.restored(generation(3), NONE);
        assert!(!trust.is_lost(|life| life == generation(3)), "it still has time");
        assert!(trust.is_lost(NONE));
        trust.taken();
        assert!(!trust.is_lost(NONE));
    }

    #[test]
    fn one_that_says_hello_or_is_not_wanted_counts_for_nothing() {
        let mut trust = Trust::default();
        trust.restored(generation(2), NONE);
        trust.restored(generation(3), NONE);
        trust.said_hello(generation(3));
        trust.restored(generation(4), NONE);
        trust.unwanted(generation(4));
        trust.restored(generation(5), NONE);
        assert!(!trust.is_lost(NONE));
        // A standby that is restored while the present life has not said hello yet.
        trust.restored(generation(6), |life| life == generation(5));
        assert!(!trust.is_lost(NONE));
    }
}
