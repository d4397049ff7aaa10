//! An open VFIO function: its regions read and written, with a device that vanished noticed.
//!
//! Reads of a device that is gone or switched off return all ones, as on a real bus; writes are lost. The
//! first access that fails because the device is gone signals [`HostFunction::vanished`].

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use nix::sys::uio::{pread, pwrite};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_ioctls::{VfioDevice, VfioRegionInfoCap};
use vmm_sys_util::eventfd::EventFd;

use super::bars::RegionInfo;
use super::config::COMMAND;
use super::error::Error;
use crate::pci::address::Bdf;
use crate::pci::config::{COMMAND_BUS_MASTER, COMMAND_IO, COMMAND_MEMORY};

/// Vendor ID that no device has: what reads of an absent device return.
const NO_VENDOR: u16 = 0xFFFF;

/// Access to a function's configuration space, as the host's kernel shows it.
pub trait HostConfig {
    /// Reads; all ones where there is nothing.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Writes; lost where there is nothing.
    fn write_config(&self, offset: u16, data: &[u8]);

    /// Reads a byte.
    fn config8(&self, offset: u16) -> u8 {
        let mut data = [0xFF];
        self.read_config(offset, &mut data);
        data[0]
    }

    /// Reads a word.
    fn config16(&self, offset: u16) -> u16 {
        let mut data = [0xFF; 2];
        self.read_config(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Reads a double word.
    fn config32(&self, offset: u16) -> u32 {
        let mut data = [0xFF; 4];
        self.read_config(offset, &mut data);
        u32::from_le_bytes(data)
    }
}

/// An open function.
pub struct HostFunction {
    bdf: Bdf,
    device: VfioDevice,
    vanished: EventFd,
    told: AtomicBool,
    /// What was last written to the command register.
    command: AtomicU16,
}

/// How a function is found when it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// As it should be.
    Present,
    /// What its driver has switched on is off: something else has reset it or switched it off.
    SwitchedOff,
    /// It does not answer.
    Absent,
}

/// Judges the command register as it reads (`now`) against what was last written to it.
fn judge(now: u16, written: u16) -> Presence {
    const SWITCHES: u16 = COMMAND_IO | COMMAND_MEMORY | COMMAND_BUS_MASTER;
    if now == NO_VENDOR {
        Presence::Absent
    } else if written & !now & SWITCHES != 0 {
        Presence::SwitchedOff
    } else {
        Presence::Present
    }
}

impl HostFunction {
    /// Wraps an opened device; `vanished` is signalled when it is gone.
    pub fn new(bdf: Bdf, device: VfioDevice, vanished: EventFd) -> Self {
        Self { bdf, device, vanished, told: AtomicBool::new(false), command: AtomicU16::new(0) }
    }

    /// The address.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// The device.
    pub fn device(&self) -> &VfioDevice {
        &self.device
    }

    /// Looks whether the function is there and as its driver wants it.
    pub fn look(&self) -> Presence {
        judge(self.config16(COMMAND), self.command.load(Ordering::Relaxed))
    }

    fn note_command(&self, offset: u16, data: &[u8]) {
        let mut command = self.command.load(Ordering::Relaxed).to_le_bytes();
        for (&byte, at) in data.iter().zip(offset..) {
            if let Some(place) = at.checked_sub(COMMAND).and_then(|i| command.get_mut(usize::from(i))) {
                *place = byte;
            }
        }
        self.command.store(u16::from_le_bytes(command), Ordering::Relaxed);
    }

    /// Signalled once, when the device is found to be gone.
    pub fn vanished(&self) -> &EventFd {
        &self.vanished
    }

    /// What VFIO says about region `index`; an empty one for those that are not there.
    pub fn region(&self, index: u32) -> RegionInfo {
        let flags = self.device.get_region_flags(index);
        let readable = flags & (VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE) != 0;
        let sparse = self.device.get_region_caps(index).into_iter().find_map(|capability| match capability {
            VfioRegionInfoCap::SparseMmap(areas) => {
                Some(areas.areas.iter().map(|a| a.offset..a.offset.saturating_add(a.size)).collect())
            }
            _ => None,
        });
        RegionInfo {
            size: if readable { self.device.get_region_size(index) } else { 0 },
            mappable: flags & VFIO_REGION_INFO_FLAG_MMAP != 0,
            sparse,
        }
    }

