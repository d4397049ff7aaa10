//! A virtqueue whose memory a hostile driver has written: every walk ends, stays inside memory, and says a fault at worst.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use umbra_splitter::queue::{Chain, Virtqueue};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// All of the memory: descriptors at 0, rings behind them, and buffers anywhere.
const MEMORY: usize = 0x4000;
const SIZE: u16 = 32;
/// Chains looked at in one run: more than the queue can hold.
const CHAINS: u16 = 2 * SIZE;

fuzz_target!(|data: &[u8]| {
    let Ok(memory) = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)]) else { return };
    let length = data.len().min(MEMORY);
    if memory.write_slice(&data[..length], GuestAddress(0)).is_err() {
        return;
    }
    let (Ok(mut queue), Ok(kick)) = (Queue::new(SIZE), EventFd::new(0)) else { return };
    queue.set_size(SIZE);
    queue.set_desc_table_address(Some(0), Some(0));
    queue.set_avail_ring_address(Some(0x200), Some(0));
    queue.set_used_ring_address(Some(0x300), Some(0));
    queue.set_event_idx(data.first().is_some_and(|byte| byte & 1 == 1));
    queue.set_ready(true);
    let Ok(mut queue) = Virtqueue::new(Arc::new(memory), &queue, kick, None) else { return };
    let Ok(mut ring) = queue.open() else { return };
    let mut chain = Chain::default();
    for _ in 0..CHAINS {
        let Ok(1..) = ring.available() else { break };
        let Ok(head) = ring.head(0) else { break };
        if ring.walk(head, &mut chain).is_ok() {
            let total: usize = chain.readable().iter().chain(chain.writable()).map(|slice| slice.len()).sum();
            assert_eq!(total, chain.readable_len() + chain.writable_len());
        }
        ring.take(1);
        if ring.complete(head, 0).is_err() {
            break;
        }
    }
    let _ = ring.publish();
});
