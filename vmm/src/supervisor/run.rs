//! The supervisor's loop: one thread, one `poll`, and everything it waits for in one list.
//!
//! Handling comes in the order of [`Ready`]: guests before driver VMs, so that a guest's reboot is known before its
//! driver VM misses it; messages and consoles before the exit of their process, so that nothing said is lost.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::SignalFd;

use super::absence::Presence;
use super::aside::{Aside, Then};
use super::asleep::Sleep;
use super::driver::DriverVm;
use super::driver::life::{LifeRole, Part};
use super::front::notify::Notify;
use super::front::protocol::StopHow;
use super::front::server::Clients;
use super::front::signals::{self, RestoreTerminal};
use super::guest::{GuestState, GuestVm};
use super::ids::{DriverId, GuestId, Table};
use super::inbox::Inbox;
use super::prepare::{self, Until};
use super::reload::{MachineFile, Reload};
use super::run_error::{RunError, WhyFailed};
use super::start::cgroups;
use super::start::leftover::{self, LeftoverError};
use super::start::preflight::{Checked, Host};
use super::start::program;
use super::start::rundir::RunDir;
use crate::base::saved_terminal::SavedTerminal;
use crate::base::time::Time;
use crate::config::Machine;
use crate::lifecycle::{Input, Rank, State};
use crate::record::archive::Archive;
use crate::record::crash_report::PendingReports;
use crate::record::events::{Event, Events, Verbosity};
use crate::record::log::EventLog;
use crate::record::metrics::{Metrics, Server};
use crate::wire::spawn::Program;

/// Interval at which crash reports that wait for room are tried again.
const RETRY_PERIOD: Duration = Duration::from_secs(1);

/// Interval at which the metrics get the present state.
const METRICS_PERIOD: Duration = Duration::from_secs(1);

/// How a machine is run.
#[derive(Debug)]
pub struct Options {
    /// The machine's name.
    pub name: String,
    /// The folder that has the machines' run directories.
    pub base: PathBuf,
    /// The folder that has the machines' past; `None`: nothing is kept.
    pub state: Option<PathBuf>,
    /// Whether events are printed.
    pub verbosity: Verbosity,
    /// Where events go as JSON lines.
    pub events: Option<File>,
    /// The program that VM processes are started from: this one.
    pub program: PathBuf,
    /// Where the host's things are.
    pub host: Host,
    /// The service manager, if there is one.
    pub notify: Notify,
    /// Until when the machine runs.
    pub until: Until,
    /// Where the machine can be read from again.
    pub file: Option<MachineFile>,
}

/// What can be ready to be handled, in the order of handling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ready {
    Signals,
    GuestControl(GuestId),
    LifeSays(LifeRole, Part, DriverId),
    GuestExit(GuestId),
    LifeEnds(LifeRole, DriverId),
    Ending(DriverId),
    ResetDone(DriverId),
    SpareResetDone(DriverId),
    Reloaded,
    Aside,
    Listener,
    Client(u64),
}

/// A running machine.
#[derive(Debug)]
pub(super) struct Supervisor {
    pub(super) program: Program,
    /// The machine as it runs.
    pub(super) machine: Machine,
    /// Where it can be read from again.
    pub(super) file: Option<MachineFile>,
    pub(super) reloading: Option<Reload>,
    pub(super) asides: Vec<Aside<Then>>,
    pub(super) host: Host,
    /// Answers who asks for the metrics.
    pub(super) served: Option<Server>,
    pub(super) run_dir: RunDir,
    pub(super) listener: UnixListener,
    pub(super) signals: SignalFd,
    pub(super) events: Events,
    pub(super) guests: Table<GuestId, GuestVm>,
    pub(super) drivers: Table<DriverId, DriverVm>,
    pub(super) clients: Clients,
    notify: Notify,
    pub(super) presence: Presence,
    pub(super) metrics_due: Time,
    /// Crash reports that wait for room on the disk, and when they are tried again.
    pub(super) shelf: PendingReports,
    shelf_due: Time,
    pub(super) stopping: Option<StopHow>,
    /// The first thing that makes the run a failure.
    pub(super) failure: Option<WhyFailed>,
    /// A guest has been served: from here on the failure of a single guest or driver VM does not end the machine.
    pub(super) in_service: bool,
    /// Until when the machine runs.
    pub(super) until: Until,
    /// The host is to sleep, or sleeps.
    pub(super) sleep: Option<Sleep>,
    /// Inputs of the life cycles that wait.
    pub(super) inbox: Inbox,
}

