//! A guest's serial console for whoever comes (`umbra console`): a socket that sends each client what the guest prints, and takes
//! what one of them types.
//!
//! The stream has no words of its own: bytes both ways. The first that types is the writer until it goes; what others type is
//! dropped, which they are told once. A client that closes its writing half only looks on.
//!
//! Invariant: nothing waits for a client. Its part of the output is in the [`Backlog`] that all share, its input stays in its socket
//! until the guest has read what it has.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use thiserror::Error;

use super::legacy::{Backlog, Part, SerialLine};
use crate::base::lock::lock;
use crate::base::unix_socket::{self, ListenError};

/// Most clients at a time: each costs a descriptor, and a copy of what the guest prints.
const MAX_CLIENTS: usize = 8;
/// Bytes sent to a client at once.
const PIECE: usize = 4096;
/// Pieces sent to a client before others get their turn.
const BUDGET: usize = 4;

/// What a client hears that is one too many.
const TOO_MANY: &[u8] = b"\r\n[umbra: this console has 8 viewers already; close one]\r\n";
/// What a client hears that types while another one does.
const NOT_THE_WRITER: &[u8] =
    b"\r\n[umbra: another viewer types here; this one only looks on until that one has left]\r\n";

/// What the descriptors are registered as; clients are [`FIRST_CLIENT`] and up.
const LISTENER: u32 = 0;
const NEWS: u32 = 1;
const DRAINED: u32 = 2;
const FIRST_CLIENT: u32 = 3;

/// Why there is no socket.
#[derive(Debug, Error)]
pub enum Error {
    /// The path.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Its mode.
    #[error("restrict the console's socket to its owner")]
    Restrict(#[source] io::Error),
}

/// The socket and its clients.
pub struct Viewers {
    listener: UnixListener,
    backlog: Arc<Backlog>,
    serial: Arc<Mutex<SerialLine>>,
    clients: BTreeMap<u32, Client>,
    next: u32,
    /// Who types.
    writer: Option<u32>,
}

struct Client {
    stream: UnixStream,
    /// Its place in the backlog.
    at: u64,
    /// It has not taken all that there is.
    behind: bool,
    input: Input,
    /// It knows that another one types.
    told: bool,
    /// It has gone: nothing is sent any more, and what it has typed is still read.
    gone: bool,
    /// The event loop watches it.
    watched: bool,
}

/// What becomes of what a client types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    /// It is read.
    Read,
    /// It stays in the socket until the guest has read what it has.
    NoRoom,
    /// There is none: it has closed its writing half.
    Ended,
}

impl Client {
    fn interest(&self, id: u32) -> Events {
        let read = if self.input == Input::Read { EventSet::IN } else { EventSet::empty() };
        let write = if self.behind { EventSet::OUT } else { EventSet::empty() };
        Events::with_data(&self.stream, id, read | write)
    }

    /// Watches it for what it waits for; not one that has gone, and so is always ready, while there is no room for what it has typed.
    fn watch(&mut self, id: u32, ops: &mut EventOps) -> io::Result<()> {
        let wanted = !(self.gone && self.input == Input::NoRoom);
        let done = match (std::mem::replace(&mut self.watched, wanted), wanted) {
            (true, true) => ops.modify(self.interest(id)),
            (true, false) => ops.remove(Events::empty(&self.stream)),
            (false, true) => ops.add(self.interest(id)),
            (false, false) => Ok(()),
        };
        done.map_err(io::Error::other)
    }

    /// Sends it what it has not seen, as far as it takes it.
    fn show(&mut self, backlog: &Backlog) {
        if self.send(backlog).is_err() {
            (self.gone, self.behind) = (true, false);
        }
    }

