//! What a guest and the supervisor see of a disk over several lives of its driver VM.

use umbra_driver_vm::block_protocol::{FromService, Operation};
use umbra_shadow::Generation;
use umbra_shadow::block::{CachePolicy, Failure, Limits, Mismatch, ModeName, Status, WriteCache};
use umbra_splitter::block::Notice;
use umbra_splitter::block::link::LinkError;

use crate::guest::{
    Guest, attached, greeted, link, live, serve, serve_and_flush, serve_once, serve_until_live, use_up_buffers,
    value_of,
};
use crate::medium::Medium;

const ENODATA: i32 = 61;
const EIO: i32 = 5;

fn generation(n: u32) -> Generation {
    link(n).generation
}

/// The link ended because the life was given up.
fn failure(guest: &mut Guest) -> Failure {
    match guest.notice() {
        Notice::Lost(_, LinkError::Failed(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

#[test]
fn writes_and_reads_pass_and_a_flush_makes_stable() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    assert_eq!(guest.splitter.serving(), Some(generation(1)));
    let tokens = [guest.write(0, 8), guest.write(100, 9), guest.zero(4, 2), guest.read(0, 16)];
    serve(&mut guest, &mut vm, &mut medium);
    assert_eq!(guest.finished().len(), tokens.len());
    assert_eq!(value_of(medium.stable(0)), 0, "still in the cache");
    guest.flush();
    serve(&mut guest, &mut vm, &mut medium);
    guest.assert_stable(&medium);
    assert_eq!(value_of(medium.stable(0)), tokens[0]);
    assert_eq!(guest.splitter.shadow().logged_extents(), 0);
}

#[test]
fn a_life_that_loses_its_cache_costs_no_acknowledged_write() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    for sector in 0..50 {
        guest.write(10 * sector, 8);
        serve(&mut guest, &mut vm, &mut medium);
    }
    guest.splitter.mask(generation(1));
    assert_eq!(guest.splitter.shadow().mode(), ModeName::Masking);
    medium.lose_cache(|| false);
    guest.read(0, 20);
    guest.turn();
    let mut vm = greeted(&mut guest, 2);
    match guest.notice() {
        Notice::Live(at, _) => assert_eq!(at, generation(2)),
        other => panic!("a link that the supervisor gave up is no news: {other:?}"),
    }
    serve_and_flush(&mut guest, &mut vm, &mut medium);
    guest.assert_stable(&medium);
    assert_eq!(guest.splitter.shadow().counts().rewritten_sectors, 400);
}

#[test]
fn the_counts_of_an_outage_begin_where_it_begins() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    serve_and_flush(&mut guest, &mut vm, &mut medium);
    guest.write(0, 8);
    guest.turn();
    drop(vm);
    assert!(matches!(guest.notice(), Notice::Lost(lost, error) if lost == link(1) && error.is_closed()));
    let _vm = greeted(&mut guest, 2);
    let Notice::Live(_, counts) = guest.notice() else { panic!() };
    assert_eq!((counts.kept_in_flight, counts.flushes), (1, 0));
}

#[test]
fn long_requests_go_in_parts_through_a_pool_that_is_smaller() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    // 8 MiB at once; the pool has 3.
    let write = guest.write(3, 16_384);
    serve(&mut guest, &mut vm, &mut medium);
    guest.read(0, 16_400);
    guest.turn();
    vm.receive();
    assert_eq!(vm.asked.len(), 3, "as much as the pool holds");
    serve_and_flush(&mut guest, &mut vm, &mut medium);
    guest.assert_stable(&medium);
    assert_eq!(value_of(medium.stable(16_386)), write);
}

#[test]
fn orders_are_sent_in_batches_and_wait_for_receive_buffers() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    for n in 0..24 {
        guest.write(100 * n, 1);
    }
    guest.turn();
    vm.receive();
    assert_eq!((vm.asked.len(), vm.largest_batch), (24, 24));
    serve(&mut guest, &mut vm, &mut medium);
    use_up_buffers(&mut guest, &mut vm, &mut medium);
    vm.largest_batch = 0;
    for n in 0..3 {
        guest.write(100 * n, 1);
    }
    guest.turn();
    vm.receive();
    assert!(vm.asked.is_empty());
    assert_eq!(vm.kick_wanted_at(), vm.rx.avail_idx, "no kick is asked for");
    vm.offers = true;
    vm.offer();
    serve(&mut guest, &mut vm, &mut medium);
    assert_eq!(vm.largest_batch, 3);
}

