//! The connections between guests' devices and the lives of a driver VM. Each end of a life is connected by itself, lost and
//! connected again, while the life goes on: it waits for no guest, and no guest costs it.
//!
//! ```text
//!             guest and life are there             lost, guest gone
//!   unconnected ------------------------> connected ----------------> unconnected, for a delay that doubles
//! ```
//! Invariants: the life cycle knows as its ends those that the present life is connected with, also those that it was connected with
//! while it waited; both processes get the two ends of one socket pair under one [`LinkId`]; a word about another link than the
//! present one changes nothing; a guest's word alone costs a life that serves others nothing but that guest's end.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use umbra_shadow::{DeviceId, Generation, LinkId};
use umbra_splitter::untrusted::Elsewhere;

use super::begin::Begin;
use super::life::{LifeRole, Purpose};
use super::{DriverVm, Life};
use crate::base::time::Time;
use crate::lifecycle::{Endpoint, Failure, Input, NoticedBy, Rank, State};
use crate::record::crash_report::{CrashReport, Mask};
use crate::record::events::Event;
use crate::record::timeline::Milestone;
use crate::supervisor::bounds::MAX_MASKS;
use crate::supervisor::class::traits;
use crate::supervisor::ids::{DriverId, GuestId};
use crate::supervisor::run::Supervisor;
use crate::wire::messages::{Disconnect, LinkEnd, ToVm};

/// A guest's device that a driver VM serves.
#[derive(Clone, Copy, Debug)]
pub(in crate::supervisor) struct EndRef {
    /// Whose.
    pub(in crate::supervisor) guest: GuestId,
    /// Which of its devices.
    pub(in crate::supervisor) device: DeviceId,
}

/// Delay before a lost connection is made again; doubled with each loss in a row up to [`DELAY_MAX`].
const DELAY: Duration = Duration::from_millis(100);
const DELAY_MAX: Duration = Duration::from_secs(5);

/// Losses in a row, while the guest's process was there, after which an end is given up until its guest or its driver VM starts
/// again: that is after 11 s of delays at least, and another connection would not remove the cause.
const MOST_LOSSES: u32 = 8;

/// A connection that lasts this long resets the count of losses: what breaks it later has another cause.
const GOOD: Duration = Duration::from_secs(60);

/// Accusations by the splitters of different guests within this time count as one fault of the driver VM. Each splitter notices a
/// fault by itself, at its next frame or after its own stall limit of some seconds.
const SAME_FAULT: Duration = Duration::from_secs(10);

/// How long the guest's report of a lost connection is waited for when the driver VM's side has reported the loss already. Only then
/// is the connection made again without it.
const ECHO: Duration = Duration::from_secs(5);

/// How long a sound service that serves already may take to greet a new session before the session is connected again. It greets
/// within milliseconds, unless it hangs at this guest's port.
const GREETING: Duration = Duration::from_secs(20);

/// How long a device that is connected again and again with a life that serves may go without being greeted: longer than the 90 s for which
/// the disk service lets a disk finish what an earlier session left.
const NEVER: Duration = Duration::from_secs(120);

/// Delay before a connection is tried again whose message the process's full control channel did not take.
const FULL: Duration = Duration::from_millis(50);

/// The connection of one end with one life.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct EndLink {
    /// Connections so far with this life; numbers the next [`LinkId`].
    attempts: u32,
    /// The present connection.
    link: Option<LinkId>,
    made: Option<Time>,
    /// The driver VM's side ended it because the guest did not answer: the guest's report of the loss is no accusation.
    excused: bool,
    /// The guest's network device has gone live by this connection: it has answered, whatever the driver VM's side says.
    live: bool,
    /// When the next connection may be made, where that is not at once.
    due: Option<Time>,
    /// Losses in a row.
    losses: u32,
    /// The last accusation by its guest, and the mask that began with it.
    accused: Option<(Time, Mask)>,
    /// The connection of this number that the agent says met an error of its disk.
    erred: Option<u32>,
    /// What the guest says of the connection of this number, where others are served: for the agent to bear out.
    suspected: Option<(u32, Failure)>,
    /// Since when it is connected and waits for a greeting.
    ungreeted: Option<Time>,
    /// No further connection with this life.
    given_up: bool,
}

impl EndLink {
    fn is_wanted(&self, now: Time) -> bool {
        !self.given_up && self.due.map_or(self.link.is_none(), |due| due <= now)
    }

