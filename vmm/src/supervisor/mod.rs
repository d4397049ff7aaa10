//! The supervisor.

pub mod lifecycle;
pub mod policy;
pub mod time;
