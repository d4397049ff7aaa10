//! A host PCI function as a device of a VM.
//!
//! The invariant: when it goes (VM reset, given up), interrupts are switched off, then bus mastering is cleared,
//! then its BARs leave the VM, and only then is the VM's memory unmapped for DMA. Once given up, nothing in this process
//! reaches the function any more, because another VM may have it.

use std::fs::File;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Instant;

use serde_json::Value;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::bars::{self, BarPlan, Emulated};
use super::config::{self, Config};
use super::container::Vfio;
use super::events::{DeviceFailure, FailureWatch};
use super::interrupts::DeviceInterrupts;
use super::mapping::BarMapping;
use super::msi::{self, Msi};
use super::msix::{MsixLayout, within};
use crate::base::error::chain;
use crate::base::pci_address::{Bdf, Slot};
use crate::base::pci_config::{BARS, COMMAND_BUS_MASTER};
use crate::host::capabilities::Capabilities;
use crate::host::error::Error;
use crate::host::files::DeviceFiles;
use crate::host::info::RegionInfo;
use crate::host::irq::Index;
use crate::host::region::COMMAND;
use crate::host::region::{HostConfig, HostFunction};
use crate::host::snapshot::{Awaited, Snapshot};
use crate::host::sysfs::HostDevice;
use crate::vm::interrupt::Interrupts;
use crate::vm::pci::device::{Bar, BarChange, BarIndex, PciDevice};
use crate::vm::pci::msix::Msix;
use crate::vm::snapshot::device::{self, StateError};

/// A BAR of the function.
struct BarState {
    plan: BarPlan,
    /// Where the bus decodes it.
    base: Option<u64>,
    mapping: Option<BarMapping>,
}

/// Where the function is.
enum Host {
    /// Its files are to come; the VM sees a snapshot of it, whose registers read all ones.
    Awaited(Box<Awaited>),
    /// Here.
    Present(Arc<HostFunction>),
    /// Given up.
    Gone,
}

/// A function passed through to a VM.
pub struct VfioPciDevice {
    name: String,
    config: Config,
    interrupts: DeviceInterrupts,
    bars: Vec<BarState>,
    bdf: Bdf,
    host: Host,
    vfio: Arc<Vfio>,
}