    /// Reads region `index` at `offset`; all ones if that fails.
    pub fn read(&self, index: u32, offset: u64, data: &mut [u8]) {
        if let Err(error) = self.try_read(index, offset, data) {
            data.fill(0xFF);
            self.failed(&error);
        }
    }

    /// Writes region `index` at `offset`.
    pub fn write(&self, index: u32, offset: u64, data: &[u8]) {
        if let Err(error) = self.try_write(index, offset, data) {
            self.failed(&error);
        }
    }

    fn try_read(&self, region: u32, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let failed = |source| Error::Access { operation: "read", region, offset, source };
        let at = self.position(region, offset, data.len()).map_err(failed)?;
        match pread(self.fd(), data, at) {
            Ok(n) if n == data.len() => Ok(()),
            Ok(_) => Err(failed(std::io::ErrorKind::UnexpectedEof.into())),
            Err(errno) => Err(failed(errno.into())),
        }
    }

    fn try_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Error> {
        let failed = |source| Error::Access { operation: "write", region, offset, source };
        let at = self.position(region, offset, data.len()).map_err(failed)?;
        match pwrite(self.fd(), data, at) {
            Ok(n) if n == data.len() => Ok(()),
            Ok(_) => Err(failed(std::io::ErrorKind::WriteZero.into())),
            Err(errno) => Err(failed(errno.into())),
        }
    }

    /// The position in the device file, if the access lies within the region.
    fn position(&self, region: u32, offset: u64, length: usize) -> std::io::Result<i64> {
        let end = offset.checked_add(length as u64).filter(|&end| end <= self.device.get_region_size(region));
        let start = end.and_then(|_| self.device.get_region_offset(region).checked_add(offset));
        start.and_then(|s| i64::try_from(s).ok()).ok_or_else(|| std::io::ErrorKind::InvalidInput.into())
    }

    /// An access failed: a device that was only switched off (no memory decoding) still has its vendor ID.
    fn failed(&self, error: &Error) {
        tracing::debug!("{}: {error}", self.bdf);
        let mut vendor = [0xFF; 2];
        let known = self.try_read(VFIO_PCI_CONFIG_REGION_INDEX, 0, &mut vendor).is_ok();
        if known && u16::from_le_bytes(vendor) != NO_VENDOR || self.told.swap(true, Ordering::Relaxed) {
            return;
        }
        tracing::warn!("{}: the device does not answer any more", self.bdf);
        // The counter of a fresh eventfd cannot overflow.
        let _ = self.vanished.write(1);
    }

    /// The device file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `self.device` owns the descriptor and is not dropped while `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) }
    }
}

impl HostConfig for HostFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        // Behind the end: a conventional device has 256 bytes, and no device answers there.
        if u64::from(offset) >= self.device.get_region_size(VFIO_PCI_CONFIG_REGION_INDEX) {
            data.fill(0xFF);
        } else {
            self.read(VFIO_PCI_CONFIG_REGION_INDEX, offset.into(), data);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        if u64::from(offset) < self.device.get_region_size(VFIO_PCI_CONFIG_REGION_INDEX) {
            self.note_command(offset, data);
            self.write(VFIO_PCI_CONFIG_REGION_INDEX, offset.into(), data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_register_tells_how_a_function_is() {
        assert_eq!(judge(0x0007, 0x0007), Presence::Present);
        assert_eq!(judge(0x0407, 0x0006), Presence::Present, "more than was asked for");
        assert_eq!(judge(0x0000, 0x0000), Presence::Present, "its driver has not switched anything on");
        assert_eq!(judge(0x0000, 0x0406), Presence::SwitchedOff);
        assert_eq!(judge(0x0003, 0x0007), Presence::SwitchedOff, "without bus mastering");
        assert_eq!(judge(0xFFFF, 0x0007), Presence::Absent);
    }
}
