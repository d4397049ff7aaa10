//! The control port to the host: a virtio-console port, found by its name. Reads and writes never block; what the host
//! does not take at once waits in a bounded buffer.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use umbra_driver_vm::lines::{LineError, LineReader, to_line};
use umbra_driver_vm::protocol::{CONTROL_PORT, FromAgent, ToAgent};

/// Longest wait for the port to appear, while the virtio modules are loading.
const APPEARS_WITHIN: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(2);
/// Most bytes that wait for a host that does not read; messages beyond that are dropped. A host that is this far behind has given
/// the VM up.
const MAX_PENDING: usize = 64 * 1024;

/// The open control port.
#[derive(Debug)]
pub struct Port {
    file: File,
    reader: LineReader,
    pending: Vec<u8>,
}

impl Port {
    /// Waits for the port and opens it.
    ///
    /// # Errors
    /// When it does not appear or cannot be opened.
    pub fn open() -> anyhow::Result<Self> {
        let started = Instant::now();
        let device = loop {
            match find() {
                Some(device) => break device,
                None if started.elapsed() > APPEARS_WITHIN => bail!("there is no console port {CONTROL_PORT}"),
                None => std::thread::sleep(POLL),
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(&device)
            .with_context(|| format!("cannot open the console port {}", device.display()))?;
        Ok(Self { file, reader: LineReader::new(), pending: Vec::new() })
    }

    /// For polling.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Something waits to be written.
    pub fn wants_to_write(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Sends a message, or keeps it until the host takes it.
    ///
    /// # Errors
    /// When the port fails.
    pub fn send(&mut self, message: &FromAgent) -> anyhow::Result<()> {
        self.send_all(std::slice::from_ref(message))
    }

    /// Sends messages in one write, or keeps them until the host takes them.
    ///
    /// # Errors
    /// When the port fails.
    pub fn send_all(&mut self, messages: &[FromAgent]) -> anyhow::Result<()> {
        for message in messages {
            let line = to_line(message).context("cannot write a message to the host")?;
            if self.pending.len() + line.len() <= MAX_PENDING {
                self.pending.extend_from_slice(&line);
            }
        }
        self.flush()
    }

    /// Writes what waits, as far as the host takes it.
    ///
    /// # Errors
    /// When the port fails.
    pub fn flush(&mut self) -> anyhow::Result<()> {
        while !self.pending.is_empty() {
            match self.file.write(&self.pending) {
                Ok(written) => drop(self.pending.drain(..written)),
                Err(error) if would_block(&error) => break,
                Err(error) => return Err(error).context("cannot write to the control port"),
            }
        }
        Ok(())
    }

    /// Takes what the host has sent. `false`: the host has closed its end.
    ///
    /// # Errors
    /// When the port fails.
    pub fn receive(&mut self) -> anyhow::Result<bool> {
        let mut chunk = [0; 4096];
        match self.file.read(&mut chunk) {
            Ok(0) => Ok(false),
            Ok(length) => {
                self.reader.feed(&chunk[..length]);
                Ok(true)
            }
            Err(error) if would_block(&error) => Ok(true),
            Err(error) => Err(error).context("cannot read from the control port"),
        }
    }

    /// The next whole message of the host's.
    ///
    /// # Errors
    /// When it breaks the protocol.
    pub fn next_message(&mut self) -> Result<Option<ToAgent>, LineError> {
        self.reader.next_message()
    }
}

fn would_block(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn find() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    let port = ports
        .flatten()
        .find(|port| fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == CONTROL_PORT))?;
    let device = PathBuf::from("/dev").join(port.file_name());
    device.exists().then_some(device)
}
