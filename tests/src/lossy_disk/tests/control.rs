//! What a scenario orders, and what its disk does then.

use std::fs::File;
use std::time::Duration;

use super::{BYTES, Rig, SECTORS, firsts, sectors};
use crate::lossy_disk::protocol::{
    NBD_CMD_DISC, NBD_CMD_FLAG_FUA, NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_EIO, NBD_EPERM, NBD_FLAG_READ_ONLY,
};
use crate::lossy_disk::{Access, Class, LossyDisk, SECTOR, Settings, Times};

/// Longer than any test: a request with this delay comes when the delay is taken back.
const LONG: Duration = Duration::from_secs(24 * 3600);
const SECTOR_BYTES: u64 = SECTOR as u64;

#[test]
fn a_write_of_several_sectors_is_torn() {
    let rig = Rig::with(&Settings { seed: 3, ..Settings::default() });
    let mut client = rig.client();
    let mut torn = 0;
    for round in 1..=32 {
        client.write(0, &sectors(8, round)).unwrap();
        rig.disk.lose(1.0);
        let left = firsts(&client.read(0, 8 * 512).unwrap());
        let new = left.iter().filter(|&&byte| byte == round).count();
        torn += usize::from((1..8).contains(&new));
    }
    assert!(torn >= 8, "{torn} of 32 writes were torn");
}

#[test]
fn what_is_written_durably_survives_a_total_loss() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.write(0, &sectors(4, 1)).unwrap();
    client.ask(NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, SECTOR_BYTES, 512, &sectors(1, 2)).unwrap();
    assert_eq!(rig.disk.lose(1.0).lost, 3);
    assert_eq!(firsts(&client.read(0, 4 * 512).unwrap()), [0, 2, 0, 0]);
    assert_eq!(rig.base(4), [0, 2, 0, 0]);
}

#[test]
fn what_a_disk_that_lies_calls_durable_is_lost() {
    let rig = Rig::with(&Settings { ignores_fua: true, ..Settings::default() });
    let mut client = rig.client();
    client.ask(NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 0, 512, &sectors(1, 2)).unwrap();
    assert_eq!(rig.disk.lose(1.0).lost, 1);
    assert_eq!(firsts(&client.read(0, 512).unwrap()), [0]);
}

#[test]
fn the_same_seed_loses_the_same_sectors() {
    let left = |seed| {
        let rig = Rig::with(&Settings { seed, ..Settings::default() });
        let mut client = rig.client();
        client.write(0, &sectors(64, 1)).unwrap();
        rig.disk.lose(0.5);
        client.read(0, u32::try_from(BYTES).unwrap()).unwrap()
    };
    assert_eq!(left(5), left(5));
    assert_ne!(left(5), left(6));
}

#[test]
fn what_a_loss_has_left_may_be_lost_later() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.write(0, &sectors(64, 1)).unwrap();
    let first = rig.disk.lose(0.5);
    assert!((8..56).contains(&first.lost), "{first:?}");
    assert_eq!(rig.disk.lose(0.0).lost, 0);
    assert_eq!(rig.disk.lose(1.0).lost, first.kept);
    assert_eq!(rig.base(64), [0; 64]);
}

#[test]
fn a_flush_covers_what_was_complete_when_it_came_and_no_more() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.write(0, &sectors(2, 1)).unwrap();
    rig.disk.delay(Class::Flush, LONG);
    let flush = client.start_flush();
    rig.wait(|state| state.waiting == 1);
    // Sector 1 is written again, sector 2 for the first time.
    client.write(SECTOR_BYTES, &sectors(2, 2)).unwrap();
    rig.disk.delay(Class::Flush, Duration::ZERO);
    assert_eq!(client.answer().unwrap(), (flush, 0, Vec::new()));
    assert_eq!(firsts(&client.read(0, 3 * 512).unwrap()), [1, 2, 2]);
    rig.disk.lose(1.0);
    assert_eq!(firsts(&client.read(0, 3 * 512).unwrap()), [1, 1, 0]);
}

#[test]
fn a_flush_fails_if_a_loss_took_what_it_covers() {
    let rig = Rig::new();
    let mut client = rig.client();
    rig.disk.delay(Class::Flush, LONG);
    let early = client.start_flush();
    rig.wait(|state| state.waiting == 1);
    client.write(0, &sectors(1, 1)).unwrap();
    let late = client.start_flush();
    rig.wait(|state| state.waiting == 2);
    rig.disk.lose(1.0);
    rig.disk.delay(Class::Flush, Duration::ZERO);
    let mut answers = [client.answer().unwrap(), client.answer().unwrap()];
    answers.sort();
    assert_eq!(answers, [(early, 0, Vec::new()), (late, NBD_EIO, Vec::new())]);
}

