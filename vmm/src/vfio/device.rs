//! A host PCI function as a device of a VM.
//!
//! The invariant: when it goes (VM reset, given up), interrupts are switched off, then bus mastering is cleared,
//! then its BARs leave the VM, and only then is the VM's memory unmapped for DMA. Once given up, nothing in this process
//! reaches the function any more, because another VM may have it.

use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::bars::{self, BarPlan, Emulated};
use super::config::{self, COMMAND, Capabilities, Config};
use super::container::Vfio;
use super::error::Error;
use super::events::{Failure, FailureWatch};
use super::files::DeviceFiles;
use super::interrupts::DeviceInterrupts;
use super::irq::Index;
use super::mapping::BarMapping;
use super::msi::{self, Msi};
use super::msix::{MsixLayout, within};
use super::region::{HostConfig, HostFunction};
use super::sysfs::HostDevice;
use crate::interrupt::Interrupts;
use crate::pci::address::{Bdf, Slot};
use crate::pci::config::COMMAND_BUS_MASTER;
use crate::pci::device::{Bar, BarChange, BarIndex, PciDevice};
use crate::pci::msix::Msix;

/// A BAR of the function.
struct BarState {
    plan: BarPlan,
    mapping: Option<BarMapping>,
}

/// A function passed through to a VM.
pub struct VfioPciDevice {
    name: String,
    config: Config,
    interrupts: DeviceInterrupts,
    bars: Vec<BarState>,
    bdf: Bdf,
    /// `None`: given up.
    host: Option<Arc<HostFunction>>,
    vfio: Arc<Vfio>,
}

/// What reads of a device that is not there return.
const ABSENT: u8 = 0xFF;

impl VfioPciDevice {
    /// Opens the function for `slot` of the VM's bus. The host's kernel resets it, if it can.
    pub fn open(vfio: &Arc<Vfio>, bdf: Bdf, slot: Slot) -> Result<Self, Error> {
        let files = vfio.open(&HostDevice::find(bdf)?)?;
        Self::from_files(vfio, files, slot)
    }

    /// Takes a function that is open already for `slot` of the VM's bus. Whoever opened it has reset it.
    pub fn from_files(vfio: &Arc<Vfio>, files: DeviceFiles, slot: Slot) -> Result<Self, Error> {
        let bdf = files.bdf();
        let vanished = EventFd::new(EFD_NONBLOCK).map_err(|source| Error::EventFd { bdf, source })?;
        let host = Arc::new(HostFunction::new(files, vanished)?);
        vfio.join(host.files())?;
        let gsi = (host.irq_count(Index::Intx) > 0).then(|| Interrupts::intx_gsi(slot.get()));
        // From here on its drop gives everything back, however far the set-up came.
        let mut this = Self {
            name: format!("vfio {bdf}"),
            config: Config::new(&Capabilities::default(), &[], None),
            interrupts: DeviceInterrupts::new(vfio.interrupts(), gsi),
            bars: Vec::new(),
            bdf,
            host: Some(Arc::clone(&host)),
            vfio: Arc::clone(vfio),
        };
        this.set_up(&host, gsi)?;
        Ok(this)
    }

    fn set_up(&mut self, host: &HostFunction, gsi: Option<u32>) -> Result<(), Error> {
        let (bdf, interrupts) = (self.bdf, self.vfio.interrupts());
        let capabilities = Capabilities::scan(host);
        let msix = config::msix_layout(host, &capabilities)?;
        let emulated: Vec<Emulated> = msix.iter().flat_map(MsixLayout::emulated).collect();
        let regions = std::array::from_fn(|index| host.region(u32::try_from(index).unwrap_or(u32::MAX)));
        let plans = bars::plan(config::bar_registers(host), &regions, &emulated);
        let bars: Vec<Bar> = plans.iter().map(|plan| plan.bar).collect();
        let mut config = Config::new(&capabilities, &bars, gsi.and_then(|gsi| u8::try_from(gsi).ok()));
        if let Some(offset) = capabilities.msi {
            let vectors = msi::vectors(interrupts, msi::announced(host, offset));
            config.msi = Some(Msi::new(host, offset, vectors.map_err(|source| Error::Interrupt { bdf, source })?));
        }
        if let Some(layout) = msix {
            let msix = Msix::new(interrupts, layout.count).map_err(|source| Error::Vectors { bdf, source })?;
            config.msix = Some((layout, msix));
        }
        config.reset(host);
        for plan in plans {
            self.bars.push(map_bar(&self.vfio, host, plan)?);
        }
        self.config = config;
        self.interrupts.update(host, &self.config)
    }

    /// Watches the function for failures, of which more than `interrupt_limit` interrupts a second are one (0: they are
    /// not); add the result to the VM's event loop. `tell` is called there.
    pub fn watch(
        &self,
        interrupt_limit: u32,
        tell: Box<dyn FnMut(Bdf, Failure) + Send>,
    ) -> Result<FailureWatch, Error> {
        let given_up = || Error::Malformed { bdf: self.bdf, what: "it was given up".into() };
        FailureWatch::new(self.host.as_ref().ok_or_else(given_up)?, interrupt_limit, tell)
    }

