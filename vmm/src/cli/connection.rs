//! A connection to a running machine's control socket.
//!
//! Invariant: it is said that a machine has ended only when nobody listens at its socket any more. A machine may close a
//! connection and live on: the client was idle and another one needed the place.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use crate::record::status::Status;
use crate::supervisor::front::protocol::{Request, Response};
use crate::supervisor::start::rundir;

/// Longest wait for a machine's answer; its loop never waits for anything.
const ANSWER: Duration = Duration::from_secs(10);

/// Connections that a machine may close without a word before it counts as ended. A machine that ends closes those that wait to be
/// accepted, and then listens no more.
const TRIES: u32 = 100;

/// Longest wait that `--timeout` can ask for, s: a year, which is for ever, and which clocks can count.
const LONGEST: u64 = 365 * 86_400;

/// What a machine of another version might answer.
pub(super) const UNEXPECTED: &str =
    "the machine gave an answer that this version does not know; is it of another version?";

/// When a wait of so many `seconds` that begins now is over.
pub(super) fn end_of_wait(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds.min(LONGEST))
}

/// A connection to a machine.
pub(super) struct Connection {
    pub(super) name: String,
    stream: BufReader<UnixStream>,
    /// The machine's socket.
    path: Option<PathBuf>,
}

/// The machine has ended, and with it the connection.
#[derive(Debug, thiserror::Error)]
#[error("the machine {0} ended before it answered")]
pub(super) struct Ended(String);

/// The machine has closed the connection and runs on.
#[derive(Debug, thiserror::Error)]
#[error(
    "the machine {0} runs, and closed the connection, which had been idle while other clients needed it; try again"
)]
pub(super) struct Dropped(String);

impl Connection {
    /// Connects to the machine `name`, or to the only one that runs.
    pub(super) fn open(name: Option<&str>) -> anyhow::Result<Self> {
        let (name, stream) = rundir::connect(&rundir::base(), name)?;
        Self::over(name, stream)
    }

    pub(super) fn over(name: String, stream: UnixStream) -> anyhow::Result<Self> {
        stream.set_read_timeout(Some(ANSWER)).context("talk to the machine")?;
        let path = stream.peer_addr().ok().and_then(|address| address.as_pathname().map(Path::to_owned));
        Ok(Self { name, stream: BufReader::new(stream), path })
    }

    /// Connects again, after [`Dropped`].
    pub(super) fn reopen(&mut self) -> anyhow::Result<()> {
        let Some(path) = &self.path else { bail!(Ended(self.name.clone())) };
        let stream = UnixStream::connect(path).map_err(|_| Ended(self.name.clone()))?;
        *self = Self::over(self.name.clone(), stream)?;
        Ok(())
    }

    /// Lets answers take any time from now on.
    pub(super) fn wait_for_ever(&self) -> anyhow::Result<()> {
        self.stream.get_ref().set_read_timeout(None).context("talk to the machine")
    }

    /// Lets answers take so long from now on.
    pub(super) fn wait_at_most(&self, patience: Duration) -> anyhow::Result<()> {
        self.stream.get_ref().set_read_timeout(Some(patience)).context("talk to the machine")
    }

    /// The machine's status, or of one of its VMs alone.
    pub(super) fn status(&mut self, vm: Option<&str>) -> anyhow::Result<Status> {
        let Response::Status(mut status) = self.ask(&Request::Status)? else { bail!(UNEXPECTED) };
        if let Some(vm) = vm
            && !status.retain(vm)
        {
            bail!("{} has no guest or driver VM named {vm}", self.name);
        }
        Ok(*status)
    }