    /// Whether it is connected, and not left alone.
    fn is_up(&self) -> bool {
        self.link.is_some() && !self.given_up
    }

    /// A session with a sound service has begun, and its greeting is awaited.
    fn await_greeting(&mut self, now: Time) {
        if self.link.is_some() {
            self.due = Some(now + GREETING);
            self.ungreeted.get_or_insert(now);
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
        self.given_up |= self.losses >= MOST_LOSSES;
        !self.given_up
    }
}

impl Life {
    fn link(&self, end: Endpoint) -> Option<LinkId> {
        self.links.get(end)?.link
    }

    pub(in crate::supervisor) fn connected(&self) -> usize {
        self.links.iter().filter(|end| end.link.is_some()).count()
    }

    /// Whether other guests than that of `end` accuse this life too.
    fn is_accused_by_another(&self, end: Endpoint, now: Time) -> bool {
        let others = self.links.numbered().filter(|(other, _)| *other != end);
        others.into_iter().any(|(_, link)| link.accused.as_ref().is_some_and(|(at, _)| now.since(*at) < SAME_FAULT))
    }
}

impl DriverVm {
    /// The present life fails: what its guests have lost by now belongs to its outage.
    pub(in crate::supervisor) fn collect_masks(&mut self, now: Time) {
        let Some(life) = &mut self.life else { return };
        let lost = life.links.iter_mut().filter(|end| end.link.is_none()).filter_map(|end| end.accused.take());
        for (_, mask) in lost.filter(|(at, _)| now.since(*at) < SAME_FAULT) {
            self.masks.retain(|known| known.guest != mask.guest || known.device != mask.device);
            self.masks.push(mask);
        }
    }

    /// The report of the last failure of this driver VM, if it was that of `generation`.
    fn report_of(&self, generation: Generation) -> Option<&CrashReport> {
        self.report.as_ref().filter(|report| report.generation == generation.get())
    }

    /// Whether it is noted already that `device` of this guest lost this life.
    fn has_mask(&self, generation: Generation, guest: &str, device: DeviceId) -> bool {
        let reported = self.report_of(generation).map(|report| &report.masks[..]).unwrap_or_default();
        reported.iter().chain(&self.masks).any(|mask| mask.guest == guest && mask.device == device)
    }

    /// The guest of `end` has a new process, or none: its connections and losses so far do not count any more.
    pub(in crate::supervisor) fn forget_guest(&mut self, end: Endpoint) {
        let lives = self.life.iter_mut().chain(self.standby.iter_mut().map(|vm| &mut vm.life));
        lives.filter_map(|life| life.links.get_mut(end)).for_each(EndLink::forget);
    }
}

impl Supervisor {
    /// Connects what can be connected: each end of the lives of driver VM `n` whose guest is there. A second standby has no connection:
    /// a guest keeps one link beside the serving one.
    pub(in crate::supervisor) fn connect_ends(&mut self, n: DriverId) {
        for role in [LifeRole::Present, LifeRole::Standby(Rank::First)] {
            for end in self.drivers[n].ends.ids() {
                self.connect(n, role, end);
            }
        }
    }

    /// When an end of driver VM `n` is to be connected. One whose guest takes no connection is connected when that reads again.
    pub(in crate::supervisor) fn connection_due(&self, n: DriverId) -> Option<Time> {
        let driver = &self.drivers[n];
        let lives =
            [LifeRole::Present, LifeRole::Standby(Rank::First)].into_iter().filter_map(|role| driver.life_of(role));
        let waits = |(end, link): &(Endpoint, &EndLink)| {
            !link.given_up && self.guests[driver.ends[*end].guest].takes_connections()
        };
        lives.flat_map(|life| life.links.numbered()).filter(waits).filter_map(|(_, link)| link.due).min()
    }

    /// Connects what guest `n` can be connected with.
    pub(in crate::supervisor) fn connect_guest(&mut self, n: GuestId) {
        for (driver, _) in self.guests[n].drivers() {
            self.connect_ends(driver);
        }
    }

