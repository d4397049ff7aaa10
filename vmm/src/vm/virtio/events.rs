//! Keeps the event loop's watch list in step with the queues of a device. Queues start and stop on vCPU
//! threads, the watch list can be changed by the event loop alone: a change is announced by an eventfd, and
//! a kick eventfd lives until the event loop has taken it off its list (closing one that is still watched
//! would leave a dead entry behind, as its file lives on in the transport).

use std::sync::Arc;

use event_manager::{EventOps, Events};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Tag of the eventfd that announces changes; queues are tagged with their index. Devices use tags from
/// [`FIRST_DEVICE_TAG`] on for their own descriptors.
const TAG_CHANGED: u32 = u32::MAX;
/// First tag for a device's own descriptors: above every queue index.
pub const FIRST_DEVICE_TAG: u32 = 1 << 16;

/// What an event of the loop means for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Queue `.0` has started just now: serve it, and expect kicks from now on.
    Started(u16),
    /// The driver has kicked queue `.0`.
    Kicked(u16),
    /// An event of a device's own descriptor with this tag.
    Device(u32),
}

/// The kick eventfds of a device.
pub struct QueueEvents {
    changed: EventFd,
    /// What is to be watched.
    kicks: Vec<Option<Arc<EventFd>>>,
    /// What is being watched.
    watched: Vec<Option<Arc<EventFd>>>,
}

impl QueueEvents {
    /// For a device with `queues` queues.
    pub fn new(queues: usize) -> std::io::Result<Self> {
        let changed = EventFd::new(EFD_NONBLOCK)?;
        Ok(Self { changed, kicks: vec![None; queues], watched: vec![None; queues] })
    }

    /// Queue `index` has started.
    pub fn start(&mut self, index: u16, kick: EventFd) {
        if let Some(place) = self.kicks.get_mut(usize::from(index)) {
            *place = Some(Arc::new(kick));
            self.announce();
        }
    }

    /// Queue `index` has stopped.
    pub fn stop(&mut self, index: u16) {
        if let Some(place) = self.kicks.get_mut(usize::from(index))
            && place.take().is_some()
        {
            self.announce();
        }
    }

    fn announce(&self) {
        // Fails only when 2^64 - 2 announcements wait: then one waits anyway.
        let _ = self.changed.write(1);
    }

    /// Call it in the device's `MutEventSubscriber::init`.
    pub fn init(&self, ops: &mut EventOps) {
        add(ops, Events::with_data(&self.changed, TAG_CHANGED, EventSet::IN));
    }

    /// Call it first in the device's `MutEventSubscriber::process`: what the event means. Empties the eventfd.
    pub fn process(&mut self, events: Events, ops: &mut EventOps) -> Vec<Wake> {
        if events.data() == TAG_CHANGED {
            let _ = self.changed.read();
            return self.synchronise(ops);
        }
        let Ok(index) = u16::try_from(events.data()) else { return vec![Wake::Device(events.data())] };
        match self.kicks.get(usize::from(index)) {
            Some(Some(kick)) => {
                let _ = kick.read();
                vec![Wake::Kicked(index)]
            }
            // The queue was stopped after the event came.
            _ => Vec::new(),
        }
    }

    fn synchronise(&mut self, ops: &mut EventOps) -> Vec<Wake> {
        let mut started = Vec::new();
        for (index, (kick, watched)) in (0u16..).zip(self.kicks.iter().zip(&mut self.watched)) {
            let same = match (kick, &*watched) {
                (Some(kick), Some(watched)) => Arc::ptr_eq(kick, watched),
                (None, None) => true,
                _ => false,
            };
            if same {
                continue;
            }
            if let Some(old) = watched.take() {
                remove(ops, Events::empty(old.as_ref()));
            }
            if let Some(new) = kick {
                add(ops, Events::with_data(new.as_ref(), index.into(), EventSet::IN));
                *watched = Some(Arc::clone(new));
                started.push(Wake::Started(index));
            }
        }
        started
    }
}

/// Watches a descriptor. Failure (no memory for the kernel's list) is logged: the device stays silent.
pub fn add(ops: &mut EventOps, events: Events) {
    if let Err(error) = ops.add(events) {
        tracing::error!("watch a descriptor of a device: {error}");
    }
}

/// Watches a descriptor no more.
pub fn remove(ops: &mut EventOps, events: Events) {
    if let Err(error) = ops.remove(events) {
        tracing::error!("stop watching a descriptor of a device: {error}");
    }
}

/// Watches a descriptor for other events than before.
pub fn modify(ops: &EventOps, events: Events) {
    if let Err(error) = ops.modify(events) {
        tracing::error!("change how a descriptor of a device is watched: {error}");
    }
}
