//! Lines from and to a non-blocking stream whose other end is not trusted: both directions are bounded, nothing blocks.

use std::io::{ErrorKind, Read, Write};

use thiserror::Error;

/// Most bytes that wait for a peer that does not read.
const MAX_UNSENT: usize = 256 * 1024;

/// Most bytes read at a time. A peer that floods is read again at the next turn of the loop, not at once.
const READ_AT_ONCE: usize = 64 * 1024;

/// Why a stream is of no more use.
#[derive(Debug, Error)]
pub enum LineError {
    /// A line without an end.
    #[error("a line of more than {0} bytes")]
    TooLong(usize),
    /// Not text.
    #[error("a line that is no UTF-8")]
    NotText,
    /// The peer does not read.
    #[error("{MAX_UNSENT} bytes wait unread")]
    Unread,
    /// The peer has closed its end.
    #[error("closed")]
    Closed,
    /// Reading or writing failed.
    #[error("read or write")]
    Io(#[source] std::io::Error),
}

/// A stream of lines, both ways.
#[derive(Debug)]
pub struct Lines<S> {
    stream: S,
    max_line: usize,
    received: Vec<u8>,
    unsent: Vec<u8>,
}

impl<S: Read + Write> Lines<S> {
    /// Lines of at most `max_line` bytes on `stream`, which must be non-blocking.
    pub fn new(stream: S, max_line: usize) -> Self {
        Self { stream, max_line, received: Vec::new(), unsent: Vec::new() }
    }

    /// The stream, to poll.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Whether something waits to be written.
    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Reads what is there. The lines come first, then the error, if any.
    pub fn receive(&mut self) -> (Vec<String>, Option<LineError>) {
        let mut chunk = vec![0; READ_AT_ONCE];
        let error = match self.stream.read(&mut chunk) {
            Ok(0) => Some(LineError::Closed),
            Ok(n) => {
                self.received.extend_from_slice(&chunk[..n]);
                None
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => None,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Some(LineError::Closed),
            Err(error) => Some(LineError::Io(error)),
        };
        let mut lines = Vec::new();
        match self.take_lines(&mut lines) {
            Ok(()) => (lines, error),
            Err(wrong) => (lines, Some(wrong)),
        }
    }

    fn take_lines(&mut self, lines: &mut Vec<String>) -> Result<(), LineError> {
        let mut start = 0;
        while let Some(length) = self.received[start..].iter().position(|b| *b == b'\n') {
            if length > self.max_line {
                return Err(LineError::TooLong(self.max_line));
            }
            let line = std::str::from_utf8(&self.received[start..start + length]).map_err(|_| LineError::NotText)?;
            lines.push(line.to_owned());
            start += length + 1;
        }
        self.received.drain(..start);
        if self.received.len() > self.max_line { Err(LineError::TooLong(self.max_line)) } else { Ok(()) }
    }

    /// Queues a line and writes what the peer takes now.
    ///
    /// # Errors
    ///
    /// The peer is gone or has not read for long.
    pub fn send(&mut self, line: &str) -> Result<(), LineError> {
        self.unsent.extend_from_slice(line.as_bytes());
        self.unsent.push(b'\n');
        self.flush()?;
        if self.unsent.len() > MAX_UNSENT { Err(LineError::Unread) } else { Ok(()) }
    }

    /// Writes what waits, as far as the peer takes it now.
    ///
    /// # Errors
    ///
    /// The peer is gone.
    pub fn flush(&mut self) -> Result<(), LineError> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(0) => return Err(LineError::Closed),
                Ok(n) => drop(self.unsent.drain(..n)),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Ok(()),
                    ErrorKind::Interrupted => {}
                    ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => return Err(LineError::Closed),
                    _ => return Err(LineError::Io(error)),
                },
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;

    fn pair(max_line: usize) -> (Lines<UnixStream>, UnixStream) {
        let (a, b) = UnixStream::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        (Lines::new(a, max_line), b)
    }

    #[test]
    fn a_line_in_two_parts_is_one_line() {
        let (mut lines, mut peer) = pair(100);
        peer.write_all(b"on").unwrap();
        assert!(matches!(lines.receive(), (got, None) if got.is_empty()));
        peer.write_all(b"e\ntwo\nthr").unwrap();
        assert_eq!(lines.receive().0, ["one", "two"]);
        assert!(lines.receive().1.is_none(), "nothing waits, and that is no error");
        drop(peer);
        assert!(matches!(lines.receive(), (_, Some(LineError::Closed))));
    }

    #[test]
    fn what_is_no_line_is_refused() {
        let (mut lines, mut peer) = pair(10);
        peer.write_all(b"good\nelevenbytes").unwrap();
        assert!(matches!(lines.receive(), (got, Some(LineError::TooLong(10))) if got == ["good"]));
        let (mut lines, mut peer) = pair(10);
        peer.write_all(b"\xff\n").unwrap();
        assert!(matches!(lines.receive().1, Some(LineError::NotText)));
    }

    #[test]
    fn a_peer_that_does_not_read_is_an_error_and_blocks_nobody() {
        let (mut lines, _peer) = pair(10);
        let line = "x".repeat(10_000);
        let error = (0..1000).find_map(|_| lines.send(&line).err());
        assert!(matches!(error, Some(LineError::Unread)), "{error:?}");
    }

    proptest! {
        #[test]
        fn lines_arrive_as_they_were_sent(
            sent in prop::collection::vec("[^\n]{0,40}", 0..20),
            cuts in prop::collection::vec(1_usize..30, 1..20),
        ) {
            let (mut lines, mut peer) = pair(200);
            let bytes = sent.iter().flat_map(|line| line.bytes().chain([b'\n'])).collect::<Vec<_>>();
            let (mut rest, mut got) = (&bytes[..], Vec::new());
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                peer.write_all(now).unwrap();
                got.extend(lines.receive().0);
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(got, sent);
        }
    }
}