#[test]
fn a_disk_without_a_volatile_cache_is_written_from_the_guest_s_buffers_and_nothing_is_kept() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    medium.is_volatile = false;
    let start = |guest: &mut Guest, medium: &mut Medium, n| {
        let mut vm = attached(guest, n);
        vm.disk.cache = WriteCache::None;
        vm.greet();
        serve_until_live(guest, &mut vm, medium);
        vm
    };
    let mut vm = start(&mut guest, &mut medium, 1);
    assert_eq!(guest.splitter.disk().unwrap().cache, WriteCache::None);
    guest.write(5, 40);
    serve(&mut guest, &mut vm, &mut medium);
    assert_eq!((guest.splitter.shadow().kept_bytes(), guest.splitter.shadow().logged_extents()), (0, 0));
    guest.write(5, 3000);
    guest.turn();
    guest.splitter.mask(generation(1));
    let mut vm = start(&mut guest, &mut medium, 2);
    serve(&mut guest, &mut vm, &mut medium);
    guest.assert_stable(&medium);
}

#[test]
fn with_the_policy_through_a_write_is_acknowledged_when_it_is_stable() {
    let (mut guest, mut medium) = (Guest::with(CachePolicy::Through, Limits::default()), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    for n in 0..10 {
        guest.write(n, 1);
        serve(&mut guest, &mut vm, &mut medium);
        guest.assert_stable(&medium);
    }
}

#[test]
fn a_guest_that_does_not_flush_has_its_writes_acknowledged_when_they_are_stable() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.splitter.set_guest_flushes(false);
    guest.write(7, 1);
    serve(&mut guest, &mut vm, &mut medium);
    guest.assert_stable(&medium);
}

#[test]
fn coming_to_rest_makes_everything_stable_and_lets_new_requests_wait() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    guest.write(8, 8);
    guest.turn();
    let now = guest.now;
    guest.splitter.quiesce(now);
    serve(&mut guest, &mut vm, &mut medium);
    let notice = loop {
        match guest.notices.try_recv() {
            Ok(notice) => break notice,
            Err(_) => serve_once(&mut guest, &mut vm, &mut medium),
        }
    };
    assert!(matches!(notice, Notice::AtRest { stable: true }), "{notice:?}");
    guest.assert_stable(&medium);
    guest.write(16, 8);
    for _ in 0..10 {
        serve_once(&mut guest, &mut vm, &mut medium);
    }
    assert_eq!(guest.waiting(), 1);
    guest.splitter.go_on();
    serve(&mut guest, &mut vm, &mut medium);
    assert!(guest.notices.try_recv().is_err());
}

#[test]
fn a_disk_that_does_not_come_to_rest_in_time_is_lost_and_that_is_said() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    serve(&mut guest, &mut vm, &mut medium);
    let now = guest.now;
    guest.splitter.quiesce(now);
    guest.turn();
    assert_eq!(guest.splitter.deadline(), Some(now + Limits::default().quiesce_ns));
    guest.now += Limits::default().quiesce_ns;
    guest.turn();
    assert!(matches!(guest.notice(), Notice::AtRest { stable: false }));
    assert!(matches!(guest.notice(), Notice::Lost(_, error) if error.is_stalled()));
    assert_eq!(guest.splitter.shadow().owed_bytes(), 8 * 512);
}

#[test]
fn a_life_that_is_lost_does_not_come_to_rest() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    guest.turn();
    guest.splitter.quiesce(guest.now);
    vm.receive();
    vm.fail(EIO);
    assert!(matches!(guest.notice(), Notice::AtRest { stable: false }));
    assert_eq!(failure(&mut guest), Failure::Suspect);
}

