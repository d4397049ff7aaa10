//! Each rule by an example: errors, deaths, resets, quarantine, and which disk it is.

use super::host::{Host, identity, link};
use crate::LinkId;
use crate::block::{
    Access, Answer, CachePolicy, ErrorClass, Failure, Identity, Limits, Mismatch, ModeName, NotTaken, Out, Status, Tag,
    Violation, WriteCache,
};

const OK: Status = Status::Ok;
const IO_ERROR: Status = Status::IoError;
const NOTHING: [String; 0] = [];

#[test]
fn the_disk_s_own_error_goes_to_the_guest_and_costs_no_life() {
    let mut host = Host::alive();
    let read = host.read(0, 8);
    host.handed();
    host.fails("read 0 8", ErrorClass::Medium);
    assert_eq!((host.done(), host.shadow.mode()), (vec![(read, IO_ERROR)], ModeName::Passive));
}

#[test]
fn a_suspect_error_is_masked_once() {
    let mut host = Host::alive();
    let (read, other) = (host.read(0, 8), host.read(8, 8));
    host.handed();
    assert_eq!(host.kills("read 0 8", ErrorClass::Suspect), Failure::Suspect);
    assert_eq!((host.done(), host.shadow.mode()), (vec![], ModeName::Masking));
    host.live();
    host.handed();
    host.fails("read 0 8", ErrorClass::Suspect);
    assert_eq!(host.done(), [(read, IO_ERROR)], "the second time it is the guest's, and the life goes on");
    host.ok("read 8 8");
    assert_eq!(host.done(), [(other, OK)]);
}

#[test]
fn a_flush_that_fails_twice_fails_for_the_guest() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.run();
    host.done();
    let flush = host.flush();
    for _ in 0..2 {
        assert_eq!(host.done(), []);
        host.run_to("flush");
        host.kills("flush", ErrorClass::Suspect);
        host.live();
    }
    assert_eq!(host.done(), [(flush, IO_ERROR)]);
    assert_eq!(host.run(), ["write 0 8"], "the log has it all the same");
}

#[test]
fn after_a_failed_change_what_the_log_has_there_is_written_again() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.run();
    let failed = host.write(4, 8);
    host.handed();
    let read = host.read(6, 1);
    host.done();
    host.fails("write 4 8", ErrorClass::Medium);
    assert_eq!(host.done(), [(failed, IO_ERROR)]);
    assert_eq!(host.handed(), ["write 4 4"], "the read waits for it");
    host.ok("write 4 4");
    assert_eq!(host.run(), ["read 6 1"]);
    assert_eq!(host.done(), [(read, OK)]);
}

/// A host whose log owes sectors 0 to 7, and whose disk is known by the block at 64.
fn owing() -> Host {
    let mut host = Host::alive();
    let known = host.write(64, 8);
    host.run();
    host.flush();
    host.run();
    host.write(0, 8);
    host.run();
    host.die();
    host.live();
    host.recognise(known);
    host.done();
    host
}

#[test]
fn what_cannot_be_written_again_is_lost_and_says_so() {
    let mut host = owing();
    host.handed();
    host.fails("write 0 8", ErrorClass::Medium);
    host.handed();
    let waiting = host.read(4, 1);
    host.fails("write 0 8", ErrorClass::Medium);
    assert_eq!(host.handed(), NOTHING);
    assert_eq!(host.done(), [(waiting, IO_ERROR)]);
    assert_eq!(host.shadow.lost_ranges().map(|range| (range.start(), range.end())).collect::<Vec<_>>(), [(0, 8)]);
    assert_eq!((host.shadow.counts().lost_sectors, host.shadow.logged_extents()), (8, 0));
    let (first, second) = (host.flush(), host.flush());
    assert_eq!(host.done(), [(first, IO_ERROR), (second, OK)], "the next flush fails, as with a disk's deferred error");
    host.write(0, 6);
    host.run();
    let (healed, lost) = (host.read(0, 6), host.read(5, 2));
    host.run();
    assert_eq!(host.done()[1..], [(lost, IO_ERROR), (healed, OK)]);
}

