//! One VM: memory, vCPUs, boot, ACPI, legacy devices.

pub mod boot;
pub mod cpuid;
pub mod kvm;
pub mod layout;
pub mod memory;
