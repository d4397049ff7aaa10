//! What a function shows before it is there: a standby's kernel enumerates it from a [`Snapshot`] that was taken of the
//! open, freshly reset function, and gives its BARs addresses, long before its files come.
//!
//! Deny by default: of what the VM does not emulate anyway, the kernel can change only registers that enumeration sets up and that
//! have no effect on their own; they are written to the function when it comes. All other writes are lost, and bus mastering stays
//! off.
//!
//! Invariant: a function that is the same has the same snapshot, whatever has happened to it before: a VM that has met it so far and no
//! further is saved, and found again by what it was shown.

use std::cell::RefCell;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use vfio_bindings::bindings::vfio::VFIO_PCI_CONFIG_REGION_INDEX;

use super::capabilities::{Capabilities, EXTENDED_ERRORS, POWER_CONTROL, STATUS, extended};
use super::error::Error;
use super::files::DeviceFiles;
use super::info;
use super::info::RegionInfo;
use super::irq::Index;
use super::region::COMMAND;
use super::region::HostConfig;
use crate::base::pci_address::Bdf;
use crate::base::pci_config::{BARS, COMMAND_BUS_MASTER};

/// Configuration space of a PCI Express function.
const MAX_CONFIG: u64 = 4096;
/// Command bits that can be set: I/O, memory, bus master, parity, SERR#, INTx disable (PCI 3.0, section 6.2.2).
const COMMAND_WRITABLE: u16 = 0x0547;
/// Cache line size and latency timer.
const CACHE_LINE: u16 = 0x0C;
/// Power management control: state, PME enable. The bit that says that a PME waits is cleared by writing it.
const POWER_WRITABLE: u16 = 1 << 8 | 0b11;
/// PCI Express capability (PCI Express 3.0, section 7.8): its version, device control, device control 2.
const EXPRESS_FLAGS: u16 = 2;
const EXPRESS_VERSION: u16 = 0xF;
const EXPRESS_CONTROL: u16 = 8;
const EXPRESS_CONTROL2: u16 = 0x28;
/// All of device control but the function level reset.
const EXPRESS_WRITABLE: u16 = 0x7FFF;
/// Status bits that tell of the past: errors, an interrupt that waits (PCI 3.0, section 6.2.3).
const STATUS_PAST: u16 = 0xF908;
/// Power management: a PME waits. It may have come before the reset.
const POWER_PAST: u16 = 1 << 15;
/// Device status: errors, an emergency, transactions under way (PCI Express 5.0, section 7.5.3.5).
const EXPRESS_STATUS: u16 = 0x0A;
const EXPRESS_STATUS_PAST: u16 = 0x6F;
/// Link status: training, and that its bandwidth has changed (section 7.5.3.8).
const EXPRESS_LINK_STATUS: u16 = 0x12;
const EXPRESS_LINK_STATUS_PAST: u16 = 0xC800;
/// Advanced error reporting, all of which survives a reset: uncorrectable and correctable errors, the first of them and its header
/// (section 7.8.4). First word, words, bits.
const ERRORS_PAST: [(u16, u16, u16); 4] =
    [(0x04, 2, u16::MAX), (0x10, 2, u16::MAX), (0x18, 1, 0x1F), (0x1C, 8, u16::MAX)];
/// What has to be as it was: vendor and device, class and revision, subsystem, first capability.
const IDENTITY: [(u16, &str); 4] =
    [(0x00, "ids"), (0x08, "class or revision"), (0x2C, "subsystem"), (0x34, "capabilities")];

/// Vendor of virtio functions, and their device ids (virtio 1.2, section 4.1.2).
const VIRTIO: u16 = 0x1AF4;
const VIRTIO_DEVICES: RangeInclusive<u16> = 0x1000..=0x107F;

/// Base class and subclass of USB controllers (PCI Code and ID Assignment, section 1.13), and where they end in configuration space.
const USB: u16 = 0x0C03;
const CLASS_END: usize = 0x0C;

/// What a standby's VM has to know of a function before it comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    bdf: Bdf,
    config: Vec<u8>,
    regions: [RegionInfo; BARS],
    /// It has an `INTx#` line.
    line: bool,
}

impl Snapshot {
    /// Takes a snapshot of an open function that was reset and that nobody uses; `None`: it cannot be shown ahead
    /// ([`Self::can_be_ahead`]).
    pub fn take(files: &DeviceFiles) -> Result<Option<Self>, Error> {
        let bdf = files.bdf();
        let failed = |source| Error::Vfio { operation: "take a snapshot of the device", bdf, source };
        let info = info::read(files.device()).map_err(failed)?;
        let region = info.region(VFIO_PCI_CONFIG_REGION_INDEX).cloned().unwrap_or_default();
        let mut head = [0; CLASS_END];
        files.device().read_exact_at(&mut head, region.offset).map_err(failed)?;
        if !Self::can_be_ahead(&head) {
            return Ok(None);
        }
        let mut config = vec![0; usize::try_from(region.size.min(MAX_CONFIG)).unwrap_or_default()];
        files.device().read_exact_at(&mut config, region.offset).map_err(failed)?;
        // As after power-on: nothing decodes.
        if let Some(command) = config.get_mut(usize::from(COMMAND)..usize::from(COMMAND) + 2) {
            command.fill(0);
        }
        let mut this = Self { bdf, config, regions: info.bars(), line: info.irqs(Index::Intx) > 0 };
        this.forget_the_past();
        Ok(Some(this))
    }

