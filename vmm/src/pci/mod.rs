//! PCI: one root bus, configuration by ECAM and by ports 0xCF8/0xCFC, BARs and MSI-X.

pub mod address;
pub mod device;
