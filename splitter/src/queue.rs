//! One end of a split virtqueue (virtio 1.2, section 2.7), device side: where it is, where we stand in it, and the
//! two eventfds. Its owner (guest or driver VM) is hostile.
//!
//! Invariants: descriptors, ring entries and indices are read once and checked before use; a chain is walked at most
//! [`MAX_CHAIN`] descriptors far; several buffers of one frame become visible to the owner with one store (which
//! `virtio_queue::Queue` cannot do); nothing is held back between calls, so that each call leaves the ring whole.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use crate::call::{Blocks, CallWatch};

/// Most descriptors in one chain: Linux sends 18 for a 64 KiB frame, and no queue here has more than 1024 entries.
/// It bounds what one chain can cost.
pub const MAX_CHAIN: usize = 1024;

/// Largest queue accepted from either side.
pub const MAX_SIZE: u16 = 1024;

/// `VRING_USED_F_NO_NOTIFY`, in a used ring's 16-bit flags.
const NO_NOTIFY: u16 = 1;

const DESCRIPTOR_LEN: usize = 16;
/// `flags` and `idx` before the entries of either ring.
const RING_HEADER: usize = 4;
const AVAIL_ENTRY: usize = 2;
const USED_ENTRY: usize = 8;

/// What is wrong with a ring. The ring cannot be used any further.
#[derive(Debug, Error)]
pub enum RingFault {
    /// A part of the ring is outside memory, or not in one piece.
    #[error("the {part} at {address:#x} is not in memory")]
    Place {
        /// Which part.
        part: &'static str,
        /// Its address.
        address: u64,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
    /// The size is no power of two between 1 and [`MAX_SIZE`].
    #[error("queue size {0} is no power of two up to {MAX_SIZE}")]
    Size(u16),
    /// A part of the ring is not aligned.
    #[error("the {part} at {address:#x} is not aligned")]
    Alignment {
        /// Which part.
        part: &'static str,
        /// Its address.
        address: u64,
    },
    /// The available index went further than the queue is long.
    #[error("available index jumped from {from} to {to} in a queue of {size}")]
    IndexJump {
        /// Where we stand.
        from: u16,
        /// What the ring says.
        to: u16,
        /// Queue size.
        size: u16,
    },
    /// A chain head that is no descriptor.
    #[error("chain head {head} in a queue of {size}")]
    Head {
        /// The head.
        head: u16,
        /// Queue size.
        size: u16,
    },
    /// An access inside the ring failed, which the checks at start exclude.
    #[error("access to the ring failed")]
    Access(#[source] vm_memory::VolatileMemoryError),
    /// More chains are in flight than there are descriptors: one was offered again before it came back.
    #[error("more chains in flight than the {size} descriptors of the queue")]
    InFlight {
        /// Queue size.
        size: u16,
    },
    /// The eventfd of its interrupts.
    #[error(transparent)]
    Call(#[from] Blocks),
}

/// What is wrong with one descriptor chain.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ChainFault {
    /// Longer than [`MAX_CHAIN`] or the table: a loop.
    #[error("descriptor chain without end")]
    Loop,
    /// A `next` outside the table.
    #[error("descriptor chain goes on at {0}, outside its table")]
    Next(u16),
    /// A buffer outside memory.
    #[error("descriptor of {len} bytes at {address:#x}, outside memory")]
    Buffer {
        /// Its address.
        address: u64,
        /// Its length.
        len: u32,
    },
    /// A buffer of no bytes.
    #[error("descriptor of 0 bytes")]
    Empty,
    /// An indirect table that is nested, of a wrong length, or outside memory.
    #[error("bad indirect descriptor table of {len} bytes at {address:#x}")]
    Indirect {
        /// Its address.
        address: u64,
        /// Its length.
        len: u32,
    },
    /// A buffer to read behind one to write, or one of the wrong direction for this queue.
    #[error("descriptors of the wrong direction")]
    Direction,
}

/// A chain's buffers, those to read first. Reused from chain to chain.
#[derive(Debug, Default)]
pub struct Chain<'m> {
    slices: Vec<VolatileSlice<'m>>,
    readable: usize,
    readable_len: usize,
    writable_len: usize,
    /// Descriptors read for this chain: what it cost.
    pub cost: usize,
}

impl<'m> Chain<'m> {
    /// Buffers that the device reads.
    pub fn readable(&self) -> &[VolatileSlice<'m>] {
        &self.slices[..self.readable]
    }

    /// Buffers that the device writes.
    pub fn writable(&self) -> &[VolatileSlice<'m>] {
        &self.slices[self.readable..]
    }

    /// Bytes to read.
    pub fn readable_len(&self) -> usize {
        self.readable_len
    }

    /// Bytes to write.
    pub fn writable_len(&self) -> usize {
        self.writable_len
    }

