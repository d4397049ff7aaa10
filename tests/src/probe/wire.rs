//! The exec protocol: one JSON message a line, both ways, over a byte stream.
//!
//! Invariant: a line that does not parse is skipped, so that a client which connects in the middle of an old answer
//! finds its feet at the next line. Runs carry an id that their client drew; answers with an unknown id are not ours.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};

/// The exec server's port in the test host and in guests.
pub const PORT_NAME: &str = "umbra.bench";

/// The port of a guest's second exec server, for what goes on beside other scripts: a port has one client at a time.
pub const LONG_PORT_NAME: &str = "umbra.bench.long";

/// Longest line that either side accepts: a script or a chunk of output, JSON escapes included.
pub const MAX_LINE: usize = 4 << 20;

/// Client to server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Request {
    /// Are you there? Answered with the same token.
    Hello {
        /// Drawn by the client.
        token: u64,
    },
    /// Run a script with `/bin/sh`.
    Run {
        /// Drawn by the client.
        id: u64,
        /// The script's text.
        script: String,
    },
    /// Kill a run and what it started.
    Kill {
        /// Which.
        id: u64,
    },
}

/// Server to client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Reply {
    /// Answer to [`Request::Hello`].
    Hello {
        /// The request's.
        token: u64,
    },
    /// Part of a run's standard output.
    Stdout {
        /// Which run.
        id: u64,
        /// Bytes that are not UTF-8 are replaced.
        text: String,
    },
    /// Part of a run's standard error.
    Stderr {
        /// Which run.
        id: u64,
        /// Bytes that are not UTF-8 are replaced.
        text: String,
    },
    /// The run has ended; nothing more comes of it.
    Exit {
        /// Which run.
        id: u64,
        /// Exit status, or 128 + signal.
        status: i32,
    },
}

/// Writes one message as a line.
///
/// # Errors
/// What the stream says.
pub fn write_line<W: Write, M: Serialize>(mut out: W, message: &M) -> io::Result<()> {
    let mut line = serde_json::to_vec(message).map_err(io::Error::other)?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()
}

/// Splits a byte stream into lines, each at most [`MAX_LINE`] long; longer ones are dropped.
#[derive(Debug, Default)]
pub struct Lines {
    pending: Vec<u8>,
    too_long: bool,
}

impl Lines {
    /// Takes bytes, hands each complete message to `each`.
    pub fn push<M: for<'a> Deserialize<'a>>(&mut self, bytes: &[u8], mut each: impl FnMut(M)) {
        for part in bytes.split_inclusive(|&b| b == b'\n') {
            if self.pending.len() + part.len() > MAX_LINE {
                self.too_long = true;
                self.pending.clear();
            }
            if !self.too_long {
                self.pending.extend_from_slice(part);
            }
            if part.ends_with(b"\n") {
                if !self.too_long
                    && let Ok(message) = serde_json::from_slice(&self.pending)
                {
                    each(message);
                }
                self.pending.clear();
                self.too_long = false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_line_does_not_hide_the_next() {
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        lines.push(b"ell\"}\n{\"type\":\"hello\",", |m: Reply| seen.push(m));
        assert!(seen.is_empty());
        lines.push(b"\"token\":7}\n", |m: Reply| seen.push(m));
        assert_eq!(seen, [Reply::Hello { token: 7 }]);
    }

    #[test]
    fn an_endless_line_is_dropped_and_memory_bounded() {
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        for _ in 0..20 {
            lines.push(&vec![b'x'; 1 << 20], |m: Reply| seen.push(m));
            assert!(lines.pending.len() <= MAX_LINE);
        }
        lines.push(b"\n{\"type\":\"exit\",\"id\":1,\"status\":0}\n", |m: Reply| seen.push(m));
        assert_eq!(seen, [Reply::Exit { id: 1, status: 0 }]);
    }
}
