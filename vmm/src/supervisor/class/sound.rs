//! Sound: what is different from the network. A guest with sound is started when its card is known, and its device
//! goes live by itself, as soon as the sound service has reported its card to it.

use umbra_driver_vm::protocol::ToAgent;
use umbra_driver_vm::sound_protocol::SOUND_PORT;
use umbra_shadow::sound::Card;
use umbra_shadow::{Class, DeviceId, Generation};

use super::{OfClass, Traits};
use crate::base::time::Time;
use crate::config;
use crate::lifecycle::NoticedBy;
use crate::record::events::Event;
use crate::record::status;
use crate::record::timeline::LifeStage;
use crate::supervisor::driver::{DriverVm, Life};
use crate::supervisor::guest::GuestVm;
use crate::supervisor::ids::{DriverId, GuestId};
use crate::supervisor::run::Supervisor;
use crate::wire::messages::{DeviceStatus, PortBackend, PortEnd, SoundBackend, SoundCounts};

pub(super) const TRAITS: Traits = Traits {
    // Its session with the sound service.
    begins_with_device: true,
    greets: true,
    has_carrier: false,
    // A card plays the same buffer over and over when nobody fills it any more.
    runs_on: true,
    rests: false,
    starts_over: true,
    noun: "sound card",
    cmdline: "",
};

/// What a guest's sound device alone has.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct GuestSound {
    /// The card as its first driver VM reported it; the guest's for its life.
    pub(super) card: Option<Card>,
}

impl GuestSound {
    /// `None` until the card is known.
    pub(super) fn backend(&self, spec: &config::Sound) -> Option<SoundBackend> {
        Some(SoundBackend { card: self.card.clone()?, policy: spec.policy })
    }

    pub(super) fn status(
        &self,
        index: usize,
        driver: Option<String>,
        said: Option<&DeviceStatus>,
    ) -> status::SoundStatus {
        let (mode, kept_bytes, sums) = match said {
            Some(DeviceStatus::Sound { mode, kept_bytes, sums }) => ((*mode).into(), *kept_bytes, *sums),
            _ => (status::DeviceMode::Unknown, 0, SoundCounts::default()),
        };
        let card = self.card.as_ref().map(|card| card.name.clone());
        status::SoundStatus { index, driver, card, mode, kept_bytes, sums }
    }
}

/// The driver VM's end `n`: a port, over which its sound service talks.
pub(super) fn end_backend(n: usize) -> PortBackend {
    PortBackend { name: format!("{SOUND_PORT}.{n}"), end: PortEnd::Attached }
}

pub(super) fn plan(driver: &DriverVm, life: &Life) -> ToAgent {
    let ends = u16::try_from(driver.ends.len()).unwrap_or(u16::MAX);
    ToAgent::ConfigureSound { ends, device: life.purpose.device() }
}

impl GuestVm {
    fn sound_mut(&mut self, device: DeviceId) -> Option<&mut GuestSound> {
        match &mut self.devices.get_mut(&device)?.of {
            OfClass::Sound(sound) => Some(sound),
            OfClass::Net(_) | OfClass::Block(_) => None,
        }
    }
}

impl Supervisor {
    /// The agent of driver VM `n` says that its card is ready.
    pub(in crate::supervisor) fn on_sound_card(&mut self, n: DriverId, kernel_driver: String, card: &Card) {
        let now = Time::now();
        if !card.is_sane() || self.drivers[n].class() != Class::Sound {
            return self.fail_driver(n, NoticedBy::Agent, "it reports a sound card that cannot be", now);
        }
        let detail = format!("{kernel_driver} {}", card.name.chars().filter(|c| !c.is_control()).collect::<String>());
        self.drivers[n].kernel_driver = Some(kernel_driver);
        self.stage(n, LifeStage::Sound, now, detail);
        for end in self.drivers[n].ends.rows() {
            if let Some(sound) = self.guests[end.guest].sound_mut(end.device) {
                // The first card is the guest's for its life; later ones are compared with it by its splitter.
                sound.card.get_or_insert_with(|| card.clone());
            }
        }
        self.serves_without_carrier(n);
    }

    pub(super) fn on_sound_live(
        &mut self,
        (guest, device): (GuestId, DeviceId),
        generation: Generation,
        masked: SoundCounts,
    ) {
        let Some((d, end)) = self.serving((guest, device), generation) else { return };
        tracing::debug!(driver = self.drivers[d].name, %device, ?masked, "sound live");
        let told = self.guests[guest].devices.get(&device).is_some_and(|device| device.is_live_with(generation));
        // Once: a guest's process could repeat it without end.
        if !told && masked != SoundCounts::default() {
            self.events.tell(&Event::SoundLive {
                guest: self.guests[guest].name.clone(),
                device,
                driver: self.drivers[d].name.clone(),
                generation: generation.get(),
                samples: masked,
            });
        }
        self.went_live(d, end, generation);
    }
}