#[test]
fn what_is_owed_without_a_driver_vm_does_not_come_to_rest() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    serve(&mut guest, &mut vm, &mut medium);
    guest.splitter.mask(generation(1));
    guest.splitter.quiesce(guest.now);
    guest.now += Limits::default().quiesce_ns;
    assert!(matches!(guest.notice(), Notice::AtRest { stable: false }));
    assert!(guest.notices.try_recv().is_err(), "no link has ended");
}

#[test]
fn what_was_finished_and_not_taken_is_gone_with_the_guest_s_reset() {
    let mut guest = Guest::new();
    guest.splitter.quarantine();
    guest.write(0, 8);
    guest.reset();
    guest.turn();
    assert!(guest.finished().is_empty());
}

#[test]
fn a_service_that_answers_nothing_is_stalled_with_and_without_buffers() {
    for offers in [true, false] {
        let (mut guest, mut medium) = (Guest::new(), Medium::new());
        let mut vm = live(&mut guest, 1, &mut medium);
        if !offers {
            use_up_buffers(&mut guest, &mut vm, &mut medium);
        }
        guest.write(900, 1);
        guest.turn();
        vm.receive();
        assert_eq!(vm.asked.len(), usize::from(offers));
        let stalls = guest.now + Limits::default().stall_ns;
        assert!(guest.splitter.deadline().unwrap() <= stalls);
        guest.now = stalls;
        guest.turn();
        assert!(matches!(guest.notice(), Notice::Lost(_, error) if error.is_stalled()));
        let mut vm = live(&mut guest, 2, &mut medium);
        serve(&mut guest, &mut vm, &mut medium);
    }
}

#[test]
fn a_service_that_is_at_work_on_a_flush_has_more_time() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    serve(&mut guest, &mut vm, &mut medium);
    guest.flush();
    guest.turn();
    vm.receive();
    let tag = vm.asked[0].tag;
    for _ in 0..8 {
        guest.now += Limits::default().stall_ns - 1;
        vm.say(FromService::AtWork { tag });
        guest.turn();
    }
    serve(&mut guest, &mut vm, &mut medium);
    guest.write(900, 1);
    guest.turn();
    vm.receive();
    let tag = vm.asked[0].tag;
    vm.say(FromService::AtWork { tag });
    guest.turn();
    assert!(matches!(guest.notice(), Notice::Lost(_, LinkError::Failed(Failure::Violation(_)))), "a write is not slow");
}

#[test]
fn a_flush_is_due_by_age_without_a_request() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    serve(&mut guest, &mut vm, &mut medium);
    let due = guest.splitter.deadline().unwrap();
    assert!(due <= guest.now + Limits::default().age_ns);
    guest.now = due;
    guest.turn();
    serve_once(&mut guest, &mut vm, &mut medium);
    serve_once(&mut guest, &mut vm, &mut medium);
    guest.assert_stable(&medium);
    assert_eq!(guest.splitter.shadow().counts().own_flushes, 1);
    assert_eq!(guest.splitter.deadline(), None);
}

#[test]
fn an_error_that_names_its_cause_is_the_guest_s_and_another_the_driver_vm_s() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    let read = guest.read(0, 8);
    guest.turn();
    vm.receive();
    vm.fail(ENODATA);
    guest.turn();
    assert_eq!(guest.finished(), [(read, Status::IoError)]);
    let write = guest.write(0, 8);
    guest.turn();
    vm.receive();
    vm.fail(EIO);
    assert_eq!(failure(&mut guest), Failure::Suspect);
    let mut vm = live(&mut guest, 2, &mut medium);
    serve(&mut guest, &mut vm, &mut medium);
    assert_eq!(guest.finished(), [(write, Status::Ok)]);
    assert_eq!(guest.splitter.shadow().counts().masked_errors, 1);
}

#[test]
fn a_failed_flush_has_everything_written_again_before_one_counts() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    serve(&mut guest, &mut vm, &mut medium);
    let flush = guest.flush();
    guest.turn();
    vm.receive();
    vm.fail(EIO);
    assert_eq!(failure(&mut guest), Failure::FlushFailed);
    medium.lose_cache(|| false);
    let mut vm = live(&mut guest, 2, &mut medium);
    serve(&mut guest, &mut vm, &mut medium);
    assert!(guest.finished().contains(&(flush, Status::Ok)));
    guest.assert_stable(&medium);
}

