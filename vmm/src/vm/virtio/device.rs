//! The trait of a virtio device, whatever its transport.
//!
//! ```text
//!   made ──start_queue(i, resources, state)──> queue i active ──stop_queue(i) -> state──> made
//! ```
//! "Take the queue from a dead back-end and hand it to the next" is stop and start: an ordinary call. Data
//! that exists only while a queue is active lives in the active arm of the device's enum.

use event_manager::MutEventSubscriber;
use serde_json::Value;
use thiserror::Error;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// What a queue needs to run, given by the transport at `DRIVER_OK`.
pub struct QueueResources {
    /// The VM's memory.
    pub memory: GuestMemoryMmap,
    /// The queue with addresses, size and `event_idx` set by the driver, ready.
    pub queue: Queue,
    /// Signalled (by ioeventfd) when the driver kicks.
    pub kick: EventFd,
    /// Write 1 to interrupt the driver.
    pub call: EventFd,
}

/// Where a stopped queue stood (split virtqueue, virtio 1.2, section 2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// Next available index to take.
    pub next_avail: u16,
    /// Next used index to write.
    pub next_used: u16,
}

/// Errors of a virtio device towards its transport, which sets `DEVICE_NEEDS_RESET`.
#[derive(Debug, Error)]
pub enum Error {
    /// No such queue.
    #[error("the device has no queue {0}")]
    NoSuchQueue(u16),
    /// The back-end failed.
    #[error("{operation}")]
    Backend {
        /// What was tried.
        operation: String,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A virtio device. Configuration calls come from vCPU threads, queue events from the VM's event loop (as
/// `MutEventSubscriber`), each with the device's lock held. An active queue's kick is announced to the event
/// loop through the device's own activation eventfd, registered in `init`.
pub trait VirtioDevice: MutEventSubscriber + Send {
    /// Device ID (virtio 1.2, section 5).
    fn device_id(&self) -> u16;

    /// Largest size of each queue, a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Features offered, bits 0 to 63 (`VIRTIO_F_VERSION_1` is the transport's).
    fn features(&self) -> u64;

    /// Features that the driver accepted, a subset of those offered. Called once before the queues start.
    fn set_features(&mut self, accepted: u64);

    /// Reads device configuration at byte `offset`; bytes past its end read as 0.
    fn config_read(&self, offset: u32, data: &mut [u8]);

    /// Writes device configuration. Devices without writable fields ignore it.
    fn config_write(&mut self, offset: u32, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Gives the eventfd by which the device announces a configuration change: before the queues start, and
    /// again whenever the driver chooses another vector.
    fn set_config_interrupt(&mut self, call: EventFd) {
        let _ = call;
    }

    /// Starts queue `index`. `state`: where to go on, `None` for a fresh queue.
    fn start_queue(&mut self, index: u16, resources: QueueResources, state: Option<QueueState>) -> Result<(), Error>;

    /// Stops queue `index` and gives its position back; `None` if it was not running. Idempotent. On return
    /// the device touches the queue's memory no more.
    fn stop_queue(&mut self, index: u16) -> Option<QueueState>;

    /// The driver has reset the device; its queues are stopped already. Idempotent.
    fn reset(&mut self) {}

    /// Its state, but for its queues and features, for a snapshot of the VM. No vCPU runs, and no queue.
    ///
    /// # Errors
    /// The device, or what it does now, cannot be saved: why, as a clause with the device as its subject.
    fn save(&self) -> Result<Value, String> {
        Err("is a device of which no snapshot can be taken".into())
    }

    /// Takes a saved state, before its queues start.
    ///
    /// # Errors
    /// The state is that of another device.
    fn restore(&mut self, state: Value) -> Result<(), String> {
        let _ = state;
        Err("is a device of which no snapshot can be taken".into())
    }

    /// Changes with the configuration (virtio 1.2, section 4.1.4.3.1).
    fn config_generation(&self) -> u8 {
        0
    }

    /// True once the device can go on only after a reset (the driver broke a rule of its queues); the
    /// device has then signalled a configuration change.
    fn needs_reset(&self) -> bool {
        false
    }
}
