//! What a guest is offered of a disk: feature bits and configuration space (virtio 1.2, sections 5.2.3 and 5.2.4).
//!
//! Not offered: a switch for the write cache (a guest flushes, or its writes are stable when they are answered), secure erase, zones.

use umbra_shadow::block::SECTOR_BYTES;

use super::QUEUE_SIZE;

/// [`SECTOR_BYTES`], as sizes of blocks are counted.
pub const SECTOR: u32 = 512;

/// Length of the identifier, in bytes (section 5.2.6).
pub const ID_SIZE: usize = 20;

/// The length of a segment is bounded.
const F_SIZE_MAX: u64 = 1 << 1;
/// The number of segments of a request is bounded.
const F_SEG_MAX: u64 = 1 << 2;
/// The disk cannot be written to.
pub const F_RO: u64 = 1 << 5;
/// The block size is in the configuration.
const F_BLK_SIZE: u64 = 1 << 6;
/// There is a cache, and a command to flush it.
pub const F_FLUSH: u64 = 1 << 9;
/// So are physical block and best size of a transfer.
const F_TOPOLOGY: u64 = 1 << 10;
/// There are several queues.
const F_MQ: u64 = 1 << 12;
/// Sectors can be discarded.
const F_DISCARD: u64 = 1 << 13;
/// Sectors can be filled with zeroes without data.
const F_WRITE_ZEROES: u64 = 1 << 14;
/// Requests may be indirect descriptors; event indices save exits.
const F_RING: u64 = 1 << 28 | 1 << 29;

/// Segments of a request: a queue's length without header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of a segment: with [`SEG_MAX`] of them a request stays below the 64 MiB that the shadow takes at once.
const SIZE_MAX: u32 = 256 << 10;
/// Ranges of one discard or write-zeroes request.
pub const MAX_SEGMENTS: u32 = 16;
/// Sectors of one range to discard: 1 GiB, which costs nothing but the order.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Sectors of one range to fill with zeroes: 128 MiB, which a hard disk writes in about a second where it has to write them.
pub const MAX_ZEROES_SECTORS: u32 = 1 << 18;
/// Largest physical block and best transfer that are believed, in bytes: above the largest known (a stripe of a RAID, a zone's unit).
const LARGEST: u32 = 64 << 20;
/// Bytes of the configuration that is offered.
const CONFIG_BYTES: usize = 60;

/// A disk as its guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Size, in sectors of 512 bytes.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Bytes of a logical block, the unit of every request: a power of two, 512 at least.
    pub logical_block: u32,
    /// Bytes of a physical block: a power of two, no smaller than the logical block.
    pub physical_block: u32,
    /// Bytes of the disk before the first whole physical block: not 0 where the disk is a part of another.
    pub offset: u32,
    /// Bytes that are read or written best at a time; 0: unknown.
    pub optimal_io: u32,
    /// Discards are taken.
    pub discards: bool,
    /// Number of queues, 1 at least.
    pub queues: u16,
    /// What the guest reads as the disk's identifier, padded with zeroes.
    pub id: [u8; ID_SIZE],
}

/// The end of `name` as an identifier: where it does not fit, the end tells disks apart, as of a model with a serial number behind it.
pub fn id(name: &str) -> [u8; ID_SIZE] {
    let name = name.as_bytes();
    let mut id = [0; ID_SIZE];
    id.iter_mut().zip(&name[name.len().saturating_sub(ID_SIZE)..]).for_each(|(to, from)| *to = *from);
    id
}

impl Offer {
    /// The feature bits.
    pub fn features(&self) -> u64 {
        let mut features = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_RING;
        features |= if self.read_only { F_RO } else { F_WRITE_ZEROES };
        if self.takes_discards() {
            features |= F_DISCARD;
        }
        if self.queues > 1 {
            features |= F_MQ;
        }
        features
    }

    /// Whether the guest may discard.
    pub fn takes_discards(&self) -> bool {
        self.discards && !self.read_only
    }

    /// Sectors of a logical block.
    pub fn block_sectors(&self) -> u64 {
        (u64::from(self.logical_block) / SECTOR_BYTES).max(1)
    }

