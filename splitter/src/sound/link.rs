//! The link of a sound splitter: the host's end of a driver VM's console port `org.umbra.sound.N`, a stream socket.
//! Never blocks. What comes in is taken apart and checked, what goes out waits in a bounded buffer; a peer that breaks
//! the protocol, does not read or goes away ends the link.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use thiserror::Error;
use umbra_driver_vm::sound_protocol::{FromService, HEADER_BYTES, MAX_BODY, ProtocolError, decode_service, encode};
use umbra_shadow::Generation;
use umbra_shadow::sound::params::{MAX_BUFFER_BYTES, MAX_STREAMS};
use umbra_shadow::sound::{HELD_MAX_BYTES, ToCard, Violation};

/// Most bytes that wait for a driver VM that does not read: twice what a replay can hold of one stream and the
/// buffers of the others, so that a replay always fits.
const MAX_UNSENT: usize = 2 * (HELD_MAX_BYTES + MAX_STREAMS * MAX_BUFFER_BYTES as usize);
/// Bytes taken in one go, so that a driver VM that talks without end does not stop the guest's other devices.
const READ_BUDGET: usize = 256 * 1024;
/// Bytes of one read.
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
    socket: UnixStream,
    generation: Generation,
    incoming: Vec<u8>,
    unsent: Vec<u8>,
    /// Bytes of `unsent` that are sent already.
    sent: usize,
}

impl Link {
    /// The link to the driver VM of `generation`.
    ///
    /// # Errors
    /// When the socket cannot be made non-blocking.
    pub fn new(socket: UnixStream, generation: Generation) -> Result<Self, LinkError> {
        socket.set_nonblocking(true).map_err(LinkError::Io)?;
        Ok(Self { socket, generation, incoming: Vec::new(), unsent: Vec::new(), sent: 0 })
    }

    /// Whose link this is.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// True while something waits to be sent.
    pub fn wants_to_write(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Sends a message, or keeps it until the peer reads.
    ///
    /// # Errors
    /// When too much waits.
    pub fn send(&mut self, message: &ToCard) -> Result<(), LinkError> {
        encode(message, self.generation, &mut self.unsent);
        if self.unsent.len() - self.sent > MAX_UNSENT {
            return Err(LinkError::NotReading);
        }
        Ok(())
    }

    /// Writes what waits, as far as the peer takes it.
    ///
    /// # Errors
    /// When the peer is gone.
    pub fn flush(&mut self) -> Result<(), LinkError> {
        while self.sent < self.unsent.len() {
            match self.socket.write(&self.unsent[self.sent..]) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if is_closed(&error) => return Err(LinkError::Closed),
                Err(error) => return Err(LinkError::Io(error)),
            }
        }
        self.unsent.clear();
        self.sent = 0;
        Ok(())
    }

    /// Takes what has come; the messages in order, and whether the link has ended behind them.
    pub fn receive(&mut self) -> (Vec<FromService>, Option<LinkError>) {
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
            match decode_service(&self.incoming[at..], self.generation) {
                Ok(Some((message, length))) => {
                    messages.push(message);
                    at += length;
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
