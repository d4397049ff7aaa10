//! What each life of the attacked driver VM does: a function of the campaign's seed and of the life's generation, so that the bench and the
//! program in the driver VM, which never speak with each other, agree on it. And what each life of a hostile guest does. Pure.
//!
//! Every fourth life of a driver VM is honest. The others work off rounds, in each of which every attack has its turn, in an order that
//! the seed gives.

use serde::Serialize;

use crate::random::Random;

/// Every so many lives, and the first one, serve honestly: the guest is served again after each few attacks.
const HONEST_EVERY: u32 = 4;

/// What a life does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attack {
    /// Nothing: it serves.
    Honest,
    /// The carrier goes up and down without a pause.
    CarrierFlood,
    /// It greets as another generation, also those before it.
    WrongGeneration,
    /// It forwards, has a carrier, has disks and a card, in any order, before it has a NIC.
    Unasked,
    /// A line that has no end.
    EndlessLine,
    /// Control characters, quotes and line ends in what it calls its kernel, driver and interface, as long as a line may be.
    ControlCharacters,
    /// Bytes that are no lines.
    Garbage,
    /// Values of any other type and size in what the agent really says.
    Mutations,
    /// Messages nested as deep as a line is long.
    Nesting,
    /// Heartbeats without a pause.
    HeartbeatFlood,
    /// It says nothing any more, and reads nothing.
    Mute,
    /// It hears everything, and says what it has to say late, behind heartbeats that are in time.
    Late,
    /// The console: floods, escape sequences, panics that are none, lines without end.
    Console,
    /// The rings, registers and features of its virtio devices, by no rule.
    Rings,
    /// All doorbells of all virtio devices, without a pause.
    Kicks,
    /// Frames for the guest by good rings, with headers that promise anything, from any address.
    Headers,
    /// Interrupt vectors that point anywhere, and interrupts.
    Vectors,
    /// Anything in any register of any function.
    Registers,
    /// Anything in any configuration space.
    Config,
    /// BARs over memory, over each other and over the interrupt controllers.
    Bars,
    /// Its NIC reads and writes memory at addresses that are not the VM's (of the model rtl8139).
    Dma,
}

/// All attacks, in the order of tables.
pub const ATTACKS: [Attack; 20] = [
    Attack::CarrierFlood,
    Attack::WrongGeneration,
    Attack::Unasked,
    Attack::EndlessLine,
    Attack::ControlCharacters,
    Attack::Garbage,
    Attack::Mutations,
    Attack::Nesting,
    Attack::HeartbeatFlood,
    Attack::Mute,
    Attack::Late,
    Attack::Console,
    Attack::Rings,
    Attack::Kicks,
    Attack::Headers,
    Attack::Vectors,
    Attack::Registers,
    Attack::Config,
    Attack::Bars,
    Attack::Dma,
];

/// What a guest can try of them: it has no control stream, and no device that does DMA.
pub const OF_GUESTS: [Attack; 7] =
    [Attack::Rings, Attack::Kicks, Attack::Headers, Attack::Vectors, Attack::Registers, Attack::Config, Attack::Bars];

/// The attack of life `life` (from 0) of a hostile guest, and what chooses the rest.
pub(super) fn of_guest(seed: u64, life: u32) -> (Attack, Random) {
    let turn = life as usize;
    let attack = order(OF_GUESTS, seed, turn / OF_GUESTS.len())[turn % OF_GUESTS.len()];
    (attack, Random::new(seed ^ Random::from_nth(u64::from(life)).next()))
}

impl Attack {
    /// It is one on devices. Its agent is left behind: the program beats in its place.
    pub fn is_on_devices(self) -> bool {
        self >= Self::Rings
    }

    /// A life that does this must not live on.
    pub fn has_to_be_stopped(self) -> bool {
        matches!(
            self,
            Self::CarrierFlood
                | Self::WrongGeneration
                | Self::EndlessLine
                | Self::Garbage
                | Self::Nesting
                | Self::HeartbeatFlood
                | Self::Mute
        )
    }
}