#[test]
fn a_flush_that_waits_fails_for_what_is_lost_meanwhile() {
    let mut host = owing();
    let flush = host.flush();
    host.handed();
    host.fails("write 0 8", ErrorClass::Medium);
    host.handed();
    host.fails("write 0 8", ErrorClass::Medium);
    assert_eq!(host.done(), [(flush, IO_ERROR)]);
    let next = host.flush();
    assert_eq!(host.done(), [(next, OK)]);
}

#[test]
fn a_write_of_which_a_part_is_lost_before_it_is_answered_fails() {
    let mut host = Host::alive();
    let write = host.write(0, 4096);
    host.handed();
    host.ok("write 0 2048");
    let flush = host.flush();
    host.die();
    host.live();
    for _ in 0..2 {
        host.handed();
        host.fails("write 0 2048", ErrorClass::Medium);
    }
    let healing = host.write(100, 8);
    host.ok("write 2048 2048");
    host.run();
    assert_eq!(host.done(), [(flush, IO_ERROR), (write, IO_ERROR), (healing, OK)]);
}

#[test]
fn a_driver_that_fails_whatever_it_is_asked_costs_nothing_of_the_log() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.write(8, 8);
    host.run();
    host.die();
    for _ in 0..10 {
        host.live();
        let first = host.handed().remove(0);
        assert_eq!(host.kills(&first, ErrorClass::Suspect), Failure::Suspect);
    }
    for _ in 0..10 {
        host.live();
        host.handed();
        host.die();
    }
    assert_eq!((host.shadow.owed_bytes(), host.shadow.lost_ranges().count()), (16 * 512, 0));
    host.live();
    host.run();
    assert_eq!(host.shadow.mode(), ModeName::Passive);
}

#[test]
fn a_range_that_fails_by_itself_is_lost_and_the_others_are_not() {
    let mut host = Host::alive();
    for n in 0..4 {
        host.write(16 * n, 8);
    }
    host.run();
    host.die();
    let mut lives = 0;
    while host.shadow.mode() != ModeName::Passive {
        host.live();
        lives += 1;
        loop {
            let Some(order) = host.orders.first().cloned() else {
                if host.handed().is_empty() {
                    break;
                }
                continue;
            };
            host.orders.remove(0);
            let is_bad =
                matches!(&order.command, crate::block::Command::Write { at, .. } if at.start() == super::host::START);
            let bytes = order.command.bytes();
            let answer = if is_bad { Answer::Failed(ErrorClass::Suspect) } else { Answer::Done { bytes } };
            if host.answer(order.tag, answer).is_err() {
                host.orders.clear();
                break;
            }
        }
    }
    assert!(lives <= 4, "{lives} lives");
    assert_eq!(host.shadow.lost_ranges().map(|range| (range.start(), range.count())).collect::<Vec<_>>(), [(0, 8)]);
}

#[test]
fn a_request_that_kills_three_lives_is_found_among_many_and_fails() {
    let mut host = Host::alive();
    for n in 0..8 {
        host.write(100 + 10 * n, 8);
    }
    host.run();
    host.done();
    let (poison, innocent) = (host.write(0, 8), host.write(20, 8));
    host.handed();
    host.die();
    host.live();
    assert!(host.handed().len() > 2, "all at once, for the first death was not in a replay");
    host.die();
    host.live();
    let mut handed = host.handed();
    while handed != ["write 0 8"] {
        assert_eq!(handed.len(), 1, "one at a time");
        host.ok(&handed[0]);
        handed = host.handed();
    }
    assert_eq!(host.done(), []);
    host.die();
    assert_eq!(host.done(), [(poison, IO_ERROR)]);
    host.live();
    host.run();
    assert_eq!(host.done(), [(innocent, OK)]);
    assert_eq!((host.shadow.mode(), host.shadow.lost_ranges().count()), (ModeName::Passive, 0));
    host.write(40, 1);
    host.write(50, 1);
    assert_eq!(host.handed().len(), 2, "together again");
}

#[test]
fn a_rewriting_that_kills_three_lives_is_lost() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.write(16, 8);
    host.run();
    host.die();
    let mut deaths = 0;
    while host.shadow.lost_ranges().count() == 0 {
        host.live();
        let mut handed = host.handed();
        while handed.iter().any(|order| order != "write 0 8") {
            host.ok("write 16 8");
            handed = host.handed();
        }
        deaths += 1;
        assert!(deaths <= 5, "not found");
        host.die();
    }
    assert_eq!(host.shadow.lost_ranges().map(|range| (range.start(), range.count())).collect::<Vec<_>>(), [(0, 8)]);
}