    pub(crate) fn clear(&mut self) {
        self.slices.clear();
        (self.readable, self.readable_len, self.writable_len, self.cost) = (0, 0, 0, 0);
    }

    fn push(&mut self, slice: VolatileSlice<'m>, writable: bool) -> Result<(), ChainFault> {
        if writable {
            self.writable_len += slice.len();
        } else if self.writable_len > 0 {
            return Err(ChainFault::Direction);
        } else {
            self.readable += 1;
            self.readable_len += slice.len();
        }
        self.slices.push(slice);
        Ok(())
    }
}

/// What became of a notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notified {
    /// It is sent.
    Sent,
    /// The owner does not want to hear of what was used.
    Unwanted,
    /// Nothing was used since the last one.
    NothingNew,
}

impl Notified {
    fn if_wanted(wanted: bool) -> Self {
        if wanted { Self::Sent } else { Self::Unwanted }
    }
}

/// Where a ring is and where we stand in it.
#[derive(Clone, Copy, Debug)]
struct State {
    descriptors: GuestAddress,
    avail: GuestAddress,
    used: GuestAddress,
    size: u16,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    /// Used index when the owner was last notified (or found not to want it).
    signalled: Option<u16>,
}

/// One end of a virtqueue.
#[derive(Debug)]
pub struct Virtqueue {
    memory: Arc<GuestMemoryMmap>,
    state: State,
    kick: EventFd,
    call: Option<EventFd>,
    /// Looks after writes to `call`, which is shared with a process that is not trusted.
    watch: Option<Arc<CallWatch>>,
}

impl Virtqueue {
    /// Takes a queue as its transport set it up. `kick` is only ever polled (edge-triggered), never read: it may
    /// belong to a peer that could make a read block.
    pub fn new(
        memory: Arc<GuestMemoryMmap>,
        queue: &Queue,
        kick: EventFd,
        call: Option<EventFd>,
    ) -> Result<Self, RingFault> {
        let size = queue.size();
        if size == 0 || size > MAX_SIZE || !size.is_power_of_two() {
            return Err(RingFault::Size(size));
        }
        let state = State {
            descriptors: aligned("descriptor table", queue.desc_table(), 16)?,
            avail: aligned("available ring", queue.avail_ring(), 2)?,
            used: aligned("used ring", queue.used_ring(), 4)?,
            size,
            event_idx: queue.event_idx_enabled(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            signalled: None,
        };
        let this = Self { memory, state, kick, call, watch: None };
        let mut state = this.state;
        Ring::open(&this.memory, &mut state)?;
        Ok(this)
    }

    /// Opens the ring for a batch of work.
    pub fn open(&mut self) -> Result<Ring<'_>, RingFault> {
        Ring::open(&self.memory, &mut self.state)
    }

    /// The memory that the queue is in.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Next available index to take and next used index to write.
    pub fn position(&self) -> (u16, u16) {
        (self.state.next_avail, self.state.next_used)
    }

    /// The eventfd by which the owner kicks.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Gives up the queue's memory, keeping the kick alone (until the event loop has forgotten it).
    pub fn into_kick(self) -> EventFd {
        self.kick
    }

    /// Replaces the eventfd by which the owner is notified.
    pub fn set_call(&mut self, call: Option<EventFd>) {
        self.call = call;
    }

    /// The owner's process has the eventfd by which it is notified as well, and is not trusted.
    pub fn set_watch(&mut self, watch: Arc<CallWatch>) {
        self.watch = Some(watch);
    }

    /// Notifies the owner if it wants to hear of what was used since last time.
    pub fn notify(&mut self) -> Result<(), RingFault> {
        self.tell().map(drop)
    }

    /// As [`Self::notify`]; whether it was.
    pub fn tell(&mut self) -> Result<Notified, RingFault> {
        let notified = self.open()?.owner_wants_notification()?;
        match (&self.call, &self.watch) {
            (Some(call), Some(watch)) if notified == Notified::Sent => watch.write(call)?,
            (Some(call), None) if notified == Notified::Sent => {
                // Full only if the owner does not take its interrupts; then it has one waiting.
                let _ = call.write(1);
            }
            _ => {}
        }
        Ok(notified)
    }

    /// Queue size.
    pub fn size(&self) -> u16 {
        self.state.size
    }
}

fn aligned(part: &'static str, address: u64, to: u64) -> Result<GuestAddress, RingFault> {
    if address.is_multiple_of(to) { Ok(GuestAddress(address)) } else { Err(RingFault::Alignment { part, address }) }
}

/// An open ring: its three parts resolved to memory.
pub struct Ring<'m> {
    memory: &'m GuestMemoryMmap,
    state: &'m mut State,
    descriptors: VolatileSlice<'m>,
    avail: VolatileSlice<'m>,
    used: VolatileSlice<'m>,
}

