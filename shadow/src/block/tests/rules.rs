//! Each rule by an example: order, log, flush, replay, and what the guest hears.

use super::host::{Host, SIZE, range};
use crate::block::{Access, CachePolicy, Command, Data, ErrorClass, Failure, Limits, ModeName, Status, WriteCache};

const OK: Status = Status::Ok;
const IO_ERROR: Status = Status::IoError;

#[test]
fn what_overlaps_a_change_waits_in_its_place_and_what_is_clear_passes() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.read(4, 8);
    host.write(10, 2);
    host.read(20, 1);
    host.read(20, 1);
    assert_eq!(host.handed(), ["write 0 8", "read 20 1", "read 20 1"]);
    host.ok("write 0 8");
    assert_eq!(host.handed(), ["read 4 8"], "the write at 10 keeps its place behind the read");
    host.ok("read 4 8");
    assert_eq!(host.handed(), ["write 10 2"]);
}

#[test]
fn a_flush_covers_what_was_done_before_it_was_handed_over() {
    let mut host = Host::alive();
    let early = host.write(0, 8);
    host.run();
    let flush = host.flush();
    let late = host.write(100, 8);
    assert_eq!(host.handed(), ["flush", "write 100 8"], "writes in flight do not delay it");
    host.ok("write 100 8");
    host.ok("flush");
    assert_eq!(host.done(), [(early, OK), (late, OK), (flush, OK)]);
    host.die();
    host.live();
    host.recognise(early);
    assert_eq!(host.run(), ["write 100 8"], "what was done meanwhile is not covered");
}

#[test]
fn a_flush_with_nothing_to_make_stable_is_answered_at_once() {
    let mut host = Host::alive();
    let first = host.flush();
    host.write(0, 8);
    host.handed();
    let second = host.flush();
    assert_eq!(host.done(), [(first, OK), (second, OK)], "a write in flight is none of its business");
    assert_eq!(host.handed(), Vec::<String>::new());
}

#[test]
fn flushes_that_wait_together_are_one() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.run();
    let first = host.flush();
    host.handed();
    let (second, third) = (host.flush(), host.flush());
    assert_eq!(host.handed(), Vec::<String>::new());
    host.done();
    host.write(50, 8);
    host.handed();
    host.ok("write 50 8");
    host.ok("flush");
    assert_eq!(host.done()[1..], [(first, OK)]);
    assert_eq!(host.run(), ["flush"]);
    assert_eq!(host.done(), [(second, OK), (third, OK)]);
}

#[test]
fn after_a_failed_flush_everything_is_written_again_before_the_next() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.write(8, 8);
    host.run();
    host.done();
    let flush = host.flush();
    host.handed();
    assert_eq!(host.kills("flush", ErrorClass::Medium), Failure::FlushFailed);
    host.live();
    assert_eq!(host.handed(), ["write 0 16"]);
    host.ok("write 0 16");
    assert_eq!(host.run(), ["flush"]);
    assert_eq!(host.done(), [(flush, OK)]);
}

#[test]
fn replay_merges_in_the_order_of_the_disk_and_in_flight_follows() {
    let mut host = Host::alive();
    let tokens = [host.write(16, 8), host.write(0, 8), host.write(8, 8), host.write(1024, 8)];
    host.run();
    host.read(512, 1);
    let again = host.write(12, 8);
    host.handed();
    host.die();
    host.live();
    assert_eq!(host.handed(), ["write 0 24", "read 512 1", "write 1024 8"], "in turns with what is clear of it");
    let written = [vec![tokens[1].0; 8], vec![tokens[2].0; 8], vec![tokens[0].0; 8]].concat();
    assert_eq!(host.writers("write 0 24"), written);
    host.ok("write 0 24");
    assert_eq!(host.handed(), ["write 12 8"]);
    host.done();
    host.ok("write 12 8");
    assert_eq!(host.done(), [(again, OK)]);
    assert_eq!(host.shadow.mode(), ModeName::Replaying);
    host.run();
    assert_eq!(host.shadow.mode(), ModeName::Passive);
}