    /// Hands each event behind number `after` to `each`, as a line; with `follow` until the machine ends.
    pub(super) fn events(
        &mut self,
        after: u64,
        follow: bool,
        mut each: impl FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        self.send(&Request::Events { after, follow })?;
        if follow {
            self.wait_for_ever()?;
        }
        loop {
            match self.line() {
                Ok(line) if line.starts_with("{\"response\"") => {
                    return match serde_json::from_str(&line).context(UNEXPECTED)? {
                        Response::Error { what } => bail!(what),
                        Response::EventsEnd => Ok(()),
                        _ => bail!(UNEXPECTED),
                    };
                }
                Ok(line) => each(line.trim_end())?,
                Err(error) if follow && error.is::<Ended>() => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn send(&mut self, request: &Request) -> anyhow::Result<()> {
        let what = || format!("talk to the machine {}", self.name);
        let request = format!("{}\n", serde_json::to_string(request).with_context(what)?);
        match self.stream.get_mut().write_all(request.as_bytes()) {
            // It has closed the connection, perhaps with a word: that is read in the place of the answer.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => Ok(()),
            result => result.with_context(what),
        }
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        match self.stream.read_line(&mut line) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let pid = process(self.stream.get_ref()).unwrap_or_default();
                bail!(
                    "the machine {} does not answer; its process {pid} is stopped or frozen, or hangs (`cat /proc/{pid}/stack`)",
                    self.name
                )
            }
            Err(error) if error.kind() != ErrorKind::ConnectionReset => {
                Err(error).with_context(|| format!("talk to the machine {}", self.name))
            }
            Ok(n) if n > 0 => Ok(line),
            _ if self.runs() => Err(Dropped(self.name.clone()).into()),
            _ => Err(Ended(self.name.clone()).into()),
        }
    }

    /// Whether the machine, which has closed this connection, still answers others. One that was started since is another.
    fn runs(&self) -> bool {
        let Some(path) = &self.path else { return false };
        let before = process(self.stream.get_ref());
        for _ in 0..TRIES {
            let Ok(stream) = UnixStream::connect(path) else { return false };
            if process(&stream) != before {
                return false;
            }
            match Self::over(self.name.clone(), stream).map(|other| other.answers()) {
                Ok(false) => {}
                Ok(true) | Err(_) => return true,
            }
        }
        false
    }

    /// Whether the machine answers a request, even with the error that it has too many clients. One that is too busy to answer in
    /// time counts as answering.
    fn answers(mut self) -> bool {
        let request = Request::Events { after: u64::MAX, follow: false };
        let mut line = String::new();
        self.send(&request).is_ok()
            && match self.stream.read_line(&mut line) {
                Ok(n) => n > 0,
                Err(error) => error.kind() != ErrorKind::ConnectionReset,
            }
    }

    /// Sends a request and waits for its answer; an error of the machine's is an error here.
    pub(super) fn ask(&mut self, request: &Request) -> anyhow::Result<Response> {
        self.send(request)?;
        let line = self.line()?;
        match serde_json::from_str(&line).context(UNEXPECTED)? {
            Response::Error { what } => bail!(what),
            response => Ok(response),
        }
    }

    /// Waits, for so many `seconds`, until the machine closes the connection, which it does at its end.
    pub(super) fn wait_for_the_end(&mut self, seconds: u64) -> anyhow::Result<()> {
        let until = end_of_wait(seconds);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "the guests of {} have not powered off after {seconds} s; `umbra stop --force` kills them",
                    self.name
                );
            }
            self.stream.get_ref().set_read_timeout(Some(left)).context("wait for the machine")?;
            match self.line() {
                Err(error) if error.is::<Ended>() => return Ok(()),
                Err(error) if error.is::<Dropped>() => return Err(error),
                Ok(_) | Err(_) => {}
            }
        }
    }
}

/// The process that listens at the other end of `stream`.
fn process(stream: &UnixStream) -> Option<i32> {
    getsockopt(stream, PeerCredentials).ok().map(|peer| peer.pid())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// A machine that closes its first connection after `words` and answers the next one.
    fn closes_the_first(words: &'static [u8]) -> (tempfile::TempDir, Connection) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let stream = UnixStream::connect(&path).unwrap();
        let (mut first, _) = listener.accept().unwrap();
        first.write_all(words).unwrap();
        drop(first);
        thread::spawn(move || {
            let (mut next, _) = listener.accept().unwrap();
            next.write_all(b"{\"response\":\"events-end\"}\n").unwrap();
            // Until the other end has read it.
            let _ = BufReader::new(next).read_line(&mut String::new());
        });
        (dir, Connection::over("m".into(), stream).unwrap())
    }

    #[test]
    fn a_machine_that_closes_a_connection_and_runs_on_has_not_ended() {
        let (_dir, mut machine) = closes_the_first(b"");
        let error = machine.ask(&Request::Status).unwrap_err();
        assert!(error.is::<Dropped>(), "{error}");
    }

    #[test]
    fn one_that_does_not_answer_is_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let _frozen = UnixListener::bind(&path).unwrap();
        let mut machine = Connection::over("m".into(), UnixStream::connect(&path).unwrap()).unwrap();
        machine.wait_at_most(Duration::from_millis(1)).unwrap();
        let said = machine.ask(&Request::Sleep).unwrap_err().to_string();
        assert!(
            said.starts_with(&format!("the machine m does not answer; its process {} is", std::process::id())),
            "{said}"
        );
    }

    #[test]
    fn what_a_machine_said_before_it_closed_the_connection_is_the_answer() {
        let (_dir, mut machine) = closes_the_first(b"{\"response\":\"error\",\"what\":\"too many clients\"}\n");
        assert_eq!(machine.ask(&Request::Status).unwrap_err().to_string(), "too many clients");
    }

    #[test]
    fn a_machine_that_listens_no_more_has_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let mut machine = Connection::over("m".into(), UnixStream::connect(&path).unwrap()).unwrap();
        drop(listener);
        assert!(machine.ask(&Request::Status).unwrap_err().is::<Ended>());
    }
}
