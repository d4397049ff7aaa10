//! What the supervisor does differently for each device class.
//!
//! The one place of the supervisor that matches on [`Class`] and on what goes with it. A class that is added to
//! `umbra_shadow::Class` makes the compiler lead to each match here; what the class does goes into a file of its name beside
//! `net.rs` and `sound.rs`. Everything else in the supervisor knows devices, ends and lives, and no class.

pub(in crate::supervisor) mod block;
pub(in crate::supervisor) mod carrier;
pub(in crate::supervisor) mod net;
pub(in crate::supervisor) mod settings;
pub(in crate::supervisor) mod sound;

use std::collections::{BTreeMap, BTreeSet};

use umbra_driver_vm::protocol::ToAgent;
use umbra_shadow::{Class, DeviceId, Generation};

use self::block::GuestBlock;
use self::net::GuestNet;
use self::settings::Setting;
use self::sound::GuestSound;
use super::driver::{DriverVm, EndRef, Life};
use super::guest::GuestState;
use super::ids::{DriverId, GuestId, Table};
use super::run::Supervisor;
use crate::base::time::Time;
use crate::config::{Guest, Machine};
use crate::lifecycle::{Carrier, Endpoint, Input};
use crate::record::status;
use crate::record::timeline::LifeStage;
use crate::wire::messages::{DeviceStatus, DiskBackend, NetBackend, OutageCounts, PortBackend, Replay, SoundBackend};

/// What holds for all devices of a class.
#[derive(Debug)]
pub(in crate::supervisor) struct Traits {
    /// A connection with a life begins with the life's device; one that waits for its device is not connected.
    pub(in crate::supervisor) begins_with_device: bool,
    /// A device that is connected with a life that serves goes live by itself within moments, unless something hangs.
    pub(in crate::supervisor) greets: bool,
    /// It has a link that can be down.
    pub(in crate::supervisor) has_carrier: bool,
    /// The host's device goes on with what it has when nobody feeds it any more, and has to be stopped.
    pub(in crate::supervisor) runs_on: bool,
    /// What a guest has had acknowledged may be lost by a reset of the host's device: it comes to rest before a deliberate one.
    pub(in crate::supervisor) rests: bool,
    /// A device whose replay has killed lives in a row starts over, with a loss that its guest sees. Else its shadow finds the request that
    /// kills by itself.
    pub(in crate::supervisor) starts_over: bool,
    /// What a driver VM holds, for people.
    pub(in crate::supervisor) noun: &'static str,
    /// Added to the kernel command line of a driver VM, with a space before it.
    pub(in crate::supervisor) cmdline: &'static str,
}

pub(in crate::supervisor) fn traits(class: Class) -> &'static Traits {
    match class {
        Class::Net => &net::TRAITS,
        Class::Sound => &sound::TRAITS,
        Class::Block => &block::TRAITS,
    }
}

/// The devices of a guest.
pub(in crate::supervisor) type Devices = BTreeMap<DeviceId, GuestDevice>;

/// A device of a guest.
#[derive(Debug)]
pub(in crate::supervisor) struct GuestDevice {
    /// The driver VM that serves it, and as which of its ends.
    pub(in crate::supervisor) driver: Option<(DriverId, Endpoint)>,
    /// The last answer to `QueryStatus`.
    pub(in crate::supervisor) status: Option<DeviceStatus>,
    /// Whether that answers the last question.
    pub(in crate::supervisor) fresh: bool,
    /// The generation that it is live with by itself, or was last, where it goes live by itself.
    live: Option<Generation>,
    /// The newest life around whose loss its pace was told.
    paced: Option<Generation>,
    /// It has been live by itself with a life of its driver VM since the guest's process was started.
    was_live: bool,
    /// Since when it is to come to rest, if it was asked to and has not answered.
    pub(in crate::supervisor) resting: Option<Time>,
    /// What a device of its class alone has.
    of: OfClass,
}

