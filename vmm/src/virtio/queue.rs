//! A running virtqueue as a device in this process serves it (split virtqueue, virtio 1.2, section 2.7).
//! Invariant: one failure of the driver's rules ends the queue's use; the device then asks for a reset.
//! Nothing here trusts what the ring holds: indices are checked by `virtio-queue`, chains end after as many
//! descriptors as the queue has.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use thiserror::Error;
use umbra_splitter::queue::Virtqueue;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::device::{self, QueueResources, QueueState};

/// The driver broke a rule of its queue.
#[derive(Debug, Error)]
pub enum Error {
    /// The available ring or its index is wrong.
    #[error("take a request from the available ring")]
    Available(#[source] virtio_queue::Error),
    /// The used ring cannot be written.
    #[error("put a request on the used ring")]
    Used(#[source] virtio_queue::Error),
    /// The rings cannot be read to decide on a notification.
    #[error("read the notification fields of the rings")]
    Notification(#[source] virtio_queue::Error),
}

/// The queue for devices that move data between the guest's buffers and the kernel without a copy of their own:
/// the splitter's, at its place, and the eventfd to watch for kicks.
pub fn start(
    index: u16,
    resources: QueueResources,
    state: Option<QueueState>,
) -> Result<(Virtqueue, EventFd), device::Error> {
    let QueueResources { memory, mut queue, kick, call } = resources;
    if let Some(QueueState { next_avail, next_used }) = state {
        queue.set_next_avail(next_avail);
        queue.set_next_used(next_used);
    }
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| device::Error::Backend {
        operation: format!("start queue {index}"),
        source,
    };
    let watched = kick.try_clone().map_err(|error| failed(error.into()))?;
    let queue = Virtqueue::new(Arc::new(memory), &queue, kick, Some(call)).map_err(|error| failed(error.into()))?;
    Ok((queue, watched))
}

/// Where a queue of [`start`] stood when it was stopped.
pub fn stop(queue: &Virtqueue) -> QueueState {
    let (next_avail, next_used) = queue.position();
    QueueState { next_avail, next_used }
}

/// A chain of descriptors in the VM's memory.
pub type Chain = DescriptorChain<Arc<GuestMemoryMmap>>;

/// A started queue.
pub struct ActiveQueue {
    memory: Arc<GuestMemoryMmap>,
    queue: Queue,
    call: EventFd,
}

impl ActiveQueue {
    /// Starts from the transport's resources; the kick eventfd goes to the device's
    /// [`QueueEvents`](super::events::QueueEvents).
    pub fn start(resources: QueueResources, state: Option<QueueState>) -> (Self, EventFd) {
        let QueueResources { memory, mut queue, kick, call } = resources;
        if let Some(QueueState { next_avail, next_used }) = state {
            queue.set_next_avail(next_avail);
            queue.set_next_used(next_used);
        }
        (Self { memory: Arc::new(memory), queue, call }, kick)
    }

    /// Ends the queue's use and says where it stood.
    pub fn stop(self) -> QueueState {
        QueueState { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// The VM's memory.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// Takes the next request, if there is one.
    pub fn pop(&mut self) -> Result<Option<Chain>, Error> {
        Ok(self.queue.iter(Arc::clone(&self.memory)).map_err(Error::Available)?.next())
    }

    /// Puts the last `count` requests back, as if they had not been taken.
    pub fn undo(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// True if a request waits.
    pub fn has_requests(&self) -> Result<bool, Error> {
        let index = self.queue.avail_idx(&*self.memory, Ordering::Acquire).map_err(Error::Available)?;
        Ok(index.0 != self.queue.next_avail())
    }

    /// Gives a request back; `written` bytes of it were filled in.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), Error> {
        self.queue.add_used(&*self.memory, head, written).map_err(Error::Used)
    }

    /// Interrupts the driver if it wants to hear of what was completed.
    pub fn notify(&mut self) -> Result<(), Error> {
        if self.queue.needs_notification(&*self.memory).map_err(Error::Notification)? {
            // Fails only when 2^64 - 2 interrupts wait: then one waits anyway.
            let _ = self.call.write(1);
        }
        Ok(())
    }

    /// Asks for kicks. True: a request has come in the meantime, look again before sleeping.
    pub fn enable_kicks(&mut self) -> Result<bool, Error> {
        self.queue.enable_notification(&*self.memory).map_err(Error::Notification)
    }

    /// Asks for no kicks while the queue is being looked at anyway.
    pub fn disable_kicks(&mut self) -> Result<(), Error> {
        self.queue.disable_notification(&*self.memory).map_err(Error::Notification)
    }
}
