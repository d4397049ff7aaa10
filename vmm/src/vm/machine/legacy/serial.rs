//! COM1: a 16550 whose output goes to the terminal, a file or nowhere ([`Output`]). Output is handed on byte by byte as it
//! comes, so that the last words of a VM that dies are kept. (A driver VM's bytes come together, at its next exit: `coalesced`.)
//!
//! To who polls, as a kernel that prints does, the transmitter is always ready. To who waits for its interrupt it is busy for as
//! long as a FIFO takes at 115,200 baud: an interrupt handler that always finds it ready goes on sending, and Linux's sends
//! 8,192 bytes in one interrupt, in which its processor does nothing else.
//!
//! The line is the VM's console for the host: where the guest's console is hvc0, that prints by [`SerialLine::print`], and what is
//! typed goes there instead of into the FIFO.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerFd, TimerSetTimeFlags};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::backlog::Backlog;
use super::output::{self, Output};
use crate::base::timer;
use crate::config::Console;

/// Errors of the serial line.
#[derive(Debug, Error)]
pub enum Error {
    /// No eventfd.
    #[error("create an eventfd for the serial line")]
    EventFd(#[source] io::Error),
    /// No timer.
    #[error("create a timer for the serial line (timerfd)")]
    Timer(#[source] nix::Error),
    /// Its output.
    #[error(transparent)]
    Output(#[from] output::Error),
}

/// Registers and bits of a 16550, as its data sheet has them.
mod register {
    pub(super) const DATA: u16 = 0;
    pub(super) const INTERRUPT_ENABLE: u16 = 1;
    pub(super) const INTERRUPT_IDENTIFICATION: u16 = 2;
    pub(super) const LINE_CONTROL: u16 = 3;
    pub(super) const MODEM_CONTROL: u16 = 4;
    pub(super) const SCRATCH: u16 = 7;
    /// Of the two above: the transmitter is empty.
    pub(super) const TRANSMITTER: u8 = 0b10;
    /// Of the interrupt identification: input, and the empty transmitter; together they would be another one, an error of the line.
    pub(super) const BOTH: u8 = 0b110;
    /// Of the interrupt identification: which it is.
    pub(super) const WHICH: u8 = 0b1110;
    /// Of the interrupt identification: there is none.
    pub(super) const NO_INTERRUPT: u8 = 0b1;
    /// Of the line control: the first two registers are the divisor's.
    pub(super) const DIVISOR: u8 = 0x80;
}

/// Bytes in a 16550's FIFO.
const FIFO: u32 = 16;
/// Most bytes that wait for hvc0: a pasted page; what is typed beyond stays where it is typed.
const TYPED: usize = 4096;
/// How long a FIFO takes at 115,200 baud, ten bits for each byte.
const FIFO_TIME: Duration = Duration::from_micros(1389);

struct Interrupt {
    event: EventFd,
    /// What is to be told is held back.
    held: Cell<bool>,
}

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if self.held.get() { Ok(()) } else { self.event.write(1) }
    }
}

/// Tells the terminal's reader and the viewers that there is room for more input.
struct Drained {
    terminal: EventFd,
    viewers: EventFd,
}

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // A full counter means that the reader knows already.
        let _ = self.terminal.write(1);
        let _ = self.viewers.write(1);
    }
}

/// A snapshot's part: what the guest has set up.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
}

/// The serial line.
pub struct SerialLine {
    uart: Serial<Interrupt, Drained, Output>,
    /// Bytes since the transmitter was busy last.
    sent: u32,
    /// The transmitter's interrupt is held back until the timer expires.
    busy: bool,
    timer: TimerFd,
    /// hvc0, if what is typed goes there.
    hvc: Option<Typed>,
}

/// What is typed and hvc0 has not taken yet.
struct Typed {
    bytes: VecDeque<u8>,
    /// Tells hvc0 that there is something.
    news: EventFd,
}

impl SerialLine {
    /// A line to `console`, and to `backlog` if there is one, that interrupts by `interrupt`.
    pub fn new(console: &Console, backlog: Option<Arc<Backlog>>, interrupt: EventFd) -> Result<Self, Error> {
        Self::with_output(Output::open(console)?.with_backlog(backlog), interrupt)
    }

