//! Which parts of a function's BARs the VM reaches directly and which are trapped. Pure: from what VFIO and
//! the configuration space say to a plan.
//!
//! Mapped: whole pages of memory BARs that the kernel lets us map. Trapped: I/O ports, the pages that hold the
//! MSI-X table or its pending bits (which are emulated), and whatever the kernel does not let us map.

use std::ops::Range;

use crate::base::pci_config::BARS;
use crate::host::info::RegionInfo;
use crate::vm::pci::device::{Bar, BarIndex, BarKind};

/// Page size of host and guest: the granularity of mappings.
pub const PAGE: u64 = 4096;
/// BAR register: the BAR is in I/O space (PCI 3.0, section 6.2.5.1).
const BAR_IO: u32 = 1;
/// BAR register: where a memory BAR may lie; 2 is "anywhere in 64 bits".
const BAR_TYPE: u32 = 0b110;
const BAR_TYPE_64: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;
/// Smallest sizes that the registers can express.
const MIN_MEMORY: u64 = 16;
const MIN_IO: u64 = 4;

/// Bytes of a BAR that are emulated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emulated {
    /// In which BAR.
    pub bar: BarIndex,
    /// Where in it.
    pub bytes: Range<u64>,
}

/// A BAR and how it is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BarPlan {
    /// As the VM sees it.
    pub bar: Bar,
    /// Page-aligned parts that are mapped; the rest is trapped.
    pub mapped: Vec<Range<u64>>,
}

/// Plans all BARs. `registers` are the BAR registers as the host shows them, `regions` the regions 0 to 5.
pub fn plan(registers: [u32; BARS], regions: &[RegionInfo; BARS], emulated: &[Emulated]) -> Vec<BarPlan> {
    let mut plans = Vec::new();
    let mut index = 0;
    while index < BARS {
        let (kind, region) = (kind(registers[index]), &regions[index]);
        let wide = matches!(kind, BarKind::Memory64 { .. });
        if region.size > 0
            && let Ok(number) = u8::try_from(index)
        {
            plans.push(plan_bar(BarIndex(number), kind, region, emulated));
        }
        index += if wide { 2 } else { 1 };
    }
    plans
}

fn kind(register: u32) -> BarKind {
    let prefetchable = register & BAR_PREFETCHABLE != 0;
    if register & BAR_IO != 0 {
        BarKind::Io
    } else if register & BAR_TYPE == BAR_TYPE_64 {
        BarKind::Memory64 { prefetchable }
    } else {
        BarKind::Memory32 { prefetchable }
    }
}

fn plan_bar(index: BarIndex, kind: BarKind, region: &RegionInfo, emulated: &[Emulated]) -> BarPlan {
    let least = if kind == BarKind::Io { MIN_IO } else { MIN_MEMORY };
    let size = region.size.next_power_of_two().max(least);
    let here = |e: &&Emulated| e.bar == index;
    if kind == BarKind::Io || !region.mappable {
        return BarPlan { bar: Bar { index, kind, size }, mapped: Vec::new() };
    }
    if size < PAGE {
        // The kernel allows the map of a BAR smaller than a page only if nothing else lies in its page
        // (`vfio_pci_probe_mmaps`). Shown to the VM as a page, all of it is reached without an exit.
        let part = emulated.iter().any(|e| here(&e));
        let (size, mapped) = if part { (size, Vec::new()) } else { (PAGE, std::iter::once(0..PAGE).collect()) };
        return BarPlan { bar: Bar { index, kind, size }, mapped };
    }
    let mut mapped = match &region.sparse {
        Some(areas) => areas.iter().map(|a| inner_pages(a.start..a.end.min(region.size))).collect(),
        None => vec![inner_pages(0..region.size)],
    };
    for hole in emulated.iter().filter(here) {
        mapped = mapped.into_iter().flat_map(|area| subtract(area, &outer_pages(&hole.bytes))).collect();
    }
    mapped.retain(|area: &Range<u64>| !area.is_empty());
    mapped.sort_unstable_by_key(|area| area.start);
    BarPlan { bar: Bar { index, kind, size }, mapped }
}

