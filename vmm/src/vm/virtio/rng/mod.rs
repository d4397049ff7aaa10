//! An entropy device (virtio 1.2, section 5.4): fills the guest's buffers from the host's `getrandom`. Bounded:
//! a request gets at most [`MAX_REQUEST`] bytes, which the driver has to expect.

use std::slice::from_mut;

use event_manager::{EventOps, Events, MutEventSubscriber};
use serde_json::Value;
use thiserror::Error;
use umbra_splitter::copy::scatter;
use umbra_splitter::log_limit::LogLimit;
use umbra_splitter::queue::{Chain, RingFault, Virtqueue};
use vmm_sys_util::eventfd::EventFd;

use super::device::{self, QueueResources, QueueState, VirtioDevice};
use super::events::{QueueEvents, Wake};
use super::queue;

/// Device ID (section 5.4.1).
const DEVICE_ID: u16 = 4;
const QUEUE_SIZES: [u16; 1] = [64];
/// Requests may be indirect descriptors; event indices save exits.
const FEATURES: u64 = 1 << 28 | 1 << 29;
/// Most bytes of a request that are filled: Linux asks for 64 at a time. The bound keeps a guest from making this process generate
/// gigabytes in one go.
const MAX_REQUEST: usize = 4096;
/// Requests served in one turn: as many as the queue holds.
const BUDGET: usize = 64;

/// The device cannot be made.
#[derive(Debug, Error)]
#[error("create an eventfd for the entropy device")]
pub struct Error(#[from] std::io::Error);

/// The device.
pub struct Rng {
    queue: Option<Virtqueue>,
    events: QueueEvents,
    broken: bool,
    config_call: Option<EventFd>,
    log: LogLimit,
}

impl Rng {
    /// An entropy device.
    pub fn new() -> Result<Self, Error> {
        let (events, log) = (QueueEvents::new(QUEUE_SIZES.len())?, LogLimit::default());
        Ok(Self { queue: None, events, broken: false, config_call: None, log })
    }
}

fn serve(queue: &mut Virtqueue) -> Result<(), RingFault> {
    let filled = fill(queue);
    queue.notify()?;
    if filled? {
        // As the driver would, which was not asked to. Fails only when 2^64 - 2 kicks wait: then one waits anyway.
        let _ = queue.kick().write(1);
    }
    Ok(())
}

/// Fills the buffers of a turn; true if there are more.
fn fill(queue: &mut Virtqueue) -> Result<bool, RingFault> {
    let mut ring = queue.open()?;
    let mut chain = Chain::default();
    let mut bytes = [0; MAX_REQUEST];
    for _ in 0..BUDGET {
        if ring.available()? == 0 && !ring.listen(0)? {
            return Ok(false);
        }
        let head = ring.head(0)?;
        let length = match ring.walk(head, &mut chain) {
            Ok(()) => random(&mut bytes[..chain.writable_len().min(MAX_REQUEST)]),
            Err(_) => 0,
        };
        scatter(&bytes[..length], chain.writable(), 0);
        ring.take(1);
        // At most `MAX_REQUEST`.
        ring.complete(head, u32::try_from(length).unwrap_or(0))?;
    }
    Ok(true)
}

/// Fills `bytes`; returns how many were to be had.
fn random(bytes: &mut [u8]) -> usize {
    // SAFETY: the buffer is writable and as long as said.
    let length = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    usize::try_from(length).unwrap_or(0)
}

impl MutEventSubscriber for Rng {
    fn init(&mut self, ops: &mut EventOps) {
        self.events.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        for wake in self.events.process(events, ops) {
            let (Wake::Started(_) | Wake::Kicked(_), Some(queue), false) = (wake, &mut self.queue, self.broken) else {
                continue;
            };
            if let Err(fault) = serve(queue) {
                self.log.warn(format_args!("entropy device: the driver broke a rule of its queue: {fault}"));
                self.broken = true;
                if let Some(call) = &self.config_call {
                    // Fails only when 2^64 - 2 interrupts wait: then one waits anyway.
                    let _ = call.write(1);
                }
            }
        }
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn set_features(&mut self, _: u64) {}

    fn config_read(&self, _: u32, data: &mut [u8]) {
        data.fill(0);
    }

    fn set_config_interrupt(&mut self, call: EventFd) {
        self.config_call = Some(call);
    }

    fn start_queue(
        &mut self,
        index: u16,
        resources: QueueResources,
        state: Option<QueueState>,
    ) -> Result<(), device::Error> {
        queue::start_in((from_mut(&mut self.queue), &mut self.events), index, resources, state)
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        queue::stop_in((from_mut(&mut self.queue), &mut self.events), index)
    }

    fn reset(&mut self) {
        self.broken = false;
    }

    /// Nothing but its queue: what it gives is the host's.
    fn save(&self) -> Result<Value, String> {
        if self.broken { Err("waits for a reset".into()) } else { Ok(Value::Null) }
    }

    fn restore(&mut self, _: Value) -> Result<(), String> {
        Ok(())
    }

    fn needs_reset(&self) -> bool {
        self.broken
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::vm::virtio::testing::{DriverQueue, Loop, memory};

    #[test]
    fn buffers_are_filled_with_different_bytes() {
        let device = Arc::new(Mutex::new(Rng::new().unwrap()));
        let mut events = Loop::new(&device);
        let mut queue = DriverQueue::new(&memory(1), 0, 64);
        device.lock().unwrap().start_queue(0, queue.resources(), None).unwrap();
        queue.add(&[], &[64]);
        queue.add(&[], &[40, 24]);
        queue.add(&[], &[10_000]);
        queue.add(&[b"not for writing"], &[]);
        queue.kick();
        events.run();
        assert_eq!(queue.used(), [(0, 64), (1, 64), (3, 4096), (4, 0)]);
        assert_ne!(queue.buffer(0, 64), [0; 64]);
        assert_ne!(queue.buffer(0, 64), queue.buffer(3, 64));
        assert!(queue.call.read().is_ok());
    }

    #[test]
    fn more_buffers_than_a_turn_fills_are_all_filled() {
        let device = Arc::new(Mutex::new(Rng::new().unwrap()));
        let mut events = Loop::new(&device);
        let mut queue = DriverQueue::new(&memory(1), 0, 256);
        device.lock().unwrap().start_queue(0, queue.resources(), None).unwrap();
        // As those that a driver adds while the device is at it, for which it does not kick.
        for _ in 0..200 {
            queue.add(&[], &[16]);
        }
        queue.kick();
        events.run();
        assert_eq!(queue.used().len(), 200);
    }

    #[test]
    fn bad_ring_asks_for_a_reset() {
        let device = Arc::new(Mutex::new(Rng::new().unwrap()));
        let mut events = Loop::new(&device);
        let queue = DriverQueue::new(&memory(1), 0, 64);
        device.lock().unwrap().start_queue(0, queue.resources(), None).unwrap();
        queue.break_ring();
        queue.kick();
        events.run();
        let mut device = device.lock().unwrap();
        assert!(device.needs_reset());
        assert!(device.stop_queue(0).is_some() && device.stop_queue(0).is_none());
        device.reset();
        assert!(!device.needs_reset());
    }
}
