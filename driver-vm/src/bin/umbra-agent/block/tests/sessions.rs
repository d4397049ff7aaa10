//! Sessions against results that the test gives.

use nix::errno::Errno;
use umbra_driver_vm::block_protocol::{MAX_BATCH, RECORD_BYTES, parse_hello};

use super::super::ring::{Action, Extent};
use super::super::session::{Name, Sessions, Work};
use super::*;

const READ: Operation = Operation::Read { place: 4096 };
const SECTORS: u64 = 1_000;

fn sessions() -> Sessions {
    Sessions::new(offer(0, disk(SECTORS, Window { start: 100, sectors: 800 })), GENERATION)
}

/// With a session that has begun.
fn begun() -> Sessions {
    let mut sessions = sessions();
    sessions.hear(&encode(&[ToService::Begin], 1)).unwrap();
    assert_eq!(hellos(&mut sessions, 1), 1);
    sessions
}

/// Hellos of session `attempt` among the buffers for the host.
fn hellos(sessions: &mut Sessions, attempt: u32) -> usize {
    let buffers = sessions.take_buffers();
    buffers.iter().filter(|buffer| matches!(parse_hello(buffer, link(attempt)), Ok(Some(_)))).count()
}

fn actions(sessions: &mut Sessions) -> Vec<(Name, Action)> {
    std::iter::from_fn(|| sessions.next_action()).collect()
}

fn extent(start: u64, count: u64) -> Extent {
    Extent { start: start * 512, length: count * 512 }
}

fn errno(errno: Errno) -> i32 {
    -(errno as i32)
}

#[test]
fn orders_are_handed_over_as_they_come_and_answered_as_they_end() {
    let mut sessions = begun();
    let orders = [
        access(1, Operation::Read { place: 0 }, range(100, 8)),
        access(2, Operation::Write { place: 8192 }, range(892, 8)),
        access(3, Operation::WriteZeroes { unmap: false }, range(200, 1)),
        access(4, Operation::WriteZeroes { unmap: true }, range(300, 1)),
        access(5, Operation::Discard, range(400, 100)),
        flush(6),
    ];
    sessions.hear(&encode(&orders, 1)).unwrap();
    let handed = [
        (1, Action::Read { at: extent(100, 8), place: 0 }),
        (2, Action::Write { at: extent(892, 8), place: 8192 }),
        (3, Action::Zero(extent(200, 1))),
        (4, Action::Punch(extent(300, 1))),
        (5, Action::Discard(extent(400, 100))),
        (6, Action::Flush),
    ];
    assert_eq!(actions(&mut sessions), handed);
    for (tag, result) in [(2, 4096), (6, 0), (1, 4096), (3, 0), (4, 0), (5, errno(Errno::EOPNOTSUPP))] {
        sessions.result(tag, result).unwrap();
    }
    let answers = [done(2, 4096), done(6, 0), done(1, 4096), done(3, 0), done(4, 0), failed(5, 95)];
    let buffers = sessions.take_buffers();
    assert_eq!(buffers.iter().map(|buffer| decode(buffer, 1)).collect::<Vec<_>>(), [answers]);
    // The tags are free again.
    sessions.hear(&encode(&orders, 1)).unwrap();
}

#[test]
fn of_what_may_take_long_it_is_said_that_the_disk_has_it() {
    let mut sessions = begun();
    assert_eq!(sessions.work(), None);
    sessions.hear(&encode(&[access(1, READ, range(100, 8))], 1)).unwrap();
    sessions.say_at_work();
    assert_eq!((sessions.work(), sessions.take_buffers().len()), (Some(Work::Quick), 0));
    sessions.hear(&encode(&[access(2, Operation::WriteZeroes { unmap: true }, range(300, 1))], 1)).unwrap();
    sessions.say_at_work();
    let said = sessions.take_buffers();
    assert_eq!(decode(&said[0], 1), [FromService::AtWork { tag: Tag(2) }]);
    assert_eq!(sessions.work(), Some(Work::Slow));
    sessions.result(2, 0).unwrap();
    assert_eq!(sessions.work(), Some(Work::Quick));
    sessions.host_is_gone();
    sessions.result(1, 4096).unwrap();
    assert_eq!(sessions.work(), Some(Work::Slow), "the flush after a session");
    sessions.say_at_work();
    assert!(sessions.take_buffers().is_empty(), "nobody is there to hear it");
}

