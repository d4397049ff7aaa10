//! A driver VM that says what must not be said: its link ends with the reason, no call panics, and the guest goes on with the next life
//! as if nothing had been.

use proptest::prelude::*;
use umbra_driver_vm::block_protocol::{
    FromService, Hello, MAX_BATCH, MAX_DEPTH, PoolRange, RECORD_BYTES, ToService, encode_hello,
};
use umbra_shadow::block::{Failure, ModeName, Status, Tag, Violation, WriteCache};
use umbra_splitter::block::Notice;
use umbra_splitter::block::link::LinkError;
use umbra_splitter::block::pool::PoolError;
use vm_memory::{Bytes, GuestAddress};

use crate::common::WRITE;
use crate::guest::{Guest, attached, link, live, serve, serve_and_flush, use_up_buffers};
use crate::medium::Medium;
use crate::vm::{MEMORY, POOL, TX_DATA, Vm};

/// What the guest waits for when the driver VM does its worst.
struct Scene {
    guest: Guest,
    medium: Medium,
    vm: Vm,
}

impl Scene {
    /// A read and a write are in flight, and a write is in the log.
    fn new() -> Self {
        let (mut guest, mut medium) = (Guest::new(), Medium::new());
        let mut vm = live(&mut guest, 1, &mut medium);
        guest.write(50, 8);
        serve(&mut guest, &mut vm, &mut medium);
        guest.read(48, 12);
        guest.write(70, 8);
        guest.turn();
        vm.receive();
        assert_eq!(vm.asked.len(), 2);
        Self { guest, medium, vm }
    }

    fn done(&self, tag: u16, bytes: u64) -> [u8; RECORD_BYTES] {
        FromService::Done { tag: Tag(tag), errno: 0, bytes }.encode(self.vm.link)
    }

    fn tag(&self, index: usize) -> u16 {
        self.vm.asked[index].tag.0
    }

    /// The link has ended by a broken rule; and the guest's requests are served by the next life, which has lost the cache.
    fn ends(&mut self) -> LinkError {
        let Notice::Lost(lost, error) = self.guest.notice() else { panic!() };
        assert_eq!(lost, link(1));
        assert!(!error.is_closed() && !error.is_stalled(), "{error:?}");
        assert_eq!(self.guest.splitter.shadow().mode(), ModeName::Masking);
        self.medium.lose_cache(|| false);
        let Self { guest, medium, .. } = self;
        let mut vm = live(guest, 2, medium);
        serve_and_flush(guest, &mut vm, medium);
        guest.assert_stable(medium);
        assert!(guest.finished().iter().all(|(_, status)| *status == Status::Ok));
        error
    }

    fn ends_after(&mut self, bytes: &[u8]) -> LinkError {
        self.vm.send(bytes);
        self.ends()
    }
}

fn violation(error: LinkError) -> Violation {
    match error {
        LinkError::Failed(Failure::Violation(violation)) => violation,
        other => panic!("{other:?}"),
    }
}

#[test]
fn answers_to_what_was_not_ordered_or_is_answered_end_the_link() {
    let mut scene = Scene::new();
    let unknown = scene.done(20, 0);
    assert_eq!(violation(scene.ends_after(&unknown)), Violation::UnknownTag(20));
    let mut scene = Scene::new();
    let past_the_depth = scene.done(200, 0);
    assert_eq!(violation(scene.ends_after(&past_the_depth)), Violation::UnknownTag(200));
    let mut scene = Scene::new();
    let tag = scene.tag(0);
    let twice = [scene.done(tag, 12 * 512), scene.done(tag, 12 * 512)].concat();
    let asked = scene.vm.asked[0];
    scene.vm.carry_out(&asked, &mut scene.medium);
    assert_eq!(violation(scene.ends_after(&twice)), Violation::UnknownTag(tag));
}

#[test]
fn answers_of_a_wrong_length_end_the_link_and_bring_the_guest_no_data() {
    for bytes in [0, 511, 11 * 512, 13 * 512, u64::MAX] {
        let mut scene = Scene::new();
        let wrong = scene.done(scene.tag(0), bytes);
        let expected = Violation::WrongLength { expected: 12 * 512, got: bytes };
        assert_eq!(violation(scene.ends_after(&wrong)), expected);
    }
    let mut scene = Scene::new();
    let wrong = scene.done(scene.tag(1), 7 * 512);
    assert_eq!(violation(scene.ends_after(&wrong)), Violation::WrongLength { expected: 8 * 512, got: 7 * 512 });
}

