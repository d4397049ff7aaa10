//! A network device on a TAP interface of the host.

pub mod config;