#[test]
fn errors_that_may_be_the_driver_s_are_known() {
    let mut sessions = begun();
    for (tag, order, error, is_noted) in [
        (1, access(1, READ, range(100, 8)), Errno::ENODATA, false),
        (2, flush(2), Errno::ENOSPC, true),
        (3, flush(3), Errno::EIO, false),
    ] {
        sessions.hear(&encode(&[order], 1)).unwrap();
        assert_eq!(sessions.result(tag, errno(error)).is_err(), order == flush(tag));
        assert_eq!(sessions.take_error(), is_noted.then_some((1, error)), "{error}");
    }
}

#[test]
fn places_are_those_of_the_end_s_own_share() {
    let mut sessions = Sessions::new(offer(3, disk(SECTORS, Window { start: 0, sectors: SECTORS })), GENERATION);
    sessions.hear(&encode(&[ToService::Begin], 1)).unwrap();
    sessions.hear(&encode(&[access(1, READ, range(0, 8))], 1)).unwrap();
    assert_eq!(actions(&mut sessions), [(1, Action::Read { at: extent(0, 8), place: 3 * HUGE_PAGE + 4096 })]);
}

#[test]
fn what_is_out_of_bounds_or_out_of_turn_ends_the_session_without_being_done() {
    let blocks = |logical_block| {
        let mut disk = disk(SECTORS, Window { start: 104, sectors: 800 });
        disk.identity.logical_block = logical_block;
        let mut sessions = Sessions::new(offer(0, disk), GENERATION);
        sessions.hear(&encode(&[ToService::Begin], 1)).unwrap();
        sessions
    };
    let last = HUGE_PAGE as u64 - 4096;
    let wrong = [
        vec![access(1, READ, range(99, 2))],
        vec![access(1, READ, range(900, 8))],
        vec![access(1, READ, range(u64::MAX - 1, 1))],
        vec![access(1, Operation::Discard, range(0, 900))],
        vec![access(1, Operation::Read { place: last }, range(200, 16))],
        vec![access(1, Operation::Write { place: u64::MAX - 511 }, range(200, 1))],
        vec![access(1, Operation::Write { place: 512 }, range(200, 1))],
    ];
    for orders in wrong {
        let mut sessions = begun();
        let what = sessions.hear(&encode(&orders, 1)).unwrap_err();
        assert!(!what.is_empty() && !sessions.listens());
        assert_eq!(actions(&mut sessions), [(256, Action::Flush)], "{what}");
    }
    assert!(blocks(4096).hear(&encode(&[access(1, READ, range(200, 8))], 1)).is_ok());
    assert!(blocks(4096).hear(&encode(&[access(1, READ, range(201, 8))], 1)).is_err());
    assert!(blocks(4096).hear(&encode(&[access(1, READ, range(200, 7))], 1)).is_err());

    let twice = [access(1, READ, range(200, 1)), access(1, READ, range(300, 1))];
    assert!(begun().hear(&encode(&twice, 1)).unwrap_err().contains("second order 1"));
    let mut sessions = begun();
    let too_many: Vec<_> = (0..=DEPTH).map(|tag| access(tag, READ, range(200, 1))).collect();
    let heard = too_many.chunks(MAX_BATCH).try_for_each(|orders| sessions.hear(&encode(orders, 1)));
    assert!(heard.unwrap_err().contains("more than 128 orders"));
    assert!(sessions.take_buffers().is_empty());

    assert!(begun().hear(&encode(&[flush(1)], 2)).is_err(), "of a session that has not begun");
    assert!(super::sessions::sessions().hear(&encode(&[flush(1)], 1)).is_err(), "before any session");
    assert!(begun().hear(&encode(&[ToService::Begin], 1)).is_err(), "begun twice");
    assert!(begun().hear(&[0; RECORD_BYTES]).is_err());
    assert!(begun().hear(&[1; RECORD_BYTES - 1]).is_err());
    let of_another_life = flush(1).encode(LinkId { generation: GENERATION.next(), attempt: 1 });
    assert!(begun().hear(&of_another_life).is_err());
}

