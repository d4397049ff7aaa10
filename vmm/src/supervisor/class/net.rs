//! The network: what a guest's network device has asked for, and how it goes live.
//!
//! What is asked for is passed on by `settings.rs`; carriers are in `carrier.rs`.

use umbra_driver_vm::protocol::{Mac, Offloads, RxMode};
use umbra_shadow::{DeviceId, Generation};

use super::settings::Setting;
use super::{OfClass, Traits};
use crate::base::time::Time;
use crate::config::{Driver, MemorySize, Net};
use crate::lifecycle::{Endpoint, Input, State};
use crate::record::status;
use crate::supervisor::driver::EndRef;
use crate::supervisor::guest::GuestVm;
use crate::supervisor::ids::{DriverId, GuestId};
use crate::supervisor::run::Supervisor;
use crate::wire::messages::{DeviceStatus, MaskedCounts, NetBackend, NetWork, Replay, ToVm};

pub(super) const TRAITS: Traits = Traits {
    begins_with_device: false,
    greets: false,
    has_carrier: true,
    runs_on: false,
    rests: false,
    starts_over: true,
    noun: "NIC",
    // Frames that the splitter has taken are let go of when the next ones go out, without an interrupt for them: what receives here belongs
    // to no socket, which alone would wait for it. A kernel that has no such parameter any more says so in its log and does without.
    cmdline: " virtio_net.napi_tx=0",
};

/// What a guest's network device alone has.
#[derive(Debug)]
pub(in crate::supervisor) struct GuestNet {
    mac: Mac,
    /// The addresses of the other devices on the same NIC.
    neighbours: Vec<Mac>,
    /// Memory of its driver VM.
    driver_memory: MemorySize,
    /// Its NIC has a spare.
    has_spare: bool,
    /// What the guest's driver asked for last.
    pub(in crate::supervisor) mode: RxMode,
    pub(in crate::supervisor) offloads: Offloads,
}

impl GuestNet {
    pub(super) fn new(mac: Mac, neighbours: Vec<Mac>, driver: Option<&Driver>) -> Self {
        let driver_memory = driver.map(Driver::memory_or_default).unwrap_or_default();
        let has_spare = driver.is_some_and(|driver| driver.spare.is_some());
        Self { mac, neighbours, driver_memory, has_spare, mode: first_mode(mac), offloads: Offloads::default() }
    }

    pub(super) fn forget(&mut self) {
        (self.mode, self.offloads) = (first_mode(self.mac), Offloads::default());
    }

    pub(super) fn backend(&self, spec: &Net) -> NetBackend {
        let (mac, mtu) = (self.mac, spec.mtu_or_default());
        match &spec.tap {
            Some(interface) => NetBackend::Tap { interface: interface.clone(), mac, mtu },
            None => NetBackend::Split {
                mac,
                mtu,
                driver_memory: self.driver_memory,
                neighbours: self.neighbours.clone(),
                allow_any_source: spec.allow_any_source,
                has_spare: self.has_spare,
            },
        }
    }

    pub(super) fn status(
        &self,
        index: usize,
        driver: Option<String>,
        tap: Option<String>,
        said: Option<&DeviceStatus>,
    ) -> status::NetStatus {
        let mut status = status::NetStatus {
            index,
            mac: self.mac.to_string(),
            driver,
            mode: if tap.is_some() { status::DeviceMode::Tap } else { status::DeviceMode::Unknown },
            tap,
            frames_out: 0,
            frames_in: 0,
            foreign_source: 0,
            logged_now: 0,
            masked: MaskedCounts::default(),
            work: NetWork::default(),
        };
        if let Some(DeviceStatus::Net { mode, frames_out, frames_in, foreign_source, logged_now, masked, work }) = said
        {
            (status.foreign_source, status.work) = (*foreign_source, *work);
            status.mode = (*mode).into();
            (status.frames_out, status.frames_in) = (*frames_out, *frames_in);
            (status.logged_now, status.masked) = (*logged_now, *masked);
        }
        status
    }
}

/// What a guest asks for until its driver says otherwise: what a NIC receives after it was opened, and all multicast, because a
/// guest without the control queue never says.
fn first_mode(mac: Mac) -> RxMode {
    RxMode { all_multicast: true, unicast: vec![mac], ..RxMode::default() }
}

/// The driver VM's own network device of end `n`.
pub(super) fn end_backend(n: usize, mtu: u16) -> NetBackend {
    NetBackend::VhostUser { mac: end_mac(n), mtu }
}

/// The address of the driver VM's network device of end `n`, by which its agent finds the interface. Never on a wire.
pub(super) fn end_mac(n: usize) -> Mac {
    let [.., high, low] = n.to_be_bytes();
    Mac([0x02, 0x75, 0x6d, 0x62, high, low])
}

impl GuestVm {
    /// Its network device `device`.
    pub(in crate::supervisor) fn net(&self, device: DeviceId) -> Option<&GuestNet> {
        match &self.devices.get(&device)?.of {
            OfClass::Net(net) => Some(net),
            OfClass::Sound(_) | OfClass::Block(_) => None,
        }
    }

    fn net_mut(&mut self, device: DeviceId) -> Option<&mut GuestNet> {
        match &mut self.devices.get_mut(&device)?.of {
            OfClass::Net(net) => Some(net),
            OfClass::Sound(_) | OfClass::Block(_) => None,
        }
    }
}

impl Supervisor {
    pub(super) fn net_goes_live(&mut self, n: DriverId, end: Endpoint, (generation, replay): (Generation, Replay)) {
        let driver = &self.drivers[n];
        let EndRef { guest, device } = driver.ends[end];
        let announce = driver.has_moved(end);
        // First, so that the guest sees no link that comes and goes.
        self.tell_carrier(n, EndRef { guest, device }, generation);
        self.tell_guest(guest, &ToVm::GoLive { device, generation, replay, announce });
    }

    pub(super) fn on_net_live(
        &mut self,
        (guest, device): (GuestId, DeviceId),
        generation: Generation,
        at: Time,
        masked: MaskedCounts,
    ) {
        let Some((d, end)) = self.served(guest, device) else { return };
        let driver = &mut self.drivers[d];
        let by_itself = driver.is_spare(generation);
        if !by_itself && !driver.is_current(generation) {
            return;
        }
        let before = driver.live_at.filter(|(of, _)| *of == generation).map_or(at, |(_, before)| before);
        driver.live_at = Some((generation, before.max(at)));
        if !by_itself && matches!(driver.lifecycle.state(), State::Live { .. }) {
            // A guest that came late has an outage of its own, or none.
            driver.late_frames = masked;
        } else {
            driver.frames = driver.frames.plus(masked);
        }
        tracing::debug!(end = end.place(), at = at.0, by_itself, "end live");
        if !by_itself {
            self.note_live(d, end);
        }
        self.drive(d, if by_itself { Input::SpareLive(end) } else { Input::EndLive(end) });
    }

    /// A guest's driver wants to receive something else.
    pub(in crate::supervisor) fn on_rx_mode(&mut self, guest: GuestId, device: DeviceId, mode: RxMode) {
        if let Some(net) = self.guests[guest].net_mut(device) {
            net.mode = mode;
            self.pass_on(guest, device, Setting::Mode);
        }
    }

    /// A guest's driver leaves other work to the device than before.
    pub(in crate::supervisor) fn on_offloads(&mut self, guest: GuestId, device: DeviceId, offloads: Offloads) {
        if let Some(net) = self.guests[guest].net_mut(device) {
            net.offloads = offloads;
            self.pass_on(guest, device, Setting::Offloads);
        }
    }
}
