//! What the PCI bus asks of a device. One root bus, one function a slot; the bus owns address decoding, the
//! device its registers. All calls come with the device's lock held, from vCPU threads.

use serde_json::Value;

use crate::vm::snapshot::device::StateError;

/// Index of a base address register, 0 to 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BarIndex(pub u8);

/// Which address space a BAR decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports (16-bit addresses).
    Io,
    /// Memory below 4 GiB.
    Memory32 {
        /// Prefetchable.
        prefetchable: bool,
    },
    /// Memory anywhere; takes the next BAR's register as its upper half.
    Memory64 {
        /// Prefetchable.
        prefetchable: bool,
    },
}

/// One base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its index; a [`BarKind::Memory64`] also occupies the next one.
    pub index: BarIndex,
    /// Its address space.
    pub kind: BarKind,
    /// Size in bytes, a power of two; at least 16 for memory and 4 for ports.
    pub size: u64,
}

/// A PCI function on the root bus.
///
/// Life: made, then [`Self::bars`] is read once and the bus gives every BAR an address and writes it with
/// [`Self::config_write`] like firmware would; then config, BAR accesses and moves in any order.
pub trait PciDevice: Send {
    /// A name for logs and errors, as `virtio-net0` or `vfio 0000:01:00.0`.
    fn name(&self) -> &str;

    /// The BARs of the function. Constant.
    fn bars(&self) -> Vec<Bar>;

    /// Reads `data.len()` (1, 2 or 4) bytes of configuration space at byte `offset` (0 to 4095), naturally aligned.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);

    /// Writes configuration space. Returns the BARs whose decoding changed by this write (a move, or the
    /// command register's memory or I/O enable bit), for the bus to act on.
    fn config_write(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange>;

    /// Reads from a BAR at byte `offset`.
    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]);

    /// Writes to a BAR at byte `offset`.
    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]);

    /// The bus now decodes `bar` at `base` (`None`: not at all). A device that maps memory or ioeventfds for
    /// a BAR moves them here.
    fn bar_moved(&mut self, bar: BarIndex, base: Option<u64>);

    /// Back to the state after power-on (the VM was reset). Idempotent.
    fn reset(&mut self);

    /// Its state, for a snapshot of the VM, in which no vCPU runs.
    ///
    /// # Errors
    /// The device, or what it does now, cannot be saved.
    fn save(&mut self) -> Result<Value, StateError> {
        Err(StateError::no_snapshots(self.name()))
    }

    /// Takes a saved state; the device is as it was made, and no vCPU has run. Returns the BARs that decode.
    ///
    /// # Errors
    /// The state is that of another device.
    fn restore(&mut self, state: Value) -> Result<Vec<BarChange>, StateError> {
        let _ = state;
        Err(StateError::no_snapshots(self.name()))
    }

    /// All devices have their state: interrupts are delivered from here on. Sends again what may have been lost on its way.
    fn restored(&mut self) {}
}

/// A BAR that decodes elsewhere than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarChange {
    /// Which.
    pub bar: Bar,
    /// Where it decodes now; `None`: decoding is off.
    pub base: Option<u64>,
}
