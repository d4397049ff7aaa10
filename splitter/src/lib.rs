//! The splitter stands between a guest's virtio device and a driver VM: it is the *device* of both. While the
//! driver VM lives it copies each request once, from queue to queue, and shows it to the shadow; while the driver
//! VM is away it redirects each request to the shadow.
//!
//! It trusts neither side: shared memory is read once, checked, then used; every length, id and index is bounded;
//! each call does bounded work. No KVM.

pub mod block;
pub mod call;
pub mod control;
pub mod copy;
pub mod header;
pub mod link;
pub mod log_limit;
pub mod net;
pub mod pump;
pub mod queue;
pub mod sound;
pub mod spares;
pub mod threads;
pub mod untrusted;
