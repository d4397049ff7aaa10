//! The connections between guests' devices and the lives of a driver VM. Each end of a life is connected by itself, lost and
//! connected again, while the life goes on: it waits for no guest, and no guest costs it.
//!
//! ```text
//!             guest and life are there             lost, guest gone
//!   unconnected ------------------------> connected ----------------> unconnected, for a delay that doubles
//! ```
//! Invariants: both processes get the two ends of one socket pair under one [`LinkId`]; a word about another link than the
//! present one changes nothing; a guest's word alone costs a life that serves others nothing but that guest's end.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use umbra_shadow::{Class, DeviceId, Generation, LinkId};

use super::begin::Begin;
use super::{DriverVm, Life, Role};
use crate::base::time::Time;
use crate::lifecycle::{End, Failure, Input, Source, State};
use crate::record::crash_report::Mask;
use crate::record::events::Event;
use crate::record::timeline::Step;
use crate::supervisor::bounds::MAX_MASKS;
use crate::supervisor::class::settings::Which;
use crate::supervisor::run::Supervisor;
use crate::wire::messages::{Disconnect, LinkEnd, ToVm};

/// A guest's device that a driver VM serves.
#[derive(Clone, Copy, Debug)]
pub(in crate::supervisor) struct EndRef {
    /// Index of the guest.
    pub(in crate::supervisor) guest: usize,
    /// Which of its devices.
    pub(in crate::supervisor) device: DeviceId,
}

/// Delay before a lost connection is made again; doubled with each loss in a row up to [`DELAY_MAX`].
const DELAY: Duration = Duration::from_millis(100);
const DELAY_MAX: Duration = Duration::from_secs(5);

/// Losses in a row that have nothing to do with the guest's process being away, after which the end is given up until its guest
/// or its driver VM starts anew: what fails so often has a cause that another connection does not mend.
const MOST_LOSSES: u32 = 8;

/// A connection that lasted this long was a good one: the losses before it do not count any more.
const GOOD: Duration = Duration::from_secs(60);

/// Accusations by different guests' splitters within this time are about one and the same fault of the driver VM.
const SAME_FAULT: Duration = Duration::from_secs(10);

/// How long after the driver VM's side of a connection has ended the guest's word of it is waited for.
const ECHO: Duration = Duration::from_secs(5);

/// How long a sound service that serves other guests may take to greet a new session before the session is connected again: it
/// greets within milliseconds, unless it hangs at this guest's port.
const GREETING: Duration = Duration::from_secs(20);

/// How long after a full channel another attempt is made.
const FULL: Duration = Duration::from_millis(50);

/// The connection of one end with one life.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct EndLink {
    /// Connections so far.
    attempts: u32,
    /// The present one.
    link: Option<LinkId>,
    made: Option<Time>,
    /// Its end on the driver VM's side was the guest's fault: the guest's word of it is no accusation.
    excused: bool,
    /// When the next connection may be made, where that is not at once.
    due: Option<Time>,
    /// Losses in a row.
    losses: u32,
    /// When its guest accused the life last, and what it lost.
    accused: Option<(Time, Mask)>,
    /// No further connection with this life.
    given_up: bool,
}

impl EndLink {
    fn is_wanted(&self, now: Time) -> bool {
        !self.given_up && self.due.map_or(self.link.is_none(), |due| due <= now)
    }

    /// A session with a sound service has begun, and its greeting is awaited.
    fn await_greeting(&mut self, now: Time) {
        if self.link.is_some() {
            self.due = Some(now + GREETING);
        }
    }

    /// The guest's process is another one from here on.
    pub(in crate::supervisor) fn forget(&mut self) {
        *self = Self { attempts: self.attempts, ..Self::default() };
    }

    /// The connection is lost. Whether another may be made.
    fn lost(&mut self, now: Time) -> bool {
        if self.made.take().is_some_and(|made| now.since(made) >= GOOD) {
            self.losses = 0;
        }
        self.losses += 1;
        let delay = DELAY.saturating_mul(1 << (self.losses - 1).min(16)).min(DELAY_MAX);
        (self.link, self.excused, self.due) = (None, false, Some(now + delay));
        self.given_up = self.losses >= MOST_LOSSES;
        !self.given_up
    }
}

impl Life {
    fn link(&self, end: End) -> Option<LinkId> {
        self.links.get(end)?.link
    }

    pub(in crate::supervisor) fn connected(&self) -> usize {
        self.links.iter().filter(|end| end.link.is_some()).count()
    }

    /// Whether other guests than that of `end` accuse this life too.
    fn is_accused_by_another(&self, end: End, now: Time) -> bool {
        let others = self.links.iter().enumerate().filter(|(other, _)| *other != end);
        others.into_iter().any(|(_, link)| link.accused.as_ref().is_some_and(|(at, _)| now.since(*at) < SAME_FAULT))
    }
}

