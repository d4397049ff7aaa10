//! The control socket's end in the supervisor: few clients, short requests, nobody waited for.
//!
//! Invariant: a client that is connected and wants nothing keeps nobody out. A client that cannot be served gets an error at once,
//! so that a connection that ends without a word means: the machine has ended, or the client was idle.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use umbra_driver_vm::protocol::{CrashKind, ToAgent};
use umbra_shadow::Generation;

use super::protocol::{MAX_REQUEST, Request, Response, StopHow};
use crate::base::lines::{LineError, Lines};
use crate::base::time::Time;
use crate::lifecycle::State;
use crate::record::events::Event;
use crate::record::recent::RecentEvents;
use crate::record::schema::Versioned;
use crate::record::status::Status;
use crate::supervisor::guest::GuestVm;
use crate::supervisor::ids::DriverId;
use crate::supervisor::run::Supervisor;
use crate::wire::messages::ToVm;

/// Most clients at a time: each costs the supervisor a descriptor and up to 256 KiB of unsent lines. `umbra` itself holds one
/// connection for a moment.
const MAX_CLIENTS: usize = 16;

/// Most clients among them that follow the events, which they may do for as long as they like: the other places stay free for
/// `umbra status` and `umbra stop`.
const MAX_FOLLOWERS: usize = 12;

/// Silence after which a client that waits for nothing gives its place to a new one: many times the delay between connection and
/// request of `umbra` on a busy machine, and short enough for a person who tries again.
const IDLE: Duration = Duration::from_secs(5);

/// Longest wait for the guests' answers about their devices; of a guest that hangs the last answer is shown.
const STATUS_PATIENCE: Duration = Duration::from_millis(250);

/// Time in which no client is taken, after one could not be.
const DEAF: Duration = Duration::from_millis(100);

/// [`Response::EventsEnd`] as a line.
const EVENTS_END: &str = r#"{"response":"events-end","schema":1}"#;

/// The connected clients.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct Clients {
    clients: BTreeMap<u64, Client>,
    next_id: u64,
    /// Until when no other is taken, because one could not be.
    deaf_until: Option<Time>,
}

#[derive(Debug)]
struct Client {
    lines: Lines<UnixStream>,
    /// A status is owed, at the latest at this time.
    status_due: Option<Time>,
    /// Events are owed.
    events: Option<Owed>,
    /// The outcome of a restart, or the end of the machine, is waited for.
    waits: bool,
    /// When it was last heard.
    heard: Time,
    /// It says nothing more, and still gets what it is owed.
    is_done: bool,
}

/// Which events a client is owed.
#[derive(Clone, Copy, Debug)]
struct Owed {
    /// Those behind this number.
    after: u64,
    /// And those to come.
    follow: bool,
}

