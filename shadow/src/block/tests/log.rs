//! The log against an array of sectors.

use std::sync::Arc;

use proptest::prelude::*;

use super::disk::{Value, at};
use crate::block::epochs::{Epoch, Epochs};
use crate::block::extents::{Content, Log, Longest, Presence};
use crate::block::range::SectorRange;

const SECTORS: u64 = 32;

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64),
    Zeroes(u64, u64),
    Cut(u64, u64),
    Owe(u64, u64),
    LoseLife,
    /// So many orders are written again; the last one fails.
    Rewrite(usize, bool),
    Flush,
}

/// A sector of the array: what it holds, and since when it is there; owed without.
type Sector = Option<(Value, Option<Epoch>)>;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..SECTORS, 1u64..12);
    let step = prop_oneof![
        6 => range().prop_map(|(start, count)| Step::Write(start, count)),
        1 => range().prop_map(|(start, count)| Step::Zeroes(start, count)),
        2 => range().prop_map(|(start, count)| Step::Cut(start, count)),
        1 => range().prop_map(|(start, count)| Step::Owe(start, count)),
        1 => Just(Step::LoseLife),
        2 => (0usize..6, any::<bool>()).prop_map(|(count, fails)| Step::Rewrite(count, fails)),
        2 => Just(Step::Flush),
    ];
    prop::collection::vec(step, 1..60)
}

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::between(start, (start + count).min(SECTORS)).unwrap()
}

fn sectors(range: SectorRange) -> impl Iterator<Item = usize> {
    (range.start()..range.end()).map(at)
}

/// What the log has of each sector.
fn logged(log: &Log<Arc<[Value]>>) -> Vec<Option<Value>> {
    let mut values = vec![None; at(SECTORS)];
    for (range, content) in log.extents() {
        for (n, sector) in (0..).zip(sectors(range)) {
            values[sector] = Some(match content.after(n) {
                Content::Data { buffer, skip } => {
                    let slice = log.slice(buffer, skip, 1).unwrap();
                    slice.payload[at(skip)]
                }
                _ => Value::MAX,
            });
        }
    }
    values
}

proptest! {
    /// Any order of writes, cuts, deaths, rewritings and flushes leaves what an array of sectors has; copies go with their last user.
    #[test]
    fn the_log_is_a_map_of_sectors(steps in steps()) {
        let (mut log, mut epochs) = (Log::<Arc<[Value]>>::default(), Epochs::default());
        let mut array: Vec<Sector> = vec![None; at(SECTORS)];
        let longest = Longest { data: 8, wide: 8 };
        let (mut next, mut cursor) = (1, 0);
        for step in steps {
            match step {
                Step::Write(start, count) => {
                    let range = range(start, count);
                    let values: Vec<Value> = sectors(range).map(|_| { next += 1; next }).collect();
                    sectors(range).zip(&values).for_each(|(s, v)| array[s] = Some((*v, Some(epochs.now()))));
                    let buffer = log.hold(values.into(), range.count());
                    log.insert(range, Content::Data { buffer, skip: 0 }, Presence::Here(epochs.now()));
                }
                Step::Zeroes(start, count) => {
                    let range = range(start, count);
                    sectors(range).for_each(|s| array[s] = Some((Value::MAX, Some(epochs.now()))));
                    log.insert(range, Content::Zeroes { unmap: true }, Presence::Here(epochs.now()));
                }
                Step::Cut(start, count) => {
                    sectors(range(start, count)).for_each(|s| array[s] = None);
                    log.cut(range(start, count));
                }
                Step::Owe(start, count) => {
                    sectors(range(start, count)).for_each(|s| array[s] = array[s].map(|(v, _)| (v, None)));
                    log.owe(range(start, count));
                }
                Step::LoseLife => {
                    array.iter_mut().for_each(|s| *s = s.map(|(v, _)| (v, None)));
                    prop_assert!(log.lose_life(Some(crate::Generation::FIRST)).is_empty());
                }
                Step::Rewrite(count, fails) => {
                    for n in 0..count {
                        let Some(range) = log.next_owed(cursor, false, longest) else { break };
                        cursor = range.end();
                        let run = log.rewrite(range).unwrap();
                        if let Content::Data { .. } = run.content {
                            let slices = run.slices.iter();
                            let values = slices.flat_map(|s| s.payload[at(s.skip)..at(s.skip + s.sectors)].to_vec());
                            let expected = sectors(range).map(|s| array[s].unwrap().0);
                            prop_assert_eq!(values.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
                        }
                        prop_assert!(sectors(range).all(|s| array[s].unwrap().1.is_none()), "not owed");
                        if fails && n + 1 == count {
                            prop_assert!(log.rewrite_failed(range, |_| ()).is_empty());
                        } else {
                            log.rewritten(range, epochs.now(), false);
                            sectors(range).for_each(|s| array[s] = Some((array[s].unwrap().0, Some(epochs.now()))));
                        }
                    }
                }
                Step::Flush => {
                    epochs.begin();
                    let (covers, _) = epochs.succeed().unwrap();
                    log.prune(covers, |_, _| ());
                    array.iter_mut().for_each(|s| *s = s.filter(|(_, since)| since.is_none()));
                }
            }
            prop_assert_eq!(logged(&log), array.iter().map(|s| s.map(|(v, _)| v)).collect::<Vec<_>>());
            for sector in 0..SECTORS {
                let one = SectorRange::new(sector, 1).unwrap();
                let owed = matches!(array[at(sector)], Some((_, None)));
                prop_assert_eq!((log.owes(one), log.overlaps(one)), (owed, array[at(sector)].is_some()));
            }
            let owed = array.iter().filter(|s| matches!(s, Some((_, None)))).count() as u64;
            prop_assert_eq!((log.owed_sectors(), log.owes_any()), (owed, owed > 0));
            prop_assert_eq!(log.kept_bytes(), log.logged_bytes());
            prop_assert_eq!(log.is_empty(), array.iter().all(Option::is_none));
        }
        log.cut(range(0, SECTORS));
        prop_assert_eq!((log.kept_bytes(), log.len(), log.owes_any()), (0, 0, false));
    }
}
