//! A console port to the host: found by its name, never blocking; what the host does not take at once waits.
//!
//! A port outlives the host's sessions. When the host has closed its end, reading gives the end of the stream at once, and
//! poll(2) reports that again and again: so the port is watched edge-triggered, which wakes for a change alone. A port
//! that has passed bytes in either direction is closed and opened again before the next session: with that the kernel
//! forgets what is left of the one before, and the host sees that it has.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use umbra_driver_vm::sound_protocol::{
    FromHost, FromService, MAX_EARLIER_BYTES, SOUND_PORT, Taken, decode, encode_service,
};
use umbra_shadow::{Generation, LinkId};

use crate::fault::Fault;

/// Longest wait for the ports to appear; those of one device come one by one. Far above what a slow machine takes: it is
/// there for a VM that was given fewer ports than guests.
const APPEARS_WITHIN: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(2);
/// Most that is taken at one look, so that a host that talks without end does not keep the card waiting. The rest waits
/// with the host.
const MAX_INCOMING: usize = 256 * 1024;
/// Most that waits for a host that does not read.
const MAX_UNSENT: usize = 1 << 20;
/// More than that waits for a host that reads slowly: its process may stand still for a moment, which is nobody's fault.
const BEHIND: usize = 256 * 1024;
/// Most messages of a host in a second: a replay at once of all that its shadow keeps (8 MiB) in periods of a tenth of a
/// kilobyte. More is a host that keeps this service busy.
pub const MESSAGES_PER_SECOND: u32 = 100_000;
const SECOND: Duration = Duration::from_secs(1);

/// Waits until the ports of `guests` guests are there; their devices, in the order of their numbers.
pub fn wait(guests: usize) -> anyhow::Result<Vec<PathBuf>> {
    let started = Instant::now();
    loop {
        let ports = find_all();
        if !ports.is_empty() && ports.len() >= guests {
            return Ok(ports);
        }
        if started.elapsed() > APPEARS_WITHIN {
            bail!("{} console ports {SOUND_PORT}.N of {guests} have appeared", ports.len());
        }
        std::thread::sleep(POLL);
    }
}

fn find_all() -> Vec<PathBuf> {
    let mut ports = Vec::new();
    for port in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        let number = name.trim().strip_prefix(SOUND_PORT).and_then(|rest| rest.strip_prefix('.')?.parse::<u16>().ok());
        if let Some(number) = number {
            let device = PathBuf::from("/dev").join(port.file_name());
            if device.exists() {
                ports.push((number, device));
            }
        }
    }
    ports.sort();
    ports.into_iter().map(|(_, path)| path).collect()
}

/// What reading has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// Everything that there was.
    All,
    /// Part of what there is: reading goes on without waiting.
    Part,
    /// The host has closed its end, or has not opened it yet.
    End,
}

/// Opens the port's device.
type Opener = Box<dyn FnMut() -> io::Result<File> + Send>;

/// An open port.
pub struct Port {
    opener: Opener,
    /// `None` only while it is being opened again.
    file: Option<File>,
    epoll: Epoll,
    /// Watched for room to write.
    watches_room: bool,
    generation: Generation,
    /// The session that has begun.
    link: Option<LinkId>,
    incoming: Vec<u8>,
    /// Bytes of `incoming` that are taken already.
    taken: usize,
    unsent: Vec<u8>,
    came: Came,
    /// Bytes have passed since it was opened.
    touched: bool,
    /// Bytes of earlier sessions that were skipped since it was opened.
    earlier: usize,
    heard: Heard,
}

/// How many messages came in a second.
#[derive(Clone, Copy, Debug)]
pub struct Heard {
    since: Instant,
    messages: u32,
}

impl Heard {
    /// None yet.
    pub fn new(now: Instant) -> Self {
        Self { since: now, messages: 0 }
    }

    /// Counts a message; false if it is one too many.
    pub fn count(&mut self, now: Instant) -> bool {
        if now.duration_since(self.since) >= SECOND {
            *self = Self::new(now);
        }
        self.messages += 1;
        self.messages <= MESSAGES_PER_SECOND
    }
}

impl Port {
    pub fn open(path: &Path, generation: Generation) -> anyhow::Result<Self> {
        let device = path.to_owned();
        let open = move || {
            let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
            OpenOptions::new().read(true).write(true).custom_flags(flags).open(&device)
        };
        Self::new(Box::new(open), generation)
            .with_context(|| format!("cannot open the console port {}", path.display()))
    }