#[test]
fn the_next_session_is_greeted_when_nothing_of_the_last_is_in_flight() {
    let mut sessions = begun();
    sessions.hear(&encode(&[access(1, READ, range(200, 8)), access(2, READ, range(300, 8))], 1)).unwrap();
    sessions.result(1, 4096).unwrap();
    // The answer to 1 was not written yet; it is not for the next session.
    sessions.hear(&encode(&[ToService::Begin], 4)).unwrap();
    assert!(!sessions.listens() && sessions.take_buffers().is_empty());
    assert_eq!(actions(&mut sessions).len(), 2, "what was received is done");
    sessions.result(2, 4096).unwrap();
    assert!(!sessions.listens() && sessions.take_buffers().is_empty());
    assert_eq!(actions(&mut sessions), [(256, Action::Flush)]);
    sessions.result(256, 0).unwrap();
    assert!(sessions.listens());
    assert_eq!(hellos(&mut sessions, 4), 1);
    assert!(sessions.take_buffers().is_empty(), "an answer to an earlier session");
    // What has waited in the kernel.
    sessions.hear(&encode(&[flush(7), ToService::Begin], 1)).unwrap();
    sessions.hear(&encode(&[ToService::Begin], 3)).unwrap();
    assert_eq!(actions(&mut sessions), []);
    sessions.hear(&encode(&[flush(7)], 4)).unwrap();
    assert_eq!(actions(&mut sessions), [(7, Action::Flush)]);
}

#[test]
fn a_host_whose_first_words_come_before_the_kernel_knows_of_it_is_not_gone() {
    let mut sessions = sessions();
    sessions.hear(&encode(&[ToService::Begin], 1)).unwrap();
    sessions.host_is_gone();
    assert_eq!(hellos(&mut sessions, 1), 1, "it is greeted");
    assert!(sessions.is_fresh() && sessions.is_idle());
    sessions.hear(&encode(&[flush(3)], 1)).unwrap();
    assert!(!sessions.is_fresh() && !sessions.is_idle());
    sessions.result(3, 0).unwrap();
    assert!(sessions.is_idle());
    sessions.host_is_gone();
    assert!(!sessions.is_idle(), "what it wrote is flushed first");
}

#[test]
fn what_a_gone_host_wrote_is_flushed() {
    let mut sessions = begun();
    sessions.hear(&encode(&[access(1, Operation::Write { place: 0 }, range(200, 8))], 1)).unwrap();
    sessions.host_is_gone();
    assert_eq!(actions(&mut sessions).len(), 1);
    sessions.result(1, 4096).unwrap();
    assert_eq!(actions(&mut sessions), [(256, Action::Flush)]);
    assert!(!sessions.listens());
    assert_eq!(sessions.result(256, errno(Errno::EIO)), Err(Errno::EIO), "reported, and no reason to end");
    assert!(sessions.hides_a_loss(), "until a host is told");
    assert!(!sessions.is_closed() && sessions.listens() && sessions.take_buffers().is_empty());
    // What it sent and was not read before it went.
    sessions.hear(&encode(&[ToService::Begin, flush(3)], 1)).unwrap();
    assert_eq!(actions(&mut sessions), []);
    sessions.hear(&encode(&[ToService::Begin], 2)).unwrap();
    assert_eq!(actions(&mut sessions), [(256, Action::Flush)], "again: it has failed before");
    sessions.result(256, 0).unwrap();
    let buffers = sessions.take_buffers();
    assert!(parse_hello(&buffers[0], link(2)).unwrap().is_some());
    assert_eq!(decode(&buffers[1], 2), [FromService::CacheLost], "for a host that has its log");
}

#[test]
fn a_flush_that_failed_when_its_host_had_gone_may_have_dropped_what_that_wrote() {
    let mut sessions = begun();
    sessions.hear(&encode(&[flush(1)], 1)).unwrap();
    sessions.host_is_gone();
    assert_eq!(sessions.result(1, errno(Errno::EIO)), Err(Errno::EIO));
    sessions.result(256, 0).unwrap();
    assert!(sessions.is_idle() && sessions.hides_a_loss(), "the next flush cannot know of it");
}

