//! What the disk keeps and what it may lose, against a reference: random requests, losses and reconnections.

use std::collections::BTreeSet;
use std::fs;

use proptest::prelude::*;

use super::{BYTES, Client, Rig, SECTORS, firsts, sectors};
use crate::lossy_disk::protocol::{NBD_CMD_FLAG_FUA, NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES};
use crate::lossy_disk::{SECTOR, Settings};

#[derive(Clone, Debug)]
enum Step {
    Write {
        first: u8,
        count: u8,
        flags: u16,
    },
    Zero {
        first: u8,
        count: u8,
        flags: u16,
        command: u16,
    },
    Read {
        first: u8,
        count: u8,
    },
    Flush,
    /// Writes and a flush that wait together and are served in any order.
    Batch {
        writes: [(u8, u8); 3],
        flush: usize,
    },
    Lose {
        tenths: u8,
    },
    Reconnect,
}

fn step() -> impl Strategy<Value = Step> {
    let limit = u8::try_from(SECTORS).unwrap();
    let range = (0..limit).prop_flat_map(move |first| (Just(first), 1..=(limit - first).min(12)));
    let flags = prop_oneof![4 => Just(0), 1 => Just(NBD_CMD_FLAG_FUA)];
    let command = prop_oneof![Just(NBD_CMD_TRIM), Just(NBD_CMD_WRITE_ZEROES)];
    prop_oneof![
        8 => (range.clone(), flags.clone()).prop_map(|((first, count), flags)| Step::Write { first, count, flags }),
        2 => (range.clone(), flags, command)
            .prop_map(|((first, count), flags, command)| Step::Zero { first, count, flags, command }),
        2 => (prop::array::uniform3(range.clone()), 0..4usize)
            .prop_map(|(writes, flush)| Step::Batch { writes, flush }),
        3 => range.prop_map(|(first, count)| Step::Read { first, count }),
        2 => Just(Step::Flush),
        2 => prop_oneof![Just(10), Just(0), 1..10u8].prop_map(|tenths| Step::Lose { tenths }),
        1 => Just(Step::Reconnect),
    ]
}

/// A sector of the reference: what reads give, and what the base may hold.
#[derive(Clone, Debug)]
struct Sector {
    now: u8,
    base: BTreeSet<u8>,
}

struct Reference {
    sectors: Vec<Sector>,
    is_written_back: bool,
}

impl Reference {
    fn write(&mut self, first: u8, count: u8, byte: u8, flags: u16) {
        for sector in &mut self.sectors[usize::from(first)..usize::from(first + count)] {
            sector.now = byte;
            if flags & NBD_CMD_FLAG_FUA != 0 {
                sector.base.clear();
            }
            if flags & NBD_CMD_FLAG_FUA != 0 || self.is_written_back {
                sector.base.insert(byte);
            }
        }
    }

    fn flush(&mut self) {
        for sector in &mut self.sectors {
            sector.base = BTreeSet::from([sector.now]);
        }
    }

    /// Writes whose order is not known, and a flush among them: what was there before is in the base, if it is not overwritten.
    fn batch(&mut self, writes: &[(u8, u8)], first_byte: u8, read: &[u8]) {
        for ((n, sector), &byte) in (0..).zip(&mut self.sectors).zip(read) {
            let touches = |(first, count): (u8, u8)| (first..first + count).contains(&n);
            let written: Vec<u8> =
                (first_byte..).zip(writes).filter(|(_, write)| touches(**write)).map(|(byte, _)| byte).collect();
            assert!(if written.is_empty() { byte == sector.now } else { written.contains(&byte) });
            sector.base = BTreeSet::from([sector.now]);
            sector.base.extend(written);
            sector.now = byte;
        }
    }

    /// After a loss a sector is as it was, or as in the base. Where all was lost, the base is known again.
    fn lose(&mut self, tenths: u8, read: &[u8]) {
        for (sector, &byte) in self.sectors.iter_mut().zip(read) {
            let may_be_kept = tenths < 10 && byte == sector.now;
            assert!(may_be_kept || (tenths > 0 && sector.base.contains(&byte)), "{byte} instead of {sector:?}");
            sector.now = byte;
            if tenths == 10 {
                sector.base = BTreeSet::from([byte]);
            }
        }
    }
}

