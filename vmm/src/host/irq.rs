//! `VFIO_DEVICE_SET_IRQS`: which eventfd the host's kernel signals for which interrupt of a function.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, VFIO_TYPE, vfio_irq_set,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ptr;

use super::region::HostFunction;

/// `_IO(VFIO_TYPE, VFIO_BASE + 10)`.
const VFIO_DEVICE_SET_IRQS: libc::c_ulong = nix::request_code_none!(VFIO_TYPE, VFIO_BASE + 10);

/// The action that connects interrupts with eventfds, or switches them off.
pub(crate) const TRIGGER: u32 = VFIO_IRQ_SET_ACTION_TRIGGER;

/// A kind of interrupt of a VFIO PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Index {
    /// The `INTx#` line.
    Intx,
    /// MSI.
    Msi,
    /// MSI-X.
    Msix,
    /// An uncorrectable error of the device (AER).
    Error,
    /// The host wants the device back.
    Request,
}

impl Index {
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Intx => VFIO_PCI_INTX_IRQ_INDEX,
            Self::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Self::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
            Self::Error => VFIO_PCI_ERR_IRQ_INDEX,
            Self::Request => VFIO_PCI_REQ_IRQ_INDEX,
        }
    }
}

impl HostFunction {
    /// How many interrupts of this kind the function has.
    pub fn irq_count(&self, index: Index) -> u32 {
        self.info().irqs(index)
    }

    /// Switches the kind on: interrupt `n` signals `events[n]`.
    pub fn irq_enable(&self, index: Index, events: &[&EventFd]) -> io::Result<()> {
        set(self.file(), index, TRIGGER, events)
    }

    /// Switches the kind off.
    pub fn irq_disable(&self, index: Index) -> io::Result<()> {
        set(self.file(), index, TRIGGER, &[])
    }

    /// A signal on `event` unmasks `INTx#`, which the kernel masks with each interrupt.
    pub fn intx_unmask_by(&self, event: &EventFd) -> io::Result<()> {
        set(self.file(), Index::Intx, VFIO_IRQ_SET_ACTION_UNMASK, &[event])
    }
}

/// Does `action` with the kind `index`: interrupt `n` has to do with `events[n]`; without events, with all of the kind.
pub(crate) fn set(device: &File, index: Index, action: u32, events: &[&EventFd]) -> io::Result<()> {
    let data = if events.is_empty() { VFIO_IRQ_SET_DATA_NONE } else { VFIO_IRQ_SET_DATA_EVENTFD };
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let count = u32::try_from(events.len()).map_err(invalid)?;
    let bytes = u32::try_from(size_of::<vfio_irq_set>() + events.len() * size_of::<i32>()).map_err(invalid)?;
    // The header (argsz, flags, index, start, count) and one descriptor each: all 32 bits wide.
    let mut request: Vec<u32> = vec![bytes, data | action, index.number(), 0, count];
    request.extend(events.iter().map(|event| event.as_raw_fd().cast_unsigned()));
    // SAFETY: the request is a `vfio_irq_set` of `argsz` bytes, aligned to its widest field; the kernel only
    // reads it.
    let result = unsafe { ioctl_with_ptr(device, VFIO_DEVICE_SET_IRQS, request.as_ptr()) };
    match result {
        0 => Ok(()),
        n if n < 0 => Err(io::Error::last_os_error()),
        n => Err(io::Error::other(format!("the host has {n} of {count} interrupt vectors left for it"))),
    }
}
