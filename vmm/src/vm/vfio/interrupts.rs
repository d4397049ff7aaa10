//! How a function's interrupts reach the VM: exactly one of INTx, MSI and MSI-X, as the guest's driver chose.
//!
//! ```text
//!              MSI on            MSI-X on
//!      ┌────── <─────── INTx ───────> ──────┐
//!     MSI               (or off:           MSI-X
//!      └────── ───────> no line) <───── ────┘
//!              MSI off           MSI-X off
//! ```

use std::sync::Arc;

use super::config::Config;
use super::intx::Intx;
use crate::host::error::Error;
use crate::host::irq::Index;
use crate::host::region::HostFunction;
use crate::vm::interrupt::Interrupts;

/// What is switched on in the host.
enum Delivery {
    Off,
    Intx(Intx),
    /// MSI with this many vectors.
    Msi(usize),
    Msix,
}

/// The interrupts of one function.
pub struct DeviceInterrupts {
    interrupts: Arc<Interrupts>,
    /// Where the line goes, if there is one.
    gsi: Option<u32>,
    delivery: Delivery,
}

impl DeviceInterrupts {
    /// All off.
    pub fn new(interrupts: &Arc<Interrupts>, gsi: Option<u32>) -> Self {
        Self { interrupts: Arc::clone(interrupts), gsi, delivery: Delivery::Off }
    }

    /// Makes the host deliver what the configuration space says now.
    pub fn update(&mut self, host: &HostFunction, config: &Config) -> Result<(), Error> {
        let bdf = host.bdf();
        let failed = |kind| move |source| Error::HostInterrupt { kind, bdf, source };
        if let Some((_, msix)) = config.msix.as_ref().filter(|(_, msix)| msix.enabled()) {
            if !matches!(self.delivery, Delivery::Msix) {
                self.off(host);
                let events: Vec<_> = (0..msix.count()).filter_map(|v| msix.event(v)).collect();
                host.irq_enable(Index::Msix, &events).map_err(failed("MSI-X"))?;
                self.delivery = Delivery::Msix;
            }
        } else if let Some(msi) = config.msi.as_ref().filter(|msi| msi.enabled()) {
            let events = msi.events();
            if !matches!(self.delivery, Delivery::Msi(count) if count == events.len()) {
                self.off(host);
                host.irq_enable(Index::Msi, &events).map_err(failed("MSI"))?;
                self.delivery = Delivery::Msi(events.len());
            }
        } else if !matches!(self.delivery, Delivery::Intx(_)) {
            self.off(host);
            if let Some(gsi) = self.gsi {
                self.delivery = Delivery::Intx(Intx::enable(host, &self.interrupts, gsi)?);
            }
        }
        Ok(())
    }

    /// Switches everything off.
    pub fn off(&mut self, host: &HostFunction) {
        let index = match std::mem::replace(&mut self.delivery, Delivery::Off) {
            Delivery::Off => return,
            Delivery::Intx(intx) => return intx.disable(host),
            Delivery::Msi(_) => Index::Msi,
            Delivery::Msix => Index::Msix,
        };
        if let Err(error) = host.irq_disable(index) {
            tracing::debug!("{}: switch {index:?} off: {error}", host.bdf());
        }
    }
}
