//! The memory map that firmware would report (e820 types; PVH uses the same numbers).

use crate::vm::machine::{layout, memory};

/// Usable RAM.
pub(super) const RAM: u32 = 1;
/// Not to be touched.
pub(super) const RESERVED: u32 = 2;

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) size: u64,
    pub(super) kind: u32,
}

/// The map of a guest with `memory_size` bytes.
pub(super) fn of(memory_size: u64) -> Vec<Range> {
    let (low, high) = memory::split(memory_size);
    let above_1m = layout::HIGH_MEMORY.0;
    let mut map = vec![
        Range { start: 0, size: layout::EBDA_START, kind: RAM },
        // Extended BIOS data, video memory, and the ROM area with the ACPI tables.
        Range { start: layout::EBDA_START, size: above_1m - layout::EBDA_START, kind: RESERVED },
        Range { start: above_1m, size: low.saturating_sub(above_1m), kind: RAM },
        Range { start: layout::ECAM_START, size: layout::ECAM_SIZE, kind: RESERVED },
    ];
    if high > 0 {
        map.push(Range { start: layout::HIGH_RAM_START, size: high, kind: RAM });
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_sorted_and_apart() {
        for size in [64 << 20, 3 << 30, 8u64 << 30] {
            let map = of(size);
            assert!(map.windows(2).all(|w| w[0].start + w[0].size <= w[1].start));
            let ram: u64 = map.iter().filter(|r| r.kind == RAM).map(|r| r.size).sum();
            assert_eq!(ram, size - (layout::HIGH_MEMORY.0 - layout::EBDA_START));
        }
    }

    #[test]
    fn no_os_uses_the_memory_of_tables_and_generation_id() {
        let map = of(64 << 20);
        let range = |at: u64| map.iter().find(|r| (r.start..r.start + r.size).contains(&at)).map(|r| r.kind);
        let tables_end = layout::ACPI_TABLES.0 + layout::ACPI_TABLES_SIZE;
        for at in [layout::ACPI_TABLES.0, tables_end - 1, layout::GENERATION_ID.0, layout::GENERATION_ID.0 + 15] {
            assert_eq!(range(at), Some(RESERVED), "{at:#x}");
        }
        assert!(tables_end <= layout::GENERATION_ID.0);
    }
}
