//! Any sequence of requests and deaths.

use proptest::prelude::*;

use super::*;

/// What a guest does, or what happens to its driver VM.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write {
        sector: u64,
        sectors: usize,
        byte: u8,
    },
    Zeroes {
        sector: u64,
        sectors: usize,
    },
    Read {
        sector: u64,
        sectors: usize,
    },
    Flush,
    /// The driver VM dies while the guest writes, and its disk loses its cache.
    Death {
        sector: u64,
        sectors: usize,
        byte: u8,
    },
    /// The connection is made again.
    Reconnect,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0u64..40, 1usize..24);
    prop_oneof![
        4 => (place(), any::<u8>()).prop_map(|((sector, sectors), byte)| Step::Write { sector, sectors, byte }),
        1 => place().prop_map(|(sector, sectors)| Step::Zeroes { sector, sectors }),
        3 => place().prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        1 => Just(Step::Flush),
        2 => (place(), any::<u8>()).prop_map(|((sector, sectors), byte)| Step::Death { sector, sectors, byte }),
        1 => Just(Step::Reconnect),
    ]
}

impl Bench {
    /// The driver VM of `link` dies with an order in flight; the next one comes.
    fn die_writing(&mut self, link: &mut LinkId, sector: u64, byte: u8, sectors: usize) {
        self.vm.as_mut().unwrap().hold(true);
        let write = self.add(&[&header(OUT, sector), &vec![byte; 512 * sectors]], &[1]);
        self.turn();
        let medium = self.kill(false);
        *link = LinkId::first(link.generation.next());
        self.live(*link, medium);
        assert_eq!(self.answered(1), [(write, 1)]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Through any number of lives and lost caches the guest reads what it wrote last.
    #[test]
    fn a_guest_reads_what_it_wrote_last(steps in prop::collection::vec(step(), 1..40)) {
        let (mut bench, mut link, mut model) = (Bench::new(), first(), vec![0; 512 * 64]);
        let extent = |sector: u64, sectors: usize| 512 * sector as usize..512 * (sector as usize + sectors);
        bench.live(link, empty());
        for step in steps {
            match step {
                Step::Write { sector, sectors, byte } => {
                    bench.write(sector, byte, sectors);
                    model[extent(sector, sectors)].fill(byte);
                }
                Step::Zeroes { sector, sectors } => {
                    let range = segment(sector, sectors as u32, 0);
                    prop_assert_eq!(bench.request(&[&header(ZEROES, 0), &range], &[1]).0, 0);
                    model[extent(sector, sectors)].fill(0);
                }
                Step::Read { sector, sectors } => {
                    prop_assert_eq!(&bench.read(sector, sectors), &model[extent(sector, sectors)]);
                }
                Step::Flush => bench.flush(),
                Step::Death { sector, sectors, byte } => {
                    bench.die_writing(&mut link, sector, byte, sectors);
                    model[extent(sector, sectors)].fill(byte);
                }
                Step::Reconnect => {
                    link = link.next();
                    bench.reconnect(link);
                }
            }
        }
        prop_assert_eq!(&bench.read(0, 64), &model);
        bench.flush();
        let medium = bench.kill(false);
        prop_assert_eq!(bytes_at(&medium, 0, 64), model);
    }
}
