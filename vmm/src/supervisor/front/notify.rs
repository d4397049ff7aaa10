//! Reports the machine's state to systemd (`sd_notify(3)`): ready, a line of status, stopping, and that the loop still turns
//! (`WatchdogSec=`). Does nothing where no service manager asked for it.

use std::env;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::base::time::Time;

/// The environment variable with the manager's socket.
const SOCKET: &str = "NOTIFY_SOCKET";

/// Time after which a message is sent again that was not taken.
const AGAIN: Duration = Duration::from_millis(100);

/// The watchdog's limit while the host sleeps: a host that wakes may take its time for its processors while no process runs yet, and that
/// counts.
const ASLEEP: Duration = Duration::from_secs(600);

/// The service manager's socket, and what it was sent.
#[derive(Debug, Default)]
pub struct Notify {
    to: Option<(UnixDatagram, SocketAddr)>,
    /// Interval of the messages to the watchdog; `None`: there is no watchdog.
    period: Option<Duration>,
    next: Time,
    /// The watchdog has been told that the host is about to sleep.
    asleep: bool,
    /// Not before this is it told anything: it did not take the last message.
    again: Time,
    /// The status as last sent.
    sent: String,
    ready: bool,
}

impl Notify {
    /// As the environment says.
    pub fn from_env() -> Self {
        let micros = |name| env::var(name).ok().and_then(|text: String| text.parse::<u64>().ok());
        let mine = micros("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let watchdog = micros("WATCHDOG_USEC").filter(|micros| mine && *micros > 0);
        Self::new(env::var_os(SOCKET), watchdog.map(Duration::from_micros))
    }

    /// Reports to the manager at `socket`, and to its watchdog at least every `watchdog`.
    pub fn new(socket: Option<OsString>, watchdog: Option<Duration>) -> Self {
        let address = socket.and_then(|name| match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name).ok(),
            _ => SocketAddr::from_pathname(&name).ok(),
        });
        let to = address.and_then(|address| {
            let socket = UnixDatagram::unbound().ok()?;
            socket.set_nonblocking(true).ok()?;
            Some((socket, address))
        });
        // Twice as often as needed, as sd_watchdog_enabled(3) has it.
        let period = watchdog.filter(|_| to.is_some()).map(|time| time / 2);
        Self { to, period, ..Self::default() }
    }

    /// When the next message to the watchdog is due, or one that was not taken.
    pub(in crate::supervisor) fn deadline(&self) -> Option<Time> {
        let again = (self.again > Time::BOOT).then_some(self.again);
        self.period.map(|_| self.next.max(self.again)).into_iter().chain(again).min()
    }

    /// Reports what has changed: whether all VMs are up, whether the host is about to sleep, and the `status` in a line.
    pub(in crate::supervisor) fn tell(
        &mut self,
        now: Time,
        (ready, asleep): (bool, bool),
        status: impl FnOnce() -> String,
    ) {
        if self.to.is_none() {
            return;
        }
        let status = status();
        let mut words = String::new();
        if ready && !self.ready {
            words.push_str("READY=1\n");
        }
        if status != self.sent {
            words.push_str(&format!("STATUS={status}\n"));
        }
        let beat = self.period.filter(|_| self.next <= now);
        if let Some(period) = self.period.filter(|_| asleep != self.asleep) {
            let limit = if asleep { ASLEEP } else { period * 2 };
            words.push_str(&format!("WATCHDOG_USEC={}\n", limit.as_micros()));
        }
        if beat.is_some() {
            words.push_str("WATCHDOG=1\n");
        }
        if words.is_empty() {
            // What was not taken is not so any more.
            self.again = Time::BOOT;
            return;
        }
        if now < self.again {
            return;
        }
        if self.send(&words) {
            self.ready |= ready;
            self.asleep = asleep;
            (self.sent, self.next) = (status, beat.map_or(self.next, |period| now + period));
            self.again = Time::BOOT;
        } else {
            // A manager that is busy, as at the host's boot, would wait for ever for a word that it never got.
            self.again = now + AGAIN;
        }
    }

    /// Reports that the end has begun.
    pub(in crate::supervisor) fn stopping(&self) {
        let _ = self.send("STOPPING=1\n");
    }

    /// Sends `words`; false if the manager takes none at the moment.
    fn send(&self, words: &str) -> bool {
        let Some((socket, address)) = &self.to else { return true };
        let sent = socket.send_to_addr(words.as_bytes(), address);
        let sent = sent.inspect_err(|error| tracing::debug!(%error, "tell the service manager"));
        !sent.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn heard(manager: &UnixDatagram) -> String {
        let mut words = [0; 256];
        manager.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let n = manager.recv(&mut words).unwrap_or(0);
        String::from_utf8_lossy(&words[..n]).into_owned()
    }

    #[test]
    fn the_manager_hears_of_what_changes_and_of_the_watchdog() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let mut notify = Notify::new(Some(path.into()), Some(Duration::from_secs(2)));
        let status = |text: &'static str| move || String::from(text);
        notify.tell(Time(1), (false, false), status("starting"));
        assert_eq!(heard(&manager), "STATUS=starting\nWATCHDOG=1\n");
        assert_eq!(notify.deadline(), Some(Time(1) + Duration::from_secs(1)));
        notify.tell(Time(2), (true, false), status("running"));
        assert_eq!(heard(&manager), "READY=1\nSTATUS=running\n");
        notify.tell(Time(3), (true, false), status("running"));
        assert_eq!(heard(&manager), "", "nothing new");
        notify.tell(Time(2_000_000_000), (true, false), status("running"));
        assert_eq!(heard(&manager), "WATCHDOG=1\n");
        notify.tell(Time(2_100_000_000), (true, true), status("running"));
        assert_eq!(heard(&manager), "WATCHDOG_USEC=600000000\n");
        notify.tell(Time(2_200_000_000), (true, true), status("running"));
        assert_eq!(heard(&manager), "", "it knows");
        notify.tell(Time(9_000_000_000), (true, false), status("running"));
        assert_eq!(heard(&manager), "WATCHDOG_USEC=2000000\nWATCHDOG=1\n");
        notify.stopping();
        assert_eq!(heard(&manager), "STOPPING=1\n");
    }

    #[test]
    fn a_manager_that_takes_nothing_for_a_while_hears_it_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let others = UnixDatagram::unbound().unwrap();
        others.set_nonblocking(true).unwrap();
        while others.send_to(b"READY=1\n", &path).is_ok() {}
        let mut notify = Notify::new(Some(path.clone().into()), None);
        let status = || String::from("all is well");
        notify.tell(Time(1), (true, false), status);
        let due = notify.deadline().unwrap();
        manager.set_nonblocking(true).unwrap();
        while manager.recv(&mut [0; 64]).is_ok() {}
        manager.set_nonblocking(false).unwrap();
        notify.tell(Time(2), (true, false), status);
        assert_eq!(heard(&manager), "", "it is not asked without end");
        notify.tell(due, (true, false), status);
        assert_eq!(heard(&manager), "READY=1\nSTATUS=all is well\n");
        assert_eq!(notify.deadline(), None);
        while others.send_to(b"READY=1\n", &path).is_ok() {}
        notify.tell(due, (true, false), || "a failure".into());
        assert!(notify.deadline().is_some());
        notify.tell(due, (true, false), status);
        assert_eq!(notify.deadline(), None, "it was over before the manager took it");
    }

    #[test]
    fn an_abstract_socket_is_known_by_its_mark_and_nobody_is_told_without_one() {
        let name = format!("umbra-notify-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        Notify::new(Some(format!("@{name}").into()), None).stopping();
        assert_eq!(heard(&manager), "STOPPING=1\n");
        let mut silent = Notify::new(None, Some(Duration::from_secs(1)));
        assert_eq!(silent.deadline(), None);
        silent.tell(Time(1), (true, true), || panic!("nobody asked"));
    }
}