    /// A port that `opener` opens, non-blocking.
    pub fn new(opener: Opener, generation: Generation) -> anyhow::Result<Self> {
        let mut port = Self {
            opener,
            file: None,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot watch a port")?,
            watches_room: false,
            generation,
            link: None,
            incoming: Vec::new(),
            taken: 0,
            unsent: Vec::new(),
            came: Came::Part,
            touched: false,
            earlier: 0,
            heard: Heard::new(Instant::now()),
        };
        port.reopen()?;
        Ok(port)
    }

    /// Ends the session: closes the port, with all that is left of it, and opens it again.
    pub fn reopen(&mut self) -> anyhow::Result<()> {
        // First: a port can be open once. Closing ends its being watched.
        self.file = None;
        let file = (self.opener)().context("cannot open a console port again")?;
        self.watches_room = false;
        self.epoll.add(&file, watch(false)).context("cannot watch a console port")?;
        self.file = Some(file);
        (self.link, self.taken, self.came, self.touched, self.earlier) = (None, 0, Came::Part, false, 0);
        self.heard = Heard::new(Instant::now());
        self.incoming.clear();
        self.unsent.clear();
        Ok(())
    }

    /// A session may have been here: before the next, the port has to be opened again.
    pub fn is_touched(&self) -> bool {
        self.touched
    }

    /// Waits until something changes, at most for `longest`; false if nothing did.
    pub fn wait(&mut self, longest: Duration) -> anyhow::Result<bool> {
        if self.came == Came::Part {
            return Ok(true);
        }
        let room = !self.unsent.is_empty();
        if let Some(file) = self.file.as_ref().filter(|_| self.watches_room != room) {
            self.epoll.modify(file, &mut watch(room)).context("cannot watch a console port")?;
            self.watches_room = room;
        }
        let millis = u16::try_from(longest.as_millis()).unwrap_or(u16::MAX);
        match self.epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::from(millis)) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(true),
            Err(error) => Err(error).context("cannot wait for the host"),
        }
    }

    /// Sends a message of the session; nothing if none has begun.
    pub fn send(&mut self, message: &FromService) -> Result<(), Fault> {
        let Some(link) = self.link else { return Ok(()) };
        encode_service(message, link, &mut self.unsent);
        if self.unsent.len() > MAX_UNSENT {
            return Err(Fault::Session("the host does not read".into()));
        }
        self.flush()
    }

    /// More than a little waits for the host.
    pub fn is_behind(&self) -> bool {
        self.unsent.len() > BEHIND
    }

    pub fn flush(&mut self) -> Result<(), Fault> {
        let Some(file) = &mut self.file else { return Ok(()) };
        while !self.unsent.is_empty() {
            match file.write(&self.unsent) {
                Ok(0) => break,
                Ok(written) => {
                    self.touched = true;
                    self.unsent.drain(..written);
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => break,
                Err(error) => return Err(Fault::Session(format!("cannot write to the host: {error}"))),
            }
        }
        Ok(())
    }

    /// Takes what the host has sent.
    pub fn receive(&mut self) -> Result<Came, Fault> {
        let Some(file) = &mut self.file else { return Ok(Came::End) };
        let mut chunk = [0; 32 * 1024];
        self.incoming.drain(..std::mem::take(&mut self.taken));
        self.came = Came::Part;
        while self.came == Came::Part && self.incoming.len() < MAX_INCOMING {
            match file.read(&mut chunk) {
                Ok(0) => self.came = Came::End,
                Ok(length) => {
                    self.touched = true;
                    self.incoming.extend_from_slice(&chunk[..length]);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.came = Came::All,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Fault::Session(format!("cannot read from the host: {error}"))),
            }
        }
        Ok(self.came)
    }

    /// The next whole message. With [`FromHost::Begin`] its session is the one that messages are sent in.
    pub fn next_message(&mut self) -> Result<Option<FromHost>, Fault> {
        loop {
            let current = self.link.map(|link| link.attempt);
            let decoded = decode(&self.incoming[self.taken..], self.generation, current);
            let decoded = decoded.map_err(|error| Fault::Session(format!("the host sent nonsense: {error}")))?;
            let Some((taken, link, length)) = decoded else { return Ok(None) };
            self.taken += length;
            if !self.heard.count(Instant::now()) {
                return Err(Fault::Session(format!("more than {MESSAGES_PER_SECOND} messages a second")));
            }
            match taken {
                Taken::Message(message) => {
                    self.link = Some(link);
                    return Ok(Some(message));
                }
                Taken::Earlier => self.earlier += length,
            }
            if self.earlier > MAX_EARLIER_BYTES {
                return Err(Fault::Session(format!("more than {MAX_EARLIER_BYTES} bytes of earlier sessions")));
            }
        }
    }
}

/// How a port is watched; its end is reported in any case.
fn watch(room: bool) -> EpollEvent {
    let room = if room { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET | room, 0)
}
