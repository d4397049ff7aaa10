//! The processes: what `umbra run` starts for each VM, and how they speak with the supervisor.

pub mod channel;
pub mod ipc;