#[test]
fn without_an_answer_the_life_is_stalled() {
    let mut host = Host::alive();
    host.read(0, 8);
    host.read(8, 8);
    host.handed();
    host.now += 9_000_000_000;
    host.ok("read 8 8");
    host.now += 9_999_999_999;
    assert_eq!(host.tick(), Ok(()), "something was answered since");
    assert_eq!(host.shadow.deadline(), Some(host.now + 1));
    host.now += 1;
    assert_eq!(host.tick(), Err(Failure::Stalled { ms: 10_000 }));
    assert_eq!((host.shadow.mode(), host.shadow.pending()), (ModeName::Masking, 1));
}

#[test]
fn a_driver_s_own_reset_has_everything_written_again_in_place() {
    let mut host = Host::alive();
    let first = host.write(0, 8);
    host.run();
    let (second, read) = (host.write(100, 8), host.read(0, 8));
    let flush = host.flush();
    host.handed();
    host.shadow.cache_lost(link(1));
    assert_eq!(host.handed(), NOTHING, "what is in flight comes first");
    host.ok("write 100 8");
    host.ok("flush");
    host.ok("read 0 8");
    assert_eq!(host.done(), [(first, OK), (second, OK)], "neither flush nor read proves anything");
    assert_eq!(host.handed(), ["write 0 8", "write 100 8"]);
    host.ok("write 0 8");
    host.ok("write 100 8");
    host.run();
    assert_eq!(host.done(), [(flush, OK), (read, OK)]);
    host.shadow.cache_lost(link(7));
    assert_eq!(host.shadow.mode(), ModeName::Passive);
}

#[test]
fn an_error_proves_nothing_of_a_read_that_was_in_flight_when_the_cache_was_lost() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.run();
    let read = host.read(0, 8);
    host.handed();
    host.done();
    host.shadow.cache_lost(link(1));
    host.fails("read 0 8", ErrorClass::Medium);
    assert_eq!(host.run(), ["write 0 8", "read 0 8"]);
    assert_eq!(host.done(), [(read, OK)]);
}

#[test]
fn a_write_is_stable_when_the_parts_are_that_a_life_with_a_cache_did() {
    let mut host = Host::new(CachePolicy::Through, Limits::default());
    host.live();
    let write = host.write(0, 4096);
    host.handed();
    host.ok("write 0 2048");
    host.die();
    host.live_with(WriteCache::None, 4);
    assert_eq!(host.handed(), ["write 0 2048", "write 2048 2048"]);
    host.ok("write 2048 2048");
    assert_eq!(host.done(), []);
    host.ok("write 0 2048");
    assert_eq!((host.done(), host.handed()), (vec![(write, OK)], vec![]));
}

#[test]
fn writes_under_way_at_the_guest_s_reset_end_as_orphans() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.read(50, 8);
    host.handed();
    host.write(100, 8);
    host.flush();
    host.done();
    host.shadow.reset_by_guest();
    let read = host.read(4, 1);
    assert_eq!(host.handed(), NOTHING, "the read waits for the orphan; what was not handed over is gone");
    host.ok("read 50 8");
    host.die();
    host.live();
    assert_eq!(host.handed(), ["write 0 8"]);
    host.ok("write 0 8");
    assert_eq!(host.run(), ["read 4 1"]);
    assert_eq!(host.done(), [(read, OK)]);
    assert_eq!((host.shadow.logged_extents(), host.shadow.pending()), (1, 0));
}

#[test]
fn at_rest_nothing_is_in_flight_and_everything_is_stable() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.run();
    host.write(8, 8);
    host.handed();
    host.shadow.quiesce(host.now);
    let waiting = host.write(16, 8);
    host.done();
    assert_eq!((host.handed(), host.shadow.is_at_rest()), (vec!["flush".to_string()], false));
    host.ok("flush");
    host.ok("write 8 8");
    assert_eq!(host.run(), ["flush"]);
    assert!(host.shadow.is_at_rest());
    assert_eq!(host.shadow.mode(), ModeName::Quiescing);
    host.now += 60_000_000_000;
    assert_eq!(host.tick(), Ok(()));
    host.die();
    host.live();
    host.run_samples();
    assert_eq!(host.run(), ["write 16 8"], "what waited is served by the next life");
    assert_eq!(host.done().pop(), Some((waiting, OK)));
}

