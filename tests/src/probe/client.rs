//! The exec protocol's client: starts scripts over a Unix socket that ends in a machine's virtio-console port.
//!
//! One reader thread hands answers to the runs they belong to. Every wait ends when nothing has been said for its limit.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::wire::{Lines, Reply, Request, write_line};

/// What a script left behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Exit status, or 128 + signal.
    pub status: i32,
}

impl Output {
    /// The script ended with status 0.
    pub fn ok(&self) -> bool {
        self.status == 0
    }
}

/// What went wrong between client and server.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket could not be reached.
    #[error("cannot connect to {path}")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The exec server does not answer.
    #[error("the exec server did not answer within {0:?}")]
    Silent(Duration),
    /// A run was given up.
    #[error("the script did not end, and nothing was printed for {limit:.0?}; so far it printed:\n{so_far}")]
    Deadline {
        /// The longest silence allowed.
        limit: Duration,
        /// Both outputs until then.
        so_far: String,
    },
    /// The other end is gone.
    #[error("the machine went away while the script ran; so far it printed:\n{so_far}")]
    Gone {
        /// Both outputs until then.
        so_far: String,
    },
    /// Writing failed.
    #[error("cannot send to the exec server")]
    Send(#[source] io::Error),
}

type Waiting = Arc<Mutex<HashMap<u64, Sender<Reply>>>>;

/// A connection to an exec server.
#[derive(Clone)]
pub struct Client {
    out: Arc<Mutex<UnixStream>>,
    waiting: Waiting,
}

/// How long a server may take nothing while its end of the stream is full.
const FULL: Duration = Duration::from_secs(10);

/// Waits for an answer before it is asked for again: the first, and the longest of those after it, each twice as long as the one before.
/// A machine that boots for minutes reads nothing meanwhile, and its end of the stream takes some 270 short lines.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// Ids are unique in this process and unlikely to be those of an earlier client of the same port.
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

fn draw_id() -> u64 {
    let n = NEXT_ID.fetch_add(1, Ordering::Relaxed);
    (u64::from(std::process::id()) << 32) | n
}

impl Client {
    /// Connects to `path` and waits until the server answers; both within `patience`.
    ///
    /// # Errors
    /// The last connection error, or [`ClientError::Silent`].
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, ClientError> {
        let start = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if start.elapsed() < patience => thread::sleep(Duration::from_millis(50)),
                Err(source) => return Err(ClientError::Connect { path: path.display().to_string(), source }),
            }
        };
        let client = Self::new(stream).map_err(ClientError::Send)?;
        client.hello(patience.saturating_sub(start.elapsed()).max(Duration::from_millis(500)))?;
        Ok(client)
    }

    /// Wraps a connected stream; does not wait for the server.
    ///
    /// # Errors
    /// No second handle or no thread to be had.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        // A machine that hangs reads nothing: when its end is full, a write would wait for ever.
        stream.set_write_timeout(Some(FULL))?;
        let reader = stream.try_clone()?;
        let waiting = Waiting::default();
        let routes = waiting.clone();
        thread::Builder::new().name("exec-client".into()).spawn(move || read_replies(reader, &routes))?;
        // Ends a line that an earlier client may have left unfinished.
        (&stream).write_all(b"\n")?;
        Ok(Self { out: Arc::new(Mutex::new(stream)), waiting })
    }

    /// Waits until the server answers.
    ///
    /// # Errors
    /// [`ClientError::Silent`] after `patience`.
    pub fn hello(&self, patience: Duration) -> Result<(), ClientError> {
        let start = Instant::now();
        let (token, answers) = self.expect_replies();
        let (mut pause, longest) = ASK_AGAIN;
        while start.elapsed() < patience {
            match self.send(&Request::Hello { token }) {
                // It is full of what was asked before, which may be answered yet.
                Err(ClientError::Send(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => sent?,
            }
            if answers.recv_timeout(pause.min(patience.saturating_sub(start.elapsed()))).is_ok() {
                self.forget(token);
                return Ok(());
            }
            pause = (2 * pause).min(longest);
        }
        self.forget(token);
        Err(ClientError::Silent(patience))
    }

    /// Starts a script; it runs beside others.
    ///
    /// # Errors
    /// The request could not be sent.
    pub fn start(&self, script: &str) -> Result<Run, ClientError> {
        let (id, replies) = self.expect_replies();
        self.send(&Request::Run { id, script: script.to_owned() })?;
        Ok(Run { id, replies, client: self.clone(), output: Output::default(), ended: false })
    }

    fn expect_replies(&self) -> (u64, Receiver<Reply>) {
        let id = draw_id();
        let (sender, receiver) = channel();
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, sender);
        (id, receiver)
    }

    fn forget(&self, id: u64) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    fn send(&self, request: &Request) -> Result<(), ClientError> {
        let out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        write_line(&*out, request).map_err(ClientError::Send)
    }
}

fn read_replies(mut from: UnixStream, waiting: &Waiting) {
    let mut lines = Lines::default();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        lines.push(&buffer[..n], |reply: Reply| {
            let (Reply::Hello { token: id }
            | Reply::Stdout { id, .. }
            | Reply::Stderr { id, .. }
            | Reply::Exit { id, .. }) = &reply;
            let waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(run) = waiting.get(id) {
                let _ = run.send(reply);
            }
        });
    }
    waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// A script under way. Dropped before its end, it is killed.
pub struct Run {
    id: u64,
    replies: Receiver<Reply>,
    client: Client,
    output: Output,
    ended: bool,
}