impl DriverVm {
    /// When an end is to be connected.
    pub(in crate::supervisor) fn connection_due(&self) -> Option<Time> {
        let lives = self.life.iter().chain(self.standby.iter().filter(|vm| !vm.dropped).map(|vm| &vm.life));
        lives.flat_map(|life| &life.links).filter(|end| !end.given_up).filter_map(|end| end.due).min()
    }

    /// The present life fails: what its guests have lost by now belongs to its outage.
    pub(in crate::supervisor) fn collect_masks(&mut self, now: Time) {
        let Some(life) = &mut self.life else { return };
        let lost = life.links.iter_mut().filter(|end| end.link.is_none()).filter_map(|end| end.accused.take());
        for (_, mask) in lost.filter(|(at, _)| now.since(*at) < SAME_FAULT) {
            self.masks.retain(|known| known.guest != mask.guest || known.device != mask.device);
            self.masks.push(mask);
        }
    }

    /// Whether it is noted already that `device` of this guest lost this life.
    fn has_mask(&self, generation: Generation, guest: &str, device: DeviceId) -> bool {
        let report = self.report.iter().filter(|report| report.generation == generation.get());
        let masks = report.flat_map(|report| &report.masks).chain(&self.masks);
        let device = device.to_string();
        masks.into_iter().any(|mask| mask.guest == guest && mask.device == device)
    }

    /// The guest of `end` has another process from here on, or none.
    pub(in crate::supervisor) fn forget_guest(&mut self, end: End) {
        let lives = self.life.iter_mut().chain(self.standby.iter_mut().map(|vm| &mut vm.life));
        lives.filter_map(|life| life.links.get_mut(end)).for_each(EndLink::forget);
    }
}

impl Supervisor {
    /// Connects what can be connected: each end of the lives of driver VM `n` whose guest is there.
    pub(in crate::supervisor) fn connect_ends(&mut self, n: usize) {
        for which in [Which::Present, Which::Standby] {
            for end in 0..self.drivers[n].ends.len() {
                self.connect(n, which, end);
            }
        }
    }

    /// Connects what guest `n` can be connected with.
    pub(in crate::supervisor) fn connect_guest(&mut self, n: usize) {
        for (driver, _) in self.guests[n].drivers() {
            self.connect_ends(driver);
        }
    }

    fn connect(&mut self, n: usize, which: Which, end: End) {
        let (driver, now) = (&mut self.drivers[n], Time::now());
        let EndRef { guest, device } = driver.ends[end];
        let guest = &mut self.guests[guest];
        // One that does not read what waits for it already would not read this either.
        if guest.process.is_none() || !guest.listening || !guest.unsent.is_empty() {
            return;
        }
        let armed = driver.lifecycle.is_armed();
        let Some(life) = driver.life_of_mut(which) else { return };
        // A session with a sound service begins with its card.
        let early = life.role == Role::Waits && which == Which::Standby && device.class == Class::Sound;
        if early || life.begin == Begin::Unmet || !life.links[end].is_wanted(now) {
            return;
        }
        let generation = life.generation;
        let link = LinkId { generation, attempt: life.links[end].attempts + 1 };
        let Some(theirs) = life.hand_out(end, link, now) else { return };
        let told = guest.tell(&ToVm::Attach { device, link }, Some(theirs));
        life.links[end] = EndLink {
            attempts: link.attempt,
            link: Some(link),
            made: Some(now),
            due: None,
            excused: false,
            ..std::mem::take(&mut life.links[end])
        };
        if which == Which::Present {
            self.await_greeting(n, end);
        }
        if let Err(error) = told {
            self.events.warn(format!("{}: {error}", self.guests[self.drivers[n].ends[end].guest].name));
        }
        match which {
            Which::Present => self.drive(n, Input::EndHere(end)),
            Which::Standby if armed => self.tell_armed_at(n, end, generation),
            Which::Standby => {}
        }
    }

    /// Where the life of driver VM `n` serves already, a sound device that is connected now is expected to be live soon.
    pub(in crate::supervisor) fn await_greeting(&mut self, n: usize, end: End) {
        let driver = &mut self.drivers[n];
        let serves = matches!(driver.lifecycle.state(), State::Live { .. });
        let is_sound = driver.ends[end].device.class == Class::Sound;
        if let Some(life) = driver.life.as_mut().filter(|_| serves && is_sound) {
            life.links[end].await_greeting(Time::now());
        }
    }

    /// The sound device at `end` of driver VM `n` is live.
    pub(in crate::supervisor) fn has_greeted(&mut self, n: usize, end: End) {
        if let Some(link) = self.drivers[n].life.as_mut().and_then(|life| life.links.get_mut(end)) {
            link.due = None;
        }
    }