    fn with_output(out: Output, interrupt: EventFd) -> Result<Self, Error> {
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::EventFd);
        let drained = Drained { terminal: eventfd()?, viewers: eventfd()? };
        let timer = timer::monotonic();
        let interrupt = Interrupt { event: interrupt, held: Cell::new(false) };
        let uart = Serial::with_events(interrupt, drained, out);
        Ok(Self { uart, sent: 0, busy: false, timer: timer.map_err(Error::Timer)?, hvc: None })
    }

    /// Waits a bounded time until what the guest has printed is written.
    pub fn finish_output(&self) {
        self.uart.writer().finish();
    }

    /// Readable when the guest has read all input.
    pub fn drained(&self) -> &EventFd {
        &self.uart.events().terminal
    }

    /// As [`Self::drained`], for another reader of input.
    pub fn drained_for_viewers(&self) -> &EventFd {
        &self.uart.events().viewers
    }

    /// How many bytes of input fit now.
    pub fn room(&self) -> usize {
        self.hvc.as_ref().map_or_else(|| self.uart.fifo_capacity(), |typed| TYPED - typed.bytes.len())
    }

    /// Input for the guest; what does not fit is lost.
    pub fn input(&mut self, bytes: &[u8]) {
        if let Some(typed) = &mut self.hvc {
            let room = TYPED - typed.bytes.len();
            typed.bytes.extend(&bytes[..bytes.len().min(room)]);
            // A full counter means that it is heard of already.
            let _ = typed.news.write(1);
            return;
        }
        if let Err(error) = self.uart.enqueue_raw_bytes(bytes) {
            tracing::debug!(%error, "input to the serial line");
        }
    }

    /// From now on what is typed is for hvc0 ([`Self::take_typed`]). An eventfd that is readable when there is something.
    ///
    /// # Errors
    /// There is no eventfd.
    pub fn type_at_hvc(&mut self) -> io::Result<EventFd> {
        let news = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        self.hvc = Some(Typed { bytes: VecDeque::new(), news: news.try_clone()? });
        Ok(news)
    }

    /// Fills `buffer` with what was typed for hvc0; how many bytes that were.
    pub fn take_typed(&mut self, buffer: &mut [u8]) -> usize {
        let Some(typed) = &mut self.hvc else { return 0 };
        let length = typed.bytes.read(buffer).unwrap_or_default();
        if length > 0 && typed.bytes.is_empty() {
            self.uart.events().in_buffer_empty();
        }
        length
    }

    /// hvc0 prints `bytes`.
    pub fn print(&mut self, bytes: &[u8]) {
        // Writing to it never fails.
        let _ = self.uart.writer_mut().write_all(bytes);
    }

    pub(in crate::vm) fn read(&mut self, offset: u16) -> u8 {
        let mut value = self.register(offset);
        if offset != register::INTERRUPT_IDENTIFICATION {
            return value;
        }
        if self.busy {
            value &= !register::TRANSMITTER;
        }
        // One at a time: input comes first, and the other is told behind it.
        if value & register::BOTH == register::BOTH {
            value &= !register::TRANSMITTER;
            self.tell_again();
        }
        if value & register::WHICH == 0 { value | register::NO_INTERRUPT } else { value }
    }

    pub(in crate::vm) fn write(&mut self, offset: u16, value: u8) {
        let divisor = self.register(register::LINE_CONTROL) & register::DIVISOR != 0;
        let waits = !divisor && self.register(register::INTERRUPT_ENABLE) & register::TRANSMITTER != 0;
        match offset {
            register::DATA if waits => {
                self.sent += 1;
                if self.sent >= FIFO {
                    self.begin_busy();
                }
            }
            // Who only now waits is told at once, as its data sheet says.
            register::INTERRUPT_ENABLE if !divisor && !waits && value & register::TRANSMITTER != 0 => self.end_busy(),
            _ => {}
        }
        self.uart.interrupt_evt().held.set(self.busy && offset == register::DATA);
        self.set_register(offset, value);
        self.uart.interrupt_evt().held.set(false);
    }

    fn register(&mut self, offset: u16) -> u8 {
        u8::try_from(offset).map_or(0xff, |offset| self.uart.read(offset))
    }

    fn set_register(&mut self, offset: u16, value: u8) {
        let Ok(offset) = u8::try_from(offset) else { return };
        if let Err(error) = self.uart.write(offset, value) {
            tracing::debug!(%error, "output of the serial line");
        }
    }

    fn begin_busy(&mut self) {
        self.sent = 0;
        let once = Expiration::OneShot(TimeSpec::from_duration(FIFO_TIME));
        match self.timer.set(once, TimerSetTimeFlags::empty()) {
            Ok(()) => self.busy = true,
            Err(error) => tracing::debug!(%error, "set the serial line's timer"),
        }
    }

    fn end_busy(&mut self) {
        (self.busy, self.sent) = (false, 0);
        if let Err(error) = self.timer.unset() {
            tracing::debug!(%error, "unset the serial line's timer");
        }
    }

    /// The state; what it has sent is sent.
    ///
    /// # Errors
    /// Input waits, which the guest of another life must not read: what is the matter, as a clause.
    pub(super) fn save(&self) -> Result<SerialState, String> {
        let uart = self.uart.state();
        if !uart.in_buffer.is_empty() {
            return Err("has input that the guest has not read".into());
        }
        Ok(SerialState {
            divisor: [uart.baud_divisor_low, uart.baud_divisor_high],
            interrupt_enable: uart.interrupt_enable,
            line_control: uart.line_control,
            modem_control: uart.modem_control,
            scratch: uart.scratch,
        })
    }

    /// Sets the line up as the guest has set it up. A guest that waits for the transmitter's interrupt gets it.
    pub(super) fn restore(&mut self, state: &SerialState) {
        let [low, high] = state.divisor;
        self.set_register(register::LINE_CONTROL, register::DIVISOR);
        self.set_register(register::DATA, low);
        self.set_register(register::INTERRUPT_ENABLE, high);
        self.set_register(register::LINE_CONTROL, state.line_control & !register::DIVISOR);
        self.set_register(register::MODEM_CONTROL, state.modem_control);
        self.set_register(register::SCRATCH, state.scratch);
        self.set_register(register::INTERRUPT_ENABLE, state.interrupt_enable);
        self.set_register(register::LINE_CONTROL, state.line_control);
    }

    /// The transmitter is ready: its interrupt, if it is enabled, is told now.
    fn ready(&mut self) {
        if self.register(register::LINE_CONTROL) & register::DIVISOR != 0 {
            return self.begin_busy();
        }
        self.end_busy();
        self.tell_again();
    }

    /// What is enabled and pending is told when it is enabled again. Not while the divisor is in the register's place.
    fn tell_again(&mut self) {
        if self.register(register::LINE_CONTROL) & register::DIVISOR == 0 {
            let enabled = self.register(register::INTERRUPT_ENABLE);
            self.set_register(register::INTERRUPT_ENABLE, enabled);
        }
    }
}