/// Runs `machine` until it is stopped, or what [`Options::until`] says.
///
/// # Errors
///
/// Nothing was started, or a VM could not be started or a guest ended badly; in any case nothing is left running.
pub fn run(machine: &Machine, options: Options) -> Result<(), RunError> {
    let prepared = (options.until == Until::Prepared).then(|| prepare::machine(machine)).transpose()?;
    let machine = prepared.as_ref().unwrap_or(machine);
    let _terminal = RestoreTerminal(SavedTerminal::save());
    let checked = Checked::new(machine, &options.host)?;
    let (mut run_dir, listener) = RunDir::claim(&options.base, &options.name)?;
    let signals = signals::watch().map_err(RunError::Signals)?;
    let left = clean_up(&mut run_dir, &options.host)?;
    let cgroups = cgroups::open(machine, run_dir.name(), &options.host.root);
    let log = EventLog::new(run_dir.event_log());
    let metrics = machine.metrics.as_ref().map(|_| Metrics::new(run_dir.name()));
    // After the signals: its thread must not take them.
    let served = match (&machine.metrics, &metrics) {
        (Some(address), Some(metrics)) => Some(Server::start(address, metrics.clone())?),
        _ => None,
    };
    let kept = options.state.filter(|_| machine.history.runs > 0 && options.until != Until::Prepared);
    let archive = kept.map(|base| Archive::new(&base, run_dir.name(), run_dir.reports(), machine.history));
    let mut events =
        Events::new(options.verbosity, options.events).with_log(log).with_archive(archive).with_metrics(metrics);
    let devices = checked.drivers.values().map(|(device, _)| device).chain(checked.spares.values());
    let resets = leftover::reset_orders(devices);
    if let Err(error) = run_dir.note_resets(&resets) {
        events.warn(format!("the run directory cannot be written: {error}"));
    }
    if let Some((pid, done)) = left {
        events.tell(&Event::CleanedUp { pid, done });
    }
    let mut supervisor = Supervisor::new(machine, checked, options.host, (run_dir, listener), signals, events);
    supervisor.served = served;
    supervisor.file = options.file;
    supervisor.program = program::of_vms(options.program, machine.confine, &supervisor.host.root, cgroups);
    supervisor.notify = options.notify;
    supervisor.until = options.until;
    supervisor.start()?;
    let result = supervisor.run_to_the_end();
    supervisor.notify.stopping();
    let hung = supervisor.end_processes();
    supervisor.finish_resets(&hung);
    // Before the control socket goes: who follows the events reads the rest from the log.
    supervisor.events.tell_troubles();
    supervisor.events.finish();
    result?;
    let Some(WhyFailed { what, configuration }) = supervisor.failure.take() else { return Ok(()) };
    Err(RunError::Vm { reported: supervisor.events.has_printed(&what), what, configuration })
}

/// Cleans up after a run before that was killed; its supervisor's number and what was done.
fn clean_up(run_dir: &mut RunDir, host: &Host) -> Result<Option<(u32, String)>, LeftoverError> {
    let Some(left) = run_dir.left().cloned() else { return Ok(None) };
    match leftover::clean_up(left.pid, &left.resets, &host.pci) {
        Ok(done) => Ok(Some((left.pid, done))),
        Err(error) => {
            run_dir.leave_to_the_next();
            Err(error)
        }
    }
}

/// What logs are about: a VM, and its life if those are numbered.
pub(crate) fn span(name: &str, generation: Option<u32>) -> tracing::Span {
    match generation {
        Some(generation) => tracing::error_span!("vm", message = %format_args!("{name}.{generation}")),
        None => tracing::error_span!("vm", message = %name),
    }
}

impl Supervisor {
    fn new(
        machine: &Machine,
        checked: Checked,
        host: Host,
        (run_dir, listener): (RunDir, UnixListener),
        signals: SignalFd,
        events: Events,
    ) -> Self {
        let mut new = Self {
            program: Program::default(),
            machine: machine.clone(),
            file: None,
            reloading: None,
            asides: Vec::new(),
            host,
            served: None,
            guests: Table::default(),
            drivers: Table::default(),
            run_dir,
            listener,
            signals,
            events,
            clients: Clients::default(),
            notify: Notify::default(),
            presence: Presence::default(),
            metrics_due: Time(0),
            shelf: PendingReports::default(),
            shelf_due: Time(0),
            stopping: None,
            failure: None,
            in_service: false,
            until: Until::default(),
            sleep: None,
            inbox: Inbox::default(),
        };
        new.add(machine, checked);
        new
    }

