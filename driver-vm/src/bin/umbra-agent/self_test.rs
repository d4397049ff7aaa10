//! The NIC's own test, for trying what follows: its driver holds the network stack's lock until it is over.

use std::fs;
use std::time::Instant;

use anyhow::Context;
use umbra_driver_vm::calls::Calls;

use crate::ethtool::Features;
use crate::{interface, kernel_log};

/// Starts the test of each NIC, in a thread: it takes seconds.
///
/// # Errors
/// When no thread can be made.
pub fn start() -> anyhow::Result<()> {
    let test = || {
        let interfaces = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
        let names = interfaces.filter_map(|entry| entry.file_name().into_string().ok());
        for nic in names.filter(|name| interface::pci_driver(name).is_some()) {
            let begun = Instant::now();
            // Not among the network thread's calls: that thread is one of those who wait.
            let done = Features::of(&Calls::default(), &nic).and_then(|of| of.self_test());
            let outcome = done.map_or_else(|error| format!("failed: {error}"), |()| "has ended".into());
            kernel_log::error(&format!("the self-test of {nic} {outcome} after {} ms", begun.elapsed().as_millis()));
        }
    };
    std::thread::Builder::new().name("self-test".into()).spawn(test).map(drop).context("cannot start a thread")
}
