//! One VM: memory, vCPUs, boot, ACPI, legacy devices.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod coalesced;
pub mod cpuid;
mod dsdt;
pub mod end;
pub mod generation_id;
pub mod kvm;
pub mod layout;
pub mod legacy;
pub mod memory;
pub mod panic_watch;
pub mod state;
pub mod terminal;
pub mod unused;
pub mod vcpu;
mod vcpu_stats;
pub mod viewers;
pub mod vm;
