//! COM1: a 16550 whose output goes to the terminal, a file or nowhere. Output is written through, a byte at a
//! time, so that the last words of a VM that dies are kept.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::PathBuf;

use thiserror::Error;
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::Console;

/// Errors of the serial line.
#[derive(Debug, Error)]
pub enum Error {
    /// No eventfd.
    #[error("create an eventfd for the serial line")]
    EventFd(#[source] io::Error),
    /// The console's file.
    #[error("open the console file {path}")]
    Open {
        /// Which.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the terminal's reader that there is room for more input.
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // A full counter means that the reader knows already.
        let _ = self.0.write(1);
    }
}

/// The serial line.
pub struct SerialLine {
    uart: Serial<Interrupt, Drained, Box<dyn Write + Send>>,
}

impl SerialLine {
    /// A line to `console` that interrupts by `interrupt`.
    pub fn new(console: &Console, interrupt: EventFd) -> Result<Self, Error> {
        let out: Box<dyn Write + Send> = match console {
            Console::Off => Box::new(io::sink()),
            Console::Terminal => Box::new(io::stdout()),
            Console::File(path) => {
                let opened = OpenOptions::new().append(true).create(true).open(path);
                Box::new(opened.map_err(|source| Error::Open { path: path.clone(), source })?)
            }
        };
        let drained = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::EventFd)?;
        Ok(Self { uart: Serial::with_events(Interrupt(interrupt), Drained(drained), out) })
    }

    /// Readable when the guest has read all input.
    pub fn drained(&self) -> &EventFd {
        &self.uart.events().0
    }

    /// How many bytes of input fit now.
    pub fn room(&self) -> usize {
        self.uart.fifo_capacity()
    }

    /// Input for the guest; what does not fit is lost.
    pub fn input(&mut self, bytes: &[u8]) {
        if let Err(error) = self.uart.enqueue_raw_bytes(bytes) {
            tracing::debug!(%error, "input to the serial line");
        }
    }

    pub(in crate::vm::machine) fn read(&mut self, offset: u16) -> u8 {
        u8::try_from(offset).map_or(0xff, |offset| self.uart.read(offset))
    }

    pub(super) fn write(&mut self, offset: u16, value: u8) {
        let Ok(offset) = u8::try_from(offset) else { return };
        if let Err(error) = self.uart.write(offset, value) {
            tracing::debug!(%error, "output of the serial line");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn line(console: &Console) -> (SerialLine, EventFd) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        (SerialLine::new(console, interrupt.try_clone().unwrap()).unwrap(), interrupt)
    }

    #[test]
    fn output_is_appended_to_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "before ").unwrap();
        let (mut line, _) = line(&Console::File(file.path().to_owned()));
        b"after".iter().for_each(|byte| line.write(0, *byte));
        assert_eq!(std::fs::read(file.path()).unwrap(), b"before after");
    }

    #[test]
    fn input_interrupts_and_is_read() {
        let (mut line, interrupt) = line(&Console::Off);
        line.write(1, 1); // receive interrupts on
        line.input(b"x");
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(line.read(5) & 1, 1);
        assert_eq!(line.read(0), b'x');
        assert_eq!(line.drained().read().unwrap(), 1);
    }
}
