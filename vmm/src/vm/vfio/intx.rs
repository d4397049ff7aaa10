//! The `INTx#` line of a function, level-triggered without an exit to this process.
//!
//! ```text
//!  device asserts ─> VFIO masks the line, signals `trigger` ─> KVM raises the GSI
//!  guest's EOI    ─> KVM lowers the GSI, signals `resample` ─> VFIO unmasks; fires again if still asserted
//! ```

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::host::error::Error;
use crate::host::irq::Index;
use crate::host::region::HostFunction;
use crate::vm::interrupt::Interrupts;

/// A line that is on.
pub struct Intx {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    trigger: EventFd,
    resample: EventFd,
}

impl Intx {
    /// Switches the line on, to `gsi`.
    pub fn enable(host: &HostFunction, interrupts: &Arc<Interrupts>, gsi: u32) -> Result<Self, Error> {
        let bdf = host.bdf();
        let event = || EventFd::new(EFD_NONBLOCK).map_err(|source| Error::EventFd { bdf, source });
        let this = Self { interrupts: Arc::clone(interrupts), gsi, trigger: event()?, resample: event()? };
        let bound = this.interrupts.bind_intx(gsi, &this.trigger, &this.resample);
        bound.map_err(|source| Error::Interrupt { bdf, source: source.into() })?;
        let on = host.irq_enable(Index::Intx, &[&this.trigger]).and_then(|()| host.intx_unmask_by(&this.resample));
        match on {
            Ok(()) => Ok(this),
            Err(source) => {
                this.disable(host);
                Err(Error::HostInterrupt { kind: "INTx", bdf, source })
            }
        }
    }

    /// Switches the line off. KVM lowers the GSI with it.
    pub fn disable(self, host: &HostFunction) {
        if let Err(error) = host.irq_disable(Index::Intx) {
            tracing::debug!("{}: switch INTx off: {error}", host.bdf());
        }
        if let Err(error) = self.interrupts.unbind(self.gsi, &self.trigger) {
            tracing::debug!("{}: unbind INTx: {error}", host.bdf());
        }
    }
}
