//! What counts as a life: several connections with one driver VM are one; and what a range that is known to be bad, and an order that takes
//! long, cost no life.

use super::host::Host;
use crate::block::{Access, ErrorClass, ModeName, Status};

const OK: Status = Status::Ok;
const IO_ERROR: Status = Status::IoError;

#[test]
fn what_is_suspect_twice_in_one_life_waits_for_the_next() {
    for what in ["read 0 8", "flush"] {
        let mut host = Host::alive();
        host.write(64, 8);
        host.run();
        host.done();
        let request = if what == "flush" { host.flush() } else { host.read(0, 8) };
        for _ in 0..4 {
            host.run_to(what);
            host.kills(what, ErrorClass::Suspect);
            host.connect_again();
            assert_eq!(host.done(), [], "it is the same driver VM");
        }
        host.die();
        host.live();
        host.run_to(what);
        if what == "flush" {
            host.kills(what, ErrorClass::Suspect);
        } else {
            host.fails(what, ErrorClass::Suspect);
        }
        assert_eq!(host.done(), [(request, IO_ERROR)]);
    }
}

#[test]
fn connections_that_end_under_a_request_are_no_deaths() {
    let mut host = Host::alive();
    let request = host.write(0, 8);
    for _ in 0..5 {
        host.handed();
        host.die();
        host.connect_again();
    }
    host.run();
    assert_eq!(host.done(), [(request, OK)]);
    host.write(64, 8);
    host.handed();
    for _ in 0..2 {
        host.die();
        host.live();
        host.run_to("write 64 8");
    }
    host.die();
    assert_eq!(host.done().len(), 1, "three lives are");
}

#[test]
fn a_range_that_is_known_to_be_bad_costs_no_further_life() {
    let mut host = Host::alive();
    host.read(0, 64);
    host.handed();
    host.kills("read 0 64", ErrorClass::Suspect);
    host.live();
    host.handed();
    host.fails("read 0 64", ErrorClass::Suspect);
    host.done();
    let (good, bad) = (host.read(0, 8), host.read(8, 8));
    host.handed();
    host.ok("read 0 8");
    host.fails("read 8 8", ErrorClass::Suspect);
    assert_eq!(host.done(), [(good, OK), (bad, IO_ERROR)], "each page is tried by itself");
    host.read(0, 8);
    host.handed();
    host.kills("read 0 8", ErrorClass::Suspect);
    host.live();
    host.run();
    host.write(8, 8);
    host.handed();
    host.kills("write 8 8", ErrorClass::Suspect);
    host.live();
    host.run();
    host.done();
    host.read(8, 8);
    host.handed();
    host.kills("read 8 8", ErrorClass::Suspect);
    assert_eq!(host.done(), [], "it was written since");
    host.live();
    host.ask(Access::Read, 16, 8);
    host.handed();
    host.kills("read 16 8", ErrorClass::Suspect);
    assert_eq!(host.done(), [], "a driver that has done nothing else is the suspect");
}

#[test]
fn a_flush_that_is_said_to_be_under_way_has_its_time() {
    let mut host = Host::alive();
    host.write(0, 8);
    host.run();
    host.done();
    let flush = host.flush();
    host.handed();
    for _ in 0..8 {
        host.now += 9_000_000_000;
        assert_eq!((host.tick(), host.at_work("flush")), (Ok(()), Ok(())));
    }
    let done = host.shadow.clone();
    host.ok("flush");
    assert_eq!(host.done(), [(flush, OK)]);
    host.shadow = done;
    for _ in 0..2 {
        host.now += 9_000_000_000;
        let _ = host.tick();
    }
    assert_eq!((host.shadow.mode(), host.shadow.pending()), (ModeName::Masking, 1), "and no more than that");
}
