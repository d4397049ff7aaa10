//! What both sides of a VM's process know: the messages, the channel that carries them, and how such a process is started.

pub mod cgroup_bounds;
pub mod channel;
pub mod counts;
mod link_end;
pub mod messages;
pub mod spawn;
pub mod vm_spec;
