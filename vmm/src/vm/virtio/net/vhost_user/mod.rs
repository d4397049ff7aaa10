//! A network device whose queues another process serves by vhost-user: a driver VM's end. The device is there from the
//! start, with its link down; connections with a guest's splitter come and go while the driver VM lives ([`FrontEnd`]), and the link
//! is up while one is set up. A connection is set up as soon as the driver runs both queues. Two queues, no control queue.

use std::os::unix::net::UnixStream;

use event_manager::{EventOps, Events, MutEventSubscriber};
use serde_json::Value;
use umbra_driver_vm::protocol::Mac;
use umbra_shadow::LinkId;
use vmm_sys_util::eventfd::EventFd;

use super::config::{F_MAC, F_MTU, F_STATUS, NetConfig};
use crate::vm::virtio::Outbox;
use crate::vm::virtio::device::{self, QueueResources, QueueState, VirtioDevice};
use crate::vm::virtio::vhost_user::{FrontEnd, Tags};

/// Device ID of a network device (virtio 1.2, section 5.1.1).
const DEVICE_ID: u16 = 1;
/// Receive and transmit; as large as the guest's own.
const QUEUE_SIZES: [u16; 2] = [256, 256];

/// Features that make sense with two queues and a back-end that only moves frames: checksum and segmentation offloads both ways,
/// mergeable buffers, indirect descriptors, event indices. They are offered whether a back-end is there or not, and required of
/// each: they are the splitter's own.
const PASSED: u64 = umbra_splitter::net::features::DRIVER_VM;

/// In the event loop.
const TAGS: Tags = Tags { wake: 0, socket: 1 };

/// The device.
pub struct VhostUserNet {
    end: u16,
    config: NetConfig,
    front: FrontEnd,
    config_call: Option<EventFd>,
}

impl VhostUserNet {
    /// End `end` of its driver VM, with address `mac`; messages for the supervisor go to `outbox`.
    pub fn new(end: u16, mac: Mac, mtu: u16, outbox: Outbox) -> std::io::Result<Self> {
        let front = FrontEnd::new(format!("network device {mac}"), TAGS, outbox)?;
        Ok(Self { end, config: NetConfig { mac, mtu, link_up: false }, front, config_call: None })
    }

    /// [`ToVm::Connect`](crate::wire::messages::ToVm::Connect).
    pub fn connect(&mut self, link: LinkId, socket: UnixStream) {
        self.front.connect(self.end, link, socket);
        self.front.set_up_if_ready();
        self.show_link();
    }

    /// Shows the driver VM's driver whether there is a guest.
    fn show_link(&mut self) {
        let up = self.front.is_up();
        if std::mem::replace(&mut self.config.link_up, up) != up
            && let Some(call) = &self.config_call
        {
            // Full only if an interrupt is due anyway.
            let _ = call.write(1);
        }
    }
}

impl MutEventSubscriber for VhostUserNet {
    fn init(&mut self, ops: &mut EventOps) {
        self.front.init(ops);
    }

    fn process(&mut self, event: Events, ops: &mut EventOps) {
        self.front.process(event, ops);
        self.show_link();
    }
}

impl VirtioDevice for VhostUserNet {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        PASSED | F_MAC | F_MTU | F_STATUS
    }

    fn set_features(&mut self, accepted: u64) {
        self.front.set_features(accepted & PASSED);
    }

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn set_config_interrupt(&mut self, call: EventFd) {
        self.config_call = Some(call);
    }

    fn start_queue(
        &mut self,
        index: u16,
        resources: QueueResources,
        _state: Option<QueueState>,
    ) -> Result<(), device::Error> {
        self.front.start_queue(index, resources)?;
        self.front.set_up_if_ready();
        self.show_link();
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let state = self.front.stop_queue(index);
        self.show_link();
        state
    }

    fn reset(&mut self) {
        self.config_call = None;
    }

    /// Nothing but its queues, unless a guest has ever been connected: the VM's memory holds that guest's frames.
    fn save(&self) -> Result<Value, String> {
        if self.front.was_connected() { Err("has been connected with a guest".into()) } else { Ok(Value::Null) }
    }

    fn restore(&mut self, _: Value) -> Result<(), String> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