fn check(steps: &[Step], settings: &Settings) {
    let rig = Rig::with(settings);
    let mut client = rig.client();
    let sector = Sector { now: 0, base: BTreeSet::from([0]) };
    let count = usize::try_from(SECTORS).unwrap();
    let mut reference = Reference { sectors: vec![sector; count], is_written_back: settings.write_back > 0.0 };
    let offset = |first: u8| u64::from(first) * SECTOR as u64;
    let length = |count: u8| u32::from(count) * u32::try_from(SECTOR).unwrap();
    let mut next_byte = 1;
    for step in steps {
        let byte = next_byte;
        next_byte += 1;
        match *step {
            Step::Write { first, count, flags } => {
                let data = sectors(usize::from(count), byte);
                client.ask(NBD_CMD_WRITE, flags, offset(first), length(count), &data).unwrap();
                reference.write(first, count, byte, flags);
            }
            Step::Zero { first, count, flags, command } => {
                client.ask(command, flags, offset(first), length(count), &[]).unwrap();
                reference.write(first, count, 0, flags);
            }
            Step::Read { first, count } => {
                let data = client.ask(NBD_CMD_READ, 0, offset(first), length(count), &[]).unwrap();
                let want = &reference.sectors[usize::from(first)..usize::from(first + count)];
                assert_eq!(firsts(&data), want.iter().map(|sector| sector.now).collect::<Vec<_>>());
                assert!(data.chunks(SECTOR).all(|sector| sector.iter().all(|&byte| byte == sector[0])));
            }
            Step::Flush => {
                client.flush().unwrap();
                reference.flush();
                assert_eq!(rig.disk.state().unflushed, 0);
            }
            Step::Batch { writes, flush } => {
                next_byte += 2;
                rig.disk.stall();
                for (n, (first, count)) in writes.into_iter().enumerate() {
                    if n == flush {
                        client.start_flush();
                    }
                    client.start_write(offset(first), &sectors(usize::from(count), byte + u8::try_from(n).unwrap()));
                }
                if flush == writes.len() {
                    client.start_flush();
                }
                rig.wait(|state| state.waiting == writes.len() + 1);
                rig.disk.resume();
                for _ in 0..=writes.len() {
                    assert_eq!(client.answer().unwrap().1, 0);
                }
                let data = client.read(0, u32::try_from(BYTES).unwrap()).unwrap();
                reference.batch(&writes, byte, &firsts(&data));
            }
            Step::Lose { tenths } => {
                let before = rig.disk.state().unflushed;
                let loss = rig.disk.lose(f64::from(tenths) / 10.0);
                assert_eq!(loss.lost + loss.kept, before);
                let data = client.read(0, u32::try_from(BYTES).unwrap()).unwrap();
                reference.lose(tenths, &firsts(&data));
            }
            Step::Reconnect => client = Client::new(&rig.disk),
        }
        let base = firsts(&fs::read(&rig.base).unwrap());
        for (n, (sector, byte)) in reference.sectors.iter().zip(base).enumerate() {
            assert!(sector.base.contains(&byte), "{byte} in the base at {n} after {step:?}, not {sector:?}");
        }
    }
    assert_eq!(rig.disk.state().host_errors, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    /// Nothing reaches the base unasked, so a total loss brings back exactly what was flushed.
    #[test]
    fn a_loss_takes_what_was_not_flushed(steps in prop::collection::vec(step(), 1..60), seed: u64) {
        check(&steps, &Settings { seed, write_back: 0.0, ..Settings::default() });
    }

    /// With sectors that go to the base unasked, one by one, and with a cache that is too small.
    #[test]
    fn what_is_flushed_is_kept_however_the_cache_is_written_back(
        steps in prop::collection::vec(step(), 1..60),
        seed: u64,
        cache_sectors in 1usize..80,
    ) {
        check(&steps, &Settings { seed, write_back: 0.5, cache_sectors, ignores_fua: false });
    }
}
