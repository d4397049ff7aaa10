//! Before anything runs: what the host must have, the run directory, and what an earlier run has left.

pub mod leftover;
pub mod preflight;
pub mod rundir;