impl Clients {
    pub(in crate::supervisor) fn accept(&mut self, listener: &UnixListener, now: Time) {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // One that has gone already, or was not there.
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => return,
            // Too many open files, for one: whoever waits there would have the loop turn without a pause.
            Err(_) => {
                self.deaf_until = Some(now + DEAF);
                return;
            }
        };
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        let mut lines = Lines::new(stream, MAX_REQUEST);
        if self.connected().count() >= MAX_CLIENTS && !self.drop_idle(now) {
            // It fits into the empty buffer of a new socket, and is read there although the connection is closed.
            if let Ok(line) = serde_json::to_string(&Versioned::new(&self.too_many())) {
                let _ = lines.send(&line);
            }
            return;
        }
        let client = Client { lines, status_due: None, events: None, waits: false, heard: now, is_done: false };
        self.clients.insert(self.next_id, client);
        self.next_id += 1;
    }

    /// Whether another client is taken now.
    pub(in crate::supervisor) fn takes_more(&self) -> bool {
        self.deaf_until.is_none()
    }

    /// Takes others again, if it is time.
    pub(in crate::supervisor) fn listen_again(&mut self, now: Time) {
        self.deaf_until = self.deaf_until.filter(|until| *until > now);
    }

    /// Those that have not gone. One that has is read, and forgotten, when its turn comes, which may be after that of a new one.
    fn connected(&self) -> impl Iterator<Item = &Client> {
        self.clients.values().filter(|client| !client.has_gone())
    }

    /// Drops the client that has been idle for longest; false if none is.
    fn drop_idle(&mut self, now: Time) -> bool {
        let idle = self.clients.iter().filter(|(_, client)| client.is_idle(now));
        let Some(id) = idle.min_by_key(|(_, client)| client.heard).map(|(id, _)| *id) else { return false };
        self.clients.remove(&id).is_some()
    }

    fn too_many(&self) -> Response {
        let what = format!(
            "too many clients of this machine: {} are connected; close some `umbra events`/`status --watch`",
            self.connected().count()
        );
        Response::Error { what }
    }

    /// Client `id` follows the events from now on, unless too many do.
    fn follow(&mut self, id: u64, owed: Owed) {
        let follows = |client: &&Client| client.events.is_some_and(|owed| owed.follow);
        let full = owed.follow && self.connected().filter(follows).count() >= MAX_FOLLOWERS;
        if full {
            return self.answer(id, &self.too_many());
        }
        if let Some(client) = self.clients.get_mut(&id) {
            client.events = Some(owed);
        }
    }

    fn wait(&mut self, id: u64) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.waits = true;
        }
    }

    pub(in crate::supervisor) fn watched(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, PollFlags)> {
        self.clients.iter().map(|(id, client)| {
            let more = if client.lines.has_unsent() { PollFlags::POLLOUT } else { PollFlags::empty() };
            let hear = if client.is_done { PollFlags::empty() } else { PollFlags::POLLIN };
            (*id, client.lines.stream().as_fd(), hear | more)
        })
    }

    pub(in crate::supervisor) fn deadline(&self) -> Option<Time> {
        self.clients.values().filter_map(|client| client.status_due).chain(self.deaf_until).min()
    }

    /// Sends each client the events it is owed, as far as it reads: one that does not holds a line, not the past.
    pub(in crate::supervisor) fn tell_events(&mut self, past: &RecentEvents) {
        self.clients.retain(|_, client| client.tell_events(past).is_ok() && (client.wants() || !client.is_done));
    }

    pub(in crate::supervisor) fn answer(&mut self, id: u64, response: &Response) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.waits = matches!(response, Response::Stopping { .. });
        let sent = serde_json::to_string(&Versioned::new(response)).is_ok_and(|line| client.lines.send(&line).is_ok());
        if !sent {
            self.clients.remove(&id);
        }
    }
}

