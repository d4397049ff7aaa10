//! What goes between the block shadow and the rest: requests of the guest, orders for the driver VM, and their answers.
//!
//! Ranges of requests count from the start of the guest's disk, those of orders from the start of the driver VM's disk: the guest may
//! have a partition of it only.

use std::hash::{DefaultHasher, Hasher};

use super::errors::ErrorClass;
use super::range::{SECTOR_BYTES, SectorRange};

/// Names a request of the guest; the device that queued it knows which. Unique among the requests in progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u32);

/// Names an order among those in flight with one driver VM: below the depth of its queue, and free again when it was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u16);

/// What is done to a range of sectors (virtio 1.2, section 5.2.6). Not offered: secure erase, zones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// `VIRTIO_BLK_T_IN`.
    Read,
    /// `VIRTIO_BLK_T_OUT`.
    Write,
    /// `VIRTIO_BLK_T_WRITE_ZEROES`.
    WriteZeroes {
        /// Whether the device may deallocate the sectors.
        unmap: bool,
    },
    /// `VIRTIO_BLK_T_DISCARD`: the content is arbitrary afterwards.
    Discard,
}

impl Access {
    /// Whether it changes the medium.
    pub fn changes(self) -> bool {
        self != Self::Read
    }

    /// Whether two accesses to a common sector may not be in flight together.
    pub(super) fn conflicts(self, other: Self) -> bool {
        self.changes() || other.changes()
    }
}

/// How a request of the guest ended (`VIRTIO_BLK_S_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// Done.
    Ok,
    /// The device does not offer that.
    Unsupported,
    /// Failed, refused, or quarantined.
    IoError,
}

/// A request that goes back to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// Which request.
    pub token: Token,
    /// How it ended.
    pub status: Status,
}

/// What a call of the shadow asks its caller to do.
#[derive(Debug, Default)]
pub struct Out {
    /// Requests that go back to the guest, in order.
    pub done: Vec<Done>,
}

impl Out {
    pub(super) fn done(&mut self, token: Token, status: Status) {
        self.done.push(Done { token, status });
    }
}

/// A private copy of what the guest writes, in whole sectors. Cloning shares it.
pub trait Payload: Clone {
    /// A fingerprint of `sectors` sectors from sector `skip` of the copy, equal to [`Fingerprint::of`] of the same bytes.
    fn fingerprint(&self, skip: u64, sectors: u64) -> Fingerprint;
}

/// A hash of a block, by which a disk is recognised. It is compared within one process only, so that it need not stay the same over
/// versions of the standard library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(pub u64);

impl Fingerprint {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = DefaultHasher::new();
        hasher.write(bytes);
        Self(hasher.finish())
    }

    /// Of `sectors` sectors from sector `skip` of `copy`; of none, if they are not all in it.
    pub fn of_sectors(copy: &[u8], skip: u64, sectors: u64) -> Self {
        let byte = |sector: u64| usize::try_from(sector.saturating_mul(SECTOR_BYTES)).unwrap_or(usize::MAX);
        Self::of(copy.get(byte(skip)..byte(skip.saturating_add(sectors))).unwrap_or_default())
    }
}

/// A place in the guest's buffers: so many sectors into the data of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestSpan {
    /// Which request.
    pub token: Token,
    /// Sectors of the request before the place.
    pub skip: u64,
    /// Sectors from there on.
    pub sectors: u64,
}

/// A piece of a private copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice<P> {
    /// The copy.
    pub payload: P,
    /// Sectors of it before the piece.
    pub skip: u64,
    /// Sectors of the piece.
    pub sectors: u64,
}

/// Where the data of a write come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data<P> {
    /// From private copies, one behind the other.
    Private(Vec<Slice<P>>),
    /// From the guest's buffers: the disk has no volatile cache, so that nobody keeps the data once they are written.
    Guest(GuestSpan),
}

/// What the driver VM is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command<P> {
    /// Read into the guest's buffers. When it is done, [`read_into`](super::BlockShadow::read_into) says whether the guest still
    /// wants that.
    Read {
        /// Which sectors of the disk.
        at: SectorRange,
        /// Where the guest wanted them when this was ordered.
        into: GuestSpan,
    },
    /// Write.
    Write {
        /// Which sectors of the disk.
        at: SectorRange,
        /// The data.
        data: Data<P>,
    },
    /// Write zeroes.
    WriteZeroes {
        /// Which sectors of the disk.
        at: SectorRange,
        /// Whether the device may deallocate the sectors.
        unmap: bool,
    },
    /// Discard.
    Discard {
        /// Which sectors of the disk.
        at: SectorRange,
    },
    /// Make stable what is done.
    Flush,
    /// Read a block for [`sampled`](super::BlockShadow::sampled).
    Sample {
        /// Which sectors of the disk.
        at: SectorRange,
    },
}

impl<P> Command<P> {
    /// Whether a disk that is in order may take long for it.
    pub fn is_slow(&self) -> bool {
        match self {
            Self::WriteZeroes { .. } | Self::Discard { .. } | Self::Flush => true,
            Self::Read { .. } | Self::Write { .. } | Self::Sample { .. } => false,
        }
    }

    /// Bytes that are read or written.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Read { at, .. } | Self::Write { at, .. } | Self::Sample { at } => at.bytes(),
            Self::WriteZeroes { .. } | Self::Discard { .. } | Self::Flush => 0,
        }
    }
}

/// An order for the driver VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order<P> {
    /// Its name until it is answered.
    pub tag: Tag,
    /// What to do.
    pub command: Command<P>,
}

/// What the driver VM answers to an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done {
        /// Bytes read or written: those of the order's range; 0 for all that carries no data.
        bytes: u64,
    },
    /// Failed.
    Failed(ErrorClass),
}

/// What the driver VM reports of the disk's write cache (`write_cache` of the kernel's queue), pinned for its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WriteCache {
    /// "write back": what is done may be lost until a flush.
    Volatile,
    /// "write through": what is done is stable.
    None,
}

/// How the disk's write cache is treated: the key `cache` of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CachePolicy {
    /// As the driver VM reports it.
    #[default]
    Auto,
    /// As volatile whatever is reported: for bridges that hide their cache.
    Volatile,
    /// A write is acknowledged when a flush has made it stable.
    Through,
}