    /// A guest's splitter says that it has lost `link`.
    pub(in crate::supervisor) fn on_lost(
        &mut self,
        (guest, device): (usize, DeviceId),
        link: LinkId,
        at: Time,
        cause: &LinkEnd,
    ) {
        let Some((d, end)) = self.served(guest, device) else { return };
        let driver = &self.drivers[d];
        let is_of = |life: &Life| life.link(end) == Some(link);
        if driver.life.as_ref().is_some_and(is_of) {
            self.lost_present(d, end, at, cause);
        } else if driver.standby.as_ref().is_some_and(|standby| is_of(&standby.life)) {
            self.lost_standby(d, end, cause);
        } else if driver.present == Some(link.generation) || driver.has_retired(link.generation) {
            // The echo of a death that is known; a guest's process that says so without end is heard once.
            if self.drivers[d].has_mask(link.generation, &self.guests[guest].name, device) {
                return;
            }
            let mask = self.tell_masked(d, end, link.generation, at, cause);
            self.add_mask(d, link.generation, mask);
        }
    }

    /// The present life of driver VM `d` is not connected at `end` any more.
    fn lost_present(&mut self, d: usize, end: End, at: Time, cause: &LinkEnd) {
        let now = Time::now();
        let driver = &mut self.drivers[d];
        let stopping = *driver.lifecycle.state() == State::Stopping;
        // A guest goes over to an armed spare by itself: the others follow it.
        let armed = driver.lifecycle.is_armed();
        let Some(life) = &mut driver.life else { return };
        let alone = life.connected() <= 1 || life.is_accused_by_another(end, now) || armed;
        let (generation, this) = (life.generation, &mut life.links[end]);
        let excused = this.excused && *cause == LinkEnd::Closed;
        let again = this.lost(now);
        let EndRef { guest, device } = driver.ends[end];
        self.guests[guest].forget_live(device);
        let mask = self.tell_masked(d, end, generation, at, cause);
        if stopping {
            return;
        }
        if let Some(life) = self.drivers[d].life.as_mut().filter(|_| !excused) {
            life.links[end].accused = Some((now, mask));
        }
        if excused || !alone {
            self.drive(d, Input::EndGone(end));
            if !again {
                self.give_end_up(d, end, cause);
            }
            return;
        }
        // No other connection: the life fails, or is found to have failed.
        if let Some(life) = &mut self.drivers[d].life {
            life.links[end].due = Some(now + ECHO);
        }
        let name = self.end_name(d, end);
        let what = match cause {
            LinkEnd::Closed => format!("it closed its link to {name}"),
            LinkEnd::Stalled(what) => format!("its link to {name}: {what}"),
            LinkEnd::Broken(what) => format!("it broke a rule of its link to {name}: {what}"),
        };
        let failure = Failure { source: Source::Link, what, at };
        // A closed link is mostly the echo of a death whose own sign is on its way.
        let closed = *cause == LinkEnd::Closed;
        self.drive(d, if closed { Input::Sign(failure) } else { Input::Failed(failure) });
    }

    /// A life that waits is not connected at `end` any more: the guest has lost nothing.
    fn lost_standby(&mut self, d: usize, end: End, cause: &LinkEnd) {
        let now = Time::now();
        let why = format!("its link to {}: {cause}", self.end_name(d, end));
        let driver = &mut self.drivers[d];
        let is_spare = driver.spare.is_some();
        let Some(standby) = &mut driver.standby else { return };
        let alone = standby.life.connected() <= 1 || standby.life.is_accused_by_another(end, now);
        let this = &mut standby.life.links[end];
        let excused = this.excused && *cause == LinkEnd::Closed;
        let again = this.lost(now);
        if excused || (!alone && again) {
            if !excused {
                let EndRef { guest, device } = driver.ends[end];
                let mask = Mask {
                    guest: self.guests[guest].name.clone(),
                    device: device.to_string(),
                    at_ns: now.0,
                    cause: cause.to_string(),
                };
                standby.life.links[end].accused = Some((now, mask));
            }
            return;
        }
        // A spare is not to be taken any more.
        if *cause == LinkEnd::Closed && !is_spare {
            driver.suspect_standby(why);
        } else {
            self.drive(d, Input::StandbyFailed(why));
        }
    }