    /// Whether a kernel bears that a function whose configuration space begins so answers all ones. Its built-in drivers probe before the
    /// agent can keep them off, and virtio's is built into Debian's: it resets the device, and waits for ever until its status is 0
    /// (`vp_reset`, `drivers/virtio/virtio_pci_modern.c`). A USB controller every kernel takes from the firmware as it finds it, and asks
    /// it half a million times whether it is ready (`quirk_usb_handoff_xhci`, `drivers/usb/host/pci-quirks.c`).
    fn can_be_ahead(head: &[u8; CLASS_END]) -> bool {
        let word = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let is_virtio = word(0) == VIRTIO && VIRTIO_DEVICES.contains(&word(2));
        !is_virtio && word(CLASS_END - 2) != USB
    }

    /// Clears what registers tell of the function's past. Some of it survives a reset.
    fn forget_the_past(&mut self) {
        let shown = Awaited::new(self.clone());
        let found = Capabilities::scan(&shown);
        self.clear(STATUS, STATUS_PAST);
        if let Some(power) = found.power {
            self.clear(power + POWER_CONTROL, POWER_PAST);
        }
        if let Some(express) = found.express {
            self.clear(express + EXPRESS_STATUS, EXPRESS_STATUS_PAST);
            self.clear(express + EXPRESS_LINK_STATUS, EXPRESS_LINK_STATUS_PAST);
        }
        for (_, errors) in extended(&shown).into_iter().filter(|(id, _)| *id == EXTENDED_ERRORS) {
            for (first, words, bits) in ERRORS_PAST {
                (0..words).for_each(|n| self.clear(errors + first + 2 * n, bits));
            }
        }
    }

    /// Clears `bits` of the word at `offset`, as far as it is there.
    fn clear(&mut self, offset: u16, bits: u16) {
        let bytes = self.config.iter_mut().skip(usize::from(offset));
        bytes.zip(bits.to_le_bytes()).for_each(|(byte, bits)| *byte &= !bits);
    }

    /// The function.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// Its BARs' regions.
    pub(crate) fn regions(&self) -> &[RegionInfo; BARS] {
        &self.regions
    }

    /// It has an `INTx#` line.
    pub(crate) fn has_line(&self) -> bool {
        self.line
    }

    /// What distinguishes a function that has come from the one of the snapshot; `None`: it is the same.
    fn difference(&self, host: &dyn HostConfig, regions: &[RegionInfo; BARS], line: bool) -> Option<&'static str> {
        let known = Awaited::new(self.clone());
        let changed = IDENTITY.iter().find(|(offset, _)| host.config32(*offset) != known.config32(*offset));
        let resources = (self.regions != *regions || self.line != line).then_some("BARs or interrupts");
        changed.map(|(_, what)| *what).or(resources)
    }

    /// An error unless `host` is the function of the snapshot.
    pub(crate) fn check(&self, host: &dyn HostConfig, regions: &[RegionInfo; BARS], line: bool) -> Result<(), Error> {
        let different = |what| {
            let what = format!("its {what} are not those that the waiting driver VM was told");
            Err(Error::Malformed { bdf: self.bdf, what })
        };
        self.difference(host, regions, line).map_or(Ok(()), different)
    }
}

/// The configuration space of a function that is awaited.
pub(crate) struct Awaited {
    snapshot: Snapshot,
    /// As it reads now.
    shown: RefCell<Vec<u8>>,
    /// Words that can be written, and which of their bits.
    writable: Vec<(u16, u16)>,
}

impl Awaited {
    pub(crate) fn new(snapshot: Snapshot) -> Self {
        let shown = RefCell::new(snapshot.config.clone());
        let mut this = Self { snapshot, shown, writable: Vec::new() };
        let found = Capabilities::scan(&this);
        this.writable = vec![(CACHE_LINE, u16::MAX)];
        if let Some(express) = found.express {
            this.writable.push((express + EXPRESS_CONTROL, EXPRESS_WRITABLE));
            if this.config16(express + EXPRESS_FLAGS) & EXPRESS_VERSION > 1 {
                this.writable.push((express + EXPRESS_CONTROL2, u16::MAX));
            }
        }
        this.writable.extend(found.power.map(|power| (power + POWER_CONTROL, POWER_WRITABLE)));
        // The last word to be handed over: with it the function begins to decode.
        this.writable.push((COMMAND, COMMAND_WRITABLE));
        this
    }

    /// What it shows.
    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Back to the snapshot as it was taken.
    pub(crate) fn reset(&self) {
        self.shown.borrow_mut().clone_from(&self.snapshot.config);
    }

    /// The function has come: writes to it what has been written meanwhile, but no bus mastering.
    pub(crate) fn hand_over(&self, host: &dyn HostConfig) {
        let taken = Self::new(self.snapshot.clone());
        for &(offset, _) in &self.writable {
            let value = self.config16(offset);
            if offset == COMMAND {
                host.write_config(offset, &(value & COMMAND_WRITABLE & !COMMAND_BUS_MASTER).to_le_bytes());
            } else if value != taken.config16(offset) {
                host.write_config(offset, &value.to_le_bytes());
            }
        }
    }

    fn mask(&self, at: u16) -> u8 {
        let word = self.writable.iter().find(|(offset, _)| (*offset..*offset + 2).contains(&at));
        word.map_or(0, |(offset, mask)| mask.to_le_bytes()[usize::from(at - offset)])
    }
}

impl HostConfig for Awaited {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let shown = self.shown.borrow();
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = shown.get(at).copied().unwrap_or(0xFF);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut shown = self.shown.borrow_mut();
        for (&byte, at) in data.iter().zip(offset..) {
            let mask = self.mask(at);
            if let Some(place) = shown.get_mut(usize::from(at)) {
                *place = *place & !mask | byte & mask;
            }
        }
    }
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