    fn connect(&mut self, n: DriverId, role: LifeRole, end: Endpoint) {
        let (driver, now) = (&mut self.drivers[n], Time::now());
        let EndRef { guest, device } = driver.ends[end];
        let guest = &mut self.guests[guest];
        if !guest.takes_connections() {
            return;
        }
        let (armed, served) = (driver.lifecycle.is_armed(), driver.lifecycle.serves(end));
        let Some(life) = driver.life_of_mut(role) else { return };
        // Connected while this life waited; the guest, or its connection with the life before, was lost meanwhile.
        if role == LifeRole::Present && life.links[end].is_up() && !served {
            return self.drive(n, Input::EndHere(end));
        }
        let waits = life.purpose != Purpose::WaitWithSpare && role != LifeRole::Present;
        let early = waits && traits(device.class).begins_with_device;
        // A life that has asked which one it is may be about to be saved.
        let unmet = matches!(life.begin, Begin::Unmet | Begin::Asked);
        if early || unmet || !life.links[end].is_wanted(now) {
            return;
        }
        let waits_since = life.links[end].ungreeted.filter(|_| role == LifeRole::Present);
        if waits_since.is_some_and(|since| now.since(since) >= NEVER) && guest.has_answered(device) {
            return self.never_greeted(n, end);
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
            live: false,
            ..std::mem::take(&mut life.links[end])
        };
        if role == LifeRole::Present {
            self.await_greeting(n, end);
            if waits_since.is_some() {
                self.ask_whether_it_lives(n, end);
            }
        }
        if let Err(error) = told {
            self.events.warn(format!("{}: {error}", self.guests[self.drivers[n].ends[end].guest].name));
        }
        match role {
            LifeRole::Present => self.drive(n, Input::EndHere(end)),
            LifeRole::Standby(_) if armed => self.tell_armed_at(n, end, generation),
            LifeRole::Standby(_) | LifeRole::Dying => {}
        }
    }

    /// Where the life of driver VM `n` serves already, a device that goes live by itself is expected to do so soon.
    pub(in crate::supervisor) fn await_greeting(&mut self, n: DriverId, end: Endpoint) {
        let driver = &mut self.drivers[n];
        let serves = matches!(driver.lifecycle.state(), State::Live { .. });
        let greets = traits(driver.ends[end].device.class).greets;
        if let Some(life) = driver.life.as_mut().filter(|_| serves && greets) {
            life.links[end].await_greeting(Time::now());
        }
    }

    /// The device at `end` of driver VM `n` is live.
    pub(in crate::supervisor) fn has_greeted(&mut self, n: DriverId, end: Endpoint) {
        if let Some(link) = self.drivers[n].life.as_mut().and_then(|life| life.links.get_mut(end)) {
            (link.due, link.ungreeted) = (None, None);
        }
    }

    /// The network device at `end` of driver VM `n` is live with the present life.
    pub(in crate::supervisor) fn note_live(&mut self, n: DriverId, end: Endpoint) {
        if let Some(link) = self.drivers[n].life.as_mut().and_then(|life| life.links.get_mut(end)) {
            link.live = true;
        }
    }

    /// Asks the guest at `end` for anything: one that does not answer is the reason itself why it is not greeted.
    fn ask_whether_it_lives(&mut self, n: DriverId, end: Endpoint) {
        let EndRef { guest, device } = self.drivers[n].ends[end];
        if let Some(device) = self.guests[guest].devices.get_mut(&device) {
            device.fresh = false;
        }
        self.tell_guest(guest, &ToVm::QueryStatus);
    }

    /// The guest at `end` lives, and its sessions with the life that serves are not greeted.
    fn never_greeted(&mut self, n: DriverId, end: Endpoint) {
        let what = format!("it has not greeted {} for {} s", self.end_name(n, end), NEVER.as_secs());
        let Some(life) = &mut self.drivers[n].life else { return };
        if life.connected() <= 1 {
            return self.fail_driver(n, NoticedBy::Link, what, Time::now());
        }
        (life.links[end].given_up, life.links[end].due) = (true, None);
        self.drive(n, Input::EndGone(end));
        self.give_end_up(n, end, &what);
    }

    /// The agent of driver VM `n` says that connection `attempt` at `end` has met an error of its disk, which may be its driver's. The life
    /// fails, if the guest says so too: if not, it has met the error in an earlier life, and takes it for the disk's own.
    pub(in crate::supervisor) fn on_disk_error(&mut self, n: DriverId, end: u16, attempt: u32) {
        let end = Endpoint::from(end);
        let Some(link) = self.drivers[n].life.as_mut().and_then(|life| life.links.get_mut(end)) else { return };
        link.erred = Some(attempt);
        if let Some((_, failure)) = link.suspected.take_if(|(of, _)| *of == attempt) {
            self.drive(n, Input::Failed(failure));
        }
    }