#[test]
fn after_a_failed_flush_only_another_write_helps() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.write(0, &sectors(4, 1)).unwrap();
    // The range is that of sectors 1 to 3; sector 0 is flushed in spite of the error.
    rig.disk.fail(Class::Flush, SECTOR_BYTES..BYTES, Times::Once);
    assert_eq!(client.flush(), Err(NBD_EIO));
    client.flush().unwrap();
    assert_eq!(rig.disk.state().given_up, 3);
    assert_eq!(firsts(&client.read(0, 4 * 512).unwrap()), [1, 1, 1, 1]);
    assert_eq!(rig.base(4), [1, 0, 0, 0]);
    client.write(SECTOR_BYTES, &sectors(1, 2)).unwrap();
    client.ask(NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 2 * SECTOR_BYTES, 512, &sectors(1, 3)).unwrap();
    client.flush().unwrap();
    assert_eq!(firsts(&client.read(0, 4 * 512).unwrap()), [1, 2, 3, 1]);
    assert_eq!(rig.disk.lose(1.0).lost, 1);
    assert_eq!(firsts(&client.read(0, 4 * 512).unwrap()), [1, 2, 3, 0]);
}

#[test]
fn errors_come_by_class_and_range() {
    let rig = Rig::new();
    let mut client = rig.client();
    rig.disk.fail(Class::Read, 512..1024, Times::Always);
    rig.disk.fail(Class::Write, 0..512, Times::Once);
    rig.disk.fail(Class::Flush, 0..BYTES, Times::Once);
    assert_eq!(client.read(0, 1024), Err(NBD_EIO));
    assert_eq!(client.read(512, 512), Err(NBD_EIO));
    client.read(0, 512).unwrap();
    client.read(1024, 512).unwrap();
    assert_eq!(client.write(0, &sectors(2, 1)), Err(NBD_EIO));
    assert_eq!(rig.disk.state().unflushed, 0);
    client.write(0, &sectors(2, 1)).unwrap();
    assert_eq!((client.flush(), client.flush()), (Err(NBD_EIO), Ok(())));
    assert_eq!(rig.disk.state().failed, 4);
    rig.disk.heal();
    assert_eq!(firsts(&client.read(0, 1024).unwrap()), [1, 1]);
}

#[test]
fn a_stall_ends_when_told() {
    let rig = Rig::new();
    let mut client = rig.client();
    rig.disk.stall();
    let mut sent = vec![client.start_write(0, &sectors(1, 1)), client.start_flush()];
    sent.push(client.start(NBD_CMD_READ, 0, 512, 512, &[]));
    rig.wait(|state| state.waiting == 3);
    assert_eq!(rig.disk.state().unflushed, 0);
    rig.disk.resume();
    let mut answered: Vec<u64> = (0..3).map(|_| client.answer().unwrap().0).collect();
    answered.sort_unstable();
    assert_eq!(answered, sent);
}

#[test]
fn a_stalled_disk_can_be_dropped() {
    let rig = Rig::new();
    let mut client = rig.client();
    rig.disk.stall();
    client.start_flush();
    rig.wait(|state| state.waiting == 1);
    drop(rig);
    assert!(client.is_cut_off());
}

#[test]
fn what_a_client_sent_before_it_was_killed_is_not_served_later() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.write(512, &sectors(1, 1)).unwrap();
    rig.disk.stall();
    client.start_write(0, &sectors(1, 1));
    client.start_flush();
    rig.wait(|state| state.waiting == 2);
    drop(client);
    rig.wait(|state| state.waiting == 0);
    rig.disk.resume();
    let mut client = rig.client();
    assert_eq!(firsts(&client.read(0, 1024).unwrap()), [0, 1]);
    // Its flush does not matter any more, either: what it covered is not written back when it is overwritten.
    client.write(512, &sectors(1, 2)).unwrap();
    assert_eq!((rig.disk.state().written_back, rig.disk.state().flushed), (0, 0));
}

#[test]
fn what_a_client_sent_before_it_left_is_served() {
    let rig = Rig::new();
    let mut client = rig.client();
    rig.disk.stall();
    let write = client.start_write(0, &sectors(1, 1));
    client.start(NBD_CMD_DISC, 0, 0, 0, &[]);
    rig.wait(|state| state.waiting == 1);
    rig.disk.resume();
    assert_eq!(client.answer().unwrap(), (write, 0, Vec::new()));
    assert!(client.is_cut_off());
    assert_eq!(firsts(&rig.client().read(0, 512).unwrap()), [1]);
}

