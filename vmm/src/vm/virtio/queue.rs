//! From the transport's resources to a queue that a device in this process serves: the splitter's virtqueue,
//! which trusts nothing that the driver wrote (split virtqueues, virtio 1.2, section 2.7).

use std::sync::Arc;

use umbra_splitter::queue::Virtqueue;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::device::{Error, QueueResources, QueueState};
use super::events::QueueEvents;

/// Starts queue `index` where `state` says; also returns the eventfd to watch for kicks.
pub fn start(index: u16, resources: QueueResources, state: Option<QueueState>) -> Result<(Virtqueue, EventFd), Error> {
    let watched = resources.kick.try_clone().map_err(|error| failed(index, error.into()))?;
    Ok((open(index, resources, state)?, watched))
}

/// Queue `index` as the splitter serves it, from where `state` says; it keeps the eventfd of its kicks.
pub fn open(index: u16, resources: QueueResources, state: Option<QueueState>) -> Result<Virtqueue, Error> {
    let QueueResources { memory, mut queue, kick, call } = resources;
    if let Some(QueueState { next_avail, next_used }) = state {
        queue.set_next_avail(next_avail);
        queue.set_next_used(next_used);
    }
    Virtqueue::new(Arc::new(memory), &queue, kick, Some(call)).map_err(|error| failed(index, error.into()))
}

fn failed(index: u16, source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::Backend { operation: format!("start queue {index}"), source }
}

/// [`VirtioDevice::start_queue`](super::device::VirtioDevice::start_queue) of a device whose queues have a place each in `queues`, and
/// whose kicks come by `events`.
pub fn start_in(
    (queues, events): (&mut [Option<Virtqueue>], &mut QueueEvents),
    index: u16,
    resources: QueueResources,
    state: Option<QueueState>,
) -> Result<(), Error> {
    let place = queues.get_mut(usize::from(index)).ok_or(Error::NoSuchQueue(index))?;
    let (queue, kick) = start(index, resources, state)?;
    *place = Some(queue);
    events.start(index, kick);
    Ok(())
}

/// [`VirtioDevice::stop_queue`](super::device::VirtioDevice::stop_queue) of such a device.
pub fn stop_in((queues, events): (&mut [Option<Virtqueue>], &mut QueueEvents), index: u16) -> Option<QueueState> {
    events.stop(index);
    queues.get_mut(usize::from(index))?.take().as_ref().map(stop)
}

/// Where a queue stood when it was stopped.
pub fn stop(queue: &Virtqueue) -> QueueState {
    let (next_avail, next_used) = queue.position();
    QueueState { next_avail, next_used }
}
