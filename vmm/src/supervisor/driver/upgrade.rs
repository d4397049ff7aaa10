//! `umbra restart`: the next driver VM, perhaps of another image, is booted beside the serving one and takes over masked.
//!
//! Invariants: a restart that does not come about changes nothing, and one that takes over and fails while it is on trial
//! gives way to the image of before by itself. Whatever waits to take over is of an image that is trusted: while one is on
//! trial, standby and spare are of the image before it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use umbra_guest_images::image::Image;
use umbra_shadow::Generation;

use crate::base::error::chain;
use crate::base::time::{Time, milliseconds};
use crate::config;
use crate::lifecycle::{Input, Standby, State};
use crate::record::events::Event;
use crate::supervisor::driver::DriverVm;
use crate::supervisor::driver::life::{LifeRole, RANKS};
use crate::supervisor::front::protocol::Response;
use crate::supervisor::ids::DriverId;
use crate::supervisor::run::Supervisor;

/// Time for which a new image has to serve before it is kept. Most drivers that cannot work with their device fail when they probe
/// or at the first traffic.
const TRIAL: Duration = Duration::from_secs(30);

/// A restart under way, or on trial.
#[derive(Debug)]
pub(in crate::supervisor) struct Trial {
    /// The generation that is to be replaced; `None` if there was none yet.
    from: Option<Generation>,
    /// The image of before, where another one is tried.
    before: Option<Arc<Image>>,
    /// Who waits for the outcome.
    client: Option<u64>,
    /// Why the new life has left no snapshot, where one was to be made.
    not_saved: Option<String>,
    /// When it took over.
    live: Option<Time>,
    /// The trial that was under way when this restart began. It goes on if the restart does not come about.
    earlier: Option<Box<Trial>>,
}

impl Trial {
    /// Whether a failure at `now` is still the new one's.
    fn is_on(&self, now: Time) -> bool {
        self.live.is_none_or(|since| now.since(since) < TRIAL)
    }
}

impl Supervisor {
    /// Begins to restart driver VM `n` for `client`; with another image, when that has been looked at.
    pub(in crate::supervisor) fn restart(
        &mut self,
        n: DriverId,
        image: Option<PathBuf>,
        client: u64,
    ) -> Result<(), String> {
        let Some(image) = image else { return self.restart_with(n, None, client) };
        self.drivers[n].may_restart()?;
        let begun = self.aside("image", move || {
            let image = Image::open(&image).map_err(|error| chain(&error));
            Box::new(move |supervisor: &mut Supervisor| {
                let begun = image.and_then(|image| supervisor.restart_with(n, Some(image), client));
                if let Err(what) = begun {
                    supervisor.clients.answer(client, &Response::Error { what });
                }
            })
        });
        begun.map_err(|error| format!("the image cannot be looked at: {error}"))
    }

    fn restart_with(&mut self, n: DriverId, image: Option<Image>, client: u64) -> Result<(), String> {
        let driver = &mut self.drivers[n];
        driver.may_restart()?;
        let earlier = driver.trial.take().filter(|trial| trial.is_on(Time::now()));
        let other = image.is_some();
        let replaced = image.map(|image| std::mem::replace(&mut driver.image, Arc::new(image)));
        // An image that is on trial itself has one before it, which is the one that is known to work.
        let before = earlier.as_ref().and_then(|trial| trial.before.clone()).or(replaced);
        let from = driver.lifecycle.generation();
        let (client, earlier) = (Some(client), earlier.map(Box::new));
        driver.trial = Some(Trial { from, before, client, not_saved: None, live: None, earlier });
        let fresh = other || !driver.standby_is_of(&driver.image);
        self.drive(n, Input::Restart { fresh });
        Ok(())
    }

    /// Tries driver VM `n`, which is quarantined, again for `client`.
    pub(in crate::supervisor) fn resume(&mut self, n: DriverId, client: u64) -> Result<(), String> {
        let driver = &mut self.drivers[n];
        let state = driver.lifecycle.state();
        if *state != State::Quarantined {
            return Err(format!("{} is not quarantined: it is {}", driver.name, state.name()));
        }
        if self.sleep.is_some() {
            return Err(format!(
                "{} is not resumed while the host is to sleep, because that would open its device; `umbra wake`, then try again",
                driver.name
            ));
        }
        if let Some(life) = driver.life.as_ref().filter(|_| driver.lifecycle.process_hangs()) {
            return Err(format!(
                "{}: its killed process ({}) still hangs in the kernel and holds {}; `dmesg` may say where",
                driver.name,
                life.process.pid(),
                driver.device.bdf()
            ));
        }
        if driver.reset_due.is_some() {
            return Err(format!(
                "{}: the reset of {} cannot be begun; the events say why",
                driver.name, driver.spec.device
            ));
        }
        if driver.resetting.is_some() {
            return Err(format!("{}: the reset of {} still hangs in the kernel", driver.name, driver.spec.device));
        }
        driver.trial = Some(Trial {
            from: driver.lifecycle.generation(),
            before: None,
            client: Some(client),
            not_saved: None,
            live: None,
            earlier: None,
        });
        self.events.tell(&Event::Resumed { driver: driver.name.clone() });
        self.drive(n, Input::Resume);
        Ok(())
    }