impl<'m> Ring<'m> {
    fn open(memory: &'m GuestMemoryMmap, state: &'m mut State) -> Result<Self, RingFault> {
        let size = usize::from(state.size);
        let place = |part, address: GuestAddress, len| {
            memory.get_slice(address, len).map_err(|source| RingFault::Place { part, address: address.0, source })
        };
        Ok(Self {
            descriptors: place("descriptor table", state.descriptors, DESCRIPTOR_LEN * size)?,
            avail: place("available ring", state.avail, RING_HEADER + AVAIL_ENTRY * size + 2)?,
            used: place("used ring", state.used, RING_HEADER + USED_ENTRY * size + 2)?,
            memory,
            state,
        })
    }

    /// Number of chains that wait; checked against the queue's size.
    #[inline]
    pub fn available(&self) -> Result<u16, RingFault> {
        let to = u16::from_le(self.avail.load(2, Ordering::Acquire).map_err(RingFault::Access)?);
        let State { next_avail: from, size, .. } = *self.state;
        let count = to.wrapping_sub(from);
        if count > size { Err(RingFault::IndexJump { from, to, size }) } else { Ok(count) }
    }

    /// Head of the chain that is `ahead` places behind the next. It must be available.
    #[inline]
    pub fn head(&self, ahead: u16) -> Result<u16, RingFault> {
        let size = self.state.size;
        let place = usize::from(self.state.next_avail.wrapping_add(ahead) & (size - 1));
        let entry = self.avail.load(RING_HEADER + AVAIL_ENTRY * place, Ordering::Relaxed);
        let head = u16::from_le(entry.map_err(RingFault::Access)?);
        if head < size { Ok(head) } else { Err(RingFault::Head { head, size }) }
    }

    /// Reads the chain at `head` into `chain`, replacing what was there. On an error `chain` is not to be used but
    /// for its cost.
    #[inline]
    pub fn walk(&self, head: u16, chain: &mut Chain<'m>) -> Result<(), ChainFault> {
        chain.clear();
        self.walk_on(head, chain)
    }

    /// As [`Self::walk`], appending.
    pub fn walk_on(&self, head: u16, chain: &mut Chain<'m>) -> Result<(), ChainFault> {
        let mut table = self.descriptors;
        let mut length = self.state.size;
        let (mut index, mut seen, mut indirect) = (head, 0u16, false);
        loop {
            if seen >= length || usize::from(seen) >= MAX_CHAIN {
                return Err(ChainFault::Loop);
            }
            seen += 1;
            chain.cost += 1;
            let (address, len, flags, next) = read_descriptor(&table, index).ok_or(ChainFault::Next(index))?;
            if flags & VRING_DESC_F_INDIRECT != 0 {
                // At the end of a chain or alone; never nested; never with NEXT (2.7.5.3.1).
                let bad = ChainFault::Indirect { address, len };
                if indirect || flags & VRING_DESC_F_NEXT != 0 {
                    return Err(bad);
                }
                (table, length) = self.indirect_table(address, len).ok_or(bad)?;
                (index, seen, indirect) = (0, 0, true);
                continue;
            }
            if len == 0 {
                return Err(ChainFault::Empty);
            }
            self.push_buffer(address, len, flags & VRING_DESC_F_WRITE != 0, chain)?;
            if flags & VRING_DESC_F_NEXT == 0 {
                return Ok(());
            }
            if next >= length {
                return Err(ChainFault::Next(next));
            }
            index = next;
        }
    }

    fn indirect_table(&self, address: u64, len: u32) -> Option<(VolatileSlice<'m>, u16)> {
        let bytes = usize::try_from(len).ok()?;
        let entries = bytes / DESCRIPTOR_LEN;
        if bytes % DESCRIPTOR_LEN != 0 || entries == 0 || entries > MAX_CHAIN {
            return None;
        }
        let table = self.memory.get_slice(GuestAddress(address), bytes).ok()?;
        Some((table, u16::try_from(entries).ok()?))
    }

    #[inline]
    fn push_buffer(&self, address: u64, len: u32, writable: bool, chain: &mut Chain<'m>) -> Result<(), ChainFault> {
        let outside = ChainFault::Buffer { address, len };
        // A buffer may lie across regions that touch each other; nearly none does.
        for slice in GuestMemoryBackend::get_slices(self.memory, GuestAddress(address), len as usize) {
            chain.push(slice.map_err(|_| outside)?, writable)?;
        }
        Ok(())
    }

    /// Takes `chains` chains: they are ours to complete.
    #[inline]
    pub fn take(&mut self, chains: u16) {
        self.state.next_avail = self.state.next_avail.wrapping_add(chains);
    }

