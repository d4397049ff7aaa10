//! The loop between the ports and the ring, one thread for all ends. It sleeps until a port has a buffer, the ring a result, or the main
//! loop an order; whatever is there is handled together: one submission for all records, one write for all answers of an end.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use umbra_driver_vm::block_protocol::{AT_WORK_INTERVAL, MAX_DEPTH};
use umbra_driver_vm::protocol::FromAgent;
use umbra_shadow::block::SECTOR_BYTES;

use super::port::{Came, MAX_BUFFER, Opener, Port};
use super::resets::Resets;
use super::ring::{self, Ring, Token};
use super::session::{Name, Sessions, Work};
use crate::kernel_log;
use crate::orders::Mailbox;

/// Buffers of one port that are read before others have their turn.
const TURN: usize = 8;
/// Actions in flight of one end at most: an order for each tag, and the flush after a session.
pub const MAX_ACTIONS: u32 = MAX_DEPTH as u32 + 1;
/// Longest time with orders of an end at its disk and no answer, while a flush, zeroes or a discard is among them. Above the 60 s that
/// Linux gives a disk for a flush, so that its drivers' own errors come first; below the 120 s after which a guest's kernel says that a
/// task hangs. Without any of them it is the end's `io_timeout_ms`. The host looks too, but does not know of what is left of a session
/// that is over, and does not believe one guest alone where others are served.
const SILENCE: Duration = Duration::from_secs(90);
/// The result of whatever was under way on a disk that is gone.
const LET_GO: i32 = -(Errno::ENODEV as i32);
/// Bits of a [`Token`] that are the action's name within its end.
const NAME_BITS: u32 = Name::BITS;
/// Numbers of what is waited for and is no port.
const RING: u64 = u64::MAX;
const MAILBOX: u64 = u64::MAX - 1;

/// One guest's disk.
struct End {
    port: Port,
    sessions: Sessions,
    disk: Arc<File>,
    /// The port may have something to read.
    readable: bool,
    /// It can be written to for the first time since it was full.
    is_ready: bool,
    /// Longest time without an answer to reads and writes.
    patience: Duration,
    /// When the disk has answered an order of this end last, or had none.
    answered: Instant,
}

/// The disk service at work.
pub struct BlockService {
    ring: Ring,
    ends: Vec<End>,
    epoll: Epoll,
    resets: Resets,
    mailbox: Arc<Mailbox>,
    /// Orders are taken no more.
    stalled: bool,
    /// The host waits for the disks to be at rest.
    rests: bool,
    /// When the hosts were told last of what may take long, or there was nothing of that kind.
    told: Instant,
    /// A disk that its driver has let go of.
    lost_disk: bool,
    results: Vec<(Token, i32)>,
    buffer: Box<[u8; MAX_BUFFER]>,
}