#[test]
fn a_long_replay_does_not_stop_the_guest_nor_the_guest_the_replay() {
    let mut host = Host::alive();
    for n in 0..64 {
        host.write(2 * n, 1);
    }
    host.run();
    host.die();
    for n in 0..64 {
        host.read(1000 + n, 1);
    }
    host.live_with(WriteCache::Volatile, 8);
    let handed = host.handed();
    let replayed = handed.iter().filter(|order| order.starts_with("write")).count();
    assert_eq!((replayed, handed.len()), (4, 8));
}

#[test]
fn at_half_of_a_bound_a_flush_is_ordered_and_at_the_bound_changes_wait() {
    let limits = Limits { bytes: 64 * 512, part_sectors: 16, ..Limits::default() };
    let mut host = Host::new(CachePolicy::Auto, limits);
    host.live();
    host.write(0, 16);
    host.run();
    host.write(16, 16);
    assert_eq!(host.handed(), ["write 16 16"]);
    host.ok("write 16 16");
    assert_eq!(host.handed(), ["flush"]);
    for n in 2..5 {
        host.write(16 * n, 16);
    }
    let read = host.read(500, 1);
    assert_eq!(host.handed(), ["write 32 16", "write 48 16", "read 500 1"], "the third has no room");
    host.done();
    host.ok("read 500 1");
    assert_eq!(host.done(), [(read, OK)]);
    host.ok("write 32 16");
    host.ok("write 48 16");
    assert_eq!(host.handed(), Vec::<String>::new());
    host.ok("flush");
    assert_eq!(host.handed(), ["flush", "write 64 16"], "there is room, and half of the bound is reached again");
    assert!(host.shadow.kept_bytes() <= 64 * 512);
}

#[test]
fn a_copy_of_which_little_is_left_counts_whole() {
    let limits = Limits { bytes: 64 * 512, part_sectors: 16, ..Limits::default() };
    let mut host = Host::new(CachePolicy::Auto, limits);
    host.live();
    host.write(0, 16);
    host.write(1, 8);
    host.write(9, 7);
    host.run();
    assert_eq!((host.shadow.kept_bytes(), host.shadow.logged_extents()), (31 * 512, 3));
    host.write(0, 1);
    assert_eq!(host.run(), ["write 0 1"]);
    assert_eq!(host.shadow.kept_bytes(), 16 * 512, "the last user of the first copy is gone");
}

#[test]
fn what_is_old_is_flushed_when_its_time_comes() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.run();
    let born = host.now;
    assert_eq!(host.shadow.deadline(), Some(born + 2_000_000_000));
    host.now += 1_999_999_999;
    assert_eq!(host.handed(), Vec::<String>::new());
    host.write(8, 8);
    host.run();
    host.now += 1;
    assert_eq!(host.handed(), ["flush"]);
    assert_ne!(host.shadow.deadline(), Some(born + 2_000_000_000), "nothing is due that is under way");
    host.ok("flush");
    assert_eq!((host.shadow.logged_extents(), host.shadow.deadline()), (0, None));
}

#[test]
fn a_disk_without_a_volatile_cache_needs_no_log_and_no_flush() {
    let mut host = Host::new(CachePolicy::Auto, Limits::default());
    host.live_with(WriteCache::None, 4);
    let write = host.write(0, 8);
    assert_eq!(host.handed(), ["write 0 8"]);
    let Command::Write { data: Data::Guest(span), .. } = &host.orders[0].command else { panic!("a copy") };
    assert_eq!((span.token, span.skip, span.sectors), (write, 0, 8));
    host.die();
    host.live_with(WriteCache::None, 4);
    assert_eq!(host.run(), ["write 0 8"], "issued again, from the guest's buffers");
    let flush = host.flush();
    assert_eq!(host.done(), [(write, OK), (flush, OK)]);
    assert_eq!((host.shadow.kept_bytes(), host.shadow.logged_extents()), (0, 0));
}