    /// A guest's splitter says that it has lost `link`.
    pub(in crate::supervisor) fn on_lost(
        &mut self,
        (guest, device): (GuestId, DeviceId),
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
        } else if driver.present == Some(link.generation) || driver.report_of(link.generation).is_some() {
            // A late report of a failure that is known, also once all are served again. It is taken once: a guest's process could repeat
            // it without end.
            if self.drivers[d].has_mask(link.generation, &self.guests[guest].name, device) {
                return;
            }
            let mask = self.tell_masked(d, end, link.generation, at, cause);
            self.add_mask(d, link.generation, mask);
        }
    }

    /// The present life of driver VM `d` is not connected at `end` any more.
    fn lost_present(&mut self, d: DriverId, end: Endpoint, at: Time, cause: &LinkEnd) {
        let now = Time::now();
        let driver = &mut self.drivers[d];
        let stopping = *driver.lifecycle.state() == State::Stopping;
        // A guest goes over to an armed spare by itself: the others follow it.
        let armed = driver.lifecycle.is_armed();
        let Some(life) = &mut driver.life else { return };
        let attempt = life.link(end).map(|link| link.attempt).filter(|_| matches!(cause, LinkEnd::Suspect(_)));
        let is_borne_out = attempt.is_some() && life.links[end].erred == attempt;
        let alone = life.connected() <= 1 || life.is_accused_by_another(end, now) || armed || is_borne_out;
        let (generation, this) = (life.generation, &mut life.links[end]);
        // One that was live may have gone over to an armed spare by itself, as from any link that it loses.
        let excused = this.excused && !(this.live && armed) && *cause == LinkEnd::Closed;
        let again = this.lost(now);
        let EndRef { guest, device } = driver.ends[end];
        self.guests[guest].forget_live(device);
        self.end_rest((guest, device), false);
        let mask = self.tell_masked(d, end, generation, at, cause);
        if stopping {
            return;
        }
        if let Some(life) = self.drivers[d].life.as_mut().filter(|_| !excused) {
            life.links[end].accused = Some((now, mask));
        }
        let name = self.end_name(d, end);
        let what = match cause {
            LinkEnd::Closed => format!("it closed its link to {name}"),
            LinkEnd::Stalled(what) => format!("its link to {name}: {what}"),
            LinkEnd::Broken(what) => format!("it broke a rule of its link to {name}: {what}"),
            LinkEnd::Suspect(what) | LinkEnd::OtherDisk(what) => format!("{name}: {what}"),
        };
        let source = match cause {
            LinkEnd::OtherDisk(_) => self.other_disk_by(d, NoticedBy::Link),
            _ => NoticedBy::Link,
        };
        let failure = Failure { source, what, at };
        if excused || !alone {
            if let (Some(attempt), Some(life)) = (attempt, &mut self.drivers[d].life) {
                life.links[end].suspected = Some((attempt, failure));
            }
            match cause {
                LinkEnd::OtherDisk(_) => self.bar_end(d, end, cause),
                _ if again => self.drive(d, Input::EndGone(end)),
                _ => {
                    self.drive(d, Input::EndGone(end));
                    let last =
                        format!("its connection with {name} was lost {MOST_LOSSES} times in a row (the last: {cause})");
                    self.give_end_up(d, end, &last);
                }
            }
            return self.look_at_rest(d);
        }
        // No other connection: the life fails, or is found to have failed.
        if let Some(life) = &mut self.drivers[d].life {
            life.links[end].due = Some(now + ECHO);
        }
        // A closed link is usually a side effect of a death whose own event (process exit, VM end) is still queued.
        let closed = *cause == LinkEnd::Closed;
        self.drive(d, if closed { Input::Sign(failure) } else { Input::Failed(failure) });
    }

