//! A VM process's way to whoever started it: the supervisor on the control socket, or, for trying a VM by hand
//! from a spec file, the log.
//!
//! Invariant: a sender never waits. What a supervisor that is busy or stopped does not take now is sent by a thread, in order;
//! messages beyond [`MAX_WAITING`] are left out and counted.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use umbra_splitter::threads::{self, Purpose};

use crate::base::lock::lock;
use crate::wire::channel::{self, Channel};
use crate::wire::messages::FromVm;

/// Most messages that wait for a supervisor that does not read: many times what a VM has to say in an outage, and some 100 KiB.
const MAX_WAITING: usize = 1024;

/// Longest wait at the end of a process for messages that are not sent yet. A supervisor reads within milliseconds; one that is
/// stopped notices the end of the process itself.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Where this process reports to. Threads share it.
#[derive(Debug)]
pub enum Host {
    /// A supervisor.
    Supervisor(Supervisor),
    /// Nobody: messages go to the log.
    Log,
}

/// The supervisor's end.
#[derive(Debug)]
pub struct Supervisor {
    channel: Arc<Channel>,
    /// To the thread that waits in this process's place; there from the first message on that the channel did not take.
    thread: Mutex<Option<SyncSender<FromVm>>>,
    /// Messages that the thread has still to send.
    waiting: Arc<AtomicUsize>,
    left_out: AtomicUsize,
}

impl Supervisor {
    /// The supervisor at the other end of `channel`.
    pub fn new(channel: Channel) -> Self {
        Self {
            channel: Arc::new(channel),
            thread: Mutex::new(None),
            waiting: Arc::default(),
            left_out: AtomicUsize::new(0),
        }
    }

    /// The channel, to receive from.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }

    fn tell(&self, message: &FromVm) {
        // Held throughout, so that messages stay in order.
        let mut thread = lock(&self.thread);
        if self.waiting.load(Ordering::Acquire) == 0 {
            match self.channel.send_now(message, &[]) {
                Err(channel::Error::Full) => {}
                Ok(()) => return,
                Err(error) => return tracing::debug!(%error, ?message, "tell the supervisor"),
            }
        }
        if thread.is_none() {
            *thread = self.start_thread();
        }
        self.waiting.fetch_add(1, Ordering::AcqRel);
        if thread.as_ref().is_none_or(|thread| thread.try_send(message.clone()).is_err()) {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            let before = self.left_out.fetch_add(1, Ordering::Relaxed);
            if before.is_multiple_of(MAX_WAITING) {
                tracing::warn!("the supervisor does not read: {} messages for it are left out so far", before + 1);
            }
        }
    }

    fn start_thread(&self) -> Option<SyncSender<FromVm>> {
        let (sender, messages) = sync_channel(MAX_WAITING);
        let (channel, waiting) = (Arc::clone(&self.channel), Arc::clone(&self.waiting));
        let run = move || send_all(&channel, &messages, &waiting);
        match threads::spawn(Purpose::Helper, "to-supervisor", run) {
            Ok(_) => Some(sender),
            Err(error) => {
                tracing::warn!(%error, "start a thread that waits for the supervisor");
                None
            }
        }
    }
}

/// Sends messages as they come, until there is no sender any more.
fn send_all(channel: &Channel, messages: &Receiver<FromVm>, waiting: &AtomicUsize) {
    for message in messages {
        // A supervisor that is stopped may be continued hours later.
        while let Err(channel::Error::Full) = channel.send(&message, &[]) {}
        waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Host {
    /// Sends `message`, and never waits. A supervisor that is gone is noticed by the event loop, not here.
    pub fn tell(&self, message: &FromVm) {
        match self {
            Self::Supervisor(supervisor) => supervisor.tell(message),
            Self::Log => tracing::info!(?message, "a message for a supervisor"),
        }
    }

    /// Whether a message of a supervisor waits to be read, or it is gone.
    pub fn has_orders(&self) -> bool {
        let Self::Supervisor(supervisor) = self else { return false };
        let mut fds = [PollFd::new(supervisor.channel().as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// Waits a bounded time, before the process ends, until everything is sent.
    pub fn finish(&self) {
        let Self::Supervisor(supervisor) = self else { return };
        let until = Instant::now() + LAST_WORDS;
        while supervisor.waiting.load(Ordering::Acquire) > 0 && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::wire::channel::Incoming;

    #[test]
    fn a_supervisor_that_does_not_read_holds_nobody_up_and_loses_nothing() {
        let (ours, theirs) = Channel::pair().unwrap();
        let host = Host::Supervisor(Supervisor::new(ours));
        let begin = Instant::now();
        for at in 0..900 {
            host.tell(&FromVm::Running { at });
        }
        // The socket holds a part of them: to wait 2 s for each of the others would take many minutes.
        assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
        let theirs = Channel::from_fd(theirs);
        for wanted in 0..900 {
            let Incoming::Message(FromVm::Running { at }, _) = theirs.receive::<FromVm>().unwrap() else {
                panic!("another message")
            };
            assert_eq!(at, wanted);
        }
        host.finish();
        host.tell(&FromVm::Running { at: 900 });
        assert!(matches!(theirs.receive::<FromVm>().unwrap(), Incoming::Message(FromVm::Running { at: 900 }, _)));
    }

    #[test]
    fn what_is_too_much_is_left_out_and_the_memory_is_bounded() {
        let (ours, _theirs) = Channel::pair().unwrap();
        let supervisor = Supervisor::new(ours);
        for at in 0..20_000 {
            supervisor.tell(&FromVm::Running { at });
        }
        assert!(supervisor.left_out.load(Ordering::Relaxed) > 0);
        assert!(supervisor.waiting.load(Ordering::Relaxed) <= MAX_WAITING + 2);
    }
}