#[derive(Debug)]
enum OfClass {
    Net(GuestNet),
    Sound(GuestSound),
    Block(GuestBlock),
}

impl GuestDevice {
    fn new(of: OfClass) -> Self {
        Self { driver: None, status: None, fresh: false, live: None, paced: None, was_live: false, resting: None, of }
    }

    /// Whether its pace around the loss of `generation`, or of what that life lost it by, was not told yet; it is told now.
    pub(in crate::supervisor) fn has_pace_of(&mut self, generation: Generation) -> bool {
        let news = self.paced.is_none_or(|paced| paced < generation);
        self.paced = self.paced.max(Some(generation));
        news
    }

    /// The guest's process is gone: what that had asked for and said does not count any more.
    pub(in crate::supervisor) fn forget(&mut self) {
        (self.status, self.fresh, self.live, self.resting) = (None, false, None, None);
        (self.was_live, self.paced) = (false, None);
        match &mut self.of {
            OfClass::Net(net) => net.forget(),
            OfClass::Sound(_) | OfClass::Block(_) => {}
        }
    }

    /// Whether it is live by itself with a driver VM.
    pub(in crate::supervisor) fn is_live(&self) -> bool {
        self.live.is_some()
    }

    /// Whether its driver VM is away, which it had before.
    pub(in crate::supervisor) fn is_left(&self) -> bool {
        self.was_live && self.live.is_none()
    }

    /// It is not live with a driver VM any more.
    pub(in crate::supervisor) fn forget_live(&mut self) {
        (self.live, self.paced) = (None, None);
    }

    /// Whether it is live by itself with `generation`.
    fn is_live_with(&self, generation: Generation) -> bool {
        self.live == Some(generation)
    }

    /// Whether all is known that a guest sees of it from its first moment on.
    pub(in crate::supervisor) fn is_known(&self) -> bool {
        match &self.of {
            OfClass::Net(_) => true,
            OfClass::Sound(sound) => sound.card.is_some(),
            OfClass::Block(block) => block.disk.is_some(),
        }
    }
}

/// The devices of guest `name` that driver VMs serve, or could; by whom is not known yet.
pub(in crate::supervisor) fn devices(machine: &Machine, name: &str, guest: &Guest) -> Devices {
    let nets = (0..).zip(&guest.net).map(|(n, spec)| {
        let index = usize::from(n);
        let driver = spec.driver.as_deref().and_then(|driver| machine.driver.get(driver));
        let net = GuestNet::new(spec.mac_or_default(name, index), machine.neighbours_of(name, index), driver);
        (DeviceId::net(n), OfClass::Net(net))
    });
    let sounds = (0..).zip(&guest.sound).map(|(n, _)| (DeviceId::sound(n), OfClass::Sound(GuestSound::default())));
    let blocks = (0..).zip(&guest.disk).filter_map(|(n, spec)| {
        let driver = machine.driver.get(spec.driver.as_deref()?)?;
        Some((DeviceId::block(n), OfClass::Block(GuestBlock::new(spec.clone(), driver.memory_or_default()))))
    });
    nets.chain(sounds).chain(blocks).map(|(device, of)| (device, GuestDevice::new(of))).collect()
}

/// The guests' devices that driver VM `driver` serves, in the order of its ends; all are of one class.
pub(in crate::supervisor) fn ends<'a>(
    machine: &'a Machine,
    driver: &'a str,
) -> impl Iterator<Item = (&'a str, DeviceId)> {
    let nets = machine.ends_of(driver).map(|(guest, n, _)| (guest, n, DeviceId::net as fn(u16) -> DeviceId));
    let sounds = machine.sounds_of(driver).map(|(guest, n, _)| (guest, n, DeviceId::sound as fn(u16) -> DeviceId));
    let disks = machine.disks_of(driver).map(|(guest, n, _)| (guest, n, DeviceId::block as fn(u16) -> DeviceId));
    nets.chain(sounds).chain(disks).filter_map(|(guest, n, device)| Some((guest, device(u16::try_from(n).ok()?))))
}

