//! From the pieces of a VM's spec to devices on its PCI bus: a short `match` each; how a device is made is the
//! device's own business. Slots are given out in the order of the spec, from 1, so that a guest finds the same
//! devices at the same places in each life.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventManager, SubscriberOps};
use thiserror::Error;

use super::vm::Vm;
use crate::pci::address::{Bdf, ParseBdfError, Slot};
use crate::pci::bus::{self, SharedDevice};
use crate::process::host::Host;
use crate::process::ipc::{FromVm, NetBackend, SoundBackend, ToVm, VmSpec};
use crate::process::vm::Subscriber;
use crate::supervisor::time::Time;
use crate::vfio::{self, DeviceFiles, Failure, Vfio, VfioPciDevice, VmResources};
use crate::virtio::block::{self, Block};
use crate::virtio::console::{self, Console};
use crate::virtio::device::{self, VirtioDevice};
use crate::virtio::net::{self, TapNet};
use crate::virtio::pci::{self, VirtioPci};
use crate::virtio::rng::{self, Rng};
use crate::virtio::sound::Sound;
use crate::virtio::split_net::SplitNet;
use crate::virtio::vhost_user_net::{self, VhostUserNet};

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
        /// Which.
        name: String,
        /// The cause.
        #[source]
        source: device::Error,
    },
    /// Its transport.
    #[error("make {name}")]
    Transport {
        /// Which.
        name: String,
        /// The cause.
        #[source]
        source: pci::Error,
    },
    /// A driver VM's link.
    #[error(transparent)]
    Link(#[from] vhost_user_net::Error),
    /// A TAP interface.
    #[error(transparent)]
    Tap(#[from] net::Error),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] block::Error),
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

/// Makes the devices of `spec` and puts them on the bus and into the event loop. `files` are those of the function to pass
/// through, if it is open already.
pub fn add(
    vm: &Vm,
    (spec, mut files): (&VmSpec, Vec<OwnedFd>),
    host: &Arc<Host>,
    events: &mut EventManager<Subscriber>,
) -> Result<Devices, Error> {
    let mut adder = Adder { vm, host, events, devices: Devices::default() };
    adder.devices.interrupt_limit = spec.interrupt_limit;
    for (index, net) in (0u16..).zip(&spec.nets) {
        adder.net(index, net)?;
    }
    for (index, sound) in (0u16..).zip(&spec.sounds) {
        adder.sound(index, sound)?;
    }
    if !spec.ports.is_empty() {
        adder.virtio("console", Arc::new(Mutex::new(Console::new(&spec.ports)?)))?;
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        adder.virtio(&format!("virtio-block{index}"), Arc::new(Mutex::new(Block::new(disk, index)?)))?;
    }
    adder.virtio("virtio-rng", Arc::new(Mutex::new(Rng::new()?)))?;
    if !spec.passthrough.is_empty() || spec.standby {
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
            NetBackend::Split { mac, mtu, neighbours, allow_any_source } => {
                let host = Arc::clone(self.host);
                let outbox = Arc::new(move |message| host.tell(&message));
                let mut net = SplitNet::new(index, *mac, *mtu, outbox).map_err(failed)?;
                net.share(neighbours, *allow_any_source);
                let net = Arc::new(Mutex::new(net));
                self.devices.split.push((index, Arc::clone(&net)));
                self.virtio(&name, net)
            }
            NetBackend::VhostUser { mac, mtu, fd } => {
                // SAFETY: the supervisor opened this descriptor for this device alone.
                let net = unsafe { VhostUserNet::from_inherited(*mac, *mtu, *fd) }?;
                self.virtio(&name, Arc::new(Mutex::new(net)))
            }
            NetBackend::Tap { interface, mac, mtu } => {
                let net = TapNet::new(interface, *mac, *mtu)?;
                self.virtio(&name, Arc::new(Mutex::new(net)))
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
        self.devices.sounds.push(Arc::clone(&sound));
        self.virtio(&name, sound)
    }

    /// Puts a virtio device on the bus and into the event loop.
    fn virtio<D: VirtioDevice + 'static>(&mut self, name: &str, device: Arc<Mutex<D>>) -> Result<(), Error> {
        let slot = free_slot(self.vm)?;
        let function = VirtioPci::new(name.into(), device.clone(), self.vm.memory.clone(), &self.vm.interrupts);
        let function = function.map_err(|source| Error::Transport { name: name.into(), source })?;
        self.events.add_subscriber(device);
        Ok(self.vm.bus.pci.add(slot, Arc::new(Mutex::new(function)))?)
    }
}

fn free_slot(vm: &Vm) -> Result<Slot, Error> {
    vm.bus.pci.free_slot().ok_or(Error::NoSlot)
}

fn new_vfio(vm: &Vm) -> Result<Arc<Vfio>, Error> {
    Ok(Vfio::new(VmResources {
        vm: Arc::clone(&vm.fd),
        memory: vm.memory.clone(),
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
    split: Vec<(u16, Arc<Mutex<SplitNet>>)>,
    sounds: Vec<Arc<Mutex<Sound>>>,
    /// In a VM that has, or will have, functions passed through.
    vfio: Option<Arc<Vfio>>,
    /// Those functions.
    functions: Vec<Arc<Mutex<VfioPciDevice>>>,
    /// The one whose files are to come.
    awaited: Option<Arc<Mutex<VfioPciDevice>>>,
    /// Interrupts a second that each of them may make; 0: any number.
    interrupt_limit: u32,
    /// What the event loop does not know yet.
    subscribers: Vec<Subscriber>,
}

impl Devices {
    /// Puts the host's function `function` on the bus, or behind what is there of it ahead; before the vCPUs run, or later.
    /// Without its `files` it is opened.
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
            self.interrupt_limit,
            Box::new(move |bdf: Bdf, failure: Failure| {
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

    /// A message of the supervisor that concerns a device.
    pub fn handle(&self, message: &ToVm, fds: Vec<OwnedFd>, host: &Host) {
        match *message {
            ToVm::AttachLink { net, generation } => {
                let Some(fd) = fds.into_iter().next() else {
                    tracing::error!(net, "a link without its socket");
                    return;
                };
                self.with(net, |net| net.attach_link(generation, UnixStream::from(fd)));
            }
            ToVm::GoLive { net, generation, replay, announce } => {
                self.with(net, |net| net.go_live(generation, replay, announce));
            }
            ToVm::Arm { net, generation, armed } => self.with(net, |net| net.arm(generation, armed)),
            ToVm::Mask { net, generation } => self.with(net, |net| net.mask(generation)),
            ToVm::Carrier { net, generation, up } => self.with(net, |net| net.carrier(generation, up)),
            ToVm::Quarantine { net } => self.with(net, SplitNet::quarantine),
            ToVm::QueryStatus => {
                for (_, net) in &self.split {
                    let status = lock(net).status();
                    host.tell(&status);
                }
                for sound in &self.sounds {
                    let status = lock(sound).status();
                    host.tell(&status);
                }
            }
            ToVm::AttachSound { sound, generation } => match fds.into_iter().next() {
                Some(fd) => self.with_sound(sound, |sound| sound.attach(generation, UnixStream::from(fd))),
                None => tracing::error!(sound, "a link without its socket"),
            },
            ToVm::MaskSound { sound, generation } => self.with_sound(sound, |sound| sound.mask(generation)),
            ToVm::QuarantineSound { sound } => self.with_sound(sound, Sound::quarantine),
            // These concern the whole VM.
            ToVm::Start(_) | ToVm::PowerButton | ToVm::Kill | ToVm::Release | ToVm::LockUp | ToVm::Plug { .. } => {}
        }
    }

    fn with(&self, index: u16, act: impl FnOnce(&mut SplitNet)) {
        match self.split.iter().find(|(number, _)| *number == index) {
            Some((_, net)) => act(&mut lock(net)),
            None => tracing::error!(index, "the supervisor names a network device that is none of a driver VM's"),
        }
    }
}

impl Devices {
    fn with_sound(&self, index: u16, act: impl FnOnce(&mut Sound)) {
        match self.sounds.get(usize::from(index)) {
            Some(sound) => act(&mut lock(sound)),
            None => tracing::error!(index, "the supervisor names a sound device that is none"),
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
