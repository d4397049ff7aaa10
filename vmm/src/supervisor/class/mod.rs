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

use self::net::GuestNet;
use self::settings::Setting;
use self::sound::GuestSound;
use super::driver::{DriverVm, EndRef, Life};
use super::ids::{DriverId, GuestId, Table};
use super::run::Supervisor;
use crate::base::time::Time;
use crate::config::{Guest, Machine};
use crate::lifecycle::Endpoint;
use crate::record::status;
use crate::wire::messages::{DeviceStatus, NetBackend, OutageCounts, PortBackend, Replay, SoundBackend};

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
    /// What a device of its class alone has.
    of: OfClass,
}

#[derive(Debug)]
enum OfClass {
    Net(GuestNet),
    Sound(GuestSound),
}

impl GuestDevice {
    fn new(of: OfClass) -> Self {
        Self { driver: None, status: None, fresh: false, of }
    }

    /// The guest's process is gone: what that had asked for and said does not count any more.
    pub(in crate::supervisor) fn forget(&mut self) {
        (self.status, self.fresh) = (None, false);
        match &mut self.of {
            OfClass::Net(net) => net.forget(),
            OfClass::Sound(sound) => sound.live = None,
        }
    }

    /// It is not live with a driver VM any more.
    pub(in crate::supervisor) fn forget_live(&mut self) {
        match &mut self.of {
            OfClass::Net(_) => {}
            OfClass::Sound(sound) => sound.live = None,
        }
    }

    /// Whether all is known that a guest sees of it from its first moment on.
    pub(in crate::supervisor) fn is_known(&self) -> bool {
        match &self.of {
            OfClass::Net(_) => true,
            OfClass::Sound(sound) => sound.card.is_some(),
        }
    }
}

/// The devices of guest `name` that driver VMs serve, or could; by whom is not known yet.
pub(in crate::supervisor) fn devices(machine: &Machine, name: &str, guest: &Guest) -> Devices {
    let nets = (0..).zip(&guest.net).map(|(n, spec)| {
        let index = usize::from(n);
        let driver = spec.driver.as_deref().and_then(|driver| machine.driver.get(driver));
        let memory = driver.map(|driver| driver.memory).unwrap_or_default();
        let net = GuestNet::new(spec.mac_or_default(name, index), machine.neighbours_of(name, index), memory);
        (DeviceId::net(n), OfClass::Net(net))
    });
    let sounds = (0..).zip(&guest.sound).map(|(n, _)| (DeviceId::sound(n), OfClass::Sound(GuestSound::default())));
    nets.chain(sounds).map(|(device, of)| (device, GuestDevice::new(of))).collect()
}

/// The guests' devices that driver VM `driver` serves, in the order of its ends; all are of one class.
pub(in crate::supervisor) fn ends<'a>(
    machine: &'a Machine,
    driver: &'a str,
) -> impl Iterator<Item = (&'a str, DeviceId)> {
    let nets = machine.ends_of(driver).map(|(guest, n, _)| (guest, n, DeviceId::net as fn(u16) -> DeviceId));
    let sounds = machine.sounds_of(driver).map(|(guest, n, _)| (guest, n, DeviceId::sound as fn(u16) -> DeviceId));
    nets.chain(sounds).filter_map(|(guest, n, device)| Some((guest, device(u16::try_from(n).ok()?))))
}

/// What a guest's process is to make of its devices.
pub(in crate::supervisor) fn backends(guest: &Guest, devices: &Devices) -> (Vec<NetBackend>, Vec<SoundBackend>) {
    let (mut nets, mut sounds) = (Vec::new(), Vec::new());
    for (id, device) in devices {
        let index = usize::from(id.index);
        match &device.of {
            OfClass::Net(net) => nets.extend(guest.net.get(index).map(|spec| net.backend(spec))),
            OfClass::Sound(sound) => sounds.extend(guest.sound.get(index).and_then(|spec| sound.backend(spec))),
        }
    }
    (nets, sounds)
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
pub(in crate::supervisor) fn status(
    guest: &Guest,
    devices: &Devices,
    driver_name: impl Fn(DriverId) -> String,
) -> (Vec<status::NetStatus>, Vec<status::SoundStatus>) {
    let (mut nets, mut sounds) = (Vec::new(), Vec::new());
    for (id, device) in devices {
        let index = usize::from(id.index);
        let driver = device.driver.map(|(driver, _)| driver_name(driver));
        match &device.of {
            OfClass::Net(net) => {
                let tap = guest.net.get(index).and_then(|spec| spec.tap.clone());
                nets.push(net.status(index, driver, tap, device.status.as_ref()));
            }
            OfClass::Sound(sound) => sounds.push(sound.status(index, driver, device.status.as_ref())),
        }
    }
    (nets, sounds)
}

impl DriverVm {
    /// What it serves. The ends of a driver VM are those of one device; without any it would be a NIC's.
    pub(in crate::supervisor) fn class(&self) -> Class {
        self.ends.iter().next().map_or(Class::Net, |end| end.device.class)
    }
}

impl Supervisor {
    /// What is sent to the agent of `life` to serve, and what has to follow because the message would be too long with it.
    fn plan(&self, driver: &DriverVm, life: &Life) -> (ToAgent, BTreeSet<(u16, Setting)>) {
        match driver.class() {
            Class::Net => settings::plan_messages(settings::net_plan(&self.guests, driver, life)),
            Class::Sound | Class::Block => (sound::plan(driver, life), BTreeSet::new()),
        }
    }

    /// The life of driver VM `n` is ready: the guest's device at `end` goes live with it.
    pub(in crate::supervisor) fn go_live_at(&mut self, n: DriverId, end: Endpoint, replay: Replay) {
        let device = self.drivers[n].ends[end].device;
        let Some(generation) = self.drivers[n].lifecycle.generation() else { return };
        match device.class {
            Class::Net => self.net_goes_live(n, end, (generation, replay)),
            Class::Sound | Class::Block => self.sound_goes_live(n, end, generation),
        }
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
            OutageCounts::Block(_) => {}
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
        let (nets, _) = backends(guest, &devices(&machine, "web", guest));
        assert!(
            matches!(nets[..], [NetBackend::Split { driver_memory: MemorySize(bytes), .. }] if bytes == 192 << 20),
            "{nets:?}"
        );
    }
}
