//! What runs inside the machines under test: an exec server on a virtio-console port, its client, and small network
//! clients (ticks, bulk transfer, round trips).
//!
//! The same static binary, `umbra-probe`, serves the test host and the guests in it. It depends on little, because it
//! is part of every guest's initramfs.

pub mod client;
pub mod disk;
pub mod flush;
pub mod frames;
pub mod idle_vcpu;
pub mod io;
pub mod kill;
pub mod mute;
pub mod net;
pub mod patience;
pub mod port;
pub mod registers;
pub mod reinit;
pub mod serve;
pub mod storm;
pub mod wire;
