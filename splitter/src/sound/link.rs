//! The link of a sound splitter: the host's end of a driver VM's console port `org.umbra.sound.N`, a stream socket.
//! Never blocks. What comes in is taken apart and checked, what goes out waits in a bounded queue, from which a message
//! goes when a later one makes it moot: a guest cannot fill it, whatever it asks for. A peer that breaks the protocol,
//! talks without end, does not read or goes away ends the link. A link begins with its `Begin`; what an earlier one of the
//! same driver VM left on the port is skipped.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsRawFd, RawFd};

use thiserror::Error;
use umbra_driver_vm::sound_protocol::{
    FromHost, FromService, HEADER_BYTES, MAX_BODY, MAX_EARLIER_BYTES, ProtocolError, Taken, decode_service, encode,
};
use umbra_shadow::LinkId;
use umbra_shadow::sound::params::{MAX_BUFFER_BYTES, MAX_STREAMS};
use umbra_shadow::sound::{HELD_MAX_BYTES, StreamId, ToCard, Violation};

use crate::untrusted::Stream;

/// Most bytes that wait for a driver VM that does not read: what the shadow keeps of every stream, as a replay sends it,
/// and as much as one message more that is under way. Only a driver VM that says it has played what it has not read can
/// have more waiting.
const MAX_UNSENT: usize =
    MAX_STREAMS * (HELD_MAX_BYTES + 2 * MAX_BUFFER_BYTES as usize) + 2 * MAX_BUFFER_BYTES as usize;
/// Most messages in one write.
const BATCH: usize = 64;
/// Most messages of a driver VM in a second. Its service sends some 500 (a report of each stream every 4 ms), and those of
/// many seconds at once after this process was late.
const MESSAGES_PER_SECOND: u32 = 20_000;
const SECOND_NS: u64 = 1_000_000_000;
/// Most bytes read at one turn, so that a driver VM that talks without end does not stop the guest's other devices.
const READ_BUDGET: usize = 256 * 1024;
/// Most bytes of one read.
const CHUNK: usize = 16 * 1024;