/// What a guest's process is to make of its devices.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct Backends {
    pub(in crate::supervisor) nets: Vec<NetBackend>,
    pub(in crate::supervisor) sounds: Vec<SoundBackend>,
    /// All disks of the guest, in the order of its file.
    pub(in crate::supervisor) disks: Vec<DiskBackend>,
}

pub(in crate::supervisor) fn backends(guest: &Guest, devices: &Devices) -> Backends {
    let (mut nets, mut sounds) = (Vec::new(), Vec::new());
    for (id, device) in devices {
        let index = usize::from(id.index);
        match &device.of {
            OfClass::Net(net) => nets.extend(guest.net.get(index).map(|spec| net.backend(spec))),
            OfClass::Sound(sound) => sounds.extend(guest.sound.get(index).and_then(|spec| sound.backend(spec))),
            // Among the disks on files, in their order.
            OfClass::Block(_) => {}
        }
    }
    let disks = (0..).zip(&guest.disk).filter_map(|(n, spec)| match devices.get(&DeviceId::block(n)) {
        Some(GuestDevice { of: OfClass::Block(block), .. }) => block.backend(),
        _ => spec.file().map(DiskBackend::File),
    });
    Backends { disks: disks.collect(), nets, sounds }
}

/// What a driver VM's process is to make of `ends`.
pub(in crate::supervisor) fn end_backends(
    ends: &Table<Endpoint, EndRef>,
    mtu: u16,
) -> (Vec<NetBackend>, Vec<PortBackend>) {
    let (mut nets, mut ports) = (Vec::new(), Vec::new());
    for (end, EndRef { device, .. }) in ends.numbered() {
        match device.class {
            Class::Net => nets.push(net::end_backend(end.place(), mtu)),
            Class::Sound => ports.push(sound::end_backend(end.place())),
            Class::Block => ports.push(block::end_backend(end.place())),
        }
    }
    (nets, ports)
}

/// How a guest's devices are, for `umbra status`.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct Statuses {
    pub(in crate::supervisor) nets: Vec<status::NetStatus>,
    pub(in crate::supervisor) sounds: Vec<status::SoundStatus>,
    pub(in crate::supervisor) disks: Vec<status::BlockStatus>,
}

pub(in crate::supervisor) fn status(
    guest: &Guest,
    devices: &Devices,
    driver_name: impl Fn(DriverId) -> String,
) -> Statuses {
    let Statuses { mut nets, mut sounds, mut disks } = Statuses::default();
    for (id, device) in devices {
        let index = usize::from(id.index);
        let driver = device.driver.map(|(driver, _)| driver_name(driver));
        match &device.of {
            OfClass::Net(net) => {
                let tap = guest.net.get(index).and_then(|spec| spec.tap.clone());
                nets.push(net.status(index, driver, tap, device.status.as_ref()));
            }
            OfClass::Sound(sound) => sounds.push(sound.status(index, driver, device.status.as_ref())),
            OfClass::Block(block) => disks.push(block.status(index, driver, device.status.as_ref())),
        }
    }
    Statuses { nets, sounds, disks }
}

/// What a driver VM with these ends serves. They are those of one device; without any it would be a NIC's.
pub(in crate::supervisor) fn class_of(ends: &Table<Endpoint, EndRef>) -> Class {
    ends.iter().next().map_or(Class::Net, |end| end.device.class)
}

impl DriverVm {
    /// What it serves.
    pub(in crate::supervisor) fn class(&self) -> Class {
        class_of(&self.ends)
    }
}

impl Supervisor {
    /// What is sent to the agent of `life` to serve, and what has to follow because the message would be too long with it.
    fn plan(&self, driver: &DriverVm, life: &Life) -> (ToAgent, BTreeSet<(u16, Setting)>) {
        match driver.class() {
            Class::Net => settings::plan_messages(settings::net_plan(&self.guests, driver, life)),
            Class::Sound => (sound::plan(driver, life), BTreeSet::new()),
            Class::Block => (block::plan(&self.guests, driver, life), BTreeSet::new()),
        }
    }