impl Run {
    /// Takes what comes within `limit`; `true` once the script has ended.
    ///
    /// # Errors
    /// [`ClientError::Gone`].
    pub fn poll(&mut self, limit: Duration) -> Result<bool, ClientError> {
        self.poll_each(limit, |_| ())
    }

    /// As [`Self::poll`], and shows each answer to `see`.
    ///
    /// # Errors
    /// [`ClientError::Gone`].
    pub fn poll_each(&mut self, limit: Duration, mut see: impl FnMut(&Reply)) -> Result<bool, ClientError> {
        let until = Instant::now() + limit;
        while !self.ended {
            match self.replies.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(reply) => {
                    see(&reply);
                    self.take(reply);
                }
                Err(RecvTimeoutError::Timeout) => return Ok(false),
                Err(RecvTimeoutError::Disconnected) => return Err(ClientError::Gone { so_far: self.so_far() }),
            }
        }
        Ok(true)
    }

    /// Takes one answer, waiting for it within `limit`, and shows it to `see`; `true` once the script has ended.
    ///
    /// # Errors
    /// [`ClientError::Gone`].
    pub fn poll_some(&mut self, limit: Duration, mut see: impl FnMut(&Reply)) -> Result<bool, ClientError> {
        if self.ended {
            return Ok(true);
        }
        match self.replies.recv_timeout(limit) {
            Ok(reply) => {
                see(&reply);
                self.take(reply);
                Ok(self.ended)
            }
            Err(RecvTimeoutError::Timeout) => Ok(false),
            Err(RecvTimeoutError::Disconnected) => Err(ClientError::Gone { so_far: self.so_far() }),
        }
    }

    fn take(&mut self, reply: Reply) {
        match reply {
            Reply::Stdout { text, .. } => self.output.stdout.push_str(&text),
            Reply::Stderr { text, .. } => self.output.stderr.push_str(&text),
            Reply::Exit { status, .. } => {
                self.output.status = status;
                self.ended = true;
                self.client.forget(self.id);
            }
            Reply::Hello { .. } => {}
        }
    }

    /// What it printed until now.
    pub fn output(&self) -> &Output {
        &self.output
    }

    fn so_far(&self) -> String {
        format!("{}{}", self.output.stdout, self.output.stderr)
    }

    /// Waits for its end; gives it up when it has printed nothing for `limit`.
    ///
    /// # Errors
    /// [`ClientError::Deadline`] (the script is killed), or [`ClientError::Gone`].
    pub fn wait(mut self, limit: Duration) -> Result<Output, ClientError> {
        loop {
            let mut printed = false;
            if self.poll_some(limit, |_| printed = true)? {
                return Ok(std::mem::take(&mut self.output));
            }
            if !printed {
                return Err(ClientError::Deadline { limit, so_far: self.so_far() });
            }
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.client.send(&Request::Kill { id: self.id });
            self.client.forget(self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::serve::serve;
    use std::fs::File;
    use std::os::fd::OwnedFd;

    fn pair() -> Client {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let port = File::from(OwnedFd::from(theirs));
        thread::spawn(move || serve(port));
        let client = Client::new(ours).unwrap();
        client.hello(Duration::from_secs(60)).unwrap();
        client
    }

    #[test]
    fn a_machine_that_reads_nothing_is_not_waited_for_without_end() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let socket = ours.try_clone().unwrap();
        let client = Client::new(ours).unwrap();
        assert_eq!(socket.write_timeout().unwrap(), Some(FULL));
        socket.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        assert!(matches!(client.start(&"x".repeat(4 << 20)), Err(ClientError::Send(_))));
        assert!(matches!(client.hello(Duration::from_millis(500)), Err(ClientError::Silent(_))));
    }

    #[test]
    fn a_machine_that_boots_for_long_is_asked_seldom_and_answers_in_the_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let client = Client::new(ours).unwrap();
        let start = Instant::now();
        let asked = thread::spawn(move || client.hello(Duration::from_secs(60)));
        thread::sleep(Duration::from_secs(3));
        let mut so_far = vec![0; 64 << 10];
        let length = theirs.read(&mut so_far).unwrap();
        let lines = so_far[..length].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
        // Four times within 3 s, and from then on in 5 s each.
        let most = 5 + usize::try_from(start.elapsed().as_secs() / 5).unwrap();
        assert!((1..=most).contains(&lines), "{lines} times");
        thread::spawn(move || serve(File::from(OwnedFd::from(theirs))));
        asked.join().unwrap().unwrap();
    }

    #[test]
    fn output_and_status_come_back() {
        let run = pair().start("echo out; echo err >&2; exit 3").unwrap();
        let output = run.wait(Duration::from_secs(60)).unwrap();
        assert_eq!(output, Output { stdout: "out\n".into(), stderr: "err\n".into(), status: 3 });
    }

    #[test]
    fn runs_go_side_by_side() {
        let client = pair();
        let slow = client.start("sleep 2; echo slow").unwrap();
        let quick = client.start("echo quick").unwrap();
        assert_eq!(quick.wait(Duration::from_secs(60)).unwrap().stdout, "quick\n");
        assert_eq!(slow.wait(Duration::from_secs(60)).unwrap().stdout, "slow\n");
    }

    #[test]
    fn a_script_that_prints_is_not_given_up() {
        let run = pair().start("for n in 1 2 3 4 5 6; do echo $n; sleep 0.5; done").unwrap();
        assert!(run.wait(Duration::from_secs(2)).unwrap().stdout.ends_with("6\n"));
    }

    #[test]
    fn a_deadline_shows_what_was_printed() {
        let run = pair().start("echo begun; sleep 100").unwrap();
        let error = run.wait(Duration::from_millis(500)).unwrap_err();
        assert!(error.to_string().contains("begun"), "{error}");
    }
}