#[test]
fn answers_come_out_of_order() {
    let rig = Rig::new();
    let mut client = rig.client();
    rig.disk.delay(Class::Read, LONG);
    let read = client.start(NBD_CMD_READ, 0, 0, 512, &[]);
    let write = client.start_write(0, &sectors(1, 7));
    assert_eq!(client.answer().unwrap().0, write);
    rig.disk.delay(Class::Read, Duration::ZERO);
    assert_eq!(client.answer().unwrap(), (read, 0, sectors(1, 7)));
}

#[test]
fn what_is_released_waits_no_longer_and_what_comes_later_does() {
    let rig = Rig::new();
    let mut client = rig.client();
    rig.disk.delay(Class::Write, LONG);
    let first = client.start_write(0, &sectors(1, 1));
    rig.wait(|state| state.waiting == 1);
    rig.disk.release();
    assert_eq!(client.answer().unwrap().0, first);
    let second = client.start_write(0, &sectors(1, 2));
    assert_eq!(firsts(&client.read(0, 512).unwrap()), [1]);
    rig.disk.delay(Class::Write, Duration::ZERO);
    assert_eq!(client.answer().unwrap().0, second);
}

#[test]
fn of_requests_that_are_due_a_random_one_is_next() {
    let order = |seed| {
        let rig = Rig::with(&Settings { seed, ..Settings::default() });
        let mut client = rig.client();
        rig.disk.stall();
        let sent: Vec<u64> = (0..32).map(|_| client.start_flush()).collect();
        rig.wait(|state| state.waiting == 32);
        rig.disk.resume();
        let answered: Vec<u64> = (0..32).map(|_| client.answer().unwrap().0).collect();
        let mut sorted = answered.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, sent);
        answered
    };
    assert_eq!(order(1), order(1));
    assert_ne!(order(1), order(2));
}

#[test]
fn a_reconnecting_client_finds_the_cache() {
    let rig = Rig::new();
    rig.client().write(0, &sectors(1, 1)).unwrap();
    let mut client = rig.client();
    assert_eq!(firsts(&client.read(0, 512).unwrap()), [1]);
    client.flush().unwrap();
    assert_eq!(rig.base(1), [1]);
    assert_eq!(rig.disk.state().connections, 2);
}

#[test]
fn a_swapped_disk_of_the_same_size_comes_unnoticed() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.write(0, &sectors(1, 1)).unwrap();
    client.flush().unwrap();
    client.write(0, &sectors(1, 2)).unwrap();
    let (before, first) = (rig.disk.base_sha256().unwrap(), rig.base.clone());
    rig.disk.swap(&rig.other("other", BYTES, 9), Access::ReadWrite).unwrap();
    assert_ne!(rig.disk.base_sha256().unwrap(), before);
    assert_eq!(firsts(&client.read(0, 512).unwrap()), [9]);
    client.write(0, &sectors(1, 3)).unwrap();
    client.flush().unwrap();
    // What was flushed to the first disk is there, the rest was lost with its cache.
    rig.disk.swap(&first, Access::ReadWrite).unwrap();
    assert_eq!(rig.disk.base_sha256().unwrap(), before);
    assert_eq!(firsts(&client.read(0, 512).unwrap()), [1]);
}

#[test]
fn a_swapped_disk_of_another_kind_has_its_clients_connect_again() {
    let rig = Rig::new();
    let mut client = rig.client();
    assert_eq!((client.export.0, client.export.1 & NBD_FLAG_READ_ONLY), (BYTES, 0));
    let smaller = rig.other("smaller", BYTES / 2, 9);
    rig.disk.swap(&smaller, Access::ReadWrite).unwrap();
    assert!(client.is_cut_off());
    client = rig.client();
    assert_eq!(client.export.0, BYTES / 2);
    rig.disk.swap(&smaller, Access::ReadOnly).unwrap();
    assert!(client.is_cut_off());
    client = rig.client();
    assert_eq!(client.export.1 & NBD_FLAG_READ_ONLY, NBD_FLAG_READ_ONLY);
    assert_eq!(client.write(0, &sectors(1, 1)), Err(NBD_EPERM));
    assert_eq!(client.ask(NBD_CMD_TRIM, 0, 0, 512, &[]), Err(NBD_EPERM));
    client.flush().unwrap();
    assert_eq!(firsts(&client.read(0, 512).unwrap()), [9]);
}