    /// The process of this life of driver VM `d` has lost a connection on its side.
    pub(in crate::supervisor) fn on_disconnected(
        &mut self,
        d: usize,
        which: Which,
        end: u16,
        link: LinkId,
        why: &Disconnect,
    ) {
        let now = Time::now();
        let end = usize::from(end);
        let Some(life) = self.drivers[d].life_of_mut(which) else { return };
        if life.link(end) != Some(link) {
            return;
        }
        tracing::debug!(end, %link, ?why, "disconnected");
        // The guest's splitter sees the end too and says so; if it does not, the connection is made again all the same.
        let only = life.connected() <= 1;
        let this = &mut life.links[end];
        this.due = Some(now + ECHO);
        match why {
            Disconnect::NoAnswer(_) => this.excused = true,
            Disconnect::Closed => {}
            Disconnect::Stopped if only && which == Which::Present => {
                let what = "its kernel has stopped its network device".into();
                self.drive(d, Input::Sign(Failure { source: Source::Link, what, at: now }));
            }
            Disconnect::Stopped => {}
        }
    }

    /// An end that loses one connection after the other: its guest is told, the others go on.
    fn give_end_up(&mut self, d: usize, end: End, cause: &LinkEnd) {
        let EndRef { guest, device } = self.drivers[d].ends[end];
        let name = self.end_name(d, end);
        self.events.warn(format!(
            "{}: its connection with {name} was lost {MOST_LOSSES} times in a row (the last: {cause}); it is left alone until \
             {} or the driver VM starts again (`umbra restart {}`)",
            self.drivers[d].name, self.guests[guest].name, self.drivers[d].name
        ));
        self.tell_guest(guest, &ToVm::Quarantine { device });
    }

    fn tell_masked(&mut self, d: usize, end: End, generation: Generation, at: Time, cause: &LinkEnd) -> Mask {
        let EndRef { guest, device } = self.drivers[d].ends[end];
        let mask = Mask {
            guest: self.guests[guest].name.clone(),
            device: device.to_string(),
            at_ns: at.0,
            cause: cause.to_string(),
        };
        self.events.tell(&Event::Masked {
            guest: mask.guest.clone(),
            device: mask.device.clone(),
            driver: self.drivers[d].name.clone(),
            generation: generation.get(),
            cause: mask.cause.clone(),
        });
        mask
    }

    /// A guest's word of the death of `generation` that comes when its recovery has begun, or is over: it belongs into the
    /// report all the same.
    fn add_mask(&mut self, d: usize, generation: Generation, mask: Mask) {
        let driver = &mut self.drivers[d];
        let report = driver.report.as_mut().filter(|report| report.generation == generation.get());
        match report {
            Some(report) if report.outage_ms.is_some() => {
                report.masks.push(mask);
                report.masks.truncate(MAX_MASKS);
                self.write_report(d);
            }
            _ if driver.timeline.at(Step::Live).is_none() => {
                driver.timeline.mark(Step::Mask, Time(mask.at_ns));
                driver.masks.push(mask);
            }
            _ => {}
        }
    }

    fn end_name(&self, d: usize, end: End) -> String {
        let EndRef { guest, device } = self.drivers[d].ends[end];
        format!("{}.{device}", self.guests[guest].name)
    }
}

impl Life {
    /// Gives the process one end of a new connection; the other one. `None`: it does not take it now.
    fn hand_out(&mut self, end: End, link: LinkId, now: Time) -> Option<OwnedFd> {
        let this = &mut self.links[end];
        let Ok((ours, theirs)) = UnixStream::pair() else {
            this.due = Some(now + DELAY_MAX);
            return None;
        };
        let message = ToVm::Connect { end: u16::try_from(end).ok()?, link };
        if let Err(error) = self.process.channel().send_now(&message, &[ours.as_fd()]) {
            // A process that is gone is noticed elsewhere.
            tracing::debug!(%error, %link, "connect an end");
            this.due = Some(now + FULL);
            return None;
        }
        Some(theirs.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_connection_is_made_again_later_and_later_and_not_for_ever() {
        let at = |ms: u64| Time(ms * 1_000_000);
        let mut end = EndLink::default();
        assert!(end.is_wanted(at(0)), "at once");
        let mut delays = Vec::new();
        for n in 1.. {
            let again = end.lost(at(0));
            assert_eq!(again, n < MOST_LOSSES);
            if !again {
                break;
            }
            delays.push(end.due.map(|due| due.0 / 1_000_000));
        }
        assert_eq!(delays[..3], [Some(100), Some(200), Some(400)]);
        assert_eq!(delays.last(), Some(&Some(5000)));
        assert!(!end.is_wanted(at(1_000_000)), "given up");
        end.forget();
        assert!(end.is_wanted(at(0)), "another process of the guest begins anew");
    }

    #[test]
    fn a_long_connection_makes_up_for_the_losses_before_it() {
        let at = |s: u64| Time(s * 1_000_000_000);
        let mut end = EndLink::default();
        for n in 0..100 {
            end.made = Some(at(n * 100));
            assert!(end.lost(at(n * 100 + 61)));
        }
    }
}
