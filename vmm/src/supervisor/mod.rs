//! The supervisor: starts the process of each VM, watches them, and replaces driver VMs that fail.
//!
//! [`crate::lifecycle`] decides and is pure; this is the I/O around it, in one thread that never waits for what it
//! supervises. `docs/recovery.md` describes states and timeouts, `docs/events.md` events and reports.

mod absence;
mod actions;
mod add;
mod aside;
mod asleep;
mod bounds;
mod class;
mod driver;
mod end;
pub mod front;
mod guest;
mod guest_lives;
mod ids;
mod inbox;
mod messages;
mod power_button;
mod prepare;
mod reload;
mod resize;
mod rest;
pub mod run;
mod run_error;
pub mod start;
mod vcpu_answers;

pub use driver::device::Open;
pub use prepare::Until;
pub use reload::MachineFile;
pub use run::{Options, run};
pub use run_error::RunError;
pub use start::leftover::LeftoverError;
pub use start::preflight::{Host, PreflightError};
