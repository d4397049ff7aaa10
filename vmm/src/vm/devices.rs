//! From the pieces of a VM's spec to devices on its PCI bus: a short `match` each; how a device is made is the
//! device's own business. Slots are given out in the order of the spec, from 1, so that a guest finds the same
//! devices at the same places in each life.

use std::collections::BTreeMap;
use std::fs::File;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_manager::{EventManager, SubscriberOps};
use thiserror::Error;
use umbra_driver_vm::block_protocol::BLOCK_PORT;
use umbra_driver_vm::sound_protocol::SOUND_PORT;
use umbra_shadow::{DeviceId, LinkId};

use super::host::Host;
use super::machine::vm::Vm;
use super::pci::bus::{self, SharedDevice};
use super::process::Subscriber;
use super::vfio::{self, DeviceFailure, Vfio, VfioPciDevice, VmResources};
use super::virtio::Outbox;
use super::virtio::console::{self, Console};
use super::virtio::device::{self, VirtioDevice};
use super::virtio::disk::split::{MAX_QUEUES, Settings};
use super::virtio::disk::{self, FileDisk, SplitDisk};
use super::virtio::net::split::SplitNet;
use super::virtio::net::tap::{self, TapNet};
use super::virtio::net::vhost_user::VhostUserNet;
use super::virtio::pci::{self, VirtioPci};
use super::virtio::rng::{self, Rng};
use super::virtio::shadowed::Shadowed;
use super::virtio::sound::Sound;
use crate::base::lock::lock;
use crate::base::pci_address::{Bdf, ParseBdfError, Slot};
use crate::base::time::Time;
use crate::host::DeviceFiles;
use crate::wire::messages::{DiskBackend, FromVm, NetBackend, SoundBackend, ToVm, VmSpec};