    /// A life that waits is not connected at `end` any more: the guest has lost nothing.
    fn lost_standby(&mut self, d: DriverId, end: Endpoint, cause: &LinkEnd) {
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
                let mask = Mask { guest: self.guests[guest].name.clone(), device, at_ns: now.0, cause: cause.clone() };
                standby.life.links[end].accused = Some((now, mask));
            }
            return;
        }
        // A spare is not to be taken any more.
        if *cause == LinkEnd::Closed && !is_spare {
            driver.suspect_standby(why);
        } else {
            self.drive(d, Input::StandbyFailed(Rank::First, why));
        }
    }

    /// The process of this life of driver VM `d` has lost a connection on its side.
    pub(in crate::supervisor) fn on_disconnected(
        &mut self,
        d: DriverId,
        role: LifeRole,
        end: u16,
        link: LinkId,
        why: &Disconnect,
    ) {
        let now = Time::now();
        let end = Endpoint::from(end);
        let Some(life) = self.drivers[d].life_of_mut(role) else { return };
        if life.link(end) != Some(link) {
            return;
        }
        tracing::debug!(end = end.place(), %link, ?why, "disconnected");
        // The guest's splitter sees the end too and says so; if it does not, the connection is made again all the same.
        let only = life.connected() <= 1;
        let this = &mut life.links[end];
        this.due = Some(now + ECHO);
        match why {
            Disconnect::NoAnswer(_) => this.excused = true,
            Disconnect::Closed => {}
            Disconnect::Stopped if only && role == LifeRole::Present => {
                let what = "its kernel has stopped the device of its end".into();
                self.drive(d, Input::Sign(Failure { source: NoticedBy::Link, what, at: now }));
            }
            Disconnect::Stopped => {}
        }
    }

    /// An end is given up, for `why`: quarantines the guest's device there; the other ends go on.
    fn give_end_up(&mut self, d: DriverId, end: Endpoint, why: &str) {
        let EndRef { guest, device } = self.drivers[d].ends[end];
        self.events.warn(format!(
            "{}: {why}; it is left alone until {} or the driver VM starts again (`umbra restart {}`)",
            self.drivers[d].name, self.guests[guest].name, self.drivers[d].name
        ));
        self.tell_guest(guest, &ToVm::Quarantine { device });
    }

    /// An end's disk is another one than its guest was given, while other ends are served: it gets nothing from this life.
    pub(in crate::supervisor) fn bar_end(&mut self, d: DriverId, end: Endpoint, cause: &LinkEnd) {
        if let Some(link) = self.drivers[d].life.as_mut().and_then(|life| life.links.get_mut(end)) {
            if link.given_up {
                return;
            }
            (link.given_up, link.due) = (true, None);
        }
        let EndRef { guest, device } = self.drivers[d].ends[end];
        let (name, driver) = (self.end_name(d, end), &self.drivers[d].name);
        self.events.warn(format!("{driver}: {name} is not served, its disk is not the one it was: {cause}"));
        self.drive(d, Input::EndGone(end));
        self.tell_guest(guest, &ToVm::Quarantine { device });
    }

    fn tell_masked(&mut self, d: DriverId, end: Endpoint, generation: Generation, at: Time, cause: &LinkEnd) -> Mask {
        let EndRef { guest, device } = self.drivers[d].ends[end];
        let mask = Mask { guest: self.guests[guest].name.clone(), device, at_ns: at.0, cause: cause.clone() };
        self.events.tell(&Event::Masked {
            guest: mask.guest.clone(),
            device,
            driver: self.drivers[d].name.clone(),
            generation: generation.get(),
            cause: mask.cause.clone(),
        });
        mask
    }

    /// Adds a guest's report of the failure of `generation` that comes while its recovery runs, or after it, to the crash report.
    fn add_mask(&mut self, d: DriverId, generation: Generation, mask: Mask) {
        let driver = &mut self.drivers[d];
        let report = driver.report.as_mut().filter(|report| report.generation == generation.get());
        if driver.timeline.at(Milestone::Live).is_none() {
            driver.timeline.mark(Milestone::Mask, Time(mask.at_ns));
            driver.masks.push(mask);
        } else if let Some(report) = report {
            report.masks.push(mask);
            report.masks.truncate(MAX_MASKS);
            self.write_report(d);
        }
    }

    pub(in crate::supervisor) fn end_name(&self, d: DriverId, end: Endpoint) -> String {
        let EndRef { guest, device } = self.drivers[d].ends[end];
        format!("{}.{device}", self.guests[guest].name)
    }
}

impl Life {
    /// Gives the process one end of a new connection; the other one. `None`: it does not take it now.
    fn hand_out(&mut self, end: Endpoint, link: LinkId, now: Time) -> Option<Elsewhere<OwnedFd>> {
        let this = &mut self.links[end];
        let Ok((ours, theirs)) = UnixStream::pair() else {
            this.due = Some(now + DELAY_MAX);
            return None;
        };
        let message = ToVm::Connect { end: u16::try_from(end.place()).ok()?, link };
        if let Err(error) = self.process.channel().send_now(&message, &[ours.as_fd()]) {
            // A process that is gone is noticed elsewhere.
            tracing::debug!(%error, %link, "connect an end");
            this.due = Some(now + FULL);
            return None;
        }
        Some(Elsewhere::new(theirs.into()))
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