/// When in its life it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Moment {
    /// It has learnt which life it is: as a standby, or while a guest waits for it.
    Begun,
    /// It has learnt what it is to serve.
    Configured,
    /// Its NIC has a driver.
    Nic,
    /// It forwards.
    Forwarding,
}

/// All moments, in the order in which a life comes to them.
pub const MOMENTS: [Moment; 4] = [Moment::Begun, Moment::Configured, Moment::Nic, Moment::Forwarding];

/// What one life does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What.
    pub attack: Attack,
    /// When.
    pub moment: Moment,
    /// Chooses the rest.
    pub(super) random: Random,
}

impl Plan {
    /// That of life `generation` (from 1) of the campaign `seed`.
    pub fn of(seed: u64, generation: u32) -> Self {
        let mut random = Random::new(seed ^ Random::from_nth(u64::from(generation)).next());
        let before = generation.saturating_sub(1);
        let attack = if before.is_multiple_of(HONEST_EVERY) {
            Attack::Honest
        } else {
            let turn = (before - before / HONEST_EVERY - 1) as usize;
            order(ATTACKS, seed, turn / ATTACKS.len())[turn % ATTACKS.len()]
        };
        // Devices are there later than the stream, and the NIC last.
        let first = if attack == Attack::Dma { 2 } else { usize::from(attack.is_on_devices()) };
        let moment = MOMENTS[first + index(&mut random, MOMENTS.len() - first)];
        Self { attack, moment, random }
    }
}

/// The attacks in the order of this round.
fn order<const N: usize>(attacks: [Attack; N], seed: u64, round: usize) -> [Attack; N] {
    let mut random = Random::new(seed ^ Random::from_nth(!(round as u64)).next());
    let mut order = attacks;
    for last in (1..order.len()).rev() {
        order.swap(last, index(&mut random, last + 1));
    }
    order
}

/// A place in a list of this length, which is not 0.
pub(super) fn index(random: &mut Random, length: usize) -> usize {
    usize::try_from(random.below(length as u64)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn attacks(seed: u64, lives: u32) -> Vec<Attack> {
        (1..=lives).map(|generation| Plan::of(seed, generation).attack).collect()
    }

    #[test]
    fn every_attack_has_its_turn_between_honest_lives_and_the_seed_repeats_it() {
        let round = u32::try_from(ATTACKS.len()).unwrap();
        let lives = attacks(7, round.div_ceil(3) * 4);
        assert!(lives.chunks(4).all(|four| four[0] == Attack::Honest && !four[1..].contains(&Attack::Honest)));
        let turns: Vec<_> = lives.iter().filter(|attack| **attack != Attack::Honest).take(ATTACKS.len()).collect();
        assert_eq!(turns.iter().copied().collect::<BTreeSet<_>>().len(), ATTACKS.len());
        assert_eq!(lives, attacks(7, round.div_ceil(3) * 4));
        assert_ne!(lives, attacks(8, round.div_ceil(3) * 4));
        let moments = |seed| (1..100).map(|generation| Plan::of(seed, generation).moment).collect::<BTreeSet<_>>();
        assert_eq!(moments(7).len(), MOMENTS.len());
    }

    #[test]
    fn a_guest_tries_all_that_it_can_before_it_repeats_itself() {
        let lives = |seed| (0..7).map(|life| of_guest(seed, life).0).collect::<Vec<_>>();
        assert_eq!(BTreeSet::from_iter(lives(7)), BTreeSet::from(OF_GUESTS));
        assert!(lives(7) == lives(7) && lives(7) != lives(8));
        assert!(OF_GUESTS.iter().all(|attack| attack.is_on_devices() && *attack != Attack::Dma));
    }

    #[test]
    fn what_a_plan_chooses_repeats_with_it() {
        let draw = |seed, generation| Plan::of(seed, generation).random.next();
        assert_eq!(draw(3, 2), draw(3, 2));
        assert_ne!(draw(3, 2), draw(3, 3));
        assert_ne!(draw(3, 2), draw(4, 2));
    }
}
