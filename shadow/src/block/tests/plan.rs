//! What one case of the model test is like: the disk, the bounds, and what goes wrong.

use super::disk::Faults;
use super::random::Random;
use crate::block::range::SectorRange;
use crate::block::{CachePolicy, Identity, Limits, Window, WriteCache};

/// Sectors of the guest's disk: few, so that requests meet.
pub(super) const SECTORS: u64 = 40;
/// Where it begins on the driver VM's disk.
pub(super) const START: u64 = 5;

/// Kinds of cases: some are calm, some have one kind of fault each, and two more:
const KINDS: u64 = 12;
const OWN_RESETS: u64 = 10;
const MANY_DEATHS: u64 = 11;
/// How often each policy is used.
const POLICIES: [CachePolicy; 8] = {
    use CachePolicy::{Auto, Through, Volatile};
    [Auto, Auto, Auto, Auto, Auto, Auto, Volatile, Through]
};

/// One case.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) steps: u64,
    /// Requests of the guest in progress at once.
    pub(super) requests: usize,
    /// Of a hundred requests, so many are reads.
    pub(super) read_percent: u64,
    /// What the driver VM of the present life offers.
    pub(super) depth: u16,
    pub(super) cache: WriteCache,
    /// Whether the next life may offer something else.
    is_changeable: bool,
    pub(super) policy: CachePolicy,
    pub(super) guest_flushes: bool,
    pub(super) limits: Limits,
    pub(super) faults: Faults,
    /// The step from which they are.
    pub(super) faults_from: u64,
    /// Of a hundred sectors of the cache, so many are lost in a reset.
    pub(super) loss_percent: u64,
    /// Nothing goes wrong but that driver VMs die, never three in a row before the service is back: no request may fail.
    pub(super) is_calm: bool,
    /// Of a hundred steps, in so many the driver resets its controller by itself.
    pub(super) own_reset_percent: u64,
    /// Of a hundred steps, in so many another guest of the disk flushes, and of a hundred driver VMs so many bring another disk.
    pub(super) others_percent: u64,
    /// Where a life ends, it may be its connection alone: the driver VM serves other guests.
    pub(super) connections_end: bool,
    /// Of a hundred steps, in so many the driver VM dies.
    pub(super) death_percent: u64,
    /// Two orders in flight that conflict are an error by themselves. Off where a rule is broken: what follows must show it.
    pub(super) is_strict: bool,
    /// Sectors that most requests go to.
    hot: u64,
}

impl Plan {
    pub(super) fn any(random: &mut Random) -> Self {
        let kind = random.below(KINDS);
        let hot = random.pick(&[4, 12, SECTORS]);
        let steps = 30 + random.below(130);
        let mut plan = Self {
            steps,
            requests: random.pick(&[2, 8, 8]),
            read_percent: random.pick(&[15, 30, 60]),
            faults_from: random.below(steps / 2),
            depth: Self::any_depth(random),
            cache: if random.percent(85) { WriteCache::Volatile } else { WriteCache::None },
            is_changeable: random.percent(15),
            policy: random.pick(&POLICIES),
            guest_flushes: random.percent(92),
            limits: Self::any_limits(random),
            faults: Self::any_faults(kind, hot, random),
            loss_percent: random.pick(&[0, 50, 100, 100]),
            is_calm: kind < 4,
            own_reset_percent: 1,
            others_percent: 0,
            connections_end: random.percent(30),
            death_percent: 3,
            is_strict: super::broken::is_sound(),
            hot,
        };
        match kind {
            OWN_RESETS => {
                (plan.own_reset_percent, plan.death_percent, plan.loss_percent) = (12, 8, 100);
                plan.others_percent = 8;
            }
            MANY_DEATHS => {
                (plan.death_percent, plan.is_changeable, plan.policy) = (12, true, CachePolicy::Through);
            }
            _ => {}
        }
        plan
    }

    fn any_depth(random: &mut Random) -> u16 {
        random.pick(&[1, 2, 3, 4, 8, 8])
    }

    /// A new life.
    pub(super) fn change(&mut self, random: &mut Random) {
        if self.is_changeable {
            self.depth = Self::any_depth(random);
            self.cache = random.pick(&[WriteCache::Volatile, WriteCache::None]);
        }
    }

    fn any_limits(random: &mut Random) -> Limits {
        Limits {
            bytes: 512 * random.pick(&[16, 24, 200]),
            extents: random.pick(&[6, 12, 64]),
            age_ns: 2_000_000_000,
            part_sectors: random.pick(&[4, 8]),
            wide_sectors: random.pick(&[8, 16]),
            stall_ns: 10_000_000_000,
            slow_ns: 90_000_000_000,
            quiesce_ns: 10_000_000_000,
        }
    }

    fn any_faults(kind: u64, hot: u64, random: &mut Random) -> Faults {
        let mut faults = Faults::default();
        let sector = START + random.below(hot);
        match kind {
            4 => faults.medium_percent = 30,
            5 => _ = faults.bad.insert(sector),
            6 => _ = faults.flaky.insert(sector),
            7 => _ = faults.deadly.insert(sector),
            8 => (faults.eio_percent, faults.discard_percent) = (8, 30),
            9 => faults.flush_percent = 35,
            _ => {}
        }
        faults
    }

    pub(super) fn identity(&self) -> Identity {
        Identity {
            serial: "model".into(),
            sectors: START + SECTORS + 3,
            logical_block: 512,
            read_only: false,
            window: Window { start: START, sectors: SECTORS },
        }
    }

    /// A disk that says that it has no cache has one where users say so.
    pub(super) fn has_cache(&self) -> bool {
        self.cache == WriteCache::Volatile || self.policy == CachePolicy::Volatile
    }

    pub(super) fn is_stable_first(&self) -> bool {
        self.policy == CachePolicy::Through || !self.guest_flushes
    }

    pub(super) fn has_medium_errors(&self) -> bool {
        !self.faults.bad.is_empty() || self.faults.medium_percent > 0 || self.faults.discard_percent > 0
    }

    /// A range that a request is about.
    pub(super) fn any_range(&self, is_read: bool, random: &mut Random) -> SectorRange {
        let longest = if random.percent(15) { 12 } else { 4 + 4 * u64::from(!is_read) };
        let count = 1 + random.below(longest);
        let start = if random.percent(20) { random.below(SECTORS) } else { random.below(self.hot) };
        if count > 7 && random.percent(60) {
            // A whole block, by which the disk can be recognised.
            return SectorRange::new(start / 8 * 8, 8).unwrap();
        }
        SectorRange::new(start.min(SECTORS - count), count).unwrap()
    }
}
