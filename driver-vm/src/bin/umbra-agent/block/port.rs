//! A console port to the host for records: one read takes one buffer of its queue, one write fills one. Never blocks; what the host has
//! no buffer for waits.
//!
//! A port outlives the host's sessions. When the host has closed its end, reading gives the end of the stream at once, and poll(2)
//! reports that again and again: so the port is watched edge-triggered. The host may be back before its going is seen, so a port stays
//! open for the next session; what is left of the one before is known by its number. Closing it ends the session that is there.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use umbra_driver_vm::block_protocol::{BLOCK_PORT, MAX_BATCH, RECORD_BYTES};

/// Longest buffer of the host, in bytes: one more than is allowed, so that a longer one shows.
pub const MAX_BUFFER: usize = MAX_BATCH * RECORD_BYTES + 1;

/// What a read has brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// A buffer with this number of bytes.
    Buffer(usize),
    /// Nothing more for now.
    Nothing,
    /// The host has closed its end, or has not opened it yet.
    End,
}

/// Opens the port's device, non-blocking.
pub type Opener = Box<dyn FnMut() -> io::Result<File> + Send>;

/// An open port.
pub struct Port {
    opener: Opener,
    /// `None` only while it is being opened again.
    file: Option<File>,
    /// Buffers that the host has not taken yet.
    unsent: VecDeque<Vec<u8>>,
    /// Watched for room to write.
    watches_room: bool,
    /// Its number with whoever waits for it.
    number: u64,
}

/// The device of the port of end `end`, if it is there.
pub fn find(class: &Path, end: usize) -> Option<PathBuf> {
    let wanted = format!("{BLOCK_PORT}.{end}");
    let is_wanted = |port: &Path| fs::read_to_string(port.join("name")).is_ok_and(|name| name.trim() == wanted);
    let port = fs::read_dir(class).ok()?.flatten().find(|port| is_wanted(&port.path()))?;
    Some(Path::new("/dev").join(port.file_name()))
}

/// Opens the port's device at this path.
pub fn opener(device: PathBuf) -> Opener {
    let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
    Box::new(move || OpenOptions::new().read(true).write(true).custom_flags(flags).open(&device))
}

impl Port {
    /// Opens it, and watches it under this number.
    ///
    /// # Errors
    /// When it cannot be opened or watched.
    pub fn open(opener: Opener, epoll: &Epoll, number: u64) -> anyhow::Result<Self> {
        let mut port = Self { opener, file: None, unsent: VecDeque::new(), watches_room: false, number };
        port.reopen(epoll)?;
        Ok(port)
    }

    /// Closes it, with all that is left in it, and opens it again.
    ///
    /// # Errors
    /// When it cannot be opened or watched.
    pub fn reopen(&mut self, epoll: &Epoll) -> anyhow::Result<()> {
        // First: a port can be open once. Closing ends its being watched.
        self.file = None;
        self.unsent.clear();
        let file = (self.opener)().context("cannot open a console port")?;
        epoll.add(&file, self.watch(false)).context("cannot watch a console port")?;
        self.watches_room = false;
        self.file = Some(file);
        Ok(())
    }

    /// Reads a buffer of the host's.
    ///
    /// # Errors
    /// When the port fails.
    pub fn receive(&mut self, buffer: &mut [u8; MAX_BUFFER]) -> anyhow::Result<Came> {
        let Some(file) = &mut self.file else { return Ok(Came::End) };
        loop {
            match file.read(buffer) {
                Ok(0) => return Ok(Came::End),
                Ok(length) => return Ok(Came::Buffer(length)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Came::Nothing),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Of a socket, with what it was sent unread.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(Came::End),
                Err(error) => return Err(error).context("cannot read from a console port"),
            }
        }
    }

    /// Sends a buffer, or keeps it until the host has room.
    ///
    /// # Errors
    /// When the port fails.
    pub fn send(&mut self, buffer: Vec<u8>) -> anyhow::Result<()> {
        self.unsent.push_back(buffer);
        if self.unsent.len() == 1 { self.flush() } else { Ok(()) }
    }

    /// Sends what waits, as far as the host has room.
    ///
    /// # Errors
    /// When the port fails.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        while let Some(buffer) = self.unsent.front() {
            match file.write(buffer) {
                Ok(written) if written == buffer.len() => drop(self.unsent.pop_front()),
                Ok(_) => anyhow::bail!("a console port has taken part of a buffer"),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The host is gone, as the next read says.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => self.unsent.clear(),
                Err(error) => return Err(error).context("cannot write to a console port"),
            }
        }
        Ok(())
    }

    /// Forgets what waits: the host that it was for is gone.
    pub fn forget(&mut self) {
        self.unsent.clear();
    }

    /// Something waits for room.
    pub fn is_full(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Watches for room if something waits for it, and only then: each answer that the host takes would wake.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn watch_room(&mut self, epoll: &Epoll) -> anyhow::Result<()> {
        let room = self.is_full();
        if let Some(file) = self.file.as_ref().filter(|_| self.watches_room != room) {
            epoll.modify(file, &mut self.watch(room)).context("cannot watch a console port")?;
            self.watches_room = room;
        }
        Ok(())
    }

    /// Its end is reported in any case.
    fn watch(&self, room: bool) -> EpollEvent {
        let room = if room { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
        EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET | room, self.number)
    }
}