#[test]
fn a_guest_that_does_not_flush_hears_of_a_write_when_it_is_stable() {
    for policy in [CachePolicy::Auto, CachePolicy::Through] {
        let mut host = Host::new(policy, Limits::default());
        host.shadow.set_guest_flushes(policy != CachePolicy::Auto);
        host.live();
        let writes = [host.write(0, 8), host.write(8, 8)];
        assert_eq!(host.handed(), ["write 0 8", "write 8 8"]);
        host.ok("write 0 8");
        host.ok("write 8 8");
        assert_eq!((host.handed(), host.done()), (vec!["flush".to_string()], vec![]), "one flush for both");
        host.die();
        host.live();
        assert_eq!(host.run(), ["write 0 16", "flush"]);
        assert_eq!(host.done(), writes.map(|write| (write, OK)));
    }
}

#[test]
fn zeroes_and_discards_are_replayed_as_what_they_were() {
    let mut host = Host::alive();
    host.ask(Access::WriteZeroes { unmap: true }, 0, 8);
    host.ask(Access::WriteZeroes { unmap: false }, 8, 8);
    host.ask(Access::Discard, 16, 8);
    host.run();
    assert_eq!(host.shadow.kept_bytes(), 0);
    host.die();
    host.live();
    assert_eq!(host.handed(), ["zero 0 8 unmap", "zero 8 8", "discard 16 8"]);
    host.ok("zero 0 8 unmap");
    host.ok("zero 8 8");
    host.fails("discard 16 8", ErrorClass::Suspect);
    assert_eq!((host.shadow.mode(), host.shadow.lost_ranges().count()), (ModeName::Passive, 0), "it is advice");
}

#[test]
fn a_large_request_goes_in_parts_and_is_answered_once() {
    let mut host = Host::alive();
    let write = host.write(0, 5000);
    assert_eq!(host.handed(), ["write 0 2048", "write 2048 2048", "write 4096 904"]);
    host.ok("write 2048 2048");
    host.ok("write 0 2048");
    assert_eq!(host.done(), []);
    host.fails("write 4096 904", ErrorClass::NoSpace);
    assert_eq!(host.done(), [(write, IO_ERROR)]);
    let zeroes = host.ask(Access::WriteZeroes { unmap: false }, 0, 200_000);
    assert_eq!(host.handed(), ["zero 0 131072", "zero 131072 68928"]);
    host.ok("zero 0 131072");
    host.fails("zero 131072 68928", ErrorClass::Unsupported);
    assert_eq!(host.done(), [(zeroes, Status::Unsupported)]);
}

#[test]
fn what_the_disk_does_not_offer_fails_at_once() {
    let mut host = Host::alive();
    let refused = [host.read(SIZE, 1), host.write(SIZE - 1, 2), host.write(0, 64 * 2048 + 1)];
    assert_eq!(host.done(), refused.map(|token| (token, IO_ERROR)));
    let accepted = host.write(0, 64 * 2048);
    host.run();
    assert_eq!(host.done(), [(accepted, OK)]);
}

#[test]
fn orders_are_in_the_guest_s_part_of_the_disk() {
    let mut host = Host::alive();
    host.read(SIZE - 1, 1);
    host.handed();
    let Command::Read { at, .. } = host.orders[0].command else { panic!("a read") };
    assert_eq!(at, range(super::host::START + SIZE - 1, 1));
}

#[test]
fn only_parts_of_a_life_that_serves_are_copied_to_the_guest() {
    let mut host = Host::alive();
    let read = host.read(0, 4096);
    host.write(9000, 1);
    host.handed();
    let tags: Vec<_> = host.orders.iter().map(|order| order.tag).collect();
    let into = |host: &Host, n: usize| host.shadow.read_into(super::host::link(1), tags[n]);
    assert_eq!(into(&host, 1).map(|span| (span.token, span.skip, span.sectors)), Some((read, 2048, 2048)));
    assert_eq!(into(&host, 2), None, "a write");
    assert_eq!(host.shadow.read_into(super::host::link(2), tags[0]), None);
    host.shadow.reset_by_guest();
    assert_eq!(into(&host, 0), None, "the guest has its memory back");
    host.die();
    assert_eq!(into(&host, 0), None);
}