impl MutEventSubscriber for SerialLine {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new_raw(self.timer.as_fd().as_raw_fd(), EventSet::IN)) {
            tracing::warn!(%error, "listen to the serial line's timer");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // It is set anew, or unset, by what has been written meanwhile.
        if self.timer.wait().is_ok() && self.busy {
            self.ready();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn line(console: &Console) -> (SerialLine, EventFd) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        (SerialLine::new(console, None, interrupt.try_clone().unwrap()).unwrap(), interrupt)
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
        const MARK: &str = "\r\n[umbra: ";

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
        let text = text.strip_suffix("the end").unwrap();
        // The thread that writes may be slow before the pipe is full, too: there is a mark for each loss.
        let (first, marked) = text.split_once(MARK).unwrap();
        let (mut accounted, mut end) = (first.len(), "");
        for part in marked.split(MARK) {
            let (lost, printed) = part.split_once(" bytes of the console's output are lost here]\r\n").unwrap();
            accounted += lost.parse::<usize>().unwrap() + printed.len();
            end = printed;
        }
        assert_eq!(accounted, 2_000_000);
        assert!(end.len() >= 64 << 10, "the last words are kept");
    }

    /// What Linux's interrupt handler does: sends a FIFO while an interrupt is pending. How many bytes it sent.
    fn handled(line: &mut SerialLine) -> u32 {
        let mut sent = 0;
        while line.read(2) & 1 == 0 && sent < 8192 {
            assert_eq!(line.read(5) & 0x20, 0x20, "who polls finds it ready");
            (0..16).for_each(|_| line.write(0, b'x'));
            sent += 16;
        }
        sent
    }

    #[test]
    fn an_interrupt_handler_gets_a_pause_after_each_fifo_and_is_told_afterwards() {
        let (mut line, interrupt) = line(&Console::Off);
        line.write(1, 2); // transmitter's interrupt on
        for _ in 0..3 {
            assert_eq!(interrupt.read().unwrap(), 1);
            assert_eq!(handled(&mut line), 16);
            // Bytes before the last interrupted: there is nothing to do then.
            let _ = interrupt.read();
            assert_eq!(handled(&mut line), 0);
            nix::poll::poll(
                &mut [nix::poll::PollFd::new(line.timer.as_fd(), nix::poll::PollFlags::POLLIN)],
                nix::poll::PollTimeout::NONE,
            )
            .unwrap();
            line.ready();
        }
        // Input does not wait for it.
        assert_eq!((interrupt.read().unwrap(), handled(&mut line)), (1, 16));
        line.write(1, 3);
        line.input(b"k");
        assert!(interrupt.read().is_ok());
        assert_eq!((line.read(2) & 0b1111, line.read(0)), (0b100, b'k'));
        // Nor does who begins to wait, as a driver that tries the interrupt at its start.
        line.write(1, 0);
        line.write(1, 2);
        assert_eq!(line.read(2) & 0b11, 0b10);
    }

    #[test]
    fn input_and_an_empty_transmitter_are_told_one_after_the_other() {
        let (mut line, interrupt) = line(&Console::Off);
        line.write(1, 3);
        line.input(b"ab");
        interrupt.read().unwrap();
        // Both at once are the code of a third: an error of the line.
        assert_eq!((line.read(2) & 0b1111, line.read(2) & 0b1111), (0b100, 0b100), "until it is read");
        assert_eq!((line.read(0), line.read(0)), (b'a', b'b'));
        assert_eq!((line.read(2) & 0b1111, line.read(2) & 0b1111), (0b010, 0b001), "told once");
    }

    #[test]
    fn who_polls_is_not_held_up_and_holds_nobody_up() {
        let (mut line, _) = line(&Console::Off);
        (0..1000).for_each(|_| line.write(0, b'x'));
        assert!(!line.busy);
        line.write(3, 0x80); // the divisor's registers
        (0..100).for_each(|_| line.write(0, 1));
        assert!(!line.busy);
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