#[test]
fn requests_under_way_do_not_reach_the_disk_that_is_swapped_in() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.write(0, &sectors(1, 1)).unwrap();
    rig.disk.stall();
    let sent = [client.start_flush(), client.start_write(0, &sectors(1, 2))];
    rig.wait(|state| state.waiting == 2);
    let other = rig.other("other", BYTES, 9);
    rig.disk.swap(&other, Access::ReadWrite).unwrap();
    rig.disk.resume();
    let mut answers = [client.answer().unwrap(), client.answer().unwrap()];
    answers.sort();
    assert_eq!(answers, sent.map(|cookie| (cookie, NBD_EIO, Vec::new())));
    client.flush().unwrap();
    assert_eq!(firsts(&client.read(0, 512).unwrap()), [9]);
}

#[test]
fn a_disk_that_cannot_be_swapped_in_leaves_the_old_one() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.write(0, &sectors(1, 1)).unwrap();
    assert!(rig.disk.swap(&rig.other("odd", 513, 0), Access::ReadWrite).is_err());
    assert!(rig.disk.swap(&rig.dir.path().join("none"), Access::ReadWrite).is_err());
    assert_eq!(firsts(&client.read(0, 512).unwrap()), [1]);
    assert!(LossyDisk::start(&rig.dir.path().join("odd"), &Settings::default()).is_err());
}

#[test]
fn the_first_request_after_a_loss_is_noted() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.read(0, 512).unwrap();
    assert_eq!(rig.disk.state().first_after_loss, None);
    let fenced = rig.disk.state().requests;
    assert_eq!(rig.disk.lose(1.0).requests, fenced);
    assert_eq!(rig.disk.state().first_after_loss, None);
    let before = crate::peer::now_us();
    client.read(0, 512).unwrap();
    client.read(0, 512).unwrap();
    let first = rig.disk.state().first_after_loss.unwrap();
    assert_eq!(first.number, fenced + 1);
    assert!((before..=crate::peer::now_us()).contains(&first.at_us));
    rig.disk.lose(0.0);
    assert_eq!(rig.disk.state().first_after_loss, None);
}

#[test]
fn the_cache_is_as_large_as_said() {
    for (cache_sectors, unflushed) in [(0, 0), (5, 5), (100, 20)] {
        let rig = Rig::with(&Settings { cache_sectors, write_back: 0.0, seed: 1, ..Settings::default() });
        rig.client().write(0, &sectors(20, 1)).unwrap();
        let state = rig.disk.state();
        assert_eq!((state.unflushed, state.written_back), (unflushed, 20 - unflushed));
    }
}

#[test]
fn what_is_trimmed_reads_as_zeroes_and_a_long_range_at_once() {
    let rig = Rig::new();
    let long = 64 << 20;
    let large = rig.dir.path().join("large");
    File::create(&large).unwrap().set_len(long).unwrap();
    rig.disk.swap(&large, Access::ReadWrite).unwrap();
    let mut client = rig.client();
    client.ask(NBD_CMD_WRITE, NBD_CMD_FLAG_FUA, 0, 1024, &sectors(2, 1)).unwrap();
    client.ask(NBD_CMD_TRIM, 0, 0, 512, &[]).unwrap();
    assert_eq!(firsts(&client.read(0, 1024).unwrap()), [0, 1]);
    rig.disk.lose(1.0);
    assert_eq!(firsts(&client.read(0, 1024).unwrap()), [1, 1]);
    client.write(512, &sectors(1, 2)).unwrap();
    client.ask(NBD_CMD_TRIM, 0, 0, u32::try_from(long).unwrap(), &[]).unwrap();
    assert_eq!(rig.disk.state().unflushed, 0);
    assert_eq!(firsts(&client.read(0, 1024).unwrap()), [0, 0]);
}

#[test]
fn the_hash_is_that_of_the_base_alone() {
    let rig = Rig::new();
    let mut client = rig.client();
    let empty = rig.disk.base_sha256().unwrap();
    // As `head -c 32768 /dev/zero | sha256sum` prints it.
    assert_eq!(SECTORS * SECTOR_BYTES, 32_768);
    assert_eq!(empty, "c35020473aed1b4642cd726cad727b63fff2824ad68cedd7ffb73c7cbd890479");
    client.write(0, &sectors(1, 1)).unwrap();
    assert_eq!(rig.disk.base_sha256().unwrap(), empty);
    client.flush().unwrap();
    assert_ne!(rig.disk.base_sha256().unwrap(), empty);
}
