//! The processes: what `umbra run` starts for each VM, and how they speak with the supervisor.

pub mod channel;
mod datagram;
pub(crate) mod first_closed;
pub mod host;
pub mod ipc;
pub mod spawn;
pub mod vm;
