//! Numbers that look random and repeat with their seed: SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number
//! generators", OOPSLA 2014).

/// What is added for each number: the golden ratio in 64 bits.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// A sequence of numbers that its seed determines.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From seed 0, `n` numbers on.
    pub(crate) fn from_nth(n: u64) -> Self {
        Self(n.wrapping_mul(STEP))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 if there is none.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }

    /// True with this probability: never at 0, always at 1.
    pub(crate) fn chance(&mut self, probability: f64) -> bool {
        // 53 bits, which a double holds exactly: at least 0, below 1.
        let unit = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        unit < probability
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chances_are_as_said_and_repeat_with_the_seed() {
        let hits = |seed, p| {
            let mut random = Random::new(seed);
            (0..10_000).filter(|_| random.chance(p)).count()
        };
        assert_eq!((hits(1, 0.0), hits(1, 1.0)), (0, 10_000));
        assert!((4_500..5_500).contains(&hits(1, 0.5)));
        assert_eq!(hits(7, 0.3), hits(7, 0.3));
        assert_ne!(hits(7, 0.3), hits(8, 0.3));
        assert_eq!(Random::new(1).below(0), 0);
    }
}