impl BlockService {
    /// A service without ends.
    ///
    /// # Errors
    /// When the kernel has no descriptor left.
    pub fn new(ring: Ring, resets: Resets, mailbox: Arc<Mailbox>) -> anyhow::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("cannot wait for ports")?;
        let watch = |descriptor: BorrowedFd<'_>, number| {
            let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, number);
            epoll.add(descriptor, event).context("cannot wait for the disk")
        };
        ring.descriptors().into_iter().try_for_each(|descriptor| watch(descriptor, RING))?;
        watch(mailbox.descriptor(), MAILBOX)?;
        let (results, buffer) = (Vec::new(), Box::new([0; MAX_BUFFER]));
        Ok(Self {
            ring,
            ends: Vec::new(),
            epoll,
            resets,
            mailbox,
            stalled: false,
            rests: false,
            told: Instant::now(),
            lost_disk: false,
            results,
            buffer,
        })
    }

    /// Opens the port of the next end, which has these sessions with this disk; without an answer to reads and writes for `patience`, the
    /// disk counts as stalled.
    ///
    /// # Errors
    /// When the port cannot be opened.
    pub fn add(
        &mut self,
        opener: Opener,
        sessions: Sessions,
        disk: Arc<File>,
        patience: Duration,
    ) -> anyhow::Result<()> {
        let port = Port::open(opener, &self.epoll, self.ends.len() as u64)?;
        let answered = Instant::now();
        self.ends.push(End { port, sessions, disk, readable: true, is_ready: false, patience, answered });
        Ok(())
    }

    /// Serves until something fails; `report` takes what the host is to know.
    pub fn run(mut self, report: impl Fn(FromAgent)) -> anyhow::Error {
        loop {
            if let Err(error) = self.turn() {
                return error;
            }
            for (number, end) in (0..).zip(&mut self.ends) {
                if let Some((attempt, errno)) = end.sessions.take_error() {
                    report(FromAgent::DiskError { end: number, attempt, errno: errno as i32 });
                }
            }
            if self.rests && self.ends.iter().all(|end| end.sessions.is_idle()) {
                self.rests = false;
                let hides_a_loss = self.ends.iter().any(|end| end.sessions.hides_a_loss());
                report(FromAgent::AtRest { stable: self.flush() && !hides_a_loss });
            }
        }
    }

    /// Flushes each disk, although each session has flushed its own: what the host asks for last is to be sure. It may wait for the disks,
    /// which nobody else uses by now.
    fn flush(&self) -> bool {
        let flushed = self.ends.iter().map(|end| end.disk.sync_data());
        let failed: Vec<_> = flushed.filter_map(Result::err).collect();
        failed.iter().for_each(|error| kernel_log::error(&format!("the last flush has failed: {error}")));
        failed.is_empty()
    }

    fn turn(&mut self) -> anyhow::Result<()> {
        self.wait()?;
        let now = Instant::now();
        self.ends.iter_mut().filter(|end| end.sessions.work().is_none()).for_each(|end| end.answered = now);
        if !self.has_slow_work() {
            self.told = now;
        }
        if !self.stalled {
            self.ends.iter_mut().try_for_each(|end| end.hear(&mut self.buffer))?;
        }
        self.hand_over()?;
        self.ring.results(&mut self.results);
        // After the results are there, and before one is passed on: a reset that lies before any of them is in the log by now.
        if !self.results.is_empty() && self.resets.look() {
            self.ends.iter_mut().for_each(|end| end.sessions.cache_lost());
        }
        self.return_results();
        if self.told.elapsed() >= AT_WORK_INTERVAL {
            self.told = Instant::now();
            self.ends.iter_mut().for_each(|end| end.sessions.say_at_work());
        }
        self.ends.iter_mut().try_for_each(|end| end.answer(&self.epoll))?;
        if self.lost_disk {
            bail!("the driver has let go of its disk");
        }
        for (number, end) in self.ends.iter().enumerate() {
            if end.due().is_some_and(|due| due.is_zero()) {
                bail!(
                    "the disk of end {number} has answered nothing for {} s, though orders are under way",
                    end.answered.elapsed().as_secs()
                );
            }
        }
        self.hand_over()
    }

    /// Waits until there is something to do. Nothing that was left unfinished waits.
    fn wait(&mut self) -> anyhow::Result<()> {
        let has_more = !self.stalled && self.ends.iter().any(End::can_hear);
        let silence = self.ends.iter().filter_map(End::due).min();
        let word = self.has_slow_work().then(|| AT_WORK_INTERVAL.saturating_sub(self.told.elapsed()));
        let timeout = match (has_more, silence.into_iter().chain(word).min()) {
            (true, _) => EpollTimeout::ZERO,
            (false, None) => EpollTimeout::NONE,
            (false, Some(due)) => EpollTimeout::try_from(due + Duration::from_millis(1)).unwrap_or(EpollTimeout::MAX),
        };
        let mut events = [EpollEvent::empty(); 16];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            // The kernel interrupts the wait for a result as well.
            Err(Errno::EINTR) => return Ok(()),
            Err(error) => return Err(error).context("cannot wait for orders"),
        };
        for event in &events[..count] {
            if event.data() == MAILBOX {
                let orders = self.mailbox.take();
                self.stalled |= orders.stall;
                self.rests |= orders.rest;
            }
            let number = usize::try_from(event.data()).unwrap_or(usize::MAX);
            if let Some(end) = self.ends.get_mut(number) {
                end.readable = true;
                end.is_ready |= event.events().contains(EpollFlags::EPOLLOUT);
                if event.events().contains(EpollFlags::EPOLLHUP) {
                    end.host_is_gone();
                }
            }
        }
        Ok(())
    }

    fn has_slow_work(&self) -> bool {
        self.ends.iter().any(|end| end.sessions.work() == Some(Work::Slow))
    }

    fn hand_over(&mut self) -> anyhow::Result<()> {
        for (number, end) in (0u64..).zip(&mut self.ends) {
            while let Some((name, action)) = end.sessions.next_action() {
                self.ring.push(Token(number << NAME_BITS | u64::from(name)), &end.disk, action)?;
            }
        }
        self.ring.submit()
    }

    fn return_results(&mut self) {
        let now = Instant::now();
        for (Token(token), result) in self.results.drain(..) {
            let end = usize::try_from(token >> NAME_BITS).ok().and_then(|number| self.ends.get_mut(number));
            let name = Name::try_from(token & u64::from(Name::MAX));
            let (Some(end), Ok(name)) = (end, name) else { continue };
            end.answered = now;
            let result = end.judge(result);
            self.lost_disk |= result == LET_GO;
            if let Err(error) = end.sessions.result(name, result) {
                kernel_log::error(&format!("a flush has failed: {error}"));
                let disk = Arc::clone(&end.disk);
                let others = self.ends.iter_mut().filter(|end| Arc::ptr_eq(&end.disk, &disk));
                others.for_each(|end| end.sessions.cache_lost());
            }
        }
    }
}

