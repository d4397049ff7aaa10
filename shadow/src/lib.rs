//! Shadows: per device class, what Umbra remembers of a device while its driver VM works (*passive*),
//! how it answers the guest while the driver VM is away (*masking*), and how it restores the next one
//! (*replaying*). After "Recovering Device Drivers" (Swift et al., OSDI 2004).
//!
//! Pure logic: no KVM, no I/O, no threads, no clock, no `unsafe`. Time comes in as a parameter. No shadow
//! knows a device model, and everything that it records is bounded.
#![forbid(unsafe_code)]

pub mod block;
pub mod class;
pub mod generation;
pub mod link_id;
pub mod net;
pub mod sound;

pub use class::{Class, DeviceId, NoDevice};
pub use generation::Generation;
pub use link_id::LinkId;