/// Why a link ended.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The peer is gone.
    #[error("closed")]
    Closed,
    /// The socket failed.
    #[error("the sound link failed")]
    Io(#[source] io::Error),
    /// Something that is no message.
    #[error("the driver VM broke the sound protocol")]
    Protocol(#[from] ProtocolError),
    /// Something that cannot be true.
    #[error("the driver VM's sound service cannot be believed")]
    Violation(#[from] Violation),
    /// Messages wait and wait.
    #[error("the driver VM does not take what it is sent")]
    NotReading,
    /// More messages than anybody has to say.
    #[error("the driver VM sends more than {MESSAGES_PER_SECOND} messages a second")]
    Flood,
    /// More of an earlier link than a port holds.
    #[error("the driver VM goes on with an earlier session: more than {MAX_EARLIER_BYTES} bytes of it")]
    Earlier,
    /// A second card, or a stream before the card.
    #[error("the driver VM's sound service greets in the wrong order")]
    Order,
    /// The service gave up.
    #[error("the driver VM's sound service failed: {0}")]
    Service(String),
}

/// A connected link.
#[derive(Debug)]
pub struct Link {
    socket: Stream,
    id: LinkId,
    incoming: Vec<u8>,
    unsent: VecDeque<Unsent>,
    /// Bytes of all of `unsent`, with their [`OVERHEAD`]: small messages without end are as much as a large one.
    waiting: usize,
    /// Bytes of the first that are sent already.
    sent: usize,
    /// A second's beginning, and how many messages came since.
    heard: (u64, u32),
    /// Bytes of earlier links that were skipped.
    earlier: usize,
}

/// What a message costs beside its bytes, in bytes: its place in the queue and that of its memory.
const OVERHEAD: usize = std::mem::size_of::<Unsent>() + 16;

/// A message that waits.
#[derive(Debug)]
struct Unsent {
    /// The stream that it is about, and what about it; `None` for the link's `Begin`, which nothing makes moot.
    about: Option<(StreamId, Kind)>,
    bytes: Vec<u8>,
}

impl Unsent {
    fn cost(&self) -> usize {
        self.bytes.len() + OVERHEAD
    }
}

/// What a message does to those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    SetParams,
    Prepare,
    Play,
    Start,
    Stop,
    Release,
}

impl Kind {
    fn of(message: &ToCard) -> (StreamId, Self) {
        match message {
            ToCard::SetParams { stream, .. } => (*stream, Self::SetParams),
            ToCard::Prepare { stream, .. } => (*stream, Self::Prepare),
            ToCard::Play { stream, .. } => (*stream, Self::Play),
            ToCard::Start { stream } => (*stream, Self::Start),
            ToCard::Stop { stream } => (*stream, Self::Stop),
            ToCard::Release { stream } => (*stream, Self::Release),
        }
    }

    /// Whether there is anything that it makes moot: samples, of which there may be many, do not.
    fn moots_any(self) -> bool {
        !matches!(self, Self::Play | Self::Start)
    }

    /// True if an earlier message of the same stream that was not sent need not be: a service that takes this one is
    /// then where it would be with both. So at most one of each kind but samples waits, and samples of one epoch.
    fn moots(self, earlier: Self) -> bool {
        match self {
            Self::Play | Self::Start => false,
            Self::Stop => matches!(earlier, Self::Start | Self::Stop),
            Self::Prepare => matches!(earlier, Self::Prepare | Self::Play | Self::Start | Self::Stop),
            Self::Release => earlier != Self::SetParams,
            // Closes the stream first.
            Self::SetParams => true,
        }
    }
}

impl Link {
    /// A new link, with its `Begin` waiting to be sent.
    pub fn new(socket: Stream, id: LinkId) -> Self {
        let mut link = Self {
            socket,
            id,
            incoming: Vec::new(),
            unsent: VecDeque::new(),
            waiting: 0,
            sent: 0,
            heard: (0, 0),
            earlier: 0,
        };
        link.push(None, &FromHost::Begin);
        link
    }

    /// Which link this is.
    pub fn id(&self) -> LinkId {
        self.id
    }

    /// True while something waits to be sent.
    pub fn wants_to_write(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends a message, or keeps it until the peer reads.
    ///
    /// # Errors
    /// When too much waits.
    pub fn send(&mut self, message: ToCard) -> Result<(), LinkError> {
        let (stream, kind) = Kind::of(&message);
        if kind.moots_any() {
            self.forget_moot(stream, kind);
        }
        self.push(Some((stream, kind)), &message.into());
        if self.waiting > MAX_UNSENT {
            return Err(LinkError::NotReading);
        }
        Ok(())
    }

    /// Forgets what `kind` makes moot.
    fn forget_moot(&mut self, stream: StreamId, kind: Kind) {
        // What has begun to go out has to go out to its end.
        let mut begun = self.sent > 0;
        self.unsent.retain(|earlier| {
            let moot = earlier.about.is_some_and(|(of, earlier)| of == stream && kind.moots(earlier));
            let kept = std::mem::take(&mut begun) || !moot;
            if !kept {
                self.waiting -= earlier.cost();
            }
            kept
        });
    }

    fn push(&mut self, about: Option<(StreamId, Kind)>, message: &FromHost) {
        let mut bytes = Vec::new();
        encode(message, self.id, &mut bytes);
        let message = Unsent { about, bytes };
        self.waiting += message.cost();
        self.unsent.push_back(message);
    }

    /// Writes what waits, as far as the peer takes it.
    ///
    /// # Errors
    /// When the peer is gone.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        while !self.unsent.is_empty() {
            let slices = self.unsent.iter().take(BATCH).zip(std::iter::once(self.sent).chain(std::iter::repeat(0)));
            let slices: Vec<IoSlice<'_>> = slices.map(|(message, sent)| IoSlice::new(&message.bytes[sent..])).collect();
            match self.socket.write_vectored(&slices) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(written) => self.forget(written),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if is_closed(&error) => return Err(LinkError::Closed),
                Err(error) => return Err(LinkError::Io(error)),
            }
        }
        Ok(())
    }

    /// The first `written` bytes that waited are sent.
    fn forget(&mut self, written: usize) {
        self.sent += written;
        while let Some(first) = self.unsent.front().filter(|first| first.bytes.len() <= self.sent) {
            self.sent -= first.bytes.len();
            self.waiting -= first.cost();
            self.unsent.pop_front();
        }
    }

    /// Takes what has come; the messages in order, and whether the link has ended behind them.
    pub fn receive(&mut self, now: u64) -> (Vec<FromService>, Option<LinkError>) {
        let (messages, error) = self.read();
        if now.saturating_sub(self.heard.0) >= SECOND_NS {
            self.heard = (now, 0);
        }
        self.heard.1 = self.heard.1.saturating_add(u32::try_from(messages.len()).unwrap_or(u32::MAX));
        let flood = (self.heard.1 > MESSAGES_PER_SECOND).then_some(LinkError::Flood);
        (messages, error.or(flood))
    }

    fn read(&mut self) -> (Vec<FromService>, Option<LinkError>) {
        let (mut messages, mut taken) = (Vec::new(), 0);
        let mut chunk = [0; CHUNK];
        loop {
            let error = match self.socket.read(&mut chunk) {
                Ok(0) => Some(LinkError::Closed),
                Ok(length) => {
                    self.incoming.extend_from_slice(&chunk[..length]);
                    taken += length;
                    self.take_messages(&mut messages).err()
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => None,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return (messages, None),
                Err(error) if is_closed(&error) => Some(LinkError::Closed),
                Err(error) => Some(LinkError::Io(error)),
            };
            if error.is_some() || taken >= READ_BUDGET {
                return (messages, error);
            }
        }
    }

    fn take_messages(&mut self, messages: &mut Vec<FromService>) -> Result<(), LinkError> {
        let mut at = 0;
        let result = loop {
            match decode_service(&self.incoming[at..], self.id) {
                Ok(Some((taken, length))) => {
                    at += length;
                    match taken {
                        Taken::Message(message) => messages.push(message),
                        Taken::Earlier => self.earlier += length,
                    }
                    if self.earlier > MAX_EARLIER_BYTES {
                        break Err(LinkError::Earlier);
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error.into()),
            }
        };
        self.incoming.drain(..at);
        debug_assert!(result.is_err() || self.incoming.len() < HEADER_BYTES + MAX_BODY);
        result
    }
}

impl AsRawFd for Link {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixStream;

    use umbra_shadow::Generation;
    use umbra_shadow::sound::Epoch;

    use super::*;

    #[test]
    fn small_messages_that_nobody_reads_are_bounded_in_memory_too() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut link = Link::new(Stream::new(ours).unwrap(), LinkId::first(Generation::FIRST));
        let play = || ToCard::Play { stream: StreamId(0), epoch: Epoch(1), samples: vec![0] };
        let sent = (0..=MAX_UNSENT / OVERHEAD).take_while(|_| link.send(play()).is_ok()).count();
        assert!(sent < MAX_UNSENT / OVERHEAD, "{sent} messages");
        assert!(matches!(link.send(play()), Err(LinkError::NotReading)));
    }
}
