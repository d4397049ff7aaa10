//! Before anything runs: what the host must have, the run directory, and what an earlier run has left.

pub(in crate::supervisor) mod cgroups;
pub(in crate::supervisor) mod groups;
pub mod host_check;
pub mod leftover;
pub mod preflight;
pub(in crate::supervisor) mod program;
pub mod rundir;