    /// The physical block, as far as it is believed.
    fn physical(&self) -> u32 {
        self.physical_block.clamp(self.logical_block, LARGEST)
    }

    /// The configuration space.
    pub fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let blocks = |bytes: u32| bytes / self.logical_block.max(1);
        let physical = self.physical();
        let sectors_of_physical = physical / SECTOR;
        put(0, &self.sectors.to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &self.logical_block.to_le_bytes());
        // Topology: physical blocks as an exponent, and the rest in logical blocks.
        let (exponent, offset) = (blocks(physical).checked_ilog2().unwrap_or(0), blocks(self.offset % physical));
        let optimal = if self.optimal_io <= LARGEST { blocks(self.optimal_io) } else { 0 };
        put(24, &[u8::try_from(exponent).unwrap_or(0), u8::try_from(offset).unwrap_or(0)]);
        put(26, &u16::try_from(blocks(physical)).unwrap_or(0).to_le_bytes());
        put(28, &optimal.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        if self.takes_discards() {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &MAX_SEGMENTS.to_le_bytes());
            put(44, &sectors_of_physical.to_le_bytes());
        }
        if !self.read_only {
            put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
            put(52, &MAX_SEGMENTS.to_le_bytes());
            put(56, &[u8::from(self.discards)]);
        }
        config
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use super::*;

    /// 100 sectors with everything.
    pub const OFFER: Offer = Offer {
        sectors: 100,
        read_only: false,
        logical_block: 512,
        physical_block: 4096,
        offset: 0,
        optimal_io: 0,
        discards: true,
        queues: 1,
        id: [0; ID_SIZE],
    };

    fn word(config: [u8; CONFIG_BYTES], at: usize) -> u32 {
        u32::from_le_bytes(config[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_configuration_has_the_layout_of_the_specification() {
        let offer = Offer { logical_block: 512, offset: 3584, optimal_io: 1 << 16, queues: 4, ..OFFER };
        let config = offer.config();
        assert_eq!(config[..8], 100u64.to_le_bytes());
        assert_eq!([8, 12, 20].map(|at| word(config, at)), [256 << 10, 254, 512]);
        assert_eq!((config[24], config[25], config[26], word(config, 28)), (3, 7, 8, 128), "topology");
        assert_eq!(config[34], 4, "queues");
        assert_eq!([36, 40, 44].map(|at| word(config, at)), [1 << 21, 16, 8], "discard");
        assert_eq!(([48, 52].map(|at| word(config, at)), config[56]), ([1 << 18, 16], 1), "zeroes");
        assert_eq!(offer.features(), 0x3000_7646);
    }

    #[test]
    fn blocks_of_4_kib_are_the_unit_of_the_topology() {
        let config = Offer { logical_block: 4096, optimal_io: 1 << 20, ..OFFER }.config();
        assert_eq!((word(config, 20), config[24], config[26], word(config, 28)), (4096, 0, 1, 256));
    }

    #[test]
    fn what_a_read_only_disk_or_one_without_discards_cannot_do_is_not_offered() {
        let read_only = Offer { read_only: true, ..OFFER };
        assert_eq!(read_only.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES | F_MQ), F_RO);
        assert!(read_only.config()[36..].iter().all(|byte| *byte == 0));
        let plain = Offer { discards: false, ..OFFER };
        assert_eq!(plain.features() & (F_DISCARD | F_WRITE_ZEROES), F_WRITE_ZEROES);
        assert!(plain.config()[36..48].iter().all(|byte| *byte == 0) && plain.config()[56] == 0);
    }

    #[test]
    fn a_physical_block_that_no_disk_has_is_not_believed() {
        let config = Offer { physical_block: 1 << 31, optimal_io: u32::MAX, ..OFFER }.config();
        assert_eq!((config[24], word(config, 28)), (17, 0));
    }

    #[test]
    fn a_long_name_is_cut_at_its_beginning() {
        assert_eq!(id("umbra-disk3"), *b"umbra-disk3\0\0\0\0\0\0\0\0\0");
        assert_eq!(&id("QEMU NVMe Ctrl_deadbeef"), b"U NVMe Ctrl_deadbeef");
    }
}
