//! Sound: what is different from the network. A guest with sound is started when its card is known, and its device
//! goes live by itself, as soon as the sound service has reported its card to it.

use umbra_shadow::sound::Card;
use umbra_shadow::{DeviceId, Generation};

use crate::base::time::Time;
use crate::lifecycle::{Carrier, Input, NoticedBy};
use crate::record::events::Event;
use crate::record::timeline::LifeStage;
use crate::supervisor::guest::GuestState;
use crate::supervisor::ids::{DriverId, GuestId};
use crate::supervisor::run::Supervisor;
use crate::wire::messages::SoundCounts;

impl Supervisor {
    /// The agent of driver VM `n` says that its card is ready.
    pub(in crate::supervisor) fn on_sound_card(&mut self, n: DriverId, kernel_driver: String, card: &Card) {
        let now = Time::now();
        if !card.is_sane() || !self.drivers[n].is_sound() {
            return self.fail_driver(n, NoticedBy::Agent, "it reports a sound card that cannot be".into(), now);
        }
        let detail = format!("{kernel_driver} {}", card.name.chars().filter(|c| !c.is_control()).collect::<String>());
        self.drivers[n].kernel_driver = Some(kernel_driver);
        self.stage(n, LifeStage::Sound, now, detail);
        self.stage(n, LifeStage::Forwarding, now, String::new());
        for end in self.drivers[n].ends.clone() {
            let guest = &mut self.guests[end.guest];
            let Some(sound) = guest.sound_mut(end.device) else { continue };
            // The first card is the guest's for its life; later ones are compared with it by its splitter.
            sound.card.get_or_insert_with(|| card.clone());
            if guest.has_cards() && guest.process.is_none() && guest.state == GuestState::Starting {
                self.start_guest_process(end.guest);
            }
        }
        self.drive(n, Input::Forwarding);
        // A sound card has no link that could be down.
        self.drive(n, Input::Carrier(Carrier::Up));
    }

    /// A guest's sound device is live.
    pub(in crate::supervisor) fn on_sound_live(
        &mut self,
        (guest, device): (GuestId, DeviceId),
        generation: Generation,
        masked: SoundCounts,
    ) {
        let Some((d, end)) = self.served(guest, device) else { return };
        if !self.drivers[d].is_current(generation) {
            return;
        }
        tracing::debug!(driver = self.drivers[d].name, end, ?masked, "sound live");
        if masked != SoundCounts::default() {
            self.events.tell(&Event::SoundLive {
                guest: self.guests[guest].name.clone(),
                device,
                driver: self.drivers[d].name.clone(),
                generation: generation.get(),
                samples: masked,
            });
        }
        if let Some(sound) = self.guests[guest].sound_mut(device) {
            sound.live = Some(generation);
        }
        self.has_greeted(d, end);
        // Before the agent's word has come, this waits for it (`Action::GoLive`).
        self.drive(d, Input::EndLive(end));
    }
}