#[test]
fn what_a_guest_was_told_is_stable_after_its_end_over_as_many_lives_as_that_takes() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.run();
    host.write(8, 8);
    host.shadow.reset_by_guest();
    host.shadow.finish();
    assert_eq!(host.shadow.mode(), ModeName::Quiescing);
    assert_eq!(host.handed(), ["flush"], "at once, and nothing else");
    host.die();
    host.live();
    assert_eq!(host.handed(), ["write 0 8"]);
    host.ok("write 0 8");
    assert_eq!(host.handed(), ["flush"]);
    host.now += Limits::default().stall_ns;
    assert!(host.tick().is_err(), "a driver VM that hangs is noticed");
    host.live();
    assert_eq!(host.run(), ["write 0 8", "flush"]);
    assert_eq!((host.shadow.logged_extents(), host.tick()), (0, Ok(())));
}

#[test]
fn what_does_not_come_to_rest_in_time_has_failed() {
    let limits = Limits { quiesce_ns: 5_000_000_000, ..Limits::default() };
    let mut host = Host::new(CachePolicy::Auto, limits);
    host.live();
    host.write(0, 8);
    host.handed();
    host.shadow.quiesce(host.now);
    host.now += 3_000_000_000;
    host.ok("write 0 8");
    assert_eq!(host.handed(), ["flush"]);
    host.shadow.quiesce(host.now);
    assert_eq!(host.shadow.deadline(), Some(host.now + 2_000_000_000), "patience does not begin again");
    host.now += 1_999_999_999;
    assert_eq!(host.tick(), Ok(()));
    host.now += 1;
    assert_eq!(host.tick(), Err(Failure::NotQuiesced));
    host.live();
    assert_eq!(host.run(), ["write 0 8", "flush"], "as after a crash");
    assert!(!host.shadow.is_at_rest());
}

#[test]
fn quarantine_fails_what_waits_and_keeps_the_log() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.run();
    host.done();
    let (in_flight, flush) = (host.write(8, 8), host.flush());
    host.handed();
    host.quarantine();
    let refused = [host.read(0, 8), host.flush()];
    let expected = [in_flight, flush, refused[0], refused[1]];
    assert_eq!(host.done(), expected.map(|token| (token, IO_ERROR)));
    assert_eq!((host.shadow.mode(), host.shadow.owed_bytes()), (ModeName::Quarantined, 8 * 512));
    assert!(!host.shadow.is_at_rest());
    let other = Identity { sectors: 1, ..identity() };
    assert_eq!(attach(&mut host, link(2), &other), Err(NotTaken::OtherDisk(Mismatch::Size)));
    assert_eq!(host.shadow.mode(), ModeName::Quarantined);
    host.life = 2;
    host.live();
    let read = host.read(0, 1);
    assert_eq!(host.run(), ["write 0 8", "flush", "read 0 1"]);
    assert_eq!(host.done(), [(read, OK)]);
}

fn attach(host: &mut Host, life: LinkId, disk: &Identity) -> Result<(), NotTaken> {
    host.shadow.attach(life, disk, WriteCache::Volatile, 8, host.now, &mut Out::default())
}

#[test]
fn another_disk_is_not_taken_and_not_tried_again() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.run();
    host.die();
    let other = Identity { serial: "t".into(), ..identity() };
    assert_eq!(attach(&mut host, link(2), &other), Err(NotTaken::OtherDisk(Mismatch::Serial)));
    assert_eq!((host.handed(), host.shadow.mode()), (vec![], ModeName::Masking));
    assert_eq!(attach(&mut host, link(2), &identity()), Err(NotTaken::Old));
    assert_eq!(attach(&mut host, link(3), &identity()), Ok(()));
}

