//! The nested bench: boots a test host in QEMU with the NICs, sound cards and disks that its caller names, runs
//! scripts in it and in the guests inside it, and measures from outside. Scenarios, the demo and the benchmarks are
//! built on it; `docs/bench.md` shows how to use it for one's own CI.
//!
//! This crate runs on a developer's machine and trusts what it boots as little as it must: every wait ends when nothing
//! moves any more ([`bench::patience`]).

pub mod assets;
pub mod bench;
pub mod cli;
pub mod demo;
pub mod disks;
pub mod hostile;
pub mod lossy_disk;
pub mod measure;
pub mod peer;
pub mod probe;
mod random;
pub mod sound;
pub mod suite;
pub mod wav;
