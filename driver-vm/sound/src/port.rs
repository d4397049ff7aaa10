//! A console port to the host: found by its name, never blocking; what the host does not take at once waits.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use umbra_driver_vm::sound_protocol::{FromService, SOUND_PORT, decode, encode_service};
use umbra_shadow::Generation;
use umbra_shadow::sound::ToCard;

/// How long the ports may take to appear; those of one device come one by one.
const APPEARS_WITHIN: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(2);
/// Most that is taken at one look, so that a host that talks without end does not keep the card waiting. The rest waits
/// with the host.
const MAX_INCOMING: usize = 256 * 1024;
/// Most that waits for a host that does not read.
const MAX_UNSENT: usize = 1 << 20;

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

/// An open port.
#[derive(Debug)]
pub struct Port {
    file: File,
    generation: Generation,
    incoming: Vec<u8>,
    /// Bytes of `incoming` that are taken already.
    taken: usize,
    unsent: Vec<u8>,
}

impl Port {
    pub fn open(path: &Path, generation: Generation) -> anyhow::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(path)
            .with_context(|| format!("cannot open the console port {}", path.display()))?;
        Ok(Self { file, generation, incoming: Vec::new(), taken: 0, unsent: Vec::new() })
    }

    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub fn wants_to_write(&self) -> bool {
        !self.unsent.is_empty()
    }

    pub fn send(&mut self, message: &FromService) -> anyhow::Result<()> {
        encode_service(message, self.generation, &mut self.unsent);
        if self.unsent.len() > MAX_UNSENT {
            bail!("the host does not read");
        }
        self.flush()
    }

    pub fn flush(&mut self) -> anyhow::Result<()> {
        while !self.unsent.is_empty() {
            match self.file.write(&self.unsent) {
                Ok(written) => drop(self.unsent.drain(..written)),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => break,
                Err(error) => return Err(error).context("cannot write to the host"),
            }
        }
        Ok(())
    }

    /// Takes what the host has sent. `false`: the host has closed its end.
    pub fn receive(&mut self) -> anyhow::Result<bool> {
        let mut chunk = [0; 32 * 1024];
        self.incoming.drain(..std::mem::take(&mut self.taken));
        while self.incoming.len() < MAX_INCOMING {
            match self.file.read(&mut chunk) {
                Ok(0) => return Ok(false),
                Ok(length) => self.incoming.extend_from_slice(&chunk[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot read from the host"),
            }
        }
        Ok(true)
    }

    /// The next whole message.
    pub fn next_message(&mut self) -> anyhow::Result<Option<ToCard>> {
        let decoded = decode(&self.incoming[self.taken..], self.generation).context("the host sent nonsense")?;
        Ok(decoded.map(|(message, length)| {
            self.taken += length;
            message
        }))
    }
}