#[test]
fn a_disk_that_lacks_what_was_flushed_to_it_gets_nothing() {
    let mut host = owing();
    host.die();
    host.live();
    assert_eq!((host.handed(), host.shadow.mode()), (vec!["sample 64 8".to_string()], ModeName::Identifying));
    let failure = host.sampled("sample 64 8", &[9; 8]).unwrap_err();
    assert_eq!(failure, Failure::OtherDisk(Mismatch::Sample(64)));
    assert!(failure.is_final());
    assert_eq!((host.handed(), host.shadow.mode()), (vec![], ModeName::Masking));
    assert_eq!(host.shadow.owed_bytes(), 8 * 512);
}

#[test]
fn a_block_that_is_about_to_be_overwritten_recognises_no_disk() {
    let mut host = owing();
    host.run();
    host.write(60, 8);
    host.handed();
    host.die();
    host.live();
    assert_eq!(host.handed(), ["write 0 8", "write 60 8"], "no sample: the write may have been done in part");
}

#[test]
fn a_sample_that_cannot_be_read_does_not_keep_the_disk_away() {
    let mut host = owing();
    host.die();
    host.live();
    host.handed();
    assert_eq!(host.kills("sample 64 8", ErrorClass::Suspect), Failure::Suspect);
    host.live();
    host.handed();
    host.fails("sample 64 8", ErrorClass::Medium);
    assert_eq!(host.run(), ["write 0 8"]);
}

#[test]
fn an_answer_that_cannot_be_costs_the_life() {
    let done = |bytes| Answer::Done { bytes };
    let cases: [(Tag, Answer, Violation); 3] = [
        (Tag(40_000), done(0), Violation::UnknownTag(40_000)),
        (Tag(5), done(0), Violation::UnknownTag(5)),
        (Tag(0), done(4095), Violation::WrongLength { expected: 4096, got: 4095 }),
    ];
    for (tag, answer, violation) in cases {
        let mut host = Host::alive();
        host.read(0, 8);
        host.handed();
        assert_eq!(host.answer(tag, answer), Err(Failure::Violation(violation)));
        assert_eq!((host.shadow.mode(), host.shadow.pending()), (ModeName::Masking, 1));
        host.orders.clear();
        host.live();
        assert_eq!(host.run(), ["read 0 8"]);
    }
    let mut host = Host::alive();
    host.read(0, 8);
    host.handed();
    let tag = host.orders[0].tag;
    assert_eq!(host.answer(tag, done(4096)), Ok(()));
    assert_eq!(host.answer(tag, done(4096)), Err(Failure::Violation(Violation::UnknownTag(tag.0))), "twice");
    let mut host = owing();
    host.die();
    host.live();
    host.handed();
    let tag = host.orders[0].tag;
    assert_eq!(host.answer(tag, done(4096)), Err(Failure::Violation(Violation::WrongKind(tag.0))));
}

#[test]
fn a_life_that_is_over_is_not_heard() {
    let mut host = Host::alive();
    let read = host.read(0, 8);
    host.handed();
    host.live();
    host.orders.clear();
    assert_eq!(host.handed(), ["read 0 8"], "a newer connection ends the one before");
    let mut out = Out::default();
    let tag = host.orders[0].tag;
    let late = host.shadow.answered(link(1), tag, Answer::Done { bytes: 4096 }, host.now, &mut out);
    host.shadow.lost(link(1), &mut out);
    assert_eq!((late, out.done.len(), host.shadow.link()), (Ok(()), 0, Some(link(2))));
    host.ok("read 0 8");
    assert_eq!(host.done(), [(read, OK)]);
}

#[test]
fn a_disk_that_cannot_be_written_to_refuses_changes() {
    let disk = Identity { read_only: true, logical_block: 4096, ..identity() };
    let mut host = Host::new(CachePolicy::Auto, Limits::default());
    host.shadow = crate::block::BlockShadow::new(disk, CachePolicy::Auto, Limits::default());
    let refused = [host.write(0, 8), host.ask(Access::Discard, 0, 8), host.read(4, 8), host.read(0, 12)];
    let accepted = host.read(8, 16);
    assert_eq!(host.done(), refused.map(|token| (token, IO_ERROR)));
    assert_eq!(host.shadow.pending(), 1, "{accepted:?}");
}
