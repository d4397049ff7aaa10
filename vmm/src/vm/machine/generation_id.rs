//! The VM generation ID (Microsoft, "Virtual Machine Generation ID", 2012): 16 random bytes in guest memory, at the address that a
//! device of the DSDT names. A VM that is restored from a snapshot finds other bytes there than the snapshot has, and GPE 0 says so
//! ([`super::legacy`]); Linux (`vmgenid`) then reseeds its random number generator.
//!
//! A VM of which snapshots are taken has the device, no other: the ID has to stay as it is over a guest's reboot, which here is a
//! new VM.

use std::io;

use thiserror::Error;
use vm_memory::{Bytes, GuestMemoryMmap};

use super::layout;
use crate::base::random::random;

/// Bytes of a generation ID.
const LENGTH: usize = 16;

/// Errors of giving a VM its generation ID.
#[derive(Debug, Error)]
pub enum Error {
    /// The host has no random bytes.
    #[error("draw a VM generation ID (getrandom)")]
    Random(#[source] io::Error),
    /// Guest memory ends below.
    #[error("write the VM generation ID to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// Writes an ID that no VM has had; no vCPU runs.
///
/// # Errors
/// There are no random bytes, or the VM's memory is too small.
pub fn renew(memory: &GuestMemoryMmap) -> Result<(), Error> {
    let id = random::<LENGTH>().map_err(Error::Random)?;
    memory.write_slice(&id, layout::GENERATION_ID).map_err(Error::Write)
}
