//! Several connections with one driver VM, and several of a guest's process with it.

use umbra_driver_vm::block_protocol::encode_hello;
use umbra_splitter::block::Notice;
use vhost::VhostBackend;

use crate::guest::{Guest, attached_again, link, live, serve, serve_and_flush, serve_until_live};
use crate::medium::Medium;
use crate::vm::{QUEUE, Vm};

#[test]
fn the_next_session_of_a_life_skips_what_is_left_of_the_one_before() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    for n in 0..5 {
        guest.write(8 * n, 8);
    }
    guest.turn();
    vm.receive();
    let socket = vm.hang_up();
    assert!(matches!(guest.notice(), Notice::Lost(lost, error) if lost == link(1) && error.is_closed()));
    drop(socket);
    // Answers, and a hello that comes late, wait in the ring when the next connection begins.
    for asked in vm.asked.clone().into_iter().take(2) {
        let answer = vm.carry_out(&asked, &mut medium);
        vm.send(&answer.encode(link(1)));
    }
    vm.send(&encode_hello(&vm.hello(), link(1)).unwrap());
    attached_again(&mut guest, &mut vm);
    vm.greet();
    serve_until_live(&mut guest, &mut vm, &mut medium);
    assert_eq!(guest.waiting(), 5, "answers of a session that is over count for nothing");
    serve_and_flush(&mut guest, &mut vm, &mut medium);
    guest.assert_stable(&medium);
}

#[test]
fn the_next_process_of_a_guest_goes_on_with_the_same_driver_vm() {
    let (mut first, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut first, 1, &mut medium);
    first.write(0, 8);
    first.turn();
    drop(first);
    let mut second = Guest::new();
    attached_again(&mut second, &mut vm);
    vm.greet();
    serve_until_live(&mut second, &mut vm, &mut medium);
    second.write(8, 8);
    serve_and_flush(&mut second, &mut vm, &mut medium);
    second.assert_stable(&medium);
}

#[test]
fn a_newer_connection_takes_the_place_of_the_present_one_and_an_older_one_is_closed() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut old = live(&mut guest, 1, &mut medium);
    guest.write(0, 8);
    guest.turn();
    old.receive();
    let mut new = live(&mut guest, 3, &mut medium);
    // The old one learns nothing more, and is not heard.
    old.work(&mut medium);
    guest.turn();
    assert_eq!(guest.waiting(), 1);
    serve(&mut guest, &mut new, &mut medium);
    for n in [link(1).next(), link(2), link(3)] {
        let (refused, socket) = Vm::new(n);
        guest.splitter.attach(n, socket);
        assert!(refused.frontend.get_features().is_err(), "{n}");
    }
    guest.read(0, 8);
    serve(&mut guest, &mut new, &mut medium);
    guest.splitter.mask(link(3).generation);
    let (refused, socket) = Vm::new(link(3).next());
    guest.splitter.attach(link(3).next(), socket);
    assert!(refused.frontend.get_features().is_err(), "the supervisor gave the generation up");
    assert!(guest.notices.try_recv().is_err());
}

#[test]
fn a_connection_that_ends_before_its_service_greets_is_reported() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let vm = crate::guest::attached(&mut guest, 1);
    drop(vm);
    assert!(matches!(guest.notice(), Notice::Lost(lost, error) if lost == link(1) && error.is_closed()));
    let (vm, socket) = Vm::new(link(2));
    guest.splitter.attach(link(2), socket);
    drop(vm);
    assert!(matches!(guest.notice(), Notice::Lost(lost, error) if lost == link(2) && error.is_closed()));
    guest.write(0, 8);
    let mut vm = live(&mut guest, 3, &mut medium);
    serve(&mut guest, &mut vm, &mut medium);
}

#[test]
fn kicks_are_watched_while_the_link_is_up_and_handed_back_when_it_ends() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    assert_eq!(guest.splitter.kicks().count(), 0);
    let _vm = live(&mut guest, 1, &mut medium);
    assert_eq!(guest.splitter.kicks().count(), 2);
    guest.splitter.mask(link(1).generation);
    assert_eq!((guest.splitter.kicks().count(), guest.splitter.take_retired().len()), (0, 2));
}

#[test]
fn the_driver_vm_is_not_interrupted_for_each_answer_and_is_before_its_queue_is_used_up() {
    let (mut guest, mut medium) = (Guest::new(), Medium::new());
    let mut vm = live(&mut guest, 1, &mut medium);
    // Whatever came before; the count is from the last interrupt on.
    let half = u64::from(QUEUE / 2);
    let mut served = |answers: u64| {
        for n in 0..answers {
            guest.write(8 * n, 8);
            serve(&mut guest, &mut vm, &mut medium);
        }
        vm.tx.interrupts()
    };
    while served(1) == 0 {}
    assert_eq!((served(half - 1), served(1)), (0, 1));
    assert_eq!(served(10 * half), 10);
}