    /// The host's address of the function.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// Gives the function up for good: afterwards this process has neither mappings nor descriptors of it. On the VM's bus
    /// there is a device that does not answer.
    pub fn give_up(&mut self) {
        let Some(host) = self.host.take() else { return };
        let start = Instant::now();
        self.stop(&host);
        let stopped = start.elapsed();
        for mapping in self.bars.iter_mut().filter_map(|state| state.mapping.as_mut()) {
            if let Err(error) = mapping.leave_device() {
                // As long as it runs, the VM has the registers: whoever waits for the device kills it.
                tracing::error!("{}: take the registers from the VM: {error}", self.name);
                std::process::abort();
            }
        }
        let left = start.elapsed();
        self.vfio.release(host.files());
        drop(host);
        tracing::debug!(?stopped, ?left, "{}: given up in {:?}", self.name, start.elapsed());
    }

    fn find_bar(&mut self, bar: BarIndex) -> Option<&mut BarState> {
        self.bars.iter_mut().find(|state| state.plan.bar.index == bar)
    }

    fn leave_vm(&mut self) {
        for mapping in self.bars.iter_mut().filter_map(|state| state.mapping.as_mut()) {
            if let Err(error) = mapping.place(None) {
                tracing::error!("{}: {}", self.name, chain(&error));
            }
        }
    }

    /// Interrupts off, then DMA off.
    fn stop(&mut self, host: &HostFunction) {
        self.interrupts.off(host);
        let command = host.config16(COMMAND);
        host.write_config(COMMAND, &(command & !COMMAND_BUS_MASTER).to_le_bytes());
    }

    fn update_interrupts(&mut self, host: &HostFunction) {
        if let Err(error) = self.interrupts.update(host, &self.config) {
            // The driver will see a device without interrupts and give up; the VM goes on.
            tracing::error!("{}: {}", self.name, chain(&error));
        }
    }
}

fn map_bar(vfio: &Arc<Vfio>, host: &HostFunction, plan: BarPlan) -> Result<BarState, Error> {
    let bar = plan.bar.index.0;
    let offset = host.region_offset(u32::from(bar));
    let mapping = (!plan.mapped.is_empty()).then(|| BarMapping::new(vfio.slots(), host.fd(), offset, &plan.mapped));
    let mapping = mapping.transpose().map_err(|source| Error::MapBar { bdf: host.bdf(), bar, source })?;
    Ok(BarState { plan, mapping })
}

impl PciDevice for VfioPciDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn bars(&self) -> Vec<Bar> {
        self.bars.iter().map(|state| state.plan.bar).collect()
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        match &self.host {
            Some(host) => self.config.read(&**host, offset, data),
            None => data.fill(ABSENT),
        }
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        let Some(host) = self.host.clone() else { return Vec::new() };
        if self.config.may_stop_decoding(offset, data) {
            self.leave_vm();
        }
        let effects = self.config.write(&*host, offset, data);
        if effects.interrupts {
            self.update_interrupts(&host);
        }
        effects.bars
    }

    fn bar_read(&mut self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        if let Some((layout, msix)) = &self.config.msix {
            if let Some(at) = within(&layout.table, bar, offset) {
                return msix.table_read(at, data);
            }
            if let Some(at) = within(&layout.pending, bar, offset) {
                return msix.pba_read(at, data);
            }
        }
        match &self.host {
            Some(host) => host.read(u32::from(bar.0), offset, data),
            None => data.fill(ABSENT),
        }
    }

    fn bar_write(&mut self, bar: BarIndex, offset: u64, data: &[u8]) {
        if let Some((layout, msix)) = &mut self.config.msix {
            if let Some(at) = within(&layout.table, bar, offset) {
                return msix.table_write(at, data);
            }
            if within(&layout.pending, bar, offset).is_some() {
                return;
            }
        }
        if let Some(host) = &self.host {
            host.write(u32::from(bar.0), offset, data);
        }
    }

    fn bar_moved(&mut self, bar: BarIndex, base: Option<u64>) {
        let Some(mapping) = self.find_bar(bar).and_then(|state| state.mapping.as_mut()) else { return };
        if let Err(error) = mapping.place(base) {
            // Accesses are trapped and forwarded instead.
            tracing::error!("{}: {}", self.name, chain(&error));
        }
    }

    fn reset(&mut self) {
        let Some(host) = self.host.clone() else { return };
        self.stop(&host);
        self.leave_vm();
        if let Err(error) = host.reset() {
            tracing::warn!("{}: reset: {error}", self.name);
        }
        self.config.reset(&*host);
        self.update_interrupts(&host);
    }
}

impl Drop for VfioPciDevice {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// The error and its causes, in a line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