    fn start(&mut self) -> Result<(), RunError> {
        for guest in self.guests.iter_mut() {
            if self.until == Until::Prepared {
                guest.state = GuestState::Off;
                continue;
            }
            // One with a sound device or a disk of a driver VM is started when that is known.
            if guest.knows_its_devices() {
                guest.start(&self.program)?;
            }
        }
        for driver in self.drivers.ids() {
            if self.takes_part(driver) {
                self.drive(driver, Input::Start);
            }
        }
        Ok(())
    }

    fn run_to_the_end(&mut self) -> Result<(), RunError> {
        while !self.is_over() {
            let mut ready = self.wait()?;
            self.excuse_absence();
            ready.sort_unstable();
            for source in ready {
                self.handle(source);
            }
            self.tick();
        }
        Ok(())
    }

    /// All guests have ended, and there is nothing else for which the machine runs.
    pub(super) fn is_done(&self) -> bool {
        let is_time = match self.until {
            Until::GuestsEnd => true,
            Until::Stopped => false,
            Until::Prepared => self.is_prepared(),
        };
        self.have_guests_ended() && (is_time || self.stopping.is_some())
    }

    /// Whether the machine goes on: what is started while it ends would find driver VMs that are gone, and nobody would end it.
    ///
    /// # Errors
    /// It does not; why, for people.
    pub(super) fn goes_on(&self) -> Result<(), String> {
        if self.stopping.is_some() {
            return Err("the machine is being stopped".into());
        }
        if self.is_done() { Err("the machine ends: its last guest has ended".into()) } else { Ok(()) }
    }

    /// The next point in time at which something is due.
    fn deadline(&self) -> Option<Time> {
        let drivers = self.drivers.iter().filter_map(|driver| driver.lifecycle.deadline());
        let dying = self.drivers.iter().filter_map(DriverVm::press_on_due);
        let questions = self.drivers.iter().filter_map(DriverVm::question_due);
        let drivers = drivers.chain(questions);
        let metrics = self.events.metrics().map(|_| self.metrics_due);
        let suspicions = self.drivers.iter().filter_map(DriverVm::suspicion_due);
        let connections = self.drivers.ids().filter_map(|n| self.connection_due(n));
        drivers
            .chain(suspicions)
            .chain(connections)
            .chain(dying)
            .chain(self.clients.deadline())
            .chain(self.notify.deadline())
            .chain(metrics)
            .chain(self.silence_due())
            .chain(self.button_due())
            .chain(self.rest_due())
            .chain(self.sleep_due())
            .chain(self.hung_due())
            .chain(self.start_due())
            .chain(self.drivers.iter().filter_map(DriverVm::reset_again_due))
            .min()
    }