#[test]
fn a_host_that_breaks_the_protocol_is_flushed_and_cut_off() {
    let mut sessions = begun();
    assert!(sessions.hear(&[0; RECORD_BYTES]).is_err());
    assert!(!sessions.is_closed());
    assert_eq!(actions(&mut sessions), [(256, Action::Flush)]);
    sessions.result(256, 0).unwrap();
    assert!(sessions.is_closed() && !sessions.is_closed() && sessions.listens());
}

#[test]
fn a_host_that_has_not_come_yet_is_not_gone() {
    let mut sessions = sessions();
    sessions.host_is_gone();
    assert!(sessions.listens() && !sessions.is_closed());
    assert_eq!(actions(&mut sessions), []);
}

#[test]
fn the_rest_of_a_short_transfer_is_tried_once() {
    let order = access(1, Operation::Write { place: 4096 }, range(200, 8));
    let rest = Action::Write { at: extent(202, 6), place: 4096 + 1024 };
    for (second, answer) in [(3072, done(1, 4096)), (1024, failed(1, 5)), (errno(Errno::ENODATA), failed(1, 61))] {
        let mut sessions = begun();
        sessions.hear(&encode(std::slice::from_ref(&order), 1)).unwrap();
        actions(&mut sessions);
        sessions.result(1, 1024).unwrap();
        assert!(sessions.take_buffers().is_empty());
        assert_eq!(actions(&mut sessions), [(1, rest)]);
        sessions.result(1, second).unwrap();
        assert_eq!(actions(&mut sessions), []);
        assert_eq!(decode(&sessions.take_buffers()[0], 1), [answer]);
    }
    for wrong in [100, 8192] {
        let mut sessions = begun();
        sessions.hear(&encode(std::slice::from_ref(&order), 1)).unwrap();
        actions(&mut sessions);
        sessions.result(1, wrong).unwrap();
        assert_eq!(decode(&sessions.take_buffers()[0], 1), [failed(1, 5)]);
    }
}

#[test]
fn zeroes_are_written_where_the_device_cannot_deallocate() {
    let mut sessions = begun();
    let order = access(1, Operation::WriteZeroes { unmap: true }, range(200, 8));
    for (second, answer) in [(0, done(1, 0)), (errno(Errno::EOPNOTSUPP), failed(1, 95))] {
        sessions.hear(&encode(std::slice::from_ref(&order), 1)).unwrap();
        assert_eq!(actions(&mut sessions), [(1, Action::Punch(extent(200, 8)))]);
        sessions.result(1, errno(Errno::EOPNOTSUPP)).unwrap();
        assert_eq!(actions(&mut sessions), [(1, Action::Zero(extent(200, 8)))]);
        sessions.result(1, second).unwrap();
        assert_eq!(decode(&sessions.take_buffers()[0], 1), [answer]);
    }
}

#[test]
fn a_lost_cache_is_reported_before_every_later_answer_and_outlives_a_session() {
    let mut sessions = begun();
    sessions.hear(&encode(&[flush(1), flush(2)], 1)).unwrap();
    sessions.cache_lost();
    sessions.result(1, 0).unwrap();
    assert_eq!(decode(&sessions.take_buffers()[0], 1), [FromService::CacheLost, done(1, 0)]);
    sessions.result(2, 0).unwrap();
    assert_eq!(decode(&sessions.take_buffers()[0], 1), [done(2, 0)]);
    sessions.host_is_gone();
    sessions.cache_lost();
    sessions.result(256, 0).unwrap();
    sessions.hear(&encode(&[ToService::Begin], 2)).unwrap();
    sessions.result(256, 0).unwrap();
    let buffers = sessions.take_buffers();
    assert!(parse_hello(&buffers[0], link(2)).unwrap().is_some());
    assert_eq!(decode(&buffers[1], 2), [FromService::CacheLost]);
}

#[test]
fn answers_fit_the_buffers_of_the_protocol() {
    let mut sessions = begun();
    let orders: Vec<_> = (0..DEPTH).map(flush).collect();
    for orders in orders.chunks(MAX_BATCH) {
        sessions.hear(&encode(orders, 1)).unwrap();
    }
    (0..DEPTH).try_for_each(|tag| sessions.result(tag, 0)).unwrap();
    sessions.cache_lost();
    let lengths: Vec<_> = sessions.take_buffers().iter().map(|buffer| decode(buffer, 1).len()).collect();
    assert_eq!(lengths, [64, 64, 1]);
}