impl End {
    /// A result as it is to be reported. The kernel says of a disk whose driver has gone that there is no space on it, or that it does not
    /// offer what it did offer, which would be the truth about the disk: it is the driver's failure.
    fn judge(&self, result: i32) -> i32 {
        let expected = self.sessions.disk().identity.sectors * SECTOR_BYTES;
        if result >= 0 || ring::size(&self.disk).is_ok_and(|bytes| bytes == expected) {
            return result;
        }
        LET_GO
    }

    /// Time until the disk counts as stalled, unless it has nothing to answer.
    fn due(&self) -> Option<Duration> {
        let patience = match self.sessions.work()? {
            Work::Quick => self.patience,
            Work::Slow => SILENCE.max(self.patience),
        };
        Some(patience.saturating_sub(self.answered.elapsed()))
    }

    /// Whether there may be a buffer to read now. None is read while answers wait: a host that takes none gets no further orders done.
    fn can_hear(&self) -> bool {
        self.readable && self.sessions.listens() && !self.port.is_full()
    }

    fn hear(&mut self, buffer: &mut [u8; MAX_BUFFER]) -> anyhow::Result<()> {
        for _ in 0..TURN {
            if !self.can_hear() {
                break;
            }
            match self.port.receive(buffer)? {
                Came::Buffer(length) => {
                    if let Err(what) = self.sessions.hear(&buffer[..length]) {
                        kernel_log::error(&format!("a session of a disk is over: the host sent {what}"));
                    }
                }
                Came::Nothing => self.readable = false,
                Came::End => {
                    self.readable = false;
                    self.host_is_gone();
                }
            }
        }
        Ok(())
    }

    fn host_is_gone(&mut self) {
        if self.sessions.host_is_gone() {
            self.port.forget();
        }
    }

    fn answer(&mut self, epoll: &Epoll) -> anyhow::Result<()> {
        if self.sessions.is_closed() {
            self.port.reopen(epoll)?;
            self.readable = true;
        }
        if std::mem::take(&mut self.is_ready) {
            self.port.flush()?;
        }
        for buffer in self.sessions.take_buffers() {
            self.port.send(buffer)?;
        }
        self.port.watch_room(epoll)
    }
}
