//! Umbra's virtual machine monitor: KVM virtual machines, their devices, and the supervisor that lets a
//! guest outlive the drivers of its devices. The binary is `umbra`.
//!
//! Who may know whom (`docs/architecture.md`, held by `vmm/tests/layers.rs`):
//! `cli > supervisor > record > lifecycle > wire > host > base` and `cli > vm > wire`, with `config` beside them.

pub mod base;
pub mod cli;
pub mod config;
pub mod host;
pub mod lifecycle;
pub mod record;
pub mod supervisor;
pub mod vm;
pub mod wire;
