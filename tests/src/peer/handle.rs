//! The bench's side of the peer process.

use std::io::{self, IoSliceMut, Read};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::{ONE_WIRE, Progress, Reply, Request, Tick};
use crate::bench::patience::scaled;
use crate::probe::wire::{Lines, write_line};

/// NICs a bench can have: as many TAP descriptors as one message is made to carry.
pub(crate) const MAX_NICS: usize = 8;

/// Longest time in which the peer, a process of this machine, may leave a question unanswered.
const SILENT: Duration = Duration::from_secs(60);

/// What can go wrong with the peer process.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// It cannot be started.
    #[error("cannot start the bench's peer {program}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It says that it cannot work here.
    #[error("{0}")]
    Refused(String),
    /// The socket to it.
    #[error("cannot talk to the bench's peer")]
    Talk(#[source] io::Error),
    /// Another answer than the question asks for.
    #[error("the bench's peer gave a wrong answer")]
    Protocol,
}

/// The peer process. Killed when dropped; its namespace and interfaces go with it.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    control: UnixStream,
    lines: Lines,
    taps: Vec<OwnedFd>,
}

impl Peer {
    /// Starts `probe peer` with one TAP interface for each NIC, each on a network of its own or all on one.
    ///
    /// # Errors
    /// No namespace or no TAP: the sentence says what to do.
    pub fn start(probe: &Path, nics: usize, one_wire: bool) -> Result<Self, PeerError> {
        let number = nics.min(MAX_NICS).to_string();
        let wires: &[&str] = if one_wire { &[ONE_WIRE] } else { &[] };
        Self::spawn(probe, &[&[number.as_str()], wires].concat(), nics)
    }

    /// Starts `probe peer` in this machine's own network.
    ///
    /// # Errors
    /// A port of [`super::ports`] is in use.
    pub fn here(probe: &Path) -> Result<Self, PeerError> {
        Self::spawn(probe, &["here"], 0)
    }

    fn spawn(probe: &Path, network: &[&str], nics: usize) -> Result<Self, PeerError> {
        let failed = |source| PeerError::Start { program: probe.display().to_string(), source };
        let (control, theirs) = UnixStream::pair().map_err(PeerError::Talk)?;
        control.set_read_timeout(Some(scaled(SILENT))).map_err(PeerError::Talk)?;
        let mut command = Command::new(probe);
        command.arg("peer").args(network).stdin(OwnedFd::from(theirs));
        // SAFETY: prctl is async-signal-safe and touches no memory of this process.
        unsafe {
            command.pre_exec(|| nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(Into::into));
        }
        let child = command.spawn().map_err(failed)?;
        drop(command);
        let mut peer = Self { child, control, lines: Lines::default(), taps: Vec::new() };
        match peer.first_reply()? {
            Reply::Ready if peer.taps.len() == nics => Ok(peer),
            Reply::Failed { what } => Err(PeerError::Refused(what)),
            _ => Err(PeerError::Protocol),
        }
    }

    fn first_reply(&mut self) -> Result<Reply, PeerError> {
        let mut buffer = [0; 4096];
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; MAX_NICS]);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let message =
            recvmsg::<()>(self.control.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
                .map_err(|e| PeerError::Talk(e.into()))?;
        let n = message.bytes;
        for part in message.cmsgs().map_err(|e| PeerError::Talk(e.into()))? {
            if let ControlMessageOwned::ScmRights(descriptors) = part {
                for fd in descriptors {
                    // SAFETY: the kernel has just made these descriptors for us; nobody else owns them.
                    self.taps.push(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        let mut reply = None;
        self.lines.push(&buffer[..n], |line| reply = Some(line));
        reply.ok_or(PeerError::Protocol)
    }

    /// Hands out the TAP descriptors, once.
    pub fn take_taps(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.taps)
    }

    fn ask(&mut self, request: &Request) -> Result<Reply, PeerError> {
        write_line(&self.control, request).map_err(PeerError::Talk)?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let n = self.control.read(&mut buffer).map_err(PeerError::Talk)?;
            if n == 0 {
                return Err(PeerError::Talk(io::ErrorKind::UnexpectedEof.into()));
            }
            let mut reply = None;
            self.lines.push(&buffer[..n], |line| reply = Some(line));
            if let Some(reply) = reply {
                return Ok(reply);
            }
        }
    }

    fn tell(&mut self, request: &Request) -> Result<(), PeerError> {
        match self.ask(request)? {
            Reply::Done => Ok(()),
            _ => Err(PeerError::Protocol),
        }
    }

    /// Offers a file of `bytes`, `rate` bytes a second, up to `allow` bytes for now.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn offer(&mut self, bytes: u64, rate: u64, allow: u64) -> Result<(), PeerError> {
        self.tell(&Request::Offer { bytes, rate, allow })
    }

    /// Lets the download go on to `bytes`.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn allow(&mut self, bytes: u64) -> Result<(), PeerError> {
        self.tell(&Request::Allow { bytes })
    }

    /// Begins to measure the longest stall anew.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn mark_stall(&mut self) -> Result<(), PeerError> {
        self.tell(&Request::MarkStall)
    }

    /// How far the downloads are.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn progress(&mut self) -> Result<Progress, PeerError> {
        match self.ask(&Request::Progress)? {
            Reply::Progress(progress) => Ok(progress),
            _ => Err(PeerError::Protocol),
        }
    }

    /// Asks `host`, with this address on the wire, 20 times a second from now on; its answers are ticks.
    ///
    /// # Errors
    /// The peer is gone, or cannot ask.
    pub fn ping(&mut self, host: Ipv4Addr, mac: [u8; 6]) -> Result<(), PeerError> {
        match self.ask(&Request::Ping { host, mac })? {
            Reply::Done => Ok(()),
            Reply::Failed { what } => Err(PeerError::Refused(what)),
            _ => Err(PeerError::Protocol),
        }
    }

    /// Sends `host`, with this address on the wire, more than it takes, for so long (30 s at most); how many datagrams of 1,400 bytes.
    ///
    /// # Errors
    /// The peer is gone, or cannot send.
    pub fn flood(&mut self, host: Ipv4Addr, mac: [u8; 6], time: Duration) -> Result<u64, PeerError> {
        let millis = u64::try_from(time.min(SILENT / 2).as_millis()).unwrap_or(0);
        match self.ask(&Request::Flood { host, mac, millis })? {
            Reply::Flooded { datagrams } => Ok(datagrams),
            Reply::Failed { what } => Err(PeerError::Refused(what)),
            _ => Err(PeerError::Protocol),
        }
    }

    /// The ticks since the last call.
    ///
    /// # Errors
    /// The peer is gone.
    pub fn take_ticks(&mut self) -> Result<Vec<Tick>, PeerError> {
        let mut all = Vec::new();
        loop {
            match self.ask(&Request::TakeTicks)? {
                Reply::Ticks { ticks, more } => {
                    all.extend(ticks);
                    if !more {
                        return Ok(all);
                    }
                }
                _ => return Err(PeerError::Protocol),
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