#[test]
fn an_answer_to_an_order_that_waits_for_a_buffer_ends_the_link() {
    // It can guess the tag.
    for tag in 0..24 {
        let mut scene = Scene::new();
        let Scene { guest, medium, vm } = &mut scene;
        use_up_buffers(guest, vm, medium);
        guest.write(600, 1);
        guest.turn();
        vm.receive();
        assert!(vm.asked.is_empty());
        let early = scene.done(tag, 512);
        assert_eq!(violation(scene.ends_after(&early)), Violation::UnknownTag(tag));
    }
}

#[test]
fn a_sample_of_a_wrong_length_ends_the_link() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    guest.write(8, 8);
    serve_and_flush(&mut guest, &mut vm, &mut medium);
    assert_eq!(guest.splitter.shadow().samples(), 1);
    guest.splitter.mask(link(1).generation);
    let mut vm = crate::guest::greeted(&mut guest, 2);
    vm.receive();
    let tag = vm.asked[0].tag;
    vm.say(FromService::Done { tag, errno: 0, bytes: 512 });
    let Notice::Lost(_, error) = guest.notice() else { panic!() };
    assert_eq!(violation(error), Violation::WrongLength { expected: 4096, got: 512 });
}

#[test]
fn what_is_no_record_ends_the_link() {
    let cases: [fn(&Scene) -> Vec<u8>; 9] = [
        |_| vec![0; RECORD_BYTES],
        |_| vec![0xff; RECORD_BYTES],
        |scene| scene.done(0, 0)[..RECORD_BYTES - 1].to_vec(),
        |scene| [scene.done(0, 0).to_vec(), vec![1]].concat(),
        |scene| scene.done(MAX_DEPTH, 0).to_vec(),
        |scene| ToService::Flush { tag: Tag(0) }.encode(scene.vm.link).to_vec(),
        // Of a session that has not begun, and of another life.
        |scene| FromService::CacheLost.encode(scene.vm.link.next()).to_vec(),
        |_| FromService::CacheLost.encode(link(2)).to_vec(),
        // A second hello.
        |scene| encode_hello(&scene.vm.hello(), scene.vm.link).unwrap(),
    ];
    for case in cases {
        let mut scene = Scene::new();
        let bytes = case(&scene);
        assert!(matches!(scene.ends_after(&bytes), LinkError::Protocol(_)), "{bytes:?}");
    }
}

#[test]
fn buffers_of_a_wrong_length_or_direction_end_the_link() {
    // Longer than a page: one record too many.
    let mut scene = Scene::new();
    let length = u32::try_from((MAX_BATCH + 1) * RECORD_BYTES).unwrap();
    scene.vm.tx.offer(&[(TX_DATA, length, 0)]);
    assert!(matches!(scene.ends(), LinkError::Protocol(_)));
    let mut scene = Scene::new();
    scene.vm.tx.offer(&[(TX_DATA, 64, 0), (TX_DATA + 64, 64, WRITE)]);
    assert!(matches!(scene.ends(), LinkError::Chain(_)));
    let mut scene = Scene::new();
    scene.vm.tx.offer(&[(MEMORY - 32, 64, 0)]);
    assert!(matches!(scene.ends(), LinkError::Chain(_)));
    let mut scene = Scene::new();
    scene.vm.tx.set_avail_idx(scene.vm.tx.avail_idx.wrapping_add(1000));
    assert!(matches!(scene.ends(), LinkError::Ring(_)));
}

#[test]
fn receive_buffers_that_hold_no_record_end_the_link() {
    let cases: [(u64, u32, u16); 3] = [(TX_DATA, 63, WRITE), (TX_DATA, 4096, 0), (MEMORY - 64, 4096, WRITE)];
    for case in cases {
        let mut scene = Scene::new();
        let Scene { guest, medium, vm } = &mut scene;
        use_up_buffers(guest, vm, medium);
        guest.write(500, 1);
        vm.rx.offer(&[case]);
        assert!(matches!(scene.ends(), LinkError::Chain(_) | LinkError::Buffer(63)));
    }
}

/// A hello of the first life, changed.
fn greeted_with(change: impl FnOnce(&mut Hello)) -> (Guest, Vm, Notice) {
    let mut guest = Guest::new();
    let mut vm = attached(&mut guest, 1);
    let mut hello = vm.hello();
    change(&mut hello);
    vm.send(&encode_hello(&hello, vm.link).unwrap());
    guest.write(0, 8);
    let notice = guest.notice();
    vm.receive();
    (guest, vm, notice)
}

fn recovers(mut guest: Guest) {
    let mut medium = Medium::new();
    let mut vm = live(&mut guest, 2, &mut medium);
    serve(&mut guest, &mut vm, &mut medium);
}