    fn send(&mut self, backlog: &Backlog) -> io::Result<()> {
        if self.gone {
            return Ok(());
        }
        self.behind = true;
        for _ in 0..BUDGET {
            let Part { lost, bytes } = backlog.part(self.at, PIECE);
            if lost > 0 {
                let mark = format!("\r\n[umbra: {lost} bytes of the console's output are lost here]\r\n");
                if !sent(self.stream.write(mark.as_bytes()))? {
                    return Ok(());
                }
                self.at += lost;
            }
            if bytes.is_empty() {
                self.behind = false;
                return Ok(());
            }
            match self.stream.write(&bytes) {
                Ok(length) => self.at += length as u64,
                Err(error) => return sent(Err(error)).map(drop),
            }
        }
        Ok(())
    }
}

/// Whether something was written, and not nothing for now.
fn sent(written: io::Result<usize>) -> io::Result<bool> {
    match written {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Viewers {
    /// Listens at `path` for viewers of what goes into `backlog`; what they type goes to `serial`.
    ///
    /// # Errors
    /// The path is taken, or cannot be had.
    pub fn listen(path: &Path, backlog: Arc<Backlog>, serial: Arc<Mutex<SerialLine>>) -> Result<Self, Error> {
        let listener = unix_socket::listen(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(Error::Restrict)?;
        listener.set_nonblocking(true).map_err(Error::Restrict)?;
        Ok(Self { listener, backlog, serial, clients: BTreeMap::new(), next: FIRST_CLIENT, writer: None })
    }

    fn accept(&mut self, ops: &mut EventOps) {
        let Ok((mut stream, _)) = self.listener.accept() else { return };
        if stream.set_nonblocking(true).is_err() {
            return;
        }
        if self.clients.len() >= MAX_CLIENTS {
            let _ = stream.write(TOO_MANY);
            return;
        }
        let id = self.next;
        self.next = self.next.checked_add(1).unwrap_or(FIRST_CLIENT);
        let (at, input) = (self.backlog.start(), Input::Read);
        let mut client = Client { stream, at, behind: true, input, told: false, gone: false, watched: false };
        match client.watch(id, ops) {
            Ok(()) => drop(self.clients.insert(id, client)),
            Err(error) => tracing::warn!(%error, "listen to a viewer of the console"),
        }
        self.backlog.await_news();
    }

    /// Does `act` with client `id`, which goes if that fails, and watches it for what it waits for then.
    fn with(&mut self, id: u32, ops: &mut EventOps, act: impl FnOnce(&mut Self, &mut Client) -> io::Result<()>) {
        let Some(mut client) = self.clients.remove(&id) else { return };
        let kept = act(self, &mut client).and_then(|()| client.watch(id, ops));
        let has_ended = client.gone && client.input == Input::Ended;
        if kept.is_ok() && !has_ended {
            self.clients.insert(id, client);
            return;
        }
        if client.watched {
            let _ = ops.remove(Events::empty(&client.stream));
        }
        if self.writer == Some(id) {
            self.writer = None;
        }
    }

    /// Reads what client `id` has typed, as far as the guest has room for it.
    fn take_input(&mut self, id: u32, client: &mut Client) -> io::Result<()> {
        let mine = self.writer.is_none_or(|writer| writer == id);
        let mut serial = lock(&self.serial);
        let mut buffer = [0; 1024];
        let room = if mine { serial.room().min(buffer.len()) } else { buffer.len() };
        if room == 0 {
            client.input = Input::NoRoom;
            return Ok(());
        }
        match client.stream.read(&mut buffer[..room]) {
            Ok(0) => {
                client.input = Input::Ended;
                if self.writer == Some(id) {
                    self.writer = None;
                }
            }
            Ok(length) if mine => {
                self.writer = Some(id);
                serial.input(&buffer[..length]);
            }
            Ok(_) if !client.told => {
                client.told = true;
                sent(client.stream.write(NOT_THE_WRITER))?;
            }
            Ok(_) => {}
            Err(error) => return sent(Err(error)).map(drop),
        }
        Ok(())
    }
}

impl MutEventSubscriber for Viewers {
    fn init(&mut self, ops: &mut EventOps) {
        self.backlog.await_news();
        let serial = lock(&self.serial);
        for events in [
            Events::with_data(&self.listener, LISTENER, EventSet::IN),
            Events::with_data(self.backlog.news(), NEWS, EventSet::IN),
            Events::with_data(serial.drained_for_viewers(), DRAINED, EventSet::IN),
        ] {
            if let Err(error) = ops.add(events) {
                tracing::warn!(%error, "listen to the console's socket");
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            LISTENER => self.accept(ops),
            NEWS => {
                // Without clients nobody is told of each byte.
                let _ = self.backlog.news().read();
                if !self.clients.is_empty() {
                    self.backlog.await_news();
                }
                for id in self.clients.keys().copied().collect::<Vec<_>>() {
                    self.with(id, ops, |this, client| {
                        client.show(&this.backlog);
                        Ok(())
                    });
                }
            }
            DRAINED => {
                let _ = lock(&self.serial).drained_for_viewers().read();
                for id in self.clients.keys().copied().collect::<Vec<_>>() {
                    self.with(id, ops, |_, client| {
                        if client.input == Input::NoRoom {
                            client.input = Input::Read;
                        }
                        Ok(())
                    });
                }
            }
            id => {
                let set = events.event_set();
                self.with(id, ops, |this, client| {
                    client.gone |= set.intersects(EventSet::HANG_UP | EventSet::ERROR);
                    if client.input == Input::Read && (client.gone || set.contains(EventSet::IN)) {
                        this.take_input(id, client)?;
                    }
                    if set.contains(EventSet::OUT) {
                        client.show(&this.backlog);
                    }
                    Ok(())
                });
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::Shutdown;
    use std::time::Duration;

    use event_manager::{EventManager, SubscriberOps};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::super::legacy::KEPT;
    use super::*;
    use crate::config::Console;

    /// A serial line with viewers, in a loop that the test turns.
    struct Guest {
        dir: tempfile::TempDir,
        backlog: Arc<Backlog>,
        serial: Arc<Mutex<SerialLine>>,
        events: EventManager<Arc<Mutex<Viewers>>>,
    }

    impl Guest {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let backlog = Arc::new(Backlog::new().unwrap());
            let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
            let serial = SerialLine::new(&Console::Off, Some(Arc::clone(&backlog)), interrupt).unwrap();
            let serial = Arc::new(Mutex::new(serial));
            let viewers = Viewers::listen(&dir.path().join("s"), Arc::clone(&backlog), Arc::clone(&serial)).unwrap();
            let mut events = EventManager::new().unwrap();
            events.add_subscriber(Arc::new(Mutex::new(viewers)));
            Self { dir, backlog, serial, events }
        }

        /// Turns the loop until it rests.
        fn turn(&mut self) {
            let turns = (0..1000).take_while(|_| self.events.run_with_timeout(1).unwrap() > 0).count();
            assert!(turns < 1000, "the loop spins");
        }

        fn viewer(&mut self) -> UnixStream {
            let stream = UnixStream::connect(self.dir.path().join("s")).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            self.turn();
            stream
        }

        /// What the guest prints, as its driver does.
        fn print(&mut self, text: &[u8]) {
            text.iter().for_each(|byte| self.serial.lock().unwrap().write(0, *byte));
            self.turn();
        }

        /// What the guest has received.
        fn read(&mut self) -> String {
            let mut got = Vec::new();
            loop {
                let before = got.len();
                let mut serial = self.serial.lock().unwrap();
                while serial.read(5) & 1 != 0 {
                    got.push(serial.read(0));
                }
                drop(serial);
                self.turn();
                if got.len() == before {
                    return String::from_utf8(got).unwrap();
                }
            }
        }
    }

    fn seen(stream: &mut UnixStream) -> String {
        let mut text = Vec::new();
        // Until it times out, or the end.
        let _ = stream.read_to_end(&mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn all_see_what_is_printed_before_and_after_they_came() {
        let mut guest = Guest::new();
        guest.print(b"boot\n");
        let (mut first, mut second) = (guest.viewer(), guest.viewer());
        guest.print(b"login: ");
        assert_eq!((seen(&mut first), seen(&mut second)), ("boot\nlogin: ".into(), "boot\nlogin: ".into()));
        drop(first);
        guest.print(b"x");
        assert_eq!(seen(&mut second), "x");
    }

    #[test]
    fn one_types_and_the_others_are_told_until_it_leaves() {
        let mut guest = Guest::new();
        let (mut first, mut second) = (guest.viewer(), guest.viewer());
        first.write_all(b"root\r").unwrap();
        guest.turn();
        for _ in 0..2 {
            second.write_all(b"intruder\r").unwrap();
            guest.turn();
        }
        assert_eq!(guest.read(), "root\r");
        assert_eq!(seen(&mut second), String::from_utf8_lossy(NOT_THE_WRITER), "once");
        // It looks on from now on.
        first.shutdown(Shutdown::Write).unwrap();
        guest.turn();
        second.write_all(b"mine").unwrap();
        guest.turn();
        assert_eq!(guest.read(), "mine");
        guest.print(b"ok");
        assert_eq!((seen(&mut first), seen(&mut second)), ("ok".into(), "ok".into()));
    }

    #[test]
    fn what_is_typed_arrives_whole_however_slowly_the_guest_reads() {
        let mut guest = Guest::new();
        let mut viewer = guest.viewer();
        let text: String = ('a'..='z').cycle().take(1000).collect();
        viewer.write_all(text.as_bytes()).unwrap();
        guest.turn();
        assert_eq!(guest.read(), text);
    }

    #[test]
    fn what_is_typed_by_a_viewer_that_leaves_at_once_arrives_whole() {
        let mut guest = Guest::new();
        guest.print(b"login: ");
        let text: String = ('a'..='z').cycle().take(1000).collect();
        // As a script does that pipes its words into the socket, and whether the guest prints meanwhile or not.
        for prints in [false, true] {
            let mut viewer = UnixStream::connect(guest.dir.path().join("s")).unwrap();
            if prints {
                guest.turn();
            }
            viewer.write_all(text.as_bytes()).unwrap();
            drop(viewer);
            if prints {
                guest.print(b"tick\n");
            }
            guest.turn();
            assert_eq!(guest.read(), text);
        }
        let mut next = guest.viewer();
        next.write_all(b"next").unwrap();
        guest.turn();
        assert_eq!(guest.read(), "next", "the line is free");
    }

    #[test]
    fn who_does_not_read_costs_nobody_anything_and_is_told_what_it_has_missed() {
        let mut guest = Guest::new();
        let (mut slow, mut quick) = (guest.viewer(), guest.viewer());
        let line = [b'x'; 4096];
        for _ in 0..200 {
            guest.print(&line);
            assert_eq!(seen_now(&mut quick), line.len());
        }
        guest.print(b"the end");
        let mut all = String::new();
        loop {
            let text = seen(&mut slow);
            guest.turn();
            if text.is_empty() {
                break;
            }
            all += &text;
        }
        assert!(
            all.ends_with("the end") && all.contains(" bytes of the console's output are lost here]"),
            "{}",
            all.len()
        );
        let marks = all.split("[umbra: ").skip(1).map(|mark| mark.split(' ').next().unwrap().parse::<usize>().unwrap());
        let lost: usize = marks.sum();
        assert_eq!(all.matches('x').count() + lost, 200 * 4096);
        assert!(lost > 0 && all.len() > KEPT);
    }

    /// Bytes that are there.
    fn seen_now(stream: &mut UnixStream) -> usize {
        let mut bytes = vec![0; 8192];
        stream.read(&mut bytes).unwrap()
    }

    #[test]
    fn one_viewer_too_many_is_told() {
        let mut guest = Guest::new();
        let viewers: Vec<_> = (0..MAX_CLIENTS).map(|_| guest.viewer()).collect();
        assert_eq!(seen(&mut guest.viewer()), String::from_utf8_lossy(TOO_MANY));
        drop(viewers);
        guest.turn();
        let mut next = guest.viewer();
        guest.print(b"hello");
        assert_eq!(seen(&mut next), "hello");
        assert_eq!(guest.backlog.start(), 0);
    }
}