#[test]
fn a_controller_that_its_driver_has_reset_is_written_again_within_its_life() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    serve(&mut guest, &mut vm, &mut medium);
    medium.lose_cache(|| false);
    vm.say(FromService::CacheLost);
    guest.flush();
    guest.read(0, 8);
    serve(&mut guest, &mut vm, &mut medium);
    guest.assert_stable(&medium);
    assert_eq!(guest.splitter.serving(), Some(generation(1)));
}

#[test]
fn a_second_reset_of_a_controller_voids_what_was_handed_over_since_the_first() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    serve(&mut guest, &mut vm, &mut medium);
    medium.lose_cache(|| false);
    vm.say(FromService::CacheLost);
    vm.say(FromService::CacheLost);
    guest.turn();
    guest.write(100, 8);
    guest.turn();
    vm.receive();
    // Both are done, and lost, before their answers are sent.
    let answers: Vec<_> = vm.asked.drain(..).collect::<Vec<_>>().iter().map(|a| vm.carry_out(a, &mut medium)).collect();
    assert_eq!(answers.len(), 2);
    medium.lose_cache(|| false);
    vm.say(FromService::CacheLost);
    answers.into_iter().for_each(|answer| vm.say(answer));
    serve_and_flush(&mut guest, &mut vm, &mut medium);
    guest.assert_stable(&medium);
}

#[test]
fn a_quarantine_fails_requests_and_keeps_the_log_for_the_next_life() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    serve(&mut guest, &mut vm, &mut medium);
    guest.finished();
    let waits = guest.read(0, 8);
    guest.turn();
    guest.splitter.quarantine();
    medium.lose_cache(|| false);
    let refused = guest.write(8, 8);
    guest.turn();
    assert_eq!(guest.finished(), [(waits, Status::IoError), (refused, Status::IoError)]);
    let mut vm = live(&mut guest, 2, &mut medium);
    guest.read(0, 8);
    guest.flush();
    serve(&mut guest, &mut vm, &mut medium);
    guest.assert_stable(&medium);
}

#[test]
fn after_the_guest_s_reset_its_buffers_are_not_touched_and_its_write_still_counts() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.read(0, 8);
    let write = guest.write(100, 8);
    guest.turn();
    vm.receive();
    // The guest's buffers are gone: to touch one of them fails.
    guest.reset();
    while vm.work(&mut medium) {}
    guest.turn();
    assert_eq!(guest.splitter.shadow().counts().orphans, 1);
    guest.splitter.mask(generation(1));
    medium.lose_cache(|| false);
    let mut vm = live(&mut guest, 2, &mut medium);
    guest.flush();
    serve(&mut guest, &mut vm, &mut medium);
    assert_eq!(value_of(medium.stable(100)), write);
}

#[test]
fn another_disk_gets_no_order_and_is_reported_as_such() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    serve(&mut guest, &mut vm, &mut medium);
    guest.splitter.mask(generation(1));
    let mut other = attached(&mut guest, 2);
    other.disk.identity.serial = "another".into();
    other.greet();
    let notice = guest.notice();
    assert!(matches!(notice, Notice::OtherDisk(lost, Mismatch::Serial) if lost == link(2)), "{notice:?}");
    other.receive();
    assert!(other.asked.is_empty());
    assert_eq!(guest.splitter.shadow().owed_bytes(), 8 * 512);
}

#[test]
fn a_disk_that_lost_what_it_had_flushed_is_found_out_before_it_is_written_to() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let before = medium.clone();
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(8, 16);
    serve_and_flush(&mut guest, &mut vm, &mut medium);
    assert_eq!(guest.splitter.shadow().samples(), 1);
    guest.write(100, 8);
    guest.turn();
    guest.splitter.mask(generation(1));
    let (mut medium, mut vm) = (before, greeted(&mut guest, 2));
    vm.receive();
    assert!(vm.asked.iter().all(|asked| matches!(asked.access, Some((Operation::Read { .. }, _)))));
    vm.work(&mut medium);
    let notice = guest.notice();
    assert!(matches!(notice, Notice::OtherDisk(_, Mismatch::Sample(_))), "{notice:?}");
}
