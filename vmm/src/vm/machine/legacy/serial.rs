//! COM1: a 16550 whose output goes to the terminal, a file or nowhere ([`Output`]). Output is handed on byte by byte as it
//! comes, so that the last words of a VM that dies are kept.

use std::io;

use thiserror::Error;
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::output::{self, Output};
use crate::config::Console;

/// Errors of the serial line.
#[derive(Debug, Error)]
pub enum Error {
    /// No eventfd.
    #[error("create an eventfd for the serial line")]
    EventFd(#[source] io::Error),
    /// Its output.
    #[error(transparent)]
    Output(#[from] output::Error),
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
    uart: Serial<Interrupt, Drained, Output>,
}

impl SerialLine {
    /// A line to `console` that interrupts by `interrupt`.
    pub fn new(console: &Console, interrupt: EventFd) -> Result<Self, Error> {
        Self::with_output(Output::open(console)?, interrupt)
    }

    fn with_output(out: Output, interrupt: EventFd) -> Result<Self, Error> {
        let drained = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::EventFd)?;
        Ok(Self { uart: Serial::with_events(Interrupt(interrupt), Drained(drained), out) })
    }

    /// Waits a bounded time until what the guest has printed is written.
    pub fn finish_output(&self) {
        self.uart.writer().finish();
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
        line.finish_output();
        assert_eq!(std::fs::read(file.path()).unwrap(), b"before after");
    }

    #[test]
    fn a_terminal_that_nobody_reads_costs_the_guest_nothing() {
        use std::io::Read;
        use std::os::fd::AsFd;

        let (mut reader, pipe) = io::pipe().unwrap();
        let shared = pipe.as_fd().try_clone_to_owned().unwrap();
        let output = Output::to(std::fs::File::from(std::os::fd::OwnedFd::from(pipe))).unwrap();
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut line = SerialLine::with_output(output, interrupt.try_clone().unwrap()).unwrap();
        // Several times what the pipe and the buffer hold: this returns, or the test hangs.
        for n in 0..2_000_000u32 {
            line.write(0, if n % 64 == 63 { b'\n' } else { b'x' });
        }
        line.write(1, 1);
        line.input(b"k");
        assert_eq!((line.read(0), interrupt.read().unwrap()), (b'k', 1), "input goes on");
        let flags = nix::fcntl::fcntl(&shared, nix::fcntl::FcntlArg::F_GETFL).unwrap();
        assert_eq!(flags & nix::fcntl::OFlag::O_NONBLOCK.bits(), 0, "others share it");
        drop(shared);
        // When it is read again, what did not fit is counted in its place.
        let reading = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).map(|_| text).unwrap()
        });
        line.finish_output();
        b"the end".iter().for_each(|byte| line.write(0, *byte));
        drop(line);
        let text = reading.join().unwrap();
        let (before, rest) = text.split_once("\r\n[umbra: ").unwrap();
        let (lost, end) = rest.split_once(" bytes of the console's output are lost here]\r\n").unwrap();
        let end = end.strip_suffix("the end").unwrap();
        assert_eq!(before.len() + lost.parse::<usize>().unwrap() + end.len(), 2_000_000);
        assert!(end.len() >= 64 << 10, "the last words are kept");
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
