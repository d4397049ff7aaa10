//! The disk service without a driver VM: regular files for disks, sockets that keep buffers apart for ports, ordinary memory for the
//! pool, and a sysfs of the test's own.

mod discover;
mod service;
mod sessions;

use umbra_driver_vm::block_protocol::{FromService, Hello, Operation, PoolRange, RECORD_BYTES, ToService, records};
use umbra_shadow::block::{Disk, Identity, SectorRange, Tag, Window, WriteCache};
use umbra_shadow::{Generation, LinkId};

use super::pool::Share;
use super::session::Offer;
use crate::huge_pages::HUGE_PAGE;

const GENERATION: Generation = Generation::FIRST;
const DEPTH: u16 = 128;

fn link(attempt: u32) -> LinkId {
    LinkId { generation: GENERATION, attempt }
}

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(start, count).unwrap()
}

/// A disk of `sectors`, and the guest's part of it.
fn disk(sectors: u64, window: Window) -> Disk {
    let identity = Identity { serial: "S1".into(), sectors, logical_block: 512, read_only: false, window };
    let (cache, physical_block, optimal_io) = (WriteCache::Volatile, 4096, 0);
    Disk { identity, cache, physical_block, optimal_io, discards: true, rotational: false }
}

/// What end `end` of a service offers, with one huge page of the pool.
fn offer(end: usize, disk: Disk) -> Offer {
    let share = Share { start: end * HUGE_PAGE, length: HUGE_PAGE };
    let pool = vec![PoolRange { start: share.start as u64, length: share.length as u64 }];
    Offer { hello: Hello { disk, pool, depth: DEPTH }, share }
}

fn access(tag: u16, operation: Operation, at: SectorRange) -> ToService {
    ToService::Access { tag: Tag(tag), operation, at }
}

fn flush(tag: u16) -> ToService {
    ToService::Flush { tag: Tag(tag) }
}

fn done(tag: u16, bytes: u64) -> FromService {
    FromService::Done { tag: Tag(tag), errno: 0, bytes }
}

fn failed(tag: u16, errno: i32) -> FromService {
    FromService::Done { tag: Tag(tag), errno, bytes: 0 }
}

fn encode(orders: &[ToService], attempt: u32) -> Vec<u8> {
    orders.iter().flat_map(|order| order.encode(link(attempt))).collect()
}

/// The answers in a buffer of session `attempt`.
fn decode(buffer: &[u8], attempt: u32) -> Vec<FromService> {
    assert!(buffer.len().is_multiple_of(RECORD_BYTES));
    records(buffer).unwrap().map(|record| FromService::parse(record, link(attempt)).unwrap().unwrap()).collect()
}
