//! The control socket's end in the supervisor: few clients, short requests, nobody waited for.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nix::poll::PollFlags;
use umbra_driver_vm::protocol::{CrashKind, ToAgent};
use umbra_shadow::Generation;

use super::protocol::{MAX_REQUEST, Request, Response, StopHow};
use crate::base::lines::{LineError, Lines};
use crate::base::time::Time;
use crate::lifecycle::State;
use crate::record::events::Event;
use crate::record::recent::Past;
use crate::record::status::Status;
use crate::supervisor::guest::GuestVm;
use crate::supervisor::run::Supervisor;
use crate::wire::messages::ToVm;

/// Clients at a time; more wait in the socket's queue. `umbra` itself holds one for a moment.
const MAX_CLIENTS: usize = 16;

/// How long guests may take to say how their network devices are; a guest that hangs shows what it said before.
const STATUS_PATIENCE: Duration = Duration::from_millis(250);

/// [`Response::EventsEnd`] as a line.
const EVENTS_END: &str = r#"{"response":"events-end"}"#;

/// The connected clients.
#[derive(Debug, Default)]
pub(in crate::supervisor) struct Clients {
    clients: BTreeMap<u64, Client>,
    next_id: u64,
}

#[derive(Debug)]
struct Client {
    lines: Lines<UnixStream>,
    /// A status is owed, at the latest at this time.
    status_due: Option<Time>,
    /// Events are owed.
    events: Option<Owed>,
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
    pub(in crate::supervisor) fn accept(&mut self, listener: &UnixListener) {
        let Ok((stream, _)) = listener.accept() else { return };
        if self.clients.len() >= MAX_CLIENTS || stream.set_nonblocking(true).is_err() {
            return;
        }
        let client = Client { lines: Lines::new(stream, MAX_REQUEST), status_due: None, events: None };
        self.clients.insert(self.next_id, client);
        self.next_id += 1;
    }

    pub(in crate::supervisor) fn watched(&self) -> impl Iterator<Item = (u64, BorrowedFd<'_>, PollFlags)> {
        self.clients.iter().map(|(id, client)| {
            let more = if client.lines.has_unsent() { PollFlags::POLLOUT } else { PollFlags::empty() };
            (*id, client.lines.stream().as_fd(), PollFlags::POLLIN | more)
        })
    }

    pub(in crate::supervisor) fn deadline(&self) -> Option<Time> {
        self.clients.values().filter_map(|client| client.status_due).min()
    }

    /// Sends each client the events it is owed, as far as it reads: one that does not holds a line, not the past.
    pub(in crate::supervisor) fn tell_events(&mut self, past: &Past) {
        self.clients.retain(|_, client| client.tell_events(past).is_ok());
    }

    pub(in crate::supervisor) fn answer(&mut self, id: u64, response: &Response) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let sent = serde_json::to_string(response).is_ok_and(|line| client.lines.send(&line).is_ok());
        if !sent {
            self.clients.remove(&id);
        }
    }
}

impl Client {
    fn tell_events(&mut self, past: &Past) -> Result<(), LineError> {
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
        let flushed = client.lines.flush();
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
        if error.is_some() || flushed.is_err() {
            self.clients.clients.remove(&id);
        }
    }

    fn on_request(&mut self, id: u64, request: Request) {
        match request {
            Request::Status => self.ask_for_status(id),
            Request::Events { after, follow } => {
                if let Some(client) = self.clients.clients.get_mut(&id) {
                    client.events = Some(Owed { after, follow });
                }
            }
            Request::Crash { name, kind } => {
                let response = self.crash(&name, kind).unwrap_or_else(|what| Response::Error { what });
                self.clients.answer(id, &response);
            }
            Request::Restart { name, image } => {
                let begun = self.driver_named(&name).and_then(|n| self.restart(n, image.as_deref(), id));
                if let Err(what) = begun {
                    self.clients.answer(id, &Response::Error { what });
                }
            }
            Request::Resume { name } => {
                let begun = self.driver_named(&name).and_then(|n| self.resume(n, id));
                if let Err(what) = begun {
                    self.clients.answer(id, &Response::Error { what });
                }
            }
            Request::Stop { how } => {
                self.clients.answer(id, &Response::Stopping { how });
                let how = if self.stopping == Some(StopHow::Kill) { StopHow::Kill } else { how };
                self.stop(how, "`umbra stop`");
            }
        }
    }

    fn driver_named(&self, name: &str) -> Result<usize, String> {
        self.drivers.iter().position(|driver| driver.name == name).ok_or_else(|| {
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
        for n in 0..self.guests.len() {
            let guest = &self.guests[n];
            if guest.nets.iter().any(|net| net.driver.is_some()) || guest.sounds.iter().any(|s| s.driver.is_some()) {
                self.guests[n].nets.iter_mut().for_each(|net| net.fresh = false);
                self.guests[n].sounds.iter_mut().for_each(|sound| sound.fresh = false);
                self.tell_guest(n, &ToVm::QueryStatus);
            }
        }
    }

    /// Answers those who asked for the status, once the guests have said theirs or have taken too long.
    pub(in crate::supervisor) fn answer_status(&mut self, now: Time) {
        let complete = self.guests.iter().all(GuestVm::is_fresh);
        let due = |client: &Client| client.status_due.is_some_and(|due| complete || due <= now);
        let ids: Vec<_> = self.clients.clients.iter().filter(|(_, c)| due(c)).map(|(id, _)| *id).collect();
        for id in ids {
            let response = self.status().into();
            if let Some(client) = self.clients.clients.get_mut(&id) {
                client.status_due = None;
            }
            self.clients.answer(id, &response);
        }
    }

    pub(in crate::supervisor) fn status(&self) -> Status {
        let driver_name = |n: usize| self.drivers[n].name.clone();
        Status {
            name: self.run_dir.name().into(),
            pid: std::process::id(),
            guests: self.guests.iter().map(|guest| guest.status(driver_name)).collect(),
            drivers: self.drivers.iter().map(crate::supervisor::driver::DriverVm::status).collect(),
        }
    }
}
