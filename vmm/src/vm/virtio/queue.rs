//! From the transport's resources to a queue that a device in this process serves: the splitter's virtqueue,
//! which trusts nothing that the driver wrote (split virtqueues, virtio 1.2, section 2.7).

use std::sync::Arc;

use umbra_splitter::queue::Virtqueue;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::device::{Error, QueueResources, QueueState};

/// Starts queue `index` where `state` says; also returns the eventfd to watch for kicks.
pub fn start(index: u16, resources: QueueResources, state: Option<QueueState>) -> Result<(Virtqueue, EventFd), Error> {
    let QueueResources { memory, mut queue, kick, call } = resources;
    if let Some(QueueState { next_avail, next_used }) = state {
        queue.set_next_avail(next_avail);
        queue.set_next_used(next_used);
    }
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Backend {
        operation: format!("start queue {index}"),
        source,
    };
    let watched = kick.try_clone().map_err(|error| failed(error.into()))?;
    let queue = Virtqueue::new(Arc::new(memory), &queue, kick, Some(call)).map_err(|error| failed(error.into()))?;
    Ok((queue, watched))
}

/// Where a queue stood when it was stopped.
pub fn stop(queue: &Virtqueue) -> QueueState {
    let (next_avail, next_used) = queue.position();
    QueueState { next_avail, next_used }
}
