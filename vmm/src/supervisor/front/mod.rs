//! Who looks at a machine and steers it from outside: control socket, signals, service manager.

pub mod notify;
pub mod protocol;
pub(in crate::supervisor) mod server;
pub(in crate::supervisor) mod signals;