    /// The life of driver VM `n` is ready: the guest's device at `end` goes live with it.
    pub(in crate::supervisor) fn go_live_at(&mut self, n: DriverId, end: Endpoint, replay: Replay) {
        let device = self.drivers[n].ends[end].device;
        let Some(generation) = self.drivers[n].lifecycle.generation() else { return };
        match device.class {
            Class::Net => self.net_goes_live(n, end, (generation, replay)),
            Class::Sound | Class::Block => self.is_live_by_itself(n, end, generation),
        }
    }

    /// The device at `end` goes live by itself, and may have done so already.
    fn is_live_by_itself(&mut self, n: DriverId, end: Endpoint, generation: Generation) {
        let EndRef { guest, device } = self.drivers[n].ends[end];
        if self.guests[guest].devices.get(&device).is_some_and(|device| device.live == Some(generation)) {
            self.drive(n, Input::EndLive(end));
        }
    }

    /// What the first word of driver VM `n` about its device makes known is told to the guests that wait for that.
    fn start_those_who_waited(&mut self, n: DriverId) {
        for EndRef { guest, .. } in self.drivers[n].ends.rows() {
            let waits = &self.guests[guest];
            if waits.knows_its_devices() && waits.process.is_none() && waits.state == GuestState::Starting {
                self.start_guest_process(guest);
            }
        }
    }

    /// The life of driver VM `n` serves, and its device has no link that could be down.
    fn serves_without_carrier(&mut self, n: DriverId) {
        self.stage(n, LifeStage::Forwarding, Time::now(), String::new());
        self.start_those_who_waited(n);
        self.drive(n, Input::Forwarding);
        self.drive(n, Input::Carrier(Carrier::Up));
    }

    /// The driver VM of `device`, if its present life is `generation`.
    fn serving(&self, (guest, device): (GuestId, DeviceId), generation: Generation) -> Option<(DriverId, Endpoint)> {
        self.served(guest, device).filter(|(d, _)| self.drivers[*d].is_current(generation))
    }

    /// The device at `end` has gone live by itself with `generation`, the present life.
    fn went_live(&mut self, n: DriverId, end: Endpoint, generation: Generation) {
        let EndRef { guest, device } = self.drivers[n].ends[end];
        if let Some(device) = self.guests[guest].devices.get_mut(&device) {
            (device.live, device.was_live) = (Some(generation), true);
        }
        self.has_greeted(n, end);
        // Before the agent's word has come, this waits for it (`Action::GoLive`).
        self.drive(n, Input::EndLive(end));
    }

    /// A guest's device is live since `at`, with what was masked until then.
    pub(in crate::supervisor) fn on_device_live(
        &mut self,
        device: (GuestId, DeviceId),
        generation: Generation,
        at: Time,
        masked: OutageCounts,
    ) {
        match masked {
            OutageCounts::Net(frames) => self.on_net_live(device, generation, at, frames),
            OutageCounts::Sound(samples) => self.on_sound_live(device, generation, samples),
            OutageCounts::Block(counts) => self.on_block_live(device, generation, counts),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::MemorySize;

    #[test]
    fn a_guest_is_told_how_much_memory_its_driver_vm_has() {
        let text = "[guest.web]\nkernel = \"k\"\nnet = [{ driver = \"nic0\" }]\n\
                    [driver.nic0]\ndevice = \"0000:03:00.0\"\nimage = \"i\"\nmemory = \"192M\"\n";
        let machine = Machine::parse(text, Path::new("m.toml")).unwrap();
        let guest = &machine.guest["web"];
        let Backends { nets, .. } = backends(guest, &devices(&machine, "web", guest));
        assert!(
            matches!(nets[..], [NetBackend::Split { driver_memory: MemorySize(bytes), .. }] if bytes == 192 << 20),
            "{nets:?}"
        );
    }
}