impl Client {
    /// Whether the other side has closed the connection, though what it said last may still wait here.
    fn has_gone(&self) -> bool {
        let mut fds = [PollFd::new(self.lines.stream().as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Whether it is owed something, as far as is known.
    fn wants(&self) -> bool {
        self.waits || self.events.is_some() || self.status_due.is_some() || self.lines.has_unsent()
    }

    /// Whether it wants nothing, and has not for some time.
    fn is_idle(&self, now: Time) -> bool {
        !self.wants() && now.since(self.heard) >= IDLE
    }

    fn tell_events(&mut self, past: &RecentEvents) -> Result<(), LineError> {
        while let Some(owed) = &mut self.events
            && !self.lines.has_unsent()
        {
            match past.after(owed.after) {
                Some((seq, line)) => {
                    owed.after = seq;
                    self.lines.send(line)?;
                }
                None if owed.follow => break,
                None => {
                    self.events = None;
                    self.lines.send(EVENTS_END)?;
                }
            }
        }
        Ok(())
    }
}

impl Supervisor {
    pub(in crate::supervisor) fn read_client(&mut self, id: u64) {
        let Some(client) = self.clients.clients.get_mut(&id) else { return };
        client.heard = Time::now();
        let flushed = client.lines.flush();
        if client.is_done {
            // Readable without an end, until it has gone altogether.
            if client.has_gone() || flushed.is_err() {
                self.clients.clients.remove(&id);
            }
            return;
        }
        let (lines, error) = client.lines.receive();
        for line in lines {
            match serde_json::from_str(&line) {
                Ok(request) => self.on_request(id, request),
                Err(error) => {
                    let what = format!("not a request that this version knows: {error}");
                    self.clients.answer(id, &Response::Error { what });
                }
            }
        }
        let Some(client) = self.clients.clients.get_mut(&id) else { return };
        if matches!(error, Some(LineError::Closed)) && flushed.is_ok() && !client.has_gone() {
            client.is_done = true;
        } else if error.is_some() || flushed.is_err() {
            self.clients.clients.remove(&id);
        }
    }

    fn on_request(&mut self, id: u64, request: Request) {
        match request {
            Request::Status => self.ask_for_status(id),
            Request::Events { after, follow } => self.clients.follow(id, Owed { after, follow }),
            Request::Crash { name, kind } => {
                let response = self.crash(&name, kind).unwrap_or_else(|what| Response::Error { what });
                self.clients.answer(id, &response);
            }
            Request::Restart { name, image } => {
                self.clients.wait(id);
                let begun = self.driver_named(&name).and_then(|n| self.restart(n, image, id));
                if let Err(what) = begun {
                    self.clients.answer(id, &Response::Error { what });
                }
            }
            Request::Resume { name } => {
                self.clients.wait(id);
                let begun = self.driver_named(&name).and_then(|n| self.resume(n, id));
                if let Err(what) = begun {
                    self.clients.answer(id, &Response::Error { what });
                }
            }
            Request::Sleep => {
                self.clients.wait(id);
                self.sleep(id);
            }
            Request::Wake => {
                let slept = self.wake();
                self.clients.answer(id, &Response::Awake { slept });
            }
            Request::StartGuest { name } => {
                let done = self.start_guest(&name);
                self.answer_done(id, name, done);
            }
            Request::StopGuest { name, how } => {
                let done = self.stop_guest(&name, how);
                self.answer_done(id, name, done);
            }
            Request::RebootGuest { name, how } => {
                let done = self.reboot_guest(&name, how);
                self.answer_done(id, name, done);
            }
            Request::Resize { name, disk, bytes } => {
                self.clients.wait(id);
                if let Err(what) = self.resize(&name, disk, bytes, id) {
                    self.clients.answer(id, &Response::Error { what });
                }
            }
            Request::Nmi { name } => {
                let done = self.inject_nmi(&name);
                self.answer_done(id, name, done);
            }
            Request::Reload { check } => {
                self.clients.wait(id);
                if let Err(why) = self.reload(Some(id), check) {
                    self.answer_reload(Some(id), check, Err(why));
                }
            }
            Request::Stop { how } => {
                self.clients.answer(id, &Response::Stopping { how });
                let how = if self.stopping == Some(StopHow::Kill) { StopHow::Kill } else { how };
                self.stop(how, "`umbra stop`");
            }
        }
    }

    fn answer_done(&mut self, id: u64, name: String, done: Result<(), String>) {
        let response = done.map_or_else(|what| Response::Error { what }, |()| Response::Done { name });
        self.clients.answer(id, &response);
    }

    fn driver_named(&self, name: &str) -> Result<DriverId, String> {
        self.drivers.position(|driver| driver.name == name).ok_or_else(|| {
            let names: Vec<_> = self.drivers.iter().map(|driver| driver.name.as_str()).collect();
            match names.len() {
                0 => "this machine has no driver VMs".into(),
                _ => format!("there is no driver VM named {name}; there is {}", names.join(", ")),
            }
        })
    }

    fn crash(&mut self, name: &str, kind: CrashKind) -> Result<Response, String> {
        let n = self.driver_named(name)?;
        let state = self.drivers[n].lifecycle.state();
        if !matches!(
            state,
            State::Configuring { .. } | State::WaitingCarrier { .. } | State::GoingLive { .. } | State::Live { .. }
        ) {
            return Err(format!("{name} has no agent that could be told to crash: its state is {}", state.name()));
        }
        let generation = self.drivers[n].lifecycle.generation().map_or(0, Generation::get);
        let kind_name = serde_json::to_value(kind).ok().and_then(|kind| kind.as_str().map(String::from));
        self.events.tell(&Event::CrashRequested {
            driver: name.into(),
            generation,
            kind: kind_name.unwrap_or_default(),
        });
        match (kind, &self.drivers[n].life) {
            (CrashKind::LockUp, Some(life)) => {
                let sent = life.process.channel().send_now(&ToVm::LockUp, &[]);
                sent.map_err(|error| format!("{name}: its process cannot be told to lock it up: {error}"))?;
            }
            _ => self.tell_agent(n, &ToAgent::Crash { kind }),
        }
        Ok(Response::Crashing { name: name.into(), generation, kind })
    }

    fn ask_for_status(&mut self, id: u64) {
        if let Some(client) = self.clients.clients.get_mut(&id) {
            client.status_due = Some(Time::now() + STATUS_PATIENCE);
        }
        self.ask_vms();
    }

    /// Asks the processes of VMs how their vCPUs and devices are.
    pub(in crate::supervisor) fn ask_vms(&mut self) {
        for n in self.guests.ids() {
            if self.guests[n].expect_answers() {
                self.tell_guest(n, &ToVm::QueryStatus);
            }
        }
        // A life that may be saved at the moment would be disturbed.
        let lives = self.drivers.iter_mut().filter_map(|driver| driver.life.as_mut());
        for life in lives.filter(|life| !life.is_to_be_saved()) {
            if life.vcpus.expect() {
                // One that does not take it does not answer in time.
                let _ = life.process.channel().send_now(&ToVm::QueryStatus, &[]);
            }
        }
    }

    /// Answers the clients that asked for the status, once the guests have answered or their time is over.
    pub(in crate::supervisor) fn answer_status(&mut self, now: Time) {
        let mut lives = self.drivers.iter().filter_map(|driver| driver.life.as_ref());
        let complete = self.guests.iter().all(GuestVm::is_fresh) && lives.all(|life| life.vcpus.is_fresh());
        let due = |client: &Client| client.status_due.is_some_and(|due| complete || due <= now);
        let ids: Vec<_> = self.clients.clients.iter().filter(|(_, c)| due(c)).map(|(id, _)| *id).collect();
        for id in ids {
            let mut status = self.status();
            status.add_threads();
            let response = status.into();
            if let Some(client) = self.clients.clients.get_mut(&id) {
                client.status_due = None;
            }
            self.clients.answer(id, &response);
        }
    }

    pub(in crate::supervisor) fn status(&self) -> Status {
        let driver_name = |n: DriverId| self.drivers[n].name.clone();
        Status {
            name: self.run_dir.name().into(),
            pid: std::process::id(),
            guests: self.guests.iter().map(|guest| guest.status(driver_name)).collect(),
            drivers: self.drivers.iter().map(crate::supervisor::driver::DriverVm::status).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_that_have_gone_keep_nobody_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let mut clients = Clients::default();
        let connect = |clients: &mut Clients| {
            let client = UnixStream::connect(&path).unwrap();
            clients.accept(&listener, Time(0));
            client
        };
        let mut first: Vec<_> = (0..MAX_CLIENTS).map(|_| connect(&mut clients)).collect();
        let _refused = connect(&mut clients);
        assert_eq!((clients.clients.len(), clients.connected().count()), (MAX_CLIENTS, MAX_CLIENTS));
        let follower = Owed { after: 0, follow: true };
        (0..MAX_FOLLOWERS as u64).for_each(|id| clients.follow(id, follower));
        first.drain(..MAX_FOLLOWERS);
        // None of those that have gone was read yet.
        let _taken = connect(&mut clients);
        assert_eq!(clients.connected().count(), MAX_CLIENTS - MAX_FOLLOWERS + 1);
        let last = MAX_CLIENTS as u64;
        clients.follow(last, follower);
        assert!(clients.clients[&last].events.is_some_and(|owed| owed.follow));
    }

    #[test]
    fn the_end_of_events_is_said_as_any_other_answer() {
        assert_eq!(EVENTS_END, serde_json::to_string(&Versioned::new(&Response::EventsEnd)).unwrap());
    }
}
