//! The supervisor: starts the process of each VM, watches them, and replaces driver VMs that fail.
//!
//! [`lifecycle`] and [`policy`] decide and are pure; the rest is the I/O around them, in one thread that never waits
//! for what it supervises. `docs/recovery.md` describes states, timeouts and reports.

mod actions;
mod bounds;
pub mod carrier;
mod console;
pub mod control;
mod driver;
mod dying;
pub mod events;
mod groups;
mod guest;
mod holder;
mod leftover;
pub mod lifecycle;
pub mod lines;
mod messages;
pub mod notify;
pub mod policy;
mod preflight;
pub mod report;
mod restart;
pub mod run;
pub mod rundir;
mod server;
mod settings;
mod signals;
mod sound;
mod spare;
mod standby;
mod starvation;
pub mod status;
pub mod time;
pub mod timeline;
pub mod wall;

pub use holder::Open;
pub use leftover::LeftoverError;
pub use preflight::{Host, PreflightError};
pub use run::{Options, RunError, run};
