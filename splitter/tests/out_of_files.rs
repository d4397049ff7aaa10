//! A process that is out of file descriptors. Alone in its test program: the limit is the process's.
#![allow(clippy::unwrap_used)]

mod common;

use common::frame;
use common::vm::{DriverVm, Guest, attached, generation, link};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use umbra_shadow::net::ModeName;
use umbra_splitter::link::Cause;
use umbra_splitter::net::{Log, Notice};

#[test]
fn a_link_that_cannot_begin_leaves_the_serving_one_alone() {
    let mut guest = Guest::new();
    let mut first = attached(&mut guest, 1);
    first.rx.offer_all();
    guest.splitter.go_live(generation(1), Log::Replay);
    while !matches!(guest.notice(), Notice::Live(..)) {}
    let (_second, connection) = DriverVm::new();
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 0, hard).unwrap();
    guest.splitter.attach(link(2), connection);
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
    assert!(matches!(guest.notice(), Notice::LinkLost(g, Cause::Protocol(_)) if g == link(2)));
    guest.tx.send(&frame(1, 100));
    guest.turn();
    assert_eq!(guest.splitter.status().mode, ModeName::Passive);
    assert_eq!(first.rx.receive_all(), [frame(1, 100)]);
}
