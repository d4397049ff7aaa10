//! Registers of a PCI function's configuration header that both the host's side and a VM's side of passthrough know
//! (PCI 3.0, section 6.2).

/// Command register: I/O decoding is on.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command register: memory decoding is on.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may be a bus master.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command register: `INTx#` is off.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Base address registers of a type 0 header.
pub const BARS: usize = 6;
