//! PCI: one root bus, configuration by ECAM and by ports 0xCF8/0xCFC, BARs and MSI-X.

mod allocator;
pub mod bus;
pub mod config;
pub mod device;
pub mod msix;
