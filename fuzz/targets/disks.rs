//! What a driver VM's disk service and the host say to each other: no input panics, what is understood means the same when it is written
//! and read again, and no piece of a pool lies outside the driver VM's memory.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use umbra_driver_vm::block_protocol::{FromService, Hello, ToService, encode_hello, parse_hello, records};
use umbra_shadow::{Generation, LinkId};
use umbra_splitter::block::pool::{LARGEST_PIECE, Pool};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Two regions with a gap.
fn memory() -> &'static GuestMemoryMmap {
    static MEMORY: OnceLock<GuestMemoryMmap> = OnceLock::new();
    let regions = [(GuestAddress(0), 4 << 20), (GuestAddress(8 << 20), 4 << 20)];
    MEMORY.get_or_init(|| GuestMemoryMmap::from_ranges(&regions).expect("memory"))
}

fn use_pool(hello: &Hello) {
    let Ok(mut pool) = Pool::new(&hello.pool, memory()) else { return };
    let sizes = (1..).map(|n: u64| n * 12_345 % LARGEST_PIECE + 1);
    let mut pieces: Vec<_> = sizes.map_while(|bytes| pool.take(bytes)).take(1000).collect();
    for piece in &pieces {
        assert!(pool.bytes(piece, memory()).is_ok());
    }
    pieces.drain(..).for_each(|piece| pool.give_back(&piece));
    assert!(pool.has_room());
}

fuzz_target!(|data: &[u8]| {
    let Some(generation) = Generation::new(1) else { return };
    let link = LinkId { generation, attempt: 2 };
    for record in records(data).into_iter().flatten() {
        if let Ok(Some(message)) = FromService::parse(record, link) {
            assert_eq!(FromService::parse(&message.encode(link), link), Ok(Some(message)));
        }
        if let Ok((of, message)) = ToService::parse(record, generation) {
            assert_eq!(ToService::parse(&message.encode(of), generation), Ok((of, message)));
        }
    }
    if let Ok(Some(hello)) = parse_hello(data, link) {
        assert!(hello.is_sane());
        if let Ok(again) = encode_hello(&hello, link) {
            assert_eq!(parse_hello(&again, link).as_ref(), Ok(&Some(hello.clone())));
        }
        use_pool(&hello);
    }
});
