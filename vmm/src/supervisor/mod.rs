//! The supervisor: starts, watches, fences and replaces driver VMs.