#[test]
fn a_pool_that_is_not_in_the_driver_vm_s_memory_or_too_small_ends_the_link() {
    let ranges = [(MEMORY, 2 << 20), (MEMORY - (1 << 20), 2 << 20), (1 << 40, 2 << 20), (POOL, 4096)];
    for (start, length) in ranges {
        let (guest, vm, notice) = greeted_with(|hello| hello.pool = vec![PoolRange { start, length }]);
        let Notice::Lost(_, LinkError::Pool(error)) = notice else { panic!("{notice:?}") };
        let expected = if start == POOL { PoolError::TooSmall } else { PoolError::Outside { start, length } };
        assert_eq!(error, expected);
        assert!(vm.asked.is_empty());
        recovers(guest);
    }
}

#[test]
fn a_hello_that_cannot_be_ends_the_link() {
    let changes: [fn(&mut Hello); 5] = [
        |hello| hello.depth = 0,
        |hello| hello.depth = MAX_DEPTH + 1,
        |hello| hello.pool.clear(),
        |hello| hello.pool[0].start = 1,
        |hello| hello.disk.identity.logical_block = 3,
    ];
    for change in changes {
        let (guest, vm, notice) = greeted_with(change);
        assert!(matches!(notice, Notice::Lost(_, LinkError::Protocol(_))), "{notice:?}");
        assert!(vm.asked.is_empty());
        recovers(guest);
    }
}

#[test]
fn answers_before_the_hello_end_the_link() {
    for message in [FromService::Done { tag: Tag(0), errno: 0, bytes: 0 }, FromService::CacheLost] {
        let mut guest = Guest::new();
        let mut vm = attached(&mut guest, 1);
        vm.say(message);
        guest.flush();
        let notice = guest.notice();
        assert!(matches!(notice, Notice::Lost(_, LinkError::Protocol(_))), "{notice:?}");
        recovers(guest);
    }
}

/// A pool whose ranges lie on each other, or on the rings, is the driver VM's own harm.
#[test]
fn a_pool_on_the_driver_vm_s_own_rings_harms_nobody_else() {
    let mut guest = Guest::new();
    let mut vm = attached(&mut guest, 1);
    let mut hello = vm.hello();
    hello.disk.cache = WriteCache::None;
    hello.pool = vec![PoolRange { start: 0, length: 2 << 20 }, PoolRange { start: 0, length: 2 << 20 }];
    vm.send(&encode_hello(&hello, vm.link).unwrap());
    guest.write(0, 2048);
    guest.write(4096, 2048);
    for _ in 0..10 {
        guest.turn();
    }
    guest.splitter.mask(link(1).generation);
    recovers(guest);
}

/// A record that may be right, or nearly.
fn record() -> impl Strategy<Value = [u8; RECORD_BYTES]> {
    let bytes = prop_oneof![Just(0u64), Just(8 * 512), Just(12 * 512), any::<u64>()];
    let errno = prop_oneof![4 => Just(0), 1 => any::<i32>()];
    let done =
        (0u16..26, errno, bytes).prop_map(|(tag, errno, bytes)| FromService::Done { tag: Tag(tag), errno, bytes });
    let at_work = any::<u8>().prop_map(|tag| FromService::AtWork { tag: Tag(tag.into()) });
    let message = prop_oneof![6 => done, 1 => Just(FromService::CacheLost), 1 => at_work];
    let change = prop::option::weighted(0.1, (0..RECORD_BYTES, any::<u8>()));
    (message, change).prop_map(|(message, change)| {
        let mut record = message.encode(link(1));
        if let Some((at, byte)) = change {
            record[at] = byte;
        }
        record
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever it says, nothing panics, and of the guest's memory nothing but the buffers of reads in progress is written.
    #[test]
    fn no_word_of_a_driver_vm_harms_the_guest(
        buffers in prop::collection::vec(prop::collection::vec(record(), 1..4), 1..12),
        noise in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let Scene { mut guest, mut vm, .. } = Scene::new();
        // It may say that it has read what it has not: what the guest reads is not judged, only that it is served.
        guest.forget();
        for (n, buffer) in buffers.iter().enumerate() {
            guest.write(100 + 10 * n as u64, 8);
            guest.turn();
            // It may have answered any of them.
            vm.asked.clear();
            vm.receive();
            vm.send(&buffer.concat());
            guest.turn();
        }
        if !noise.is_empty() {
            vm.send(&noise);
        }
        vm.rx.memory.write_slice(&noise, GuestAddress(vm.tx.avail())).unwrap();
        for _ in 0..3 {
            guest.turn();
        }
        guest.splitter.mask(link(1).generation);
        let mut medium = Medium::new();
        let mut vm = crate::guest::greeted(&mut guest, 2);
        guest.read(0, 300);
        guest.flush();
        serve(&mut guest, &mut vm, &mut medium);
    }
}