/// Errors of adding devices.
#[derive(Debug, Error)]
pub enum Error {
    /// The bus is full.
    #[error("too many devices: the PCI bus has 31 slots")]
    NoSlot,
    /// No place on the bus.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// A virtio device.
    #[error("make {name}")]
    Virtio {
        /// Name of the device.
        name: String,
        /// The cause.
        #[source]
        source: device::Error,
    },
    /// Its transport.
    #[error("make {name}")]
    Transport {
        /// Name of the device.
        name: String,
        /// The cause.
        #[source]
        source: pci::Error,
    },
    /// A driver VM's end.
    #[error("make an eventfd for a driver VM's network device")]
    End(#[source] std::io::Error),
    /// A TAP interface.
    #[error(transparent)]
    Tap(#[from] tap::Error),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// The entropy device.
    #[error(transparent)]
    Rng(#[from] rng::Error),
    /// The console.
    #[error(transparent)]
    Console(#[from] console::Error),
    /// A passed-through function.
    #[error(transparent)]
    Vfio(#[from] vfio::Error),
    /// Not a PCI address.
    #[error(transparent)]
    Bdf(#[from] ParseBdfError),
}

impl Error {
    /// Whether a device cannot be what the VM's spec has it be, whatever the host has.
    pub(super) fn is_configuration(&self) -> bool {
        match self {
            Self::NoSlot | Self::Bdf(_) | Self::Console(console::Error::TooManyPorts(_)) => true,
            Self::Tap(tap::Error::Tap(why)) => why.is_configuration(),
            Self::Disk(disk::Error::Image(why)) => why.is_configuration(),
            _ => false,
        }
    }
}

/// Makes the devices of `spec` and puts them on the bus and into the event loop. `files` are those of the function to pass
/// through, if it is open already.
pub fn add(
    vm: &Vm,
    (spec, mut files): (&VmSpec, Vec<OwnedFd>),
    host: &Arc<Host>,
    events: &mut EventManager<Subscriber>,
) -> Result<Devices, Error> {
    let mut adder = Adder { vm, host, events, devices: Devices::default() };
    adder.devices.storm = spec.interrupt_limit.and_then(|limit| Some((limit, open_counters()?)));
    for (index, net) in (0u16..).zip(&spec.nets) {
        adder.net(index, net)?;
    }
    for (index, sound) in (0u16..).zip(&spec.sounds) {
        adder.sound(index, sound)?;
    }
    if !spec.ports.is_empty() || spec.hvc {
        let host = Arc::clone(host);
        let outbox: Outbox = Arc::new(move |message| host.tell(&message));
        let console =
            Arc::new(Mutex::new(Console::new(&spec.ports, spec.hvc.then(|| Arc::clone(&vm.serial)), &outbox)?));
        adder.devices.console = Some(Arc::clone(&console));
        adder.virtio("console", console)?;
    }
    for (index, disk) in (0u16..).zip(&spec.disks) {
        adder.disk(index, disk, spec.cpus)?;
    }
    adder.virtio("virtio-rng", Arc::new(Mutex::new(Rng::new()?)))?;
    if !spec.passthrough.is_empty() || spec.awaits_device {
        adder.devices.vfio = Some(new_vfio(vm)?);
    }
    for function in &spec.passthrough {
        adder.devices.plug(vm, (function, std::mem::take(&mut files)), host)?;
    }
    if let (Some(snapshot), Some(vfio)) = (&spec.awaited, &adder.devices.vfio) {
        // Without it the function is put on the bus when it comes.
        match add_function(vm, |slot| VfioPciDevice::awaited(vfio, snapshot, slot)) {
            Ok(device) => adder.devices.awaited = Some(device),
            Err(error) => tracing::warn!("the device will not be there ahead: {error}"),
        }
    }
    Ok(adder.devices)
}

struct Adder<'a> {
    vm: &'a Vm,
    host: &'a Arc<Host>,
    events: &'a mut EventManager<Subscriber>,
    devices: Devices,
}

impl Adder<'_> {
    fn net(&mut self, index: u16, backend: &NetBackend) -> Result<(), Error> {
        let name = format!("virtio-net{index}");
        let failed = |source| Error::Virtio { name: name.clone(), source };
        match backend {
            NetBackend::Split { mac, mtu, driver_memory, neighbours, allow_any_source, has_spare } => {
                let host = Arc::clone(self.host);
                let outbox = Arc::new(move |message| host.tell(&message));
                let mut net = SplitNet::new(index, *mac, *mtu, outbox).map_err(failed)?;
                net.share(neighbours, *allow_any_source);
                if *has_spare {
                    net.keep_behind();
                }
                net.limit_memory(*driver_memory);
                let net = Arc::new(Mutex::new(net));
                self.devices.shadowed.insert(DeviceId::net(index), Arc::clone(&net) as _);
                self.virtio(&name, net)
            }
            NetBackend::VhostUser { mac, mtu } => {
                let host = Arc::clone(self.host);
                let outbox = Arc::new(move |message| host.tell(&message));
                let net = VhostUserNet::new(index, *mac, *mtu, outbox).map_err(Error::End)?;
                let net = Arc::new(Mutex::new(net));
                self.devices.ends.push(Arc::clone(&net));
                self.virtio(&name, net)
            }
            NetBackend::Tap { interface, mac, mtu } => {
                let host = Arc::clone(self.host);
                let outbox = Arc::new(move |message| host.tell(&message));
                let net = Arc::new(Mutex::new(TapNet::new(interface, *mac, *mtu, outbox)?));
                self.devices.taps.push(Arc::clone(&net));
                self.virtio(&name, net)
            }
        }
    }

    fn sound(&mut self, index: u16, backend: &SoundBackend) -> Result<(), Error> {
        let name = format!("virtio-sound{index}");
        let host = Arc::clone(self.host);
        let outbox = Arc::new(move |message| host.tell(&message));
        let sound = Sound::new(index, backend.card.clone(), backend.policy, outbox);
        let sound = sound.map_err(|source| Error::Virtio { name: name.clone(), source })?;
        let sound = Arc::new(Mutex::new(sound));
        self.devices.shadowed.insert(DeviceId::sound(index), Arc::clone(&sound) as _);
        self.virtio(&name, sound)
    }

    /// Disk `index` of all disks of a VM with `cpus` vCPUs.
    fn disk(&mut self, index: u16, backend: &DiskBackend, cpus: u8) -> Result<(), Error> {
        let name = format!("virtio-block{index}");
        match backend {
            DiskBackend::File(disk) => {
                let host = Arc::clone(self.host);
                let outbox = Arc::new(move |message| host.tell(&message));
                let disk = Arc::new(Mutex::new(FileDisk::new(disk, index, outbox)?));
                self.devices.files.insert(DeviceId::block(index), Arc::clone(&disk));
                self.virtio(&name, disk)
            }
            DiskBackend::Split { disk, cache, driver_memory, io_timeout_ms } => {
                let host = Arc::clone(self.host);
                let outbox = Arc::new(move |message| host.tell(&message));
                let settings = Settings {
                    disk: disk.clone(),
                    cache: *cache,
                    driver_memory: *driver_memory,
                    io_timeout: Duration::from_millis((*io_timeout_ms).into()),
                    // One a vCPU.
                    queues: cpus.min(MAX_QUEUES),
                };
                let disk = SplitDisk::new(index, &settings, outbox);
                let disk = disk.map_err(|source| Error::Virtio { name: name.clone(), source })?;
                let disk = Arc::new(Mutex::new(disk));
                self.devices.shadowed.insert(DeviceId::block(index), Arc::clone(&disk) as _);
                self.virtio(&name, disk)
            }
        }
    }

    /// Puts a virtio device on the bus and into the event loop.
    fn virtio<D: VirtioDevice + 'static>(&mut self, name: &str, device: Arc<Mutex<D>>) -> Result<(), Error> {
        let slot = free_slot(self.vm)?;
        let function = VirtioPci::new(name.into(), device.clone(), self.vm.memory.clone(), (&self.vm.interrupts, slot));
        let function = function.map_err(|source| Error::Transport { name: name.into(), source })?;
        self.events.add_subscriber(device);
        Ok(self.vm.bus.pci.add(slot, Arc::new(Mutex::new(function)))?)
    }
}

/// The host's counters of interrupts, open for the functions that come later too.
fn open_counters() -> Option<Arc<File>> {
    let opened = File::open(vfio::COUNTERS);
    opened
        .inspect_err(|error| tracing::warn!("interrupts are not counted: open {}: {error}", vfio::COUNTERS))
        .ok()
        .map(Arc::new)
}

fn free_slot(vm: &Vm) -> Result<Slot, Error> {
    vm.bus.pci.free_slot().ok_or(Error::NoSlot)
}

fn new_vfio(vm: &Vm) -> Result<Arc<Vfio>, Error> {
    Ok(Vfio::new(VmResources {
        vm: Arc::clone(&vm.fd),
        memory: vm.memory.clone(),
        unused: Arc::clone(&vm.unused),
        interrupts: Arc::clone(&vm.interrupts),
        slots: Arc::clone(&vm.slots),
    })?)
}

/// Puts the function that `make` makes for a slot into it.
fn add_function(
    vm: &Vm,
    make: impl FnOnce(Slot) -> Result<VfioPciDevice, vfio::Error>,
) -> Result<Arc<Mutex<VfioPciDevice>>, Error> {
    let slot = free_slot(vm)?;
    let device = Arc::new(Mutex::new(make(slot)?));
    vm.bus.pci.add(slot, Arc::clone(&device) as SharedDevice)?;
    Ok(device)
}

/// The devices that the supervisor speaks with.
#[derive(Default)]
pub struct Devices {
    /// A guest's, behind a shadow each.
    shadowed: BTreeMap<DeviceId, Arc<Mutex<dyn Shadowed>>>,
    /// Disks on files.
    files: BTreeMap<DeviceId, Arc<Mutex<FileDisk>>>,
    /// A guest's on interfaces of the host.
    taps: Vec<Arc<Mutex<TapNet>>>,
    /// A driver VM's network devices, by position among its ends.
    ends: Vec<Arc<Mutex<VhostUserNet>>>,
    console: Option<Arc<Mutex<Console>>>,
    /// In a VM that has, or will have, functions passed through.
    vfio: Option<Arc<Vfio>>,
    /// Those functions.
    functions: Vec<Arc<Mutex<VfioPciDevice>>>,
    /// The function whose files are to come.
    awaited: Option<Arc<Mutex<VfioPciDevice>>>,
    /// Most times a second that one interrupt of a function may come, and the host's counters of interrupts; `None`: no limit.
    storm: Option<(NonZeroU32, Arc<File>)>,
    /// Subscribers that the event loop does not have yet.
    subscribers: Vec<Subscriber>,
}

impl Devices {
    /// Puts the host's function `function` on the bus, or, where a snapshot of it is there, in the place of that; before the vCPUs
    /// run, or later. Without its `files` it is opened.
    pub fn plug(&mut self, vm: &Vm, (function, files): (&str, Vec<OwnedFd>), host: &Arc<Host>) -> Result<(), Error> {
        let bdf: Bdf = function.parse()?;
        let vfio = match &self.vfio {
            Some(vfio) => vfio,
            None => self.vfio.insert(new_vfio(vm)?),
        };
        let device = match (self.awaited.take(), DeviceFiles::received(bdf, files)) {
            (Some(device), Some(files)) => {
                lock(&device).arrive(files)?;
                device
            }
            (_, Some(files)) => add_function(vm, |slot| VfioPciDevice::from_files(vfio, files, slot))?,
            (_, None) => add_function(vm, |slot| VfioPciDevice::open(vfio, bdf, slot))?,
        };
        self.watch(device, host)
    }

    /// From here on the function is watched.
    fn watch(&mut self, device: Arc<Mutex<VfioPciDevice>>, host: &Arc<Host>) -> Result<(), Error> {
        let host = Arc::clone(host);
        let watch = lock(&device).watch(
            self.storm.clone(),
            Box::new(move |bdf: Bdf, failure: DeviceFailure| {
                let (device, what) = (bdf.to_string(), failure.to_string());
                host.tell(&FromVm::DeviceFailed { at: Time::now().0, device, what });
            }),
        )?;
        self.subscribers.push(Arc::new(Mutex::new(watch)));
        self.functions.push(device);
        Ok(())
    }

    /// Gives all functions up, while the vCPUs run.
    pub fn release(&mut self) {
        for device in self.functions.drain(..) {
            lock(&device).give_up();
        }
        self.vfio = None;
    }

    /// Subscribers that have come since the last call.
    pub fn take_subscribers(&mut self) -> Vec<Subscriber> {
        std::mem::take(&mut self.subscribers)
    }

    /// Bytes of the largest file of a disk that may be written to; `None`: there is none.
    pub fn largest_file(&self) -> Option<u64> {
        self.files.values().map(|disk| lock(disk).written()).filter(|bytes| *bytes > 0).max()
    }

    /// The VM has ended: what its guest was told is done is to become stable.
    pub fn finish(&self) {
        self.shadowed.iter().for_each(|(_, shadowed)| lock(shadowed).finish());
    }

    /// The guest's devices with something that the guest was told is done and that would be lost with a driver VM, if this process ended
    /// now.
    pub fn keepers(&self) -> impl Iterator<Item = DeviceId> {
        self.shadowed.iter().filter(|(_, shadowed)| lock(shadowed).keeps()).map(|(device, _)| *device)
    }

    /// A message of the supervisor that concerns a device.
    pub fn handle(&self, message: &ToVm, fds: Vec<OwnedFd>, host: &Host) {
        let socket = |fds: Vec<OwnedFd>| fds.into_iter().next().map(UnixStream::from);
        match *message {
            ToVm::Attach { device, link } => match socket(fds) {
                Some(socket) => self.with(device, |shadowed| shadowed.attach(link, socket)),
                None => tracing::error!(%device, "a link without its socket"),
            },
            ToVm::Connect { end, link } => match socket(fds) {
                Some(socket) => self.connect(end, link, socket),
                None => tracing::error!(end, "a connection without its socket"),
            },
            ToVm::Mask { device, generation } => self.with(device, |shadowed| shadowed.mask(generation)),
            ToVm::Quarantine { device } => self.with(device, |shadowed| shadowed.quarantine()),
            ToVm::GoLive { device, .. } | ToVm::Arm { device, .. } | ToVm::Carrier { device, .. } => {
                self.with(device, |shadowed| shadowed.order(message));
            }
            ToVm::Quiesce { device } | ToVm::GoOn { device } => self.with(device, |shadowed| shadowed.order(message)),
            ToVm::Resize { device, bytes } => match self.files.get(&device) {
                Some(disk) => lock(disk).resize(bytes),
                None => tracing::error!(%device, "the supervisor names a disk that is on no file"),
            },
            ToVm::QueryStatus => {
                for shadowed in self.shadowed.values() {
                    let status = lock(shadowed).status();
                    host.tell(&status);
                }
            }
            ToVm::Tap { ref interface, ref refused } => {
                let file = fds.into_iter().next().map(File::from);
                let answer = file.ok_or_else(|| refused.clone().unwrap_or_default());
                match self.taps.iter().find(|tap| lock(tap).interface() == interface) {
                    Some(tap) => lock(tap).answered(answer),
                    None => tracing::error!(interface, "the supervisor names a TAP that is none of this VM"),
                }
            }
            // These concern the whole VM.
            ToVm::Start(_)
            | ToVm::PowerButton
            | ToVm::Kill
            | ToVm::Finish
            | ToVm::Release
            | ToVm::LockUp
            | ToVm::Nmi
            | ToVm::WatchForPanic { .. }
            | ToVm::Plug { .. }
            | ToVm::Snapshot { .. } => {}
        }
    }

    fn with(&self, device: DeviceId, act: impl FnOnce(&mut dyn Shadowed)) {
        match self.shadowed.get(&device) {
            Some(shadowed) => act(&mut *lock(shadowed)),
            None => tracing::error!(%device, "the supervisor names a device that is none of a driver VM's"),
        }
    }

    /// An end of this driver VM is connected: that of a network device, or the port of a service's session.
    fn connect(&self, end: u16, link: LinkId, socket: UnixStream) {
        if let Some(net) = self.ends.get(usize::from(end)) {
            return lock(net).connect(link, socket);
        }
        let mut console = self.console.as_ref().map(|console| lock(console));
        let names = [SOUND_PORT, BLOCK_PORT].map(|class| format!("{class}.{end}"));
        let taken =
            console.as_mut().and_then(|console| Some((names.iter().find(|name| console.takes_peers(name))?, console)));
        match taken {
            Some((name, console)) => console.connect(name, (end, link), socket),
            None => tracing::error!(end, "the supervisor connects an end that is none"),
        }
    }
}
