//! The link of a block splitter: the two queues of a driver VM's console port `org.umbra.block.N`, served over vhost-user
//! ([`crate::link`]). Whole buffers go in and out here; what is in them is for `session`.
//!
//! Invariant: a buffer is read once, and given back before what it says is looked at; nothing waits.

use thiserror::Error;
use umbra_driver_vm::block_protocol::{MAX_HELLO, ProtocolError, RECORD_BYTES};
use umbra_shadow::LinkId;
use umbra_shadow::block::Failure;
use vmm_sys_util::eventfd::EventFd;

use super::pool::PoolError;
use crate::copy::{gather, scatter};
use crate::link::{Cause, Link, LinkQueue};
use crate::pump::more;
use crate::queue::{Chain, ChainFault, RingFault};

/// Why a link ended.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The vhost-user connection has ended.
    #[error(transparent)]
    Link(#[from] Cause),
    /// A ring that is none.
    #[error("the driver VM broke a queue of its disk service")]
    Ring(#[from] RingFault),
    /// A descriptor chain that is none.
    #[error("the driver VM offered a buffer that cannot be used")]
    Chain(#[from] ChainFault),
    /// A receive buffer without room for one record.
    #[error("the driver VM offered a receive buffer of {0} bytes, too small for a record")]
    Buffer(usize),
    /// Something that is no record.
    #[error("the driver VM broke the disk protocol")]
    Protocol(#[from] ProtocolError),
    /// A pool that cannot be used.
    #[error("the driver VM's pool cannot be used")]
    Pool(#[from] PoolError),
    /// The shadow has given the life up: the service said what cannot be true, did not answer, or has failed.
    #[error(transparent)]
    Failed(#[from] Failure),
}

impl LinkError {
    /// Whether the driver VM's process or driver is gone, without having broken a rule.
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Link(Cause::Closed | Cause::Stopped))
    }

    /// Whether the driver VM has answered with an error that may be its own, or has failed a flush, without having broken a rule. Its agent
    /// says so too.
    pub fn is_suspect(&self) -> bool {
        matches!(self, Self::Failed(Failure::Suspect | Failure::FlushFailed))
    }

    /// Whether the driver VM stands still, without having broken a rule.
    pub fn is_stalled(&self) -> bool {
        matches!(self, Self::Link(Cause::Stalled(_)) | Self::Failed(Failure::Stalled { .. } | Failure::NotQuiesced))
    }
}

/// A link that is up.
#[derive(Debug)]
pub(super) struct Port {
    link: Box<Link>,
    /// Buffers of the driver VM that were given back since it was last interrupted for that.
    given_back: u16,
}

impl Port {
    pub(super) fn new(link: Box<Link>) -> Self {
        Self { link, given_back: 0 }
    }

    pub(super) fn id(&self) -> LinkId {
        self.link.id
    }

    pub(super) fn memory(&self) -> &vm_memory::GuestMemoryMmap {
        self.link.rx.memory()
    }

    pub(super) fn kicks(&self) -> [(LinkQueue, &EventFd); 2] {
        [(LinkQueue::Rx, self.link.rx.kick()), (LinkQueue::Tx, self.link.tx.kick())]
    }

    /// Gives the driver VM's memory up, keeping the kicks alone.
    pub(super) fn into_kicks(self) -> [EventFd; 2] {
        let Link { rx, tx, .. } = *self.link;
        [rx.into_kick(), tx.into_kick()]
    }

    pub(super) fn take_calls(&mut self) {
        self.link.take_calls();
    }

    /// Puts as many whole records of `records` into the next receive buffer as it holds; how many bytes. 0: there is no buffer, and the
    /// driver VM will kick when there is one.
    pub(super) fn send(&mut self, records: &[u8]) -> Result<usize, LinkError> {
        let mut ring = self.link.rx.open()?;
        ring.mute()?;
        if more(&mut ring)? == 0 {
            return Ok(0);
        }
        let head = ring.head(0)?;
        let mut chain = Chain::default();
        ring.walk(head, &mut chain)?;
        if !chain.readable().is_empty() {
            return Err(ChainFault::Direction.into());
        }
        let room = chain.writable_len() / RECORD_BYTES * RECORD_BYTES;
        if room == 0 {
            return Err(LinkError::Buffer(chain.writable_len()));
        }
        let records = &records[..records.len().min(room)];
        let length = scatter(records, chain.writable(), 0);
        ring.take(1);
        // At most a page.
        ring.complete(head, u32::try_from(length).unwrap_or_default())?;
        Ok(length)
    }

    /// Takes the next buffer that the driver VM has sent into `buffer`; its length. None: there is none, and the driver VM will kick
    /// when there is one.
    pub(super) fn receive(&mut self, buffer: &mut [u8; MAX_HELLO]) -> Result<Option<usize>, LinkError> {
        let mut ring = self.link.tx.open()?;
        ring.mute()?;
        if more(&mut ring)? == 0 {
            return Ok(None);
        }
        let head = ring.head(0)?;
        let mut chain = Chain::default();
        ring.walk(head, &mut chain)?;
        if !chain.writable().is_empty() {
            return Err(ChainFault::Direction.into());
        }
        let length = chain.readable_len();
        let Some(bytes) = buffer.get_mut(..length) else { return Err(ProtocolError::Length(length).into()) };
        gather(chain.readable(), 0, bytes);
        ring.take(1);
        ring.complete(head, 0)?;
        self.given_back = self.given_back.saturating_add(1);
        Ok(Some(length))
    }

    /// Tells the driver VM of what was sent since the last time, and now and then of its own buffers that were given back: Linux's
    /// console driver (`virtio_console.c`) asks for an interrupt at each of them, which would wake the driver VM once more for each answer,
    /// takes them back at its next write in any case, and waits for one only where its queue is full. A full queue is more than half a one.
    pub(super) fn notify(&mut self) -> Result<(), LinkError> {
        self.link.rx.notify()?;
        if self.given_back >= self.link.tx.size() / 2 {
            self.given_back = 0;
            self.link.tx.notify()?;
        }
        Ok(())
    }
}