/// Bytes of configuration space.
const CONFIG_SIZE: usize = 4096;

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
        let host = host_function(files)?;
        vfio.join(host.files())?;
        let gsi = gsi(host.irq_count(Index::Intx) > 0, slot);
        // From here on its drop gives everything back, however far the set-up came.
        let mut this = Self::new(vfio, host.bdf(), Host::Present(Arc::clone(&host)), gsi);
        this.set_up(&*host, &host.info().bars(), gsi)?;
        this.begin(&host)?;
        Ok(this)
    }

    /// The function of `snapshot` for `slot` of the VM's bus, where its kernel may set it up; it comes later, by
    /// [`Self::arrive`].
    pub fn awaited(vfio: &Arc<Vfio>, snapshot: &Snapshot, slot: Slot) -> Result<Self, Error> {
        let gsi = gsi(snapshot.has_line(), slot);
        let mut this = Self::new(vfio, snapshot.bdf(), Host::Awaited(Box::new(Awaited::new(snapshot.clone()))), gsi);
        this.set_up(&Awaited::new(snapshot.clone()), snapshot.regions(), gsi)?;
        Ok(this)
    }

    /// The awaited function comes, open and reset; it is set up as the VM's kernel has set up the snapshot of it. After an
    /// error it is gone.
    pub fn arrive(&mut self, files: DeviceFiles) -> Result<(), Error> {
        let malformed = |what: &str| Error::Malformed { bdf: self.bdf, what: what.into() };
        let Host::Awaited(awaited) = &self.host else { return Err(malformed("it is not awaited any more")) };
        if files.bdf() != self.bdf {
            return Err(malformed("another function has come in its place"));
        }
        let host = host_function(files)?;
        awaited.snapshot().check(&*host, &host.info().bars(), host.irq_count(Index::Intx) > 0)?;
        self.vfio.join(host.files())?;
        awaited.hand_over(&*host);
        self.host = Host::Present(Arc::clone(&host));
        let begun = self.begin(&host);
        if begun.is_err() {
            self.give_up();
        }
        begun
    }

    fn new(vfio: &Arc<Vfio>, bdf: Bdf, host: Host, gsi: Option<u32>) -> Self {
        Self {
            name: format!("vfio {bdf}"),
            config: Config::new(&Capabilities::default(), &[], None),
            interrupts: DeviceInterrupts::new(vfio.interrupts(), gsi),
            bars: Vec::new(),
            bdf,
            host,
            vfio: Arc::clone(vfio),
        }
    }

    /// Makes all that the VM sees of the function.
    fn set_up(&mut self, host: &dyn HostConfig, regions: &[RegionInfo; BARS], gsi: Option<u32>) -> Result<(), Error> {
        let (bdf, interrupts) = (self.bdf, self.vfio.interrupts());
        let capabilities = Capabilities::scan(host);
        let msix = config::msix_layout((bdf, host), regions, &capabilities)?;
        let emulated: Vec<Emulated> = msix.iter().flat_map(MsixLayout::emulated).collect();
        let plans = bars::plan(config::bar_registers(host), regions, &emulated);
        let bars: Vec<Bar> = plans.iter().map(|plan| plan.bar).collect();
        let mut config = Config::new(&capabilities, &bars, gsi.and_then(|gsi| u8::try_from(gsi).ok()));
        if let Some(offset) = capabilities.msi {
            let vectors = msi::vectors(interrupts, msi::announced(host, offset));
            config.msi = Some(Msi::new(
                host,
                offset,
                vectors.map_err(|source| Error::Interrupt { bdf, source: source.into() })?,
            ));
        }
        if let Some(layout) = msix {
            let msix =
                Msix::new(interrupts, layout.count).map_err(|source| Error::Vectors { bdf, source: source.into() })?;
            config.msix = Some((layout, msix));
        }
        config.reset(host);
        self.bars = plans.into_iter().map(|plan| BarState { plan, base: None, mapping: None }).collect();
        self.config = config;
        Ok(())
    }

    /// Maps the BARs, into the VM those that decode, and switches the interrupts on.
    fn begin(&mut self, host: &HostFunction) -> Result<(), Error> {
        for state in &mut self.bars {
            state.mapping = map_bar(&self.vfio, host, &state.plan)?;
            if let Some(mapping) = &mut state.mapping
                && let Err(error) = mapping.place(state.base)
            {
                tracing::error!("{}: {}", self.name, chain(&error));
            }
        }
        self.interrupts.update(host, &self.config)
    }

    /// Watches the function for failures, of which more interrupts a second than the limit of `storm`, counted in its file, are one
    /// (`None`: no limit); add the result to the VM's event loop, which calls `tell`.
    pub fn watch(
        &self,
        storm: Option<(NonZeroU32, Arc<File>)>,
        tell: Box<dyn FnMut(Bdf, DeviceFailure) + Send>,
    ) -> Result<FailureWatch, Error> {
        match &self.host {
            Host::Present(host) => FailureWatch::new(host, storm, tell),
            _ => Err(Error::Malformed { bdf: self.bdf, what: "it is not here".into() }),
        }
    }

    /// The host's address of the function.
    pub fn bdf(&self) -> Bdf {
        self.bdf
    }

    /// Gives the function up for good: afterwards this process has neither mappings nor descriptors of it. On the VM's bus
    /// there is a device that does not answer.
    pub fn give_up(&mut self) {
        let Host::Present(host) = std::mem::replace(&mut self.host, Host::Gone) else { return };
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

    /// Configuration space as the VM reads it.
    fn image(&mut self) -> Vec<u8> {
        let mut image = vec![0; CONFIG_SIZE];
        self.config_read(0, &mut image);
        image
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

    fn update_interrupts(&mut self) {
        let Host::Present(host) = &self.host else { return };
        if let Err(error) = self.interrupts.update(host, &self.config) {
            // The driver will see a device without interrupts and give up; the VM goes on.
            tracing::error!("{}: {}", self.name, chain(&error));
        }
    }
}

/// Where the line of the function in `slot` goes, if it has one.
fn gsi(has_line: bool, slot: Slot) -> Option<u32> {
    has_line.then(|| Interrupts::intx_gsi(slot.get()))
}

fn host_function(files: DeviceFiles) -> Result<Arc<HostFunction>, Error> {
    let bdf = files.bdf();
    let vanished = EventFd::new(EFD_NONBLOCK).map_err(|source| Error::EventFd { bdf, source })?;
    Ok(Arc::new(HostFunction::new(files, vanished)?))
}

fn map_bar(vfio: &Arc<Vfio>, host: &HostFunction, plan: &BarPlan) -> Result<Option<BarMapping>, Error> {
    let bar = plan.bar.index.0;
    let offset = host.region_offset(u32::from(bar));
    let mapping = (!plan.mapped.is_empty()).then(|| BarMapping::new(vfio.slots(), host.fd(), offset, &plan.mapped));
    mapping.transpose().map_err(|source| Error::MapBar { bdf: host.bdf(), bar, source })
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
            Host::Present(host) => self.config.read(&**host, offset, data),
            Host::Awaited(awaited) => self.config.read(&**awaited, offset, data),
            Host::Gone => data.fill(ABSENT),
        }
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) -> Vec<BarChange> {
        if self.config.may_stop_decoding(offset, data) && matches!(self.host, Host::Present(_)) {
            self.leave_vm();
        }
        let effects = match &self.host {
            Host::Present(host) => self.config.write(&**host, offset, data),
            Host::Awaited(awaited) => self.config.write(&**awaited, offset, data),
            Host::Gone => return Vec::new(),
        };
        if effects.interrupts {
            self.update_interrupts();
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
            Host::Present(host) => host.read(u32::from(bar.0), offset, data),
            _ => data.fill(ABSENT),
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
        if let Host::Present(host) = &self.host {
            host.write(u32::from(bar.0), offset, data);
        }
    }

    fn bar_moved(&mut self, bar: BarIndex, base: Option<u64>) {
        let Some(state) = self.find_bar(bar) else { return };
        state.base = base;
        let Some(mapping) = &mut state.mapping else { return };
        if let Err(error) = mapping.place(base) {
            // Accesses are trapped and forwarded instead.
            tracing::error!("{}: {}", self.name, chain(&error));
        }
    }

    fn reset(&mut self) {
        match &self.host {
            Host::Present(host) => {
                let host = Arc::clone(host);
                self.stop(&host);
                self.leave_vm();
                if let Err(error) = host.reset() {
                    tracing::warn!("{}: reset: {error}", self.name);
                }
                self.config.reset(&*host);
                self.update_interrupts();
            }
            Host::Awaited(awaited) => {
                awaited.reset();
                self.config.reset(&**awaited);
            }
            Host::Gone => {}
        }
    }

    /// Of a function that has not come yet, the registers that the VM's kernel has set up.
    fn save(&mut self) -> Result<Value, StateError> {
        let interrupts = self.config.msi.as_ref().is_some_and(Msi::enabled)
            || self.config.msix.as_ref().is_some_and(|(_, msix)| msix.enabled());
        if !matches!(self.host, Host::Awaited(_)) || interrupts {
            return Err(StateError::new(&self.name, "is in use, and what is in it cannot be read"));
        }
        let image = self.image();
        device::save(&self.name, &image)
    }

    fn restore(&mut self, state: Value) -> Result<Vec<BarChange>, StateError> {
        let image: Vec<u8> = device::restore(&self.name, state)?;
        let other = || StateError::new(&self.name, "is another function than when it was saved");
        if !matches!(self.host, Host::Awaited(_)) || image.len() != CONFIG_SIZE {
            return Err(other());
        }
        let mut changes = Vec::new();
        // The command register last: with it the function begins to decode.
        for at in (0..COMMAND).chain(COMMAND + 2..u16::try_from(CONFIG_SIZE).unwrap_or(u16::MAX)).step_by(2) {
            changes.extend(self.config_write(at, &image[usize::from(at)..usize::from(at) + 2]));
        }
        let command = usize::from(COMMAND);
        changes.extend(self.config_write(COMMAND, &image[command..command + 2]));
        if self.image() == image { Ok(changes) } else { Err(StateError::new(&self.name, "has other registers")) }
    }
}

impl Drop for VfioPciDevice {
    fn drop(&mut self) {
        self.give_up();
    }
}
