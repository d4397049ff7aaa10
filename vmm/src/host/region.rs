//! An open VFIO function: its regions read and written, with a device that vanished noticed.
//!
//! Reads of a device that is gone or switched off return all ones, as on a real bus; writes are lost. The
//! first access that fails because the device is gone signals [`HostFunction::vanished`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use nix::sys::uio::{pread, pwrite};
use vfio_bindings::bindings::vfio::{VFIO_BASE, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_TYPE};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl;

use super::error::Error;
use super::files::{DeviceFiles, done};
use super::info::{self, Info, Region};
use crate::base::pci_address::Bdf;
use crate::base::pci_config::{COMMAND_BUS_MASTER, COMMAND_IO, COMMAND_MEMORY};

/// Offset of the command register.
pub(crate) const COMMAND: u16 = 0x04;

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
    files: DeviceFiles,
    info: Info,
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
    pub fn new(files: DeviceFiles, vanished: EventFd) -> Result<Self, Error> {
        let bdf = files.bdf();
        let read = info::read(files.device());
        let info = read.map_err(|source| Error::Vfio { operation: "ask about the open device", bdf, source })?;
        Ok(Self { bdf, files, info, vanished, told: AtomicBool::new(false), command: AtomicU16::new(0) })
    }

    /// The address.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// Its files.
    pub(crate) fn files(&self) -> &DeviceFiles {
        &self.files
    }

    /// The device file.
    pub(crate) fn file(&self) -> &File {
        self.files.device()
    }

    /// What VFIO says about it.
    pub(crate) fn info(&self) -> &Info {
        &self.info
    }

    /// Where region `index` begins in the device file.
    pub(crate) fn region_offset(&self, index: u32) -> u64 {
        self.described(index).map_or(0, |region| region.offset)
    }

    /// Resets the function, if the kernel can.
    pub(crate) fn reset(&self) -> io::Result<()> {
        /// `_IO(VFIO_TYPE, VFIO_BASE + 11)`.
        const VFIO_DEVICE_RESET: libc::c_ulong = nix::request_code_none!(VFIO_TYPE, VFIO_BASE + 11);
        if !self.info.resettable {
            return Ok(());
        }
        // SAFETY: the request takes no argument.
        done(unsafe { ioctl(self.file(), VFIO_DEVICE_RESET) })
    }

    fn described(&self, index: u32) -> Option<&Region> {
        self.info.region(index)
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
            Ok(_) => Err(failed(io::ErrorKind::UnexpectedEof.into())),
            Err(errno) => Err(failed(errno.into())),
        }
    }

    fn try_write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Error> {
        let failed = |source| Error::Access { operation: "write", region, offset, source };
        let at = self.position(region, offset, data.len()).map_err(failed)?;
        match pwrite(self.fd(), data, at) {
            Ok(n) if n == data.len() => Ok(()),
            Ok(_) => Err(failed(io::ErrorKind::WriteZero.into())),
            Err(errno) => Err(failed(errno.into())),
        }
    }

    /// The position in the device file, if the access lies within the region.
    fn position(&self, region: u32, offset: u64, length: usize) -> io::Result<i64> {
        let region = self.described(region).ok_or(io::ErrorKind::InvalidInput)?;
        let end = offset.checked_add(length as u64).filter(|&end| end <= region.size);
        let start = end.and_then(|_| region.offset.checked_add(offset));
        start.and_then(|s| i64::try_from(s).ok()).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// An access failed: signals that the device is gone, unless it was only switched off (no memory decoding), when it still has
    /// its vendor ID.
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

    /// The device file, to be mapped.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file().as_fd()
    }

    fn config_size(&self) -> u64 {
        self.described(VFIO_PCI_CONFIG_REGION_INDEX).map_or(0, |region| region.size)
    }
}

impl HostConfig for HostFunction {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        // Behind the end: a conventional device has 256 bytes, and no device answers there.
        if u64::from(offset) >= self.config_size() {
            data.fill(0xFF);
        } else {
            self.read(VFIO_PCI_CONFIG_REGION_INDEX, offset.into(), data);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        if u64::from(offset) < self.config_size() {
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
