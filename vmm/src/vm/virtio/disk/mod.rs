//! Block devices (virtio 1.2, section 5.2): on a file or a block device of the host ([`file`]), and on a disk of a driver VM
//! ([`split`]). What the guest is offered ([`offer`]) and what its requests mean ([`request`]) is the same for both.

pub mod file;
pub mod offer;
pub mod request;
pub mod split;

pub use file::{Error, FileDisk};
pub use split::SplitDisk;

/// Device ID (section 5.2.1).
const DEVICE_ID: u16 = 2;

/// Size of a queue: a request takes one descriptor of it, so that as many are under way as any disk takes.
const QUEUE_SIZE: u16 = 256;