fn inner_pages(bytes: Range<u64>) -> Range<u64> {
    let start = bytes.start.next_multiple_of(PAGE);
    start..(bytes.end / PAGE * PAGE).max(start)
}

fn outer_pages(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / PAGE * PAGE..bytes.end.next_multiple_of(PAGE)
}

fn subtract(area: Range<u64>, hole: &Range<u64>) -> [Range<u64>; 2] {
    [area.start..area.end.min(hole.start).max(area.start), area.start.max(hole.end).min(area.end)..area.end]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn regions(list: &[(usize, u64, bool)]) -> [RegionInfo; BARS] {
        let mut regions: [RegionInfo; BARS] = Default::default();
        for &(index, size, mappable) in list {
            regions[index] = RegionInfo { size, mappable, sparse: None };
        }
        regions
    }

    #[test]
    fn e1000e_keeps_only_msix_pages_trapped() {
        let regions = regions(&[(0, 0x2_0000, true), (1, 0x2_0000, true), (2, 0x20, false), (3, 0x4000, true)]);
        let emulated =
            [Emulated { bar: BarIndex(3), bytes: 0..80 }, Emulated { bar: BarIndex(3), bytes: 0x2000..0x2008 }];
        let plans = plan([0, 0, 1, 0, 0, 0], &regions, &emulated);
        assert_eq!(plans.len(), 4);
        assert!(plans[0].mapped.iter().eq([&(0..0x2_0000)]));
        assert_eq!((plans[2].bar.kind, plans[2].bar.size, plans[2].mapped.len()), (BarKind::Io, 0x20, 0));
        assert_eq!(plans[3].mapped, [0x1000..0x2000, 0x3000..0x4000]);
    }

    #[test]
    fn small_bars_become_a_page_if_the_kernel_maps_them() {
        let plans = plan([1, 0, 0, 0, 0, 0], &regions(&[(0, 0x100, false), (1, 0x100, true), (2, 0x100, false)]), &[]);
        assert_eq!((plans[1].bar.size, plans[1].mapped.first()), (PAGE, Some(&(0..PAGE))));
        assert_eq!((plans[2].bar.size, plans[2].mapped.len()), (0x100, 0));
    }

    #[test]
    fn a_wide_bar_takes_two_registers() {
        let plans =
            plan([0xC, 0x40, 0, 0, 0, 0], &regions(&[(0, 1 << 20, true), (1, 0x1000, true), (2, 0x1000, true)]), &[]);
        assert_eq!(plans.iter().map(|p| p.bar.index.0).collect::<Vec<_>>(), [0, 2]);
        assert_eq!(plans[0].bar.kind, BarKind::Memory64 { prefetchable: true });
    }

    #[test]
    fn sparse_areas_bound_the_map() {
        let mut regions = regions(&[(0, 0x8000, true)]);
        regions[0].sparse = Some(vec![0x5000..0x8000, 0..0x1800, 0x2000..0x2000]);
        assert_eq!(plan([0; 6], &regions, &[])[0].mapped, [0..0x1000, 0x5000..0x8000]);
    }

    proptest! {
        #[test]
        fn maps_are_whole_pages_inside_and_never_hold_emulated_bytes(
            shift in 4u32..20,
            holes in prop::collection::vec((0u64..0x10_0000, 1u64..0x9000), 0..3),
        ) {
            let emulated: Vec<_> =
                holes.iter().map(|&(start, length)| Emulated { bar: BarIndex(0), bytes: start..start + length }).collect();
            let plans = plan([0; 6], &regions(&[(0, 1 << shift, true)]), &emulated);
            for area in &plans[0].mapped {
                prop_assert!(area.start % PAGE == 0 && area.end % PAGE == 0 && area.start < area.end);
                prop_assert!(area.end <= plans[0].bar.size);
                prop_assert!(emulated.iter().all(|e| e.bytes.end <= area.start || area.end <= e.bytes.start));
            }
        }
    }
}