    /// The next driver VM did not come up: the serving one goes on.
    pub(in crate::supervisor) fn restart_off(&mut self, n: DriverId, why: &str) {
        let what = format!("the new driver VM did not come up: {why}");
        let driver = &mut self.drivers[n];
        let serving = driver.life.as_ref().map(|life| Arc::clone(&life.image));
        let Some(trial) = driver.trial.as_mut() else { return };
        let earlier = trial.earlier.take();
        if let Some(image) = serving {
            // The serving driver VM goes on, even if it is on trial itself.
            trial.before = Some(image).filter(|image| !Arc::ptr_eq(image, &driver.image));
        }
        self.fall_back(n, &what);
        self.drivers[n].trial = earlier.map(|trial| *trial);
        self.renew_standby(n);
    }

    /// The present life of driver VM `n` has failed: was it on trial?
    pub(in crate::supervisor) fn judge_trial(&mut self, n: DriverId) {
        let driver = &mut self.drivers[n];
        let Some(trial) = &driver.trial else { return };
        if driver.present == trial.from {
            return;
        }
        if !trial.is_on(Time::now()) {
            driver.trial = None;
            return;
        }
        let why = driver.reason.clone().unwrap_or_default();
        self.fall_back(n, &format!("the new driver VM failed: {why}"));
        self.renew_standby(n);
    }

    /// An image that has served for as long as its trial is kept: the next standby is of it as well.
    pub(in crate::supervisor) fn end_trial(&mut self, n: DriverId, now: Time) {
        let driver = &mut self.drivers[n];
        if driver.trial.as_ref().is_some_and(|trial| !trial.is_on(now)) {
            driver.trial = None;
            self.renew_standby(n);
        }
    }

    /// A standby of another image than the next one would be of is of no use.
    fn renew_standby(&mut self, n: DriverId) {
        let driver = &self.drivers[n];
        if !driver.standby_is_of(driver.next_image()) {
            self.drive(n, Input::StandbyUseless);
        }
    }

    /// Driver VM `n` serves again.
    pub(in crate::supervisor) fn restarted(&mut self, n: DriverId, now: Time) {
        let driver = &mut self.drivers[n];
        let generation = driver.lifecycle.generation();
        let Some(trial) = driver.trial.as_mut().filter(|trial| trial.from != generation) else { return };
        trial.live.get_or_insert(now);
        if let Some(client) = trial.client.take() {
            let response = Response::Restarted {
                name: driver.name.clone(),
                generation: generation.map_or(0, Generation::get),
                outage_ms: driver.timeline.outage().map(milliseconds),
                no_snapshot: trial.not_saved.take(),
            };
            self.clients.answer(client, &response);
        }
    }

    /// Goes back to the image of before, if another one was tried, and answers the client that waits for the outcome.
    pub(in crate::supervisor) fn fall_back(&mut self, n: DriverId, why: &str) {
        let driver = &mut self.drivers[n];
        let Some(Trial { before, client, .. }) = driver.trial.take() else { return };
        let changed = before.is_some();
        if let Some(image) = before {
            driver.image = image;
        }
        let next = if changed { "it goes on with the image of before" } else { "`umbra status` says how it goes on" };
        let name = driver.name.clone();
        if changed || client.is_some() {
            self.events.tell(&Event::RestartFailed { driver: name.clone(), reason: format!("{why}; {next}") });
        }
        if let Some(client) = client {
            let what = format!("{name}: {why}; {next}");
            self.clients.answer(client, &Response::Error { what });
        }
    }
}

impl DriverVm {
    /// # Errors
    /// It cannot be restarted now; why, for people.
    fn may_restart(&self) -> Result<(), String> {
        let state = self.lifecycle.state();
        if !matches!(state, State::Live { .. }) {
            return Err(format!("{} cannot be restarted now: it is {}", self.name, state.name()));
        }
        if self.trial.as_ref().is_some_and(|trial| trial.live.is_none()) {
            return Err(format!("{} is being restarted already", self.name));
        }
        Ok(())
    }

    /// The image of a standby that is started now: one that is on trial is not relied on.
    pub(super) fn next_image(&self) -> &Arc<Image> {
        let tried = self.trial.as_ref().filter(|trial| trial.from != self.present);
        tried.and_then(|trial| trial.before.as_ref()).unwrap_or(&self.image)
    }

    /// Whether a new image is on trial.
    pub(in crate::supervisor) fn tries_an_image(&self) -> bool {
        self.trial.as_ref().is_some_and(|trial| trial.before.is_some())
    }

    /// Whether what waits, or the snapshot, is of `image`, if there is any that is of use.
    fn standby_is_of(&self, image: &Arc<Image>) -> bool {
        let waiting: Vec<_> = RANKS
            .into_iter()
            .filter_map(|rank| self.life_of(LifeRole::Standby(rank)))
            .map(|life| &life.image)
            .collect();
        let saved = self.saved.as_ref().filter(|_| self.lifecycle.standby() == Standby::Saved);
        let saved = saved.filter(|_| waiting.is_empty());
        waiting.into_iter().chain(saved).all(|of| Arc::ptr_eq(of, image))
    }

    /// The life that is about to take over for a restart has left no snapshot, for the reason `why`: who asked for the restart hears of
    /// it, where the next failure costs a boot therefore.
    pub(super) fn restart_lacks_snapshot(&mut self, why: &str) {
        let needed = self.spec.standby == config::Standby::Snapshot;
        if let Some(trial) = self.trial.as_mut().filter(|trial| needed && trial.live.is_none()) {
            trial.not_saved = Some(why.into());
        }
    }
}
