//! Passing host PCI functions through to a VM (VFIO).
