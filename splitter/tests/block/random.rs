//! Random requests over lives and sessions that end at any moment, with and without what was in the disk's cache.

use proptest::prelude::*;

use crate::guest::{Guest, attached, attached_again, greeted, serve, serve_and_flush};
use crate::medium::Medium;
use crate::vm::Vm;

/// Numbers that follow from a seed (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

fn request(guest: &mut Guest, numbers: &mut Numbers) {
    let long = if numbers.below(16) == 0 { 3000 } else { 24 };
    let (start, count) = (numbers.below(200), 1 + numbers.below(long));
    match numbers.below(8) {
        0..4 => guest.write(start, count),
        4..6 => guest.read(start, count),
        6 => guest.zero(start, count),
        _ => guest.flush(),
    };
}

/// The service does some of its orders, in any order.
fn work(vm: &mut Vm, medium: &mut Medium, numbers: &mut Numbers) {
    vm.receive();
    for _ in 0..numbers.below(6) {
        if vm.asked.is_empty() || vm.tx.free() < 2 {
            return;
        }
        let which = usize::try_from(numbers.below(vm.asked.len() as u64)).unwrap();
        let asked = vm.asked.remove(which).unwrap();
        let answer = vm.carry_out(&asked, medium);
        vm.say(answer);
    }
}

fn run(seed: u64) {
    let (mut guest, mut medium, mut numbers) = (Guest::new(), Medium::new(), Numbers(seed));
    let mut life = 1;
    let mut vm = greeted(&mut guest, life);
    for round in 0..4 + numbers.below(4) {
        for _ in 0..numbers.below(40) {
            if guest.waiting() < 48 {
                request(&mut guest, &mut numbers);
            }
            work(&mut vm, &mut medium, &mut numbers);
            guest.turn();
        }
        if round % 2 == 1 {
            // What is in flight at three deaths in a row would be held for their cause.
            serve(&mut guest, &mut vm, &mut medium);
        }
        let is_same = numbers.below(3) == 0;
        // Some is done, and nobody hears of it.
        while let Some(asked) = vm.asked.pop_front() {
            if is_same || numbers.below(2) == 0 {
                vm.carry_out(&asked, &mut medium);
            }
        }
        if is_same {
            attached_again(&mut guest, &mut vm);
        } else {
            life += 1;
            let keeps = numbers.below(3);
            medium.lose_cache(|| numbers.below(2) < keeps);
            vm = attached(&mut guest, life);
        }
        vm.greet();
    }
    serve_and_flush(&mut guest, &mut vm, &mut medium);
    guest.assert_stable(&medium);
    assert!(guest.finished().iter().all(|(_, status)| *status == umbra_shadow::block::Status::Ok), "seed {seed}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_was_acknowledged_stays_whatever_dies_and_is_lost(seed: u64) {
        run(seed);
    }
}
