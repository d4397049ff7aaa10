//! A virtual CPU that never runs, for as long as the test host lives.
//!
//! KVM rewrites its own code (static keys) whenever the last virtual CPU whose local APIC is off, or the last VM, comes or goes. A
//! multi-threaded emulator now and then has another processor run into the breakpoint of such a rewriting when that is over already
//! (`Oops: int3` in `apic_has_pending_timer`), which no real processor does. With one such virtual CPU there for good nothing is rewritten.

use std::convert::Infallible;

use kvm_ioctls::{Error, Kvm};

/// Holds it until the process is killed.
///
/// # Errors
/// KVM is not there.
pub fn hold() -> Result<Infallible, Error> {
    let vm = Kvm::new()?.create_vm()?;
    vm.create_irq_chip()?;
    let _held = vm.create_vcpu(0)?;
    loop {
        std::thread::park();
    }
}