    fn wait(&mut self) -> Result<Vec<Ready>, RunError> {
        let now = Time::now();
        let due = self.presence.wait_until(self.deadline(), now);
        let watched = self.watched();
        let mut fds: Vec<_> = watched.iter().map(|(_, fd, flags)| PollFd::new(*fd, *flags)).collect();
        let timeout = match due {
            // Rounded up, so that the deadline has passed when the wait is over.
            Some(due) => {
                let ms = due.since(now).as_nanos().div_ceil(1_000_000);
                PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX)
            }
            None => PollTimeout::NONE,
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(RunError::Poll(errno)),
        }
        let ready = watched.iter().zip(&fds).filter(|(_, fd)| fd.any().unwrap_or(false));
        Ok(ready.map(|((source, ..), _)| *source).collect())
    }

    fn watched(&self) -> Vec<(Ready, BorrowedFd<'_>, PollFlags)> {
        let mut watched = vec![(Ready::Signals, self.signals.as_fd(), PollFlags::POLLIN)];
        if self.clients.takes_more() {
            watched.push((Ready::Listener, self.listener.as_fd(), PollFlags::POLLIN));
        }
        watched
            .extend(self.reloading.iter().map(|reload| (Ready::Reloaded, reload.reading.as_fd(), PollFlags::POLLIN)));
        watched.extend(self.asides.iter().map(|aside| (Ready::Aside, aside.as_fd(), PollFlags::POLLIN)));
        for (n, guest) in self.guests.numbered() {
            let Some(process) = &guest.process else { continue };
            watched.push((Ready::GuestExit(n), process.pidfd(), PollFlags::POLLIN));
            if guest.listening {
                let more = if guest.unsent.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
                watched.push((Ready::GuestControl(n), process.channel().as_fd(), PollFlags::POLLIN | more));
            }
        }
        for (n, driver) in self.drivers.numbered() {
            if let Some(job) = &driver.resetting {
                watched.push((Ready::ResetDone(n), job.done.as_fd(), PollFlags::POLLIN));
            }
            if let Some(job) = driver.spare.as_ref().and_then(|spare| spare.resetting.as_ref()) {
                watched.push((Ready::SpareResetDone(n), job.done.as_fd(), PollFlags::POLLIN));
            }
            watched.extend(driver.ending.iter().map(|ending| (Ready::Ending(n), ending.pidfd(), PollFlags::POLLIN)));
            watched.extend(driver.watched_lives().map(|(role, part, fd, flags)| match part {
                Part::Exit => (Ready::LifeEnds(role, n), fd, flags),
                part => (Ready::LifeSays(role, part, n), fd, flags),
            }));
        }
        watched.extend(self.clients.watched().map(|(id, fd, flags)| (Ready::Client(id), fd, flags)));
        watched
    }

    /// What logs are about while `source` is handled.
    fn span_of(&self, source: Ready) -> tracing::Span {
        match source {
            Ready::GuestControl(n) | Ready::GuestExit(n) => span(&self.guests[n].name, None),
            Ready::LifeSays(_, _, n)
            | Ready::LifeEnds(_, n)
            | Ready::Ending(n)
            | Ready::ResetDone(n)
            | Ready::SpareResetDone(n) => self.drivers[n].span(),
            Ready::Signals | Ready::Reloaded | Ready::Aside | Ready::Listener | Ready::Client(_) => {
                tracing::Span::none()
            }
        }
    }

    fn handle(&mut self, source: Ready) {
        let _about = self.span_of(source).entered();
        match source {
            Ready::Signals => self.on_signal(),
            Ready::GuestControl(n) => self.read_guest(n),
            Ready::LifeSays(role, part, n) => self.hear(n, role, part),
            Ready::GuestExit(n) => self.on_guest_exit(n),
            Ready::LifeEnds(role, n) => self.hear(n, role, Part::Exit),
            Ready::Ending(n) => self.on_ending(n),
            Ready::ResetDone(n) => self.on_reset_done(n),
            Ready::SpareResetDone(n) => self.on_spare_reset_done(n),
            Ready::Reloaded => self.on_reloaded(),
            Ready::Aside => self.on_aside(),
            Ready::Listener => self.clients.accept(&self.listener, Time::now()),
            Ready::Client(id) => self.read_client(id),
        }
    }

    fn tick(&mut self) {
        let now = Time::now();
        self.events.tell_troubles();
        for n in self.drivers.ids() {
            if self
                .drivers
                .iter()
                .any(|DriverVm { lifecycle, .. }| lifecycle.standby_boots() || lifecycle.is_on_its_way())
            {
                self.drivers[n].lifecycle.wait_turn(now);
            }
            if let Some(why) = self.drivers[n].take_suspicion(now) {
                self.drive(n, Input::StandbyFailed(Rank::First, why));
            }
            if self.connection_due(n).is_some_and(|due| due <= now) {
                self.connect_ends(n);
            }
            self.look_at_silence(n, now);
            self.reset_again(n, now);
            if self.drivers[n].lifecycle.deadline().is_some_and(|deadline| deadline <= now) {
                self.drive(n, Input::Tick);
            }
            self.drivers[n].press_on(now);
            self.ask_about_network(n, now);
            self.end_trial(n, now);
            if let Some(warning) = self.drivers[n].console.take_warning() {
                self.events.warn(warning);
            }
        }
        self.press_buttons_again(now);
        self.kill_overdue(now);
        self.start_guests_again(now);
        self.clients.listen_again(now);
        self.answer_status(now);
        self.look_at_sleep(now);
        self.clients.tell_events(self.events.past());
        self.show(now);
        self.retry_reports(now);
        if self.is_done() {
            self.stop_drivers(now);
        }
    }

    /// Writes crash reports that had to wait for room. Heartbeats turn the loop often enough for that.
    fn retry_reports(&mut self, now: Time) {
        if self.shelf.is_empty() || now < self.shelf_due {
            return;
        }
        self.shelf_due = now + RETRY_PERIOD;
        for (name, path) in self.shelf.retry(&self.run_dir.reports()) {
            tracing::info!(path = %path.display(), "a crash report that waited for room is written");
            if let Some(driver) = self.drivers.iter_mut().find(|driver| driver.name == name) {
                driver.report_path = Some(path.display().to_string());
            }
        }
    }

    /// Reports the present state to the service manager and to the metrics.
    pub(super) fn show(&mut self, now: Time) {
        let mut notify = std::mem::take(&mut self.notify);
        let ready = self.guests.iter().all(|guest| guest.state != GuestState::Starting);
        notify.tell(now, (ready, self.sleep.is_some()), || {
            let running = self.guests.iter().filter(|guest| guest.state == GuestState::Running).count();
            let live =
                self.drivers.iter().filter(|driver| matches!(driver.lifecycle.state(), State::Live { .. })).count();
            format!(
                "{running} of {} guests running, {live} of {} driver VMs live",
                self.guests.len(),
                self.drivers.len()
            )
        });
        self.notify = notify;
        if let Some(metrics) = self.events.metrics().filter(|_| self.metrics_due <= now) {
            // Each guest's last answer, and a question for the next time.
            metrics.show(self.status());
            self.ask_vms();
            self.metrics_due = now + METRICS_PERIOD;
        }
    }

    fn on_signal(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            // As of any service; and a terminal that is gone is nothing that a machine ends of.
            if info.ssi_signo == libc::SIGHUP.unsigned_abs() {
                if let Err(why) = self.reload(None, false) {
                    self.answer_reload(None, false, Err(why));
                }
                continue;
            }
            // The second signal of any kind means it.
            let how = if self.stopping.is_some() { StopHow::Kill } else { StopHow::PowerButton };
            self.stop(how, "a signal");
        }
    }

    /// Ends the machine.
    pub(super) fn stop(&mut self, how: StopHow, who: &str) {
        let (again, over) =
            (self.stopping.replace(how) == Some(StopHow::Kill), self.guests.iter().all(GuestVm::is_over));
        self.notify.stopping();
        if self.until == Until::Prepared && !self.is_prepared() {
            let _ = self.failure.get_or_insert("stopped before all snapshots were there".into());
        }
        let what = match how {
            StopHow::PowerButton if self.until == Until::Prepared => format!("{who} asked for the end"),
            StopHow::PowerButton => format!("{who} asked the guests to power off (once more kills them)"),
            StopHow::Kill => format!("{who} asked to kill the VMs"),
        };
        self.events.tell(&Event::Stopping { how: what });
        for n in self.guests.ids() {
            // One that waits for its sound card or a disk has not started, and does not any more.
            if self.guests[n].process.is_none() && !self.guests[n].is_over() {
                self.guests[n].state = GuestState::Off;
            }
            match how {
                // A guest that has just reset is not started again: it is off when its process has ended.
                StopHow::PowerButton => self.press_power_button(n),
                StopHow::Kill => self.kill_guest(n),
            }
        }
        match how {
            StopHow::PowerButton => {}
            // Asked for twice, or while nothing but the agents' flushes is waited for.
            StopHow::Kill if again || over => self.stop_drivers_at_once(),
            StopHow::Kill => self.stop_drivers(Time::now()),
        }
    }

    /// Ends the driver VMs, but those that have to rest before.
    fn stop_drivers(&mut self, now: Time) {
        for n in self.drivers.ids() {
            if !self.drivers[n].is_being_stopped() && !self.has_to_rest(n, now) {
                self.drive(n, Input::Stop);
            }
        }
    }

    fn stop_drivers_at_once(&mut self) {
        for n in self.drivers.ids() {
            if !self.drivers[n].is_being_stopped() {
                self.drive(n, Input::Stop);
            }
        }
    }

    /// Ends the machine because it cannot do what it was started for; `why` is the error of the run.
    pub(super) fn give_up(&mut self, why: impl Into<WhyFailed>) {
        self.failure.get_or_insert(why.into());
        for guest in self.guests.iter_mut() {
            guest.kill();
            if guest.process.is_none() && !guest.is_over() {
                guest.state = GuestState::Off;
            }
        }
        self.stopping = Some(StopHow::Kill);
        self.stop_drivers_at_once();
    }
}