    /// The used index that the next element will have.
    #[inline]
    pub fn next_used(&self) -> u16 {
        self.state.next_used
    }

    /// Writes one used element, invisible until [`Self::publish`].
    #[inline]
    pub fn put_used(&mut self, head: u16, len: u32) -> Result<(), RingFault> {
        let place = usize::from(self.state.next_used & (self.state.size - 1));
        let at = RING_HEADER + USED_ENTRY * place;
        let store = |value: u32, at| self.used.store(value.to_le(), at, Ordering::Relaxed).map_err(RingFault::Access);
        store(u32::from(head), at)?;
        store(len, at + 4)?;
        self.state.next_used = self.state.next_used.wrapping_add(1);
        Ok(())
    }

    /// Shows all used elements to the owner with one store.
    #[inline]
    pub fn publish(&mut self) -> Result<(), RingFault> {
        self.used.store(self.state.next_used.to_le(), 2, Ordering::Release).map_err(RingFault::Access)
    }

    /// Completes one chain.
    #[inline]
    pub fn complete(&mut self, head: u16, len: u32) -> Result<(), RingFault> {
        self.put_used(head, len)?;
        self.publish()
    }

    /// Asks the owner not to kick. With event index this needs no word: it kicks once per index asked for.
    pub fn mute(&mut self) -> Result<(), RingFault> {
        if self.state.event_idx {
            return Ok(());
        }
        self.used.store(NO_NOTIFY.to_le(), 0, Ordering::Relaxed).map_err(RingFault::Access)
    }

    /// Asks the owner to kick when there is more than `known` chains waiting. Returns true if there is already.
    pub fn listen(&mut self, known: u16) -> Result<bool, RingFault> {
        if self.state.event_idx {
            let event = self.state.next_avail.wrapping_add(known);
            let at = RING_HEADER + USED_ENTRY * usize::from(self.state.size);
            self.used.store(event.to_le(), at, Ordering::Relaxed).map_err(RingFault::Access)?;
        } else {
            self.used.store(0u16, 0, Ordering::Relaxed).map_err(RingFault::Access)?;
        }
        // The owner writes its index, then reads our wish; we write the wish, then read the index.
        fence(Ordering::SeqCst);
        Ok(self.available()? > known)
    }

    /// Whether the owner has taken every element that was used, as far as it shows: one without event index does not.
    ///
    /// # Errors
    /// The ring is not in memory.
    pub fn all_taken(&self) -> Result<bool, RingFault> {
        Ok(!self.state.event_idx || self.used_event()? == self.state.next_used)
    }

    /// The used index behind which the owner wants to be notified, with event index.
    fn used_event(&self) -> Result<u16, RingFault> {
        let at = RING_HEADER + AVAIL_ENTRY * usize::from(self.state.size);
        Ok(u16::from_le(self.avail.load(at, Ordering::Relaxed).map_err(RingFault::Access)?))
    }

    /// Whether the owner is to be notified; it is taken to be.
    fn owner_wants_notification(&mut self) -> Result<Notified, RingFault> {
        let new = self.state.next_used;
        let Some(old) = self.state.signalled.replace(new) else { return Ok(Notified::Sent) };
        if old == new {
            return Ok(Notified::NothingNew);
        }
        // The used index must be visible before we read the wish.
        fence(Ordering::SeqCst);
        if self.state.event_idx {
            let event = self.used_event()?;
            return Ok(Notified::if_wanted(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)));
        }
        let flags = u16::from_le(self.avail.load(0, Ordering::Relaxed).map_err(RingFault::Access)?);
        Ok(Notified::if_wanted(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0))
    }

    /// Queue size.
    pub fn size(&self) -> u16 {
        self.state.size
    }
}

/// Address, length, flags and next of one descriptor, read once.
#[inline]
fn read_descriptor(table: &VolatileSlice<'_>, index: u16) -> Option<(u64, u32, u32, u16)> {
    let at = DESCRIPTOR_LEN * usize::from(index);
    // The table's owner chooses an indirect table's alignment: whole reads where it is aligned, bytes where not.
    let (address, rest) = match (table.load::<u64>(at, Ordering::Relaxed), table.load::<u64>(at + 8, Ordering::Relaxed))
    {
        (Ok(address), Ok(rest)) => (u64::from_le(address), u64::from_le(rest)),
        _ => {
            let mut bytes = [0u8; DESCRIPTOR_LEN];
            table.read_slice(&mut bytes, at).ok()?;
            let [a0, a1, a2, a3, a4, a5, a6, a7, rest @ ..] = bytes;
            (u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]), u64::from_le_bytes(rest))
        }
    };
    // Fields of a packed word: truncation is the meaning.
    #[allow(clippy::cast_possible_truncation)]
    Some((address, rest as u32, u32::from((rest >> 32) as u16), (rest >> 48) as u16))
}
